import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from support.cuts import cut
from support.exported import export_bundle
from support.tiny_graphs import CONTEXT, HEAD_DIM, HIDDEN, VOCAB, tiny_bundle

from export.bundle.genai import genai_config
from export.bundle.manifest import DECODE_GRAPH, LayerSizes, read_manifest
from export.bundle.tokenizer import BundleTokenizer
from export.clients import optimum_config, write_client_files
from export.engine.onnxruntime import OnnxRuntimeEngine
from export.engine.protocol import EngineOptions
from export.generate.loop import AnswerSettings, begin_text
from saap.models.checkpoint import load_model, read_config
from saap.prune.plan import LayerPlan, PrunePlan
from saap.prune.vocabulary import Chosen, trim


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("clients") / "bundle")


def test_config_names_every_cache_tensor_of_the_graph(bundle):
    decoder = genai_config(read_manifest(bundle))["model"]["decoder"]
    model = onnx.load(bundle / decoder["filename"], load_external_data=False)
    layers = range(decoder["num_hidden_layers"])
    for told, has in ((decoder["inputs"], model.graph.input), (decoder["outputs"], model.graph.output)):
        named = {name % n if "%d" in name else name for name in told.values() for n in layers}
        assert named == {value.name for value in has}


def test_genai_is_told_the_sizes_of_layers_with_a_cache_and_every_end_of_text(bundle):
    manifest = read_manifest(bundle)
    model, search = genai_config(manifest)["model"], genai_config(manifest)["search"]
    decoder = model["decoder"]
    assert (decoder["head_size"], decoder["hidden_size"], model["vocab_size"]) == (HEAD_DIM, HIDDEN, VOCAB)
    # Layers of 4/2, none and 3/1 heads: two with a cache, the largest counts.
    assert (decoder["num_hidden_layers"], decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (2, 4, 2)
    assert model["context_length"] == search["max_length"] == CONTEXT
    assert search["past_present_share_buffer"] is True and search["do_sample"] is False
    model = genai_config(replace(manifest, eos_token_ids=[0, 2, 7], bos_token_id=0))["model"]
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([0, 2, 7], 0, 0)
    assert genai_config(replace(manifest, bos_token_id=None, eos_token_ids=[3]))["model"]["bos_token_id"] == 3
    alone = genai_config(replace(manifest, layers=[LayerSizes(0, 0, 64)]))["model"]["decoder"]
    assert alone["num_hidden_layers"] == 0


IDS = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(2))
UNEVEN = (
    LayerPlan((), (), tuple(range(0, 128, 4))),  # no attention first
    LayerPlan((0, 1, 2, 3, 4, 5), (0, 1, 2), tuple(range(64))),
    LayerPlan((2, 3), (1,), ()),  # another number of KV heads, and no FFN
)
HALF = Chosen(tuple(range(0, 320, 2)), 320, 0.01, "dice")
NARROW = tuple(LayerPlan((0, 2, 4), (0, 1, 2), tuple(range(width))) for width in (32, 96, 64))  # KV heads alike


@pytest.mark.parametrize(("target", "words"), [("cpu", "all"), ("cpu", "half"), ("portable", "all")])
def test_onnxruntime_genai_streams_what_our_decoder_draws(tiny_model, tmp_path, target, words):
    og = pytest.importorskip("onnxruntime_genai")
    slim, directory = cut(tiny_model(), tmp_path / "slim", PrunePlan(UNEVEN)), tmp_path / "bundle"
    if words == "half":
        slim = trim(slim, HALF, tmp_path / "trimmed")
    export_bundle(slim, directory, target=target)
    tokenizer = BundleTokenizer(directory)
    engine = OnnxRuntimeEngine(directory, EngineOptions(1, 64))
    ours = begin_text(engine, tokenizer, "The quick brown fox", AnswerSettings(24, stop_ids=()))
    assert "".join(ours)
    ids = tokenizer.encode_chat("The quick brown fox")
    model = og.Model(str(directory))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=64)
    generator, theirs = og.Generator(model, parameters), og.Tokenizer(model)
    prompt = theirs.apply_chat_template(
        '[{"role": "user", "content": "The quick brown fox"}]', add_generation_prompt=True
    )
    assert theirs.encode(prompt).tolist() == ids
    generator.append_tokens(np.array([ids], np.int32))
    drawn = []
    while len(drawn) < 24 and not generator.is_done():
        generator.generate_next_token()
        drawn.append(int(generator.get_next_tokens()[0]))
    assert len(drawn) == 24
    assert drawn == ours.drawn
    assert words == "all" or set(drawn) <= set(HALF.words)
    # genai's stream swallows what follows a byte that is no UTF-8, which a random model may draw: a real text instead.
    stream, sentence = theirs.create_stream(), "naïve 日本 foxes, 12 of them"
    assert "".join(stream.decode(token) for token in tokenizer.encode(sentence)) == sentence


@pytest.mark.parametrize("words", ["all", "half"])
def test_optimum_draws_the_tokens_of_torch_where_kv_heads_are_alike(tiny_model, tmp_path, words):
    optimum = pytest.importorskip("optimum.onnxruntime")
    slim, directory = cut(tiny_model(), tmp_path / "slim", PrunePlan(NARROW)), tmp_path / "bundle"
    if words == "half":
        slim = trim(slim, HALF, tmp_path / "trimmed")
    manifest = export_bundle(slim, directory, bits=32)
    assert json.loads((directory / "config.json").read_text()) == optimum_config(read_config(slim), manifest)
    theirs = optimum.ORTModelForCausalLM.from_pretrained(directory, file_name=DECODE_GRAPH, local_files_only=True)
    torch_model = load_model(slim)
    for options in ({}, {"num_beams": 3}):
        options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 2, **options}
        assert theirs.generate(IDS, **options).tolist() == torch_model.generate(IDS, **options).tolist()


def test_optimum_has_no_config_where_kv_heads_differ(bundle, tmp_path):
    manifest = read_manifest(bundle)  # KV heads 2 and 1
    assert optimum_config({"model_type": "llama"}, manifest) is None
    write_client_files(tmp_path, {"model_type": "llama"}, manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["genai_config.json"]
    assert json.loads((tmp_path / "genai_config.json").read_text()) == genai_config(manifest)
    alike = replace(manifest, layers=[LayerSizes(4, 2, 128), LayerSizes(0, 0, 64), LayerSizes(2, 2, 96)])
    config = optimum_config({"model_type": "saap_llama", "slim_layers": [], "auto_map": {}, "rms_norm_eps": 1.0}, alike)
    assert config == {"model_type": "llama", "rms_norm_eps": 1.0, "num_hidden_layers": 2, "num_attention_heads": 4,
                      "num_key_value_heads": 2, "head_dim": HEAD_DIM}  # fmt: skip
    assert optimum_config({"model_type": "llama"}, replace(alike, hidden_size=HIDDEN + 8)) is None
