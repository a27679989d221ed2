"""Trained scales of the vocabulary: what is trained is what is folded, in every family, tied and not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from saap.architectures import FAMILIES, architecture_of
from saap.checkpoint import load_model
from saap.group_quant import quantize_model
from saap.modeling_slim import GroupQuantTable, TiedHead
from saap.training import TrainOptions
from saap.tune import TuneOptions, tune
from saap.vocabulary_scales import TrainedTable, attach_vocabulary, fold_vocabulary, vocabulary_parameters

IDS = (torch.arange(24)[None] + torch.arange(0, 256, 8)[:, None]) % 300


def quantised(path, bits=4):
    model = load_model(path)
    quantize_model(model, 4, 32, bits)
    return model.requires_grad_(False)


def logits_of(model):
    return model(input_ids=IDS[:2]).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_was_trained_is_what_is_folded(tiny_family, family, tied):
    model = quantised(tiny_family(family, tie_word_embeddings=tied))
    before, kinds = logits_of(model), [type(m) for m in model.modules()]
    attach_vocabulary(model)
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=0)
    (delta,) = vocabulary_parameters(model)
    with torch.no_grad():
        delta.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    trained = logits_of(model)
    assert (trained - before).abs().max() > 1e-2
    fold_vocabulary(model)
    torch.testing.assert_close(logits_of(model), trained, rtol=0, atol=0)
    assert [type(m) for m in model.modules()] == kinds
    head = model.get_submodule(architecture_of(model.config).head)
    assert isinstance(head, TiedHead) == tied
    for table in (m for m in model.modules() if isinstance(m, GroupQuantTable)):
        assert torch.equal(table.scales, table.scales.half().float())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_the_float_table(tiny_model, tied, bits):
    model = quantised(tiny_model(tie_word_embeddings=tied), bits)
    attach_vocabulary(model)
    (table,) = (m for m in model.modules() if isinstance(m, TrainedTable))
    torch.nn.init.normal_(table.delta, std=0.1)
    table.delta.requires_grad_(True)
    targets = IDS[:2, 1:].flatten()
    F.cross_entropy(logits_of(model)[:, :-1].flatten(0, 1), targets).backward()
    found, scales = table.delta.grad, table.scales().detach().requires_grad_()
    matrix = (table.centred.float() * scales.unsqueeze(-1)).flatten(1)
    states = model.model(inputs_embeds=F.embedding(IDS[:2], matrix) if tied else model.model.embed_tokens(IDS[:2]))
    F.cross_entropy(F.linear(states.last_hidden_state, matrix)[:, :-1].flatten(0, 1), targets).backward()
    assert found.abs().max() > 1e-6
    torch.testing.assert_close(found, scales.grad * table.base.scales, rtol=1e-3, atol=1e-8)


def test_tuning_trains_them_and_a_rate_of_0_leaves_them(tiny_model, tmp_path):
    path = tiny_model()
    training = TrainOptions(precision="fp32", checkpointing=True)
    options = TuneOptions(learning_rate=0.0, norm_rate=0.0, vocabulary_rate=2e-2, held_out=0, training=training)
    tune(path, tmp_path / "still", IDS, replace(options, vocabulary_rate=0.0))
    tune(path, tmp_path / "tuned", IDS, replace(options, training=replace(training, passes=4)))
    models = [load_model(tmp_path / name) for name in ("still", "tuned")]
    with torch.inference_mode():
        before, after = (float(model(input_ids=IDS, labels=IDS).loss) for model in models)
    assert after < before - 0.05
    still, tuned = (model.state_dict() for model in models)
    assert {name for name in still if not torch.equal(still[name], tuned[name])} == {"model.embed_tokens.scales"}
