import pytest

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}])
def test_parameters_are_those_of_the_real_module(tiny_model, overrides):
    path = tiny_model(**overrides)
    model, shape = load_model(path), shape_of(read_config(path))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layer_weights == sum(p.numel() for p in model.model.layers.parameters())
