"""ONNX's own implementation of its operators, that graphs of standard ones are held against."""

from pathlib import Path
from typing import Any

import numpy as np
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class Gather(OpRun):
    """Theirs stops at indices that are not contiguous, until onnx 1.22 at least."""

    op_domain = ""

    def _run(self, x: Any, indices: Any, axis: int | None = None) -> tuple[Any]:
        return (np.take(x, indices.astype(np.int64), axis=axis),)


def reference(path: Path) -> ReferenceEvaluator:
    """A session of the reference implementation."""
    return ReferenceEvaluator(str(path), new_ops=[Gather])
