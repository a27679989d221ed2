"""This side of a worker: a model in a process of its own, perhaps in another Python."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import msgspec
import numpy as np

from export.engine.protocol import Ids, Logits
from export.engine.worker import Job, Prompt, Rows, Steps, Text
from saap.base.child import ChildFailedError, Resident
from saap.base.errors import UserError

WORKER = "export.engine.worker"
ROWS_TIMEOUT_S = 3600.0  # of one batch of rows


class EngineProcess:
    """A model that is loaded in a child until :meth:`close`, or until this process ends.

    ``step_s``: seconds of a warm decode step, where the job times something.

    Raises ChildFailedError: the child crashed, hung or gave no answer; its methods do, too.
    """

    def __init__(
        self,
        job: Job,
        python: str = sys.executable,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = ROWS_TIMEOUT_S,
    ) -> None:
        self.job = job
        self._child = Resident(WORKER, timeout_s, environment or {}, python)
        self._child.__enter__()
        try:
            self.step_s = _seconds(self._child.ask(asdict(job)))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        self._child.__exit__()

    def rest(self) -> None:
        """Stop the child until the next request, so that none of its threads spins while others are timed."""
        self._child.rest()

    def prompt(self) -> float:
        """Seconds of the job's prompt from an empty cache."""
        return _seconds(self._ask(Prompt()))

    def steps(self, count: int) -> float:
        """Seconds of a number of decode steps after what came before."""
        return _seconds(self._ask(Steps(count)))

    def text(self, ids: list[int], greedy: int) -> dict[str, object]:
        """Greedy tokens after a text, and its likelihood (:func:`export.engine.worker.continued`)."""
        return self._ask(Text(ids, greedy))

    def logits(self, rows: Ids) -> Logits:
        """Logits [batch, tokens, vocab] after every token of ``rows`` [batch, tokens]; of a job for scoring.

        Raises UserError: the engine cannot run them.
        """
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "logits.npy"
            try:
                self._ask(Rows(rows.tolist(), str(out)))
            except ChildFailedError as error:
                raise UserError(f"{self.job.source} gives no logits in {self.job.module}: {error}") from None
            logits: Logits = np.load(out)
            return logits

    def _ask(self, request: Prompt | Steps | Rows | Text) -> dict[str, object]:
        return self._child.ask(msgspec.to_builtins(request))


def _seconds(answer: dict[str, object]) -> float:
    seconds = answer.get("seconds")
    if not isinstance(seconds, float):
        raise ChildFailedError(f"the worker gave no seconds: {answer}")
    return seconds
