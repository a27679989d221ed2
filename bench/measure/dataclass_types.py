"""Dataclasses out of JSON that anybody may have written: each field is of the type that it is annotated with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def built(kind: type[T], raw: Mapping[str, Any]) -> T:
    """A dataclass of these fields.

    Raises:
        TypeError: fields that are missing, not known, or of another type.
    """
    made = kind(**raw)
    check_types(made)
    return made


def check_types(made: Any) -> None:
    """Hold the fields of a dataclass against their annotations; whole numbers are floats too.

    Raises:
        TypeError: naming the first that does not fit.
    """
    for name, hint in _hints(made.__class__).items():
        if not _fits(getattr(made, name), hint):
            raise TypeError(f"{name} is {str(getattr(made, name))[:40]!r}")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is list:
        if not isinstance(value, list):
            return False
        if arguments == (float,):  # thousands of token times
            return set(map(type, value)) <= {int, float}
        return all(_fits(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and _fits(v, arguments[1]) for k, v in value.items())
    if hint is None or hint is NoneType:
        return value is None
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, hint)
