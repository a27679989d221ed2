"""Options for exporting a model. Imports no torch: the command line builds its help from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from export.engine.table import ONNXRUNTIME, bundle_engines
from saap.base.errors import UserError
from saap.base.options import COMPUTE, Option, check_values, refuse_unused
from saap.base.values import parse_names
from saap.system.device_names import AUTO, check_device_is_there

PARITY_ROWS, PARITY_TOKENS = 4, 256
Target = Literal["cpu", "cuda", "portable", "gguf"]
BITS: dict[str, tuple[int, ...]] = {
    "cpu": (4, 8, 32), "cuda": (4, 8, 16), "portable": (4, 8, 32), "gguf": (4, 8, 16, 32),
}  # fmt: skip
LLAMA_CPP_TYPES = {4: "Q4_0", 8: "Q8_0"}  # that its quantizer writes, by bits


@dataclass(frozen=True)
class ExportOptions:
    """Options of :func:`export.export`; what is None follows from the model and the target."""

    target: Annotated[
        Target, Option("portable: standard operators, for TensorRT and others; gguf: one file for llama.cpp.")
    ] = "cpu"
    bits: Annotated[Literal[4, 8, 16, 32] | None, Option("Bits of the linears; default: 4, or as tuned.")] = None
    group_size: Annotated[
        Literal[32, 64, 128] | None, Option("Weights per scale; default: 32, or as tuned.", old=("--group",))
    ] = None
    head_bits: Annotated[Literal[4, 8] | None, Option("Bits of embedding and head; default: as --bits.")] = None
    integers: Annotated[
        Literal["gptq", "nearest", "llama.cpp"],
        Option("Error-compensating, by the text; each weight by itself; or, for gguf, llama.cpp's own."),
    ] = "gptq"
    kv_bits: Annotated[Literal[8, 32], Option("Bits of the KV cache.", flags=("--kv",))] = 32
    dotprod: Annotated[bool, Option("For Raspberry Pi 3 and 4, which lack dot products.", flags=("--no-dotprod",))] = (
        True
    )
    onnxruntime: Annotated[
        str | None,
        Option("Oldest ONNX Runtime that must load it, such as 1.23 (JetPack 6).", flags=("--ort",), metavar="VERSION"),
    ] = None
    gguf_type: Annotated[
        str | None, Option("GGUF type: F32, F16, Q8_0, Q4_0 or Q4_1.", flags=("--type",), metavar="TYPE")
    ] = None
    parity: Annotated[Literal["full", "none"], Option("none: faster, and the bundle is marked UNVERIFIED.")] = "full"
    text: Annotated[
        str | None, Option("Text for parity and the cache's scales; default: SAAP_DATA, else saap's samples.")
    ] = None
    engines: Annotated[
        tuple[str, ...],
        Option(
            "Engines that run it: onnxruntime,llama.cpp,openvino; auto: those installed that hold the model.",
            metavar="NAMES",
            parse=parse_names,
        ),
    ] = (ONNXRUNTIME,)
    device: Annotated[str, Option(COMPUTE, metavar="NAME", hidden=True)] = "auto"

    def check(self) -> None:
        """Refuse values that are not allowed, and options that do not go together."""
        check_values(self)
        check_device_is_there(self.device)
        if self.bits is not None and self.bits not in BITS[self.target]:
            allowed = ", ".join(map(str, BITS[self.target]))
            raise UserError(f"{self.bits} bits are not supported for the {self.target} target; allowed: {allowed}")
        if self.target != "cpu":
            refuse_unused(self, ("kv_bits", "dotprod"), "--target cpu")
        self.check_engines()
        if self.target == "gguf":
            none = ("onnxruntime", "group_size", "parity", "text", "device")
            chosen = () if self.integers == "llama.cpp" else ("integers",)
            refuse_unused(self, (*none, *chosen), "bundles, and a GGUF file is none")
        else:
            refuse_unused(self, ("gguf_type",), "--target gguf")
            if self.integers == "llama.cpp":
                raise UserError("--integers llama.cpp is for --target gguf: give gptq or nearest")
        if self.integers == "llama.cpp":
            refuse_unused(self, ("head_bits",), "types that saap chooses, and llama.cpp chooses its own")
            if self.bits in (16, 32):
                self.check_floats()
        if self.gguf_type:
            refuse_unused(self, ("bits",), "a choice of type by bits, and --type names one")
        elif self.bits in (16, 32) and self.target != "gguf":
            self.check_floats()
        if self.parity == "none" and self.kv_bits == 32 and self.integers == "nearest":
            refuse_unused(self, ("text",), "parity, gptq, and the scales of --kv 8")

    def check_engines(self) -> None:
        """Refuse engines that are not known, or that cannot have what else is asked for."""
        if self.engines == (AUTO,):
            return
        if unknown := [name for name in self.engines if name not in bundle_engines()]:
            raise UserError(f"--engines {unknown[0]} is not known: give {', '.join(bundle_engines())}, or auto alone")
        if ONNXRUNTIME not in self.engines:
            raise UserError("a bundle is made for onnxruntime, too: add it to --engines, or give --target gguf")
        if len(self.engines) > 1 and self.target != "cpu":
            refuse_unused(self, ("engines",), "--target cpu")

    def check_floats(self) -> None:
        """Refuse what is said of integers where there are none."""
        names = ("group_size", "head_bits", "integers")
        refuse_unused(self, names, "integers, and these weights are floats", "give --bits 4 or 8")
