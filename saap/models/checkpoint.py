"""Slim directories: write one beside and rename, read one back as a transformers model.

A slim directory holds ``config.json``, weights as safetensors, tokenizer files and ``saap.json`` (plan, lineage and
hashes). Models whose layers are all alike are plain Hugging Face directories. Others need this module imported, which
registers their class with transformers, or the ``modeling_slim.py`` shipped in the directory and
``trust_remote_code=True``.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from saap.base.errors import UserError, first_line
from saap.base.writing import RECORD, read_object, writing_directory
from saap.models import modeling_slim
from saap.models.architectures import (
    ARCHITECTURES,
    FAMILIES,
    MOST_VOCABULARY,
    PER_LAYER,
    SLIM,
    ModelConfig,
    architecture_of,
    check_config,
    config_object,
    entries_of,
    field_of,
    head_vocabulary,
    rope_of,
    with_defaults,
)  # fmt: skip
from saap.models.config_fields import built, check_fields
from saap.models.directory import check_files, copy_sidecars
from saap.models.integrity import check_directory, hashes
from saap.models.modeling_slim import GroupQuantTable, ScaledEmbedding, TiedHead, slim_classes
from saap.models.record import DOCUMENT, Record, read_record
from saap.models.shape import MIXERS, ModelShape
from saap.models.slim_quant import SlimQuant, quant_of
from saap.models.weight_files import NOT_NEEDED, check_finite, read_tensors, tensor_reader, write_shards

for _row in FAMILIES.values():
    if (_classes := slim_classes(_row.family)) is not None:
        AutoConfig.register(_classes.config.model_type, _classes.config, exist_ok=True)
        AutoModelForCausalLM.register(_classes.config, _classes.model, exist_ok=True)
        # So that save_pretrained puts modeling_slim.py beside the config, whose auto_map names it.
        _classes.config.register_for_auto_class()
        _classes.model.register_for_auto_class("AutoModelForCausalLM")

KERNELS = "transformers.integrations.hub_kernels"  # which speaks of optional ones


@dataclass(frozen=True)
class Model:
    """A model directory that was checked, and what it hands out."""

    directory: Path
    config: dict[str, Any]
    record: Record

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Model:
        """Check a directory's files, config, family and record, and its hashes if ``verify``.

        Raises UserError: no model there, of an architecture or format that is not supported, or damaged.
        """
        directory = Path(path)
        config = read_config(directory)
        architecture_of(config)
        record = read_record(directory)
        if verify:
            check_directory(directory)
        return cls(directory, config, record)

    def tensors(self) -> tuple[list[str], Callable[[str], torch.Tensor]]:
        """Return the names of the tensors, and a function that reads one."""
        return tensor_reader(self.directory)


def load_model(
    path: str | Path, *, materialise: bool = False, dtype: torch.dtype = torch.float32, verify: bool = True
) -> PreTrainedModel:
    """Load a dense, slim or tuned directory as a transformers model in eval mode.

    Args:
        materialise: turn integer weights into ordinary linears with the same numbers (faster forward, more memory).
        dtype: of the floating-point weights.
        verify: hold the files against their hashes first, which reads them all.

    Raises UserError: no model there, of an architecture or format that is not supported.
    """
    directory = Model.open(path, verify=verify).directory
    model = built_model(directory, dtype)
    for name, tensor in model.state_dict().items():
        check_finite(directory, name, tensor)
    if materialise:
        materialise_linears(model)
    model.eval()
    return model


def built_model(directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Build a directory's model, of any family that transformers has, from tensors that are read here.

    transformers is given no directory: there it would follow an index, names in ``config.json`` and pickles.

    Raises UserError: no tensors there, too few, or some that the model has no place for.
    """
    tensors = read_tensors(directory)
    transformers_logging.disable_progress_bar()  # a bar of its own for half a second, in the middle of ours
    with loading(directory):
        with torch.device("meta"):  # which tells its class and its config
            empty = AutoModelForCausalLM.from_config(transformers_config(directory), trust_remote_code=False)
        model: PreTrainedModel
        # From 5.25 on, transformers fetches compiled kernels from the hub unless told not to: nobody asked for them.
        model, report = type(empty).from_pretrained(
            None, config=empty.config, state_dict=tensors, dtype=dtype, output_loading_info=True, use_kernels=False
        )
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    if missing := sorted(report["missing_keys"]):  # transformers would go on with random numbers
        raise UserError(f"{directory} has no tensor {missing[0]}, which its config.json asks for: get or make it again")
    if strange := [name for name in sorted(report["unexpected_keys"]) if not NOT_NEEDED.search(name)]:
        raise UserError(f"{directory} has a tensor {strange[0]}, which its config.json has no place for: get it again")
    return model


def transformers_config(directory: str | Path) -> ModelConfig:
    """Read a directory's config with transformers. Raises UserError: it cannot, or as of :func:`read_config`."""
    read_config(directory)
    with loading(directory):
        config: ModelConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return config


@contextmanager
def loading(directory: str | Path) -> Iterator[None]:
    """Run transformers on a directory's files in silence; its errors become UserErrors."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report on tensors would come before our one line about them
    if not torch.cuda.is_available():  # it recommends kernels that there are none of for CPUs
        logging.getLogger(KERNELS).setLevel(logging.ERROR)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # fields of other types fail somewhere in it, each in its own way
        raise UserError(f"{directory} cannot be loaded ({first_line(error)}): make it again") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def read_config(directory: str | Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises UserError: it is not there, damaged, of more layers than any model has, or tuned with a fold that is gone.
    """
    path = Path(directory) / "config.json"
    if not path.parent.is_dir():
        raise UserError(
            f"{directory} is not a model directory: give one; resolve() of saap.models.resolve makes one of a GGUF "
            "file or a name"
        )
    check_files(path.parent)
    if not path.is_file():
        raise UserError(f"{directory} is not a model directory: it has no config.json; give a Hugging Face one")
    config = read_object(path, "make the directory again")
    if (Path(directory) / "adapter_config.json").exists():
        raise UserError(
            f"{directory} holds an adapter (adapter_config.json), which no command applies: merge it into its model "
            "first (peft's merge_and_unload), and give that"
        )
    check_config(config)
    quant = config.get("slim_quant")
    if isinstance(quant, dict) and quant.get("branch"):
        raise UserError(
            f"{directory} was tuned with --fold branch, which saap no longer has: tune the slim directory again"
        )
    quant_of(config)
    check_fields("config.json", config)
    if (config.get("pad_token_id") or 0) >= (most := config.get("vocab_size") or MOST_VOCABULARY):
        raise UserError(f"config.json has pad_token_id {config['pad_token_id']}: must be below {most}; get it again")
    generation = path.with_name("generation_config.json")
    with loading(directory):
        if config.get("model_type") in ARCHITECTURES:
            config_object(config)
        if generation.is_file():
            settings = read_object(generation, "get or make the model again")
            check_fields(str(generation), settings)
            built(GenerationConfig, settings, str(generation))
    return config


def materialise_linears(model: PreTrainedModel) -> None:
    """Replace holders of integers by ordinary modules with the same numbers, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, modeling_slim.GroupQuantLinear):
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                linear.weight = torch.nn.Parameter(child.dequantize(), requires_grad=False)
                if child.bias is not None:
                    linear.bias = child.bias
                setattr(parent, name, linear)
    table = model.get_input_embeddings()
    if isinstance(table, GroupQuantTable):
        weight = torch.nn.Parameter(table.dequantize(), requires_grad=False)
        model.set_input_embeddings(_embedding(weight, getattr(table, "factor", 1.0)))
        if isinstance(model.lm_head, TiedHead):
            model.lm_head = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            model.lm_head.weight = weight


def _embedding(weight: torch.nn.Parameter, factor: float) -> torch.nn.Embedding:
    rows, columns = weight.shape
    if factor == 1:
        return torch.nn.Embedding(rows, columns, _weight=weight)
    scaled = ScaledEmbedding(rows, columns, _weight=weight)
    scaled.factor = factor
    return scaled


OLD_NAMES = {"block_ff_dim": "intermediate_size", "tie_embedding": "tie_word_embeddings"}  # which win over the new


def slim_config(
    config: Mapping[str, object],
    shape: ModelShape,
    quant: SlimQuant | None = None,
    *,
    kept: Sequence[int] | None = None,
    vocabulary: str = "",
) -> dict[str, object]:
    """Write the config of a model cut to ``shape``: of its own family where its layers have one size, ours where not.

    Quantised models, and those with biases that the family does not have, are of our family, too.

    Args:
        config: of the model that is cut, dense or slim.
        quant: the ``slim_quant`` entry of a model that holds integers.
        kept: which layers of that model are left, ``plan.kept_layers``; None is all of them.
        vocabulary: the tokens that the head predicts, packed; by default as that model's.

    Raises ValueError: ``kept`` is needed to know what each layer does.
    """
    architecture = architecture_of(dict(config))
    ours = ("slim_layers", "slim_quant", "slim_bias", "auto_map", "_name_or_path", "slim_vocabulary")
    slim: dict[str, object] = {k: v for k, v in config.items() if k not in ours} | _layer_lists(config, shape, kept)
    slim["num_hidden_layers"], slim["head_dim"] = len(shape.layers), shape.head_dim
    slim.pop("full_attn_idxs", None)  # what ``layer_types`` says in other words
    if "block_auto_adjust_ff_dim" in slim or architecture.conv_in:
        slim["block_auto_adjust_ff_dim"] = False  # widths are what they say
    slim |= {name: slim.pop(old) for old, name in OLD_NAMES.items() if old in slim}
    family, first = str(config["model_type"]).removeprefix(SLIM), shape.layers[0]
    biased = shape.added_bias and not (shape.mlp_bias and shape.attention_bias and shape.output_bias)
    vocabulary = vocabulary or head_vocabulary(config)
    if quant is None and not biased and not vocabulary and _is_plain(slim, shape):
        return slim | {
            "model_type": family,
            "architectures": [f"{architecture.family}ForCausalLM"],
            "num_attention_heads": first.query_heads,
            "num_key_value_heads": first.kv_heads,
            architecture.ffn_width: first.ffn,
        }
    classes = slim_classes(architecture.family)
    assert classes is not None, "transformers has the family of a model that it read"
    slim |= {
        "model_type": classes.config.model_type,
        "architectures": [classes.model.__name__],
        "auto_map": {
            "AutoConfig": f"modeling_slim.{classes.config.__name__}",
            "AutoModelForCausalLM": f"modeling_slim.{classes.model.__name__}",
        },
        "slim_layers": [sizes.entry(architecture.rare) for sizes in shape.layers],
    }
    if biased:
        slim["slim_bias"] = True
    if vocabulary:
        slim["slim_vocabulary"] = vocabulary
    if quant is not None:
        slim |= {"slim_quant": quant, "tie_word_embeddings": False}  # the integers are tied, not a float weight
    return slim


def _is_plain(slim: Mapping[str, object], shape: ModelShape) -> bool:
    """Whether the family's own class in transformers builds the model."""
    first, base_heads = shape.layers[0], slim.get("num_attention_heads")
    alike = len(set(shape.layers)) == 1 and bool(first.ffn and first.query_heads)
    if not alike or first.query_heads == base_heads:
        return alike
    # transformers 5 refuses query heads that do not divide the hidden size, and Phi-3 counts the factors of its long
    # rotary embedding by hidden size / heads.
    return shape.hidden % first.query_heads == 0 and "short_factor" not in rope_of(slim)


def _layer_lists(
    config: Mapping[str, object], shape: ModelShape, kept: Sequence[int] | None
) -> dict[str, list[object]]:
    """Cut the config's lists with one entry per layer, also those of its defaults, to the kept layers.

    A layer that mixes no tokens takes the type of one that does: so the first layer's type, by which transformers
    measures how long a cache is, is one that has something in it.
    """
    if architecture_of(dict(config)).window != "by layer":
        return {}
    full = with_defaults(dict(config))
    count = field_of(full, "num_hidden_layers")
    if kept is None and count != len(shape.layers):
        raise ValueError(f"{count} layers become {len(shape.layers)}: say which are kept")
    lists = {key: entries_of(full, key) for key in PER_LAYER}
    cut = {key: entries if kept is None else [entries[i] for i in kept] for key, entries in lists.items() if entries}
    if (kinds := cut.get("layer_types")) and not shape.sources:  # else a layer's type says whose keys it reads
        mixes = [any(map(sizes.has, MIXERS)) for sizes in shape.layers]
        first = kinds[mixes.index(True)] if any(mixes) else None
        cut["layer_types"] = [kind if there else first for kind, there in zip(kinds, mixes, strict=True)]
    return cut


def write_slim(
    out: str | Path,
    base: str | Path,
    config: Mapping[str, object],
    tensors: Iterator[tuple[str, torch.Tensor]],
    record: Record,
    change: Callable[[Path, Path], None] | None = None,
) -> Path:
    """Write a slim directory: weights, config, the base's tokenizer files, and ``saap.json``.

    ``change``: is given the directory and the base, to change further files before they are hashed.
    """
    with writing_directory(out) as partial:
        write_shards(partial, tensors)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        copy_sidecars(Path(base), partial)
        if change is not None:
            change(partial, Path(base))
        if str(config["model_type"]).startswith(SLIM):
            shutil.copyfile(modeling_slim.__file__, partial / "modeling_slim.py")
        DOCUMENT.write(partial / RECORD, {**record, "files": hashes(partial)})
    return Path(out)
