"""A watch for what unpickles: ``torch.load``, in this process and in those that it starts.

Children import ``sitecustomize`` from PYTHONPATH when they start; there it waits until torch is imported.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

WATCH = """
import importlib.abc, importlib.util, sys, traceback

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch.serialization":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def watched(module):
            execute(module)
            module.load = noted

        spec.loader.exec_module = watched
        return spec

def noted(*args, **kwargs):
    with open({log!r}, "a") as log:
        log.write("".join(traceback.format_stack()))
    raise RuntimeError("a pickle is loaded")

sys.meta_path.insert(0, Watch())
"""


@contextmanager
def no_pickles(folder: Path) -> Iterator[Path]:
    """The block must load no pickle; yields the file in which a process notes that it would have.

    ``folder``: for that file and for ``sitecustomize``.
    """
    folder.mkdir(exist_ok=True)
    log = folder / "loaded.txt"
    (folder / "sitecustomize.py").write_text(WATCH.format(log=str(log)))

    def noted(*args: object, **kwargs: object) -> None:
        log.write_text("here")
        raise RuntimeError("a pickle is loaded")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", noted)
        patch.setattr(torch.serialization, "load", noted)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield log
        assert not log.exists(), log.read_text()
