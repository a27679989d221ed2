"""Fusion of the scores of a structure by homoscedastic uncertainty.

The scores I_m are taken as outputs with observation noise sigma_m (Kendall, Gal & Cipolla 2018, eq. 7):

    I(G) = sum_m I_m(G) / (2 sigma_m^2) + sum_m log sigma_m

The sigmas minimise the sum of I(G) over the structures that share them; setting the derivative to zero gives
sigma_m^2 = mean_G I_m(G). For selection only the non-negative part P(G) = sum_m I_m / (2 sigma_m^2) counts: the log
term is one offset for all structures that share the sigmas.

Ours is a factor for layers. Channels are scored one by one, but go by the hundred, and what goes from one layer adds up
in one output. So P(G) of a channel is multiplied by its layer's own importance, the mean of P over the layer's
channels in units of the mean over layers. Heads, of which a layer has few, do worse with the factor.

Stability is how much a structure's importance changes from one calibration sequence to the next. With
I_j(G) = |t_j - c/2 t_j^2| the fluctuation is F(G) = std_j I_j / mean_j I_j, and the adaptive stability indicator puts
it on one scale: ASI(G) = (F - mean F) / std F over the structures of a type. It enters the score
as S(G) = P(G) exp(lambda ASI(G)). arXiv 2412.15127 names both indicators; the formulas are ours, and so is the sign of
lambda, which text held out from scoring decides.
"""

from __future__ import annotations

import torch

from saap.models.shape import ATTENTION, ModelShape
from saap.prune.options import FUSIONS, FusionOptions
from saap.prune.scores.importance import TYPES, Scores

# Beyond three deviations a factor says more about one odd sequence than about the structure.
ASI_LIMIT = 3.0


def fuse(scores: Scores, shape: ModelShape, options: FusionOptions | None = None) -> dict[str, list[torch.Tensor]]:
    """S(G) = P(G) exp(lambda ASI(G)) per structure type and layer, [structures]; channels by layer_weighted too.

    The mean of P over the structures that share the sigmas is half the number of scores.
    """
    options = options or FusionOptions()
    terms_of = {
        "vector": lambda kind: scores.vector(kind, shape, options.slices),
        "element": lambda kind: scores.fine(kind, shape, options.slices),
        "token": lambda kind: scores.tokenwise(kind, shape),
    }
    fused = {}
    for kind in TYPES:
        terms = [terms_of[term](kind) for term in FUSIONS[options.score]]
        total = [sum(rows, torch.zeros(())) for rows in zip(*(_scaled(term) for term in terms), strict=True)]
        if options.stability:
            factors = stability_factor(scores.fluctuating(kind, shape, options.slices), options.stability)
            total = [row * factor for row, factor in zip(total, factors, strict=True)]
        fused[kind] = total if kind in ATTENTION.types else layer_weighted(total)
    return fused


def layer_weighted(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Scores per layer, [structures] each, times the layer's mean over the mean of such means above 0."""
    means = torch.stack([row.mean() if len(row) else row.new_zeros(()) for row in rows])
    some = means > 0
    if not some.any():
        return rows
    factors = torch.where(some, means / means[some].mean(), 1.0)
    return [row * factor for row, factor in zip(rows, factors, strict=True)]


def _scaled(rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """I / (2 sigma^2) per layer."""
    variance = closed_form_variance(rows)
    return [row / (2 * variance) for row in rows]


def closed_form_variance(scores: list[torch.Tensor]) -> torch.Tensor:
    """sigma^2 = mean of the scores of all structures, which minimises sum_G I(G) / (2 sigma^2) + log sigma."""
    flat = torch.cat(scores)
    return (flat.mean() if len(flat) else flat.new_ones(())).clamp_min(torch.finfo(torch.float32).tiny)


def fluctuation(importance: torch.Tensor) -> torch.Tensor:
    """F(G) = std_j I_j / mean_j I_j, [sequences, structures] -> [structures]; 0 where a structure never matters."""
    if len(importance) < 2 or not importance.numel():
        return torch.zeros(importance.shape[1:])
    mean = importance.mean(0)
    return torch.where(mean > 0, importance.std(0) / mean.clamp_min(torch.finfo(mean.dtype).tiny), 0.0)


def stability_indicator(importance: list[torch.Tensor]) -> list[torch.Tensor]:
    """ASI(G) per layer, [structures] each, within +-3, from I_j(G) per layer, [sequences, structures].

    A structure above 0 fluctuates more than the others of its type.
    """
    rows = [fluctuation(layer) for layer in importance]
    everything = torch.cat(rows)
    return [_standardised(row, everything) for row in rows]


def stability_factor(importance: list[torch.Tensor], strength: float) -> list[torch.Tensor]:
    """exp(lambda ASI(G)) per layer, [structures] each."""
    return [torch.exp(strength * asi) for asi in stability_indicator(importance)]


def _standardised(row: torch.Tensor, peers: torch.Tensor) -> torch.Tensor:
    if len(peers) < 2 or not float(peers.std()):
        return torch.zeros_like(row)
    return ((row - peers.mean()) / peers.std()).clamp(-ASI_LIMIT, ASI_LIMIT)
