"""The script that sets zero-shot tasks on whole files against the harness's own class."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval")
from studies.tasks import study as tasks_check

LONG, SHORT = "another way that is long", "one more"  # which a random model finds unlikely, and less so
ROWS = [
    {"idx": n, "question": f"word {n}", "choices": [LONG, SHORT] if n % 3 else [SHORT, LONG], "label": n % 2}
    for n in range(8)
]


def test_cells_are_made_once_and_shown(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "piqa_validation.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.setenv("SAAP_DATA", str(tmp_path))
    monkeypatch.setattr(tasks_check, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(tasks_check, "BUNDLES", tmp_path / "bundles")
    monkeypatch.setattr(tasks_check.models, "resolve", lambda name: tiny_model(max_position_embeddings=256))
    tasks_check.run(["piqa"], ["hf", "torch", "fp32"], again=False)
    cells = [json.loads((tmp_path / f"cells/piqa-{who}.json").read_text()) for who in ("hf", "torch", "fp32")]
    assert len({(cell["acc"], cell["acc_norm"], cell["choices"]) for cell in cells}) == 1
    assert len(cells[0]["choices"]) == len(ROWS) and set(cells[0]["choices"]) == {"0", "1"}
    tasks_check.run(["piqa"], ["torch"], again=False)
    tasks_check.run(["piqa"], ["fp32"], again=True)
    times = [len(json.loads((tmp_path / f"cells/piqa-{who}.json").read_text())["seconds"]) for who in ("torch", "fp32")]
    assert times == [1, 2]
    capsys.readouterr()
    tasks_check.show()
    assert capsys.readouterr().out.count("0 of 8") == 3
