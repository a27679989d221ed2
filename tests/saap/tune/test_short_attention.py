"""Attention by matrix products gives what transformers' own gives, and so do its gradients."""

import pytest
import torch

from saap.models.checkpoint import load_model
from saap.tune import short_attention
from saap.tune.short_attention import LONGEST, use_short_attention

CASES = {
    "groups": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 16}),
    "a window, by layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "scaled scores": ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 24}),
}


def passes(model, ids, dtype):
    """Logits, and the gradient of the embedding."""
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits.float()
    logits.log_softmax(-1)[:, :, 7].sum().backward()
    return logits.detach(), model.get_input_embeddings().weight.grad.clone()


def off(found, exact):
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", CASES)
def test_it_is_as_near_to_float32_as_transformers_own(case, tiny_family, monkeypatch):
    family, config = CASES[case]
    model = load_model(tiny_family(family, **config))
    ids = torch.randint(320, (2, 40), generator=torch.Generator().manual_seed(3))
    exact, own = passes(model, ids, torch.float32), passes(model, ids, torch.bfloat16)
    called = []
    monkeypatch.setattr(short_attention, "sdpa_attention_forward", lambda *a, **k: called.append(a))
    use_short_attention(model)
    short = passes(model, ids, torch.bfloat16)
    assert not called
    for found, other, wanted in zip(short, own, exact, strict=True):
        assert 0 < off(found, wanted) <= 2 * off(other, wanted)


@pytest.mark.parametrize(("length", "dtype"), [(40, torch.float32), (LONGEST + 1, torch.bfloat16)])
def test_where_it_does_not_pay_transformers_own_is_taken(length, dtype, tiny_family):
    model = load_model(tiny_family("llama", max_position_embeddings=1024))
    ids = torch.arange(length)[None] % 320
    own = passes(model, ids, dtype)
    use_short_attention(model)
    assert all(map(torch.equal, passes(model, ids, dtype), own))
