"""Names of models, and the directories that hold them.

A name is a directory, a GGUF file, a hub id (``org/name``) or the name of a packaged model. GGUF files, packaged models
and the text part of a multimodal model are converted once into the cache: the directory that ``SAAP_CACHE`` names, else
the platform's.
"""

from __future__ import annotations

import os
import re
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saap.base.errors import UserError
from saap.base.files import cache_directory, calling, read_whole, sha256_file
from saap.base.progress import Progress
from saap.base.tokenizer_file import LARGEST_TOKENIZER, TOKENIZER, check_tokenizer, tokenizing
from saap.base.wording import installing
from saap.base.writing import read_object
from saap.models.config_fields import check_fields
from saap.models.directory import SIDECARS, WEIGHTS, check_files, copy_sidecars, weight_files
from saap.models.integrity import cached
from saap.models.packaged import PACKAGED, fetch, model_card

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def resolve(name: str | Path, *, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Find or make the directory of a model: ``config.json``, safetensors and tokenizer files.

    Args:
        name: a directory, a GGUF file, a packaged name (see :data:`PACKAGED`) or a hub id.
        cache_dir: where converted models are kept; by default ``SAAP_CACHE``, else the platform's cache directory.

    Raises UserError: no such model, a directory that is none, a package or hub that cannot be reached.
    """
    report = progress or (lambda *_: None)
    cache = cache_dir or cache_directory()
    kind, path = kind_of(name), Path(name)
    if kind == "directory":
        return _text_of(_checked(path), cache, report)
    if kind == "file":
        return _from_gguf(path, cache, report)
    if kind == "package":
        return _from_package(str(name), cache, report)
    return _text_of(_checked(_from_hub(str(name), report)), cache, report)


def kind_of(name: str | Path) -> Literal["directory", "file", "package", "hub"]:
    """Tell the kind of a model's name; no file is read. Raises UserError: no kind."""
    path = Path(name)
    if path.is_dir():
        return "directory"
    if path.is_file():
        return "file"
    if str(name) in PACKAGED:
        return "package"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", str(name)):
        near = "".join(f" (did you mean {each}?)" for each in get_close_matches(str(name), PACKAGED, n=1))
        raise UserError(
            f"no model {str(name)!r}{near}: give a directory, a GGUF file, a hub id (org/name, org/name@revision) or "
            f"one of {', '.join(PACKAGED)}"
        )
    if path.parent.is_dir():
        raise UserError(
            f"no directory {name}: check the name; for the hub's model {name}, work where no folder {path.parent} is"
        )
    return "hub"


def tokenizer_of_gguf(source: Path) -> Path:
    """Convert the tokenizer of a GGUF file, without its weights, into a directory in the cache.

    Raises UserError: no such file, or a tokenizer that cannot be converted.
    """
    from saap.models.gguf import convert_tokenizer

    digest = sha256_file(source)
    entry = cache_directory() / f"{source.stem}-tokenizer-{digest[:12]}"
    return cached(entry, lambda out: convert_tokenizer(source, out), digest)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory with transformers.

    Raises UserError: there is no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise UserError(f"{path} is not a directory: give a model directory")
    check_files(path)
    remedy = "copy the base model's tokenizer files there"
    with tokenizing(f"{path} has no tokenizer that can be read", remedy):
        if (file := Path(path) / TOKENIZER).is_file():
            check_tokenizer(read_whole(file, LARGEST_TOKENIZER))
        if (file := Path(path) / "tokenizer_config.json").is_file():
            check_fields(str(file), read_object(file, remedy))
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    if not isinstance(tokenizer.model_max_length, int | float):  # with which a text's length is compared
        raise UserError(
            f"{Path(path) / 'tokenizer_config.json'} has model_max_length {str(tokenizer.model_max_length)[:40]}: "
            f"must be a number; {remedy}"
        )
    return tokenizer


def _checked(path: Path) -> Path:
    """Return the path of a model directory. Raises UserError: it is none."""
    if (path / "bundle.json").is_file():
        raise UserError(f"{path} is an exported bundle, not a model: give the model directory it was made from")
    check_files(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a model directory: it has no config.json; give a Hugging Face model directory")
    if not weight_files(path):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        what = "only pickled weights" if pickled else "no weights"
        raise UserError(f"{path} holds {what}: saap reads safetensors; save the model with save_pretrained first")
    return path


def _text_of(source: Path, cache: Path, report: Progress) -> Path:
    """Return the directory itself; for a multimodal model, a directory with its text part."""
    from saap.models.checkpoint import read_config
    from saap.models.text_part import text_config_of, write_text_part
    from saap.models.weight_files import check_family, weights_hash

    if text_config_of(read_object(source / "config.json", "make the directory again")) is None:
        check_family(source)
        read_config(source)  # before the tokenizer is blamed for it, whose loader reads it, too
        return source
    digest = weights_hash(source)

    def build(out: Path) -> None:
        write_text_part(source, out, report)
        copy_sidecars(source, out)

    return cached(cache / f"{source.resolve().name}-text-{digest[:12]}", build, digest)


def _from_gguf(source: Path, cache: Path, report: Progress) -> Path:
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{source} is not a GGUF file: give a GGUF file or a model directory")
    digest = sha256_file(source)
    return cached(cache / f"{source.stem}-{digest[:12]}", lambda out: _convert(source, out, report), digest)


def _from_package(name: str, cache: Path, report: Progress) -> Path:
    package = PACKAGED[name]

    def build(out: Path) -> None:
        place = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".download.building-{os.getpid()}-")
        with place as work, calling(Path(work), name):
            gguf = fetch(package, Path(work), out, report)
            _convert(gguf, out, report)
        (out / "README.md").write_text(model_card(name, package), encoding="utf-8")

    return cached(cache / f"{name}-{package.sha256[:12]}", build, package.sha256)


def _convert(source: Path, out: Path, report: Progress) -> None:
    try:
        from saap.models.gguf import convert
    except ImportError as error:
        raise UserError(f"reading a GGUF file needs {error.name}: pip install {installing('prune')}") from None
    convert(source, out, report)


def _from_hub(name: str, report: Progress) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(
            f"{name} is no directory, and a hub id needs huggingface_hub: pip install {installing('prune')}"
        ) from None
    report(f"downloading, {name}", 0, 0)
    repository, _, revision = name.partition("@")
    try:
        path = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[WEIGHTS, "*.safetensors.index.json", "config.json", *SIDECARS],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # its HTTP library, and so the class of a lost connection, differs by version
        raise UserError(
            f"{name} is no directory here, and no model hub gave it ({type(error).__name__}): check the id and the "
            f"network, or give a directory, a GGUF file or one of {', '.join(PACKAGED)}"
        ) from None
    return Path(path)
