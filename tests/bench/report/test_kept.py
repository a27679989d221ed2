"""The picture of what a plan kept, in the page that it stands in."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from support.report_page import RUN

from bench.report import report

PLAN = RUN["plan"]


def page(tmp_path, plan):
    return report([], tmp_path / "report.html", run={"plan": plan}).read_text()


def test_what_was_kept_layer_by_structure(tmp_path):
    (drawing,) = re.findall(r"<svg.*?</svg>", page(tmp_path, PLAN), flags=re.DOTALL)
    words = "|".join(ElementTree.fromstring(drawing).itertext())
    for told in ["query heads", "KV groups", "FFN width", "33 %", "66 %", "all kept", "all gone"]:  # 6, 2 and 2016 left
        assert told in words, told
    # Squared shares 2/3, 2/3, 2/3 and 31/48; what is gone has no fill.
    opacities = [float(o) for o in re.findall(r'style="fill: var\(--s2\); opacity: ([\d.]+)"', drawing)]
    shares = [6 / 9, 2 / 3, 1024 / 1536, 992 / 1536, 0.75, 0.5, 0.25]  # the last three are the key's
    assert sorted(opacities) == pytest.approx(sorted(0.06 + 0.94 * share**2 for share in shares), abs=1e-6)
    assert 'aria-label="What is kept: query heads 33 %, KV groups 33 %, FFN width 66 %"' in page(tmp_path, PLAN)


@pytest.mark.parametrize("dense", [None, [{"query_heads": 9}], [{}, {}], [{"query_heads": 0, "ffn": "x"}] * 2])
def test_what_the_dense_model_had_is_not_guessed(tmp_path, dense):
    assert "<svg" not in page(tmp_path, {**PLAN, "dense_layers": dense})
