"""The page in a real browser: a headless Chromium of the system, driven by playwright."""

import json
import shutil
from itertools import product

import pytest
from support.report_page import RUN, document, measurement, result, row, task

from bench.measure.result import write_result
from bench.report.page import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
LONG = "a-model-with-a-very-long-name-such-as-people-give-to-their-runs-int4-block32-no-dotprod"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """Everything a page can hold: a run, speeds with energy, quality of two documents, tasks, hostile names."""
    folder = tmp_path_factory.mktemp("page")
    measured = [measurement("dense", 10.0), measurement("slim", 8.0), measurement(LONG, 7.0)]
    write_result(folder / "bench.json", result(*measured))
    rows = [row("dense", 20.0), row("slim", 25.0), row(LONG, 31.0)]
    names = ("piqa", "arc_easy", "boolq", "hellaswag", "winogrande", "arc_challenge", "openbookqa")
    tasks = [task(r["name"], name, 0.5, 0.6) for r in rows for name in names]
    (folder / "quality.json").write_text(json.dumps(document(rows, tasks=tasks)))
    return report([folder / "bench.json", folder / "quality.json"], folder / "page.html", run=RUN)


@pytest.fixture(scope="module")
def opened(browser, page_file):
    """Pages of each width and scheme, and what the browser complained of or fetched."""
    made = {}
    for width, scheme in product((380, 768, 1280), ("light", "dark")):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        said, fetched = [], []
        page.on("console", lambda message, said=said: said.append(message.text))
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.on("request", lambda request, fetched=fetched: fetched.append(request.url))
        page.goto(page_file.as_uri())
        made[width, scheme] = page, said, fetched
    return made


def test_the_page_opens_whole_and_fetches_nothing(opened, page_file):
    assert page_file.stat().st_size < 2_000_000
    for (width, _), (page, said, fetched) in opened.items():
        assert said == [] and fetched == [page_file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.evaluate(
            "[...document.querySelectorAll('main *')].filter(e => !e.closest('svg') && !e.closest('.details')"
            " && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 120))"
        )
        assert wide == []
        scrolled = "[...document.querySelectorAll('.panel')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert width == 1280 or page.evaluate(scrolled) == 0


@pytest.mark.parametrize("width", [380, 768, 1280])
def test_the_plot_is_drawn_and_its_letters_can_be_read(opened, width):
    plots = opened[width, "light"][0].evaluate(
        "[...document.querySelectorAll('figure svg')].map(svg => { const box = svg.getBoundingClientRect();"
        " const inner = svg.viewBox.baseVal;"
        " return {width: box.width, height: box.height, scale: box.width / inner.width,"
        " marks: svg.querySelectorAll('path, use').length,"
        " letters: [...svg.querySelectorAll('text')].map(t => parseFloat(getComputedStyle(t).fontSize)),"
        " outside: [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();"
        " return b.left < -1 || b.right > innerWidth + 1; }).map(t => t.textContent)}; })"
    )
    (plot,) = plots
    assert plot["width"] > 250 and plot["height"] > 100 and plot["marks"] > 3
    assert min(plot["letters"]) * plot["scale"] >= 8  # CSS pixels
    assert plot["outside"] == []
