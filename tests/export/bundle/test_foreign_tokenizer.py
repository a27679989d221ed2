"""Rules of a tokenizer that are not allowed are refused, or run in a process with limits."""

import json
import resource
import shutil

import pytest

pytest.importorskip("onnx")
from support.command_line import here, refused
from support.hostile import BUNDLES, seal
from support.old_products import old_products

from export.bundle.tokenizer import BundleTokenizer


def bundle_with(change, place):
    shutil.copytree(old_products() / "bundle", place)
    change(place)
    seal(place)
    return place


def many_steps(bundle):
    """Seventeen steps, which change nothing here."""
    path = bundle / "tokenizer.json"
    document = json.loads(path.read_text())
    document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 17}
    path.write_text(json.dumps(document))


def test_other_rules_run_where_the_user_says_so(tmp_path):
    bundle = bundle_with(many_steps, tmp_path / "bundle")
    ask = ("generate", bundle, "The river", "--max-tokens", 8)
    assert "17 steps, 16 are allowed" in (line := refused(*ask)) and "--foreign-tokenizer" in line
    plain = here("generate", old_products() / "bundle", *ask[2:])
    assert here(*ask, "--foreign-tokenizer").stdout == plain.stdout != ""
    ours, theirs = BundleTokenizer(old_products() / "bundle"), BundleTokenizer(bundle, foreign=True)
    ids = ours.encode("The dog ran.", add_special_tokens=False)
    assert theirs.encode("The dog ran.", add_special_tokens=False) == ids
    assert (theirs.decode(ids), theirs.bos_token_id) == (ours.decode(ids), ours.bos_token_id)


@pytest.mark.parametrize(
    "name", ["tokenizer-byte-levels", "tokenizer-template", "normalizer-replace", "tokenizer-strip"]
)
def test_what_takes_all_memory_or_panics_is_ended_there(name, tmp_path):
    bundle = bundle_with(BUNDLES[name], tmp_path / "bundle")
    done = here("generate", bundle, "The river", "--max-tokens", 2, "--foreign-tokenizer", code=None)
    assert done.code in (0, 2) and "Traceback" not in done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2.2 * (1 << 20)  # KiB
    if done.code:
        assert "tokenizer.json cannot be" in done.stderr.splitlines()[-1]
