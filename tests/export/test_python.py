"""Export and text as functions of Python: typed results, nothing printed, nothing heavy before it is needed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from export import ExportOptions, export
from export.bundle.manifest import read_manifest
from export.generate import GenerateOptions, generate
from saap.system.errors import UserError

HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "tokenizers", "numpy"}


def test_a_bundle_and_its_text(tiny_model: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    seen: list[str] = []
    options = ExportOptions(bits=8)
    result = export(tiny_model(), options, output=tmp_path / "bundle", progress=lambda what, *_: seen.append(what))
    assert result.path == tmp_path / "bundle" and result.gguf is None
    assert result.manifest == read_manifest(tmp_path / "bundle") and result.manifest.bits == 8
    assert result.manifest.parity.tokens == 4 * 256 and "writing weights" in seen
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
        ({"gguf_type": "F16"}, "--type is for --target gguf"),
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
        "import export.generate.text, export.bundle.inspect, export.generate.scoring\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
