"""Kinds of errors, partial matches and all other counts of entities."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.v1 import precision_recall_fscore_support
from seqeval.scheme import IOB2, IOBES

from bertner.analysis import (
    FAMILIARITY,
    KINDS,
    Analysis,
    Inventory,
    Prediction,
    analyse,
    compare_analyses,
    familiarity,
    match_entities,
    take_inventory,
)
from bertner.corpus import Corpus, CorpusBuilder
from bertner.labels import Spans, detect_scheme, find_spans, split_tag
from tests import conlleval
from tests.conftest import corpus_of

many = settings(max_examples=200, deadline=None)

Sentences = list[list[str]]


def read(sentences: Sentences) -> Corpus:
    builder = CorpusBuilder("made-up")
    for line, tags in enumerate(sentences, 1):
        builder.add([f"w{k}" for k in range(len(tags))], tags, [line] * len(tags))
    return builder.finish("")


def predicted(sentences: Sentences, scheme: str = "IOB2") -> Prediction:
    parsed = [split_tag(tag) for tags in sentences for tag in tags]
    names = tuple(dict.fromkeys(kind for _, kind in parsed if kind is not None))
    return Prediction(
        np.array([prefix for prefix, _ in parsed], dtype=np.int8),
        np.array([-1 if kind is None else names.index(kind) for _, kind in parsed]),
        names,
        scheme,
    )


def analysis_of(gold: str, said: str) -> Analysis:
    """Of tags such as "B-X I-X O, B-Y": sentences stand between commas."""
    both = [[part.split() for part in text.split(",")] for text in (gold, said)]
    return analyse(read(both[0]), predicted(both[1]))


@st.composite
def pairs(draw: st.DrawFn, prefixes: str = "BI") -> tuple[Sentences, Sentences]:
    tag = st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in "XY")])
    gold = draw(st.lists(st.lists(tag, min_size=1, max_size=8), min_size=1, max_size=5))
    said = [[draw(tag) if draw(st.integers(0, 2)) == 0 else t for t in tags] for tags in gold]
    return gold, said


def inventory_of(corpus: Corpus) -> Inventory:
    """In blocks of one sentence."""
    return take_inventory(corpus.blocks(1), corpus.type_names)


def as_counts(analysis: Analysis) -> dict[str, int]:
    return dict(zip(KINDS, analysis.errors().sum(0).tolist(), strict=True))


@pytest.mark.parametrize(
    ("gold", "said", "expected"),
    [
        ("B-X I-X O", "B-X I-X O", "correct"),
        ("B-X I-X O", "B-Y I-Y O", "type"),
        ("B-X I-X O", "B-X O O", "boundary"),
        ("O B-X O", "B-X I-X I-X", "boundary"),
        ("B-X I-X O", "O B-Y I-Y", "boundary and type"),
        ("B-X O O", "O O O", "missed"),
        ("O O O", "O B-X O", "spurious"),
        ("B-X O O", "O B-X O", "missed, spurious"),
        # One gold entity, two parts of it: the one of its type, and a spurious one.
        ("B-X I-X I-X", "B-Y I-Y B-X", "boundary, spurious"),
        # Of the same type the longer part.
        ("B-X I-X I-X", "B-X B-X I-X", "boundary, spurious"),
        # The same words go before the same type.
        ("B-X B-Y", "B-Y B-X", "type, type"),
        ("B-X I-X B-Y, B-X", "B-X I-X B-X, O", "correct, type, missed"),
        # Neighbours do not overlap, nor do entities at the border of sentences.
        ("B-X, B-X", "O, B-X", "missed, correct"),
    ],
)
def test_kinds_by_hand(gold: str, said: str, expected: str) -> None:
    analysis = analysis_of(gold, said)
    assert ", ".join(KINDS[kind] for kind in analysis.matching.kinds) == expected


@many
@given(pairs())
def test_every_entity_is_in_one_match(case: tuple[Sentences, Sentences]) -> None:
    gold, said = case
    analysis = analyse(read(gold), predicted(said))
    matching, true, found = analysis.matching, analysis.true, analysis.found
    assert sorted(matching.true[matching.true >= 0]) == list(range(len(true)))
    assert sorted(matching.found[matching.found >= 0]) == list(range(len(found)))
    places = []
    for t, f, kind in zip(matching.true, matching.found, matching.kinds, strict=True):
        places.append(true.start[t] if t >= 0 else found.start[f])
        if t < 0 or f < 0:
            assert KINDS[kind] == ("missed" if f < 0 else "spurious")
            continue
        assert max(true.start[t], found.start[f]) < min(true.end[t], found.end[f])
        same_words = (true.start[t], true.end[t]) == (found.start[f], found.end[f])
        same_type = true.type[t] == found.type[f]
        name = {
            (True, True): "correct",
            (True, False): "type",
            (False, True): "boundary",
            (False, False): "boundary and type",
        }[same_words, bool(same_type)]
        assert KINDS[kind] == name
    assert places == sorted(places)
    # What is left over on both sides shares no word.
    missed = [t for t, f in zip(matching.true, matching.found, strict=True) if f < 0]
    spurious = [f for t, f in zip(matching.true, matching.found, strict=True) if t < 0]
    for t, f in itertools.product(missed, spurious):
        assert true.end[t] <= found.start[f] or found.end[f] <= true.start[t]
    assert as_counts(analysis)["correct"] == analysis.word.overall.num_correct


@many
@given(pairs("BIES"))
def test_word_scores_are_conllevals(case: tuple[Sentences, Sentences]) -> None:
    gold, said = case
    analysis = analyse(read(gold), predicted(said))
    counts = conlleval.Counts(gold, said)
    overall = analysis.word.overall
    assert (overall.num_correct, overall.num_predicted, overall.num_gold) == (
        counts.correct.total(),
        counts.found.total(),
        counts.gold.total(),
    )


@many
@given(st.sampled_from(["BI", "BIES"]).flatmap(lambda p: st.tuples(st.just(p), pairs(p))))
def test_strict_scores_are_seqevals(case: tuple[str, tuple[Sentences, Sentences]]) -> None:
    prefixes, (gold, said) = case
    scheme, theirs = ("IOB2", IOB2) if prefixes == "BI" else ("BIOES", IOBES)
    corpus = read(gold)
    # What the file is, is found out from its tags; seqeval is told.
    object.__setattr__(corpus, "scheme", scheme)
    scores = analyse(corpus, predicted(said, scheme)).strict.overall
    wanted = precision_recall_fscore_support(
        gold, said, average="micro", scheme=theirs, zero_division=0
    )
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx(wanted[:3])


def test_muc_by_hand() -> None:
    gold = "B-X I-X O, B-X O, B-Y I-Y, B-X, O"
    said = "B-X O O, B-Y O, B-Y I-Y, O, B-X"
    analysis = analysis_of(gold, said)  # boundary, type, correct, missed, spurious
    muc = analysis.muc()
    assert muc["strict"] == {
        "correct": 1,
        "incorrect": 2,
        "partial": 0,
        "missed": 1,
        "spurious": 1,
        "precision": 1 / 4,
        "recall": 1 / 4,
        "f1": 1 / 4,
    }
    assert muc["exact"]["correct"] == 2
    assert muc["type"]["correct"] == 2
    assert muc["partial"] == {
        "correct": 2,
        "incorrect": 0,
        "partial": 1,
        "missed": 1,
        "spurious": 1,
        "precision": 2.5 / 4,
        "recall": 2.5 / 4,
        "f1": 2.5 / 4,
    }


@many
@given(pairs())
def test_strict_muc_is_the_plain_score(case: tuple[Sentences, Sentences]) -> None:
    gold, said = case
    analysis = analyse(read(gold), predicted(said))
    muc, overall = analysis.muc(), analysis.word.overall
    for name in ("precision", "recall", "f1"):
        assert muc["strict"][name] == pytest.approx(getattr(overall, name))
        assert muc["strict"][name] <= min(muc["exact"][name], muc["type"][name])
        assert muc["exact"][name] <= muc["partial"][name]


@many
@given(pairs())
def test_all_parts_add_up(case: tuple[Sentences, Sentences]) -> None:
    gold, said = case
    analysis = analyse(read(gold), predicted(said))
    overall, inventory = analysis.word.overall, inventory_of(read(said))
    for parts in (analysis.by_length(), analysis.by_training(inventory)):
        for name in ("num_correct", "num_predicted", "num_gold"):
            assert sum(getattr(part, name) for part in parts.values()) == getattr(overall, name)
    for unit in ("document", "sentence"):
        totals = analysis.counts(unit).sum((0, 1)).tolist()
        assert totals == [overall.num_correct, overall.num_predicted, overall.num_gold]
    confusion = analysis.confusion()
    assert confusion.sum() == len(analysis.matching.kinds)
    assert confusion[:-1].sum() == overall.num_gold
    assert confusion[:, :-1].sum() == overall.num_predicted
    values = list(analysis.sentences())
    assert sum(len(each["gold"]) for each in values) == overall.num_gold
    assert sum(len(each["predicted"]) for each in values) == overall.num_predicted
    for each, tags in zip(values, gold, strict=True):
        assert len(each["words"]) == len(tags)
        named = {tuple(entity) for entity in each["gold"]}
        assert named == set(conlleval.entities([tags]))
        matched = [m[0] for m in each["matches"] if m[0] >= 0]
        assert sorted(matched) == list(range(len(each["gold"])))
        matched = [m[1] for m in each["matches"] if m[1] >= 0]
        assert sorted(matched) == list(range(len(each["predicted"])))


def test_seen_and_unseen_in_training() -> None:
    training = corpus_of("Paris/B-LOC said Mary/B-PER Poe/I-PER", "Bank/B-ORG Bank/B-LOC")
    inventory = inventory_of(training)
    assert inventory == {("Paris",): {"LOC"}, ("Mary", "Poe"): {"PER"}, ("Bank",): {"ORG", "LOC"}}
    corpus = corpus_of("Paris/B-LOC Mary/B-ORG Poe/I-ORG Mary/B-PER Bank/B-LOC")
    said = Prediction(corpus.prefixes, corpus.types, corpus.type_names, "IOB2")
    parts = analyse(corpus, said).by_training(inventory)
    assert {name: part.num_gold for name, part in parts.items()} == {
        "seen": 2,
        "other type": 1,
        "unseen": 1,
    }


def test_familiarity_by_hand() -> None:
    training = corpus_of("a/B-X b/I-X", "c/B-X a", "c/B-Y")
    corpus = corpus_of("a/B-X b/I-X", "a/B-Y b/I-Y", "a/B-X c/B-Y", "c/B-X")
    spans = find_spans(corpus.prefixes, corpus.types, corpus.starts[:-1])
    of_each = familiarity(corpus, spans, corpus.type_names, inventory_of(training))
    assert [FAMILIARITY[k] for k in of_each] == ["seen", "other type", "unseen", "seen", "seen"]


def test_types_of_either_side_alone() -> None:
    analysis = analysis_of("B-X O", "O B-Z")
    assert analysis.type_names == ("X", "Z")
    assert analysis.word.per_type["X"].num_gold == 1
    assert analysis.word.per_type["Z"].num_predicted == 1
    assert analysis.confusion().tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_units_of_intervals() -> None:
    few = read([["O"]] * 5)
    assert analyse(few, predicted([["O"]] * 5)).unit() == "sentence"
    builder = CorpusBuilder("made-up")
    builder.marks_documents = True
    for document in range(30):
        builder.document = document
        builder.add(["a"], ["O"], [document])
    marked = analyse(builder.finish(""), predicted([["O"]] * 30))
    assert marked.unit() == "document"
    assert marked.unit("sentence") == "sentence"


def test_a_comparison() -> None:
    gold = [["B-X", "O"], ["O", "B-Y"], ["B-X", "I-X"]] * 20
    worse = [["B-X", "O"], ["O", "B-X"], ["B-X", "I-X"]] * 20
    corpus = read(gold)
    first, second = analyse(corpus, predicted(gold)), analyse(corpus, predicted(worse))
    result = compare_analyses(first, second, samples=200)
    assert result["difference"] == pytest.approx(1 / 3)
    assert result["interval"][0] > 0.2
    assert result["p_value"] < 0.01
    assert result["num_differ"] == 20
    assert result["per_type"]["Y"]["difference"] == 1.0
    same = compare_analyses(first, first, samples=200)
    assert (same["difference"], same["p_value"], same["num_differ"]) == (0.0, 1.0, 0)
    shown = [each for each in first.sentences(second) if each["other"] != each["predicted"]]
    assert len(shown) == 20


def test_a_prediction_of_other_words_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tags for 1 words"):
        analyse(read([["O"]]), predicted([["O", "O"]]))


def test_spans_on_both_sides_may_be_none() -> None:
    empty = np.zeros(0, dtype=np.int64)
    matching = match_entities(Spans(empty, empty, empty), Spans(empty, empty, empty))
    assert len(matching.kinds) == 0
    assert detect_scheme(np.zeros(0, np.int8), np.zeros(0, np.int16), empty).name == "IOB2"
