"""A cost table of the tiny model."""

import json
from pathlib import Path
from typing import Any


def cost_file(path: Path, **changes: Any) -> Path:
    """A dense step of the tiny model takes 1 + 3 * (0.9 + 0.8) = 6.1 ms."""
    model = {"hidden": 96, "head_dim": 16, "vocab": 320, "bits": 4, "block": 32}
    attention = {(1, 1): 0.3, (2, 1): 0.4, (3, 3): 0.5, (6, 3): 0.9}
    table = {
        "n_threads": 1,
        "constant_ms": 1.0,
        "node_ms": None,
        "attention": [{"query_heads": q, "kv_heads": kv, "ms": ms} for (q, kv), ms in attention.items()],
        "ffn": [{"width": 32, "ms": 0.2}, {"width": 128, "ms": 0.8}],
    }
    device = {"board": None, "cpu_model": "Cortex-A76", "fingerprint": "abc", "onnxruntime": "1.23.0"}
    whole = {"kind": "saap costs", "schema": 1, "device": device, "model": model, "depth": 192, "threads": [table]}
    path.write_text(json.dumps({**whole, **changes}))
    return path
