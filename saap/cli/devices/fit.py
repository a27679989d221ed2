"""Bundles, written or planned, as :mod:`devices.fit` judges them; and what a run asks of pruning for a device."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from devices.fit.demands import CONTEXT
from saap import WHEEL
from saap.base.errors import UserError
from saap.cli.report import DeviceFit

if TYPE_CHECKING:
    from devices.fit.demands import Demands
    from devices.fit.memory import Model
    from export.bundle.manifest import BundleManifest
    from export.options import ExportOptions

BOARD = "USER@BOARD"


def read_model(bundle: Path) -> Model:
    from export.bundle.manifest import WEIGHTS, read_manifest

    manifest = read_manifest(bundle)
    weights = manifest.files.get(WEIGHTS)
    return _model_of(manifest, weights.bytes if weights else manifest.weight_bytes_per_token)


def _model_of(manifest: BundleManifest, file_bytes: int) -> Model:
    from devices.fit.memory import Model

    return Model(
        **{
            key: getattr(manifest, key)
            for key in (
                "target", "bits", "block", "accuracy_level", "weight_bytes_per_token", "kv_bytes_per_token", "kv_dtype",
                "context_length", "head_dim", "onnxruntime_min", "sliding",
            )
        },
        hidden=manifest.hidden_size,
        widest_ffn=max((layer.ffn for layer in manifest.layers), default=0),
        file_bytes=file_bytes,
        attention=tuple((layer.query_heads, layer.kv_heads) for layer in manifest.kv_layers),
    )  # fmt: skip


@dataclass(frozen=True)
class Planned:
    """The bundle that a model directory of floats will be, before its weights are read; for the cpu target."""

    model: Model
    parameters: int
    layer_weights: int
    layer_bytes: int  # of the weights file: what pruning takes from
    head_bytes: int  # what a head of other bits adds to the file, which pruning does not count

    @classmethod
    def of(cls, directory: Path, options: ExportOptions) -> Planned:
        from export.source import ModelSource, sized_manifest
        from export.write import graph_writer
        from saap.quantize.bundle_size import bundle_size

        source = ModelSource(directory)
        writer, shape = graph_writer(source, options), source.shape
        precision = writer.precision
        counted = bundle_size(source.config, precision.bits, precision.group_size)
        size = replace(counted, head_bits=precision.head_bits)
        whole, outside = size.total(shape), size.outside(shape)
        manifest = replace(
            sized_manifest(shape, precision, source.transformers_config),
            weight_bytes_per_token=whole - size.looked_up(shape),
            onnxruntime_min=writer.onnxruntime_min,
        )
        model, beside = _model_of(manifest, whole), outside - counted.outside(shape)
        return cls(model, shape.parameters, shape.layer_weights, whole - outside, beside)

    def bytes_at(self, kind: str, value: float) -> int | None:
        """Bytes of the weights file of a model that meets a requirement; None where a table of costs decides."""
        if kind == "max_bytes":
            return min(int(value) + self.head_bytes, self.model.file_bytes)
        if kind not in ("ratio", "max_params"):
            return None
        removed = value if kind == "ratio" else (self.parameters - value) / self.layer_weights
        return self.model.file_bytes - math.floor(removed * self.layer_bytes)

    def ratio_for(self, size: int) -> float:
        """Return the least ratio, of three digits, that leaves a weights file of so many bytes."""
        return math.ceil(1000 * (self.model.file_bytes - size) / self.layer_bytes) / 1000


def size_to_reach(
    demands: Demands, dense: Planned, asked: Mapping[str, float], default: float, reachable: Callable[[int], bool]
) -> int | None:
    """Bytes to prune to, where nothing is asked for and the ratio ``default`` is too little for the device; else None.

    Args:
        asked: the requirement that a person gave, or nothing.
        reachable: whether the model can be pruned to so many bytes, as ``--max-bytes`` counts them.

    Raises UserError: it cannot load there, or what was asked for does not fit; says what would.
    """
    from devices.fit.fitting import in_units, size_option

    for finding in demands.judge(dense.model).refusals:
        newer = "install a newer one in a Python of your own there, and say which with --set onnxruntime=VERSION"
        raise UserError(f"{demands.device.name}: {finding.what}: {newer}")
    ((kind, value),) = (asked or {"ratio": default}).items()
    whole, most = dense.model.file_bytes, demands.largest_file(dense.model)
    size, countable = dense.bytes_at(kind, value), in_units(most - dense.head_bytes)
    if most >= (whole if size is None else size):
        return None
    possible = countable > 0 and reachable(countable)
    if possible and not asked:
        return countable
    if possible and size is None:
        return None  # how large that is, the plan will tell
    advice = [f"--max-bytes {size_option(countable)}", f"--ratio {dense.ratio_for(most):g}"] if possible else []
    if asked and size is not None:
        raise does_not_fit(demands, dense.model, f"--{kind.replace('_', '-')} leaves", size, advice)
    raise does_not_fit(demands, dense.model, "the model has", whole, advice)


def check_pruned(demands: Demands, slim: Planned) -> None:
    """Refuse a pruned model that is too large for the device after all, as its sizes tell."""
    from devices.fit.fitting import size_option

    if not demands.judge(slim.model).fits:
        countable = demands.largest_file(slim.model) - slim.head_bytes
        advice = [f"--max-bytes {size_option(countable)}"] if countable > 0 else []
        raise does_not_fit(demands, slim.model, "the pruned model has", slim.model.file_bytes, advice)


def does_not_fit(demands: Demands, model: Model, subject: str, size: int, advice: list[str]) -> UserError:
    """Return the error of a weights file of ``size`` bytes; ``advice`` is what would fit, beside what is found here."""
    from devices.fit.fitting import with_bits
    from devices.fit.memory import largest_context

    device, asked = demands.device, demands.options
    lookup = model.file_bytes - model.weight_bytes_per_token
    pruned = replace(model, file_bytes=size, weight_bytes_per_token=max(size - lookup, 1))
    if model.bits == 8 and demands.judge(with_bits(pruned, 4)).fits:
        advice.append("--bits 4")
    if context := largest_context(pruned, device):
        advice.append(f"--set context={context}")
    if asked.memory is None:
        advice.append("--memory SIZE where there is more")
    most = demands.largest_file(model)
    room = f"one of {amount(most)}" if most > 0 else "none"
    return UserError(
        f"{subject} a weights file of {amount(size)}, and {device.name} has room for {room} beside a context of "
        f"{asked.context_of(model)} tokens: give {' or '.join(advice) or 'a smaller model'}"
    )


def amount(size: int) -> str:
    from saap.base.needs import gigabytes

    return gigabytes(size) if size >= 10**7 else f"{size / 1e3:.0f} kB"


def check_costs(profile: str, costs: Path) -> None:
    """Refuse a table of costs that was measured on another device than the one that the bundle is for."""
    from devices.profiles.profile import load_profiles, profile_of
    from saap.base.costs import COSTS

    names = COSTS.read(costs).device.get("compatible")
    board = profile_of(map(str, names), load_profiles()) if isinstance(names, list) else None
    if board not in (None, profile):
        raise UserError(
            f"{costs} was measured on {board}, and the bundle is for {profile}: measure there, with "
            f"`saap devices costs MODEL --on ssh://{BOARD}`, or leave --for out"
        )


def device_fit(demands: Demands, bundle: Path) -> DeviceFit:
    verdict, device = demands.judge(read_model(bundle)), demands.device
    return DeviceFit(
        name=device.name,
        fits=verdict.fits,
        context=verdict.context,
        takes=verdict.memory.total,
        has=verdict.available,
        memory=device.memory_source,
        threads=device.big_cores,
    )


def fit_in_words(fit: DeviceFit, bundle: str) -> str:
    verb = "takes" if fit["fits"] else "does not fit: it takes"
    return (
        f"On {fit['name']} {bundle} {verb} {amount(fit['takes'])} of {amount(fit['has'])} with a context of "
        f"{fit['context']} tokens ({fit['memory']})"
    )


def board_commands(fit: DeviceFit, bundle: Path) -> Iterator[tuple[str, str]]:
    """Yield the commands that bring a bundle to the device and run it there, each after its purpose."""
    threads = f" --threads {fit['threads']}" if fit["threads"] else ""
    context = f" --context {fit['context']}" if fit["context"] != CONTEXT else ""
    yield "copy it to the board", f"scp -r {shlex.quote(str(bundle))} {BOARD}:"
    yield "saap too, once", f"make wheel && scp dist/{WHEEL} {BOARD}:"
    yield "there, once", f"pip install './{WHEEL}[bench]'"
    yield "there", f"saap generate {shlex.quote(bundle.name)}{context}{threads}"
    yield "its speed, from here", f"saap bench {shlex.quote(str(bundle))} --on ssh://{BOARD}{threads}"
