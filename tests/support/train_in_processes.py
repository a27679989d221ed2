"""Train a tiny model in the processes that start this: python train_in_processes.py MODEL OUT RUNS COMMANDS.

RUNS are arguments of :func:`main`; COMMANDS are of saap, and what they printed is in OUT/command-<rank>.json.
"""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from support.command_line import here
from support.fast_passes import skip_packing
from torch import nn
from torch.nn import functional as F

from saap.models.checkpoint import load_model
from saap.system.processes import is_main_process
from saap.tune.loop.processes import prepare
from saap.tune.loop.steps import DivergedError, Run, train
from saap.tune.options import TrainOptions

STEPS, ROWS = 3, 4


class Factor(nn.Module):
    """A linear with a trained parameter of its own beside the frozen weight, as the tuning folds are."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.factor = nn.Parameter(torch.zeros(base.out_features, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) * (1 + self.factor.sum(-1))


class KilledError(Exception):
    pass


def main(model_dir: str, out: Path, state: str, kill: int | None = None, poison: int | None = None) -> None:
    """One run, with its state in OUT/STATE; writes OUT/STATE-<rank>.json and .safetensors.

    Args:
        kill: the step in which every process is killed.
        poison: the step in which the second process meets a loss that is not a number.
    """
    generator = torch.Generator().manual_seed(0)
    ids = (torch.arange(24)[None] + torch.randint(300, (20, 1), generator=generator)) % 320
    labels = ids.clone()
    labels[0:2, 3:] = -100  # the first process learns fewer tokens than the second
    labels[6:8, 1:] = -100  # and the second none at all in the second step
    rows = {"ids": ids, "labels": labels}
    model = load_model(model_dir).requires_grad_(False)
    for layer in model.model.layers:
        layer.mlp.down_proj = Factor(layer.mlp.down_proj)
    factors = [layer.mlp.down_proj.factor for layer in model.model.layers]
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    for parameter in factors + norms:
        parameter.requires_grad_(True)
    sharded, taken, said = set(), [], []
    second = not is_main_process()

    def watched(*given: Any) -> Any:
        prepared = prepare(*given)
        sharded.add(any(hasattr(p, "full_tensor") for p in prepared[0].parameters()))
        return prepared

    def loss_of(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(input_ids=batch["ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
        targets = batch["labels"][:, 1:].flatten()
        total = F.cross_entropy(logits, targets, reduction="sum")
        if model.training:
            taken.append(len(batch["ids"]))
            step = -(-sum(taken) // (ROWS // (torch.distributed.get_world_size() if distributed() else 1)))
            if step == kill:
                raise KilledError
            if step == poison and second:
                total = total * math.nan
        return total, (targets != -100).sum()

    report = {}
    groups = [{"params": factors, "lr": 1e-2}, {"params": norms, "lr": 1e-3}]
    cut = {name: tensor[: ROWS * STEPS] for name, tensor in rows.items()}
    held_out = {name: tensor[ROWS * STEPS + 3 :] for name, tensor in rows.items()}  # 5: not the same for both
    options = TrainOptions(rows_per_step=ROWS, micro_rows=1, precision="fp32", save_seconds=0.0)
    try:
        with mock.patch("saap.tune.loop.steps.prepare", watched):
            history = train(
                model, groups, cut, loss_of, Run(options, held_out=held_out, state_dir=out / state),
                lambda *seen: said.append(seen),
            )  # fmt: skip
    except DivergedError as error:
        history, report["error"] = error.history, str(error)
    except KilledError:
        history = None
    rank = torch.distributed.get_rank() if distributed() else 0
    kind = AcceleratorState().distributed_type.value
    report |= {"kind": kind, "sharded": True in sharded, "said": said, **(asdict(history) if history else {})}
    (out / f"{state}-{rank}.json").write_text(json.dumps(report), encoding="utf-8")
    trained = {name: p.detach() for name, p in model.named_parameters() if "norm" in name or "factor" in name}
    save_file({name: tensor.contiguous() for name, tensor in trained.items()}, out / f"{state}-{rank}.safetensors")


def distributed() -> bool:
    return torch.distributed.is_initialized()


if __name__ == "__main__":
    skip_packing()
    for run in json.loads(sys.argv[3]):
        main(sys.argv[1], Path(sys.argv[2]), **run)
    told = [vars(here(*words)) for words in json.loads(sys.argv[4])]
    Path(sys.argv[2], f"command-{torch.distributed.get_rank()}.json").write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
