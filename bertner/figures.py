"""The figures of a report: from the numbers of an evaluation or a run to charts and their tables.

Every chart has a table of the very numbers that it shows, for those who do not see it, and in its
place where there is no matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bertner import charts
from bertner.errors import visible

# How a gold and a predicted entity can stand to each other, and what that means.
KINDS = {
    "correct": "the words and the type are right",
    "type": "the words are right, the type is wrong",
    "boundary": "the type is right; the words overlap, but the entity begins or ends elsewhere",
    "boundary and type": "the words overlap only in part, and the type is wrong",
    "missed": "a gold entity that overlaps no prediction, or only one that fits another better",
    "spurious": "a prediction that overlaps no gold entity, or only one that another fits better",
}

LEVELS = {
    "word": (
        "word",
        "Each word is decided once. The rule of CoNLL-2003's conlleval, and what papers report.",
    ),
    "word_strict": (
        "word, strict",
        "The same words, but an entity counts only if its tags keep to the tag scheme: no I- "
        "without its B-. The strict mode of seqeval.",
    ),
    "tokens": (
        "single words",
        "Each word's tag counts by itself, so that an entity found in part is right in part.",
    ),
    "subword": (
        "subword",
        "Each wordpiece that carries a label is decided by itself, as in model cards made by the "
        "Hugging Face Trainer. Not to be compared with the word level.",
    ),
}

MUC = {
    "strict": "words and type are right",
    "exact": "the words are right, whatever the type",
    "partial": "the words are right, whatever the type; where they only overlap, it counts half",
    "type": "the type is right, and at least one word",
}

TRAINING = {
    "seen": "these words are an entity of this type in the training data",
    "other type": "these words are an entity in the training data, but only of another type",
    "unseen": "these words are no entity in the training data",
}

ALL, NONE = "all", "none"

_MAX_TYPES = 24  # in a chart: the most frequent ones
_MAX_POINTS = 200  # of a curve
_SHARES = {"F1": "f1", "precision": "precision", "recall": "recall"}
_COUNTS = ("num_correct", "num_predicted", "num_gold")
_SCORE_HEADER = ("F1", "precision", "recall", "correct", "predicted", "gold")


@dataclass(frozen=True)
class Link:
    """A number that leads to the sentences in which it was counted.

    Attributes:
        text: The number.
        kind: Of match; None is any.
        gold: Index of the gold entity's type; -1 is none, None is any.
        predicted: The same of the predicted one.
    """

    text: str
    kind: str | None = None
    gold: int | None = None
    predicted: int | None = None


@dataclass(frozen=True)
class Table:
    """A table as it is to be shown.

    Attributes:
        header: Names of the columns.
        rows: The first cell of each is its name.
        is_prose: The last column is text, not numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Link]]
    is_prose: bool = False


@dataclass(frozen=True)
class Figure:
    """A chart and the numbers that it shows.

    Attributes:
        name: Its id in the page.
        title: What it shows, in some words.
        table: Its numbers.
        svg: The drawing; None without matplotlib.
        note: What is to be known of the numbers; may be empty.
    """

    name: str
    title: str
    table: Table
    svg: str | None
    note: str = ""


def format_share(value: float) -> str:
    """A score, as in papers."""
    return f"{value:.4f}"


def format_difference(value: float) -> str:
    """A difference between scores."""
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def format_p(value: float) -> str:
    """What a p-value is equal to, or below."""
    return f"= {value:.4f}" if value >= 0.0001 else "< 0.0001"


def format_count(value: float) -> str:
    """A whole number."""
    return f"{value:,.0f}"


def format_interval(interval: Sequence[float], form: Callable[[float], str] = format_share) -> str:
    """Both ends of an interval."""
    return f"{form(interval[0])} to {form(interval[1])}"


def evaluation_figures(
    prefix: str, analysis: Mapping[str, Any], types: Sequence[str]
) -> dict[str, Figure]:
    """The figures of an evaluation, by name; those that there are no numbers for are missing.

    Args:
        prefix: Begins their ids.
        analysis: The evaluation.
        types: All types of the page, which links count by.
    """
    figures = {
        "scores": _scores(f"{prefix}-scores-figure", analysis["levels"]["word"]),
        "confusion": _confusion(f"{prefix}-confusion-figure", analysis["confusion"], types),
        "errors": _errors(f"{prefix}-errors-figure", analysis["errors"]["per_type"], types),
        "muc": _muc(f"{prefix}-muc-figure", analysis["muc"]),
        "by_length": _by_length(f"{prefix}-length-figure", analysis["by_length"]),
    }
    if analysis["by_training"]:
        name = f"{prefix}-training-figure"
        figures["by_training"] = _by_training(name, analysis["by_training"])
    if analysis.get("reliability"):  # a file of predictions has none
        name = f"{prefix}-reliability-figure"
        figures["reliability"] = _reliability(name, analysis["reliability"]["bins"])
    return figures


def level_table(analysis: Mapping[str, Any]) -> Table:
    """The scores of all entities at every level, and what each level counts."""
    rows = []
    for key, (name, meaning) in LEVELS.items():
        if level := analysis["levels"].get(key):
            shares = [level["overall"][share] for share in _SHARES.values()]
            values = [format_share(value) for value in (*shares, level["accuracy"])]
            rows.append([name, *values, format_count(level["num_labels"]), meaning])
    return Table(["level", *_SHARES, "accuracy", "labels", "what counts"], rows, is_prose=True)


def level_type_table(analysis: Mapping[str, Any]) -> Table:
    """The scores by type at all levels but the first, of which there is a figure."""
    rows = [
        [f"{name}: {kind}", *_score_cells(score)]
        for key, (name, _) in LEVELS.items()
        if key != "word" and key in analysis["levels"]
        for kind, score in _all_and_types(analysis["levels"][key])
    ]
    return Table(["level: type", *_SCORE_HEADER], rows)


def comparison_figure(name: str, comparison: Mapping[str, Any]) -> Figure:
    """Differences between two models."""
    per_type = comparison["per_type"]
    rows = [(ALL, comparison), *_most_frequent(per_type)]
    marks = charts.Marks(
        "difference", [r["difference"] for _, r in rows], [r["interval"] for _, r in rows]
    )
    title = f"Difference in {_metric(comparison)}, with 95 % intervals"
    table = Table(
        ["type", "difference", "95 % interval", "p"],
        [
            [
                kind,
                format_difference(row["difference"]),
                format_interval(row["interval"], format_difference),
                format_p(row["p_value"]).removeprefix("= "),
            ]
            for kind, row in [(ALL, comparison), *per_type.items()]
        ],
    )
    x_label = f"this model's {_metric(comparison)} less the other's"
    names = [kind for kind, _ in rows]
    svg = _draw(
        charts.interval_chart, name, title, table, names, [marks], x_label=x_label, zero=True
    )
    return Figure(name, title, table, svg)


def training_figures(events: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """The curves of a run, from the events of its `metrics.jsonl`."""
    logs = [event for event in events if event.get("event") == "log"]
    evaluations = [event for event in events if event.get("event") == "eval"]
    curves = [
        ("Loss", "loss", {"training": (logs, "loss"), "validation": (evaluations, "eval_loss")}),
        (
            "Scores on the validation data",
            "score",
            {
                "F1": (evaluations, "eval_word_f1"),
                "precision": (evaluations, "eval_word_precision"),
                "recall": (evaluations, "eval_word_recall"),
                "F1 (subword)": (evaluations, "eval_f1"),
            },
        ),
        ("Learning rate", "rate", {"rate": (logs, "learning_rate")}),
        ("Throughput", "tokens per second", {"tokens per second": (logs, "tokens_per_second")}),
    ]
    figures: list[Figure] = []
    for title, quantity, sources in curves:
        lines = [_line(label, *source) for label, source in sources.items()]
        lines = [line for line in lines if line.x]
        if lines:
            figures.append(_curves(f"training-figure-{len(figures) + 1}", title, quantity, lines))
    return figures


def _scores(name: str, level: Mapping[str, Any]) -> Figure:
    title = "Scores by entity type, with 95 % intervals"
    rows = [(ALL, level["overall"]), *_most_frequent(level["per_type"])]
    table = Table(
        ["type", *_SCORE_HEADER],
        [[kind, *_score_cells(score)] for kind, score in _all_and_types(level)],
    )
    return Figure(name, title, table, _draw_scores(name, title, table, rows))


def _confusion(name: str, confusion: Mapping[str, Any], types: Sequence[str]) -> Figure:
    title = "What gold entities were predicted as"
    labels, sides, counts = _fold(confusion["types"], confusion["counts"], types)
    numbers = range(len(labels)) if sides[:-1] else range(0)

    def cell(i: int, j: int) -> str | Link:
        text = format_count(counts[i][j])
        if i == j == numbers[-1]:  # neither gold nor predicted: no entity
            return ""
        if not counts[i][j] or sides[i] is None or sides[j] is None:
            return text
        return Link(text, gold=sides[i], predicted=sides[j])

    table = Table(
        ["gold \\ predicted", *labels],
        [[labels[i], *(cell(i, j) for j in numbers)] for i in numbers],
    )
    svg = _draw(charts.heat_map, name, title, table, labels, counts)
    return Figure(name, title, table, svg)


def _errors(name: str, per_type: Mapping[str, Mapping[str, int]], types: Sequence[str]) -> Figure:
    title = "Errors by type and kind"
    kinds = [kind for kind in KINDS if kind != "correct"]
    counts = {t: {kind: of.get(kind, 0) for kind in kinds} for t, of in per_type.items()}
    counts = dict(sorted(counts.items(), key=lambda item: -sum(item[1].values())))

    def cell(kind: str, entity_type: str) -> str | Link:
        text = format_count(counts[entity_type][kind])
        if not counts[entity_type][kind]:
            return text
        side = "predicted" if kind == "spurious" else "gold"
        return Link(text, kind=kind, **{side: types.index(entity_type)})

    table = Table(
        ["entity", *kinds, "all"],
        [
            [t, *(cell(kind, t) for kind in kinds), format_count(sum(of.values()))]
            for t, of in counts.items()
        ],
    )
    rows = list(counts)[:_MAX_TYPES]
    parts = {kind: [counts[row][kind] for row in rows] for kind in kinds}
    colours = [f"kind-{list(KINDS).index(kind)}" for kind in kinds]
    svg = _draw(charts.stacked_bars, name, title, table, rows, parts, colours, x_label="errors")
    note = "Counted by the gold type; spurious ones by the predicted type."
    return Figure(name, title, table, svg, note)


def _muc(name: str, muc: Mapping[str, Mapping[str, Any]]) -> Figure:
    title = "Scores in four ways of counting"
    parts = ("correct", "partial", "incorrect", "missed", "spurious")
    rows = [(way, muc[way]) for way in MUC if way in muc]
    table = Table(
        ["way", *_SHARES, *parts, "what counts"],
        [
            [
                way,
                *(format_share(score[share]) for share in _SHARES.values()),
                *(format_count(score[part]) for part in parts),
                MUC[way],
            ]
            for way, score in rows
        ],
        is_prose=True,
    )
    return Figure(name, title, table, _draw_scores(name, title, table, rows))


def _by_training(name: str, scores: Mapping[str, Mapping[str, Any]]) -> Figure:
    title = "Recall of entities that the training data has, and has not"
    rows = [kind for kind in TRAINING if kind in scores]
    table = Table(
        ["gold entities", "recall", "correct", "gold", "what they are"],
        [
            [
                row,
                format_share(scores[row]["recall"]),
                format_count(scores[row]["num_correct"]),
                format_count(scores[row]["num_gold"]),
                TRAINING[row],
            ]
            for row in rows
        ],
        is_prose=True,
    )
    # The bootstrap is not of these.
    intervals = [
        charts.wilson_interval(scores[row]["recall"], scores[row]["num_gold"]) for row in rows
    ]
    marks = charts.Marks("recall", [scores[row]["recall"] for row in rows], intervals)
    svg = _draw(charts.interval_chart, name, title, table, rows, [marks], x_label="recall")
    return Figure(name, title, table, svg)


def _by_length(name: str, scores: Mapping[str, Mapping[str, Any]]) -> Figure:
    title = "Scores by length of an entity"
    units = {length: "1 word" if length == "1" else f"{length} words" for length in scores}
    rows = [(units[length], score) for length, score in scores.items()]
    table = Table(
        ["length", *_SCORE_HEADER], [[length, *_score_cells(score)] for length, score in rows]
    )
    return Figure(name, title, table, _draw_scores(name, title, table, rows))


def _reliability(name: str, bins: Sequence[Mapping[str, Any]]) -> Figure:
    title = "Share of correct entities against confidence"
    filled = [of for of in bins if of["count"]]
    table = Table(
        ["confidence", "entities", "mean confidence", "share correct", "95 % interval"],
        [
            [
                f"{of['low']:.2f} to {of['high']:.2f}",
                format_count(of["count"]),
                format_share(of["confidence"]),
                format_share(of["precision"]),
                format_interval(charts.wilson_interval(of["precision"], of["count"])),
            ]
            for of in filled
        ],
    )
    svg = _draw(charts.reliability_diagram, name, title, table, filled)
    return Figure(name, title, table, svg)


def _line(label: str, events: Sequence[Mapping[str, Any]], key: str) -> charts.Line:
    """A value of events over their steps; of very many, the means of some in a row."""
    points = [
        (event["step"], event[key])
        for event in events
        if _is_number(event.get("step")) and _is_number(event.get(key))
    ]
    size = max(1, math.ceil(len(points) / _MAX_POINTS))
    groups = [points[k : k + size] for k in range(0, len(points), size)]
    x = [group[-1][0] for group in groups]
    return charts.Line(label, x, [sum(y for _, y in group) / len(group) for group in groups])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _curves(name: str, title: str, quantity: str, lines: Sequence[charts.Line]) -> Figure:
    columns = [dict(zip(line.x, line.y, strict=True)) for line in lines]
    steps = sorted(set().union(*columns))
    table = Table(
        ["step", *(line.label for line in lines)],
        [
            [format_count(step), *(f"{of[step]:.5g}" if step in of else "" for of in columns)]
            for step in steps
        ],
    )
    svg = _draw(charts.line_chart, name, title, table, lines, x_label="step", y_label=quantity)
    return Figure(name, title, table, svg)


def _fold(
    names: Sequence[str], counts: Sequence[Sequence[int]], types: Sequence[str]
) -> tuple[list[str], list[int | None], list[list[int]]]:
    """Confusions of the most frequent types; the others are put into one row and column.

    Returns:
        Labels of rows and columns, what they are in a `Link` (None: not to be linked), and counts.
    """
    size = len(names)
    totals = [sum(counts[k]) + sum(row[k] for row in counts) for k in range(size)]
    chosen = sorted(sorted(range(size), key=lambda k: -totals[k])[:_MAX_TYPES])
    others = [k for k in range(size) if k not in chosen]
    groups = [*([k] for k in chosen), *([others] if others else []), [size]]
    labels = [names[k] for k in chosen]
    sides: list[int | None] = [types.index(label) for label in labels]
    if others:
        labels.append(f"{len(others)} other types")
        sides.append(None)
    folded = [
        [sum(counts[i][j] for i in rows for j in columns) for columns in groups] for rows in groups
    ]
    return [*labels, NONE], [*sides, -1], folded


def _most_frequent(
    per_type: Mapping[str, Mapping[str, Any]],
) -> list[tuple[str, Mapping[str, Any]]]:
    """Types in their order, without the rare ones of very many."""
    by_support = sorted(per_type, key=lambda kind: -per_type[kind].get("num_gold", 0))
    chosen = set(by_support[:_MAX_TYPES])
    return [(kind, score) for kind, score in per_type.items() if kind in chosen]


def _all_and_types(level: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(ALL, level["overall"]), *level["per_type"].items()]


def _score_cells(score: Mapping[str, Any]) -> list[str]:
    intervals = score.get("intervals", {})
    cells = []
    for share in _SHARES.values():
        text = format_share(score[share])
        if share in intervals:
            text += f" ({format_interval(intervals[share])})"
        cells.append(text)
    return cells + [format_count(score[name]) for name in _COUNTS]


def _draw_scores(
    name: str, title: str, table: Table, rows: Sequence[tuple[str, Mapping[str, Any]]]
) -> str | None:
    series = [
        charts.Marks(
            label,
            [score[share] for _, score in rows],
            [score.get("intervals", {}).get(share) for _, score in rows],
        )
        for label, share in _SHARES.items()
    ]
    names = [kind for kind, _ in rows]
    return _draw(charts.interval_chart, name, title, table, names, series, x_label="score")


def _draw(
    chart: Callable[..., str], name: str, title: str, table: Table, *numbers: Any, **names: Any
) -> str | None:
    """The chart, described by its table; None without matplotlib, or without anything to draw."""
    if not table.rows or not charts.can_draw():
        return None
    columns = visible(", ".join(table.header))
    description = f"The numbers are in a table of {len(table.rows)} rows: {columns}."
    return chart(name, title, description, *numbers, **names)


def _metric(comparison: Mapping[str, Any]) -> str:
    metric = str(comparison["metric"])
    return {share: name for name, share in _SHARES.items()}.get(metric, metric)
