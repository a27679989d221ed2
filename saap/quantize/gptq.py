"""Error-compensating integers: what rounding one column breaks, the columns after it repair.

GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1): with H = X X^T over calibration inputs and U the upper Cholesky
factor of H^-1, column k is rounded and its error divided by U_kk is taken off the later columns along U_k. Groups are
symmetric, which needs no zero points at run time; the scale of a group is the one of a small grid with
the least error weighted by diag(H). Columns stay in their order, since permuted groups have no fast kernel.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch
from torch import nn
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.models.architectures import architecture_of
from saap.models.layer_walk import LayerArguments, layer_inputs, layers_of, removed_hooks, run_layer
from saap.models.slim_quant import MatrixForm
from saap.models.streaming import present
from saap.quantize.groups import (
    IntegerForm,
    QuantMatrix,
    best_scales,
    check_groups,
    middle_zero_points,
    pack_codes,
    quantize,
)

DAMPING = 0.01  # of the mean of diag(H), as in the paper
LAZY = 256  # columns whose errors reach the columns after them in one product: the paper's lazy batch updates
ROWS = 8192  # of a vocabulary, that are rounded together


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group_size: int, inverse: torch.Tensor | None = None
) -> QuantMatrix:
    """Quantise a matrix.

    Args:
        weight: [N, K].
        hessian: X X^T [K, K] of its inputs, any positive factor.
        group_size: input columns that share a scale; divides K.
        inverse: :func:`inverse_factor` of ``hessian``, where it is known.

    Raises UserError: K is not whole groups, or the inputs were not finite.
    """
    check_groups(weight.shape[1], group_size, "a matrix")
    inverse = inverse_factor(hessian) if inverse is None else inverse
    importance, form = hessian.diagonal().float(), MatrixForm(bits, group_size)
    return QuantMatrix.stacked([_compensated(rows, importance, inverse, form) for rows in weight.split(ROWS)])


def _compensated(
    weight: torch.Tensor, importance: torch.Tensor, inverse: torch.Tensor, form: MatrixForm
) -> QuantMatrix:
    """Round column by column; ``importance`` [K] weighs the errors that scales are chosen by."""
    bits, group_size = form
    # [K, N]: a column of the matrix is one run of memory. A copy, which a transposed column vector would not be.
    rest = weight.detach().float().t().clone(memory_format=torch.contiguous_format)
    half, diagonal = 2 ** (bits - 1), inverse.diagonal().tolist()
    codes = torch.empty_like(rest, dtype=torch.uint8)
    scales = []
    lazy = max(group_size, LAZY // group_size * group_size)
    gaps, chosen = (rest.new_empty(rows, rest.shape[1]) for rows in (lazy, group_size))
    rounded = torch.empty_like(rest[0])
    for start in range(0, len(rest), group_size):
        end, batch = start + group_size, start // lazy * lazy
        batch_end = batch + lazy
        group = rest[start:end]
        scale = best_scales(group.t().unsqueeze(1), bits, importance[start:end])[:, 0]
        places = zip(group.unbind(), chosen.unbind(), gaps[start - batch :].unbind(), strict=False)
        for k, (column, code, gap) in enumerate(places):  # into memory that is there: a column is short, a call is not
            torch.div(column, scale, out=code).round_().clamp_(-half, half - 1)
            torch.mul(scale, code, out=rounded)
            torch.sub(column, rounded, out=gap).div_(diagonal[start + k])
            group[k + 1 :].addr_(inverse[start + k, start + k + 1 : end], gap, alpha=-1)
        codes[start:end] = chosen.add_(half)
        if end < batch_end:
            rest[end:batch_end].addmm_(
                inverse[start:end, end:batch_end].t(), gaps[start - batch : end - batch], alpha=-1
            )
        else:
            rest[end:].addmm_(inverse[batch:end, end:].t(), gaps[: end - batch], alpha=-1)
        scales.append(scale)
    packed = pack_codes(codes.t().contiguous().view(len(weight), -1, group_size), bits)
    stacked = torch.stack(scales, dim=1)
    return QuantMatrix(packed, stacked, middle_zero_points(stacked, bits), bits, group_size)


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """U upper triangular with U^T U = (H + damping)^-1, [K, K] float32; an input that is always 0 gets 1 there.

    H backwards is L L^T; L backwards is R, upper, with H = R R^T; and U is the inverse of R: half the work of
    inverting H and factoring that. On a CPU by scipy's LAPACK, which inverts triangles, in float32 as the authors do:
    the damping is far above what is lost there.

    Raises UserError: the inputs were not finite.
    """
    from scipy.linalg import lapack

    if not bool(torch.isfinite(hessian.diagonal()).all()):  # sums of squares: where they are, so are the rest
        raise UserError("calibration inputs are not finite: the model's activations overflow on this text")
    backwards = hessian.float().flip(0, 1)
    diagonal = backwards.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    if backwards.device.type == "cpu":
        factor, singular = lapack.spotrf(backwards.numpy().T, lower=1, clean=1, overwrite_a=1)
        if not singular:
            factor, singular = lapack.strtri(factor, lower=1, overwrite_c=1)
        inverse = torch.from_numpy(factor)
    else:
        lower, singular = torch.linalg.cholesky_ex(backwards)
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), device=lower.device), upper=False)
    if singular:
        raise UserError("the calibration inputs have no Cholesky factor: give more or other text")
    return inverse.flip(0, 1)


@torch.no_grad()
def compensated_matrices(
    model: PreTrainedModel, rows: torch.Tensor, form: IntegerForm, progress: Progress | None = None
) -> dict[str, QuantMatrix]:
    """Integers of every linear, the embedding and the head, chosen layer by layer, each fed by quantised layers.

    The weights of ``model`` are replaced by the numbers that the integers hold. A tied table is chosen for its use as
    the head, where an error meets every token.

    ``rows``: calibration ids [sequences, tokens].

    Returns module name -> integers.
    """
    architecture, layers = architecture_of(model.config), layers_of(model)
    matrices: dict[str, QuantMatrix] = {}
    walk = layer_inputs(model, rows)
    hidden = [batch.hidden for batch in walk]
    for index, layer in enumerate(layers):
        advance(progress, "choosing integers (layers)", index, len(layers))
        with present(layer):
            linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
            linears = {name: linear for name, linear in linears.items() if not architecture.is_float(name)}
            batches = [(x, batch.arguments[index]) for x, batch in zip(hidden, walk, strict=True)]
            for alike, hessian in _hessians(layer, linears, batches):
                called = {f"{architecture.layers}.{index}.{name}": linears[name] for name in alike}
                matrices |= _chosen(called, hessian, form)
            hidden = [run_layer(layer, x, arguments) for x, arguments in batches]
    advance(progress, "choosing integers (layers)", len(layers), len(layers))
    norm = model.get_submodule(architecture.final_norm)
    final = [norm(x).flatten(0, -2).float() for x in hidden]
    head, table = (model.get_parameter(f"{name}.weight") for name in (architecture.head, architecture.embedding))
    total = sum(x.t() @ x for x in final)
    matrices[architecture.head] = gptq(head, total, *form.vocabulary(architecture.head))
    matrices[architecture.embedding] = (
        matrices[architecture.head] if head is table else quantize(table, *form.vocabulary(architecture.embedding))
    )
    return matrices


def _chosen(linears: dict[str, nn.Linear], hessian: torch.Tensor, form: IntegerForm) -> dict[str, QuantMatrix]:
    """Integers of linears that are fed alike, which replace their weights; those of the same form at once."""
    inverse, matrices = inverse_factor(hessian), {}
    for own in {form.linear(name): None for name in linears}:
        alike = {name: linear for name, linear in linears.items() if form.linear(name) == own}
        sizes = [linear.out_features for linear in alike.values()]
        weight = torch.cat([linear.weight for linear in alike.values()])
        matrix = gptq(weight, hessian, *own, inverse)
        ends = list(accumulate(sizes))
        for (name, linear), size, end in zip(alike.items(), sizes, ends, strict=True):
            matrices[name] = matrix[end - size : end]
            linear.weight.copy_(matrices[name].dequantize())
    return matrices


def _hessians(
    layer: nn.Module, linears: dict[str, nn.Linear], batches: list[tuple[torch.Tensor, LayerArguments]]
) -> list[tuple[list[str], torch.Tensor]]:
    """Return the linears that are fed one tensor, and its X X^T."""
    sums: dict[str, torch.Tensor] = {}
    first: dict[str, str] = {}  # the linear that was fed the same tensor before
    last: tuple[torch.Tensor | None, str] = None, ""

    def add(name: str, _: nn.Module, args: tuple[torch.Tensor]) -> None:
        nonlocal last
        if last[0] is not args[0]:
            last = args[0], name
            x = args[0].flatten(0, -2).float()
            sums[name] = sums[name] + x.t() @ x if name in sums else x.t() @ x
        first[name] = last[1]

    with removed_hooks() as handles:
        handles += [linear.register_forward_pre_hook(partial(add, name)) for name, linear in linears.items()]
        for hidden, arguments in batches:
            run_layer(layer, hidden, arguments)
    return [([name for name in linears if first[name] == fed], total) for fed, total in sums.items()]
