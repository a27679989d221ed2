import json
from pathlib import Path
from typing import Any

import pytest

from saap.base.costs import CostError
from saap.models.shape import LayerSizes, ModelShape
from saap.prune.search.layer_costs import CostTable, read_costs

SHAPE = ModelShape(hidden=576, head_dim=64, vocab=49152, tied=True, layers=())
ATTENTION = {(1, 1): 10.0, (3, 1): 14.0, (3, 3): 30.0, (9, 3): 42.0}
FFN = {64: 5.0, 256: 8.0, 1536: 40.0}
TABLE = CostTable(1, 192, 100.0, ATTENTION, FFN, head={49152: 100.0})


def document(**changes: Any) -> dict[str, Any]:
    table = {
        "n_threads": 1,
        "constant_ms": 100.0,
        "node_ms": 0.5,
        "attention": [{"query_heads": q, "kv_heads": kv, "ms": ms} for (q, kv), ms in ATTENTION.items()],
        "ffn": [{"width": width, "ms": ms} for width, ms in FFN.items()],
    }
    whole = {
        "kind": "saap costs",
        "schema": 1,
        "device": {"fingerprint": "abc", "onnxruntime": "1.32.0"},
        "model": {"hidden": 576, "head_dim": 64, "vocab": 49152, "bits": 4, "block": 32},
        "depth": 192,
        "threads": [table],
    }
    return {**whole, **changes}


def with_table(**changes: Any) -> dict[str, Any]:
    return document(threads=[{**document()["threads"][0], **changes}])


def written(path: Path, content: dict[str, Any] | str) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_step_is_the_sum_of_what_was_measured_and_interpolated() -> None:
    assert [TABLE.attention_ms(q, kv) for q, kv in ATTENTION] == list(ATTENTION.values())
    assert [TABLE.layer_ms(LayerSizes(ffn=width)) for width in FFN] == list(FFN.values())
    assert (TABLE.layer_ms(LayerSizes(ffn=896)), TABLE.attention_ms(2, 1)) == pytest.approx((24.0, 12.0))
    assert TABLE.attention_ms(2, 2) == pytest.approx(20.0)  # between 1 on 1 and 3 on 3
    assert TABLE.attention_ms(4, 2) == pytest.approx((12 + 36) / 2)
    assert TABLE.layer_ms(LayerSizes(ffn=32)) == 5.0  # as the smallest that was measured
    assert TABLE.layer_ms(LayerSizes()) == 0
    assert TABLE.layer_ms(LayerSizes(9, 3, 0)) == 42 and TABLE.layer_ms(LayerSizes(0, 0, 1536)) == 40
    assert TABLE.total_ms([LayerSizes(9, 3, 1536), LayerSizes(0, 0, 64), LayerSizes(3, 1, 0)]) == 100 + 82 + 5 + 14


def test_a_head_of_fewer_words_is_interpolated(tmp_path: Path) -> None:
    heads = [{"rows": 8000, "ms": 20.0}, {"rows": 24000, "ms": 50.0}]
    table = read_costs(written(tmp_path / "cost.json", with_table(head=heads)), SHAPE, bits=4, group_size=32)
    assert [table.outside_ms(rows) for rows in (None, 49152, 24000, 16000, 100)] == [100, 100, 50, 35, 20]
    assert table.total_ms([LayerSizes(9, 3, 1536)], 24000) == 50 + 82
    older = read_costs(written(tmp_path / "old.json", document()), SHAPE, bits=4, group_size=32)
    assert older.outside_ms() == older.outside_ms(49152) == 100
    with pytest.raises(CostError, match=r"has no smaller vocabularies: measure it again .* or leave --vocabulary out"):
        older.outside_ms(24000)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((9, 3, 2048), "costs were measured up to an FFN width of 1536, not for 2048"),
        ((12, 3, 64), "up to 3 KV heads of 3 query heads each, not for 3 of 4"),
        ((4, 4, 64), "up to 3 KV heads of 3 query heads each, not for 4 of 1"),
        ((4, 3, 64), "4 query heads on 3 KV heads have no cost"),
    ],
)
def test_larger_sizes_are_refused(sizes: tuple[int, int, int], message: str) -> None:
    with pytest.raises(CostError, match=message):
        TABLE.layer_ms(LayerSizes(*sizes))


def test_the_thread_count_is_chosen(tmp_path: Path) -> None:
    one = document()["threads"][0]
    path = written(tmp_path / "cost.json", document(threads=[one, {**one, "n_threads": 2, "constant_ms": 60.0}]))
    assert read_costs(path, SHAPE, bits=4, group_size=32, threads=2).constant_ms == 60
    with pytest.raises(CostError, match="holds costs for 1, 2 threads, say for how many threads: choose one"):
        read_costs(path, SHAPE, bits=4, group_size=32)
    with pytest.raises(CostError, match="holds costs for 1, 2 threads, it has none for 4"):
        read_costs(path, SHAPE, bits=4, group_size=32, threads=4)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"onnxruntime": "1.33.0"}, "was measured for ONNX Runtime 1.32.0, not 1.33.0"),
        ({"bits": 8}, "was measured for a model with bits 4, not bits 8"),
        ({"group_size": 64}, "was measured for a model with block 32, not block 64"),
        (
            {"shape": ModelShape(512, 64, 300, True, ())},
            "a model with hidden 576, vocab 49152, not hidden 512, vocab 300",
        ),
    ],
)
def test_another_device_or_model_is_refused(tmp_path: Path, asked: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "cost.json", document())
    with pytest.raises(CostError, match=message) as error:
        read_costs(path, **{"shape": SHAPE, "bits": 4, "group_size": 32, **asked})
    assert error.value.exit_code == 2 and "\n" not in str(error.value)


def test_a_table_is_read_and_the_group_size_means_nothing_for_floats(tmp_path: Path) -> None:
    path = written(tmp_path / "cost.json", document())
    assert read_costs(path, SHAPE, bits=4, group_size=32, threads=1, onnxruntime="1.32.0") == TABLE
    assert read_costs(path, SHAPE, bits=4, group_size=32) == TABLE
    path = written(tmp_path / "cost.json", document(model={**document()["model"], "bits": 32, "block": 0}))
    assert read_costs(path, SHAPE, bits=32, group_size=32) == TABLE


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(document())[:-40], "is damaged"),
        ("[1]", "is damaged .not an object"),
        (document(kind="else"), "is damaged .'else' is no table of costs"),
        ({"measurements": []}, "is another kind of file .it has no 'threads'."),
        (document(schema=2), "has costs schema 2, this saap reads 1"),
        (document(threads=[{"n_threads": 1}]), "is damaged .Object missing required field `constant_ms`"),
        (with_table(ffn=[]), "is damaged"),
        (with_table(constant_ms=None), "is damaged"),
        (with_table(constant_ms=float("nan")), "is damaged .a number is NaN"),
        (with_table(constant_ms=10**400), "is damaged .*constant_ms"),
        (with_table(ffn=[{"width": 10**400, "ms": 1.0}]), "is damaged .*width"),
        (with_table(ffn=[{"width": 0, "ms": 1.0}]), "is damaged .Expected `int` >= 1 - at .*width"),
        (document(threads=3), "is damaged"),
        (document(device=None), "is damaged"),
    ],
)
def test_foreign_and_damaged_files_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = written(tmp_path / "cost.json", content)
    with pytest.raises(CostError, match=message) as error:
        read_costs(path, SHAPE, bits=4, group_size=32)
    assert "\n" not in str(error.value)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CostError, match=r"there is no .*cost.json: give a file of `saap devices costs MODEL"):
        read_costs(tmp_path / "cost.json", SHAPE, bits=4, group_size=32)


def test_a_table_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "cost.json", document())
    first = read_costs(path, SHAPE, bits=4, group_size=32)
    monkeypatch.setattr("saap.base.documents.parse_json", lambda *args, **kwargs: pytest.fail("parsed again"))
    assert read_costs(path, SHAPE, bits=4, group_size=32) == first
