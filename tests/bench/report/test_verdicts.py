import xml.etree.ElementTree as ElementTree

from bench.judge.comparison import Comparison
from bench.judge.verdict import FASTER, NOT_COMPARABLE, SAME, SLOWER, Verdict
from bench.report.verdicts import comparison_json, comparison_junit, step_summary

HOSTILE = "a|b <i>&\"']]> [x](y)\x07\x00\ud800\n\u2028"
NUMBERS = {
    "what": "decode",
    "setting": "pp8+tg4",
    "ratio": 1.05,
    "low": 1.03,
    "high": 1.07,
    "p_value": 0.001,
    "test": "wilcoxon",
}
COMPARISON = Comparison(
    0.02,
    [
        Verdict(SAME, name="dense", **NUMBERS),
        Verdict(SLOWER, name="slim", confirmed=True, **NUMBERS),
        Verdict(NOT_COMPARABLE, name=HOSTILE, n_threads=2, setting="pp8+tg4", reason=HOSTILE),
        Verdict(FASTER, name="fast", **NUMBERS),
    ],
)


def test_junit_counts_failures_and_errors() -> None:
    suite = ElementTree.fromstring(comparison_junit(COMPARISON).encode()).find("testsuite")
    assert suite is not None
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["4", "1", "1", "0"]
    same, slower, refused, _ = suite.findall("testcase")
    assert same.get("name") == "dense, pp8+tg4, 1 thread"
    assert [child.tag for child in same] == ["system-out"]
    failure = slower.find("failure")
    assert failure is not None
    told = "decode: slower, 0.952x as fast (95 %: 0.935 to 0.971, p = 0.001, wilcoxon)"
    assert failure.get("message") == f"{told}, confirmed by another run"
    error = refused.find("error")
    assert error is not None and error.text == "not comparable, a|b <i>&\"']]> [x](y)???\n\u2028"


def test_the_document_says_both_times_and_speeds() -> None:
    document = comparison_json(COMPARISON)
    (row, *_) = document["rows"]  # type: ignore[misc]
    assert document["schema"] == 2 and (row["ratio"], round(row["speed"], 3)) == (1.05, 0.952)


def test_step_summary_is_a_table_with_the_slower_rows_first() -> None:
    lines = step_summary(COMPARISON).splitlines()
    assert lines[0] == "### saap compare: 1 same, 1 slower, 1 not comparable, 1 faster"
    table = [line for line in lines if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| slower", "| not comparable", "| same", "| faster"]
    assert len({line.count("|") for line in table}) == 1
    assert "| 0.952x | 0.935 to 0.971 | 0.001 |" in table[2]
    assert "a&#124;b &lt;i&gt;&amp;" in table[3] and "<i>" not in "".join(lines)
    assert lines[-1] == "Changes below 2 % do not count; below 1x is slower."
    step_summary(COMPARISON).encode()
