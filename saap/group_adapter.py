"""Group adapters on a quantised model: attach, save, load, fold.

The layers (:mod:`saap.group_folds`) are PEFT's, so that a saved adapter is a PEFT adapter: ``adapter_config.json`` and
``adapter_model.safetensors``. PEFT keeps neither the fold nor the registration of the layers: it drops fields that it
does not know from ``adapter_config.json`` with a warning only. So ``group_adapter.json`` beside them holds the fold and
the hash of the integers that the adapter was trained on, and is required. What PEFT would warn about when it loads
(keys that are missing or left over) is refused here.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from saap.architectures import architecture_of
from saap.errors import SaapError
from saap.group_folds import FOLDS, GroupAdapterLayer
from saap.integrity import differing, hashes
from saap.json_files import read_object, write_document
from saap.modeling_slim import GroupQuantLinear
from saap.outputs import beside, put_in_place
from saap.sealed_tensors import save_tensors

FORMAT = 1
RECORD, WEIGHTS, PEFT_CONFIG = "group_adapter.json", "adapter_model.safetensors", "adapter_config.json"
NAME = "default"  # of the adapter, PEFT's own
PREFIX = "base_model.model."  # before a module's name in a PeftModel


@dataclass(frozen=True)
class GroupAdapterConfig:
    """What is trained for each group of input columns.

    Attributes:
        fold: ``scale`` or ``zero-point`` (:mod:`saap.group_folds`).
        rank: r of D = B A * alpha / r; None or 0 is a free D.
        alpha: None is r.

    Raises:
        SaapError: a fold that does not exist, or options that do not go together.
    """

    fold: str = "scale"
    rank: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.fold not in FOLDS:
            raise SaapError(f"fold {self.fold!r} does not exist: choose one of {', '.join(FOLDS)}")
        if (self.rank or 0) < 0:
            raise SaapError(f"rank {self.rank} is negative: give 1 or more, or 0 for a free factor per group")
        if self.alpha is not None and (not self.rank or self.alpha <= 0):
            raise SaapError(f"alpha {self.alpha:g} needs a rank, and must be above 0: leave it out, or give both")


def attach(model: PreTrainedModel, config: GroupAdapterConfig, seed: int = 0) -> PeftModel:
    """Put an adapter on every linear of the decoder layers, in place; all other parameters are frozen.

    Args:
        seed: of the A matrices, apart from torch's global one.

    Raises:
        SaapError: linears that hold no integers or have an adapter already, or a PEFT that did not put our
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
            raise SaapError(
                f"PEFT {peft.__version__} does not take the layers of group adapters ({str(error).splitlines()[0]}): "
                "install another version, 0.17 to 0.21"
            ) from error
    found = {name.removeprefix(PREFIX): type(m) for name, m in adapted.named_modules() if isinstance(m, BaseTunerLayer)}
    if found != dict.fromkeys(holders, layer_class):
        wrong = sorted(n for n in {*holders, *found} if found.get(n) is not layer_class or n not in holders)
        raise SaapError(
            f"PEFT {peft.__version__} put no group adapter on {wrong[0]} ({len(wrong)} of {len(holders)} linears): "
            "install another version, 0.17 to 0.21"
        )
    adapted.saap_adapter = config
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


def save_adapter(model: PeftModel, directory: str | Path) -> None:
    """Write the adapter, and with it every other parameter of the model that is trained, such as norms.

    Raises:
        SaapError: the directory holds something else than an adapter.
    """
    out, adapted = Path(directory), layers_of(model)
    if not adapted or any(layer.merged for layer in adapted.values()):
        raise SaapError("the model has no adapter, or it is folded already: save the adapter before folding it")
    if out.exists() and not (out / RECORD).is_file() and (out.is_file() or any(out.iterdir())):
        raise SaapError(f"{out} holds other files: give a directory that is new, empty, or an earlier adapter")
    # PEFT's own save_pretrained would ask the hub, and leave the other parameters out.
    tensors = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    inside = tuple(f"{PREFIX}{name}." for name in adapted)
    also = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad and not n.startswith(inside)}
    record = {
        "format": FORMAT,
        "adapter": asdict(_config_of(model)),
        "integers_sha256": integers_hash(adapted),
        "also": sorted(also),
    }
    with beside(out, "partial") as written:
        save_tensors(tensors | also, written / WEIGHTS)
        model.peft_config[NAME].save_pretrained(str(written))
        write_document(written / RECORD, {**record, "files": hashes(written)})
        put_in_place(written, out)


def load_adapter(model: PreTrainedModel, directory: str | Path) -> PeftModel:
    """Put a saved adapter on the quantised model that it was trained on, ready to be trained on.

    Raises:
        SaapError: no adapter there, or it does not fit the model to the last key, size and integer. The model is then
            as it was.
    """
    path, remedy = Path(directory), "save the adapter again with save_adapter"
    record, written = read_object(path / RECORD, remedy), read_object(path / PEFT_CONFIG, remedy)
    if bad := differing(path, record.get("files", {})):
        raise SaapError(f"{path / bad} is damaged (not the file that was written there): {remedy}")
    try:
        tensors = load_file(path / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise SaapError(f"{path / WEIGHTS} cannot be read ({str(error).splitlines()[0]}): {remedy}") from None
    if record.get("format") != FORMAT:
        raise SaapError(f"{path / RECORD} has format {record.get('format')!r}, this saap reads {FORMAT}: upgrade saap")
    try:
        config, also = GroupAdapterConfig(**record["adapter"]), list(record["also"])
    except (KeyError, TypeError) as error:
        raise SaapError(f"{path / RECORD} is damaged ({error}): {remedy}") from None
    adapted = attach(model, config)
    try:
        _check_fit(adapted, path, tensors, also, written)
        if record.get("integers_sha256") != integers_hash(layers_of(adapted)):
            raise SaapError(f"{path} was trained on other integers: load it on the quantised model that it came from")
    except SaapError:
        detach(adapted)
        raise
    result: Any = set_peft_model_state_dict(adapted, tensors, adapter_name=NAME)
    if result.unexpected_keys:  # after the checks above, only PEFT's renaming can bring this about
        raise SaapError(f"PEFT {peft.__version__} did not load {result.unexpected_keys[0]}: install another version")
    for name in also:
        adapted.get_parameter(name).requires_grad_(True)
    return adapted


def integers_hash(layers: dict[str, GroupAdapterLayer]) -> str:
    """sha256 over the integers, scales and zero points under the adapters."""
    digest = hashlib.sha256()
    for name, layer in sorted(layers.items()):
        digest.update(f"{name} {layer.base.bits} {layer.base.block}".encode())
        for part in (layer.base.qweight, layer.base.scales, layer.base.zero_points):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _holders(model: PreTrainedModel) -> dict[str, GroupQuantLinear]:
    """The decoder layers' linears by name, all of integers and untouched."""
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise SaapError("the model has an adapter already: fold or detach it first")
    inside = architecture_of(model.config).layers
    linears = {
        f"{inside}.{name}": module
        for name, module in model.get_submodule(inside).named_modules()
        if isinstance(module, nn.Linear | GroupQuantLinear)
    }
    holders = {name: module for name, module in linears.items() if isinstance(module, GroupQuantLinear)}
    if not linears or len(holders) < len(linears):
        plain = next(iter(linears.keys() - holders.keys()), "the model")
        raise SaapError(f"{plain} holds no integers, which a group adapter is put on: quantise the model first")
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


def _config_of(model: PeftModel) -> GroupAdapterConfig:
    config: GroupAdapterConfig = model.saap_adapter
    return config


def _check_fit(
    model: PeftModel, path: Path, tensors: dict[str, torch.Tensor], also: list[str], written: dict[str, Any]
) -> None:
    """Refuse tensors that are not, one by one, what the adapted model wants."""
    parameters = dict(model.named_parameters())
    wanted = {n: t.shape for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}
    wanted |= {name: parameters[name].shape for name in also if name in parameters}
    for name in sorted((wanted.keys() ^ tensors.keys()) | (set(also) - wanted.keys())):
        which = "lacks" if name in wanted else "has, and the model has not,"
        raise SaapError(f"{path} {which} {name}: load it on the model that it was trained on")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise SaapError(
                f"{path} has {name} of {tuple(tensors[name].shape)}, the model wants {tuple(shape)}: load it on the "
                "model that it was trained on"
            )
    own = model.peft_config[NAME].to_dict()
    for key in ("peft_type", "target_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        if written.get(key) != own[key]:
            raise SaapError(f"{path / PEFT_CONFIG} was changed in {key!r}: save the adapter again with save_adapter")
