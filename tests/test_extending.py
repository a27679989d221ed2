"""docs/extending.md can be followed: its files are there, and the row that it adds is all that a family needs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import refused

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
FILES = sorted({
    name for name in re.findall(r"`([a-z_]+/[\w/.-]*)`", PAGE) if not re.search(r"[A-Z]{3}", name)
})  # fmt: skip
ROW = r"`(\"\w+\": Architecture\(.*?\))`"
FOLLOWED = """
import sys
from saap.models import architectures
from saap.models.architectures import Architecture
row = {%s}
architectures.FAMILIES.update(row)
architectures.ARCHITECTURES.update({f"{start}{name}": each for name, each in row.items() for start in ("", "saap_")})
import torch
from transformers import AutoConfig, AutoModelForCausalLM
if sys.argv[1] == "make":
    config = AutoConfig.for_model(
        *row, vocab_size=320, hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, head_dim=16, max_position_embeddings=256, attention_bias=True, attention_out_bias=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(sys.argv[2])
else:
    from saap.cli.main import main
    main()
"""


def test_the_page_names_files():
    assert len(FILES) > 20 and "saap/models/architectures.py" in FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_page_names_is_there(name):
    assert (ROOT / name).exists()


def test_the_row_of_the_page_is_enough_for_a_family(tiny_tokenizer, tmp_path):
    """It is pruned to layers of several sizes, tuned and exported; the export compares the graph with transformers."""
    (row,) = re.findall(ROW, PAGE)
    text = tmp_path / "text.txt"
    text.write_text("a river rose and a bridge was closed\n" * 2000)

    def followed(*words):
        command = [sys.executable, "-c", FOLLOWED % row, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    model, slim, tuned = tmp_path / "model", tmp_path / "slim", tmp_path / "tuned"
    followed("make", model)
    tiny_tokenizer.save_pretrained(model)
    assert "docs/extending.md" in refused("export", model, "-o", tmp_path / "no")
    little = ("--calibration", text, "--sequences", 8, "--length", 16)
    followed("prune", model, "-o", slim, "--ratio", 0.3, *little)
    assert (slim / "config.json").read_text().count("saap_seed_oss") == 1
    followed("tune", slim, "-o", tuned, "--data", text, "--tokens", 512, "--length", 32)
    followed("export", tuned, "-o", tmp_path / "bundle", "--text", text)
    assert (tmp_path / "bundle/model.onnx").is_file()
