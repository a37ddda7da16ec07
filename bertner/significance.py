"""How sure a score is: intervals by the bootstrap, and a test of two models on the same data.

Sentences of a document resemble each other, so what is drawn again are documents, where the data
tell them apart, and sentences elsewhere. Everything here works on counts: an array (num_units,
num_types, 3) of the correct, the predicted and the gold entities of each unit and type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bertner.labels import IntArray

FloatArray = NDArray[np.float64]

LEVEL = 0.95  # of every interval

# Samples are drawn for this many units at a time: some 30 MB.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Intervals:
    """Percentile intervals; the last element of each array is that of all types together.

    Attributes:
        precision: (num_types + 1, 2) lower and upper bound.
        recall: The same of recall.
        f1: The same of F1.
    """

    precision: FloatArray
    recall: FloatArray
    f1: FloatArray


@dataclass(frozen=True)
class Difference:
    """What tells two models apart in F1; the last element of each array is that of all types.

    Attributes:
        f1: (num_types + 1,) F1 of the first less F1 of the second.
        interval: (num_types + 1, 2) percentile interval of the difference.
        p_value: (num_types + 1,) how often a difference as large, in either direction, comes about
            if for each unit it is left to chance which of the two models said what.
    """

    f1: FloatArray
    interval: FloatArray
    p_value: FloatArray


def bootstrap(counts: IntArray, samples: int, seed: int) -> Intervals:
    """Intervals of the scores (Efron, 1979): units are drawn again, with replacement.

    Args:
        counts: (num_units, num_types, 3) correct, predicted and gold entities.
        samples: How many times, at least once.
        seed: Of the draws.
    """
    drawn = [_with_all(weights @ _flat(counts)) for weights in _draw(len(counts), samples, seed)]
    return Intervals(*(_interval(values) for values in _scores(np.concatenate(drawn))))


def compare(first: IntArray, second: IntArray, samples: int, seed: int) -> Difference:
    """Compares two models on the same units.

    The interval is by the bootstrap, both models scored on the same draws. The p-value is by
    approximate randomization (Noreen, 1989; Yeh, 2000): what the two said of a unit is swapped or
    not, by a coin.

    Args:
        first: (num_units, num_types, 3) counts of the one model.
        second: The same of the other.
        samples: Of each kind.
        seed: Of the draws.
    """
    observed = _f1(_with_all(_flat(first).sum(0))) - _f1(_with_all(_flat(second).sum(0)))
    drawn = [
        _f1(_with_all(weights @ _flat(first))) - _f1(_with_all(weights @ _flat(second)))
        for weights in _draw(len(first), samples, seed)
    ]
    # Swapping changes nothing where the two count the same.
    differ = np.flatnonzero((first != second).any((1, 2)))
    total, change = _flat(first).sum(0), _flat(second[differ]) - _flat(first[differ])
    both = total + _flat(second).sum(0)
    num_larger = np.zeros(len(observed), dtype=np.int64)
    rng = np.random.default_rng([seed, 1])
    for size in _blocks(len(differ), samples):
        swapped = total + rng.integers(0, 2, (size, len(differ))).astype(np.float64) @ change
        differences = _f1(_with_all(swapped)) - _f1(_with_all(both - swapped))
        # With some room, since equal differences need not be equal in every bit.
        num_larger += (np.abs(differences) >= np.abs(observed) - 1e-12).sum(0)
    return Difference(observed, _interval(np.concatenate(drawn)), (num_larger + 1) / (samples + 1))


def _draw(num_units: int, samples: int, seed: int) -> Iterator[FloatArray]:
    """How often each unit is drawn: blocks of (some samples, num_units)."""
    rng = np.random.default_rng([seed, 0])
    shares = np.full(num_units, 1 / max(num_units, 1))
    for size in _blocks(num_units, samples):
        yield rng.multinomial(num_units, shares, size).astype(np.float64)


def _blocks(num_units: int, samples: int) -> Iterator[int]:
    """Numbers of samples that add up to all."""
    at_a_time = max(1, _BLOCK // max(num_units, 1))
    for begin in range(0, samples, at_a_time):
        yield min(at_a_time, samples - begin)


def _flat(counts: IntArray) -> FloatArray:
    return counts.reshape(len(counts), 3 * counts.shape[1]).astype(np.float64)


def _with_all(totals: FloatArray) -> FloatArray:
    """(..., num_types * 3) totals as (..., num_types + 1, 3), with those of all types last."""
    totals = totals.reshape(*totals.shape[:-1], -1, 3)
    return np.concatenate([totals, totals.sum(-2, keepdims=True)], axis=-2)


def _scores(totals: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Precision, recall and F1; 0 where there is nothing to divide by, as in `metrics.Score`."""
    correct, predicted, gold = np.moveaxis(totals, -1, 0)
    return (
        correct / np.maximum(predicted, 1),
        correct / np.maximum(gold, 1),
        2 * correct / np.maximum(predicted + gold, 1),
    )


def _f1(totals: FloatArray) -> FloatArray:
    return _scores(totals)[2]


def _interval(values: FloatArray) -> FloatArray:
    """(samples, num_types + 1) values as (num_types + 1, 2) bounds."""
    tail = (1 - LEVEL) / 2
    bounds: FloatArray = np.quantile(values, [tail, 1 - tail], axis=0).T
    return bounds
