"""What old commits wrote, whole again: ``tests/support/old`` keeps a file once that stands in several products."""

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

HOME = Path(__file__).parent / "old"


@cache
def old_products(commit: str = "760273a") -> Path:
    """The folder of all products of a commit, until this process ends."""
    place = Path(tempfile.mkdtemp(prefix="old-products-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    shutil.copytree(HOME / commit, place / commit)
    for copy, source in json.loads((HOME / "copies.json").read_text(encoding="utf-8")).items():
        if copy.startswith(commit):
            (place / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(HOME / source, place / copy)
    return place / commit
