"""transformers' generate on a bundle, against the torch model that the bundle was made from."""

import pytest
import torch
from support.cuts import cut
from support.exported import export_bundle, export_portable

from export.bundle.manifest import BundleError
from export.bundle.tokenizer import RunError
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineError, EngineOptions
from export.generate.ort_model import CACHE, CAPACITY_STEP, BundleForCausalLM
from saap.models.checkpoint import load_model
from saap.prune.plan import LayerPlan, PrunePlan

LAYERS = (
    LayerPlan((), (), tuple(range(0, 128, 4))),  # no attention first
    LayerPlan((0, 1, 2, 3, 4, 5), (0, 1, 2), tuple(range(64))),
    LayerPlan((2, 3), (1,), tuple(range(96))),
    LayerPlan((0, 4), (0, 2), ()),  # no FFN last
)
IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 7 + [1] * 2])


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


def test_greedy_sampling_and_beams_draw_the_same_tokens(pair):
    assert_same_tokens(pair, IDS[:1])
    drawn = assert_same_tokens(pair, IDS[:1], do_sample=True, temperature=1.5, top_k=40, top_p=0.95)
    assert drawn.tolist() != both(pair, IDS[:1])[0].tolist()
    assert_same_tokens(pair, IDS[:2], num_beams=4, max_new_tokens=20, eos_token_id=None)
    assert_same_tokens(pair, IDS[:1], num_beams=3, num_return_sequences=3, length_penalty=0.7)
    assert_same_tokens(pair, IDS[:1], do_sample=True, num_return_sequences=3, repetition_penalty=1.3)


def test_rows_padded_on_the_left_are_continued_as_if_they_were_alone(pair):
    found = assert_same_tokens(pair, IDS, attention_mask=MASK, eos_token_id=None)
    for row in range(3):
        alone = pair[1].generate(IDS[row : row + 1, MASK[row].bool()], max_new_tokens=12, eos_token_id=None)
        assert alone[0, -12:].tolist() == found[row, -12:].tolist()
    assert_same_tokens(pair, IDS, attention_mask=MASK, num_beams=3, eos_token_id=None)


def test_a_row_that_ends_early_does_not_disturb_the_others(pair):
    free = both(pair, IDS, attention_mask=MASK, eos_token_id=None)[0]
    found = assert_same_tokens(pair, IDS, attention_mask=MASK, eos_token_id=int(free[1, 11]))
    assert (found[1, 12:] == 2).all()


def test_logits_over_a_growing_cache_and_a_prompt_in_pieces(pair):
    ids = torch.randint(3, 300, (2, 2 * CAPACITY_STEP + 40), generator=torch.Generator().manual_seed(3))[:, :500]
    with torch.inference_mode():
        expected = pair[0](ids).logits
    state, at, worst = None, 0, 0.0
    for step in [200, 55, 1, 1, 1, 240, 1, 1]:
        out = pair[1](ids[:, at : at + step], **{CACHE: state})
        state, at = out[CACHE], at + step
        worst = max(worst, float((out.logits[:, 0] - expected[:, at - 1]).abs().max()))
    assert (at, state.get_seq_length()) == (500, 500)
    assert state.capacity == (500 if pair[1]._grows else 512)
    assert worst <= 1e-4


def test_generation_continues_from_a_returned_cache(pair):
    whole = both(pair, IDS[:1], max_new_tokens=10, eos_token_id=None)[1]
    first = pair[1].generate(IDS[:1], max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True)
    assert first[CACHE].get_seq_length() == 12  # the last token was drawn, not read
    again = pair[1].generate(first.sequences, max_new_tokens=6, eos_token_id=None, **{CACHE: first[CACHE]})
    assert again.tolist() == whole.tolist()


def test_masks_that_cannot_be_honoured_and_more_than_the_context_are_refused(pair):
    for mask, message in (
        ([[1, 1, 0]], "pad on the left"),
        ([[1, 0, 1]], "pad on the left"),
        ([[0, 0, 0]], "pad on the left"),
        ([[1, 1]], r"shape \(1, 2\), not \(1, 3\)"),
    ):
        with pytest.raises(RunError, match=message) as caught:
            pair[1](IDS[:1, :3], attention_mask=torch.tensor(mask))
        assert "\n" not in str(caught.value)
    ids = torch.full((1, 511), 5)
    out = pair[1](ids)
    out = pair[1](ids[:, :1], **{CACHE: out[CACHE]})
    with pytest.raises(RunError, match="513 tokens do not fit the context of 512"):
        pair[1](ids[:, :1], **{CACHE: out[CACHE]})


def test_no_bundle_and_a_damaged_one_are_refused(slim, tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        BundleForCausalLM.from_bundle(slim)
    export_bundle(slim, tmp_path / "bundle", bits=32)
    (tmp_path / "bundle/model.onnx").write_bytes(b"nothing")
    with pytest.raises(BundleError, match="does not match the hash"):
        BundleForCausalLM.from_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match="is not an ONNX file"):
        BundleForCausalLM.from_bundle(tmp_path / "bundle", verify=False)
    with pytest.raises(EngineError, match="10000 threads cannot be used: this process has"):
        BundleForCausalLM.from_bundle(tmp_path / "bundle", threads=10_000, verify=False)


def test_text_generation_pipeline(pair, tiny_tokenizer):
    from transformers import pipeline

    texts = ["The quick brown fox", "A model"]
    tiny_tokenizer.padding_side = "left"
    options = {"batch_size": 2, "max_new_tokens": 8, "do_sample": False}
    pipelines = [pipeline("text-generation", model=model, tokenizer=tiny_tokenizer) for model in pair]
    assert pipelines[0](texts, **options) == pipelines[1](texts, **options)


def test_four_bits_draw_what_the_decoder_that_is_measured_draws(slim, tmp_path):
    export_bundle(slim, tmp_path / "bundle")
    decoder, ours = OnnxRuntimeEngine(tmp_path / "bundle", EngineOptions(1, 64)), []
    logits = decoder.prefill(IDS[0].numpy())
    for _ in range(16):
        ours.append(int(logits.argmax()))
        logits = decoder.step(ours[-1])
    found = BundleForCausalLM.from_bundle(tmp_path / "bundle").generate(IDS[:1], max_new_tokens=16, eos_token_id=None)
    assert found[0, 9:].tolist() == ours
