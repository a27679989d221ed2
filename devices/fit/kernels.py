"""Does a bundle load on a device, and which of ONNX Runtime's kernels will run it.

What the kernels are was read from ONNX Runtime's sources (MLAS, KleidiAI) and, on x86-64, measured; nobody has run
them on the boards.
"""

from __future__ import annotations

import re

from devices.fit.facts import Device, Finding, Model

# Head sizes and query heads per KV head for which CUDA's attention has its fast decode path (ONNX Runtime 1.32).
CUDA_HEADS = (64, 128, 256)
CUDA_RATIOS = (1, 2, 4, 5, 8, 16, 32)
# What the onnxruntime-gpu wheel for arm64 holds kernels for.
WHEEL_GPUS = ("sm_89", "sm_90", "sm_120", "sm_121")
OWN_PYTHON = "install a Python of your own, 3.11 or newer, and onnxruntime into it; then say --onnxruntime VERSION"


def dotprod(device: Device) -> bool | None:
    """Whether the CPU multiplies int8 in hardware; every x86-64 is taken to, None is unknown."""
    return True if device.architecture == "x86_64" else has(device, "dotprod")


def has(device: Device, feature: str) -> bool | None:
    """Whether the CPU has a feature; None is unknown."""
    return True if feature in device.isa else False if feature in device.lacks else None


def refusals(model: Model, device: Device) -> tuple[Finding, ...]:
    """Why it would not load, or not run at a speed that makes sense; empty where nothing is known against it."""
    found = []
    if device.onnxruntime and _version(device.onnxruntime) < _version(model.onnxruntime_min):
        found.append(
            Finding(
                f"it needs ONNX Runtime {model.onnxruntime_min}, there it is {device.onnxruntime} "
                f"({device.onnxruntime_source})",
                _for_older(model, device),
            )
        )
    if model.target != "cuda" and model.bits == 8 and dotprod(device) is False:
        found.append(
            Finding("8 bit has no kernel without dotprod", "saap export MODEL -o BUNDLE --bits 4 --no-dotprod")
        )
    if model.target != "cuda" and model.bits == 8 and model.accuracy_level != 4:
        found.append(
            Finding(
                "8 bit is fast at accuracy level 4 only (else 250 times slower)", "saap export MODEL -o BUNDLE --bits 8"
            )
        )
    if model.target == "cuda" and device.cuda == "none":
        found.append(Finding("it is for CUDA, and there is no such GPU", "saap export MODEL -o BUNDLE --target cpu"))
    return tuple(found)


def kernels(model: Model, device: Device) -> tuple[str, ...]:
    """Which kernels multiply its matrices, for people; empty where that cannot be told."""
    if model.target == "cuda":
        return (f"CUDA, {device.cuda or 'a GPU that is not known'}: float16, {model.bits}-bit weights",)
    if model.bits == 32:
        return ("float32",)
    if device.architecture == "aarch64":
        return _arm_kernels(model, device)
    return _x86_kernels(model, device) if device.architecture == "x86_64" else ()


def remarks(model: Model, device: Device) -> tuple[str, ...]:
    """What a person has to know of a bundle that loads, or that may."""
    told = []
    if device.onnxruntime is None:
        told.append(f"needs ONNX Runtime {model.onnxruntime_min}; which one is there is not known")
    if model.target != "cuda" and model.bits == 8 and dotprod(device) is None:
        told.append("8 bit needs dotprod, and whether the CPU has it is not known")
    if model.target != "cuda" and model.bits == 4 and dotprod(device) is False:
        told.append("without dotprod 4 bit is computed in float32: arithmetic, not memory, will be the limit")
    if model.target == "cpu" and model.kv_dtype == "float16":
        told.append("a float16 cache is slower than float32 on CPUs")
    if model.target == "portable":
        told.append("standard operators copy the cache at every token: it counts twice, and decode slows with depth")
    return (*told, *(_cuda_remarks(model, device) if model.target == "cuda" else ()))


def _arm_kernels(model: Model, device: Device) -> tuple[str, ...]:
    dot = dotprod(device)
    if model.accuracy_level != 4 or dot is False:
        return ("float32 (NEON) on weights of 4 bit",) if model.bits == 4 else ()
    if dot is None:
        return ("int8 dot product if the CPU has dotprod, else float32 (NEON)",)
    decode = "int8 dot product (dotprod)"
    if has(device, "i8mm") and model.block % 32 == 0:
        return (f"decode: {decode}", "prefill: int8 matrix product (i8mm)")
    return (decode,)


def _x86_kernels(model: Model, device: Device) -> tuple[str, ...]:
    if has(device, "avx2") is False:
        return ("float32 after unpacking: without AVX2 there is no kernel for packed weights, and it is very slow",)
    wide = "AVX512" if has(device, "avx512f") else "AVX2" if has(device, "avx2") else "AVX2 or AVX512"
    if model.accuracy_level != 4:
        return (f"float32 ({wide}) on weights of {model.bits} bit",)
    if has(device, "avx512_vnni") or (wide == "AVX2" and has(device, "avx_vnni")):
        return (f"int8 dot product ({wide}-VNNI)",)
    return (f"int8 products in several instructions ({wide} without VNNI)",)


def _cuda_remarks(model: Model, device: Device) -> list[str]:
    told = ["the memory is a lower bound: what CUDA itself takes has not been measured"]
    if device.cuda is None:
        told.append("whether there is a GPU for CUDA is not known")
    elif device.architecture == "aarch64" and device.cuda not in (*WHEEL_GPUS, "none"):
        told.append(
            f"onnxruntime-gpu on PyPI has no kernels for {device.cuda}: it needs a build of NVIDIA's for Jetson"
        )
    ratios = {heads / kv for heads, kv in model.attention}
    if model.head_dim not in CUDA_HEADS or not ratios <= set(CUDA_RATIOS):
        told.append(
            f"attention takes CUDA's slow path: the fast one wants heads of {', '.join(map(str, CUDA_HEADS))} and "
            f"{', '.join(map(str, CUDA_RATIOS))} query heads per KV head"
        )
    return told


def _for_older(model: Model, device: Device) -> str:
    """What to do about an ONNX Runtime that is too old: the int8 cache is what asks for a newer one."""
    if model.kv_dtype == "int8" and device.onnxruntime and _version(device.onnxruntime) >= (1, 23):
        return "saap export MODEL -o BUNDLE --kv 32"
    return OWN_PYTHON


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d{1,9}", text)[:2])
