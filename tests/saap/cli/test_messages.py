"""What a careless person types, and the one line that says what is wrong and what to do instead."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.command_line import refused

OLD = Path(__file__).parents[2] / "support" / "old"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Old products, and things that are none."""
    from support.command_line import here

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
    "prune dense -o o --ratio 0.2 --method flap --modules": "--modules is for the method saap: leave it out, or leave",
    "prune dense -o o --ratio 0.2 --method flap --set score=fused --drop-layers 1": "score and --drop-layers are for",
    "prune dense -o o --ratio 0.2 --method shortgpt --heads": "--heads is for methods that prune in width",
    "prune dense -o o --ratio 0.2 --method random --calibration long.txt": "--calibration is for methods that read a",
    "prune dense -o o --ratio 0.2 --method magnitude --seed 1 --length 9": "--length and --seed are for methods that",
    "prune dense -o o --ratio 0.2 --threads 1": "--threads is for --speedup and --ms-per-token: leave it out, or ask",
    "prune dense -o o --ratio 0.2 --heads --no-heads": "--heads and --no-heads contradict each other: give one",
    "prune dense -o o --ratio 0.2 --here": "--here is about the table of --costs",
    "tune slim -o o --teacher-weight 0.3 --temperature 2": "--teacher-weight and --temperature are for --teacher:",
    "tune slim -o o --teacher dense --teacher-weight 0 --temperature 2": "--temperature is for a --teacher-weight",
    "tune slim -o o --max-bytes 1MB --head-bits 8": "--head-bits is for one precision, and --max-bytes chooses",
    "tune slim -o o --integers nearest --set calibration_rows=2": "calibration_rows is for --integers gptq",
    "tune slim -o o --set held_out=0 --patience 2": "--patience is for held-out text, and held_out is 0",
    "eval slim --task-dir . --seed 3": "--task-dir and --seed are for --tasks: leave them out, or name some",
    "eval slim --tasks piqa --seed 3": "--seed is for drawing examples: leave it out, or give --max-examples",
    "eval slim --tasks piqa --stride 32": "--stride is for perplexity, which --tasks leaves out: leave it out, or",
    "export slim -o o --target gguf --type Q8_0 --bits 4": "--bits is for a choice of type by bits, and --type names",
    "export slim -o o --target gguf --text long.txt": "--text is for bundles, and a GGUF file is none",
    "export slim -o o --target cuda --kv 8 --no-dotprod": "--kv and --no-dotprod are for --target cpu",
    "export slim -o o --bits 32 --head-bits 8": "--head-bits is for integers, and these weights are floats",
    "export slim -o o --target portable --group-size 64": "--group-size is for integers, and these weights are floats",
    "export slim -o o --target portable --ort 1.16": "ONNX Runtime 1.16 is too old, 1.20 or newer is needed",
    "export slim -o o --set graph_writer=optimum": "graph_writer is for --target portable",
    "export slim -o o --target portable --set graph_writer=optimum": "optimum writes uniform float32 LLaMA models",
    "export slim -o o --parity none --text long.txt": "--text is for parity and the scales of --kv 8",
    "export tuned -o o --head-bits 8": "of --head-bits 4 and not 8: leave --head-bits out, or tune again with",
    "export tuned -o o --bits 8": "of --bits 4 and not 8: leave --bits out",
    "export tuned -o o --group-size 64": "of --group-size 32 and not 64: leave --group-size out",
    "export bundle --inspect --bits 4": "--inspect writes nothing, so --bits has no effect",
    "export bundle --inspect -o o": "--inspect writes nothing, so -o has no effect",
    "export slim -o o --json": "--json is for --inspect",
    "generate bundle hi --chat --raw": "--chat and --raw contradict each other: give one of them",
    "generate bundle hi --seed 3": "--seed is for drawn tokens: leave it out, or give --sample or --temperature",
    "bench bundle -r 2 --precision 0.1 --max-time 9": "--precision and --max-time are for an open number of runs",
    "bench bundle --board-packages": "--board-packages belong to --on",
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
    "prune dense -o o --max-params 1": "allow is 57,792 parameters: give a larger --max-params, or allow more with",
    "prune dense -o o --max-params 100G": "already, which meets 100,000,000,000 parameters: give a smaller",
    "prune dense -o o --ratio 0.2 --length 1": "--length 1 is not allowed: give a whole number from 2 to",
    "prune dense -o o --ratio 0.2 --length 600 --calibration long.txt": "--length 600 is more than the 512 positions",
    "prune dense -o o --ratio 0.2 --calibration short.txt": "give more text, or fewer --sequences or a smaller",
    "tune slim -o o --tokens 0": "--tokens 0 is not allowed: give 1 or more",
    "tune slim -o o --tokens 9 --data long.txt": "--tokens 9 are fewer than a step's 1024 (4 sequences of 256): give",
    "tune slim -o o --data short.txt": "give more text, or fewer --tokens",
    "tune dense -o o --group-size 128 --data long.txt": "not a multiple of the group size 128: give --group-size 32",
    "export slim -o o --group-size 64": "down_proj has 96 input columns, not a multiple of the group size 64: give",
    "eval dense --text short.txt": "give more text, or a smaller --chunk",
    "generate cuda hi": "cuda is a bundle for cuda, which the provider cpu does not run: run it with `saap bench",
    "bench bundle --provider cuda": "bundle is a bundle for cpu, which the provider cuda does not run: run it with",
    "prune damaged -o o --ratio 0.2": "damaged/config.json is damaged (Expecting value",
}  # fmt: skip


@pytest.mark.parametrize(("command", "message"), TRUE.items(), ids=TRUE)
def test_a_message_is_true_and_says_what_to_do(command, message):
    assert message in refused(*command.split())
