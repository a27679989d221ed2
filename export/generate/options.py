"""Options for writing text with a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from saap.base.options import THREADS, Option


@dataclass(frozen=True)
class GenerateOptions:
    """Options of :func:`export.generate.generate`; sampling settings that are None come with ``sample`` from the model.

    Their ranges are checked by :class:`export.generate.sampling.Sampling`, whoever gives them.
    """

    max_tokens: Annotated[int, Option("Longest answer, in tokens."), Meta(ge=1)] = 256
    chat: Annotated[
        bool | None,
        Option("Use the chat template; default: where there is one.", flags=("--chat/--no-chat", " /--raw")),
    ] = None
    system: Annotated[str | None, Option("System prompt, before the first turn.")] = None
    sample: Annotated[bool, Option("Draw tokens, with the settings that the model comes with.")] = False
    temperature: Annotated[
        float | None, Option("Above 0 draws tokens; default: 0, or the model's with --sample."), Meta(ge=0, le=1000)
    ] = None
    top_k: Annotated[int | None, Option("Draw from this many likeliest tokens."), Meta(ge=1)] = None
    top_p: Annotated[
        float | None, Option("Draw from the likeliest tokens of this probability together."), Meta(gt=0, le=1)
    ] = None
    min_p: Annotated[
        float | None, Option("Draw from tokens at least this times as likely as the likeliest."), Meta(ge=0, lt=1)
    ] = None
    repetition_penalty: Annotated[
        float | None, Option("Above 1 makes tokens less likely that were there before."), Meta(gt=0, le=1000)
    ] = None
    seed: Annotated[int, Option("Seed of the draws."), Meta(ge=0)] = 0
    foreign_tokenizer: Annotated[
        bool, Option("Run a tokenizer of rules that are not allowed, in a process of at most 2 GB.")
    ] = False
    threads: Annotated[int | None, Option("Threads; default: all physical cores."), THREADS] = None
    context: Annotated[
        int | None, Option("Tokens that the cache holds; default: as needed, 4096 for a conversation."), Meta(ge=1)
    ] = None
