"""Does pruning depend on the seed? The spread over calibration seeds, and one seed run twice.

    python -m studies.pruning.seeds spread         # SAAP and LLM-Pruner alike at 20 %, seeds 0 to 9, into seeds/
    python -m studies.pruning.seeds twice          # prunes twice with one seed; the hashes of all files, twice.json

Cells are those of pruning_bench.py; what its table has already is not made again. Pruning twice scores twice: the
scores that were kept are not used.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from saap import models
from saap.json_files import write_json
from saap.prune import prune
from saap.prune_options import PruneOptions
from studies.pruning.bars import MANY_SEEDS
from studies.pruning.study import HERE, Texts, Variant, options_of, remember_rankings, run_cell, slug

RATIO, CHUNKS = 0.2, 40


def spread_variants(methods: Sequence[str]) -> list[Variant]:
    """SAAP with and without its refit, and forms of LLM-Pruner, FFN only, on our text and with all layers allowed."""
    rows: list[Variant] = [{"method": "saap", "compensate": kind} for kind in ("refit", "none")]
    rows += [
        {"method": method, "heads": False, "text": "alike", "compensate": kind}
        for kind in ("none", "refit")
        for method in methods
    ]
    return [{**row, "ratio": RATIO} for row in rows]


def spread(where: Path, model_dir: Path, texts: Texts, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """A cell for every seed that the table does not have."""
    judged = {f"test{CHUNKS}": texts.test(CHUNKS)}
    for seed in seeds:
        for variant in spread_variants(methods):
            cell = {**variant, "seed": seed}
            if not (where / "table" / f"{slug(cell)}.json").is_file():
                run_cell(where / "seeds", cell, model_dir, texts.alike(seed), judged)


def twice(model_dir: Path, ids: torch.Tensor, options: PruneOptions) -> list[dict[str, str]]:
    """sha256 of every file of two slim directories, made with nothing kept from one to the other."""
    found = []
    cache = os.environ.get("SAAP_CACHE")
    try:
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["SAAP_CACHE"] = str(Path(folder) / "cache")
                slim = Path(folder) / "slim"
                prune(model_dir, slim, ids, options)
                found.append({p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(slim.iterdir())})
    finally:
        os.environ.pop("SAAP_CACHE")
        if cache is not None:
            os.environ["SAAP_CACHE"] = cache
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["spread", "twice"])
    parser.add_argument(
        "--methods", default="param_first", help="of LLM-Pruner: param_first,param_second,param_mix,vector"
    )
    parser.add_argument("--seeds", default=",".join(map(str, MANY_SEEDS)))
    given = parser.parse_args()
    model_dir = Path(models.resolve("smollm2-135m"))
    texts = Texts(model_dir)
    seeds = [int(seed) for seed in given.seeds.split(",")]
    if given.what == "spread":
        remember_rankings()
        spread(HERE / "cells", model_dir, texts, given.methods.split(","), seeds)
        return
    variant: Variant = {"method": "saap", "ratio": RATIO, "seed": seeds[0]}
    write_json(
        HERE / "cells" / "twice.json",
        {"variant": variant, "files": twice(model_dir, texts.alike(seeds[0]), options_of(variant))},
    )


if __name__ == "__main__":
    main()
