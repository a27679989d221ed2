"""What the documents say is there: links lead somewhere, options and commands exist, code runs, the tutorial works."""

import ast
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from support.command_line import here
from support.remote_runs import running, script

from bench.remote.files import REQUIREMENTS
from saap.cli.main import cli

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("saap", "export", "bench", "devices")
EVERY_PAGE = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "studies")
    for path in (ROOT / folder).glob("**/*.md" if folder == "studies" else "*.md")
)
# What was measured and what changed name commands as they were then.
PAGES = [name for name in EVERY_PAGE if not name.startswith("studies/") and name != "CHANGELOG.md"]
SOURCES = sorted(str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])(?<!var\()--[a-z][\w-]*")
CODE_SPAN = re.compile(r"(?<!`)(`{1,2})(?!`)(.+?)\1(?!`)", re.DOTALL)
OTHER_PROGRAMS = {
    *("--fsdp_version", "--multi_gpu", "--num_processes", "--use_fsdp"),  # accelerate
    "--wait",  # labgrid-client
    *("--arch", "--include", "--keyring", "--variant"),  # mmdebstrap
    "--pruner_type",  # LLM-Pruner
    *("--index-url", "--no-binary", "--only-binary", "--platform", "--upgrade"),  # pip
    *("--saap-baselines", "--saap-device", "--saap-max-time"),  # our plugin of pytest
    *("--scope", "--user"),  # systemd-run
    "--rows",  # a study
    "--interval",  # tegrastats
    *("--help-all", "--set"),  # what every command gets from its options dataclass
    "--fold",  # a removed option, which the message about a directory of 0.1.0 names
    "--saap",  # no option: an arrow in the picture of the commands
}


# As `wc -w` counts them.
MOST_WORDS = {
    "README.md": 900,
    "docs/method.md": 2200,
    "studies/field/README.md": 2800,
    "studies/search/README.md": 2800,
}


@pytest.mark.parametrize("name", MOST_WORDS)
def test_a_page_stays_short(name):
    assert len((ROOT / name).read_text().split()) <= MOST_WORDS[name]


def fences(name, *languages):
    """(what stands after the language, text) of a page's code blocks."""
    found = FENCE.findall((ROOT / name).read_text())
    return [(note.strip(), text) for language, note, text in found if language in languages]


def anchors(path):
    """As GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines(text):
    """The words after `saap` of each line that runs it, also through another program; no pipe, no comment."""
    found = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if not re.search(r"\bsaap\b", line):
            continue
        words = shlex.split(line, comments=True)
        start = next((i for i, word in enumerate(words) if re.fullmatch(r"(.*/bin/)?saap|saap\.cli\S*", word)), None)
        if start is not None:
            stop = next((i for i, word in enumerate(words) if i > start and word in ("|", "&&")), len(words))
            found.append(words[start + 1 : stop])
    return found


def indented(name):
    """Commands that a page sets off by four spaces."""
    return "\n".join(re.findall(r"^    (accelerate .*|saap .*)$", (ROOT / name).read_text(), re.MULTILINE))


def commands_of(command, context):
    """Every command below one, with its words."""
    yield (), command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            for words, below in commands_of(command.get_command(context, name), context):
                yield (name, *words), below


def options_of(command, context):
    return {flag for option in command.get_params(context) for flag in (*option.opts, *option.secondary_opts)}


CONTEXT = click.Context(cli)
OPTIONS = {words: options_of(command, CONTEXT) for words, command in commands_of(cli, CONTEXT)}
ANY_OPTION = set().union(*OPTIONS.values(), OTHER_PROGRAMS)


def strings(name):
    """The text of every docstring and message of a module; what a message fills in is `X`."""
    tree = ast.parse((ROOT / name).read_text())
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            yield node.value


def misused(text):
    """The options in a text that no command has, and in its quoted `saap ...` those that this command has not."""
    for option in OPTION.findall(text):
        if option not in ANY_OPTION and not re.fullmatch("--(no-)?[xX]", option):  # of a name that is filled in
            yield option
    for _, code in CODE_SPAN.findall(text):
        words = re.split(r"[\s=]+", code.strip())
        if words[0] != "saap":
            continue
        named = next((tuple(words[1:end]) for end in (3, 2) if tuple(words[1:end]) in OPTIONS), None)
        if named is None and re.fullmatch("[a-z]+", words[1] if len(words) > 1 else ""):
            yield code
        elif named is not None:
            yield from (f"saap {' '.join(named)} {o}" for o in OPTION.findall(code) if o not in OPTIONS[named])


@pytest.mark.parametrize("name", EVERY_PAGE)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("name", PAGES)
def test_named_files_and_modules_exist(name):
    """Of our own folders, such as `saap/cli/main.py` and `saap.load_model`, but no NAME that a reader replaces."""
    text = (ROOT / name).read_text()
    ours = "|".join((*PACKAGES, "tests", "studies"))
    for path in re.findall(rf"(?<![\w/.])((?:{ours})/[\w/*.-]+\.(?:py|toml|md))", text):
        assert re.search("[A-Z]{3}", Path(path).stem) or list(ROOT.glob(path)), path
    for dotted in re.findall(rf"(?:`|-m |from |import )((?:{ours})(?:\.\w+)+)", text):
        if not dotted.endswith((".json", ".toml")):
            assert is_there(dotted), dotted


def is_there(dotted):
    """Whether a module has that name, or one holds it."""
    place, (top, *parts) = ROOT, dotted.split(".")
    place = place / top
    while parts and (place / parts[0]).is_dir():
        place = place / parts.pop(0)
    module = place / f"{parts.pop(0)}.py" if parts and (place / f"{parts[0]}.py").is_file() else place / "__init__.py"
    return not parts or (module.is_file() and re.search(rf"\b{parts[0]}\b", module.read_text()) is not None)


@pytest.mark.parametrize("name", PAGES)
def test_options_of_a_page_exist(name):
    assert list(misused((ROOT / name).read_text())) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_options_of_messages_and_docstrings_exist(package):
    """But for strings that are an option alone: those are arguments of other programs."""
    texts = {(name, text) for name in SOURCES if name.startswith(f"{package}/") for text in strings(name)}
    wrong = {(name, bad) for name, text in texts if not OPTION.fullmatch(text) for bad in misused(text)}
    assert sorted(wrong) == []


def test_what_no_command_has_is_found():
    assert list(misused("choose another with --block (32, 64 or 128)")) == ["--block"]
    assert list(misused("see `saap tune SLIM --ratio 0.2`")) == ["saap tune --ratio"]
    assert list(misused("see `saap mend MODEL`")) == ["saap mend MODEL"]
    assert list(misused("`saap devices costs MODEL -t 1`, and `saap prune MODEL --group-size 32`")) == []


@pytest.mark.parametrize("name", PAGES)
def test_commands_are_commands(name):
    """Every `saap ...` of a code block has a command, options, values and arguments that there are."""
    for text in [text for _, text in fences(name, "sh", "yaml", "")] + [indented(name)]:
        for words in command_lines(text):
            context, command, rest = click.Context(cli), cli, words
            while isinstance(command, click.Group):
                _, command, rest = command.resolve_command(context, rest)
            command.make_context("saap", list(rest))


def test_pages_have_commands_at_all():
    found = {name: [words for _, text in fences(name, "sh", "yaml") for words in command_lines(text)] for name in PAGES}
    assert sum(map(len, found.values())) > 30
    assert ["devices", "test"] in [words[:2] for words in found["docs/regression.md"]]


def some_text(seed, lines):
    """Lines of words, each with numbers that no other text has."""
    words = ("cat", "mat", "dog", "day", "night", "home", "by", "all", "saw", "ran", "while", "how", "we", "they", "it")
    return "\n".join(
        f"{seed} {line} " + " ".join(words[(seed + line * line + place * 7) % len(words)] for place in range(20))
        for line in range(lines)
    )


@pytest.fixture
def workplace(tmp_path, tiny_model, monkeypatch):
    """A folder with `my-model` and the texts of the tutorial."""
    tiny_model("my-model", max_position_embeddings=512)
    (tmp_path / "train.txt").write_text(some_text(1, 4000))
    (tmp_path / "test.txt").write_text(some_text(5, 900))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Shell:
    """A shell in a folder of its own, in which `saap` is there and the terminal has 100 columns."""

    place: Path
    env: dict[str, str]

    def type(self, line):
        """Run a line: it ends well, prints no traceback, and no line that is longer than the terminal is wide.

        Where a busy machine makes speeds INVALID, commands that judge them say that they cannot.
        """
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.place, env=self.env, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        said = f"$ {line}\n{done.stdout}\n{done.stderr}"
        allowed = (0, 3) if line.startswith(NOT_TOLD) else (0,)
        assert done.returncode in allowed and "Traceback" not in said, said
        ours = done.stderr if line.startswith("saap generate ") else done.stdout + done.stderr  # not what a model says
        wide = done.returncode or re.search("--wide|--format md", line)  # one line of an error; tables for elsewhere
        assert wide or [out for out in ours.splitlines() if len(out) > 100] == [], said
        return done.stdout


@pytest.fixture
def shell(workplace):
    """Starts shells: ``shell(more, apart)``; ``more`` is added to the words of a command, ``apart`` runs them all."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # a socket's name must be short
        home = workplace / "home"
        home.mkdir()
        env = {k: v for k, v in os.environ.items() if not re.match("ORT_|HF_|XDG_|SAAP_|DO_NOT|MPL", k)}
        env |= {"HOME": str(home), "COLUMNS": "100", "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}

        def start(more=None, apart=()):
            server = [*apart, sys.executable, "-m", "support.saap_server", str(folder), json.dumps(more or {})]
            paths = {**env, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
            process = stack.enter_context(subprocess.Popen(server, env=paths, start_new_session=True))
            stack.callback(os.killpg, process.pid, signal.SIGTERM)
            while not (folder / "saap").is_file():
                assert process.poll() is None
                time.sleep(0.05)
            return Shell(workplace, env)

        yield start


def lines_of(name, *notes):
    """The lines that a page tells a reader to type, in their order: of blocks with such a note, else with none."""
    shown = [text for note, text in fences(name, "sh") if note in (notes or ("",))]
    return [line for text in shown for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line]


ON_A_BOARD = "on a board"
OF_BOARDS = ("docs/bench.md", "docs/board.md", "docs/devices.md", "docs/regression.md", "docs/tutorial.md")
MOST_NOT_RUN = 4


def test_every_line_is_typed_by_a_test_or_says_why_not():
    """After a fence's `sh`: nothing or `on a board`, which tests of this file type; another test; or a reason."""
    not_run = []
    for name in PAGES:
        for note, text in fences(name, "sh"):
            kind, _, rest = note.partition(" ")
            if kind == "no-run:":
                not_run.append((name, rest))
            elif note.startswith("run by "):
                test = ROOT / note.removeprefix("run by ")
                assert test.is_file() and (name in test.read_text() or "install_lines()" in test.read_text()), name
            else:
                assert name in ("docs/first-ten.md", *OF_BOARDS) and note in ("", ON_A_BOARD), (name, text)
    assert len(not_run) <= MOST_NOT_RUN and all(len(reason.split()) >= 3 for _, reason in not_run), not_run


SHORT = ["--ratio-time", "2", "--repetitions", "3", "--prompt", "8", "--generate", "8"]


def test_the_first_ten_commands_work_word_for_word(shell, workplace):
    """With a small random model in the place of the packaged one, and options that make a bench short."""
    few = {"bench": ["--no-cold", *SHORT], "prune": ["--speedup", "1.01", "--set", "accept_invalid=true"]}
    (workplace / "my-model").rename(workplace / "smollm2-135m")
    lines, typed = lines_of("docs/first-ten.md"), shell(few)
    assert len(lines) == 10 and all(line.startswith("saap ") for line in lines)
    said = {line: typed.type(line) for line in lines}
    assert all(words in said[lines[4]] for words in ("The plan saves ", "lost the largest share", "Next would go "))
    assert (workplace / "report.html").stat().st_size > 10_000


# What stands in a row of the README's table, and what the tutorial has made by then.
STAND_INS = {
    "MODEL": "my-model", "SLIM": "out/slim", "TUNED": "out/tuned-again", "PATH...": "out/slim out/tuned-again",
    "PATH": "out/tuned-again", "BUNDLE": "out/bundle-again", "A": "out/all/dense-int4", "B": "out/all/slim-int4",
    "...": "", "OLD": "out/all/dense-int4", "NEW": "out/all/slim-int4", "RESULT...": "quality.json",
}  # fmt: skip


def table_of_commands():
    """The commands of the README's table, with what the tutorial has made; one that `run` does is not done again."""
    table = (ROOT / "README.md").read_text().partition("\n## Commands\n")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| `saap ([^`]*)` \|", table, re.MULTILINE):
        if "\\|" not in row and not row.startswith("run "):
            yield "saap " + " ".join(STAND_INS.get(word, word) for word in row.split(" "))


def test_the_tutorial_and_the_readme_work_and_call_nobody(shell, workplace):
    """All their commands in order, with a home of their own and without network, where calls are traced.

    A random model needs few tokens, and its bench few repetitions.
    """
    quick = ["--repetitions", "1", "--prompt", "8", "--generate", "8"]
    few = {
        "run": ["--tokens", "1024", "--repetitions", "1", "--threads", "1", "--set", "sequences=8",
                "--set", "length=32", "--set", "chunk=64", "--set", "max_chunks=4", "--speedup", "1.01",
                "--set", "accept_invalid=true"],
        "prune": ["--sequences", "8", "--length", "32"],
        "tune": ["--tokens", "1024"],
        "bench": [*quick, "--no-cold"],
        "compare": ["--repetitions", "3", *quick[2:]],
        "eval": ["--chunk", "64", "--max-chunks", "4"],
    }  # fmt: skip
    calls = workplace / "calls"
    apart = ["unshare", "--net", "strace", "-f", "--seccomp-bpf", "-e", "trace=connect", "-o", str(calls)]
    if not (
        traced := shutil.which("strace") and not subprocess.run(["unshare", "--net", "true"], check=False).returncode
    ):
        apart = []  # needs root; .ci/run has both
    typed = shell(few, apart)
    for line in lines_of("docs/tutorial.md"):
        typed.type(line)
    made = ("out/all/report.html", "out/slim", "out/tuned", "out/bundle/bundle.json", "quality.json", "report.html")
    assert [name for name in made if not (workplace / name).exists()] == []
    (workplace / "out/slim").rename(workplace / "out/slim-of-the-tutorial")
    table = [*table_of_commands()]
    assert {line.split()[1] for line in table} >= {"prune", "tune", "eval", "export", "generate", "bench", "compare"}
    for line in table:
        typed.type(line)
    ours = {path.relative_to(workplace / "home").parts[:2] for path in workplace.rglob("home/**/*") if path.is_file()}
    assert ours == {(".cache", "saap")}
    if traced:
        assert [line for line in calls.read_text().splitlines() if "AF_INET" in line] == []


@pytest.fixture(scope="module")
def boards(tmp_path_factory):
    """Two boards, each an sshd on this host, under all names that pages have; ``pi`` is whoever runs the tests."""
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        folder, ssh = tmp_path_factory.mktemp("boards"), shutil.which("ssh")
        made = [stack.enter_context(contextlib.contextmanager(running)(folder / n, patch)) for n in ("pi", "jetson")]
        known, configuration = made[0].folder / "ssh_config", ""
        for board, names in zip(made, ("raspberrypi offline board", "jetson"), strict=True):
            configuration += f"Host {names}\nHostName 127.0.0.1\nPort {board.port}\nIdentityFile {board.folder}/user\n"
        keys = [board.known.read_text() for board in made]
        made[0].known.write_text("".join(keys))
        known.write_text(f"{configuration}Host *\n{known.read_text()}")
        user = 'for word; do shift; [ "$word" = pi ] && word=$(id -un); set -- "$@" "$word"; done'
        script(made[0].bin / "ssh", f'{user}\nexec {ssh} -F {known} "$@"')
        patch.setenv("PATH", f"{made[0].bin}{os.pathsep}{os.environ['PATH']}")
        yield made


# Where a busy machine may say that it cannot tell. A baseline must be recorded, or the test after it tests nothing.
NOT_TOLD = ("saap compare ", "saap devices test ")
BRIEF = {
    "bench": ["-r", "1", "-p", "8", "-n", "8", "-d", "0", "-t", "1", "--no-cold"],
    "devices baseline": ["-r", "3", "-n", "16", "-p", "8", "-t", "1", "--sessions", "4", "--spread", "1s",
                         "--min-effect", "99"],
    "devices costs": ["--quick", "-t", "1"],
    "prune": ["--sequences", "8", "--length", "32", "--set", "accept_invalid=true", "--threads", "1",
              "--speedup", "1.01"],
    "run": ["--tokens", "1024", "--repetitions", "1", "--threads", "1", "--set", "sequences=8", "--set", "length=32",
            "--set", "chunk=64", "--set", "max_chunks=4"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_BOARDS)
def test_the_pages_of_boards_work(name, shell, workplace, boards):
    """In their order, with real connections, agents and installations; llama.cpp where it is installed."""
    from support.exported import export_bundle

    export_bundle(Path("my-model"), workplace / "out/demo/dense-int4")
    shutil.copytree("out/demo/dense-int4", "out/demo/slim-int4")
    shutil.copytree("out/demo/dense-int4", "out/all/dense-int4")
    shutil.copytree("out/demo/dense-int4", "out/bundle")
    (workplace / "wheels").mkdir()
    if name == "docs/board.md":
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "-d", "wheels", *REQUIREMENTS], check=True)
    stands = {"BUNDLE": "out/demo/slim-int4", "MODEL": "my-model", "SLIM": "out/slim", "torch:DIR": "torch:my-model",
              "DIR": "out/demo/slim-int4", "OLD_BUNDLE": "out/demo/dense-int4",
              "NEW_BUNDLE": "out/demo/slim-int4"}  # fmt: skip
    typed = shell(BRIEF)
    notes = (ON_A_BOARD,) if name == "docs/tutorial.md" else ("", ON_A_BOARD)
    for line in lines_of(name, *notes):
        words = line.partition("  #")[0]
        words = re.sub(r"\b(?:torch:)?[A-Z_]{3,}\b", lambda match: stands.get(match[0], match[0]), words)
        if not find_spec("llama_cpp"):
            words = re.sub(r" \S*llama\.cpp\S*", "", words)
        if name == "docs/bench.md" and "before.json" in line:
            for made in ("before", "after"):
                typed.type(f"saap bench out/demo/slim-int4 --json {made}.json")
        typed.type(words)


@pytest.mark.parametrize("name", ["README.md", "docs/deploy.md"])
def test_python_runs(name, workplace, capsys):
    """A page's Python, in a folder where its example was made; clients that are not installed are passed over."""
    from support.exported import export_bundle

    few = ("--sequences", 8, "--length", 32, "--calibration", "train.txt")
    here("prune", "my-model", "-o", "out/demo/tuned", "--ratio", 0.2, *few)
    export_bundle(Path("out/demo/tuned"), Path("out/demo/slim-int4"))
    found = fences(name, "python")
    assert found
    said = []
    for _, text in found:
        clients = ("onnxruntime_genai", "llama_cpp", "openvino")
        if all(find_spec(module) for module in clients if f"{module} " in text):
            exec(compile(text, name, "exec"), {})
            said.append(capsys.readouterr().out)
    if name == "docs/deploy.md":
        assert len(said) >= 3 and said[0].strip() and said[0].strip() == said[1].strip()
