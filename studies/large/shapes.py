"""The shapes of LLaMA-like models."""

# hidden, FFN, layers, query heads, KV heads
SHAPES = {
    "0.3B": (1024, 2816, 24, 16, 16),
    "1.1B": (2048, 5632, 22, 32, 4),
    "3B": (3072, 8192, 28, 24, 8),
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
}
