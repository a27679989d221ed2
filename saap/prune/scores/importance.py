"""Estimation: how much the loss rises when a coupled structure goes, streamed sequence by sequence.

For calibration sequence j of T tokens with loss L_j (mean NLL per token) and gradient g_j, removing structure G sets
its weights w to zero, and a second-order Taylor expansion with the empirical Fisher in place of the Hessian gives

* vector-wise   I_v(G) = | mean_j t_j - c/2 mean_j t_j^2 |,   t_j(G) = sum_w g_j w
* element-wise  I_e(G) = sum_w | mean_j(g_j) w - c/2 mean_j (g_j w)^2 |            (exact)
                I_e(G) = mean_j sum_w | g_j w - c/2 (g_j w)^2 |                     (streamed: an upper bound)

after LLM-Pruner (arXiv 2305.11627) and SAAP (arXiv 2412.15127). Ours is a third one between the two,

* token-wise    I_t(G) = 1/2 mean_j T sum_tokens p_jt^2,   p_jt = the product of the structure's output and its gradient

the Fisher of the structure's own mask, token by token: sum_tokens p_jt = t_j over the output slices. It rests on
tokens, not on sequences, so that the same text says more.

Vector and token scores need no gradient of a weight: by the chain rule t_j over the rows of a matrix is the sum over
tokens of its output times the output's gradient, and over columns of its input times the input's. The element score
does; such gradients are consumed in post-accumulate hooks and freed at once. Peak memory is weights + one layer +
activations; the exact element score keeps two numbers per weight of the layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.models.layer_walk import removed_hooks
from saap.models.matrices import Matrix, matrices_of
from saap.models.shape import ATTENTION, KINDS, ModelShape
from saap.prune.options import Element, Slices

TYPES = tuple(type_ for kind in KINDS.values() for type_ in kind.types)
ROWS = 2  # sequences of a pass that needs no gradient of a weight: a quarter faster than one, on AVX2
WRITES = tuple(kind.writes for kind in KINDS.values())  # roles of which a structure has columns, of the others rows


@dataclass(frozen=True)
class Scores:
    """Scores of a logical matrix (layer, role): one number per structure (FFN channel, query head or KV head)."""

    products: dict[tuple[int, str], torch.Tensor]  # t_j of the matrix's slice, [sequences, structures]
    element: dict[tuple[int, str], torch.Tensor]  # the element-wise score, [structures]; or empty
    token: dict[tuple[int, str], torch.Tensor]  # the token-wise score, [structures], of the roles that write
    c: float  # weight of the second-order term
    loss: float  # mean over the sequences, nats per token

    def vector(self, kind: str, shape: ModelShape, slices: Slices = "all") -> list[torch.Tensor]:
        """I_v(G) of structure type ``kind`` per layer, [structures]."""
        return [
            (t.mean(0) - self.c / 2 * t.square().mean(0)).abs()
            for t in per_structure(self.products, kind, shape, slices)
        ]

    def fluctuating(self, kind: str, shape: ModelShape, slices: Slices = "all") -> list[torch.Tensor]:
        """I_j(G) = |t_j - c/2 t_j^2| per layer, [sequences, structures]: what stability looks at."""
        return [(t - self.c / 2 * t.square()).abs() for t in per_structure(self.products, kind, shape, slices)]

    def fine(self, kind: str, shape: ModelShape, slices: Slices = "all") -> list[torch.Tensor]:
        """I_e(G) per layer, [structures]."""
        return per_structure(self.element, kind, shape, slices)

    def tokenwise(self, kind: str, shape: ModelShape) -> list[torch.Tensor]:
        """I_t(G) per layer, [structures]."""
        return per_structure(self.token, kind, shape, "output")

    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by names, from which :meth:`named` makes the scores again."""
        return {
            f"{part}.{layer}.{role}": tensor
            for part in ("products", "element", "token")
            for (layer, role), tensor in getattr(self, part).items()
        }

    @classmethod
    def named(cls, tensors: Mapping[str, torch.Tensor], c: float, loss: float) -> Scores:
        """Build scores from named tensors; KeyError or ValueError for other names."""
        parts: dict[str, dict[tuple[int, str], torch.Tensor]] = {"products": {}, "element": {}, "token": {}}
        for name, tensor in tensors.items():
            part, layer, role = name.split(".")
            parts[part][int(layer), role] = tensor
        return cls(**parts, c=c, loss=loss)


def merged(parts: Sequence[Scores]) -> Scores:
    """Merge the scores of portions of the sequences; exact element scores do not add up."""
    counts = [len(next(iter(part.products.values()))) for part in parts]

    def mean(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
        products = (each * count for each, count in zip(numbers, counts, strict=True))
        return sum(products, torch.zeros(())) / sum(counts)

    return Scores(
        products={key: torch.cat([part.products[key] for part in parts]) for key in parts[0].products},
        element={key: mean([part.element[key] for part in parts]) for key in parts[0].element},
        token={key: mean([part.token[key] for part in parts]) for key in parts[0].token},
        c=parts[0].c,
        loss=sum(part.loss * count for part, count in zip(parts, counts, strict=True)) / sum(counts),
    )


def per_structure(
    sums: dict[tuple[int, str], torch.Tensor], kind: str, shape: ModelShape, slices: Slices = "all"
) -> list[torch.Tensor]:
    """Add up the matrices that a structure has slices in, per layer [..., structures].

    The chain rule makes t_j of a channel's slices in up_proj and down_proj the same number, so that ``all`` counts a
    channel two to three times against a head; ``output`` takes the columns of down_proj and o_proj alone. A group's
    numbers include its query heads.

    ``kind``: the type of structure.
    """
    lead = next(iter(sums.values())).shape[:-1]
    (block,) = (block for block in KINDS.values() if kind in block.types)
    result = []
    for index, layer in enumerate(shape.layers):
        if not layer.has(block):
            result.append(torch.zeros(*lead, 0))
        elif block is not ATTENTION:
            roles = block.roles if slices == "all" else (block.writes,)
            result.append(torch.stack([sums[index, role] for role in roles]).sum(0))
        else:
            heads = sums[index, "output"] if slices == "output" else sums[index, "query"] + sums[index, "output"]
            if slices == "all" and (index, "head_gate") in sums:
                heads = heads + sums[index, "head_gate"]
            if kind == "group":
                heads = heads.unflatten(-1, (layer.kv_heads, layer.heads_per_group)).sum(-1)
                if slices == "all" and not layer.reads:
                    heads = heads + sums[index, "key"] + sums[index, "value"]
            result.append(heads)
    return result


def estimate(
    model: PreTrainedModel,
    shape: ModelShape,
    ids: torch.Tensor,
    *,
    c: float | None = None,
    element: Element = "streamed",
    progress: Progress | None = None,
) -> Scores:
    """Score every structure of ``model`` on calibration sequences.

    Args:
        ids: [sequences, tokens] int64.
        c: weight of the second-order term; None is the number of tokens per sequence, which corrects for the loss being
            a mean over tokens (the literature prints 1).
        element: whether the element score is wanted, which takes half as long again, and which form of it.

    Raises:
        UserError: the loss is not finite on a sequence.
    """
    c = float(ids.shape[1]) if c is None else c
    sums = Sums(shape, c, element)
    with watched(model, matrices_of(model, shape), sums):
        losses = backward(model, ids, progress, ROWS if element == "none" else 1)
    return sums.scores(len(ids), sum(losses) / len(losses))


def backward(model: PreTrainedModel, ids: torch.Tensor, progress: Progress | None, rows: int = 1) -> list[float]:
    """Backward passes of ``rows`` sequences at once, whose gradients hooks consume; the sequences' losses."""
    losses: list[float] = []
    for part in ids.split(rows):
        advance(progress, "scoring (sequences)", len(losses), len(ids))
        part = part.to(model.device)
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        each = (
            F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none").view(len(part), -1).mean(1)
        )
        losses += [check_loss(float(loss), len(losses) + number) for number, loss in enumerate(each.detach())]
        each.sum().backward()
    advance(progress, "scoring (sequences)", len(ids), len(ids))
    return losses


def check_loss(loss: float, index: int) -> float:
    """Return the loss itself; UserError if it is NaN or infinite."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} on calibration sequence {index}: check the model and the text")
    return loss


@dataclass
class Sums:
    """Collects, per logical matrix, sums over each structure's slice."""

    shape: ModelShape
    c: float
    kind: Element
    vector: dict[tuple[int, str], list[torch.Tensor]] = field(default_factory=dict)
    element: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    token: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    # Exact scores only: sums over sequences of g and g^2 per weight, and the weights.
    whole: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def consume(self, matrices: list[Matrix], weight: nn.Parameter) -> None:
        """Reduce this sequence's gradient of one linear to one number per structure and free it."""
        assert weight.grad is not None
        gradient, weight.grad = weight.grad, None
        for matrix in matrices:
            self._reduce(matrix, gradient[matrix.rows], weight.detach()[matrix.rows])

    def _reduce(self, matrix: Matrix, gradient: torch.Tensor, weight: torch.Tensor) -> None:
        key, axis = (matrix.layer, matrix.role), summed_axis(matrix.role)
        if self.kind == "exact":
            first, second, _ = self.whole.get(key) or (torch.zeros_like(weight), torch.zeros_like(weight), weight)
            self.whole[key] = (first.add_(gradient), second.addcmul_(gradient, gradient), weight)
        product = gradient.mul_(weight)
        self.vector.setdefault(key, []).append(self._by_structure(product.sum(axis), *key))
        if self.kind == "streamed":
            # Few passes over memory: they cost as much as the backward pass itself.
            fine = torch.linalg.vector_norm(torch.addcmul(product, product, product, value=-self.c / 2), 1, dim=axis)
            self.element[key] = self.element.get(key, 0) + self._by_structure(fine, *key)

    def consume_input(self, matrix: Matrix, inputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """Products of what structures put into output or down and its gradient, both [sequences, tokens, K]."""
        product = self._by_structure(inputs * gradient, matrix.layer, matrix.role)
        key = (matrix.layer, matrix.role)
        self.token[key] = self.token.get(key, 0) + product.shape[1] / 2 * product.square().sum((0, 1))
        if self.kind == "none":
            self.vector.setdefault(key, []).extend(product.sum(1))

    def consume_rows(self, matrices: list[Matrix], outputs: torch.Tensor, gradient: torch.Tensor) -> None:
        """t_j of the rows of a linear, whose outputs without bias and their gradient are [sequences, tokens, N]."""
        product = (outputs * gradient).sum(1)
        for matrix in matrices:
            summed = self._by_structure(product[:, matrix.rows], matrix.layer, matrix.role)
            self.vector.setdefault((matrix.layer, matrix.role), []).extend(summed)

    def _by_structure(self, numbers: torch.Tensor, layer: int, role: str) -> torch.Tensor:
        width = self.shape.width_of(role, self.shape.layers[layer])
        return numbers if width == 1 else numbers.unflatten(-1, (-1, width)).sum(-1)

    def scores(self, sequences: int, loss: float) -> Scores:
        """Return the scores over this many sequences, on the CPU; ``loss`` is their mean."""
        for key, (first, second, weight) in self.whole.items():
            taylor = first.mul_(weight).sub_(second.mul_(weight).mul_(weight), alpha=self.c / 2)
            total = torch.linalg.vector_norm(taylor, 1, dim=summed_axis(key[1]))
            self.element[key] = self._by_structure(total, *key)
        return Scores(
            products={key: torch.stack(rows).cpu() for key, rows in self.vector.items()},
            element={key: (total / sequences).cpu() for key, total in self.element.items()},
            token={key: (total / sequences).cpu() for key, total in self.token.items()},
            c=self.c,
            loss=loss,
        )


def summed_axis(role: str) -> int:
    """Return the axis to sum over: a structure is a column of a matrix that writes to the stream, a row of others."""
    return 0 if role in WRITES else 1


@contextmanager
def watched(model: PreTrainedModel, matrices: list[Matrix], sums: Sums) -> Iterator[None]:
    """Inside the block a backward pass adds the products of these matrices to the sums; no gradient is kept."""
    by_linear: dict[nn.Linear, list[Matrix]] = {}
    for matrix in matrices:
        by_linear.setdefault(matrix.linear, []).append(matrix)
    with frozen(model), removed_hooks() as handles:
        _watch(model, by_linear, sums, handles)
        yield


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside the block, but those that it asks for; flags and gradients come back."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _watch(
    model: PreTrainedModel, by_linear: dict[nn.Linear, list[Matrix]], sums: Sums, handles: list[RemovableHandle]
) -> None:
    if sums.kind == "none":  # then nothing else starts a graph
        embedding: nn.Module = model.get_input_embeddings()
        handles.append(embedding.register_forward_hook(lambda _, args, output: output.requires_grad_(True)))
    for linear, parts in by_linear.items():
        if parts[0].role in WRITES:
            handles.append(linear.register_forward_pre_hook(partial(_watch_input, parts[0], sums)))
        if sums.kind != "none":
            linear.weight.requires_grad_(True)
            handles.append(linear.weight.register_post_accumulate_grad_hook(partial(sums.consume, parts)))
        elif parts[0].role not in WRITES:
            handles.append(linear.register_forward_hook(partial(_watch_output, parts, sums)))


# Hooks hold detached tensors: one that holds its own tensor is never freed, nor is the graph behind it.
def _watch_input(matrix: Matrix, sums: Sums, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    args[0].register_hook(partial(sums.consume_input, matrix, args[0].detach()))


def _watch_output(matrices: list[Matrix], sums: Sums, linear: nn.Linear, _: object, output: torch.Tensor) -> None:
    plain = output.detach() if linear.bias is None else output.detach() - linear.bias.detach()
    output.register_hook(partial(sums.consume_rows, matrices, plain))
