"""Repaired label sequences, against a search over every sequence there is."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bertner import decoding
from bertner.decoding import is_legal, repair, stranded_types
from bertner.labels import SCHEMES, IntArray, LabelSet, label_list, scheme_exceptions

many = settings(max_examples=300, deadline=None)

Scores = NDArray[np.float32]
CONLL = LabelSet(tuple(label_list(["PER", "ORG", "LOC", "MISC"])))


@st.composite
def label_sets(draw: st.DrawFn, max_size: int = 13) -> LabelSet:
    """Labels of one or two types in any order, some of them missing, O always there."""
    prefixes = draw(st.sampled_from(["BI", "BIES", "BILU", "BIESLU"]))
    names = [f"{prefix}-{kind}" for prefix in prefixes for kind in "XY"]
    kept = draw(st.lists(st.sampled_from(names), unique=True, max_size=max_size - 1))
    return LabelSet(tuple(draw(st.permutations(["O", *kept]))))


schemes = st.sampled_from([None, *SCHEMES])
seeds = st.integers(0, 2**32 - 1)


def starts_of(lengths: list[int]) -> IntArray:
    return np.cumsum([0, *lengths])[:-1].astype(np.int64)


def random_words(label_set: LabelSet, lengths: list[int], seed: int) -> tuple[IntArray, Scores]:
    """Scores of sum(lengths) words, and their argmax."""
    logits = np.random.default_rng(seed).normal(size=(sum(lengths), len(label_set.names))) * 2
    scores = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    return scores.argmax(axis=1).astype(np.int16), scores


def irregular_sentences(
    labels: IntArray, starts: IntArray, label_set: LabelSet, scheme: str | None
) -> IntArray:
    """(num_sentences,) whether each has a word that `scheme_exceptions` reports."""
    exceptions = scheme_exceptions(label_set.prefix_of[labels], label_set.type_of[labels], starts)
    words = exceptions[scheme or label_set.scheme]
    irregular = np.zeros(len(starts), dtype=bool)
    irregular[np.searchsorted(starts, words, side="right") - 1] = True
    return irregular


def best_by_search(scores: Scores, label_set: LabelSet, scheme: str | None) -> IntArray:
    """The best legal labels of a sentence, of all (L ** W) sequences."""
    num_words, num_labels = scores.shape
    choices = np.indices((num_labels,) * num_words).reshape(num_words, -1).T
    choices = choices[:, ::-1]  # the last word counts first, so of equals the first is to be taken
    starts = np.arange(len(choices)) * num_words
    legal = ~irregular_sentences(choices.ravel(), starts, label_set, scheme)
    floored = np.nan_to_num(scores.astype(np.float64), nan=-1e9, neginf=-1e9)
    sums = floored[np.arange(num_words), choices].sum(axis=1)
    best: IntArray = choices[np.where(legal, sums, -np.inf).argmax()]
    return best


@many
@given(label_sets(), schemes, st.lists(st.integers(0, 5), max_size=6), seeds)
def test_legal_is_what_scheme_exceptions_does_not_report(
    label_set: LabelSet, scheme: str | None, lengths: list[int], seed: int
) -> None:
    starts = starts_of(lengths)
    labels, _ = random_words(label_set, lengths, seed)
    irregular = irregular_sentences(labels, starts, label_set, scheme)
    np.testing.assert_array_equal(is_legal(labels, starts, label_set, scheme), ~irregular)


@many
@given(st.data(), label_sets(max_size=6), schemes, st.integers(1, 4))
def test_a_broken_sentence_gets_the_best_legal_sequence(
    data: st.DataObject, label_set: LabelSet, scheme: str | None, num_words: int
) -> None:
    """Few values, which sums hold exactly, so that many sequences are equally good."""
    size = num_words * len(label_set.names)
    values = st.sampled_from([0, -0.25, -0.5, -2, -7, -500, -np.inf, np.nan])
    drawn = data.draw(st.lists(values, min_size=size, max_size=size))
    scores = np.array(drawn, dtype=np.float32).reshape(num_words, -1)
    labels = np.fmax(scores, -np.inf).argmax(axis=1)
    starts = np.array([0])
    expected = labels
    if not is_legal(labels, starts, label_set, scheme)[0]:
        expected = best_by_search(scores, label_set, scheme)
    repaired, num_repaired = repair(labels, scores, starts, label_set, scheme)
    assert repaired.tolist() == expected.tolist()
    assert num_repaired == np.count_nonzero(expected != labels)


@many
@given(label_sets(), schemes, st.lists(st.integers(0, 9), max_size=12), seeds)
def test_sentences_become_legal_each_by_itself(
    label_set: LabelSet, scheme: str | None, lengths: list[int], seed: int
) -> None:
    starts = starts_of(lengths)
    labels, scores = random_words(label_set, lengths, seed)
    given_labels, given_scores = labels.copy(), scores.copy()
    with mock.patch.object(decoding, "_CELLS", 3 * len(label_set.names) ** 2):  # three at a time
        repaired, num_repaired = repair(labels, scores, starts, label_set, scheme)

    assert is_legal(repaired, starts, label_set, scheme).all()
    assert repaired.dtype == labels.dtype
    assert num_repaired == np.count_nonzero(repaired != labels)
    np.testing.assert_array_equal(labels, given_labels)
    np.testing.assert_array_equal(scores, given_scores)
    for start, length in zip(starts, lengths, strict=True):
        words = slice(start, start + length)
        alone, _ = repair(labels[words], scores[words], np.array([0]), label_set, scheme)
        np.testing.assert_array_equal(repaired[words], alone)


@many
@given(label_sets(), schemes, st.lists(st.integers(0, 9), max_size=12), seeds)
def test_a_legal_sentence_stays_whatever_the_scores(
    label_set: LabelSet, scheme: str | None, lengths: list[int], seed: int
) -> None:
    starts = starts_of(lengths)
    labels, scores = random_words(label_set, lengths, seed)
    legal, _ = repair(labels, scores, starts, label_set, scheme)
    for others in (np.zeros_like(scores), -scores):  # all tie; others are better
        repaired, num_repaired = repair(legal, others, starts, label_set, scheme)
        np.testing.assert_array_equal(repaired, legal)
        assert repaired is not legal
        assert num_repaired == 0


@many
@given(st.data(), label_sets(), schemes, st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_words_that_must_be_o_are(
    data: st.DataObject, label_set: LabelSet, scheme: str | None, lengths: list[int]
) -> None:
    starts = starts_of(lengths)
    labels, scores = random_words(label_set, lengths, data.draw(seeds))
    forced = np.array(
        data.draw(st.lists(st.booleans(), min_size=len(labels), max_size=len(labels)))
    )
    labels[forced] = label_set.outside
    scores[forced] = -np.inf
    scores[forced, label_set.outside] = 0
    repaired, _ = repair(labels, scores, starts, label_set, scheme)
    assert np.all(repaired[forced] == label_set.outside)
    assert is_legal(repaired, starts, label_set, scheme).all()


def decode_by_hand(words: list[dict[str, float]], names: str) -> str:
    """Labels of one sentence; labels that a word does not name have a score of -9."""
    label_set = LabelSet(tuple(names.split()))
    scores = np.array([[word.get(name, -9) for name in label_set.names] for word in words])
    repaired, _ = repair(scores.argmax(axis=1), scores, np.array([0]), label_set)
    return " ".join(label_set.names[label] for label in repaired)


BIO = "O B-X I-X B-Y I-Y"
BIOES = "O B-X I-X E-X S-X B-Y"


@pytest.mark.parametrize(
    ("words", "names", "expected"),
    [
        ([{"O": -1}, {"I-X": -1, "B-X": -2}], BIO, "O B-X"),
        ([{"O": -1}, {"I-X": -1, "B-X": -6, "O": -4}], BIO, "O O"),
        ([{"O": -1, "B-X": -1.5}, {"I-X": -1, "B-X": -2}], BIO, "B-X I-X"),
        ([{"B-X": -1, "B-Y": -2}, {"I-Y": -1}, {"I-Y": -1, "I-X": -3}], BIO, "B-Y I-Y I-Y"),
        ([{"B-X": -1, "S-X": -2}, {"O": -1}], BIOES, "S-X O"),
        ([{"B-X": -1}, {"I-X": -1, "E-X": -2}], BIOES, "B-X E-X"),
        ([{"B-Y": -1, "O": -5}, {"E-X": -1, "B-Y": -2, "O": -3}], BIOES, "O O"),  # no E-Y
        ([{"O": -1}, {"B-X": -1, "I-X": -2}], "O B-X I-X I-Y", "O I-X"),  # IOB1
    ],
)
def test_sentences_by_hand(words: list[dict[str, float]], names: str, expected: str) -> None:
    assert decode_by_hand(words, names) == expected


def test_impossible_scores_still_give_a_legal_sequence() -> None:
    """A word that can only be I-PER: the rest is decided by score, with as few such words."""
    per, inside = CONLL.index["B-PER"], CONLL.index["I-PER"]
    scores = np.full((3, 9), -3, dtype=np.float32)
    scores[:, CONLL.outside] = -5
    scores[1] = -np.inf
    scores[1, inside] = 0
    scores[0, CONLL.index["B-LOC"]] = -0.5
    scores[2, CONLL.index["B-ORG"]] = -1
    repaired, num_repaired = repair(scores.argmax(axis=1), scores, np.array([0]), CONLL)
    assert repaired.tolist() == [per, inside, CONLL.index["B-ORG"]]
    assert num_repaired == 1

    nothing = np.full((3, 9), -np.inf, dtype=np.float32)
    repaired, num_repaired = repair(np.full(3, inside), nothing, np.array([0]), CONLL)
    assert repaired.tolist() == [CONLL.outside] * 3
    assert num_repaired == 3


def test_sums_are_in_double_precision() -> None:
    """In float32, 20,000 words would hide the difference that decides the last one."""
    scores = np.full((20_000, 3), -100, dtype=np.float32)
    scores[:, 0] = -0.3
    scores[-1] = [-0.5001, -0.5, -0.4]  # O, B-X, I-X
    label_set = LabelSet(("O", "B-X", "I-X"))
    repaired, num_repaired = repair(scores.argmax(axis=1), scores, np.array([0]), label_set)
    assert num_repaired == 1
    assert repaired[-1] == label_set.index["B-X"]
    assert not repaired[:-1].any()


def test_no_sentences_and_no_words() -> None:
    none, empty = np.zeros(0, dtype=np.int64), np.zeros((0, 9), dtype=np.float32)
    assert is_legal(none, none, CONLL).tolist() == []
    assert is_legal(none, np.array([0, 0]), CONLL).tolist() == [True, True]
    repaired, num_repaired = repair(none, empty, np.array([0, 0]), CONLL)
    assert (repaired.tolist(), num_repaired) == ([], 0)


@pytest.mark.parametrize("starts", [[], [1], [0, 3, 2], [0, 5]])
def test_starts_that_divide_no_words_are_refused(starts: list[int]) -> None:
    labels, scores = random_words(CONLL, [4], seed=0)
    with pytest.raises(ValueError, match="ascend from 0"):
        repair(labels, scores, np.array(starts, dtype=np.int64), CONLL)


def test_scores_of_another_shape_are_refused() -> None:
    labels, scores = random_words(CONLL, [4], seed=0)
    with pytest.raises(ValueError, match=r"scores are \(4, 8\), not \(4, 9\)"):
        repair(labels, scores[:, :8], np.array([0]), CONLL)


@pytest.mark.parametrize(
    ("names", "lost"),
    [
        ("O B-X I-X B-Y", []),
        ("O I-X", []),
        ("O B-X I-X E-X S-Y", []),
        ("O I-X E-X S-Y", ["X"]),  # IOE, of which BIOES is only a guess
        ("O B-X I-X S-Y", ["X"]),  # an entity of X could never end
        ("O", []),
    ],
)
def test_types_that_no_legal_sequence_has(names: str, lost: list[str]) -> None:
    assert stranded_types(LabelSet(tuple(names.split()))) == lost
