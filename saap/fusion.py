"""Fusion of the vector-wise and the element-wise score by homoscedastic uncertainty.

The two scores are taken as outputs with observation noise sigma_v and sigma_e (Kendall, Gal & Cipolla 2018, eq. 7):

    I(G) = I_v(G) / (2 sigma_v^2) + I_e(G) / (2 sigma_e^2) + log(sigma_v sigma_e)

The sigmas minimise the sum of I(G) over the structures that share them; setting the derivative to zero gives
sigma_m^2 = mean_G I_m(G). Here they are shared per structure type over the whole model, so that layers stay comparable.
For selection only the non-negative part counts: the log term is one offset for all structures of a type.
"""

from __future__ import annotations

import torch

from saap.importance import TYPES, Scores


def fuse(scores: Scores) -> dict[str, list[torch.Tensor]]:
    """P(G) = I_v / (2 sigma_v^2) + I_e / (2 sigma_e^2), per structure type and layer; its mean over a type is 1."""
    fused = {}
    for kind in TYPES:
        vector, element = scores.vector(kind), scores.element[kind]
        var_v, var_e = closed_form_variance(vector), closed_form_variance(element)
        fused[kind] = [v / (2 * var_v) + e / (2 * var_e) for v, e in zip(vector, element, strict=True)]
    return fused


def closed_form_variance(scores: list[torch.Tensor]) -> torch.Tensor:
    """sigma^2 = mean of the scores of all structures, which minimises sum_G I(G) / (2 sigma^2) + log sigma."""
    return torch.cat(scores).mean().clamp_min(torch.finfo(torch.float32).tiny)
