"""Targets: the types that each computes in, and what its kernels refuse.

* ``cpu``: float32 activations, integers by the int8-activation kernels (accuracy level 4).
* ``cpu`` without dot product (Raspberry Pi 3 and 4): the float32 kernels, which 8 bit does not have.
* ``portable``: float32 and integers, in standard operators.
* ``cuda``: float16 throughout, since attention on CUDA takes no float32; MatMulNBits' fast kernels need symmetric
  groups and multiples of 8 as N and K.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from export.source import Precision
from saap.base.errors import UserError
from saap.models.shape import ModelShape

ONNXRUNTIME_PORTABLE = "1.20"
ONNXRUNTIME_MIN = "1.23"  # GatherBlockQuantized on packed uint8
ONNXRUNTIME_WINDOWS = "1.24"  # before, GroupQueryAttention on a CPU gets sliding windows wrong
ONNXRUNTIME_INT8_CACHE = "1.27"  # GroupQueryAttention with an int8 cache on a CPU
ONNXRUNTIME_LINEAR = "1.32"  # LinearAttention; older ones were not tried
CUDA_STEP = 8


@dataclass(frozen=True)
class Target:
    """A runtime and device that a bundle is made for."""

    name: str = "cpu"
    dotprod: bool = True  # the CPU multiplies int8 by hardware (every x86 since 2013, ARMv8.2 and newer)
    onnxruntime: str | None = None  # oldest version that must load it, as 1.23; None: whatever the graph needs

    def precision(self, precision: Precision, kv_bits: int) -> Precision:
        """``precision`` as this target computes it.

        Raises UserError: a combination that the target has no fast kernel for.
        """
        if self.name == "cuda":
            if kv_bits == 8:
                raise UserError("the cuda target keeps its cache in float16: leave --kv out")
            return replace(precision, accuracy_level=0, floats="float16", kv="float16")
        if self.name == "portable":  # ONNX Runtime fuses DequantizeLinear and MatMul to its int8 kernel by default
            return replace(precision, accuracy_level=4 if precision.bits != 32 else 0)
        if 8 in precision.all_bits and not self.dotprod:
            raise UserError("a CPU without dot product has no 8-bit kernel: export at 4 bit, or leave --no-dotprod out")
        if kv_bits == 8 and self.onnxruntime and _version(self.onnxruntime) < _version(ONNXRUNTIME_INT8_CACHE):
            raise UserError(
                f"ONNX Runtime {self.onnxruntime} has no int8 cache, {ONNXRUNTIME_INT8_CACHE} has: leave --kv out"
            )
        return replace(precision, accuracy_level=4 if self.dotprod else 0, kv="int8" if kv_bits == 8 else "float32")

    def oldest_runtime(self, shape: ModelShape, precision: Precision, windows: bool) -> str:
        """Return the oldest ONNX Runtime for a graph of these blocks and this precision, with windows or not."""
        if self.name == "portable":
            return ONNXRUNTIME_PORTABLE
        if shape.delta is not None:
            return ONNXRUNTIME_LINEAR
        if precision.kv == "int8":
            return ONNXRUNTIME_INT8_CACHE
        return ONNXRUNTIME_WINDOWS if windows and self.name == "cpu" else ONNXRUNTIME_MIN

    def check(self, shape: ModelShape, precision: Precision, windows: bool) -> None:
        """Refuse sizes that the target's kernels refuse, and versions that lack what the graph uses."""
        oldest = self.oldest_runtime(shape, precision, windows)
        why = {ONNXRUNTIME_WINDOWS: " for sliding windows", ONNXRUNTIME_LINEAR: " for gated delta nets"}
        check_runtime(self.onnxruntime, oldest, why.get(oldest, ""))
        if self.name == "cuda" and shape.delta is not None:
            raise UserError("gated delta nets are not exported for cuda: give --target cpu or portable")
        if self.name == "cuda" and shape.per_layer:
            raise UserError("embeddings for each layer are not exported for cuda: give --target cpu")
        if self.name != "cuda" or precision.bits == 32:
            return
        for index, sizes in enumerate(shape.layers):
            for width in (shape.hidden, *(shape.inner_width(kind, sizes) for kind in sizes.blocks)):
                if width % CUDA_STEP:
                    raise UserError(
                        f"layer {index} has a width of {width}, not a multiple of {CUDA_STEP} as CUDA's kernels "
                        "want: prune with --group-size 32 or larger"
                    )


CPU = Target()


def check_runtime(version: str | None, oldest: str, why: str = "") -> None:
    """Refuse to export for a version that is older than the graph needs."""
    if version and _version(version) < _version(oldest):
        raise UserError(f"ONNX Runtime {version} is too old, {oldest} or newer is needed{why}")


def _version(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(".")[:2])
    except ValueError:
        raise UserError(f"{text!r} is no version of ONNX Runtime: write something like {ONNXRUNTIME_MIN}") from None
