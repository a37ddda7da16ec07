"""Annotated sentences as flat arrays, checked and in IOB2: where every reader ends.

Each word keeps its line, so that whatever is found wrong later can still be pointed at.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import reprlib
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bertner.errors import DataError
from bertner.labels import (
    B,
    E,
    IntArray,
    likeliest_scheme,
    scheme_exceptions,
    split_tag,
    to_iob2,
)

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger("bertner")

# Label ids are 16-bit integers, two for each type and one for O; no real tag set comes near.
MAX_TYPES = 10_000

# A source is read this many words at a time: some 1,500 sentences, which cost about 5 MB while
# they are Python objects, and long enough that array operations on them cost nothing a word.
BLOCK_WORDS = 25_000

# Of the tags that do not fit a scheme, so many are kept to be shown.
_KEPT_MISFITS = 5

# What cannot stand in a label: it would break the lines of messages, cards and vocabularies.
_NOT_IN_LABELS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# Ideographs, each of which BERT's tokenizer makes a word of its own: the languages written in them
# put no space between words.
_IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
    "\U0002f800-\U0002fa1f]"
)


@dataclass(frozen=True)
class Sentences:
    """Annotated sentences in flat arrays: all of a source, or a block of it.

    Attributes:
        words: All words, sentence after sentence.
        prefixes: (num_words,) IOB2 prefix codes (labels.O, B, I).
        types: (num_words,) number of each word's entity type, -1 for O.
        raw_prefixes: (num_words,) prefix codes as they stand in the source, in whatever scheme.
        starts: (num_sentences + 1,) where each sentence begins; the last is the number of words.
        documents: (num_sentences,) number of the document that each sentence is in.
        lines: (num_words,) line or record of each word, from 1.
    """

    words: list[str]
    prefixes: IntArray
    types: IntArray
    raw_prefixes: IntArray
    starts: IntArray
    documents: IntArray
    lines: IntArray

    @property
    def num_sentences(self) -> int:
        """Number of sentences."""
        return len(self.starts) - 1

    @property
    def num_words(self) -> int:
        """Number of words."""
        return len(self.words)

    def sentence(self, index: int) -> list[str]:
        """The words of one sentence."""
        return self.words[self.starts[index] : self.starts[index + 1]]

    def head(self, num_sentences: int) -> Self:
        """The first sentences alone."""
        if num_sentences >= self.num_sentences:
            return self
        return replace(self, **self._part(0, num_sentences))

    def blocks(self, num_words: int = BLOCK_WORDS) -> Iterator[Sentences]:
        """Whole sentences, about `num_words` words at a time."""
        begin = 0
        while begin < self.num_sentences:
            # Up to the sentence in which the block's last word stands, and at least one.
            end = int(np.searchsorted(self.starts, self.starts[begin] + num_words))
            end = min(end, self.num_sentences)
            yield Sentences(**self._part(begin, end))
            begin = end

    def _part(self, begin: int, end: int) -> dict[str, Any]:
        words = slice(int(self.starts[begin]), int(self.starts[end]))
        return {
            "words": self.words[words],
            "prefixes": self.prefixes[words],
            "types": self.types[words],
            "raw_prefixes": self.raw_prefixes[words],
            "starts": self.starts[begin : end + 1] - self.starts[begin],
            "documents": self.documents[begin:end],
            "lines": self.lines[words],
        }


@dataclass(frozen=True)
class CorpusSummary:
    """What a run tells of its data; the words themselves need not stay in memory for it.

    Attributes:
        source: File or dataset, as named in messages.
        sha256: Hash of the file's bytes, or of what was read of a dataset.
        scheme: Tag scheme that the source uses.
        type_names: Entity types, sorted.
        num_documents: Number of documents; a source without boundaries is one.
        marks_documents: Whether the source says where documents begin.
        num_sentences: Number of sentences.
        num_words: Number of words.
        entity_counts: Number of entities of each type.
    """

    source: str
    sha256: str
    scheme: str
    type_names: tuple[str, ...]
    num_documents: int
    marks_documents: bool
    num_sentences: int
    num_words: int
    entity_counts: dict[str, int]


@dataclass(frozen=True)
class Misfit:
    """A tag that the scheme of its source does not allow where it stands.

    Attributes:
        line: Line or record, from 1.
        word: The word that has it.
        tag: As written.
        before: The tag before it; None at the start of a sentence.
        after: The tag after it; None at the end of a sentence.
    """

    line: int
    word: str
    tag: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Corpus(Sentences):
    """All sentences of a source.

    Attributes:
        source: File or dataset, as named in messages.
        type_names: Entity types, sorted; `types` are indices into them.
        scheme: Tag scheme that the source uses.
        sha256: Hash of the file's bytes, or of what was read of a dataset.
        marks_documents: Whether the source says where documents begin.
        num_misfits: Number of tags that do not fit the scheme.
        misfits: The first of them.
    """

    source: str
    type_names: tuple[str, ...]
    scheme: str
    sha256: str
    marks_documents: bool
    num_misfits: int = 0
    misfits: tuple[Misfit, ...] = ()

    @property
    def num_documents(self) -> int:
        """Number of documents; a source without boundaries is one."""
        return len(np.unique(self.documents))

    def entity_counts(self) -> dict[str, int]:
        """Number of entities of each type."""
        counts = np.bincount(self.types[self.prefixes == B], minlength=len(self.type_names))
        return {name: int(counts[k]) for k, name in enumerate(self.type_names)}


class CorpusBuilder:
    """Collects words and tags of one source and turns them into checked sentences in IOB2.

    Attributes:
        source: File or dataset, as named in messages.
        label_names: Names of integer tags, for readers.
        document: Number of the document that the next sentence is in.
        marks_documents: Whether the source says where documents begin; set by readers.
        kinds: Entity types in order of first appearance: what `types` of a block are indices into.
        warnings: What `conclude` found worth a warning.
    """

    def __init__(self, source: str, label_names: Sequence[str] | None = None) -> None:
        self.source = source
        self.label_names = label_names
        self.document = 0
        self.marks_documents = False
        self.kinds: list[str] = []
        self.warnings: list[str] = []
        self._kind_of: dict[str, int] = {}
        self._tag_of: dict[str, int] = {}
        self._prefix_of: list[int] = []  # of each tag
        self._type_of: list[int] = []
        self._num_misfits: Counter[str] = Counter()  # by scheme
        self._misfits: dict[str, list[Misfit]] = {}  # the first of them
        self._has_e_or_s = False
        self._clear()

    def _clear(self) -> None:
        self.words: list[str] = []
        self.tags: list[str] = []
        self.lines: list[int] = []
        self.starts: list[int] = [0]
        self.documents: list[int] = []

    def add(self, words: Sequence[str], tags: Sequence[str], lines: Sequence[int]) -> None:
        """Adds a sentence; one without words is nothing to learn from and is passed over."""
        if not words:
            return
        self.words.extend(words)
        self.tags.extend(tags)
        self.lines.extend(lines)
        self.starts.append(len(self.words))
        self.documents.append(self.document)

    def take(self) -> Sentences:
        """Takes out what was added since the last time, with its tags read.

        Raises:
            DataError: A tag that is none, or too many types.
        """
        lines = np.array(self.lines, dtype=np.int64)
        tag_of = self._tag_of
        tag_ids = np.fromiter(
            (tag_of.setdefault(tag, len(tag_of)) for tag in self.tags), np.int32, len(self.tags)
        )
        for tag in itertools.islice(tag_of, len(self._prefix_of), None):
            try:
                self._learn(tag)
            except ValueError as error:
                line = int(lines[np.argmax(tag_ids == tag_of[tag])])
                raise DataError(
                    f"{error}; write O, or B-/I- and the type", self.source, line
                ) from None
        if len(self.kinds) > MAX_TYPES:
            raise DataError(
                f"has more than {MAX_TYPES} types of entities; are these really tags?", self.source
            )
        prefixes = np.array(self._prefix_of, dtype=np.int8)[tag_ids]
        types = np.array(self._type_of, dtype=np.int16)[tag_ids]
        starts = np.array(self.starts, dtype=np.int64)

        self._has_e_or_s |= bool(np.any(prefixes >= E))
        for name, exceptions in scheme_exceptions(prefixes, types, starts[:-1]).items():
            self._num_misfits[name] += len(exceptions)
            kept = self._misfits.setdefault(name, [])
            kept += map(self._misfit, exceptions[: _KEPT_MISFITS - len(kept)].tolist())
        block = Sentences(
            words=self.words,
            prefixes=to_iob2(prefixes, types, starts[:-1]),
            types=types,
            raw_prefixes=prefixes,
            starts=starts,
            documents=np.array(self.documents, dtype=np.int32),
            lines=lines,
        )
        self._clear()
        return block

    def _misfit(self, word: int) -> Misfit:
        sentence = bisect_right(self.starts, word)
        begin, end = self.starts[sentence - 1 : sentence + 1]
        # Line breaks around a type are forgiven.
        before, tag, after = (
            " ".join(self.tags[place].split()) if begin <= place < end else None
            for place in (word - 1, word, word + 1)
        )
        assert tag is not None
        return Misfit(self.lines[word], self.words[word], tag, before, after)

    def _learn(self, tag: str) -> None:
        """Reads a tag that is new."""
        prefix, kind = split_tag(tag.strip())
        if kind is not None:
            kind = _checked_type(kind.strip())
            if kind not in self._kind_of:
                self._kind_of[kind] = len(self.kinds)
                self.kinds.append(kind)
        self._prefix_of.append(prefix)
        self._type_of.append(-1 if kind is None else self._kind_of[kind])

    def conclude(self) -> str:
        """The tag scheme of all that was taken; warns of tags that do not fit it.

        Raises:
            DataError: There was no sentence.
        """
        if not self._tag_of:
            raise DataError("holds no sentence; is it the right file?", self.source)
        scheme = likeliest_scheme(self._num_misfits, self._has_e_or_s)
        if self._num_misfits[scheme]:
            first = self._misfits[scheme][0]
            self.warnings.append(
                f"{self.source}:{first.line}: {self._num_misfits[scheme]} tags do not fit "
                f"{scheme}, the first is {first.tag:.40} on {first.word!r:.40}; "
                "read as conlleval does"
            )
            logger.warning("%s", self.warnings[-1])
        return scheme

    def finish(self, sha256: str) -> Corpus:
        """All that was added, as a corpus.

        Raises:
            DataError: A tag that is none, too many types, or no sentence at all.
        """
        everything = self.take()
        scheme = self.conclude()
        type_names = tuple(sorted(self.kinds))
        # The last element is for O, whose type is -1.
        index = {name: k for k, name in enumerate(type_names)}
        number = np.array([*map(index.__getitem__, self.kinds), -1], dtype=np.int16)
        return Corpus(
            **{**vars(everything), "types": number[everything.types]},
            source=self.source,
            type_names=type_names,
            scheme=scheme,
            sha256=sha256,
            marks_documents=self.marks_documents,
            num_misfits=self._num_misfits[scheme],
            misfits=tuple(self._misfits[scheme]),
        )


# A sentence as a reader finds it: number of its document; words, tags and lines.
RawSentence = tuple[int, Sequence[str], Sequence[str], Sequence[int]]


class CorpusStream:
    """A source that is read once: as blocks of sentences, or as one corpus.

    Args:
        builder: Knows the source, and what was found in it once it is read.
        sentences: What a reader yields.
        digest: Is updated by the reader; the source's hash once it is read.
    """

    def __init__(
        self, builder: CorpusBuilder, sentences: Iterable[RawSentence], digest: hashlib._Hash
    ) -> None:
        self.builder = builder
        self.digest = digest
        self._sentences = sentences

    def blocks(self, num_words: int = BLOCK_WORDS) -> Iterator[Sentences]:
        """Whole sentences, about `num_words` words at a time.

        Raises:
            DataError: The first mistake in the data.
            StorageError: The disk fails.
        """
        builder = self.builder
        for document, words, tags, lines in self._sentences:
            builder.document = document
            builder.add(words, tags, lines)
            if len(builder.words) >= num_words:
                yield builder.take()
        if builder.words:
            yield builder.take()

    def read(self) -> Corpus:
        """The whole source; raises what `blocks` does."""
        for document, words, tags, lines in self._sentences:
            self.builder.document = document
            self.builder.add(words, tags, lines)
        return self.builder.finish(self.digest.hexdigest())


def _checked_type(kind: str) -> str:
    if _NOT_IN_LABELS.search(kind):
        raise ValueError(f"type {reprlib.repr(kind)} holds a control character")
    return kind


def split_words(text: str) -> list[tuple[int, int]]:
    """Splits running text into words: (start, end) of each, in characters.

    White space separates; every punctuation mark, symbol and ideograph is a word of its own. So
    almost any annotated entity begins and ends between words. BERT's own tokenizer cuts at all the
    same places but between letters and the rarer symbols, such as emoji; there, cutting spares the
    letters from being one unknown word with the symbol.
    """
    spans = []
    for chunk in re.finditer(r"\S+", text):
        begin = chunk.start()
        if chunk.group().isalnum() and chunk.group().isascii():
            spans.append(chunk.span())  # most words: not worth a look at each letter
            continue
        for position, character in enumerate(chunk.group(), begin):
            # Letters, digits, marks (accents, vowel signs) and invisible joiners hold together.
            if unicodedata.category(character)[0] in "PS" or _IDEOGRAPH.match(character):
                if begin < position:
                    spans.append((begin, position))
                spans.append((position, position + 1))
                begin = position + 1
        if begin < chunk.end():
            spans.append((begin, chunk.end()))
    return spans


def split_sentences(text: str, words: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Parts a text at blank lines: (first, after the last) word of each part.

    They are to running text what sentences are to annotated data: no entity goes across.
    """
    if not words:
        return []
    borders = [
        k
        for k, ((_, end), (start, _)) in enumerate(itertools.pairwise(words), 1)
        if start - end > 1 and text.count("\n", end, start) > 1
    ]
    return list(itertools.pairwise([0, *borders, len(words)]))
