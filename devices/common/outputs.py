"""The place of ``writing_over`` before saap 0.3."""

from __future__ import annotations

from saap.base.lazy import moved

__getattr__ = moved(__name__, "saap.base.outputs")
