"""A conversation of several turns that reads only what is new in each: the KV cache stays between them."""

from __future__ import annotations

from export.bundle.tokenizer import BundleTokenizer, RunError, TextStream
from export.engine.protocol import Engine
from export.generate.loop import DEFAULTS, AnswerSettings, CachedSequence, Generation, check_request


class Conversation:
    """Turns of a user and a model.

    Every turn renders the whole conversation with the model's chat template, so the model always sees exactly what it
    would see if it were prompted afresh. What the cache already holds of it, from the start, is kept: with a template
    that only appends, that is all but the new turn; one that rewrites earlier turns costs as much as it rewrites.

    Args:
        engine: the model; its cache is emptied first.
        tokenizer: the bundle's; it must have a chat template.
        settings: of every answer; the draws of all turns come from one seed.
        system: what the model is told first; None leaves it to the template.

    ``messages``: what has been said, as ``{"role", "content"}``; an answer joins when the next turn begins.

    Raises RunError: no chat template, or an argument out of range.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: BundleTokenizer,
        settings: AnswerSettings = DEFAULTS,
        *,
        system: str | None = None,
    ) -> None:
        if not tokenizer.has_chat_template:
            raise RunError(f"{tokenizer.directory} has no chat template: give a prompt to continue instead of a chat")
        self._sequence, self._tokenizer, self._system = CachedSequence(engine), tokenizer, system
        self._settings, self._draw = settings, settings.sampling.sampler()
        self.reset()

    def reset(self) -> None:
        """Start a new conversation; the system prompt stays in the cache."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]
        self._answer: Generation | None = None

    def ask(self, text: str) -> Generation:
        """Start the answer to the user's next turn, to be read as it is written.

        Raises RunError: an empty turn, a template that refuses it, or a context that is full; the conversation is then
        as it was.
        """
        check_request(text, self._settings.max_tokens)
        if self._answer is not None:
            self.messages.append({"role": "assistant", "content": self._answer.text})
            self._answer = None
        turns = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokenizer.encode(self._tokenizer.render_chat(turns), add_special_tokens=False)
        if not ids:
            raise RunError("the model's tokenizer makes no tokens of this conversation: do not use it")
        room = self._sequence.engine.max_length
        if len(ids) > room:
            raise RunError(
                f"the context is full: the conversation has {len(ids)} tokens with this turn and {room} fit; "
                "say it shorter, or start again with /reset"
            )
        self.messages = turns
        self._answer = Generation(self._sequence, ids, TextStream(self._tokenizer), self._draw, self._settings)
        return self._answer
