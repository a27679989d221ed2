"""Shared parts: where the texts are, one real model, and tiny random ones."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_NEIGHBOUR = Path(__file__).resolve().parents[2] / "shared" / "data"
if "SAAP_DATA" not in os.environ and _NEIGHBOUR.is_dir():
    os.environ["SAAP_DATA"] = str(_NEIGHBOUR)

os.environ.pop("COLUMNS", None)  # which pytest-xdist sets in its workers: sentences are as long as they are

# A shell that starts the tests in its background lets them, and all that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A model is small when it fits the device; it is fast when memory feeds it well.",
    "In 1998 the river rose by 12 centimetres and the bridge was closed for 3 days.",
    "def add(left, right):\n    return left + right\n",
    "She said: what happened, what is allowed, and what to do?",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# A file is one worker's: those that take longest begin, so that the workers end together.
LONGEST = {
    "test_python_page",
    "test_distributed",
    "test_real_model",
    "test_old_products",
    "test_labgrid",
    "test_target",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_collection_finish() -> None:
    """What is imported by now stays; to look at it takes the collector a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is of the machine, and costs each test time: a measurement probes its memory in two processes."""
    from bench.measure.result import Bandwidth

    monkeypatch.setattr("bench.measure.run.probe_bandwidth", lambda cpus, cache: Bandwidth(len(cpus), 1, []))
    # Each session would move all memory of this process to huge pages.
    monkeypatch.setattr("export.engine.huge_pages.collapse", lambda: 0)


@pytest.fixture(scope="session", autouse=True)
def one_spelling() -> Iterator[None]:
    """Each export counts the tokens of a long text; the tokenizers of most tests are one."""
    if "export.write" not in sys.modules:
        yield
        return
    from export import write

    counts: dict[object, list[int]] = {}

    def encode(text: str, tokenizer: Any, encode: Callable[..., list[int]] = write.encode) -> list[int]:
        key = text, tokenizer.backend_tokenizer.to_str()
        if key not in counts:
            counts[key] = encode(text, tokenizer)
        return counts[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write, "encode", encode)
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The directory of texts that SAAP_DATA names; broken is a failure, absent a skip."""
    named = os.environ.get("SAAP_DATA")
    if not named:
        pytest.skip("SAAP_DATA is not set: no real text here")
    assert Path(named).is_dir(), f"SAAP_DATA names {named}, which is not a directory"
    return Path(named)


@pytest.fixture(scope="session")
def river(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 200 lines that tell one from another."""
    path = tmp_path_factory.mktemp("text") / "river.txt"
    path.write_text("\n".join(f"The river rose by {i} centimetres, and bridge {i * 7} was closed." for i in range(200)))
    return path


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct as a model directory; fetched once into the cache."""
    pytest.importorskip("transformers")
    from saap.base.errors import UserError
    from saap.models.resolve import resolve

    try:
        return resolve("smollm2-135m")
    except UserError as error:
        if "could not be downloaded" not in str(error):
            raise
        pytest.skip(f"the real model cannot be fetched: {error}")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE of 300 tokens trained on a few sentences, with chat template."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="session")
def beginning_tokenizer(tiny_tokenizer: Any) -> Any:
    """The same, but it sets the beginning-of-sequence token before every text."""
    from tokenizers import processors

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Writes random Llama directories: ``llama(path, seed=0, **config)`` -> path; each is made once and copied.

    Hidden 96, six query heads in three KV groups of 16, three layers, FFN 128, tied embedding; any field of
    LlamaConfig may be given. The vocabulary holds the tiny tokenizer's 300 tokens, padded to a multiple of 64.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    made = _Made(tmp_path_factory.mktemp("llamas"), tiny_tokenizer)

    def make(path: Path, seed: int = 0, **overrides: Any) -> Path:
        fields: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 96,  # transformers 5 refuses one that the query heads do not divide
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }

        def build() -> Any:
            model = LlamaForCausalLM(LlamaConfig(**{**fields, **overrides}))
            for parameter in model.parameters():
                if parameter.dim() > 1:  # wider than the default 0.02, so that the logits differ from token to token
                    torch.nn.init.normal_(parameter, std=0.1)
            return model

        return made.copied(path, build, seed, overrides)

    return make


@pytest.fixture
def tiny_model(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    llama: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Path]:
    """``tiny_model(name="tiny", seed=0, **config)`` -> path of a random Llama, as ``llama`` makes it."""
    # Scores are kept by content: those of an older version of the code must not stand in for the tested one.
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path_factory.mktemp("cache")))
    return lambda name="tiny", seed=0, **config: llama(tmp_path / name, seed, **config)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> _Made:
    """Random models of all families, each made once."""
    return _Made(tmp_path_factory.mktemp("families"), tiny_tokenizer)


@pytest.fixture
def tiny_family(tmp_path: Path, families: _Made) -> Callable[..., Path]:
    """Factory of random directories of any family: ``tiny_family("qwen3", name="tiny", seed=0, **config)`` -> path.

    The sizes of ``tiny_model``, but one wide head more: three query heads of 32 in one KV group. Norms and biases are
    random too, so that none of them can be forgotten.
    """
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from saap.models.architectures import FAMILIES, LAYER_TYPES

    def make(model_type: str, name: str = "", seed: int = 0, **overrides: Any) -> Path:
        fields: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        if model_type != "phi3":  # which has no such field
            fields["head_dim"] = 32
        if FAMILIES[model_type].transformers > int(transformers.__version__.split(".")[0]):
            pytest.skip(f"{model_type} is of transformers {FAMILIES[model_type].transformers}")
        fields |= overrides
        if model_type == "granitemoehybrid":
            dense = {
                "num_local_experts": 0,
                "layer_types": ["attention"] * fields["num_hidden_layers"],
                "shared_intermediate_size": fields["intermediate_size"],
                "position_embedding_type": "rope",
                "mamba_n_heads": 4,  # which has to divide, also where there is none
            }
            fields = dense | fields
        if (rare := FAMILIES[model_type].rare) is not None:
            kinds = [(LAYER_TYPES[rare], "full_attention")[i % 2] for i in range(fields["num_hidden_layers"])]
            fields = {"layer_types": kinds, "block_auto_adjust_ff_dim": False} | fields
        if FAMILIES[model_type].per_layer:
            count = fields["num_hidden_layers"]
            kinds = [("sliding_attention", "full_attention")[i % 2 or i == count - 1] for i in range(count)]
            others = {"layer_types": kinds, "global_head_dim": 64, "num_kv_shared_layers": 1, "sliding_window": 8}
            others |= {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": fields["vocab_size"]}
            fields = {"use_double_wide_mlp": True, **others} | fields
        if FAMILIES[model_type].delta:
            heads = {"linear_num_key_heads": 3, "linear_num_value_heads": 6}
            fields = {**heads, "linear_key_head_dim": 24, "linear_value_head_dim": 16, "head_dim": 32} | fields
            fields = {
                "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
            } | fields

        def build() -> Any:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
            _skip_windows_of_old_runtimes(model.config)
            for parameter in model.parameters():
                spread = torch.empty_like(parameter).normal_(std=0.1 if parameter.dim() > 1 else 0.3)
                parameter.data = spread if parameter.dim() > 1 else parameter.data + spread
            return model

        return families.copied(tmp_path / (name or model_type), build, seed, model_type, overrides)

    return make


class _Made:
    """Models that were made in this session, by what they were made of."""

    def __init__(self, home: Path, tokenizer: Any) -> None:
        from support.fast_passes import skip_packing

        skip_packing()
        self.home, self.tokenizer, self.made = home, tokenizer, {}

    def copied(self, path: Path, build: Callable[[], Any], seed: int, *key: Any) -> Path:
        """A copy of the model that ``build`` makes with a seed, which with the key says all of it."""
        import torch

        name = json.dumps([seed, *key], sort_keys=True)
        if name not in self.made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.made[name] = _save(build(), self.home / str(len(self.made)), self.tokenizer)
        shutil.copytree(self.made[name], path, dirs_exist_ok=True)
        return path


def _skip_windows_of_old_runtimes(config: Any) -> None:
    """Export refuses them there; a window that is longer than any text here is none."""
    import onnxruntime
    from packaging.version import Version

    from export.graph.targets import ONNXRUNTIME_WINDOWS
    from saap.models.architectures import traits_of

    windows = [layer.window for layer in traits_of(config.to_dict()).layers if layer.window]
    if windows and Version(onnxruntime.__version__) < Version(ONNXRUNTIME_WINDOWS):
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} gets sliding windows wrong")


def _save(model: Any, directory: Path, tokenizer: Any) -> Path:
    model.generation_config.eos_token_id = [2, 0]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "LICENSE").write_text("Test licence\n", encoding="utf-8")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n", encoding="utf-8")
    return directory
