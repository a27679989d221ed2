"""The place of OpenVINO's decoder in earlier releases."""

from __future__ import annotations

from saap.base.lazy import moved

__getattr__ = moved("export.bundle.openvino", "export.engine.openvino")
