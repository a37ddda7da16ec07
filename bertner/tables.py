"""Tables as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bertner.metrics import EntityScores


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text: the first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in (header, *rows)
    )


def format_scores(
    scores: EntityScores, title: str, f1_intervals: Mapping[str, Sequence[float]] | None = None
) -> str:
    """A table of precision, recall, F1 and support per entity type, as text.

    Args:
        scores: What is shown.
        title: Stands above the types.
        f1_intervals: By type, "all" included: bounds to show beside F1.
    """
    rows = [
        [name, f"{s.precision:.4f}", f"{s.recall:.4f}", f"{s.f1:.4f}", str(s.num_gold)]
        for name, s in [*scores.per_type.items(), ("all", scores.overall)]
    ]
    header = [title, "precision", "recall", "f1", "entities"]
    if f1_intervals is not None:
        header.insert(4, "95% interval")
        for row in rows:
            row.insert(4, "{:.4f}-{:.4f}".format(*f1_intervals[row[0]]))
    return format_table(header, rows)
