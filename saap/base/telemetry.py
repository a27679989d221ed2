"""Nothing that a library could report leaves the device, unless ``SAAP_TELEMETRY=1``.

ONNX Runtime's wheels for Linux (from 1.29) and onnxruntime-genai's upload events in the background and keep a device id
under the user's cache directory. They read their switch when they are loaded, child processes inherit it. OpenVINO has
no switch but a file in the home directory: it goes without the package that reports, where that cannot be imported.
"""

from __future__ import annotations

import os
import sys

# DO_NOT_TRACK is read by huggingface_hub and by others that follow https://consoledonottrack.com.
OFF = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
REPORTER = "openvino_telemetry"


def turn_off() -> None:
    """Tell the libraries of this process, and of those it will start, to report nothing."""
    if os.environ.get("SAAP_TELEMETRY") != "1":
        os.environ.update(OFF)
        sys.modules.setdefault(REPORTER, None)  # type: ignore[arg-type]  # importing it fails
