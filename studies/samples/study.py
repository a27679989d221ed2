"""The texts that ship with saap, cut from larger files, and what they hold.

    python -m studies.samples.study make               # writes saap/text/samples/; SAAP_DATA names the files
    python -m studies.samples.study table [--write]    # documents, tokens, bytes

The same files give the same texts. Documents come in the order of their hashes, so that none is taken for where it
stood, and are taken whole until a source has given its share. One that has thirteen words in a row in common with the
evaluation text, or with a document that was taken before, is left out.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saap.text.samples import EVALUATION, FOLDER, SHA256
from studies.common import add_write_option, markdown, parser_of, provenance, show_tables

HERE = Path(__file__).resolve().parent
CELL = HERE / "cells" / "samples.json"
JUDGED_BY = "wikitext2_test_raw.txt"
GRAM = 13  # words in a row that two documents must not share, as in GPT-3's and PaLM's checks
CONTACT = re.compile(r"\S@\S+\.\w|\d{3}\W{1,2}\d{3}\W\d{4}")  # a mail address or a telephone number
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a sample is cut from, and how much: whole documents of ``shortest`` to ``longest`` characters."""

    file: str
    fields: tuple[str, ...]  # of a row, kept in the sample
    text: Callable[[Row], str]
    shortest: int
    longest: int
    characters: int  # that are taken


def running_text(row: Row) -> str:
    return str(row["text"])


def spoken_text(row: Row) -> str:
    return "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)


# A third of 400,000 tokens of SmolLM2's tokenizer each.
SOURCES = {
    "web.jsonl": Source("c4_sample300.jsonl", ("text",), running_text, 150, 20_000, 588_000),
    "encyclopedia.jsonl": Source(
        "wikipedia_docs.jsonl.gz", ("title", "url", "text"), running_text, 500, 12_000, 537_000
    ),
    "instructions.jsonl": Source(
        "dolly_filtered3k.jsonl.gz", ("instruction", "input", "output"), spoken_text, 60, 6_000, 560_000
    ),
}


def grams(text: str) -> set[tuple[str, ...]]:
    """Thirteen words in a row, without case and signs."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}


def articles_of(wikitext: str) -> set[str]:
    """The titles in WikiText's files, as letters and digits: they are written with blanks around their signs."""
    return {_letters(title) for title in re.findall(r"^ = ([^=\n]+) = $", wikitext, re.MULTILINE)}


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))


def chosen(rows: list[Row], source: Source, seen: set[tuple[str, ...]], articles: set[str]) -> Iterator[Row]:
    """Rows for a sample; what they hold joins ``seen``."""
    taken = 0
    for row in sorted(rows, key=lambda row: hashlib.sha256(source.text(row).encode()).digest()):
        text = source.text(row)
        if not source.shortest <= len(text) <= source.longest or taken + len(text) > source.characters:
            continue
        if CONTACT.search(text) or _letters(str(row.get("title", ""))) in articles:
            continue
        known = grams(text)
        if known & seen:
            continue
        seen |= known
        taken += len(text)
        yield {field: row[field] for field in source.fields}


def samples(data: Path) -> dict[str, bytes]:
    """The content of every sample."""
    judged = (data / JUDGED_BY).read_bytes()
    wikitext = judged.decode("utf-8")
    seen, found = grams(wikitext), {}
    for name, source in SOURCES.items():
        rows = chosen(read_rows(data / source.file), source, seen, articles_of(wikitext))
        found[name] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return {**found, EVALUATION: judged}


def read_rows(path: Path) -> list[Row]:
    raw = path.read_bytes()
    content = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    return [json.loads(line) for line in content.split("\n") if line]


def make(data: Path) -> None:
    from saap.models.resolve import load_tokenizer, resolve
    from saap.text.encoding import encode

    tokenizer, cell = load_tokenizer(resolve("smollm2-135m")), {}
    files = {name: source.file for name, source in SOURCES.items()} | {EVALUATION: JUDGED_BY}
    for name, content in samples(data).items():
        packed = gzip.compress(content, 9, mtime=0)
        (FOLDER / f"{name}.gz").write_bytes(packed)
        source = SOURCES.get(name)
        rows = [json.loads(line) for line in content.decode().split("\n") if line] if source else []
        texts = [source.text(row) for row in rows] if source else [content.decode()]
        cell[name] = {
            "from": files[name],
            "from_sha256": hashlib.sha256((data / files[name]).read_bytes()).hexdigest(),
            "sha256": hashlib.sha256(content).hexdigest(),
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "tokens": sum(len(encode(text, tokenizer)) for text in texts),
            "bytes": len(packed),
        }
        print(f'    "{name}": "{cell[name]["sha256"]}",{"" if cell[name]["sha256"] == SHA256[name] else "  # new"}')
    CELL.parent.mkdir(exist_ok=True)
    CELL.write_text(json.dumps({**provenance(), "samples": cell}, indent=1) + "\n", encoding="utf-8")


def tables() -> dict[str, str]:
    found = json.loads(CELL.read_text(encoding="utf-8"))["samples"]
    heads = ["sample", "from", "documents", "characters", "tokens", "bytes, compressed"]
    keys = ("documents", "characters", "tokens", "bytes")
    rows = [[name, f"`{row['from']}`", *(f"{row[key]:,}" for key in keys)] for name, row in found.items()]
    return {"samples": markdown(heads, rows)}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("what", choices=["make", "table"])
    add_write_option(parser)
    asked = parser.parse_args()
    if asked.what == "table":
        show_tables(HERE, tables(), asked.write)
        return
    if "SAAP_DATA" not in os.environ:
        raise SystemExit("set SAAP_DATA to the folder of the files that are cut")
    make(Path(os.environ["SAAP_DATA"]))


if __name__ == "__main__":
    main()
