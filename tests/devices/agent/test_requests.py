"""docs/formats.md names every field of the agent's requests and answers."""

import re
from pathlib import Path
from typing import get_type_hints

import pytest

from devices.agent import requests
from devices.agent.main import REQUESTS

PAGE = Path(__file__).resolve().parents[3] / "docs/formats.md"
ASKED = {
    "hello": requests.Request,
    "take": requests.TakeRequest,
    "held": requests.HeldRequest,
    "put": requests.PutRequest,
    "install": requests.InstallRequest,
    "start": requests.StartRequest,
    "follow": requests.FollowRequest,
    "fetch": requests.RunRequest,
    "end": requests.RunRequest,
}
ANSWERED = {
    "hello": requests.HelloAnswer,
    "take": requests.TakeAnswer,
    "install": requests.Installation,
    "fetch": requests.FetchAnswer,
}


@pytest.mark.parametrize("do", REQUESTS)
def test_the_page_has_every_field(do: str) -> None:
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{do}` |")]
    _, fields, answer = row.strip("| ").split("|")
    named = set(re.findall(r"`(\w+)`", fields))
    assert set(get_type_hints(ASKED[do])) - {"do", "root"} <= named
    if do in ANSWERED:
        assert set(get_type_hints(ANSWERED[do])) <= set(re.findall(r"`(\w+)`", answer))
