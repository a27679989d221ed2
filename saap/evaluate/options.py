"""Options of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from saap.base.options import COMPUTE, COUNT, Option, refuse_unused
from saap.base.values import parse_count, parse_names
from saap.system.device_names import check_device_is_there
from saap.text.windows import Cut, Join

_TEXT, _TASKS, _ANSWERS = "Perplexity", "Zero-shot tasks", "Answers"


@dataclass(frozen=True)
class EvalOptions:
    """The cut of a text, the zero-shot tasks, and the number of prompts to answer."""

    chunk: Annotated[int, Option("Tokens per chunk.", _TEXT), Meta(ge=2, le=1_000_000)] = 256
    stride: Annotated[
        int | None,
        Option("Tokens from one chunk's start to the next's; default: the chunk.", _TEXT),
        COUNT,
    ] = None
    bos: Annotated[
        bool | None, Option("A beginning-of-sequence token before each chunk; default: as the tokenizer.", _TEXT)
    ] = None
    join: Annotated[
        Join, Option("Lines as they are, by blank lines, or as papers join them: wikitext, and PTB by spaces.", _TEXT)
    ] = "raw"
    max_chunks: Annotated[
        int | None, Option("Chunks at most, or all.", _TEXT, metavar="N", parse=parse_count), Meta(ge=1)
    ] = 160
    tasks: Annotated[
        tuple[str, ...],
        Option(
            "Such as piqa,arc_easy; with them perplexity only where --text is given.", _TASKS, metavar="TEXT",
            parse=parse_names,
        ),
    ] = ()  # fmt: skip
    task_dir: Annotated[
        Path | None, Option("Folder of the tasks' .jsonl files; default: the harness downloads.", _TASKS)
    ] = None
    max_examples: Annotated[
        int | None, Option("Of each task, drawn with --seed; default: all.", _TASKS), Meta(ge=1)
    ] = None
    seed: Annotated[int, Option("Of the examples that are drawn.", _TASKS), Meta(ge=0)] = 0
    answers: Annotated[
        int | None,
        Option("Prompts to answer: agreement with the dense model's answers, and repetition.", _ANSWERS),
        Meta(ge=1, le=10_000),
    ] = None
    prompts: Annotated[Path | None, Option("A prompt on each line; default: 32 of saap's.", _ANSWERS)] = None
    answer_tokens: Annotated[
        int, Option("Tokens of an answer, at most.", _ANSWERS, metavar="N", hidden=True), Meta(ge=1, le=100_000)
    ] = 48
    device: Annotated[str, Option(COMPUTE, metavar="NAME", hidden=True)] = "auto"

    @property
    def cut(self) -> Cut:
        return Cut(self.chunk, self.stride, self.bos, self.join, self.max_chunks)


def check_options(options: EvalOptions, *, on_text: bool = True) -> None:
    """Refuse what would have no effect; ``on_text``: whether a text is evaluated on. Raises UserError: names it."""
    check_device_is_there(options.device)
    if not options.tasks:
        refuse_unused(options, ("task_dir", "max_examples", "seed"), "--tasks", "name some, as piqa,arc_easy")
    if options.answers is None:
        refuse_unused(options, ("prompts", "answer_tokens"), "answers", "give --answers")
    if options.max_examples is None:
        refuse_unused(options, ("seed",), "drawing examples", "give --max-examples")
    if not on_text:
        cut = ("chunk", "stride", "bos", "join", "max_chunks")
        refuse_unused(
            options, cut, f"perplexity, which {'--tasks' if options.tasks else '--answers'} leaves out", "give --text"
        )
