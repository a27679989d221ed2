"""One layer's run, as far as a module of it."""

import pytest
import torch
from torch import nn

from saap.models.checkpoint import load_model
from saap.models.layer_walk import batches_of, inputs_of, layers_of, output_of, outputs_of, run_layer, run_until

IDS = torch.arange(16).view(2, 8)


@pytest.fixture
def run(tiny_model):
    model = load_model(tiny_model())
    layer = layers_of(model)[1]
    (batch,) = batches_of(model, [IDS])
    return layer, batch.hidden, batch.arguments[1]


@torch.no_grad()
def test_a_run_ends_at_a_module(run):
    layer = run[0]
    named = {"attention": layer.self_attn.o_proj, "norm": layer.post_attention_layernorm}
    with inputs_of(named) as inputs, outputs_of(named) as outputs:
        run_layer(*run)
    behind = []
    layer.mlp.down_proj.register_forward_hook(lambda *_: behind.append(1))
    assert torch.equal(output_of(*run, named["attention"]), outputs["attention"])
    x, seen = run_until(*run, named["norm"], {"attention": named["attention"]})
    assert torch.equal(x, inputs["norm"]) and torch.equal(seen["attention"], inputs["attention"])
    assert not behind
    run_layer(*run)
    assert behind, "the next run is whole"


@torch.no_grad()
def test_a_module_that_the_layer_does_not_run(run):
    for stray in (lambda: output_of(*run, nn.Linear(1, 1)), lambda: run_until(*run, nn.Linear(1, 1), {})):
        with pytest.raises(RuntimeError, match="does not run that module"):
            stray()
