from __future__ import annotations

from pathlib import Path

from bench.measure.cores import allowed_cores, choose_cores, physical_cores


def _cpus(root: Path, siblings: list[str], capacities: list[int] | None = None) -> Path:
    for cpu, text in enumerate(siblings):
        (root / f"cpu{cpu}/topology").mkdir(parents=True)
        (root / f"cpu{cpu}/topology/thread_siblings_list").write_text(text + "\n")
        if capacities:
            (root / f"cpu{cpu}/cpu_capacity").write_text(f"{capacities[cpu]}\n")
    return root


def test_one_thread_per_core_before_its_sibling(tmp_path: Path) -> None:
    root = _cpus(tmp_path, ["0-1", "0-1", "2-3", "2-3"])
    assert physical_cores([0, 1, 2, 3], root) == 2
    assert choose_cores(2, [0, 1, 2, 3], root) == [0, 2]
    assert choose_cores(3, [0, 1, 2, 3], root) == [0, 1, 2]


def test_big_cores_first(tmp_path: Path) -> None:
    root = _cpus(tmp_path, [str(i) for i in range(6)], [400, 400, 1024, 1024, 400, 400])
    assert choose_cores(1, list(range(6)), root) == [2]
    assert choose_cores(3, list(range(6)), root) == [0, 2, 3]


def test_without_topology_the_first_ones(tmp_path: Path) -> None:
    assert choose_cores(2, [3, 5, 7], tmp_path) == [3, 5]
    assert physical_cores([3, 5, 7], tmp_path) == 3


def test_this_host() -> None:
    assert 1 <= physical_cores() <= len(allowed_cores())
    assert set(choose_cores(1)) <= set(allowed_cores())
