"""Requests to the board's agent, with a measuring process of the test's own, and a boot that a test may change."""

import hashlib
import io
import json
from pathlib import Path

from devices.agent import home as agent_home
from devices.agent.files import Store

AGENT = Path(agent_home.__file__).parent
RUN, OTHER, KEY = "0123456789abcdef", "fedcba9876543210", "a1b2c3d4e5f60718"


def stream(data: bytes) -> io.BufferedReader:
    return io.BufferedReader(io.BytesIO(data))


def nothing(done: int = 0) -> None:
    pass


def boot(root: Path, value: str) -> str:
    path = root / "proc/sys/kernel/random/boot_id"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value + "\n")
    return str(root)


def code(job: str) -> dict[str, str]:
    """The agent's real code with a measuring process of our own."""
    sources = {f"devices/agent/{path.name}": path.read_text() for path in AGENT.glob("*.py")}
    packages = {f"{package}/__init__.py": "" for package in ("devices", "bench", "bench/remote")}
    return {**sources, **packages, "bench/remote/job.py": job}


def put(folder: Path, document: object) -> str:
    data = json.dumps(document).encode()
    sha = hashlib.sha256(data).hexdigest()
    Store(folder).receive(sha, len(data), 0, stream(data), nothing)
    return sha


def request(folder: Path, job: str, **more: object) -> dict[str, object]:
    return {
        "key": KEY, "code": put(folder, code(job)), "requirements": [], "wheels": None, "own": False, "root": "/",
        "run": RUN, "bundles": [], "job": {"x": 1}, "lease_s": 60.0, **more,
    }  # fmt: skip
