"""``saap.json``: the record of a slim or tuned directory.

These types are the format; docs/formats.md says what the fields mean. Keys that are not named here are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypedDict

from msgspec import Meta

from saap.base.documents import Document
from saap.base.writing import RECORD

Count = Annotated[int, Meta(ge=0)]
Measures = dict[str, float | None]  # ratio, ratio_of_all, parameters, bytes, ms_per_token, speedup


class FileHash(TypedDict, total=False):
    """A file's size and hash when it was written."""

    bytes: Count
    sha256: str


class StateCounts(TypedDict, total=False):
    """Sizes of a short convolution or a delta net."""

    conv: Count
    delta: Count


class Counts(StateCounts):
    """Sizes of a layer."""

    query_heads: Count
    kv_heads: Count
    ffn: Count


class KeptStates(TypedDict, total=False):
    """Kept channels of a short convolution or key heads of a delta net."""

    conv: list[Count]
    delta: list[Count]


class Kept(KeptStates):
    """The kept structures of a layer of the base model: indices, ascending."""

    query_heads: list[Count]
    kv_heads: list[Count]
    ffn: list[Count]


class Costs(TypedDict, total=False):
    """The cost table that times were planned with."""

    file: str
    sha256: str
    board: str | None
    cpu_model: str | None
    fingerprint: str | None
    onnxruntime: str | None
    engine: str  # where it is another than ONNX Runtime
    threads: Count
    depth: Count


class PlannedBundle(TypedDict, total=False):
    """The bundle that sizes and times were planned for; names as in ``slim_quant`` (:mod:`saap.models.slim_quant`)."""

    bits: int
    block: int  # 0 of floats
    embedding_bits: int  # where not ``bits``
    matrices: dict[str, int]
    blocks: dict[str, int]


class Trial(TypedDict):
    """A plan that was tuned a little, to choose between it and others."""

    plan: Count  # its number; that of least price is 0
    settings: dict[str, object]  # of the search
    gone: Count  # removed blocks
    price_nats: float
    kl: dict[str, float]  # by tokens of tuning: from the dense model on other text, nats per token


class Plan(TypedDict, total=False):
    """The request, the plan, its result, and the kept structures."""

    asked: dict[str, float]
    bundle: PlannedBundle
    costs: Costs
    dense: Measures
    planned: Measures
    achieved: Measures
    price_nats: float | None
    gap: float  # where the search ended before it knew its plan to be the best
    reasons: dict[str, object] | None
    trials: list[Trial]  # where plans were tuned to choose between them
    dense_layers: list[Counts]
    layers: list[Kept]


class Calibration(TypedDict, total=False):
    """The text that structures were scored on: ``sha256`` is the ids'."""

    sequences: Count
    tokens: Count  # of each
    sha256: str
    source: str | None
    text_sha256: str | None


class WordsText(TypedDict, total=False):
    """The text that chose the tokens of a trimmed vocabulary."""

    source: str
    text_sha256: str | None


class Lineage(TypedDict, total=False):
    """The model and the text that a directory was made from."""

    base: str
    base_sha256: str
    base_record: dict[str, object] | None
    calibration: Calibration
    words: WordsText
    versions: dict[str, str]


class Tuning(TypedDict, total=False):
    """The tuning of a directory."""

    options: dict[str, object]
    trained_parameters: Count
    tokens: Count
    text: dict[str, object]
    teacher: str | None
    seconds: float
    history: dict[str, object]
    from_sha256: str


class Integers(TypedDict, total=False):
    """The method and the text by which integers were chosen without training; ``sha256`` is the ids'."""

    method: str
    sequences: Count
    tokens: Count  # of each
    sha256: str
    source: str
    text_sha256: str
    from_sha256: str


class Words(TypedDict, total=False):
    """The part of the vocabulary that a directory's head predicts, and reads."""

    rows: Count  # tokens that it predicts
    of: Count
    kept: str  # where it reads no others either: their ids in the base model, packed; an id is a place in it
    longer: float  # share of tokens by which text like the one that chose them becomes longer


class Record(TypedDict, total=False):
    """The whole file; ``options`` are those that lead to the same plan."""

    format: int
    method: str
    plan: Plan
    options: dict[str, object]
    lineage: Lineage
    weights: Tuning  # the training of its floats
    tuning: Tuning
    integers: Integers
    vocabulary: Words
    files: dict[str, FileHash]


DOCUMENT = Document(Record, "record", "make the directory again with this saap", version="format")


def read_record(directory: str | Path) -> Record:
    """``saap.json`` of a directory, empty for a dense model. Raises UserError: damaged, or of a newer format."""
    path = Path(directory) / RECORD
    return DOCUMENT.read(path) if path.is_file() else {}
