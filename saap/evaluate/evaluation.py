"""Evaluate models: on one text side by side, then on zero-shot tasks one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from export.engine.table import ONNXRUNTIME, TORCH
from saap.base.errors import UserError
from saap.base.needs import check_memory, fits
from saap.base.progress import Progress, advance, note
from saap.base.quality import Answers, ModelQuality, Quality
from saap.evaluate.answers import read_prompts, score_answers, stop_ids
from saap.evaluate.options import EvalOptions, check_options
from saap.evaluate.perplexity import score_models
from saap.evaluate.subjects import Directory, Model, Subject, subject_of
from saap.models.architectures import shape_of
from saap.models.checkpoint import read_config
from saap.models.needs import eval_needs
from saap.models.resolve import load_tokenizer
from saap.models.streaming import whole_needs
from saap.system.device_names import device_of
from saap.system.gpu import CPU, out_of_memory
from saap.system.precision import fast_float32
from saap.text.documents import documents_of
from saap.text.encoding import check_ids, head_words_of, long_spelling, writing_tokenizer
from saap.text.overlap import refuse_trained_on
from saap.text.windows import Windows, evaluation_windows, tokenizer_hash

if TYPE_CHECKING:
    from saap.evaluate.tasks import ContinuationModel

STREAMED_TOKENS = 4096  # of one pass over a model that is read layer by layer


def evaluate(
    models: Model | Sequence[Model],
    options: EvalOptions | None = None,
    *,
    reference: Model | None = None,
    text: str | Path | Windows | None = None,
    progress: Progress | None = None,
    keep: Callable[[Quality], None] | None = None,
) -> Quality:
    """Perplexity, KL and top-1 agreement on a text, zero-shot tasks, and answers to prompts.

    Args:
        models: directories, names, or what else can be evaluated.
        reference: the dense model that KL and top-1 are against.
        text: a text, .jsonl or .gz file, or a data set id; None is SAAP_DATA, else the sample that ships. With tasks or
            answers there is a perplexity only where a text is given. Windows that are cut already are not checked.
        keep: called with what is known so far, after the text and after each model's tasks.

    Raises:
        UserError: no such text, one that a model was calibrated or tuned on, models that do not compare, unknown tasks.
    """
    options, keep = options or EvalOptions(), keep or (lambda quality: None)
    on_text = text is not None or not (options.tasks or options.answers)
    check_options(options, on_text=on_text)
    base, subjects = subjects_of(models, reference, progress)
    check_engines(subjects, options)
    quality = Quality(None, base.name if base else None, tuple(ModelQuality(s.name, *s.size()) for s in subjects))
    if on_text:
        windows = text if isinstance(text, Windows) else windows_for(subjects, options, text, progress)
        quality = _on_text(subjects, windows, quality, device_of(options.device), progress)
        keep(quality)
    if options.answers:
        quality = _on_prompts(subjects, options, quality, progress)
        keep(quality)
    return _on_tasks(subjects, options, quality, progress, keep) if options.tasks else quality


def subjects_of(
    models: Model | Sequence[Model], reference: Model | None, progress: Progress | None
) -> tuple[Subject | None, list[Subject]]:
    """Recognise the reference, and all that is evaluated: the reference first, nothing twice."""
    several = [models] if isinstance(models, str | Path) or not isinstance(models, Sequence) else models
    base = None if reference is None else subject_of(reference, progress=progress)
    subjects: dict[str, Subject] = {base.name: base} if base else {}
    for model in several:
        subject = subject_of(model, progress=progress)
        subjects.setdefault(subject.name, subject)
    return base, list(subjects.values())


def check_engines(subjects: Sequence[Subject], options: EvalOptions) -> None:
    """Refuse tasks and prompts for what only gives logits of rows."""
    for option, refusal in (("tasks", "asked zero-shot tasks"), ("answers", "given prompts")):
        others = [each.name for each in subjects if each.engine not in (TORCH, ONNXRUNTIME)]
        if getattr(options, option) and others:
            raise UserError(f"{others[0]}: only ONNX Runtime is {refusal}: leave --{option} out, or give a bundle")


def windows_for(
    subjects: Sequence[Subject], options: EvalOptions, text: str | Path | None, progress: Progress | None = None
) -> Windows:
    """Cut the text that all models read, and note what it is.

    Raises:
        UserError: no text, one that a model was calibrated or tuned on, or one that a model cannot read.
    """
    windows, documents = evaluation_windows(subjects[0].path, None if text is None else str(text), options.cut)
    for subject in subjects:
        refuse_trained_on(subject.name, subject.lineage(), documents)
        if tokenizer_hash(writing_tokenizer(subject.path)) != windows.protocol.tokenizer_sha256:
            raise UserError(
                f"{subject.name} cuts a text into other tokens than the first model, so their perplexities do not "
                "compare: evaluate them one at a time, and compare bits per byte"
            )
        if isinstance(subject, Directory):
            check_ids(windows.ids, subject.path)
        positions, tokens = subject.positions(), windows.ids.shape[1]
        if tokens > positions:
            raise UserError(f"{subject.name} holds {positions} tokens, a window has {tokens}: give a smaller --chunk")
    note(progress, f"evaluation text: {windows.protocol.text}")
    for subject in subjects:
        if warning := long_spelling(subject.path, windows.ids.flatten().tolist()):
            note(progress, warning)
    return windows


@fast_float32()
def _on_text(
    subjects: Sequence[Subject], windows: Windows, quality: Quality, device: torch.device, progress: Progress | None
) -> Quality:
    large = [s.path for s in subjects if isinstance(s, Directory) and not fits(whole_needs(s.path))]
    batch = max(1, STREAMED_TOKENS // windows.ids.shape[1]) if large else None
    for config in map(read_config, large):
        if not config.get("slim_quant"):  # integers are small
            needs = eval_needs(shape_of(config), windows.ids[:batch].numel(), streamed=True)
            check_memory(needs, "evaluating", "give a smaller --chunk or fewer --max-chunks")
    scorers = {}
    for number, subject in enumerate(subjects):
        advance(progress, "loading (models)", number, len(subjects))
        scorers[subject.name] = subject.scorer(device)
    with out_of_memory("give a smaller --chunk, fewer models, or --device cpu"):
        scores_of = score_models(
            scorers, windows.ids.to(device), windows.counted.to(device), reference=quality.reference, batch=batch,
            progress=progress,
        )  # fmt: skip
    rows = []
    for row, scores in zip(quality.rows, scores_of, strict=True):
        row = replace(
            row, kl=scores.kl, top1=scores.top1, nll=scores.nll, perplexity=scores.perplexity,
            window_nll=scores.window_nll,
        )  # fmt: skip
        if windows.predicted_bytes:
            bits = scores.nll * windows.protocol.predictions / math.log(2)
            row = replace(row, bits_per_byte=bits / windows.predicted_bytes)
        rows.append(row)
    return replace(quality, protocol=windows.protocol, rows=tuple(rows))


@fast_float32()
def _on_prompts(
    subjects: Sequence[Subject], options: EvalOptions, quality: Quality, progress: Progress | None
) -> Quality:
    """Let all models answer the same prompts, in the first one's words."""
    prompts = read_prompts(options.prompts, options.answers or 0)
    documents = documents_of(prompts.texts, prompts.source)
    tokenizer, device = load_tokenizer(subjects[0].path), device_of(options.device)
    ids = prompts.ids(tokenizer)
    for subject in subjects:
        refuse_trained_on(subject.name, subject.lineage(), documents)
        if tokenizer_hash(load_tokenizer(subject.path)) != tokenizer_hash(tokenizer):
            raise UserError(f"{subject.name} has another tokenizer than {subjects[0].name}: leave --answers out")
        if max(map(len, ids)) + options.answer_tokens > subject.positions():
            raise UserError(f"{subject.name} holds {subject.positions()} tokens: give a smaller --answer-tokens")
    stops, longest = stop_ids(subjects[0].path, tokenizer), max(map(len, ids)) + options.answer_tokens
    models = {each.name: (each.writer(device, stops, longest), each.scorer(device)) for each in subjects}
    scores = score_answers(models, ids, options.answer_tokens, quality.reference, progress)
    about = (prompts.source, prompts.sha256, len(ids), options.answer_tokens)
    return replace(quality, answers=Answers(*about, tuple(scores)))


def _on_tasks(
    subjects: Sequence[Subject],
    options: EvalOptions,
    quality: Quality,
    progress: Progress | None,
    keep: Callable[[Quality], None],
) -> Quality:
    """One model in memory at a time."""
    from saap.evaluate.tasks import run_tasks, task_files

    task_files(options)  # what is wrong with a file or a tokenizer is said before a model is loaded
    for subject in subjects:
        load_tokenizer(subject.path)
        if head_words_of(subject.path) is not None:
            note(progress, f"{subject.name}: questions are read in all words, answers weighed in those it writes")
    quality = replace(quality, task_seed=options.seed, max_examples=options.max_examples)
    for subject in subjects:
        report = progress and (progress if len(subjects) == 1 else partial(_of_model, progress, subject.name))
        with fast_float32():
            scores = run_tasks(subject.name, continuation_model(subject, device_of(options.device)), options, report)
        quality = replace(quality, tasks=(*quality.tasks, *scores))
        keep(quality)
    return quality


def continuation_model(subject: Subject, device: torch.device = CPU) -> Callable[[Progress | None], ContinuationModel]:
    """Return what makes the harness's model; it is loaded when the tasks are known to be good."""
    from saap.evaluate.tasks import ContinuationModel

    def make(progress: Progress | None) -> ContinuationModel:
        tokenizer = writing_tokenizer(subject.path)
        reader = None if head_words_of(subject.path) is None else load_tokenizer(subject.path)
        scorer, positions = subject.continuations(device)
        return ContinuationModel(scorer, tokenizer, positions, progress, reader)

    return make


def _of_model(report: Progress, name: str, label: str, done: float, total: float) -> None:
    report(f"{label}, {name}", done, total)
