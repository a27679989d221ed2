"""The agent's requests and answers as JSON: see the table in ``devices.agent.main``. For types only."""

from __future__ import annotations

from typing import TypedDict


class Request(TypedDict):
    """Every request; ``fetch``, ``end`` and the rest add to it."""

    do: str
    root: str  # where /proc is looked for; another one in tests of a reboot


class TakeRequest(Request):
    """The lock, for ``run``; its files must fit beside ``reserve`` bytes and, where it is missing, the installation."""

    run: str  # 16 hex digits
    owner: str  # for a person who finds the lock taken
    files: dict[str, int]  # sha256 -> bytes
    key: str  # of the installation, 16 hex digits
    reserve: int
    agent_bytes: int


class HeldRequest(Request):
    """A question by the run that has the lock: how much of a file is there."""

    run: str
    sha: str


class PutRequest(HeldRequest):
    """A file's bytes from ``offset`` on follow the request."""

    size: int
    offset: int


class InstallRequest(Request):
    """Code and packages, for the run that has the lock."""

    run: str
    key: str
    code: str  # sha256 of a stored JSON object of path -> text
    requirements: list[str]
    wheels: dict[str, str] | None  # name -> sha256; None: the board's index
    own: bool  # whether it gets a venv, else the Python that runs this is used


class Bundle(TypedDict):
    """A directory that is laid out for a run."""

    name: str
    files: dict[str, str]  # relative path -> sha256


class RunRequest(Request):
    """``fetch`` and ``end``."""

    run: str


class StartRequest(RunRequest):
    """Bundles, and the job that the measuring process gets."""

    key: str
    bundles: list[Bundle]
    job: dict[str, object]
    lease_s: float  # a run that nobody has followed for so long ends itself


class FollowRequest(RunRequest):
    """A question about a run's progress, from a byte of it on."""

    offset: int


class HelloAnswer(TypedDict):
    """Facts for a preflight; bytes, and seconds since the epoch."""

    python: str
    machine: str
    folder: str
    free_bytes: int
    available_bytes: int | None
    time: float
    boot_id: str


class TakeAnswer(TypedDict):
    """Files that are not whole there (sha256 -> bytes that are), and whether the installation is."""

    missing: dict[str, int]
    installed: bool


class Installation(TypedDict):
    """The Python that measures, and versions of its packages."""

    python: str
    versions: dict[str, str]


class FetchAnswer(TypedDict):
    """The result's text."""

    result: str
    sha256: str
