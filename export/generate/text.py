"""Text from a bundle: one answer, or a conversation. No torch, no transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict

import msgspec

from export.bundle import Bundle
from export.bundle.manifest import BundleManifest
from export.bundle.small_files import SmallFiles
from export.bundle.tokenizer import BundleTokenizer, read_json
from export.engine.protocol import EngineOptions
from export.engine.spec import resolve
from export.generate.chat import Conversation
from export.generate.loop import AnswerSettings, Generation, begin_text
from export.generate.options import GenerateOptions
from export.generate.sampling import Sampling
from saap.base.cores import physical_cores
from saap.base.errors import UserError
from saap.base.options import refuse_unused
from saap.base.progress import Progress

CHAT_CONTEXT = 4096  # positions of a conversation's cache where no context is given


class SamplingSettings(TypedDict, total=False):
    """Settings of sampling that a user or a model may give."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


SAMPLED = tuple(SamplingSettings.__annotations__)


@dataclass(frozen=True)
class GenerateResult:
    """One answer."""

    prompt: str
    text: str
    ids: list[int]  # tokens drawn, one that ends the text included
    n_prompt: int  # tokens of the prompt, template included
    n_prompt_read: int  # how many of them were not in the cache
    n_gen: int
    prefill_seconds: float  # until the first token; ``decode_seconds``: from there to the end
    decode_seconds: float
    stop_reason: str | None  # eos, length (max_tokens reached), context (the cache is full) or interrupted


@dataclass(frozen=True)
class OpenBundle:
    """A bundle that is loaded and answers prompts."""

    manifest: BundleManifest
    sampling: Sampling
    threads: int
    context: int
    ask: Callable[[str], Generation]
    conversation: Conversation | None  # None where each prompt is a plain text that is continued


def generate(
    bundle: str | Path,
    prompt: str,
    options: GenerateOptions | None = None,
    *,
    on_text: Callable[[str], object] | None = None,
    progress: Progress | None = None,
) -> GenerateResult:
    """Answer a prompt, or continue it where the model has no chat template.

    Args:
        bundle: ``BUNDLE``, ``BUNDLE@llama.cpp``, or ``BUNDLE@fastest``, which measures where the answer is not known.
        on_text: is given each piece of the text as it is written; pieces never split a character.

    Raises UserError: no bundle, an empty prompt, an option out of range, or a context that is too small.
    """
    generation = open_bundle(bundle, options or GenerateOptions(), prompt, progress).ask(prompt)
    for piece in generation:
        if on_text is not None:
            on_text(piece)
    return result_of(prompt, generation)


def result_of(prompt: str, generation: Generation) -> GenerateResult:
    return GenerateResult(
        prompt=prompt,
        text=generation.text,
        ids=generation.drawn,
        n_prompt=generation.prompt_tokens,
        n_prompt_read=generation.read_tokens,
        n_gen=generation.tokens,
        prefill_seconds=generation.prefill_seconds,
        decode_seconds=generation.decode_seconds,
        stop_reason=generation.stop_reason,
    )


def open_bundle(
    bundle: str | Path, options: GenerateOptions, prompt: str | None = None, progress: Progress | None = None
) -> OpenBundle:
    """Load a bundle with a cache that one prompt needs or, without a prompt, a conversation may.

    Raises UserError: no bundle, options that do not go together, or a context that is too small.
    """
    named = resolve(bundle, progress, here=True)
    opened = replace(Bundle.open(named.bundle), foreign_tokenizer=options.foreign_tokenizer)
    source, manifest, tokenizer = named.source(opened), opened.manifest, opened.tokenizer
    templated = tokenizer.has_chat_template if options.chat is None else options.chat
    if prompt is None and not templated:
        raise UserError("a conversation needs the model's chat template: give a prompt to continue")
    if options.system is not None and not templated:
        instead = ", or leave --raw out" if tokenizer.has_chat_template else "; this bundle has none"
        raise UserError(f"--system needs the model's chat template: put it into the prompt{instead}")
    if templated:
        tokenizer.prepare_chat()
    sampling = chosen_sampling(opened.small_files, options)
    for text in (prompt, options.system):
        check_text(text)
    needed = CHAT_CONTEXT if prompt is None else options.max_tokens + _length(tokenizer, prompt, templated, options)
    context = max(1, min(manifest.context_length, needed)) if options.context is None else options.context
    threads = physical_cores() if options.threads is None else options.threads
    named.row.check_here()
    engine = named.row.open(source, EngineOptions(threads, context))
    settings = AnswerSettings(options.max_tokens, sampling)
    talk = Conversation(engine, tokenizer, settings, system=options.system) if templated else None

    def ask(text: str) -> Generation:
        if talk is not None:
            return talk.ask(text)
        return begin_text(engine, tokenizer, text, settings, chat=False)

    return OpenBundle(manifest, sampling, threads, context, ask, talk)


def chosen_sampling(files: SmallFiles, options: GenerateOptions) -> Sampling:
    """Greedy unless sampling is asked for; then what is not given comes from the model's generation_config.json.

    Asked for means: ``sample``, a temperature above 0, top_k, top_p or min_p.

    Raises:
        UserError: a temperature of 0 beside an option that only means something when tokens are drawn.
        RunError: a value out of range.
    """
    settings: dict[str, object] = {
        name: getattr(options, name) for name in SAMPLED if getattr(options, name) is not None
    }
    drawing = [name for name in ("top_k", "top_p", "min_p") if name in settings] + (
        ["sample"] if options.sample else []
    )
    if drawing and settings.get("temperature") == 0:
        flag = "--" + drawing[0].replace("_", "-")
        raise UserError(f"temperature 0 takes the likeliest token, so {flag} has no effect: leave one of them out")
    if drawing or settings.get("temperature"):
        settings = {"temperature": 1.0, **_model_defaults(files), **settings}
    else:
        refuse_unused(options, ("seed",), "drawn tokens", "give --sample or --temperature")
    return Sampling(**msgspec.convert(settings, SamplingSettings), seed=options.seed)


def check_text(text: str | None) -> None:
    """Refuse bytes that a shell passed on although they are no text."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("the prompt is not UTF-8 text: convert it first") from None


def _length(tokenizer: BundleTokenizer, prompt: str, templated: bool, options: GenerateOptions) -> int:
    """Tokens of a first prompt."""
    if not templated:
        return len(tokenizer.encode(prompt))
    turns = [] if options.system is None else [{"role": "system", "content": options.system}]
    rendered = tokenizer.render_chat([*turns, {"role": "user", "content": prompt}])
    return len(tokenizer.encode(rendered, add_special_tokens=False))


def _model_defaults(files: SmallFiles) -> dict[str, float]:
    path = files.directory / "generation_config.json"
    config = read_json(files, path.name)
    defaults: dict[str, float] = {}
    for name in SAMPLED:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float | None):
            raise UserError(f"{path} has {name} {value!r}, which is no number: give --{name.replace('_', '-')}")
        if value is not None and (name, value) != ("top_k", 0):  # transformers' way to say that all are kept
            defaults[name] = value
    return defaults
