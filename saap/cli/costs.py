"""``saap devices probe --costs``: times the shapes of a model on this device or a board. The command line's room."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from saap.cli.console import Console, print_table
from saap.system.files import check_place
from saap.system.interrupt import ended_as_by_a_person

CACHES = 4  # last-level caches that the probe's weights should exceed, where the model does


@dataclass(frozen=True)
class Place:
    """A board that is probed instead of this device.

    Attributes:
        url: as for ``saap bench --on``.
        wheels: a folder of wheels for a board that reaches no package index.
        own: packages are installed into a venv there; False: those of the board's Python.
    """

    url: str
    wheels: Path | None = None
    own: bool = True


def probe_costs_step(
    model: str,
    out: Path,
    *,
    threads: Sequence[int] | None,
    bits: int | None,
    block: int | None,
    depth: int | None,
    on: Place | None = None,
    console: Console,
) -> None:
    """``saap devices probe --costs MODEL -o cost.json``: measure, write, and show what was found."""
    with ended_as_by_a_person():
        document = probe_costs(
            model, out, threads=threads, bits=bits, block=block, depth=depth, on=on, progress=console.report,
            say=console.say,
        )  # fmt: skip
    console.finish()
    show_costs(out, document)


def probe_costs(
    model: str | Path,
    out: Path,
    *,
    threads: Sequence[int] | None = None,
    bits: int | None = None,
    block: int | None = None,
    depth: int | None = None,
    on: Place | None = None,
    progress: Callable[[str, float, float], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time a model's layers at all their sizes on this device, or on a board, and write the table.

    Args:
        model: a model directory (its ``config.json`` is enough), a bundle, or anything that ``saap prune`` takes.
        out: the JSON file.
        threads: counts, each measured by itself; None is the number of physical cores.
        bits: 4, 8 or 32; None is 4, or what a bundle or a tuned directory holds.
        block: quantisation group; None is 32, or what a bundle or a tuned directory holds.
        depth: tokens in the cache; None is 192, the middle of 128 tokens after a prompt of 128.
        on: a board: the graphs are made here and timed there.
        say: told what a person should know, a line each.

    Returns:
        The document.

    Raises:
        UserError, BundleError, CostsError, DecoderError: the user's input, or too little memory.
        BoardError: naming the board and what to do.
    """
    from bench.costs.measure import DEPTH, measure_costs, write_costs
    from bench.measure.cores import physical_cores
    from bench.remote.costs import costs_on
    from devices.probe.host import probe
    from export.graph.probe_model import WEIGHT_LIMIT, read_probe_model
    from export.graph.probe_stacks import write_probe_stacks
    from saap.models.resolve import resolve

    check_place(out)
    path = Path(model)
    if not any((path / name).is_file() for name in ("config.json", "bundle.json")):
        path = resolve(model, progress=progress)
    limit = WEIGHT_LIMIT if on else max(WEIGHT_LIMIT, CACHES * (probe()["last_level_cache_bytes"] or 0))
    depth = DEPTH if depth is None else depth
    counts = list(dict.fromkeys(threads)) if threads else None
    source = read_probe_model(path, bits, block, limit)
    with tempfile.TemporaryDirectory(prefix="saap-costs-") as work:
        stacks = write_probe_stacks(source, Path(work), progress=progress)
        if on is None:
            document = measure_costs(stacks, counts or [physical_cores()], depth=depth, progress=progress)
        else:
            document = costs_on(
                on.url, stacks, counts, depth=depth, wheels=on.wheels, own=on.own, progress=progress, say=say
            )
    write_costs(out, document)
    return document


def show_costs(out: Path, document: dict[str, Any]) -> None:
    """A table per thread count, and what a step is made of."""
    for table in document["threads"]:
        count = table["n_threads"]
        click.echo(f"one layer with {count} {'thread' if count == 1 else 'threads'} at {document['depth']} tokens:")
        attention = [(f"{c['query_heads']} query, {c['kv_heads']} KV heads", c["ms"]) for c in table["attention"]]
        ffn = [(f"FFN {c['width']}", c["ms"]) for c in table["ffn"]]
        print_table("", ["part", "us"], [[name, f"{1000 * ms:.1f}"] for name, ms in [*attention, *ffn]])
        node = "an unknown time" if table["node_ms"] is None else f"{1000 * table['node_ms']:.1f} us"
        click.echo(
            f"  a step of the whole stack takes {table['step_ms']:.2f} ms, {table['constant_ms']:.2f} ms of it outside "
            f"its layers; a node costs {node} apart from its arithmetic"
        )
    click.echo(f"{out}: written")
