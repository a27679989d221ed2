"""Group-wise tuning of a quantised slim model: what is trained is what is deployed.

The integers are chosen first, with their errors compensated on the first rows of the text (:mod:`saap.gptq`), and stay;
one factor per group is trained (multiplicative "scale" fold):

    W = s (1 + D) (q - z),  D = 0 at the start,  dL/dD = s * sum_{k in group} (q - z)_k dL/dW_k

together with the RMS norms. Scales are rounded to float16-representable numbers inside the forward pass
(straight-through), so that the trained model and the exported graph hold the same numbers, and the deployed kernel does
not change at all. The weight gradient of a matrix is formed for one matrix at a time and reduced at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from saap.architectures import architecture_of, require_llama
from saap.checkpoint import check_output, load_model, read_config, read_record, slim_config, weights_hash, write_slim
from saap.errors import SaapError
from saap.gptq import compensated_matrices
from saap.group_quant import quantize_model
from saap.importance import Progress
from saap.modeling_slim import GroupQuantLinear

SMALLEST_FACTOR = 0.05  # 1 + D stays positive: a group must not change its sign


@dataclass(frozen=True)
class TuneOptions:
    """Precision and schedule.

    Attributes:
        bits, block: of the linears.
        head_bits: of embedding and head, which are quantised and not trained; None is ``bits``.
        integers: ``gptq`` (:mod:`saap.gptq`) or ``nearest``, which takes each matrix by itself.
        calibration_rows: sequences that gptq looks at.
        rows_per_step: sequences per optimiser step.
        learning_rate: peak of the cosine schedule, for D (relative to the scales).
        norm_learning_rate: peak for the norms' weights.
        teacher_weight: share of the loss that is KL to the teacher, where there is one.
    """

    bits: int = 4
    block: int = 32
    head_bits: int | None = None
    integers: str = "gptq"
    calibration_rows: int = 16
    rows_per_step: int = 4
    learning_rate: float = 3e-3
    norm_learning_rate: float = 1e-3
    warmup_share: float = 0.1
    teacher_weight: float = 0.5
    clip: float = 1.0


class _GroupMatMul(torch.autograd.Function):
    """y = x (scale * centred)^T; the dequantised matrix is made twice instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, centred: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """x [..., K], centred [N, groups, block] int8, scale [N, groups] -> [..., N]."""
        ctx.save_for_backward(x, centred, scale)
        return F.linear(x, (centred.to(x.dtype) * scale.unsqueeze(-1)).flatten(1))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, None, torch.Tensor | None]:
        """Gradients for x and scale."""
        x, centred, scale = ctx.saved_tensors
        floats = centred.to(x.dtype)
        grad_x = grad @ (floats * scale.unsqueeze(-1)).flatten(1) if ctx.needs_input_grad[0] else None
        weight_grad = grad.flatten(0, -2).t() @ x.flatten(0, -2)
        return grad_x, None, torch.einsum("ngb,ngb->ng", weight_grad.view_as(floats), floats)


class TunableGroups(nn.Module):
    """A GroupQuantLinear with one trainable factor 1 + D per group."""

    def __init__(self, base: GroupQuantLinear) -> None:
        super().__init__()
        self.base = base
        centred = base.centred()
        self.centred = centred.to(torch.int8) if base.bits < 8 else centred
        self.delta = nn.Parameter(torch.zeros_like(base.scales))

    def tuned_scales(self) -> torch.Tensor:
        """[N, groups]: s (1 + D), rounded to what float16 represents; the gradient passes straight through."""
        exact = self.base.scales * (1 + self.delta).clamp_min(SMALLEST_FACTOR)
        return exact + (exact.detach().half().float() - exact.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        y = _GroupMatMul.apply(x, self.centred, self.tuned_scales())
        return y if self.base.bias is None else y + self.base.bias


def tune(
    slim_dir: str | Path,
    out: str | Path,
    rows: torch.Tensor,
    options: TuneOptions,
    *,
    teacher: PreTrainedModel | None = None,
    lineage: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Quantise a slim (or dense) directory, tune its group scales on text, write a directory with integer weights.

    Args:
        rows: [sequences, tokens] int64 of tuning text, used once each, in this order.
        teacher: the dense model; adds the KL divergence of its next-token distribution to the loss.

    Returns:
        the training loss of every step.

    Raises:
        SaapError: already tuned, widths that are not whole groups, too little text, a loss that is not finite.
    """
    check_output(out)
    config = read_config(slim_dir)
    require_llama(config, "tuning")
    if config.get("slim_quant"):
        raise SaapError(f"{slim_dir} holds tuned integers already: tune the slim directory it came from")
    if len(rows) < options.rows_per_step:
        raise SaapError(
            f"{len(rows)} sequences of tuning text are fewer than one step's {options.rows_per_step}: give more"
        )
    model = load_model(slim_dir)
    start = time.monotonic()
    head_bits = options.head_bits or options.bits
    matrices = None
    if options.integers == "gptq":
        matrices = compensated_matrices(
            model, rows[: options.calibration_rows], options.bits, options.block, head_bits, progress
        )
    quant = quantize_model(model, options.bits, options.block, head_bits, matrices)
    groups = attach(model)
    losses = train(model, groups, rows, options, teacher=teacher, progress=progress)
    detach(model)
    from saap.architectures import shape_of

    tensors = ((name, tensor) for name, tensor in model.state_dict().items())
    record = {k: v for k, v in read_record(slim_dir).items() if k != "format"}
    record["tuning"] = {
        "fold": "scale",
        "options": asdict(options),
        "tokens": rows.numel(),
        "teacher": teacher is not None,
        "seconds": round(time.monotonic() - start, 1),
        "losses": [round(loss, 5) for loss in losses],
        "from_sha256": weights_hash(slim_dir),
        **(lineage or {}),
    }
    write_slim(out, slim_dir, slim_config(config, shape_of(config), quant), tensors, record)
    return losses


def attach(model: PreTrainedModel) -> list[TunableGroups]:
    """Wrap every GroupQuantLinear of the decoder layers; everything else but the norms is frozen."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    architecture = architecture_of(model.config)
    wrapped = []
    layers: Any = model.get_submodule(architecture.layers)
    for layer in layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, GroupQuantLinear):
                    wrapped.append(TunableGroups(child))
                    setattr(parent, name, wrapped[-1])
    for norm in norms(model):
        norm.requires_grad_(True)
    return wrapped


def norms(model: PreTrainedModel) -> list[nn.Parameter]:
    """Weights of all RMS norms."""
    return [p for name, p in model.named_parameters() if "norm" in name]


def detach(model: PreTrainedModel) -> None:
    """Write the tuned scales into the integers' holders and take the wrappers off."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, TunableGroups):
                child.base.scales = child.tuned_scales().detach()
                setattr(parent, name, child.base)


def train(
    model: PreTrainedModel,
    groups: list[TunableGroups],
    rows: torch.Tensor,
    options: TuneOptions,
    *,
    teacher: PreTrainedModel | None,
    progress: Progress | None,
) -> list[float]:
    """AdamW with warm-up and cosine; one pass over ``rows``."""
    parameters = [
        {"params": [g.delta for g in groups], "lr": options.learning_rate},
        {"params": norms(model), "lr": options.norm_learning_rate},
    ]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.0, betas=(0.9, 0.95))
    steps = len(rows) // options.rows_per_step
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, options.warmup_share))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    losses: list[float] = []
    for step in range(steps):
        batch = rows[step * options.rows_per_step : (step + 1) * options.rows_per_step]
        loss = loss_of(model, batch, teacher, options.teacher_weight)
        if not torch.isfinite(loss):
            raise SaapError(f"the loss became {loss.item()} at step {step + 1} of {steps}: lower the learning rate")
        loss.backward()
        nn.utils.clip_grad_norm_(trained, options.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if progress:
            progress(f"tuning, loss {sum(losses[-8:]) / len(losses[-8:]):.3f}", step + 1, steps)
    return losses


def loss_of(model: PreTrainedModel, ids: torch.Tensor, teacher: PreTrainedModel | None, weight: float) -> torch.Tensor:
    """Mean NLL per predicted token, mixed with KL(teacher || model) where there is a teacher."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    nll = F.cross_entropy(logits, ids[:, 1:].flatten())
    if teacher is None:
        return nll
    with torch.inference_mode():
        target = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    divergence = F.kl_div(logits.log_softmax(-1), target.clone(), log_target=True, reduction="batchmean")
    return (1 - weight) * nll + weight * divergence


def cosine(steps: int, warmup_share: float) -> Callable[[int], float]:
    """Factor of the learning rate per step: linear warm-up, then a cosine to a tenth."""
    warmup = max(1, round(steps * warmup_share))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return factor
