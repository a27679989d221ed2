"""ONNX Runtime sessions as decode wants them: which bundle runs where, and is its graph what its manifest says."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from export.bundle import Bundle
from export.bundle.manifest import DECODE_GRAPH, BundleError, BundleManifest, too_old
from export.engine.protocol import EngineError
from saap.base.errors import first_line
from saap.base.memory_limit import MemoryLimit, most_bytes

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

EXECUTION = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
TARGETS = {"cpu": ("cpu", "portable"), "cuda": ("cuda",)}  # attention of the cuda target is float16
FATAL = 4  # its lines of less would come before our message, which an exception brings all the same


def open_session(bundle: Bundle, threads: int, graph: str = DECODE_GRAPH) -> InferenceSession:
    """Open a graph of a bundle on the CPU.

    Raises:
        BundleError: a graph that must not be loaded, or that is not what its manifest says.
        EngineError: ONNX Runtime refuses the graph.
    """
    path = bundle.graph(graph)
    with MemoryLimit(most_bytes(bundle.graph_bytes(graph), 0, 0, 0)):
        session = own_session(path, threads)
    check_signature(session, bundle.manifest, path)
    return session


def own_session(graph: Path, threads: int) -> InferenceSession:
    """Open a graph that we wrote just now, or that was checked, on the CPU.

    Raises EngineError: ONNX Runtime refuses the graph.
    """
    import onnxruntime as ort

    ort.set_default_logger_severity(FATAL)
    options = session_options(threads, {})
    options.log_severity_level = FATAL
    try:
        return ort.InferenceSession(str(graph), options, providers=[EXECUTION["cpu"]])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise EngineError(f"ONNX Runtime {ort.__version__} cannot load {graph}: {first_line(error)}") from error


def session_options(threads: int, entries: dict[str, str], runtime: ModuleType | None = None) -> SessionOptions:
    """Options of every session: one stream of operators, whose threads spin where there is more than one.

    Args:
        entries: session config entries that override the defaults.
        runtime: the onnxruntime module, or another one in its place.
    """
    if runtime is None:
        runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = runtime.ExecutionMode.ORT_SEQUENTIAL
    # Both keep buffers for tensors of the same size to come. Layers that differ have none, and prompts of each length
    # would have a block of their own: a pruned model would need more memory than the dense one, for no speed.
    options.enable_mem_pattern = options.enable_mem_reuse = False
    options.log_severity_level = 3
    for key, value in {"session.intra_op.allow_spinning": "1" if threads > 1 else "0", **entries}.items():
        options.add_session_config_entry(key, value)
    return options


TENSORS = {"float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}


def check_signature(session: InferenceSession, manifest: BundleManifest, graph: Path) -> None:
    """Refuse a graph that takes or gives something else than the manifest says.

    Raises BundleError: names the first input or output that differs.
    """
    cache = {name: part for part in manifest.cache for name in (part.past, part.present)}
    expected = {"input_ids", "attention_mask", "logits", *cache}
    ports = {port.name: port for port in (*session.get_inputs(), *session.get_outputs())}
    if strange := sorted(set(ports) - expected - {"position_ids"}):
        raise BundleError(f"{graph} has {strange[0]!r}, which is not an input or output of a bundle: do not use it")
    for name in sorted(expected):
        if name not in ports:
            raise BundleError(f"{graph} has no {name}, which its manifest promises: export the bundle again")
        shape, kind = ports[name].shape, ports[name].type
        if part := cache.get(name):
            sizes, dtype = part.shape, part.dtype
            fits = len(shape) == len(sizes) + 1 and kind == TENSORS[dtype]
        else:
            sizes, dtype = ((manifest.vocab_size,) if name == "logits" else ()), "float32"
            fits = True
        here = shape[len(shape) - len(sizes) :]
        if not fits or any(isinstance(n, int) and n != size for n, size in zip(here, sizes, strict=False) if size):
            sides = " x ".join("positions" if size is None else str(size) for size in sizes)
            raise BundleError(
                f"{graph} has {name} of {kind} {shape}, and its manifest says {dtype} and {sides}: export the bundle "
                "again"
            )


def check_provider(manifest: BundleManifest, provider: str, where: str, *, runtime: ModuleType | None = None) -> None:
    """Refuse a bundle that a provider cannot run, and a provider that this ONNX Runtime does not have.

    Args:
        provider: cpu or cuda.
        runtime: the onnxruntime module, or another one in its place.
    """
    if provider not in EXECUTION:
        raise EngineError(f"there is no provider {provider!r}: give {', '.join(EXECUTION)}")
    if manifest.target not in TARGETS[provider]:
        fit = [name for name, targets in TARGETS.items() if manifest.target in targets]
        instead = f"run it with `saap bench --provider {' or '.join(fit)}`, or " if fit else ""
        raise EngineError(
            f"{where} is a bundle for {manifest.target}, which the provider {provider} does not run: {instead}"
            f"make another with `saap export MODEL -o BUNDLE --target {TARGETS[provider][0]}`"
        )
    if runtime is None:
        runtime = import_module("onnxruntime")
    if refusal := too_old(manifest, runtime.__version__):
        raise EngineError(f"{where} {refusal}")
    if provider != "cpu":
        _check_installed(provider, runtime)


def _check_installed(provider: str, runtime: ModuleType) -> None:
    available = runtime.get_available_providers()
    if EXECUTION[provider] in available:
        return
    raise EngineError(
        f"the provider {provider} needs {EXECUTION[provider]}, and this ONNX Runtime {runtime.__version__} has only "
        f"{', '.join(available)}: pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'; a Jetson "
        "needs NVIDIA's own build, since the aarch64 wheel has no kernels for Orin or Thor"
    )
