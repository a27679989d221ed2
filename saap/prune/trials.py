"""Choose between plans by tuning each a little: successive halving (Jamieson and Talwalkar, arXiv 1502.07943).

Prices are of a model that is not tuned, and their sum tells little about which depth is best for one that will be. So
plans of several depths are made, each is tuned on a few tokens with the dense model as the teacher, and the half that
stays closest to it on other text goes on to more tokens, until one is left. That one is kept as it was before tuning.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers

from saap import __version__
from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.base.writing import RECORD
from saap.models.record import DOCUMENT, Trial, read_record
from saap.models.streaming import open_model
from saap.prune.options import AdaptiveOptions, Effort, PruneOptions
from saap.prune.plan import PrunePlan
from saap.prune.record import plan_of
from saap.text.rows import Rows

if TYPE_CHECKING:
    from saap.tune.options import TuneOptions

Kept = Callable[[str], Path]  # from a name to its path

# Tokens learnt for each token that judges. The difference of two plans has a standard error of 0.005 nats per
# token on 32 sequences of 256 and of 0.0025 on 128, and the best plans are 0.01 apart (studies/search).
LEARNT = 2


@dataclass(frozen=True)
class Halving:
    """The number of plans and of tokens to tune them on.

    Attributes:
        depths: of the blocks that go whole in the plan of least price, the shares that may go in further plans.
        recovered: shares of a missing block's price that the search does not count in further plans.
        tokens: that every plan that is left is tuned on, round by round; half of them stay after each but the last.
    """

    depths: tuple[float, ...]
    recovered: tuple[float, ...]
    tokens: tuple[int, ...]

    def others(self, first: PrunePlan, options: AdaptiveOptions) -> list[AdaptiveOptions]:
        """Return the settings of the search for further plans, after the one of least price."""
        gone = gone_of(first)
        most = sorted({round(share * gone) for share in self.depths}, reverse=True) if gone else []
        further = [replace(options, recovered=share) for share in self.recovered if gone]
        return further + [replace(options, most_gone=count) for count in most]


HALVINGS: dict[Effort, Halving] = {
    "normal": Halving((2 / 3, 1 / 3, 0.0), (), (16_384, 32_768)),
    "thorough": Halving((0.8, 0.6, 0.4, 0.2, 0.0), (0.5, 0.75), (16_384, 32_768, 65_536)),
}


def trial_rows(options: PruneOptions) -> int:
    """Rows of text that are wanted beyond those that score: to learn from, and to be judged on."""
    halving = HALVINGS.get(options.effort)
    return 0 if halving is None else sum(_rows_of(halving.tokens[-1], options.length))


def _rows_of(tokens: int, length: int) -> tuple[int, int]:
    """Sequences to learn from, and to be judged on."""
    learnt = -(-tokens // length)
    return learnt, -(-learnt // LEARNT)


def gone_of(plan: PrunePlan) -> int:
    """Count the attention and FFN blocks that a plan removes."""
    return sum((not layer.query_heads) + (not layer.ffn) for layer in plan.layers)


@dataclass(frozen=True)
class TrialOptions:
    """Options of the trials, from those of a pruning."""

    halving: Halving
    adaptive: AdaptiveOptions  # of the plan of least price
    length: int  # tokens of a sequence
    tuning: TuneOptions
    device: torch.device

    def rows_for(self, tokens: int) -> tuple[int, int]:
        """Sequences to learn from, and to be judged on."""
        return _rows_of(tokens, self.length)


def tuning_for(options: PruneOptions) -> TuneOptions:
    """Return the options to tune a plan as the bundle will be tuned; text is short, so none is held out."""
    from saap.tune.options import TrainOptions, TuneOptions

    training = TrainOptions(micro_rows=2, seed=options.seed, device=options.device)
    bits = 8 if options.bits == 32 else options.bits
    return TuneOptions(bits=bits, length=options.length, held_out=0.0, training=training)


# Prunes into a directory by these settings, scored on rows.
Make = Callable[[AdaptiveOptions, Path, Rows, "Progress | None"], object]


def choose_by_tuning(
    make: Make, directory: Path, options: TrialOptions, kept: Kept, rows: Rows, progress: Progress | None
) -> Path:
    """Return the slim directory of the plan that is best after some tuning; its record lists all plans.

    Args:
        directory: where the model lies, which teaches.
        kept: names what trials keep, as :func:`kept_trials` does.
        rows: those that score, and :func:`trial_rows` more after them.

    Raises:
        UserError: what ``make`` raises for the first plan.
    """
    trials = _Trials(make, directory, options, rows, kept, progress)
    best = trials.run()
    record = read_record(best)
    record["plan"]["trials"] = trials.plans
    DOCUMENT.write(best / RECORD, record)
    return best


@contextmanager
def kept_trials(output: Path, *parts: object) -> Iterator[Kept]:
    """Names what trials keep beside the output; it is removed when the block ends, but not when it is killed.

    ``parts``: all that the trials depend on, but for the versions of the packages; tensors count by their bytes.
    """
    hashed = [p if not isinstance(p, torch.Tensor) else hashlib.sha256(p.numpy().tobytes()).hexdigest() for p in parts]
    versions = [__version__, torch.__version__, transformers.__version__]
    key = hashlib.sha256(json.dumps([versions, *hashed], default=repr, sort_keys=True).encode()).hexdigest()[:16]
    folder = output.parent / f".{output.name}-trials.pruning"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if not old.name.endswith(f"-{key}"):
            shutil.rmtree(old, ignore_errors=True)
    try:
        yield lambda name: folder / f"{name}-{key}"
    except Exception:  # an interrupt is none: what was done stays
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


class _Trials:
    """Plans in a folder that outlives a kill, and what is known of them."""

    def __init__(
        self,
        make: Make,
        directory: Path,
        options: TrialOptions,
        rows: Rows,
        kept: Kept,
        progress: Progress | None,
    ) -> None:
        self.make, self.directory, self.kept, self.progress = make, directory, kept, progress
        self.options = options
        most, judged = options.rows_for(options.halving.tokens[-1])
        spare = most + judged
        self.scored = replace(rows, ids=rows.ids[:-spare])
        self.learnt, self.judged = rows.ids[-spare:].tensor_split([most])
        self.plans: list[Trial] = []

    def run(self) -> Path:
        """Return the directory of the best plan."""
        rounds = self.options.halving.tokens
        self.plans = list(self._plans())
        left = list(self.plans)
        for number, tokens in enumerate(rounds):
            if len(left) < 2:
                break
            for at, trial in enumerate(left, 1):
                detail = f"{tokens:,} tokens of plan {at} of {len(left)}"
                trial["kl"][str(tokens)] = self._divergence(trial["plan"], tokens, self._named(detail))
            left.sort(key=lambda trial: trial["kl"][str(tokens)])
            last = number == len(rounds) - 1
            left = left[: 1 if last else max(2, len(left) // 2)]
        return self._path(left[0]["plan"])

    def _plans(self) -> Iterator[Trial]:
        """All plans, no two alike; the one of least price is first."""
        waiting, known = [self.options.adaptive], []
        for number, adaptive in enumerate(waiting):  # which grows by the first
            try:
                self._make(number, adaptive)
            except UserError:
                if not number:
                    raise
                continue  # with so few blocks gone the budget is not met
            recorded = read_record(self._path(number))["plan"]
            plan, bundle = plan_of(recorded), recorded["bundle"]
            if not number:
                waiting += self.options.halving.others(plan, adaptive)
            if (kept := (plan.layers, bundle)) in known:
                continue
            known.append(kept)
            asked = {name: getattr(adaptive, name) for name in ("recovered", "most_gone")}
            yield Trial(plan=number, settings=asked, gone=gone_of(plan), price_nats=plan.price, kl={})

    def _make(self, number: int, adaptive: AdaptiveOptions) -> None:
        if not (self._path(number) / RECORD).is_file():
            self.make(adaptive, self._path(number), self.scored, self._named(f"plan {number + 1}"))

    def _divergence(self, number: int, tokens: int, progress: Progress | None) -> float:
        """KL to the dense model on the judged text after some tuning, nats per token; once done it is known."""
        from saap.evaluate.perplexity import score_models, torch_scorer
        from saap.tune.tuning import tune

        known = self.kept(f"plan {number} after {tokens}.txt")
        if known.is_file():
            return float(known.read_text())
        tuned = self.kept(f"plan {number} tuned")
        learnt, judged = self.options.rows_for(tokens)
        tune(
            self._path(number), self.options.tuning, output=tuned, teacher=self.directory, data=self.learnt[:learnt],
            progress=progress,
        )  # fmt: skip
        device = self.options.device
        scorers = {
            name: torch_scorer(open_model(at, device)) for name, at in (("dense", self.directory), ("tuned", tuned))
        }
        scores = score_models(scorers, self.judged[:judged].to(device), reference="dense", progress=progress)
        shutil.rmtree(tuned)
        known.write_text(repr(scores[1].kl))
        return float(scores[1].kl or 0.0)

    def _path(self, number: int) -> Path:
        return self.kept(f"plan {number}")

    def _named(self, detail: str) -> Progress | None:
        """Progress whose labels name the plan."""
        report = self.progress
        return report and (lambda label, done, total: report(f"{label}, {detail}", done, total))
