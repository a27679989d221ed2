"""What a shell does to a command: streams that are closed, full or without a reader, a folder or a cache that is gone.

The work is done and its files are there, whatever becomes of what is shown; or it had not begun.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.old_products import old_products

SUPPORT = Path(__file__).parents[2] / "support"
FAST = "-p 16 -n 8 -t 1"
MAKE = {  # a command, and what it makes
    "prune slim -o new/slim --ratio 0.1 --calibration learn.jsonl --sequences 8 --length 16": "slim/saap.json",
    "tune slim -o new/tuned --data learn.jsonl --tokens 64 --length 16 --precision fp32": "tuned/saap.json",
    "export slim -o new/bundle": "bundle/bundle.json",
    "export slim --target gguf -o new/model.gguf": "model.gguf",
    "eval bundle --text judge.txt --max-chunks 2 --chunk 64 --json new/quality.json": "quality.json",
    "compare result.json result.json --json new/verdicts.json --junit new/verdicts.xml": "verdicts.xml",
    "compare quality.json quality.json --json new/verdicts.json": "verdicts.json",
    "report result.json -o new/page.html": "page.html",
}
CACHED = {words: file for words, file in MAKE.items() if words.split()[0] in ("prune", "tune", "export", "report")}
MEASURE = {
    f"bench bundle {FAST} -r 1 --no-cold --json new/result.json --history new/history": "result.json",
    "devices costs slim -t 1 --set rounds=1 --set seconds=0 -o new/cost.json": "cost.json",
    f"devices baseline bundle {FAST} -r 6 --sessions 1 --baselines new": "bundle.*.json",
}
RUN = (  # of which the pages come after tables of its steps
    "run dense -o new --ratio 0.2 --calibration learn.jsonl --data learn.jsonl --text judge.txt --tokens 1024"
    " --repetitions 1 --threads 1 --set sequences=8 --set length=16 --set max_chunks=2 --set chunk=64"
)
SHOW = (
    "devices check bundle",
    "devices list",
    "generate bundle hello --max-tokens 4 --json",
    "export --inspect bundle",
)
CLOSED = {"streams": {"stdin": "closed", "stdout": "closed", "stderr": "closed"}}
FULL = {"streams": {"stdout": "full", "stderr": "full"}}
UNREAD = {"streams": {"stdout": "gone", "stderr": "gone"}}
ASCII = {"encoding": "ascii"}
NO_FOLDER, NO_CACHE = {"folder_gone": True}, {"env": {"SAAP_CACHE": "judge.txt"}}


@dataclass
class Asked:
    """A command, what is wrong around it, its exit code, what it makes, and how often it tells of the cache."""

    words: str
    wrong: dict[str, Any]
    code: int
    makes: str | None = None
    tells: str = ""

    @property
    def name(self) -> str:
        return f"{' '.join(self.words.split()[:2])}: {json.dumps(self.wrong)}"


CASES = [
    *(Asked(words, CLOSED, 0, file) for words, file in MAKE.items()),
    *(Asked(words, FULL, 2, file) for words, file in MAKE.items()),
    *(Asked(words, UNREAD, 141, file) for words, file in (MAKE | MEASURE).items()),
    Asked(RUN, FULL, 2, "report.html"),
    *(Asked(words, ASCII, 0, file) for words, file in MAKE.items()),
    *(Asked(words, NO_CACHE, 0, file, "the cache judge.txt cannot be written") for words, file in CACHED.items()),
    *(Asked(words, UNREAD, 141) for words in SHOW),
    *(Asked(words, FULL, 2) for words in SHOW),
    *(Asked(words, ASCII, 0) for words in SHOW),
    *(Asked(words, CLOSED, 0) for words in SHOW),
    Asked("generate bundle - --max-tokens 4", CLOSED, 2),
    Asked("eval bundle --text judge.txt --json new/quality.json", NO_FOLDER, 2, tells="the working directory is gone"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All of them, forked off one process that has imported torch."""
    root = tmp_path_factory.mktemp("streams")
    cases = []
    for number, asked in enumerate(CASES):
        place = root / str(number)
        place.mkdir()
        for path in old_products().iterdir():
            (place / path.name).symlink_to(path)
        env = {"SAAP_CACHE": str(root / "cache"), **asked.wrong.get("env", {})}
        cases.append({**asked.wrong, "words": asked.words.split(), "place": str(place), "env": env})
    (root / "cases.json").write_text(json.dumps(cases))
    path = os.pathsep.join(map(str, (SUPPORT.parents[1], SUPPORT.parent)))
    subprocess.run(
        [sys.executable, SUPPORT / "forked_commands.py", root / "answers.json", root / "cases.json"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SAAP_DATA": ""}, check=True,
    )  # fmt: skip
    found = json.loads((root / "answers.json").read_text())
    for number, answer in enumerate(found):
        answer["new"] = root / str(number) / "new"
    return found


@pytest.mark.parametrize("number", range(len(CASES)), ids=[asked.name for asked in CASES])
def test_the_work_is_there_or_had_not_begun(answers: list[dict[str, Any]], number: int) -> None:
    asked, answer = CASES[number], answers[number]
    assert "Traceback" not in answer["err"] and "Exception ignored" not in answer["err"], answer["err"]
    assert answer["code"] == asked.code, answer
    if asked.makes:
        (made,) = answer["new"].glob(asked.makes)
        assert made.stat().st_size > 100
        if made.suffix == ".json":
            json.loads(made.read_text())
    else:
        assert not answer["new"].exists()
    assert answer["err"].count("cannot be written") == ("cache" in asked.tells) and asked.tells in answer["err"]


def test_the_texts_of_a_generation_are_json_in_any_encoding(answers: list[dict[str, Any]]) -> None:
    (number,) = (n for n, asked in enumerate(CASES) if "generate" in asked.words and asked.wrong == ASCII)
    assert len(json.loads(answers[number]["out"])["turns"]) == 1


def test_no_lock_and_no_partial_stays(answers: list[dict[str, Any]]) -> None:
    root = answers[0]["new"].parents[1]
    left = [path for path in root.rglob("*") if path.suffix == ".lock" or ".partial-" in path.name]
    assert not left and not any((root / "cache" / "locks").iterdir())


def test_a_reader_that_wants_no_more_is_141(tmp_path: Path) -> None:
    """As a shell has it: the interpreter ends without a word."""
    command = f"{sys.executable} -m saap.cli devices list"
    shell = shutil.which("bash")
    script = f"{command} | true; echo ${{PIPESTATUS[0]}}; {command} >&-; echo $?; {command} 2>&- >/dev/null; echo $?"
    script += f"; {command} > /dev/full; echo $?; mkdir gone; cd gone; rmdir ../gone; {command}; echo $?"
    assert shell
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines()[-5:] == ["141", "0", "0", "2", "2"], done
    assert done.stderr.splitlines() == [
        "saap: No space left on device: make room there, or write elsewhere",
        "saap: the working directory is gone: change into one that is there",
    ]
