"""Names are nouns and verbs of the field, and a docstring's first line is a sentence of its own.

Whether a function's docstring begins with a verb is ruff's to check (D401).
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("saap", "export", "bench", "devices")

PARTICIPLES = {"found", "told", "said", "held", "made", "asked", "given", "wanted", "taken", "seen"}
# Ten at most, each with its reason.
EXCEPTIONS = {
    "asked": "a key of saap.json and bundle.json, in a TypedDict",
    "device_told": "a key of run.json, in a TypedDict",
    "held_out": "the field's own word for text that is not learned from",
    "held_out_name": "see held_out",
    "held_out_loss": "see held_out",
}
OPENINGS = re.compile(
    r"(of|as|by|with|in|what|to|from|where|how|when|which|who|whom|whose|why|at|on|for|into|about|beside|behind|below"
    r"|above|under|over|after|before|between|within|until|since|through|than|like|because|while|if|per)\b",
    re.IGNORECASE,
)


def test_exceptions_are_few_and_have_reasons():
    assert len(EXCEPTIONS) <= 10 and all(EXCEPTIONS.values())
    assert set(EXCEPTIONS) <= {name for package in OURS for _, name in names(package)}, "an exception without a use"


@pytest.mark.parametrize("package", OURS)
def test_names_say_what_things_are(package):
    assert not [
        f"{place}: {name}"
        for place, name in names(package)
        if PARTICIPLES & set(name.lower().split("_")) and name not in EXCEPTIONS
    ]


@pytest.mark.parametrize("package", OURS)
def test_first_lines_are_sentences_or_noun_phrases(package):
    assert not [f"{place}: {first}" for place, first in first_lines(package) if OPENINGS.match(first)]


def test_both_rules_see_what_they_forbid():
    tree = ast.parse('def f(told, *, b=0):\n    "Of x."\n    for c, _found in d: e.made_of = 1\nclass Said: pass')
    assert {name for _, name in defined(tree)} == {"f", "told", "b", "c", "_found", "made_of", "Said"}
    assert [line for _, line in documented(tree)] == ["Of x."]


def names(package: str) -> Iterator[tuple[str, str]]:
    for path, tree in trees(package):
        yield from ((f"{path}:{line}", name) for line, name in defined(tree))


def defined(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that the code gives: of functions, classes, arguments, variables and attributes, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def first_lines(package: str) -> Iterator[tuple[str, str]]:
    for path, tree in trees(package):
        yield from ((f"{path}:{line}", first) for line, first in documented(tree))


def documented(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from ((getattr(node, "lineno", 1), line) for line in (ast.get_docstring(node) or "").splitlines()[:1])


def trees(package: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / package).glob("**/*.py")):
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
