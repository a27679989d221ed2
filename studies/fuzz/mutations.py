"""Documents that differ from valid ones: in their bytes, or value by value where they are JSON."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**60, 2**63, 2**70, -(2**70), 1e308, -1e308, 5e-324, float("inf"),
    float("nan"), 0.5, "", "\x00", "\ud800", "..", "../../etc/passwd", "/etc/passwd", "a" * 5000, "\x1b[2J", "%s%n",
    "<script>", [], {}, [[]], [None] * 50, {"": {}}, {"__class__": "x"}, [1, "2", 3.0], "1e999", "٣", "NaN",
)  # fmt: skip
NAMES = tuple(value for value in NASTY if isinstance(value, str))


def mutated(seed: bytes, draw: random.Random, as_json: bool) -> bytes:
    """A document that differs from a seed in one to four places."""
    content = seed
    for _ in range(draw.randint(1, 4)):
        content = _json_mutated(content, draw) if as_json and draw.random() < 0.7 else _bytes_mutated(content, draw)
    return content


def _json_mutated(content: bytes, draw: random.Random) -> bytes:
    try:
        root = [json.loads(content)]
    except (ValueError, RecursionError):
        return _bytes_mutated(content, draw)
    node: Any = root
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return _bytes_mutated(content, draw)
        key = draw.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        break
    change = draw.randrange(5)
    if change == 0 and node is not root:
        del node[key]
    elif change == 1 and isinstance(node, dict):
        node[draw.choice(["", "x", "__class__", "format", "schema", "name"])] = draw.choice(NASTY)
    elif change == 2 and isinstance(node, list):
        node.extend(node[:20])
    elif change == 3 and isinstance(node, dict):  # another name for what is there: of a file, say
        node[draw.choice(NAMES)] = node.pop(key)
    else:
        node[key] = draw.choice(NASTY)
    return json.dumps(root[0]).encode()


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
