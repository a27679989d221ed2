"""saap: prune a language model until it is as fast as you need on the device you have.

``import saap`` stays free of torch; :func:`load_model` imports it when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saap.base.errors import UserError
from saap.base.lazy import handed_out
from saap.base.telemetry import turn_off

if TYPE_CHECKING:
    from saap.cli.console import Console as Console
    from saap.models.checkpoint import load_model as load_model

__version__ = "0.2.0"
WHEEL = f"saap-{__version__}-py3-none-any.whl"  # of `make wheel`
__all__ = ["Console", "UserError", "__version__", "load_model"]
turn_off()
__getattr__ = handed_out(__name__, {"Console": ".cli.console", "load_model": ".models.checkpoint"})
