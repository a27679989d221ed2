"""Zero-shot tasks on whole files: a bundle against its torch model, and ours against lm-eval's own `hf` class.

    python -m studies.tasks.study run                                      # an hour on two cores; finished cells stay
    python -m studies.tasks.study run --tasks piqa --who torch,int4        # some of them; both read anew with --again
    python -m studies.tasks.study table [--write]                          # accuracies, choices that differ, seconds

The model is SmolLM2-135M-Instruct, the files are those of SAAP_DATA. Who answers: `hf`, the class of the harness;
`torch`, as `saap eval MODEL`; `fp32` and `int4`, bundles as `saap export` writes them. A cell is one JSON in
cells/ with accuracies, the choice of every example, and the seconds of that run, model loading apart.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from studies.common import add_write_option, markdown, parser_of, provenance, show_tables

HERE = Path(__file__).resolve().parent
CELLS, BUNDLES = HERE / "cells", HERE.parents[1] / "out" / "tasks"
WHO, TASKS = ("hf", "torch", "fp32", "int4"), ("piqa", "arc_easy")
BATCH = 16  # rows of `hf` at a time
Row = dict[str, Any]


def by_harness(model_dir: Path, task: str) -> Row:
    """What the harness gives with its own class."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from saap.evaluate.tasks import task_files
    from saap.models.checkpoint import load_model
    from saap.models.resolve import load_tokenizer

    model, (file,) = load_model(model_dir), task_files(options_of(task))
    theirs: Any = HFLM(model, tokenizer=load_tokenizer(model_dir), device="cpu", batch_size=BATCH)
    began = time.monotonic()
    found: Any = simple_evaluate(model=theirs, tasks=[file.config()], task_manager=TaskManager(include_defaults=False))
    samples = sorted(found["samples"][task], key=lambda sample: int(sample["doc_id"]))
    metrics = found["results"][task]
    return {
        "acc": metrics["acc,none"],
        "acc_norm": metrics["acc_norm,none"],
        "choices": choices_of([[answer[0] for answer in sample["filtered_resps"]] for sample in samples]),
        "seconds": round(time.monotonic() - began, 1),
    }


def by_saap(path: Path, task: str) -> Row:
    """What `saap eval --tasks` gives."""
    from saap.cli.eval import subject_of
    from saap.evaluate.evaluation import continuation_model, subjects_of
    from saap.evaluate.tasks import run_tasks

    _, [subject] = subjects_of([subject_of(path)], None, None)
    model = continuation_model(subject)(None)
    began = time.monotonic()
    (row,) = run_tasks(subject.name, lambda _: model, options_of(task), None)
    return {
        "acc": row.acc,
        "acc_norm": row.acc_norm,
        "choices": choices_of([list(example.loglikelihoods) for example in row.examples]),
        "seconds": round(time.monotonic() - began, 1),
    }


def answers(model_dir: Path, who: str, task: str) -> Row:
    """Accuracies and choices of one of :data:`WHO`."""
    if who == "hf":
        return by_harness(model_dir, task)
    return by_saap(model_dir if who == "torch" else bundle_of(model_dir, 32 if who == "fp32" else 4), task)


def choices_of(likelihoods: list[list[float]]) -> str:
    """The likeliest choice of every example, a digit each."""
    return "".join(str(max(range(len(each)), key=each.__getitem__)) for each in likelihoods)


def options_of(task: str) -> Any:
    """The whole file of a task."""
    from saap.evaluate import EvalOptions

    return EvalOptions(tasks=(task,), task_dir=Path(os.environ["SAAP_DATA"]))


def bundle_of(model_dir: Path, bits: int) -> Path:
    """A bundle of the model, made where it is not there."""
    from export import ExportOptions, export

    out = BUNDLES / f"{bits}-bit"
    if not out.is_dir():
        export(model_dir, ExportOptions(bits=bits, parity="none"), output=out)
    return out


def run(tasks: list[str], who: list[str], again: bool) -> None:
    """The cells that are not there, in turn, so that two that are compared in time run one after the other."""
    import torch

    from saap.base.writing import write_json
    from saap.models.resolve import resolve

    model_dir = resolve("smollm2-135m")
    for task in tasks:
        for name in who:
            path = CELLS / f"{task}-{name}.json"
            if path.is_file() and not again:
                continue
            row = answers(model_dir, name, task)
            about = {"task": task, "who": name, "threads": torch.get_num_threads(), "lm_eval": version("lm-eval")}
            known = json.loads(path.read_text()) if path.is_file() else {}
            earlier = known["seconds"] if known.get("threads") == about["threads"] else []
            row |= {**about, "seconds": [*earlier, row["seconds"]], **provenance()}
            write_json(path, row)
            print(
                f"{task} {name}: acc {row['acc']:.4f}, acc_norm {row['acc_norm']:.4f}, {row['seconds']} s", flush=True
            )


def tables() -> dict[str, str]:
    """The table of the README: cells, each against torch."""
    cells = {path.stem: json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))}
    lines = []
    for cell in cells.values():
        torch_cell, differ = cells.get(f"{cell['task']}-torch"), "-"
        if torch_cell:
            pairs = list(zip(cell["choices"], torch_cell["choices"], strict=True))
            differ = f"{sum(a != b for a, b in pairs)} of {len(pairs)}"
        seconds = f"{', '.join(map(str, cell['seconds']))} ({cell['threads']})"
        lines.append([cell["task"], cell["who"], f"{cell['acc']:.2%}", f"{cell['acc_norm']:.2%}", differ, seconds])
    heads = ["task", "who", "acc", "acc_norm", "choices that differ from torch's", "seconds (threads)"]
    return {"tasks": markdown(heads, lines)}


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--who", default=",".join(WHO))
    parser.add_argument("--again", action="store_true", help="cells that are there too: one more time of each")
    add_write_option(parser)
    given = parser.parse_args(arguments)
    if given.what == "table":
        return show_tables(HERE, tables(), given.write)
    run(given.tasks.split(","), given.who.split(","), given.again)


if __name__ == "__main__":
    main()
