"""A tokenizer with rules that are not allowed, in a process of its own: ``python -m export.bundle.foreign_tokenizer``.

The process may take 2 GB, and each answer 10 s. It gets a JSON line for each request and answers with one.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from saap.base.child import ChildFailedError, Resident, end_with_parent
from saap.base.memory_limit import limit_memory
from saap.base.tokenizer_file import what_failed

MOST_BYTES = 2 << 30
PATIENCE_S = 10.0


class Encoded(NamedTuple):
    """A text as tokens."""

    ids: list[int]


class ForeignTokenizer:
    """The calls of ``tokenizers.Tokenizer`` that a bundle needs. Raises ChildFailedError: too much memory or time."""

    def __init__(self, content: bytes) -> None:
        child = Resident(__spec__.name, PATIENCE_S, {"TOKENIZERS_PARALLELISM": "false"}).__enter__()
        self._end = weakref.finalize(self, child.__exit__)
        self._ask = child.ask
        self._answer("from_str", content.decode())

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        return Encoded(msgspec.convert(self._answer("encode", text, None, False, add_special_tokens), list[int]))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return msgspec.convert(self._answer("decode", list(ids), skip_special_tokens), str)

    def token_to_id(self, token: str) -> int | None:
        return msgspec.convert(self._answer("token_to_id", token), int | None)

    def id_to_token(self, token_id: int) -> str | None:
        return msgspec.convert(self._answer("id_to_token", token_id), str | None)

    def _answer(self, call: str, *arguments: object) -> object:
        answer = self._ask({"call": call, "arguments": arguments})
        if "error" in answer:
            raise ChildFailedError(str(answer["error"]))
        return answer["value"]


def main() -> None:
    """Answer until no more requests come."""
    from tokenizers import Encoding, Tokenizer

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints
    end_with_parent()
    limit_memory(MOST_BYTES)
    tokenizer: Any = Tokenizer  # until its file has come
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            value = getattr(tokenizer, request["call"])(*request["arguments"])
            if isinstance(value, Tokenizer):
                tokenizer, value = value, None
                tokenizer.no_truncation()
                tokenizer.no_padding()
            answer = {"value": value.ids if isinstance(value, Encoding) else value}
        except BaseException as error:  # the library panics with what is no Exception
            answer = {"error": what_failed(error)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
