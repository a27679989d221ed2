"""What import-linter (``make lint``) cannot say of imports: what the agent needs, what is heavy, what is dangerous."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("saap", "export", "bench", "devices")


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("**/*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", files("devices/agent"), ids=lambda path: path.name)
def test_the_agent_needs_python_alone(path):
    others = {name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}
    assert all(name.startswith("devices.agent.") for name in others), others


def test_what_a_board_or_a_page_of_help_needs_has_no_torch():
    """In one process, which names the first of these modules that brings something heavy."""
    light = (
        "saap", "saap.cli.main", "saap.prune.options", "saap.tune.options", "saap.evaluate.options", "export.options",
        "export.bundle.manifest", "export.bundle.tokenizer", "export.generate.text", "devices.probe.host",
        "devices.fit.fitting",
    )  # fmt: skip
    bench = (str(path.relative_to(ROOT).with_suffix("")).replace("/", ".") for path in files("bench"))
    script = f"""
import importlib, sys
for name in {(*light, *bench)}:
    importlib.import_module(name)
    heavy = {{"torch", "transformers", "onnx", "onnxruntime", "scipy"}} & set(sys.modules)
    assert not heavy, (name, heavy)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "path", [p for package in OURS for p in files(package)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_pickle_and_no_shell(path):
    assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "cloudpickle", "joblib"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in ("shell", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False, f"{path}: {node.arg}"
        if isinstance(node, ast.Attribute) and node.attr == "load":
            assert not (isinstance(node.value, ast.Name) and node.value.id == "torch"), f"{path}: torch.load unpickles"
