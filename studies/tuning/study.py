"""The recovery by tuning: one small JSON per cell, so a table may take several runs.

    python -m studies.tuning.study cell fold=scale                    # one cell; any of the settings below
    python -m studies.tuning.study run                                # all rows; hours on two cores
    python -m studies.tuning.study table [--write]

A cell prunes SmolLM2 with SAAP's defaults, tunes it on C4, Wikipedia and Dolly (the same tokens in the same order for
every method), writes a bundle, and measures NLL with ONNX Runtime on rows of that text that nothing was tuned on
("held"), on the head of WikiText-2 *train* ("other", 80 chunks) and on WikiText-2 raw test ("test160"). Choices are
made by the first two; the test is read with --test.

Settings: ratio=0.2|0.5, tokens=400000, fold=scale|lora|none, rank (of LoRA), lr (of scales 3e-3 if left out),
teacher=0.5 (share of the loss; 0 is none), head=4|8, bits, group, integers=gptq|nearest. fold=lora is float LoRA: it
is measured as it is and, merged, with integers=nearest|gptq as a bundle. fold=none is the model before tuning: pruned,
or with ratio=0 dense, as it is or with integers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from studies.common import Cell, add_write_option, markdown, parser_of, read_cells, show_tables

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
Variant = dict[str, Any]  # settings of a cell
DEFAULTS: Variant = {"ratio": 0.2, "tokens": 400_000, "fold": "scale", "teacher": 0.5}
TABLE: tuple[Variant, ...] = (
    {"fold": "scale"}, {"fold": "lora"}, {"fold": "lora", "integers": "nearest"},
    {"fold": "lora", "integers": "gptq"},
    {"fold": "scale", "teacher": 0}, {"fold": "lora", "teacher": 0},
    {"fold": "lora", "teacher": 0, "integers": "nearest"},
)  # fmt: skip
TEXTS = {"held": "held", "other": "WikiText-2 *train*", "test160": "test"}
FEW = 3072  # tokens of the cells that compare memory


def slug(variant: Variant) -> str:
    """A file name for a cell."""
    return "_".join(f"{key}={value}" for key, value in sorted(variant.items()))


def setting(pair: str) -> tuple[str, Any]:
    """A setting as it was typed, ``key=value``: JSON, or a word."""
    key, value = pair.split("=", 1)
    try:
        return key, json.loads(value.lower())
    except json.JSONDecodeError:
        return key, value


def tables() -> dict[str, str]:
    """The tables of the README."""
    cells = read_cells(CELLS)

    def of(chosen: Callable[[Variant], bool]) -> str:
        return settings_table([cell for cell in cells if chosen(cell["variant"])])

    whole = (0, DEFAULTS["tokens"])  # 0: of what is not tuned
    return {
        "twenty": of(lambda v: v["ratio"] == 0.2 and v["tokens"] in whole and "lr" not in v),
        "fifty": of(lambda v: v["ratio"] == 0.5),
        "rates": of(lambda v: v["fold"] == "scale" and is_rate(v)),
        "memory": of(lambda v: v["tokens"] == FEW),
    }


def is_rate(variant: Variant) -> bool:
    """Whether a cell compares rates of scales."""
    return variant["ratio"] == 0.2 and variant["tokens"] > FEW and variant["teacher"] == DEFAULTS["teacher"]


def settings_table(cells: list[Cell]) -> str:
    """A row a cell, what is trained, its peak, and NLL; the best on held text first."""
    lines = []
    for cell in cells:
        training = cell.get("training", {})
        trained = f"{training['trained'] / 1e6:.2f} M" if training.get("trained") else ""
        rate = f"{training['tokens'] / training['seconds']:.0f}" if training.get("seconds") else ""
        peak = f"{cell['peak_gb']:.2f}" if "peak_gb" in cell else ""
        nll = [f"{cell['nll'][text]:.3f}" if text in cell["nll"] else "" for text in TEXTS]
        order = (cell["variant"]["tokens"], nll[0])
        lines.append((order, [words(cell["variant"]), kind(cell["variant"]), trained, rate, peak, *nll]))
    heads = ["settings", "what is measured", "trained", "tokens/s", "peak, GB", *TEXTS.values()]
    return markdown(heads, [line for _, line in sorted(lines)])


def words(variant: Variant) -> str:
    """Settings as they are typed, but for what is the default."""
    rest = {k: v for k, v in variant.items() if k != "teacher" and DEFAULTS.get(k, "") != v}
    if variant["fold"] == "none":
        rest.pop("tokens", None)
    elif variant["teacher"] != DEFAULTS["teacher"]:
        rest["teacher"] = variant["teacher"]
    return ", ".join(f"`{k}={v}`" for k, v in sorted({"fold": variant["fold"], **rest}.items()))


def kind(variant: Variant) -> str:
    """Return how a cell is measured: as float or as an int4 bundle."""
    return "float" if variant["fold"] in ("lora", "none") and "integers" not in variant else "int4 bundle"


def main(arguments: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["cell", "run", "table"])
    parser.add_argument("settings", nargs="*", help="cell: key=value")
    parser.add_argument("--test", action="store_true", help="read the test too: when the choices are made")
    add_write_option(parser)
    args = parser.parse_args(arguments)
    if args.what == "table":
        return show_tables(HERE, tables(), args.write)
    from studies.tuning.measure import run_cell

    cell: Variant = dict(map(setting, args.settings))
    for variant in [cell] if args.what == "cell" else TABLE:
        run_cell(variant, args.test)


if __name__ == "__main__":
    main()
