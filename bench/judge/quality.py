"""Is the new model better or worse than the old one? Two documents of ``saap eval --json``.

What both answered is compared answer by answer: window by window of a text, example by example of a task. Two
perplexities of different protocols, or tasks on different examples, do not compare, and that is said instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.judge.verdict import BETTER, NOT_COMPARABLE, SAME, WORSE, Verdict
from bench.judge.wording import plain
from saap.base.documents import LARGEST
from saap.base.errors import UserError
from saap.base.files import parse_json, read_whole
from saap.base.quality import KIND, QUALITY, Protocol, Quality, TaskScore

PERPLEXITY, MEAN = "NLL", "mean of the tasks"
NATS, SHARE = "nats/token", "share"
RESAMPLES = 9999

Pair = tuple[str, str]  # the old model's name and the new one's
Values = NDArray[np.float64]


class QualityError(UserError):
    """A document that cannot be used; the message says what to do."""


def is_quality(path: str | Path) -> bool:
    try:
        raw = parse_json(read_whole(Path(path), LARGEST))
    except (OSError, ValueError):
        return False
    return isinstance(raw, dict) and raw.get("kind") == KIND


def read_quality(path: str | Path) -> Quality:
    """Read a document of ``saap eval --json``.

    Raises QualityError: no such file, not one of these, or of another version.
    """
    return replace(QUALITY, error=QualityError).read(path)


def compare_quality(old: Quality, new: Quality, pair: Pair | None = None) -> list[Verdict]:
    """Compare what both documents hold of each pair of models.

    Models are paired by name, or, where each document holds one beside its reference, those two; or ``pair`` names
    them. Raises QualityError: no pair, nothing that both measured, or numbers that do not belong together.
    """
    pairs = _pairs(old, new) if pair is None else [pair]
    for name, document in zip(pair or (), (old, new), strict=False):
        if name not in _names(document):
            raise QualityError(f"nothing was evaluated as {name!r}: give one of {', '.join(_names(document))}")
    try:
        rows = [row for pair in pairs for row in (*_perplexity(pair, old, new), *_tasks(pair, old, new))]
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise QualityError(f"one of the documents is damaged ({error!r}): evaluate again") from None
    if not rows:
        raise QualityError("one holds a perplexity and the other tasks: nothing was measured of both; evaluate again")
    return rows + _alone(pairs, old, new)


def exit_code(rows: Sequence[Verdict], fail_on_regression: bool) -> int:
    """3 where something does not compare, 1 for a regression where that is asked for, else 0."""
    if any(row.verdict == NOT_COMPARABLE for row in rows):
        return 3
    return int(fail_on_regression and any(row.verdict == WORSE for row in rows))


def _pairs(old: Quality, new: Quality) -> list[Pair]:
    names = [_names(document) for document in (old, new)]
    if both := [name for name in names[0] if name in names[1]]:
        return [(name, name) for name in both]
    if len(names[0]) == len(names[1]) == 1:
        return [(names[0][0], names[1][0])]
    models = " and ".join(", ".join(some) or "none" for some in names)
    raise QualityError(f"which models to compare is not clear, they hold {models}: evaluate one model per document")


def _perplexity(pair: Pair, old: Quality, new: Quality) -> list[Verdict]:
    if old.protocol is None or new.protocol is None:
        return []
    # A text's name is no part of the measurement.
    names = [field.name for field in fields(Protocol) if field.name != "text"]
    values = [(name, getattr(old.protocol, name), getattr(new.protocol, name)) for name in names]
    if differing := [f"{name} {_short(a)} against {_short(b)}" for name, a, b in values if a != b]:
        return [_refused(pair, PERPLEXITY, f"the protocols differ: {'; '.join(differing)}")]
    mine, theirs = (
        next(row for row in document.rows if row.name == name) for document, name in zip((old, new), pair, strict=True)
    )
    if mine.nll is None or theirs.nll is None:
        reason = "the model wrote the text itself, so its perplexity says nothing; give --text"
        return [_refused(pair, PERPLEXITY, reason)]
    windows = np.array([mine.window_nll, theirs.window_nll], dtype=float)
    low, high = _interval([windows[1] - windows[0]])
    scale = windows.shape[1] / old.protocol.predictions  # from nats per window to nats per token
    return [_judged(_of(pair, PERPLEXITY), mine.nll, theirs.nll, (low * scale, high * scale), windows.shape[1])]


def perplexity_ratio(old: Sequence[float], new: Sequence[float], predictions: float) -> tuple[float, float, float]:
    """Return the new perplexity over the old one, with its 95 % interval over windows.

    old, new: negative log-likelihood of the same windows, in nats a window; predictions: in all windows together.
    """
    differences = np.asarray(new, dtype=float) - np.asarray(old, dtype=float)
    means = differences.mean(), *_interval([differences])
    ratio, low, high = (float(np.exp(mean * len(differences) / predictions)) for mean in means)
    return ratio, low, high


def _alone(pairs: Sequence[Pair], *documents: Quality) -> list[Verdict]:
    """Return rows for measures that one document alone holds: a lost measurement must not pass for an unchanged one."""
    rows = []
    for side, (document, label) in enumerate(zip(documents, ("old", "new"), strict=True)):
        other, reason = documents[1 - side], f"only in the {label} document"
        paired = [pair[side] for pair in pairs]
        lost = [((name, name), "model") for name in _names(document) if name not in paired]
        for pair in pairs:
            if document.protocol and not other.protocol:
                lost.append((pair, PERPLEXITY))
            theirs = _tasks_of(other, pair[1 - side])
            lost += [(pair, task) for task in _tasks_of(document, pair[side]) if task not in theirs]
        rows += [_refused(pair, measure, reason) for pair, measure in lost]
    return rows


def _names(document: Quality) -> list[str]:
    """Return the names of the judged models; the reference is what they are compared with."""
    return [row.name for row in document.rows if row.name != document.reference]


def _tasks_of(document: Quality, name: str) -> dict[str, TaskScore]:
    return {row.task: row for row in document.tasks if row.model == name}


def _tasks(pair: Pair, old: Quality, new: Quality) -> list[Verdict]:
    tasks = [_tasks_of(document, name) for document, name in zip((old, new), pair, strict=True)]
    rows, scores = [], []
    for task in [task for task in tasks[0] if task in tasks[1]]:
        mine, theirs = tasks[0][task], tasks[1][task]
        if reason := _other_examples(mine, theirs):
            rows.append(_refused(pair, task, reason))
            continue
        counted = np.array([[float(getattr(e, mine.metric)) for e in row.examples] for row in (mine, theirs)])
        scores.append(counted)
        before, after = counted.mean(1)
        interval = _interval([counted[1] - counted[0]])
        rows.append(_judged(_of(pair, f"{task} {mine.metric}"), before, after, interval, counted.shape[1]))
    if len(scores) > 1:
        before, after = (float(np.mean([counted[side].mean() for counted in scores])) for side in (0, 1))
        interval = _interval([counted[1] - counted[0] for counted in scores])
        rows.append(_judged(_of(pair, MEAN), before, after, interval, sum(counted.shape[1] for counted in scores)))
    return rows


def _other_examples(mine: TaskScore, theirs: TaskScore) -> str | None:
    if mine.sha256 != theirs.sha256:
        return f"the files differ: {_short(mine.sha256)} against {_short(theirs.sha256)}"
    indices = [[example.index for example in row.examples] for row in (mine, theirs)]
    if indices[0] != indices[1]:
        return f"other examples ({len(indices[0])} against {len(indices[1])}): give the same --max-examples and --seed"
    return None


def _interval(differences: Sequence[Values]) -> tuple[float, float]:
    """95 % of the mean over parts of the mean of each, every part resampled by itself (a stratified bootstrap).

    Without bounds where a part is a single value, of which nothing is known but itself, or holds what is no number.
    """
    from scipy.stats import bootstrap

    if any(len(part) < 2 or not np.isfinite(part).all() for part in differences):
        return -np.inf, np.inf
    if all(np.ptp(part) == 0 for part in differences):  # nothing to resample
        mean = float(np.mean([part[0] for part in differences]))
        return mean, mean

    def mean_of(*parts: Values, axis: int) -> Values:
        return np.asarray(sum(part.mean(axis) for part in parts) / len(parts))

    interval = bootstrap(
        [np.asarray(part) for part in differences], mean_of, n_resamples=RESAMPLES, method="percentile",
        random_state=np.random.default_rng(0), vectorized=True, batch=100,
    )  # fmt: skip
    return float(interval.confidence_interval.low), float(interval.confidence_interval.high)


def _of(pair: Pair, measure: str) -> Verdict:
    old, new = pair
    unit = NATS if measure == PERPLEXITY else SHARE
    return Verdict(SAME, measure, new, old if old != new else "", unit=unit)


def _refused(pair: Pair, measure: str, reason: str) -> Verdict:
    return replace(_of(pair, measure), verdict=NOT_COMPARABLE, reason=reason)


def _judged(of: Verdict, old: float, new: float, interval: tuple[float, float], pairs: int) -> Verdict:
    """Less is better of nats, more of shares."""
    of, (low, high) = replace(of, pairs=pairs), interval
    if not np.isfinite([old, new]).all():
        reason = "a number of one of the models is NaN or infinite"
        return replace(of, verdict=NOT_COMPARABLE, reason=reason)
    if not np.isfinite([low, high]).all():
        return replace(of, verdict=NOT_COMPARABLE, reason="one pair has no interval: evaluate on more")
    verdict = SAME
    if low > 0 or high < 0:
        verdict = BETTER if (high < 0) == (of.unit == NATS) else WORSE
    return replace(of, verdict=verdict, old=float(old), new=float(new), difference=float(new - old), low=low, high=high)


def _short(value: object) -> str:
    text = plain(value)
    return text[:12] if len(text) == 64 else text
