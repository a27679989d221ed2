from __future__ import annotations

from saap.base.wording import counted


def test_numbers_and_nouns_agree() -> None:
    assert [counted(count, "thread") for count in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
    assert [counted(count, "matrix", "matrices") for count in (1, 3)] == ["1 matrix", "3 matrices"]
