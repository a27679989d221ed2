import pytest

from saap.base.errors import UserError
from saap.models.shape import LayerSizes, ModelShape
from saap.prune.plan import LayerPlan, PrunePlan, check_plan, whole_layer

SHAPE = ModelShape(hidden=96, head_dim=16, vocab=320, tied=True, layers=(LayerSizes(6, 3, 128),) * 2)


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
