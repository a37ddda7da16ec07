"""Scores, against conlleval's counters written out and against seqeval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import seqeval.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from bertner.labels import LabelSet, label_list
from bertner.metrics import EntityScores, Score, score_entities
from tests import conlleval

many = settings(max_examples=300, deadline=None)

Sentences = list[list[str]]
IOB2 = LabelSet(tuple(label_list(["PER", "LOC"])))
BIOES = LabelSet(("O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC") for prefix in "BIES")))


def score(predicted: Sentences, gold: Sentences, labels: LabelSet = IOB2) -> EntityScores:
    def ids(sentences: Sentences) -> np.ndarray:
        flat = [labels.index[tag] for sentence in sentences for tag in sentence]
        return np.array(flat, dtype=np.int16)

    starts = np.cumsum([0, *map(len, gold)])[:-1]
    return score_entities(ids(predicted), ids(gold), starts, labels)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Sentences, Sentences, LabelSet]:
    """(predicted, gold, labels): predictions that are right more often than not, or have no entity.

    Either side may have no entity at all, and there may be one sentence.
    """
    labels = draw(st.sampled_from([IOB2, BIOES]))
    tag = st.sampled_from(labels.names)
    gold = draw(st.lists(st.lists(tag, min_size=1, max_size=9), min_size=1, max_size=4))
    share = draw(st.sampled_from(["some wrong", "all wrong", "no gold", "no predictions"]))
    if share == "no gold":
        gold = [["O"] * len(sentence) for sentence in gold]
    predicted = [[draw(tag) if draw(st.integers(0, 3)) == 0 else t for t in s] for s in gold]
    if share == "all wrong":
        predicted = [[draw(tag) for _ in sentence] for sentence in gold]
    if share == "no predictions":
        predicted = [["O"] * len(sentence) for sentence in gold]
    return predicted, gold, labels


@many
@given(pairs())
def test_counts_are_conllevals(case: tuple[Sentences, Sentences, LabelSet]) -> None:
    predicted, gold, labels = case
    counts = conlleval.Counts(gold, predicted)
    scores = score(predicted, gold, labels)
    assert scores.overall == Score(
        counts.correct.total(), counts.found.total(), counts.gold.total()
    )
    assert scores.per_type == {
        kind: Score(counts.correct[kind], counts.found[kind], counts.gold[kind])
        for kind in ("LOC", "PER")
        if counts.found[kind] or counts.gold[kind]
    }
    assert list(scores.per_type) == sorted(scores.per_type)
    assert scores.accuracy == counts.num_right_tags / counts.num_words
    assert scores.num_labels == counts.num_words


@many
@given(pairs())
def test_scores_are_seqevals(case: tuple[Sentences, Sentences, LabelSet]) -> None:
    predicted, gold, labels = case
    scores = score(predicted, gold, labels)
    overall = scores.overall
    zero = {"zero_division": 0}
    assert math.isclose(overall.precision, seqeval.metrics.precision_score(gold, predicted, **zero))
    assert math.isclose(overall.recall, seqeval.metrics.recall_score(gold, predicted, **zero))
    assert math.isclose(overall.f1, seqeval.metrics.f1_score(gold, predicted, **zero))
    assert math.isclose(scores.accuracy, seqeval.metrics.accuracy_score(gold, predicted))
    if not scores.per_type:
        return  # seqeval makes no report of nothing
    report = seqeval.metrics.classification_report(gold, predicted, output_dict=True, **zero)
    by_type = {kind: row for kind, row in report.items() if not kind.endswith(" avg")}
    assert by_type.keys() == scores.per_type.keys()
    for kind, row in by_type.items():
        ours = scores.per_type[kind]
        assert ours.precision == pytest.approx(row["precision"])
        assert ours.recall == pytest.approx(row["recall"])
        assert ours.f1 == pytest.approx(row["f1-score"])
        assert ours.num_gold == row["support"]


def test_scores_by_hand() -> None:
    gold = [
        "B-PER I-PER O B-LOC".split(),
        "B-LOC O B-PER O".split(),
        "B-LOC I-LOC I-LOC".split(),
    ]
    predicted = [
        "B-PER I-PER O B-PER".split(),  # right; right place, wrong type
        "B-LOC O O B-PER".split(),  # right; missed; made up
        "B-LOC I-LOC O".split(),  # right start and type, wrong end
    ]
    scores = score(predicted, gold)
    assert scores.overall == Score(num_correct=2, num_predicted=5, num_gold=5)
    assert scores.per_type == {"LOC": Score(1, 2, 3), "PER": Score(1, 3, 2)}
    assert (scores.accuracy, scores.num_labels) == (7 / 11, 11)
    assert scores.per_type["PER"].precision == 1 / 3
    assert scores.per_type["PER"].recall == 1 / 2
    assert scores.per_type["PER"].f1 == pytest.approx(0.4)
    assert scores.overall.f1 == pytest.approx(0.4)


def test_an_entity_does_not_cross_into_the_next_sentence() -> None:
    gold = [["O", "B-PER"], ["I-PER", "O"]]
    assert score(gold, gold).overall == Score(2, 2, 2)
    joined = [["O", "B-PER", "I-PER", "O"]]
    assert score(joined, joined).overall == Score(1, 1, 1)


def test_scoring_is_lenient_like_seqevals_default() -> None:
    """An entity may begin with I: the same span is right."""
    assert score([["I-PER", "I-PER", "O"]], [["B-PER", "I-PER", "O"]]).overall == Score(1, 1, 1)


def test_nothing_to_score() -> None:
    for score_ in (score([["O"]], [["O"]]).overall, Score(0, 0, 0)):
        assert (score_.precision, score_.recall, score_.f1) == (0.0, 0.0, 0.0)
    assert score([["O"]], [["O"]]).per_type == {}
    empty = score([], [])
    assert (empty.overall, empty.accuracy, empty.num_labels) == (Score(0, 0, 0), 0.0, 0)
    only_o = LabelSet(("O",))
    assert score([["O", "O"]], [["O", "O"]], only_o).accuracy == 1.0


def test_one_sided() -> None:
    missed = score([["O", "O"]], [["B-PER", "B-LOC"]]).overall
    assert (missed.precision, missed.recall, missed.f1) == (0.0, 0.0, 0.0)
    assert (missed.num_predicted, missed.num_gold) == (0, 2)
    made_up = score([["B-PER", "B-LOC"]], [["O", "O"]])
    assert made_up.overall == Score(0, 2, 0)
    assert made_up.per_type == {"LOC": Score(0, 1, 0), "PER": Score(0, 1, 0)}


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="2 predictions for 3 labels"):
        score([["O", "O"]], [["O", "O", "O"]])
