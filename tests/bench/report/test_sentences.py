import pytest
from support.bench_samples import measurement, result

from bench.measure.result import INVALID, WARN
from bench.report.sentences import sentences

BASE = [0.0100, 0.0101, 0.0099, 0.0102, 0.0100, 0.0098, 0.0101, 0.0100]


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.8, "slim is faster than dense (1.25x)."),
        (1.25, "slim is slower than dense (0.80x)."),
        (1.0, "slim is as fast as dense (1.00x)."),
    ],
)
def test_which_model_is_faster(factor, words):
    slim = measurement("slim", [factor * value for value in BASE])
    assert sentences(result(measurement("dense", BASE), slim))[1] == words


def test_a_sweep_is_summed_up_by_its_first_setting():
    rows = [measurement(name, BASE, n_threads=count) for count in (1, 2) for name in ("dense", "slim")]
    speeds, compared, _ = sentences(result(*rows))
    assert speeds == "dense decodes 100.0, slim decodes 100.0 tokens per second (pp8+tg4, 1 thread)."
    assert compared == "slim is as fast as dense (1.00x)."


def test_a_prompt_alone_and_nothing_at_all():
    prompt = measurement("dense", BASE, n_gen=0)
    assert sentences(result(prompt)) == [
        "dense reads 400.0 prompt tokens per second (pp8, 1 thread).",
        "There is no second model to compare with.",
        "Every measurement is OK.",
    ]
    lost = measurement("lost", [], status=INVALID, reasons=["the worker died"])
    assert sentences(result(lost))[0] == "Nothing was measured."


def test_doubt_is_counted():
    rows = [measurement("a", BASE, status=WARN), measurement("b", BASE, status=INVALID), measurement("c", BASE)]
    _, compared, status = sentences(result(*rows))
    assert compared.startswith("b does not compare with a, c is as fast as a")
    assert status == "WARN or INVALID marks 2 of 3 measurements, for the reasons below the table."
    assert sentences(result(rows[0], rows[2]))[2].startswith("WARN marks 1 of 2 measurements, for")
