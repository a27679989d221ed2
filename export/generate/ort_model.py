"""transformers' ``generate`` on a bundle: greedy or sampling, one sequence at a time.

optimum's ``ORTModelForCausalLM`` reads one KV shape from the config, so it runs uniform bundles only.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from export.bundle import Bundle
from export.bundle.manifest import BundleManifest
from export.bundle.tokenizer import RunError
from export.engine.opening import open_engine
from export.engine.protocol import Engine, EngineOptions
from export.engine.spec import BundleSpec
from export.generate.loop import CachedSequence


class BundleConfig(PretrainedConfig):
    """The config that ``generate`` reads, from the manifest; the counts are the largest of any layer."""

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


class BundleForCausalLM(PreTrainedModel, GenerationMixin):
    """A bundle as a transformers model for ``generate``; it has no weights of its own.

    ``BundleForCausalLM.from_bundle("out/bundle").generate(ids, max_new_tokens=20)``
    """

    config_class = BundleConfig
    main_input_name = "input_ids"
    _is_stateful = True  # the cache is the engine's, and cannot be rolled back for assisted generation

    def __init__(self, config: BundleConfig, engine: Engine, manifest: BundleManifest) -> None:
        super().__init__(config)
        self.manifest, self._sequence = manifest, CachedSequence(engine)

    @classmethod
    def from_bundle(cls, directory: str | Path, threads: int = 1) -> BundleForCausalLM:
        """Load a bundle, or ``BUNDLE@ENGINE``.

        Raises:
            BundleError: no bundle there, or one that does not verify.
            EngineError: more threads than cores, or a graph that this ONNX Runtime cannot load.
        """
        bundle = Bundle.open(BundleSpec.of(directory).bundle)
        manifest = bundle.manifest
        engine = open_engine(directory, EngineOptions(threads, manifest.context_length))
        model = cls(BundleConfig.of(manifest), engine, manifest)
        if "generation_config.json" in manifest.files:
            path = bundle.file("generation_config.json")
            model.generation_config = GenerationConfig.from_pretrained(path.parent, local_files_only=True)
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
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object
    ) -> dict[str, object]:
        """All ids: the engine reads those that its cache does not hold."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: object
    ) -> CausalLMOutputWithPast:
        """Logits [1, 1, vocab] after the last of ``input_ids`` [1, n], the whole sequence.

        Raises RunError: several rows or beams, padding, or more tokens than the context holds.
        """
        if len(input_ids) != 1 or (attention_mask is not None and not bool(attention_mask.all())):
            raise RunError("a bundle generates one sequence at a time: give one prompt, no padding and no beams")
        count, limit = input_ids.shape[1], self.manifest.context_length
        if count > limit:
            raise RunError(f"{count} tokens do not fit the context of {limit}: shorten the prompt or max_new_tokens")
        logits, _read = self._sequence.continue_to(input_ids[0].tolist(), lambda: False)
        assert logits is not None
        row = torch.from_numpy(logits.copy())[None, None]
        return CausalLMOutputWithPast(logits=row)
