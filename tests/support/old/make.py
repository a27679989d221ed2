"""Makes what lies beside it: products of the command line, and the record of what it computes.

    python make.py products DIR        # what a commit writes of DIR's model and texts; once, with that commit
    python make.py record DIR          # what the code at hand computes from DIR's products, as JSON: digests.json

``tests/test_old_products.py`` makes the record anew. Processors round differently, so it is made with the arithmetic
that all x86-64 processors share, and with a sample of that arithmetic, which tells whether bytes can be compared.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

# Before anything that computes is imported: results must not depend on what the processor can do, nor on its maker.
PINNED = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
}
LIBRARIES = ("gguf", "numpy", "onnx", "onnx-ir", "safetensors", "scipy", "tokenizers", "torch", "transformers")
WORDS = re.findall(
    r"\w+",
    "river bridge engine paper window market signal copper garden letter number winter silver doctor island bottle "
    "carries closes measures follows opens crosses holds finds writes turns moves breaks small warm early heavy quiet "
    "distant narrow plain before after under against without beside because while where until every some many few",
)
GRAPHS = ("model.onnx", "scoring.onnx")
ROLES = ("user", "assistant")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# By model_type, the fields of a config that set a family apart.
FAMILIES: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5},
    },
    "gemma3_text": {"sliding_window": 64, "sliding_window_pattern": 3, "query_pre_attn_scalar": 24},
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "global_head_dim": 64,
        "num_kv_shared_layers": 1, "sliding_window": 64, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 320,
    },
}  # fmt: skip


def text(seed: int, documents: int) -> list[str]:
    """Documents of words at random: nobody's text, and no two alike."""
    draw = random.Random(seed)
    found = []
    for _ in range(documents):
        sentences = (" ".join(draw.choice(WORDS) for _ in range(draw.randrange(8, 20))) for _ in range(12))
        found.append("\n".join(f"{sentence.capitalize()}, {draw.randrange(1000)}." for sentence in sentences))
    return found


def here(*arguments: object) -> None:
    """A command of saap in this process, which spares the imports."""
    from click.testing import CliRunner

    from saap.cli.main import cli

    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    if done.exit_code:
        sys.exit(f"exit {done.exit_code}: {done.output}")


def saap(line: str) -> None:
    """A command of saap in a process of its own, with this environment."""
    program = Path(sys.executable).with_name("saap")
    subprocess.run([program, *line.split()], check=True)


def products() -> None:
    """Write what the commands make of the folder's ``dense``, ``learn.jsonl`` and ``judge.txt``, in that folder."""
    saap("prune dense -o slim --ratio 0.2 --calibration learn.jsonl --sequences 12")
    saap("tune slim -o tuned --teacher dense --data learn.jsonl --tokens 8192 --precision fp32")
    saap("export tuned -o bundle")
    saap("eval slim bundle --reference dense --text judge.txt --json quality.json")
    saap("bench bundle -p 64 -n 64 -t 1 -r 6 --quality quality.json --json result.json")
    saap("devices costs dense -t 1 -o cost.json")
    saap("devices baseline bundle -p 64 -n 64 -t 1 -r 6 --baselines baselines")
    for path in (Path("result.json"), Path("cost.json"), *Path("baselines").iterdir()):
        tidy(path)


def tidy(path: Path) -> None:
    """Take out of a document which kernel its machine ran, and of a table of costs most of its raw samples."""
    from saap.base.files import with_checksum, without_checksum

    document = without_checksum(json.loads(path.read_text(encoding="utf-8")))
    for part in (document, *document.get("results", [])):
        if "device" in part:
            part["device"]["kernel"] = "6.18"
    for process in (process for table in document.get("threads", []) for process in table["processes"]):
        for samples in ("samples_ns", "waited_ns"):
            process[samples] = [turns[:4] for turns in process[samples]]  # of each stack
    path.write_text(json.dumps(with_checksum(document)) + "\n", encoding="utf-8")


def record(old: Path) -> dict[str, Any]:
    """What the code at hand makes of the old products, in the folder that this runs in.

    Returns:
        versions of libraries, a sample of the arithmetic, and by the name of each product: the plan, the sha256 of the
        files with weights, and of each tensor type, shape, the start of a hash and a sketch; of a bundle the sha256 of
        its files, and starts of hashes of the graph's nodes and constants; the sha256 of a GGUF file.
    """
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # an older transformers has fewer

    torch.backends.mkldnn.enabled = False  # used on AMD's processors only
    result: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in LIBRARIES}}
    result["arithmetic"] = arithmetic(old / "dense")
    text = ("--calibration", old / "learn.jsonl", "--sequences", 12)
    pruned = {
        "ratio": ("--ratio", 0.15),
        "speedup": ("--speedup", 1.15, "--costs", old / "cost.json"),
        "max-bytes": ("--max-bytes", "180kB", "--group-size", 32),
        "vocabulary": ("--vocabulary", 0.9, "--ratio", 0.1),
        "flap": ("--method", "flap", "--ratio", 0.2),
        "shortgpt": ("--method", "shortgpt", "--ratio", 0.3),
    }
    for name, options in pruned.items():
        here("prune", old / "dense", "-o", name, *options, *text, "--seed", 0)
    slim, talks = talking(old / "slim", Path("talking")), conversations(Path("talks.jsonl"))
    teacher = ("--teacher", old / "dense", "--data", old / "learn.jsonl")
    tuned = {
        "tuned": (old / "slim", *teacher, "--tokens", 4096),
        "tuned-max-bytes": (old / "slim", *teacher, "--tokens", 1024, "--max-bytes", "205kB"),
        "tuned-conversations": (slim, "--data", talks, "--kind", "chat", "--tokens", 2048),
    }
    families = [name for name in FAMILIES if name in CONFIG_MAPPING]
    for name in families:
        dense = family(name, old / "dense", Path(name))
        here("prune", dense, "-o", f"{name}-slim", "--ratio", 0.3, "--keep", "blocks", *text, "--seed", 0)
        tuned[f"{name}-tuned"] = (f"{name}-slim", *teacher[2:], "--tokens", 1024)
    for name, arguments in tuned.items():
        here("tune", *arguments, "-o", name, "--seed", 0, "--precision", "fp32")
    models = [*pruned, *(f"{name}-slim" for name in families), *tuned]
    result["models"] = {name: of_model(Path(name)) for name in models}
    bundles = {
        "cpu": (old / "tuned",),
        "portable": (old / "tuned", "--target", "portable"),
        "vocabulary-bundle": ("vocabulary",),
        "max-bytes-bundle": ("tuned-max-bytes",),
        **{f"{name}-bundle": (f"{name}-tuned",) for name in families},
    }
    for name, words in bundles.items():
        here("export", *words, "-o", name)
    here("export", old / "slim", "-o", "slim.gguf", "--target", "gguf", "--bits", 8)
    here("export", old / "tuned", "-o", "tuned.gguf", "--target", "gguf")
    result["bundles"] = {name: of_bundle(Path(name)) for name in bundles}
    result["gguf"] = {name: sha256(Path(name)) for name in ("slim.gguf", "tuned.gguf")}
    return result


def family(name: str, tokenizer: Path, out: Path) -> Path:
    """A model of random weights whose layers are not all attention, or not all alike."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(fields | FAMILIES[name])))
    for place, parameter in model.named_parameters():  # by name, so that no order of making changes them
        values = np.random.Generator(np.random.PCG64(zlib.crc32(place.encode()))).standard_normal(parameter.shape)
        spread = torch.from_numpy(values.astype(np.float32)) * (0.1 if parameter.dim() > 1 else 0.3)
        constant = parameter.dim() == 1 and bool((parameter == parameter[0]).all())  # a norm, not a random start
        parameter.data = parameter.data + spread if constant else spread
    model.save_pretrained(out)
    for path in tokenizer.glob("*token*.json"):
        shutil.copy(path, out)
    return out


def talking(model: Path, out: Path) -> Path:
    """A copy of a model whose tokenizer has a template of conversations."""
    shutil.copytree(model, out)
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return out


def conversations(path: Path) -> Path:
    """Rows of messages: two questions and their answers each."""
    sentences = [line for document in text(4, 24) for line in document.splitlines()]
    rows = (sentences[place : place + 4] for place in range(0, len(sentences), 4))
    turns = ([{"role": ROLES[i % 2], "content": line} for i, line in enumerate(row)] for row in rows)
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in turns), encoding="utf-8")
    return path


def arithmetic(model: Path) -> str:
    """A sha256 over results of the operations that pruning and tuning are made of: equal where these round alike."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = (torch.arange(1024).reshape(4, 256) * 7919) % 320
    output = network(input_ids=ids, labels=ids, output_hidden_states=True)
    output.loss.backward()
    found = [output.loss, output.logits, *(parameter.grad for parameter in network.parameters())]
    for kind in (torch.float32, torch.float64):
        rows = output.hidden_states[1].detach().reshape(-1, 64).to(kind)
        gram = rows.T @ rows / len(rows) + torch.eye(64, dtype=kind)
        root = torch.linalg.cholesky(gram)
        found += [gram, root, torch.cholesky_inverse(root), torch.linalg.solve(gram, rows[:64]), rows.var(0)]
        found += [torch.linalg.eigvalsh(gram), torch.log_softmax(rows, -1), rows.abs().sqrt().sum(1)]
        found += [getattr(torch, name)(rows.abs() + 0.1) for name in ("exp", "log", "sin", "cos", "sigmoid", "rsqrt")]
        found += [(rows.abs() + 0.1).pow(0.75), rows.mean(0), rows.std(1), rows.norm(dim=1), rows.cumsum(1)]
    values = [tensor.detach().numpy() for tensor in found]
    for rows in (values[1].reshape(-1, 320), values[1].reshape(-1, 320).astype(np.float64)):
        values += [np.exp(rows), np.log1p(np.abs(rows)), np.abs(rows) ** 0.75, rows.T @ rows, rows.sum(axis=1)]
        values += [rows.mean(axis=0), np.linalg.solve(rows.T @ rows + np.eye(320, dtype=rows.dtype), rows[:320])]
    return hashlib.sha256(b"".join(np.ascontiguousarray(value).tobytes() for value in values)).hexdigest()


def of_model(directory: Path) -> dict[str, Any]:
    """The plan of a slim directory, and its weights."""
    from safetensors.numpy import load_file

    files = sorted(directory.glob("*.safetensors"))
    return {
        "plan": json.loads((directory / "saap.json").read_text(encoding="utf-8"))["plan"],
        "files": {file.name: sha256(file) for file in files},
        "tensors": {name: sketch(value) for file in files for name, value in sorted(load_file(file).items())},
    }


def of_bundle(directory: Path) -> dict[str, Any]:
    """The graphs and the weights of a bundle."""
    import onnx

    result: dict[str, Any] = {"files": {name: sha256(directory / name) for name in (*GRAPHS, "model.onnx.data")}}
    for name in GRAPHS:
        graph = onnx.load(directory / name, load_external_data=False).graph
        result[name] = {
            "nodes": [f"{node.op_type} {start(node.SerializeToString())}" for node in graph.node],
            "constants": {each.name: start(each.SerializeToString()) for each in graph.initializer},
        }
    return result


def start(data: bytes) -> str:
    """The start of a hash, which is enough to say where two files differ."""
    return hashlib.sha256(data).hexdigest()[:8]


def sketch(tensor: Any) -> list[Any]:
    """Type, shape, start of a hash, norm, and eight sums with random signs, which are near where tensors are near."""
    import numpy as np

    flat = tensor.astype(np.float64).reshape(-1)
    places = np.arange(1, len(flat) + 1, dtype=np.uint64)
    mixed = places * np.uint64(0x9E3779B97F4A7C15)  # wraps around
    mixed ^= mixed >> np.uint64(29)
    signs = [1.0 - 2.0 * ((mixed >> np.uint64(k)) & np.uint64(1)).astype(np.float64) for k in range(8)]
    sums = [float(f"{float(np.sum(flat * sign)):.9g}") for sign in signs]
    head = [str(tensor.dtype), list(tensor.shape), start(np.ascontiguousarray(tensor).tobytes())]
    return [*head, float(f"{float(np.sqrt(np.sum(flat * flat))):.9g}"), *sums]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "products":
        os.chdir(where)
        products()
    else:
        os.environ.update(PINNED)
        where = where.resolve()
        with tempfile.TemporaryDirectory() as work:
            os.chdir(work)
            os.environ["SAAP_CACHE"] = str(Path(work) / "cache")
            os.environ.pop("SAAP_DATA", None)
            made = record(where)
            os.chdir(where)
        print(json.dumps(made))
