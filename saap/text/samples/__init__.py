"""The small texts that ship with saap: the default wherever no text is given.

NOTICE.md beside them has sources and licences, and says how they were cut.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

from saap.base.errors import UserError

FOLDER = Path(__file__).parent
TRAINING = ("web.jsonl", "encyclopedia.jsonl", "instructions.jsonl")
EVALUATION = "wikitext2_test.txt"
SHA256 = {  # of what the .gz files hold
    "web.jsonl": "5d3e433b53f6a3709ef9d508e8ca8ab0ae54e7e55df1bb3239eb97e3d1a77d8e",
    "encyclopedia.jsonl": "6e1340061ce580f6b8720e865f1914632f7755ab6e463a474dc687cce2743762",
    "instructions.jsonl": "e4d1202abb9c95f9fe785130fb9015ae994effb8f0744b19d56484c8acbdaa65",
    "wikitext2_test.txt": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
}


def read_sample(name: str) -> str:
    """Read a sample. Raises UserError: it is damaged."""
    path = FOLDER / f"{name}.gz"
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error):
        content = b""
    if hashlib.sha256(content).hexdigest() != SHA256[name]:
        raise UserError(f"the sample {path} is damaged: install saap again, or give a text of your own")
    return content.decode("utf-8")
