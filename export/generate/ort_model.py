"""transformers' ``generate`` on a bundle whose layers may differ: greedy, sampling, beams, batches padded on the left.

optimum's ``ORTModelForCausalLM`` reads one KV shape from the config, so it runs uniform bundles only; here each layer's
shape comes from the manifest. GroupQueryAttention counts a row's tokens from its start, so padding on the left would be
taken for text: rows are moved to the start of their cache instead. That is also why a prompt is prefilled row by row
(the operator refuses several rows of several tokens over a past), while decoding runs all rows at once. The portable
graph reads the mask and takes positions, so there padding stays where it is and the cache grows by a column at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from export.bundle.manifest import DECODE_GRAPH, BundleManifest, CachePart, read_manifest, verify_files
from export.bundle.tokenizer import RunError
from export.engine.protocol import check_threads
from export.engine.session import open_session

CAPACITY_STEP = 256  # positions; the cache doubles from here, so that growing it is rare
# Later releases of transformers 5 call the cache by another name.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class BundleConfig(PretrainedConfig):
    """What ``generate`` reads of a config, from the manifest; the counts are the largest of any layer."""

    model_type = "saap_bundle"

    @classmethod
    def of(cls, manifest: BundleManifest) -> BundleConfig:
        eos = list(manifest.eos_token_ids)
        fields: dict[str, object] = {
            "vocab_size": manifest.vocab_size,
            "hidden_size": manifest.hidden_size,
            "num_hidden_layers": len(manifest.kv_layers),
            "num_attention_heads": max(layer.query_heads for layer in manifest.kv_layers),
            "num_key_value_heads": max(layer.kv_heads for layer in manifest.kv_layers),
            "head_dim": manifest.head_dim,
            "max_position_embeddings": manifest.context_length,
            "bos_token_id": manifest.bos_token_id,
            "eos_token_id": eos or None,
            "pad_token_id": eos[0] if eos else None,
            "is_decoder": True,
        }
        config: BundleConfig = cls.from_dict(fields)
        return config


class BundleCache:
    """What the layers remember of a batch; every row starts at position 0, past and present are the same memory.

    ``parts``: of the bundle's manifest.

    Attributes:
        lengths: [b] int64, the tokens that each row holds, padding not counted.
        columns: columns of ``input_ids`` seen so far, padding counted.
        buffers: of each part in turn, keys and values [b, kv_heads, capacity, head_dim], and states.
    """

    is_compileable = False
    is_linear = (False,)  # generate asks whether all layers are of linear attention

    def __init__(self, parts: Sequence[CachePart], batch: int) -> None:
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        self.columns = 0
        self.parts = parts
        self.buffers = [torch.zeros(part.sized(batch, 0), dtype=getattr(torch, part.dtype)) for part in parts]

    @property
    def capacity(self) -> int:
        return next(b.shape[2] for b, part in zip(self.buffers, self.parts, strict=True) if part.grows)

    def reserve(self, positions: int, limit: int) -> None:
        """Make room for ``positions`` in every row, at most ``limit``."""
        if positions <= self.capacity:
            return
        more = min(limit, max(2 * self.capacity, -(-positions // CAPACITY_STEP) * CAPACITY_STEP)) - self.capacity
        self.buffers = [
            torch.nn.functional.pad(buffer, (0, 0, 0, more)) if part.grows else buffer
            for buffer, part in zip(self.buffers, self.parts, strict=True)
        ]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen: what ``generate`` cuts ``input_ids`` by."""
        return self.columns

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i be what row ``rows[i]`` was."""
        self.lengths = self.lengths[rows]
        self.buffers = [buffer[rows] for buffer in self.buffers]


class BundleForCausalLM(PreTrainedModel, GenerationMixin):
    """A bundle as a transformers model for ``generate``; it has no weights of its own.

    ``BundleForCausalLM.from_bundle("out/bundle").generate(ids, max_new_tokens=20)``
    """

    config_class = BundleConfig
    main_input_name = "input_ids"
    _is_stateful = True  # the cache is ours, and cannot be rolled back for assisted generation

    def __init__(self, config: BundleConfig, directory: Path, manifest: BundleManifest, threads: int = 1) -> None:
        check_threads(threads)
        super().__init__(config)
        self.manifest = manifest
        self._session = open_session(directory / DECODE_GRAPH, threads, manifest)
        self._parts = manifest.cache
        self._grows = any(given.name == "position_ids" for given in self._session.get_inputs())

    @classmethod
    def from_bundle(cls, directory: str | Path, threads: int = 1, verify: bool = True) -> BundleForCausalLM:
        """Load a bundle.

        ``verify``: check the files' hashes first, which reads them all.

        Raises:
            BundleError: no bundle there, or one that does not verify.
            EngineError: more threads than cores, or a graph that this ONNX Runtime cannot load.
        """
        directory = Path(directory)
        manifest = verify_files(directory) if verify else read_manifest(directory)
        model = cls(BundleConfig.of(manifest), directory, manifest, threads)
        if (directory / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
            model.generation_config.eos_token_id = model.config.eos_token_id
        model.eval()
        return model

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: object
    ) -> dict[str, object]:
        """The columns that the cache has not seen, the whole mask, and the cache."""
        state = kwargs.get(CACHE)
        new = input_ids[:, state.columns :] if isinstance(state, BundleCache) else input_ids
        return {"input_ids": new, "attention_mask": attention_mask, CACHE: state}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: BundleCache | None = None,
        cache: BundleCache | None = None,
        **_: object,
    ) -> CausalLMOutputWithPast:
        """Logits after the last column.

        Args:
            input_ids: [b, n], the new columns.
            attention_mask: [b, columns seen + n]; zeros only before the first one of a row. None is all ones.
            past_key_values: of an earlier call; it is changed in place.
            cache: the same under its newer name.

        Raises RunError: padding that is not on the left, or more tokens than the context holds.
        """
        batch, count = input_ids.shape
        state = past_key_values or cache or BundleCache(self._parts, batch)
        if attention_mask is None:
            attention_mask = torch.ones(batch, state.columns + count, dtype=torch.int64)
        new = _new_columns(attention_mask, batch, state.columns, count)
        fresh, limit = state.columns == 0, self.manifest.context_length
        longest = int((state.lengths + new.sum(1)).max())
        if longest > limit:
            raise RunError(f"{longest} tokens do not fit the context of {limit}: shorten the prompt or max_new_tokens")
        if self._grows:
            logits = self._append_columns(input_ids, attention_mask, new, state)
        else:
            state.reserve(longest, limit)
            logits = self._append_tokens(input_ids, new, state, fresh)
        state.columns += count
        return CausalLMOutputWithPast(logits=logits, **{CACHE: state})  # type: ignore[arg-type]

    def _append_columns(
        self, ids: torch.Tensor, mask: torch.Tensor, new: torch.Tensor, state: BundleCache
    ) -> torch.Tensor:
        """Where the cache grows: all rows at once, padding as a column like any other."""
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, state.columns :]
        total = state.columns + ids.shape[1]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        present = [
            buffer.new_empty(part.sized(len(ids), total))
            for buffer, part in zip(state.buffers, self._parts, strict=True)
        ]
        logits = self._run_graph(given, state.buffers, present)
        state.buffers, state.lengths = present, state.lengths + new.sum(1)
        return logits

    def _append_tokens(self, ids: torch.Tensor, new: torch.Tensor, state: BundleCache, fresh: bool) -> torch.Tensor:
        """Where past and present are one buffer: single tokens all rows at once, longer pieces row by row.

        Beams of one prompt, equal rows of an empty cache, are computed once.
        """
        if ids.shape[1] == 1 and not fresh:
            state.lengths += 1
            return self._run_shared(ids, state.lengths, state.buffers)
        seen: dict[tuple[int, ...], int] = {}
        logits = torch.empty(len(ids), 1, self.manifest.vocab_size)
        for row in range(len(ids)):
            tokens = ids[row, new[row]]
            twin = seen.setdefault(tuple(tokens.tolist()), row) if fresh else row
            state.lengths[row] += len(tokens)
            if twin == row:
                views = [buffer[row : row + 1] for buffer in state.buffers]
                logits[row] = self._run_shared(tokens[None], state.lengths[row : row + 1], views)[0]
            else:
                logits[row] = logits[twin]
                for buffer in state.buffers:
                    buffer[row] = buffer[twin]
        return logits

    def _run_shared(self, ids: torch.Tensor, lengths: torch.Tensor, buffers: Sequence[torch.Tensor]) -> torch.Tensor:
        """Rows of ids [b, n] that are ``lengths`` long with them."""
        mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
        return self._run_graph({"input_ids": ids, "attention_mask": mask}, buffers, buffers)

    def _run_graph(
        self, given: dict[str, torch.Tensor], past: Sequence[torch.Tensor], present: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """One call of the graph over contiguous buffers, without a copy."""
        logits = torch.empty(len(given["input_ids"]), 1, self.manifest.vocab_size)
        inputs = {name: tensor.long().contiguous() for name, tensor in given.items()}
        inputs |= {part.past: buffer for part, buffer in zip(self._parts, past, strict=True)}
        outputs = {part.present: buffer for part, buffer in zip(self._parts, present, strict=True)}
        binding = self._session.io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, {"logits": logits, **outputs})):
            for name, tensor in tensors.items():
                bind(name, "cpu", 0, tensor.numpy().dtype, tuple(tensor.shape), tensor.data_ptr())
        self._session.run_with_iobinding(binding)
        return logits

    @staticmethod
    def _reorder_cache(past_key_values: BundleCache, beam_idx: torch.Tensor) -> BundleCache:
        past_key_values.reorder(beam_idx)
        return past_key_values


def _new_columns(mask: torch.Tensor, batch: int, columns: int, count: int) -> torch.Tensor:
    """The part of the mask that belongs to the new columns, bool [b, count]."""
    if tuple(mask.shape) != (batch, columns + count):
        raise RunError(f"the attention mask has shape {tuple(mask.shape)}, not {(batch, columns + count)}")
    present = mask.bool()
    if not bool(present[:, -1].all()) or bool((present[:, :-1] & ~present[:, 1:]).any()):
        raise RunError("the attention mask has zeros after a token: pad on the left (padding_side='left')")
    return present[:, columns:]
