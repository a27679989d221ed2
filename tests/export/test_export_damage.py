"""A model directory whose small files are damaged: named before weights are written, with what mends it."""

import pytest
from support.exported import export_bundle

from export.bundle.tokenizer import RunError
from saap.base.errors import UserError

MEND = "get or make the model again"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("generation_config.json", "{", rf"generation_config\.json is damaged \(.*\): {MEND}"),
        ("generation_config.json", "[]", rf"generation_config\.json is damaged \(not an object\): {MEND}"),
        ("generation_config.json", '{"eos_token_id": [1, "x"]}', "has eos_token_id .*: must be a token's id or a list"),
        ("generation_config.json", '{"eos_token_id": 1.5}', "has eos_token_id '1.5': must be a token's id or a list"),
        ("tokenizer.json", "{}", rf"tokenizer\.json cannot be read \(.*\): {MEND}"),
        ("tokenizer_config.json", "[]", rf"tokenizer_config\.json is damaged \(not an object\): {MEND}"),
    ],
)
def test_damage_is_named(tiny_model, tmp_path, name, content, says):
    path = tiny_model()
    (path / name).write_text(content)
    told: list[str] = []
    with pytest.raises((UserError, RunError), match=says) as caught:
        export_bundle(path, tmp_path / "bundle", progress=lambda *step: told.append(step[0]))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not told  # no weight was written
    assert not (tmp_path / "bundle").exists()


def test_every_id_that_ends_a_text_is_kept(tiny_model, tmp_path):
    path = tiny_model()
    for content, ids in (
        ('{"eos_token_id": [1, 2]}', [1, 2]),
        ('{"eos_token_id": 5}', [5]),
        ('{"eos_token_id": null}', []),
    ):
        (path / "generation_config.json").write_text(content)
        assert export_bundle(path, tmp_path / "bundle").eos_token_ids == ids
