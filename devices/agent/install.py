"""The bench's own code on the board, and a Python with what it needs. Standard library only."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from devices.agent.files import Store, inside
from devices.agent.home import AgentError, guarded, write_json

if TYPE_CHECKING:
    from devices.agent.requests import Installation, InstallRequest

READY = "ready.json"
KEPT = 2  # installations, this one included
INSTALL_S = 3600.0
CHECK_S = 180.0  # a busy board imports for long
_KEY = re.compile(r"[0-9a-f]{16}")
_CHECK = """
import importlib.metadata, json
import msgspec, numpy, onnxruntime, psutil
print(json.dumps({"onnxruntime": onnxruntime.__version__, "numpy": numpy.__version__}))
"""
_OTHERS = ("PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "VIRTUAL_ENV")


def agent_folder(folder: Path, key: str) -> Path:
    """Return the folder of an installation. Raises AgentError: ``key`` is not a key."""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise AgentError(f"{key!r} is no installation: the two sides are not of one version")
    return folder / f"agent-{key}"


def ready(folder: Path, key: str, beat: Callable[[], None]) -> Installation | None:
    """Its python and versions, or None where it is not whole or does not run any more; ``beat`` is called meanwhile."""
    place = agent_folder(folder, key)
    try:
        python = str(json.loads((place / READY).read_text(encoding="utf-8"))["python"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        versions = _versions(python, place, beat)
    except AgentError:
        return None
    os.utime(place)
    return {"python": python, "versions": versions}


def install(folder: Path, request: InstallRequest, beat: Callable[[], None]) -> Installation:
    """Install what a key names, unless it is there; an unfinished installation is made anew.

    Raises AgentError: no venv module, no index and no wheels, or a package that is not there.
    """
    with guarded(folder / "install.guard"):
        return ready(folder, request["key"], beat) or _install(folder, request, beat)


def _install(folder: Path, request: InstallRequest, beat: Callable[[], None]) -> Installation:
    place, store = agent_folder(folder, request["key"]), Store(folder)
    shutil.rmtree(place, ignore_errors=True)
    try:
        _write_code(place / "code", json.loads(store.file(request["code"]).read_text(encoding="utf-8")))
        python = sys.executable
        if request["own"]:
            python = _venv(place / "venv", beat)
            _fill(python, place, store, request, beat)
        versions = _versions(python, place, beat)
        write_json(place / READY, {"python": python})
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    for old in sorted(folder.glob("agent-*"), key=lambda p: p.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return {"python": python, "versions": versions}


def environment() -> dict[str, str]:
    """Our environment without what would lead another Python to other packages."""
    return {name: value for name, value in os.environ.items() if name not in _OTHERS}


def _write_code(place: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = place / inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _venv(place: Path, beat: Callable[[], None]) -> str:
    code, output = _run([sys.executable, "-m", "venv", str(place)], beat)
    if code:
        if "ensurepip" in output or "No module named venv" in output:
            raise AgentError("its Python has no venv: `sudo apt install python3-venv` there")
        raise AgentError(f"no venv can be made: {_last(output)}")
    return str(place / "bin/python")


def _fill(python: str, place: Path, store: Store, request: InstallRequest, beat: Callable[[], None]) -> None:
    source: list[str] = []
    if request["wheels"] is not None:
        wheels = place / "wheels"
        store.lay_out(wheels, request["wheels"])
        source = ["--no-index", "--find-links", str(wheels)]
    pip = [python, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    code, output = _run([*pip, *source, *request["requirements"]], beat)
    if code and "No space left" in output:
        raise AgentError("the disk became full while packages were installed: free some 300 MB there")
    if code:
        if "CMAKE" in output and "COMPILER" in output:
            raise AgentError(
                "llama.cpp is compiled there, and there is no C++ compiler: `sudo apt install build-essential` there, "
                "or push wheels with --wheels DIR"
            )
        give = "push the right ones" if source else "let it reach a package index, or push wheels with --wheels DIR"
        raise AgentError(
            f"its packages cannot be installed: {give}, or take its own with --board-packages: {_last(output)}"
        )
    shutil.rmtree(place / "wheels", ignore_errors=True)


def _versions(python: str, place: Path, beat: Callable[[], None]) -> dict[str, str]:
    code, output = _run([python, "-c", _CHECK], beat, CHECK_S, place / "code")
    try:
        versions = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        why = f"nothing in {CHECK_S:.0f} s" if code < 0 else _last(output)
        raise AgentError(f"{python} there does not have what the bench needs: {why}") from None
    return {str(name): str(version) for name, version in versions.items()}


def _run(
    command: Sequence[str], beat: Callable[[], None], limit_s: float = INSTALL_S, folder: Path | None = None
) -> tuple[int, str]:
    """Exit code (negative: ended after ``limit_s``) and what it printed; ``beat`` meanwhile, which may raise."""
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                command, cwd=folder, env=environment(), stdin=subprocess.DEVNULL, stdout=printed,
                stderr=subprocess.STDOUT,
            )  # fmt: skip
        except OSError as error:
            return 127, str(error)
        try:
            for _ in range(int(limit_s)):
                beat()
                try:
                    process.wait(1.0)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        printed.seek(0)
        return process.returncode, printed.read().decode(errors="replace")


def _last(text: str) -> str:
    """Return the last line that is not pip's advice."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "[notice]" not in line]
    return lines[-1][:300] if lines else "it said nothing"
