"""An aarch64 CPU without a board: Debian's arm64 Python and the real aarch64 wheels under qemu-user.

``mmdebstrap`` fetches and verifies Debian's packages and unpacks them into a folder; nothing is installed into the host
and no root is needed. pip puts the wheels that a board would get beside them. What runs there is what runs on a board,
instruction for instruction; times and memory are those of an emulator and mean nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from devices.transport import Local, last_line
from saap.base.errors import UserError

# qemu's CPU models and what they stand for: which kernels ONNX Runtime takes depends on them.
CPUS = {
    "cortex-a72": "Raspberry Pi 4: no dotprod",
    "cortex-a76": "Raspberry Pi 5, RK3588, Jetson Orin's class: dotprod",
    "max": "all that qemu knows: i8mm, bf16, SVE2",
}
SUITE, PYTHON = "trixie", "3.13"  # Debian 13
PACKAGES = ("python3", "libstdc++6", "libgcc-s1")
WHEELS = ("numpy>=1.26", "psutil>=5.9")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"  # packages are verified by signature, not by the connection
FETCH_S = 1800.0


class EmulationError(UserError):
    """No emulated CPU here; one line that says what to install or to mend."""


@dataclass(frozen=True)
class Root:
    """A folder with arm64 programs, and the emulator that runs them."""

    path: Path
    qemu: str

    @property
    def python(self) -> Path:
        """A script that starts the arm64 Python; ``QEMU_CPU`` chooses the CPU."""
        return self.path / "run/python3"


class Emulated(Local):
    """An emulated board, by the same protocol as a real one.

    Args:
        cpu: a key of ``CPUS``.
        home: the agent's folder.
    """

    def __init__(self, root: Root, cpu: str, home: Path) -> None:
        super().__init__()
        self.name = f"emulated {cpu}"
        # The arm64 Python comes first; all other programs are the host's.
        path = f"{root.python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        self._env = [f"PATH={path}", f"QEMU_CPU={cpu}", f"SAAP_CACHE={home}"]

    def argv(self, command: str) -> list[str]:
        return ["env", *self._env, *super().argv(command)]


def prepare(cache: Path, onnxruntime: str) -> Root:
    """Make the folder for one version of ONNX Runtime, once, and keep it in ``cache`` (about 300 MB).

    Raises EmulationError: a tool is missing, or something cannot be fetched.
    """
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        raise EmulationError("qemu-aarch64 is not installed: `sudo apt install qemu-user mmdebstrap` (Debian, Ubuntu)")
    place = cache / "emulated" / f"{SUITE}-arm64-onnxruntime-{onnxruntime}"
    root = Root(place, qemu)
    if not (place / "whole").is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix="partial-") as folder:
            partial = Path(folder) / "root"
            _unpack_debian(partial, Path(folder) / "root.tar")
            _install_wheels(partial, onnxruntime)
            (partial / "whole").touch()
            if not (place / "whole").is_file():  # else another process was faster, and may be using it
                shutil.rmtree(place, ignore_errors=True)
                partial.rename(place)
    _write_launcher(root)
    return root


def _unpack_debian(root: Path, archive: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        raise EmulationError("mmdebstrap is not installed: `sudo apt install qemu-user mmdebstrap` (Debian, Ubuntu)")
    if find_spec("pip") is None:  # said before minutes of fetching
        raise EmulationError("this Python has no pip, which fetches the wheels: `python -m ensurepip`")
    keyring = [f"--keyring={KEYRING}"] if KEYRING.is_file() else []
    _fetch(
        ["mmdebstrap", "--arch=arm64", "--variant=extract", f"--include={','.join(PACKAGES)}", *keyring, SUITE,
         str(archive), MIRROR],
        "Debian's arm64 packages",
    )  # fmt: skip
    with tarfile.open(archive) as tar:
        # Programs and libraries only: device nodes need root, and nothing else is needed.
        members = [m for m in tar if m.name.startswith("./usr/") and (m.isreg() or m.isdir() or m.issym() or m.islnk())]
        if hasattr(tarfile, "tar_filter"):
            tar.extractall(root, members, filter="tar")
        else:
            tar.extractall(root, members)
    archive.unlink()
    if not (root / "lib").exists():  # base-files makes this link, which an unpacked archive may lack
        (root / "lib").symlink_to("usr/lib")


def _install_wheels(root: Path, onnxruntime: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    target = ["--target", str(root / "usr/lib/python3/dist-packages"), "--only-binary", ":all:", "--no-compile"]
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    version = ["--python-version", PYTHON, "--implementation", "cp"]
    _fetch([*pip, *target, *platforms, *version, f"onnxruntime=={onnxruntime}", *WHEELS], "the aarch64 wheels")


def _fetch(command: Sequence[str], what: str) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=FETCH_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EmulationError(f"{what} were not fetched within {FETCH_S:.0f} s: look at the connection") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.lower().startswith(("e:", "error"))]
        reason = lines[0] if lines else last_line(done.stderr)
        raise EmulationError(f"{what} cannot be fetched: {reason}")


def _write_launcher(root: Root) -> None:
    """``-0`` names this script as the program, so that Python starts its children through it as well."""
    script = root.python
    script.parent.mkdir(exist_ok=True)
    program, library = (_quoted(str(path)) for path in (root.path / f"usr/bin/python{PYTHON}", root.path))
    partial = script.with_name(f"python3.{os.getpid()}")
    partial.write_text(f'#!/bin/sh\nexec {_quoted(root.qemu)} -0 "$0" -L {library} {program} "$@"\n', encoding="utf-8")
    partial.chmod(0o755)
    partial.replace(script)


def _quoted(text: str) -> str:
    """Quote for sh, and refuse what a script's own first line could not hold."""
    if "\n" in text:
        raise EmulationError(f"{text!r} cannot be the cache's path: name another in SAAP_CACHE")
    return "'" + text.replace("'", "'\\''") + "'"
