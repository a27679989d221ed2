"""`saap devices check`: read a bundle and a device, ask :mod:`devices.fit.fitting`, and say it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from devices.fit.demands import Demands, DeviceOptions, demands_of
from saap.base.errors import UserError
from saap.base.options import Option
from saap.cli.console import print_table, tell
from saap.cli.devices.fit import read_model
from saap.cli.options import OptionsCommand, options_of
from saap.cli.types import device_names, directory

if TYPE_CHECKING:
    from devices.fit.fitting import Fit
    from devices.fit.memory import Device, Model

DOES_NOT_FIT = 1


@dataclass(frozen=True)
class CheckOptions:
    """The device and the limits that a bundle is checked against."""

    device: Annotated[
        str | None, Option("A profile of `saap devices list`; default: this host.", metavar="NAME", names=device_names)
    ] = None
    facts: DeviceOptions = field(default_factory=DeviceOptions)
    bandwidth: Annotated[bool, Option("Without --device: read memory for some seconds, for the ceiling.")] = False

    def check(self) -> None:
        self.facts.check()
        if self.device and self.bandwidth:
            raise UserError("--bandwidth measures this host: leave it out with --device")


@click.command(cls=OptionsCommand)
@click.argument("bundle", type=directory)
@options_of(CheckOptions)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def check(bundle: Path, as_json: bool, options: CheckOptions) -> None:
    """Will a bundle run there? Exit 1 when it does not fit.

    Whether it loads, how much memory it takes, how much context fits, how fast it could be at most, and what would make
    it fit. Nothing is run.

    \b
    Example:
      saap devices check out/demo/slim-int4 --device raspberry-pi-4 --memory 2GiB
    """
    model = read_model(bundle)
    options.check()
    facts = options.facts
    demands = demands_of(options.device, facts) if options.device else Demands(_here(facts, options.bandwidth), facts)
    device, verdict = demands.device, demands.judge(model)
    if as_json:
        click.echo(json.dumps(as_document(bundle, model, device, verdict), indent=1))
    else:
        _show(bundle, model.context_length, device, verdict)
    sys.exit(0 if verdict.fits else DOES_NOT_FIT)


def as_document(bundle: Path, model: Model, device: Device, verdict: Fit) -> dict[str, object]:
    """Everything for machines; JSON types, bytes, tokens per second; unknown is null."""
    known = asdict(device) | {"isa": sorted(device.isa), "lacks": sorted(device.lacks)}
    memory = asdict(verdict.memory) | {"total": verdict.memory.total}
    return {"bundle": str(bundle), "model": asdict(model), "device": known} | asdict(verdict) | {"memory": memory}


def _here(options: DeviceOptions, measure: bool) -> Device:
    from bench.measure.roofline import probe_bandwidths
    from devices.fit.memory import Device
    from devices.probe.cpu import FEATURES
    from devices.probe.host import probe
    from devices.profiles.profile import load_profiles, profile_of
    from saap.base.cgroup import available

    if options.memory is not None:
        raise UserError("--memory is the size of a board's RAM, this host's is read: give --device with it")
    facts, profiles = probe(), load_profiles()
    known = profiles.get(profile_of(facts["compatible"], profiles) or "")
    free = available(Path("/")) or facts["memory_bytes"]
    if free is None:
        raise UserError("how much memory this host has cannot be read: check with --device and --memory")
    bandwidth: tuple[float | None, str] = (None, "measure it with --bandwidth")
    if measure:
        best = max(each.bytes_per_s or 0 for each in probe_bandwidths(facts["last_level_cache_bytes"]))
        bandwidth = (best or None, "read just now")
    elif known:
        bandwidth = (known.numbers["memory_bandwidth"].value, known.numbers["memory_bandwidth"].source)
    sustained = known.sustained if known else None
    # Elsewhere than on a board there is no GPU without NVIDIA's driver, and it is unknown with it.
    cuda = None if not known and Path("/proc/driver/nvidia/version").exists() else (known and known.cuda) or "none"
    isa = frozenset(facts["isa"] or ())
    return Device(
        name=facts["board"] or facts["cpu_model"] or "this host",
        architecture=facts["architecture"],
        isa=isa,
        lacks=FEATURES - isa if isa else isa,
        memory_bytes=free,
        memory_source="available at the moment",
        bandwidth=bandwidth[0],
        bandwidth_source=bandwidth[1],
        sustained=sustained.value if sustained else None,
        sustained_source=sustained.source if sustained else "unknown",
        last_level_cache=facts["last_level_cache_bytes"],
        cuda=cuda,
        onnxruntime=options.onnxruntime or facts["onnxruntime"],
        onnxruntime_source="given" if options.onnxruntime else f"installed here, Python {facts['python']}",
    )


def _show(bundle: Path, context_length: int, device: Device, verdict: Fit) -> None:
    m = verdict.memory
    tell(f"{bundle} on {device.name}: {'fits' if verdict.fits else 'does not fit'}")
    for finding in verdict.refusals:
        tell(f"  {finding.what}")
    rows = [
        ["runtime and session", _mb(m.runtime)],
        ["packed weights", _mb(m.weights)],
        [f"cache of {verdict.context} tokens", _mb(m.cache)],
        ["activations of a piece of a prompt", _mb(m.work)],
        ["together", _mb(m.total)],
    ]
    print_table("memory that must stay resident", ["what", "MB"], rows)
    tell(f"  there are {_mb(verdict.available)} MB: {device.memory_source}")
    largest = verdict.largest_context
    limit = "the model has no more" if largest == context_length else f"the model has {context_length}, memory is short"
    tell(f"  largest context that fits: {f'{largest} tokens' if largest else 'none'} ({limit})")
    empty, full = verdict.ceiling
    if empty is not None and full is not None:
        rate = "unknown" if device.bandwidth is None else f"{device.bandwidth / 1e9:.1f} GB/s"
        tell(
            f"  ceiling: {empty:.1f} tokens/s, {full:.1f} with a full cache ({rate}: "
            f"{device.bandwidth_source}); what it will do is less, measure it"
        )
    empty, full = verdict.sustained
    if empty is not None and full is not None and device.sustained is not None:
        tell(
            f"  sustained: {empty:.1f} tokens/s, {full:.1f} with a full cache ({device.sustained / 1e9:.1f} GB/s: "
            f"{device.sustained_source})"
        )
    for line in verdict.remarks:
        tell(f"  note: {line}")
    if verdict.remedies:
        tell("what would help:")
    for finding in verdict.remedies:
        tell(f"  {finding.what}: {finding.command}" if finding.command else f"  {finding.what}")


def _mb(size: int) -> str:
    return f"{size / 1e6:.0f}"
