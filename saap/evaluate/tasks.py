"""Zero-shot tasks by lm-evaluation-harness, with a model directory or a bundle as its model.

The harness puts the questions, compares the choices' likelihoods and counts; what it asks of a model is answered by
:mod:`saap.evaluate.continuations`, which reads what the choices of a question share once.

Questions come from the harness's own data sets, or from files: seven multiple-choice tasks with the harness's prompts,
so the numbers compare with published ones. A file is .jsonl, .json or either with .gz; ``label`` counts ``choices``
from 0. The fields of each task are in :data:`FIELDS`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

from lm_eval.api import task as harness_task
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager, get_task_dict
from transformers import PreTrainedTokenizerBase

from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.base.quality import TaskExample, TaskScore
from saap.evaluate.continuations import Group, Likelihood, Scorer
from saap.evaluate.options import EvalOptions
from saap.text.documents import is_unicode, load_rows
from saap.text.encoding import encode

Request = tuple[tuple[str, str], list[int], list[int]]  # texts, context ids, tail ids, as the harness hands them over
Row = dict[str, object]  # an example of a file

# Of each task the fields that a row must have, beside ``label``.
FIELDS = {
    "boolq": ("context", "question", "choices"),
    "piqa": ("question", "choices"),
    "hellaswag": ("context", "choices"),
    "winogrande": ("sentence", "option1", "option2"),
    "arc_easy": ("question", "choices"),
    "arc_challenge": ("question", "choices"),
    "openbookqa": ("question", "choices"),
}

# The harness's prompts (lm_eval/tasks/*/*.yaml) in terms of these fields; a test holds them equal.
PROMPTS = {
    "boolq": "{{context}}\nQuestion: {{question}}?\nAnswer:",
    "piqa": "Question: {{question}}\nAnswer:",
    "hellaswag": "{{context}}",
    "arc_easy": "Question: {{question}}\nAnswer:",
    "arc_challenge": "Question: {{question}}\nAnswer:",
    "openbookqa": "{{question}}",
}


class Sample(TypedDict, total=False):
    """The harness's result for one example."""

    doc_id: int
    target: int
    filtered_resps: list[Likelihood]
    acc: float
    acc_norm: float


class Results(TypedDict):
    """The harness's results by task."""

    results: dict[str, dict[str, float]]
    samples: dict[str, list[Sample]]


class ContinuationModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A model of the harness that only weighs continuations; ``score`` says how likely they are.

    ``tokenizer`` is of the model's output; ``reader`` of its input, where that has more tokens.
    """

    def __init__(
        self,
        score: Scorer,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        progress: Progress | None = None,
        reader: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.score, self.tokenizer, self.max_length, self.progress = score, tokenizer, max_length, progress
        self.reader = reader

    @property
    def eot_token_id(self) -> int:
        """The token that stands for an empty context where there is no beginning-of-sequence token."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "a question begins with nothing, and this tokenizer has no token to begin with: mend its file"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them unless told, and never a second beginning."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        return encode(string, self.tokenizer, add_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a question in the input's tokens, and of an answer in the output's."""
        ids, tail = super()._encode_pair(context, continuation)
        if self.reader is not None:
            asked = context.rstrip()  # the harness has the spaces behind it belong to the answer
            first = self.tokenizer.bos_token
            ids = encode(asked, self.reader, not (first and asked.startswith(first)))
        return ids, tail

    def loglikelihood(self, requests: list[object], disable_tqdm: bool = False) -> list[Likelihood]:
        """Without the harness's own bar."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(self, requests: list[Request], **_: object) -> list[Likelihood]:
        """Likelihoods in the requests' order; those of one context are asked for together, the longest first."""
        tails: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for index, (texts, context, tail) in enumerate(requests):
            if not tail:
                raise UserError(f"a choice without a token follows {str(texts[0])[-60:]!r}: mend its file")
            if len(tail) > self.max_length:
                raise UserError(
                    f"a choice of {len(tail)} tokens follows {str(texts[0])[-60:]!r}: the model reads {self.max_length}"
                )
            room = max(1, self.max_length + 1 - len(tail))  # cut on the left, as the harness does
            tails.setdefault(tuple(context[-room:]), {}).setdefault(tuple(tail), []).append(index)
        order = [Group(context, tuple(each)) for context, each in tails.items()]
        order.sort(key=lambda group: -group.tokens)
        answers: list[Likelihood] = [(0.0, False)] * len(requests)
        done = 0
        for group, likelihoods in zip(order, self.score(order), strict=True):
            if not all(math.isfinite(answer[0]) for answer in likelihoods):
                raise UserError(
                    "the model gives likelihoods that are no numbers (NaN or infinite): its weights are broken"
                )
            for choice, answer in zip(group.tails, likelihoods, strict=True):
                for index in tails[group.context][choice]:
                    answers[index] = answer
                    done += 1
            if self.progress:
                self.progress("zero-shot tasks (requests)", done, len(requests))
        return answers

    def loglikelihood_rolling(self, requests: object, disable_tqdm: bool = False) -> list[float]:
        """Not of these tasks; perplexity has a command of its own."""
        raise UserError("this task measures perplexity: use `saap eval --text`, which states its protocol")

    def generate_until(self, requests: object, disable_tqdm: bool = False) -> list[str]:
        raise UserError("this task lets the model write: only multiple-choice tasks are run here")


def run_tasks(
    name: str, model: Callable[[Progress | None], ContinuationModel], options: EvalOptions, progress: Progress | None
) -> list[TaskScore]:
    """Run tasks with one model: of each task accuracies, standard errors and every example's likelihoods.

    Raises:
        UserError: unknown tasks, files that are not of a task's form, or a data set that cannot be downloaded.
    """
    files = task_files(options)
    asked: list[object] = [file.config() for file in files] if files else list(options.tasks)
    samples = {file.name: drawn(file.name, len(file.rows), options.max_examples, options.seed) for file in files}
    with _quiet():
        tasks = _loaded(asked, TaskManager(include_defaults=not files), options)
        _check_kind(tasks)
        if not files and options.max_examples is not None:
            sizes = {each: len(task.eval_docs) for each, task in tasks.items()}
            samples = {each: drawn(each, size, options.max_examples, options.seed) for each, size in sizes.items()}
        results = evaluate(model(progress), tasks, samples=samples or None)
    by_name = {file.name: file for file in files}
    return [_score(name, task, results, by_name.get(task)) for task in sorted(results["samples"])]


def _loaded(asked: list[object], manager: TaskManager, options: EvalOptions) -> dict[str, harness_task.Task]:
    if options.task_dir is None and (unknown := sorted(set(options.tasks) - set(manager.all_tasks))):
        raise UserError(f"no task {', '.join(unknown)}: `lm_eval ls tasks` lists what there is")
    try:
        return dict(get_task_dict(asked, manager))
    except OSError as error:  # a lost connection's classes are all of these
        raise UserError(
            f"the data of {', '.join(options.tasks)} cannot be downloaded ({type(error).__name__}): check the "
            "network, or give --task-dir a folder with the tasks' files"
        ) from None


def _check_kind(tasks: Mapping[str, object]) -> None:
    """Raise UserError for what is no multiple-choice task with an accuracy, before a model is loaded."""
    for name, task in tasks.items():
        if not isinstance(task, harness_task.ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"{name} is no multiple-choice task: name some, and those of a group one by one")
        if "acc" not in task.aggregation():
            raise UserError(f"{name} is not judged by accuracy but by {', '.join(task.aggregation())}: name others")


def task_files(options: EvalOptions) -> list[TaskFile]:
    """Read the files of the tasks, before a model is loaded; none where the harness's own data sets are asked for."""
    if options.max_examples is not None and options.max_examples < 2:
        raise UserError("one example has no standard error: give --max-examples 2 or more")
    return [] if options.task_dir is None else [find_task(name, options.task_dir) for name in options.tasks]


def _score(model: str, name: str, results: Results, file: TaskFile | None) -> TaskScore:
    metrics = results["results"][name]
    examples = tuple(
        TaskExample(
            sample["doc_id"], sample["target"], tuple(float(answer[0]) for answer in sample["filtered_resps"]),
            **{metric: float(sample[metric]) for metric in ("acc", "acc_norm") if metric in sample},
        )
        for sample in sorted(results["samples"][name], key=lambda sample: int(sample["doc_id"]))
    )  # fmt: skip
    numbers = {key: metrics.get(f"{key},none") for key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")}
    source, sha256, of = (file.source, file.sha256, len(file.rows)) if file else ("the harness's data set", None, None)
    return TaskScore(model, name, source, sha256, of, **numbers, examples=examples)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's log and its bar over the examples: what went wrong is raised, progress is ours."""
    logger, bar = logging.getLogger("lm_eval"), harness_task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    harness_task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        harness_task.tqdm = bar


@dataclass(frozen=True)
class TaskFile:
    """One task's examples."""

    name: str  # of the task
    rows: tuple[Row, ...]  # examples, checked, in file order
    source: str  # the file's name
    sha256: str  # of the rows that were read, all of them

    def config(self) -> dict[str, object]:
        """Convert to the form that the harness takes."""
        from datasets import Dataset

        # A Dataset has one type per column; what is not asked for may be anything.
        columns = {*FIELDS[self.name], "label"}
        rows = [{key: row[key] for key in columns} for row in self.rows]
        metrics = ("acc",) if self.name in ("boolq", "winogrande") else ("acc", "acc_norm")
        asked: dict[str, object] = {"doc_to_text": PROMPTS.get(self.name), "doc_to_target": "label"}
        asked["doc_to_choice"] = "{{choices}}"
        if self.name == "hellaswag":  # given as text, a context of digits would be taken for a choice's number
            asked["doc_to_text"] = _context
        if self.name == "winogrande":  # the end of the sentence is predicted from two beginnings
            asked = {"doc_to_text": _right, "doc_to_target": _ending, "doc_to_choice": _beginnings}
        return {
            "task": self.name,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "output_type": "multiple_choice",
            "test_split": "test",
            **asked,
            "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in metrics],
        }


def drawn(name: str, total: int, count: int | None, seed: int) -> list[int]:
    """Choose a task's examples: all, or ``count`` drawn with the seed, in order."""
    if count is None or count >= total:
        return list(range(total))
    return sorted(random.Random(f"{name} {seed}").sample(range(total), count))


def find_task(name: str, folder: Path) -> TaskFile:
    """Read the task's file in a folder: its name begins with the task's, as in ``arc_easy_test.jsonl``.

    Raises:
        UserError: unknown task, no file or several, or a row that is not of the task's form, by file and line.
    """
    if name not in FIELDS:
        raise UserError(f"no task {name!r} from files: choose among {', '.join(FIELDS)}")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give --task-dir the folder that holds the tasks' files")
    files = sorted(
        path
        for path in folder.iterdir()
        if re.fullmatch(rf"{name}(_(test|validation|valid|dev))?\.jsonl?(\.gz)?", path.name, re.IGNORECASE)
    )
    if len(files) != 1:
        there = ", ".join(path.name for path in files) or "none"
        raise UserError(f"{name} needs one file in {folder}, {there} is there: name it {name}.jsonl")
    return read_task(name, files[0])


def read_task(name: str, path: Path) -> TaskFile:
    """Read and check a task's file; UserError as :func:`find_task`."""
    rows = load_rows(path, split="evaluation") or []
    checked = tuple(_checked(name, row, where) for where, row in rows)
    if len(checked) < 2:  # without a standard error
        raise UserError(f"{path} holds {'one' if checked else 'no'} example: give 2 or more, one JSON object a line")
    return TaskFile(name, checked, path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def _checked(name: str, value: object, where: str) -> Row:
    fields = (*FIELDS[name], "label")
    row: Row = value if isinstance(value, dict) else {}
    if name == "hellaswag":
        row = _without_marks(row)
    if missing := [field for field in fields if field not in row]:
        raise UserError(f"{where} lacks {', '.join(missing)}: {name} needs {', '.join(fields)}")
    text = [field for field in fields if field not in ("choices", "label")]
    if wrong := [field for field in text if not _is_text(row[field])]:
        raise UserError(f"{where}: {wrong[0]} is no text")
    choices = ["first", "second"] if name == "winogrande" else row["choices"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(map(_is_text, choices)):
        raise UserError(f"{where}: choices must be a list of two or more texts")
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise UserError(f"{where}: label {label!r} must count the {len(choices)} choices from 0")
    if name == "winogrande" and str(row["sentence"]).count("_") != 1:
        raise UserError(f"{where}: a sentence of winogrande has one _ where an option goes")
    return dict(row)


def _is_text(value: object) -> bool:
    """Not blank, and no half of a surrogate pair in it, which no tokenizer takes."""
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def _without_marks(row: Row) -> Row:
    """Clean the texts of a row of HellaSwag; the checks find what is no text."""
    choices = row.get("choices")
    cleaned = {"choices": [_cleaned(each) for each in choices]} if isinstance(choices, list) else {}
    return {**row, **cleaned, **({"context": _cleaned(row["context"])} if "context" in row else {})}


def _cleaned(text: object) -> object:
    """HellaSwag's text without the marks of its WikiHow part, as the harness does it."""
    if not isinstance(text, str):
        return text
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _context(row: Row) -> str:
    return str(row["context"])


def _right(row: Row) -> object:
    return row["label"]


def _beginnings(row: Row) -> list[str]:
    before = str(row["sentence"]).partition("_")[0]
    return [f"{before}{row['option1']}", f"{before}{row['option2']}"]


def _ending(row: Row) -> str:
    return str(row["sentence"]).partition("_")[2].strip()
