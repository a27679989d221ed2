"""A real decoder bundle of a few kilobytes: random weights, two layers of different sizes, the exporter's contract."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from support.hostile import seal

from export.bundle.manifest import DECODE_GRAPH, SCORING_GRAPH, WEIGHTS, BundleManifest, LayerSizes, write_manifest

HIDDEN, HEAD_DIM, VOCAB, CONTEXT = 64, 16, 96, 128
LAYERS = [LayerSizes(4, 2, 128), LayerSizes(0, 0, 64), LayerSizes(3, 1, 96)]  # the middle one has no attention


def endless_graph(path: Path) -> Path:
    """A loop that ends after 2^62 turns."""
    go, turns = (numpy_helper.from_array(np.array(value), name) for value, name in ((True, "go"), (2**62, "turns")))
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_in"], ["go_out"]), helper.make_node("Identity", ["x_in"], ["x_out"])],
        "body",
        [info("i", TensorProto.INT64, []), info("go_in", TensorProto.BOOL, []), info("x_in", TensorProto.INT64, [])],
        [info("go_out", TensorProto.BOOL, []), info("x_out", TensorProto.INT64, [])],
    )
    loop = helper.make_node("Loop", ["turns", "go", "turns"], ["x"], body=body)
    graph = helper.make_graph([loop], "g", [], [info("x", TensorProto.INT64, [])], [go, turns])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


def tiny_bundle(directory: Path, *, seed: int = 0, layers: list[LayerSizes] = LAYERS) -> Path:
    """Write ``model.onnx``, ``scoring.onnx``, their shared weights and ``bundle.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    model = _model(np.random.default_rng(seed), layers)
    parameters = sum(int(np.prod(i.dims)) for i in model.graph.initializer if i.data_type == TensorProto.FLOAT)
    onnx.save_model(model, directory / DECODE_GRAPH, save_as_external_data=True, location=WEIGHTS, size_threshold=1024)
    _keep_all_positions(model)  # its initializers now point into the file just written
    (directory / SCORING_GRAPH).write_bytes(model.SerializeToString())
    (directory / "genai_config.json").write_text(json.dumps({}))
    kv = [layer for layer in layers if layer.query_heads]
    write_manifest(
        directory,
        BundleManifest(
            target="cpu",
            model_type="llama",
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            head_dim=HEAD_DIM,
            context_length=CONTEXT,
            layers=layers,
            bits=32,
            block=0,
            accuracy_level=0,
            parameters=parameters,
            weight_bytes_per_token=4 * parameters,
            kv_bytes_per_token=sum(2 * layer.kv_heads * HEAD_DIM * 4 for layer in kv),
            kv_dtype="float32",
            bos_token_id=1,
            eos_token_ids=[2],
            onnxruntime_min="1.23",
        ),
    )
    return directory


def _model(random: np.random.Generator, layers: list[LayerSizes]) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def weight(name: str, *shape: int) -> str:
        values = random.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        weights.append(numpy_helper.from_array(values, name))
        return name

    def constant(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values, name))
        return name

    def op(kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    ones = constant("ones", np.ones(HIDDEN, np.float32))
    angles = np.outer(np.arange(CONTEXT), 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)
    cos, sin = constant("cos", np.cos(angles)), constant("sin", np.sin(angles))
    one, axis = constant("one", np.array(1, np.int64)), constant("axis", np.array([1], np.int64))
    counted = op("ReduceSum", ["attention_mask", axis], "counted", keepdims=0)
    lengths = op("Cast", [op("Sub", [counted, one], "last")], "lengths", to=TensorProto.INT32)
    shape = op("Shape", ["attention_mask"], "mask_shape")
    total = op("Cast", [op("Gather", [shape, one], "total64")], "total", to=TensorProto.INT32)

    x = op("Gather", [weight("embedding", VOCAB, HIDDEN), "input_ids"], "embedded")
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "rows", VOCAB])]
    n = 0
    for i, layer in enumerate(layers):
        if layer.query_heads:
            h, kv = layer.query_heads, layer.kv_heads
            normed = op("SimplifiedLayerNormalization", [x, ones], f"l{i}.norm")
            qkv = op("MatMul", [normed, weight(f"l{i}.qkv", HIDDEN, (h + 2 * kv) * HEAD_DIM)], f"l{i}.packed")
            past = [f"past_key_values.{n}.key", f"past_key_values.{n}.value"]
            present = [f"present.{n}.key", f"present.{n}.value"]
            nodes.append(
                helper.make_node(
                    "GroupQueryAttention",
                    [qkv, "", "", *past, lengths, total, cos, sin],
                    [f"l{i}.attended", *present],
                    domain="com.microsoft",
                    num_heads=h,
                    kv_num_heads=kv,
                    do_rotary=1,
                )
            )
            for name in past:
                inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", kv, "past", HEAD_DIM]))
            for name in present:
                outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", kv, "total", HEAD_DIM]))
            n += 1
            mixed = op("MatMul", [f"l{i}.attended", weight(f"l{i}.o", h * HEAD_DIM, HIDDEN)], f"l{i}.mixed")
            x = op("Add", [x, mixed], f"l{i}.residual")
        if layer.ffn:
            normed = op("SimplifiedLayerNormalization", [x, ones], f"l{i}.ffn_norm")
            up = op("MatMul", [normed, weight(f"l{i}.up", HIDDEN, layer.ffn)], f"l{i}.wide")
            down = op(
                "MatMul", [op("Sigmoid", [up], f"l{i}.gate"), weight(f"l{i}.down", layer.ffn, HIDDEN)], f"l{i}.down_"
            )
            x = op("Add", [x, down], f"l{i}.out")
    starts, ends = constant("minus_one", np.array([-1], np.int64)), constant("end", np.array([2**31 - 1], np.int64))
    x = op("Slice", [x, starts, ends, axis], "kept")
    op("MatMul", [op("SimplifiedLayerNormalization", [x, ones], "final"), weight("head", HIDDEN, VOCAB)], "logits")
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _keep_all_positions(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.name == "kept")
    node.op_type = "Cast"
    node.attribute.append(helper.make_attribute("to", onnx.TensorProto.FLOAT))
    del node.input[1:]


def greedy_for_memory(bundle: Path, when: str, operator: str = "Expand") -> Path:
    """Let the decode graph make a tensor of 16 GB: while it is loaded (`load`), or with the first token (`run`)."""
    path = bundle / DECODE_GRAPH
    model = onnx.load(path, load_external_data=False)
    nodes, weights = model.graph.node, model.graph.initializer
    next(node for node in nodes if "logits" in node.output).output[0] = "small"
    weights.append(numpy_helper.from_array(np.array([2**32], np.int64), "many"))
    weights.append(numpy_helper.from_array(np.zeros(1, np.float32), "nothing"))
    sizes = "many"
    if when == "run":  # the number of rows, which is 1, is known with the input only
        weights.append(numpy_helper.from_array(np.zeros(1, np.int64), "first"))
        nodes.append(helper.make_node("Shape", ["input_ids"], ["rows_and_tokens"]))
        nodes.append(helper.make_node("Gather", ["rows_and_tokens", "first"], ["rows"]))
        nodes.append(helper.make_node("Mul", ["many", "rows"], ["sizes"]))
        sizes = "sizes"
    inputs = ["nothing", sizes] if operator == "Expand" else [sizes]
    nodes.append(helper.make_node(operator, inputs, ["large"]))
    nodes.append(helper.make_node("ReduceMean", ["large"], ["mean"], keepdims=0))
    nodes.append(helper.make_node("Add", ["small", "mean"], ["logits"]))
    path.write_bytes(model.SerializeToString())
    seal(bundle)
    return bundle
