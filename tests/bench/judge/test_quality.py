"""Two documents of `saap eval --json`: what compares is judged pair by pair, what does not is said."""

import copy
import json
import sys

import numpy as np
import pytest
from support.command_line import here

from bench.judge import quality
from bench.judge.quality import MEAN, PERPLEXITY, QualityError, exit_code, read_quality
from bench.judge.verdict import BETTER, NOT_COMPARABLE, SAME, WORSE
from bench.judge.wording import TIMES, UNKNOWN
from bench.report import headline
from saap.base.quality import QUALITY

RANDOM = np.random.default_rng(3)  # each test has its own, see below
WINDOWS = RANDOM.normal(40.0, 8.0, 60)  # nats of windows of 11 predictions: windows differ far more than models do
PROTOCOL = {"text": "a.txt", "text_sha256": "a" * 64, "tokens_sha256": "b" * 64, "tokenizer_sha256": "c" * 64,
            "chunk": 12, "chunks": 60, "stride": 12, "bos": False, "join": "raw", "predictions": 660,
            "self_written": False}  # fmt: skip


@pytest.fixture(autouse=True)
def the_same_noise_in_every_order(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "RANDOM", np.random.default_rng(4))


def document(name="m", shift=0.0, noise=0.2, answers=None, **protocol):
    windows = WINDOWS + shift * 11 + RANDOM.normal(0, noise, 60)
    row = {"name": name, "parameters": 1, "bytes": 2, "nll": float(windows.sum() / 660), "window_nll": windows.tolist()}
    made = {
        "kind": "saap-quality",
        "version": 1,
        "protocol": {**PROTOCOL, **protocol},
        "reference": None,
        "rows": [row],
    }
    return made if answers is None else {**made, "tasks": [task(name, answers)]}


def task(model, answers, name="piqa", start=0):
    examples = [
        {"index": start + n, "target": 0, "loglikelihoods": [], "acc": float(a), "acc_norm": float(a)}
        for n, a in enumerate(answers)
    ]
    return {"model": model, "task": name, "source": "a file", "sha256": "d" * 64, "acc_norm": float(np.mean(answers)),
            "examples": examples}  # fmt: skip


def compare_quality(*documents):
    return quality.compare_quality(*map(QUALITY.convert, documents))


@pytest.mark.parametrize(("shift", "verdict"), [(0.05, WORSE), (-0.05, BETTER), (0.0, SAME)])
def test_a_difference_smaller_than_between_windows_is_seen(shift, verdict):
    [row] = compare_quality(document(), document(shift=shift))
    assert (row.what, row.verdict, row.pairs) == (PERPLEXITY, verdict, 60)
    assert row.difference == pytest.approx(shift, abs=0.01)
    assert row.low <= row.difference <= row.high


def test_the_interval_of_the_nll_is_that_of_the_normal_theory():
    old, new = document(noise=0.0), document(noise=2.0)
    [row] = compare_quality(old, new)
    differences = np.subtract(new["rows"][0]["window_nll"], old["rows"][0]["window_nll"]) / 11
    half = 1.96 * differences.std(ddof=1) / 60**0.5
    assert row.high - row.low == pytest.approx(2 * half, rel=0.1)


def test_the_ratio_of_perplexities_has_the_interval_of_the_windows():
    old, new = (document(shift=shift)["rows"][0]["window_nll"] for shift in (0.0, 0.1))
    ratio, low, high = quality.perplexity_ratio(old, new, 660)
    assert ratio == pytest.approx(np.exp(sum(new) / 660 - sum(old) / 660)) and low < ratio < high
    assert low > 1.09 and high < 1.12
    pages = [{"window_nll": windows, "nll": sum(windows) / 660} for windows in (old, new)]
    assert headline._ratio_of_windows(*pages) == f", {ratio:.2f}{TIMES} (95 % interval {low:.2f}{UNKNOWN}{high:.2f})"
    assert headline._ratio_of_windows(pages[0], {"nll": 3.0}) == ""


def test_equal_documents_are_the_same():
    one = document(answers=[1, 0] * 30)
    assert [row.verdict for row in compare_quality(one, copy.deepcopy(one))] == [SAME, SAME]


@pytest.mark.parametrize("change", [{"chunk": 2048}, {"stride": 6}, {"bos": True}, {"join": "spaces"},
                                    {"text_sha256": "e" * 64}, {"tokenizer_sha256": "e" * 64}])  # fmt: skip
def test_other_protocols_do_not_compare(change):
    [row] = compare_quality(document(), document(**change))
    assert row.verdict == NOT_COMPARABLE and row.difference is None
    assert f"the protocols differ: {next(iter(change))} " in row.reason
    assert exit_code([row], False) == 3


def test_another_name_of_the_same_text_does_compare():
    [row] = compare_quality(document(), document(text="b.txt"))
    assert row.verdict != NOT_COMPARABLE


def test_examples_are_compared_in_pairs():
    answers = RANDOM.integers(0, 2, 400)
    better = answers.copy()
    better[np.flatnonzero(answers == 0)[:12]] = 1  # 3 of 100, which 400 unpaired examples could not show
    rows = compare_quality(document(answers=answers), document(answers=better))
    piqa = rows[1]
    assert (piqa.what, piqa.verdict, piqa.pairs) == ("piqa acc_norm", BETTER, 400)
    assert piqa.difference == pytest.approx(0.03)
    assert 0 < piqa.low < 0.03 < piqa.high < 0.06


def test_the_mean_weighs_tasks_alike():
    old, new = document(answers=[0] * 100), document(answers=[1] * 100)
    for made, right in ((old, 1), (new, 0)):
        made["tasks"].append(task("m", [right] * 10, "boolq"))
    rows = {row.what: row for row in compare_quality(old, new)}
    assert rows[MEAN].difference == 0.0
    assert (rows["piqa acc_norm"].verdict, rows["boolq acc_norm"].verdict) == (BETTER, WORSE)


def test_other_examples_do_not_compare():
    old, new = document(answers=[0, 1, 1, 0]), document(answers=[0, 1, 1, 0])
    new["tasks"] = [task("m", [0, 1, 1, 0], start=1)]
    assert "other examples" in compare_quality(old, new)[1].reason
    new["tasks"][0]["sha256"] = "e" * 64
    assert "the files differ" in compare_quality(old, new)[1].reason


def test_what_one_document_alone_holds_does_not_pass():
    answers = RANDOM.random(200) < 0.6
    old, new = document(answers=answers), document(answers=answers)
    old["tasks"].append(task("m", answers, name="arc_easy"))
    new["rows"].append({**new["rows"][0], "name": "other"})
    rows = compare_quality(old, new)
    told = {(row.what, row.against or row.name): row.reason for row in rows if row.verdict == NOT_COMPARABLE}
    assert told == {("arc_easy", "m"): "only in the old document", ("model", "other"): "only in the new document"}
    assert exit_code(rows, False) == 3
    old["protocol"] = None
    assert (PERPLEXITY, "m") in {(row.what, row.against or row.name) for row in compare_quality(old, new) if row.reason}


def test_models_of_other_names_are_paired_where_it_is_clear():
    [row] = compare_quality(document("a"), document("b"))
    assert (row.against, row.name) == ("a", "b")
    two = document("b")
    two["rows"].append({**two["rows"][0], "name": "c"})
    with pytest.raises(QualityError, match="they hold a and b, c: evaluate one model per document"):
        compare_quality(document("a"), two)
    with pytest.raises(QualityError, match="nothing was evaluated as 'd': give one of b, c"):
        quality.compare_quality(*(QUALITY.convert(each) for each in (document("a"), two)), ("a", "d"))
    assert quality.compare_quality(*(QUALITY.convert(each) for each in (document("a"), two)), ("a", "c"))[0].name == "c"
    two["reference"] = "c"
    assert compare_quality(document("a"), two)[0].label == "b against a"


def test_what_is_no_such_document_is_refused(tmp_path):
    path = tmp_path / "x.json"
    good = document()
    for text, said in (("{", "is damaged"), ("[]", "is damaged .not an object"), ({**good, "kind": "x"}, "is damaged"),
                       ({**good, "version": 9}, "has quality version 9, this saap reads 1: make one with `saap eval"),
                       ({**good, "rows": [{**good["rows"][0], "name": 5}]}, r"is damaged.*rows\[0\]\.name"),
                       ({**good, "rows": [{**good["rows"][0], "nll": float("nan")}]}, "is damaged .a number is NaN"),
                       ({**good, "rows": [{**good["rows"][0], "window_nll": "x"}]}, "is damaged")):  # fmt: skip
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        with pytest.raises(QualityError, match=said):
            read_quality(path)


@pytest.mark.parametrize("value", [None, [1.0]])
def test_a_damaged_document_is_one_line(value):
    broken = document()
    for row in broken["rows"]:
        row["window_nll"] = value
    with pytest.raises(QualityError, match="damaged"):
        compare_quality(document(), broken)


def test_from_the_command_line(tmp_path):
    files = []
    for name, made in (("old", document()), ("new", document(shift=0.2)), ("other", document(chunk=9))):
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(made))
    old, new, other = files
    assert "worse" in here("compare", old, new).stdout
    here("compare", old, new, "--fail-on", "regression", "--json", tmp_path / "verdict.json", code=1)
    assert json.loads((tmp_path / "verdict.json").read_text())["rows"][0]["verdict"] == "worse"
    assert "the protocols differ: chunk 12 against 9" in here("compare", old, other, code=3).stdout
    (tmp_path / "bench.json").write_text("{}")
    assert "give two of a kind" in here("compare", old, tmp_path / "bench.json", code=2).stderr


def test_what_is_no_number_never_passes():
    broken = document()
    broken["rows"][0]["window_nll"][3] = broken["rows"][0]["nll"] = float("nan")
    [row] = compare_quality(document(), broken)
    assert row.verdict == NOT_COMPARABLE and "NaN or infinite" in row.reason
    assert exit_code([row], fail_on_regression=True) == 3


def test_one_pair_tells_nothing():
    old, new = (copy.deepcopy(document()) for _ in range(2))
    for made, nll in ((old, 6.0), (new, 6.00001)):
        made["rows"][0] |= {"nll": nll, "window_nll": [11 * nll]}
    [row] = compare_quality(old, new)
    assert row.verdict == NOT_COMPARABLE and "no interval" in row.reason
    old, new = (document(answers=answers) for answers in ([1], [0]))
    old["tasks"].append(task("m", [1, 0, 1], "boolq"))
    new["tasks"].append(task("m", [1, 1, 1], "boolq"))
    verdicts = {row.what: row.verdict for row in compare_quality(old, new)}
    assert verdicts["piqa acc_norm"] == verdicts[MEAN] == NOT_COMPARABLE and verdicts["boolq acc_norm"] == SAME
