"""An onnxruntime with a GPU that is not there: it computes on the CPU and moves data as CUDA does.

What it is strict about is what goes wrong on a GPU without a word: a value of the host is copied when it is bound and
never again; what a run wrote on the device must not be read before it was waited for.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


class Memory:
    """A value somewhere. ``log`` is the machine's, of everything that happened."""

    def __init__(self, array: np.ndarray, device: str, log: list[str]) -> None:
        self.array, self.device, self.log, self.running = array, device, log, False

    def numpy(self) -> np.ndarray:
        assert not self.running, "read before the GPU was waited for"
        self.log.append("read")
        return self.array.copy()

    def update_inplace(self, values: np.ndarray) -> None:
        assert values.shape == self.array.shape and values.dtype == self.array.dtype
        self.array[:] = values

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def device_name(self) -> str:
        return self.device


class Binding:
    def __init__(self, session: Session) -> None:
        self.session, self.inputs, self.outputs = session, {}, {}

    def bind_ortvalue_input(self, name: str, value: Memory) -> None:
        self.inputs[name] = value

    def bind_input(self, name: str, device: str, _: int, dtype: Any, shape: tuple[int, ...], pointer: int) -> None:
        owner = next(m for m in self.session.machine.memory if m.data_ptr() == pointer)
        view = owner.array.reshape(-1)[: int(np.prod(shape))].reshape(shape)
        assert view.dtype == dtype
        array = view if device == owner.device == "cuda" else view.copy()
        self.inputs[name] = Memory(array, device, owner.log)

    def bind_ortvalue_output(self, name: str, value: Memory) -> None:
        self.outputs[name] = value

    def bind_output(self, name: str, device: str = "cpu", _: int = 0) -> None:
        self.outputs[name] = device

    def synchronize_outputs(self) -> None:
        self.session.machine.log.append("wait")
        for memory in self.session.machine.memory:
            memory.running = False

    def get_outputs(self) -> list[Memory]:
        return list(self.results)


class Session:
    """``InferenceSession``; providers that do not start are replaced by the CPU, as ONNX Runtime does."""

    def __init__(self, machine: Machine, graph: str, options: Any, providers: list[Any], enable_fallback: int) -> None:
        self.machine, self.asked = machine, dict(providers)
        assert not enable_fallback
        for key, value in machine.fails.items():
            if key in self.asked:
                raise RuntimeError(value)
        self.real = ort.InferenceSession(graph, options, providers=[CPU])
        self.first = next(iter(self.asked)) if machine.starts else CPU

    def get_providers(self) -> list[str]:
        return list(dict.fromkeys([self.first, *(self.asked if self.machine.starts else ()), CPU]))

    def get_inputs(self) -> list[Any]:
        return self.real.get_inputs()

    def get_outputs(self) -> list[Any]:
        return self.real.get_outputs()

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding) -> None:
        self.machine.log.append("run")
        inputs, outputs = binding.inputs, binding.outputs
        for value in inputs.values():
            assert value.device == "cuda"
        real = self.real.io_binding()
        for name, value in inputs.items():
            a = value.array
            real.bind_input(name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
        for name, value in outputs.items():
            if isinstance(value, Memory):
                a = value.array
                real.bind_output(name, "cpu", 0, a.dtype.type, a.shape, a.ctypes.data)
            else:
                real.bind_output(name, "cpu")
        self.real.run_with_iobinding(real)
        binding.results = []
        for (_, value), result in zip(outputs.items(), real.get_outputs(), strict=True):
            memory = value if isinstance(value, Memory) else self.machine.put(result.numpy(), value)
            memory.running = True
            binding.results.append(memory)


class Machine:
    """Stands for the module."""

    __version__ = "1.99.0"
    SessionOptions, ExecutionMode = ort.SessionOptions, ort.ExecutionMode

    def __init__(
        self,
        available: tuple[str, ...] = (CUDA, CPU),
        starts: bool = True,
        fails: dict[str, str] | None = None,
    ) -> None:
        self.available, self.starts, self.fails = available, starts, fails or {}
        self.memory: list[Memory] = []
        self.log: list[str] = []
        self.sessions: list[Session] = []
        machine = self

        class InferenceSession(Session):
            def __init__(self, graph: str, options: Any, providers: list[Any], enable_fallback: int = 1) -> None:
                super().__init__(machine, graph, options, providers, enable_fallback)
                machine.sessions.append(self)

        self.InferenceSession = InferenceSession
        self.OrtValue = SimpleNamespace(ortvalue_from_numpy=lambda values, device, _: self.put(values, device))

    def get_available_providers(self) -> list[str]:
        return list(self.available)

    def put(self, values: np.ndarray, device: str) -> Memory:
        self.memory.append(Memory(np.array(values), device, self.log))
        return self.memory[-1]
