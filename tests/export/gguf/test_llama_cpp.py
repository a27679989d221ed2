"""Integers of llama.cpp's own quantizer: how it is called, and with a real one what it writes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.fake_trees import plant
from support.slim_integers import write_integers

from export import ExportOptions, export
from export.gguf.llama_cpp import quantizer
from saap.base.errors import UserError
from saap.base.interpreters import PEER_PYTHON

OPTIONS = ExportOptions(target="gguf", integers="llama.cpp")
# A library of that name: it knows one type, copies what it is given, and notes how it was asked.
COPIES = """
import pathlib, sys
LLAMA_FTYPE_MOSTLY_Q4_0 = 2
def llama_model_quantize_default_params():
    import ctypes
    return type("Params", (ctypes.Structure,), {"_fields_": [("ftype", ctypes.c_int)]})()
def llama_model_quantize(source, out, params):
    data = pathlib.Path(source.decode()).read_bytes()
    pathlib.Path(out.decode()).write_bytes(data)
    if FAILS:
        print("it cannot", file=sys.stderr)
    return FAILS
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make an interpreter with a ``llama_cpp`` of this source."""
    if os.name != "posix":
        pytest.skip("the stand-in interpreter is a shell script")

    def make(source: str) -> None:
        script = f'#!/bin/sh\nPYTHONPATH={tmp_path}/packages exec {sys.executable} "$@"\n'
        files = {"packages/llama_cpp/__init__.py": "", "packages/llama_cpp/llama_cpp.py": source, "python": script}
        python = plant(tmp_path, files) / "python"
        python.chmod(0o755)
        monkeypatch.setenv(PEER_PYTHON, str(python))

    return make


def test_a_file_of_floats_is_quantized_in_another_process(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    stand_in: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(COPIES.replace("FAILS", "0"))
    monkeypatch.chdir(tmp_path)  # where the other process does not run
    out = Path("out/model.gguf")
    result = export(tiny_model(), OPTIONS, output=out)
    assert (result.gguf.file, result.gguf.kind, result.gguf.bytes) == (out, "Q4_0", out.stat().st_size)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "F16"  # as it was given
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]
    export(tiny_model(), OPTIONS, output=out)  # over its own file


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        (OPTIONS, COPIES.replace("FAILS", "1"), "llama.cpp wrote no Q4_0 of model.gguf: exit 1: it cannot"),
        (
            ExportOptions(target="gguf", integers="llama.cpp", gguf_type="Q9"),
            COPIES,
            "llama.cpp wrote no Q9 of model.gguf: exit 1: it knows no type Q9",
        ),
        (OPTIONS, "import os; os.abort()", "killed by SIGABRT"),
    ],
    ids=["fails", "no such type", "crashes"],
)
def test_what_the_quantizer_refuses_is_one_line(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    stand_in: Callable[[str], None],
    options: ExportOptions,
    source: str,
    message: str,
) -> None:
    stand_in(source)
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(UserError, match=message) as caught:
        export(tiny_model(), options, output=out)
    assert "\n" not in str(caught.value)
    assert [*out.parent.iterdir()] == []


def test_integers_are_not_quantized_again(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    tuned = write_integers(tiny_model(), tmp_path / "tuned")
    with pytest.raises(UserError, match=r"--integers is for floats, and .*tuned holds integers"):
        export(tuned, OPTIONS, output=tmp_path / "model.gguf")


def test_a_real_quantizer_rounds_to_the_nearest_of_its_blocks(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    try:
        quantizer()
    except UserError as error:
        pytest.skip(str(error))
    path = tiny_model()
    export(path, OPTIONS, output=tmp_path / "q4.gguf")
    export(path, ExportOptions(target="gguf", bits=16), output=tmp_path / "floats.gguf")
    given, found = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
        for name in ("floats.gguf", "q4.gguf")
    )
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items() if tensor.tensor_type.name != "F32"}
    assert kinds.pop("token_embd.weight") == "Q8_0"  # also the head, which llama.cpp keeps in more bits
    assert set(kinds.values()) == {"Q4_0"} and len(kinds) > 6
    q4 = gguf.GGMLQuantizationType.Q4_0
    for name in kinds:
        rounded = gguf.quants.quantize(given[name].data.astype(np.float32), q4)
        assert np.array_equal(found[name].data.reshape(rounded.shape), rounded), name
