"""Ridge regression whose damping is chosen on tokens that it does not see: C = R^T X (X^T X + lambda D)^-1.

D = diag(X^T X), so that lambda means the same for every input. Two forms of the same numbers: products of the inputs
where there are more tokens than inputs, the tokens themselves where there are fewer, whose system is smaller.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

CPU = torch.device("cpu")
LEAST_SQUARE = 1e-6  # of the mean of D: an input that hardly ever differs from 0 is not worth a large weight


def regression(tokens: int, inputs: int, outputs: int, device: torch.device = CPU) -> Regression:
    """Return the smaller form for this many tokens, still empty."""
    return Rows() if tokens < inputs else Products(inputs, outputs, device)


class Regression(Protocol):
    """Tokens, as the regression of R [tokens, outputs] on X [tokens, K] needs them."""

    rest: float  # |R|^2

    def add(self, kept: torch.Tensor, rest: torch.Tensor) -> None:
        """Add tokens."""

    def plus(self, other: Any) -> Regression:
        """Both."""

    def error(self, change: torch.Tensor) -> float:
        """|R - X change^T|^2."""

    def solved(self, damping: float) -> torch.Tensor:
        """R^T X (X^T X + damping D)^-1, [hidden, K]; on inputs of unit square, so that D is the identity."""


class Products:
    """X^T X and R^T X: for more tokens than inputs."""

    def __init__(self, inputs: int, outputs: int, device: torch.device = CPU) -> None:
        self.squares = torch.zeros(inputs, inputs, device=device)
        self.crossed = torch.zeros(outputs, inputs, device=device)
        self.rest = 0.0

    def add(self, kept: torch.Tensor, rest: torch.Tensor) -> None:
        self.squares.addmm_(kept.t(), kept)
        self.crossed.addmm_(rest.t(), kept)
        self.rest += float(rest.square().sum())

    def plus(self, other: Products) -> Products:
        both = Products(0, 0)
        both.squares, both.crossed = self.squares + other.squares, self.crossed + other.crossed
        both.rest = self.rest + other.rest
        return both

    def on(self, kept: torch.Tensor, weight: torch.Tensor) -> Products:
        """Return the regression of the other inputs' output by a weight [outputs, inputs] on the kept ones."""
        some = Products(0, 0)
        left = weight.index_fill(1, kept.to(weight.device), 0)
        crossed = left @ self.squares
        some.squares, some.crossed = self.squares[kept][:, kept], crossed[:, kept]
        some.rest = float((crossed * left).sum())
        return some

    def error(self, change: torch.Tensor) -> float:
        return self.rest + float(((change @ self.squares - 2 * self.crossed) * change).sum())

    def solved(self, damping: float) -> torch.Tensor:
        scale = _scale(self.squares.diagonal())
        correlation, crossed = self.squares / scale / scale[:, None], (self.crossed / scale).t()
        factor = torch.linalg.cholesky(correlation + damping * torch.eye(len(scale), device=scale.device))
        return torch.cholesky_solve(crossed, factor).t() / scale


class Rows:
    """X and R themselves: for fewer tokens than inputs, by (X^T X + c)^-1 X^T = X^T (X X^T + c)^-1."""

    def __init__(self) -> None:
        self._kept: list[torch.Tensor] = []
        self._gone: list[torch.Tensor] = []
        self.rest = 0.0

    def add(self, kept: torch.Tensor, rest: torch.Tensor) -> None:
        self._kept.append(kept)
        self._gone.append(rest)
        self.rest += float(rest.square().sum())

    def plus(self, other: Rows) -> Rows:
        both = Rows()
        both._kept, both._gone, both.rest = self._kept + other._kept, self._gone + other._gone, self.rest + other.rest
        return both

    def error(self, change: torch.Tensor) -> float:
        pairs = zip(self._kept, self._gone, strict=True)
        return sum(float((rest - kept @ change.t()).square().sum()) for kept, rest in pairs)

    def solved(self, damping: float) -> torch.Tensor:
        kept, rest = torch.cat(self._kept), torch.cat(self._gone)
        scale = _scale(kept.square().sum(0))
        kept /= scale
        factor = torch.linalg.cholesky(kept @ kept.t() + damping * torch.eye(len(kept), device=kept.device))
        return torch.cholesky_solve(rest, factor).t() @ kept / scale


def token_weights(states: torch.Tensor) -> torch.Tensor:
    """Weigh each token by one over the size of its state, as the next norm does; [..., channels] -> [..., 1].

    A state of zeros, as an untrained embedding has, counts nothing.
    """
    return states.square().mean(-1, keepdim=True).rsqrt().nan_to_num(posinf=0.0)


def _scale(squares: torch.Tensor) -> torch.Tensor:
    """Root of the sum of squares of each input, [K]."""
    return squares.clamp_min(LEAST_SQUARE * float(squares.mean()) + torch.finfo(torch.float32).tiny).sqrt()
