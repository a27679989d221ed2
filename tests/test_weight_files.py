"""Weights in several files, and tensors put aside on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file

from saap.checkpoint import load_model
from saap.weight_files import TensorFolder, tensor_reader, write_shards


def test_small_weights_are_one_file_and_large_ones_several_that_transformers_reads(tiny_model, tmp_path, monkeypatch):
    path = tiny_model()
    names, read = tensor_reader(path)
    (tmp_path / "one").mkdir()
    write_shards(tmp_path / "one", ((name, read(name)) for name in names))
    assert [file.name for file in (tmp_path / "one").iterdir()] == ["model.safetensors"]
    monkeypatch.setattr("saap.weight_files.SHARD_BYTES", 100_000)
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
