"""The training loop: parameters, rows and a loss in; the best state of the parameters out.

AdamW with a linear warm-up and a cosine to a tenth of each group's peak rate, in bfloat16 autocast where the hardware
has it. It stops early on held-out rows, stops before a step that is not finite, continues after a kill on the same loss
curve, and gives the same gradients in several processes of ``accelerate launch`` as in one
(:mod:`saap.tune.loop.processes`).

The loss of a step is the mean over all tokens that its rows teach, wherever they are computed: sums of losses are
differentiated, added up over micro-batches and processes, and divided by the number of tokens in the end.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypedDict

import torch
from msgspec import convert
from torch import nn

from saap.base.errors import UserError
from saap.base.options import check_values
from saap.base.progress import Progress
from saap.system.precision import autocast_dtype
from saap.system.sealed_tensors import data_hash
from saap.tune.loop.processes import Batch, LossOf, add_up, from_main, join_processes, prepare, unshard
from saap.tune.loop.state import (
    About,
    Trained,
    best_file,
    fingerprint_of,
    others_differ_in,
    parse_state,
    state_path,
    write_state,
)
from saap.tune.options import TrainOptions

SMOOTHED = 8  # steps whose mean loss is shown
SAVING = 0.02  # share of the time that may go into states


class Group(TypedDict):
    """Parameters as torch's optimisers take them, and their peak rate; AdamW's other options may stand beside."""

    params: list[nn.Parameter]
    lr: float


@dataclass
class History:
    """Losses and events of a run."""

    steps: int  # planned
    losses: list[float] = field(default_factory=list)  # of the steps taken, in nats per learnt token, before the update
    held_out: list[tuple[int, float]] = field(default_factory=list)  # (steps taken, loss) of every evaluation
    best_step: int = 0  # after how many steps the parameters were what they are now
    stopped: str | None = None  # why the run ended before ``steps``; None if it did not
    resumed_at: int | None = None  # the step it was continued at after a kill
    precision: str = "fp32"  # "bf16" or "fp32"
    tokens: int = 0  # in the rows of the steps taken, learnt or not
    seconds: float = 0.0  # spent on the steps, evaluations not included
    loss_name: str = "loss"  # what ``losses`` are
    held_out_name: str = "held-out loss"

    def in_words(self) -> str:
        """Describe the run so far, for a progress bar; the loss is a mean over the last few steps."""
        recent = self.losses[-SMOOTHED:]
        held_out = f", {self.held_out_name} {self.held_out[-1][1]:.3f}" if self.held_out else ""
        speed = self.tokens / max(self.seconds, 1e-9)
        return f"{self.loss_name} {sum(recent) / len(recent):.3f}{held_out}, {speed:.0f} tokens/s"

    def kept(self) -> str:
        known = f" ({self.held_out_name} {min(loss for _, loss in self.held_out):.3f})" if self.held_out else ""
        return f"the state of step {self.best_step}{known}"


class DivergedError(UserError):
    """A loss or gradient stopped being finite; the model holds the state that the message names.

    It is an error, so that nobody writes out such a run without noticing; who wants to, catches it and does.
    """

    def __init__(self, message: str, step: int, history: History) -> None:
        super().__init__(message)
        self.step = step
        self.history = history


@dataclass(frozen=True)
class Run:
    """Options, held-out text and state of a run.

    Attributes:
        held_out: rows to evaluate; without, nothing stops early and the last state is the best.
        held_out_loss: what they are evaluated with, if not the loss of training.
        loss_name, held_out_name: what the two are called where they are shown.
        state_dir: where the state is kept for a run that is killed; :func:`saap.tune.loop.state.discard_states` deletes
            it when the result is safe. A state of other options or rows is not touched and not continued.
        best_on_disk: keep the best parameters in a file of ``state_dir``, where they would take much memory.
        fingerprint: what else the loss curve depends on (the model's hash), JSON. Options, rows and the parameters'
            names and rates are added.
    """

    options: TrainOptions = field(default_factory=TrainOptions)
    held_out: Batch | None = None
    held_out_loss: LossOf | None = None
    loss_name: str = "loss"
    held_out_name: str = "held-out loss"
    state_dir: Path | None = None
    best_on_disk: bool = False
    fingerprint: Mapping[str, object] = field(default_factory=dict)


def train(
    model: nn.Module,
    groups: Sequence[Group],
    rows: Batch,
    loss_of: LossOf,
    run: Run | None = None,
    progress: Progress | None = None,
) -> History:
    """Train parameter groups of a model in place, and leave it with the best state.

    Args:
        model: parameters in no group stay as they are. Under FSDP it can be written out, but not run, afterwards.
        rows: tensors with one entry per row, "ids" [rows, tokens] among them; taken in order, what does not fill a step
            is left out. Every process is given all of them.
        loss_of: (model, batch) -> the sum of the losses over the learnt tokens, and their number; ``batch`` holds
            slices of ``rows``. A process may get rows without any learnt token: the sum must still have a gradient.
        progress: called in the main process; the label carries losses and tokens per second.

    Raises:
        DivergedError: a loss or gradient is not finite.
        UserError: options out of range, too few rows, rows that cannot be split, a damaged state, or a launch that is
            not supported.
    """
    run = run or Run()
    check_values(run.options)
    with torch.random.fork_rng():
        training = _Training(model, groups, rows, loss_of, run, progress)
        try:
            training.keep(run.state_dir, dict(run.fingerprint), best_on_disk=run.best_on_disk)
            training.go()
        finally:
            training.close()
    return training.history


class _Training:
    """One run: what is trained, on what, how far it is, and the best so far."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        rows: Batch,
        loss_of: LossOf,
        run: Run,
        progress: Progress | None,
    ) -> None:
        self.accelerator = join_processes()
        self.options, self.rows, self.loss_of = run.options, rows, loss_of
        options = run.options
        self.progress = progress if self.accelerator.is_main_process else None
        steps = steps_of(rows, options, self.accelerator.num_processes)
        self.dtype = autocast_dtype(options.precision, self.accelerator.device)
        self.history = History(
            steps, precision="bf16" if self.dtype else "fp32", loss_name=run.loss_name, held_out_name=run.held_out_name
        )
        self.factor = cosine(steps, options.warmup_share)
        self.every = max(1, math.ceil(steps / options.evaluations))
        self.model, self.home, self.was_training = model, next(model.parameters()).device, model.training
        self.rates = [float(group["lr"]) for group in groups]
        self.settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        called = {id(p): name for name, p in model.named_parameters()}
        names = [called.pop(id(p)) for group in groups for p in group["params"]]
        self.frozen = [p for p in model.parameters() if p.requires_grad and id(p) in called]
        for parameter in self.frozen:
            parameter.requires_grad_(False)
        if options.checkpointing:
            recompute(model, True)
        model.to(self.accelerator.device)
        optimizer = torch.optim.AdamW(map(dict, groups), betas=options.betas, weight_decay=options.weight_decay)
        self.module, self.optimizer = prepare(self.accelerator, model, optimizer)
        self.trained = Trained(names, self.optimizer)
        self.held_out, self.held_out_loss = run.held_out, run.held_out_loss or loss_of
        self.path: Path | None = None
        self.saved, self.rest = time.monotonic(), options.save_seconds

    def keep(self, directory: Path | None, fingerprint: dict[str, object], *, best_on_disk: bool) -> None:
        """Keep the state there, and continue from one that is there."""
        note = None
        if directory is not None:
            self.parts = self._parts(fingerprint)
            self.path = state_path(directory, fingerprint_of(self.parts))
            self.trained.file = best_file(self.path) if best_on_disk else None
            main = self.accelerator.is_main_process
            state = from_main(self.accelerator, parse_state(self.path) if main and self.path.is_file() else None)
            if state is not None:
                self._restore(*state)
                note = f"continued at step {self.step}"
            elif main and (changed := others_differ_in(self.path, self.parts)) is not None:
                note = f"from the start, the state in {directory} is of another run ({', '.join(changed)})"
        if note and self.progress:
            self.progress(f"tuning (steps), {note}", self.step, self.history.steps)

    @property
    def step(self) -> int:
        return len(self.history.losses)

    def go(self) -> None:
        history = self.history
        if history.resumed_at is None:
            if self.progress:
                self.progress("tuning (steps), first evaluation", 0, history.steps)
            self._judge()
        while self.step < history.steps and history.stopped is None:
            due = self._take_step()
            judged = self.step % self.every == 0 or self.step == history.steps
            if judged:
                self._judge()
            if due or (judged and (self.trained.file is None or self.step == history.steps)):
                self._save()
            if self.progress:
                self.progress(f"tuning (steps), {history.in_words()}", self.step, history.steps)
        if history.best_step != self.step:
            self.trained.put_best(history.best_step)

    def close(self) -> None:
        """Give the model back as it came: whole, in its mode, on its device."""
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.is_fsdp2:
            unshard(self.model)
        self.accelerator.free_memory()
        if self.options.checkpointing:
            recompute(self.model, False)
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.model.train(self.was_training)
        self.model.to(self.home)

    def _take_step(self) -> bool:
        """One update; whether the state should be saved."""
        options, number, accelerator = self.options, self.step + 1, self.accelerator
        begin = time.monotonic()
        for group, peak in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = peak * self.factor(self.step)
        # Seeded by the step: a continued run draws what an uninterrupted one does, with nothing to save.
        torch.manual_seed(
            (options.seed * 1_000_003 + self.step) * accelerator.num_processes + accelerator.process_index
        )
        self.module.train()
        total = learnt = 0.0
        batches = list(self._share_of_step())
        for batch in batches:
            whole_step = batch is batches[-1]
            with nullcontext() if whole_step else accelerator.no_sync(self.module):
                loss, count = self._loss(self.loss_of, batch)
                loss.backward()  # not accelerator.backward, which divides by the launcher's accumulation steps
            total, learnt = total + float(loss.detach()), learnt + float(count)
        late = accelerator.is_main_process and time.monotonic() - self.saved >= self.rest
        total, learnt, due = add_up(accelerator, [total, learnt, float(late)])
        value = total / max(learnt, 1.0)
        norm = self.trained.mean_gradient(accelerator.num_processes / max(learnt, 1.0), options.clip)
        for what, size in (("loss", value), ("gradient", norm)):
            if not math.isfinite(size):
                self._diverge(f"the {what} became {size} at step {number} of {self.history.steps}", number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.history.losses.append(value)
        self.history.tokens += options.rows_per_step * self.rows["ids"].shape[1]
        self.history.seconds += time.monotonic() - begin
        return due > 0

    def _share_of_step(self) -> Iterable[Batch]:
        size = self.options.rows_per_step
        share = size // self.accelerator.num_processes
        turn, place = divmod(self.step, len(self.rows["ids"]) // size)
        if turn:  # the rows of a step stay together: a teacher's answers to them lie together
            order = list(range(len(self.rows["ids"]) // size))
            random.Random(f"{self.options.seed} {turn}").shuffle(order)
            place = order[place]
        first = place * size + self.accelerator.process_index * share
        micro = self.options.micro_rows or share
        for at in range(first, first + share, micro):
            yield self._slice(self.rows, at, min(at + micro, first + share))

    def _slice(self, rows: Batch, first: int, end: int) -> Batch:
        return {name: tensor[first:end].to(self.accelerator.device) for name, tensor in rows.items()}

    def _loss(self, loss_of: LossOf, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(self.accelerator.device.type, dtype=torch.bfloat16, enabled=self.dtype is not None):
            result: tuple[torch.Tensor, torch.Tensor] = self.module(loss_of, batch)
            return result

    @torch.no_grad()
    def _evaluate(self, rows: Batch) -> float:
        """Mean loss of the held-out rows, in nats per learnt token; all processes do as many forward passes."""
        self.module.eval()
        processes, count = self.accelerator.num_processes, len(rows["ids"])
        micro = self.options.micro_rows or self.options.rows_per_step // processes
        total = learnt = 0.0
        for at in range(0, count, micro * processes):
            first = at + self.accelerator.process_index * micro
            idle = first >= count  # FSDP waits for every process, so one without rows does some for nothing
            loss, number = self._loss(
                self.held_out_loss, self._slice(rows, *((0, 1) if idle else (first, first + micro)))
            )
            if not idle:
                total, learnt = total + float(loss), learnt + float(number)
        total, learnt = add_up(self.accelerator, [total, learnt])
        return total / max(learnt, 1.0)

    def _judge(self) -> None:
        """Evaluate; keep the parameters if they are the best so far, stop if none were for long."""
        history = self.history
        if self.held_out is None:
            self._keep_best()
            return
        known = min((loss for _, loss in history.held_out), default=math.inf)
        loss = self._evaluate(self.held_out)
        if not math.isfinite(loss):
            self._diverge(f"the held-out loss became {loss} after step {self.step} of {history.steps}", self.step)
        history.held_out.append((self.step, loss))
        if loss < known:
            self._keep_best()
            return
        waited = sum(step > history.best_step for step, _ in history.held_out)
        if self.options.patience is not None and waited >= self.options.patience and self.step < history.steps:
            history.stopped = f"no lower {history.held_out_name} in {waited} evaluations since step {history.best_step}"

    def _keep_best(self) -> None:
        self.trained.keep_best(self.step, writes=self.accelerator.is_main_process)
        if self.trained.file is not None:  # which every process reads in the end
            self.accelerator.wait_for_everyone()
        self.history.best_step = self.step

    def _diverge(self, what: str, step: int) -> None:
        history = self.history
        if self.held_out is None or history.held_out:
            self.trained.put_best(history.best_step)
        if self.held_out is not None and not history.held_out:
            raise DivergedError(
                f"{what}: the model or the held-out text is unusable before any training", step, history
            )
        raise DivergedError(f"{what}; {history.kept()} is kept: lower the learning rate", step, history)

    def _parts(self, fingerprint: dict[str, object]) -> dict[str, object]:
        """Everything that the loss curve depends on."""
        values = asdict(self.options).items()
        options = {
            f"options.{key}": value for key, value in values if key not in ("save_seconds", "checkpointing", "device")
        }
        return {**fingerprint, **options} | {
            "precision": self.history.precision,
            "rows": data_hash(self.rows),
            "held-out rows": data_hash(self.held_out) if self.held_out is not None else None,
            "parameters": self.trained.shapes(),
            "rates": self.settings,
        }

    def _save(self) -> None:
        if self.path is None:
            return
        began, tensors = time.monotonic(), self.trained.tensors()
        if self.accelerator.is_main_process:
            write_state(tensors, self.path, {"parts": self.parts, "history": asdict(self.history)})
            self.trained.forget_others(self.history.best_step)
        self.saved = time.monotonic()
        if self.options.save_seconds:  # 0: after every step
            self.rest = max(self.options.save_seconds, (self.saved - began) / SAVING)

    def _restore(self, tensors: dict[str, torch.Tensor], about: About) -> None:
        self.trained.load(tensors)
        before, saved = self.history, convert(about["history"], History)
        self.history = replace(saved, loss_name=before.loss_name, held_out_name=before.held_out_name)
        self.history.resumed_at = self.step


def cosine(steps: int, warmup_share: float) -> Callable[[int], float]:
    """Factor of the learning rate per step: linear warm-up, then a cosine to a tenth."""
    warmup = max(1, round(steps * warmup_share))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return factor


def steps_of(rows: Batch, options: TrainOptions, processes: int) -> int:
    """Count the steps that the rows give.

    Raises:
        UserError: too few rows, rows that cannot be split over the processes, or a step that teaches nothing.
    """
    size, count = options.rows_per_step, len(rows["ids"])
    if any(len(tensor) != count for tensor in rows.values()):
        raise ValueError(f"rows of different numbers: { {name: len(tensor) for name, tensor in rows.items()} }")
    if size % processes:
        raise UserError(f"{size} rows per step cannot be split over {processes} processes: give a multiple of them")
    if count < size:
        raise UserError(f"{count} sequences of training text are fewer than one step's {size}: give more")
    once = count // size
    if "labels" in rows:
        learnt = (rows["labels"][: once * size, 1:] != -100).view(once, -1).sum(1)
        if (empty := (learnt == 0).nonzero()).numel():
            first = int(empty[0]) * size
            raise UserError(f"rows {first + 1} to {first + size} hold no token to learn: leave such rows out")
    return once * options.passes


def recompute(model: nn.Module, on: bool) -> None:
    """Let layers keep no activations and compute them again on the way back, or not."""
    # activation_checkpointing_* since transformers 5, gradient_checkpointing_* before.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        # The reentrant form gives no gradients where a layer's input needs none: behind a frozen embedding.
        options = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{name}_checkpointing_enable")(**options)
    else:
        getattr(model, f"{name}_checkpointing_disable")()
