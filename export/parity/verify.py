"""Parity: the exported graphs against the torch model that holds the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from export.bundle.manifest import DECODE_GRAPH, SCORING_GRAPH, WEIGHTS, BundleManifest, Parity, read_manifest
from export.engine.scoring import BundleScorer, empty_past, graph_feed
from export.needs import WHOLE_BYTES
from export.parity.pieces import logits_in_pieces
from export.parity.streamed import StreamedModel
from export.source import ModelSource, Precision
from saap.base.errors import UserError
from saap.base.progress import Progress, advance
from saap.system.precision import fast_float32

FLOAT_DIFFERENCE = 1e-3  # floats throughout: largest logit difference
LEVEL4_PERPLEXITY = 0.02  # int8 activations or cache: relative difference of perplexity
LEVEL4_KL = 0.05


@fast_float32()
def check_parity(
    bundle: Path, model_dir: Path, ids: torch.Tensor, sample: str, threads: int = 1, progress: Progress | None = None
) -> Parity:
    """Compare a bundle with its torch model, which runs one layer at a time, on ids [rows, tokens].

    A bundle of more than :data:`saap.base.needs.WHOLE_BYTES` runs in pieces, so that it may be larger than the
    memory.

    Raises UserError: the two do not agree within what the precision allows.
    """
    manifest = read_manifest(bundle)
    reference = StreamedModel(ModelSource(Path(model_dir)), _precision(manifest))
    states = reference.hidden_states(ids, progress)
    scored = graph_logits(bundle, SCORING_GRAPH, ids, threads)  # only now: the layers are out of memory again
    sums, largest = np.zeros(4), 0.0
    last = torch.empty(0)
    for index, (row, expected, logits) in enumerate(zip(ids, reference.logits(states), scored, strict=True)):
        advance(progress, "checking parity (rows)", index, len(ids))
        last = logits[-1] if index == 0 else last
        largest = max(largest, (expected - logits).abs().max().item())
        sums += _row_sums(expected[:-1], logits[:-1], row[1:])
    advance(progress, "checking parity (rows)", len(ids), len(ids))
    _check_decode_graph(bundle, ids[:1], last, threads)
    kl, top1, nll_torch, nll_graph = sums / (ids.shape[0] * (ids.shape[1] - 1))
    report = Parity(
        max_abs_logit_difference=largest,
        kl=max(float(kl), 0.0),
        top1_agreement=float(top1),
        nll_torch=float(nll_torch),
        nll_graph=float(nll_graph),
        perplexity_torch=math.exp(nll_torch),
        perplexity_graph=math.exp(nll_graph),
        perplexity_ratio=math.exp(nll_graph - nll_torch),
        tokens=int(ids.numel()),
        sample=sample,
        accuracy_level=manifest.accuracy_level,
    )
    _judge(report, exact=manifest.bits == 32 and manifest.kv_dtype == "float32")
    return report


def _precision(manifest: BundleManifest) -> Precision:
    """Return the precision that the exporter rounded to."""
    head_bits = int(manifest.lineage["head_bits"])
    bits = 32 if manifest.bits == 16 else manifest.bits  # float weights, whatever their type
    return Precision(bits, manifest.block, head_bits, manifest.accuracy_level)


def _row_sums(expected: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    theirs, ours = expected.log_softmax(-1), logits.log_softmax(-1)
    kl = F.kl_div(ours, theirs, log_target=True, reduction="sum").item()
    same = (theirs.argmax(-1) == ours.argmax(-1)).sum().item()
    nlls = [F.nll_loss(x, targets, reduction="sum").item() for x in (theirs, ours)]
    return np.array([kl, same, *nlls])


def graph_logits(bundle: Path, graph: str, ids: torch.Tensor, threads: int) -> Iterator[torch.Tensor]:
    """Logits [scored, vocab] float32 of each row of ids [rows, tokens] by one of the bundle's graphs."""
    if (bundle / WEIGHTS).stat().st_size <= WHOLE_BYTES:
        scorer = BundleScorer(bundle, threads, graph)
        results: Iterator[np.ndarray] = (scorer.logits(row[None].numpy()) for row in ids)
    else:
        past = empty_past(read_manifest(bundle), 1)
        results = logits_in_pieces(bundle / graph, [graph_feed(row[None].numpy(), past) for row in ids], threads)
    for logits in results:
        yield torch.from_numpy(logits[0]).float()


def _check_decode_graph(bundle: Path, ids: torch.Tensor, expected: torch.Tensor, threads: int) -> None:
    """Check the decode graph's logits [1, vocab] of ids [1, tokens] against the scoring graph's last ones, [vocab]."""
    (logits,) = graph_logits(bundle, DECODE_GRAPH, ids, threads)
    difference = (logits[0] - expected).abs().max().item()
    # The head sees one row instead of many, which may take another kernel: equal up to rounding.
    if not difference <= 1e-2:
        raise UserError(f"the decode graph differs from the scoring graph by {difference:.3g}: nothing was exported")


def _judge(report: Parity, exact: bool) -> None:
    if exact:
        good = report.max_abs_logit_difference <= FLOAT_DIFFERENCE
        limit = f"a logit difference of at most {FLOAT_DIFFERENCE}"
    else:
        good = abs(report.perplexity_ratio - 1) <= LEVEL4_PERPLEXITY and report.kl <= LEVEL4_KL
        limit = f"a perplexity within {LEVEL4_PERPLEXITY:.0%} and a KL of at most {LEVEL4_KL}"
    if not good:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in asdict(report).items() if isinstance(value, float))
        raise UserError(f"parity failed ({numbers}); {limit} was expected: nothing was exported")
