"""A directory's tokenizer.json as the ``tokenizer.*`` fields of a GGUF file.

llama.cpp knows pre-tokenizers by name and not by their expressions, so what tokenizer.json says is looked up; one that
llama.cpp has no name for is refused, because a file that runs with other tokens than its model's is silently wrong.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.bundle.tokenizer import BundleTokenizer
from saap.base.errors import UserError
from saap.models.gguf import CONTROL, END_TOKENS, USER_DEFINED

if TYPE_CHECKING:
    from gguf import GGUFWriter

Part = dict[str, Any]  # an object of tokenizer.json
NORMAL, UNKNOWN, UNUSED, BYTE = 1, 2, 5, 6  # tokenizer.ggml.token_type
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"{_WORD}*[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]+|{_WORD}+[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2", _TEKKEN: "tekken"}
# Where llama.cpp's version of an expression is known to differ.
_DIFFERENCES = {
    "tekken": "llama.cpp's tekken knows capitals of ASCII only and no combining marks: such text may get other tokens",
    "Metaspace": "llama.cpp puts a space before a text that begins with one too; this tokenizer does not",
}


@dataclass
class TokenizerFields:
    """The tokenizer's fields in the file; ids are None if the directory names none, ``scores`` is for sentencepiece."""

    model: str  # gpt2 = byte-level BPE, llama = sentencepiece
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]  # bos, eos, eot, unknown, padding
    add: dict[str, bool]  # bos_token, eos_token, space_prefix
    chat_template: str | None
    notes: list[str] = field(default_factory=list)

    def write(self, writer: GGUFWriter) -> None:
        prefix = "tokenizer.ggml."
        writer.add_string(prefix + "model", self.model)
        writer.add_string(prefix + "pre", self.pre)
        writer.add_array(prefix + "tokens", self.tokens)
        writer.add_array(prefix + "token_type", self.types)
        if self.scores:
            writer.add_array(prefix + "scores", self.scores)
        else:
            writer.add_array(prefix + "merges", self.merges)
        for name, index in self.ids.items():
            writer.add_uint32(f"{prefix}{name}_token_id", index)
        for name, value in self.add.items():
            writer.add_bool(f"{prefix}add_{name}", value)
        if self.chat_template:
            writer.add_string("tokenizer.chat_template", self.chat_template)


def tokenizer_fields(directory: Path, vocabulary: int) -> TokenizerFields:
    """Read tokenizer.json and the files beside it.

    ``vocabulary``: rows of the embedding; ids above the tokenizer's are filled up with unused tokens.

    Raises UserError: no tokenizer.json, or one that llama.cpp has no counterpart for.
    """
    if not (directory / "tokenizer.json").is_file():
        raise UserError(f"{directory} has no tokenizer.json, which a GGUF file needs: put the model's own there")
    ours = BundleTokenizer(directory)
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise UserError(
            f"{directory} has a tokenizer of type {model.get('type')!r}, which no GGUF of ours holds; allowed: BPE"
        )
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens(content, vocabulary, sentencepiece)
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    add, notes = _added(ours)
    pre = "default" if sentencepiece else _pre_tokenizer(directory, content.get("pre_tokenizer"))
    space = _space_prefix(content)
    notes += [_DIFFERENCES[name] for name in (pre, space) if name in _DIFFERENCES]
    if content.get("normalizer") and not sentencepiece:
        notes.append(f"the tokenizer's normalizer ({content['normalizer']['type']}) has no counterpart in llama.cpp")
    return TokenizerFields(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in pairs],
        scores=_scores(tokens, pairs) if sentencepiece else [],
        ids=_special_ids(ours, notes),
        add=add | ({"space_prefix": bool(space)} if sentencepiece else {}),
        chat_template=ours.chat_template,
        notes=notes,
    )


def _tokens(content: Part, vocabulary: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    by_id = {index: (token, NORMAL) for token, index in content["model"]["vocab"].items()}
    unknown = content["model"].get("unk_token")
    for index, (token, _) in by_id.items():
        if sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            by_id[index] = (token, BYTE)
    for entry in content.get("added_tokens", []):
        by_id[entry["id"]] = (entry["content"], CONTROL if entry["special"] else USER_DEFINED)
    if sentencepiece and unknown is not None:
        by_id[content["model"]["vocab"][unknown]] = (unknown, UNKNOWN)
    if not by_id:
        raise UserError("the model's tokenizer has no tokens: get or make the model again")
    if max(by_id) >= vocabulary:
        raise UserError(f"the tokenizer has ids up to {max(by_id)}, the embedding {vocabulary} rows: not of one model")
    filled = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(vocabulary)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _scores(tokens: list[str], pairs: list[tuple[str, ...]]) -> list[float]:
    """llama.cpp merges what has the highest score, tokenizer.json what comes first: minus the rank of the product."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(pairs):
        rank.setdefault("".join(pair), index)
    return [-float(rank[token]) if token in rank else 0.0 for token in tokens]


def _pre_tokenizer(directory: Path, part: Part | None) -> str:
    """llama.cpp's name for the pre-tokenizer of a byte-level BPE."""
    steps = part.get("pretokenizers", [part]) if part else []
    shape = [step["type"] for step in steps]
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if shape == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if shape == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last.get("use_regex", True):
            return "smollm"
        if shape == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
            if name and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"):
                return name
    raise UserError(
        f"{directory} splits text before its BPE ({' + '.join(shape) or 'not at all'}) as no known pre-tokenizer of "
        f"llama.cpp does; known: gpt-2, smollm, {', '.join(SPLITS.values())}; export it for the cpu target"
    )


def _added(ours: BundleTokenizer) -> tuple[dict[str, bool], list[str]]:
    """Find the tokens that the tokenizer puts around a text, by encoding one."""
    bare, whole = ours.encode("a", add_special_tokens=False), ours.encode("a")
    before = whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else whole[:1]
    after = whole[len(before) + len(bare) :]
    add = {"bos_token": bool(before), "eos_token": bool(after)}
    known = before in ([], [ours.bos_token_id]) and (not after or after[0] in ours.eos_token_ids)
    return add, [] if known else [f"the tokenizer puts a text between {before} and {after}; llama.cpp puts BOS and EOS"]


def _special_ids(ours: BundleTokenizer, notes: list[str]) -> dict[str, int]:
    names = {"unk_token": "unknown", "pad_token": "padding"}
    special = ours.special_tokens
    ids = {key: ours.tokenizer.token_to_id(special[name]) for name, key in names.items() if name in special}
    if ours.bos_token_id is not None:
        ids["bos"] = ours.bos_token_id
    ends = ours.eos_token_ids
    # llama.cpp ends a text at its one EOS, and at the names that it knows to be one.
    others = [index for index in ends[1:] if ours.tokenizer.id_to_token(index) not in END_TOKENS]
    ids |= dict(zip(("eos", "eot", "eom"), [*ends[:1], *others], strict=False))
    if len(others) > 2:
        notes.append(f"llama.cpp will not end a text at the tokens {others[2:]}")
    return {name: index for name, index in ids.items() if index is not None}


def _space_prefix(content: Part) -> str | None:
    """Name what puts a space before a text in sentencepiece's kind, None where nothing does."""
    parts = [content.get("normalizer") or {}, content.get("pre_tokenizer") or {}]
    parts += [p for part in parts for p in part.get("normalizers", part.get("pretokenizers", []))]
    kinds = {part.get("type"): part for part in parts}
    if "Prepend" in kinds:
        return "Prepend"
    return "Metaspace" if kinds.get("Metaspace", {}).get("prepend_scheme", "never") != "never" else None
