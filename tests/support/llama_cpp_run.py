"""Runs a GGUF file in a real llama.cpp, in a process of its own: an assertion of ggml ends the process.

llama.cpp is found in the interpreter that runs the tests, or in the one that SAAP_LLAMA_CPP_PYTHON names. The keys and
values of the cache are float32 and flash attention is off, so that a float32 file computes as torch does.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np


def interpreter() -> str:
    """The Python that has llama_cpp; skips where there is none."""
    named = os.environ.get("SAAP_LLAMA_CPP_PYTHON")
    if named:
        assert Path(named).is_file(), f"SAAP_LLAMA_CPP_PYTHON names {named}, which is no file"
        return named
    if importlib.util.find_spec("llama_cpp") is None:
        import pytest  # the other interpreter, which runs this file too, need not have it

        pytest.skip("no llama.cpp: pip install llama-cpp-python (it compiles), or name a Python that has it in "
                    "SAAP_LLAMA_CPP_PYTHON")  # fmt: skip
    return sys.executable


def run(gguf: Path, *, ids: list[int] | None = None, greedy: int = 0, texts: list[str] | None = None) -> dict[str, Any]:
    """Run a file.

    Args:
        ids: prompt; gives ``logits`` [len(ids), vocab] float32.
        greedy: this many tokens after the prompt; gives ``tokens``.
        texts: gives ``encoded``, the ids of each text with special tokens parsed and none added.

    Returns:
        these, and ``special`` (bos, eos, add_bos), ``ends`` (ids that end a text), ``template``, ``architecture``.
    """
    out = gguf.with_suffix(".npz")
    task = {"gguf": str(gguf), "out": str(out), "ids": ids or [], "greedy": greedy, "texts": texts or []}
    done = subprocess.run(
        [interpreter(), __file__], input=json.dumps(task), capture_output=True, text=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONPATH": ""}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"llama.cpp ended with {done.returncode}: {done.stderr[-2000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    if ids:
        with np.load(out) as arrays:
            found["logits"] = arrays["logits"]
    return found


def _work(task: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp
    from llama_cpp import Llama

    ids, texts = task["ids"], task["texts"]
    model = Llama(
        task["gguf"], n_ctx=max(64, len(ids) + task["greedy"] + 8), n_batch=max(64, len(ids)), n_threads=2,
        n_threads_batch=2, logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False, vocab_only=not ids,
    )  # fmt: skip
    vocabulary = model._model.vocab
    found: dict[str, Any] = {
        "encoded": [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts],
        "special": [
            llama_cpp.llama_vocab_bos(vocabulary),
            llama_cpp.llama_vocab_eos(vocabulary),
            bool(llama_cpp.llama_vocab_get_add_bos(vocabulary)),
        ],
        "ends": [i for i in range(model.n_vocab()) if llama_cpp.llama_vocab_is_eog(vocabulary, i)],
        "template": model.metadata.get("tokenizer.chat_template"),
        "architecture": model.metadata["general.architecture"],
    }
    if ids:
        model.eval(ids)
        np.savez(task["out"], logits=model.scores[: len(ids)].copy())
        found["tokens"] = []
        for _ in range(task["greedy"]):
            token = int(model.scores[model.n_tokens - 1].argmax())
            found["tokens"].append(token)
            model.eval([token])
    return found


if __name__ == "__main__":
    print(json.dumps(_work(json.loads(sys.stdin.read()))))
