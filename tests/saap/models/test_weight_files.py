"""Weights in several files, and tensors put aside on disk."""

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import here, refused
from support.edited import edited

from saap.base.errors import UserError
from saap.models.checkpoint import load_model
from saap.models.weight_files import TensorFolder, stored_tensors, tensor_reader, write_shards
from saap.prune.options import PruneOptions
from saap.prune.pruning import budget_of


def test_small_weights_are_one_file_and_large_ones_several_that_transformers_reads(tiny_model, tmp_path, monkeypatch):
    path = tiny_model()
    names, read = tensor_reader(path)
    (tmp_path / "one").mkdir()
    write_shards(tmp_path / "one", ((name, read(name)) for name in names))
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    monkeypatch.setattr("saap.models.weight_files.SHARD_BYTES", 100_000)
    expected = load_model(path).state_dict()
    (path / "model.safetensors").unlink()
    tensors = load_file(tmp_path / "one/model.safetensors")
    write_shards(path, iter(tensors.items()))
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2 and all(file.stat().st_size <= 150_000 for file in shards)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    found = load_model(path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_folder_of_tensors_is_a_mapping(tmp_path):
    folder = TensorFolder(tmp_path, torch.bfloat16)
    folder["a"], folder["b"] = torch.tensor([1.0, 2.0]), torch.zeros(2, 3).t()
    folder["a"] = torch.tensor([3.0])
    assert dict(folder).keys() == {"a", "b"} and len(list(tmp_path.iterdir())) == 2
    assert torch.equal(folder["a"], torch.tensor([3.0], dtype=torch.bfloat16)) and folder["b"].shape == (3, 2)
    del folder["a"]
    assert list(folder) == ["b"] and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(KeyError):
        folder["a"]


def damaged(path, how):
    file = path / "model.safetensors"
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "a header that claims 2^63 bytes":
        file.write_bytes(b"\xff" * 7 + b"\x7f" + content[8:])
    elif how == "no safetensors":
        file.write_bytes(b"nothing of the kind")
    else:
        tensors = load_file(file)
        del tensors[how]
        save_file(tensors, file, metadata={"format": "pt"})


def test_sizes_that_the_weights_do_not_have_are_refused_before_a_plan(tiny_model):
    """A plan lists the channels of every width that a layer may keep: of widths that are not there, without end."""
    path = tiny_model()
    edited(path / "config.json", intermediate_size=1 << 20)
    with pytest.raises(UserError, match=r"down_proj.weight of \d+ x \d+, and its config.json makes it \d+ x 1048576"):
        budget_of(path, PruneOptions(ratio=0.2))


DAMAGE = {
    "truncated": "cannot be loaded|is damaged",
    "a header that claims 2^63 bytes": "cannot be loaded|is damaged",
    "no safetensors": "cannot be loaded|is damaged",
    "model.norm.weight": "has no tensor model.norm.weight",
    "model.embed_tokens.weight": r"has no tensor (model.embed_tokens|lm_head).weight",
    "model.layers.1.mlp.down_proj.weight": "has no tensor model.layers.1.mlp.down_proj.weight",
}
COMMANDS = (
    ("export", "--text", "TEXT", "-o", "OUT"),
    ("eval", "--text", "TEXT"),
    ("prune", "--ratio", "0.2", "--calibration", "TEXT", "-o", "OUT"),
    ("prune", "--ratio", "0.2", "--calibration", "TEXT", "-o", "OUT", "--stream"),
    ("tune", "--data", "TEXT", "-o", "OUT"),
)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_weights_are_named_and_nothing_is_written(how, tiny_model, tmp_path, monkeypatch):
    """All commands read weights in two ways, as a whole and tensor by tensor, so that two take every damage."""
    logged, handler = [], logging.Handler()
    monkeypatch.setattr(handler, "emit", logged.append)
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    path, text = tiny_model("model"), tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 4000)
    damaged(path, how)
    places = {"TEXT": text, "OUT": tmp_path / "out"}
    for command in COMMANDS if how in ("truncated", "model.layers.1.mlp.down_proj.weight") else COMMANDS[:2]:
        done = here(command[0], path, *(places.get(word, word) for word in command[1:]), code=2)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("saap: ") and re.search(DAMAGE[how], last) and "Traceback" not in done.stderr
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert [record.getMessage() for record in logged] == []  # its report would stand before our line


TYPES = [
    ("model.layers.1.mlp.up_proj.weight", torch.int32, "I32"),
    ("model.embed_tokens.weight", torch.int8, "I8"),
    ("model.norm.weight", torch.bool, "BOOL"),
    ("model.layers.0.self_attn.q_proj.weight", torch.float8_e4m3fn, "F8_E4M3"),
]


@pytest.mark.parametrize(("name", "dtype", "shown"), TYPES)
@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_no_floats_are_refused(command, name, dtype, shown, tiny_model, tmp_path):
    path, text = tiny_model("model"), tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 4000)
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: tensors[name].to(dtype)}, file, metadata={"format": "pt"})
    places = {"TEXT": text, "OUT": tmp_path / "out"}
    line = refused(command[0], path, *(places.get(word, word) for word in command[1:]))
    assert line == (
        f"saap: {file} has {name} of type {shown}: must be F32 or F16 or BF16 or F64; get the model again as floats"
    )


def test_buffers_may_be_integers(tiny_model):
    path = tiny_model()
    file = path / "model.safetensors"
    save_file({**load_file(file), "model.position_ids": torch.arange(9)}, file, metadata={"format": "pt"})
    assert "model.position_ids" in stored_tensors(path)
