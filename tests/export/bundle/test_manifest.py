"""bundle.json: what is refused, with the place, and that its page names every field."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from support.tiny_graphs import tiny_bundle

from export.bundle.manifest import BundleError, BundleManifest, Parity, read_manifest, write_manifest

FORMATS = Path(__file__).resolve().parents[3] / "docs" / "formats.md"


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    text = (bundle / "bundle.json").read_text()
    assert write_manifest(bundle, read_manifest(bundle)) == read_manifest(bundle)
    assert (bundle / "bundle.json").read_text() == text
    assert list(json.loads(text)) == [*(field.name for field in fields(BundleManifest)), "checksum"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, r"bundle\.json has bundle format 2, this saap reads 1: export the bundle again"),
        ({"format": None}, "has no 'format'"),
        ({"bits": "4"}, r"is damaged \(.*`\$\.bits`\): export the bundle again"),
        ({"layers": [{"query_heads": 1, "kv_heads": 1, "ffn": -1}]}, r"is damaged \(.*`\$\.layers\[0\]\.ffn`\)"),
        ({"files": {"model.onnx": {"bytes": 1}}}, r"is damaged \(.*sha256.*\$\.files"),
        *(
            ({"files": {name: {"bytes": 1, "sha256": "0"}}}, "outside the bundle")
            for name in ("../secret", "/etc/hostname", "model\0.onnx")
        ),
        ({"checksum": "sha256:0"}, r"is damaged \(it was changed after it was written"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    bundle = tiny_bundle(tmp_path / "bundle")
    document = json.loads((bundle / "bundle.json").read_text())
    del document["checksum"]
    (bundle / "bundle.json").write_text(json.dumps(document | changes))
    with pytest.raises(BundleError, match=message):
        read_manifest(bundle)


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_other_text_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match=r"bundle\.json is damaged \(.*\): export the bundle again"):
        read_manifest(tmp_path)


def test_the_page_of_formats_names_every_field() -> None:
    section = FORMATS.read_text(encoding="utf-8").split("\n## bundle.json\n")[1].split("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    assert {field.name for kind in (BundleManifest, Parity) for field in fields(kind)} <= named
