"""A device's demands on a bundle: bits, kernels and a version that it has, and a size that fits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from devices.fit.fitting import Fit, fit, largest_file
from devices.fit.memory import Device, Model, usable_memory
from devices.profiles.profile import load_profile
from saap.base.errors import UserError
from saap.base.options import Option
from saap.base.values import parse_bytes

CONTEXT = 4096  # tokens, as a conversation has by default


@dataclass(frozen=True)
class DeviceOptions:
    """The options of a device beside its name."""

    context: Annotated[
        int | None, Option("Tokens that the cache holds; default: 4096, or what the model has."), Meta(ge=1)
    ] = None
    memory: Annotated[
        int | None,
        Option(
            "RAM of the device, such as 8GiB, where its profile does not know it.", metavar="SIZE", parse=parse_bytes
        ),
        Meta(ge=0),
    ] = None
    onnxruntime: Annotated[
        str | None, Option("That is on the device, where it is not its system's.", metavar="VERSION")
    ] = None

    def check(self) -> None:
        if self.onnxruntime and not re.fullmatch(r"\d+(\.\d+)+", self.onnxruntime):
            raise UserError(f"{self.onnxruntime!r} is no version of ONNX Runtime: write something like 1.23.2")

    def context_of(self, model: Model) -> int:
        return min(CONTEXT, model.context_length) if self.context is None else self.context


@dataclass(frozen=True)
class Demands:
    """The demands on a bundle that should run on a device."""

    device: Device
    options: DeviceOptions

    @property
    def dotprod(self) -> bool:
        """Whether kernels may need dot products; where nobody knows, those that can do without are chosen there."""
        return self.device.dotprod is not False

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of integers that there are kernels for; embedding and head count."""
        return (4, 8) if self.dotprod else (4,)

    def check_bits(self, bits: int, what: str) -> None:
        """Refuse bits that there is no kernel for; ``what`` is the option that asks for them."""
        if bits not in self.bits:
            raise UserError(f"{what} has no kernel on {self.device.name}, which lacks dotprod: give 4")

    def judge(self, model: Model) -> Fit:
        return fit(model, self.device, self.options.context_of(model))

    def largest_file(self, model: Model) -> int:
        """Bytes of the weights file that the device has room for, were the model pruned; 0 or less: for none."""
        return largest_file(model, self.device, self.options.context_of(model))


def demands_of(name: str, options: DeviceOptions) -> Demands:
    """Return the demands of the device with this profile.

    Raises UserError: no such profile, a memory that nobody knows, or a version that is none.
    """
    options.check()
    profile = load_profile(name)
    values = {key: number.value for key, number in profile.numbers.items()}
    usable = usable_memory(values, options.memory)
    if usable is None:
        raise UserError(f"how much memory {name} has is not known: say it with --memory, such as --memory 8GiB")
    bandwidth, cache = profile.numbers["memory_bandwidth"], values.get("last_level_cache")
    sustained = profile.sustained
    big_cores, runtime = values.get("big_cores"), profile.runtime
    device = Device(
        name=profile.title,
        architecture=profile.architecture,
        isa=frozenset(profile.isa),
        lacks=frozenset(profile.lacks),
        memory_bytes=usable[0],
        memory_source=usable[1],
        bandwidth=bandwidth.value,
        bandwidth_source=bandwidth.source,
        sustained=sustained.value if sustained else None,
        sustained_source=sustained.source if sustained else "unknown",
        last_level_cache=None if cache is None else int(cache),
        big_cores=None if big_cores is None else int(big_cores),
        cuda=profile.cuda or ("none" if not name.startswith("generic") else None),
        onnxruntime=options.onnxruntime or (runtime.onnxruntime if runtime else None),
        onnxruntime_source="given"
        if options.onnxruntime
        else f"{runtime.system}, Python {runtime.python}"
        if runtime
        else "unknown",
    )
    return Demands(device, options)
