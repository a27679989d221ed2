"""Layers that keep no activations and compute them again on the way back, under either of transformers' names."""

from __future__ import annotations

from typing import Any


def recompute(model: Any, on: bool) -> None:
    """Turn it on or off: ``activation_checkpointing_*`` since transformers 5, ``gradient_checkpointing_*`` before."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if on:
        # The reentrant form gives no gradients where a layer's input needs none: behind a frozen embedding.
        options = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{name}_checkpointing_enable")(**options)
    else:
        getattr(model, f"{name}_checkpointing_disable")()
