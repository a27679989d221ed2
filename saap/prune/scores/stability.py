"""Stability: how much a structure's importance changes from one calibration sequence to the next.

With I_j(G) = |t_j - c/2 t_j^2| the fluctuation is F(G) = std_j I_j / mean_j I_j, and the adaptive stability indicator
puts it on one scale: ASI(G) = (F - mean F) / std F over structures of a type (or of a type and layer). It enters the
score as S(G) = P(G) exp(lambda ASI(G)). arXiv 2412.15127 names both indicators; the formulas are ours, and so is the
sign of lambda, which text held out from scoring decides.
"""

from __future__ import annotations

import torch

# Beyond three deviations a factor says more about one odd sequence than about the structure.
ASI_LIMIT = 3.0


def fluctuation(importance: torch.Tensor) -> torch.Tensor:
    """F(G) = std_j I_j / mean_j I_j, [sequences, structures] -> [structures]; 0 where a structure never matters."""
    if len(importance) < 2:
        return torch.zeros(importance.shape[1:])
    mean = importance.mean(0)
    return torch.where(mean > 0, importance.std(0) / mean.clamp_min(torch.finfo(mean.dtype).tiny), 0.0)


def stability_indicator(importance: list[torch.Tensor], scope: str = "type") -> list[torch.Tensor]:
    """ASI(G) per layer, [structures] each, within +-3, from I_j(G) per layer, [sequences, structures].

    What is above 0 fluctuates more than its peers: the structures of the same ``type``, or of the same ``layer`` too.
    """
    rows = [fluctuation(layer) for layer in importance]
    if scope == "layer":
        return [_standardised(row, row) for row in rows]
    everything = torch.cat(rows)
    return [_standardised(row, everything) for row in rows]


def stability_factor(importance: list[torch.Tensor], strength: float, scope: str = "type") -> list[torch.Tensor]:
    """exp(lambda ASI(G)) per layer, [structures] each."""
    return [torch.exp(strength * asi) for asi in stability_indicator(importance, scope)]


def _standardised(row: torch.Tensor, peers: torch.Tensor) -> torch.Tensor:
    if len(peers) < 2 or not float(peers.std()):
        return torch.zeros_like(row)
    return ((row - peers.mean()) / peers.std()).clamp(-ASI_LIMIT, ASI_LIMIT)
