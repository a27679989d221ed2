import json

import pytest

from saap.base.errors import UserError
from saap.base.files import MOST_NESTED
from saap.models.record import read_record


def test_a_document_is_not_nested_deeper_than_it_can_be_written(tmp_path):
    """Python reads what is a thousand deep, and copies no dataclass that holds it."""
    deep: object = 0
    for _ in range(MOST_NESTED):
        deep = [deep]
    (tmp_path / "saap.json").write_text(json.dumps({"format": 4, "lineage": {"source": deep}}))
    with pytest.raises(UserError, match=r"saap\.json is damaged \(nested too deeply\)"):
        read_record(tmp_path)
