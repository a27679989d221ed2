"""A model directory of integers that calibration text chose, without training."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from saap.base.allocator import kept_memory
from saap.base.needs import PROCESS, Needs, fits
from saap.base.progress import LOADING, WRITING, Progress
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config, slim_config, write_slim
from saap.models.needs import SQUARES
from saap.models.record import Integers, read_record
from saap.models.shape import ModelShape
from saap.models.streaming import load_streamed, moved, settle
from saap.models.weight_files import weights_hash
from saap.quantize.gptq import compensated_matrices
from saap.quantize.groups import IntegerForm, check_widths, quantize_model
from saap.system.gpu import fits_device
from saap.system.precision import fast_float32
from saap.system.processes import training_device

CHOOSING = 6  # bytes per weight of a matrix whose integers are chosen: a copy, codes, and codes as they are packed


@fast_float32()
@kept_memory()
def write_integers(
    model_dir: Path, out: Path, form: IntegerForm, rows: torch.Tensor, text: Integers, progress: Progress | None = None
) -> Path:
    """Write a directory that holds error-compensated integers (:mod:`saap.quantize.gptq`) in place of floats.

    Args:
        rows: calibration ids [sequences, tokens].
        text: where they come from, as the record holds it.

    Raises UserError: widths that are not whole groups, or activations that overflow.
    """
    config, record, weights = read_config(model_dir), read_record(model_dir), weights_hash(model_dir)
    shape = shape_of(config)
    if not form.own:  # which was planned for these widths
        check_widths(shape, form.group_size)
    whole = Needs({"the process": PROCESS, "integers": integer_bytes(shape, form.bits, form.group_size),
                   **choosing_needs(shape, streamed=False)})  # fmt: skip
    report = progress or (lambda label, done, total: None)
    report(LOADING, 0, 0)
    device = training_device()
    streamed = not (fits(whole) and fits_device(whole, device))
    model = load_streamed(model_dir, device=device) if streamed else moved(load_model(model_dir), device)
    matrices = compensated_matrices(model, rows, form, progress)
    quant = quantize_model(model, form.bits, form.group_size, form.head_bits, matrices)
    del matrices
    settle(model)
    record["integers"] = {
        "method": "gptq",
        "sequences": rows.shape[0],
        "tokens": rows.shape[1],
        "sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
        "from_sha256": weights,
        **text,
    }
    report(WRITING, 0, 0)
    return write_slim(
        out,
        model_dir,
        slim_config(config, shape, quant),
        ((name, tensor.cpu()) for name, tensor in model.state_dict().items()),
        record,
    )


def integer_bytes(shape: ModelShape, bits: int, group_size: int) -> int:
    """Sum up a model's integers, scales and zero points."""
    return round(shape.parameters * (bits / 8 + 4 / group_size))


def choosing_needs(shape: ModelShape, *, streamed: bool) -> dict[str, int]:
    """Sum up bytes by what they are for, beside the process and the integers themselves."""
    layers = [shape.weights_of(s) for s in shape.layers]
    floats = {"embedding and head": 4 * shape.resident_outside, "a layer": 4 * max(layers)}
    return {
        **(floats if streamed else {"weights": 4 * shape.parameters}),
        "X X^T": 4 * SQUARES * max(sizes.ffn for sizes in shape.layers) ** 2,
        "choosing the head": CHOOSING * shape.vocab * shape.hidden,
    }
