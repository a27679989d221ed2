"""A decoder that says a script, and a small tokenizer for it."""

import json

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from export.engine.protocol import Engine

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces, a tab\tand\n\na blank line ",
    "naïve café, 日本語のテキスト, emoji 👩‍👩‍👧 and 🤷🏽‍♀️!",
    "<|im_start|>user\nspecial tokens inside<|im_end|>",
    "def f(x):\n    return x ** 2  # 12345",
]


class ScriptedDecoder(Engine):
    """Says the ids of a script, whatever it is given: the protocol is what is under test, not a model."""

    def __init__(self, script, vocab, max_length=64):
        self.script, self.vocab, self.max_length = list(script), vocab, max_length
        self.seen, self.resets = [], 0

    def rewind(self, length):
        assert length <= len(self.seen)
        if not length:
            self.at, self.resets = 0, self.resets + 1
        del self.seen[length:]
        return length

    def prefill(self, ids):
        assert ids.dtype == np.int64
        self.seen += ids.tolist()
        return self._next()

    def step(self, token_id):
        self.seen.append(token_id)
        return self._next()

    def _next(self):
        assert len(self.seen) <= self.max_length, "a cache was written past its end"
        logits = np.zeros(self.vocab, np.float32)
        logits[self.script[self.at % len(self.script)]] = 9.0
        self.at += 1
        return logits


def bpe_directory(path, config=None):
    """A byte-level BPE of a few merges: most characters outside ASCII take several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | (config or {})
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path
