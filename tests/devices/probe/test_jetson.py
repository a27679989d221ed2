from pathlib import Path

from support import fake_trees
from support.fake_trees import plant

from devices.probe.host import nobody
from devices.probe.jetson import jetpack, power_mode


def test_power_mode_of_the_file_or_of_the_tool(tmp_path: Path) -> None:
    nano = plant(tmp_path, fake_trees.nano())
    assert power_mode(nano, nobody) is None
    assert power_mode(nano, lambda command: "NV Fan Mode:quiet\nNV Power Mode: 5W\n1\n") == {"name": "5W", "id": 1}
    assert power_mode(nano, lambda command: "NV Power Mode: MAXN\n") == {"name": "MAXN", "id": None}
    assert power_mode(nano, lambda command: "NV Power Mode: 5W\n" + "9" * 6000) == {"name": "5W", "id": None}
    plant(nano, {"var/lib/nvpmodel/status": "pmode:0007\n"})
    assert power_mode(nano, nobody) == {"name": None, "id": 7}  # a mode that the configuration does not name


def test_jetpack_of_a_release() -> None:
    assert [jetpack(l4t) for l4t in ("36.4.3", "38.2.0", "36.99.1", "99.1", None)] == ["6.2", "7.0", "6", None, None]
