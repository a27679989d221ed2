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

from bench.judge.comparison import compare_within
from bench.measure.result import read_result
from bench.report.tables import table_rows
from export.bundle.manifest import read_manifest
from saap.base.writing import write_json
from studies.common import provenance
from studies.field.cells import PROTOCOLS, cells_of

TASKS = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
TEXT, TRAIN = "wikitext2_test_raw.txt", "c4_sample300.jsonl"  # TRAIN: for the parity check
RATE, TOKENS = "6e-3", "100000"  # of tuning, for all methods
# What the pruning table (studies/pruning) found to be each baseline's best; SAAP is as it is by default.
OPTIONS: dict[str, list[str]] = {
    "saap": [],
    "flap": ["--method", "flap", "--keep", "heads", "--compensate", "bias", "--keep-layers", "none"],
    "wanda_sp": ["--method", "wanda_sp", "--keep", "heads", "--keep-layers", "none"],
    "param_second": ["--method", "param_second", "--keep", "heads", "--keep-layers", "none"],
    "param_first": ["--method", "param_first", "--keep", "heads", "--keep-layers", "none"],
    "param_mix": ["--method", "param_mix", "--keep", "heads", "--keep-layers", "none"],
    "vector": ["--method", "vector", "--keep", "heads", "--keep-layers", "none"],
    "shortgpt": ["--method", "shortgpt"],
    "magnitude": ["--method", "magnitude", "--keep", "heads", "--keep-layers", "none"],
    "random": ["--method", "random", "--keep", "heads", "--keep-layers", "none"],
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

    def __init__(self, name: str, work: Path, model: str, given: argparse.Namespace) -> None:
        self.name, self.work, self.model, self.given = name, work / name, model, given
        self.commands: list[list[str]] = []
        self.path = cells_of(model) / f"{name}.json"

    def saap(self, made: str, *arguments: str) -> Path:
        """Run a command of saap unless what it makes is there."""
        out = self.work / made
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
        if self.given.costs and word == str(self.given.costs):
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

    def known(self) -> dict[str, Any]:
        """The cell that is there; one that was not timed has no ``bench``."""
        return dict(json.loads(self.path.read_text())) if self.path.is_file() else {}

    def missing(self) -> bool:
        """Whether there is something to make or to time."""
        known = self.known()
        return not known or (known["bench"] is None and self.given.skip != "bench")

    def finish(self, bundle: Path, dense: Path | None) -> None:
        """Evaluate and bench the bundle, and write the cell; what is known of it is not measured again."""
        known = self.known()
        quality = known.get("quality") or self.quality(bundle)
        if self.given.speedups and "answers" not in quality:
            quality["answers"] = self.answered()
        bench = None if self.given.skip == "bench" else self.timed(bundle, dense)
        commands = [*known["commands"], self.commands[-1]] if known else self.commands
        cell = {"name": self.name, "commands": commands, "quality": quality, "bench": bench, **provenance()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, cell)

    def quality(self, bundle: Path) -> dict[str, Any]:
        """Perplexities by each protocol, and the tasks."""
        data = Path(os.environ["SAAP_DATA"])
        numbers: dict[str, Any] = {}
        for name, (chunk, count) in PROTOCOLS.items():
            cut = ["--chunk", str(chunk), "--max-chunks", str(count), "--join", "paragraphs"]
            numbers[name] = self.evaluated(name, bundle, "--text", str(data / TEXT), *cut)
        if tasks := [task for task in TASKS if list(data.glob(f"{task}_*.jsonl*"))]:
            few = ["--max-examples", str(self.given.max_examples)] if self.given.max_examples else []
            asked = ["--tasks", ",".join(tasks), "--task-dir", str(data), *few]
            numbers["tasks"] = self.evaluated("tasks", bundle, *asked)
        return {name: _slim(document) for name, document in numbers.items()}

    def answered(self) -> dict[str, Any]:
        """How far the tuned model answers as the dense one does."""
        made = self.evaluated("answers", self.work / "tuned", "--reference", self.model, "--answers", ANSWERS)
        scores = made["answers"]["scores"][-1]
        return {key: scores[key] for key in ("agreement", "same", "repetition")}

    def timed(self, bundle: Path, dense: Path | None) -> dict[str, Any]:
        """What ``saap bench`` finds beside the dense bundle; ``speedup``: over it, in pairs, with its 95 % interval."""
        specs = [str(bundle)] if dense is None else [str(dense), str(bundle)]
        made = self.saap("bench.json", "bench", *specs, "-t", "1", "-r", "6", "--json", str(self.work / "bench.json"))
        result = read_result(made)
        row = table_rows(result)[-1]
        wanted = ("decode_ts", "peak_decode_bytes", "model_bytes", "status", "reasons")
        kept = {key: row[key] for key in wanted} | {key: result.device[key] for key in ("cpu_model", "isa")}
        if dense is None:
            return kept
        base, other = (measurement.name for measurement in result.measurements)
        (pair,) = compare_within(result, base, other).rows
        return kept | {"speedup": [1 / each for each in (pair.ratio, pair.high, pair.low) if each]}


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
    """For each metric 1 or 0 for every example, in their order."""
    examples = sorted(task["examples"], key=lambda example: int(example["index"]))
    metrics = [metric for metric in ("acc", "acc_norm") if task.get(metric) is not None]
    return {metric: "".join(str(int(example[metric])) for example in examples) for metric in metrics}


def run(given: argparse.Namespace) -> None:
    """Make the cells that are missing, the dense one first."""
    few = f"-{given.max_examples}examples" if given.max_examples else ""
    dense = Cell(f"dense{few}", given.work, given.model, given)
    bundle = dense.exported(Path(given.model))
    if dense.missing():
        dense.finish(bundle, None)
    for seed in map(int, given.seeds.split(",")):
        for ratio in [f"{each}x" for each in given.speedups.split(",")] if given.speedups else given.ratios.split(","):
            for method in given.methods.split(","):
                for tuned in (False, True) if given.tuned == "both" else (given.tuned == "yes",):
                    if method == "dense" and not tuned:
                        continue
                    kept = method if method == "dense" else f"{method}-{ratio}"
                    name = f"{kept}-{'tuned' if tuned else 'untuned'}{few}-seed{seed}"
                    cell = Cell(name, given.work, given.model, given)
                    if cell.missing():
                        _cell(cell, method, ratio, seed, tuned, bundle)


def _cell(cell: Cell, method: str, ratio: str, seed: int, tuned: bool, dense: Path) -> None:
    given = cell.given
    cell.work.mkdir(parents=True, exist_ok=True)
    source = Path(given.model) if method == "dense" else _pruned(cell, method, ratio, seed)
    if tuned:
        cell.saap("tuned", "tune", str(source), "-o", str(cell.work / "tuned"), "--teacher", given.model, "--tokens",
                  TOKENS, "--seed", str(seed), "--learning-rate", RATE)  # fmt: skip
        source = cell.work / "tuned"
    cell.finish(cell.exported(source), dense)


def _fastest(method: str, given: argparse.Namespace) -> list[str]:
    """The integers that are fastest there: SAAP's search finds them, a baseline is told."""
    return [] if method in ("saap", "published") else ["--group-size", str(given.group_size)]


def _pruned(cell: Cell, method: str, ratio: str, seed: int) -> Path:
    """The directory that the tuned and the untuned cell are of."""
    given = cell.given
    seeded = [] if method == "magnitude" else ["--seed", str(seed)]  # which draws nothing
    asked = (
        ["--speedup", ratio[:-1], "--costs", str(given.costs), *_fastest(method, given), *HELPED.get(method, [])]
        if given.speedups
        else ["--ratio", ratio]
    )
    chosen = [*asked, *seeded, *OPTIONS.get(method, [])]
    source = given.work / f"{method}-{ratio}-seed{seed}"
    cell.saap(f"../{source.name}", "prune", given.model, "-o", str(source), *chosen)
    return source
