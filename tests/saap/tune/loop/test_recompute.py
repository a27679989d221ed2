from __future__ import annotations

import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saap.tune.loop.steps import recompute


def test_recomputed_activations_give_the_same_gradients_and_no_warning_of_old_names():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        kept = _gradient(model)
        recompute(model, True)
        assert _recomputed(model) > 0
        again = _gradient(model)
        recompute(model, False)
    assert _recomputed(model) == 0
    assert torch.allclose(kept, again, rtol=1e-5, atol=1e-8)  # the order of sums may differ


def _gradient(model: LlamaForCausalLM) -> torch.Tensor:
    model.zero_grad()
    ids = torch.arange(16)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    return model.model.layers[0].mlp.up_proj.weight.grad.clone()


def _recomputed(model: LlamaForCausalLM) -> int:
    return sum(getattr(module, "gradient_checkpointing", False) for module in model.modules())
