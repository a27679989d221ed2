"""Zero-shot tasks from files: seven multiple-choice tasks with the prompts of lm-evaluation-harness.

A file is .jsonl, .json or either with .gz; ``label`` counts ``choices`` from 0. The fields of each task are in
:data:`FIELDS`. How a question is put is the harness's own wording, so the numbers compare with published ones.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saap.system.errors import UserError
from saap.text.documents import is_unicode, load_rows

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


@dataclass(frozen=True)
class TaskFile:
    """One task's examples.

    Attributes:
        name: of the task.
        rows: examples, checked, in file order.
        source: the file's name.
        sha256: of the rows that were read, all of them.
    """

    name: str
    rows: tuple[dict[str, Any], ...]
    source: str
    sha256: str

    def config(self) -> dict[str, Any]:
        """The task as the harness takes it."""
        from datasets import Dataset

        # A Dataset has one type per column; what is not asked for may be anything.
        wanted = {*FIELDS[self.name], "label"}
        rows = [{key: row[key] for key in wanted} for row in self.rows]
        metrics = ("acc",) if self.name in ("boolq", "winogrande") else ("acc", "acc_norm")
        asked: dict[str, Any] = {"doc_to_text": PROMPTS.get(self.name), "doc_to_target": "label"}
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
    """Which of a task's examples to take: all, or ``count`` drawn with the seed, in order."""
    if count is None or count >= total:
        return list(range(total))
    return sorted(random.Random(f"{name} {seed}").sample(range(total), count))


def find_task(name: str, folder: Path) -> TaskFile:
    """The task's file in a folder: its name begins with the task's, as in ``arc_easy_test.jsonl``.

    Raises:
        UserError: unknown task, no file or several, or a row that is not of the task's form, by file and line.
    """
    if name not in FIELDS:
        raise UserError(f"no task {name!r} from files: choose among {', '.join(FIELDS)}")
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give --task-dir the folder that holds the tasks' files")
    found = sorted(
        path
        for path in folder.iterdir()
        if re.fullmatch(rf"{name}(_(test|validation|valid|dev))?\.jsonl?(\.gz)?", path.name, re.IGNORECASE)
    )
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{name} needs one file in {folder}, {there} is there: name it {name}.jsonl")
    return read_task(name, found[0])


def read_task(name: str, path: Path) -> TaskFile:
    """Read and check a task's file.

    Raises:
        UserError: as :func:`find_task`.
    """
    rows = load_rows(path, split="evaluation") or []
    checked = tuple(_checked(name, row, where) for where, row in rows)
    if len(checked) < 2:  # without a standard error
        raise UserError(f"{path} holds {'one' if checked else 'no'} example: give 2 or more, one JSON object a line")
    return TaskFile(name, checked, path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def _checked(name: str, row: Any, where: str) -> dict[str, Any]:
    wanted = (*FIELDS[name], "label")
    if name == "hellaswag" and isinstance(row, dict):
        row = _without_marks(row)
    missing = [field for field in wanted if not isinstance(row, dict) or field not in row]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}: {name} needs {', '.join(wanted)}")
    text = [field for field in wanted if field not in ("choices", "label")]
    if wrong := [field for field in text if not _is_text(row[field])]:
        raise UserError(f"{where}: {wrong[0]} is no text")
    choices = row.get("choices", ["", ""])
    if "choices" in wanted and not (isinstance(choices, list) and len(choices) > 1 and all(map(_is_text, choices))):
        raise UserError(f"{where}: choices must be a list of two or more texts")
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
        raise UserError(f"{where}: label {label!r} must count the {len(choices)} choices from 0")
    if name == "winogrande" and row["sentence"].count("_") != 1:
        raise UserError(f"{where}: a sentence of winogrande has one _ where an option goes")
    return dict(row)


def _is_text(value: Any) -> bool:
    """Not blank, and no half of a surrogate pair in it, which no tokenizer takes."""
    return isinstance(value, str) and bool(value.strip()) and is_unicode(value)


def _without_marks(row: dict[str, Any]) -> dict[str, Any]:
    """A row of HellaSwag whose texts are cleaned; what is none is for the checks to find."""
    choices = row.get("choices")
    cleaned = {"choices": [_cleaned(each) for each in choices]} if isinstance(choices, list) else {}
    return {**row, **cleaned, **({"context": _cleaned(row["context"])} if "context" in row else {})}


def _cleaned(text: Any) -> Any:
    """HellaSwag's text without the marks of its WikiHow part, as the harness does it."""
    if not isinstance(text, str):
        return text
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _context(row: dict[str, Any]) -> str:
    return str(row["context"])


def _right(row: dict[str, Any]) -> int:
    return int(row["label"])


def _beginnings(row: dict[str, Any]) -> list[str]:
    before = row["sentence"][: row["sentence"].index("_")]
    return [before + row["option1"], before + row["option2"]]


def _ending(row: dict[str, Any]) -> str:
    return str(row["sentence"][row["sentence"].index("_") + 1 :].strip())
