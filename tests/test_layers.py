"""Who may import whom: the rules of the architecture, held on the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"saap", "export", "bench", "devices"}
# The command line's room, which may import everything, but the light part at module level only.
COMMANDS = {f"saap/{name}.py" for name in ("board", "chat", "cli", "console", "pipeline", "steps")} | {
    path.relative_to(ROOT).as_posix() for kind in ("cli_*.py", "*_command.py") for path in (ROOT / "saap").glob(kind)
}
# Peers that run as __main__ in a process of their own.
PEERS = {"torch_worker.py", "optimum_worker.py"}
STANDARD = sys.stdlib_module_names | {"tomllib"}  # of Python 3.11
HEAVY = {"torch", "transformers", "onnx", "onnx_ir", "optimum", "peft", "lm_eval"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("**/*.py"))


def top(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("path", files("devices"), ids=str)
def test_devices_import_nothing_of_ours_and_nothing_heavy(path):
    allowed = {"devices", "psutil", "tomli"} | STANDARD
    assert {top(name) for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", files("bench"), ids=str)
def test_bench_imports_no_torch_and_only_the_bundle_of_export(path):
    found = imports(path)
    ours = {name for name in found if top(name) in OURS - {"bench"}}
    if path.name in PEERS:
        return
    assert all(
        name.startswith(("devices.", "export.bundle.manifest", "export.bundle.external_data")) for name in ours
    ), ours
    if path.match("runtimes/facts.py"):  # counts a peer's graph, where the onnx package is installed
        found = {name for name in found if top(name) != "onnx"}
    assert not {top(name) for name in found} & HEAVY


@pytest.mark.parametrize("path", files("export"), ids=str)
def test_export_imports_no_bench(path):
    assert "bench" not in {top(name) for name in imports(path)}


@pytest.mark.parametrize("path", files("saap"), ids=str)
def test_the_core_imports_neither_export_nor_bench(path):
    if path.relative_to(ROOT).as_posix() in COMMANDS:
        return
    # The memory limit of this process's own group, checksums and the header of a GGUF file are no matter of boards.
    ours = ("devices.common.cgroup.", "devices.common.files.", "devices.common.gguf_header.")
    found = {name for name in imports(path) if not name.startswith(ours)}
    assert not {top(name) for name in found} & {"export", "bench", "devices"}


@pytest.mark.parametrize("name", ["bundle", "run", "tokenizer", "clients"])
def test_the_part_of_export_that_runs_on_a_board_has_no_torch(name):
    script = f"import sys, export.{name}; assert not {{'torch', 'transformers', 'onnx'}} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", [p for package in sorted(OURS) for p in files(package)], ids=str)
def test_no_pickle_and_no_shell(path):
    found = imports(path)
    assert not {top(name) for name in found} & {"pickle", "dill", "cloudpickle", "joblib"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path}: {node.arg}"
        if isinstance(node, ast.Attribute) and node.attr == "load":
            assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"{path}: torch.load unpickles"
