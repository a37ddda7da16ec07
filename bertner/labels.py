"""Tags and what they mean: schemes, spans, label lists.

A tag is a string such as `B-PER`: a prefix and an entity type. Everything here works on flat
integer arrays, one element per word, with `starts` saying where each sentence begins, so that a
corpus of millions of words costs a few array operations.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100  # a token that is not scored and carries no loss

# Prefix codes. L and U are the BILOU spelling of E and S.
O, B, I, E, S = range(5)  # noqa: E741 - the field's own letters
PREFIX_LETTERS = "OBIES"
_PREFIXES = {"B": B, "I": I, "E": E, "L": E, "S": S, "U": S}

CONLL_TYPES = ("PER", "ORG", "LOC", "MISC")  # in the order of the CoNLL-2003 label list

SCHEMES = ("BIOES", "IOB2", "IOB1")

IntArray = NDArray[np.integer]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Spans:
    """Entities: span `k` is the words `start[k]` to `end[k]` (exclusive), of type `type[k]`.

    Attributes:
        start: (num_spans,) index of the first word, ascending.
        end: (num_spans,) index after the last word.
        type: (num_spans,) entity type.
    """

    start: IntArray
    end: IntArray
    type: IntArray

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True)
class LabelSet:
    """A list of label names with the arrays that interpret them.

    Attributes:
        names: Label names in order of their ids, such as `["O", "B-PER", "I-PER"]`.
        given_scheme: "BIOES", "IOB2" or "IOB1" if it is known; None for what the names speak for.
    """

    names: tuple[str, ...]
    given_scheme: str | None = None

    @cached_property
    def index(self) -> dict[str, int]:
        """Label id of each name."""
        return {name: label for label, name in enumerate(self.names)}

    @cached_property
    def outside(self) -> int:
        """Label id of `O`."""
        return self.index["O"]

    @cached_property
    def types(self) -> tuple[str, ...]:
        """Entity types in order of first appearance."""
        return tuple(dict.fromkeys(t for _, t in map(split_tag, self.names) if t is not None))

    @cached_property
    def prefix_of(self) -> IntArray:
        """(num_labels,) prefix code of each label."""
        return np.array([split_tag(name)[0] for name in self.names], dtype=np.int8)

    @cached_property
    def type_of(self) -> IntArray:
        """(num_labels,) index into `types` of each label; -1 for O."""
        number = {t: k for k, t in enumerate(self.types)}
        kinds = [split_tag(name)[1] for name in self.names]
        return np.array([-1 if t is None else number[t] for t in kinds], dtype=np.int16)

    @cached_property
    def continuation(self) -> IntArray:
        """(num_labels,) label of a word's later pieces: `B-X` becomes `I-X`, the rest stay."""
        return np.array(
            [
                self.index.get("I" + name[1:], label) if self.prefix_of[label] == B else label
                for label, name in enumerate(self.names)
            ],
            dtype=np.int16,
        )

    @cached_property
    def of_tag(self) -> dict[tuple[int, str], int]:
        """Label id of each prefix code and type that there is a label for."""
        tags = map(split_tag, self.names)
        return {(prefix, t): label for label, (prefix, t) in enumerate(tags) if t is not None}

    @cached_property
    def scheme(self) -> str:
        """The scheme that is given, or else that the names speak for: "BIOES", "IOB2" or "IOB1".

        It is BIOES if there is an E or S. If not, a type that has I but no B speaks against IOB2,
        and one that has B but no I against IOB1; on a tie it is IOB2. So `O, I-X` is IOB1 and
        `O, B-X` IOB2, and so is a list where each type has both, though IOB1 may have it too.
        """
        if self.given_scheme is not None:
            return self.given_scheme
        if np.any(self.prefix_of >= E):
            return "BIOES"
        begun = set(self.type_of[self.prefix_of == B].tolist())
        inside = set(self.type_of[self.prefix_of == I].tolist())
        return "IOB1" if len(inside - begun) > len(begun - inside) else "IOB2"

    def may_be(self, scheme: str) -> bool:
        """Whether the names may be those of a scheme: IOB1 can have the same as IOB2."""
        return scheme == self.scheme or (scheme, self.scheme) == ("IOB1", "IOB2")

    def transitions(self, scheme: str | None = None) -> BoolArray:
        """(num_labels, num_labels) whether [before, after] may stand side by side in a sentence.

        A label may begin a sentence if it may follow O, and end one if O may follow it. So a
        sentence is legal if and only if `scheme_exceptions` reports none of its words.

        Args:
            scheme: "BIOES", "IOB2" or "IOB1"; None for that of the labels.

        Raises:
            ValueError: There is no such scheme.
        """
        scheme = self.scheme if scheme is None else scheme
        if scheme not in SCHEMES:
            raise ValueError(f"scheme {reprlib.repr(scheme)} is none of {', '.join(SCHEMES)}")
        before, after = self.prefix_of[:, None], self.prefix_of
        same_type = self.type_of[:, None] == self.type_of
        if scheme == "BIOES":
            is_open = (before == B) | (before == I)
            goes_on = (after == I) | (after == E)
            allowed: BoolArray = np.where(is_open, goes_on & same_type, ~goes_on)
        else:
            free = after != (I if scheme == "IOB2" else B)
            allowed = (before < E) & (after < E) & (free | same_type)
        return allowed

    def spans(self, labels: IntArray, starts: IntArray) -> Spans:
        """Entities in flat `labels` (num_words,); sentences begin at `starts`."""
        return find_spans(self.prefix_of[labels], self.type_of[labels], starts)


def split_tag(tag: str) -> tuple[int, str | None]:
    """Prefix code and type of a tag; `O` has no type.

    Raises:
        ValueError: The tag is neither `O` nor a prefix, a hyphen and a type.
    """
    if tag == "O":
        return O, None
    prefix, hyphen, kind = tag.partition("-")
    if not hyphen or not kind or prefix not in _PREFIXES:
        raise ValueError(f"tag {reprlib.repr(tag)} has no B-, I-, E- or S- in front of its type")
    return _PREFIXES[prefix], kind


def find_spans(prefixes: IntArray, types: IntArray, starts: IntArray) -> Spans:
    """Finds entities as `conlleval` does, whatever the scheme and however broken the sequence.

    An entity begins at B or S; at I or E after O, E, S, the start of a sentence or another type. It
    ends where the next word begins one or is O, or after E or S. This is the rule of the CoNLL-2003
    evaluation script and of seqeval's default mode.

    Args:
        prefixes: (num_words,) prefix codes.
        types: (num_words,) entity types, -1 for O.
        starts: Indices at which sentences begin, ascending.
    """
    if len(prefixes) == 0:
        empty = np.zeros(0, dtype=np.int64)
        return Spans(empty, empty, empty)
    before = np.empty_like(prefixes)
    before[0], before[1:] = O, prefixes[:-1]
    before[starts[starts < len(prefixes)]] = O
    type_before = np.empty_like(types)
    type_before[0], type_before[1:] = -1, types[:-1]
    type_before[before == O] = -1

    inside = prefixes != O
    begins = (prefixes == B) | (prefixes == S)
    begins |= ((prefixes == I) | (prefixes == E)) & ((before == O) | (before == E) | (before == S))
    begins |= inside & (types != type_before)
    # A word inside an entity that begins none belongs to the one before it, so an entity runs from
    # its beginning to the next beginning or O, and a sentence's first word is always one of these.
    first = np.flatnonzero(begins)
    stop_at = np.append(np.flatnonzero(begins | ~inside), len(prefixes))
    last = stop_at[np.searchsorted(stop_at, first, side="right")]
    return Spans(first, last, types[first].astype(np.int64))


def strict_spans(prefixes: IntArray, types: IntArray, starts: IntArray, scheme: str) -> Spans:
    """Finds only the entities that are written as a scheme has it: seqeval's strict mode.

    In IOB2 an entity is a B and the I of its type that follow. In BIOES it is an S, or a B, any
    number of I and an E of one type. In IOB1 it is an I or, right after an entity of the same type,
    a B, and the I of its type that follow. All other words are outside.

    Args:
        prefixes: (num_words,) prefix codes.
        types: (num_words,) entity types, -1 for O.
        starts: Indices at which sentences begin, ascending.
        scheme: "BIOES", "IOB2" or "IOB1".
    """
    # With an O before and after each sentence no case is a special one.
    num_words = len(prefixes)
    places = np.searchsorted(starts, np.arange(num_words), side="right") + np.arange(num_words)
    padded = np.zeros(num_words + len(starts) + 1, dtype=np.int8)
    kinds = np.full(len(padded), -1, dtype=np.int64)
    padded[places], kinds[places] = prefixes, types
    here, before = padded[1:], padded[:-1]
    same = kinds[1:] == kinds[:-1]
    was_open = (before == B) | (before == I)
    if scheme == "BIOES":
        goes_on = was_open & same & ((here == I) | (here == E))
        begins = (here == B) | (here == S)
    else:
        goes_on = was_open & same & (here == I)
        begins = here == B
    if scheme == "IOB1":
        begins = np.where(here == I, (before == O) | (before == B) | ~same, (here == B) & same)
        begins &= here != O
        begins[1:] &= ~(goes_on[1:] & begins[:-1])  # an I that a B before it has begun
    first = np.flatnonzero(begins)
    stop_at = np.flatnonzero(~goes_on)
    last = stop_at[np.searchsorted(stop_at, first, side="right")]
    is_whole = np.ones(len(first), dtype=bool)
    if scheme == "BIOES":
        is_whole = here[last - 1] >= E
    elif scheme == "IOB1":  # in which nothing ends between a B and one of another type
        is_whole = (here[last - 1] != B) | (here[last] != B) | same[last]
    first, last = first[is_whole], last[is_whole]
    begin = np.searchsorted(places, first + 1)
    return Spans(begin, begin + (last - first), kinds[first + 1])


@dataclass(frozen=True)
class Scheme:
    """What `detect_scheme` found.

    Attributes:
        name: "IOB1", "IOB2" or "BIOES".
        irregular: Indices of words whose tag the scheme does not allow where it stands.
    """

    name: str
    irregular: IntArray


def detect_scheme(prefixes: IntArray, types: IntArray, starts: IntArray) -> Scheme:
    """Tells IOB1, IOB2 and BIOES apart by where their prefixes stand.

    In IOB1 an entity begins with I, and with B only right after one of the same type; in IOB2 it
    always begins with B; neither has E or S. In BIOES an entity of one word is S, and a longer one
    begins with B and ends with E. The scheme with the fewest exceptions wins, so a few slips do not
    hide what a file is; on a tie it is BIOES if there is an E or S, and IOB2 if not.
    """
    exceptions = scheme_exceptions(prefixes, types, starts)
    name = likeliest_scheme(
        {name: len(words) for name, words in exceptions.items()}, bool(np.any(prefixes >= E))
    )
    return Scheme(name, exceptions[name])


def scheme_exceptions(prefixes: IntArray, types: IntArray, starts: IntArray) -> dict[str, IntArray]:
    """For each scheme, the indices of words whose tag it does not allow where it stands.

    Only words of one sentence are compared, so that counts add up over parts of a corpus.
    """
    before = np.concatenate([[O], prefixes[:-1]])
    type_before = np.concatenate([[-1], types[:-1]])
    before[starts[starts < len(prefixes)]] = O
    same = (before != O) & (type_before == types)
    foreign = prefixes >= E
    open_before = same & ((before == B) | (before == I))
    after = np.concatenate([prefixes[1:], [O]])
    after[starts[starts > 0] - 1] = O
    same_after = np.concatenate([types[1:] == types[:-1], [False]])
    goes_on = ((after == I) | (after == E)) & same_after
    needs_before = (prefixes == I) | (prefixes == E)
    needs_after = (prefixes == B) | (prefixes == I)
    wrong = {
        "BIOES": (needs_before & ~open_before) | (needs_after & ~goes_on),
        "IOB2": ((prefixes == I) & ~same) | foreign,
        "IOB1": ((prefixes == B) & ~same) | foreign,
    }
    return {name: np.flatnonzero(words) for name, words in wrong.items()}


def likeliest_scheme(num_exceptions: Mapping[str, int], has_e_or_s: bool) -> str:
    """The scheme with the fewest exceptions; BIOES only if there is an E or S at all."""
    candidates = ["BIOES", "IOB2", "IOB1"] if has_e_or_s else ["IOB2", "IOB1"]
    return min(candidates, key=lambda name: num_exceptions[name])  # of equals, the first


def to_iob2(prefixes: IntArray, types: IntArray, starts: IntArray) -> IntArray:
    """(num_words,) prefix codes of the same entities in IOB2."""
    spans = find_spans(prefixes, types, starts)
    converted = np.where(prefixes == O, O, I).astype(np.int8)
    converted[spans.start] = B
    return converted


def from_iob2(prefixes: IntArray, types: IntArray, starts: IntArray, scheme: str) -> IntArray:
    """(num_words,) prefix codes of the same entities in another scheme.

    Args:
        prefixes: (num_words,) prefix codes, legal in IOB2.
        types: (num_words,) entity types, -1 for O.
        starts: Indices at which sentences begin, ascending.
        scheme: "BIOES", "IOB2" or "IOB1".
    """
    if scheme == "IOB2" or len(prefixes) == 0:
        return prefixes
    inside = np.zeros(len(prefixes) + 1, dtype=bool)  # and one after the last
    inside[:-1] = prefixes == I
    if scheme == "BIOES":
        alone = np.where(prefixes == B, S, E).astype(np.int8)  # or the last of several
        return np.where((prefixes == O) | inside[1:], prefixes, alone)
    parted = np.zeros(len(prefixes), dtype=bool)  # from an entity of the same type before it
    parted[1:] = (prefixes[1:] == B) & (types[1:] == types[:-1])
    parted[starts[starts < len(prefixes)]] = False
    return np.where((prefixes == B) & ~parted, I, prefixes).astype(np.int8)


def label_list(types: Iterable[str]) -> list[str]:
    """`O`, then `B-` and `I-` of each type: in CoNLL-2003's own order, or else by alphabet.

    CoNLL-2003's order is used when its four types are all there is, so that labels get the very ids
    that the Hub's dataset gives them.
    """
    unique = set(types)
    order: Sequence[str] = CONLL_TYPES if unique == set(CONLL_TYPES) else sorted(unique)
    return ["O", *(f"{prefix}-{kind}" for kind in order for prefix in "BI")]
