from pathlib import Path

from saap.base.tree import field, fields


def test_counts_of_a_file_in_proc_are_bytes_where_it_says_kb(tmp_path: Path) -> None:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:  100 kB\nHugePages_Total:   3\nActive(anon):\t7 kB\nVmFlags: rd\ninactive_file 12\n")
    assert fields(path) == {"MemTotal": 102400, "HugePages_Total": 3, "Active(anon)": 7168, "inactive_file": 12}
    path.write_text("Node 0 MemTotal:  100 kB\nNode 0 MemFree:  x kB\n")
    assert (field(path, "MemTotal"), field(path, "MemFree"), field(tmp_path / "none", "MemTotal")) == (
        102400,
        None,
        None,
    )
