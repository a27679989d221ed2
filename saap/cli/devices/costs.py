"""``saap devices costs``: times the shapes of a model on this device or a board."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import click

from bench.costs.options import CostsOptions
from bench.remote.options import BoardOptions
from export.engine.table import ONNXRUNTIME, row_of
from saap.base.files import calling
from saap.base.options import Option, refuse_unused
from saap.base.progress import Progress
from saap.base.wording import counted
from saap.cli.console import Console, print_table, tell
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import complete_model, directory, force

if TYPE_CHECKING:
    from bench.costs.measure import Costs
    from bench.remote.target import Target

QUICK_ROUNDS, QUICK_SECONDS = 5, 0.5  # of few sizes: what differs between processes is most of the noise
CACHES = 4  # last-level caches that the probe's weights should exceed, where the model does


@dataclass(frozen=True)
class CostsCommand:
    """The options of ``saap devices costs``; None is 4 bits in groups of 32, or as a tuned model holds."""

    options: CostsOptions = field(default_factory=CostsOptions)
    bits: Annotated[Literal[4, 8, 32] | None, Option("Bits of the linears; default: 4, or the tuned model's.")] = None
    group_size: Annotated[
        Literal[32, 64, 128] | None, Option("Weights per scale; default: 32, or the tuned model's.", old=("--group",))
    ] = None
    quick: Annotated[bool, Option("A first look: a minute for a small model, where the whole takes five.")] = False
    on: Annotated[
        str | None, Option("A board: ssh://user@host[:port], adb://[serial], labgrid://PLACE.", metavar="URL")
    ] = None
    board: BoardOptions = field(default_factory=BoardOptions)

    @property
    def shortened(self) -> CostsCommand:
        """The options, with fewer and shorter processes if they are ``quick``."""
        if not self.quick:
            return self
        return replace(self, options=replace(self.options, rounds=QUICK_ROUNDS, seconds=QUICK_SECONDS))

    def check(self) -> None:
        self.board.check(on_a_board=self.on is not None)
        if self.on is not None:
            refuse_unused(self, ("engine",), "this host", "leave --on or it out")
        if self.bits == 32:
            refuse_unused(self, ("group_size",), "integers, and 32 bits are none", "give --bits 4 or 8")


@click.command(cls=OptionsCommand)
@click.argument("model", shell_complete=complete_model)
@click.option("-o", "--out", type=directory, default=Path("cost.json"), show_default=True, help="The JSON file.")
@options_of(CostsCommand)
@force
def costs(model: str, out: Path, options: CostsCommand) -> None:
    """Measure what each layer size of MODEL takes, on this device or on a board.

    With --on the graphs are made here and timed there; the board needs Python and nothing else.

    \b
    Example:
      saap devices costs smollm2-135m -t 1 -o cost.json
      saap devices costs smollm2-135m -t 4 --on ssh://pi@raspberrypi -o pi.json
    """
    from bench.remote.target import target
    from saap.base.interrupt import ended_as_by_a_person

    options.check()
    options = options.shortened
    with Console() as console, ended_as_by_a_person():
        device = target(options.on, options.board, console.say)
        table = probe_costs(model, out, options, device, console.report)
        console.finish()
    keep_costs(out, table)


def probe_costs(
    model: str | Path, out: Path, command: CostsCommand, device: Target, progress: Progress | None = None
) -> Costs:
    """Time a model's layers at all their sizes on a device; the graphs are made here.

    The model is a directory (its ``config.json`` is enough) or anything that ``saap prune`` takes; ``out``
    is where the table will go, refused before the work where it cannot.
    """
    from devices.probe.host import probe
    from export.gguf.probe import check_probe, write_probe_gguf
    from export.graph.probe_model import WEIGHT_LIMIT, read_probe_model
    from export.graph.probe_stacks import COARSE, FINE, stacks_of, write_probe_stacks
    from saap.base.outputs import COSTS, check_place
    from saap.models.resolve import resolve

    check_place(out, COSTS, model)
    path = Path(model)
    if not any((path / name).is_file() for name in ("config.json", "bundle.json")):
        path = resolve(model, progress=progress)
    limit = WEIGHT_LIMIT if device.url else max(WEIGHT_LIMIT, CACHES * (probe()["last_level_cache_bytes"] or 0))
    source = read_probe_model(path, command.bits, command.group_size, limit)
    if command.options.engine != ONNXRUNTIME:
        check_probe(source)
    needed = stacks_of(source, COARSE if command.quick else FINE)
    if command.options.engine != ONNXRUNTIME:
        needed = [stack for stack in needed if not stack.part]  # its blocks have 32 weights
    with tempfile.TemporaryDirectory(prefix="saap-costs-") as work, calling(Path(work), "the probe graphs"):
        stacks = write_probe_stacks(source, Path(work), needed, progress)
        if command.options.engine != ONNXRUNTIME:
            for stack, of in zip(stacks, needed, strict=True):
                write_probe_gguf(source, of, stack / str(row_of(command.options.engine).file))
        return device.costs(stacks, command.options, progress=progress)


def keep_costs(out: Path, costs: Costs) -> None:
    """Write the table and show it, also where there is no more room for a file."""
    from bench.costs.measure import write_costs

    try:
        write_costs(out, costs)
    finally:
        show_costs(costs)
    click.echo(f"{out}: written")


def show_costs(costs: Costs) -> None:
    for reason in costs.reasons:
        tell(f"{costs.status}: {reason}; end other programs and measure again")
    for table in costs.threads:
        count = table.n_threads
        tell(f"one layer with {counted(count, 'thread')} at {counted(costs.depth, 'token')}:")
        attention = [(f"{c.query_heads} query, {c.kv_heads} KV heads", c.ms) for c in table.attention]
        ffn = [(f"FFN {c.width}", c.ms) for c in table.ffn]
        ffn += [(f"convolution {c.channels}", c.ms) for c in table.conv]
        ffn += [(f"delta net of {c.heads} key heads", c.ms) for c in table.delta]
        heads = [(f"outside the layers with {c.rows:,} words", c.ms) for c in table.head]
        for of in table.forms:
            own = ("attention", of.attention_ms), ("FFN", of.ffn_ms), ("outside the layers", of.outside_ms)
            heads += [
                (f"{name} at {of.bits} bit in groups of {of.group_size}", ms) for name, ms in own if ms is not None
            ]
        print_table("", ["part", "us"], [[name, f"{1000 * ms:.1f}"] for name, ms in [*attention, *ffn, *heads]])
        node = "an unknown time" if table.node_ms is None else f"{1000 * table.node_ms:.1f} us"
        tell(
            f"  a step of the whole stack takes {table.step_ms:.2f} ms, {table.constant_ms:.2f} ms of it outside "
            f"its layers; a node costs {node} apart from its arithmetic"
        )
