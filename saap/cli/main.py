"""The command line. Every heavy import lives inside the command that needs it, so that ``saap --help`` is instant."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path
from typing import Any

import click

from saap.cli.board_commands import bench, compare, report
from saap.cli.console import Console, shown
from saap.cli.devices_options import devices
from saap.cli.eval_options import evaluate
from saap.cli.prune_options import CHOICE, COSTS, DROPPED, REQUIREMENTS, prune, required, together
from saap.cli.tune_options import tune
from saap.cli.types import Sections, directory
from saap.system.interrupt import ask_to_end, was_asked_to_end

EXTRAS = {
    "torch": "prune", "transformers": "prune", "safetensors": "prune", "gguf": "prune", "peft": "prune",
    "accelerate": "prune",
    "onnx": "export", "onnx_ir": "export", "onnxruntime": "bench", "numpy": "bench", "scipy": "bench",
    "tokenizers": "bench", "jinja2": "bench", "matplotlib": "bench", "optimum": "optimum",
    "lm_eval": "tasks", "datasets": "tasks",
}  # fmt: skip

INTERRUPTED = "interrupted; run the same command again"
NO_ROOM, NO_WRITING = "make room there, or write elsewhere", "allow writing there, or write elsewhere"
NO_PLACE = "give another place"
PLACES = {
    errno.ENOSPC: NO_ROOM, errno.EDQUOT: NO_ROOM, errno.EFBIG: NO_ROOM,
    errno.EROFS: NO_WRITING, errno.EACCES: NO_WRITING, errno.EPERM: NO_WRITING,
    errno.EEXIST: NO_PLACE, errno.ENOTDIR: NO_PLACE, errno.EISDIR: NO_PLACE, errno.ENAMETOOLONG: NO_PLACE,
    errno.ELOOP: NO_PLACE,
    errno.EIO: "the disk may be failing: write elsewhere",
}  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="saap")
def cli() -> None:
    """Prune a language model until it is as fast as you need on the device you have.

    \b
    One command, from a model to a measured bundle:
      saap run smollm2-135m -o out/demo --ratio 0.2
    """


@cli.command(cls=Sections)
@click.argument("model")
@click.option("-o", "--out", type=directory, required=True, help="Directory for everything that is made.")
@required("--ratio", type=float, metavar="SHARE", help="Share of the decoder layers' weights to remove; default: 0.2.")
@together(*REQUIREMENTS, COSTS, *CHOICE, DROPPED)
@click.option("--calibration", help="Text for scoring: a text, .jsonl or .gz file, or a data set id.")
@click.option("--data", help="Text for tuning, likewise.")
@click.option("--text", help="Text for evaluation, likewise; never the same as the others.")
@click.option("--tokens", type=int, default=24576, show_default=True, help="Tuning tokens.")
@click.option("--repetitions", type=int, default=6, show_default=True, help="Interleaved bench repetitions.")
@click.option("--threads", type=int, help="Threads of the bench; default: 1, and all physical cores.")
@click.option("--seed", type=int, default=0, show_default=True)
def run(model: str, out: Path, **options: Any) -> None:
    """All of it: prune, tune, export, evaluate, bench, report.

    Interrupted and started again, finished steps are not repeated.

    \b
    Example:
      saap run smollm2-135m -o out/demo --ratio 0.2
      saap run smollm2-135m -o out/fast --speedup 1.25 --costs cost.json --threads 1
    """
    from saap.cli.run import run_all
    from saap.cli.run_options import RunOptions
    from saap.system.outputs import claimed

    with Console() as console, claimed(out):
        run_all(model, out, RunOptions(**options), console)


@cli.command()
@click.argument("model")
@click.option("-o", "--out", type=directory, help="The bundle (or the .gguf file) to write.")
@click.option(
    "--target",
    type=click.Choice(["cpu", "cuda", "portable", "gguf"]),
    default="cpu",
    show_default=True,
    help="portable: standard operators, for TensorRT and others; gguf: one file for llama.cpp.",
)
@click.option("--bits", type=click.Choice(["4", "8", "16", "32"]), help="Of the linears; default: 4, or as tuned.")
@click.option("--group", type=click.Choice(["32", "64", "128"]), help="Weights per scale; default: 32, or as tuned.")
@click.option("--head-bits", type=click.Choice(["4", "8"]), help="Of embedding and head; default: as --bits.")
@click.option("--kv", type=click.Choice(["8", "32"]), default="32", show_default=True, help="Bits of the KV cache.")
@click.option("--no-dotprod", "dotprod", is_flag=True, default=True, flag_value=False, help="For Raspberry Pi 3 and 4.")
@click.option("--ort", "onnxruntime", help="Oldest ONNX Runtime that must load it, such as 1.23 (JetPack 6).")
@click.option("--type", "gguf_type", help="GGUF type: F32, F16, Q8_0, Q4_0 or Q4_1.")
@click.option(
    "--parity",
    type=click.Choice(["full", "none"]),
    default="full",
    show_default=True,
    help="none: faster, and the bundle is marked UNVERIFIED.",
)
@click.option("--text", help="Text for parity and the cache's scales; default: SAAP_DATA's, else random tokens.")
@click.option("--inspect", is_flag=True, help="Write nothing: show what is in the bundle MODEL.")
@click.option("--json", "as_json", is_flag=True, help="With --inspect, for machines.")
def export(model: str, out: Path | None, inspect: bool, as_json: bool, **options: Any) -> None:
    """Write a model (directory, GGUF file or name) as a bundle, with parity checked; or look into a bundle.

    \b
    Example:
      saap export out/tuned -o out/bundle
      saap export smollm2-135m -o out/dense
      saap export out/slim -o out/slim.gguf --target gguf --bits 8
      saap export --inspect out/bundle
    """
    from saap.cli.export import export_step, inspect_step

    if inspect:
        inspect_step(Path(model), as_json)
        return
    if out is None:
        raise click.UsageError("give -o OUT, where the bundle shall be written, or --inspect to look into one")
    with Console() as console:
        export_step(model, out, options, console)


@cli.command()
@click.argument("bundle", type=directory)
@click.argument("prompt", required=False)
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Of one answer.")
@click.option("--chat/--no-chat", " /--raw", default=None, help="Use the chat template; default: where there is one.")
@click.option("--system", help="What the model is told before the first turn.")
@click.option("--sample", is_flag=True, help="Draw tokens, with the settings that the model comes with.")
@click.option("--temperature", type=float, help="Above 0 draws tokens; default: 0, or the model's with --sample.")
@click.option("--top-k", type=int, help="Draw from this many likeliest tokens.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens of this probability together.")
@click.option("--min-p", type=float, help="Draw from tokens at least this times as likely as the likeliest.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens less likely that were there before.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the draws.")
@click.option("--threads", type=int, help="Default: all physical cores.")
@click.option("--context", type=int, help="Tokens that the cache holds; default: as needed, 4096 for a conversation.")
@click.option("--prepacked", is_flag=True, help="Keep packed weights in the cache: less memory, faster next start.")
@click.option("--json", "as_json", is_flag=True, help="One document with texts, ids and times, for machines.")
def generate(bundle: Path, prompt: str | None, **options: Any) -> None:
    """Stream text from a bundle; needs no torch.

    Without a prompt it is a conversation: at a terminal, or with --chat one turn per line of standard input. A prompt
    of - is read from standard input.

    \b
    Example:
      saap generate out/demo/slim-int4 "Why is the sky blue?"
      saap generate out/demo/slim-int4 --system "Be brief." --temperature 0.7 --top-p 0.9
    """
    from saap.cli.generate import generate_text

    generate_text(bundle, prompt, **options)


for command in (prune, tune, evaluate, bench, compare, devices, report):
    cli.add_command(command)


def check_packages() -> None:
    """Refuse to run with a ``bench``, ``export`` or ``devices`` that belongs to another distribution."""
    from importlib.util import find_spec

    home = Path(__file__).resolve().parents[2]
    for name in ("export", "bench", "devices"):
        spec = find_spec(name)
        found = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if found != home:
            raise click.ClickException(
                f"package {name!r} comes from {found}, saap from {home}: another package shadows "
                "it; use a fresh virtual environment"
            )


def main() -> None:
    """Entry point of the installed program."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, ask_to_end)
    try:
        invoke()
    except Exception:
        if not was_asked_to_end():
            raise
        fail(INTERRUPTED, 130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: the interpreter's own end would print a traceback


def invoke() -> None:
    """Do what the arguments say: one line and exit code 2 for what is the user's to mend."""
    try:
        check_packages()
        cli(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        fail(INTERRUPTED, 130)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing not in EXTRAS:
            raise
        fail(f"this command needs {missing}, which is not installed: pip install 'saap[{EXTRAS[missing]}]'", 2)
    except OSError as error:
        if error.errno not in PLACES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}: {PLACES[error.errno]}", 2)
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if code is None:
            raise
        fail(str(error), code)


def fail(message: str, code: int) -> None:
    """Say it in one line and leave."""
    click.echo(f"saap: {shown(' '.join(message.split()))}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
