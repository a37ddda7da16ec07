"""Intervals and the paired test: what they promise, on data of which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from bertner.significance import bootstrap, compare


def draw_counts(rng: np.random.Generator, num_units: int, quality: float) -> np.ndarray:
    """(num_units, 2, 3): each unit has some gold entities, of which a share is found."""
    gold = rng.integers(0, 4, (num_units, 2))
    correct = rng.binomial(gold, quality)
    predicted = correct + rng.binomial(gold, 1 - quality)
    return np.stack([correct, predicted, gold], axis=-1)


def f1(counts: np.ndarray) -> float:
    correct, predicted, gold = counts.reshape(-1, 3).sum(0)
    return float(2 * correct / (predicted + gold))


def test_an_interval_holds_the_truth_in_19_of_20_cases() -> None:
    rng = np.random.default_rng(1)
    # Of ever so many units, F1 is that of the expected counts: q of the gold ones are found, and as
    # many are predicted as there are.
    hits = 0
    for k in range(300):
        intervals = bootstrap(draw_counts(rng, 150, 0.8), 300, seed=k)
        low, high = intervals.f1[-1]
        hits += low <= 0.8 <= high
    assert 270 <= hits <= 297


def test_intervals_are_around_the_scores_and_narrow_with_more_data() -> None:
    rng = np.random.default_rng(2)
    widths = []
    for num_units in (50, 5000):
        counts = draw_counts(rng, num_units, 0.7)
        intervals = bootstrap(counts, 500, seed=0)
        assert intervals.f1.shape == intervals.recall.shape == intervals.precision.shape == (3, 2)
        for k, part in enumerate((counts[:, :1], counts[:, 1:], counts)):
            low, high = intervals.f1[k]
            assert low < f1(part) < high
        widths.append(intervals.f1[-1, 1] - intervals.f1[-1, 0])
    assert widths[1] == pytest.approx(widths[0] / 10, rel=0.4)


def test_the_same_seed_gives_the_same_intervals_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = draw_counts(np.random.default_rng(3), 40, 0.7)
    whole = bootstrap(counts, 200, seed=5)
    monkeypatch.setattr("bertner.significance._BLOCK", 1)
    np.testing.assert_array_equal(bootstrap(counts, 200, seed=5).f1, whole.f1)
    assert not np.array_equal(bootstrap(counts, 200, seed=6).f1, whole.f1)


def test_a_model_does_not_differ_from_itself() -> None:
    counts = draw_counts(np.random.default_rng(4), 60, 0.7)
    result = compare(counts, counts, 200, seed=0)
    assert not result.f1.any()
    assert not result.interval.any()
    assert np.all(result.p_value == 1.0)


def test_a_better_model_is_told_apart() -> None:
    rng = np.random.default_rng(5)
    worse, better = draw_counts(rng, 300, 0.6), draw_counts(rng, 300, 0.9)
    better[..., 2] = worse[..., 2]
    result = compare(better, worse, 400, seed=0)
    assert result.f1[-1] == pytest.approx(f1(better) - f1(worse))
    assert result.interval[-1, 0] > 0.1
    assert result.p_value[-1] == 1 / 401
    back = compare(worse, better, 400, seed=0)
    assert back.f1[-1] == -result.f1[-1]
    assert back.p_value[-1] == result.p_value[-1]


def test_false_alarms_are_as_many_as_the_level_says() -> None:
    rng = np.random.default_rng(6)
    first, second = draw_counts(rng, 80, 0.70), draw_counts(rng, 80, 0.78)
    alarms = 0
    for k in range(1000):
        # Which of the two said what is left to chance, unit by unit: there is nothing to find.
        swap = rng.integers(0, 2, 80).astype(bool)[:, None, None]
        one, other = np.where(swap, second, first), np.where(swap, first, second)
        alarms += compare(one, other, 199, seed=k).p_value[-1] <= 0.05
    assert 30 <= alarms <= 70, "5% of 1000, within three deviations"


def test_nothing_to_find_and_nothing_found() -> None:
    nothing = np.zeros((10, 1, 3), dtype=np.int64)
    assert not bootstrap(nothing, 100, seed=0).f1.any()
    result = compare(nothing, nothing, 100, seed=0)
    assert result.p_value.tolist() == [1.0, 1.0]
