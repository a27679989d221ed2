"""Documents that differ from valid ones: in their bytes, value by value and name by name, or node by node."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
from collections.abc import Callable, Iterator, MutableSequence
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**60, 2**63, 2**70, -(2**70), 1e308, -1e308, 5e-324, float("inf"),
    float("nan"), 0.5, "", "\x00", "\ud800", "..", "../../etc/passwd", "/etc/passwd", "a" * 5000, "\x1b[2J", "%s%n",
    "<script>", [], {}, [[]], [None] * 50, {"": {}}, {"__class__": "x"}, [1, "2", 3.0], "1e999", "٣", "NaN",
    "\r\n\u202e\u2028", "e" * 200_000, list(range(20_000)), {str(n): n for n in range(2_000)},
)  # fmt: skip
NAMES = tuple(value for value in NASTY if isinstance(value, str))
LARGEST = 4 << 20  # bytes of a document that is made
TWICE = "\x7ftwice"  # after a name that a document holds a second time


def mutated(seed: bytes, draw: random.Random, kind: str) -> bytes:
    """A document that differs from a seed in one to four places; ``kind`` is one of ``CHANGES``."""
    content, changes = seed, draw.randint(1, 4)
    if kind == "values":
        return _json_mutated(content, draw, changes)
    for _ in range(changes):
        content = CHANGES[kind](content, draw)
    return content


def _json_or_bytes(content: bytes, draw: random.Random) -> bytes:
    return (_json_mutated if draw.random() < 0.7 else _bytes_mutated)(content, draw)


def _json_mutated(content: bytes, draw: random.Random, changes: int = 1) -> bytes:
    """Change values and names of a JSON document."""
    try:
        root = [json.loads(content)]
    except (ValueError, RecursionError):
        return _bytes_mutated(content, draw)
    twice = set[str]()
    for _ in range(changes):
        with contextlib.suppress(RecursionError):  # of a value that is nested deeply
            twice |= _value_changed(root, draw)
    try:
        text = json.dumps(root[0])
    except (ValueError, RecursionError):  # a value within itself
        return content
    for name in twice:
        text = text.replace(json.dumps(name + TWICE), json.dumps(name))
    return text.encode() if len(text) < LARGEST else content


def _value_changed(root: list[Any], draw: random.Random) -> set[str]:
    """Change one value or name of a document, whose only entry it is; names that it shall have twice."""
    places = list(_places(root))
    node, key = draw.choice(places)
    change = draw.randrange(9)
    if change == 0 and node is not root:
        del node[key]
    elif change == 1 and isinstance(node, dict):
        node[draw.choice(["", "x", "__class__", "format", "schema", "name"])] = draw.choice(NASTY)
    elif change == 2 and isinstance(node, list):
        node.extend(node[:20] * draw.choice([1, 1, 1, 500]))
    elif change == 3 and isinstance(node, dict):  # another name for what is there: of a file, say
        names = [key for _, key in places if isinstance(key, str)]
        node[draw.choice([*NAMES, *names])] = node.pop(key)
    elif change == 4:
        other, its = draw.choice(places)
        node[key], other[its] = copy.deepcopy(other[its]), copy.deepcopy(node[key])
    elif change == 5:
        node[key] = _near(node[key], draw)
    elif change == 6:
        node[key] = _retyped(node[key], draw)
    elif change == 7 and isinstance(node, dict):
        other, its = draw.choice(places)
        node[key + TWICE] = copy.deepcopy(draw.choice([draw.choice(NASTY), other[its]]))
        return {str(key)}
    else:
        node[key] = copy.deepcopy(draw.choice(NASTY))
    return set()


def _places(root: list[Any]) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value, the whole document first; of long lists and texts the first entries."""
    waiting: list[Any] = [root]
    while waiting:
        node = waiting.pop()
        for key in list(node)[:50] if isinstance(node, dict) else range(min(len(node), 20)):
            yield node, key
            if isinstance(node[key], dict | list):
                waiting.append(node[key])


def _near(value: Any, draw: random.Random) -> Any:
    """A value of the same type close by."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return draw.choice([value + 1, value - 1, -value, value * 2, value // 2, value + 0.5, value * 1000])
    if isinstance(value, str):
        return draw.choice([value + "\x00", value[1:], value * 2, value.upper(), value + "\ud800", f"./{value}", " "])
    if isinstance(value, list):
        return draw.choice([value[:-1], value[::-1], value + value, value[:1] * 3, [value]])
    return dict(list(value.items())[: len(value) // 2])


def _retyped(value: Any, draw: random.Random) -> Any:
    if draw.random() < 0.2:
        for _ in range(draw.choice([1, 2, 200, 900])):
            value = [value] if draw.random() < 0.5 else {"a": value}
        return value
    if isinstance(value, dict):
        return draw.choice([list(value), list(value.values()), len(value), json.dumps(value)[:200]])
    if isinstance(value, list):
        return draw.choice([{str(at): each for at, each in enumerate(value)}, len(value), str(value)[:200]])
    return draw.choice([str(value), [value], {"value": value}, len(str(value)), float(len(str(value))), bool(value)])


def _graph_mutated(content: bytes, draw: random.Random) -> bytes:
    """Change a field of a message of an ONNX file: of a node, an attribute, a tensor, a shape."""
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        return _bytes_mutated(content, draw)
    messages = list(_messages(model))
    message = draw.choice(messages)
    fields = [field for field, _ in message.ListFields()] if draw.random() < 0.8 else message.DESCRIPTOR.fields
    if not fields:
        return content
    field = draw.choice(list(fields))
    if field.is_repeated:
        _change_list(getattr(message, field.name), field, draw, messages)
    elif draw.random() < 0.2:
        message.ClearField(field.name)
    elif field.message_type is None:
        _set(lambda value: setattr(message, field.name, value), field, draw, messages, getattr(message, field.name))
    else:
        part = getattr(message, field.name)
        part.CopyFrom(_copied(draw.choice([other for other in messages if type(other) is type(part)] or [part])))
    data: bytes = model.SerializePartialToString()
    return data if len(data) < LARGEST else content


def _messages(message: Any) -> Iterator[Any]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in value if field.is_repeated else [value]:
                yield from _messages(part)


def _copied(message: Any) -> Any:
    """A message apart from the one that it is put into, which may be part of it."""
    return type(message).FromString(message.SerializePartialToString()) if hasattr(message, "DESCRIPTOR") else message


def _change_list(values: MutableSequence[Any], field: Any, draw: random.Random, messages: list[Any]) -> None:
    change, at = draw.randrange(5), draw.randrange(len(values)) if values else 0
    if values and change == 0:
        del values[at]
    elif values and change == 1:  # once more, or very often
        values.extend([_copied(values[at])] * draw.choice([1, 1, 3, 300]))
    elif change == 2:
        del values[:]
    elif field.message_type is not None:
        others = [other for other in messages if other.DESCRIPTOR is field.message_type]
        if others:
            values.append(_copied(draw.choice(others)))
    elif values and change == 3:
        _set(lambda value: values.__setitem__(at, value), field, draw, messages, values[at])
    else:
        _set(values.append, field, draw, messages, values[at] if values else 0)


def _set(put: Callable[[Any], None], field: Any, draw: random.Random, messages: list[Any], now: Any) -> None:
    """Put another value into a field; what does not fit its type is left out."""
    texts: list[Any] = [getattr(m, name) for m in draw.sample(messages, min(20, len(messages))) for name in
                        ("name", "op_type", "key", "value") if isinstance(getattr(m, name, None), str)]  # fmt: skip
    numbers = [now + 1, now - 1, -now, now * 2] if isinstance(now, int | float) else []
    value = draw.choice([*NASTY, *texts * 2, *numbers * 6, *range(30)])
    if field.type in (field.TYPE_BYTES, field.TYPE_STRING):
        value = value if isinstance(value, str) else str(value)[:100]
        value = value.encode(errors="replace") if field.type == field.TYPE_BYTES else value
    try:
        put(value)
    except (TypeError, ValueError):
        with contextlib.suppress(TypeError, ValueError):  # there may be no such member of an enumeration
            put(type(now)(draw.randint(0, 20)))


def _bytes_mutated(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    change = draw.randrange(7)
    if change == 0:
        return content[:place]
    if change == 1:
        return content[:place] + draw.randbytes(draw.randint(1, 8)) + content[place:]
    if change == 2:
        return content[:place] + content[place + draw.randint(1, 16) :]
    if change == 3:
        return (
            content[:place]
            + struct.pack("<Q", draw.choice([0, 1, 2**31, 2**60, 2**63, 2**64 - 1]))
            + content[place + 8 :]
        )
    if change == 4:
        return content[:place] + content[place : place + 64] * draw.randint(2, 40) + content[place:]
    if change == 5:
        return (
            content[:place]
            + draw.choice([b"[" * 3000, b'{"a":' * 3000, b"-", b"e", b"9" * 5000, b"\xff", b"\n"])
            + content[place:]
        )
    return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json_or_bytes,
    "values": _json_mutated,  # JSON that stays JSON, as somebody would write it who means harm
    "graph": _graph_mutated,
    "bytes": _bytes_mutated,
}
