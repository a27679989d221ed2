"""Draws a token from logits: greedy, or from a distribution cut by top-k, top-p and min-p. numpy only.

The order of the steps and what each keeps is transformers' (repetition penalty, temperature, top-k, top-p, min-p), so
that the same settings mean the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.bundle.tokenizer import RunError
from export.engine.protocol import Logits

Draw = Callable[[Logits, Sequence[int]], int]


@dataclass(frozen=True)
class Sampling:
    """Settings for drawing a token.

    Args:
        top_p: keep the likeliest tokens until their probabilities reach this sum (Holtzman et al., arXiv 1904.09751).
        repetition_penalty: positive logits of tokens seen are divided by it, negative ones multiplied (Keskar et al.,
            arXiv 1909.05858); it also acts on the greedy choice.
    """

    temperature: float = 0.0  # 0 takes the likeliest token; above, tokens are drawn from softmax(logits / temperature)
    top_k: int | None = None  # keep this many likeliest tokens, and those tied with the last of them; None keeps all
    top_p: float = 1.0
    min_p: float = 0.0  # keep tokens at least this times as likely as the likeliest (Nguyen et al., arXiv 2407.01082)
    repetition_penalty: float = 1.0
    seed: int = 0  # of the draws

    def __post_init__(self) -> None:
        # Each comparison is false for NaN.
        if not 0.0 <= self.temperature < math.inf:
            raise _out_of_range("temperature", self.temperature, "0 (greedy) or more, 0.7 is usual")
        if self.top_k is not None and not self.top_k >= 1:
            raise _out_of_range("top-k", self.top_k, "1 or more, 40 is usual")
        if not 0.0 < self.top_p <= 1.0:
            raise _out_of_range("top-p", self.top_p, "more than 0 and at most 1, 0.9 is usual")
        if not 0.0 <= self.min_p <= 1.0:
            raise _out_of_range("min-p", self.min_p, "0 to 1, 0.05 is usual")
        if not 0.0 < self.repetition_penalty < math.inf:
            raise _out_of_range("repetition penalty", self.repetition_penalty, "more than 0, 1 has no effect")
        if self.seed < 0:
            raise _out_of_range("seed", self.seed, "0 or more")

    def sampler(self) -> Draw:
        """``draw(logits, ids)``: the next token after ``ids``; logits [vocab] are not changed.

        ``draw`` raises RunError for logits that are not finite.
        """
        if self.temperature == 0.0 and self.repetition_penalty == 1.0:
            return _greedy
        generator = np.random.default_rng(self.seed)

        def draw(logits: Logits, ids: Sequence[int]) -> int:
            _greedy(logits, ids)  # refuses what is not finite
            scores = _penalised(logits, ids, self.repetition_penalty)
            if self.temperature == 0.0:
                return int(scores.argmax())
            tokens, weights = self._distribution(scores)
            total = weights.cumsum()
            drawn = int(total.searchsorted(generator.random() * total[-1], side="right"))
            return int(tokens[min(drawn, len(total) - 1)])  # the product may round up to the total

        return draw

    def _distribution(self, scores: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the tokens that are kept, and weights in proportion to their probabilities."""
        with np.errstate(over="ignore"):  # a tiny temperature sends the losers to -inf, which is meant
            scores = (scores - scores.max()) / self.temperature
        tokens = np.arange(len(scores))
        if self.top_k is not None and self.top_k < len(scores):
            tokens = np.flatnonzero(scores >= np.partition(scores, -self.top_k)[-self.top_k])
        weights = np.exp(scores[tokens])
        if self.top_p < 1.0:
            order = np.argsort(-weights, kind="stable")
            likelier = weights[order].cumsum() - weights[order]  # the sum of those before each
            kept = np.sort(order[likelier < self.top_p * weights.sum()])
            tokens, weights = tokens[kept], weights[kept]
        if self.min_p > 0.0:
            likely = weights >= self.min_p * weights.max()
            tokens, weights = tokens[likely], weights[likely]
        return tokens, weights


GREEDY = Sampling()


def _greedy(logits: Logits, ids: Sequence[int]) -> int:
    token = int(logits.argmax())  # a NaN counts as the largest, so looking at the winner is enough
    if not math.isfinite(logits[token]):
        raise RunError("the bundle's logits are not finite: export it again")
    return token


def _penalised(logits: Logits, ids: Sequence[int], penalty: float) -> NDArray[np.float64]:
    scores = logits.astype(np.float64)
    if penalty != 1.0:
        present = np.unique(np.asarray(ids, dtype=np.int64))
        scores[present] = np.where(scores[present] < 0, scores[present] * penalty, scores[present] / penalty)
    return scores


def _out_of_range(name: str, value: float, allowed: str) -> RunError:
    return RunError(f"{name} {value} is out of range: give {allowed}")
