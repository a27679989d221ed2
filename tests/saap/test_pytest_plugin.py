"""The plugin in suites of their own."""

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from support.bench_samples import instant_workers
from support.tiny_graphs import tiny_bundle

from bench.judge.baselines import NoBaselineError, write_baseline
from bench.judge.regression import record
from bench.measure.options import BenchOptions
from bench.measure.run import measure
from bench.remote.options import BoardOptions
from bench.remote.target import Target
from saap.pytest_plugin import Device

pytest_plugins = ["pytester"]

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SUITE = """
import pytest

def test_plain():
    pass

@pytest.mark.device
def test_marked_by_somebody_else():
    pass

def test_on_the_device(saap_device):
    assert saap_device.measure("tiny", prompt=4, generate=4, threads=1, repetitions=1).measurements[0].samples

def test_against_the_baseline(saap_device):
    verdict = saap_device.check("tiny", min_effect=0.9)
    assert {check.what for check in verdict.checks} >= {"decode", "greedy tokens", "NLL"}
"""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """A suite runs in this process, which then forgets what that was the first to import; scipy can be loaded once."""
    import scipy.stats  # noqa: F401


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the other plugins here take long to import
    pytester.makepyfile(SUITE)
    return pytester


def ran(suite: pytest.Pytester, *options: str) -> pytest.RunResult:
    return suite.runpytest_inprocess("-p", "saap.pytest_plugin", "-rs", "--strict-markers", *options)


def test_without_a_device_they_are_skipped_and_others_are_not(suite: pytest.Pytester) -> None:
    done = ran(suite)
    done.assert_outcomes(passed=2, skipped=2)
    done.stdout.fnmatch_lines(["*no device: name one with --saap-device*"])


def test_the_mark_selects_them(suite: pytest.Pytester) -> None:
    ran(suite, "-m", "not device").assert_outcomes(passed=1, deselected=3)


def test_on_this_host_against_a_baseline(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    instant_workers(monkeypatch)  # the answers are a real model's
    bundle = tiny_bundle(suite.path / "tiny")
    plan = BenchOptions(prompt=4, generate=4, threads=1, repetitions=3, cold=False, text=tuple(range(3, 23)))
    write_baseline(suite.path / "kept", record("tiny", lambda p: measure([str(bundle)], p), plan))
    ran(suite, "--saap-device", "local", "--saap-baselines", "kept").assert_outcomes(passed=4)
    tiny_bundle(bundle, seed=1)
    done = ran(suite, "--saap-device", "local", "--saap-baselines", "kept", "-k", "against_the_baseline")
    done.assert_outcomes(failed=1, deselected=3)
    done.stdout.fnmatch_lines(["*greedy tokens: worse, token 1 of 16*"])


@pytest.mark.parametrize(("bundle", "name"), [("some/tiny", "tiny"), ("some/tiny@llama.cpp", "tiny-llama.cpp")])
def test_a_bundle_has_the_name_that_the_commands_give_it(tmp_path: Path, bundle: str, name: str) -> None:
    tiny_bundle(tmp_path / "some/tiny")
    with pytest.raises(NoBaselineError, match=f"no baseline of {name}:"):
        Device(Target("ssh://board", BoardOptions()), tmp_path, 1.0).check(tmp_path / bundle)


def test_no_baseline_says_how_to_make_one(suite: pytest.Pytester) -> None:
    tiny_bundle(suite.path / "tiny")
    done = ran(suite, "--saap-device", "local", "-k", "against_the_baseline")
    done.stdout.fnmatch_lines(["*NoBaselineError*devices/baselines holds no baseline of tiny: record one*"])


def test_an_installation_brings_it() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    ((name, value),) = declared.items()
    plugin = EntryPoint(name, value, "pytest11").load()
    assert plugin.pytest_addoption and plugin.saap_device


def test_what_names_no_board_is_refused(suite: pytest.Pytester) -> None:
    done = ran(suite, "--saap-device", "telnet://board")
    done.assert_outcomes(passed=2, errors=2)
    done.stdout.fnmatch_lines(["*--saap-device: 'telnet://board' names no board*"])


def test_in_a_project_whose_bench_hides_ours_only_tests_of_devices_end(pytester: pytest.Pytester) -> None:
    pytester.mkpydir("bench")
    pytester.makepyfile("def test_plain():\n    import bench\n\ndef test_device(saap_device):\n    pass")
    plain = pytester.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "plain")
    plain.assert_outcomes(passed=1, deselected=1)
    done = pytester.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--saap-device", "local")
    done.assert_outcomes(passed=1, errors=1)
    done.stdout.fnmatch_lines(["*the package 'bench' is *bench/__init__.py, not the one of saap: *"])
