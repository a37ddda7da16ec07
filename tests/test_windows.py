"""Which tokens a row reads and which are its own: nothing lost, nothing twice."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertner.labels import IntArray
from bertner.windows import Rows, cut_rows

# Pieces of each word, of each sentence, of each document.
WORD = st.one_of(st.integers(0, 3), st.integers(0, 9))
DOCUMENTS = st.lists(
    st.lists(st.lists(WORD, min_size=1, max_size=25), min_size=1, max_size=6),
    min_size=1,
    max_size=4,
)


@dataclasses.dataclass
class Text:
    """Sentences as flat arrays.

    Attributes:
        starts: (num_sentences + 1,) in tokens.
        word_ids: (num_tokens,).
        documents: (num_sentences,).
        sentence_of: (num_tokens,).
    """

    starts: IntArray
    word_ids: IntArray
    documents: IntArray
    sentence_of: IntArray


def text_of(documents: list[list[list[int]]], limit: int) -> Text:
    sentences = [sentence for document in documents for sentence in document]
    counts = [min(pieces, limit) for sentence in sentences for pieces in sentence]
    lengths = [sum(min(pieces, limit) for pieces in sentence) for sentence in sentences]
    return Text(
        np.cumsum([0, *lengths]),
        np.repeat(np.arange(len(counts)), counts),
        np.repeat(np.arange(len(documents)), [len(document) for document in documents]),
        np.repeat(np.arange(len(sentences)), lengths),
    )


def rows_of(text: Text, limit: int, overlap: int, **options: Any) -> Rows:
    return cut_rows(text.starts, text.word_ids, limit, overlap, **options)


def ranges(rows: Rows) -> list[tuple[int, int, int, int]]:
    """Of each row where it begins, where its own tokens begin and end, where it ends."""
    own = zip(rows.starts[:-1], rows.starts[1:], rows.before, rows.after, strict=True)
    return [(int(a - before), int(a), int(b), int(b + after)) for a, b, before, after in own]


@settings(max_examples=300, deadline=None)
@given(DOCUMENTS, st.integers(1, 40), st.data())
def test_rows_divide_the_tokens(
    documents: list[list[list[int]]], limit: int, data: st.DataObject
) -> None:
    text = text_of(documents, limit)
    overlap = data.draw(st.integers(0, limit // 2))
    options: dict[str, Any] = {}
    if data.draw(st.booleans()):
        options["documents"] = text.documents
        options["join"] = data.draw(st.booleans())
        options["context"] = data.draw(st.integers(0, 2 * limit))
    rows = rows_of(text, limit, overlap, **options)
    num_tokens = len(text.word_ids)
    assert (rows.starts[0], rows.starts[-1]) == (0, num_tokens)
    assert np.all(np.diff(rows.starts) >= 0)
    assert len(rows.sentences) == len(rows.before) == len(rows.after) == len(rows.starts) - 1
    assert np.all(np.diff(rows.sentences) >= 0)
    borders = np.append(np.flatnonzero(np.diff(text.word_ids, prepend=-1)), num_tokens)
    for row, (first, own, own_stop, stop) in enumerate(ranges(rows)):
        assert 0 <= first <= own <= own_stop <= stop <= num_tokens
        assert stop - first <= limit, "longer than a row"
        assert {first, own, own_stop, stop} <= set(borders.tolist()), "cut within a word"
        if own < own_stop:
            assert text.sentence_of[own] >= rows.sentences[row]
        read = text.sentence_of[first:stop]
        if "documents" in options:
            assert len(set(text.documents[read])) <= 1, "reads another document"
        else:
            assert len(set(read)) <= 1, "reads another sentence"
        if not options.get("join"):
            assert len(set(text.sentence_of[own:own_stop])) <= 1
    long = np.diff(text.starts) > limit
    assert rows.num_cut == np.count_nonzero(long)
    if not options.get("join"):
        assert len(rows.sentences) == rows.num_parts + np.count_nonzero(~long)
        assert set(rows.sentences) == set(range(len(text.starts) - 1)), "a sentence without a row"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=80), st.integers(6, 30), st.data())
def test_each_word_is_own_where_it_has_most_context(
    words: list[int], limit: int, data: st.DataObject
) -> None:
    text = text_of([[words]], limit)
    rows = rows_of(text, limit, data.draw(st.integers(0, limit // 2)))
    ends = np.cumsum(words)
    parts = ranges(rows)
    for begin, end in zip(ends - words, ends, strict=True):
        contexts = [
            min(begin - first, stop - end) if first <= begin and end <= stop else -1
            for first, _, _, stop in parts
        ]
        (decides,) = (k for k, part in enumerate(parts) if part[1] <= begin < part[2])
        # What lies beyond the sentence is no context that another row could have.
        at_border = begin < parts[0][3] // 2 or end > parts[-1][0] + limit // 2
        assert at_border or contexts[decides] == max(contexts)


def test_a_long_sentence_by_hand() -> None:
    text = text_of([[[1] * 20]], 8)
    rows = rows_of(text, 8, 4)
    assert ranges(rows) == [(0, 0, 6, 8), (4, 6, 10, 12), (8, 10, 14, 16), (12, 14, 20, 20)]
    assert (rows.num_cut, rows.num_parts) == (1, 4)
    assert ranges(rows_of(text, 8, 0)) == [(0, 0, 8, 8), (8, 8, 14, 16), (12, 14, 20, 20)]
    # Two sentences around it keep their places.
    text = text_of([[[1], [1] * 10, [0], [1, 1]]], 8)
    rows = rows_of(text, 8, 2)
    assert ranges(rows) == [
        (0, 0, 1, 1),
        (1, 1, 6, 9),
        (3, 6, 11, 11),
        (11, 11, 11, 11),
        (11, 11, 13, 13),
    ]
    assert rows.sentences.tolist() == [0, 1, 1, 2, 3]


def test_windows_of_whole_sentences_by_hand() -> None:
    text = text_of([[[2], [3], [4], [1], [1]], [[2], [2]]], 6)
    rows = rows_of(text, 6, 0, documents=text.documents, join=True)
    assert ranges(rows) == [(0, 0, 5, 5), (5, 5, 11, 11), (11, 11, 15, 15)]
    assert rows.sentences.tolist() == [0, 2, 5]


def test_context_by_hand() -> None:
    text = text_of([[[2], [3], [4], [1], [1]], [[2], [2]]], 8)
    rows = rows_of(text, 8, 0, documents=text.documents, context=3)
    assert ranges(rows) == [
        (0, 0, 2, 5),
        (0, 2, 5, 5),  # the word of four pieces after it would be cut
        (5, 5, 9, 11),  # four to spare, two for each side, and no room for all of the word before
        (9, 9, 10, 11),
        (9, 10, 11, 11),
        (11, 11, 13, 15),
        (11, 13, 15, 15),
    ]


def test_context_is_shared_out_evenly() -> None:
    text = text_of([[[1] * 20, [1] * 3, [1] * 20], [[1] * 2, [1] * 3, [1] * 20]], 23)
    rows = rows_of(text, 13, 0, documents=text.documents, context=30)
    parts = ranges(rows)
    assert (15, 20, 23, 28) in parts, "as much on both sides"
    assert (43, 45, 48, 56) in parts, "what the one side lacks goes to the other"


@pytest.mark.parametrize("join", [False, True])
def test_a_document_of_two_hundred_sentences(join: bool) -> None:
    text = text_of([[[1] * 15] * 200], 126)
    rows = rows_of(text, 126, 0, documents=text.documents, join=join, context=40)
    lengths = np.diff(rows.starts) + rows.before + rows.after
    assert rows.starts[-1] == 3000
    assert len(lengths) == (67 if join else 200)
    assert lengths.max() <= 126
    # All but those at the ends of the document have their context on both sides.
    assert set(rows.before[5:-5]) == set(rows.after[5:-5]) == {40}


def test_a_row_of_one_word() -> None:
    text = text_of([[[5, 1, 0, 2], [1]]], 1)
    rows = rows_of(text, 1, 0)
    assert ranges(rows) == [(k, k, k + 1, k + 1) for k in range(4)]
