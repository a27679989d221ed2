"""Rows of a field at one planned speed."""

from __future__ import annotations

import json
from pathlib import Path

from saap.models.record import read_record
from studies.common import Cell, provenance, saap

ANSWERS = 32


def row(name: str, command: list[str], texts: dict[str, str], tokens: int, work: Path) -> Cell:
    """Prune, tune and judge one row of a field by commands that anyone can type."""
    slim, tuned = work / name, work / f"{name}-tuned"
    if not (slim / "saap.json").is_file():
        saap("prune", *command, "-o", slim)
    if not (tuned / "saap.json").is_file():
        saap("tune", slim, "-o", tuned, "--teacher", command[0], "--tokens", tokens)
    plan = read_record(slim)["plan"]
    cell: Cell = {
        "asked": [word for word in command if not word.startswith("/")], "tokens": tokens,
        "planned": plan["planned"]["speedup"], "removed": plan["planned"]["ratio"],
        "group": plan["bundle"]["block"],
        "eights": len(plan["bundle"].get("matrices", {})),
        "vocabulary": [
            plan["bundle"].get("embedding_bits", plan["bundle"]["bits"]),
            plan["bundle"].get("blocks", {}).get("lm_head", plan["bundle"]["block"]),
        ],
        "gone": sum((not layer["query_heads"]) + (not layer["ffn"]) for layer in plan["layers"]),
    }  # fmt: skip
    for kind, path in (("untuned", slim), ("tuned", tuned)):
        for text, file in texts.items():
            out = work / f"{name}-{kind}-{text}.json"
            if not out.is_file():
                words = ["--reference", command[0], "--max-chunks", 40, "--json", out]
                saap("eval", path, *(["--text", file] if file else []), *words)
            scores = json.loads(out.read_text())["rows"][-1]
            cell[f"{kind} {text}"] = {key: scores[key] for key in ("perplexity", "bits_per_byte", "kl", "top1")}
    out = work / f"{name}-answers.json"
    if not out.is_file():
        saap("eval", tuned, "--reference", command[0], "--answers", ANSWERS, "--json", out)
    scores = json.loads(out.read_text())["answers"]["scores"][-1]
    cell["answers"] = {key: scores[key] for key in ("agreement", "same", "repetition")}
    if trials := plan.get("trials"):
        cell["trials"] = trials
    return {**cell, **provenance()}
