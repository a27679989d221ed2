"""The ratios of models that stay loaded and take turns (:mod:`export.engine.turns`), in one setting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.measure.options import BenchOptions, Setting
from bench.measure.result import Bursts
from bench.measure.rounds import job_of
from bench.runtimes.peers import Peer, memory_needs
from export.engine.turns import Contender, take_turns
from saap.base.cgroup import available
from saap.base.progress import Progress


def take_bursts(
    peers: Sequence[Peer],
    setting: Setting,
    plan: BenchOptions,
    progress: Progress | None = None,
    *,
    load_s: float | None = None,
) -> Bursts:
    """Let all peers take turns for ``plan.turns_s``; a failure is in the answer.

    ``load_s``: of turns in one load.
    """
    bursts = Bursts(
        [peer.name for peer in peers], setting.prompt, setting.generate, setting.depth, setting.threads, loads=[]
    )
    if reason := _too_large(peers, setting, plan):
        return replace(bursts, failure=reason)
    vocab = min(peer.vocab_size for peer in peers)
    contenders = [
        Contender(peer.name, job_of(peer, setting, plan, vocab), peer.python, peer.environment(setting.threads))
        for peer in peers
    ]
    loads, failure = take_turns(contenders, plan.turns_s, progress, load_s=load_s, timeout_s=plan.timeout_s)
    return replace(bursts, loads=loads, failure=failure)


def _too_large(peers: Sequence[Peer], setting: Setting, plan: BenchOptions) -> str | None:
    """Say why they cannot all be loaded at once; None: they can."""
    needs = [memory_needs(peer.kind, peer.model, setting.positions, peer.path) for peer in peers]
    needed, left = sum(sum(parts.values()) for parts in needs), available(plan.root)
    if left is None or needed <= left:
        return None
    return f"all at once need about {needed / 1e6:.0f} MB, and {left / 1e6:.0f} MB are available"
