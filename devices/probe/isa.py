"""Instruction set features that decide which int4, int8 and half-precision kernels ONNX Runtime takes."""

from __future__ import annotations

# Kernel name of a CPU feature (arch/arm64/kernel/cpuinfo.c, arch/x86/include/asm/cpufeatures.h) -> the name used in
# profiles and results.
ISA_FEATURES = {
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx_vnni": "avx_vnni",
    "amx_int8": "amx_int8",
    "asimd": "asimd",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}

FEATURES = frozenset(ISA_FEATURES.values())
