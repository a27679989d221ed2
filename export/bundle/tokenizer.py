"""The tokenizer of a bundle without transformers: ids, chat template, and text as a stream.

Rendering follows transformers' ``apply_chat_template`` (same sandbox, same helpers), so that a bundle is prompted on a
board exactly as its model was prompted in training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tokenizers import Tokenizer

from devices.common.errors import UserError
from devices.common.files import parse_json
from export.bundle.manifest import MANIFEST

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.parser import Parser

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class RunError(UserError):
    """A prompt or a bundle that cannot be run."""


class BundleTokenizer:
    """``tokenizer.json`` and the chat template of a bundle or a model directory.

    Attributes:
        chat_template: the template's source; None where there is none.
        special_tokens: name to text, as the chat template sees them (``bos_token``, ``eos_token``, ...).
        bos_token_id: from the manifest, else from the tokenizer; None when there is none.
        eos_token_ids: every id that ends a text: from the manifest, else generation_config.json, else the tokenizer.

    Raises:
        RunError: no tokenizer there, or one that cannot be read.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / "tokenizer.json"
        if not path.is_file():
            raise RunError(f"{self.directory} has no tokenizer.json: {_remedy(self.directory)}")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise RunError(f"{path} cannot be read ({error}): {_remedy(self.directory)}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        config = read_json(self.directory / "tokenizer_config.json")
        self.special_tokens = _special_tokens(config, read_json(self.directory / "special_tokens_map.json"))
        self.chat_template = _template_source(self.directory, config)
        self._template: Template | None = None
        manifest = read_json(self.directory / MANIFEST)
        self.bos_token_id: int | None = manifest.get("bos_token_id", self._id_of("bos_token"))
        self.eos_token_ids = self._eos_ids(manifest)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def render_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the text that the model was trained on.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": text}`` in order.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises:
            RunError: there is no template, or it refuses the conversation.
        """
        import jinja2

        if self.chat_template is None:
            raise RunError(f"{self.directory} has no chat template: give the prompt as plain text, with chat off")
        try:
            self._template = self._template or _compile(self.chat_template)
            text: str = self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise RunError(f"the chat template of {self.directory} refuses this conversation: {error}") from None
        return text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; leave the special tokens out for text that comes from a chat template, which writes its own."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(self, prompt: str) -> list[int]:
        """Token ids of one user turn, ready for the assistant's answer."""
        return self.encode(self.render_chat([{"role": "user", "content": prompt}]), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)

    def _eos_ids(self, manifest: dict[str, object]) -> list[int]:
        named = manifest.get("eos_token_ids")
        if named is None:
            named = read_json(self.directory / "generation_config.json").get("eos_token_id")
        if named is None:
            named = self._id_of("eos_token")
        return end_ids(named, self.directory)


class TextStream:
    """Text of a growing list of ids, piece by piece; the pieces joined are the text of the whole.

    A tokenizer's decoder looks at neighbours (a leading space is dropped, a character may span tokens), so each piece
    is the difference of two decodings that share a window of context, and a piece that ends inside a character waits.

    Args:
        context: ids that come before the first pushed one, e.g. the prompt that is being continued.
    """

    def __init__(self, tokenizer: BundleTokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context[-_CONTEXT_TOKENS:])
        self._shown = tokenizer.decode(self._ids)
        self._read = len(self._ids)

    @property
    def end_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.eos_token_ids)

    def push(self, token: int) -> str:
        """The text that this token completes: often a word, empty inside a character."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # U+FFFD at the end is (almost always) the first bytes of a character whose last bytes are still to come.
        if len(text) <= len(self._shown) or text.endswith("\ufffd"):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, text: str) -> str:
        piece = text[len(self._shown) :]
        # The tokens just shown become the context of the next ones; older ones are no longer looked at.
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._shown = self._tokenizer.decode(self._ids)
        return piece


_CONTEXT_TOKENS = 6


def _template_source(directory: Path, config: dict[str, object]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # older files: several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(*configs: dict[str, object]) -> dict[str, str]:
    found: dict[str, str] = {}
    for config in configs:
        for name in _SPECIAL_TOKENS:
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.setdefault(name, token)
    return found


def _compile(source: str) -> Template:
    """A jinja2 template with the helpers that transformers gives to chat templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}``: marks the assistant's text for training; nothing to do here."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    # jinja2's own filter escapes < and >, which a prompt must keep.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def end_ids(named: object, directory: Path) -> list[int]:
    """The ids of an ``eos_token_id``: one, several or none.

    Raises:
        RunError: an entry that is not a number.
    """
    found: list[object] = [] if named is None else named if isinstance(named, list) else [named]
    if wrong := [each for each in found if type(each) is not int]:
        raise RunError(f"{directory} ends a text with the token {wrong[0]!r}: mend its eos_token_id, ids are numbers")
    return [each for each in found if isinstance(each, int)]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a bundle or a model directory; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): {_remedy(path.parent)}") from None
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged (not an object): {_remedy(path.parent)}")
    return value


def _remedy(directory: Path) -> str:
    """How to repair a damaged file; a model directory has tokenizers, too."""
    return "export the bundle again" if (directory / MANIFEST).is_file() else "get or make the model again"
