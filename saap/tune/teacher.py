"""The dense teacher runs once: its k likeliest tokens per predicted place are kept on disk.

An entry of the cache is a directory named by the sha256 over all that its numbers depend on: the teacher's weights, the
token ids, k, the precision and a format number. It holds shards of some rows each (safetensors),
written beside their place and renamed, so a killed run goes on with the first shard that is missing. Tokens are uint16
where the vocabulary allows it, else int32; log-probabilities are float16, so a probability is known to 0.05 % where it
is above a third and to 0.4 % at 1e-5. All entries together are bounded; those unused longest go.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.base.store import Store
from saap.base.wording import counted
from saap.models.architectures import MOST_VOCABULARY, shape_of
from saap.models.checkpoint import read_config
from saap.models.modeling_slim import unpacked_ids
from saap.models.record import read_record
from saap.models.resolve import load_tokenizer
from saap.models.streaming import open_model
from saap.models.weight_files import weights_hash
from saap.system.processes import training_device
from saap.system.sealed_tensors import load_sealed, save_sealed
from saap.text.encoding import head_words_of

FORMAT = 1  # counts up when the same inputs would give other numbers
TEMPERATURE = 1.0  # of the answers; a part of the keys of entries, of which earlier versions had others
MOST_UINT16 = 1 << 16  # tokens of a vocabulary whose ids are kept in two bytes
LIMIT_BYTES = 4 << 30  # of all entries
SHARD_ROWS, MOST_SHARDS = 32, 128  # a killed run loses one shard; every shard is an open file
TOKENS_AT_ONCE = 1024  # of one forward pass: the logits of 49152 words are then 200 MB


class TeacherTargets:
    """A teacher's answers for every row, read from memory-mapped shards: ``k`` tokens per predicted place.

    ``directory`` is the entry of the cache.
    """

    def __init__(self, directory: Path, rows: int, k: int) -> None:
        self.directory, self.k = directory, k
        self._rows, self._each = rows, _shard_rows(rows)
        self._shards = [safe_open(path, framework="pt") for path in _shard_paths(directory, rows)]

    def __len__(self) -> int:
        return self._rows

    def batch(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 and log-probabilities float32, both [stop - start, tokens - 1, k], the likeliest first.

        Place t of a row is what the teacher expects at t + 1, as logits[:, :-1] are.

        Raises:
            IndexError: rows that are not there.
        """
        if not 0 <= start < stop <= self._rows:
            raise IndexError(f"rows {start} to {stop} of {self._rows}")
        parts: dict[str, list[torch.Tensor]] = {"tokens": [], "logprobs": []}
        for index in range(start // self._each, (stop - 1) // self._each + 1):
            first = index * self._each
            for name, pieces in parts.items():
                shard = self._shards[index].get_slice(name)
                pieces.append(shard[max(start - first, 0) : min(stop - first, self._each)])
        tokens = torch.cat([part.to(torch.int64) for part in parts["tokens"]])
        return tokens, torch.cat([part.float() for part in parts["logprobs"]])


@dataclass(frozen=True)
class StudentWords:
    """The vocabulary of a student that predicts fewer tokens than its teacher.

    Attributes:
        ids: the teacher's, ascending int64.
        renumbered: whether the student's ids are places in ``ids``; else they are the teacher's.
    """

    ids: torch.Tensor
    renumbered: bool = False

    @classmethod
    def of(cls, student: str | Path) -> StudentWords | None:
        """Those of a model directory; None: all. Raises UserError: its record says it in a way that nothing means."""
        vocabulary = read_record(student).get("vocabulary", {})
        if kept := vocabulary.get("kept"):
            try:
                return cls(unpacked_ids(kept, min(vocabulary.get("of", 0), MOST_VOCABULARY)), True)
            except (ValueError, zlib.error) as error:
                raise UserError(f"{student} has a damaged vocabulary in its record ({error}): make it again") from None
        words = head_words_of(student)
        return None if words is None else cls(words)


@dataclass(frozen=True)
class Question:
    """The part of a teacher's answers that is kept.

    Attributes:
        k: tokens per place; fewer where the rows would not fit into ``LIMIT_BYTES``.
            64 of SmolLM2-135M's 49152 hold 88 % of its probability.
        autocast: compute in bfloat16 where the model allows: faster on CPUs that have it, and about as exact as
            bfloat16 logits are (three digits).
        words: the only ones that the student predicts; the teacher's probabilities are of them alone.
    """

    k: int = 64
    autocast: bool = False
    words: StudentWords | None = None


def teacher_targets(
    teacher_dir: str | Path, ids: torch.Tensor, question: Question | None = None, progress: Progress | None = None
) -> TeacherTargets:
    """Run the teacher over the rows, but for those that the cache has, and keep its k likeliest tokens.

    Args:
        teacher_dir: a model directory; it is not loaded where the cache has all.
        ids: [rows, tokens] int64, at least two tokens.

    Raises:
        UserError: a value out of range, rows that do not fit with one token each, a cache that cannot be written.
    """
    question = question or Question()
    k, words = question.k, question.words
    if k < 1:
        raise UserError(f"k {k} is not allowed: give 1 or more")
    rows, length = ids.shape
    if rows < 1 or length < 2:
        raise UserError(
            f"{counted(rows, 'row')} of {counted(length, 'token')} cannot predict anything: give at least 1 of 2 tokens"
        )
    vocabulary = _vocabulary(teacher_dir)
    per_token = 2 + (2 if vocabulary <= MOST_UINT16 else 4)
    k = min(k, vocabulary if words is None else len(words.ids), LIMIT_BYTES // (rows * (length - 1) * per_token))
    if k < 1:
        raise UserError(
            f"the teacher's answers to {rows} rows of {length} tokens do not fit into {LIMIT_BYTES / 1e6:.0f} MB: "
            "ask for fewer tokens, or tune without a teacher"
        )
    store = Store("teacher", LIMIT_BYTES)
    question = replace(question, k=k)
    entry = store.folder / _key(teacher_dir, ids, question)
    try:
        entry.mkdir(parents=True, exist_ok=True)
        os.utime(entry)
        store.make_room(entry, rows * (length - 1) * per_token * k)
        _fill(entry, teacher_dir, ids, question, progress)
        return TeacherTargets(entry, rows, k)
    except OSError as error:
        raise UserError(
            f"the teacher's answers cannot be kept in {store.folder} ({error.strerror or error}): "
            "make room there, or set SAAP_CACHE to another place"
        ) from None


def check_same_vocabulary(teacher_dir: str | Path, student_dir: str | Path) -> None:
    """Raise UserError for a teacher whose token ids mean something else than the student's."""
    advice = "a teacher must have the student's vocabulary; give the dense model that the student was made from"
    sizes = _vocabulary(teacher_dir), _vocabulary(student_dir)
    words = [load_tokenizer(directory).get_vocab() for directory in (teacher_dir, student_dir)]
    fewer = StudentWords.of(student_dir)
    if fewer is not None and fewer.renumbered and int(fewer.ids[-1]) < sizes[0]:
        places = {word: place for place, word in enumerate(fewer.ids.tolist())}
        words[0] = {word: places[index] for word, index in words[0].items() if index in places}
    elif sizes[0] != sizes[1]:
        raise UserError(f"{teacher_dir} has {sizes[0]} tokens and {student_dir} {sizes[1]}: {advice}")
    different = sorted(set(words[0].items()) ^ set(words[1].items()), key=lambda item: (item[1], item[0]))
    if different:
        word, index = different[0]
        raise UserError(
            f"{teacher_dir} and {student_dir} have tokenizers that differ (token {index}, {word!r}, first): {advice}"
        )


@torch.inference_mode()
def _answers(teacher: PreTrainedModel, ids: torch.Tensor, question: Question) -> dict[str, torch.Tensor]:
    """``tokens`` and ``logprobs`` [rows, tokens - 1, k] of ids [rows, tokens]."""
    tokens, logprobs, words = [], [], question.words
    dtype = torch.uint16 if shape_of(teacher.config).vocab <= MOST_UINT16 else torch.int32
    if words is not None and words.renumbered:
        ids = words.ids[ids]
    for few in ids.split(max(1, TOKENS_AT_ONCE // ids.shape[1])):
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=question.autocast):
            logits = teacher(input_ids=few.to(teacher.device), use_cache=False).logits
        for row in logits:  # one by one: the float32 copies are as large as the logits
            floats = row[:-1].float()
            floats = floats if words is None else floats[:, words.ids.to(floats.device)]
            likeliest = floats.topk(question.k)
            places = likeliest.indices.cpu()
            tokens.append((places if words is None or words.renumbered else words.ids[places]).to(dtype))
            logprobs.append((likeliest.values - floats.logsumexp(-1, keepdim=True)).half().cpu())
    return {"tokens": torch.stack(tokens), "logprobs": torch.stack(logprobs)}


def _intact(path: Path, size: list[int]) -> bool:
    """Whether a shard is what was written, and its tensors are of this size."""
    try:
        tensors = load_sealed(path.read_bytes())[0]
    except (OSError, ValueError):
        return False
    return {name: list(tensor.shape) for name, tensor in tensors.items()} == {"tokens": size, "logprobs": size}


def _fill(
    entry: Path, teacher_dir: str | Path, ids: torch.Tensor, question: Question, progress: Progress | None
) -> None:
    """Make the shards that are missing or broken."""
    for left in entry.glob("*.partial-*"):
        owner = left.name.rsplit("-", 1)[1]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            left.unlink(missing_ok=True)
    label = f"asking the teacher (sequences), {question.k} likeliest tokens"
    teacher, done = None, 0
    for path, part in zip(_shard_paths(entry, len(ids)), ids.split(_shard_rows(len(ids))), strict=True):
        if not _intact(path, [len(part), ids.shape[1] - 1, question.k]):
            advance(progress, label, done, len(ids))
            teacher = teacher or open_model(teacher_dir, training_device())
            save_sealed(_answers(teacher, part, question), path)
        done += len(part)
    if progress and teacher is not None:
        progress(label, len(ids), len(ids))


def _shard_rows(rows: int) -> int:
    return max(SHARD_ROWS, -(-rows // MOST_SHARDS))


def _shard_paths(entry: Path, rows: int) -> list[Path]:
    count = -(-rows // _shard_rows(rows))
    return [entry / f"{index:05d}-of-{count:05d}.safetensors" for index in range(count)]


def _vocabulary(directory: str | Path) -> int:
    return shape_of(read_config(directory)).vocab


def _key(teacher_dir: str | Path, ids: torch.Tensor, question: Question) -> str:
    about = [FORMAT, weights_hash(teacher_dir), list(ids.shape), question.k, TEMPERATURE, question.autocast]
    digest = hashlib.sha256(json.dumps(about).encode())
    if (words := question.words) is not None:
        digest.update(bytes([words.renumbered]) + words.ids.numpy().tobytes())
    digest.update(ids.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
