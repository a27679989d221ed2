"""No model is judged on text that it was calibrated or tuned on, or that chose its words.

A record keeps where such text came from and its hash, not the text. Where the file is still what it was, its lines are
compared against the evaluation's; where it is gone, the evaluation is refused only if it is that very text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from saap.base.errors import UserError
from saap.text.documents import (
    TRAINING_FILES,
    TRAINING_SAMPLES,
    Documents,
    cut_text,
    documents_of,
    load_documents,
    read_file,
    samples_of,
)

# Lines from this length on are taken to identify a text; shorter ones ("= = Reception = =") recur everywhere.
TELLING_CHARACTERS = 80


def refuse_overlap(training: Documents, evaluation: Documents) -> None:
    """Refuse to evaluate on text that the model was calibrated or tuned on.

    Texts coincide when they are equal, when they share a document, or when a hundredth of the evaluation's long lines
    occur in the training text.
    """
    shared = {text.strip() for text in training.texts} & {text.strip() for text in evaluation.texts}
    lines, known = _telling_lines(evaluation.texts), _telling_lines(training.texts)
    if training.sha256 == evaluation.sha256 or shared or (lines and len(lines & known) >= max(1, len(lines) / 100)):
        raise UserError(_same_text(training.source, evaluation.source))


def refuse_trained_on(model: str, lineage: Mapping[str, object], evaluation: Documents) -> None:
    """Refuse to evaluate on text that a model's record names; the text itself may be gone.

    ``lineage``: of a bundle, or of a directory with ``tuning`` as a bundle has it.
    """
    cut = documents_of((part for text in evaluation.texts for part in cut_text(text)), evaluation.source)
    compared: set[str] = set()  # calibration and tuning are often of one text
    for about in _texts_in(lineage):
        source, sha256 = str(about.get("source")), str(about.get("text_sha256") or "")
        if sha256 in (evaluation.sha256, cut.sha256):
            raise UserError(f"{model}: {_same_text(source, evaluation.source)}")
        documents = _again(source, sha256) if sha256 and source not in compared else None
        if documents is not None:
            compared.add(source)
            try:
                refuse_overlap(documents, evaluation)
            except UserError as error:
                raise UserError(f"{model}: {error}") from None


def _same_text(training: str, evaluation: str) -> str:
    return (
        f"{training} and {evaluation} hold the same text: a model is not evaluated on what it was calibrated or tuned "
        "on; give another file for one of them"
    )


def _texts_in(lineage: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """List what is known of each text, that of earlier prunings too."""
    for key in ("calibration", "words", "tuning", "integers"):
        if isinstance(about := lineage.get(key), Mapping):
            yield about
    if isinstance(before := lineage.get("base_record"), Mapping):
        yield from _texts_in(before)


def _again(source: str, sha256: str) -> Documents | None:
    """Load the text itself, if it is still there."""
    try:
        if source == TRAINING_SAMPLES:  # of any version: most of them stays
            return samples_of("calibration")
        if source == " + ".join(TRAINING_FILES):  # their order, and so the hash, is of a seed
            default = load_documents(None, split="calibration")
            return default if default.source == source else None
        documents = documents_of(read_file(Path(source)), source) if Path(source).is_file() else None
    except UserError:
        return None
    return documents if documents is not None and documents.sha256 == sha256 else None


def _telling_lines(texts: Iterable[str]) -> set[str]:
    lines = (" ".join(line.split()) for text in texts for line in text.splitlines())
    return {line for line in lines if len(line) >= TELLING_CHARACTERS}
