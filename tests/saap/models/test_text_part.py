"""The text part of a multimodal model: the same logits, and everything else left out."""

import json

import pytest
import torch
import transformers

from saap.base.errors import UserError
from saap.models.checkpoint import load_model, read_config
from saap.models.resolve import resolve
from saap.models.text_part import text_name

IDS = torch.randint(320, (2, 12), generator=torch.Generator().manual_seed(5))
TEXT = {"vocab_size": 320, "hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "pad_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
NEW = int(transformers.__version__.split(".")[0]) > 4
KINDS = {
    "gemma3": (
        "Gemma3",
        {"text_config": {**TEXT, "sliding_window": 8}, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    **(
        {
            "gemma4": (
                "Gemma4",
                {
                    "text_config": {
                        **TEXT,
                        "layer_types": ["sliding_attention", "full_attention"],
                        "global_head_dim": 64,
                        "sliding_window": 8,
                        "hidden_size_per_layer_input": 32,
                        "vocab_size_per_layer_input": 320,
                    },
                    "vision_config": {
                        "hidden_size": 32,
                        "intermediate_size": 48,
                        "num_hidden_layers": 1,
                        "num_attention_heads": 2,
                        "num_key_value_heads": 2,
                        "head_dim": 16,
                        "patch_size": 14,
                    },
                    "audio_config": None,
                },
            )
        }
        if NEW
        else {}
    ),
    **(
        {
            "qwen3_5": (
                "Qwen3_5",
                {
                    "text_config": {
                        **TEXT,
                        "linear_num_key_heads": 2,
                        "linear_num_value_heads": 4,
                        "linear_key_head_dim": 16,
                        "linear_value_head_dim": 16,
                        "layer_types": ["linear_attention", "full_attention"],
                    },
                    "vision_config": {
                        "hidden_size": 32,
                        "intermediate_size": 48,
                        "depth": 1,
                        "num_heads": 2,
                        "patch_size": 14,
                        "out_hidden_size": 96,
                    },
                    "tie_word_embeddings": True,
                },
            )
        }
        if NEW
        else {}
    ),
    "mistral3": (
        "Mistral3",
        {
            "text_config": {**TEXT, "model_type": "ministral3" if NEW else "mistral", "sliding_window": None},
            "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.fixture
def seeing(tmp_path, tiny_tokenizer):
    """Factory of tiny models that see: their directory, and the logits of their text."""

    def make(kind):
        family, fields = KINDS[kind]
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**fields)
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
        model.save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
        with torch.inference_mode():
            expected = model.lm_head(model.model.language_model(input_ids=IDS).last_hidden_state)
        return tmp_path / kind, expected

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_part_has_the_logits_of_the_whole(seeing, tmp_path, kind):
    directory, expected = seeing(kind)
    told = []
    found = resolve(directory, cache_dir=tmp_path / "cache", progress=lambda label, *_: told.append(label))
    assert found.parent == tmp_path / "cache" and f"taking the text part of a {kind} model (tensors)" in told
    assert (
        read_config(found)["model_type"]
        == json.loads((directory / "config.json").read_text())["text_config"]["model_type"]
    )
    with torch.inference_mode():
        assert (load_model(found)(input_ids=IDS).logits - expected).abs().max() <= 1e-5
    assert (found / "tokenizer.json").is_file()
    told.clear()
    assert resolve(directory, cache_dir=tmp_path / "cache", progress=lambda *_: told.append(1)) == found and not told


def test_a_text_part_of_an_unknown_family_is_refused_before_it_is_made(seeing, tmp_path):
    directory, _ = seeing("gemma3")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["model_type"] = "gemma9_text"
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="model type 'gemma9_text' is not supported"):
        resolve(directory, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*text*"))


def test_names_of_both_layouts():
    assert text_name("model.language_model.layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"
    assert text_name("language_model.model.norm.weight") == "model.norm.weight"
    assert text_name("language_model.lm_head.weight") == text_name("lm_head.weight") == "lm_head.weight"
    assert text_name("model.vision_tower.blocks.0.weight") is text_name("multi_modal_projector.weight") is None
