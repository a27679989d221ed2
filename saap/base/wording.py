"""Words that messages of all packages need."""

from __future__ import annotations

import json


def counted(count: int, noun: str, nouns: str = "") -> str:
    """Return a number and its noun: ``1 thread``, ``2 threads``, ``3 matrices``."""
    return f"{count} {noun if count == 1 else nouns or f'{noun}s'}"


def installing(extra: str) -> str:
    """Return what to give to pip for an extra: of the checkout or wheel that this saap is of, else by its name."""
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    try:
        source = json.loads(distribution("saap").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # on a board
        source = {}
    if source.get("dir_info", {}).get("editable"):
        return f"-e '{unquote(urlsplit(source['url']).path)}[{extra}]'"
    return f"'saap[{extra}] @ {source['url']}'" if source else f"'saap[{extra}]'"
