"""Flags and ``--set`` of an options dataclass."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import click
import pytest
from click.testing import CliRunner
from msgspec import Meta

from saap.base.errors import UserError
from saap.base.options import REMOVED, Option, build, check_values, settings_of
from saap.base.values import parse_bytes, parse_counts, parse_layers, parse_parameters
from saap.cli.options import OptionsCommand, options_of


@dataclass(frozen=True)
class Inner:
    slices: Annotated[int, Option("Slices.", section="Research", shown=False), Meta(ge=1)] = 1
    score: Annotated[Literal["fused", "token"], Option("Score.", section="Research", shown=False)] = "token"
    rows: Annotated[int, Option("Rows at once."), Meta(ge=1)] = 1
    private: int = 7


@dataclass(frozen=True)
class Options:
    ratio: Annotated[float | None, Option("Share to remove.", section="Required"), Meta(gt=0, lt=1)] = None
    group_size: Annotated[Literal[32, 64], Option("Weights per scale.", old=("--group",))] = 32
    compensate: Annotated[Literal["none", "refit"] | None, Option("How.")] = None
    heads: Annotated[bool | None, Option("Heads too.", flags=("--heads/--no-heads",))] = None
    explain: Annotated[bool, Option("Say why.")] = False
    symmetric: Annotated[bool, Option("Zero points.", flags=("--asymmetric",))] = True
    cold: Annotated[bool, Option("A load too.")] = True
    costs: Annotated[Path | None, Option("Table.", metavar="FILE")] = None
    most: Annotated[int | None, Option("Bytes.", parse=parse_bytes), Meta(ge=1)] = None
    keep: Annotated[frozenset[int] | None, Option("Layers.", parse=parse_layers)] = frozenset()
    prompt: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Option("P.", flags=("-p",), parse=parse_counts)] = (128,)
    on: Annotated[tuple[str, ...], Option("There.", metavar="URL")] = ()
    weight: Annotated[float, Option("Weight.", shown=False), Meta(ge=0, le=1)] = 0.5
    exact: Annotated[bool, Option("Exact.", shown=False)] = False
    inner: Inner = field(default_factory=lambda: Inner(rows=2))


@click.command(cls=OptionsCommand)
@click.argument("model")
@click.option("-o", "--out")
@options_of(Options)
def command(model, out, options):
    command.got = (model, out, options)


def given(*arguments):
    """The options of a command line; a UserError is raised."""
    result = CliRunner().invoke(command, ["m", *map(str, arguments)], catch_exceptions=True)
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    assert command.got[:2] == ("m", None)
    return command.got[2]


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ("", {}),
        ("--ratio 0.2", {"ratio": 0.2}),
        ("--group-size 64", {"group_size": 64}),
        ("--group 64", {"group_size": 64}),
        ("--compensate none", {"compensate": "none"}),
        ("--heads", {"heads": True}),
        ("--no-heads", {"heads": False}),
        ("--explain", {"explain": True}),
        ("--asymmetric", {"symmetric": False}),
        ("--no-cold", {"cold": False}),
        ("--costs a/b.json", {"costs": Path("a/b.json")}),
        ("--most 80MiB", {"most": 80 * 2**20}),
        ("--keep 0-2,5", {"keep": frozenset({0, 1, 2, 5})}),
        ("--keep none", {"keep": None}),
        ("-p 1,2", {"prompt": (1, 2)}),
        ("--on a --on b", {"on": ("a", "b")}),
        ("--rows 4", {"inner": Inner(rows=4)}),
        ("--set slices=3", {"inner": Inner(slices=3, rows=2)}),
        ("--set score=fused --set weight=0.25", {"inner": Inner(score="fused", rows=2), "weight": 0.25}),
        ("--set group-size=64 --set exact=yes", {"group_size": 64, "exact": True}),
        ("--set keep=none --set prompt=3,4 --set on=a,b", {"keep": None, "prompt": (3, 4), "on": ("a", "b")}),
        ("--set heads=none --set most=1k", {"most": 1000}),
        ("--set ratio=0.1 --ratio 0.3", {"ratio": 0.3}),
    ],
)
def test_what_is_given_is_in_the_dataclass(arguments, changed):
    assert given(*arguments.split()) == replace(Options(), **changed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--ratio 1.5", "--ratio 1.5 is not allowed: give a number between 0 and 1"),
        ("--ratio nan", "--ratio nan is not allowed: give a number between 0 and 1"),
        ("--ratio much", "--ratio much is not allowed: give a number between 0 and 1"),
        ("--group-size 33", "--group-size 33 is not allowed: give 32 or 64"),
        ("--compensate all", "--compensate all is not allowed: give none or refit"),
        ("--rows 0", "--rows 0 is not allowed: give 1 or more"),
        ("--rows 1.5", "--rows 1.5 is not allowed: give 1 or more"),
        ("--most 0", "--most 0 is not allowed: give 1 or more"),
        ("-p 1,-2", "-p 1,-2 is not allowed: give 0 or more"),
        ("--most much", "--most 'much' is not a number of bytes: write something like 80MB, 80MiB or 1.5G"),
        ("--set weight=2", "weight 2.0 is not allowed: give a number from 0 to 1"),
        ("--set exact=perhaps", "exact perhaps is not allowed: give true or false"),
        ("--set score=best", "score best is not allowed: give fused or token"),
        ("--set slice=2", "there is no option 'slice': did you mean slices, score?"),
        ("--set ratios=2", "there is no option 'ratios': did you mean ratio, rows?"),
        ("--set slices", "--set slices has no value: write NAME=VALUE"),
        ("--exact", "--exact is not a flag: write --set exact=VALUE, or leave it at its default"),
        ("--cuda-graph", f"--cuda-graph was removed: {REMOVED['cuda_graph']}"),
        ("--prepacked", f"--prepacked was removed: {REMOVED['prepacked']}"),
        ("--set prepacked=true", f"prepacked was removed: {REMOVED['prepacked']}"),
        ("--config no.toml", f"--config was removed: {REMOVED['config']}"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        given(*arguments.split())
    assert str(error.value) == message


def test_help_shows_what_is_decided_and_help_all_every_name():
    help, everything = (CliRunner().invoke(command, [flag]).output for flag in ("--help", "--help-all"))
    assert "--ratio X" in help and "--heads / --no-heads" in help and "--group-size [32|64]" in help
    assert "--group " not in help and "slices" not in help and "[default: 2]" in help
    named = {*settings_of(Options)} - {"symmetric", "prompt"}  # by their flags: --asymmetric, -p
    assert all(name in everything or f"--{name.replace('_', '-')}" in everything for name in named)
    assert "slices=N" in everything and "Slices. [default: 1]" in everything and "private" not in everything


def test_values_of_python_callers_are_checked():
    check_values(Options())
    check_values(Options(ratio=0.5, keep=None, prompt=(1,)))
    for wrong, message in (
        (Options(ratio=0.0), "--ratio 0.0 is not allowed: give a number between 0 and 1"),
        (Options(inner=Inner(slices=0)), "slices 0 is not allowed: give 1 or more"),
        (Options(compensate="some"), "--compensate some is not allowed: give none or refit"),
        (Options(prompt=(1, -1)), "-p 1,-1 is not allowed: give 0 or more"),
    ):
        with pytest.raises(UserError) as error:
            check_values(wrong)
        assert str(error.value) == message


def test_a_value_that_must_be_given_is_asked_for():
    @dataclass(frozen=True)
    class Needy:
        size: Annotated[int, Option("Size.")]

    with pytest.raises(UserError, match="size is missing"):
        build(Needy, {})
    assert build(Needy, {"size": 3}) == Needy(3)


def test_names_are_unique():
    @dataclass(frozen=True)
    class One:
        size: Annotated[int, Option("Size.")] = 1

    @dataclass(frozen=True)
    class Two:
        one: One = field(default_factory=One)
        size: Annotated[int, Option("Size.")] = 1

    Two.__annotations__["one"] = One  # local names are not found by typing
    with pytest.raises(TypeError, match="two fields size"):
        settings_of(Two)


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_bytes, "1.5G", 1_500_000_000),
        (parse_bytes, "2kib", 2048),
        (parse_parameters, "100M", 10**8),
        (parse_parameters, "1.5b", 15 * 10**8),
        (parse_counts, "128", (128,)),
        (parse_layers, "0-2,29", frozenset({0, 1, 2, 29})),
    ],
)
def test_text_as_values(parse, text, value):
    assert parse(text) == value
