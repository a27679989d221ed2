"""Export and text as functions of Python: typed results, nothing printed, nothing heavy before it is needed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from export import ExportOptions, export
from export.bundle.manifest import read_manifest
from export.engine.scoring import BundleScorer
from export.generate import GenerateOptions, generate
from export.options import PARITY_TOKENS
from export.write import sample_rows
from saap.base.errors import UserError
from saap.models.checkpoint import load_model
from saap.models.weight_files import weights_hash

HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "tokenizers", "numpy"}


def test_a_bundle_and_its_text(tiny_model: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    seen: list[str] = []
    options = ExportOptions(bits=8)
    model = tiny_model()
    capfd.readouterr()  # transformers writes a bar when it saves
    result = export(model, options, output=tmp_path / "bundle", progress=lambda what, *_: seen.append(what))
    assert result.path == tmp_path / "bundle" and result.gguf is None
    assert result.manifest == read_manifest(tmp_path / "bundle") and result.manifest.bits == 8
    assert result.manifest.parity.tokens == 4 * 256 and "writing weights (layers)" in seen
    pieces: list[str] = []
    answer = generate(result.path, "The quick brown fox", GenerateOptions(max_tokens=5), on_text=pieces.append)
    assert "".join(pieces) == answer.text and (answer.n_gen, len(answer.ids)) == (5, 5)
    assert answer.stop_reason == "length" and answer.prefill_seconds > 0
    assert capfd.readouterr() == ("", "")


def test_a_gguf_file(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    result = export(tiny_model(), ExportOptions(target="gguf", bits=8), output=tmp_path / "model.gguf")
    assert result.manifest is None and result.gguf.bytes == result.path.stat().st_size
    assert result.gguf.kind == "Q8_0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "cuda", "bits": 32}, "32 bits are not supported for the cuda target; allowed: 4, 8, 16"),
        ({"target": "portable", "kv_bits": 8}, "--kv is for --target cpu: leave it out"),
        ({"target": "gguf", "parity": "none"}, "--parity is for bundles, and a GGUF file is none"),
        ({"target": "gguf", "integers": "nearest"}, "--integers is for bundles, and a GGUF file is none"),
        ({"bits": 32, "integers": "nearest"}, "--integers is for integers, and these weights are floats"),
        ({"gguf_type": "F16"}, "--type is for --target gguf"),
        ({"integers": "llama.cpp"}, "--integers llama.cpp is for --target gguf: give gptq or nearest"),
        (
            {"target": "gguf", "integers": "llama.cpp", "head_bits": 8},
            "--head-bits is for types that saap chooses, and llama.cpp chooses its own",
        ),
        ({"target": "gguf", "integers": "llama.cpp", "bits": 16}, "--integers is for integers, and these weights"),
        ({"target": "tpu"}, "--target tpu is not allowed: give cpu, cuda, portable or gguf"),
        ({"group_size": 48}, "--group-size 48 is not allowed: give 32, 64 or 128"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export("nowhere", ExportOptions(**options), output=tmp_path / "bundle")


def test_options_import_nothing_heavy_and_what_runs_on_a_board_no_torch() -> None:
    script = (
        "import sys, export, export.options, export.generate.options, export.bundle.manifest\n"
        f"assert not {HEAVY!r} & set(sys.modules), 'heavy'\n"
        "import export.generate.text, export.bundle.inspect, export.engine.scoring\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_dense_model_s_integers_are_chosen_by_text(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Worse one by one, they compute nearer to what the floats compute; the bundle is still of the floats."""
    path, errors = tiny_model(), {}
    for integers in ("nearest", "gptq"):
        out = tmp_path / integers
        manifest = export(path, ExportOptions(integers=integers, dotprod=False), output=out).manifest
        assert manifest.lineage["model_sha256"] == weights_hash(path)
        ids = sample_rows(path, None, 1).ids
        wanted = load_model(path)(ids).logits.detach().numpy()
        errors[integers] = float(np.square(BundleScorer(out).logits(ids.numpy()) - wanted).mean())
    assert errors["gptq"] < 0.8 * errors["nearest"]
    assert manifest.lineage["integers"]["tokens"] == PARITY_TOKENS
    assert sorted(place.name for place in tmp_path.iterdir() if place.is_dir()) == ["gptq", "nearest", "tiny"]
