"""Answers: does a model write what the dense one writes, and does it repeat itself?

Multiple choice hardly tells a model that lost layers from one that lost width; what they write does. Every prompt is
answered greedily by the dense model and by each other one. Counted are the tokens of the dense answer that a model
would say next behind its beginning (agreement), the tokens until its own answer differs, and the 4-grams of its own
answer that were in it before (rep-4 of Welleck et al., arXiv 1908.04319, within one answer).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from saap.base.chat_template import ChatTemplate, TemplateError
from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.base.quality import AnswerScore
from saap.evaluate.perplexity import Score
from saap.text.conversations import has_chat_template

NGRAM = 4
Writer = Callable[[Sequence[int], int], list[int]]  # writes greedily: prompt ids, most tokens -> new ids


@dataclass(frozen=True)
class Prompts:
    """Prompts in words, and where they are from."""

    texts: tuple[str, ...]
    source: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Token ids of each, in the model's chat template where it has one."""
        if not has_chat_template(tokenizer):
            return [list(map(int, tokenizer(text)["input_ids"])) for text in self.texts]
        template = ChatTemplate(str(tokenizer.get_chat_template()), tokenizer.special_tokens_map)
        try:
            asked = [template.render([{"role": "user", "content": text}], True) for text in self.texts]
        except TemplateError as error:
            raise UserError(
                f"the chat template fails at a prompt ({error}): give a model whose template works"
            ) from None
        return [list(map(int, tokenizer(text, add_special_tokens=False)["input_ids"])) for text in asked]


def read_prompts(path: Path | None, count: int) -> Prompts:
    """Read the first lines of a text file, or of the prompts that ship.

    Raises UserError: the file cannot be read, or has fewer.
    """
    source = "saap's prompts" if path is None else path.name
    try:
        text = (files("saap.evaluate") / "prompts.txt" if path is None else path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as UTF-8 text ({error}): give a file with a prompt on each line"
        ) from None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if len(lines) < count:
        raise UserError(f"{source} has {len(lines)} prompts: give --answers {len(lines)} or fewer, or --prompts FILE")
    return Prompts(tuple(lines[:count]), source)


def stop_ids(directory: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer."""
    place = directory / "generation_config.json"
    stops = json.loads(place.read_text()).get("eos_token_id") if place.is_file() else None
    stops = tokenizer.eos_token_id if stops is None else stops
    return [] if stops is None else [stops] if isinstance(stops, int) else list(stops)


def score_answers(
    models: Mapping[str, tuple[Writer, Score]],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    reference: str | None,
    progress: Progress | None = None,
) -> list[AnswerScore]:
    """Every model's answers of ``tokens`` at most; against those of the reference, where one is named."""
    answers: dict[str, list[list[int]]] = {}
    for name, (write, _) in models.items():
        answers[name] = []
        for number, prompt in enumerate(prompts):
            advance(progress, f"answering (prompts), {name}", number, len(prompts))
            answers[name].append(write(prompt, tokens))
    scores = []
    for name, (_, score) in models.items():
        agreement = same = None
        if reference is not None:
            expected = answers[reference]
            agreed = [_agreed(score, prompt, answer) for prompt, answer in zip(prompts, expected, strict=True)]
            agreement = sum(agreed) / max(1, sum(map(len, expected)))
            same = sum(map(_common, answers[name], expected)) / len(prompts)
        repeated = [repetition(answer) for answer in answers[name]]
        scores.append(AnswerScore(name, agreement, same, sum(repeated) / len(prompts)))
    return scores


def _agreed(score: Score, prompt: Sequence[int], answer: Sequence[int]) -> int:
    """Tokens of an answer that a model would say next behind the prompt and those before."""
    if not answer:
        return 0
    logits = score(torch.tensor([[*prompt, *answer[:-1]]]))[0, len(prompt) - 1 :]
    return int((logits.argmax(-1).cpu() == torch.tensor(answer)).sum())


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next(
        (n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), min(len(left), len(right))
    )


def repetition(answer: Sequence[int]) -> float:
    """Share of its 4-grams that were in it before."""
    grams = [tuple(answer[at : at + NGRAM]) for at in range(len(answer) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
