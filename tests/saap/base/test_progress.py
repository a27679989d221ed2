from __future__ import annotations

import pytest

from saap.base.progress import Label


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("choosing integers (layers)", ("choosing integers", "layers", "")),
        ("scoring (sequences), stage 1 of 2", ("scoring", "sequences", ", stage 1 of 2")),
        ("taking turns (s), load 3", ("taking turns", "s", ", load 3")),
        ("bench (runs), out (new)/a: round 1", ("bench", "runs", ", out (new)/a: round 1")),
        ("downloading, org/name (v2)", ("downloading", "", ", org/name (v2)")),
        ("loading", ("loading", "", "")),
    ],
)
def test_a_label_names_the_work_and_the_unit(text: str, parts: tuple[str, str, str]) -> None:
    label = Label.of(text)
    assert (label.what, label.unit, label.detail) == parts
    assert label.shown == parts[0] + parts[2]
