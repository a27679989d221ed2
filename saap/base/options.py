"""Options as dataclass fields: their flags, help and ranges, and the text that becomes their values.

    @dataclass(frozen=True)
    class PruneOptions:
        ratio: Annotated[float | None, Option("Share to remove.", metavar="SHARE"), Meta(gt=0, lt=1)] = None
        slices: Annotated[int, Option("Slices of the Taylor integral.", shown=False), Meta(ge=1)] = 1

The range is ``msgspec.Meta``'s, the choices are a ``Literal``'s, a ``bool`` is a flag, a ``tuple`` without ``parse``
is a flag that may be given several times. A field that is itself an options dataclass is flattened, so names are unique
in all of them. A field without an ``Option`` is not set from outside. Annotations are read at run time: import
their names outside ``TYPE_CHECKING``.

Python callers get the same ranges: ``check_values(options)`` in a dataclass's ``check``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from saap.base.errors import UserError
from saap.base.values import parse_names

T = TypeVar("T")
COUNT, THREADS = Meta(ge=1, le=1_000_000), Meta(ge=1, le=1024)  # of most options that count something
WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
COMPUTE = "Compute device: cpu, cuda or cuda:1; auto is a GPU where there is one."
# The settings, with their dataclasses, that stand on the command line of the command that runs.
TYPED: ContextVar[Collection[tuple[type | None, str]]] = ContextVar("TYPED", default=())
NAMES = {int: "N", float: "X", Path: "PATH", str: "TEXT"}
FROM_PYTHON = "leave it out, or set it from Python, in saap.tune.TuneOptions or its TrainOptions"
# Options that earlier versions had, by name, and what to do instead.
REMOVED = {
    "graph_writer": "saap writes every portable graph; leave it out",
    "accuracy_level": "--no-dotprod computes in float32, else int8 is used; leave it out",
    "cuda_graph": "--provider cuda runs every step without one; leave it out",
    "here": "a cost table of another machine is taken as it is; leave it out",
    "prepacked": "ONNX Runtime packs the weights at each start, which takes a tenth of a second; leave it out",
    **dict.fromkeys(("passes", "warmup_share", "weight_decay", "clip", "checkpointing", "evaluations"), FROM_PYTHON),
    **dict.fromkeys(("save_seconds", "calibration_rows", "norm_rate", "kept_tokens"), FROM_PYTHON),
    "pairs": "give lists of lengths, such as -p 512,0 -n 128,0",
    "costs": "it has a command of its own, `saap devices costs MODEL -o cost.json`",
    "quality": "give both documents to saap report",
    "cool_down": "a repetition in which a clock moved is INVALID; let the device cool down before the command",
    "cool_down_s": "a repetition in which a clock moved is INVALID; let the device cool down before the command",
    "text": "a device is asked about a text of saap's own; leave it out",
    "config": "write --set NAME=VALUE for each of its lines",
    "iterative_steps": "one stage is better than several; leave it out",
    "stages": "one stage is better than several; leave it out",
    "c": "it is the number of tokens per sequence; leave it out",
    "sigma": "structures of one type share it; leave it out",
    "layer_power": "an FFN channel's score is multiplied by its layer's; leave it out",
    "attention": "lost attention that is not measured counts 1.5 times its price; leave it out",
    "rounding": "0.15 of the price of rounding counts; leave it out",
    "fold": "saap tune trains the scale of each group; leave it out",
    "temperature": "saap tune compares with the teacher at temperature 1; leave it out",
    "asymmetric": "kernels read zero points at a cost of 15 to 25 %, and tuning gained nothing by them; leave it out",
    "symmetric": "saap tune chooses no zero points; leave it out",
    "rank": "saap tune trains one factor for each group; leave it out, or give a larger --group-size to train fewer",
}


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        flags: its spellings on the command line; empty is the field's name with dashes. A ``bool`` whose only flag is
            not a pair (``--x/--no-x``) sets the opposite of the default.
        shown: False keeps it out of help and off the command line: ``--set NAME=VALUE`` and ``--help-all`` know it.
        parse: text to value, raising ValueError with one line; None goes by the annotation.
    """

    help: str  # one sentence; the default is added where it is neither None, False nor empty
    section: str = "Options"  # the heading that help shows it under
    flags: tuple[str, ...] = ()
    old: tuple[str, ...] = ()  # spellings that still work and that help does not show
    metavar: str | None = None  # what help shows for the value
    shown: bool = True
    hidden: bool = False  # a flag that only ``--help-all`` shows
    parse: Callable[[str], object] | None = None
    names: Callable[[], Collection[str]] | None = None  # the values that a shell offers


@dataclass(frozen=True)
class Part:
    """Names of an inner options dataclass that can be set from outside, in place of all of them.

    Attributes:
        headings: what help calls sections here, by what it calls them there.
    """

    flags: tuple[str, ...]  # the names that are flags; those of the others that are not left out are for ``--set``
    without: tuple[str, ...] = ()  # names that are not set from outside here
    headings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A field that can be set from outside, of an options dataclass or of one inside it."""

    name: str
    option: Option
    kind: type  # the type without None: ``int``, ``Path``, ``tuple``, ...
    optional: bool  # whether None is allowed
    choices: tuple[str | int, ...]  # the values of a ``Literal``
    metas: tuple[Meta, ...]
    default: object  # ``dataclasses.MISSING`` where a value must be given
    hint: object  # the annotation
    element: type = str  # what a repeated flag's text becomes
    owner: type | None = None  # the dataclass that has the field

    @property
    def flags(self) -> tuple[str, ...]:
        plain = "--" + self.name.replace("_", "-")
        if self.option.flags:
            return self.option.flags
        pair = self.kind is bool and self.default is not False
        return (f"{plain}/--no-{plain[2:]}" if pair else plain,)

    @property
    def flag(self) -> str:
        if not self.option.shown:
            return self.name
        return next((flag for flag in self.flags if flag.startswith("--")), self.flags[0]).split("/")[0]

    @property
    def repeated(self) -> bool:
        return self.kind is tuple and self.option.parse is None

    @property
    def metavar(self) -> str:
        choices = "|".join(map(str, ("true", "false") if self.kind is bool else self.choices))
        return self.option.metavar or (f"[{choices}]" if choices else NAMES.get(self.kind, "VALUE"))

    @property
    def allowed(self) -> str:
        if self.choices:
            *others, last = map(str, self.choices)
            return f"{', '.join(others)} or {last}" if others else last
        if self.kind is bool:
            return "true or false"
        low = {k: getattr(m, k) for m in self.metas for k in ("ge", "gt") if getattr(m, k) is not None}
        high = {k: getattr(m, k) for m in self.metas for k in ("le", "lt") if getattr(m, k) is not None}
        if "ge" in low and not high:
            return f"{low['ge']} or more"
        what = {int: "a whole number", float: "a number", str: "text", Path: "a path"}.get(self.kind, "a number")
        if "gt" in low and "lt" in high:
            return f"{what} between {low['gt']} and {high['lt']}"
        if "ge" in low and "le" in high:
            return f"{what} from {low['ge']} to {high['le']}"
        words = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}
        return " ".join([what, " and ".join(f"{words[k]} {limit}" for k, limit in (low | high).items())]).strip()

    def read(self, text: str) -> object:
        """Return the value that a text means; of a repeated flag one element. Raises ValueError: what is allowed."""
        if self.choices and self.kind is frozenset:
            return self.checked(frozenset(parse_names(text)))
        choice = next((choice for choice in self.choices if str(choice) == text), None)
        if choice is not None:
            return choice
        if self.optional and text == "none" and (self.choices or self.kind not in (str, Path)):
            return None
        if self.option.parse is not None:
            value = self.option.parse(text)
            return self.checked(value)
        if self.kind is tuple:
            if self.choices:
                raise self._refusal(text)
            return self._converted(text, self.element)
        return self.checked(self._converted(text, self.kind))

    def _converted(self, text: str, kind: type) -> object:
        if kind is bool and text.lower() in WORDS:
            return WORDS[text.lower()]
        if kind is Path and not text:
            raise ValueError("is empty: give the name of a place")
        if kind in (str, Path, int, float):
            try:
                return kind(text)
            except ValueError:
                pass
        raise self._refusal(text)

    def checked(self, value: object) -> object:
        """Return the value as its annotation has it; whole numbers serve where fractions do.

        Raises ValueError: what is allowed.
        """
        if value is None and self.optional:
            return value
        if self.kind is tuple and isinstance(value, int) and not isinstance(value, bool):
            value = (value,)
        try:
            converted: object = msgspec.convert(value, self.hint, dec_hook=_as_is)
        except msgspec.ValidationError:
            raise self._refusal(value) from None
        numbers = converted if isinstance(converted, tuple | frozenset) else (converted,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise self._refusal(value)
        return converted

    def _refusal(self, value: object) -> ValueError:
        return ValueError(f"{_plain(value)} is not allowed: give {self.allowed}")


def _as_is(kind: type, value: object) -> object:
    """Accept a value of a type that msgspec does not know, such as a path."""
    if not isinstance(value, kind):
        raise ValueError
    return value


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | frozenset) else str(value)


def settings_of(kind: type) -> dict[str, Setting]:
    """Return the settings of an options dataclass and of those inside it, by name, in their order.

    Raises TypeError: two have the same name.
    """
    settings: dict[str, Setting] = {}
    for setting in _settings(kind, None):
        if setting.name in settings:
            raise TypeError(f"{kind.__name__} has two fields {setting.name}: names are unique, or have no Option")
        settings[setting.name] = setting
    return settings


@cache
def _hints(kind: type) -> dict[str, type]:
    """Return the annotations of a class, which take a millisecond to read."""
    return get_type_hints(kind, include_extras=True)


def _parts(hint: type) -> tuple[type, tuple[object, ...]]:
    """Return a type and the extras that ``Annotated`` gives it."""
    return (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())


def _settings(kind: type, base: object) -> Iterator[Setting]:
    """Yield settings; ``base`` is the instance with the defaults where a dataclass lies inside another."""
    hints = _hints(kind)
    for each in fields(kind):
        hint, default = hints[each.name], _default(each, base)
        inner, extras = _parts(hint)
        option = next((extra for extra in extras if isinstance(extra, Option)), None)
        if is_dataclass(inner):
            part = next((extra for extra in extras if isinstance(extra, Part)), None)
            theirs = _settings(cast("type", inner), None if default is MISSING else default)
            yield from theirs if part is None else _part(theirs, part)
        elif option is not None and each.init:
            metas = tuple(extra for extra in extras if isinstance(extra, Meta))
            yield replace(_setting(each.name, option, inner, metas, default), owner=kind)


def _part(settings: Iterator[Setting], part: Part) -> Iterator[Setting]:
    for setting in settings:
        if setting.name not in part.without:
            option = setting.option
            shown = setting.name in part.flags
            heading = part.headings.get(option.section, option.section)
            option = replace(option, section=heading, shown=shown, hidden=option.hidden and not shown)
            yield replace(setting, option=option)


def _setting(name: str, option: Option, hint: type, metas: tuple[Meta, ...], default: object) -> Setting:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    optional = NoneType in parts
    kinds = [part for part in parts if part is not NoneType]
    hint, extras = _parts(next((part for part in kinds if get_origin(part) is tuple), kinds[0]))  # of int | tuple: both
    metas += tuple(extra for extra in extras if isinstance(extra, Meta))
    several = (hint, *metas)  # a star inside the brackets is syntax of Python 3.11
    annotation = Annotated[several] if metas else hint
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = type(choices[0]) if choices else get_origin(hint) or hint
    element: type = str
    if kind in (tuple, frozenset) and get_args(hint):
        element, extras = _parts(get_args(hint)[0])
        metas += tuple(extra for extra in extras if isinstance(extra, Meta))
        if get_origin(element) is Literal:
            choices, element = get_args(element), type(get_args(element)[0])
    return Setting(name, option, kind, optional, choices, metas, default, annotation, element)


def _default(each: Field[object], base: object) -> object:
    if base is not None:
        return getattr(base, each.name)
    if each.default_factory is not MISSING:
        return each.default_factory()
    return each.default


def build(kind: type[T], values_by_name: Mapping[str, object], base: T | None = None) -> T:
    """Build the options dataclass of values by name; what is not given is at its default, or as in ``base``.

    Raises UserError: a value that must be given is missing.
    """
    hints, values = _hints(cast("type", kind)), {}
    for each in fields(cast("type", kind)):
        default = _default(each, base)
        inner, extras = _parts(hints[each.name])
        if is_dataclass(inner):
            without = {name for extra in extras if isinstance(extra, Part) for name in extra.without}
            theirs = {name: value for name, value in values_by_name.items() if name not in without}
            values[each.name] = build(cast("type", inner), theirs, None if default is MISSING else default)
        elif each.init and each.name in values_by_name:
            values[each.name] = values_by_name[each.name]
        elif each.init and default is not MISSING:
            values[each.name] = default
        elif each.init:
            raise UserError(f"{each.name} is missing: give a value")
    return kind(**values)


def setting_named(settings: Mapping[str, Setting], name: str) -> Setting:
    """Return a setting by its name, with dashes or underscores. Raises UserError: no such name, with the nearest."""
    plain = name.strip().lstrip("-").replace("-", "_")
    if plain in settings:
        return settings[plain]
    refuse_removed(name.strip())
    import difflib

    near = ", ".join(difflib.get_close_matches(plain, settings, cutoff=0.6))
    advice = f"did you mean {near}?" if near else "--help-all lists them all"
    raise UserError(f"there is no option {name.strip()!r}: {advice}")


def refuse_removed(name: str) -> None:
    """Refuse an option that an earlier version had. Raises UserError: says what to use instead."""
    if advice := REMOVED.get(name.lstrip("-").replace("-", "_")):
        raise UserError(f"{name} was removed: {advice}")


def assigned(settings: Mapping[str, Setting], text: str) -> tuple[str, object]:
    """Split ``NAME=VALUE`` into a name and a value; elements of a tuple are separated by commas.

    Raises UserError: no such name, or not a value for it.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text} has no value: write NAME=VALUE")
    setting = setting_named(settings, name)
    try:
        if setting.repeated:
            return setting.name, tuple(setting.read(part.strip()) for part in value.split(","))
        return setting.name, setting.read(value)
    except ValueError as error:
        raise UserError(f"{setting.name} {error}") from None


def check_values(options: object) -> None:
    """Refuse a value of an options dataclass, or of one inside it, that its annotation does not allow.

    Raises UserError: names the option and what is allowed.
    """
    for setting in _settings(type(options), options):
        value = setting.default  # of an instance: what it holds
        try:
            setting.checked(value)
        except ValueError as error:
            raise UserError(f"{setting.flag} {error}") from None


def changed_in(options: object) -> Iterator[tuple[Setting, object]]:
    """Yield the settings that are not at their defaults, and their values."""
    defaults = settings_of(type(options))
    for now in _settings(type(options), options):
        if now.name in defaults and now.default != defaults[now.name].default:
            yield defaults[now.name], now.default


def refuse_unused(options: object, names: Collection[str], owner: str, instead: str = "") -> None:
    """Refuse those of these settings that are given, or not at their defaults: nothing would come of them.

    ``owner``: what they are for; ``instead``: what else to do than to leave them out.

    Raises UserError: names the options.
    """
    changed, typed = {setting.name for setting, _ in changed_in(options)}, TYPED.get()
    flags = [
        setting.flag
        for name, setting in settings_of(type(options)).items()
        if name in names and (name in changed or (setting.owner, name) in typed)
    ]
    if flags:
        are, them = ("are", "them") if len(flags) > 1 else ("is", "it")
        advice = f"leave {them} out" + (f", or {instead}" if instead else "")
        raise UserError(f"{' and '.join(flags)} {are} for {owner}: {advice}")


def arguments_of(options: object) -> list[str]:
    """Return the words that a person types for these options: all that is not at its default."""
    words: list[str] = []
    for setting, value in changed_in(options):
        if not setting.option.shown:
            words += ["--set", f"{setting.name}={_text(value, ';')}"]
        elif setting.kind is bool:
            on, _, off = next((flag for flag in setting.flags if "/" in flag), setting.flag).partition("/")
            words.append(off if off and value is False else on)
        elif setting.repeated:
            words += [word for each in cast("tuple[object, ...]", value) for word in (setting.flag, _text(each))]
        else:
            words += [setting.flag, _text(value)]
    return words


def _text(value: object, separator: str = ",") -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, frozenset):
        return ",".join(map(str, sorted(value)))
    if isinstance(value, tuple):
        inner = any(isinstance(each, tuple) for each in value)
        return (separator if inner else ",").join(map(_text, value))
    return str(value)
