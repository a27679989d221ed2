import re
import warnings
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from support.report_page import RUN, measurement, result, sample, text_of

from bench.judge.comparison import compare_within
from bench.measure.result import ModelFacts, ResultError, read_result, write_result
from bench.report.headline import cards_of, entries_of, pair_of
from bench.report.history import add
from bench.report.page import report

HOSTILE = "</svg></title><script>alert('$x$')</script><img src=x onerror=alert(1)>\x07"


@pytest.fixture
def page(tmp_path):
    def write(*results, run=None):
        paths = []
        for index, document in enumerate(results):
            paths.append(tmp_path / f"{index}.json")
            write_result(paths[-1], document)
        out = report(paths, tmp_path / "deep" / "report.html", run=run)
        assert [p.name for p in out.parent.iterdir()] == ["report.html"]
        return out.read_text(encoding="utf-8")

    return write


class Elements(HTMLParser):
    """The elements and attributes that a browser would see; refuses tags that do not nest."""

    VOID = ("meta", "br", "img", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = set(), [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def dense_and_slim(**slim):
    smaller = ModelFacts(108_000_000, 80_000_000, 72_000_000, 19_200, 4, 49_152)
    return result(measurement("dense", 10.0), measurement("slim", 8.0, **{"model": smaller, **slim}))


def cards(document, rows=()):
    return {card.title: card for card in cards_of(pair_of(entries_of([document])), rows)}


def test_page_tells_everything_that_was_given(page):
    text = text_of(page(dense_and_slim(status="WARN", reasons=["governor is powersave"]), run=RUN))
    for told in [
        "a model", "Some CPU", "Some OS", "governor is powersave", "saap bench 'a b'", "saap prune 'a b'", "61.2",
        "ab" * 32, "achieved 0.2009", "perplexity", "25.00", "0.2500", "75.0 %", "134.5 M", "chunk 256", "BOS no",
        "max abs 0.00031", "Why is the sky blue?", "Because.", "torch 2.13.0", "onnxruntime 1.32.0", "15.0 GB/s",
    ]:  # fmt: skip
        assert told in text, told


def test_headline_sets_dense_against_slim(page):
    told = cards(dense_and_slim(), RUN["quality"]["rows"])
    assert list(told) == ["Size", "Speed", "Memory", "Quality"]
    assert (told["Size"].value, told["Size"].ratio) == ("80", "0.80\u00d7")
    assert (told["Speed"].value, told["Speed"].ratio) == ("125.0", "1.25\u00d7")
    assert "95 % interval 1.25\u20131.25" in told["Speed"].note
    assert told["Speed"].rows == [("dense", "100.0"), ("slim", "125.0")]
    assert (told["Memory"].value, told["Memory"].ratio) == ("210", "1.00\u00d7")
    assert (told["Quality"].value, told["Quality"].ratio, told["Quality"].gain) == ("25.0", "1.25\u00d7", False)
    assert "75.0 % same top token" in told["Quality"].note


def test_the_page_begins_with_what_was_bought_and_what_it_cost(page):
    text = text_of(page(dense_and_slim(), run=RUN))
    told = "slim against dense: 1.25x as fast with 1 thread and 20% smaller; perplexity 25.0 instead of 20.0 (worse)."
    assert told in text and text.index(told) < text.index("Measurements")
    assert text.index(told) < text.index("What was kept") < text.index("Why is the sky blue?")
    assert text.index("Why is the sky blue?") < text.index("Measurements") < text.index("Where the numbers come from")


def test_what_a_user_would_otherwise_take_comes_second(page):
    peer = measurement(
        "dense-Q4_0 (llama.cpp)", 9.0, spec="llama.cpp:dense-Q4_0.gguf", kind="llama.cpp", bundle_hash=None
    )
    document = dense_and_slim()
    document = replace(document, measurements=[*document.measurements, peer])
    rows = [*RUN["quality"]["rows"], {"name": "dense-Q4_0 (llama.cpp)", "perplexity": 21.0}]
    text = text_of(page(document, run=RUN | {"quality": RUN["quality"] | {"rows": rows}}))
    first, second = (
        "slim against dense: 1.25x",
        "slim against dense-Q4_0 (llama.cpp): 1.12x as fast with 1 thread and 20%",
    )
    assert text.index(first) < text.index(second) and "perplexity 25.0 instead of 21.0 (worse)." in text


def test_each_engine_of_the_pruned_bundle_is_held_against_a_peer_at_its_best(page):
    """The rows of a peer's other settings stand in the table alone."""
    document = dense_and_slim()
    mine = document.measurements[1].bundle_hash
    rows = [
        measurement("slim@llama.cpp", 7.0, spec="out/slim@llama.cpp", kind="llama.cpp", bundle_hash=mine),
        measurement("slim@llama.cpp, on", 7.5, spec="out/slim@llama.cpp", kind="llama.cpp", bundle_hash=mine),
        measurement("Q4_0 (llama.cpp)", 9.0, spec="llama.cpp:q.gguf", kind="llama.cpp", bundle_hash=None),
        measurement("Q4_0 (llama.cpp), on", 9.5, spec="llama.cpp:q.gguf", kind="llama.cpp", bundle_hash=None),
    ]
    document.measurements[0] = replace(document.measurements[0], bundle_hash="cd" * 32)
    text = text_of(page(replace(document, measurements=[*document.measurements, *rows])))
    told = re.findall(r"(slim\S*) against Q4_0 \(llama.cpp\): ([\d.]+)x", text)
    assert told == [("slim", "1.12"), ("slim@llama.cpp", "1.29")] and "against Q4_0 (llama.cpp), on" not in text


def test_speed_is_of_pairs_as_bench_tells_it():
    rounds = [10.0, 14.0, 9.0, 12.0, 16.0, 11.0]  # what else the host did hits both of a round
    noise = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98]

    def times(factors):
        return [sample(2 * i, factor * slow, 16) for i, (factor, slow) in enumerate(zip(factors, rounds, strict=True))]

    document = result(
        measurement("dense", 0, samples=times([1.0] * 6)),
        measurement("slim", 0, samples=times([0.8 * n for n in noise])),
    )
    told = cards(document)["Speed"]
    (row,) = compare_within(document, "dense", "slim").rows
    assert told.ratio == f"{1 / row.ratio:.2f}\u00d7" == "1.25\u00d7"
    assert f"95 % interval {1 / row.high:.2f}\u2013{1 / row.low:.2f}" in told.note
    assert row.high / row.low < 1.05  # alone, either varies by 78 %


def test_speed_without_decode_is_that_of_the_prompt(page):
    prompts = [measurement(name, 0, n_gen=0, samples=[sample(i, 0, 0, prefill_s=s * (1 + i / 99)) for i in range(6)])
               for name, s in (("dense", 0.25), ("slim", 0.2))]  # fmt: skip
    told = cards(result(*prompts))["Speed"]
    assert told.ratio == "1.25\u00d7" and told.note.startswith("prefill, median of 6")
    assert told.note in page(result(*prompts))
    assert float(told.value) == pytest.approx(128 / (0.2 * (1 + 2.5 / 99)), rel=0.01)


def test_a_page_has_words_for_keys_and_dates_a_person_reads(page):
    sizes = {
        "ratio": 0.2012,
        "ratio_of_all": 0.151,
        "parameters": 108e6,
        "bytes": 80e6,
        "speedup": 1.25,
        "ms_per_token": None,
    }
    run = RUN | {"plan": RUN["plan"] | {"asked": {"ratio": 0.2}, "achieved": sizes}}
    run["quality"] = RUN["quality"] | {"protocol": {"text_sha256": "ab", "self_written": False}}
    document = replace(
        dense_and_slim(), settings={"timeout_s": 600, "warmup_steps": 4}, created="2026-12-04T13:30:00+01:00"
    )
    text = text_of(page(document, run=run))
    for words in (
        "asked 20.0 % of the layers' weights removed planned",
        "15.1 % of all weights removed, 108.0 M parameters, 80.0 MB, 1.25x as fast",
        "text SHA-256 ab", "self written no", "timeout 600 s warmup steps 4", "memory 8000 MB",
        "Some OS \u00b7 4 December 2026, 12:30 UTC",
    ):  # fmt: skip
        assert words in text, words
    assert not re.findall(r"\b[a-z]+_[a-z_]+\b", text.replace("out/", ""))
    assert "some day" in text_of(page(replace(document, created="some day")))


def test_worse_is_said_where_it_is_worse(page):
    bad = ModelFacts(134_515_008, 120_000_000, 90_000_000, 23_040, 4, 49_152)
    document = result(measurement("dense", 8.0), measurement("slim", 10.0, model=bad))
    rows = [{"name": "dense", "perplexity": 20.0}, {"name": "slim", "perplexity": 25.0}]
    assert [card.worse for card in cards(document, rows).values()] == [True, True, False, True]
    assert [card.worse for card in cards(dense_and_slim(), rows[::-1]).values()] == [False, False, False, True]
    text = text_of(page(document, run=RUN))
    assert "0.80x as fast (worse) with 1 thread and 20% larger; perplexity 25.0 instead of 20.0 (worse)." in text
    assert "1.20\u00d7 worse" in text and "0.80\u00d7 worse" in text and "1.00\u00d7 worse" not in text
    better = [{"name": "dense", "perplexity": 25.0}, {"name": "slim", "perplexity": 20.0}]
    assert not cards(dense_and_slim(), better)["Quality"].worse


def test_quality_without_perplexity_is_told_as_divergence():
    rows = [{"name": "dense"}, {"name": "slim", "kl": 0.25, "top1": 0.0}]
    quality = cards(dense_and_slim(), rows)["Quality"]
    assert (quality.value, quality.unit, quality.ratio) == ("0.250", "nats", None)
    assert quality.note.startswith("0.0 %")


def test_invalid_measurement_is_shown_with_reasons_and_never_enters_a_ratio(page):
    document = dense_and_slim(status="INVALID", reasons=["the device throttled"])
    told = cards(document)
    assert told["Speed"].ratio is told["Memory"].ratio is None
    assert told["Speed"].refused == told["Memory"].refused == "no ratio: slim INVALID"
    assert "interval" not in told["Speed"].note
    text = page(document)
    assert "the device throttled" in text
    assert "1.25\u00d7" not in text
    hollow = re.compile(r'<use [^>]*style="fill: none[^"]*stroke: var\(--s2\)')
    assert hollow.search(text)
    assert not hollow.search(page(dense_and_slim()))


def test_measurements_of_other_settings_are_not_compared():
    threads = result(measurement("dense", 10.0), measurement("slim", 8.0, n_threads=2))
    assert [card.ratio for card in cards(threads).values()] == [None, None, None]
    assert [entry.name for entry in entries_of([threads])] == ["dense, 1 thread", "slim, 2 threads"]
    depth = result(measurement("dense", 10.0), measurement("slim", 8.0, n_prompt=512))
    assert cards(depth)["Speed"].ratio is None
    apart = entries_of([result(measurement("dense", 10.0)), result(measurement("slim", 8.0))])
    old, new = pair_of(apart)
    assert old is new


def test_dense_bundle_is_the_baseline_wherever_it_stands():
    peer = measurement("dense in torch", 60.0, kind="torch")
    document = result(peer, measurement("slim", 8.0), measurement("dense", 10.0))
    assert cards(document)["Speed"].ratio == "1.25\u00d7"


def test_one_repetition_has_no_interval():
    document = result(measurement("dense", 10.0, repetitions=1), measurement("slim", 8.0, repetitions=1))
    assert "spread unknown" in cards(document)["Speed"].note


def test_unknown_is_a_dash_with_its_reason(page):
    unknown = {"peak_decode_bytes": None, "unknown": {"peak_decode_bytes": "no <procfs> here"}}
    lost = measurement("lost", 10.0, samples=[sample(0, 10.0, 16, **unknown)], model=ModelFacts())
    text = page(result(lost, bandwidth=[]))
    assert "no &lt;procfs&gt; here" in text
    row = re.search(r'data-label="peak decode MB">(.*?)</td>', text)
    assert row and row[1] == "\u2013"
    assert cards(result(lost))["Memory"].value == "\u2013"


def test_hostile_text_does_not_become_markup(page):
    nasty = measurement(HOSTILE, 10.0, spec=HOSTILE, status="WARN", reasons=[HOSTILE], bundle_hash=HOSTILE)
    document = result(
        measurement(f"_{HOSTILE}", 10.0), nasty, device={"cpu_model": HOSTILE, HOSTILE: HOSTILE},
        command=[HOSTILE], versions={HOSTILE: HOSTILE}, settings={HOSTILE: HOSTILE},
    )  # fmt: skip
    run = {
        "model": HOSTILE,
        "steps": [{"name": HOSTILE, "command": HOSTILE, "seconds": HOSTILE}],
        "plan": {"asked": HOSTILE, "layers": [{"query_heads": 1, "kv_heads": 1, "ffn": 1}]},
        "quality": {"protocol": {HOSTILE: HOSTILE}, "rows": [{"name": HOSTILE, "perplexity": HOSTILE}]},
        "parity": {HOSTILE: {HOSTILE: HOSTILE}},
        "texts": [{"prompt": HOSTILE, "outputs": {HOSTILE: HOSTILE}}],
        "versions": {HOSTILE: HOSTILE},
    }
    text = page(document, run=run)
    elements = Elements(text)
    assert not elements.tags & {"script", "img", "link", "iframe", "object"}
    assert not [name for name, _ in elements.attributes if name.startswith("on")]
    assert text.count("alert(") > 20


def test_page_loads_nothing_and_is_small(page):
    long = [measurement(f"model {i}", 5.0 + i, count=2000) for i in range(8)]
    text = page(result(*long), run=RUN)
    elements = Elements(text)
    assert not elements.tags & {"script", "img", "link", "iframe"}
    links = [value for name, value in elements.attributes if name in ("href", "xlink:href", "src", "srcset")]
    assert links  # markers of the plots
    assert all(value.startswith("#") for value in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", text))
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\"' )]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(text.encode()) < 1_000_000


def test_plots_are_well_formed_keep_their_text_and_take_the_page_s_colours(page):
    name = "font-family: x; #010203 $y$ <1>"  # called like a style
    document = result(measurement("dense", 10.0), measurement(name, 90.0, kind="torch"))
    text = page(document, run=RUN)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    (drawing,) = drawings
    words = "".join(ElementTree.fromstring(drawing).itertext())
    assert name in words and "100.0, ceiling " in words and "mathdefault" not in words
    colours = set(re.findall(r"#[0-9a-f]{6}\b", drawing.replace("#010203 $y$", "")))
    assert not colours - {"#000000", "#ffffff"}
    assert page(document, run=RUN) == text


@pytest.mark.parametrize(
    "run",
    [
        None,
        {},
        {"plan": None, "steps": None, "quality": None, "parity": None, "texts": None, "versions": None, "model": None},
        {"plan": [], "steps": {}, "quality": "x", "parity": [1], "texts": [1, None], "versions": 3, "model": 7},
        {"plan": {"layers": [{}]}, "quality": {"rows": [{}, 4]}, "steps": [{}], "texts": [{}], "parity": {"a": 1}},
    ],
)
def test_every_part_of_the_run_may_be_missing(page, run):
    Elements(page(run=run))


def test_result_without_a_valid_sample_still_has_a_page(page):
    text = page(result(measurement("dead", 10.0, samples=[], status="INVALID", reasons=["the worker died"])))
    assert "the worker died" in text


def test_several_results_name_their_devices_and_one_of_an_older_version_is_shown(page, tmp_path):
    limits = {"device": "raspberry-pi-5", "cores_used": 1, "memory_bytes": 600_000_000, "memory_limited": True}
    emulated = replace(
        dense_and_slim(),
        device={**dense_and_slim().device, "emulated": "raspberry-pi-5, 1 cores, 600 MB", "fingerprint": "0" * 16},
        settings={"emulated": limits},
    )
    text = text_of(page(emulated, replace(dense_and_slim(), device={"board": "Some Board"})))
    assert "Some Board" in text and "Some CPU" in text
    assert read_result(tmp_path / "0.json") == emulated


def test_unreadable_result_leaves_no_page(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ResultError, match=r"bad\.json"):
        report([tmp_path / "bad.json"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_text_has_enough_contrast_in_light_and_dark():
    css = (Path(report.__code__.co_filename).parent / "report.html.jinja").read_text()
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in css.split("@media")[:2]]
    assert [len(theme) for theme in themes] == [18, 18]
    for theme in themes:
        for ink, paper in [
            ("ink", "page"), ("ink", "surface"), ("muted", "page"), ("muted", "surface"), ("accent", "surface"),
            ("bad", "surface"), ("ok", "ok-bg"), ("warn", "warn-bg"), ("bad", "bad-bg"),
        ]:  # fmt: skip
            assert _contrast(theme[ink], theme[paper]) >= 4.5, (ink, paper)
        for index in range(1, 7):  # WCAG 1.4.11: graphics
            assert _contrast(theme[f"s{index}"], theme["surface"]) >= 3


def _contrast(one, other):
    def luminance(colour):
        parts = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted([luminance(one), luminance(other)])
    return (high + 0.05) / (low + 0.05)


def test_history_has_a_section_with_its_changes(tmp_path):
    for day in range(24):
        created = f"2025-01-{day + 1:02d}T00:00:00+00:00"
        milliseconds = (10.0 if day < 12 else 11.0) + 0.02 * (day % 3)
        document = result(measurement(HOSTILE, milliseconds), created=created)
        add(tmp_path / "history", replace(document, device={"fingerprint": "f" * 16, "cpu_model": "Some CPU"}))
    out = report([], tmp_path / "report.html", history=tmp_path / "history")
    text = out.read_text()
    Elements(text)
    assert "<script" not in text
    assert "1 Some CPU 24 " in text_of(text)
    assert "10.0 % slower from 13 January 2025, 00:00 UTC on (20250113T000000Z-" in text
    assert "<h2>History</h2>" not in report([], tmp_path / "plain.html").read_text()


@pytest.mark.parametrize(
    ("dense", "kept"),
    [
        (RUN["plan"]["dense_layers"], "kept query heads 33.3 %, KV groups 33.3 %, FFN width 65.6 %"),
        (None, None), ([{"query_heads": 9}], None), ([{}, {}], None), ([{"query_heads": 0, "ffn": "x"}] * 2, None),
    ],
)  # fmt: skip
def test_the_shares_that_a_plan_kept(page, dense, kept):
    text = text_of(page(run={"plan": {**RUN["plan"], "dense_layers": dense}}))
    assert kept in text if kept else " kept query" not in text


def test_a_sweep_names_its_tests_and_details(page):
    deep = measurement("dense", 12.0, n_depth=1024, cold_load_s=1.75)
    found = result(measurement("dense", 10.0), measurement("slim", 8.0), deep)
    assert [entry.name for entry in entries_of([found])] == [
        "dense, pp128+tg16", "slim, pp128+tg16", "dense, pp128+tg16@d1024"
    ]  # fmt: skip
    old, new = pair_of(entries_of([found]))
    assert (old.measurement.name, new.measurement.name) == ("dense", "slim")
    text = page(found)
    assert text.count("pp128+tg16@d1024") >= 2 and "cold load ms" in text and "1750" in text


def test_plots_of_very_many_measurements_show_the_first_and_say_so(tmp_path):
    many = [measurement(f"model-{index}", 10.0 + index) for index in range(60)]
    write_result(tmp_path / "many.json", result(*many))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a legend that leaves its plot no room
        text = report([tmp_path / "many.json"], tmp_path / "page.html").read_text()
    assert text.count("The first 24 of 60 are drawn, the tables hold all.") == 1
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "model-23<" in drawn and "model-24<" not in drawn and "model-59" in text


def test_the_noise_floor_s_second_run_is_no_headline():
    again = measurement("dense #2", 10.1, spec="out/dense")
    peer = measurement("dense (torch)", 70.0, kind="torch", spec="torch:dense")
    old, new = pair_of(entries_of([result(measurement("dense", 10.0), again, peer)]))
    assert (old.measurement.name, new.measurement.name) == ("dense", "dense (torch)")
    alone = pair_of(entries_of([result(measurement("dense", 10.0), again)]))
    assert alone[0] is alone[1]
