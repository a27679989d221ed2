"""What the tests of the report show: a run, measurements with a rhythm of their own, and documents of ``saap eval``."""

import html
import re

import numpy as np

from bench.measure.result import Bandwidth, Measurement, ModelFacts, Result, Sample

RUN = {
    "model": "a model",
    "steps": [
        {"name": "prune", "command": ["saap", "prune", "a b"], "seconds": 61.25},
        {"name": "tune", "command": "saap tune", "seconds": None},
    ],
    "plan": {
        "asked": 0.2,
        "planned": 0.2012,
        "achieved": 0.2009,
        "layers": [{"query_heads": 6, "kv_heads": 2, "ffn": 1024}, {"query_heads": 0, "kv_heads": 0, "ffn": 992}],
        "dense_layers": [{"query_heads": 9, "kv_heads": 3, "ffn": 1536}] * 2,
    },
    "quality": {
        "protocol": {"chunk": 256, "bos": False},
        "rows": [
            {"name": "dense", "perplexity": 20.0, "nll": 2.9957, "kl": 0.0, "top1": 1.0, "parameters": 134515008},
            {"name": "slim", "perplexity": 25.0, "nll": 3.2189, "kl": 0.25, "top1": 0.75, "bytes": None},
        ],
    },
    "parity": {"slim": {"max_abs": 0.00031, "greedy_equal": 64}},
    "texts": [{"prompt": "Why is the sky blue?", "outputs": {"dense": "Scattering.", "slim": "Because."}}],
    "versions": {"torch": "2.13.0"},
}


def sample(order, milliseconds, count, **changes):
    times = milliseconds / 1e3 * (1 + 0.01 * np.sin(np.arange(count) + order))
    values = {
        "started_at": "2025-01-01T00:00:00Z", "order": order, "load_s": 0.3, "warmup_s": [0.1], "prefill_s": 0.25,
        "ttft_s": 0.26, "token_s": times.tolist(), "peak_load_bytes": 200_000_000, "peak_decode_bytes": 210_000_000,
        "anonymous_bytes": 100_000_000, "file_bytes": 90_000_000,
    }  # fmt: skip
    return Sample(**values | changes)


def measurement(name, milliseconds, *, count=16, repetitions=5, status="OK", reasons=(), **changes):
    values = {
        "name": name, "spec": f"out/{name}", "kind": "onnx", "bundle_hash": "ab" * 32,
        "model": ModelFacts(134_515_008, 100_000_000, 90_000_000, 23_040, 4, 49_152),
        "n_prompt": 128, "n_gen": count, "n_threads": 1, "affinity": [0],
        "samples": [sample(2 * i, milliseconds, count) for i in range(repetitions)],
        "status": status, "reasons": list(reasons),
    }  # fmt: skip
    return Measurement(**values | changes)


def result(*measurements, **changes):
    values = {
        "device": {"board": None, "cpu_model": "Some CPU", "os": "Some OS", "memory_bytes": 8_000_000_000},
        "measurements": list(measurements), "bandwidth": [Bandwidth(1, 1 << 28, [1.4e10, 1.5e10])],
        "command": ["saap", "bench", "a b"], "versions": {"onnxruntime": "1.32.0"}, "created": "2025-01-01T00:00:00Z",
    }  # fmt: skip
    return Result(**values | changes)


def text_of(page):
    page = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


PROTOCOL = {"text": "a.txt", "text_sha256": None, "tokens_sha256": "b", "tokenizer_sha256": "c", "chunk": 256,
            "chunks": 1, "stride": 256, "bos": False, "join": "raw", "predictions": 255}  # fmt: skip


def row(name, perplexity):
    return {"name": name, "perplexity": perplexity, "nll": 3.0, "kl": None, "top1": None, "parameters": 1, "bytes": 2}


def task(model, name, acc, acc_norm=None, count=5):
    example = {"index": 0, "target": 0, "loglikelihoods": []}
    return {"model": model, "task": name, "source": "a file", "acc": float(acc), "acc_stderr": 0.01,
            "acc_norm": acc_norm, "acc_norm_stderr": None if acc_norm is None else 0.02,
            "examples": [example] * count}  # fmt: skip


def document(rows, protocol=PROTOCOL, tasks=()):
    return {"kind": "saap-quality", "version": 1, "reference": None, "protocol": protocol, "rows": rows,
            "tasks": list(tasks)}  # fmt: skip
