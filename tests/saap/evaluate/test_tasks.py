"""Zero-shot tasks: files read and checked, the harness's prompts, and its numbers with its own model class."""

import json
from pathlib import Path

import pytest
from support.command_line import here, last_line

from saap.base.errors import UserError
from saap.evaluate.evaluation import continuation_model, subjects_of
from saap.evaluate.options import EvalOptions
from saap.models.checkpoint import load_model
from saap.models.resolve import load_tokenizer

lm_eval = pytest.importorskip("lm_eval")

from saap.evaluate.tasks import FIELDS, PROMPTS, _check_kind, drawn, find_task, run_tasks, task_files  # noqa: E402

WORDS = ("cat", "mat", "dog", "day", "night", "home", "by", "all", "saw", "ran", "while", "how")
ROWS = {
    "piqa": {"question": "how to sit", "choices": ["on a mat", "on a dog"], "label": 0},
    "arc_easy": {"question": "who ran?", "choices": ["cat", "dog", "we all saw"], "label": 1},
    "arc_challenge": {"question": "who ran?", "choices": ["the cat", "the dog", "it", "they"], "label": 1},
    "openbookqa": {"question": "they went", "choices": ["home", "by day", "to it", "on"], "label": 0},
    "boolq": {"context": "the cat sat", "question": "did the cat sit", "choices": ["no", "yes"], "label": 1},
    "hellaswag": {"context": "sit: the cat [header] a [title] sat", "choices": ["on a mat", "[step] ran"], "label": 0},
    "winogrande": {"sentence": "the dog and the cat ran, _ was first.", "option1": "cat", "option2": "dog", "label": 1},
}


def write(folder, name, rows):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def some_rows(name, count):
    """Examples of a task's form, each with another text."""
    return [
        json.loads(json.dumps(ROWS[name]).replace("the cat", f"the {WORDS[n % len(WORDS)]} {WORDS[n % 7]}"))
        for n in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    for name in ROWS:
        write(tmp_path / "tasks", name, some_rows(name, 12))
    return tmp_path / "tasks"


def run(path, options):
    return run_tasks(str(path), model_of(path), options, None)


def model_of(path):
    (_, [subject]) = subjects_of([path], None, None)
    return continuation_model(subject)


def test_every_task_gives_what_the_harness_gives_with_its_own_class(tiny_model, folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    directory, options = tiny_model(max_position_embeddings=256), EvalOptions(tasks=tuple(FIELDS), task_dir=folder)
    rows = run(directory, options)
    theirs = simple_evaluate(
        model=HFLM(load_model(directory), tokenizer=load_tokenizer(directory), device="cpu", batch_size=3),
        tasks=[file.config() for file in task_files(options)],
        task_manager=TaskManager(include_defaults=False),
    )
    assert {row.task for row in rows} == set(FIELDS)
    for row in rows:
        expected = theirs["results"][row.task]
        assert row.acc == expected["acc,none"]
        assert row.acc_stderr == pytest.approx(expected["acc_stderr,none"])
        assert row.acc_norm == expected.get("acc_norm,none")
        samples = sorted(theirs["samples"][row.task], key=lambda sample: sample["doc_id"])
        assert len(row.examples) == 12
        for ours, sample in zip(row.examples, samples, strict=True):
            assert ours.loglikelihoods == pytest.approx([answer[0] for answer in sample["filtered_resps"]], abs=1e-3)
            assert ours.acc == bool(sample["acc"])


def test_a_bundle_chooses_as_its_model(tiny_model, folder, tmp_path):
    from support.exported import export_bundle

    directory = tiny_model()
    export_bundle(directory, tmp_path / "bundle", bits=32)
    options = EvalOptions(tasks=("piqa", "arc_easy", "winogrande"), task_dir=folder)
    for ours, theirs in zip(run(tmp_path / "bundle", options), run(directory, options), strict=True):
        assert ours.acc == theirs.acc
        for one, other in zip(ours.examples, theirs.examples, strict=True):
            assert one.loglikelihoods == pytest.approx(other.loglikelihoods, abs=1e-3)


def test_the_examples_that_are_drawn_depend_on_the_seed_alone():
    assert drawn("piqa", 12, None, 3) == list(range(12)) == drawn("piqa", 12, 50, 3)
    assert drawn("piqa", 12, 5, 3) == drawn("piqa", 12, 5, 3) != drawn("piqa", 12, 5, 4)
    assert len(set(drawn("piqa", 12, 5, 3))) == 5


def test_a_row_names_its_examples(tiny_model, folder):
    [row] = run(tiny_model(), EvalOptions(tasks=("piqa",), task_dir=folder, max_examples=4, seed=1))
    assert [example.index for example in row.examples] == drawn("piqa", 12, 4, 1)
    assert row.examples_of == 12
    for example in row.examples:
        likelihoods = example.loglikelihoods
        assert example.acc == (likelihoods.index(max(likelihoods)) == example.target)


def test_the_prompts_are_the_harness_s(folder):
    """Against the templates in its own files, filled with the same text under its names."""
    import yaml
    from jinja2 import Template

    class Loader(yaml.SafeLoader):
        """Functions stay names."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    home = Path(lm_eval.__file__).parent / "tasks"
    files = {
        "piqa": "piqa/piqa.yaml", "arc_easy": "arc/arc_easy.yaml", "openbookqa": "openbookqa/openbookqa.yaml",
        "boolq": "super_glue/boolq/default.yaml", "hellaswag": "hellaswag/hellaswag.yaml",
    }  # fmt: skip
    row = {"question": "who", "context": "where"}
    names = {"goal": "who", "question_stem": "who", "passage": "where", "query": "where", "question": "who"}
    for name, path in files.items():
        template = yaml.load((home / path).read_text(), Loader)["doc_to_text"]
        template = template if "{{" in template else f"{{{{{template}}}}}"
        assert Template(PROMPTS[name]).render(row) == Template(template).render(names)
    assert PROMPTS["arc_challenge"] == PROMPTS["arc_easy"]


def test_hellaswag_is_cleaned_as_the_harness_does_it(folder):
    import importlib.util

    source = Path(lm_eval.__file__).parent / "tasks/hellaswag/utils.py"
    spec = importlib.util.spec_from_file_location("hellaswag_utils", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    row = find_task("hellaswag", folder).rows[0]
    raw = some_rows("hellaswag", 1)[0]
    assert row["context"] == module.preprocess(raw["context"])
    assert row["choices"] == [module.preprocess(choice) for choice in raw["choices"]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"choices": ["one"]}, "choices must be a list of two or more"),
        ("piqa", {"label": 2}, "label 2 must count the 2 choices from 0"),
        ("piqa", {"label": True}, "label True must count"),
        ("arc_easy", {"question": " "}, "question is no text"),
        ("winogrande", {"sentence": "no gap"}, "one _ where an option goes"),
        ("boolq", {"context": None}, "context is no text"),
        ("piqa", {"question": "half \ud83d"}, "question is no text"),
        ("arc_easy", {"choices": ["a", "half \udc00"]}, "choices must be"),
        ("hellaswag", {"choices": ["on", "[step]"]}, "choices must be"),
        ("hellaswag", {"context": "[header]"}, "context is no text"),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, name, change, message):
    write(tmp_path / "t", name, [ROWS[name], {**ROWS[name], **change}])
    with pytest.raises(UserError, match=f"{name}_test.jsonl line 2.*{message}"):
        find_task(name, tmp_path / "t")


def test_a_context_of_digits_is_a_context(tiny_model, tmp_path):
    rows = [{**row, "context": str(40 + n)} for n, row in enumerate(some_rows("hellaswag", 3))]
    write(tmp_path / "t", "hellaswag", rows)
    (row,) = run(tiny_model(), EvalOptions(tasks=("hellaswag",), task_dir=tmp_path / "t"))
    assert len(row.examples) == 3


def test_a_task_that_is_not_judged_by_accuracy_is_refused(folder):
    from lm_eval.tasks import TaskManager, get_task_dict

    config = find_task("piqa", folder).config()
    tasks = dict(get_task_dict([config], TaskManager(include_defaults=False)))
    _check_kind(tasks)
    config["metric_list"] = [{"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}]
    with pytest.raises(UserError, match="piqa is not judged by accuracy but by mcc"):
        _check_kind(dict(get_task_dict([config], TaskManager(include_defaults=False))))
    with pytest.raises(UserError, match="group is no multiple-choice task"):
        _check_kind({"group": tasks})


def test_a_model_that_gives_no_numbers_is_refused(tiny_model, folder):
    def broken(progress):
        made = model_of(tiny_model())(progress)
        whole = made.score
        made.score = lambda groups: ([(float("nan"), False) for _ in told] for told in whole(groups))
        return made

    with pytest.raises(UserError, match="likelihoods that are no numbers"):
        run_tasks("broken", broken, EvalOptions(tasks=("piqa",), task_dir=folder), None)


def test_what_was_measured_is_kept_before_it_is_shown(tiny_model, folder, tmp_path, monkeypatch):
    from saap.cli import eval as eval_command

    def broken(document):
        raise UserError("the screen is broken")

    monkeypatch.setattr(eval_command, "show_tasks", broken)
    out = tmp_path / "quality.json"
    here("eval", tiny_model(), "--tasks", "piqa", "--task-dir", folder, "--json", out, code=2)
    assert len(json.loads(out.read_text())["tasks"]) == 1
    done = here("eval", tiny_model(), "--tasks", "piqa", "--task-dir", folder, "--json", tmp_path, code=2)
    assert "is a directory: give the name of a file" in last_line(done)


def test_a_model_that_is_done_is_kept_when_the_next_one_fails(tiny_model, folder, tmp_path, monkeypatch):
    from saap.evaluate import tasks

    whole, seen = tasks.run_tasks, []

    def second_fails(*arguments):
        seen.append(arguments)
        if len(seen) == 2:
            raise UserError("no memory left")
        return whole(*arguments)

    monkeypatch.setattr(tasks, "run_tasks", second_fails)
    out, first, second = tmp_path / "quality.json", tiny_model(), tiny_model("other", seed=1)
    here("eval", first, second, "--tasks", "piqa", "--task-dir", folder, "--json", out, code=2)
    assert [row["model"] for row in json.loads(out.read_text())["tasks"]] == [str(first)]


def test_what_is_no_task_is_refused(folder, tmp_path):
    write(tmp_path / "less", "piqa", [{"question": "who"}])
    write(tmp_path / "one", "piqa", some_rows("piqa", 1))
    (folder / "piqa.jsonl").write_text("{}")
    for name, place, message in (
        ("mmlu", folder, "no task 'mmlu' from files: choose among boolq, piqa"),
        ("piqa", folder / "nothing", "is no folder"),
        ("piqa", folder, r"piqa needs one file .* piqa.jsonl, piqa_test.jsonl is there"),
        ("piqa", tmp_path / "less", r"line 1 lacks choices, label: piqa needs question, choices, label"),
        ("piqa", tmp_path / "one", r"piqa_test.jsonl holds one example: give 2 or more"),
    ):
        with pytest.raises(UserError, match=message):
            find_task(name, place)


def test_from_the_command_line_to_the_document(tiny_model, folder, tmp_path):
    directory, out = tiny_model(), tmp_path / "quality.json"
    done = here("eval", directory, "--tasks", "piqa,boolq", "--task-dir", folder, "--max-examples", 6, "--json", out)
    assert "zero-shot, 6 examples each (seed 0)" in done.stdout and "%" in done.stdout
    document = json.loads(out.read_text())
    assert document["protocol"] is None and document["max_examples"] == 6
    assert [row["task"] for row in document["tasks"]] == ["boolq", "piqa"]
    done = here("eval", directory, "--task-dir", folder, code=2)
    assert "--task-dir is for --tasks: leave it out, or name some" in done.stderr


def test_a_data_set_that_cannot_be_had_is_one_line(tiny_model, monkeypatch):
    import datasets
    from lm_eval.tasks import TaskManager

    from saap.evaluate import tasks

    def unreachable(**_):
        raise ConnectionError("no route")

    def one_folder(include_defaults):
        """The harness's piqa alone: to read the files of all its tasks takes long."""
        assert include_defaults
        return TaskManager(include_defaults=False, include_path=str(Path(lm_eval.__file__).parent / "tasks/piqa"))

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(tasks, "TaskManager", one_folder)
    said = here("eval", tiny_model(), "--tasks", "piqa", code=2).stderr
    assert "the data of piqa cannot be downloaded (ConnectionError)" in said and "--task-dir" in said
    assert "no task piqqa" in here("eval", tiny_model(), "--tasks", "piqqa", code=2).stderr
