from __future__ import annotations

import pytest

from saap.models.architectures import architecture_of, shape_of
from saap.models.checkpoint import load_model, read_config
from saap.system.errors import UserError


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}, {"attention_bias": True, "mlp_bias": True}])
def test_parameters_are_those_of_the_real_module(tiny_model, overrides):
    path = tiny_model(**overrides)
    model = load_model(path)
    assert shape_of(read_config(path)).parameters == sum(p.numel() for p in model.parameters())


def test_layer_weights_leave_embedding_and_head_out(tiny_model):
    model = load_model(tiny_model())
    assert shape_of(model.config).layer_weights == sum(p.numel() for p in model.model.layers.parameters())


def test_unsupported_architectures_name_what_is_supported():
    with pytest.raises(UserError, match="'gpt2' is not supported; supported: llama"):
        architecture_of({"model_type": "gpt2"})
    with pytest.raises(UserError, match="activation 'gelu'"):
        architecture_of({"model_type": "llama", "hidden_act": "gelu"})
