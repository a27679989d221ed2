"""``saap devices costs``: times the shapes of a model on this device or a board. The command line's room."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from devices.common.progress import Progress
from saap.cli.console import Console, print_table
from saap.system.files import check_place

if TYPE_CHECKING:
    from bench.costs import Costs, CostsOptions
    from bench.remote import Target

CACHES = 4  # last-level caches that the probe's weights should exceed, where the model does


@dataclass(frozen=True)
class Precision:
    """Of the stacks that are timed; None is 4 bits in groups of 32, or what a bundle or a tuned directory holds."""

    bits: int | None = None
    group_size: int | None = None


def costs_step(
    model: str, out: Path, options: CostsOptions, precision: Precision, device: Target, console: Console
) -> None:
    """``saap devices costs MODEL -o cost.json``: measure, write, and show what was found."""
    costs = probe_costs(model, out, options, precision, device, console.report)
    console.finish()
    show_costs(out, costs)


def probe_costs(
    model: str | Path,
    out: Path,
    options: CostsOptions,
    precision: Precision,
    device: Target,
    progress: Progress | None = None,
) -> Costs:
    """Time a model's layers at all their sizes on a device and write the table; the graphs are made here.

    Args:
        model: a model directory (its ``config.json`` is enough), a bundle, or anything that ``saap prune`` takes.
        out: the JSON file.

    Raises:
        UserError, BundleError, CostsError, DecoderError: the user's input, or too little memory.
        BoardError: naming the board and what to do.
    """
    from bench.costs.measure import write_costs
    from devices.probe.host import probe
    from export.graph.probe_model import WEIGHT_LIMIT, read_probe_model
    from export.graph.probe_stacks import write_probe_stacks
    from saap.models.resolve import resolve

    check_place(out)
    path = Path(model)
    if not any((path / name).is_file() for name in ("config.json", "bundle.json")):
        path = resolve(model, progress=progress)
    limit = WEIGHT_LIMIT if device.url else max(WEIGHT_LIMIT, CACHES * (probe()["last_level_cache_bytes"] or 0))
    source = read_probe_model(path, precision.bits, precision.group_size, limit)
    with tempfile.TemporaryDirectory(prefix="saap-costs-") as work:
        stacks = write_probe_stacks(source, Path(work), progress=progress)
        costs = device.costs(stacks, options, progress=progress)
    write_costs(out, costs)
    return costs


def show_costs(out: Path, costs: Costs) -> None:
    """A table per thread count, and what a step is made of."""
    for table in costs.threads:
        count = table.n_threads
        click.echo(f"one layer with {count} {'thread' if count == 1 else 'threads'} at {costs.depth} tokens:")
        attention = [(f"{c.query_heads} query, {c.kv_heads} KV heads", c.ms) for c in table.attention]
        ffn = [(f"FFN {c.width}", c.ms) for c in table.ffn]
        print_table("", ["part", "us"], [[name, f"{1000 * ms:.1f}"] for name, ms in [*attention, *ffn]])
        node = "an unknown time" if table.node_ms is None else f"{1000 * table.node_ms:.1f} us"
        click.echo(
            f"  a step of the whole stack takes {table.step_ms:.2f} ms, {table.constant_ms:.2f} ms of it outside "
            f"its layers; a node costs {node} apart from its arithmetic"
        )
    click.echo(f"{out}: written")
