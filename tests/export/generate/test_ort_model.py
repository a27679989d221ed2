"""transformers' generate on a bundle, against the torch model that the bundle was made from."""

import pytest
import torch
from support.cuts import cut
from support.exported import export_bundle, export_portable

from export.bundle.manifest import BundleError
from export.bundle.tokenizer import RunError
from export.engine.protocol import EngineError
from export.generate.ort_model import BundleForCausalLM
from saap.models.checkpoint import load_model
from saap.prune.plan import LayerPlan, PrunePlan

LAYERS = (
    LayerPlan((), (), tuple(range(0, 128, 4))),  # no attention first
    LayerPlan((0, 1, 2, 3, 4, 5), (0, 1, 2), tuple(range(64))),
    LayerPlan((2, 3), (1,), tuple(range(96))),
    LayerPlan((0, 4), (0, 2), ()),  # no FFN last
)
IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def slim(llama, tmp_path_factory):
    home = tmp_path_factory.mktemp("generate")
    dense = llama(home / "dense", num_hidden_layers=4, max_position_embeddings=512)
    return cut(dense, home / "slim", PrunePlan(LAYERS))


@pytest.fixture(scope="module", params=["cpu", "portable"])
def pair(request, slim):
    """(torch model, bundle as a transformers model)."""
    bundle = slim.parent / request.param
    (export_bundle if request.param == "cpu" else export_portable)(slim, bundle, bits=32)
    return load_model(slim), BundleForCausalLM.from_bundle(bundle)


def both(pair, ids, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, **options}
    results = []
    for model in pair:
        torch.manual_seed(7)
        results.append(model.generate(ids, **options))
    return results


def assert_same_tokens(pair, ids, **options):
    expected, found = both(pair, ids, **options)
    assert found.tolist() == expected.tolist()
    assert found.shape[1] > ids.shape[1] + 3
    return found


def test_the_model_is_told_what_the_bundle_says(pair):
    keys = [part.shape for part in pair[1].manifest.cache if part.past.endswith("key")]
    assert keys == [(3, None, 16), (1, None, 16), (2, None, 16)]
    assert pair[1].generation_config.eos_token_id == pair[0].generation_config.eos_token_id == [2, 0]
    assert pair[1].config.max_position_embeddings == 512


def test_greedy_and_sampling_draw_the_same_tokens(pair):
    assert_same_tokens(pair, IDS[:1])
    drawn = assert_same_tokens(pair, IDS[:1], do_sample=True, temperature=1.5, top_k=40, top_p=0.95)
    assert drawn.tolist() != both(pair, IDS[:1])[0].tolist()
    assert_same_tokens(pair, IDS[1:2], do_sample=True, repetition_penalty=1.3)


def test_several_rows_beams_padding_and_more_than_the_context_are_refused(pair):
    bundle, message = pair[1], "one sequence at a time: give one prompt, no padding and no beams"
    for ids, options in (
        (IDS, {}),
        (IDS[:1], {"num_beams": 3}),
        (IDS[:1], {"num_return_sequences": 2, "do_sample": True}),
    ):
        with pytest.raises(RunError, match=message):
            bundle.generate(ids, max_new_tokens=4, **options)
    with pytest.raises(RunError, match=message):
        bundle(IDS[:1, :3], attention_mask=torch.tensor([[0, 1, 1]]))
    with pytest.raises(RunError, match="513 tokens do not fit the context of 512"):
        bundle(torch.full((1, 513), 5))


def test_no_bundle_and_a_damaged_one_are_refused(slim, tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        BundleForCausalLM.from_bundle(slim)
    export_bundle(slim, tmp_path / "bundle", bits=32)
    (tmp_path / "bundle/model.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="does not match the hash"):
        BundleForCausalLM.from_bundle(tmp_path / "bundle")
    export_bundle(slim, tmp_path / "whole", bits=32)
    with pytest.raises(EngineError, match="10000 threads cannot be used: this process has"):
        BundleForCausalLM.from_bundle(tmp_path / "whole", threads=10_000)


def test_text_generation_pipeline(pair, tiny_tokenizer):
    from transformers import pipeline

    texts = ["The quick brown fox", "A model"]
    options = {"max_new_tokens": 8, "do_sample": False}
    pipelines = [pipeline("text-generation", model=model, tokenizer=tiny_tokenizer) for model in pair]
    assert pipelines[0](texts, **options) == pipelines[1](texts, **options)
