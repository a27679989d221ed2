"""What the documents say is there: links lead somewhere, commands parse, code runs, and the tutorial works in order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from command_line import here

from saap.cli import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")] if path.name != "CHANGELOG.md")
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def blocks(path, language):
    """(what stands after the language, text) of a page's code blocks."""
    return [(note.strip(), text) for name, note, text in BLOCK.findall(path.read_text()) if name == language]


def anchors(path):
    """As GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(text):
    """The lines of a shell block that call saap, without what follows a pipe."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in joined.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["saap"]:
            found.append(words[1:])
    return found


@pytest.mark.parametrize("name", [*NAMES, "CHANGELOG.md", "studies/README.md", "studies/LOG.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_commands(name):
    """Every `saap ...` of a shell block has a command, options and arguments that there are."""
    for _, text in blocks(ROOT / name, "sh"):
        for words in commands(text):
            context, command, rest = click.Context(cli), cli, words
            while isinstance(command, click.Group):
                _, command, rest = command.resolve_command(context, rest)
            command.make_context("saap", list(rest))


def test_pages_have_commands_at_all():
    found = [words for name in NAMES for _, text in blocks(ROOT / name, "sh") for words in commands(text)]
    assert len(found) > 30


def some_text(seed, lines):
    """Lines of words, each with numbers that no other text has."""
    words = ("cat", "mat", "dog", "day", "night", "home", "by", "all", "saw", "ran", "while", "how", "we", "they", "it")
    return "\n".join(
        f"{seed} {line} " + " ".join(words[(seed + line * line + place * 7) % len(words)] for place in range(20))
        for line in range(lines)
    )


@pytest.fixture
def workplace(tmp_path, tiny_model, monkeypatch):
    """A folder with `my-model` and the texts of the tutorial."""
    tiny_model("my-model", max_position_embeddings=512)
    (tmp_path / "train.txt").write_text(some_text(1, 4000))
    (tmp_path / "test.txt").write_text(some_text(5, 900))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tutorial_works(workplace):
    """All its commands in order; a random model needs few tokens, and its bench few repetitions."""
    few = {
        "run": ["--tokens", "2048", "--repetitions", "2", "--threads", "1"],
        "prune": ["--sequences", "8", "--length", "32"],
        "tune": ["--tokens", "2048"],
        "bench": ["--repetitions", "2", "--prompt", "8", "--generate", "8", "--no-cold"],
        "eval": ["--max-chunks", "4"],
    }
    for note, text in blocks(ROOT / "docs" / "tutorial.md", "sh"):
        if note == "no-run":
            continue
        for words in commands(text):
            # A random model is told to fit a board whatever it is; INVALID speeds of a test machine are no failure.
            here(*words, *few.get(words[0], []), code=None if words[0] == "bench" else 0)
    made = ("out/all/report.html", "out/slim", "out/tuned", "out/bundle/bundle.json", "quality.json", "report.html")
    assert [name for name in made if not (workplace / name).exists()] == []


@pytest.mark.parametrize("name", ["README.md"])
def test_python_runs(name, workplace):
    """The README's Python, in a folder where its example was made."""
    from export.export import export_bundle

    few = ("--sequences", 8, "--length", 32, "--calibration", "train.txt")
    here("prune", "my-model", "-o", "out/demo/tuned", "--ratio", 0.2, *few)
    export_bundle(Path("out/demo/tuned"), Path("out/demo/slim-int4"))
    found = blocks(ROOT / name, "python")
    assert found
    for _, text in found:
        exec(compile(text, name, "exec"), {})
