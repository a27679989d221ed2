"""``python -m saap``: what the command ``saap`` does."""

import sys
from importlib import import_module

# ``-m`` puts the working directory first, where a torch.py or a bench/ may stand that is not meant.
sys.path[:] = sys.path if getattr(sys.flags, "safe_path", False) else sys.path[1:]
import_module("saap.cli.main").main()
