"""No model is judged on what it was calibrated or tuned on."""

import json

import pytest
from support.command_line import here, last_line

pytest.importorskip("transformers")
from saap.base.errors import UserError
from saap.text.documents import EVALUATION_FILE, load_documents
from saap.text.overlap import refuse_overlap

LONG = "This line is long enough to tell one text from another, and it stands in both of the files given here.\n"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def lines(start, count=60):
    """Long lines of which no two are the same."""
    numbers = range(start, start + count)
    return "".join(" ".join(WORDS[(n * k + k) % 10] for k in range(1, 24)) + f" {n}\n" for n in numbers)


def test_files_of_the_data_directory(data_dir):
    evaluation = load_documents(None, split="evaluation")
    refuse_overlap(load_documents(None, split="calibration", seed=3), evaluation)
    with pytest.raises(UserError, match="hold the same text"):
        refuse_overlap(load_documents(data_dir / EVALUATION_FILE, split="tuning"), evaluation)
    refuse_overlap(load_documents(data_dir / "wikitext2_train_raw_head1MB.txt", split="tuning"), evaluation)


def test_overlap_is_seen_in_parts_but_short_lines_are_not_text(tmp_path):
    def documents(name, content):
        (tmp_path / name).write_text(content)
        return load_documents(tmp_path / name, split="evaluation")

    def row(text):
        return json.dumps({"text": text}) + "\n"

    one = documents("one.txt", "= = Reception = =\n" + LONG + "its own\n")
    with pytest.raises(UserError, match=r"one\.txt and .*two\.txt hold the same text"):
        refuse_overlap(one, documents("two.txt", "another beginning\n  " + LONG))
    refuse_overlap(one, documents("three.txt", "= = Reception = =\nsomething else\n"))
    with pytest.raises(UserError, match="same text"):
        refuse_overlap(documents("a.jsonl", row("short")), documents("b.jsonl", row("short ")))


def test_eval_holds_its_text_against_the_records(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, of in (("calibration", (0,)), ("tuning", (200, 200)), ("part", (50,)), ("own", (1000,))):
        (tmp_path / f"{name}.txt").write_text(lines(*of))
    few = ("--sequences", 4, "--length", 32)
    here("prune", tiny_model(), "-o", "slim", "--ratio", 0.2, "--calibration", "calibration.txt", *few)
    here("tune", "slim", "-o", "tuned", "--data", "tuning.txt", "--tokens", 128, "--length", 32)
    here("export", "tuned", "-o", "bundle", "--text", "own.txt")
    here("export", tiny_model(), "-o", "chosen", "--text", "own.txt", "--parity", "none")

    def refused(path, text):
        done = here("eval", path, "--text", text, "--chunk", 16, "--max-chunks", 2, code=None)
        assert done.code in (0, 2), done.stderr
        return last_line(done) if done.code else None

    for path in ("slim", "tuned", "bundle"):
        assert f"{path}: calibration.txt and calibration.txt hold the same text" in refused(path, "calibration.txt")
        assert f"{path}: calibration.txt and part.txt hold the same text" in refused(path, "part.txt")
        assert refused(path, "own.txt") is None
    assert "chosen: own.txt and own.txt hold the same text" in refused("chosen", "own.txt")  # its integers are from it
    for path in ("tuned", "bundle"):
        assert f"{path}: tuning.txt and tuning.txt hold the same text" in refused(path, "tuning.txt")
    assert refused("slim", "tuning.txt") is None
    (tmp_path / "calibration.txt").rename("elsewhere.txt")  # that text alone is known then
    (tmp_path / "calibration.txt").write_text(lines(50))
    assert "hold the same text" in refused("tuned", "elsewhere.txt")
    assert refused("tuned", "part.txt") is None
