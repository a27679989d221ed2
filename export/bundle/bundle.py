"""A bundle that somebody else may have made: each part is checked before it is handed out.

    bundle = Bundle.open(path)   # the manifest is read and checked
    bundle.graph(), bundle.file("llama.cpp/model.gguf"), bundle.tokenizer

A graph's file and its data are hashed, and what it may make a runtime do is limited, on first use. Whether its inputs
and outputs are the manifest's is checked where a session is made of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from export.bundle.graph_check import ALL, STANDARD, check_graph
from export.bundle.manifest import (
    DECODE_GRAPH,
    MANIFEST,
    BundleError,
    BundleManifest,
    FileEntry,
    inside,
    is_there,
    read_manifest,
)
from export.bundle.small_files import SmallFiles
from saap.base.hashing import known_sha256

if TYPE_CHECKING:
    from export.bundle.tokenizer import BundleTokenizer


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest was read and checked; make one with :meth:`open`."""

    path: Path
    manifest: BundleManifest
    foreign: bool = False  # whether a graph may hold other operators of ONNX Runtime's than saap writes
    foreign_tokenizer: bool = False  # whether rules of its tokenizer that are not allowed run, in a process with limits

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest.

        Raises BundleError: no bundle there, damaged, of a newer format, or naming a file outside the bundle.
        """
        return cls(Path(path), read_manifest(path))

    def file(self, name: str) -> Path:
        """Return the path of a listed file, whose content has the listed hash.

        Raises BundleError: not listed, missing, or not as listed.
        """
        entry, path = self._entry(name), inside(self.path, name)
        if path is None or not is_there(path):
            raise BundleError(f"{self.path / name} is missing: export the bundle again")
        if path.stat().st_size != entry.bytes or known_sha256(path) != entry.sha256:
            raise BundleError(f"{path} does not match the hash in {MANIFEST}: export the bundle again")
        return path

    def graph(self, name: str = DECODE_GRAPH) -> Path:
        """Return the path of a graph that a runtime may load: its file and data are as listed, it stays within limits.

        Raises BundleError: as of :meth:`file`; data outside the bundle, branches or loops, operators that saap does not
            write, or tensors that claim to be larger than the files.
        """
        return self.graph_files(name)[0]

    def graph_files(self, name: str = DECODE_GRAPH) -> list[Path]:
        """Return the paths of a graph, checked as :meth:`graph` does, and of its data files."""
        path = self.file(name)
        return [path, *(self.file(file.relative_to(self.path).as_posix()) for file in self._data(path, name))]

    def graph_bytes(self, name: str = DECODE_GRAPH) -> int:
        """Bytes of a graph's file and its data files, each counted once."""
        path = inside(self.path, name) or self.path / name  # no hashes: those who load it make them
        return sum(file.stat().st_size for file in {path, *self._data(path, name)})

    def _data(self, path: Path, name: str) -> list[Path]:
        return _data_files(path, self.manifest.files[name].sha256, None if self.foreign else self.manifest.target)

    @cached_property
    def tokenizer(self) -> BundleTokenizer:
        """The tokenizer.

        Raises BundleError, RunError: no tokenizer, not as listed, or one that must not be loaded.
        """
        from export.bundle.tokenizer import BundleTokenizer

        return BundleTokenizer(self.path, self.manifest, self.foreign_tokenizer)

    @cached_property
    def small_files(self) -> SmallFiles:
        """The small files, which are read whole."""
        return SmallFiles(self.path, self.manifest)

    def check(self) -> Bundle:
        """Check every file, and that there is no other.

        Raises BundleError: names the first file that is missing, differs, or is not listed.
        """
        self.refuse_unlisted()
        for name in self.manifest.files:
            self.file(name)
        return self

    def refuse_unlisted(self) -> None:
        """Raise BundleError for a file, a link or a device that the manifest does not list."""
        for path in sorted(self.path.rglob("[!.]*")):
            name = path.relative_to(self.path).as_posix()
            if name != MANIFEST and (path.is_symlink() or not path.is_dir()):
                self._entry(name)

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of every file, the manifest included, as listed."""
        listed = {name: entry.sha256 for name, entry in self.manifest.files.items()}
        return {**listed, MANIFEST: known_sha256(self.path / MANIFEST)}

    def _entry(self, name: str) -> FileEntry:
        if name not in self.manifest.files:
            raise BundleError(f"{self.path / name} is not listed in {MANIFEST}: remove it, or export the bundle again")
        return self.manifest.files[name]


@cache
def _data_files(graph: Path, sha256: str, target: str | None) -> list[Path]:
    """Check a graph of this content, once, and return its data files; no target: it is foreign."""
    allowed = None if target is None else STANDARD if target == "portable" else ALL
    return check_graph(graph, allowed, sha256)


def foreign_graph(path: Path) -> list[Path]:
    """Check a graph that another tool wrote, and return its path and those of its data files.

    Raises BundleError: data outside the folder, operators of somebody's library, or tensors that claim to be larger
        than the files.
    """
    return [path, *check_graph(path, allowed=None)]
