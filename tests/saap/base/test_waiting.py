import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import sys
from saap.cli.main import main
sys.argv = ["saap", "--version"]
try:
    main()
except SystemExit:
    pass
import torch
"""


@pytest.mark.parametrize(("given", "here"), [({}, {"3000"}), ({"GOMP_SPINCOUNT": "7"}, {"7"})])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given: dict[str, str], here: set[str]) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    env |= {"OMP_DISPLAY_ENV": "VERBOSE", **given}  # libgomp then says what it has read
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(re.findall(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)) == here


@pytest.mark.parametrize(("given", "there"), [({}, "None"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_what_is_measured_waits_as_its_builders_chose(given: dict[str, str], there: str) -> None:
    script = "from saap.base.waiting import *\nsleep_while_waiting()\n"
    script += "print(environment_of_others().get('GOMP_SPINCOUNT'))"
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | given
    done = subprocess.run([sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == there
