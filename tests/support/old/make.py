"""Makes what lies beside it: products of the command line, and the record of what it computes.

    python make.py products DIR        # what the old code wrote; once, with that code
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
import subprocess
import sys
import tempfile
from collections import Counter
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


def dense(out: Path) -> None:
    """A Llama of random weights: three layers, four query heads in two KV groups, tied, a vocabulary of 320."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text(1, 20), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:  # wider than the default, so that the logits differ from token to token
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def products() -> None:
    """What the commands write, in the folder that this runs in."""
    dense(Path("dense"))
    Path("learn.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text(2, 40)), encoding="utf-8")
    Path("judge.txt").write_text("\n\n".join(text(3, 6)) + "\n", encoding="utf-8")
    saap("prune dense -o slim --ratio 0.2 --calibration learn.jsonl --sequences 12")
    saap("tune slim -o tuned --teacher dense --data learn.jsonl --tokens 8192 --precision fp32")
    saap("export tuned -o bundle")
    saap("eval slim bundle --reference dense --text judge.txt --json quality.json")
    saap("bench bundle -p 64 -n 64 -t 1 -r 6 --quality quality.json --json result.json")
    saap("devices probe --costs dense -t 1 -o cost.json")
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
        files with weights, and of each tensor type, shape and sketch; the sha256 of a bundle's files and of a GGUF
        file, and how often each operator stands in a graph.
    """
    import torch

    torch.backends.mkldnn.enabled = False  # used on AMD's processors only
    made: dict[str, Any] = {"versions": {name: importlib.metadata.version(name) for name in LIBRARIES}}
    made["arithmetic"] = arithmetic(old / "dense")
    text = ("--calibration", old / "learn.jsonl", "--sequences", 12, "--seed", 0)
    for name, options in {
        "saap": ("--ratio", 0.15),
        "saap-two-stages": ("--ratio", 0.2),
        "flap": ("--method", "flap", "--ratio", 0.2),
        "shortgpt": ("--method", "shortgpt", "--ratio", 0.3),
    }.items():
        here("prune", old / "dense", "-o", name, *options, *text)
    here("tune", old / "slim", "-o", "tuned", "--teacher", old / "dense", "--data", old / "learn.jsonl",
         "--tokens", 4096, "--seed", 0, "--precision", "fp32")  # fmt: skip
    made["models"] = {name: of_model(Path(name)) for name in ("saap", "saap-two-stages", "flap", "shortgpt", "tuned")}
    here("export", old / "tuned", "-o", "cpu")
    here("export", old / "tuned", "-o", "portable", "--target", "portable")
    here("export", old / "slim", "-o", "slim.gguf", "--target", "gguf", "--bits", 8)
    here("export", old / "tuned", "-o", "tuned.gguf", "--target", "gguf")
    made["bundles"] = {name: of_bundle(Path(name)) for name in ("cpu", "portable")}
    made["gguf"] = {name: sha256(Path(name)) for name in ("slim.gguf", "tuned.gguf")}
    return made


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

    said = json.loads((directory / "saap.json").read_text(encoding="utf-8"))
    files = sorted(directory.glob("*.safetensors"))
    return {
        "plan": said["plan"],
        "files": {file.name: sha256(file) for file in files},
        "tensors": {name: sketch(value) for file in files for name, value in sorted(load_file(file).items())},
    }


def of_bundle(directory: Path) -> dict[str, Any]:
    """The graph and the weights of a bundle."""
    import onnx

    nodes = onnx.load(directory / "model.onnx", load_external_data=False).graph.node
    return {
        "operators": dict(sorted(Counter(node.op_type for node in nodes).items())),
        "files": {name: sha256(directory / name) for name in ("model.onnx", "model.onnx.data", "scoring.onnx")},
    }


def sketch(tensor: Any) -> list[Any]:
    """Type, shape, norm, and sums with eight patterns of signs: near those of another tensor where that is near."""
    import numpy as np

    flat = tensor.astype(np.float64).reshape(-1)
    places = np.arange(1, len(flat) + 1, dtype=np.uint64)
    mixed = places * np.uint64(0x9E3779B97F4A7C15)  # wraps around
    mixed ^= mixed >> np.uint64(29)
    signs = [1.0 - 2.0 * ((mixed >> np.uint64(k)) & np.uint64(1)).astype(np.float64) for k in range(8)]
    sums = [float(f"{float(np.sum(flat * sign)):.9g}") for sign in signs]
    return [str(tensor.dtype), list(tensor.shape), float(f"{float(np.sqrt(np.sum(flat * flat))):.9g}"), *sums]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "products":
        where.mkdir(parents=True, exist_ok=True)
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
