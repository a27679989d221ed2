"""A model of two layers, its budgets and random prices."""

from __future__ import annotations

import numpy as np

from saap.models.shape import LayerSizes, ModelShape
from saap.prune.search.budget import Budget, StepTime, Weights
from saap.prune.search.layer_costs import CostTable
from saap.prune.search.milp import Prices

SHAPE = ModelShape(hidden=96, head_dim=16, vocab=320, tied=True, layers=(LayerSizes(6, 3, 128),) * 2)
TABLE = CostTable(1, 192, 1.0, {(1, 1): 0.3, (2, 1): 0.4, (3, 3): 0.5, (6, 3): 0.9}, {32: 0.25, 128: 0.85})


def weights(limit, shape=SHAPE):
    return Budget("weights", limit, Weights(False), {"ratio": 1 - limit / shape.layer_weights}, shape, shape)


def milliseconds(limit):
    return Budget("ms", limit, StepTime(TABLE), {"ms_per_token": limit}, SHAPE, SHAPE, table=TABLE)


def prices(seed=0, modules=True, alpha=0.0):
    rng = np.random.default_rng(seed)
    structures = {
        "ffn": [rng.random(128) for _ in range(2)],
        "head": [rng.random(6) * 5 for _ in range(2)],
        "group": [rng.random(3) * 15 for _ in range(2)],
        "conv": [np.zeros(0)] * 2,
    }
    gone = {
        "attention": list(rng.random(2) * 60) if modules else [None, None],
        "ffn": list(rng.random(2) * 80) if modules else [None, None],
        "conv": [None, None],
    }
    return Prices(structures, gone, dict.fromkeys(structures, alpha))
