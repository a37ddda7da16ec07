"""What stands more than once in annotated data: sentences, and the strings of entities.

Everything works on numbers: those of words and of types are the same in all splits that are
compared. Time and memory are in proportion to the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from bertner.labels import IntArray, Spans

OUTSIDE = -1  # in place of a type: not an entity

# Of a sentence's key: of a million sentences few have by chance one of some thousands that are
# looked for.
_KEY_BITS, _KEY_FACTOR = 22, np.uint64(0x9E3779B97F4A7C15)

_MAX_STRING = 10  # longer ones are not looked for where they are no entity


@dataclass(frozen=True)
class Numbered:
    """A split, in numbers.

    Attributes:
        words: (num_words,) number of each word.
        tags: (num_words,) number of each tag; 0 for O, in IOB2.
        starts: (num_sentences + 1,) where each sentence begins; the last is the number of words.
        spans: Its entities.
    """

    words: IntArray
    tags: IntArray
    starts: IntArray
    spans: Spans


@dataclass
class Repeats:
    """Sentences of the same words, in splits 0, 1, ...

    Attributes:
        within: For each split its sentences that repeat an earlier one, with the first of those.
        across: For each pair of an earlier and a later split the sentences of the later that stand
            in the earlier too, with the first of those there.
        num_other: For each such pair how many of them are tagged as in none of the earlier's.
        differing: Sentences with other tags than the same words have where they stand first: the
            first and the other as (split, sentence). Of the same words there is one such pair.
    """

    within: list[list[tuple[int, int]]] = field(default_factory=list)
    across: dict[tuple[int, int], list[tuple[int, int]]] = field(default_factory=dict)
    num_other: dict[tuple[int, int], int] = field(default_factory=dict)
    differing: list[tuple[tuple[int, int], tuple[int, int]]] = field(default_factory=list)


def find_repeats(splits: Sequence[Numbered]) -> Repeats:
    """Finds sentences that stand more than once."""
    repeats = Repeats()
    firsts: list[dict[bytes, int]] = []  # by words, the first sentence of each split
    tagged: list[set[bytes]] = []  # words with tags, of each split
    origins: dict[bytes, tuple[tuple[int, int], bytes]] = {}  # by words: where first, and tags
    known_to_differ: set[bytes] = set()
    for later, split in enumerate(splits):
        within: list[tuple[int, int]] = []
        across: list[list[tuple[int, int]]] = [[] for _ in range(later)]
        num_other = [0] * later
        first: dict[bytes, int] = {}
        both: set[bytes] = set()
        for sentence, (begin, end) in enumerate(pairwise(split.starts.tolist())):
            words, tags = split.words[begin:end].tobytes(), split.tags[begin:end].tobytes()
            before = first.setdefault(words, sentence)
            if before != sentence:
                within.append((sentence, before))
            both.add(words + tags)
            for earlier in range(later):
                if words in firsts[earlier]:
                    across[earlier].append((sentence, firsts[earlier][words]))
                    num_other[earlier] += words + tags not in tagged[earlier]
            origin, tags_there = origins.setdefault(words, ((later, sentence), tags))
            if tags != tags_there and words not in known_to_differ:
                known_to_differ.add(words)
                repeats.differing.append((origin, (later, sentence)))
        repeats.within.append(within)
        for earlier in range(later):
            repeats.across[earlier, later] = across[earlier]
            repeats.num_other[earlier, later] = num_other[earlier]
        firsts.append(first)
        tagged.append(both)
    return repeats


def count_shared(first: tuple[IntArray, IntArray], other: tuple[IntArray, IntArray]) -> int:
    """Number of the other's sentences that stand in the first too; empty ones do not count.

    Only what a few tokens of each sentence do not tell apart is compared in full, so that this
    costs little next to reading millions of sentences.

    Args:
        first: (num_tokens,) tokens of all sentences, and (num_sentences + 1,) where each begins.
        other: The same of the other.
    """
    keys, other_keys = _sentence_keys(*first), _sentence_keys(*other)
    known = set(_sentences_with(other_keys, keys, *first))
    return sum(each in known for each in _sentences_with(keys, other_keys, *other))


def _sentence_keys(tokens: IntArray, starts: IntArray) -> IntArray:
    """(num_sentences,) a number that is the same for the same sentence, and seldom for others."""
    begin, last = starts[:-1].astype(np.int64), np.diff(starts.astype(np.int64)) - 1
    keys: IntArray = last.astype(np.uint64)
    for third in range(4 if len(tokens) else 0):  # the first token, the last, and two between
        place = np.minimum(begin + last * third // 3, len(tokens) - 1)  # the last may be empty
        keys = (keys + tokens[place].astype(np.uint64)) * _KEY_FACTOR
    keys >>= np.uint64(64 - _KEY_BITS)
    return keys


def _sentences_with(
    wanted: IntArray, keys: IntArray, tokens: IntArray, starts: IntArray
) -> Iterator[bytes]:
    """The tokens of the sentences that have one of the wanted keys."""
    is_wanted = np.zeros(1 << _KEY_BITS, dtype=bool)
    is_wanted[wanted] = True
    for sentence in np.flatnonzero(is_wanted[keys]).tolist():
        if sentence_tokens := tokens[starts[sentence] : starts[sentence + 1]].tobytes():
            yield sentence_tokens


@dataclass
class Use:
    """How a string is used: as an entity of a type, or as none.

    Attributes:
        count: How often.
        split: Where it is used so first: number of the split.
        word: Its first word there.
    """

    count: int
    split: int
    word: int


# By a string's words: its uses by type, or OUTSIDE.
Uses = dict[tuple[int, ...], dict[int, Use]]


def find_uses(splits: Sequence[Numbered]) -> Uses:
    """How strings are used that are an entity somewhere.

    A string counts where it is all of an entity, and where no word of it is in one: within a longer
    entity it says nothing.
    """
    uses: Uses = {}

    def count(string: tuple[int, ...], kind: int, split: int, word: int) -> None:
        by_kind = uses.setdefault(string, {})
        by_kind.setdefault(kind, Use(0, split, word)).count += 1

    for number, split in enumerate(splits):
        for string, kind, word in _entities(split):
            count(string, kind, number, word)
    sizes: dict[int, set[int]] = {}  # by its first word: of strings
    for string in uses:
        if len(string) <= _MAX_STRING:
            sizes.setdefault(string[0], set()).add(len(string))
    begins_string = np.fromiter(sizes, np.int64, len(sizes))
    for number, split in enumerate(splits):
        words, outside = split.words.tolist(), split.tags == 0
        # An entity or the end of a sentence is where a string ends at the latest.
        stops = np.union1d(np.flatnonzero(~outside), split.starts)
        candidates = np.flatnonzero(outside & np.isin(split.words, begins_string))
        ends = stops[np.searchsorted(stops, candidates, side="right")]
        for word, end in zip(candidates.tolist(), ends.tolist(), strict=True):
            for size in sizes[words[word]]:
                string = tuple(words[word : word + size])
                if word + size <= end and string in uses:
                    count(string, OUTSIDE, number, word)
    return uses


def _entities(split: Numbered) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """The string, the type and the first word of each entity."""
    words, spans = split.words.tolist(), split.spans
    for begin, end, kind in zip(
        spans.start.tolist(), spans.end.tolist(), spans.type.tolist(), strict=True
    ):
        yield tuple(words[begin:end]), kind, begin
