"""The rows of the field: which methods there are, and the commands that make a row's cell."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from export.bundle.manifest import read_manifest
from saap.base.writing import write_json
from studies.common import provenance
from studies.field.cells import PROTOCOLS, cells_of

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TEXT, TRAIN = "wikitext2_test_raw.txt", "c4_sample300.jsonl"  # TRAIN: for the parity check
RATE, TOKENS = "6e-3", "100000"  # of tuning, for all methods
# Each baseline at its best before tuning (studies/README.md, "Settled"); SAAP is as it is by default.
OPTIONS: dict[str, list[str]] = {
    "saap": [],
    "flap": ["--method", "flap", "--keep", "heads", "--compensate", "bias", "--keep-layers", "none"],
    "wanda_sp": ["--method", "wanda_sp", "--keep", "heads", "--keep-layers", "none"],
    "param_mix": ["--method", "param_mix", "--keep", "heads", "--keep-layers", "none"],
    "vector": ["--method", "vector", "--keep", "heads", "--keep-layers", "none"],
    "shortgpt": ["--method", "shortgpt"],
}
PUBLISHED = ["--set", "score=fused", "--set", "stability=-0.5"]
# At an equal speed: our refit for the baseline that it helps, and what makes SAAP that of the paper.
HELPED: dict[str, list[str]] = {"shortgpt": ["--compensate", "refit"], "published": PUBLISHED}
ANSWERS = "32"


class Cell:
    """One row: its folder of intermediate files, its commands, and its JSON.

    Args:
        name: of the row.
        work: folder for models and bundles.
    """

    def __init__(self, name: str, work: Path, model: str, args: argparse.Namespace) -> None:
        self.name, self.work, self.model, self.args = name, work / name, model, args
        self.commands: list[list[str]] = []
        self.path = cells_of(model) / f"{name}.json"

    def saap(self, output: str, *arguments: str) -> Path:
        """Run a command of saap unless what it makes is there."""
        out = self.work / output
        words = [str(word) for word in arguments]
        self.commands.append(["saap", *map(self._typed, words)])
        if not out.exists():
            began = time.monotonic()
            run = [sys.executable, "-m", "saap.cli", *words]
            done = subprocess.run(run, check=False, capture_output=True, text=True)
            if not out.exists():
                raise SystemExit(f"{self.name}: saap {' '.join(words)} failed: {done.stderr[-600:]}")
            print(f"  {self.name}: {words[0]} {time.monotonic() - began:.0f} s", flush=True)
        return out

    def _typed(self, word: str) -> str:
        """A word as anyone would type it: folders by their names, and the table of costs."""
        if self.args.costs and word == str(self.args.costs):
            return "cost.json"
        for path, name in (
            (str(self.work.parent), f"out/field/{Path(self.model).name}"),
            (os.environ["SAAP_DATA"].rstrip("/"), "$SAAP_DATA"),
        ):
            word = word.replace(path, name)
        return word

    def exported(self, source: Path) -> Path:
        """The bundle; with a perplexity of thousands it differs from its float model by more than parity allows."""
        bundle = self.work / "bundle"
        arguments = ("bundle", "export", str(source), "-o", str(bundle))
        if bundle.exists() and read_manifest(bundle).parity is None:
            return self.saap(*arguments, "--parity", "none")
        try:
            return self.saap(*arguments, "--text", str(Path(os.environ["SAAP_DATA"]) / TRAIN))
        except SystemExit as error:
            if "parity failed" not in str(error):
                raise
            self.commands.pop()
            return self.saap(*arguments, "--parity", "none")

    def evaluated(self, name: str, bundle: Path, *options: str) -> dict[str, Any]:
        """The document of a ``saap eval``."""
        out = self.work / f"{name}.json"
        document = json.loads(self.saap(out.name, "eval", str(bundle), *options, "--json", str(out)).read_text())
        return dict(document)

    def finish(self, bundle: Path) -> None:
        """Evaluate the bundle and write the cell."""
        quality = self.quality(bundle)
        if self.args.speedups:
            quality["answers"] = self.answered()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"name": self.name, "commands": self.commands, "quality": quality, **provenance()})

    def quality(self, bundle: Path) -> dict[str, Any]:
        """Perplexities by each protocol, and the tasks."""
        data = Path(os.environ["SAAP_DATA"])
        numbers: dict[str, Any] = {}
        for name, (chunk, count) in PROTOCOLS.items():
            cut = ["--chunk", str(chunk), "--max-chunks", str(count), "--join", "paragraphs"]
            numbers[name] = self.evaluated(name, bundle, "--text", str(data / TEXT), *cut)
        if tasks := [task for task in TASKS if list(data.glob(f"{task}_*.jsonl*"))]:
            few = ["--max-examples", str(self.args.max_examples)] if self.args.max_examples else []
            options = ["--tasks", ",".join(tasks), "--task-dir", str(data), *few]
            numbers["tasks"] = self.evaluated("tasks", bundle, *options)
        return {name: _slim(document) for name, document in numbers.items()}

    def answered(self) -> dict[str, Any]:
        """Compare the tuned model's answers with the dense one's."""
        output = self.evaluated("answers", self.work / "tuned", "--reference", self.model, "--answers", ANSWERS)
        scores = output["answers"]["scores"][-1]
        return {key: scores[key] for key in ("agreement", "same", "repetition")}


def _slim(document: dict[str, Any]) -> dict[str, Any]:
    """A document of eval without paths, windows and likelihoods: what was answered right stays, for paired tests."""
    rows = [{k: v for k, v in row.items() if k not in ("window_nll", "name")} for row in document["rows"]]
    tasks = [
        {k: v for k, v in task.items() if k not in ("model", "examples")} | {"right": _right(task)}
        for task in document.get("tasks", [])
    ]
    slim = {k: v for k, v in document.items() if k != "checksum"} | {"rows": rows, "tasks": tasks}
    if slim.get("protocol"):  # the file's name; its hash tells which it is
        slim["protocol"] = slim["protocol"] | {"text": Path(slim["protocol"]["text"]).name}
    return slim


def _right(task: dict[str, Any]) -> dict[str, str]:
    """Return a 1 or 0 for every example, in their order, by metric."""
    examples = sorted(task["examples"], key=lambda example: int(example["index"]))
    metrics = [metric for metric in ("acc", "acc_norm") if task.get(metric) is not None]
    return {metric: "".join(str(int(example[metric])) for example in examples) for metric in metrics}


def run(args: argparse.Namespace) -> None:
    """Make the cells that are missing, the dense one first."""
    few = f"-{args.max_examples}examples" if args.max_examples else ""
    dense = Cell(f"dense{few}", args.work, args.model, args)
    if not dense.path.is_file():
        dense.finish(dense.exported(Path(args.model)))
    for seed in map(int, args.seeds.split(",")):
        for ratio in [f"{each}x" for each in args.speedups.split(",")] if args.speedups else args.ratios.split(","):
            for method in args.methods.split(","):
                kept = method if method == "dense" else f"{method}-{ratio}"
                cell = Cell(f"{kept}-tuned{few}-seed{seed}", args.work, args.model, args)
                if not cell.path.is_file():
                    _cell(cell, method, ratio, seed)


def _cell(cell: Cell, method: str, ratio: str, seed: int) -> None:
    args = cell.args
    cell.work.mkdir(parents=True, exist_ok=True)
    source = Path(args.model) if method == "dense" else _pruned(cell, method, ratio, seed)
    tuning = ["--teacher", args.model, "--tokens", TOKENS, "--seed", str(seed), "--learning-rate", RATE]
    tuned = cell.saap("tuned", "tune", str(source), "-o", str(cell.work / "tuned"), *tuning)
    cell.finish(cell.exported(tuned))


def _fastest(method: str, args: argparse.Namespace) -> list[str]:
    """The integers that are fastest there: SAAP's search finds them, a baseline is told."""
    return [] if method in ("saap", "published") else ["--group-size", str(args.group_size)]


def _pruned(cell: Cell, method: str, ratio: str, seed: int) -> Path:
    """The pruned directory of a row."""
    args = cell.args
    target = (
        ["--speedup", ratio[:-1], "--costs", str(args.costs), *_fastest(method, args), *HELPED.get(method, [])]
        if args.speedups
        else ["--ratio", ratio]
    )
    chosen = [*target, "--seed", str(seed), *OPTIONS.get(method, [])]
    source = args.work / f"{method}-{ratio}-seed{seed}"
    cell.saap(f"../{source.name}", "prune", args.model, "-o", str(source), *chosen)
    return source
