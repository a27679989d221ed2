"""The tokenizer of a bundle without transformers: ids, chat template, and text as a stream.

A bundle is prompted on a board exactly as its model was prompted in training: ``saap.base.chat_template``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from export.bundle.foreign_tokenizer import ForeignTokenizer
from export.bundle.manifest import BundleManifest
from export.bundle.small_files import SmallFiles, manifest_of, remedy
from saap.base.chat_template import ChatTemplate, TemplateError
from saap.base.errors import UserError
from saap.base.files import parse_json
from saap.base.tokenizer_file import TOKENIZER, check_tokenizer, tokenizing, what_failed

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class RunError(UserError):
    """A prompt or a bundle that cannot be run."""


class BundleTokenizer:
    """``tokenizer.json`` and the chat template of a bundle or a model directory.

    Attributes:
        chat_template: the template's source; None where there is none.
        special_tokens: name to text, as the chat template sees them (``bos_token``, ``eos_token``, ...).
        bos_token_id: from the manifest, else from the tokenizer; None when there is none.
        files: those that were read, and others to read.
        eos_token_ids: every id that ends a text: from the manifest, else generation_config.json, else the tokenizer.

    Raises RunError: no tokenizer there, or one that cannot be read.
    """

    def __init__(self, directory: str | Path, manifest: BundleManifest | None = None, foreign: bool = False) -> None:
        """Read the files.

        Args:
            manifest: the bundle's, where it was read before.
            foreign: take rules that are not allowed, too, and run them in a process with limits.
        """
        self.directory = Path(directory)
        manifest = manifest or manifest_of(self.directory)
        self.files = SmallFiles(self.directory, manifest)
        content = self.files.read(TOKENIZER)
        if content is None:
            raise RunError(f"{self.directory} has no {TOKENIZER}: {remedy(self.directory)}")
        self.tokenizer = _tokenizer(content, self.directory, foreign)
        config = read_json(self.files, "tokenizer_config.json")
        special = read_json(self.files, "special_tokens_map.json")
        try:
            self.special_tokens = _special_tokens(config, special)
            self.chat_template = _template_source(self.files, config)
        except ValueError as error:
            path = self.directory / "tokenizer_config.json"
            raise RunError(f"{path} is damaged ({error}): {remedy(self.directory)}") from None
        source = self.chat_template
        self._template = None if source is None else ChatTemplate(source, self.special_tokens)
        self.bos_token_id = self._id_of("bos_token") if manifest is None else manifest.bos_token_id
        self.eos_token_ids = self._eos_ids() if manifest is None else list(manifest.eos_token_ids)

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def prepare_chat(self) -> None:
        """Start what renders conversations, while something else is loaded."""
        if self._template is not None:
            self._template.start()

    def render_chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as the text that the model was trained on.

        Args:
            messages: ``{"role": "system" | "user" | "assistant", "content": text}`` in order.
            add_generation_prompt: end with the opening of the assistant's turn.

        Raises RunError: there is no template, or it refuses the conversation.
        """
        if self._template is None:
            raise RunError(f"{self.directory} has no chat template: give the prompt as plain text, with chat off")
        try:
            return self._template.render(messages, add_generation_prompt)
        except TemplateError as error:
            raise RunError(f"the chat template of {self.directory} refuses this conversation: {error}") from None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; leave the special tokens out for text that comes from a chat template, which writes its own.

        Raises RunError: the tokenizer's own rules do not allow it.
        """
        with tokenizing(f"{self.directory / TOKENIZER} cannot be used", remedy(self.directory), RunError):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(self, prompt: str) -> list[int]:
        """Token ids of one user turn, ready for the assistant's answer."""
        return self.encode(self.render_chat([{"role": "user", "content": prompt}]), add_special_tokens=False)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD. Raises RunError: the tokenizer's own rules fail."""
        try:  # which costs nothing, once a token
            text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except BaseException as wrong:
            what = f"{self.directory / TOKENIZER} cannot be used ({what_failed(wrong)})"
            raise RunError(f"{what}: {remedy(self.directory)}") from None
        return text

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.tokenizer.token_to_id(token)

    def _eos_ids(self) -> list[int]:
        named = read_json(self.files, "generation_config.json").get("eos_token_id")
        return ids_of(self._id_of("eos_token") if named is None else named, self.directory)


class TextStream:
    """Text of a growing list of ids, piece by piece; the pieces joined are the text of the whole.

    A tokenizer's decoder looks at neighbours (a leading space is dropped, a character may span tokens), so each piece
    is the difference of two decodings that share a window of context, and a piece that ends inside a character waits.

    ``context``: ids that come before the first pushed one, e.g. the prompt that is being continued.
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
        """Return the text that this token completes: often a word, empty inside a character."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        # U+FFFD at the end is (almost always) the first bytes of a character whose last bytes are still to come.
        if len(text) <= len(self._shown) or text.endswith("\ufffd"):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """Return the rest of the text, at its end."""
        return self._take(self._tokenizer.decode(self._ids))

    def _take(self, text: str) -> str:
        piece = text[len(self._shown) :]
        # The tokens just shown become the context of the next ones; older ones are no longer looked at.
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._shown = self._tokenizer.decode(self._ids)
        return piece


_CONTEXT_TOKENS = 6


def _tokenizer(content: bytes, directory: Path, foreign: bool) -> Tokenizer | ForeignTokenizer:
    """Load a tokenizer. Raises RunError: not a tokenizer, or one that the library must not be given."""
    within = "" if foreign else ", or run it within limits (`saap generate --foreign-tokenizer`)"
    with tokenizing(f"{directory / TOKENIZER} cannot be read", remedy(directory) + within, RunError):
        if foreign:
            return ForeignTokenizer(content)
        check_tokenizer(content)
        tokenizer = Tokenizer.from_buffer(content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _template_source(files: SmallFiles, config: Mapping[str, object]) -> str | None:
    if (content := files.read("chat_template.jinja")) is not None:
        return content.decode("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # older files: several named templates
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ValueError("chat_template is not text")
    return template


def _special_tokens(*configs: Mapping[str, object]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for config in configs:
        for name in _SPECIAL_TOKENS:
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise ValueError(f"{name} is not text")
            if token is not None:
                tokens.setdefault(name, token)
    return tokens


def ids_of(named: object, directory: Path, what: str = "ends") -> list[int]:
    """List the ids of a ``bos_token_id`` or ``eos_token_id``: one, several or none.

    ``what``: ``begins`` or ``ends``, for the message.

    Raises RunError: an entry that is not a number.
    """
    ids: list[object] = [] if named is None else named if isinstance(named, list) else [named]
    if wrong := [each for each in ids if type(each) is not int or not 0 <= each < 2**31]:
        raise RunError(
            f"{directory} {what} a text with the token {repr(wrong[0])[:40]}: mend its "
            f"{'bos' if what == 'begins' else 'eos'}_token_id, ids are numbers"
        )
    return [each for each in ids if isinstance(each, int)]


def read_json(files: SmallFiles, name: str) -> dict[str, object]:
    """Read the object in a small JSON file of a bundle or a model directory; empty where there is no such file.

    Raises:
        RunError: damaged.
        BundleError: as of :meth:`export.bundle.manifest.SmallFiles.read`.
    """
    content, directory = files.read(name), files.directory
    if content is None:
        return {}
    try:
        value = parse_json(content)
    except ValueError as error:
        raise RunError(f"{directory / name} is damaged ({error}): {remedy(directory)}") from None
    if not isinstance(value, dict):
        raise RunError(f"{directory / name} is damaged (not an object): {remedy(directory)}")
    return value
