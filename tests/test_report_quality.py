"""Quality on the page: tables per protocol, tasks, and quality against its price."""

from __future__ import annotations

import html
import json

import pytest
from test_report import measurement, result

from bench.headline import entries_of
from bench.pareto import Point, pareto_front
from bench.report import write_report
from bench.report_quality import sections_of, task_table, tradeoffs
from bench.store import write_result

PROTOCOL = {"text": "a.txt", "chunk": 256}


def row(name, perplexity):
    return {"name": name, "perplexity": perplexity, "nll": 3.0, "kl": None, "top1": None, "parameters": 1, "bytes": 2}


def task(model, name, acc, acc_norm=None, count=5):
    return {"model": model, "task": name, "acc": acc, "acc_stderr": 0.01, "acc_norm": acc_norm,
            "acc_norm_stderr": None if acc_norm is None else 0.02, "examples": [{}] * count}  # fmt: skip


def document(rows, protocol=PROTOCOL, tasks=()):
    return {"kind": "saap-quality", "version": 1, "protocol": protocol, "rows": rows, "tasks": list(tasks)}


def test_documents_of_one_protocol_share_a_table_and_others_never():
    sections = sections_of(
        [], {}, [document([row("a", 20.0)]), document([row("b", 21.0)]), document([row("c", 5.0)], {"chunk": 2048})]
    )
    assert [[r["name"] for r in section["rows"]] for section in sections] == [["a", "b"], ["c"]]


def test_accuracy_is_normalised_where_a_task_has_it():
    tasks = [task("m", "piqa", 0.6, 0.7), task("m", "boolq", 0.5), task("n", "piqa", 0.5, 0.4)]
    table = task_table(tasks)
    assert table["header"] == ["model", "piqa (5)", "boolq (5)", "mean"]
    assert table["rows"][0] == ["m", "70.0 % ± 2.0", "50.0 % ± 1.0", "60.0 %"]
    assert table["rows"][1][2:] == ["–", "–"]  # noqa: RUF001


def test_the_front_is_what_nothing_beats():
    points = [
        Point("cheap", 1, 30),
        Point("good", 3, 10),
        Point("beaten", 3, 20),
        Point("dear", 4, 10),
        Point("mid", 2, 15),
    ]
    assert [p.name for p in pareto_front(points, less=True)] == ["cheap", "mid", "good"]
    assert [p.name for p in pareto_front(points, less=False)] == ["cheap"]


def test_a_price_needs_two_models_with_a_quality():
    entries = entries_of([result(measurement("dense", 10.0), measurement("slim", 8.0))])
    plots = tradeoffs(entries, sections_of([], {}, [document([row("out/dense", 20.0), row("out/slim", 25.0)])]))
    assert [plot["title"] for plot in plots] == ["Quality against speed", "Quality against size"]
    assert "dense 10.00 and 20" in plots[0]["label"] and "best trade-offs: dense, slim" in plots[0]["label"]
    assert "ms per generated token" in plots[0]["svg"]
    assert tradeoffs(entries, sections_of([], {}, [document([row("dense", 20.0)])])) == []


def test_an_invalid_speed_has_no_place_in_a_trade_off():
    entries = entries_of(
        [result(measurement("dense", 10.0), measurement("slim", 8.0, status="INVALID", reasons=["x"]))]
    )
    plots = tradeoffs(entries, sections_of([], {}, [document([row("dense", 20.0), row("slim", 25.0)])]))
    assert [plot["title"] for plot in plots] == ["Quality against size"]


def test_tasks_stand_in_where_there_is_no_perplexity():
    rows = [{"name": "dense"}, {"name": "slim"}]
    tasks = [task("dense", "piqa", 0.6, 0.7), task("slim", "piqa", 0.6, 0.65)]
    entries = entries_of([result(measurement("dense", 10.0), measurement("slim", 8.0))])
    plots = tradeoffs(entries, sections_of([], {}, [document(rows, None, tasks)]))
    assert plots[0]["label"].startswith("mean accuracy, %") and "Higher is better" in plots[0]["text"]


def test_the_page_takes_files_of_bench_and_of_eval(tmp_path):
    write_result(tmp_path / "bench.json", result(measurement("dense", 10.0), measurement("slim", 8.0)))
    hostile = "<img src=x onerror=alert(1)>"
    made = document(
        [row("dense", 20.0), row("slim", 25.0)], tasks=[task("slim", "piqa", 0.6, 0.7), task(hostile, "piqa", 1)]
    )
    (tmp_path / "quality.json").write_text(json.dumps(made))
    page = write_report([tmp_path / "bench.json", tmp_path / "quality.json"], tmp_path / "page.html").read_text()
    assert "Quality against speed" in page and "70.0 % ± 2.0" in page
    assert hostile not in page and html.escape(hostile) in page


def test_a_quality_document_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "quality.json").write_text(json.dumps({**document([]), "version": 7}))
    from bench.compare_quality import QualityError

    with pytest.raises(QualityError, match="is of version 7"):
        write_report([tmp_path / "quality.json"], tmp_path / "page.html")
