"""``saap prune`` as a person meets it: requirements, what is reported, and what is refused."""

import hashlib
import json

import pytest
from safetensors.torch import load_file
from support.command_line import here, prune_words, refused
from support.cost_files import cost_file

from saap.models.architectures import shape_of
from saap.models.checkpoint import read_config
from saap.models.record import read_record
from saap.prune.options import PruneOptions
from saap.prune.search.budget import budget_for


@pytest.fixture
def costs(tmp_path):
    return cost_file(tmp_path / "cost.json")


@pytest.fixture
def model(tiny_model):
    return tiny_model()


def pruned(*arguments):
    return here(*prune_words(*arguments))


def cells(stdout, row):
    """The numbers dense, asked, planned and achieved of a row of the table."""
    (line,) = (line for line in stdout.splitlines() if line.strip().startswith(row))
    return [None if cell == "-" else float(cell) for cell in line.split(row)[1].split()]


def test_a_ratio(model, tmp_path, river):
    done = pruned(model, tmp_path / "slim", river, "--ratio", "0.3")
    dense, asked, planned, achieved = cells(done.stdout, "layers' weights removed, %")
    assert (dense, asked) == (0, 30) and 30 <= planned == achieved < 36
    size = cells(done.stdout, "weights file at 4 bit, MB")
    assert size[1] is None and size[2] == size[3] < size[0]
    assert "by the table" not in done.stdout and "next step" not in done.stdout
    assert "exported file" not in done.stdout
    plan = read_record(tmp_path / "slim")["plan"]
    assert plan["asked"] == {"ratio": 0.3} and plan["planned"] == plan["achieved"] and "costs" not in plan


def test_what_the_tables_of_a_vocabulary_hold_back_is_said(tiny_model, tmp_path, river):
    """Against the real file: its weights less those of the layers."""
    large, slim = tiny_model(vocab_size=8192, tie_word_embeddings=True), tmp_path / "slim"
    done = pruned(large, slim, river, "--ratio", "0.3", "--bits", "32")
    plan = read_record(slim)["plan"]
    shrunk = 1 - plan["achieved"]["bytes"] / plan["dense"]["bytes"]
    here("export", slim, "-o", tmp_path / "bundle", "--parity", "none", "--bits", "32")
    table = 4 * 8192 * read_config(slim)["hidden_size"]
    share = table / (tmp_path / "bundle/model.onnx.data").stat().st_size
    said = " ".join(done.stdout.split())
    assert (
        f"The exported file shrinks by {shrunk:.0%}, not 30%: " in said and f": {share:.0%} of it is embedding" in said
    )
    assert "--vocabulary COUNT --vocabulary-input` removes rows of them." in said


def test_larger_groups_are_advised_where_they_divide(tiny_model, tmp_path, river):
    large = tiny_model(vocab_size=8192, hidden_size=192)
    done = pruned(large, tmp_path / "slim", river, "--ratio", "0.3", "--group-size", "32")
    assert "removes rows of them, and --group-size 64 takes fewer scales." in " ".join(done.stdout.split())


def test_parameters_with_a_unit(model, tmp_path, river):
    done = pruned(model, tmp_path / "slim", river, "--max-params", "0.18M")
    assert cells(done.stdout, "parameters, M")[1] == 0.18
    assert sum(t.numel() for t in load_file(tmp_path / "slim/model.safetensors").values()) <= 180_000


def test_bytes_are_met_by_the_bundle(model, tmp_path, river):
    done = pruned(model, tmp_path / "slim", river, "--max-bytes", "195KiB")
    here("export", tmp_path / "slim", "-o", tmp_path / "bundle", "--parity", "none")
    real = (tmp_path / "bundle/model.onnx.data").stat().st_size
    assert real <= 195 * 1024
    assert read_record(tmp_path / "slim")["plan"]["achieved"]["bytes"] == real
    assert cells(done.stdout, "weights file at 4 bit, MB")[3] == pytest.approx(real / 1e6, abs=5e-4)


def test_bytes_at_32_bit(model, tmp_path, river):
    pruned(model, tmp_path / "slim", river, "--max-bytes", "900kB", "--bits", "32")
    here("export", tmp_path / "slim", "-o", tmp_path / "bundle", "--parity", "none", "--bits", "32")
    assert 700_000 < (tmp_path / "bundle/model.onnx.data").stat().st_size <= 900_000


def test_a_speed_up(model, tmp_path, river, costs):
    done = pruned(model, tmp_path / "slim", river, "--speedup", "1.5", "--costs", costs)
    assert "all of it is running text, so instructions are not scored: give a .jsonl with both" in done.stderr
    dense, asked, planned, achieved = cells(done.stdout, "speed-up by the table")
    assert (dense, asked) == (1, 1.5) and 1.5 <= planned == achieved < 1.7
    assert "by cost.json (Cortex-A76, ONNX Runtime 1.23.0, 1 thread, 192 tokens in the cache), not meas" in done.stdout
    plan = read_record(tmp_path / "slim")["plan"]
    assert plan["costs"]["sha256"] == hashlib.sha256(costs.read_bytes()).hexdigest()
    config = read_config(tmp_path / "slim")
    dense_config = read_config(model)
    budget = budget_for(PruneOptions(speedup=1.5, costs=costs), shape_of(dense_config), dense_config)
    assert budget.meets(shape_of(config))
    assert plan["achieved"]["ms_per_token"] == budget.total(shape_of(config))
    assert plan["dense"]["ms_per_token"] == pytest.approx(6.1)


def test_milliseconds_can_be_met_by_whole_modules(model, tmp_path, river, costs):
    arguments = ["--ms-per-token", "2.4", "--costs", costs, "--threads", "1"]
    message = pruned_refused(model, tmp_path / "slim", river, *arguments, "--keep", "blocks")
    assert "asked 2.4 ms per token, the smallest that these options allow is 2.8 ms per token: give a larger" in message
    done = pruned(model, tmp_path / "slim", river, *arguments)
    assert cells(done.stdout, "ms per token by the table")[3] <= 2.4


@pytest.fixture
def plain(tmp_path):
    """Text of which a quarter is enough to try words on."""
    path = tmp_path / "plain.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and the cat sat on the mat\n" * 400)
    return path


def test_words_alone(model, tmp_path, plain):
    done = here("prune", model, "-o", tmp_path / "head", "--vocabulary", "290", "--calibration", plain)
    assert "vocabulary: the head predicts 290 of 320 tokens; text like" in done.stderr
    assert read_config(tmp_path / "head")["vocab_size"] == 320
    words = ["--vocabulary", "290", "--vocabulary-input", "--calibration", plain]
    done = here("prune", model, "-o", tmp_path / "all", *words)
    assert "vocabulary: the model has 290 of 320 tokens" in done.stderr
    assert read_config(tmp_path / "all")["vocab_size"] == 290


def test_fewer_words_count_in_what_was_asked(model, tmp_path, plain):
    (table,) = json.loads(cost_file(tmp_path / "old.json").read_text())["threads"]
    heads = {**table, "head": [{"rows": 280, "ms": 0.3}, {"rows": 300, "ms": 0.35}]}
    costs = cost_file(tmp_path / "cost.json", threads=[heads])
    words = ["--vocabulary", "290", "--speedup", "1.1", "--costs"]
    done = pruned(model, tmp_path / "slim", plain, *words, costs)
    assert cells(done.stdout, "ms per token by the table") == pytest.approx([6.1, None, 5.425, 5.425], abs=1e-3)
    assert cells(done.stdout, "layers' weights removed, %")[3] == 0, "fewer words are enough"
    done = pruned(model, tmp_path / "slimmer", plain, "--vocabulary", "290", "--speedup", "1.5", "--costs", costs)
    assert 1.5 <= cells(done.stdout, "speed-up by the table")[3] < 1.7
    least = pruned_refused(model, tmp_path / "none", plain, *words, tmp_path / "old.json")
    assert "the cost table has no smaller vocabularies: measure it again" in least
    words = ["--vocabulary", "290", "--vocabulary-input", "--max-params"]
    enough = shape_of(read_config(model)).parameters - (320 - 290) * 96
    done = pruned(model, tmp_path / "few", plain, *words, str(enough))
    assert shape_of(read_config(tmp_path / "few")).parameters == enough
    assert cells(done.stdout, "layers' weights removed, %")[3] == 0
    assert "asked 10,000 parameters, the smallest" in pruned_refused(model, tmp_path / "none", plain, *words, "10k")


def pruned_refused(model, out, text, *options):
    message = refused(*prune_words(model, out, text, *options))
    assert not out.exists()
    return message


def test_a_slim_model_prunes_again(model, tmp_path, river, costs):
    pruned(model, tmp_path / "one", river, "--max-bytes", "210kB")
    pruned(tmp_path / "one", tmp_path / "two", river, "--max-bytes", "160kB")
    pruned(tmp_path / "two", tmp_path / "three", river, "--ms-per-token", "2.5", "--costs", costs)
    sizes = [read_record(tmp_path / name)["plan"]["achieved"]["bytes"] for name in ("one", "two", "three")]
    assert sizes[0] <= 210_000 and sizes[1] <= 160_000 and sizes[2] <= sizes[1]
    assert "already, which meets" in pruned_refused(tmp_path / "one", tmp_path / "four", river, "--max-bytes", "210kB")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "give one requirement: --ratio, --max-params, --max-bytes, --speedup or --ms-per-token (given: none)"),
        ("--ratio 0.2 --max-bytes 1MB", "(given: --ratio and --max-bytes)"),
        ("--ratio 0.95", "asked a ratio of 0.95, the largest that these options allow is 0."),
        ("--max-params 20k", "asked 20,000 parameters, the smallest that these options allow is"),
        ("--max-bytes many", "'many' is not a number of bytes: write something like 80MB, 80MiB or 1.5G"),
        ("--max-params -5", "'-5' is not a number of parameters: write something like 100M or 1.5B"),
        ("--speedup 9 --costs COSTS", "asked a speed-up of 9, the largest that these options allow is 4.357"),
        ("--speedup 1.5 --costs no.json", "there is no no.json: give a file of `saap devices costs"),
        ("--max-bytes 150kB --group-size 64", "the hidden size is 96 wide, which groups of 64 do not divide"),
        ("--ratio 0.2 --keep-layers 7", "--keep-layers names layer 7; the model has layers 0 to 2"),
        (
            "--ratio 0.9 --keep-layers 0-2",
            "options allow is 0: allow more with fewer --keep-layers",
        ),
        ("--ratio 0.2 --vocabulary-input", "--vocabulary-input is for models that lose words: give --vocabulary too"),
        ("--vocabulary 9", "a vocabulary of 9 words cannot be closed: 261 must stay"),
        (
            "--vocabulary 320",
            "a vocabulary of '320' is not allowed, the model has 320 words: give a number such as 24k",
        ),
        ("--ratio 0.2 --method best", "--method best is not allowed: give saap, vector,"),
        ("--ratio 0.2 --compensate hope", "--compensate hope is not allowed: give none, bias or refit"),
        ("--ratio 0.2 --set stability=nan", "stability nan is not allowed"),
        (
            "--ratio 0.2 --keep blocks --method flap",
            "--keep blocks is for the method saap: leave it out, or leave --method",
        ),
        ("--ratio 0.2 --keep layers", "--keep layers is not allowed: give blocks, heads or ffn"),
        ("--ratio 0.9 --keep blocks,ffn", "allow more with fewer kinds than --keep blocks,ffn"),
    ],
)
def test_what_cannot_be_met_or_makes_no_sense(model, tmp_path, river, costs, options, message):
    options = options.replace("COSTS", str(costs)).split()
    assert message in pruned_refused(model, tmp_path / "slim", river, *options)


def test_a_table_of_this_machine_must_be_of_its_runtime(model, tmp_path, river):
    from devices.probe.host import probe

    device = probe()
    ours = cost_file(tmp_path / "ours.json", device=device)
    pruned(model, tmp_path / "slim", river, "--speedup", "1.5", "--costs", ours)
    old = cost_file(tmp_path / "old.json", device={**device, "onnxruntime": "1.0.0"})
    message = pruned_refused(model, tmp_path / "other", river, "--speedup", "1.5", "--costs", old)
    assert f"was measured for ONNX Runtime 1.0.0, not {device['onnxruntime']}" in message


def test_too_little_text(model, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("The quick brown fox.")
    message = pruned_refused(model, tmp_path / "slim", path, "--ratio", "0.2")
    assert "too little text: 1 documents give" in message and "8 rows of 16 need 128" in message


def test_what_fails_later_was_not_written(model, tmp_path, river):
    """A directory of an earlier run stays as it was."""
    pruned(model, tmp_path / "slim", river, "--ratio", "0.2")
    before = (tmp_path / "slim/saap.json").read_text()
    refused("prune", model, "-o", tmp_path / "slim", "--calibration", river, "--ratio", "0.99")
    assert (tmp_path / "slim/saap.json").read_text() == before
    assert json.loads(before)["plan"]["bundle"] == {"bits": 4, "block": 32}


def test_no_layer_is_kept_where_that_is_said(tiny_model, tmp_path, river):
    """LLM-Pruner's methods leave first and last layers whole by themselves; alike means that they do not."""
    model = tiny_model(num_hidden_layers=8)
    widths = {}
    for kept in ((), ("--keep-layers", "none")):
        out = tmp_path / f"slim{len(kept)}"
        pruned(model, out, river, "--ratio", 0.25, "--method", "param_mix", *kept)
        widths[kept] = [len(layer["ffn"]) for layer in read_record(out)["plan"]["layers"]]
    own, none = widths.values()
    assert own[0] == 128 and none[0] < 128
    said = here("prune", model, "-o", tmp_path / "y", "--keep-layers", "some", code=2).stderr
    assert "write something like 0-2,29, or none" in said
