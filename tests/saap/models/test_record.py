"""saap.json has a schema, which docs/formats.md names field by field, and old records fit it."""

import json
from pathlib import Path
from typing import get_type_hints

import pytest

from saap.base.errors import UserError
from saap.models.record import Calibration, Costs, Lineage, Plan, Record, Tuning, read_record

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("kind", [Record, Plan, Costs, Lineage, Calibration, Tuning])
def test_the_page_names_every_field(kind):
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    section = page[page.index("## saap.json") : page.index("## bundle.json")]
    assert [name for name in get_type_hints(kind) if f"`{name}`" not in section and name not in section.split()] == []


@pytest.mark.parametrize("commit", ["760273a", "1e82854a"])
@pytest.mark.parametrize("name", ["slim", "tuned"])
def test_what_an_old_record_says_is_read_and_kept(name, commit):
    old = ROOT / "tests" / "support" / "old" / commit / name
    written = json.loads((old / "saap.json").read_text(encoding="utf-8"))
    del written["checksum"]
    assert read_record(old) == written


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"format": 2}, r"saap\.json has record format 2, this saap reads 1: make the directory again with this saap"),
        ({"plan": {"layers": [{"query_heads": [0], "kv_heads": [0]}]}}, r"damaged \(.*`ffn`.*\$\.plan\.layers\[0\]"),
        ({"lineage": {"calibration": {"tokens": -1}}}, r"damaged \(.*\$\.lineage\.calibration\.tokens"),
        ({"files": []}, r"damaged \(Expected `object`, got `array` - at `\$\.files`\): make the directory again"),
    ],
)
def test_a_record_that_is_not_one(tmp_path, changes, complaint):
    (tmp_path / "saap.json").write_text(json.dumps({"format": 1, **changes}))
    with pytest.raises(UserError, match=complaint):
        read_record(tmp_path)


def test_a_dense_model_has_none(tmp_path):
    assert read_record(tmp_path) == {}
