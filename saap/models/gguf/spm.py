"""The sentencepiece tokenizer of a GGUF file (kind ``llama``) as a ``tokenizer.json``.

transformers' conversion of these fields (4.57) orders the merges of Gemma's vocabulary wrongly: " English" becomes
five pieces. A sentencepiece BPE joins the two neighbours whose joint piece has the best score; as merges that is every
way to part a piece, in the order of the pieces' scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
SPACE = "\u2581"  # what stands for a space in a piece


def spm_tokenizer(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], unk: int | None, prefix: bool
) -> Any:
    """A ``tokenizers.Tokenizer`` that gives sentencepiece's ids; special tokens are the control pieces.

    Args:
        tokens: pieces in the order of their ids.
        types: kind of each piece.
        scores: of each piece; the best is joined first.
        unk: id for what has no piece, where bytes do not stand in.
        prefix: a space is put before the text, and, as llama.cpp does, before what follows a special piece.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces, merges=list(_merges(tokens, types, scores)), fuse_unk=True, byte_fallback=BYTE in types,
            unk_token=None if unk is None else tokens[unk],
        )
    )  # fmt: skip
    spaces = [normalizers.Replace(" ", SPACE)]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *spaces] if prefix else spaces)
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    typed = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in typed if kind == CONTROL]
    )
    # Runs of spaces are joined by merges: as added tokens they would be looked for before spaces become pieces.
    own = [token for token, kind in typed if kind == USER_DEFINED and token.strip(SPACE)]
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own])
    return tokenizer


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces, the first to be joined first; a piece that users defined is never left in parts."""
    joined = {token for token, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    order = sorted(
        (index for index, token in enumerate(tokens) if token in joined and len(token) > 1),
        key=lambda index: (types[index] != USER_DEFINED, -scores[index], len(tokens[index]), index),
    )
    for index in order:
        token = tokens[index]
        for cut in range(1, len(token)):
            if token[:cut] in joined and token[cut:] in joined:
                yield token[:cut], token[cut:]
