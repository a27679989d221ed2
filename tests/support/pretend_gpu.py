"""A GPU that is none: tensors that say they are on cuda:0 while the CPU computes, and that do not mix with others.

What a real GPU refuses is refused: an operation on tensors of two devices, and reading memory without ``.cpu()``. What
it computes is what the CPU computes, bit for bit, so that a whole command can be held against its run on the CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
INSIDE = "lazy"  # what torch's own code takes the tensors for: a device that needs no driver and no thread of its own
KINDS = ("cuda", INSIDE)
COPIES = {"aten::_to_copy", "aten::copy_", "aten::to"}
INDEXES = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}  # by indices of the CPU


class OnGpu(torch.Tensor):
    """Numbers of the CPU that say they are a GPU's."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=INSIDE,
        )  # fmt: skip
        made.inner = inner
        return made

    @property
    def device(self):
        return GPU

    @property
    def is_cuda(self):
        return True

    def cpu(self, *_):
        return self.to("cpu")

    def cuda(self, *_):
        return self

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use .cpu()")

    def tolist(self):
        return self.inner.tolist()

    def __repr__(self):
        return f"OnGpu({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


@torch.inference_mode(False)
@torch.no_grad()
def computed(func, args, kwargs):
    """An operation, on the device of its tensors, or on the one that it names."""
    name = func._schema.name
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
    ours = [each for each in tensors if isinstance(each, OnGpu)]
    if name == "aten::_has_compatible_shallow_copy_type":
        return len(ours) in (0, len(tensors))
    if ours and name not in COPIES:
        others = [each for each in tensors if not isinstance(each, OnGpu) and each.dim() and each.numel()]
        if name in INDEXES:
            others = [each for each in others if each is tensors[0]]
        if others:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
    (asked,) = [each for each in leaves if isinstance(each, torch.device)] or [None]
    args, kwargs = tree_map(_inner, (args, kwargs))
    with _disable_current_modes():
        found = func(*args, **kwargs)
    if name.endswith("_") and not name.endswith("__"):  # in place
        return tensors[0]
    on_gpu = asked.type in KINDS if asked is not None else bool(ours)
    places = {id(each.inner): each for each in ours}  # what is given back as it came

    def placed(each):
        if not isinstance(each, torch.Tensor) or not on_gpu:
            return each
        return places[id(each)] if id(each) in places else OnGpu(each)

    return tree_map(placed, found)


def _inner(each):
    if isinstance(each, OnGpu):
        return each.inner
    return torch.device("cpu") if isinstance(each, torch.device) and each.type in KINDS else each


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class _Named(TorchFunctionMode):
    """What Python calls a GPU, torch's own code gets as ``INSIDE``."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def named(each):
            gpu = isinstance(each, torch.device | str) and str(each).partition(":")[0] == "cuda"
            return torch.device(INSIDE) if gpu else each

        if func is not torch.device:
            args, kwargs = tree_map(named, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def moved_as_one(to):
    """``nn.Module.to`` that keeps tied parameters tied, as it does between real devices."""

    def move(module, *args, **kwargs):
        places = {}
        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is not None:
                    places.setdefault(id(parameter), []).append((each, name))
        to(module, *args, **kwargs)
        for (first, called), *others in places.values():
            for each, name in others:
                each._parameters[name] = first._parameters[called]
        return module

    return move


@contextmanager
def pretend_gpu(monkeypatch, free: int = 8 << 30) -> Iterator[torch.device]:
    """Inside the block torch sees one GPU of so much free memory."""
    cuda = torch.cuda
    told = {
        "is_available": lambda: True, "device_count": lambda: 1, "_lazy_init": lambda: None,
        "mem_get_info": lambda device=None: (free, 2 * free), "set_device": lambda device: None,
        "is_bf16_supported": lambda including_emulation=True: False, "current_device": lambda: 0,
        "get_rng_state": lambda device=None: torch.get_rng_state(), "set_rng_state": lambda state, device=None: None,
        "empty_cache": lambda: None, "synchronize": lambda device=None: None,
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="a pretended GPU", total_memory=2 * free, major=6, minor=0  # older than any that Triton compiles for
        ),
    }  # fmt: skip
    with monkeypatch.context() as patch:
        for name, value in told.items():
            patch.setattr(cuda, name, value)
        patch.setattr(torch.nn.Module, "to", moved_as_one(torch.nn.Module.to))
        with _Named(), _Mode():
            yield GPU
