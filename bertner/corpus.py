"""Annotated sentences as flat arrays, checked and in IOB2: where every reader ends.

Each word keeps its line, so that whatever is found wrong later can still be pointed at.
"""

from __future__ import annotations

import logging
import re
import reprlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bertner.errors import DataError
from bertner.labels import B, IntArray, detect_scheme, split_tag, to_iob2

logger = logging.getLogger("bertner")

# Label ids are 16-bit integers, two for each type and one for O; no real tag set comes near.
MAX_TYPES = 10_000

# What cannot stand in a label: it would break the lines of messages, cards and vocabularies.
_NOT_IN_LABELS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# Ideographs, each of which BERT's tokenizer makes a word of its own: the languages written in them
# put no space between words.
_IDEOGRAPH = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002ceaf"
    "\U0002f800-\U0002fa1f]"
)


@dataclass(frozen=True)
class Corpus:
    """Annotated sentences in flat arrays.

    Attributes:
        source: File or dataset, as named in messages.
        words: All words, sentence after sentence.
        prefixes: (num_words,) IOB2 prefix codes (labels.O, B, I).
        types: (num_words,) index into `type_names`, -1 for O.
        type_names: Entity types, sorted.
        starts: (num_sentences + 1,) where each sentence begins; the last is the number of words.
        documents: (num_sentences,) number of the document that each sentence is in.
        lines: (num_words,) line or record of each word, from 1.
        scheme: Tag scheme that the source uses.
        sha256: Hash of the file's bytes, or of the words and tags of a dataset.
    """

    source: str
    words: list[str]
    prefixes: IntArray
    types: IntArray
    type_names: tuple[str, ...]
    starts: IntArray
    documents: IntArray
    lines: IntArray
    scheme: str
    sha256: str

    @property
    def num_sentences(self) -> int:
        """Number of sentences."""
        return len(self.starts) - 1

    @property
    def num_words(self) -> int:
        """Number of words."""
        return len(self.words)

    @property
    def num_documents(self) -> int:
        """Number of documents; a source without boundaries is one."""
        return len(np.unique(self.documents))

    def entity_counts(self) -> dict[str, int]:
        """Number of entities of each type."""
        counts = np.bincount(self.types[self.prefixes == B], minlength=len(self.type_names))
        return {name: int(counts[k]) for k, name in enumerate(self.type_names)}

    def sentence(self, index: int) -> list[str]:
        """The words of one sentence."""
        return self.words[self.starts[index] : self.starts[index + 1]]

    def head(self, num_sentences: int) -> Corpus:
        """The first sentences, as a corpus of its own."""
        if num_sentences >= self.num_sentences:
            return self
        end = int(self.starts[num_sentences])
        return replace(
            self,
            words=self.words[:end],
            prefixes=self.prefixes[:end],
            types=self.types[:end],
            starts=self.starts[: num_sentences + 1],
            documents=self.documents[:num_sentences],
            lines=self.lines[:end],
        )


class CorpusBuilder:
    """Collects words and tags of one source and turns them into a Corpus."""

    def __init__(self, source: str, label_names: Sequence[str] | None = None) -> None:
        self.source = source
        self.label_names = label_names
        self.words: list[str] = []
        self.tags: list[str] = []
        self.lines: list[int] = []
        self.starts: list[int] = [0]
        self.documents: list[int] = []
        self.document = 0

    def add(self, words: Sequence[str], tags: Sequence[str], lines: Sequence[int]) -> None:
        """Adds a sentence; one without words is nothing to learn from and is passed over."""
        if not words:
            return
        self.words.extend(words)
        self.tags.extend(tags)
        self.lines.extend(lines)
        self.starts.append(len(self.words))
        self.documents.append(self.document)

    def finish(self, sha256: str) -> Corpus:
        """Reads the tags, finds their scheme and converts them to IOB2."""
        if not self.words:
            raise DataError("holds no sentence; is it the right file?", self.source)
        tag_of: dict[str, int] = {}
        tag_ids = np.fromiter(
            (tag_of.setdefault(tag, len(tag_of)) for tag in self.tags), np.int32, len(self.tags)
        )
        lines = np.array(self.lines, dtype=np.int64)
        prefix_of = np.zeros(len(tag_of), dtype=np.int8)
        kinds: list[str | None] = []
        for tag, tag_id in tag_of.items():
            try:
                prefix_of[tag_id], kind = split_tag(tag.strip())
                if kind is not None:
                    kind = _checked_type(kind.strip())
            except ValueError as error:
                line = int(lines[np.argmax(tag_ids == tag_id)])
                raise DataError(
                    f"{error}; write O, or B-/I- and the type", self.source, line
                ) from None
            kinds.append(kind)
        type_names = tuple(sorted({kind for kind in kinds if kind is not None}))
        if len(type_names) > MAX_TYPES:
            raise DataError(
                f"has {len(type_names)} types of entities; are these really tags?", self.source
            )
        number_of: dict[str | None, int] = {kind: k for k, kind in enumerate(type_names)}
        number_of[None] = -1
        type_of = np.array([number_of[kind] for kind in kinds], dtype=np.int16)
        prefixes, types = prefix_of[tag_ids], type_of[tag_ids]
        starts = np.array(self.starts, dtype=np.int64)

        scheme = detect_scheme(prefixes, types, starts[:-1])
        if len(scheme.irregular):
            word = int(scheme.irregular[0])
            logger.warning(
                "%s:%d: %d tags do not fit %s, the first is %.40s on %.40r; read as conlleval does",
                self.source,
                lines[word],
                len(scheme.irregular),
                scheme.name,
                self.tags[word],
                self.words[word],
            )
        return Corpus(
            source=self.source,
            words=self.words,
            prefixes=to_iob2(prefixes, types, starts[:-1]),
            types=types,
            type_names=type_names,
            starts=starts,
            documents=np.array(self.documents, dtype=np.int32),
            lines=lines,
            scheme=scheme.name,
            sha256=sha256,
        )


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
