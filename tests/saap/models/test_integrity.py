"""One flipped bit in any file that saap wrote is found when the file is read, or changes nothing that is read."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.bench_samples import measurement, result
from support.command_line import refused
from support.cost_files import cost_file
from support.exported import export_bundle
from support.slim_integers import WIDE

from bench.judge.baselines import Baseline, RegressionError, read_baselines, write_baseline
from bench.judge.quality import QualityError, read_quality
from bench.measure.result import ResultError, read_result, write_result
from export.bundle import Bundle
from export.bundle.manifest import BundleError
from saap.base.errors import UserError
from saap.base.quality import QUALITY
from saap.base.writing import read_object, write_document
from saap.models.checkpoint import load_model
from saap.models.record import read_record
from saap.models.shape import ModelShape
from saap.models.streaming import load_streamed
from saap.prune.options import AdaptiveOptions, PruneOptions
from saap.prune.pruning import prune
from saap.prune.scores.cache import keep_scores, read_scores, scores_path
from saap.prune.scores.scoring import scores_of
from saap.prune.search.layer_costs import read_costs
from saap.system.sealed_tensors import load_sealed, save_sealed
from saap.tune.teacher import Question, teacher_targets

IDS = torch.randint(320, (8, 16), generator=torch.Generator().manual_seed(3))
NAMED = (UserError, BundleError, ResultError, QualityError, RegressionError)


@contextmanager
def flipped(path: Path, draw: random.Random) -> Iterator[str]:
    """The file with one bit changed for the time of the block; where it is."""
    content = path.read_bytes()
    place, bit = draw.randrange(len(content)), 1 << draw.randrange(8)
    path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    try:
        yield f"{path.name}, byte {place}, bit {bit}"
    finally:
        path.write_bytes(content)


def holds(path: Path, read: Callable[[], Any], times: int = 40, same: Any = None) -> int:
    """Flip a bit ``times``; how often it was found. What is not found must read as before."""
    draw, found = random.Random(path.name), 0
    expected = read() if same is None else same
    for _ in range(times):
        with flipped(path, draw) as where:
            try:
                value = read()
            except NAMED as error:
                assert path.name in str(error) or str(path.parent) in str(error), where
                found += 1
                continue
        if isinstance(value, dict):  # a flip in the name of the checksum leaves a field that nobody reads
            value = {name: value.get(name) for name in expected}
        assert value == expected, where
    return found


@pytest.fixture(scope="module")
def pruned(llama, tmp_path_factory):
    home = tmp_path_factory.mktemp("pruned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAAP_CACHE", str(home / "cache"))
        prune(llama(home / "dense"), PruneOptions(ratio=0.3), output=home / "slim", calibration=IDS)
    return home / "slim"


@pytest.fixture
def slim(pruned, tmp_path):
    return shutil.copytree(pruned, tmp_path / "slim")


def test_a_slim_directory(slim):
    for name, entry in read_record(slim)["files"].items():
        assert (slim / name).stat().st_size == entry["bytes"]
        for load in (load_model, load_streamed):
            assert holds(slim / name, lambda load=load: load(slim) and 1, times=5) == 5
    (slim / "README.md").write_text("my own words\n")
    load_model(slim)
    load_streamed(slim)
    assert holds(slim / "saap.json", lambda: read_record(slim)) > 30


def test_a_slim_directory_that_its_owner_changed_on_purpose_and_records_of_files_elsewhere(slim):
    config = json.loads((slim / "config.json").read_text()) | {"max_position_embeddings": 128}
    (slim / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"config.json is damaged.*if the change is yours, remove its entry and the che"
    ):
        load_model(slim)
    record = json.loads((slim / "saap.json").read_text())
    del record["files"]["config.json"], record["checksum"]
    (slim / "saap.json").write_text(json.dumps(record))
    assert load_model(slim).config.max_position_embeddings == 128
    for name in ("../other", "/etc/hostname", "sub/file"):
        write_document(slim / "saap.json", record | {"files": {name: {"sha256": "0" * 64}}})
        with pytest.raises(UserError, match="is damaged"):
            load_model(slim)


def test_a_bench_holds_a_model_against_its_hashes_before_it_runs(slim):
    with flipped(slim / "model.safetensors", random.Random(2)):
        for command in (("bench", f"torch:{slim}"), ("compare", f"torch:{slim}", f"torch:{slim}")):
            assert "model.safetensors is damaged" in refused(*command)
        load_model(slim, verify=False)  # as the measured process does


def test_a_hub_cache_whose_blob_is_damaged(tiny_model, tmp_path):
    """The hub's cache links each large file to a blob that is named by its sha256."""
    from saap.base.files import sha256_file

    path = tmp_path / "models--org--name/snapshots/0123"
    path.parent.mkdir(parents=True)
    tiny_model().rename(path)
    weights = path / "model.safetensors"
    blob = path.parents[1] / "blobs" / sha256_file(weights)
    blob.parent.mkdir()
    weights.rename(blob)
    weights.symlink_to(f"../../blobs/{blob.name}")
    load_model(path)
    with flipped(blob, random.Random(0)), pytest.raises(UserError, match="remove it from the hub's cache"):
        load_model(path)


def test_a_bundle(tiny_model, tmp_path):
    export_bundle(tiny_model(**WIDE), tmp_path / "bundle")
    files = sorted(p for p in (tmp_path / "bundle").iterdir() if p.name != "bundle.json")
    for file in files:
        assert holds(file, lambda: Bundle.open(tmp_path / "bundle").check(), times=5) == 5
    assert holds(tmp_path / "bundle/bundle.json", lambda: Bundle.open(tmp_path / "bundle").check()) > 30


def test_results_and_other_documents(tmp_path):
    write_result(tmp_path / "result.json", result(measurement("a", [0.01, 0.011])))
    assert holds(tmp_path / "result.json", lambda: read_result(tmp_path / "result.json"), 200) > 150
    QUALITY.write(tmp_path / "eval.json", read_quality(Path(__file__).parents[2] / "support/old/760273a/quality.json"))
    assert holds(tmp_path / "eval.json", lambda: read_quality(tmp_path / "eval.json")) > 20
    costs, shape = cost_file(tmp_path / "cost.json"), ModelShape(96, 16, 320, True, ())
    write_document(costs, json.loads(costs.read_text()))
    assert holds(costs, lambda: read_costs(costs, shape, bits=4, group_size=32), 200) > 150
    baseline = write_baseline(tmp_path / "of", Baseline("a", [result(measurement("a", [0.01] * 5))]))
    assert holds(baseline, lambda: read_baselines(tmp_path / "of", "a"), 100) > 80
    write_document(tmp_path / "run.json", {"model": "a", "steps": [], "quality": {"rows": [1.5, 2]}})
    assert holds(tmp_path / "run.json", lambda: read_object(tmp_path / "run.json", "run again")) > 20


def test_documents_without_a_checksum_are_read_as_before(tmp_path):
    write_result(tmp_path / "a.json", result(measurement("a", [0.01])))
    raw = json.loads((tmp_path / "a.json").read_text())
    raw["measurements"][0]["name"] = "b"
    (tmp_path / "a.json").write_text(json.dumps(raw))
    with pytest.raises(
        ResultError, match=r"a.json is damaged \(it was changed after it was written; if that was you, rem"
    ):
        read_result(tmp_path / "a.json")
    del raw["checksum"]
    (tmp_path / "a.json").write_text(json.dumps(raw))
    assert read_result(tmp_path / "a.json").measurements[0].name == "b"


def test_caches_are_made_anew(tiny_model, tmp_path, monkeypatch):
    path = tiny_model()
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    calls = []

    def scores() -> list[float]:
        from saap.models.architectures import shape_of
        from saap.models.checkpoint import read_config

        def compute():
            calls.append("scores")
            return scores_of(load_model(path), shape_of(read_config(path)), IDS, AdaptiveOptions())

        place = scores_path("w", IDS, {})
        if (found := read_scores(place)) is None:
            keep_scores(place, found := compute())
        return [float(part.double().sum()) for part in (*found.products.values(), *found.token.values())]

    def teacher() -> Any:
        return [part.tolist() for part in teacher_targets(path, IDS, Question(k=4)).batch(0, 8)]

    for read, pattern in ((scores, "scores/*.safetensors"), (teacher, "teacher/*/*")):
        expected = read()
        (file,) = (tmp_path / "cache").glob(pattern)
        assert holds(file, read, 10, expected) == 0
    assert calls.count("scores") == 11


def test_the_cache_of_converted_models_is_made_anew(tmp_path):
    from saap.models.integrity import cached

    built = []

    def build(out: Path) -> None:
        built.append(1)
        (out / "model.safetensors").write_bytes(bytes(range(256)))

    for _ in range(2):
        cached(tmp_path / "cache/a", build, "0" * 64)
    assert len(built) == 1
    weights = tmp_path / "cache/a/model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"\xff" + weights.read_bytes()[1:])
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    cached(tmp_path / "cache/a", build, "0" * 64)
    assert len(built) == 2 and weights.read_bytes() == bytes(range(256))


def test_sealed_tensors(tmp_path):
    tensors = {"a": torch.arange(12.0).reshape(3, 4).t(), "b": torch.zeros(0), "c": torch.ones(3, dtype=torch.bfloat16)}
    save_sealed(tensors, tmp_path / "t", {"said": "x"})
    read, about = load_sealed((tmp_path / "t").read_bytes())
    assert about == {"said": "x"} and read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    draw, content = random.Random(1), (tmp_path / "t").read_bytes()
    for _ in range(300):
        with flipped(tmp_path / "t", draw) as where, pytest.raises(ValueError):
            pytest.fail(f"{where}: {load_sealed((tmp_path / 't').read_bytes())}")
    for size in range(0, len(content), 7):
        with pytest.raises(ValueError):
            load_sealed(content[:size])
    with pytest.raises(OSError):
        save_sealed(tensors, tmp_path / "no" / "t")
