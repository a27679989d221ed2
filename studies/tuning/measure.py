"""One cell of tuning: prune, tune, export, and measure NLL."""

from __future__ import annotations

import json
import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saap.base.writing import write_json
from saap.evaluate.perplexity import score_models, torch_scorer
from saap.models import resolve as models
from saap.models.checkpoint import load_model, read_config, write_slim
from saap.models.record import read_record
from saap.models.resolve import load_tokenizer
from saap.models.weight_files import tensor_reader
from saap.prune.options import PruneOptions
from saap.prune.pruning import prune
from saap.text.documents import Sequences, documents_of, read_file
from saap.text.rows import FEWEST_ROWS, TuningRows, held_out, training_rows, tuning_rows
from saap.text.windows import Cut, windows_of
from saap.tune.loop.steps import Run, train
from saap.tune.tuning import TuneOptions, loss_of, targets_of, tensors_of, tune
from studies.common import ROOT, provenance
from studies.tuning.study import CELLS, DEFAULTS, Variant, slug

OUT = ROOT / "out" / "tuning"
SEQUENCES, LENGTH, UNSEEN, SEED, CHUNKS = 64, 256, 40, 0, 160
SCALE_RATE = 3e-3  # where a cell names none: saap's own was that when the table was made, and has doubled since


def mean_nll(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats per predicted token, ids [sequences, tokens]."""
    (row,) = score_models({"model": torch_scorer(model)}, ids)
    return float(row.nll or 0.0)


def chunks_of(name: str, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """A file of $SAAP_DATA in windows that follow one another, [n, 256]."""
    (text,) = read_file(Path(os.environ["SAAP_DATA"]) / name, whole=True)
    return windows_of(documents_of([text], "text"), tokenizer, Cut(LENGTH)).ids


def slim_of(model_dir: Path, ratio: float) -> Path:
    """The pruned model with SAAP's defaults."""
    out = OUT / f"slim-{model_dir.name}-{ratio:g}"
    if not out.is_dir():
        rows = training_rows(model_dir, None, "calibration", Sequences(SEQUENCES + UNSEEN, LENGTH, SEED))
        prune(model_dir, PruneOptions(ratio=ratio), output=out, calibration=rows.ids[:SEQUENCES])
    return out


def rows_of(slim: Path, tokens: int) -> tuple[TuningRows, torch.Tensor]:
    """Rows to tune on, and rows after them that nothing is chosen, tuned or stopped by, [40, 256]."""
    count = max(tokens // LENGTH, FEWEST_ROWS)  # what is not tuned reads none of them
    calibrated = read_record(slim)["lineage"]["calibration"]
    skip = -(-calibrated["sequences"] * calibrated["tokens"] // LENGTH)
    unseen = tuning_rows(slim, None, Sequences(UNSEEN, LENGTH, SEED, skip))  # the same for any count
    return tuning_rows(slim, None, Sequences(count, LENGTH, SEED, skip + UNSEEN)), unseen.ids


def options_of(variant: Variant) -> TuneOptions:
    """TuneOptions of a cell; the loop's options are the defaults."""
    names = {"lr": "learning_rate", "teacher": "teacher_weight", "head": "head_bits", "bits": "bits",
             "group": "group_size", "integers": "integers"}  # fmt: skip
    options = {theirs: variant[mine] for mine, theirs in names.items() if mine in variant}
    options.setdefault("learning_rate", SCALE_RATE)
    return TuneOptions(**options)


def run_cell(variant: Variant, test: bool) -> None:
    """Tune, export, measure, write; what is known is not measured again."""
    variant = {**DEFAULTS, **variant}
    if untuned := variant["fold"] == "none":
        variant |= {"tokens": 0, "teacher": 0}
    model_dir = Path(models.resolve("smollm2-135m"))
    tokenizer = load_tokenizer(model_dir)
    path, name = CELLS / f"{slug(variant)}.json", slug(variant)
    cell = json.loads(path.read_text()) if path.is_file() else {"variant": variant, "nll": {}}
    missing = {"held", "other", *([f"test{CHUNKS}"] if test else [])} - set(cell["nll"])
    if not missing:
        return
    slim = slim_of(model_dir, variant["ratio"] or DEFAULTS["ratio"])  # of the dense model: for its rows
    rows, unseen = rows_of(slim, variant["tokens"])
    tuned, began = OUT / (lora_name(variant) if variant["fold"] == "lora" else name), time.monotonic()
    if untuned:
        tuned = slim if variant["ratio"] else model_dir
    elif not tuned.is_dir():
        if variant["fold"] == "lora":
            cell["training"] = tune_lora(variant, slim, model_dir, rows)
        else:
            teacher = model_dir if variant["teacher"] else None
            tune(slim, options_of(variant), output=tuned, data=rows, teacher=teacher, progress=say)
            tuning = read_record(tuned)["tuning"]
            cell["training"] = {**tuning["history"], "trained": tuning["trained_parameters"]}
        cell["seconds"] = round(time.monotonic() - began, 1)
        cell["peak_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3)
    other = chunks_of("wikitext2_train_raw_head1MB.txt", tokenizer)[100:180]
    test_ids = chunks_of("wikitext2_test_raw.txt", tokenizer)[:CHUNKS]
    for text, ids in {"held": unseen, "other": other, f"test{CHUNKS}": test_ids}.items():
        if text in missing:
            cell["nll"][text] = nll_of(tuned, slim, variant, ids)
    write_json(path, cell | provenance())
    print(f"{name}: {cell['nll']}", flush=True)


def lora_name(variant: Variant) -> str:
    """One float LoRA for all integers that are made of it."""
    return slug({k: v for k, v in variant.items() if k not in ("integers", "head", "bits", "group")})


def nll_of(directory: Path, slim: Path, variant: Variant, ids: torch.Tensor) -> float:
    """Nats per token: by ONNX Runtime of a bundle with integers, by torch of a float model."""
    integers = variant.get("integers") if variant["fold"] in ("lora", "none") else "tuned"
    if integers is None:
        return mean_nll(load_model(directory), ids)
    from export import ExportOptions, export
    from saap.evaluate.subjects import Bundle

    source, bundle = directory, OUT / f"bundle-{slug(variant)}"
    if not bundle.is_dir():
        if integers != "tuned":
            source = OUT / f"integers-{slug(variant)}"
            still = options_of(variant)
            still = replace(still, learning_rate=0.0, norm_rate=0.0, held_out=0.0)
            rows, _ = rows_of(slim, 16 * LENGTH)
            still = replace(still, training=replace(still.training, rows_per_step=16))
            tune(directory, still, output=source, data=rows)
        export(source, ExportOptions(parity="none"), output=bundle)
    (row,) = score_models({"bundle": Bundle("bundle", bundle).scorer(torch.device("cpu"))}, ids)
    return row.nll


def tune_lora(variant: Variant, slim: Path, teacher_dir: Path, rows: TuningRows) -> dict[str, Any]:
    """Float LoRA on the same linears with the same loop, loss, rows and norms; merged into a slim directory."""
    directory = OUT / lora_name(variant)
    if directory.is_dir():
        return json.loads((directory / "lora.json").read_text())
    options = options_of(variant)
    model, targets = load_model(slim), targets_of(teacher_dir if variant["teacher"] else None, rows, options, say)
    learnt, judged = held_out(rows, options.held_out)
    rank = variant.get("rank") or lora_rank(model)
    adapted = with_lora(model, rank)
    norms = [p for n, p in adapted.named_parameters() if "norm" in n]
    for norm in norms:
        norm.requires_grad_(True)
    lora = [p for n, p in adapted.named_parameters() if "lora_" in n]
    groups = [{"params": lora, "lr": variant.get("lr", 1e-3)}, {"params": norms, "lr": options.rates[1]}]
    history = train(
        model, groups, tensors_of(learnt, 0), loss_of(targets, options),
        Run(options.training, held_out=tensors_of(judged, len(learnt)), held_out_loss=loss_of(None, options),
            state_dir=OUT / f".{lora_name(variant)}.tuning", fingerprint={"rank": rank, "model": str(slim)}),
        say,
    )  # fmt: skip
    trained = sum(p.numel() for group in groups for p in group["params"])
    merged: Any = adapted.merge_and_unload()
    record = {k: v for k, v in read_record(slim).items() if k != "format"}
    names = tensor_reader(slim)[0]  # a tied head is no tensor of its own
    write_slim(directory, slim, read_config(slim), ((n, merged.state_dict()[n]) for n in names), record)
    about = {**vars(history), "trained": trained, "rank": rank}
    write_json(directory / "lora.json", about)
    return about


def with_lora(model: PreTrainedModel, rank: int) -> Any:
    """Put LoRA on every linear of the decoder layers, in place."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=r"model\.layers\.\d+\..*_proj", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def lora_rank(model: PreTrainedModel, block: int = 32) -> int:
    """The smallest rank with at least as many parameters as one factor per group."""
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("model.layers.")]
    groups = sum(m.out_features * m.in_features // block for m in linears)
    each = sum(m.out_features + m.in_features for m in linears)
    return -(-groups // each)


def say(label: str, done: float, total: float) -> None:
    """A line now and then."""
    if done == total or int(done) % 50 == 0:
        print(f"  {label}: {done:.0f}/{total:.0f}", flush=True)
