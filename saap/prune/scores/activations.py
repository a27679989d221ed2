"""Statistics of activations from one forward pass: what Wanda, FLAP, ShortGPT and bias compensation read.

Per layer, for the inputs X [tokens, K] of the output projection and of down_proj: the mean, the fluctuation (sample
variance: FLAP, arXiv 2312.11983) and the mean square, whose root is Wanda's input norm ||X_k||_2 up to the square root
of the number of tokens (arXiv 2306.11695, equation 1). And per layer ShortGPT's block influence, 1 - the mean cosine of
the hidden states that enter and leave it (arXiv 2403.03853, equation 1).

Statistics are merged batch by batch in float64 (Chan, Golub & LeVeque 1979), so nothing is buffered and a large mean
does not swallow a small variance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.models.layer_walk import layers_of, removed_hooks
from saap.models.matrices import matrices_of
from saap.models.shape import ModelShape

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of one linear's inputs over all tokens, each [K] float32: K is its number of columns."""

    mean: torch.Tensor  # of x_k
    fluctuation: torch.Tensor  # sample variance of x_k, divided by tokens - 1
    mean_square: torch.Tensor  # of x_k; not centred


@dataclass(frozen=True)
class Activations:
    """Statistics of one pass."""

    # By layer and role: of the output projection, K = query_heads * head_dim, and of down_proj, K = the FFN's width.
    inputs: dict[tuple[int, str], InputStatistics]
    influence: torch.Tensor  # block influence, [layers] float32, between 0 (nothing changes) and 2
    tokens: int  # how many tokens the numbers are of


def collect(
    model: PreTrainedModel, shape: ModelShape, ids: torch.Tensor, *, batch: int = 4, progress: Progress | None = None
) -> Activations:
    """Run ids [sequences, tokens] through ``model`` once; its weights and flags are left as they were.

    Raises:
        UserError: too few tokens, or an activation that is not finite.
    """
    if ids.dim() != 2 or ids.numel() < 2:
        raise UserError("activations need calibration text of at least 2 tokens: give more")
    running: dict[tuple[int, str], _Running] = {}
    cosines = [0.0] * len(shape.layers)
    with torch.inference_mode(), _forward_hooks(model, shape, running, cosines):
        for start in range(0, len(ids), batch):
            advance(progress, "reading activations (sequences)", start, len(ids))
            # The bare decoder: no statistic needs the logits.
            model.base_model(input_ids=ids[start : start + batch].to(model.device), use_cache=False)
    advance(progress, "reading activations (sequences)", len(ids), len(ids))
    return Activations(
        inputs={place: numbers.statistics() for place, numbers in running.items()},
        influence=1 - torch.tensor(cosines, dtype=torch.float64).div(ids.numel()).float(),
        tokens=ids.numel(),
    )


class _Running:
    """Count, mean and summed squared deviations, in float64."""

    def __init__(self, columns: int) -> None:
        self.count = 0
        self.mean = torch.zeros(columns, dtype=torch.float64)
        self.deviations = torch.zeros(columns, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> None:
        """Merge rows [tokens, columns]."""
        rows = rows.double()
        mean = rows.mean(0)
        deviations = (rows - mean).square_().sum(0).cpu()
        mean, earlier = mean.cpu(), self.count
        self.count += len(rows)
        shift = mean - self.mean
        self.mean += shift * (len(rows) / self.count)
        self.deviations += deviations + shift.square() * (earlier * len(rows) / self.count)

    def statistics(self) -> InputStatistics:
        mean_square = self.deviations / self.count + self.mean.square()
        fluctuation = self.deviations / (self.count - 1)
        return InputStatistics(self.mean.float(), fluctuation.float(), mean_square.float())


@contextmanager
def _forward_hooks(
    model: PreTrainedModel, shape: ModelShape, running: dict[tuple[int, str], _Running], cosines: list[float]
) -> Iterator[None]:
    def see_input(layer: int, role: str, module: object, args: Tensors) -> None:
        rows = args[0].flatten(0, -2)
        if not torch.isfinite(rows).all():
            raise UserError(
                f"layer {layer}: the inputs of {role} are not finite on the calibration text: check model and text"
            )
        running.setdefault((layer, role), _Running(rows.shape[1])).add(rows)

    def see_layer(
        layer: int, module: object, args: Tensors, kwargs: dict[str, torch.Tensor], result: torch.Tensor | Tensors
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = result[0] if isinstance(result, tuple) else result
        cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).sum().item()
        if cosine != cosine:
            raise UserError(f"layer {layer}: its output is not finite on the calibration text: check model and text")
        cosines[layer] += cosine

    with removed_hooks() as handles:
        for matrix in matrices_of(model, shape):
            if matrix.role in ("output", "down"):
                see = partial(see_input, matrix.layer, matrix.role)
                handles.append(matrix.linear.register_forward_pre_hook(see))
        for index, layer in enumerate(layers_of(model)):
            handles.append(layer.register_forward_hook(partial(see_layer, index), with_kwargs=True))
        yield
