"""Quality on the page: tables per protocol, and tasks."""

import dataclasses
import html
import json

from support.report_page import document, measurement, result, row, task

from bench.measure.result import write_result
from bench.report.headline import cards_of, entries_of, pair_of
from bench.report.page import report
from bench.report.quality import sections_of, task_table


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


def test_the_page_takes_files_of_bench_and_of_eval(tmp_path):
    write_result(tmp_path / "bench.json", result(measurement("dense", 10.0), measurement("slim", 8.0)))
    hostile = "<img src=x onerror=alert(1)>"
    made = document(
        [row("dense", 20.0), row("slim", 25.0)], tasks=[task("slim", "piqa", 0.6, 0.7), task(hostile, "piqa", 1)]
    )
    (tmp_path / "quality.json").write_text(json.dumps(made))
    page = report([tmp_path / "bench.json", tmp_path / "quality.json"], tmp_path / "page.html").read_text()
    assert "70.0 % ± 2.0" in page
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


def test_other_results_of_the_same_name_have_a_table_of_their_own():
    documents = [
        document([row("m", 20.0)], tasks=[task("m", "piqa", 0.7)]),
        document([row("m", 20.0)], tasks=[task("m", "piqa", 0.7), task("m", "boolq", 0.3)]),
        document([row("m", 21.0)], tasks=[task("m", "piqa", 0.3)]),
        document([row("m", 20.0)], tasks=[task("m", "piqa", 0.3)]),
    ]
    sections = sections_of([], {}, documents)
    assert [[r["perplexity"] for r in section.rows] for section in sections] == [[20.0], [21.0], [20.0]]
    assert [[r["acc"] for r in section.tasks] for section in sections] == [[0.7, 0.3], [0.3], [0.3]]


def test_a_task_whose_name_is_no_text_has_its_table():
    assert task_table([task("m", 7, 0.5)]).header == ["model", "7 (5)", "mean"]
