"""Label sequences that their scheme allows, by exact Viterbi search over word scores.

Words are labelled one by one, so argmax may give a sequence that the scheme has no room for, such
as `O I-PER` in IOB2. Only such sentences are decoded: each gets the legal sequence with the highest
sum of scores. No transition has a score of its own, so there is nothing to train.

Shapes: W words, L labels; N sentences that are decoded together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertner.labels import BoolArray, IntArray, LabelSet

# What a score of -inf counts as. No sum of real log probabilities comes near it; and in a sum with
# it they keep six digits after the point, so sequences that need it are still told apart.
_IMPOSSIBLE = -1e9

_CELLS = 2**18  # sentences * labels**2 that are computed at a time: 2 MiB, within a cache


def is_legal(
    labels: IntArray, starts: IntArray, label_set: LabelSet, scheme: str | None = None
) -> BoolArray:
    """(num_sentences,) whether each sentence is a sequence that the scheme allows.

    Args:
        labels: (W,) label ids.
        starts: (num_sentences,) where sentences begin, ascending from 0; some may have no words.
        label_set: What the ids mean.
        scheme: See `LabelSet.transitions`.

    Raises:
        ValueError: `starts` do not divide the words, or there is no such scheme.
    """
    allowed = label_set.transitions(scheme)
    lengths = np.diff(starts, append=len(labels))
    if lengths.sum() != len(labels) or np.any(lengths < 0):
        raise ValueError("starts do not divide the words into sentences: they ascend from 0")
    outside = label_set.outside
    before = np.concatenate([[outside], labels[:-1]])[: len(labels)]
    before[starts[lengths > 0]] = outside
    wrong = ~allowed[before, labels]
    ends = (starts + lengths)[lengths > 0] - 1
    wrong[ends] |= ~allowed[labels[ends], outside]
    sentence = np.repeat(np.arange(len(starts)), lengths)
    legal: BoolArray = np.bincount(sentence[wrong], minlength=len(starts)) == 0
    return legal


def stranded_types(label_set: LabelSet, scheme: str | None = None) -> list[str]:
    """The entity types that no legal sequence has: of them `repair` would leave nothing.

    Such is every type of a list like `O, I-X, E-X`, which is of none of the schemes.

    Args:
        label_set: The labels.
        scheme: See `LabelSet.transitions`.
    """
    allowed, outside = label_set.transitions(scheme), label_set.outside
    usable = np.ones(len(label_set.names), dtype=bool)
    for steps in (allowed, allowed.T):  # from O to the label, and from the label to O
        found = np.zeros_like(usable)
        reached = steps[outside]
        while np.any(reached & ~found):
            found |= reached
            reached = steps[found].any(axis=0)
        usable &= found
    kept = set(label_set.type_of[usable].tolist())
    return [name for kind, name in enumerate(label_set.types) if kind not in kept]


def repair(
    labels: IntArray,
    scores: NDArray[np.floating[Any]],
    starts: IntArray,
    label_set: LabelSet,
    scheme: str | None = None,
) -> tuple[IntArray, int]:
    """Gives each sentence that breaks the scheme the best sequence that does not.

    The best has the highest sum of scores; of several, it is the one whose last word has the lowest
    label id, then the word before it, and so on. A sentence that is legal stays as it is, and none
    depends on the others.

    Args:
        labels: (W,) label id of each word, the argmax of its scores.
        scores: (W, L) log probabilities. A word that must be O has 0 there and -inf elsewhere. -inf
            and NaN count as -1e9: where no legal sequence avoids them, the best has the fewest.
        starts: (num_sentences,) where sentences begin, ascending from 0; some may have no words.
        label_set: What the ids mean; it has O, so there always is a legal sequence.
        scheme: See `LabelSet.transitions`.

    Returns:
        (W,) labels, and the number of words whose label is another than before.

    Raises:
        ValueError: The shapes do not fit, or there is no such scheme.
    """
    shape = (len(labels), len(label_set.names))
    if scores.shape != shape:
        raise ValueError(f"scores are {scores.shape}, not {shape}: words and labels")
    broken = np.flatnonzero(~is_legal(labels, starts, label_set, scheme))
    lengths = np.diff(starts, append=len(labels))[broken]
    longest_first = np.argsort(-lengths, kind="stable")
    firsts, lengths = starts[broken][longest_first], lengths[longest_first]
    allowed, outside = label_set.transitions(scheme), label_set.outside
    repaired = labels.copy()
    size = max(1, _CELLS // allowed.size)
    for k in range(0, len(broken), size):
        block = slice(k, k + size)
        _decode(repaired, scores, firsts[block], lengths[block], allowed, outside)
    return repaired, int(np.count_nonzero(repaired != labels))


def _decode(
    labels: IntArray,
    scores: NDArray[np.floating[Any]],
    firsts: IntArray,
    lengths: IntArray,
    allowed: BoolArray,
    outside: int,
) -> None:
    """Writes the best legal labels of sentences, the longest first, into `labels`."""
    penalty = np.where(allowed, 0.0, -np.inf)  # (L before, L after)
    # At each position, the sentences that have a word there are the first rows of every array.
    rows_at = [len(lengths), *(len(lengths) - np.cumsum(np.bincount(lengths))[1:-1]).tolist()]
    # best[position][row, label] is the sum of the best path that ends with this label there.
    best = [penalty[outside] + _floored(scores[firsts])]
    for position, rows in enumerate(rows_at[1:], start=1):
        paths = best[-1][:rows, :, None] + penalty  # (rows, L before, L after)
        best.append(paths.max(axis=1) + _floored(scores[firsts[:rows] + position]))

    after = np.full(len(lengths), outside)  # (N,) the label that comes next: O after the last word
    for position in reversed(range(len(rows_at))):
        rows = rows_at[position]
        after[:rows] = (best[position] + penalty.T[after[:rows]]).argmax(axis=1)
        labels[firsts[:rows] + position] = after[:rows]


def _floored(scores: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Scores in double precision, finite from below."""
    floored: NDArray[np.float64] = np.fmax(scores, _IMPOSSIBLE, dtype=np.float64)  # NaN too
    return floored
