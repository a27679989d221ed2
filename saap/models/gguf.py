"""A GGUF file turned into a Hugging Face directory: float32 safetensors, config and tokenizer.

transformers reads the weights. The tokenizer is built here from the file's own fields where its kind is known,
because transformers' conversion (4.57 and 5.x) of byte-level BPE loses the pre-tokenizer, takes ``<|im_start|>`` for
the end of text, prepends a BOS that the file says is not wanted, and saves the whole GGUF as ``tokenizer.model``. Of a
sentencepiece BPE (kind ``llama``) it orders the merges of Gemma's vocabulary wrongly: " English" becomes five pieces. A
sentencepiece BPE joins the two neighbours whose joint piece has the best score; as merges that is every way to part a
piece, in the order of the pieces' scores.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from saap.base.errors import UserError, first_line
from saap.base.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from saap.base.gguf_header import GgufHeader

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
SPACE = "\u2581"  # what stands for a space in a piece
# Control tokens that end a turn or a text, whatever the file names as its one EOS: llama.cpp treats them so as well.
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")


@dataclass(frozen=True)
class GGUFTokenizer:
    """The tokenizer's fields in a GGUF file; ids that the file does not name are None."""

    kind: str  # gpt2 = byte-level BPE, llama = sentencepiece
    pre: str  # name of the pre-tokenizer
    tokens: list[str]
    types: list[int]
    scores: list[float]  # of sentencepiece's pieces; else empty
    merges: list[str]
    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None
    add_bos: bool
    space_prefix: bool  # sentencepiece puts a space before the text
    chat_template: str | None
    context: int | None

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends a generation, the file's own EOS first."""
        named = [
            index
            for index, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind == CONTROL and token in END_TOKENS
        ]
        return list(dict.fromkeys([*([] if self.eos is None else [self.eos]), *named]))


def convert(source: Path, destination: Path, progress: Progress | None = None) -> None:
    """Write ``config.json``, ``model.safetensors`` (float32), ``generation_config.json`` and tokenizer files.

    ``destination``: an existing directory.

    Raises UserError: not a GGUF file, or one of an architecture or quantisation that transformers does not read.
    """
    with _read_once(source):
        fields = read_tokenizer_fields(source)
        _convert_weights(source, destination, fields, progress or (lambda label, done, total: None))
    convert_tokenizer(source, destination, fields)


def convert_tokenizer(source: Path, destination: Path, fields: GGUFTokenizer | None = None) -> None:
    """Write the tokenizer files alone. Raises UserError: no GGUF file, or a tokenizer that cannot be converted."""
    fields = fields or read_tokenizer_fields(source)
    try:
        if fields.kind == "gpt2" and fields.pre in ("gpt-2", "smollm"):
            write_tokenizer(fields, byte_level_bpe(fields), destination)
        elif fields.kind == "llama" and fields.scores:
            spm = spm_tokenizer(fields.tokens, fields.types, fields.scores, fields.unk, fields.space_prefix)
            write_tokenizer(fields, spm, destination)
        else:
            _convert_tokenizer(source, destination, fields)
    except (OSError, UserError):
        raise
    except Exception as error:  # the library raises a bare Exception
        raise UserError(f"{source} has a damaged tokenizer ({first_line(error)}): download it again") from None


def read_tokenizer_fields(source: Path) -> GGUFTokenizer:
    """Read the ``tokenizer.ggml.*`` fields.

    Raises UserError: the file is not a GGUF file, is cut short, or holds no tokenizer.
    """
    from gguf import GGUFReader

    from saap.base.gguf_header import GgufHeaderError, read_header

    try:
        header = read_header(source)  # bounded by the file's size, where the library's reader believes a count of 2^60
    except GgufHeaderError as error:
        raise UserError(str(error)) from None
    _check_sizes(source, header)
    try:
        reader = GGUFReader(source)
    except Exception as error:  # the reader raises what numpy raises on garbage
        raise UserError(f"{source} is not a whole GGUF file ({first_line(error)}): download it again") from None

    def field(name: str, default: Any = None) -> Any:
        entry = reader.get_field(name)
        try:
            return default if entry is None else entry.contents()
        except ValueError as error:  # bytes that are no text
            raise UserError(f"{source} is damaged in {name} ({first_line(error)}): download it again") from None

    prefix = "tokenizer.ggml."
    tokens = field(prefix + "tokens")
    if not tokens:
        raise UserError(f"{source} holds no tokenizer: give a GGUF file of a whole language model")
    if not isinstance(tokens, list):
        raise UserError(f"{source} has a damaged tokenizer (tokens that are no list): download it again")
    kind = field(prefix + "model", "")
    context = field(f"{field('general.architecture', '')}.context_length")
    values = {
        "kind": kind,
        "pre": field(prefix + "pre", "gpt-2"),
        "tokens": tokens,
        "types": field(prefix + "token_type") or [NORMAL] * len(tokens),
        "scores": field(prefix + "scores", []),
        "merges": field(prefix + "merges", []),
        "bos": field(prefix + "bos_token_id"),
        "eos": field(prefix + "eos_token_id"),
        "pad": field(prefix + "padding_token_id"),
        "unk": field(prefix + "unknown_token_id"),
        "add_bos": bool(field(prefix + "add_bos_token", kind == "llama")),
        "space_prefix": bool(field(prefix + "add_space_prefix", True)),
        "chat_template": field("tokenizer.chat_template"),
        "context": context,
    }
    try:
        return _checked(msgspec.convert(values, GGUFTokenizer))
    except ValueError as error:
        raise UserError(f"{source} has a damaged tokenizer ({error}): download it again") from None


def _checked(fields: GGUFTokenizer) -> GGUFTokenizer:
    """Check the fields against one another and return them. Raises ValueError: they contradict one another."""
    count = len(fields.tokens)
    if len(fields.types) != count or len(fields.scores) not in (0, count):
        raise ValueError(f"{count} tokens have {len(fields.types)} types and {len(fields.scores)} scores")
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(fields, name)) is not None and not 0 <= index < count:
            raise ValueError(f"its {name} is token {index} of {count}")
    return fields


def _check_sizes(source: Path, header: GgufHeader) -> None:
    """Refuse sizes that are not those of the file's tensors: transformers makes a model of them before it reads any.

    What a file leaves out, transformers takes to be what LLaMA 7B has.

    Raises UserError: says which, and what the tensors have.
    """
    layers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.") and name.count(".") > 1}
    table, down = header.tensors.get("token_embd.weight"), header.tensors.get("blk.0.ffn_down.weight")
    for key, expected in (
        ("block_count", {len(layers)}),
        ("embedding_length", set(table.shape[:1]) if table else set()),
        ("vocab_size", set(table.shape[1:2]) if table else set()),
        ("feed_forward_length", set(down.shape[:1]) if down else set()),
    ):
        size = next(iter(header.counts(key)), None)
        needed = layers and key != "vocab_size"  # which its tokens say, too
        if expected and size not in expected and (size is not None or needed):
            claim = f"no {key}" if size is None else f"{key} {size}"
            raise UserError(f"{source} says {claim}, its tensors have {min(expected)}: download it again")
    hidden = max(table.shape[:1], default=0) if table else 0
    for key in ("attention.head_count", "attention.key_length", "attention.value_length", "expert_count"):
        if strange := [size for size in header.counts(key) if not 0 <= size <= max(hidden, 512)]:
            raise UserError(f"{source} says {key} {strange[0]} at a width of {hidden}: download it again")


def byte_level_bpe(fields: GGUFTokenizer) -> Tokenizer:
    """Build a byte-level BPE.

    ``smollm`` splits every digit off before GPT-2's byte-level split; ``gpt-2`` is the latter alone.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # Rows of the embedding that no token has are filled up in a file.
    vocabulary = {token: index for index, token in enumerate(fields.tokens) if token != f"[PAD{index}]"}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields.merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = [pre_tokenizers.Digits(individual_digits=True)] if fields.pre == "smollm" else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    typed = list(zip(fields.tokens, fields.types, strict=True))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t, kind in typed if kind == CONTROL]
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token, kind in typed if kind == USER_DEFINED])
    return tokenizer


def write_tokenizer(fields: GGUFTokenizer, tokenizer: Tokenizer, destination: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja``."""
    if fields.add_bos and fields.bos is not None:
        _prepend(tokenizer, fields.tokens[fields.bos], fields.bos)
    tokenizer.save(str(destination / "tokenizer.json"))
    _write_json(destination / "tokenizer_config.json", _tokenizer_config(fields))
    if fields.chat_template:
        (destination / "chat_template.jinja").write_text(fields.chat_template, encoding="utf-8")


def _prepend(tokenizer: Tokenizer, token: str, index: int) -> None:
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, index)]
    )


def _tokenizer_config(fields: GGUFTokenizer) -> dict[str, object]:
    # PreTrainedTokenizerFast takes tokenizer.json as it is; a class by the model's name would rebuild it.
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "model_input_names": ["input_ids", "attention_mask"],  # else token_type_ids come along, which generate refuses
        "add_bos_token": fields.add_bos,
        **_special_tokens(fields),
    }
    if fields.context:
        config["model_max_length"] = fields.context
    return config


def _special_tokens(fields: GGUFTokenizer) -> dict[str, str]:
    ids = {"bos_token": fields.bos, "eos_token": fields.eos, "pad_token": fields.pad, "unk_token": fields.unk}
    return {name: fields.tokens[index] for name, index in ids.items() if index is not None}


def _convert_weights(source: Path, destination: Path, fields: GGUFTokenizer, report: Progress) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from saap.system.sealed_tensors import save_tensors

    try:
        with _quiet(), _counted(source, report), _alone(source) as folder:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=source.name,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_kernels=False,
            )
    except Exception as error:  # sizes and names that do not fit fail somewhere in it, each in its own way
        raise UserError(
            f"{source} cannot be read by transformers ({first_line(error)}): use a GGUF file of a LLaMA-type model"
        ) from None
    report(f"writing the model, {source.name}", 0, 0)
    # Written here because transformers 5 refuses to save what it has just dequantised.
    tensors: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        tensors.setdefault(tensor.data_ptr(), (name, tensor))  # a tied lm_head comes last and is left out
    save_tensors(dict(tensors.values()), destination / "model.safetensors")
    _write_json(destination / "config.json", _config(model, fields))
    _write_json(destination / "generation_config.json", _generation_config(fields))


def _config(model: PreTrainedModel, fields: GGUFTokenizer) -> dict[str, object]:
    config: dict[str, object] = json.loads(model.config.to_json_string(use_diff=True))
    config.pop("_model_name_or_path", None)
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    config["eos_token_id"] = fields.eos
    # transformers 5 keeps the rotary base and scaling in rope_parameters only, where 4 would not find them.
    parameters = config.get("rope_parameters")
    rope = dict(parameters) if isinstance(parameters, dict) else {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope.pop("rope_theta"))
        config.setdefault("rope_scaling", rope if rope.get("rope_type", "default") != "default" else None)
    return dict(sorted(config.items()))


def _generation_config(fields: GGUFTokenizer) -> dict[str, object]:
    pad = fields.eos if fields.pad is None else fields.pad
    ids = {"bos_token_id": fields.bos, "eos_token_id": fields.end_ids or None, "pad_token_id": pad}
    return {name: value for name, value in ids.items() if value is not None}


def _convert_tokenizer(source: Path, destination: Path, fields: GGUFTokenizer) -> None:
    """Let transformers convert the tokenizer, with the special tokens that the file names."""
    from transformers import AutoTokenizer

    try:
        with _quiet(), _alone(source) as folder:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, gguf_file=source.name, local_files_only=True, **_special_tokens(fields)
            )
    except Exception as error:  # a converter per model family, each with its own way to fail
        raise UserError(
            f"{source} has a {fields.kind!r} tokenizer that transformers cannot convert ({first_line(error)}): "
            "give the Hugging Face directory of this model"
        ) from None
    if fields.chat_template:
        tokenizer.chat_template = fields.chat_template
    tokenizer.save_pretrained(str(destination))
    (destination / "tokenizer.model").unlink(missing_ok=True)  # this is the GGUF itself


@contextlib.contextmanager
def _alone(source: Path) -> Iterator[str]:
    """Give a folder that holds a link to the file alone: transformers reads adapters and settings beside a GGUF."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, source.name).symlink_to(source.resolve())
        yield folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' GGUF reader, which draws a bar on stderr and advises on legacy tokenizers."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _counted(source: Path, report: Progress) -> Iterator[None]:
    """Report the progress of transformers' loop over the tensors, where this version still has one."""
    from transformers import modeling_gguf_pytorch_utils as reader

    names = vars(reader)
    label, bar = f"converting (tensors), {source.name}", names.get("tqdm")
    report(label, 0, 0)

    def counted(tensors: Sequence[object], **_: object) -> Iterator[object]:
        for done, tensor in enumerate(tensors):
            report(label, done, len(tensors))
            yield tensor
        report(label, len(tensors), len(tensors))

    if bar is not None:
        names["tqdm"] = counted
    try:
        yield
    finally:
        if bar is not None:
            names["tqdm"] = bar


@contextlib.contextmanager
def _read_once(source: Path) -> Iterator[None]:
    """Share one reader of a file between ours and transformers' two: each would take seconds."""
    import gguf

    plain, readers = gguf.GGUFReader, list[gguf.GGUFReader]()

    def reader(path: str | Path, *mode: Any) -> gguf.GGUFReader:
        if not Path(path).samefile(source):
            return plain(path, *mode)
        if not readers:
            readers.append(plain(path, *mode))
        return readers[0]

    vars(gguf)["GGUFReader"] = reader
    try:
        yield
    finally:
        vars(gguf)["GGUFReader"] = plain


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def spm_tokenizer(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float], unk: int | None, prefix: bool
) -> Tokenizer:
    """Build a tokenizer that gives sentencepiece's ids; special tokens are the control pieces.

    Args:
        tokens: pieces in the order of their ids.
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
