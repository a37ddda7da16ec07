from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from bertner import charts

pytest.importorskip("matplotlib")

HOSTILE = '<script>"$x_1$ & \x00\ufffe\u202eabc'


def draw_all(name: str, label: str) -> dict[str, str]:
    """A chart of each kind, in which a label comes from elsewhere."""
    names = (name, "a title", "a description")
    marks = charts.Marks("F1", [0.5, 0.75], [(0.4, 0.6), None])
    bins = [{"low": 0.5, "high": 1.0, "count": 8, "confidence": 0.9, "precision": 0.75}]
    line = charts.Line(label, [1, 2, 3], [0.5, 0.4, 0.3])
    return {
        "line": charts.line_chart(*names, [line], x_label="step", y_label="loss"),
        "interval": charts.interval_chart(*names, [label, "b"], [marks] * 3, x_label="score"),
        "bars": charts.stacked_bars(
            *(*names, [label, "b"], {"missed": [1, 2], "d": [3, 0]}, ["kind-1", "kind-2"]),
            x_label="errors",
        ),
        "heat": charts.heat_map(*names, [label, "none"], [[5, 1234567], [1, 0]]),
        "reliability": charts.reliability_diagram(*names, bins),
    }


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return draw_all("name", HOSTILE)


@pytest.fixture(scope="module")
def drawn_beside() -> dict[str, str]:
    return draw_all("other", HOSTILE)


@pytest.mark.parametrize("kind", ["line", "interval", "bars", "heat", "reliability"])
def test_a_chart_can_stand_in_a_page(
    drawn: dict[str, str], drawn_beside: dict[str, str], kind: str
) -> None:
    root = ElementTree.fromstring(drawn[kind])
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "name-title name-description"
    assert (root[0].tag, root[0].text) == ("title", "a title")
    assert (root[1].tag, root[1].text) == ("desc", "a description")
    elements = list(root.iter())
    assert all("{" not in element.tag and "style" not in element.attrib for element in elements)
    assert not any(element.tag in ("style", "script", "metadata", "image") for element in elements)
    # Every colour is a variable of the page's style sheet, and one that it knows.
    paints = {
        element.attrib[key]
        for element in elements
        for key in ("fill", "stroke")
        if key in element.attrib
    }
    assert paints - {"none"}
    assert paints - {"none"} <= {f"var(--{name})" for name in charts.COLOURS}
    assert "http" not in drawn[kind]
    # What is referred to is there, under an id that no other chart of the page has.
    ids = {element.attrib["id"] for element in elements if "id" in element.attrib}
    references = set(re.findall(r'(?:url\(|href=")#([\w-]+)', drawn[kind]))
    assert references <= ids
    other = set(re.findall(r'id="([^"]+)"', drawn_beside[kind]))
    assert not ids & other


def test_labels_are_text_and_harmless(drawn: dict[str, str]) -> None:
    for kind in ("interval", "bars", "heat"):
        texts = [t.text for t in ElementTree.fromstring(drawn[kind]).iter("text")]
        assert '<script>"$x_1$ & ���a…' in texts, texts


def test_the_same_numbers_give_the_same_bytes(drawn: dict[str, str]) -> None:
    assert draw_all("name", HOSTILE) == drawn


def texts_of(svg: str) -> list[str]:
    return [str(text.text) for text in ElementTree.fromstring(svg).iter("text")]


def test_what_charts_show(drawn: dict[str, str]) -> None:
    assert {"4", "2"} <= set(texts_of(drawn["bars"])), "sums stand at the ends of bars"
    assert {"5", "1", "1235k", "gold", "predicted"} <= set(texts_of(drawn["heat"]))
    assert "0" not in texts_of(drawn["heat"]), "nothing is empty"
    assert {"confidence", "share correct", "entities"} <= set(texts_of(drawn["reliability"]))


def positions(svg: str, colour: str) -> list[tuple[float, float]]:
    """Where a series has its marks, from the left and from above."""
    uses = ElementTree.fromstring(svg).iter("use")
    marks = [use.attrib for use in uses if use.attrib.get("fill") == f"var(--{colour})"]
    return [(float(mark["x"]), float(mark["y"])) for mark in marks]


def test_marks_stand_where_their_values_are() -> None:
    marks = charts.Marks("a", [0.2, 0.9, 0.5])
    svg = charts.interval_chart("n", "t", "d", ["1", "2", "3"], [marks], x_label="x")
    (x1, y1), (x2, y2), (x3, y3) = positions(svg, "series-0")
    assert y1 < y2 < y3
    assert (x3 - x1) / (x2 - x1) == pytest.approx(3 / 7, abs=0.01)


def test_differences_are_drawn_around_zero() -> None:
    marks = charts.Marks("a", [-0.02, 0.0], [(-0.03, 0.01), (-0.01, 0.01)])
    svg = charts.interval_chart("n", "t", "d", ["1", "2"], [marks], x_label="x", zero=True)
    assert "0.00" in texts_of(svg)
    (x1, _), (x2, _) = positions(svg, "series-0")
    assert x1 < x2


@pytest.mark.parametrize(
    ("values", "label"), [([2e-5, 1e-5], "rate (1e-5)"), ([0.5, 0.0], "rate"), ([0.0], "rate")]
)
def test_the_power_of_small_values_stands_beside_the_axis(values: list[float], label: str) -> None:
    lines = [charts.Line("rate", [10 * k for k in range(len(values))], values)]
    assert label in texts_of(charts.line_chart("n", "t", "d", lines, x_label="x", y_label="rate"))


@pytest.mark.parametrize("size", [2, 30])
def test_a_heat_map_grows_with_its_types(size: int) -> None:
    counts = [[int(i == j) for j in range(size)] for i in range(size)]
    svg = charts.heat_map("n", "t", "d", ["type"] * size, counts)
    classes = ElementTree.fromstring(svg).attrib["class"].split()
    assert ("wide" in classes) == (size == 30)


def test_wilson_intervals() -> None:
    # Brown, Cai, DasGupta (2001): 95 % of 10 out of 20, and the ends of shares of 0 and 1.
    low, high = charts.wilson_interval(0.5, 20)
    assert (low, high) == (pytest.approx(0.299, abs=1e-3), pytest.approx(0.701, abs=1e-3))
    assert charts.wilson_interval(0.0, 10)[0] == 0.0
    assert charts.wilson_interval(1.0, 10)[1] == 1.0
    assert charts.wilson_interval(0.0, 0) == (0.0, 1.0)
