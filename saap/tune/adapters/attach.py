"""Group adapters on a quantised model, as PEFT layers (:mod:`saap.tune.adapters.folds`): attach, train, fold."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from saap.models.architectures import architecture_of
from saap.models.modeling_slim import GroupQuantLinear
from saap.system.errors import UserError
from saap.tune.adapters.folds import FOLDS, GroupAdapterLayer

NAME = "default"  # of the adapter, PEFT's own
PREFIX = "base_model.model."  # before a module's name in a PeftModel


@dataclass(frozen=True)
class GroupAdapterConfig:
    """What is trained for each group of input columns.

    Attributes:
        fold: ``scale`` or ``zero-point`` (:mod:`saap.tune.adapters.folds`).
        rank: r of D = B A * alpha / r; None or 0 is a free D.
        alpha: None is r.

    Raises:
        UserError: a fold that does not exist, or options that do not go together.
    """

    fold: str = "scale"
    rank: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.fold not in FOLDS:
            raise UserError(f"fold {self.fold!r} does not exist: choose one of {', '.join(FOLDS)}")
        if (self.rank or 0) < 0:
            raise UserError(f"rank {self.rank} is negative: give 1 or more, or 0 for a free factor per group")
        if self.alpha is not None and (not self.rank or self.alpha <= 0):
            raise UserError(f"alpha {self.alpha:g} needs a rank, and must be above 0: leave it out, or give both")


def attach(model: PreTrainedModel, config: GroupAdapterConfig, seed: int = 0) -> PeftModel:
    """Put an adapter on every linear of the decoder layers, in place; all other parameters are frozen.

    Args:
        seed: of the A matrices, apart from torch's global one.

    Raises:
        UserError: linears that hold no integers or have an adapter already, or a PEFT that did not put our
            layer on each of them.
    """
    holders = _holders(model)
    free = not config.rank
    ranks = {name: holder.scales.shape[1] for name, holder in holders.items()} if free else {}
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank or 1,
        lora_alpha=config.alpha or config.rank or 1,  # type: ignore[arg-type]  # PEFT only divides by r
        target_modules=_pattern(model, holders),
        rank_pattern=_by_value(ranks),
        alpha_pattern=_by_value(ranks),
    )
    layer_class = FOLDS[config.fold]
    lora._register_custom_module({GroupQuantLinear: partial(layer_class, free=free)})  # type: ignore[dict-item]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # which PEFT reads
        try:
            adapted: Any = get_peft_model(model, lora, adapter_name=NAME)
        except ValueError as error:
            raise UserError(
                f"PEFT {peft.__version__} does not take the layers of group adapters ({str(error).splitlines()[0]}): "
                "install another version, 0.17 to 0.21"
            ) from error
    found = {name.removeprefix(PREFIX): type(m) for name, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)}
    if found != dict.fromkeys(holders, layer_class):
        wrong = sorted(n for n in {*holders, *found} if found.get(n) is not layer_class or n not in holders)
        raise UserError(
            f"PEFT {peft.__version__} put no group adapter on {wrong[0]} ({len(wrong)} of {len(holders)} linears): "
            "install another version, 0.17 to 0.21"
        )
    return adapted


def layers_of(model: nn.Module) -> dict[str, GroupAdapterLayer]:
    """The adapted linears by their name in the plain model."""
    return {n.removeprefix(PREFIX): m for n, m in model.named_modules() if isinstance(m, GroupAdapterLayer)}


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters, in the order of the model."""
    return [p for layer in layers_of(model).values() for p in layer.parameters() if p.requires_grad]


def fold(model: PeftModel) -> PreTrainedModel:
    """Write what the adapted model computes into its integers' holders; the plain model, on the same modules."""
    for layer in layers_of(model).values():
        layer.merge()
    return detach(model)


def detach(model: PeftModel) -> PreTrainedModel:
    """Take the adapter off and drop it; the plain model, on the same modules."""
    plain: Any = model.unload()
    if hasattr(plain, "peft_config"):  # older PEFT leaves it there and warns at the next adapter
        del plain.peft_config
    return plain


def _holders(model: PreTrainedModel) -> dict[str, GroupQuantLinear]:
    """The decoder layers' linears by name, all of integers and untouched."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise UserError("the model has an adapter already: fold or detach it first")
    inside = architecture_of(model.config).layers
    linears = {
        f"{inside}.{name}": module
        for name, module in model.get_submodule(inside).named_modules()
        if isinstance(module, nn.Linear | GroupQuantLinear)
    }
    holders = {name: module for name, module in linears.items() if isinstance(module, GroupQuantLinear)}
    if not linears or len(holders) < len(linears):
        plain = next(iter(linears.keys() - holders.keys()), "the model")
        raise UserError(f"{plain} holds no integers, which a group adapter is put on: quantise the model first")
    return holders


def _pattern(model: PreTrainedModel, holders: dict[str, GroupQuantLinear]) -> str:
    """A regular expression for the names; PEFT would write a set of names in another order each time."""
    inside = re.escape(architecture_of(model.config).layers)
    names = sorted({re.sub(rf"^{inside}\.\d+\.", "", name) for name in holders})
    return rf"{inside}\.\d+\.({'|'.join(re.escape(name) for name in names)})"


def _by_value(numbers: dict[str, int]) -> dict[str, int]:
    """One pattern of names for each number, as PEFT's rank and alpha patterns may be: it tries them one by one."""
    names = defaultdict(list)
    for name, number in numbers.items():
        names[number].append(re.escape(name))
    return {"|".join(which): number for number, which in names.items()}
