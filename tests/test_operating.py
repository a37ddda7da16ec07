"""Thresholds keep what they promise, on the data that they were counted on."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertner.calibration import Calibration, fit
from bertner.config import Reading
from bertner.errors import UsageError
from bertner.metrics import Score
from bertner.operating import Curve

some = settings(max_examples=60, deadline=None)


@st.composite
def outcomes(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """(confidence, right, number of gold entities): of few or many, with and without ties."""
    size = draw(st.sampled_from([0, 1, 2, 19, 20, 21, 150, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    confidence = rng.random(size) ** draw(st.sampled_from([0.01, 1, 5]))
    if draw(st.booleans()):
        confidence = confidence.round(draw(st.integers(0, 2)))
    shift = draw(st.sampled_from([-2.0, -0.3, 0.0, 0.3, 2.0]))
    right = rng.random(size) < confidence + shift
    return confidence, right, int(right.sum()) + draw(st.integers(0, 40))


@some
@given(outcomes(), st.floats(0, 1), st.floats(0, 1))
def test_promises_are_kept(
    case: tuple[np.ndarray, np.ndarray, int], wanted: float, other: float
) -> None:
    confidence, right, num_gold = case
    curve = Curve.of(*case)
    assert len(curve.points) <= 100
    assert Curve.from_dict(json.loads(json.dumps(curve.to_dict()))) == curve
    for point in curve.points:
        kept = confidence >= point.threshold
        assert point.score == Score(int(right[kept].sum()), int(kept.sum()), num_gold)
    if len(right):
        assert curve.points[0].threshold == 0.0
        assert curve.points[0].score.num_predicted == len(right)

    found = {}
    for precision in (wanted, other):
        needed = max(20, 1 / max(1 - precision, 0.001) - 0.5)
        firm = [each for each in curve.points if each.score.num_predicted >= needed]
        good = [each.threshold for each in firm if each.score.precision >= precision]
        try:
            point = curve.at_precision(precision)
        except UsageError:
            assert not good
            continue
        assert point.threshold == good[0]
        kept = confidence >= point.threshold
        assert kept.sum() >= 20
        assert right[kept].mean() >= precision
        found[precision] = point.threshold
    if len(found) == 2:
        assert found[min(found)] <= found[max(found)]
    try:
        point = curve.at_recall(wanted)
    except UsageError:
        assert right.sum() < wanted * num_gold or not num_gold or not len(right)
    else:
        kept = confidence >= point.threshold
        assert right[kept].sum() >= wanted * num_gold - 1e-9
        larger = [p for p in curve.points if p.threshold > point.threshold]
        assert all(p.score.recall < wanted for p in larger)


def test_a_curve_by_hand() -> None:
    confidence = np.array([0.25] * 10 + [0.5] * 20 + [0.7500004] * 30)
    right = np.array([False] * 10 + [True, False] * 10 + [True] * 30)
    curve = Curve.of(confidence, right, 50)
    rows = [(p.threshold, p.score.num_predicted, p.score.num_correct) for p in curve.points]
    assert rows == [(0.0, 60, 40), (0.5, 50, 40), (0.75, 30, 30)]
    assert curve.at_precision(0.6).threshold == 0.0
    assert curve.at_precision(0.8) == curve.points[1]
    assert curve.at_precision(0.81) == curve.points[2]
    assert curve.at_recall(0.8) == curve.points[1]
    assert curve.at_recall(0.6) == curve.points[2]
    with pytest.raises(UsageError, match=r"recall 0.9 .* it is 0.8000 of 50; ask for less"):
        curve.at_recall(0.9)
    with pytest.raises(UsageError, match=r"0.99 takes 100 entities to show, and 60 were predicted"):
        curve.at_precision(0.99)
    with pytest.raises(ValueError, match="40 predicted entities are right, of 39"):
        Curve.of(confidence, right, 39)


def calibration(num_entities: int) -> Calibration:
    rng = np.random.default_rng(0)
    evidence = np.stack([rng.random(num_entities), np.full(num_entities, 0.999)], axis=1)
    right = rng.random(num_entities) < 0.8 * evidence[:, 0]
    types = ["PER", "LOC"] * (num_entities // 2)
    gold = {"PER": num_entities, "LOC": num_entities, "ORG": 7}
    return fit(evidence, types, right, gold, source="dev.txt", weights="", reading=Reading())


def test_a_threshold_for_a_type_and_for_all() -> None:
    calibrated = calibration(400)
    for kind, num_predicted in ((None, 400), ("PER", 200)):
        curve = calibrated.overall if kind is None else calibrated.per_type[kind]
        assert curve.points[0].score.num_predicted == num_predicted
        point = calibrated.threshold_for(kind, precision=0.6)
        assert point == curve.at_precision(0.6)
        assert point.score.precision >= 0.6
        assert calibrated.threshold_for(kind, recall=0.1) == curve.at_recall(0.1)
    with pytest.raises(
        UsageError, match=r"^PER on dev.txt: precision 0.95 is out of reach; at best"
    ):
        calibrated.threshold_for("PER", precision=0.95)
    with pytest.raises(UsageError, match=r"^all types on dev.txt: recall 0.9 is out of reach"):
        calibrated.threshold_for(recall=0.9)
    with pytest.raises(UsageError, match=r"^ORG on dev.txt: precision 0.5 takes 20 .* and 0 were"):
        calibrated.threshold_for("ORG", precision=0.5)
    with pytest.raises(UsageError, match=r"^ORG on dev.txt: recall 0.5 .* it is 0.0000 of 7"):
        calibrated.threshold_for("ORG", recall=0.5)
    with pytest.raises(UsageError, match="no type 'per' was calibrated, but LOC, ORG, PER"):
        calibrated.threshold_for("per", recall=0.5)
    wrong: list[dict[str, Any]] = [{}, {"precision": 0.5, "recall": 0.5}]
    for arguments in wrong:
        with pytest.raises(UsageError, match="give one of them"):
            calibrated.threshold_for(**arguments)
