"""One or several processes that train one model, through Hugging Face accelerate.

Started plainly, there is one process. Under ``accelerate launch`` each process takes its share of every step's rows:
data parallel (DDP, every process holds the whole model) or FSDP 2 (parameters, gradients and optimiser state are
sharded; buffers, such as packed integers, are not). The processes meet in the gradients and in a few numbers per step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, broadcast_object_list
from torch import nn
from torch.torch_version import TorchVersion

from saap.base.errors import UserError
from saap.system.processes import meet_on_cpus

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
Batch = dict[str, torch.Tensor]
LossOf = Callable[[nn.Module, Batch], tuple[torch.Tensor, torch.Tensor]]

REFUSED = {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA}
FSDP_TORCH = "2.9"  # 2.6 cannot shard here; with 2.7 and 2.8 a step's gradients were not one process's


class LossModule(nn.Module):
    """A model whose forward pass ends in the loss, so that whatever part of the model a loss calls is seen by DDP."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = getattr(model, "_no_split_modules", None)  # what FSDP makes its units of

    def forward(self, loss_of: LossOf, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum of the losses of a batch's learnt tokens, and their number."""
        return loss_of(self.model, batch)

    def get_input_embeddings(self) -> nn.Module | None:
        """Asked for by FSDP, which shards a tied embedding together with its head."""
        return getattr(self.model, "get_input_embeddings", lambda: None)()

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self.model, "get_output_embeddings", lambda: None)()


def join_processes() -> Accelerator:
    """Meet the other processes of ``accelerate launch``, or be alone; UserError for a launch that is not supported."""
    # Precision is ours (saap.system.precision): accelerate's would turn outputs to float32 and cannot change within a
    # process.
    # Buffers are the same everywhere already; sending the integers with every forward pass would be slow.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=meet_on_cpus(), mixed_precision="no", kwargs_handlers=[ddp])
    state = accelerator.state
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started and {accelerator.num_processes} joined: launch on one device type"
        )
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        # accelerate shards on GPUs only and would silently not shard here; torch does over gloo.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if state.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UserError("FSDP 1 is not supported: give accelerate launch --fsdp_version 2")
    if state.distributed_type == DistributedType.FSDP and TorchVersion(torch.__version__) < FSDP_TORCH:
        raise UserError(
            f"FSDP needs torch 2.9 and this is {torch.__version__}: install it, or launch with data parallel"
        )
    if state.distributed_type in REFUSED:
        raise UserError(f"{state.distributed_type.value} is not supported: launch with data parallel or FSDP 2")
    return accelerator


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Prepare the model's loss and the optimiser for all processes; under FSDP the parameters are sharded."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`broadcast_buffers` is deprecated", FutureWarning
        )  # its heir is in new torch
        module, wrapped = accelerator.prepare(LossModule(model), optimizer)
    return module, wrapped.optimizer  # accelerate's wrapper adds gradient scaling, which bfloat16 does not need


def add_up(accelerator: Accelerator, numbers: Sequence[float]) -> list[float]:
    """Each number's sum over the processes, the same bits in all of them."""
    if accelerator.num_processes == 1:
        return list(numbers)
    precise = torch.float32 if accelerator.device.type == "mps" else torch.float64
    mine = torch.tensor(numbers, dtype=precise, device=accelerator.device)
    return [float(x) for x in accelerator.reduce(mine, reduction="sum")]


def from_main(accelerator: Accelerator, value: T) -> T:
    """Share the main process's value with all of them."""
    if accelerator.num_processes == 1:
        return value
    return cast("T", broadcast_object_list([value])[0])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Put a sharded tensor together, on the CPU; every process has to call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).cpu()


def like(tensor: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """``full``, on the device of ``tensor`` and sharded as it is if their shapes are the same."""
    full = full.to(tensor.device)
    if is_sharded(tensor) and tensor.shape == full.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(full, tensor.device_mesh, tensor.placements)
    return full


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is a DTensor, which a torch built without torch.distributed does not know."""
    return hasattr(tensor, "full_tensor")


def unshard(model: nn.Module) -> None:
    """Put whole parameters in the places of sharded ones, for writing them out; no forward pass may follow."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # some units are left whole after their forward pass
    wholes: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and is_sharded(parameter):
                if id(parameter) not in wholes:
                    wholes[id(parameter)] = nn.Parameter(whole(parameter), parameter.requires_grad)
                module._parameters[name] = wholes[id(parameter)]
    for module in model.modules():
        for hooks in (module._state_dict_pre_hooks, module._load_state_dict_pre_hooks):
            for number, hook in list(hooks.items()):
                if "fsdp" in getattr(getattr(hook, "hook", hook), "__module__", ""):
                    del hooks[number]  # it would put the shards back
        if isinstance(
            module, FSDPModule
        ):  # whose to() expects shards; fully_shard wholes a subclass of (this, its own)
            module.__class__ = type(module).__bases__[1]
