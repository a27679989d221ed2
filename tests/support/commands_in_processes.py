"""Commands one after the other in the processes that start this: python commands_in_processes.py OUT COMMANDS.

What each of them printed and its exit code are in OUT/<rank>.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from support.command_line import here
from support.fast_passes import skip_packing

if __name__ == "__main__":
    skip_packing()
    said = [vars(here(*words, code=None)) for words in json.loads(sys.argv[2])]
    Path(sys.argv[1], f"{torch.distributed.get_rank()}.json").write_text(json.dumps(said), encoding="utf-8")
    torch.distributed.destroy_process_group()
