"""One search over depth and width: is it better at one planned speed?

    python -m studies.search.study row search --speedup 1.5 --costs cost.json --work W --texts Dolly=dolly.txt
    python -m studies.search.study row shortgpt --speedup 1.5 --costs cost.json --work W --method shortgpt
    python -m studies.search.study halving --speedup 1.5 --seed 0 --costs cost.json --work W --text other.txt
    python -m studies.search.study table --write

What a command has made stays in --work, and is not made again.
"""

from __future__ import annotations

from pathlib import Path

from saap.base.writing import write_json
from studies.common import Cell, add_write_option, bar_table, markdown, parser_of, read_cells, show_tables

HERE = Path(__file__).resolve().parent
CELLS = HERE / "cells"
MODEL = "smollm2-135m"
ROWS = {
    "search": "**SAAP**",
    "normal": "**SAAP, `--effort normal`**",
    "shortgpt": "ShortGPT",
    "shortgpt-refit-64": "ShortGPT with our refit, groups of 64",
}
TEXTS = ("WikiText-2", "Dolly")


def tables() -> dict[str, str]:
    """The tables of the README."""
    from studies.search import halving

    trials = {cell["halving"]: cell for cell in read_cells(CELLS) if "halving" in cell}
    return {"rows": rows_table(), "halving": halving.table(trials), "halving-bar": bar_table([halving.bar(trials)])}


def rows_of() -> list[Cell]:
    return [cell for cell in read_cells(CELLS) if "row" in cell]


def rows_table() -> str:
    """Quality of every tuned row."""
    lines = []
    for cell in rows_of():
        method, _, speed = cell["row"].rpartition("-")
        columns = [
            f"{speed}x",
            ROWS[method],
            f"{cell['planned']:.3f}",
            f"{100 * cell['removed']:.0f} %",
            str(cell["gone"]),
        ]
        columns += [str(cell.get("group", 32)), str(cell.get("eights", 0))]
        for text in TEXTS:
            columns += [f"{cell[f'tuned {text}']['kl']:.3f}", f"{cell[f'tuned {text}']['perplexity']:.1f}"]
        answers = cell.get("answers")
        columns += (
            [f"{100 * answers['agreement']:.1f} %", f"{100 * answers['repetition']:.0f} %"] if answers else ["-", "-"]
        )
        lines.append((speed, cell[f"tuned {TEXTS[1]}"]["kl"], columns))
    heads = ["asked", "method", "planned", "layers' weights gone", "blocks gone", "weights to a scale"]
    heads.append("linears in 8 bit")
    for text in TEXTS:
        heads += [f"{text}: KL", "perplexity"]
    heads += ["answers: agreement", "repetition"]
    return markdown(heads, [columns for *_, columns in sorted(lines)])


def main() -> None:
    parser = parser_of(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("row")
    rows.add_argument("name", choices=ROWS)
    rows.add_argument("--speedup", type=float, required=True)
    rows.add_argument("--tokens", type=int, default=16_384)
    rows.add_argument("--method", default="saap")
    rows.add_argument("--compensate", choices=("none", "refit"))
    rows.add_argument("--costs", type=Path, required=True)
    rows.add_argument("--group-size", type=int)
    rows.add_argument("--effort")
    tried = commands.add_parser("halving")
    tried.add_argument("--speedup", type=float, required=True)
    tried.add_argument("--seed", type=int, default=0)
    tried.add_argument("--tokens", type=int, default=100_000)
    tried.add_argument("--in-full", type=int, default=8, help="plans tuned in full, the best after the first round")
    tried.add_argument("--costs", type=Path, required=True)
    tried.add_argument("--text", type=Path, required=True, help="that judges, and is neither learnt nor calibrated on")
    rows.add_argument("--texts", nargs="*", default=[], help="NAME=FILE of further texts")
    for each in (rows, tried):
        each.add_argument("--work", type=Path, required=True)
    add_write_option(commands.add_parser("table"))
    args = parser.parse_args()
    if args.command == "table":
        show_tables(HERE, tables(), args.write)
        return
    if args.command == "halving":
        from studies.search.halving import trial

        name = f"{args.speedup:g}x, seed {args.seed}"
        command = ["--speedup", str(args.speedup), "--costs", str(args.costs.resolve()), "--seed", str(args.seed)]
        text, work = args.text.resolve(), args.work.resolve()
        cell = {"halving": name} | trial(MODEL, command, text, args.tokens, work, args.in_full)
        write_json(CELLS / f"halving-{args.speedup:g}-seed{args.seed}.json", cell)
        return
    from studies.search.measure import row

    texts = {"WikiText-2": "", **dict(each.split("=", 1) for each in args.texts)}
    command = [MODEL, "--speedup", str(args.speedup), "--costs", str(args.costs.resolve())]
    command += ["--method", args.method] if args.method != "saap" else []
    command += ["--compensate", args.compensate] if args.compensate else []
    command += ["--group-size", str(args.group_size)] if args.group_size else []
    command += ["--effort", args.effort] if args.effort else []
    name = f"{args.name}-{args.speedup:g}"
    cell = {"row": name} | row(name, command, texts, args.tokens, args.work.resolve())
    write_json(CELLS / f"row-{name}.json", cell)


if __name__ == "__main__":
    main()
