"""What the bench says when something disturbs it in the middle; studies/bench/cells holds twenty tries of each."""

from pathlib import Path

import pytest
from support.disturbances import CHEAP, judged_under
from support.tiny_graphs import tiny_bundle

from bench.measure.result import OK


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="needs Linux")
@pytest.mark.parametrize("kind", CHEAP)
def test_a_disturbance_is_named(kind: str, tmp_path: Path) -> None:
    status, reasons = judged_under(kind, str(tiny_bundle(tmp_path / "bundle")), rounds=2)
    assert status != OK and reasons
