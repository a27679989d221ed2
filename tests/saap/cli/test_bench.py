"""`saap bench` and `saap compare` as a person and a workflow meet them, on bundles of a few kilobytes."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support.bench_samples import measurement, result
from support.command_line import here, refused
from support.tiny_graphs import tiny_bundle

from bench.measure.options import BenchOptions
from bench.measure.result import INVALID, Result, read_result, write_result

QUICK = ["-p", "4", "-n", "6", "-t", "1", "-r", "1", "--no-cold"]
BASE = [0.0100, 0.0101, 0.0099, 0.0102, 0.0100, 0.0098, 0.0101, 0.0100]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("bundles")
    return [tiny_bundle(root / "dense"), tiny_bundle(root / "slim", seed=1)]


def test_the_last_line_is_one_document(bundles: list[Path]) -> None:
    done = here("bench", *bundles, *QUICK, "--json", "-")
    document = json.loads(done.stdout.splitlines()[-1])
    assert [m["name"] for m in document["measurements"]] == ["dense", "slim"]
    assert "decode" in done.stdout and "slim" in done.stdout


def test_a_sweep_is_a_row_for_each_of_its_tests(bundles: list[Path], tmp_path: Path) -> None:
    sweep = ["-p", "4,0", "-n", "6", "-d", "0,3", *QUICK[4:]]
    shown = here("bench", bundles[0], *sweep, "--wide", "--format", "md", "--json", tmp_path / "r.json").stdout
    tests = [m.test for m in read_result(tmp_path / "r.json").measurements]
    assert shown.count("| dense |") == 2 * len(tests) == 8 and tests[:2] == ["tg6", "pp4+tg6"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The specs of each measurement, which has always the same times."""
    asked: list[list[str]] = []

    def measure(specs: list[str], options: BenchOptions, **_: object) -> Result:
        asked.append([Path(spec).name for spec in specs])
        names = [name if name not in asked[-1][:at] else f"{name} #2" for at, name in enumerate(asked[-1])]
        return result(*(measurement(name, BASE) for name in names))

    monkeypatch.setattr("bench.measure.measure", measure)
    return asked


def test_noise_floor_and_history(bundles: list[Path], measured: list[list[str]], tmp_path: Path) -> None:
    options = ["--noise-floor", "--history", tmp_path / "h"]
    done = here("bench", *bundles, *options, "--json", tmp_path / "r.json")
    assert "noise floor" in done.stdout and measured == [["dense", "slim", "dense"]]
    kept = read_result(tmp_path / "r.json")
    assert [m.name for m in kept.measurements] == ["dense", "slim", "dense #2"]
    (stored,) = (tmp_path / "h").glob("*.json")
    assert read_result(stored) == kept
    here("report", "--history", tmp_path / "h", "-o", tmp_path / "page.html")
    assert "History" in (tmp_path / "page.html").read_text()


def test_bundles_are_compared_live(bundles: list[Path], measured: list[list[str]], tmp_path: Path) -> None:
    done = here("compare", *bundles, "--min-effect", "0.9", "--json", tmp_path / "c.json")
    (row,) = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert (row["verdict"], row["name"], row["test"]) == ("same", "slim", "wilcoxon") and "pp8+tg4" in done.stdout
    assert measured == [["dense", "slim"]]


def test_sentences_and_one_table_unless_the_other_is_wanted(bundles: list[Path], measured: list[list[str]]) -> None:
    done = here("bench", *bundles).stdout
    assert done.splitlines()[:3] == [
        "dense decodes 100.0, slim decodes 100.0 tokens per second (pp8+tg4, 1 thread).",
        "slim is as fast as dense (1.00x).",
        "Every measurement is OK.",
    ]
    assert "prefill" in done and "warm-up" not in done
    assert "warm-up" in here("bench", *bundles, "--wide").stdout
    markdown = ("bench", *bundles, "--format", "md")
    assert [here(*markdown, *wide).stdout.count("| ---") for wide in ([], ["--wide"])] == [10, 25]


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Path]:
    """Written by hand: a base, a slower one and one that is not valid."""
    made = {
        "old": measurement("m", BASE),
        "slow": measurement("m", [1.2 * t for t in BASE]),
        "bad": measurement("m", BASE, status=INVALID, reasons=["the host swapped"]),
    }
    for name, m in made.items():
        write_result(tmp_path / f"{name}.json", result(m))
    return {name: tmp_path / f"{name}.json" for name in made}


def test_a_workflow_gets_its_files_and_exit_codes(
    results: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    outputs = ["--junit", tmp_path / "j.xml"]
    done = here("compare", results["old"], results["slow"], "--fail-on", "regression", *outputs, code=1)
    assert "slower" in done.stdout and "not confirmed" in done.stdout  # measured on another device than this
    assert ElementTree.parse(tmp_path / "j.xml").find(".//failure") is not None
    assert "slower" in (tmp_path / "summary.md").read_text()
    here("compare", results["old"], results["slow"])  # without --fail-on it only tells
    unclear = ("compare", results["old"], results["old"], "--fail-on", "regression")
    assert "cannot tell" in here(*unclear, code=3).stdout
    here(*unclear, "--min-effect", "0.5")
    assert "the host swapped" in here("compare", results["old"], results["bad"], code=3).stdout


def test_mistakes_are_one_line(bundles: list[Path], results: dict[str, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.json"
    cut.write_text(results["old"].read_text()[:-40])
    assert "is damaged" in refused("compare", cut, results["old"])
    (tmp_path / "theirs.json").write_text('[{"model_filename": "a.gguf", "n_gen": 16, "samples_ns": [10, 11]}]')
    assert "is damaged (not an object)" in refused("compare", tmp_path / "theirs.json", results["old"])
    assert "two results" in refused("compare", results["old"], bundles[0])
    assert "no runtime" in refused("compare", "mlx:/nowhere", bundles[0])
    assert "there is no " in refused("compare", tmp_path / "none.json", results["old"])
    assert "neither a number nor" in refused("bench", bundles[0], "-p", "many")
    assert "-p 512,0 -n 128,0" in refused("bench", bundles[0], "--pairs", "512,128")
    assert "cores" in refused("bench", bundles[0], "-t", "1024")
    assert "provider" in refused("bench", bundles[0], *QUICK, "--provider", "cuda")
    assert "saap report" in refused("bench", bundles[0], "--quality", tmp_path / "none.json", *QUICK)
    assert "--history" in refused("report", "-o", tmp_path / "x.html")


def test_a_run_in_which_nothing_could_be_measured(bundles: list[Path]) -> None:
    done = here("bench", bundles[0], *QUICK, "--time-limit", "0.01", code=3)
    assert "no answer within 0.01 s" in done.stdout
