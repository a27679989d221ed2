"""The README of a run's directory: a model card as the Hugging Face hub reads it, ready to be uploaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.judge.wording import as_dict, as_float, as_list, megabytes, number, plain, threads
from bench.measure.result import Measurement, Result
from bench.report.headline import bought_by
from bench.report.tables import Table, markdown
from saap import WHEEL
from saap.cli.devices.fit import board_commands, fit_in_words
from saap.cli.report import RunFile


def model_card(source: Path, run: RunFile, results: Sequence[Result], bundles: Sequence[str]) -> str:
    """Write the card: the base model, quality and speed, how to run the bundle, how it was made.

    Args:
        source: the dense model's directory, whose own card names the base model and the licence.
        results: the benches of the run, the one of the fewest threads first.
        bundles: names of the dense and the slim bundle.
    """
    slim = bundles[1]
    gained = next(filter(None, (bought_by(result, run["quality"]) for result in results)), None)
    steps = "\n".join(str(step["command"]) for step in run["steps"])
    return f"""---
{_metadata(source, run)}
---
# {plain(run["model"])}, pruned and tuned by saap

{f"**{gained}.**" if gained else ""}

{markdown(_measured(run, results))}
{_conditions(run, results)}

## How to run it

{_on_device(run, slim)}On a board or a computer, with Python and the wheel that `make wheel` builds in saap's checkout:

```sh
pip install './{WHEEL}[bench]'
saap generate {slim} "Explain in two sentences why the sky is blue."
saap bench {slim}
```

In transformers' `generate()`, with `pip install './{WHEEL}[prune]'`:

```python
from export.generate.ort_model import BundleForCausalLM

model = BundleForCausalLM.from_bundle("{slim}")
```

With llama.cpp, where its architecture is known there, with the same integers:

```sh
saap export tuned -o slim.gguf --target gguf
llama-cli -m slim.gguf
```

## How it was made

```sh
{steps}
```

`report.html` shows all measurements, and what was kept of each layer.
"""


def _metadata(source: Path, run: RunFile) -> str:
    """Write the card's header as YAML."""
    from huggingface_hub import ModelCard, ModelCardData

    known, about = source / "README.md", dict[str, object]()
    if known.is_file():
        about = ModelCard.load(known, ignore_metadata_errors=True).data.to_dict()
    base = about.get("base_model") or run["model"]
    data = ModelCardData(
        base_model=base if isinstance(base, str | list) else str(base),
        license=str(about["license"]) if "license" in about else None,
        library_name="onnxruntime",
        pipeline_tag="text-generation",
        tags=["saap", "onnx", "pruned", "quantized", "edge"],
    )
    return data.to_yaml()


def _on_device(run: RunFile, slim: str) -> str:
    """Say whether the bundle fits the run's device, and how to copy it there."""
    if (fit := run.get("device")) is None:
        return ""
    commands = "\n".join(f"{command}  # {what}" for what, command in board_commands(fit, Path(slim)))
    return f"{fit_in_words(fit, slim)}.\n\n```sh\n{commands}\n```\n\n"


def _measured(run: RunFile, results: Sequence[Result]) -> Table:
    counts = sorted({m.n_threads for result in results for m in result.measurements})
    rows = []
    for row in map(as_dict, as_list(run["quality"].get("rows"))):
        name, perplexity = plain(row.get("name")), as_float(row.get("perplexity"))
        quality = [number(perplexity, 1), number(row.get("kl"), 3), megabytes(row.get("bytes"))]
        rows.append([name, *quality, *(_decode(name, count, results) for count in counts)])
    heads = ["model", "perplexity", "KL to dense", "MB", *(f"tok/s, {threads(count)}" for count in counts)]
    return Table(heads, rows)


def _decode(name: str, count: int, results: Sequence[Result]) -> str:
    measurements: list[Measurement] = [m for result in results for m in result.of(name) if m.n_threads == count]
    decode = measurements[0].decode if measurements else None
    return "-" if decode is None else f"{decode.median:.1f} ({measurements[0].status})"


def _conditions(run: RunFile, results: Sequence[Result]) -> str:
    protocol = as_dict(run["quality"].get("protocol"))
    device = results[0].device if results else {}
    where = plain(device.get("board") or device.get("cpu_model") or "an unknown device")
    test = results[0].measurements[0].test if results and results[0].measurements else ""
    return (
        f"Perplexity and KL: {plain(protocol.get('text'))}, in pieces of {plain(protocol.get('chunk'))} tokens. "
        f"Speed: {test} on {where}; WARN and INVALID are explained in `report.html`."
    )
