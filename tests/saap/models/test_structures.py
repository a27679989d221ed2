from __future__ import annotations

import pytest

from saap.models.architectures import architecture_of, shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.structures import LayerPlan, LayerSizes, ModelShape, PrunePlan, check_plan, whole_layer
from saap.system.errors import UserError

SHAPE = ModelShape(hidden=96, head_dim=16, vocab=320, tied=True, layers=(LayerSizes(6, 3, 128),) * 2)


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}])
def test_parameters_are_those_of_the_real_module(tiny_model, overrides):
    path = tiny_model(**overrides)
    model = load_model(path)
    assert shape_of(read_config(path)).parameters == sum(p.numel() for p in model.parameters())


def test_layer_weights_leave_embedding_and_head_out(tiny_model):
    model = load_model(tiny_model())
    assert shape_of(model.config).layer_weights == sum(p.numel() for p in model.model.layers.parameters())


def test_a_whole_plan_keeps_the_shape():
    plan = PrunePlan(tuple(whole_layer(sizes) for sizes in SHAPE.layers))
    check_plan(plan, SHAPE)
    assert plan.kept_shape(SHAPE) == SHAPE


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        (LayerPlan((0, 1, 2), (0, 1), (0,)), "same number of query heads"),  # group 0 has two heads, group 1 one
        (LayerPlan((0, 2), (0, 1, 2), (0,)), "same number of query heads"),  # group 2 has no head
        (LayerPlan((0, 2, 4), (0, 1), (0,)), "same number of query heads"),  # head 4 belongs to group 2
        (LayerPlan((2, 0), (0, 1), (0,)), "query heads are not distinct sorted"),
        (LayerPlan((0, 2, 4), (0, 1, 2), (5, 128)), "FFN channels are not distinct sorted indices below 128"),
    ],
)
def test_plans_that_break_gqa_or_the_model_are_refused(layer, complaint):
    plan = PrunePlan((layer, whole_layer(SHAPE.layers[1])))
    with pytest.raises(UserError, match=complaint):
        check_plan(plan, SHAPE)


def test_a_model_without_any_attention_is_refused():
    nothing = LayerPlan((), (), (0, 1))
    with pytest.raises(UserError, match="no layer with attention"):
        check_plan(PrunePlan((nothing, nothing)), SHAPE)


def test_unsupported_architectures_name_what_is_supported():
    with pytest.raises(UserError, match="'gpt2' is not supported; supported: llama"):
        architecture_of({"model_type": "gpt2"})
    with pytest.raises(UserError, match="activation 'gelu'"):
        architecture_of({"model_type": "llama", "hidden_act": "gelu"})
