"""Open a model directory to run it forward, by the way that memory allows."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from saap.models.architectures import shape_of
from saap.models.checkpoint import load_model, read_config
from saap.models.streaming import load_streamed
from saap.system.errors import UserError
from saap.system.needs import PROCESS, Needs, available_memory, fits, gigabytes


def whole_needs(path: str | Path) -> Needs:
    """Of a model in memory with float32 weights."""
    return Needs({"the process": PROCESS, "weights": 4 * shape_of(read_config(path)).parameters})


def open_model(path: str | Path) -> PreTrainedModel:
    """A directory to run forward: as a whole in float32 where it fits; else integers as they are, or layer by layer.

    Raises:
        UserError: no model there.
    """
    if fits(whole_needs(path)):
        return load_model(path, materialise=True)
    if read_config(path).get("slim_quant"):
        return load_model(path)
    return load_streamed(path)


def open_writer(path: str | Path, option: str) -> PreTrainedModel:
    """A directory that is to write text token by token, which is no work for a model that is read for each of them.

    Args:
        option: where the user gives a text instead, as ``--calibration``.

    Raises:
        UserError: it does not fit into memory.
    """
    needs = whole_needs(path)
    if not fits(needs):
        raise UserError(
            f"there is no text, and to write one itself the model needs {gigabytes(needs.memory_bytes)} of memory, "
            f"{gigabytes(available_memory())} are free: give {option} FILE, or set SAAP_DATA to a folder of texts"
        )
    return load_model(path)
