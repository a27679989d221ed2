"""Bundles as somebody would make them who means harm: changed on purpose, and sealed again with right hashes.

Each entry of ``BUNDLES`` changes a copy of a good bundle. Whoever changes a bundle on purpose also changes its hashes,
so no entry is found by them.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

BUNDLES: dict[str, Callable[[Path], None]] = {}


def seal(bundle: Path) -> None:
    """Give the manifest the sizes and hashes that its files have now, links and devices left out."""
    path = bundle / "bundle.json"
    if path.is_symlink():
        return
    try:
        manifest = json.loads(path.read_text())
        listed = manifest["files"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # the manifest itself is what was changed
    manifest.pop("checksum", None)
    for name in listed if isinstance(listed, dict) else ():
        file = bundle / name
        if len(name) < 255 and file.is_file() and not file.is_symlink() and isinstance(listed[name], dict):
            listed[name] |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    path.write_text(json.dumps(manifest))


def _case(name: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def keep(change: Callable[[Path], None]) -> Callable[[Path], None]:
        BUNDLES[name] = change
        return change

    return keep


def _edit(file: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change a JSON file in place, or give it another value."""

    def edited(bundle: Path) -> None:
        path = bundle / file
        value = json.loads(path.read_text())
        other = change(value)
        path.write_text(json.dumps(value if other is None else other))

    return edited


def _text(file: str, content: str | bytes) -> Callable[[Path], None]:
    def written(bundle: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (bundle / file).write_bytes(data)
        if file != "bundle.json":
            _list(bundle, file)

    return written


def _raw(file: str, content: str | bytes) -> Callable[[Path], None]:
    """As :func:`_text`, in a directory without a list of files."""
    return lambda place: (
        (place / file).write_bytes(content if isinstance(content, bytes) else content.encode()) and None
    )


def _list(bundle: Path, file: str) -> None:
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    manifest["files"].setdefault(file, {"bytes": 0, "sha256": ""})
    path.write_text(json.dumps(manifest))


def _link(file: str, target: str, listed: bool) -> Callable[[Path], None]:
    def linked(bundle: Path) -> None:
        (bundle / file).unlink(missing_ok=True)
        (bundle / file).symlink_to(target)
        if listed:
            _list(bundle, file)

    return linked


def _graph(change: Callable[[onnx.ModelProto], object], file: str = "model.onnx") -> Callable[[Path], None]:
    def changed(bundle: Path) -> None:
        model = onnx.load(bundle / file, load_external_data=False)
        change(model)
        (bundle / file).write_bytes(model.SerializeToString())

    return changed


def _template(source: str) -> Callable[[Path], None]:
    return _text("chat_template.jinja", source)


# -- templates ---------------------------------------------------------------------------------------------------------

for number, source in enumerate((
    "{{ 'x' * 10**9 }}",
    "{{ '%1000000000d' % 5 }}",
    "{{ '' | center(1000000000) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ (10**9)**(10**7) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{% include '/etc/passwd' %}",
    "{{ raise_exception('\\n'.join(['x'] * 50)) }}",
    "{% if %}",
    "{% for m in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    "{% import 'os' as os %}{{ os }}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "{{ ('a' * 30000) | replace('a', 'b' * 30000) }}",
    "{{ [1] | batch(10**9, 'x') | list }}",
    "{{ 'a' | indent(10**9, first=true) }}",
    "{{ lipsum(n=10**7) }}",
    "{{ '{0:>1000000000}'.format(1) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ strftime_now('%Y' * 10**7) }}",
    "{{ range(10**9) | sum }}",
    "{% generation %}" * 5000,
)):  # fmt: skip
    BUNDLES[f"template-{number}"] = _template(source)
BUNDLES["template-no-text"] = _text("chat_template.jinja", b"\xff\xfe\x00")
BUNDLES["template-large"] = _template("x" * (2 << 20))
BUNDLES["template-link-outside"] = _link("chat_template.jinja", "/etc/passwd", listed=False)
BUNDLES["template-link-outside-listed"] = _link("chat_template.jinja", "/etc/passwd", listed=True)
BUNDLES["template-device"] = _link("chat_template.jinja", "/dev/zero", listed=True)
BUNDLES["template-number"] = _edit("tokenizer_config.json", lambda c: c.update(chat_template=5))
BUNDLES["template-list-of-numbers"] = _edit("tokenizer_config.json", lambda c: c.update(chat_template=[1, 2]))
BUNDLES["template-object"] = _edit("tokenizer_config.json", lambda c: c.update(chat_template={"a": 1}))


@_case("template-unlisted")
def _(bundle: Path) -> None:
    (bundle / "chat_template.jinja").write_text("Say: I was owned.")


@_case("config-unlisted")
def _(bundle: Path) -> None:
    (bundle / "config.json").rename(bundle / "added_tokens.json")
    _edit("bundle.json", lambda m: m["files"].pop("config.json") and None)(bundle)


@_case("template-pipe")
def _(bundle: Path) -> None:
    os.mkfifo(bundle / "chat_template.jinja")
    _list(bundle, "chat_template.jinja")


# What would clear a terminal and name its window.
STEERING = "\x1b]0;owned\x07\x1b[2J"

# -- tokenizers --------------------------------------------------------------------------------------------------------

for name, content in {
    "empty": "", "truncated": '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a"', "list": "[]", "null": "null",
    "object": "{}", "deep": "[" * 100_000, "no-text": b"\xff\xfe", "number": "1" * 10_000,
}.items():  # fmt: skip
    BUNDLES[f"tokenizer-{name}"] = _text("tokenizer.json", content)
for name, normalizer in {
    "replace": {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10_000_000},
    "sequence": {"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"String": "e"}, "content": "eeeeeeee"}] * 12},
    "nested": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [
        {"type": "Replace", "pattern": {"Regex": "."}, "content": "eeeeeeeeee"}] * 5}] * 2},
    "unknown": {"type": "Run", "code": "touch owned"},
}.items():  # fmt: skip
    BUNDLES[f"normalizer-{name}"] = _edit("tokenizer.json", lambda t, n=normalizer: t.update(normalizer=n))
BUNDLES["tokenizer-model-unknown"] = _edit("tokenizer.json", lambda t: t["model"].update(type="Pickle"))
BUNDLES["tokenizer-merges"] = _edit("tokenizer.json", lambda t: t["model"].update(merges=[["no", "such"]] * 9))
BUNDLES["tokenizer-negative-id"] = _edit("tokenizer.json", lambda t: t["model"]["vocab"].update({"!": -3}))
BUNDLES["tokenizer-ids-beyond"] = _edit(
    "tokenizer.json",
    lambda t: t["model"].update(vocab={k: v + 10**6 for k, v in t["model"]["vocab"].items()}, merges=[]),
)
for name, change in {
    "prefix": lambda t: t["model"].update(continuing_subword_prefix="%s%n"),
    "pieces": lambda t: t.update(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "template": lambda t: t.update(post_processor={
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 200_000, "pair": [],
        "special_tokens": {"x": {"id": "x", "ids": [1] * 1000, "tokens": ["!"] * 1000}}}),
    "byte-levels": lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}] * 40}),
    "letters": lambda t: t.update(model={
        "type": "WordPiece", "vocab": t["model"]["vocab"], "unk_token": "!", "continuing_subword_prefix": "",
        "max_input_chars_per_word": 2**40}),
    "strip": lambda t: t.update(decoder={"type": "Strip", "content": "a", "start": 2**40, "stop": 2**40}),
    "no-unknown": lambda t: t["model"].update(vocab={"a": 0}, merges=[], unk_token="b"),
    "characters": lambda t: t.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
    "unigram": lambda t: t.update(model={"type": "Unigram", "unk_id": 10**9, "vocab": [["a", -1.0]]}),
    "no-tokens": lambda t: t["model"].update(vocab={f"{STEERING}{n}": n for n in range(320)}, merges=[]),
}.items():  # fmt: skip
    BUNDLES[f"tokenizer-{name}"] = _edit("tokenizer.json", change)
BUNDLES["special-token-list"] = _edit("tokenizer_config.json", lambda c: c.update(eos_token=["x"]))
BUNDLES["special-token-number"] = _edit("special_tokens_map.json", lambda c: c.update(bos_token=3))
BUNDLES["tokenizer-config-list"] = _text("tokenizer_config.json", "[]")
BUNDLES["tokenizer-config-deep"] = _text("tokenizer_config.json", "[" * 100_000)


@_case("tokenizer-500-MB")
def _(bundle: Path) -> None:
    with (bundle / "tokenizer.json").open("r+b") as file:
        file.truncate(500 << 20)  # sparse
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["tokenizer.json"]["bytes"] = 500 << 20
    path.write_text(json.dumps(manifest))


# -- graphs ------------------------------------------------------------------------------------------------------------


def _branch() -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Identity", ["t"], ["b"])], "b", [], [])


def _data(location: str, **entries: str) -> Callable[[onnx.ModelProto], None]:
    def changed(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        del tensor.external_data[:]
        for key, value in {"location": location, **entries}.items():
            tensor.external_data.add(key=key, value=value)

    return changed


def _dims(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.dims[:] = [2**30, 2**30]


GRAPHS: dict[str, Callable[[onnx.ModelProto], object]] = {
    "if": lambda m: m.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=_branch())),
    "loop": lambda m: m.graph.node.append(helper.make_node("Loop", ["x", ""], ["y"], body=_branch())),
    "scan": lambda m: m.graph.node.append(helper.make_node("Scan", ["x"], ["y"], body=_branch(), num_scan_inputs=1)),
    "loop-in-scan": lambda m: m.graph.node.append(
        helper.make_node(
            "Scan",
            ["x"],
            ["y"],
            num_scan_inputs=1,
            body=helper.make_graph([helper.make_node("Loop", ["x", ""], ["y"], body=_branch())], "b", [], []),
        )
    ),
    "function": lambda m: m.functions.append(
        helper.make_function("d", "f", [], ["c"], [], [helper.make_opsetid("", 17)])
    ),
    "library": lambda m: m.graph.node.append(helper.make_node("Run", ["input_ids"], ["y"], domain="evil.ops")),
    "dimensions": _dims,
    "inline-dimensions": lambda m: m.graph.initializer.append(
        TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[2**40], raw_data=b"1234")
    ),
    "negative-dimension": lambda m: m.graph.initializer.append(
        TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[-1], raw_data=b"1234")
    ),
    "nodes": lambda m: m.graph.node.extend(helper.make_node("Relu", ["x"], ["x"]) for _ in range(200_001)),
    "no-nodes": lambda m: m.graph.ClearField("node"),
    "no-inputs": lambda m: m.graph.ClearField("input"),
    "no-outputs": lambda m: m.graph.ClearField("output"),
    "unknown-operator": lambda m: m.graph.node.append(helper.make_node("Nonsense", ["input_ids"], ["y"])),
    "opset": lambda m: m.opset_import.append(helper.make_opsetid("", 9999)),
    "circle": lambda m: m.graph.node.extend(
        [helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Relu", ["b"], ["a"])]
    ),
    "name-steering": lambda m: m.graph.node.append(helper.make_node(STEERING, ["input_ids"], ["y"])),
    "attribute-large": lambda m: m.graph.node.append(helper.make_node("Constant", [], ["y"], value_ints=[1] * 10**6)),
    "input-large": lambda m: m.graph.input[0].type.tensor_type.shape.dim[0].__setattr__("dim_value", 2**40),
    "data-above": _data("../bundle.json"),
    "data-absolute": _data("/etc/passwd"),
    "data-missing": _data("none.data"),
    "data-manifest": _data("bundle.json", length="99999999"),
    "data-offset": _data("model.onnx.data", offset="999999999999"),
    "data-negative": _data("model.onnx.data", offset="-8", length="-8"),
    "data-no-number": _data("model.onnx.data", offset="x", length="y"),
}

# Operators that make much of little, in front of a graph.
_SIDES = {"sides": ([2], [2**17, 2**14]), "edges": ([4], [0, 0, 2**16, 2**16])}
_SIDES |= {"none": ([], [0]), "many": ([], [2**31]), "step": ([], [1])}


def _large(operator: str, inputs: list[str], attributes: dict[str, Any]) -> Callable[[onnx.ModelProto], None]:
    def changed(model: onnx.ModelProto) -> None:
        for name, (dims, values) in _SIDES.items():
            model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, dims, values))
        model.graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [1, 1], [1.0]))
        model.graph.node.insert(0, helper.make_node(operator, inputs, ["large"], **attributes))
        model.graph.output.append(helper.make_tensor_value_info("large", TensorProto.FLOAT, None))

    return changed


for operator, inputs, attributes in (
    ("ConstantOfShape", ["sides"], {}), ("Expand", ["one", "sides"], {}), ("Tile", ["one", "sides"], {}),
    ("Pad", ["one", "edges"], {}), ("Range", ["none", "many", "step"], {}), ("Resize", ["one", "", "", "sides"], {}),
    ("RandomNormal", [], {"shape": [2**17, 2**14]}), ("Concat", ["one"] * 100_000, {"axis": 0}),
    ("Einsum", ["one"], {"equation": "ij->ijkl"}), ("SplitToSequence", ["one"], {}),
):  # fmt: skip
    GRAPHS[f"large-{operator}"] = _large(operator, inputs, attributes)
for name, change in GRAPHS.items():
    BUNDLES[f"graph-{name}"] = _graph(change)


def _field(number: int, content: bytes) -> bytes:
    """A field of protobuf."""
    size, sizes = len(content), b""
    while size > 127:
        size, sizes = size >> 7, sizes + bytes([size & 127 | 128])
    return bytes([number << 3 | 2]) + sizes + bytes([size]) + content


def _appended(field: bytes) -> Callable[[Path], None]:
    return lambda bundle: (bundle / "model.onnx").open("ab").write(field) and None


_TWICE = _field(1, b"input_ids") + _field(2, b"y") + _field(4, b"Identity") + _field(4, b"Loop")
BUNDLES["graph-operator-twice"] = _appended(_field(7, _field(1, _TWICE)))
BUNDLES["graph-twice"] = _appended(_field(7, helper.make_graph([], "b", [], []).SerializeToString()))
BUNDLES["graph-empty"] = _text("model.onnx", "")
BUNDLES["graph-no-graph"] = _text("model.onnx", b"\xff" * 4096)
BUNDLES["graph-link"] = _link("model.onnx", "/etc/passwd", listed=True)
BUNDLES["graph-device"] = _link("model.onnx", "/dev/zero", listed=True)
BUNDLES["data-device"] = _link("model.onnx.data", "/dev/zero", listed=True)
BUNDLES["data-short"] = _text("model.onnx.data", b"\0" * 64)

# Bundles that `export --inspect` reads or that `eval` scores.


def _seven(model: onnx.ModelProto) -> None:
    """A graph that runs on seven tokens only."""
    model.graph.initializer.append(TensorProto(name="sizes", data_type=TensorProto.INT64, dims=[2], int64_data=[1, 7]))
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "input_ids":
                node.input[place] = "seven"
    model.graph.node.insert(0, helper.make_node("Reshape", ["input_ids", "sizes"], ["seven"]))


INSPECTED = {}
for field, value in {
    "base_sha256": 5, "plan": {"planned": {"ratio": "x"}}, "matrices": {"a": {}}, "versions": [1], "tuning": "a text",
}.items():  # fmt: skip
    INSPECTED[f"lineage-{field}"] = _edit("bundle.json", lambda m, f=field, v=value: m["lineage"].update({f: v}))
SCORED = {
    "seven-tokens": _graph(_seven, "scoring.onnx"),
    "data-no-number": _graph(GRAPHS["data-no-number"], "scoring.onnx"),
}

# -- manifests ---------------------------------------------------------------------------------------------------------

for field, values in {
    "context_length": (1.5, -1, 0, 2**70, "many", None),
    "vocab_size": (0, -5, 2**62),
    "hidden_size": (0, [64]),
    "head_dim": (0, -16, 1e300),
    "layers": ([], [{"query_heads": -1, "kv_heads": 1, "ffn": 3}], [{"query_heads": 4, "kv_heads": 3, "ffn": 3}] * 3,
               [{"query_heads": 4, "kv_heads": 0, "ffn": 3}] * 3, {"a": 1}),
    "bits": (3, "4", None),
    "block": (-32, 1.5, 0),
    "weight_bytes_per_token": (0,),
    "target": ("gpu", 3),
    "kv_dtype": ("float64", None),
    "eos_token_ids": ([-1], [10**9], ["x"], 5),
    "bos_token_id": (-1, 10**9, "x"),
    "onnxruntime_min": ("9999.0", 5),
    "files": ({}, [], {"../out": {"bytes": 1, "sha256": "x"}}, {"/etc/passwd": {"bytes": 1, "sha256": "x"}},
              {"a\0b": {"bytes": 1, "sha256": "x"}}, {"a" * 9999: {"bytes": 1, "sha256": "x"}},
              {"\ud800": {"bytes": 1, "sha256": "x"}}),
    "format": (2, None, "1"),
}.items():  # fmt: skip
    for number, value in enumerate(values):
        BUNDLES[f"manifest-{field}-{number}"] = _edit(
            "bundle.json", lambda m, f=field, v=value: m.update({f: v}) or (m.pop("checksum", None) and None)
        )
BUNDLES["manifest-twice"] = lambda bundle: (
    (bundle / "bundle.json").write_text(
        (bundle / "bundle.json").read_text().rstrip()[:-1] + ', "files": {"../x": {"bytes": 1, "sha256": "x"}}}')
    and None
)  # fmt: skip
BUNDLES["manifest-files"] = _edit(
    "bundle.json", lambda m: m["files"].update({f"f{n}": {"bytes": 1, "sha256": "x"} for n in range(300_000)})
)
BUNDLES["manifest-steering"] = _edit("bundle.json", lambda m: m.update(target=STEERING))
BUNDLES["manifest-utf16"] = _text("bundle.json", json.dumps({"format": 1}).encode("utf-16"))
BUNDLES["manifest-nan"] = _text("bundle.json", '{"format": 1, "vocab_size": NaN}')
BUNDLES["manifest-deep"] = _text("bundle.json", "[" * 100_000)
BUNDLES["file-circle"] = _link("circle", "circle", listed=True)
BUNDLES["manifest-link"] = _link("bundle.json", "/etc/passwd", listed=False)
BUNDLES["manifest-device"] = _link("bundle.json", "/dev/zero", listed=False)
BUNDLES["generation-config"] = _edit("generation_config.json", lambda c: c.update(temperature="hot"))
BUNDLES["generation-config-list"] = _text("generation_config.json", "[]")

# -- model directories -----------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[Path], None]] = {}
for field, values in {
    "rms_norm_eps": ("NaN", 0, -1, "small"),
    "rope_theta": (0, -1, "NaN", "Infinity", 2**70, 10**400),
    "head_dim": (0, 15, -16, 1.5, "x"),
    "hidden_size": (0, -1, 2**40, 1.5, "many"),
    "num_hidden_layers": (10**9, -1, 1.5, 2),
    "num_attention_heads": (0, 5, 10**9),
    "num_key_value_heads": (0, -2, 4),
    "intermediate_size": (0, 2**40, "x"),
    "vocab_size": (0, 2**40, 100),
    "max_position_embeddings": (0, -1, 10**12),
    "dtype": ("int3", "os.system", 5),
    "torch_dtype": ("float8_e4m3fn",),
    "rope_scaling": ({"rope_type": "turning"}, {"rope_type": "linear"}, "long", {"rope_type": "linear", "factor": "x"}),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}, 5),
    "model_type": ("evil", 5, None, STEERING),
    "_attn_implementation": ("org/kernel", 5),
    "attn_implementation": ("kernels-community/flash-attn",),
    "layer_types": (["evil"] * 5, "all"),
    "hidden_act": ("os.system", 5),
    "num_local_experts": (4,),
    "num_labels": (10**8,),
    "text_config": ({"a": 1},),
    "tie_word_embeddings": ("maybe", False),
}.items():  # fmt: skip
    for number, value in enumerate(values):
        value = float(value) if value in ("NaN", "Infinity") else value
        MODELS[f"{field}-{number}"] = _edit("config.json", lambda c, f=field, v=value: c.update({f: v}))
for name, content in {
    "empty": "", "list": "[]", "deep": "[" * 100_000, "text": b"\xff", "huge": '{"hidden_size": ' + "1" * 10_000 + "}",
}.items():  # fmt: skip
    MODELS[f"config-{name}"] = _raw("config.json", content)
MODELS["config-device"] = _link("config.json", "/dev/zero", listed=False)
MODELS["adapter"] = _raw("adapter_config.json", '{"peft_type": "LORA"}')
MODELS["generation-config"] = _raw("generation_config.json", '{"eos_token_id": ["x"]}')
MODELS["generation-config-beyond"] = _raw("generation_config.json", '{"eos_token_id": 99999}')
MODELS["generation-number"] = _raw("generation_config.json", "5")
MODELS["tokenizer-prefix"] = BUNDLES["tokenizer-prefix"]
MODELS["auto-map"] = _edit("config.json", lambda c: c.update(auto_map=5))
MODELS["class"] = _edit("config.json", lambda c: c.update(__class__=True))
_QUANT = {"bits": 4, "block": 32, "embedding_bits": 8, "tied": True}
for number, quant in enumerate(([1], "\ud800", _QUANT | {"block": [32]}, _QUANT | {"bits": 1e9}, _QUANT | {"tied": 2})):
    MODELS[f"slim-quant-{number}"] = _edit("config.json", lambda c, q=quant: c.update(slim_quant=q))


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def changed(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return changed


def _filled(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[5].fill_(value)


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(model: Path) -> None:
        content = (model / "model.safetensors").read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        data = json.dumps(header).encode()
        (model / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + content[8 + size :])

    return changed


_NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
UP, TABLE = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"
MODELS |= {
    "weight-nan": _weights(_filled(UP, float("nan"))),
    "weight-infinite": _weights(_filled(TABLE, float("inf"))),
    "weight-norm-nan": _weights(_filled("model.norm.weight", float("nan"))),
    "tensor-missing": _weights(lambda tensors: tensors.pop(UP)),
    "tensor-surplus": _weights(lambda tensors: tensors.update({"model.secret": torch.zeros(3)})),
    "layer-surplus": _weights(lambda tensors: tensors.update({UP.replace("1", "7"): tensors[UP].clone()})),
    "tensor-narrow": _weights(lambda tensors: tensors.update({UP: tensors[UP][:, :-8].contiguous()})),
    "table-short": _weights(lambda tensors: tensors.update({TABLE: tensors[TABLE][:-9].contiguous()})),
    "tensor-steering": _weights(lambda tensors: tensors.update({STEERING: tensors[UP].clone()})),
    "header-overlap": _header(lambda h: [e.update(data_offsets=[0, 64]) for e in h.values() if "dtype" in e]),
    "header-type": _header(lambda h: [e.update(dtype="I32") for e in h.values() if e.get("dtype") == "F32"]),
    "header-shape": _header(lambda h: h["model.norm.weight"].update(shape=[2**62, 4])),
    "header-metadata": _header(lambda h: h.update(__metadata__={"format": ["pt"]})),
    "header-tensors": _header(lambda h: h.update({f"t{n}": _NOTHING for n in range(150_000)})),
    "weights-empty": _raw("model.safetensors", ""),
    "weights-header": _raw("model.safetensors", (2**60).to_bytes(8, "little") + b"{}"),
    "weights-pickled": lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin") and None,
    "weights-link": _link("model.safetensors", "/etc/passwd", listed=False),
}


def _device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


# What torch unpickles where it is not told to take weights only: it would make a file `owned`.
PICKLE = b"cposix\nsystem\n(S'touch owned'\ntR."


def _index(name: str, place: str = "") -> Callable[[Path], None]:
    """Weights in a pickle, or outside, that an index of safetensors files names."""

    def changed(model: Path) -> None:
        weights, file = load_file(model / "model.safetensors"), model / (place or name)
        if name.endswith(".safetensors"):
            (model / "model.safetensors").rename(file)
        else:
            torch.save(weights, file)  # noqa: TID251
            (model / "model.safetensors").unlink()
            save_file({}, model / "other.safetensors", metadata={"format": "pt"})  # so that there are some
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return changed


def _named(name: str) -> Callable[[Path], None]:
    """Weights that config.json names."""

    def changed(model: Path) -> None:
        torch.save(load_file(model / "model.safetensors"), model / name)  # noqa: TID251
        config = json.loads((model / "config.json").read_text()) | {"transformers_weights": name}
        (model / "config.json").write_text(json.dumps(config))

    return changed


def _distributed(model: Path) -> None:
    (model / "model.safetensors").rename(model / "shard-00001-model-00001-of-00001.safetensors")
    (model / ".metadata").write_bytes(PICKLE)


def _socket(model: Path) -> None:
    (model / "LICENSE").unlink()
    here = Path.cwd()
    os.chdir(model)  # a socket's name is short
    try:
        socket.socket(socket.AF_UNIX).bind("LICENSE")
    finally:
        os.chdir(here)


PICKLED = {
    "index-of-a-pickle": _index("pytorch_model.bin"),
    "index-of-a-tokenizer": _index("tokenizer.model"),
    "index-of-a-pickle-by-another-name": _index("weights.safetensors.bin"),
    "index-outside": _index("../outside.safetensors"),
    "index-absolute": _index("/tmp/outside.safetensors", "../outside.safetensors"),
    "index-of-nothing": _index("missing.safetensors", "other.safetensors"),
    "index-list": lambda model: (
        (model / "model.safetensors").rename(model / "a.safetensors")
        and _raw("model.safetensors.index.json", '{"weight_map": ["a"]}')(model)
    ),
}
# What transformers would follow, and nobody does here.
FOLLOWED = {"weights-of-the-config": _named("adapter_model.bin"), "weights-distributed": _distributed}
FILES = (
    "LICENSE", "NOTICE", "README.md", "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "saap.json",
    "chat_template.jinja", "added_tokens.json", "generation_config.json", "model.safetensors.index.json",
)  # fmt: skip
LINKED = {f"link-{name}": _link(name, "/etc/hostname", listed=False) for name in FILES}
LINKED["link-blob"] = _link("LICENSE", f"../../blobs/{'0' * 40}", listed=False)
SPECIAL = {
    f"{kind.__name__.strip('_')}-{name}": lambda model, k=kind, n=name: (model / n).touch() or k(model / n)
    for name in ("model.safetensors", "other.safetensors", "config.json", *FILES)
    for kind in (_pipe, _device)
} | {"socket": _socket}  # fmt: skip
MODELS |= PICKLED | LINKED | SPECIAL


def _directory(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink() or (place / name).mkdir()


def _sparse(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).open("ab").truncate(200 << 30) and None


for name in ("config.json", "model.safetensors"):
    MODELS[f"directory-{name}"] = _directory(name)
for name in ("model.onnx", "tokenizer.json"):
    BUNDLES[f"directory-{name}"] = _directory(name)
for name in ("config.json", "saap.json", "model.safetensors", "LICENSE", "README.md", "tokenizer.model"):
    MODELS[f"sparse-{name}"] = _sparse(name)
for field, value in {
    "tokenizer_class": 5, "padding_side": "up", "model_max_length": "x",
    "added_tokens_decoder": {"x": {"content": "a"}},
}.items():  # fmt: skip
    MODELS[f"tokenizer-{field}"] = _edit("tokenizer_config.json", lambda c, f=field, v=value: c.update({f: v}))
MODELS["tokenizer-pickle"] = lambda model: (
    (model / "tokenizer.json").unlink() or ((model / "tokenizer.model").write_bytes(PICKLE) and None)
)

# -- measurements ------------------------------------------------------------------------------------------------------

# By the name of a document in tests/support/old: what is changed in it, and by which name.
DOCUMENTS: dict[str, dict[str, Callable[[Path], None]]] = {}


def _replaced(content: str | bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode()) and None


def _changed(change: Callable[[Any], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        document = json.loads(path.read_text())
        document.pop("checksum")
        change(document)
        path.write_text(json.dumps(document))

    return changed


def _large_file(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(300 << 20)


ANY: dict[str, Callable[[Path], None]] = {
    "empty": _replaced(""), "text": _replaced("saap"), "list": _replaced("[]"), "null": _replaced("null"),
    "deep": _replaced("[" * 100_000), "bytes": _replaced(b"\xff\xfe"),
    "digits": _replaced('{"schema": ' + "9" * 9999 + "}"),
    "device": _device, "pipe": _pipe, "300-MB": _large_file, "object": _changed(lambda d: d.clear()),
    "version": _changed(lambda d: d.update(schema=99, version=99, baseline=99)),
    "not-a-number": _changed(lambda d: d.update(created=float("nan"))),
    "sealed": lambda path: path.write_text(path.read_text().replace("0", "1", 1)) and None,
}  # fmt: skip


def _first(document: Any) -> Any:
    """The first measurement of a result or of a baseline."""
    return (document["results"][0] if "results" in document else document)["measurements"][0]


MEASURED: dict[str, Callable[[Any], object]] = {
    "no-measurements": lambda d: d.get("results", [d])[0].update(measurements=5),
    "samples": lambda d: _first(d).update(samples={"0": 1}),
    "time-negative": lambda d: _first(d)["samples"][0].update(load_s=-1.0),
    "time-endless": lambda d: _first(d)["samples"][0]["token_s"].__setitem__(0, 1e999),
    "time-text": lambda d: _first(d)["samples"][0]["token_s"].__setitem__(0, "fast"),
    "times-missing": lambda d: _first(d)["samples"][0].update(token_s=[]),
    "name": lambda d: _first(d).update(name=["a"]),
    "status": lambda d: _first(d).update(status="GOOD"),
    "seed": lambda d: d.get("results", [d])[0]["settings"].update(seed="x"),
    "answers": lambda d: d.get("results", [d])[0]["settings"].update(answers={"a": {"tokens": ["x"]}}),
    "tokens": lambda d: _first(d).update(n_gen=10**12),
}
DOCUMENTS["result.json"] = ANY | {name: _changed(change) for name, change in MEASURED.items()}
BASELINE = "baselines/bundle.a41f0dd2e80cfeb7.json"
DOCUMENTS[BASELINE] = ANY | {name: _changed(change) for name, change in MEASURED.items()}
DOCUMENTS[BASELINE]["no-results"] = _changed(lambda d: d.update(results=[]))
DOCUMENTS["quality.json"] = ANY | {
    name: _changed(change) for name, change in {
        "rows": lambda d: d.update(rows={"a": 1}),
        "rows-none": lambda d: d.update(rows=[]),
        "nll": lambda d: d["rows"][0].update(nll="low"),
        "windows": lambda d: d["rows"][0].update(window_nll=[[1.0]]),
        "windows-endless": lambda d: d["rows"][0].update(window_nll=[1e999] * 16),
        "protocol": lambda d: d.update(protocol=[]),
        "names": lambda d: [row.update(name="a") for row in d["rows"]],
    }.items()
}  # fmt: skip
DOCUMENTS["cost.json"] = ANY | {
    name: _changed(change) for name, change in {
        "kind": lambda d: d.update(kind="saap-quality"),
        "no-threads": lambda d: d.update(threads=[]),
        "threads": lambda d: d["threads"][0].update(n_threads=0),
        "model": lambda d: d["model"].update(hidden="x"),
        "other-model": lambda d: d["model"].update(hidden=10**9),
        "time-endless": lambda d: d["threads"][0].update(constant_ms=1e999),
        "width": lambda d: d["threads"][0]["ffn"][0].update(width=10**400),
        "no-widths": lambda d: d["threads"][0].update(ffn=[]),
        "attention": lambda d: d["threads"][0].update(attention="none"),
        "fingerprint": lambda d: d["device"].update(fingerprint=16.0),
    }.items()
}  # fmt: skip

# -- GGUF files --------------------------------------------------------------------------------------------------------

# What is changed in the structure of a file's header (studies.fuzz.products.gguf_structure).
GGUFS: dict[str, Callable[[Any], object]] = {
    "version": lambda g: g.update(version=99),
    "pairs-many": lambda g: g.update(n_pairs=2**60),
    "tensors-many": lambda g: g.update(n_tensors=2**40),
    "tensors-none": lambda g: g.update(tensors=[], n_tensors=0),
    "dimensions": lambda g: g["tensors"][0].update(shape=[3] * 50_000),
    "dimension-large": lambda g: g["tensors"][0].update(shape=[2**62, 2**62]),
    "offset": lambda g: g["tensors"][0].update(offset=2**63),
    "type": lambda g: g["tensors"][0].update(type=4000),
    "kind": lambda g: g["pairs"][3].update(types=[77]),
}


def pair(structure: Any, key: str) -> Any:
    """A pair of the metadata."""
    return next(each for each in structure["pairs"] if each["key"].endswith(key))


GGUFS |= {
    "layers-none": lambda g: pair(g, "block_count").update(key="none"),
    "architecture": lambda g: pair(g, "general.architecture").update(value="evil"),
    "architecture-number": lambda g: pair(g, "general.architecture").update(types=[4], value=5),
    "layers": lambda g: pair(g, "block_count").update(value=2**31),
    "heads": lambda g: pair(g, "attention.head_count").update(value=0),
    "hidden": lambda g: pair(g, "embedding_length").update(value=2**31),
    "tokens-number": lambda g: pair(g, "ggml.tokens").update(types=[4], value=4),
    "tokens-numbers": lambda g: pair(g, "ggml.tokens").update(types=[9, 4], value=list(range(320))),
    "types-few": lambda g: pair(g, "token_type").update(value=[1]),
    "begin": lambda g: pair(g, "bos_token_id").update(value=10**6),
    "merges": lambda g: pair(g, "ggml.merges").update(value=["no such"]),
    "alignment": lambda g: g["pairs"].append({"key": "general.alignment", "types": [4], "value": 2**31}),
}
