"""Quality on the page: tables per protocol, tasks, and quality against its price."""

from __future__ import annotations

import dataclasses
import html
import json

from support.report_page import document, measurement, result, row, task

from bench.measure.result import Bursts, Load, write_result
from bench.report import report
from bench.report.headline import cards_of, entries_of, pair_of
from bench.report.quality import Point, pareto_front, sections_of, task_table, tradeoffs


def test_documents_of_one_protocol_share_a_table_and_others_never():
    sections = sections_of(
        [], {}, [document([row("a", 20.0)]), document([row("b", 21.0)]), document([row("c", 5.0)], {"chunk": 2048})]
    )
    assert [[r["name"] for r in section.rows] for section in sections] == [["a", "b"], ["c"]]


def test_accuracy_is_normalised_where_a_task_has_it():
    tasks = [task("m", "piqa", 0.6, 0.7), task("m", "boolq", 0.5), task("n", "piqa", 0.5, 0.4)]
    table = task_table(tasks)
    assert table.header == ["model", "piqa (5)", "boolq (5)", "mean"]
    assert table.rows[0] == ["m", "70.0 % ± 2.0", "50.0 % ± 1.0", "60.0 %"]
    assert table.rows[1][2:] == ["–", "–"]  # noqa: RUF001


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
    assert [plot.title for plot in plots] == ["Quality against speed"]
    assert "dense 10.00 and 20" in plots[0].label and "best trade-offs: dense, slim" in plots[0].label
    assert "ms per generated token" in plots[0].svg
    assert tradeoffs(entries, sections_of([], {}, [document([row("dense", 20.0)])])) == []


def test_another_runtime_is_a_point_and_not_the_headline():
    peer = measurement("dense-Q4_0 (llama.cpp)", 9.0, spec="llama.cpp:out/dense-Q4_0.gguf", kind="llama.cpp")
    entries = entries_of([result(measurement("dense", 10.0), measurement("slim", 8.0), peer)])
    rows = [row("dense", 20.0), row("slim", 25.0), row("dense-Q4_0 (llama.cpp)", 21.0)]
    plots = tradeoffs(entries, sections_of([], {}, [document(rows)]))
    assert "dense-Q4_0 (llama.cpp) 9.00 and 21" in plots[0].label
    assert [entry.name for entry in pair_of(entries)] == ["dense", "slim"]


def test_an_invalid_speed_has_no_place_in_a_trade_off():
    entries = entries_of(
        [result(measurement("dense", 10.0), measurement("slim", 8.0, status="INVALID", reasons=["x"]))]
    )
    assert tradeoffs(entries, sections_of([], {}, [document([row("dense", 20.0), row("slim", 25.0)])])) == []


def test_turns_tell_a_speed_where_the_clock_moves():
    moved = {"status": "INVALID", "reasons": ["the clock moved"]}
    told = [measurement(name, 10.0, **moved) for name in ("dense", "slim", "other")]
    loads = [Load([0, 1], [[0.1], [0.1]], [[0.010 * clock], [0.008 * clock]]) for clock in (1.0, 1.3)]
    loads += [Load([1, 0], [[0.1], [0.1]], [[0.010 * clock], [0.008 * clock]]) for clock in (1.1, 0.9)]
    entries = entries_of([result(*told, bursts=[Bursts(["dense", "slim"], 128, 16, 0, 1, loads)])])
    rows = [row("dense", 20.0), row("slim", 25.0), row("other", 24.0)]
    (plot,) = tradeoffs(entries, sections_of([], {}, [document(rows)]))
    assert plot.title == "Quality against speed" and "The clock moved" in plot.text
    assert "against time per generated token, dense = 1: dense 1.00 and 20.000; slim 0.80 and 25.000;" in plot.label


def test_tasks_stand_in_where_there_is_no_perplexity():
    rows = [{"name": "dense"}, {"name": "slim"}]
    tasks = [task("dense", "piqa", 0.6, 0.7), task("slim", "piqa", 0.6, 0.65)]
    entries = entries_of([result(measurement("dense", 10.0), measurement("slim", 8.0))])
    plots = tradeoffs(entries, sections_of([], {}, [document(rows, None, tasks)]))
    assert plots[0].label.startswith("mean accuracy, %") and "Higher is better" in plots[0].text


def test_the_page_takes_files_of_bench_and_of_eval(tmp_path):
    write_result(tmp_path / "bench.json", result(measurement("dense", 10.0), measurement("slim", 8.0)))
    hostile = "<img src=x onerror=alert(1)>"
    made = document(
        [row("dense", 20.0), row("slim", 25.0)], tasks=[task("slim", "piqa", 0.6, 0.7), task(hostile, "piqa", 1)]
    )
    (tmp_path / "quality.json").write_text(json.dumps(made))
    page = report([tmp_path / "bench.json", tmp_path / "quality.json"], tmp_path / "page.html").read_text()
    assert "Quality against speed" in page and "70.0 % ± 2.0" in page
    assert hostile not in page and html.escape(hostile) in page


def measured(*specs):
    """A bench of paths, as `saap bench` names them: by the last part, numbered where that is not one model's."""
    made = []
    for path in specs:
        name = path.rpartition("/")[2]
        again = sum(each.name.partition(" ")[0] == name for each in made)
        named = name if not again else f"{name} #{again + 1}"
        made.append(dataclasses.replace(measurement(named, 10.0 - len(made)), spec=path))
    return result(*made)


def card(document, rows):
    return {each.title: each for each in cards_of(pair_of(entries_of([document])), rows)}["Quality"]


def test_the_headline_is_of_the_models_that_were_timed():
    bench = measured("out/dense-int4", "out/slim-int4")
    rows = [row("out/slim-int4", 25.0), row("out/dense-int4", 20.0), row("out/other", 99.0)]
    told = card(bench, rows)
    assert (told.value, told.ratio) == ("25.0", "1.25\u00d7")
    assert [name for name, _ in told.rows] == ["out/dense-int4", "out/slim-int4"]
    alone = card(bench, [row("out/slim-int4", 25.0), row("out/other", 99.0)])  # the dense one was not evaluated
    assert (alone.value, alone.ratio) == ("25.0", None)


def test_models_whose_folders_share_a_name_are_kept_apart():
    bench = measured("dense", "a/bundle", "b/bundle")
    section = sections_of([], {}, [document([row("a/bundle", 20.0), row("b/bundle", 25.0), row("dense", 15.0)])])
    told = tradeoffs(entries_of([bench]), section)[0].label
    assert "dense 10.00 and 15.000" in told and "bundle 9.00 and 20.000" in told and "bundle #2 8.00 and 25.000" in told
    elsewhere = sections_of([], {}, [document([row("c/bundle", 20.0), row("d/bundle", 25.0), row("x/dense", 15.0)])])
    assert tradeoffs(entries_of([bench]), elsewhere) == []  # which bundle is which is not known


def test_a_document_of_tasks_alone_takes_no_headline(tmp_path):
    write_result(tmp_path / "bench.json", measured("dense", "slim"))
    tasks = {**document([row("dense", None)], protocol=None), "tasks": [task("dense", "piqa", 0.7)]}
    for name, made in (("tasks", tasks), ("quality", document([row("dense", 20.0), row("slim", 25.0)]))):
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    paths = [tmp_path / f"{name}.json" for name in ("bench", "tasks", "quality")]
    page = html.unescape(report(paths, tmp_path / "page.html").read_text())
    assert "1.25\u00d7" in page


def test_tasks_on_other_examples_have_a_table_of_their_own():
    def asked(model, acc, sha256, count):
        return {**task(model, "piqa", acc), "sha256": sha256, "examples": [{"index": n} for n in range(count)]}

    made = [
        document([row("dense", None)], {}, [asked("dense", 0.7, "a" * 64, 9)]),
        document([row("slim", None)], {}, [asked("slim", 0.5, "b" * 64, 9)]),
        document([row("few", None)], {}, [asked("few", 0.5, "a" * 64, 4)]),
        document([row("also", None)], {}, [asked("also", 0.6, "a" * 64, 9)]),
    ]
    tables = [section.task_table.rows for section in sections_of([], {}, made)]
    assert [[cells[0] for cells in rows] for rows in tables] == [["dense", "also"], ["slim"], ["few"]]


def test_what_is_called_alike_and_differs_is_numbered():
    (section,) = sections_of(
        [],
        {},
        [
            document([row("m", 20.0)], tasks=[task("m", "piqa", 0.7)]),
            document([row("m", 20.0)], tasks=[task("m", "piqa", 0.7)]),
            document([row("m", 21.0)], tasks=[task("m", "piqa", 0.3)]),
            document([row("m", 22.0)], tasks=[task("m", "boolq", 0.3)]),
        ],
    )
    assert [(r["name"], r["perplexity"]) for r in section.rows] == [("m", 20.0), ("m #2", 21.0), ("m #3", 22.0)]
    assert [(r["model"], r["task"], r["acc"]) for r in section.tasks] == [
        ("m", "piqa", 0.7), ("m #2", "piqa", 0.3), ("m #3", "boolq", 0.3),
    ]  # fmt: skip


def test_a_task_whose_name_is_no_text_has_its_table():
    assert task_table([task("m", 7, 0.5)]).header == ["model", "7 (5)", "mean"]
