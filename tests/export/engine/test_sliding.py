"""Caches of sliding layers are no longer than what they see and one piece of a prompt."""

import numpy as np
import pytest
import torch
from support.export_cases import FAMILIES, WINDOW
from support.exported import export_bundle

from export.bundle.manifest import PREFILL_CHUNK, WINDOW_BACK, read_manifest
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from saap.models.checkpoint import load_model

SLIDING = ("mistral", "gemma3", "smollm3 with windows", "lfm3", "gemma4")
PROMPT, TOKENS = 500, 700
CAPACITY = WINDOW - 1 + WINDOW_BACK + PREFILL_CHUNK
IDS = np.random.default_rng(3).integers(3, 300, TOKENS)


@pytest.fixture(params=SLIDING)
def model_and_bundle(request, tiny_family, tmp_path):
    model_type, overrides = FAMILIES[request.param]
    path = tiny_family(model_type, **{**overrides, "max_position_embeddings": 1024})
    export_bundle(path, tmp_path / "bundle", bits=32)
    return load_model(path), tmp_path / "bundle"


def expected_of(model, ids):
    with torch.inference_mode():
        return model(input_ids=torch.tensor(ids)[None]).logits[0].numpy()


def test_logits_are_those_of_transformers_far_beyond_the_window(model_and_bundle):
    model, bundle = model_and_bundle
    expected, decoder = expected_of(model, IDS), OnnxRuntimeEngine(bundle, EngineOptions(1, TOKENS))
    for _ in range(2):
        decoder.rewind(0)
        assert np.abs(decoder.prefill(IDS[:PROMPT]) - expected[PROMPT - 1]).max() <= 1e-4
        for place in range(PROMPT, TOKENS):
            assert np.abs(decoder.step(int(IDS[place])) - expected[place]).max() <= 1e-4
    held = {part: value.shape()[2] for part, value in decoder._past if part.grows}
    assert {bool(part.window): length for part, length in held.items()} == {
        bool(part.window): CAPACITY if part.window else TOKENS for part in held
    }
    assert any(part.window for part in held)


def test_what_is_still_there_is_kept_and_the_rest_is_read_again(model_and_bundle):
    model, bundle = model_and_bundle
    decoder = OnnxRuntimeEngine(bundle, EngineOptions(1, TOKENS))
    forgets = read_manifest(bundle).can_forget
    decoder.prefill(IDS[:PROMPT])
    kept = decoder.rewind(PROMPT - WINDOW_BACK)
    assert kept == (PROMPT - WINDOW_BACK if forgets else 0)
    other = np.concatenate([IDS[:kept], IDS[-40:]])
    assert np.abs(decoder.prefill(IDS[-40:]) - expected_of(model, other)[-1]).max() <= 1e-4
    decoder.rewind(0)
    decoder.prefill(IDS[:PROMPT])
    assert decoder.rewind(PROMPT // 4) == decoder.length == 0
    assert np.abs(decoder.prefill(IDS[:9]) - expected_of(model, IDS[:9])[-1]).max() <= 1e-4


def test_a_short_context_needs_no_other_caches(model_and_bundle):
    _, bundle = model_and_bundle
    decoder = OnnxRuntimeEngine(bundle, EngineOptions(1, CAPACITY))
    assert {value.shape()[2] for part, value in decoder._past if part.grows} == {CAPACITY}
    decoder.prefill(IDS[:CAPACITY])
    assert decoder.rewind(3) == (3 if read_manifest(bundle).can_forget else 0)


def test_what_the_cache_takes_is_told(model_and_bundle):
    manifest = read_manifest(model_and_bundle[1])
    decoder = OnnxRuntimeEngine(model_and_bundle[1], EngineOptions(1, TOKENS))
    taken = sum(value.numpy().nbytes for part, value in decoder._past if part.grows)
    assert taken == manifest.kv_bytes_per_token * TOKENS - manifest.sliding.saved(TOKENS)
    assert manifest.sliding.positions == CAPACITY


def test_other_targets_keep_everything(tiny_family, tmp_path):
    model_type, overrides = FAMILIES["mistral"]
    manifest = export_bundle(tiny_family(model_type, **overrides), tmp_path / "bundle", bits=32, target="portable")
    assert not any(part.window for part in manifest.cache)
    assert manifest.sliding.saved(10**6) == 0
