"""The price and gain of smaller vocabularies: `saap eval` and `saap bench` of models with other vocabularies.

    python -m studies.vocabulary.study quality gemma --models dense=gemma3-270m auto=out/auto --texts C4=c4.txt --work W
    python -m studies.vocabulary.study tasks gemma --models dense=gemma3-270m auto=out/auto --task-dir tasks/ --work W
    python -m studies.vocabulary.study speed gemma --models dense=out/dense-int4 auto=out/auto-int4 --work W
    python -m studies.vocabulary.study table --write

Measurements stay in --work and are not repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.measure.result import read_result
from bench.report.tables import table_rows
from studies.common import Cell, markdown, parser_of, provenance, read_cells, saap, show_tables

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
TASKS = ("arc_easy", "piqa")
QUESTIONS = 200  # of each: a vocabulary of 262,144 takes 0.3 s for an answer


def quality(models: Mapping[str, str], texts: Mapping[str, str], work: Path) -> list[Cell]:
    """Bits per byte and tokens of each model on each text, every model by its own segmentation."""
    rows = []
    for text, file in texts.items():
        for model, path in models.items():
            out = work / f"{model}-{text}.json"
            if not out.is_file():
                saap("eval", path, "--text", file, "--max-chunks", 20, "--chunk", 512, "--json", out)
            document = json.loads(out.read_text())
            rows.append({"model": model, "text": text, "bits_per_byte": document["rows"][0]["bits_per_byte"]})
    return rows


def tasks(models: Mapping[str, str], folder: str, work: Path) -> list[Cell]:
    """Accuracies of each model."""
    rows = []
    for model, path in models.items():
        out = work / f"{model}-tasks.json"
        if not out.is_file():
            words = ["--tasks", ",".join(TASKS), "--task-dir", folder, "--max-examples", QUESTIONS]
            saap("eval", path, *words, "--json", out)
        for score in json.loads(out.read_text())["tasks"]:
            kept = {key: score[key] for key in ("task", "acc", "acc_stderr")}
            rows.append({"model": model, **kept, "examples": len(score["examples"])})
    return rows


def speed(models: Mapping[str, str], work: Path) -> list[Cell]:
    """Decode against the first bundle, per token and per character, by turns; peaks in processes of their own."""
    rows, (first, base) = [], next(iter(models.items()))
    for model, path in models.items():
        if model == first:
            continue
        out = work / f"{model}-speed.json"
        if not out.is_file():
            saap("bench", base, path, "-p", 128, "-n", 64, "-t", 1, "-r", 3, "--ratio-time", 60, "--json", out)
        result = read_result(out)
        dense, slim = result.measurements
        ratio = result.ratio(slim, dense, "decode")
        lengths = [m.model.spelling.characters_per_token if m.model.spelling else None for m in (dense, slim)]
        peaks = {row["name"]: row["peak_decode_bytes"] for row in table_rows(result)}
        rows.append({
            "model": model, "against": first, "decode": [ratio.ratio, ratio.low, ratio.high] if ratio else None,
            "characters_per_token": lengths, "peak_bytes": [peaks[dense.name], peaks[slim.name]],
            "bytes": [dense.model.model_bytes, slim.model.model_bytes],
        })  # fmt: skip
    return rows


def tables() -> dict[str, str]:
    """One per cell."""
    shown = {}
    for cell in read_cells(CELLS):
        rows = cell["rows"]
        if cell["what"] == "quality":
            texts, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("text", "model"))
            bits = {(row["model"], row["text"]): row["bits_per_byte"] for row in rows}
            lines = [[text, *(_bits(bits, model, models[0], text) for model in models)] for text in texts]
            shown[f"quality-{cell['name']}"] = markdown(["bits per byte", *models], lines)
        elif cell["what"] == "tasks":
            lines = [
                [row["task"], row["model"], f"{100 * row['acc']:.2f} %", f"{100 * row['acc_stderr']:.2f}"]
                for row in sorted(rows, key=lambda row: row["task"])
            ]
            shown[f"tasks-{cell['name']}"] = markdown(["task", "model", "accuracy", "standard error"], lines)
        else:
            shown[f"speed-{cell['name']}"] = markdown(
                ["against", "model", "decode, tokens/s", "characters/s", "file", "peak MB"], map(_speed_line, rows)
            )
    return shown


def _bits(bits: Mapping[tuple[str, str], float], model: str, dense: str, text: str) -> str:
    own, before = bits[model, text], bits[dense, text]
    return f"{own:.4f}" if model == dense else f"{own:.4f} ({own / before - 1:+.1%})"


def _speed_line(row: Cell) -> list[str]:
    (ratio, low, high), (before, after) = row["decode"], row["characters_per_token"]
    peaks, sizes = ([f"{value / 1e6:.0f}" for value in row[key]] for key in ("peak_bytes", "bytes"))
    return [
        row["against"], row["model"], f"{ratio:.2f}x ({low:.2f} to {high:.2f})", f"{ratio * after / before:.2f}x",
        f"{sizes[1]} instead of {sizes[0]} MB", f"{peaks[1]} instead of {peaks[0]}",
    ]  # fmt: skip


def _named(words: Sequence[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words)


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for what in ("quality", "tasks", "speed"):
        command = commands.add_parser(what)
        command.add_argument("name", help="of the cell")
        command.add_argument("--models", nargs="+", required=True, metavar="NAME=PATH", help="the dense one first")
        command.add_argument("--work", type=Path, required=True)
        if what == "quality":
            command.add_argument("--texts", nargs="+", required=True, metavar="NAME=FILE")
        elif what == "tasks":
            command.add_argument("--task-dir", required=True)
    commands.add_parser("table").add_argument("--write", action="store_true")
    args = parser.parse_args(arguments)
    if args.what == "table":
        return show_tables(HERE, tables(), args.write)
    args.work.mkdir(parents=True, exist_ok=True)
    models = _named(args.models)
    if args.what == "quality":
        rows = quality(models, _named(args.texts), args.work)
    else:
        rows = tasks(models, args.task_dir, args.work) if args.what == "tasks" else speed(models, args.work)
    cell = {"name": args.name, "what": args.what, "rows": rows, **provenance()}
    CELLS.mkdir(exist_ok=True)
    (CELLS / f"{args.what}-{args.name}.json").write_text(json.dumps(cell, indent=1) + "\n")


if __name__ == "__main__":
    main()
