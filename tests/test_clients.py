from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from tiny_graphs import CONTEXT, HEAD_DIM, HIDDEN, VOCAB, tiny_bundle

from export.bundle import DECODE_GRAPH, BundleManifest, LayerSizes, read_manifest
from export.clients import genai_config, write_genai_config


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("clients") / "bundle")


def without(manifest: BundleManifest, **changes) -> BundleManifest:
    return BundleManifest(**{**{n: getattr(manifest, n) for n in manifest.__dataclass_fields__}, **changes})


def test_config_names_every_cache_tensor_of_the_graph(bundle):
    decoder = genai_config(read_manifest(bundle))["model"]["decoder"]
    model = onnx.load(bundle / decoder["filename"], load_external_data=False)
    layers = range(decoder["num_hidden_layers"])
    for told, has in ((decoder["inputs"], model.graph.input), (decoder["outputs"], model.graph.output)):
        named = {name % n if "%d" in name else name for name in told.values() for n in layers}
        assert named == {value.name for value in has}


def test_sizes_are_of_the_layers_that_have_a_cache(bundle):
    config = genai_config(read_manifest(bundle))
    decoder = config["model"]["decoder"]
    assert (decoder["head_size"], decoder["hidden_size"], config["model"]["vocab_size"]) == (HEAD_DIM, HIDDEN, VOCAB)
    # Layers of 4/2, none and 3/1 heads: two with a cache, the largest counts.
    assert (decoder["num_hidden_layers"], decoder["num_attention_heads"], decoder["num_key_value_heads"]) == (2, 4, 2)
    assert config["model"]["context_length"] == config["search"]["max_length"] == CONTEXT
    assert config["search"]["past_present_share_buffer"] is True
    assert config["search"]["do_sample"] is False


def test_every_end_of_text_id_and_an_id_of_zero_survive(bundle):
    manifest = without(read_manifest(bundle), eos_token_ids=[0, 2, 7], bos_token_id=0)
    model = genai_config(manifest)["model"]
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([0, 2, 7], 0, 0)
    assert genai_config(manifest, pad_token_id=5)["model"]["pad_token_id"] == 5
    assert genai_config(without(manifest, bos_token_id=None, eos_token_ids=[3]))["model"]["bos_token_id"] == 3


def test_search_defaults_of_the_model_go_over_greedy_ones(bundle):
    search = genai_config(read_manifest(bundle), search={"do_sample": True, "top_p": 0.9})["search"]
    assert (search["do_sample"], search["top_p"], search["top_k"]) == (True, 0.9, 50)


def test_model_without_attention_has_no_cache(bundle):
    manifest = without(read_manifest(bundle), layers=[LayerSizes(0, 0, 64)])
    assert genai_config(manifest)["model"]["decoder"]["num_hidden_layers"] == 0


def test_writer_leaves_the_document_and_nothing_beside_it(tmp_path, bundle):
    manifest = read_manifest(bundle)
    path = write_genai_config(tmp_path, manifest)
    assert json.loads(path.read_text()) == genai_config(manifest)
    assert [p.name for p in tmp_path.iterdir()] == ["genai_config.json"]


def test_onnxruntime_genai_draws_the_tokens_that_the_graph_says(tmp_path):
    og = pytest.importorskip("onnxruntime_genai")
    from bench.runtime import OrtDecoder

    directory = tiny_bundle(tmp_path / "bundle")
    write_genai_config(directory, read_manifest(directory))
    # genai sizes its logits buffer by this dimension, so it has to be a number.
    model = onnx.load(directory / DECODE_GRAPH, load_external_data=False)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1
    onnx.save(model, directory / DECODE_GRAPH)
    decoder, ours = OrtDecoder(directory, 1, 32, verify=False), []
    logits = decoder.prefill(np.array([1, 5, 9, 7]))
    for _ in range(12):
        ours.append(int(logits.argmax()))
        logits = decoder.step(ours[-1])
    model = og.Model(str(directory))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=32)
    generator, theirs = og.Generator(model, parameters), []
    generator.append_tokens(np.array([[1, 5, 9, 7]], np.int32))
    while len(theirs) < len(ours) and not generator.is_done():
        generator.generate_next_token()
        theirs.append(int(generator.get_next_tokens()[0]))
    assert theirs == ours[: len(theirs)]
    assert len(theirs) > 3
