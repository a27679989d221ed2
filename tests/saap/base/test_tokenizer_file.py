"""What a tokenizer of somebody else's may ask of the library."""

import base64
import json
from typing import Any

import pytest

from saap.base.tokenizer_file import check_tokenizer

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def sequence(inner: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", inner: steps}


def replace(text: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": "e"}, "content": text}


def precompiled(string: str) -> dict[str, Any]:
    charsmap = (8).to_bytes(4, "little") + b"\1" * 8 + string.encode() + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}


def template(pieces: int, ids: int) -> dict[str, Any]:
    one = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    special = {"<s>": {"id": "<s>", "ids": [1] * ids, "tokens": ["<s>"] * ids}}
    return {"type": "TemplateProcessing", "single": [one] * pieces, "pair": [], "special_tokens": special}


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("pre_tokenizer", sequence("pretokenizers", [BYTES] * 40), "its pre_tokenizer has 40 steps, 16 are allowed"),
        ("pre_tokenizer", sequence("pretokenizers", [BYTES] * 12), "up to 4096 times longer, 1000 are allowed"),
        ("normalizer", sequence("normalizers", [{"type": "ByteLevel"}] * 18), "its normalizer has 18 steps"),
        ("normalizer", sequence("normalizers", [{"type": "NFKD"}] * 3), "up to 1331 times longer"),
        ("normalizer", sequence("normalizers", [sequence("normalizers", [replace("ee")] * 5)] * 2), "up to 1024 times"),
        ("normalizer", replace("é" * 501), "up to 1002 times longer"),
        ("normalizer", precompiled("e" * 1001), "up to 1001 times longer"),
        ("normalizer", {"type": "Run"}, "its normalizer has a step 'Run', allowed are BertNormalizer, "),
        ("post_processor", template(200_000, 1000), "up to 200000000 times longer"),
        ("decoder", {"type": ["Strip"]}, "Expected `str`, got `array`"),
        (
            "decoder",
            {"type": "Strip", "content": "a", "start": 1, "stop": 1},
            "its decoder strips both ends of a token",
        ),
        ("decoder", replace("e" * 1001), "up to 1001 times longer"),
        (
            "model",
            {"type": "WordPiece", "vocab": {}, "max_input_chars_per_word": 2**40},
            "max_input_chars_per_word is ",
        ),
    ],
)
def test_what_takes_all_memory_is_refused(part: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_tokenizer(json.dumps({"model": {"type": "BPE"}, part: value}).encode())


def test_what_real_families_have_is_taken() -> None:
    """LLaMA 2, Gemma, DeepSeek, T5, XLNet and BERT, as their files list it."""
    splits = [{"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated", "invert": False}] * 4
    digits = {"type": "Digits", "individual_digits": True}
    fallback = sequence("decoders", [replace(" "), {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip"}])
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    kinds = [{"type": name} for name in ("NFKD", "StripAccents", "Lowercase")]
    for document in (
        {
            "normalizer": sequence("normalizers", [{"type": "Prepend", "prepend": "▁"}, replace("▁")]),
            "decoder": fallback,
        },
        {"pre_tokenizer": sequence("pretokenizers", [*splits, digits, BYTES]), "post_processor": template(3, 1)},
        {"normalizer": precompiled("e" * 33), "pre_tokenizer": metaspace},
        {"normalizer": sequence("normalizers", [replace('"'), *kinds]), "pre_tokenizer": {"type": "BertPreTokenizer"}},
        {"normalizer": {"type": "BertNormalizer"}, "model": {"type": "WordPiece", "max_input_chars_per_word": 100}},
        {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None},
    ):
        check_tokenizer(json.dumps({"model": {"type": "BPE"}, **document}).encode())
