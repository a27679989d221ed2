"""What is shipped and what it is installed with: the wheel's content, and constraints that fit the project's bounds."""

import gzip
import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from export.engine.table import ROWS
from saap.text.samples import SHA256
from studies.common import read_cells, with_tables
from studies.install import study as install

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

ROOT = Path(__file__).resolve().parent.parent
NOTICE = "saap/text/samples/NOTICE.md"
OURS = {"saap", "export", "bench", "devices"}


def test_a_wheel_holds_our_four_packages_and_nothing_else(tmp_path):
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("saap-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == OURS
    sources = {p.relative_to(ROOT).as_posix() for top in OURS for p in (ROOT / top).rglob("*.py")}
    assert sources <= set(names)
    assert wheel.stat().st_size <= 2_500_000
    samples = {f"saap/text/samples/{name}.gz" for name in SHA256}
    assert {name for name in names if name.endswith(".gz")} == samples
    with zipfile.ZipFile(wheel) as archive:
        for name in SHA256:
            content = gzip.decompress(archive.read(f"saap/text/samples/{name}.gz"))
            assert hashlib.sha256(content).hexdigest() == SHA256[name]
        (metadata,) = (name for name in names if name.endswith("METADATA"))
        assert re.findall(r"License-\S+: .*", archive.read(metadata).decode()) == [
            "License-Expression: Apache-2.0 AND ODC-By-1.0 AND CC-BY-SA-3.0 AND CC-BY-SA-4.0",
            "License-File: LICENSE",
            f"License-File: {NOTICE}",
        ]
    kinds = {Path(name).suffix for name in names if ".dist-info/" not in name}
    assert kinds <= {".py", ".toml", ".jinja", ".css", ".js", ".typed", ".sh", ".gz", ".md", ".txt"}, kinds
    assert {name for name in names if name.endswith(".txt") and ".dist-info/" not in name} == {
        "saap/evaluate/prompts.txt"
    }
    assert {name for name in names if name.endswith(".md") and ".dist-info/" not in name} == {NOTICE}
    assert not [name for name in names if "devices/baselines" in name or Path(name).name.startswith("test_")]


def test_a_board_needs_few_packages():
    assert len(install.direct("bench")) <= 12
    assert install.direct("bench") >= install.direct(install.BASE) | {"numpy", "onnxruntime", "tokenizers"}
    assert "torch" not in install.direct("bench") and "torch" in install.direct("tasks")  # by an extra of ours


def install_lines() -> dict[str, str]:
    """What pages tell a reader to install, and the page that says so first; a board's own lines are printed."""
    lines: dict[str, str] = {}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs/nightly.yml"):
        for line in re.findall(r"\bpip install [^`#\n]*[^`#\s]", page.read_text()):
            lines.setdefault(line, page.name)
    return lines


def test_install_lines_name_extras_that_there_are():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    ours = [line for line in install_lines() if "[" in line]
    assert len(ours) >= 7
    for line in ours:
        (listed,) = re.findall(r"\[([\w,-]+)\]", line)
        assert set(listed.split(",")) <= extras, line
    published = [line for line in ours if "'saap[" in line]
    assert [install_lines()[line] for line in published] == ["install.md"]  # what changes on the day of publication


@pytest.mark.slow
# Neither what will be published nor what comes from another index than PyPI.
@pytest.mark.parametrize("line", [line for line in install_lines() if not re.search(r"'saap\[|--index-url", line)])
def test_an_install_line_works_in_a_fresh_environment(line, tmp_path):
    """In a copy of the checkout, with the wheel of `make wheel` in the working directory."""
    checkout = tmp_path / "saap"
    subprocess.run(["git", "clone", "-q", ROOT, checkout], check=True)
    subprocess.run([sys.executable, "-m", "venv", checkout / ".venv"], check=True)
    env = {**os.environ, "PATH": f"{checkout / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"}
    if ".whl" in line:
        subprocess.run(["make", "wheel", f"PYTHON={sys.executable}"], cwd=checkout, env=env, check=True)
        (wheel,) = checkout.glob("dist/*.whl")
        wheel.rename(checkout / wheel.name)
    subprocess.run(["bash", "-c", line], cwd=checkout, env=env, check=True)
    if "saap" in line or "-e " in line:
        subprocess.run([checkout / ".venv/bin/saap", "--version"], check=True)


def test_a_board_gets_the_engines_that_their_extras_install():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for row in ROWS:
        if row.requirement:
            assert [row.requirement] in extras.values() and row.requirement.startswith(row.install)


def test_the_page_tells_what_every_extra_installs():
    """`python -m studies.install.study table --write` mends it."""
    page = (ROOT / "docs" / "install.md").read_text()
    assert with_tables(page, install.tables()) == page
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {install.BASE, *project["optional-dependencies"]}
    assert set(install.FOR) == extras
    measured = {cell["extra"]: cell for cell in read_cells(install.CELLS)}
    assert measured.keys() >= {install.BASE, "bench", "prune"}
    assert 5 < measured[install.BASE]["megabytes"] < measured["bench"]["megabytes"] < measured["prune"]["megabytes"]
    assert all(f"| `{extra}` | " in page for extra in extras - {install.BASE})


def test_megabytes_are_of_what_was_installed(tmp_path):
    for name, size in {"pip/a": 500_000, "numpy/core/b": 1_500_000, "c.py": 250_000, "setuptools-1/d": 9}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "link").symlink_to(tmp_path / "c.py")
    assert install.megabytes(tmp_path) == 1.75


def test_the_constraints_meet_the_bounds_of_every_extra():
    requirements = pytest.importorskip("packaging.requirements")
    pins = {}
    text = (ROOT / "constraints.txt").read_text()
    made_on = re.search(r"Python (3\.\d+)", text)[1]
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower().replace("_", "-")] = version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    del extras["optimum"]  # which wants older releases
    asked = project["dependencies"] + [r for extra in extras.values() for r in extra]
    python = {"extra": "", "python_version": made_on}
    for text in asked:
        requirement = requirements.Requirement(text)
        if requirement.name == "saap" or (requirement.marker and not requirement.marker.evaluate(python)):
            continue
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name], prereleases=True), text
        else:
            assert requirement.name in {"nvidia-ml-py", "llama-cpp-python"}, (
                f"{text} is not in constraints.txt: run `make constraints.txt`"
            )
