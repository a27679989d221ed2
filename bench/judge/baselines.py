"""Baselines on disk: a file per model and device fingerprint, raw samples included."""

from __future__ import annotations

import contextlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import msgspec

from bench.measure.result import RESULT, Result
from export.engine.spec import BundleSpec
from saap.base.documents import Document
from saap.base.errors import UserError
from saap.base.files import write_text
from saap.base.outputs import BASELINE as BASELINE_FILE
from saap.base.outputs import check_folder, check_place

DEFAULT = Path("devices/baselines")  # of the folder that the user works in


class RegressionError(UserError):
    """A baseline that cannot be used or made; one line that says what to do."""


class NoBaselineError(RegressionError):
    """There is no baseline, or one of something that this is not."""

    exit_code = 3


class BlindBaselineError(RegressionError):
    """Sessions differ too much for a test to see anything."""

    exit_code = 3


@dataclass(frozen=True)
class Baseline:
    """The document: what one model was on one device, in one or more sessions of the same setting."""

    name: str
    results: list[Result]  # a session each
    tested: int = 0  # how many of the last runs were added by tests that found no change

    @property
    def fingerprint(self) -> str:
        return str(self.results[0].device.get("fingerprint"))

    @property
    def on(self) -> str | None:
        """The board's address, None for this host."""
        return self.results[0].settings.get("on")

    @property
    def repetitions(self) -> int:
        return sum(len(result.measurements[0].samples) for result in self.results)

    def with_tested(self, results: Sequence[Result], most: int) -> Baseline:
        """Add the sessions of a good test; the recorded ones stay, of the others the newest up to ``most``."""
        recorded = len(self.results) - self.tested
        tested = [*self.results[recorded:], *results]
        tested = tested[max(0, len(tested) - max(0, most - recorded)) :]
        return replace(self, results=[*self.results[:recorded], *tested], tested=len(tested))


def checked_folder(folder: Path) -> Path:
    """Return a folder for baselines, which is created when it is first written to.

    Raises RegressionError: inside an installed package, where the next update would remove it.
    """
    installed = [Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")]
    place = folder.resolve()
    if any(place.is_relative_to(packages.resolve()) for packages in installed):
        raise RegressionError(
            f"{folder} is inside the installed packages, an update would remove it: give --baselines DIR of your own"
        )
    if folder.exists() and not folder.is_dir():
        raise RegressionError(f"{folder} is a file: give --baselines a folder")
    return folder


def writable_folder(folder: Path, name: str) -> Path:
    """Check now that ``folder`` takes baselines of ``name``: minutes of measuring come before it is needed.

    Raises UserError: as ``checked_folder``, nothing can be written there, or a file of that name is no baseline.
    """
    checked_folder(folder)
    check_folder(folder, BASELINE_FILE, "--baselines")
    for path in folder.glob(f"{_stem(name)}.*.json"):
        check_place(path, BASELINE_FILE)
    return folder


def name_of(bundle: str) -> str:
    """Return the name of a bundle's baselines: its folder's, and the engine's where the bundle is given with one."""
    spec = BundleSpec.of(bundle)
    return spec.bundle.resolve().name + (f"-{spec.engine}" if spec.engine else "")


def write_baseline(folder: Path, baseline: Baseline) -> Path:
    """Write beside and rename; an older one of the same name and device is replaced."""
    path = checked_folder(folder) / f"{_stem(baseline.name)}.{baseline.fingerprint}.json"
    write_text(path, BASELINE.text(baseline, indent=None) + "\n")
    older = folder / f"{_older_stem(baseline.name)}.{baseline.fingerprint}.json"
    with contextlib.suppress(RegressionError, OSError):
        if older != path and BASELINE.read(older).name == baseline.name:
            older.unlink()
    return path


def read_baselines(folder: Path, name: str) -> list[Baseline]:
    """Read one model's baselines, of all devices. Raises RegressionError: one is damaged; NoBaselineError: none."""
    stems = {_stem(name), _older_stem(name)}
    files = sorted(path for stem in stems for path in checked_folder(folder).glob(f"{stem}.*.json"))
    baselines = [b for b in map(BASELINE.read, files) if b.name == name]
    if not baselines:
        known = sorted(set(_names(folder)))
        others = f"; it has {', '.join(known)}" if known else ""
        raise NoBaselineError(
            f"{folder} holds no baseline of {name}{others}: record one with `saap devices baseline BUNDLE`"
        )
    return baselines


def _names(folder: Path) -> Iterator[str]:
    """Yield the names of all baselines; other files are ignored."""
    for path in folder.glob("*.json"):
        with contextlib.suppress(RegressionError):
            yield BASELINE.read(path).name


def _stem(name: str) -> str:
    """Return the stem of a name's file: no two names have the same, and none holds a dot."""
    return quote(name, safe="").replace(".", "%2E").replace("~", "%7E") or "%"


def _older_stem(name: str) -> str:
    """Return the stem that was used until 0.2.0, where ``a.b`` and ``a_b`` shared a file."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "_"


def _with_results(raw: dict[str, object]) -> dict[str, object]:
    results = msgspec.convert(raw["results"], list)
    return {
        "name": raw["name"],
        "tested": raw.get("tested", 0),
        "results": [RESULT.convert(result) for result in results],
    }


def _check(baseline: Baseline) -> None:
    if not baseline.results or any(len(result.measurements) != 1 for result in baseline.results):
        raise ValueError("not one measurement a run")
    if not 0 <= baseline.tested <= len(baseline.results):
        raise ValueError(f"{baseline.tested} of {len(baseline.results)} sessions were added by tests")


BASELINE = Document(
    Baseline, "device", "record it again, or remove it", version="baseline", upgrade=_with_results, check=_check,
    error=RegressionError,
)  # fmt: skip
