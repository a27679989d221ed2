import pytest

from saap.base.progress import Label, note


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


def test_a_note_reaches_a_progress_that_shows_notes() -> None:
    class Shown(list[str]):
        note = list.append

        def __call__(self, label: str, done: float, total: float) -> None:
            self.append(label)

    shown = Shown()
    note(shown, "calibration text: a.txt")
    note(lambda label, done, total: pytest.fail("a plain function is told of work only"), "calibration text: a.txt")
    note(None, "calibration text: a.txt")
    assert shown == ["calibration text: a.txt"]
