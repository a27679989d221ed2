"""The text part of a multimodal checkpoint: a model directory of its own.

transformers nests the decoder's config in ``text_config``. Its tensors are ``model.language_model.*`` with the head
outside, or, in older files, ``language_model.model.*`` and ``language_model.lm_head.*``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from saap.base.errors import UserError
from saap.base.progress import Progress
from saap.base.writing import read_object
from saap.models.architectures import ARCHITECTURES, architecture_of, check_config
from saap.models.weight_files import opened, stored_tensors, write_shards

NESTED, OLDER, HEAD = "model.language_model.", "language_model.", "lm_head."


def text_config_of(config: Mapping[str, object]) -> dict[str, object] | None:
    """Return the config of the text part; None for a model that is text alone."""
    text = config.get("text_config")
    return dict(text) if isinstance(text, dict) and config.get("model_type") not in ARCHITECTURES else None


def write_text_part(source: Path, out: Path, report: Progress) -> None:
    """Write weights and config of the text part of ``source`` into ``out``.

    Raises UserError: a family that is not supported, or no text tensors.
    """
    config = read_object(source / "config.json", "get it again")
    check_config(config)
    text = text_config_of(config)
    assert text is not None, "the caller has looked"
    family = architecture_of(text).family
    places: dict[str, tuple[Path, str]] = {}
    for name, file in stored_tensors(source).items():
        if new := text_name(name):
            places[name] = file, new
    if not places:
        raise UserError(f"{source} has no tensors of a text part ({NESTED}*): get it again")
    heads = any(new.startswith(HEAD) for _, new in places.values())
    new_config = {**text, "architectures": [f"{family}ForCausalLM"], "tie_word_embeddings": not heads}
    (out / "config.json").write_text(json.dumps(new_config, indent=2) + "\n", encoding="utf-8")

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for done, (name, (file, new)) in enumerate(places.items()):
            report(f"taking the text part of a {config['model_type']} model (tensors)", done, len(places))
            with opened(file) as handle:
                yield new, handle.get_tensor(name)
        report(f"taking the text part of a {config['model_type']} model (tensors)", len(places), len(places))

    write_shards(out, tensors())


def text_name(name: str) -> str | None:
    """Return a tensor's name in the text part; None where it is not in it."""
    if name.startswith(NESTED):
        return "model." + name.removeprefix(NESTED)
    if name.startswith(OLDER):
        return name.removeprefix(OLDER)
    return name if name.startswith(HEAD) else None
