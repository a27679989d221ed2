"""Open a bundle in its engine: in this process, or in one of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from export.bundle import Bundle
from export.engine.process import EngineProcess
from export.engine.protocol import Engine, EngineOptions, Ids, Logits
from export.engine.spec import resolve
from export.engine.table import Row
from export.engine.worker import Job
from saap.base.child import ChildFailedError
from saap.base.errors import UserError
from saap.base.progress import Progress


def open_engine(spec: str | Path, options: EngineOptions | None = None, *, progress: Progress | None = None) -> Engine:
    """Open a bundle in this process.

    Args:
        spec: ``BUNDLE``, ``BUNDLE@NAME``, or ``BUNDLE@fastest``, which measures where the answer is not known yet.

    Raises UserError: no bundle, or an engine that does not run it or is not in this Python.
    """
    named = resolve(spec, progress, here=True)
    source = named.source(Bundle.open(named.bundle))
    named.row.check_here()
    return named.row.open(source, options or EngineOptions())


def open_process(row: Row, source: Path, options: EngineOptions) -> EngineProcess:
    """Open what an engine reads, already checked, in a process of its own, in the Python that has the engine.

    Raises UserError: the engine is not installed, or cannot load it.
    """
    job = Job(row.module, str(source.resolve()), options, list(row.packages))
    python = row.python(row.name)
    try:
        return EngineProcess(job, python, row.process_environment(options.threads))
    except ChildFailedError as error:
        raise UserError(f"{source} cannot be opened in {row.name}: {error}") from None


def logits_in_process(row: Row, source: Path, threads: int) -> Callable[[Ids], Logits]:
    """Return a function that computes logits [batch, tokens, vocab] after every token of rows [batch, tokens].

    The model stays loaded in a process of its own as long as the function lives, for the longest rows so far.

    Raises UserError, as the function does: the engine is not installed, or cannot run the model.
    """
    process: EngineProcess | None = None

    def logits(rows: Ids) -> Logits:
        nonlocal process
        longest = rows.shape[1]
        if process is None or longest > process.job.options.max_length:
            if process is not None:
                process.close()
            process = open_process(row, source, EngineOptions(threads, longest, scoring=True, huge_pages=False))
        return process.logits(rows)

    row.python(row.name)
    return logits
