"""Zero-shot tasks by lm-evaluation-harness, with a model directory or a bundle as its model.

The harness puts the questions, compares the choices' likelihoods and counts; what it asks of a model is answered by
:mod:`saap.evaluate.continuations`, which reads what the choices of a question share once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval.api import task as harness_task
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager, get_task_dict

from devices.common.progress import Progress
from saap.evaluate.continuations import Group, Likelihood, Scorer
from saap.evaluate.task_files import TaskFile, drawn, find_task
from saap.system.errors import UserError

Request = tuple[Any, list[int], list[int]]  # (texts, context ids, tail ids), as the harness hands them over


@dataclass(frozen=True)
class TaskOptions:
    """What is asked.

    Attributes:
        names: of tasks; without a folder any multiple-choice task of the harness, which fetches its data set.
        folder: where the tasks' files are; None takes the harness's own data sets.
        max_examples: of each task, drawn with ``seed``; None takes all.
    """

    names: tuple[str, ...]
    folder: Path | None = None
    max_examples: int | None = None
    seed: int = 0


class ContinuationModel(TemplateLM):
    """A model of the harness that only weighs continuations.

    Args:
        score: what the likelihoods come from.
        tokenizer: the model's, of transformers.
        max_length: tokens of its context.
        progress: is told how many requests are done.
    """

    def __init__(self, score: Scorer, tokenizer: Any, max_length: int, progress: Progress | None = None) -> None:
        super().__init__()
        self.score, self.tokenizer, self.max_length, self.progress = score, tokenizer, max_length, progress

    @property
    def eot_token_id(self) -> int:
        """What stands for an empty context where there is no beginning-of-sequence token."""
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                "a question begins with nothing, and this tokenizer has no token to begin with: mend its file"
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them unless told, and never a second beginning."""
        if add_special_tokens is None:
            first = self.tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Likelihood]:
        """Without the harness's own bar."""
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[Likelihood]:
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
        for group, found in zip(order, self.score(order), strict=True):
            if not all(math.isfinite(answer[0]) for answer in found):
                raise UserError(
                    "the model gives likelihoods that are no numbers (NaN or infinite): its weights are broken"
                )
            for choice, answer in zip(group.tails, found, strict=True):
                for index in tails[group.context][choice]:
                    answers[index] = answer
                    done += 1
            if self.progress:
                self.progress("zero-shot tasks, requests", done, len(requests))
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Not of these tasks; perplexity has a command of its own."""
        raise UserError("a task that asks for perplexity: use `saap eval --text`, which states its protocol")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Not of these tasks."""
        raise UserError("a task that lets the model write: only multiple-choice tasks are run here")


def run_tasks(
    model: Callable[[Progress | None], ContinuationModel], options: TaskOptions, progress: Progress | None
) -> list[dict[str, Any]]:
    """Run tasks with one model: a row per task with accuracies, standard errors and every example's likelihoods.

    Raises:
        UserError: unknown tasks, files that are not of a task's form, or a data set that cannot be had.
    """
    files = task_files(options)
    asked: list[Any] = [file.config() for file in files] if files else list(options.names)
    samples = {file.name: drawn(file.name, len(file.rows), options.max_examples, options.seed) for file in files}
    with _quiet():
        tasks = _loaded(asked, TaskManager(include_defaults=not files), options)
        _check_kind(tasks)
        if not files and options.max_examples is not None:
            sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
            samples = {name: drawn(name, size, options.max_examples, options.seed) for name, size in sizes.items()}
        found = evaluate(model(progress), tasks, samples=samples or None)
    by_name = {file.name: file for file in files}
    return [_row(name, found, by_name.get(name)) for name in sorted(found["samples"])]


def _loaded(asked: list[Any], manager: TaskManager, options: TaskOptions) -> dict[str, Any]:
    if options.folder is None and (unknown := sorted(set(options.names) - set(manager.all_tasks))):
        raise UserError(f"no task {', '.join(unknown)}: `lm_eval ls tasks` lists what there is")
    try:
        return dict(get_task_dict(asked, manager))
    except OSError as error:  # a lost connection's classes are all of these
        raise UserError(
            f"the data of {', '.join(options.names)} cannot be had ({type(error).__name__}): check the network, or "
            "give --task-dir a folder with the tasks' files"
        ) from None


def _check_kind(tasks: dict[str, Any]) -> None:
    """Raise UserError for what is no multiple-choice task with an accuracy, before a model is loaded."""
    for name, task in tasks.items():
        if not isinstance(task, harness_task.ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice":
            raise UserError(f"{name} is no multiple-choice task: name some, and those of a group one by one")
        if "acc" not in task.aggregation():
            raise UserError(f"{name} is not judged by accuracy but by {', '.join(task.aggregation())}: name others")


def task_files(options: TaskOptions) -> list[TaskFile]:
    """The files of the tasks, before a model is loaded; none where the harness's own data sets are asked for."""
    if options.max_examples is not None and options.max_examples < 2:
        raise UserError(f"{options.max_examples} examples have no standard error: give 2 or more")
    return [] if options.folder is None else [find_task(name, options.folder) for name in options.names]


def _row(name: str, found: dict[str, Any], file: TaskFile | None) -> dict[str, Any]:
    """Accuracies in [0, 1]; of each example its index, the right choice, the choices' likelihoods and what counted."""
    metrics = found["results"][name]
    examples = [
        {
            "index": sample["doc_id"],
            "target": sample["target"],
            "loglikelihoods": [float(answer[0]) for answer in sample["filtered_resps"]],
            **{metric: float(sample[metric]) for metric in ("acc", "acc_norm") if metric in sample},
        }
        for sample in sorted(found["samples"][name], key=lambda sample: int(sample["doc_id"]))
    ]
    return {
        "task": name,
        "source": file.source if file else "the harness's data set",
        "sha256": file.sha256 if file else None,
        "examples_of": len(file.rows) if file else None,
        **{
            key: metrics.get(f"{metric},none")
            for key, metric in (
                ("acc", "acc"), ("acc_stderr", "acc_stderr"), ("acc_norm", "acc_norm"),
                ("acc_norm_stderr", "acc_norm_stderr"),
            )
        },
        "examples": examples,
    }  # fmt: skip


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
