"""What the studies of pruning share: a cell of settings, the text it is calibrated on, and what it is judged by.

A cell is what `saap prune` writes with these settings, loaded and evaluated: no cell is a mask. Chunks are of 256
tokens, predicted from their own start.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from saap.base.errors import UserError
from saap.evaluate.perplexity import score_models, torch_scorer
from saap.models.checkpoint import load_model
from saap.models.record import read_record
from saap.models.resolve import load_tokenizer
from saap.prune.baselines.methods import published
from saap.prune.options import AdaptiveOptions, FusionOptions, PruneOptions
from saap.prune.pruning import prune
from saap.text.documents import Sequences, documents_of, pack, read_file
from saap.text.rows import training_rows
from saap.text.windows import Cut, windows_of
from studies.common import provenance
from studies.pruning.cells import HELD, LENGTH, SEQUENCES, Variant, slug


def mean_nll(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats per predicted token, ids [sequences, tokens]."""
    (found,) = score_models({"model": torch_scorer(model)}, ids)
    return float(found.nll or 0.0)


def options_of(variant: Variant) -> PruneOptions:
    """PruneOptions from a flat dict."""
    given = {
        part: {name: variant[name] for name in names if name in variant}
        for part, names in (
            ("fusion", ("score", "slices", "sigma", "learned", "stability", "layer_power")),
            ("adaptive", ("c", "exact")),
            ("rest", ("method", "compensate", "heads", "seed")),
        )
    }
    adaptive = AdaptiveOptions(fusion=FusionOptions(**given["fusion"]), **given["adaptive"])
    kept = None if variant.get("text") == "alike" else frozenset[int]()  # alike: every layer may be pruned
    return PruneOptions(
        ratio=variant["ratio"],
        stages=variant.get("steps", 1),
        adaptive=adaptive,
        keep_layers=kept,
        keep=frozenset(variant.get("keep", "").split()),
        **given["rest"],
    )


class Texts:
    """Calibration rows by seed, and what is evaluated on."""

    def __init__(self, model_dir: Path) -> None:
        self.model_dir, self.data = model_dir, Path(os.environ["SAAP_DATA"])
        self.tokenizer = load_tokenizer(model_dir)
        self._rows: dict[tuple[Any, ...], torch.Tensor] = {}

    def alike(self, seed: int, sequences: int = SEQUENCES, length: int = LENGTH) -> torch.Tensor:
        """Our own text, [sequences, length]; with more sequences than the usual the usual are the first of them."""
        return self._own(seed, sequences)[: sequences * length // LENGTH].reshape(sequences, length)

    def held(self, seed: int) -> torch.Tensor:
        """The rows after those, [40, 256], which no score, price or refit sees."""
        return self._own(seed)[SEQUENCES:]

    def _own(self, seed: int, sequences: int = SEQUENCES) -> torch.Tensor:
        count = max(sequences, SEQUENCES + HELD)
        if (seed, count) not in self._rows:
            self._rows[seed, count] = training_rows(
                self.model_dir, None, "calibration", Sequences(count, LENGTH, seed)
            ).ids
        return self._rows[seed, count]

    def published(self, method: str, seed: int) -> torch.Tensor:
        """As many sequences and tokens as a method's authors take, of the text here that is closest to theirs."""
        settings = published(method)
        tokens, count = settings.tokens or 64, settings.sequences
        if settings.text.startswith("WikiText"):
            texts = read_file(self.data / "wikitext2_train_raw_head1MB.txt")
        elif settings.text.startswith("C4"):
            texts = read_file(self.data / "c4_sample300.jsonl")
        else:  # books: running prose is what the encyclopedia comes closest to
            texts = read_file(self.data / "wikipedia_docs.jsonl.gz")
        return pack(texts, self.tokenizer, tokens, count or 64, seed)

    def wikitext(self, seed: int) -> torch.Tensor:
        """As many tokens as :meth:`alike`, of the text that FLAP's authors take: the head of WikiText-2 *train*."""
        return pack(read_file(self.data / "wikitext2_train_raw_head1MB.txt"), self.tokenizer, LENGTH, SEQUENCES, seed)

    def of(self, variant: Variant) -> torch.Tensor:
        """What a variant is calibrated on: its ``text``, by its seed."""
        kind, seed = variant.get("text"), variant["seed"]
        if kind == "published":
            return self.published(variant["method"], seed)
        return self.wikitext(seed) if kind == "wikitext" else self.alike(seed, variant.get("sequences", SEQUENCES))

    def other(self) -> torch.Tensor:
        """80 chunks of the head of WikiText-2 *train*, [80, 256]: text of another kind, none of it from the test."""
        (text,) = read_file(self.data / "wikitext2_train_raw_head1MB.txt", whole=True)
        return self._chunks(text)[100:180]

    def test(self, count: int) -> torch.Tensor:
        """The first chunks of WikiText-2 raw test, as it is."""
        return self._chunks(read_file(self.data / "wikitext2_test_raw.txt", whole=True)[0])[:count]

    def _chunks(self, text: str) -> torch.Tensor:
        """A text as it is, side by side, [n, 256]."""
        return windows_of(documents_of([text], "text"), self.tokenizer, Cut(LENGTH)).ids


def run_cell(where: Path, variant: Variant, model_dir: Path, ids: torch.Tensor, texts: dict[str, torch.Tensor]) -> None:
    """Prune, load, evaluate, write."""
    path = where / f"{slug(variant)}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    missing = {name: rows for name, rows in texts.items() if name not in known.get("nll", {})}
    if not missing:
        return
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "slim"
        try:
            prune(model_dir, options_of(variant), output=out, calibration=ids)
        except UserError as error:
            print(f"{slug(variant)}: {error}", flush=True)
            return
        pruned = time.monotonic() - began
        record = read_record(out)
        model = load_model(out)
        nll = means_of(model, missing)
    plan = record["plan"]
    cell = {
        "variant": variant,
        "calibration": record["lineage"]["calibration"],
        "achieved": plan["achieved"],
        "sizes": [[len(k["query_heads"]), len(k["kv_heads"]), len(k["ffn"])] for k in plan["layers"]],
        "price": plan["price_nats"],
        "nll": {**known.get("nll", {}), **nll},
        "seconds": round(pruned, 1),
        **provenance(),
    }
    where.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(cell, indent=1) + "\n")
    partial.replace(path)
    print(f"{slug(variant)}: {nll} ({pruned:.0f} s)", flush=True)


def means_of(model: Any, texts: dict[str, torch.Tensor]) -> dict[str, float]:
    """Mean NLL of texts, nats per token; a text that another begins with is read once."""
    found: dict[str, float] = {}
    total, done = 0.0, 0
    previous: torch.Tensor | None = None
    for name, rows in sorted(texts.items(), key=lambda item: len(item[1])):
        if previous is None or not torch.equal(previous, rows[:done]):
            total, done = 0.0, 0
        if done < len(rows):
            total += mean_nll(model, rows[done:]) * (len(rows) - done)
        found[name], done, previous = total / len(rows), len(rows), rows
    return found


def remember_rankings() -> None:
    """Score once for all ratios and compensations: a ranking depends on neither."""
    from saap.prune.baselines import methods as module

    known: dict[tuple[Any, ...], Any] = {}
    rank = module.rank

    def remembered(model: Any, shape: Any, ids: torch.Tensor, options: PruneOptions, progress: Any = None) -> Any:
        settings = (options.method, options.keep_layers, options.heads, options.group_size, options.seed)
        key = (*settings, hashlib.sha256(ids.numpy().tobytes()).hexdigest())
        if key not in known:
            known[key] = rank(model, shape, ids, options, progress)
        return known[key]

    module.rank = remembered
