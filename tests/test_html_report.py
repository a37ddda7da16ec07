from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bertner.errors import StorageError
from bertner.html_report import write_report
from tests.reports import (
    TYPES,
    analysis_of,
    example_comparison,
    example_events,
    example_sentences,
    right,
    sentence,
)

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)

FACTS = [("Model", "tiny"), ("Command", "bertner-train " + "--a_very_long_flag " * 9)]
HOSTILE_WORDS = [
    '</script><img src=x onerror="window.harmed=1">',
    "<!--",
    "<script>window.harmed=1</script>",
    "]]>",
    "{{7*7}}",
    "&amp;",
    "\u202eabc",
    "שלום",
    "\u200b",
    "👩‍👩‍👧",
    "a\u2028b\x00\x1b[31m",
    "\ud800",
    "x" * 300,
]
HOSTILE_TYPE = '</script><b onclick="window.harmed=1">\u202e$x$' + "y" * 80


def hostile_sentences() -> list[dict[str, Any]]:
    size = len(HOSTILE_WORDS)
    gold = [[k, k + 1, HOSTILE_TYPE] for k in range(size)]
    predicted = [[k, k + 1, HOSTILE_TYPE, None] for k in range(size)]
    of = sentence("", gold, predicted, [[k, k, "correct"] for k in range(size - 1)])
    of["words"] = HOSTILE_WORDS
    of["matches"].append([size - 1, -1, "missed"])
    of["matches"].append([-1, size - 1, "spurious"])
    return [of]


def write(path: Path, *splits: list[dict[str, Any]], **more: Any) -> Path:
    splits = splits or (example_sentences(),)
    names = ("validation", "test")
    evaluations = {n: (analysis_of(of), of) for n, of in zip(names, splits, strict=False)}
    write_report(path, **{"title": "A report", "evaluations": evaluations, **more})
    return path


@pytest.fixture
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib: charts take a while."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages that the tests look at."""
    folder = tmp_path_factory.mktemp("pages")
    compared = copy.deepcopy(example_sentences())
    for of in compared:
        of["other"] = of["predicted"]
    compared[0]["other"] = []  # helped: the other model misses it
    compared[-1]["other"] = []  # hurt: the other model has no spurious entity
    hostile = hostile_sentences()
    evaluations = {HOSTILE_TYPE: (analysis_of(hostile, (HOSTILE_TYPE,)), hostile)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # charts take a while
        two = write(folder / "two.html", example_sentences(), [right()] * 3)
    return {
        "two": two,
        "run": write(folder / "run.html", facts=FACTS, events=example_events()),
        "compared": write(folder / "compared.html", compared, comparison=example_comparison()),
        "hostile": write(
            folder / "hostile.html",
            title=HOSTILE_TYPE,
            facts=[(HOSTILE_TYPE, HOSTILE_TYPE * 2)],
            evaluations=evaluations,
        ),
    }


# --- The file ---


class _Outline(HTMLParser):
    """Checks that elements are closed in order; gathers ids, references and data."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.content: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("style", "src"), (tag, value)
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "xlink:href") and value:
                (self.references.add(value[1:]) if value[0] == "#" else self.sources.append(value))
            if name in ("aria-labelledby", "aria-describedby", "for"):
                self.references |= set((value or "").split())

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.content.setdefault(self.open[-1], []).append(data)


@pytest.mark.parametrize("name", ["run", "two", "compared", "hostile"])
def test_the_page_is_whole_and_needs_nothing_else(pages: dict[str, Path], name: str) -> None:
    text = pages[name].read_text(encoding="utf-8")
    outline = _Outline(text)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.references <= {*outline.ids}
    assert [source[:5] for source in outline.sources] == ["data:"], "the icon"
    assert not re.search(r"@import|url\(\s*[^#]", "".join(outline.content["style"]))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    assert "default-src &#39;none&#39;" in policy[1]
    for element, content in (
        ("style", outline.content["style"][0]),
        ("script", outline.content["script"][1]),
    ):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{element}-src &#39;sha256-{digest}&#39;" in policy[1]


def sentences_of(path: Path, split: int = 0) -> list[list[Any]]:
    """The sentences that a page holds."""
    content = _Outline(path.read_text(encoding="utf-8")).content["script"][0]
    return list(json.loads(content)["splits"][split]["sentences"])


def test_the_sentences_are_in_the_page(pages: dict[str, Path]) -> None:
    kept = sentences_of(pages["run"])
    assert [of[0] for of in kept] == list(range(1, 51))
    error = example_sentences()[5]
    assert kept[5] == [
        *(6, 1, 0, error["words"], [[1, 4, 2]], [[1, 2, 2, 0.4], [3, 4, 0, 0.6]]),
        [[0, 0, 2], [-1, 1, 5]],
    ]
    assert sentences_of(pages["hostile"])[0][3] == HOSTILE_WORDS


@pytest.mark.usefixtures("without_charts")
def test_too_many_sentences_are_left_out_those_without_errors_first(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html", max_sentence_bytes=1000)
    numbers = [of[0] for of in sentences_of(page)]
    assert set(numbers) > {5, 6, 7, 49, 50}, "those with errors"
    assert numbers == sorted(numbers)
    assert numbers[:4] == [1, 2, 3, 4]
    assert len(numbers) < 50
    assert f"{len(numbers)} of the 50 sentences" in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_charts")
def test_splits_share_the_room(tmp_path: Path) -> None:
    """What a small one leaves is for the next."""
    many = example_sentences()
    page = write(tmp_path / "page.html", [right()], many, max_sentence_bytes=2000)
    alone = write(tmp_path / "alone.html", many, max_sentence_bytes=2000)
    assert len(sentences_of(page)) == 1
    assert len(sentences_of(page, 1)) == len(sentences_of(alone)) - 1
    page = write(tmp_path / "page.html", many, many, max_sentence_bytes=2000)
    assert len(sentences_of(page, 1)) == pytest.approx(len(sentences_of(page)), abs=1)


@pytest.mark.usefixtures("without_charts")
def test_the_same_run_gives_the_same_bytes(pages: dict[str, Path], tmp_path: Path) -> None:
    again = write(tmp_path / "two.html", example_sentences(), [right()] * 3)
    assert again.read_bytes() == pages["two"].read_bytes()


@pytest.mark.usefixtures("without_charts")
def test_without_matplotlib_there_are_tables(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    page = write(tmp_path / "page.html", events=example_events())
    assert "pip install 'bertner[report]'" in caplog.text
    text = page.read_text(encoding="utf-8")
    assert "pip install 'bertner[report]'" in text
    outline = _Outline(text)
    assert "svg" not in outline.tags
    assert "Numbers of this chart" not in text
    # Curves of training, figures of an evaluation, and the levels.
    assert outline.tags.count("table") == 4 + 7 + 2


def test_with_matplotlib_there_are_charts(pages: dict[str, Path]) -> None:
    text = pages["run"].read_text(encoding="utf-8")
    assert "pip install" not in text
    tags = _Outline(text).tags
    assert tags.count("svg") == tags.count("desc") == tags.count("figure") == 4 + 7
    assert tags.count("table") == 4 + 7 + 2


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    """No model, no training data, no confidences, no run, no entities at all."""
    sentences = [sentence("Nothing here .", [], [], [])]
    analysis = analysis_of(sentences, ())
    del analysis["loss"], analysis["levels"]["subword"]
    analysis.update(by_training=None, reliability=None, model=None)
    write_report(tmp_path / "a.html", title="a", evaluations={"test": (analysis, sentences)})
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "Confidence</h2>" not in text
    assert "Training</h2>" not in text
    write_report(tmp_path / "b.html", title="b", evaluations={}, events=example_events())
    text = (tmp_path / "b.html").read_text(encoding="utf-8")
    assert "Training</h2>" in text
    assert "Sentences</h2>" not in text
    for page in ("a.html", "b.html"):
        outline = _Outline((tmp_path / page).read_text(encoding="utf-8"))
        assert outline.references <= {*outline.ids}


@pytest.mark.usefixtures("without_charts")
def test_a_disk_that_fails(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        write(tmp_path / "no-such-folder" / "page.html")


# --- The page in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium or Chrome is installed to look at the page with")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        # No sandbox: it cannot be had by root, and these are our own pages.
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Opens a page; when all is done, nothing may have gone wrong in it, nor been asked for."""
    trouble: list[str] = []
    contexts = []

    def open_page(name: str, anchor: str = "", width: int = 1200, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        address = pages[name].as_uri()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((address, "data:image/svg+xml"))
                else trouble.append(request.url)
            ),
        )
        page.goto(address + anchor)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


def shown(page: Any) -> list[int]:
    """Numbers of the sentences on the page of the list."""
    return [
        int(n)
        for n in page.eval_on_selector_all("article", "all => all.map(a => a.dataset.number)")
    ]


def status(page: Any) -> str:
    return str(page.inner_text("#status"))


def chip(page: Any, group: str, name: str) -> Any:
    return page.locator(f"#filter-{group} label", has=page.get_by_text(name, exact=True))


def test_sentences_with_errors_are_shown_first(visit: Callable[..., Any]) -> None:
    page = visit("run")
    assert shown(page) == [5, 6, 7, 49, 50]
    assert status(page) == "5 of 50 sentences, with 6 matching entities; page 1 of 1."
    assert page.get_attribute("#status", "aria-live") == "polite"
    assert page.is_hidden("#paging")
    card = page.locator("#sentence-6")
    assert card.locator(".text").inner_text().split() == ["the", "Bank", "of", "Rome"]
    assert "line 1 · document 1 · 2 errors" in card.inner_text()
    matches = card.locator("li").all_inner_texts()
    assert matches == [
        "boundary gold ORG Bank of Rome, predicted ORG Bank, confidence 0.40",
        "spurious predicted LOC Rome, confidence 0.60",
    ]
    marks = card.locator(".bar.filled").evaluate_all(
        "all => all.map(bar => [bar.className.replace(/type-\\\\d/, ''), bar.dataset.label])"
    )
    assert [label for _, label in marks if label] == ["ORG", "ORG", "LOC"]
    assert all("wrong" in classes for classes, _ in marks)


def test_filters_by_kind_and_type(visit: Callable[..., Any]) -> None:
    page = visit("run")
    chip(page, "kind", "spurious").click()  # off: the other kinds of errors stay
    assert shown(page) == [5, 6, 7, 49]
    page.click("#everything")
    assert len(shown(page)) == 20
    assert status(page) == "50 of 50 sentences; page 1 of 3."
    chip(page, "kind", "boundary and type").click()
    assert shown(page) == [7]
    chip(page, "kind", "missed").click()
    assert shown(page) == [7, 49]
    chip(page, "type", "PER").click()  # gold or predicted
    assert shown(page) == [7]
    counts = page.locator("#filter-kind .count").all_inner_texts()
    assert counts == ["1", "0", "0", "1", "0", "0"], "of type PER, whichever kinds are chosen"
    chip(page, "kind", "correct").click()
    assert shown(page) == [5, 7]
    page.click("#only-errors")
    assert shown(page) == [5, 6, 7, 49, 50]
    assert not page.is_checked("#filter-type input >> nth=3")


def test_filters_by_confidence(visit: Callable[..., Any]) -> None:
    page = visit("run")
    page.fill("#filter-low", "0.6")
    assert shown(page) == [5, 6, 50], "one that was missed has none"
    page.fill("#filter-high", "0.9")
    assert shown(page) == [6, 50]
    page.fill("#filter-low", "")
    assert shown(page) == [6, 7, 50]
    page.fill("#filter-high", "1")
    assert shown(page) == [5, 6, 7, 49, 50]


def test_orders(visit: Callable[..., Any]) -> None:
    page = visit("run")
    page.select_option("#filter-order", "sure")
    assert shown(page) == [5, 50, 6, 7, 49]
    page.select_option("#filter-order", "errors")
    assert shown(page) == [6, 5, 7, 49, 50]
    page.select_option("#filter-order", "unsure")
    assert shown(page) == [7, 6, 50, 5, 49]


def test_search(visit: Callable[..., Any]) -> None:
    page = visit("run")
    page.fill("#filter-text", "  k OF  rome ")
    assert shown(page) == [6]
    assert page.locator("mark").all_inner_texts() == ["Bank", "of", "Rome"]
    page.fill("#filter-text", "no such words")
    assert shown(page) == []
    assert status(page) == "No sentence passes these filters."
    page.click("#everything")
    assert page.input_value("#filter-text") == ""
    assert len(shown(page)) == 20


def test_numbers_in_tables_lead_to_their_sentences(visit: Callable[..., Any]) -> None:
    page = visit("run")
    links = page.locator("#split-1-errors-figure a.filter")
    for k in range(links.count()):
        link = links.nth(k)
        number = int(link.inner_text())
        link.click()
        assert f"with {number} matching entit" in status(page)
    page.click('a.filter[data-gold="2"][data-predicted="0"]')
    assert shown(page) == [5]
    assert page.inner_text("#pair") == "Gold ORG, predicted LOC ✕"
    assert page.evaluate("location.hash") == "#sentences"
    page.click("#pair")
    assert len(shown(page)) == 20
    page.click('a.filter[data-gold="1"][data-predicted="-1"]')
    assert page.inner_text("#pair") == "Gold MISC, predicted none ✕"
    assert shown(page) == [49]


def test_paging(visit: Callable[..., Any]) -> None:
    page = visit("run")
    page.click("#everything")
    assert page.is_disabled("#previous")
    page.click("#next")
    assert shown(page) == list(range(21, 41))
    page.click("#next")
    assert shown(page) == list(range(41, 51))
    assert page.is_disabled("#next")
    assert "page 3 of 3" in status(page)
    chip(page, "kind", "correct").click()
    assert shown(page)[0] == 1, "another filter begins at the first page"


def current(page: Any) -> int:
    """The number of the sentence that has the focus and is marked."""
    number = page.evaluate("document.activeElement.dataset.number")
    assert page.eval_on_selector_all(".current", "all => all.map(a => a.dataset.number)") == [
        number
    ]
    return int(number)


def test_keys(visit: Callable[..., Any]) -> None:
    page = visit("run")
    press = page.keyboard.press
    press("j")
    assert current(page) == 5
    press("j")
    assert current(page) == 6
    press("k")
    press("k")
    assert current(page) == 5
    press("a")
    assert len(shown(page)) == 20
    press("n")
    assert shown(page)[0] == 21
    press("j")
    assert current(page) == 21
    press("k")
    assert current(page) == 20, "over the border of pages"
    press("n")
    press("p")
    press("p")
    assert shown(page)[0] == 1, "there is none before"
    press("/")
    assert page.evaluate("document.activeElement.id") == "filter-text"
    page.keyboard.type("ja")
    assert page.input_value("#filter-text") == "ja", "letters are letters there"
    press("Escape")
    assert page.evaluate("document.activeElement.id") != "filter-text"
    press("e")
    assert shown(page) == [5, 6, 7, 49, 50]
    press("Control+a")
    assert shown(page) == [5, 6, 7, 49, 50]
    press("?")
    assert page.is_visible("#keys dl")
    page.uncheck("#keys-on")
    press("a")
    assert len(shown(page)) == 5, "switched off"


def test_all_that_can_be_used_has_a_name_and_is_reached_by_tab(visit: Callable[..., Any]) -> None:
    page = visit("compared")
    nameless = page.eval_on_selector_all(
        "input, select, button:not([hidden]), a, summary, [role=region], article, svg",
        """all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || e.labels?.length
            || e.ariaLabelledByElements?.length)).map(e => e.outerHTML)""",
    )
    assert nameless == []
    reached = page.evaluate(
        """[...document.querySelectorAll("*")]
            .filter(e => e.tabIndex >= 0 && e.checkVisibility()).map(e => e.id || e.value)"""
    )
    controls = {"theme", "filter-text", "filter-low", "filter-high", "filter-models"}
    assert set(reached) > controls | {"filter-order", "only-errors", "everything", "0", "5"}
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"


@pytest.mark.parametrize("where", ["address", "link"])
def test_deep_links(visit: Callable[..., Any], where: str) -> None:
    if where == "address":
        page = visit("run", "#sentence-30")
    else:
        page = visit("run")
        page.evaluate("location.hash = '#sentence-30'")
        page.wait_for_selector("#sentence-30")
    assert current(page) == 30
    assert shown(page) == list(range(21, 41)), "filters that would hide it are gone"
    top = page.eval_on_selector("#sentence-30", "a => a.getBoundingClientRect().top")
    assert 0 <= top < 800
    page.evaluate("location.hash = '#sentence-31'")
    page.wait_for_function("document.activeElement.id == 'sentence-31'")
    page.evaluate("location.hash = '#sentence-99'")
    page.wait_for_function("document.getElementById('status').textContent.includes('not on')")
    assert status(page) == "Sentence 99 is not on this page."


def test_one_split_is_shown_at_a_time(visit: Callable[..., Any]) -> None:
    page = visit("two")
    assert page.is_visible("#split-1-scores")
    assert page.is_hidden("#split-2-scores")
    assert "of 50 sentences (validation)" in status(page)
    page.click("#splits label >> nth=1")
    assert page.is_hidden("#split-1-scores")
    assert page.is_visible("#split-2-scores")
    assert shown(page) == []
    page.click("#everything")
    assert status(page) == "3 of 3 sentences (test); page 1 of 1."
    page.evaluate("location.hash = '#split-1-errors'")
    page.wait_for_selector("#split-1-errors")
    assert page.is_checked("input[value=split-1]")
    page.evaluate("location.hash = '#split-2-sentence-3'")
    page.wait_for_selector("#split-2-sentence-3")
    assert page.is_checked("input[value=split-2]")
    assert current(page) == 3
    assert page.get_attribute("#split-2-sentence-3 h3 a", "href") == "#split-2-sentence-3"
    page = visit("two", "#split-2-sentence-2")
    assert current(page) == 2


@pytest.mark.usefixtures("without_charts")
def test_a_run_without_evaluation(
    visit: Callable[..., Any], pages: dict[str, Path], tmp_path: Path
) -> None:
    pages["bare"] = write(tmp_path / "bare.html", evaluations={}, events=example_events())
    page = visit("bare")
    assert page.inner_text("#theme") == "Dark colours"
    assert page.locator("h2").all_inner_texts() == ["Training"]


def test_where_two_models_differ(visit: Callable[..., Any]) -> None:
    page = visit("compared")
    assert "Comparison with another" in page.inner_text("#comparison h2")
    page.click("#everything")
    page.select_option("#filter-models", "differ")
    assert shown(page) == [1, 50]
    page.select_option("#filter-models", "helped")
    assert shown(page) == [1]
    assert "helped" in page.inner_text("#sentence-1 .where")
    page.select_option("#filter-models", "hurt")
    assert shown(page) == [50]
    page.select_option("#filter-models", "")
    assert page.locator("#sentence-2 .bar.other.filled").count() == 1
    assert page.locator("#sentence-1 .bar.other.filled").count() == 0


# A function of the page: the contrast of every text that is seen.
CONTRASTS = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "compared"])
def test_text_stands_out(visit: Callable[..., Any], name: str, scheme: str) -> None:
    page = visit(name, scheme=scheme)
    page.click("#everything")
    contrasts = page.evaluate(CONTRASTS)
    assert [faint for faint in contrasts if faint[0] < 4.5] == []
    texts = {text for _, text, _ in contrasts}
    # Of prose, a mark, a cell of a heat map, an axis, a tile, and the number of a sentence.
    assert texts > {"correct", "LOC", "46", "score", "0.2500", "12"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_labels_of_all_hues_can_be_read(visit: Callable[..., Any], scheme: str) -> None:
    page = visit("run", scheme=scheme)
    page.evaluate(
        """() => {
          for (let hue = 0; hue < 360; hue += 5) {
            const bar = document.createElement("i");
            bar.className = "bar filled type-0";
            bar.dataset.label = "any";
            bar.style.setProperty("--hue", hue);
            document.querySelector("main").append(bar);
          }
        }"""
    )
    ratios = [ratio for ratio, text, _ in page.evaluate(CONTRASTS) if text == "any"]
    assert len(ratios) == 72
    assert min(ratios) >= 4.5


def test_colours_follow_the_system_and_the_button(visit: Callable[..., Any]) -> None:
    colours = """() => ["body", "h1", "svg text", ".bar.filled"].map((name) => {
      const { backgroundColor, color, fill } = getComputedStyle(document.querySelector(name));
      return [backgroundColor, color, fill];
    })"""
    light, dark = visit("run"), visit("run", scheme="dark")
    assert light.evaluate(colours) != dark.evaluate(colours)
    assert light.inner_text("#theme") == "Dark colours"
    assert dark.inner_text("#theme") == "Light colours"
    light.click("#theme")
    assert light.evaluate(colours) == dark.evaluate(colours)
    assert light.inner_text("#theme") == "Light colours"
    light.click("#theme")
    dark.click("#theme")
    assert light.evaluate(colours) == dark.evaluate(colours)
    dark.emulate_media(media="print")
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.parametrize("name", ["run", "two", "compared", "hostile"])
def test_a_narrow_window_is_enough(visit: Callable[..., Any], name: str) -> None:
    page = visit(name, width=400)
    page.click("#everything")
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    letters = page.eval_on_selector_all(
        "svg.chart:not(.wide)",
        "all => all.map(s => 12 * s.getBoundingClientRect().width / s.viewBox.baseVal.width)",
    )
    assert all(size > 10 for size in letters), "pixels"


def test_a_hostile_corpus_does_no_harm(visit: Callable[..., Any]) -> None:
    page = visit("hostile")
    page.click("#everything")
    assert page.evaluate("window.harmed") is None
    assert page.evaluate("document.images.length") == 0
    assert page.evaluate("document.scripts.length") == 2
    cells = page.locator(".token").all_inner_texts()
    assert cells[:6] == HOSTILE_WORDS[:6]
    assert cells[6:9] == ["U+202Eabc", "שלום", "U+200B"]
    assert cells[9] == HOSTILE_WORDS[9]
    assert cells[10] == "aU+2028bU+0000U+001B[31m"
    assert cells[12] == HOSTILE_WORDS[12]
    assert page.title().startswith("</script><b onclick")
    # A word of another direction does not move its neighbours.
    boxes = page.locator(".word").evaluate_all("all => all.map(w => [w.offsetTop, w.offsetLeft])")
    assert boxes == sorted(boxes)


@pytest.mark.usefixtures("without_charts")
def test_a_sentence_from_right_to_left(
    visit: Callable[..., Any], pages: dict[str, Path], tmp_path: Path
) -> None:
    hebrew = sentence(
        "אנגלה מרקל ביקרה", [[0, 2, "PER"]], [[0, 2, "PER", 0.9]], [[0, 0, "correct"]]
    )
    pages["hebrew"] = write(tmp_path / "hebrew.html", [hebrew])
    page = visit("hebrew", "#sentence-1")
    lefts = page.locator(".word").evaluate_all("all => all.map(w => w.offsetLeft)")
    assert lefts == sorted(lefts, reverse=True)


@pytest.mark.usefixtures("without_charts")
def test_thousands_of_sentences_are_quick_to_filter(
    visit: Callable[..., Any], pages: dict[str, Path], tmp_path: Path
) -> None:
    """No more of them is in the document than is shown."""
    pages["long"] = write(tmp_path / "long.html", example_sentences() * 100)
    page = visit("long")
    page.click("#everything")
    assert "5,000 of 5,000 sentences; page 1 of 250" in status(page)
    assert page.evaluate("document.querySelectorAll('*').length") < 4000
    page.fill("#filter-text", "Trafford")
    assert len(shown(page)) == 20
    assert "100 of 5,000" in status(page)


def test_types_stand_in_one_order(pages: dict[str, Path]) -> None:
    """The hues are those of the terminal: types by name."""
    text = pages["run"].read_text(encoding="utf-8")
    assert f'"types":{json.dumps(list(TYPES), separators=(",", ":"))}' in text
    assert [float(h) for h in re.findall(r"--hue: ([\d.]+)", text)] == [210.0, 347.5, 125.0, 262.5]
