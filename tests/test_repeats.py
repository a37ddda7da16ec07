"""Sentences and strings that stand more than once, against the plainest way to find them."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bertner import repeats
from bertner.labels import B, I, O, find_spans
from bertner.repeats import (
    OUTSIDE,
    Numbered,
    count_shared,
    find_repeats,
    find_uses,
)

# Words 0 to 3; tags O, B-0, I-0, B-1, I-1 as 0, 1, 2, 3, 4.
Sentences = list[list[tuple[int, int]]]
SENTENCES = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=5), max_size=8
)


def numbered(sentences: Sentences) -> Numbered:
    pairs = [pair for sentence in sentences for pair in sentence]
    words, tags = np.array(pairs, dtype=np.int32).reshape(-1, 2).T
    starts = np.cumsum([0, *map(len, sentences)])
    types = np.where(tags == 0, -1, (tags - 1) // 2)
    prefixes = np.where(tags == 0, O, np.where(tags % 2, B, I))
    return Numbered(words, tags, starts, find_spans(prefixes, types, starts[:-1]))


def words_of(sentence: list[tuple[int, int]]) -> list[int]:
    return [word for word, _ in sentence]


@settings(max_examples=60, deadline=None)
@given(st.lists(SENTENCES, min_size=1, max_size=3))
def test_repeats_are_those_of_comparing_every_pair(splits: list[Sentences]) -> None:
    found = find_repeats([numbered(split) for split in splits])
    for number, split in enumerate(splits):
        plain = [words_of(sentence) for sentence in split]
        expected = [(k, plain.index(w)) for k, w in enumerate(plain) if w in plain[:k]]
        assert found.within[number] == expected
        for earlier in range(number):
            there = [words_of(sentence) for sentence in splits[earlier]]
            shared = [(k, there.index(words)) for k, words in enumerate(plain) if words in there]
            assert found.across[earlier, number] == shared
            others = [k for k, _ in shared if split[k] not in splits[earlier]]
            assert found.num_other[earlier, number] == len(others)
    everything = [
        (words_of(sentence), sentence, (number, k))
        for number, split in enumerate(splits)
        for k, sentence in enumerate(split)
    ]
    expected_pairs = {}
    for words, sentence, place in everything:
        _, first, origin = next(each for each in everything if each[0] == words)
        if sentence != first:
            expected_pairs.setdefault(tuple(words), (origin, place))
    assert found.differing == list(expected_pairs.values())


@settings(max_examples=60, deadline=None)
@given(first=SENTENCES, other=SENTENCES, empty=st.booleans())
def test_shared_sentences_are_counted_from_tokens(
    first: Sentences, other: Sentences, empty: bool
) -> None:
    arrays = []
    for sentences in (first, other):
        split = numbered(sentences)
        starts = np.append(split.starts, split.starts[-1]) if empty else split.starts
        arrays.append((split.words.astype(np.uint16), starts.astype(np.int32)))
    known = [words_of(sentence) for sentence in first]
    expected = sum(words_of(sentence) in known for sentence in other)
    assert count_shared(*arrays) == expected
    with_one_key = repeats._KEY_BITS
    try:
        repeats._KEY_BITS = 1  # nearly all keys meet by chance
        assert count_shared(*arrays) == expected
    finally:
        repeats._KEY_BITS = with_one_key


@settings(max_examples=60, deadline=None)
@given(st.lists(SENTENCES, min_size=1, max_size=3))
def test_uses_are_those_of_trying_every_string_at_every_word(splits: list[Sentences]) -> None:
    arrays = [numbered(split) for split in splits]
    expected: dict[tuple[int, ...], dict[int, list[tuple[int, int]]]] = {}
    for number, split in enumerate(arrays):
        for begin, end, kind in zip(
            split.spans.start, split.spans.end, split.spans.type, strict=True
        ):
            string = tuple(split.words[begin:end].tolist())
            expected.setdefault(string, {}).setdefault(int(kind), []).append((number, int(begin)))
    for number, split in enumerate(arrays):
        for string in expected:
            for begin in range(len(split.words) - len(string) + 1):
                end = begin + len(string)
                crosses = np.any((split.starts > begin) & (split.starts < end))
                same = tuple(split.words[begin:end].tolist()) == string
                if same and not split.tags[begin:end].any() and not crosses:
                    expected[string].setdefault(OUTSIDE, []).append((number, begin))
    found = {
        string: {kind: (use.count, (use.split, use.word)) for kind, use in by_kind.items()}
        for string, by_kind in find_uses(arrays).items()
    }
    assert found == {
        string: {kind: (len(places), min(places)) for kind, places in by_kind.items()}
        for string, by_kind in expected.items()
    }
