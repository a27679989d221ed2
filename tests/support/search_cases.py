"""A model of two layers, its budgets and random prices."""

import numpy as np

from saap.models.shape import LayerSizes, ModelShape
from saap.models.slim_quant import MatrixForm
from saap.prune.search.budget import Budget
from saap.prune.search.choices import Allowed, choices, runs_of
from saap.prune.search.layer_costs import CostTable
from saap.prune.search.milp import Gap, Library
from saap.prune.search.model_cost import StepTime, Weights
from saap.prune.search.rounding import Rounding

SHAPE = ModelShape(hidden=96, head_dim=16, vocab=320, tied=True, layers=(LayerSizes(6, 3, 128),) * 2)
TABLE = CostTable(1, 192, 1.0, {(1, 1): 0.3, (2, 1): 0.4, (3, 3): 0.5, (6, 3): 0.9}, {32: 0.25, 128: 0.85})


def weights(limit, shape=SHAPE):
    return Budget(
        unit="weights", most=limit, measure=Weights(False), asked={"ratio": 1 - limit / shape.layer_weights},
        dense=shape, cut=shape,
    )  # fmt: skip


def milliseconds(limit):
    return Budget(
        unit="ms", most=limit, measure=StepTime(TABLE), asked={"ms_per_token": limit}, dense=SHAPE, cut=SHAPE,
        table=TABLE,
    )  # fmt: skip


def library(seed=0, allowed=None):
    """Random prices of all that is on offer; more costs more, and the whole block nothing."""
    rng = np.random.default_rng(seed)
    allowed = allowed or Allowed()
    offers = {}
    for (index, kind), plans in choices(SHAPE, allowed).items():
        prices = sorted(rng.random(len(plans) - 1) * (60 if kind == "attention" else 80), reverse=True)
        offers[index, kind] = tuple(zip(plans, [0.0, *map(float, prices)], strict=True))
    gaps = tuple(Gap(run, float(rng.random() * 70 * len(run))) for run in runs_of(SHAPE, allowed))
    forms = [MatrixForm(bits, 32) for bits in (4, 8)]
    blocks = {
        place: tuple(dict(zip(forms, (p, p / 256), strict=True)) for p in rng.random(2).tolist()) for place in offers
    }
    return Library(offers, gaps, Rounding(blocks, {forms[0]: 3.0, forms[1]: 0.01}))
