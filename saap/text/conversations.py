"""Conversations: rows of chat data as turns, and turns as token ids of which only the answers are learnt.

No torch here: a row becomes ``[{"role", "content"}, ...]``, and with the model's own chat template token ids and, for
each, whether it is learnt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeGuard

from saap.base.chat_template import ChatTemplate, TemplateError
from saap.base.errors import UserError
from saap.text.encoding import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
Sample = tuple[list[int], list[bool]]

# What data sets call the three roles that chat templates know; the last two are ShareGPT's.
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
# As transformers looks for it.
GENERATION = re.compile(r"\{\%-?\s*generation\s*-?\%\}")


def is_conversation(row: object) -> TypeGuard[dict[str, object]]:
    """Whether a row of data is chat: ``messages``, ShareGPT's ``conversations``, or an ``instruction``."""
    return isinstance(row, dict) and bool({"messages", "conversations", "instruction"} & set(row))


def messages_of(row: object, where: str) -> list[Message]:
    """Read the turns of one row, as ``{"role": system | user | assistant, "content"}``.

    Args:
        row: ``messages`` (role, content), ``conversations`` (from, value), or ``instruction``, ``input`` or
            ``context``, and ``output`` or ``response``.

    Raises UserError: another form, an unknown role, a turn that is no text, or no answer to learn.
    """
    if not is_conversation(row):
        raise UserError(f"{where} is no chat: give rows with 'messages', 'conversations' or 'instruction'")
    if "messages" in row:
        turns = _turns(row["messages"], "role", "content", where)
    elif "conversations" in row:
        turns = _turns(row["conversations"], "from", "value", where)
    else:
        asked = [str(part) for part in (row["instruction"], row.get("input", row.get("context"))) if part]
        answer = row.get("output", row.get("response")) or ""
        turns = [{"role": "user", "content": "\n\n".join(asked)}, {"role": "assistant", "content": str(answer)}]
    answers = [turn["content"].strip() for turn in turns if turn["role"] == "assistant"]
    if not answers or not all(answers):
        raise UserError(f"{where} has {'an empty' if answers else 'no'} answer: there is nothing to learn, remove it")
    if next(turn["role"] for turn in turns if turn["role"] != "system") == "assistant":
        raise UserError(f"{where} begins with an answer: give what it answers, or remove that turn")
    return turns


def _turns(turns: object, role: str, content: str, where: str) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where} has turns that are no list of objects: give [{{'{role}', '{content}'}}, ...]")
    for turn in turns:
        if not isinstance(turn.get(role), str) or turn[role] not in ROLES:
            raise UserError(f"{where} has a turn of {role} {turn.get(role)!r}: {', '.join(ROLES)} are read, remove it")
        if not isinstance(turn.get(content), str):
            raise UserError(f"{where} has a turn whose {content} is no text: give text only")
    return [{"role": ROLES[turn[role]], "content": turn[content]} for turn in turns]


class ChatEncoder:
    """Token ids of conversations in a model's own chat template; only the assistant's tokens are learnt.

    Where the template marks what it generates (``{% generation %}``), its marks are taken as they are. Elsewhere an
    answer is what the template adds between the prompt that asks for it (``add_generation_prompt``) and the answered
    conversation, up to its last special token, which ends the turn: the line break that ChatML writes after
    ``<|im_end|>`` is never generated, so it is not learnt. A token that holds characters of both prompt and answer
    belongs to the prompt.

    A template that writes earlier turns differently once they are answered (it drops their reasoning, say) is followed
    exactly: every answer of the conversation is then a sample of its own, after what the model would really see.

    Raises UserError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not has_chat_template(tokenizer):
            raise UserError("the model has no chat template to write conversations with: give --kind text")
        self._tokenizer = tokenizer
        source = tokenizer.get_chat_template()
        self._marked = bool(GENERATION.search(source))
        self._template = ChatTemplate(source, tokenizer.special_tokens_map)
        added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = added | set(tokenizer.all_special_ids)

    def samples(self, messages: Sequence[Message], where: str) -> Iterator[Sample]:
        """Ids and whether each is learnt: one sample, or one per answer where the template rewrites earlier turns.

        What follows the last answer is left out.

        Raises UserError: the template refuses the conversation, or does not say where an answer begins.
        """
        last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
        turns = list(messages[: last + 1])
        if self._marked:
            text, spans = self._render_marked(turns, where)
            yield self._encoded(text, spans, whole=True)
            return
        text = self._render(turns, where)
        spans, alone = [], []
        for i, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt, answered = self._render(turns[:i], where, prompt=True), self._render(turns[: i + 1], where)
                if not answered.startswith(prompt):
                    raise UserError(
                        f"{where}: the model's chat template does not write an answer after its own prompt for one, "
                        "so it is not known which tokens to learn: give --kind text"
                    )
                spans.append((len(prompt), len(answered)))
                alone.append(answered)
        if all(text.startswith(answered) for answered in alone):
            yield self._encoded(text, spans)
        else:
            for answered, span in zip(alone, spans, strict=True):
                yield self._encoded(answered, [span])

    def _render(self, turns: Sequence[Message], where: str, *, prompt: bool = False) -> str:
        try:
            return self._template.render(turns, prompt)
        except TemplateError as error:
            raise _refused(where, error) from None

    def _render_marked(self, turns: Sequence[Message], where: str) -> tuple[str, list[tuple[int, int]]]:
        # Not apply_chat_template's token mask: where a tokenizer leaves blanks out of its offsets, an answer that
        # ends with one would be learnt up to the end of the conversation.
        try:
            return self._template.render_marked(turns)
        except TemplateError as error:
            raise _refused(where, error) from None

    def _encoded(self, text: str, spans: Sequence[tuple[int, int]], *, whole: bool = False) -> Sample:
        """Ids of ``text``; learnt are the characters of ``spans``, ``whole`` or up to the last special token."""
        ids = self._ids(text)
        learnt = [False] * len(ids)
        for start, end in spans:
            first = self._begin(text[:start], ids)
            stop = len(ids) if end == len(text) else _common(self._ids(text[:end]), ids)
            if not whole:
                ends = [i for i in range(first, stop) if ids[i] in self._special]
                stop = ends[-1] + 1 if ends else stop
            learnt[first:stop] = [True] * max(0, stop - first)
        return ids, learnt

    def _begin(self, prompt: str, ids: Sequence[int]) -> int:
        """Find the first token that lies wholly after ``prompt``."""
        before = self._ids(prompt)
        first = _common(before, ids)
        if first == len(before):
            return first
        behind, first = first, first + 1  # the token at the boundary holds characters of both
        while first < len(ids) and len(self._text(ids[behind:first])) < len(self._text(before[behind:])):
            first += 1
        return first

    def _ids(self, text: str) -> list[int]:
        # The template writes the special tokens itself; a conversation longer than the context is cut later.
        return encode(text, self._tokenizer)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has one chat template, or several of which one is the default."""
    try:
        return bool(tokenizer.get_chat_template())
    except ValueError:
        return False


def _refused(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: the model's chat template refuses it ({error}): mend or remove it, or give --kind text")


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common start."""
    if list(right[: len(left)]) == list(left):
        return len(left)
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
