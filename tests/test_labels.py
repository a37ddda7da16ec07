"""Entities, schemes and label lists, against conlleval's rule written out and against seqeval."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB1, IOB2, IOBES, Entities

from bertner.labels import (
    SCHEMES,
    B,
    E,
    I,
    IntArray,
    LabelSet,
    O,
    S,
    Spans,
    detect_scheme,
    find_spans,
    from_iob2,
    label_list,
    scheme_exceptions,
    split_tag,
    strict_spans,
    to_iob2,
)
from tests import conlleval

many = settings(max_examples=400, deadline=None)

Sentences = list[list[str]]


def tags(prefixes: str, types: Sequence[str] = ("X", "Y")) -> st.SearchStrategy[str]:
    return st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in prefixes for kind in types)])


def corpora(prefixes: str, min_size: int = 0) -> st.SearchStrategy[Sentences]:
    """Several sentences of any tags, so with every kind of break, and empty ones."""
    return st.lists(st.lists(tags(prefixes), min_size=min_size, max_size=9), max_size=4)


def arrays(sentences: Sentences) -> tuple[IntArray, IntArray, IntArray]:
    """(prefixes, types, starts), with X, Y, Z as types 0, 1, 2."""
    parsed = [split_tag(tag) for sentence in sentences for tag in sentence]
    prefixes = np.array([prefix for prefix, _ in parsed], dtype=np.int8)
    types = np.array([-1 if t is None else "XYZ".index(t) for _, t in parsed], dtype=np.int16)
    starts = np.cumsum([0, *map(len, sentences)])[:-1]
    return prefixes, types, starts.astype(np.int64)


def tuples(spans: Spans) -> list[conlleval.Entity]:
    rows = zip(spans.start, spans.end, spans.type, strict=True)
    return [(int(start), int(end), "XYZ"[kind]) for start, end, kind in rows]


def found(sentences: Sentences) -> list[conlleval.Entity]:
    return tuples(find_spans(*arrays(sentences)))


@many
@given(corpora("BIES"))
def test_spans_are_conllevals(sentences: Sentences) -> None:
    assert found(sentences) == conlleval.entities(sentences)


@many
@given(st.sampled_from(["BI", "IE", "S"]).flatmap(corpora))
def test_spans_are_those_of_the_script_itself_in_the_schemes_it_knows(sentences: Sentences) -> None:
    assert found(sentences) == conlleval.entities(sentences, mixed=False)


@many
@given(corpora("BIES"))
def test_spans_are_seqevals(sentences: Sentences) -> None:
    expected = []
    offset = 0
    for sentence in sentences:
        for kind, first, last in get_entities(sentence):
            expected.append((first + offset, last + 1 + offset, kind))
        offset += len(sentence)
    assert found(sentences) == expected


@many
@given(corpora("BIESLU"))
def test_every_tagged_word_is_in_one_entity_of_its_type(sentences: Sentences) -> None:
    prefixes, types, starts = arrays(sentences)
    spans = find_spans(prefixes, types, starts)
    covered = np.full(len(prefixes), -1)
    for start, end, kind in zip(spans.start, spans.end, spans.type, strict=True):
        assert start < end
        assert np.all(covered[start:end] == -1)
        covered[start:end] = kind
        assert not np.any((starts > start) & (starts < end))  # none crosses a sentence's border
    np.testing.assert_array_equal(covered, types)
    assert len(spans) == len(spans.start)


@pytest.mark.parametrize(
    ("sentences", "expected"),
    [
        ("", []),
        ("O", []),
        ("B-X I-X", [(0, 2, "X")]),
        ("B-X B-X", [(0, 1, "X"), (1, 2, "X")]),
        ("I-X I-X", [(0, 2, "X")]),
        ("I-X I-Y", [(0, 1, "X"), (1, 2, "Y")]),
        ("B-X I-Y O", [(0, 1, "X"), (1, 2, "Y")]),
        ("O E-X E-X", [(1, 2, "X"), (2, 3, "X")]),
        ("B-X E-X I-X", [(0, 2, "X"), (2, 3, "X")]),
        ("S-X I-X E-X", [(0, 1, "X"), (1, 3, "X")]),
        ("B-X S-X", [(0, 1, "X"), (1, 2, "X")]),
        ("B-X L-X U-X", [(0, 2, "X"), (2, 3, "X")]),
        ("B-X|I-X", [(0, 1, "X"), (1, 2, "X")]),  # | is the border of a sentence
        ("I-X|I-X|I-X I-X", [(0, 1, "X"), (1, 2, "X"), (2, 4, "X")]),
    ],
)
def test_spans_by_hand(sentences: str, expected: list[conlleval.Entity]) -> None:
    assert found([sentence.split() for sentence in sentences.split("|")]) == expected


# Entities laid out in sentences: (type, length in words, words of O before it).
layouts = st.lists(
    st.lists(st.tuples(st.sampled_from("XYZ"), st.integers(1, 4), st.integers(0, 2)), max_size=5),
    max_size=4,
)
Layout = list[list[tuple[str, int, int]]]


def render(layout: Layout, scheme: str) -> Sentences:
    """Tags of a layout in a scheme, entity by entity."""
    sentences = []
    for sentence in layout:
        rendered: list[str] = []
        last = ""  # type of the entity that ends at the word before
        for kind, length, gap in sentence:
            rendered += ["O"] * gap
            if scheme == "IOB1":
                prefixes = ("B" if last == kind and not gap else "I") + "I" * (length - 1)
            elif scheme == "IOB2":
                prefixes = "B" + "I" * (length - 1)
            else:
                begin, inside, end, single = scheme[0], scheme[1], scheme[3], scheme[4]
                prefixes = single if length == 1 else begin + inside * (length - 2) + end
            rendered += [f"{prefix}-{kind}" for prefix in prefixes]
            last = kind
        sentences.append([*rendered, "O"])
    return sentences


SPELLINGS = {"IOB1": "IOB1", "IOB2": "IOB2", "BIOES": "BIOES", "BIOLU": "BIOES"}


@many
@given(layouts, st.sampled_from(sorted(SPELLINGS)))
def test_each_scheme_is_known_and_becomes_iob2(layout: Layout, spelling: str) -> None:
    prefixes, types, starts = arrays(render(layout, spelling))
    scheme = detect_scheme(prefixes, types, starts)
    assert scheme.name == (SPELLINGS[spelling] if any(layout) else "IOB2")
    assert scheme.irregular.tolist() == []

    converted = to_iob2(prefixes, types, starts)
    expected, _, _ = arrays(render(layout, "IOB2"))
    np.testing.assert_array_equal(converted, expected)


@many
@given(corpora("BIES"))
def test_conversion_keeps_the_entities_of_any_sequence(sentences: Sentences) -> None:
    prefixes, types, starts = arrays(sentences)
    converted = to_iob2(prefixes, types, starts)
    assert set(converted.tolist()) <= {O, B, I}
    assert converted.dtype == np.int8
    assert tuples(find_spans(converted, types, starts)) == found(sentences)
    np.testing.assert_array_equal(to_iob2(converted, types, starts), converted)
    scheme = detect_scheme(converted, types, starts)
    assert (scheme.name, scheme.irregular.tolist()) == ("IOB2", [])


@many
@given(corpora("BI"), st.sampled_from(SCHEMES))
def test_iob2_becomes_any_scheme_and_keeps_its_entities(sentences: Sentences, scheme: str) -> None:
    prefixes, types, starts = arrays(sentences)
    prefixes = to_iob2(prefixes, types, starts)
    converted = from_iob2(prefixes, types, starts, scheme)
    assert not len(scheme_exceptions(converted, types, starts)[scheme])
    assert tuples(find_spans(converted, types, starts)) == tuples(
        find_spans(prefixes, types, starts)
    )
    np.testing.assert_array_equal(to_iob2(converted, types, starts), prefixes)


STRICT = {"IOB1": IOB1, "IOB2": IOB2, "BIOES": IOBES}


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(sorted(STRICT)), st.data())
def test_strict_spans_are_seqevals(scheme: str, data: st.DataObject) -> None:
    sentences = data.draw(corpora("BIES" if scheme == "BIOES" else "BI", min_size=1))
    expected, offset = [], 0
    for sentence, entities in zip(
        sentences, Entities(sentences, STRICT[scheme]).entities, strict=True
    ):
        expected += [(e.start + offset, e.end + offset, e.tag) for e in entities]
        offset += len(sentence)
    assert tuples(strict_spans(*arrays(sentences), scheme)) == expected


@pytest.mark.parametrize(
    ("sentences", "name", "irregular"),
    [
        ("O O", "IOB2", []),
        ("", "IOB2", []),
        ("B-X O B-Y", "IOB2", []),  # single words
        ("I-X O I-Y", "IOB1", []),
        ("S-X O S-Y", "BIOES", []),
        ("I-X I-X O I-Y", "IOB1", []),  # nothing adjacent, so no B at all
        ("I-X B-X I-X", "IOB1", []),
        ("I-X I-Y", "IOB1", []),
        ("I-X|I-X", "IOB1", []),
        ("B-X B-X", "IOB2", []),
        ("B-X I-X O I-Y O B-Y O B-X", "IOB2", [3]),  # a stray I
        ("B-X|I-X|B-X", "IOB2", [1]),
        ("B-X I-Y O B-X", "IOB2", [1]),
        ("I-X O B-X O I-X O I-Y", "IOB1", [2]),  # a stray B
        ("I-X O B-X", "IOB2", [0]),  # as many of each
        ("B-X O S-X O B-Y", "IOB2", [2]),  # a stray S does not make it BIOES
        ("I-X O E-X O I-Y", "IOB1", [2]),
        ("B-X O S-X", "BIOES", [0]),
        ("B-X E-X O B-X", "BIOES", [3]),  # never ends
        ("S-X O I-X E-X S-X S-X", "BIOES", [2]),
        ("S-X B-X E-Y S-Y S-X", "BIOES", [1, 2]),
        ("S-X S-X S-X B-X I-X O", "BIOES", [4]),
        ("S-X S-X S-X B-X I-X|E-X", "BIOES", [4, 5]),
    ],
)
def test_scheme_by_hand(sentences: str, name: str, irregular: list[int]) -> None:
    scheme = detect_scheme(*arrays([sentence.split() for sentence in sentences.split("|")]))
    assert (scheme.name, scheme.irregular.tolist()) == (name, irregular)


@many
@given(corpora("BI"))
def test_irregular_tags_are_those_that_differ_from_the_scheme(sentences: Sentences) -> None:
    """In IOB1 and IOB2 a tag is irregular just where writing the entities anew changes it."""
    prefixes, types, starts = arrays(sentences)
    scheme = detect_scheme(prefixes, types, starts)
    expected = to_iob2(prefixes, types, starts).copy()
    if scheme.name == "IOB1":
        spans = find_spans(prefixes, types, starts)
        for k in np.flatnonzero(expected == B):
            previous = np.flatnonzero((spans.end == k) & (spans.type == types[k]))
            if len(previous) == 0 or k in starts:
                expected[k] = I
    np.testing.assert_array_equal(scheme.irregular, np.flatnonzero(prefixes != expected))


def test_label_list_has_conlls_own_order() -> None:
    expected = "O B-PER I-PER B-ORG I-ORG B-LOC I-LOC B-MISC I-MISC".split()
    assert label_list(["LOC", "MISC", "ORG", "PER"]) == expected
    assert label_list(iter(["PER", "MISC", "ORG", "PER", "LOC"])) == expected


def test_label_list_is_alphabetical_for_other_types() -> None:
    assert label_list(["PER", "LOC"]) == "O B-LOC I-LOC B-PER I-PER".split()
    assert label_list(["b", "B", "a-c"]) == "O B-B I-B B-a-c I-a-c B-b I-b".split()
    five = ["PER", "ORG", "LOC", "MISC", "DATE"]
    assert label_list(five)[1::2] == [f"B-{kind}" for kind in sorted(five)]
    assert label_list([]) == ["O"]


@many
@given(st.data())
def test_label_list_does_not_depend_on_the_order_of_types(data: st.DataObject) -> None:
    types = data.draw(st.lists(st.text(min_size=1, max_size=3), unique=True, max_size=5))
    types = data.draw(st.sampled_from([types, ["PER", "ORG", "LOC", "MISC"]]))
    assert label_list(data.draw(st.permutations(types))) == label_list(types)
    assert len(label_list(types)) == 2 * len(types) + 1


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("O", (O, None)),
        ("B-PER", (B, "PER")),
        ("I-PER", (I, "PER")),
        ("E-x", (E, "x")),
        ("L-x", (E, "x")),
        ("S-x", (S, "x")),
        ("U-x", (S, "x")),
        ("B-art-film", (B, "art-film")),
        ("I--", (I, "-")),
        ("B-地名", (B, "地名")),
    ],
)
def test_split_tag(tag: str, expected: tuple[int, str | None]) -> None:
    assert split_tag(tag) == expected


@pytest.mark.parametrize("tag", ["", "PER", "B", "B-", "-PER", "b-PER", "o", "X-PER", "PER-B", "0"])
def test_split_tag_refuses_what_is_no_tag(tag: str) -> None:
    with pytest.raises(ValueError, match="has no B-, I-, E- or S- in front"):
        split_tag(tag)


def test_a_refused_tag_is_shown_in_short() -> None:
    with pytest.raises(ValueError) as caught:
        split_tag("x" * 10_000)
    assert len(str(caught.value)) < 200


def test_label_set() -> None:
    labels = LabelSet(("B-X", "O", "I-X", "S-Y", "E-Y", "B-Y", "I-Y", "B-Z"))
    assert labels.index["I-X"] == 2
    assert labels.outside == 1
    assert labels.types == ("X", "Y", "Z")
    assert labels.prefix_of.tolist() == [B, O, I, S, E, B, I, B]
    assert labels.type_of.tolist() == [0, -1, 0, 1, 1, 1, 1, 2]
    # B-X becomes I-X, B-Y becomes I-Y; B-Z has no I-Z to become; the rest stay.
    assert labels.continuation.tolist() == [2, 1, 2, 3, 4, 6, 6, 7]
    ids = np.array([labels.index[tag] for tag in "B-X I-X O I-X B-Z S-Y".split()])
    spans = labels.spans(ids, np.array([0, 3]))
    assert tuples(spans) == [(0, 2, "X"), (3, 4, "X"), (4, 5, "Z"), (5, 6, "Y")]


def test_label_set_refuses_names_that_are_no_tags() -> None:
    with pytest.raises(ValueError, match="LABEL_0"):
        _ = LabelSet(("LABEL_0", "LABEL_1")).types


ALL_LABELS = LabelSet(("O", *(f"{prefix}-{kind}" for prefix in "BIESLU" for kind in "XY")))


def assert_transitions_agree(sentences: Sentences) -> None:
    """A sentence has only allowed transitions just where `scheme_exceptions` reports nothing."""
    prefixes, types, starts = arrays(sentences)
    exceptions = scheme_exceptions(prefixes, types, starts)
    for scheme in SCHEMES:
        allowed = ALL_LABELS.transitions(scheme)
        for sentence, start in zip(sentences, starts, strict=True):
            labels = [ALL_LABELS.index[tag] for tag in ["O", *sentence, "O"]]
            words = range(start, start + len(sentence))
            irregular = set(words) & set(exceptions[scheme].tolist())
            legal = all(allowed[before, after] for before, after in itertools.pairwise(labels))
            assert legal == (not irregular), (scheme, sentence)


@many
@given(st.sampled_from(["BI", "BIES", "BILU", "BIESLU"]).flatmap(corpora))
def test_transitions_are_those_without_exceptions(sentences: Sentences) -> None:
    assert_transitions_agree(sentences)


def test_transitions_are_those_without_exceptions_in_every_short_sentence() -> None:
    for length in range(4):
        assert_transitions_agree(
            [list(s) for s in itertools.product(ALL_LABELS.names[:9], repeat=length)]
        )


@pytest.mark.parametrize(
    ("names", "scheme", "transitions"),
    [
        ("O B-X I-X", "IOB2", [[1, 1, 0], [1, 1, 1], [1, 1, 1]]),
        ("O B-X I-X", "IOB1", [[1, 0, 1], [1, 1, 1], [1, 1, 1]]),
        ("O B-X I-X", "BIOES", [[1, 1, 0], [0, 0, 1], [0, 0, 1]]),
        ("O B-X E-X", "BIOES", [[1, 1, 0], [0, 0, 1], [1, 1, 0]]),
        ("O S-X I-X", "IOB2", [[1, 0, 0], [0, 0, 0], [1, 0, 1]]),  # S has no place in it
        ("O I-X I-Y", "IOB2", [[1, 0, 0], [1, 1, 0], [1, 0, 1]]),
    ],
)
def test_transitions_by_hand(names: str, scheme: str, transitions: list[list[int]]) -> None:
    allowed = LabelSet(tuple(names.split())).transitions(scheme)
    assert allowed.astype(int).tolist() == transitions


@pytest.mark.parametrize(
    ("names", "scheme"),
    [
        ("O B-X I-X", "IOB2"),
        ("O B-X B-Y", "IOB2"),  # only entities of one word
        ("O I-X I-Y", "IOB1"),  # no two entities side by side
        ("O B-X I-X I-Y", "IOB1"),
        ("O B-X I-X B-Y", "IOB2"),
        ("O B-X I-Y", "IOB2"),
        ("O B-X B-Y B-Z I-X I-V", "IOB2"),
        ("O B-X I-X I-Y I-Z B-V", "IOB1"),
        ("O", "IOB2"),
        ("O B-X I-X E-X S-X", "BIOES"),
        ("O B-X I-X L-X U-X", "BIOES"),
        ("O B-X I-X E-X S-X I-Y", "BIOES"),
        ("O S-X", "BIOES"),
    ],
)
def test_scheme_of_a_label_list(names: str, scheme: str) -> None:
    labels = LabelSet(tuple(names.split()))
    assert labels.scheme == scheme
    np.testing.assert_array_equal(labels.transitions(), labels.transitions(scheme))


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="'BILOU' is none of BIOES, IOB2, IOB1"):
        LabelSet(("O",)).transitions("BILOU")
