"""A model and three devices, for tests of whether one fits on the other."""

from dataclasses import replace

from devices.fit.memory import Device, Model

MB = 10**6
# SmolLM2-135M in 4 bit, as `saap export` writes it.
SMOL = Model(
    target="cpu", bits=4, block=32, accuracy_level=4, weight_bytes_per_token=84_190_464, kv_bytes_per_token=46_080,
    kv_dtype="float32", context_length=8192, hidden=576, head_dim=64, widest_ffn=1536, file_bytes=86_642_688,
    onnxruntime_min="1.23", attention=((9, 3),) * 30,
)  # fmt: skip
SMOL8 = replace(SMOL, bits=8, weight_bytes_per_token=151_430_400, file_bytes=153_759_744)
SMOL32 = replace(SMOL, bits=32, block=0, weight_bytes_per_token=538_060_032, file_bytes=540_266_496)
PI5 = Device(
    "Pi 5", "aarch64", frozenset({"asimd", "dotprod", "fp16"}), frozenset({"i8mm", "bf16", "sve"}), 2000 * MB, "given",
    bandwidth=17.1e9, bandwidth_source="computed", last_level_cache=2 << 20, cuda="none", onnxruntime="1.32.0",
)  # fmt: skip
PI4 = replace(
    PI5, isa=frozenset({"asimd"}), lacks=frozenset({"dotprod", "fp16", "i8mm", "bf16", "sve"}), bandwidth=12.8e9
)
X86 = replace(
    PI5, architecture="x86_64", isa=frozenset({"avx2", "avx512f", "avx512_vnni"}), lacks=frozenset({"avx_vnni"})
)
