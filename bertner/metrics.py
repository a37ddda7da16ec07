"""Entity scores and token accuracy, from flat arrays of label ids.

Scores are counts first: `count_entities` gives correct, predicted and gold entities per type, and
precision, recall and F1 follow. At subword level the sequence is the wordpieces that carry a label;
at word level it is the words, each decided by its first wordpiece. The rule for what is an entity
is conlleval's (see `labels.find_spans`), which is also seqeval's default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bertner.labels import IntArray, LabelSet, Spans


@dataclass(frozen=True)
class Score:
    """Counts of entities and what follows from them.

    Attributes:
        num_correct: Predicted entities with the same start, end and type as a gold one.
        num_predicted: Predicted entities.
        num_gold: Entities in the data (the support).
    """

    num_correct: int
    num_predicted: int
    num_gold: int

    @property
    def precision(self) -> float:
        """Share of the predicted entities that are correct; 0 if none was predicted."""
        return self.num_correct / self.num_predicted if self.num_predicted else 0.0

    @property
    def recall(self) -> float:
        """Share of the gold entities that were found; 0 if there are none."""
        return self.num_correct / self.num_gold if self.num_gold else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; 0 if both are."""
        both = self.num_predicted + self.num_gold
        return 2 * self.num_correct / both if both else 0.0


@dataclass(frozen=True)
class EntityScores:
    """Scores of a set of sentences at one level.

    Attributes:
        overall: Over all entities (micro average).
        per_type: By entity type, sorted by name.
        accuracy: Share of labels predicted right, O included.
        num_labels: Number of labels compared.
    """

    overall: Score
    per_type: dict[str, Score]
    accuracy: float
    num_labels: int


def score_entities(
    predicted: IntArray, gold: IntArray, starts: IntArray, labels: LabelSet
) -> EntityScores:
    """Compares two label sequences entity by entity.

    Args:
        predicted: (num_labels,) predicted label ids.
        gold: (num_labels,) label ids of the data; none is IGNORE_INDEX.
        starts: Indices at which sentences begin, ascending; an entity never crosses one.
        labels: What the ids mean.
    """
    if predicted.shape != gold.shape:
        raise ValueError(f"{len(predicted)} predictions for {len(gold)} labels")
    found, true = labels.spans(predicted, starts), labels.spans(gold, starts)
    overall, per_type = count_entities(found, true, labels.types)
    return EntityScores(
        overall=overall,
        per_type=per_type,
        accuracy=float(np.mean(predicted == gold)) if len(gold) else 0.0,
        num_labels=len(gold),
    )


def count_entities(
    found: Spans, true: Spans, types: Sequence[str]
) -> tuple[Score, dict[str, Score]]:
    """Counts entities: over all, and by type.

    Args:
        found: Predicted entities.
        true: Those of the data.
        types: Names of the types.
    """
    correct = np.bincount(true.type[find_matches(found, true) >= 0], minlength=len(types))
    num_found = np.bincount(found.type, minlength=len(types))
    num_true = np.bincount(true.type, minlength=len(types))
    per_type = {
        kind: Score(int(correct[k]), int(num_found[k]), int(num_true[k]))
        for k, kind in sorted(enumerate(types), key=lambda item: item[1])
        if num_found[k] or num_true[k]
    }
    return Score(int(correct.sum()), len(found), len(true)), per_type


def find_matches(found: Spans, true: Spans) -> IntArray:
    """(num_true,) index of the equal one among the entities found; -1 where there is none."""
    matches: IntArray = np.full(len(true), -1, dtype=np.int64)
    # Starts are unique on each side, so a match is: same start, then same end and type.
    _, at_found, at_true = np.intersect1d(
        found.start, true.start, assume_unique=True, return_indices=True
    )
    same = (found.end[at_found] == true.end[at_true]) & (found.type[at_found] == true.type[at_true])
    matches[at_true[same]] = at_found[same]
    return matches
