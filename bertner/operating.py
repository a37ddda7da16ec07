"""Operating points: what each threshold on confidence keeps of a split's entities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short  # what a message shows of a value from a file
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertner.errors import UsageError
from bertner.labels import BoolArray
from bertner.metrics import Score

MAX_POINTS = 100  # of a curve


@dataclass(frozen=True)
class OperatingPoint:
    """What is left of a split's entities if those of less confidence are dropped.

    Attributes:
        threshold: The least confidence that is kept.
        score: Counts, precision and recall of those that are left.
    """

    threshold: float
    score: Score


@dataclass(frozen=True)
class Curve:
    """Operating points of the entities of one type, or of all.

    Attributes:
        points: By ascending threshold; the first threshold is 0, so that all are left. None if no
            entity was predicted.
        num_gold: Gold entities of the split.
    """

    points: tuple[OperatingPoint, ...]
    num_gold: int

    @classmethod
    def of(
        cls,
        confidence: NDArray[np.float64],
        right: BoolArray,
        num_gold: int,
        max_points: int = MAX_POINTS,
    ) -> Curve:
        """Counts a split's entities at thresholds that divide them into about equal parts.

        Args:
            confidence: (n,) of the predicted entities, from 0 to 1.
            right: (n,) whether each is right.
            num_gold: Gold entities.
            max_points: Number of thresholds; fewer where many entities have one confidence.

        Raises:
            ValueError: More are right than there are.
        """
        if right.sum() > num_gold:
            raise ValueError(f"{right.sum()} predicted entities are right, of {num_gold} gold ones")
        num_predicted = len(right)
        if num_predicted == 0:
            return cls((), num_gold)
        order = np.argsort(confidence, kind="stable")
        confidence, right = confidence[order], right[order]
        borders = confidence[np.arange(max_points) * num_predicted // max_points]
        # Short numbers, rounded down. Other data may have entities of less confidence than the
        # least one here; nothing is known against them that is not known against this one.
        thresholds = np.unique(np.floor(borders * 1e6) / 1e6)
        thresholds[0] = 0.0
        dropped = np.searchsorted(confidence, thresholds)
        num_correct = right.sum() - np.append(0, np.cumsum(right))[dropped]
        return cls._from_columns(
            thresholds.tolist(), (num_predicted - dropped).tolist(), num_correct.tolist(), num_gold
        )

    @classmethod
    def _from_columns(
        cls,
        thresholds: list[float],
        num_predicted: list[int],
        num_correct: list[int],
        num_gold: int,
    ) -> Curve:
        rows = zip(thresholds, num_predicted, num_correct, strict=True)
        return cls(tuple(OperatingPoint(t, Score(c, p, num_gold)) for t, p, c in rows), num_gold)

    def at_precision(self, precision: float) -> OperatingPoint:
        """The smallest threshold that leaves this precision.

        Of a few entities, all may be right by chance, so points with fewer than 20 left count for
        nothing, nor do those where one wrong entity would be too many: 0.99 takes 100 entities. A
        smaller precision never has a larger threshold.

        Args:
            precision: Wanted share of right entities among those that are left.

        Raises:
            UsageError: There is none; the message says what there is.
        """
        needed = max(20, round(1 / max(1 - precision, 0.001)))
        firm = [point for point in self.points if point.score.num_predicted >= needed]
        if not firm:
            count = self.points[0].score.num_predicted if self.points else 0
            raise UsageError(
                f"precision {precision:g} takes {needed:,} entities to show, and {count:,} were "
                "predicted; calibrate on more data, or ask for less"
            )
        for point in firm:
            if point.score.precision >= precision:
                return point
        top = max(firm, key=lambda point: point.score.precision)
        raise UsageError(
            f"precision {precision:g} is out of reach; at best it is {top.score.precision:.4f}, "
            f"with threshold {top.threshold:g} and {top.score.num_predicted:,} entities; "
            "ask for less"
        )

    def at_recall(self, recall: float) -> OperatingPoint:
        """The largest threshold that leaves this recall.

        Args:
            recall: Wanted share of gold entities that are among those that are left.

        Raises:
            UsageError: There is none; the message says what there is.
        """
        enough = [point for point in self.points if point.score.recall >= recall]
        if not enough:
            best = self.points[0].score.recall if self.points else 0.0
            raise UsageError(
                f"recall {recall:g} is out of reach; with every predicted entity it is {best:.4f} "
                f"of {self.num_gold:,}; ask for less"
            )
        return enough[-1]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in columns; `from_dict` makes the same curve of it."""
        return {
            "num_gold": self.num_gold,
            "thresholds": [point.threshold for point in self.points],
            "num_predicted": [point.score.num_predicted for point in self.points],
            "num_correct": [point.score.num_correct for point in self.points],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Curve:
        """Takes apart what `to_dict` made.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        thresholds = [number_in(value, 0.0, 1.0) for value in values["thresholds"]]
        num_predicted = [count_in(value) for value in values["num_predicted"]]
        num_correct = [count_in(value) for value in values["num_correct"]]
        num_gold = count_in(values["num_gold"])
        if not len(thresholds) == len(num_predicted) == len(num_correct) <= MAX_POINTS:
            raise ValueError("a curve's columns differ in length, or are too long")
        if (
            thresholds[:1] not in ([], [0.0])
            or np.any(np.diff(thresholds) <= 0)
            or np.any(np.diff(num_predicted) > 0)
            or np.any(np.diff(num_correct) > 0)
            or np.any(np.greater(num_correct, num_predicted))
            or max(num_correct, default=0) > num_gold
        ):
            raise ValueError("a curve's numbers do not belong together")
        return cls._from_columns(thresholds, num_predicted, num_correct, num_gold)


def number_in(value: Any, low: float, high: float) -> float:
    """A number from JSON between two others.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{short(value)} is no number from {low:g} to {high:g}")
    return float(value)


def count_in(value: Any) -> int:
    """A count from JSON.

    Raises:
        ValueError: It is none.
    """
    if type(value) is not int or not 0 <= value < 1 << 53:
        raise ValueError(f"{short(value)} is no count")
    return value
