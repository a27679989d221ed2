"""The cache is shown by what it holds, and cleared."""

from support.command_line import here


def test_what_is_kept_is_shown_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("SAAP_CACHE", str(tmp_path / "cache"))
    assert here("cache").stdout.strip().endswith(f"0.0 MB in {tmp_path}/cache")
    for name, size in (
        ("scores/a.json", 3_000_000),
        ("model-0a1b/model.safetensors", 500_000),
        ("smollm2-135m-0a/x", 9),
    ):
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(size))
    shown = here("cache").stdout
    assert "scores and measured losses" in shown and "3.0" in shown and "converted from GGUF" in shown
    assert f"3.5 MB in {tmp_path}/cache" in shown
    assert f"0.5 MB removed from {tmp_path}/cache" in here("cache", "--clear", "model").stdout
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["scores", "smollm2-135m-0a"]
    assert "'score' is not one of 'all', 'scores'" in here("cache", "--clear", "score", code=2).stderr
    assert f"3.0 MB removed from {tmp_path}/cache" in here("cache", "--clear").stdout
    assert list((tmp_path / "cache").iterdir()) == []
