"""Prune anything: the masked dense model and the slim model give the same logits."""

import json
import os
import subprocess
import sys

import pytest
import torch
from support.cuts import EMPTY, PLANS, WHOLE, cut
from support.masking import masked

from saap.base.errors import UserError
from saap.models.checkpoint import load_model, read_config, write_slim
from saap.prune.cut.surgery import head_rows
from saap.prune.plan import PrunePlan


def logits(model, ids):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("layers", PLANS.values(), ids=PLANS.keys())
def test_slim_equals_masked_dense(tiny_model, tmp_path, layers):
    path = tiny_model()
    dense, ids = load_model(path), torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))
    with masked(dense, dict(enumerate(layers))):
        expected = logits(dense, ids)
    slim = load_model(cut(path, tmp_path / "slim", PrunePlan(layers)))
    assert (logits(slim, ids) - expected).abs().max() <= 1e-5
    assert (logits(load_model(path), ids) == logits(dense, ids)).all(), "the mask was not taken off"


def test_saving_again_gives_the_same_weights_and_the_file_that_the_config_names(tiny_model, tmp_path):
    slim = cut(tiny_model(), tmp_path / "slim", PrunePlan(PLANS["random 3"]))
    load_model(slim).save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "modeling_slim.py"):
        assert (tmp_path / "again" / name).read_bytes() == (slim / name).read_bytes()
    mapped = json.loads((tmp_path / "again/config.json").read_text())["auto_map"]
    assert mapped == json.loads((slim / "config.json").read_text())["auto_map"]


def test_sidecars_travel(tiny_model, tmp_path):
    slim = cut(tiny_model(), tmp_path / "slim", PrunePlan((WHOLE, EMPTY, WHOLE)))
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "README.md", "saap.json"):
        assert (slim / name).is_file(), name
    assert load_model(slim).generation_config.eos_token_id == [2, 0]


def test_head_rows():
    assert head_rows((1, 3), 2).tolist() == [2, 3, 6, 7]


def test_an_output_directory_with_other_files_is_refused(tiny_model, tmp_path):
    out = tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other files"):
        cut(tiny_model(), out, PrunePlan((WHOLE,) * 3))
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_a_failed_write_leaves_nothing_behind(tiny_model, tmp_path):
    path = tiny_model()

    def broken():
        yield "model.norm.weight", torch.ones(96)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_slim(tmp_path / "slim", path, read_config(path), broken(), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny"]


def test_leftovers_of_a_killed_process_are_removed_and_those_of_a_live_one_are_not(tiny_model, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    dead, alive = (tmp_path / f".slim.partial-{pid}" for pid in (killed.pid, os.getppid()))
    dead.mkdir()
    alive.mkdir()
    cut(tiny_model(), tmp_path / "slim", PrunePlan((WHOLE,) * 3))
    assert not dead.exists() and alive.exists()


def test_a_newer_format_is_refused(tiny_model, tmp_path):
    slim = cut(tiny_model(), tmp_path / "slim", PrunePlan((WHOLE,) * 3))
    (slim / "saap.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        load_model(slim)
