"""The facts of a device as one document, whether it is this host or a board."""

from __future__ import annotations

from dataclasses import dataclass

from bench.measure.result import Bandwidth
from bench.measure.roofline import probe_bandwidths
from devices.probe.host import HostFacts, probe


@dataclass(frozen=True)
class Facts:
    """The answer to ``saap devices probe``."""

    host: HostFacts
    bandwidth: list[Bandwidth]  # for each number of threads; empty where it was not asked for


def probe_facts(bandwidth: bool) -> Facts:
    """Describe the host that this runs on, and read its memory for some seconds if ``bandwidth``."""
    host = probe()
    return Facts(host, probe_bandwidths(host["last_level_cache_bytes"]) if bandwidth else [])
