import json
from dataclasses import replace

import pytest
import torch

from saap.base.errors import UserError
from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.record import read_record
from saap.prune import pruning
from saap.prune.options import PruneOptions
from saap.prune.plan import whole_layer
from saap.prune.pruning import prune
from saap.text.rows import Rows

IDS = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_asked_planned_achieved(tiny_model, tmp_path, ratio):
    """No block goes whole: a run of them may be cheaper than anything that removes less."""
    path = tiny_model()
    prune(path, PruneOptions(ratio=ratio, keep=frozenset({"blocks"})), output=tmp_path / "slim", calibration=IDS)
    dense, slim = load_model(path), load_model(tmp_path / "slim")
    weights = [sum(p.numel() for p in m.model.layers.parameters()) for m in (dense, slim)]
    plan = read_record(tmp_path / "slim")["plan"]
    assert plan["asked"] == {"ratio": ratio}
    assert plan["achieved"]["ratio"] == pytest.approx(1 - weights[1] / weights[0])
    assert plan["achieved"]["ratio"] == plan["planned"]["ratio"]
    assert ratio <= plan["achieved"]["ratio"] <= ratio + 0.06  # a tiny model has coarse steps
    assert plan["achieved"]["parameters"] == sum(p.numel() for p in slim.parameters())
    assert torch.isfinite(slim(input_ids=IDS).logits).all()


def test_lineage_names_base_text_and_versions(tiny_model, tmp_path):
    path, rows = tiny_model(), Rows(IDS, "dice", None)
    result = prune(path, PruneOptions(ratio=0.2), output=tmp_path / "slim", calibration=rows)
    record = json.loads((tmp_path / "slim/saap.json").read_text())
    lineage = record["lineage"]
    assert lineage["base"] == str(path)
    assert lineage["calibration"]["source"] == result.text == "dice"
    assert lineage["calibration"]["sequences"] == 8
    assert len(lineage["base_sha256"]) == len(lineage["calibration"]["sha256"]) == 64
    assert set(lineage["versions"]) == {"saap", "torch", "transformers"}
    assert record["plan"]["achieved"] == result.achieved and result.path == tmp_path / "slim"
    assert record["plan"]["asked"] == result.budget.asked


def test_a_text_is_read_as_the_options_say(tiny_model, tmp_path, river, monkeypatch):
    asked = PruneOptions(ratio=0.2, sequences=6, length=16)
    with monkeypatch.context() as few:
        few.setattr(pruning, "LONG_TEXT", 48)  # three more rows, to find long windows in
        counts = {
            method: len(pruning.calibration_rows(tiny_model(), str(river), replace(asked, method=method)).ids)
            for method in ("saap", "flap", "shortgpt")
        }
        assert counts == {"saap": 15, "flap": 6, "shortgpt": 6}
    result = prune(tiny_model(), asked, output=tmp_path / "slim", calibration=river)
    said = read_record(tmp_path / "slim")["lineage"]["calibration"]
    assert (said["sequences"], said["tokens"], said["source"]) == (12, 16, result.text) and str(river) in result.text
    short = tmp_path / "short.txt"  # which has not twice as many for the refit
    short.write_text("\n".join(f"She sold {i} boats." for i in range(9)))
    prune(tiny_model(), asked, output=tmp_path / "less", calibration=short)
    assert read_record(tmp_path / "less")["lineage"]["calibration"]["sequences"] == 6


def test_several_processes_are_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="pruning runs in one process: start it without accelerate launch"):
        prune(tiny_model(), PruneOptions(ratio=0.3), output=tmp_path / "slim", calibration=IDS)


def test_layers_that_are_kept_stay_whole(tiny_model, tmp_path):
    options = PruneOptions(ratio=0.3, keep_layers=frozenset({1}))
    plan = prune(tiny_model(), options, output=tmp_path / "slim", calibration=IDS).plan
    assert plan.layers[1] == whole_layer(shape_of(read_config(tmp_path / "slim")).layers[1])
    assert len(plan.layers[1].ffn) == 128


def test_the_plan_indexes_into_the_base_model(tiny_model, tmp_path):
    path, options = tiny_model(), PruneOptions(ratio=0.4, compensate="none")
    plan = prune(path, options, output=tmp_path / "slim", calibration=IDS).plan
    record = read_record(tmp_path / "slim")["plan"]
    assert record["achieved"]["ratio"] >= 0.4
    assert [layer["ffn"] for layer in record["layers"]] == [list(layer.ffn) for layer in plan.layers]
    dense, slim = load_model(path), load_model(tmp_path / "slim")
    for index, after in zip(plan.kept_layers, slim.model.layers, strict=True):
        keep, before = plan.layers[index], dense.model.layers[index]
        if keep.ffn:
            assert torch.equal(before.mlp.down_proj.weight[:, list(keep.ffn)], after.mlp.down_proj.weight)


@pytest.mark.parametrize("error", [OSError(28, ""), KeyboardInterrupt()])
def test_a_pruning_that_ends_early_leaves_nothing(tiny_model, tmp_path, monkeypatch, error):
    path = tiny_model()
    (tmp_path / ".slim.pruning").mkdir()  # of one that was killed

    def failing(*arguments):
        raise error

    monkeypatch.setattr(pruning, "write_trimmed", failing)
    with pytest.raises(type(error)):
        prune(path, PruneOptions(ratio=0.3, stream=True), output=tmp_path / "slim", calibration=IDS)
    assert {p.name for p in tmp_path.iterdir()} == {path.name}
