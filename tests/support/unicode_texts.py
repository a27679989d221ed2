"""Texts that a tokenizer must bring back as they are."""

import random

TEXT = "The cat sat on the mat, and 17 other cats were sitting there; naïve cafés, πάντα ῥεῖ, 猫が座った. " * 40


def texts(count=2000):
    """So many strings of all planes of Unicode, beside ordinary ones."""
    generator = random.Random(5)
    planes = [(0x20, 0x7F), (0xA0, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0xFFFD), (0x10000, 0x10FFFF)]
    for _ in range(count):
        low, high = generator.choice(planes)
        yield "".join(chr(generator.randint(low, high)) for _ in range(generator.randint(1, 12)))
    yield from (TEXT[:200], "def f(x):\n\treturn x**2  # 🙂", "👩‍👩‍👧‍👦 flags 🇩🇪", "\n\n \t")
