from __future__ import annotations

import sys
from typing import Any

import pytest

from bertner import figures
from bertner.figures import (
    Figure,
    Link,
    comparison_figure,
    evaluation_figures,
    format_p,
    level_table,
    level_type_table,
    training_figures,
)
from tests.reports import (
    TYPES,
    analysis_of,
    example_comparison,
    example_events,
    example_sentences,
    score,
)


@pytest.fixture(autouse=True)
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib: what is of interest here is which numbers are shown."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def example() -> dict[str, Figure]:
    return evaluation_figures("test", analysis_of(example_sentences()), TYPES)


def text_of(cell: str | Link) -> str:
    return cell if isinstance(cell, str) else cell.text


def texts(figure: Figure) -> list[list[str]]:
    return [[text_of(cell) for cell in row] for row in figure.table.rows]


def test_figures_have_ids_of_their_own(example: dict[str, Figure]) -> None:
    names = [figure.name for figure in example.values()]
    assert len(set(names)) == 7
    assert all(name.startswith("test-") for name in names)
    assert [figure.svg for figure in example.values()] == [None] * 7


def test_scores(example: dict[str, Figure]) -> None:
    assert texts(example["scores"])[0] == [
        *("all", "0.9126 (0.6000 to 0.9000)", "0.9038 (0.6000 to 0.9000)"),
        *("0.9216 (0.6000 to 0.9000)", "47", "52", "51"),
    ]
    assert [row[0] for row in texts(example["scores"])] == ["all", *TYPES]


def test_confusions_lead_to_their_sentences(example: dict[str, Figure]) -> None:
    table = example["confusion"].table
    assert list(table.header) == ["gold \\ predicted", *TYPES, "none"]
    assert texts(example["confusion"]) == [
        ["LOC", "46", "0", "0", "1", "0"],
        ["MISC", "0", "0", "0", "0", "1"],
        ["ORG", "1", "0", "1", "0", "0"],
        ["PER", "0", "0", "0", "1", "0"],
        ["none", "1", "1", "0", "0", ""],
    ]
    assert table.rows[0][4] == Link("1", gold=0, predicted=3)
    assert table.rows[1][5] == Link("1", gold=1, predicted=-1)
    assert table.rows[4][1] == Link("1", gold=-1, predicted=0)


def test_errors_lead_to_their_sentences(example: dict[str, Figure]) -> None:
    table = example["errors"].table
    header = ["entity", "type", "boundary", "boundary and type", "missed", "spurious", "all"]
    assert list(table.header) == header
    assert texts(example["errors"]) == [
        ["LOC", "0", "0", "1", "0", "1", "2"],
        ["MISC", "0", "0", "0", "1", "1", "2"],
        ["ORG", "1", "1", "0", "0", "0", "2"],
        ["PER", "0", "0", "0", "0", "0", "0"],
    ]
    assert table.rows[0][3] == Link("1", kind="boundary and type", gold=0)
    assert table.rows[1][5] == Link("1", kind="spurious", predicted=1), "by the predicted type"


def test_links_count_by_the_types_of_the_page() -> None:
    analysis = analysis_of(example_sentences())
    linked = evaluation_figures("a", analysis, ("AAA", *TYPES))
    assert linked["confusion"].table.rows[0][4] == Link("1", gold=1, predicted=4)
    assert linked["errors"].table.rows[0][3] == Link("1", kind="boundary and type", gold=1)


def test_what_is_not_known_has_no_figure() -> None:
    analysis = {**analysis_of(example_sentences()), "by_training": None, "reliability": None}
    names = list(evaluation_figures("a", analysis, TYPES))
    assert names == ["scores", "confusion", "errors", "muc", "by_length"]


def test_lengths_ways_and_bins_by_name(example: dict[str, Figure]) -> None:
    lengths = [row[0] for row in texts(example["by_length"])]
    assert lengths == ["1 word", "2 words", "3 words", "4+ words"]
    assert [row[0] for row in texts(example["muc"])] == ["strict", "exact", "partial", "type"]
    assert [row[0] for row in texts(example["by_training"])] == ["seen", "other type", "unseen"]
    bins = texts(example["reliability"])
    assert bins[1][:4] == ["0.50 to 1.00", "8", "0.9000", "0.7500"]


def test_levels() -> None:
    analysis = analysis_of(example_sentences())
    names = ["word", "word, strict", "single words", "subword"]
    assert [row[0] for row in level_table(analysis).rows] == names
    assert len(level_type_table(analysis).rows) == 3 * 5
    del analysis["levels"]["subword"]
    assert [row[0] for row in level_table(analysis).rows] == names[:3]


def many_types(size: int) -> dict[str, Any]:
    """An analysis of very many types, of which the later are the more frequent."""
    types = [f"T{k:03}" for k in range(size)]
    counts = [[0] * (size + 1) for _ in range(size + 1)]
    for k in range(size):
        counts[k][k] = k
        counts[k][0] += 1
    per_type = {t: score(k, k + 1, k + 1) for k, t in enumerate(types)}
    analysis = analysis_of(example_sentences())
    analysis["errors"]["per_type"] = {}
    analysis["confusion"] = {"types": types, "counts": counts}
    analysis["levels"]["word"] = {**analysis["levels"]["word"], "per_type": per_type}
    return analysis


def test_rare_ones_of_very_many_types_are_put_together() -> None:
    analysis = many_types(100)
    types = analysis["confusion"]["types"]
    example = evaluation_figures("a", analysis, types)
    table = example["confusion"].table
    assert len(table.header) == 1 + 24 + 2
    assert "76 other types" in table.header
    total = sum(map(sum, analysis["confusion"]["counts"]))
    shown = sum(int(text_of(c).replace(",", "")) for row in table.rows for c in row[1:] if c != "")
    assert shown == total
    assert table.rows[0][1] == Link("76", gold=76, predicted=76)
    by_name = {row[0]: row for row in table.rows}
    assert all(isinstance(cell, str) for cell in by_name["76 other types"])
    assert len(example["scores"].table.rows) == 101


def test_curves() -> None:
    found = {figure.title: figure for figure in training_figures(example_events())}
    assert list(found) == [
        *("Loss", "Scores on the validation data", "Learning rate", "Throughput"),
    ]
    loss = texts(found["Loss"])
    assert list(found["Loss"].table.header) == ["step", "training", "validation"]
    assert loss[0] == ["1", "1", ""]
    assert loss[9] == ["10", "0.1", "0.5"]
    assert len(loss) == 20
    assert list(found["Scores on the validation data"].table.header)[1:] == ["F1", "F1 (subword)"]


def test_long_curves_are_means() -> None:
    events = [{"event": "log", "step": k, "loss": float(k)} for k in range(1, 1001)]
    (loss,) = training_figures(events)
    assert len(loss.table.rows) == 200
    assert texts(loss)[0] == ["5", "3"]
    assert texts(loss)[-1] == ["1,000", "998"]


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), True, "1.0", [1]])
def test_values_that_are_no_numbers_are_left_out(value: object) -> None:
    good = [{"event": "log", "step": k, "loss": 1.0} for k in (1, 3)]
    bad = [{"event": "log", "step": 2, "loss": value}, {"event": "log", "step": value, "loss": 1.0}]
    (loss,) = training_figures([good[0], *bad, good[1], {"event": "log"}, {}])
    assert [row[0] for row in texts(loss)] == ["1", "3"]


def test_no_run_has_no_curves() -> None:
    assert training_figures([]) == []


def test_comparison() -> None:
    figure = comparison_figure("a", example_comparison())
    assert "F1" in figure.title
    assert texts(figure)[0] == ["all", "+0.0100", "−0.0050 to +0.0200", "0.2000"]
    assert len(figure.table.rows) == 5


def test_p_values() -> None:
    assert format_p(0.05) == "= 0.0500"
    assert format_p(0.0) == "< 0.0001"


def test_kinds_in_the_order_of_their_colours() -> None:
    assert list(figures.KINDS) == [
        *("correct", "type", "boundary", "boundary and type", "missed", "spurious"),
    ]
