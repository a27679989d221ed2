"""Device tests in a suite of one's own: ``pytest --saap-device ssh://pi@board``.

    def test_the_board_is_as_good_as_it_was(saap_device):
        saap_device.check("out/demo/slim-int4")        # against its baseline, an AssertionError says what is worse

    def test_it_is_fast_enough(saap_device):
        result = saap_device.measure("out/demo/slim-int4", prompt=64, generate=64, threads=4)
        assert result.measurements[0].decode.median > 8

Tests that take ``saap_device`` are marked ``device``, so that ``-m "not device"`` leaves them out; without
``--saap-device`` they are skipped. pytest loads this module in every run of every project where saap is installed, so
nothing else of ours is imported before a test uses it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bench.judge.regression import DeviceTest
    from bench.measure.options import BenchOptions
    from bench.measure.result import Result
    from bench.remote.target import Target

FIXTURE, MARK = "saap_device", "device"
HERE = ("local", "local://")


@dataclass
class Device:
    """A device under test."""

    target: Target  # a board, or this host
    baselines: Path  # folder of ``saap devices baseline``
    max_time_s: float
    tests: list[DeviceTest] = field(default_factory=list)  # all checks so far

    @property
    def url(self) -> str | None:
        """The board's; None for this host."""
        return self.target.url

    def measure(self, bundle: str | Path, **options: Any) -> Result:
        """Measure one bundle; ``options`` are fields of ``bench.measure.BenchOptions``.

        Raises:
            AssertionError: the result is INVALID, so nothing can be said of it.
        """
        from bench.measure.options import BenchOptions
        from bench.measure.result import INVALID

        result = self._run(bundle, BenchOptions(**{"max_time_s": self.max_time_s, **options}))
        for m in result.measurements:
            if m.status == INVALID:  # no assert statement: python -O leaves those out
                raise AssertionError(f"{m.name} on {self}: INVALID: {'; '.join(m.reasons)}")
        return result

    def check(self, bundle: str | Path, name: str | None = None, min_effect: float = 0.05) -> DeviceTest:
        """Measure again and compare with the baseline of this device.

        Raises:
            AssertionError: something is worse, or could not be compared or told.
            RegressionError: no baseline of this model, or none of this device.
        """
        from bench.judge.baselines import name_of, read_baselines
        from bench.judge.regression import Limits, keep_tested, retest
        from bench.judge.verdict import CANNOT_TELL, NOT_COMPARABLE, WORSE
        from bench.report.verdicts import sentence
        from devices.probe.host import probe

        test = retest(
            read_baselines(self.baselines, name or name_of(str(bundle))),
            lambda options: self._run(bundle, options),
            on=self.target.url,
            here=None if self.target.url else probe()["fingerprint"],
            limits=Limits(speed=min_effect, max_time_s=self.max_time_s),
        )
        self.tests.append(test)
        keep_tested(self.baselines, test)
        broken = [sentence(check) for check in test.checks if check.verdict in (WORSE, NOT_COMPARABLE, CANNOT_TELL)]
        if broken:
            raise AssertionError(f"{bundle} on {self}:\n  " + "\n  ".join(broken))
        return test

    def __str__(self) -> str:
        return self.target.url or "this host"

    def _run(self, bundle: str | Path, options: BenchOptions) -> Result:
        return self.target.bench([str(bundle)], options)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("saap", "device tests")
    group.addoption(
        "--saap-device",
        metavar="URL",
        help="Run device tests: local, ssh://user@host[:port], adb://[serial], labgrid://PLACE.",
    )
    group.addoption("--saap-baselines", metavar="DIR", help="Of saap devices baseline; default: devices/baselines.")
    group.addoption("--saap-max-time", type=float, default=120.0, metavar="S", help="Seconds of one measurement.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}: needs a device; name one with --saap-device")


@pytest.hookimpl(tryfirst=True)  # before -m is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what takes the fixture; other tests with the same mark are left as they are."""
    for item in items:
        if FIXTURE in getattr(item, "fixturenames", ()):
            item.add_marker(MARK)


@pytest.fixture(scope="session")
def saap_device(request: pytest.FixtureRequest) -> Device:
    """Return the device that ``--saap-device`` names; a URL that names none is refused before anything is measured."""
    from saap.base.lazy import strangers

    for name, place in strangers().items():
        raise pytest.UsageError(f"the package {name!r} is {place}, not the one of saap: start pytest where it is not")
    from bench.judge.baselines import DEFAULT
    from bench.remote.target import target
    from devices.transport import BoardError

    url = request.config.getoption("--saap-device")
    if url is None:
        pytest.skip("no device: name one with --saap-device local or --saap-device ssh://user@host")
    baselines = Path(request.config.getoption("--saap-baselines") or request.config.invocation_params.dir / DEFAULT)
    try:
        device = target(None if url in HERE else url, say=print)  # pytest shows it where a test fails
    except BoardError as error:
        raise pytest.UsageError(f"--saap-device: {error}") from None
    return Device(device, baselines, request.config.getoption("--saap-max-time"))
