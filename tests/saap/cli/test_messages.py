"""What a careless person types, and the one line that says what is wrong and what to do instead."""

import shutil

import pytest
from support.command_line import here, refused
from support.old_products import old_products

import saap
from saap.base.errors import UserError

OLD = old_products()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Old products, and things that are none."""
    home = tmp_path_factory.mktemp("messages")
    for name in ("dense", "slim", "tuned", "bundle"):
        shutil.copytree(OLD / name, home / name)
    for name in ("result.json", "quality.json", "cost.json", "learn.jsonl", "judge.txt"):
        shutil.copyfile(OLD / name, home / name)
    (home / "empty").mkdir()
    shutil.copytree(OLD / "dense", home / "damaged")
    (home / "damaged/config.json").write_text('{"model_type": ')
    (home / "short.txt").write_text("A short text.")
    (home / "long.txt").write_text("\n".join(f"No dog ran home {n} at night, and {n} rivers rose." for n in range(900)))
    here("export", home / "dense", "-o", home / "dense.gguf", "--target", "gguf", "--bits", "8")
    here("export", home / "slim", "-o", home / "cuda", "--target", "cuda", "--parity", "none")
    return home


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.delenv("SAAP_DATA", raising=False)
    before = sorted(place.iterdir())
    yield
    assert sorted(place.iterdir()) == before


UNUSED = {
    "prune dense -o o --ratio 0.2 --method flap --keep ffn": "--keep ffn is for the method saap: leave it out, or",
    "prune dense -o o --ratio 0.2 --method flap --set score=fused --effort normal": "--effort and score are for",
    "prune dense -o o --ratio 0.2 --method shortgpt --heads --compensate bias": "--compensate and --heads are for",
    "prune dense -o o --ratio 0.2 --stages 2": "--stages was removed: one stage is better than several; leave it out",
    "prune dense -o o --ratio 0.2 --set c=1": "c was removed: it is the number of tokens per sequence; leave it out",
    "prune dense -o o --ratio 0.2 --threads 1": "--threads is for --speedup and --ms-per-token: leave it out, or ask",
    "prune dense -o o --ratio 0.2 --heads --keep heads": "--heads and --keep heads contradict each other: give one",
    "prune dense -o o --ratio 0.2 --here": "--here was removed: a cost table of another machine is taken as it is",
    "tune slim -o o --teacher-weight 0.5": "--teacher-weight is for --teacher: leave it out, or name one",
    "tune slim -o o --teacher dense --temperature 2": "--temperature was removed: saap tune compares with the",
    "tune slim -o o --set clip=2": "clip was removed: leave it out, or set it from Python, in saap.tune.TuneOptions",
    "tune slim -o o --max-bytes 1MB --head-bits 8": "--head-bits is for one form of integers, and --max-bytes chooses",
    "tune slim -o o --set held_out=0 --patience 2": "--patience is for held-out text, and held_out is 0",
    "tune slim -o o --micro-batch 8": "--micro-batch is for at most the 4 sequences of a step: leave it out, or give 4",
    "run dense -o o --set micro_rows=8": "is for at most the 4 sequences of a step: leave it out, or give 4",
    "tune slim -o o --patience 2": "--patience is for held-out text, and of 96 sequences none are held out: leave "
    "it out, or give --tokens 51200 or more",
    "tune slim -o o --tokens 60000 --patience 11": "--patience is for at most the 6 evaluations, and 0 "
    "never stops early: leave it",
    "eval slim --task-dir . --seed 3": "--task-dir and --seed are for --tasks: leave them out, or name some",
    "eval slim --tasks piqa --seed 3": "--seed is for drawing examples: leave it out, or give --max-examples",
    "eval slim --tasks piqa --stride 32": "--stride is for perplexity, which --tasks leaves out: leave it out, or",
    "export slim -o o --target gguf --type Q8_0 --bits 4": "--bits is for a choice of type by bits, and --type names",
    "export slim -o o --target gguf --text long.txt": "--text is for bundles, and a GGUF file is none",
    "export slim -o o --target cuda --kv 8 --no-dotprod": "--kv and --no-dotprod are for --target cpu",
    "export slim -o o --bits 32 --head-bits 8": "--head-bits is for integers, and these weights are floats",
    "export slim -o o --target portable --group-size 64": "--group-size is for integers, and these weights are floats",
    "export slim -o o --target portable --ort 1.16": "ONNX Runtime 1.16 is too old, 1.20 or newer is needed",
    "export slim -o o --set graph_writer=optimum": "graph_writer was removed: saap writes every portable graph",
    "export slim -o o --set accuracy_level=0": "accuracy_level was removed: --no-dotprod computes in float32",
    "export slim -o o --integers nearest --parity none --text long.txt": "--text is for parity, gptq, and the scales",
    "export tuned -o o --head-bits 8": "of --head-bits 4 and not 8: leave --head-bits out, or tune again with",
    "export tuned -o o --integers nearest": "--integers is for floats, and tuned holds integers: leave it out",
    "export tuned -o o --bits 8": "of --bits 4 and not 8: leave --bits out",
    "export tuned -o o --group-size 64": "of --group-size 32 and not 64: leave --group-size out",
    "export bundle --inspect --bits 4": "--inspect writes nothing, so --bits has no effect",
    "export bundle --inspect -o o": "--inspect writes nothing, so -o has no effect",
    "export slim -o o --json": "--json is for --inspect",
    "generate bundle hi --chat --raw": "--chat and --raw contradict each other: give one of them",
    "generate bundle hi --seed 3": "--seed is for drawn tokens: leave it out, or give --sample or --temperature",
    "bench bundle -r 2 --precision 0.1 --max-time 9": "--precision and --max-time are for an open number of runs",
    "compare bundle bundle -r 2": "--repetitions 2 tell no difference: give 3 or more",
    "bench bundle --ratio-time 9": "--ratio-time is for the ratio of two models or more: leave it out, or give another",
    "bench bundle bundle --precision 0.1": "--precision is for one model, and turns tell the ratio of several: leave",
    "bench bundle --noise-floor --precision 0.1": "--precision is for one model, and turns tell the ratio of several",
    "bench bundle bundle --ratio-time 9 --max-time 9": "--max-time is for one model, and turns tell the ratio of seve",
    "compare bundle bundle --precision 0.1": "--precision is for one model, and turns tell the ratio of several: leave",
    "bench bundle --board-packages": "--board-packages is for --on",
    "compare quality.json quality.json -r 3 --junit o": "--repetitions and --junit are for speeds, and these are",
    "compare result.json result.json -p 12": "--prompt is for bundles, and results have theirs",
    "compare result.json result.json --no-confirm -r 3": "--repetitions is for a second run, which --no-confirm",
    "devices costs slim --bits 32 --group-size 64": "--group-size is for integers, and 32 bits are none",
    "devices check bundle --device raspberry-pi-5 --bandwidth": "--bandwidth measures this host: leave it out",
    "devices baseline bundle -r 3 --max-time 4": "--max-time is for an open number of runs",
}  # fmt: skip


@pytest.mark.parametrize(("command", "message"), UNUSED.items(), ids=UNUSED)
def test_an_option_without_effect_is_refused(command, message):
    assert message in refused(*command.split())


TRUE = {
    "prune dense -o o --max-params 1": "allow is 26,752 parameters: give a larger --max-params",
    "prune dense -o o --max-params 100G": "already, which meets 100,000,000,000 parameters: give a smaller",
    "prune dense -o o --ratio 0.2 --length 1": "--length 1 is not allowed: give a whole number from 2 to",
    "prune dense -o o --ratio 0.2 --length 600 --calibration long.txt": "--length 600 is more than the 512 positions",
    "prune dense -o o --ratio 0.2 --calibration short.txt": "give more text, or fewer --sequences or a smaller",
    "tune slim -o o --tokens 0": "--tokens 0 is not allowed: give 1 or more",
    "tune slim -o o --tokens 9 --data long.txt": "--tokens 9 is less than a step needs, 1024 (4 sequences of 256)",
    "tune slim -o o --fold zero-point": "--fold was removed: saap tune trains the scale of each group; leave it out",
    "run dense -o o --set rank=4": "rank was removed: saap tune trains one factor for each group; leave it out, or",
    "tune slim -o o --data short.txt": "give more text, or fewer --tokens",
    "tune dense -o o --group-size 128 --data long.txt": "not a multiple of the group size 128: give --group-size 32",
    "export slim -o o --group-size 64": "down_proj of layer 1 has 96 input columns, not a multiple of the group size",
    "eval dense --text short.txt": "give more text, or a smaller --chunk",
    "generate cuda hi": "cuda is a bundle for cuda, which the provider cpu does not run: run it with `saap bench",
    "bench prepacked:cuda": "prepacked:cuda: prepacked: was removed: give the bundle without it",
    "generate bundle hi --system x": "--system needs the model's chat template: put it into the prompt; this",
    "bench bundle --provider cuda": "bundle is a bundle for cpu, which the provider cuda does not run: run it with",
    "prune damaged -o o --ratio 0.2": "damaged/config.json is damaged (Expecting value",
}  # fmt: skip


@pytest.mark.parametrize(("command", "message"), TRUE.items(), ids=TRUE)
def test_a_message_is_true_and_says_what_to_do(command, message):
    assert message in refused(*command.split())


WRONG = {
    "prune bundle -o o --ratio 0.2": "bundle is an exported bundle, not a model: give the model directory it was made",
    "prune tuned -o o --ratio 0.2": "holds tuned integers, which cannot be pruned: prune the model it was tuned from",
    "prune result.json -o o --ratio 0.2": "is not a GGUF file: give a GGUF file or a model directory",
    "prune dense -o o --speedup 1.2 --costs result.json": "result.json is another kind of file (it has no 'threads')",
    "prune dense -o o --ratio 0.2 --calibration dense": "dense is a directory: give a text, .jsonl or .gz file",
    "prune dense -o o --ratio 0.2 --calibration cost.json": "is not a list of rows: give .jsonl, one object a line",
    "prune dense -o o --ratio 0.2 --set nonsense=1": "there is no option 'nonsense': --help-all lists them all",
    "tune tuned -o o": "tuned holds tuned integers already: tune the slim directory it came from",
    "tune slim -o o --teacher bundle": "bundle is an exported bundle, not a model",
    "tune empty -o o": "empty is not a model directory: it has no config.json",
    "eval quality.json": "quality.json is not a GGUF file: give a GGUF file or a model directory",
    "eval slim --tasks piqa --task-dir empty": "piqa needs one file in empty, none is there: name it piqa.jsonl",
    "export --inspect slim": "slim is not a bundle: it is a model; make one of it with `saap export slim -o BUNDLE`",
    "export --inspect dense.gguf": "dense.gguf is not a bundle: it is a GGUF file; `saap export` makes a bundle of it",
    "export --inspect result.json": "is not a bundle: it is a file; give the directory that `saap export` wrote",
    "export bundle -o o": "bundle is an exported bundle, not a model",
    "generate smollm2-135m hi": "there is no such directory; make one with `saap export MODEL -o BUNDLE`",
    "bench dense.gguf": "and `saap bench llama.cpp:dense.gguf` measures it",
    "bench torch:bundle": "is a bundle; leave torch: out, or give the model that it was made from",
    "bench torch:empty": "give torch: a Hugging Face model directory",
    "bench llama.cpp:long.txt": "is no GGUF file: give one that llama.cpp reads",
    "bench optimum:dense": "make one with `saap export --target portable`",
    "compare cost.json result.json": "cost.json is another kind of file (it has no 'measurements'): make one with",
    "compare result.json quality.json": "do not compare: one is of `saap eval`, the other is not; give two of a kind",
    "compare bundle result.json": "do not compare: give two results of `saap bench --json`, or two bundles",
    "report cost.json -o o": "cost.json is another kind of file (it has no 'measurements')",
    "report bundle -o o": "bundle holds no run.json: give the -o directory of `saap run`, or result files",
    "report --history empty -o o": "empty holds no results: give a folder of `saap bench --history`",
    "devices check dense": "dense is not a bundle: it is a model",
    "devices costs result.json -o o": "is not a GGUF file: give a GGUF file or a model directory",
    "devices baseline slim": "slim is not a bundle: it is a model",
    "run bundle -o o": "bundle is an exported bundle, not a model",
}  # fmt: skip


@pytest.mark.parametrize(("command", "message"), WRONG.items(), ids=WRONG)
def test_the_wrong_kind_of_thing_is_told_from_the_right_one(command, message):
    assert message in refused(*command.split())


def test_a_gguf_file_of_ours_is_evaluated():
    assert "dense.gguf" in here("eval", "dense.gguf", "--text", "judge.txt", "--max-chunks", "1").stdout


@pytest.mark.parametrize("name", ["dense.gguf", "smollm2-135m"])
def test_a_library_that_wants_a_directory_says_what_makes_one(name):
    with pytest.raises(UserError, match=r"is not a model directory: give one; resolve\(\) of saap.models.resolve"):
        saap.load_model(name)
