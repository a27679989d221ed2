"""docs/models.md is made of the rows of the families."""

from pathlib import Path

from saap.models.architectures import FAMILIES, LFM2

PAGE = Path(__file__).resolve().parents[3] / "docs/models.md"
WINDOWS = {"none": "-", "all": "in all layers", "by layer": "by layer"}


def table():
    lines = ["| `model_type` | transformers | what is pruned | windows | GGUF |", "| --- | --- | --- | --- | --- |"]
    for name, row in FAMILIES.items():
        attention = "heads of a layer together" if row.qk_norm_spans_heads else "query heads, KV groups"
        release = "5" if row.transformers > 4 else "4.57 and 5"
        gguf = row.gguf
        rare = {"conv": "channels of FFN and convolution", "delta": "FFN channels, key heads of delta nets"}
        channels = rare[row.rare.name] if row.rare else "FFN channels"
        windows = "-" if row is LFM2 or row.delta else WINDOWS[row.window]
        pruned = f"{channels}, {attention}, blocks" + ("" if row.per_layer else ", layers")
        parts = [f"`{name}`", release, pruned, windows, gguf]
        lines.append(f"| {' | '.join(parts)} |")
    return "\n".join(lines)


def test_the_page_names_every_family_and_what_works_for_it():
    _, marked, rest = PAGE.read_text().partition("<!-- table: families -->\n")
    assert marked
    shown = rest.partition("\n<!-- end -->")[0]
    assert shown == table(), f"write this into docs/models.md:\n{table()}"
