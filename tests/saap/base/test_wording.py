import json
from types import SimpleNamespace

import pytest

from saap.base.wording import counted, installing


def test_numbers_and_nouns_agree() -> None:
    assert [counted(count, "thread") for count in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
    assert [counted(count, "matrix", "matrices") for count in (1, 3)] == ["1 matrix", "3 matrices"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "'saap[bench]'"),
        ({"url": "file:///my%20code/saap", "dir_info": {"editable": True}}, "-e '/my code/saap[bench]'"),
        ({"url": "file:///dist/saap.whl", "archive_info": {}}, "'saap[bench] @ file:///dist/saap.whl'"),
    ],
)
def test_what_is_given_to_pip_is_where_saap_came_from(
    source: dict[str, object] | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = None if source is None else json.dumps(source)
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: SimpleNamespace(read_text=lambda _: record))
    assert installing("bench") == words
