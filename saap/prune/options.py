"""How to prune: the options of :func:`saap.prune.pruning.prune`."""

from __future__ import annotations

from dataclasses import dataclass, field

from saap.models.structures import ModelShape
from saap.prune.baselines.methods import BASELINES
from saap.prune.baselines.scores import TAYLOR
from saap.prune.cut.refit import COMPENSATIONS, Compensation
from saap.prune.search.adaptive import AdaptiveOptions
from saap.prune.search.requirement import Requirement
from saap.system.errors import UserError
from saap.system.gpu import device_of

METHODS = ("saap", *BASELINES)


@dataclass(frozen=True)
class PruneOptions:
    """How to prune.

    Attributes:
        requirement: what the slim model must meet.
        method: ``saap`` or one of :data:`saap.prune.baselines.methods.BASELINES`.
        compensate: how what stays makes up for what goes; None is the method's own: a refit for saap, a bias for flap.
        heads: whether attention loses heads or KV groups; None lets saap weigh it, and baselines where every query head
            has its own KV head: whole groups are dear.
        block: the quantisation group that every width must be a multiple of.
        adaptive: how saap chooses.
        steps: how many times saap scores, cuts and makes up for it on the way to the requirement; None is one for every
            15 % of what the layers cost that has to go.
        drop_layers: how many layers go whole, in a step before these: those with the least block influence.
        keep_layers: layers that stay whole; empty leaves it to the method, None keeps none, whatever the method.
        seed: of the method ``random``.
        stream: leave the decoder layers in their files and read one at a time; None does where memory is too small.
        device: that computes, such as ``cuda``; of several processes each takes its own.
    """

    requirement: Requirement
    method: str = "saap"
    compensate: Compensation | None = None
    heads: bool | None = None
    block: int = 32
    adaptive: AdaptiveOptions = field(default_factory=AdaptiveOptions)
    steps: int | None = None
    drop_layers: int = 0
    keep_layers: frozenset[int] | None = frozenset()
    seed: int = 0
    stream: bool | None = None
    device: str = "cpu"

    @property
    def compensation(self) -> Compensation:
        """The kind that is used."""
        own: dict[str, Compensation] = {"saap": "refit", "flap": "bias"}
        return self.compensate or own.get(self.method, "none")

    def prunes_heads(self, shape: ModelShape) -> bool:
        """Whether attention loses heads or KV groups in a model of this shape."""
        if self.heads is not None:
            return self.heads
        return self.method == "saap" or all(layer.heads_per_group <= 1 for layer in shape.layers)

    def check(self) -> None:
        """Raise UserError for names that are not known and numbers that are not allowed."""
        self.requirement.check()
        self.adaptive.check()
        device_of(self.device)
        if self.drop_layers < 0:
            raise UserError(f"--drop-layers {self.drop_layers} is not allowed: give 0 or more")
        if self.method != "saap" and self.drop_layers:
            raise UserError(f"--drop-layers is for the method saap: leave it out for {self.method}")
        if self.method != "saap" and (self.steps is not None or self.adaptive.corrections):
            raise UserError(f"steps and corrections are for the method saap: leave them out for {self.method}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"{self.steps} steps are not allowed: give 1 or more")
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is not known; known: {', '.join(METHODS)}")
        if self.stream and self.method in TAYLOR:
            raise UserError(
                f"{self.method} needs the gradients of all weights at once: leave --stream out, or use saap"
            )
        if self.compensation not in COMPENSATIONS:
            raise UserError(f"compensation {self.compensate!r} is not known; known: {', '.join(COMPENSATIONS)}")
