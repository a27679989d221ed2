"""What pruning costs in nats: one small JSON per cell, so that a table may take more than one sitting.

    python -m studies.pruning.study ablation            # held-out calibration text; chooses the defaults
    python -m studies.pruning.study table               # WikiText-2 raw test; only after the ablation is committed
    python -m studies.pruning.study show ablation       # the cells that are there, as Markdown

A cell is what `saap prune` writes with these settings, loaded and evaluated: no cell is a mask. Finished cells are not
made again. Chunks are of 256 tokens, predicted from their own start; `--chunks 40` screens, 160 confirms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from saap import __version__, models
from saap.adaptive import AdaptiveOptions
from saap.baselines import published
from saap.checkpoint import load_model, read_record
from saap.errors import SaapError
from saap.fusion import FusionOptions
from saap.masking import mean_nll
from saap.models import load_tokenizer
from saap.protocol import Cut, windows_of
from saap.prune import prune
from saap.prune_options import PruneOptions
from saap.requirement import Requirement
from saap.rows import training_rows
from saap.text import documents_of, pack, read_file

HERE = Path(__file__).resolve().parent
SEQUENCES, LENGTH, HELD = 64, 256, 40
SCREEN = 40  # chunks of the test on which rows are screened

STRONGEST_FIRST = (
    "flap", "param_second", "param_first", "wanda_sp", "param_mix", "vector", "shortgpt", "magnitude", "random",
)  # fmt: skip
Variant = dict[str, Any]  # options of PruneOptions, with fusion's and adaptive's under their own names


def options_of(variant: Variant) -> PruneOptions:
    """PruneOptions from a flat dict."""
    given = {
        part: {name: variant[name] for name in names if name in variant}
        for part, names in (
            ("fusion", ("score", "slices", "sigma", "learned", "stability", "layer_power")),
            ("adaptive", ("c", "exact", "modules", "corrections", "prices")),
            ("rest", ("method", "compensate", "heads", "seed", "steps")),
        )
    }
    adaptive = AdaptiveOptions(fusion=FusionOptions(**given["fusion"]), **given["adaptive"])
    kept = None if variant.get("text") == "alike" else frozenset[int]()  # alike: every layer may be pruned
    return PruneOptions(Requirement(ratio=variant["ratio"]), adaptive=adaptive, keep_layers=kept, **given["rest"])


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
            self._rows[seed, count] = training_rows(self.model_dir, None, "calibration", count, LENGTH, seed).ids
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


def slug(variant: Variant) -> str:
    """A file name for a cell."""
    parts = [f"{k}={','.join(map(str, v)) if isinstance(v, list) else v}" for k, v in sorted(variant.items())]
    return "_".join(parts).replace("/", "-") or "dense"


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
            prune(model_dir, out, ids, options_of(variant))
        except SaapError as error:
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
        "weighed": plan["reasons"]["weighed"],  # how attention was, in each step where it was
        "nll": {**known.get("nll", {}), **nll},
        "seconds": round(pruned, 1),
        "versions": {"saap": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "date": time.strftime("%Y-%m-%d"),
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


def ablation_variants() -> list[Variant]:
    """One thing at a time, without compensation and in one step; then compensation and steps."""
    base: Variant = {"method": "saap", "compensate": "none", "score": "vector-token", "steps": 1, "layer_power": 0}
    changes: list[Variant] = [
        {"score": s} for s in ("vector-token", "fused-token", "fused", "vector", "element", "token")
    ]
    changes += [
        {"c": 1.0}, {"slices": "output"}, {"sigma": "layer"}, {"stability": -0.5}, {"stability": 0.5}, {"heads": False},
        {"score": "fused", "exact": True}, {"modules": True}, {"corrections": 1}, {"steps": 2}, {"compensate": "bias"},
        {"compensate": "refit"}, {"compensate": "refit", "steps": 2}, {"compensate": "refit", "steps": 4},
        {"layer_power": 1}, {"layer_power": 2}, {"compensate": "refit", "steps": 4, "layer_power": 1},
    ]  # fmt: skip
    return [{**base, **change} for change in changes]


def table_variants() -> list[Variant]:
    """SAAP as it is by default, and every baseline as published and alike, FFN alone and with KV groups.

    Alike is our text, tokens and layers. Compensation: none, the refit, and a bias where a paper has one. What a score
    and a search do by themselves is read off the rows without compensation.
    """
    rows: list[Variant] = [{"method": "saap", "compensate": c} for c in ("refit", "none", "bias")]
    rows.append({**rows[0], "text": "wikitext"})  # against FLAP as published, which is calibrated on that
    rows.append({**rows[0], "sequences": 2 * SEQUENCES})  # a quarter of the tokens that FLAP as published takes
    for method in STRONGEST_FIRST:
        own = "bias" if method == "flap" else "none"
        kinds = ("bias", "refit", "none") if method in ("flap", "wanda_sp") else ("refit", "none")
        for heads in (False,) if method == "shortgpt" else (False, True):
            cell = {"method": method, "heads": heads}
            rows += [{**cell, "text": "alike", "compensate": compensation} for compensation in kinds]
            rows.append({**cell, "text": "published", "compensate": own})
    return rows


def remember_rankings() -> None:
    """Score once for all ratios and compensations: a ranking depends on neither."""
    from saap import prune as module

    known: dict[tuple[Any, ...], Any] = {}
    rank = module.rank

    def remembered(method: str, model: Any, shape: Any, ids: torch.Tensor, **options: Any) -> Any:
        settings = sorted((k, v) for k, v in options.items() if k != "progress")
        key = (method, str(settings), hashlib.sha256(ids.numpy().tobytes()).hexdigest())
        if key not in known:
            known[key] = rank(method, model, shape, ids, **options)
        return known[key]

    module.rank = remembered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["ablation", "table", "cell", "show"])
    parser.add_argument("rest", nargs="*", help="show: which; cell: key=value; else: only rows with these key=value")
    parser.add_argument("--ratios", default="0.2,0.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--chunks", type=int, default=SCREEN, help="of the test; the first 40 have a number of their own"
    )
    parser.add_argument("--methods", help="of the table, only these, as saap,flap")
    parser.add_argument("--where", help="folder of the cells; default: by what is run")
    given = parser.parse_args()
    if given.what == "show":
        show(_place(given.rest[0]))
        return
    ratios, seeds = [float(r) for r in given.ratios.split(",")], [int(s) for s in given.seeds.split(",")]
    model_dir = Path(models.resolve("smollm2-135m"))
    texts = Texts(model_dir)
    remember_rankings()
    variants = {"ablation": ablation_variants, "table": table_variants}.get(given.what, list)()
    if given.methods:
        variants = [v for v in variants if v["method"] in given.methods.split(",")]
    settings = {k: _value(v) for k, v in (pair.split("=", 1) for pair in given.rest)}
    variants = [settings] if given.what == "cell" else [v for v in variants if settings.items() <= v.items()]
    where = _place(given.where or given.what)
    for seed in seeds:
        judged = (
            {f"test{n}": texts.test(n) for n in sorted({SCREEN, given.chunks})}
            if given.what == "table"
            else {"held": texts.held(seed), "other": texts.other()}
        )
        for variant in variants:
            ids = texts.of({**variant, "seed": seed})
            for ratio in ratios:
                run_cell(where, {**variant, "ratio": ratio, "seed": seed}, model_dir, ids, judged)


def _place(name: str) -> Path:
    """The folder of the table, the ablation, or ``pays``."""
    ablation = HERE.parent / "ablation" / "cells"
    return {"ablation": ablation, "pays": ablation / "pays"}.get(name, HERE / "cells" / name)


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower())
    except json.JSONDecodeError:
        return text


def show(where: Path) -> None:
    """Cells as Markdown: mean over seeds."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(where.glob("*.json")):
        cell = json.loads(path.read_text())
        groups.setdefault(slug({k: v for k, v in cell["variant"].items() if k != "seed"}), []).append(cell)
    print("| settings | seeds | removed | NLL |\n|---|---|---|---|")
    for name, cells in groups.items():
        removed = sum(c["achieved"]["ratio"] for c in cells) / len(cells)
        both = [t for t in cells[0]["nll"] if all(t in c["nll"] for c in cells)]
        means = {t: sum(c["nll"][t] for c in cells) / len(cells) for t in both}
        print(f"| {name} | {len(cells)} | {removed:.4f} | {', '.join(f'{t} {v:.4f}' for t, v in means.items())} |")


if __name__ == "__main__":
    main()
