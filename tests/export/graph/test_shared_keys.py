"""Layers that read keys and values of earlier ones, in a bundle: what they remember is as in transformers."""

import numpy as np
import pytest
import torch
from support.exported import export_bundle
from support.family_cuts import cut
from support.genai_run import greedy

from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from export.generate.loop import CachedSequence
from export.generate.ort_model import BundleForCausalLM
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.prune.plan import PrunePlan, whole_layer

IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(2))
KINDS = ["sliding_attention", "full_attention"] * 3


@pytest.fixture
def slim(tiny_family, tmp_path):
    """(slim directory, its bundle): six layers, of which the last two read, with a third of their FFNs gone."""
    dense = tiny_family("gemma4_text", num_hidden_layers=6, layer_types=KINDS, num_kv_shared_layers=2)
    layers = [whole_layer(sizes) for sizes in shape_of(read_config(dense)).layers]
    for index in (0, 2, 4):
        layers[index] = type(layers[index])(**{**vars(layers[index]), "ffn": layers[index].ffn[:64]})
    path = cut(dense, tmp_path / "slim", PrunePlan(tuple(layers)))
    manifest = export_bundle(path, tmp_path / "bundle", bits=32, ids=IDS.repeat(1, 5))
    assert [layer.reads for layer in manifest.layers] == [False] * 4 + [True] * 2
    assert [part.shape for part in manifest.cache] == [(1, None, dim) for dim in (32, 32, 64, 64) * 2]
    return path, tmp_path / "bundle"


def test_a_conversation_goes_on_where_it_was_and_can_go_back(slim):
    model, decoder = load_model(slim[0]), OnnxRuntimeEngine(slim[1], EngineOptions(1, 256))
    held, ids = CachedSequence(decoder), [5, 6, 7, 8]
    for turn in range(3):  # the third is beyond the window
        logits, read = held.continue_to(ids, lambda: False)
        assert read == (4 if turn == 0 else 3)
        for _ in range(5):
            ids = [*ids, int(np.argmax(logits))]
            logits = held.step(ids[-1])
        check(model, ids, logits)
        ids = [*ids, 20 + turn, 30, 40]
    other = [*ids[:9], 10, 11]
    logits, read = held.continue_to(other, lambda: False)
    assert read == 2
    check(model, other, logits)


def check(model, ids, logits):
    with torch.inference_mode():
        assert np.abs(logits - model(input_ids=torch.tensor([ids])).logits[0, -1].numpy()).max() <= 1e-4


def test_it_generates_as_in_transformers(slim):
    model, bundle = load_model(slim[0]), BundleForCausalLM.from_bundle(slim[1])
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    assert bundle.generate(IDS[:1], **options).tolist() == model.generate(IDS[:1], **options).tolist()


def test_an_int8_cache_is_read_by_later_layers_too(slim, tmp_path):
    ids = torch.randint(320, (4, 40), generator=torch.Generator().manual_seed(5))
    manifest = export_bundle(slim[0], tmp_path / "int8", bits=8, kv_bits=8, ids=ids)
    assert {part.dtype for part in manifest.cache} == {"int8"} and len(manifest.cache) == 8
    assert manifest.parity.perplexity_ratio == pytest.approx(1, abs=0.02)


def test_genai_runs_it(slim):
    found = greedy(slim[1], IDS[0], 24)
    expected = load_model(slim[0]).generate(IDS[:1], max_length=24, do_sample=False, pad_token_id=2)[0].tolist()
    assert found[: len(expected)] == expected
