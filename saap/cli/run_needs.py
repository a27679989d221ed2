"""What all of ``saap run`` takes, known before it begins: its largest step's memory, and all on the disk."""

from __future__ import annotations

from pathlib import Path

from export.needs import PACKED, export_needs
from saap.cli.export import PARITY_ROWS, PARITY_TOKENS
from saap.cli.run_options import TUNE_LENGTH, RunOptions
from saap.models.architectures import shape_of
from saap.models.checkpoint import read_config
from saap.models.weight_files import weights_bytes
from saap.prune.needs import prune_disk, prune_needs
from saap.prune.options import PruneOptions
from saap.prune.search.budget import Budget
from saap.prune.stages import share_of, stages_of
from saap.quantize.bundle_size import bundle_size
from saap.system.needs import PROCESS, Needs, check_disk, check_memory, gigabytes
from saap.tune.loop.options import TrainOptions
from saap.tune.needs import tune_needs

BITS, BLOCK = 4, 32  # of what run tunes and exports


def run_needs(directory: Path, budget: Budget, pruning: PruneOptions, options: RunOptions) -> dict[str, Needs]:
    """Of each step that may be the largest, read layer by layer where that is possible; the disk is that of all steps.

    Args:
        directory: the dense model.
        budget: what is asked of it.
    """
    shape, floats = shape_of(read_config(directory)), weights_bytes(directory)
    bundle = bundle_size(read_config(directory), BITS, BLOCK).total(shape)
    share, training = share_of(budget), TrainOptions()
    rows = training.micro_rows or training.rows_per_step
    disk = prune_disk(shape, floats, share, len(stages_of(budget, pruning)))
    disk |= {"the tuned model": round((1 - share) * bundle), "two bundles": round((2 - share) * bundle)}
    element = pruning.adaptive.element if pruning.method == "saap" else "none"
    steps = {
        "pruning": prune_needs(shape, options.sequences, options.length, floats, streamed=True, element=element),
        "tuning": tune_needs(shape, BITS, BLOCK, rows * TUNE_LENGTH, streamed=True),
        "exporting": export_needs(shape, bundle, PARITY_ROWS * PARITY_TOKENS),
        "evaluating": Needs({"the process": PROCESS, "both bundles, packed": round((2 - share) * PACKED * bundle)}),
    }
    return {name: Needs(needs.memory, disk) for name, needs in steps.items()}


def check_run(directory: Path, out: Path, budget: Budget, pruning: PruneOptions, options: RunOptions) -> None:
    """Refuse what memory or disk is too small for.

    Raises:
        UserError: naming the step, the sum, and what there is.
    """
    steps = run_needs(directory, budget, pruning, options)
    name = max(steps, key=lambda step: steps[step].memory_bytes)
    others = ", ".join(f"{step} {gigabytes(needs.memory_bytes)}" for step, needs in steps.items() if step != name)
    advice = f"the other steps need {others}: call the commands one by one, or use a machine with more memory"
    check_memory(steps[name], f"a run, in its step {name},", advice)
    if not (out / "run.json").is_file():  # of a run that goes on, part lies there already; each step asks for its own
        check_disk(steps[name], out, "a run")
