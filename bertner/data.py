"""From a checked corpus to token rows: tokenise, align labels, divide into rows.

Everything is flat: the wordpieces of all sentences stand one after another, once. A row is a range
of them, between `[CLS]` and `[SEP]`: a sentence, a part of a long one, several, or one with its
neighbours (see `windows`); nothing is dropped, and nothing copied.

A corpus goes through in blocks of sentences, so that memory holds one block as Python objects and
the rest as integers that are no wider than they need to be: 7 bytes a token, and 1 to 2 more for
words, sentences and rows.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from reprlib import repr as short  # what a message shows of a word from a file
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from bertner.config import Reading
from bertner.corpus import Corpus, CorpusStream, CorpusSummary, Sentences
from bertner.errors import DataError
from bertner.labels import (
    IGNORE_INDEX,
    PREFIX_LETTERS,
    B,
    I,
    IntArray,
    LabelSet,
    from_iob2,
    label_list,
)
from bertner.tokenizer import Tokenizer
from bertner.windows import Rows, cut_rows, sentence_rows

logger = logging.getLogger("bertner")

NumberArray = NDArray[Any]

CARD_READING = Reading()  # a sentence a row, every wordpiece labelled

# Words whose pieces are remembered. Few words make most of any text; the rest are tokenised again.
_KNOWN_WORDS = 100_000

# A growing array of more bytes than the first is moved out of the heap; one of the second size
# always has pages of its own (glibc's highest threshold is 32 MiB).
_HEAP_BYTES = 1 << 18
_OWN_PAGES_BYTES = 33 << 20

# Temporary arrays are made for this many tokens at a time.
_SLICE_TOKENS = 1 << 18


@dataclass(frozen=True)
class TokenDataset:
    """Tokenised sentences in flat arrays, and the rows that they are read in.

    The integers are narrow: convert before computing with them. Tokens are wordpieces; the special
    ones are not kept but put around each row when it is read.

    Attributes:
        input_ids: (num_tokens,) token ids; uint16 if they fit, or int32.
        word_ids: (num_tokens,) index of each token's word in the corpus.
        labels: (num_tokens,) label ids, IGNORE_INDEX where a token carries none; int8 or int16.
        word_labels: (num_words,) label ids of the corpus' words.
        sentence_starts: (num_sentences + 1,) where each sentence begins, in words.
        sentence_token_starts: (num_sentences + 1,) where each sentence begins, in tokens.
        sentence_lines: (num_sentences,) line or record at which each sentence begins.
        documents: (num_sentences,) number of the document that each sentence is in.
        rows: Which tokens are read together.
        reading: How the rows came about, and how words are decided.
        source: File or dataset, as named in messages.
        label_set: What the label ids mean.
        cls_id: Id that begins a row.
        sep_id: Id that ends a row.
        pad_id: Id that fills rows up.
    """

    input_ids: IntArray
    word_ids: IntArray
    labels: IntArray
    word_labels: IntArray
    sentence_starts: IntArray
    sentence_token_starts: IntArray
    sentence_lines: IntArray
    documents: IntArray
    rows: Rows
    reading: Reading
    source: str
    label_set: LabelSet
    cls_id: int
    sep_id: int
    pad_id: int

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows.sentences)

    @cached_property
    def row_lengths(self) -> IntArray:
        """(num_rows,) tokens that each row reads, with context and special tokens."""
        rows = self.rows
        lengths: IntArray = (np.diff(rows.starts) + rows.before + rows.after + 2).astype(np.int32)
        return lengths

    @property
    def num_read(self) -> int:
        """Tokens of one pass over all rows, with context and special tokens."""
        return int(self.row_lengths.sum(dtype=np.int64))

    @cached_property
    def row_num_labelled(self) -> IntArray:
        """(num_rows,) tokens of each row's own that carry a label."""
        return self._num_labelled(self.rows.starts)

    @cached_property
    def label_counts(self) -> IntArray:
        """(num_labels,) tokens that carry each label."""
        counts = np.zeros(len(self.label_set.names), dtype=np.int64)
        for _, tokens in _slices(self.rows.starts):
            labels = self.labels[tokens]
            counts += np.bincount(labels[labels != IGNORE_INDEX], minlength=len(counts))
        return counts

    def row_sums(self, label_values: NumberArray) -> NumberArray:
        """Sums a value of each label over those of each row's own tokens that carry it.

        Args:
            label_values: (num_labels,) values.

        Returns:
            (num_rows,) sums, float64.
        """
        sums = np.empty(len(self), dtype=np.float64)
        starts = self.rows.starts
        for rows, tokens in _slices(starts):
            labels = self.labels[tokens]
            values = np.where(labels == IGNORE_INDEX, 0.0, label_values[np.maximum(labels, 0)])
            row_starts = starts[rows.start : rows.stop + 1] - tokens.start
            sums[rows] = sum_parts(values, row_starts, np.float64)
        return sums

    @property
    def labelled_sentence_starts(self) -> IntArray:
        """(num_sentences,) where each sentence begins among the tokens that carry a label."""
        counts = self._num_labelled(self.sentence_token_starts)
        return np.cumsum(counts) - counts

    def _num_labelled(self, starts: IntArray) -> IntArray:
        counts = np.empty(len(starts) - 1, dtype=np.int32)
        for part, tokens in _slices(starts):
            labelled = self.labels[tokens] != IGNORE_INDEX
            part_starts = starts[part.start : part.stop + 1] - tokens.start
            counts[part] = sum_parts(labelled, part_starts, np.int32)
        return counts

    def decide_words(self, token_values: NumberArray, default: int) -> NumberArray:
        """Gives each word the value of its first piece.

        Args:
            token_values: (num_tokens,) a value for each token, such as its predicted label.
            default: For words that have no piece.

        Returns:
            (num_words,) a value for each word of the corpus.
        """
        values = np.full(len(self.word_labels), default, dtype=token_values.dtype)
        first = begins_word(self.word_ids)
        values[self.word_ids[first]] = token_values[first]
        return values


def sum_parts(values: NumberArray, starts: IntArray, dtype: DTypeLike) -> NumberArray:
    """Sums of the parts of a flat array, of which some may be empty.

    Args:
        values: (num_values,).
        starts: (num_parts + 1,) where each part begins; the last is the number of values.
        dtype: Of the sums.

    Returns:
        (num_parts,) the sums.
    """
    sums = np.zeros(len(starts) - 1, dtype)
    (filled,) = np.nonzero(starts[:-1] < starts[1:])
    if len(filled):
        sums[filled] = np.add.reduceat(values, starts[filled], dtype=dtype)
    return sums


def labels_for(train: Corpus | CorpusSummary) -> LabelSet:
    """The labels that a training corpus needs, in a stable order.

    Raises:
        DataError: The corpus has no entity at all.
    """
    if not train.type_names:
        raise DataError("every tag is O: there is nothing to learn", train.source)
    return LabelSet(tuple(label_list(train.type_names)))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name:.30}" for name in names[:12])
    return shown + (", ..." if len(names) > 12 else "")


def begins_word(word_ids: IntArray) -> NDArray[np.bool_]:
    """(num_tokens,) whether a token is the first piece of its word."""
    first = np.ones(len(word_ids), dtype=bool)
    first[1:] = word_ids[1:] != word_ids[:-1]
    return first


def align_labels(
    word_labels: IntArray, word_ids: IntArray, label_set: LabelSet, label_all_tokens: bool
) -> IntArray:
    """Gives each token the label of its word.

    A word's first piece takes the word's label. Later pieces take it too, with `B-X` turned into
    `I-X`, or none (IGNORE_INDEX) if `label_all_tokens` is off.

    Args:
        word_labels: (num_words,) label ids.
        word_ids: (num_tokens,) word of each token.
        label_set: What the ids mean.
        label_all_tokens: Label every piece, as the Hugging Face course does.

    Returns:
        (num_tokens,) label ids, as wide as those of the words.
    """
    labels = word_labels[word_ids]
    later = ~begins_word(word_ids)
    labels[later] = label_set.continuation[labels[later]] if label_all_tokens else IGNORE_INDEX
    return labels


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    label_set: LabelSet,
    reading: Reading = CARD_READING,
    *,
    warn: bool = True,
) -> TokenDataset:
    """Tokenises a corpus, aligns its labels and divides it into rows.

    Args:
        corpus: The sentences.
        tokenizer: The model's tokenizer.
        label_set: The model's labels.
        reading: What a row is, and which tokens carry a label.
        warn: Log what is longer than a row.

    Raises:
        DataError: The corpus has a tag that the labels lack, or does not tell documents apart that
            context is to be read from.
        UsageError: The reading asks for what cannot be.
    """
    _check_documents(corpus, reading)
    row_limit = tokenizer.row_limit(reading.max_seq_length)
    builder = _DatasetBuilder(corpus.source, tokenizer, row_limit, label_set.scheme)
    for block in corpus.blocks():
        builder.add(block)
    dataset = builder.finish(corpus.type_names, label_set, reading.label_all_tokens)
    dataset, warnings = _divide(dataset, tokenizer, reading)
    if warn:
        _log([*builder.warnings, *warnings])
    return dataset


@dataclass(frozen=True)
class PreparedData:
    """A source, read and tokenised.

    Attributes:
        summary: What it holds; of the samples that were asked for, counts and types of these alone.
        dataset: Its rows.
        warnings: What was logged of it, each beginning with the source.
    """

    summary: CorpusSummary
    dataset: TokenDataset
    warnings: tuple[str, ...]


def prepare(
    stream: CorpusStream,
    tokenizer: Tokenizer,
    label_set: LabelSet | None,
    *,
    reading: Reading = CARD_READING,
    max_samples: int | None = None,
) -> PreparedData:
    """Reads a source and tokenises it as it comes: the same as `tokenize` of the whole corpus.

    Args:
        stream: The source.
        tokenizer: The model's tokenizer.
        label_set: The model's labels; None for training data, which say them themselves.
        reading: What a row is, and which tokens carry a label.
        max_samples: Use only the first sentences; the others are read and checked all the same.

    Raises:
        DataError: A mistake in the data; see `read_file` and `tokenize`.
        StorageError: The disk fails.
        UsageError: The reading asks for what cannot be.
    """
    prepared = prepare_tokens(
        stream,
        tokenizer,
        label_set,
        label_all_tokens=reading.label_all_tokens,
        row_limit=tokenizer.row_limit(reading.max_seq_length),
        max_samples=max_samples,
    )
    return with_rows(prepared, tokenizer, reading)


def prepare_tokens(
    stream: CorpusStream,
    tokenizer: Tokenizer,
    label_set: LabelSet | None,
    *,
    label_all_tokens: bool,
    row_limit: int,
    max_samples: int | None = None,
) -> PreparedData:
    """`prepare`, up to the division into rows: each sentence is one, however long.

    Args:
        stream: The source.
        tokenizer: The model's tokenizer.
        label_set: The model's labels; None for training data.
        label_all_tokens: See `align_labels`.
        row_limit: Longest row in tokens; of a word that alone is longer, the rest is left out.
        max_samples: Use only the first sentences.
    """
    reader = stream.builder
    scheme = "IOB2" if label_set is None else label_set.scheme
    builder = _DatasetBuilder(reader.source, tokenizer, row_limit, scheme)
    for block in stream.blocks():
        if max_samples is not None:
            block = block.head(max_samples - builder.num_sentences)
        builder.add(block)
    source_scheme = reader.conclude()
    summary = CorpusSummary(
        source=reader.source,
        sha256=stream.digest.hexdigest(),
        scheme=source_scheme,
        type_names=tuple(sorted(reader.kinds)),
        num_documents=builder.count_documents(),
        marks_documents=reader.marks_documents,
        num_sentences=builder.num_sentences,
        num_words=builder.num_words,
        entity_counts=builder.entity_counts(reader.kinds),
    )
    if label_set is None:
        label_set = labels_for(summary)
    dataset = builder.finish(reader.kinds, label_set, label_all_tokens)
    _log(builder.warnings)
    return PreparedData(summary, dataset, (*reader.warnings, *builder.warnings))


def with_rows(prepared: PreparedData, tokenizer: Tokenizer, reading: Reading) -> PreparedData:
    """Divides prepared sentences into the rows of a reading.

    Raises:
        DataError: Context is to be read from documents, and the source does not tell them apart.
        UsageError: The reading asks for what cannot be.
    """
    _check_documents(prepared.summary, reading)
    dataset, warnings = _divide(prepared.dataset, tokenizer, reading)
    _log(warnings)
    return PreparedData(prepared.summary, dataset, (*prepared.warnings, *warnings))


def _log(warnings: Iterable[str]) -> None:
    for warning in warnings:
        logger.warning("%s", warning)


def _check_documents(corpus: Corpus | CorpusSummary, reading: Reading) -> None:
    if reading.context != "none" and not corpus.marks_documents:
        raise DataError(
            "does not say where documents begin, which --context document needs: add -DOCSTART- "
            "lines or a document_id column (--document_column_name), from the first record on; or "
            "give --context none",
            corpus.source,
        )


def _divide(
    dataset: TokenDataset, tokenizer: Tokenizer, reading: Reading
) -> tuple[TokenDataset, list[str]]:
    """The same tokens in the rows of a reading, and what is worth a warning."""
    row_limit = tokenizer.row_limit(reading.max_seq_length)
    limit = row_limit - 2  # besides [CLS] and [SEP]
    rows = cut_rows(
        dataset.sentence_token_starts,
        dataset.word_ids,
        limit,
        reading.overlap(limit),
        documents=None if reading.context == "none" else dataset.documents,
        join=reading.context_unit == "window",
        context=reading.context_budget(limit),
    )
    warnings = []
    if rows.num_cut:
        warnings.append(
            f"{dataset.source}: {rows.num_cut} sentences are longer than {row_limit} tokens; cut "
            f"between words into {rows.num_parts} overlapping rows, no word dropped"
        )
    return dataclasses.replace(dataset, rows=rows, reading=reading), warnings


class _GrowingArray:
    """A flat array that is appended to, and made wider should a value need it."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._array: IntArray = np.empty(0, dtype)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def append(self, values: IntArray) -> None:
        if len(values) and values.max() > np.iinfo(self._array.dtype).max:
            self._array = self._array.astype(np.int64)
        end = self._size + len(values)
        if end > len(self._array):
            self._reserve(end + end // 8)
        self._array[self._size : end] = values
        self._size = end

    def _reserve(self, capacity: int) -> None:
        """Makes room without holding all of a large array twice, or leaving holes in the heap.

        The C library keeps a large array in pages of its own: those that are not written to yet
        cost nothing, and `resize` adds to them or moves them. Only the first time, when it is
        small, may it be copied (NumPy asks for huge pages, which do not move).
        """
        itemsize = self._array.itemsize
        if self._array.nbytes >= _OWN_PAGES_BYTES:
            self._array.resize(capacity, refcheck=False)
            return
        if capacity * itemsize > _HEAP_BYTES:
            capacity = max(capacity, _OWN_PAGES_BYTES // itemsize + 1)
        array = np.empty(capacity, self._array.dtype)
        array[: self._size] = self._array[: self._size]
        self._array = array

    def view(self) -> IntArray:
        """What was appended so far."""
        return self._array[: self._size]

    def take(self) -> IntArray:
        """The array, without room to spare; it is no longer kept here."""
        array, self._array = self._array, np.empty(0, self._array.dtype)
        array.resize(self._size, refcheck=False)
        self._size = 0
        return array


class _WordPieces:
    """The pieces of words; a word that was met before is not tokenised again."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._forget()

    def _forget(self) -> None:
        self._number_of: dict[str, int] = {}
        self._pieces: IntArray = np.zeros(0, dtype=np.int32)
        self._counts: IntArray = np.zeros(0, dtype=np.int32)  # of pieces, for each word

    def of(self, words: Sequence[str]) -> tuple[IntArray, IntArray]:
        """(num_pieces,) ids, word after word, and (num_words,) number of pieces of each word."""
        if len(self._number_of) > _KNOWN_WORDS:
            self._forget()
        number_of, num_known = self._number_of, len(self._number_of)
        numbers = np.fromiter(
            (number_of.setdefault(word, len(number_of)) for word in words), np.int32, len(words)
        )
        new = list(islice(number_of, num_known, None))
        encoding = self._tokenizer.encode(new)
        self._pieces = np.append(self._pieces, np.array(encoding.ids, dtype=np.int32))
        word_of_piece = np.array(encoding.word_ids, dtype=np.int32)
        new_counts = np.bincount(word_of_piece, minlength=len(new)).astype(np.int32)
        self._counts = np.append(self._counts, new_counts)
        starts = np.cumsum(self._counts) - self._counts
        counts = self._counts[numbers]
        # The pieces of word w, which begin at `begin[w]` here, begin at `starts[w]` over there.
        begin = np.cumsum(counts) - counts
        shift = np.repeat(starts[numbers] - begin, counts)
        return self._pieces[shift + np.arange(len(shift))], counts


class _DatasetBuilder:
    """Tokenises blocks of sentences and collects their rows.

    Args:
        source: Named in messages.
        tokenizer: The model's tokenizer.
        row_limit: Longest row in tokens.
        scheme: Tag scheme of the labels.

    Attributes:
        num_sentences: So far.
        num_words: So far.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, row_limit: int, scheme: str) -> None:
        self.source = source
        self._scheme = scheme
        self.num_sentences = 0
        self.num_words = 0
        self._tokenizer = tokenizer
        self._limit = row_limit - 2  # pieces of a word
        self._word_pieces = _WordPieces(tokenizer)
        self._input_ids = _GrowingArray(np.uint16 if tokenizer.num_ids <= 1 << 16 else np.int32)
        self._word_ids = _GrowingArray(np.int32)
        self._tags = _GrowingArray(np.int16)  # of each word: see _tag_number
        self._sentence_ends = _GrowingArray(np.int32)
        self._sentence_token_ends = _GrowingArray(np.int32)
        self._sentence_lines = _GrowingArray(np.int32)
        self._documents = _GrowingArray(np.int32)
        self._entity_counts: Counter[int] = Counter()  # by type
        # By tag: line and text of the first word that has it.
        self._first_use: dict[int, tuple[int, str]] = {}
        self._long_word: tuple[int, str] | None = None

    def add(self, block: Sentences) -> None:
        if block.num_sentences == 0:
            return
        limit = self._limit
        pieces, counts = self._word_pieces.of(block.words)  # counts: pieces of each word
        word_ids = np.repeat(np.arange(block.num_words), counts)
        if counts.max() > limit:  # of a word that alone is longer than a row, the rest is left out
            word = int(np.argmax(counts > limit))
            self._long_word = self._long_word or (int(block.lines[word]), block.words[word])
            in_word = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
            pieces, word_ids = pieces[in_word < limit], word_ids[in_word < limit]
            counts = np.minimum(counts, limit)
        pieces_before = np.concatenate([[0], np.cumsum(counts)])
        self._sentence_token_ends.append(pieces_before[block.starts[1:]] + len(self._input_ids))
        self._input_ids.append(pieces)
        self._word_ids.append(word_ids + self.num_words)
        self._sentence_ends.append(block.starts[1:] + self.num_words)
        self._sentence_lines.append(block.lines[block.starts[:-1]])
        self._documents.append(block.documents)
        self._add_tags(block)
        self.num_sentences += block.num_sentences
        self.num_words += block.num_words

    def _add_tags(self, block: Sentences) -> None:
        prefixes = from_iob2(block.prefixes, block.types, block.starts[:-1], self._scheme)
        # As _tag_number has it; O has prefix 0 and type -1.
        tags = np.maximum(_tag_number(prefixes, block.types.astype(np.int32)), 0)
        self._tags.append(tags)
        for tag, first in zip(*np.unique(tags, return_index=True), strict=True):
            self._first_use.setdefault(int(tag), (int(block.lines[first]), block.words[first]))
        kinds, counts = np.unique(block.types[block.prefixes == B], return_counts=True)
        self._entity_counts.update(dict(zip(kinds.tolist(), counts.tolist(), strict=True)))

    @property
    def warnings(self) -> list[str]:
        """What is worth a warning so far."""
        if self._long_word is None:
            return []
        line, word = self._long_word
        return [
            f"{self.source}:{line}: a word of more than {self._limit} pieces ({word!r:.20}...); "
            "its later pieces are not read"
        ]

    def count_documents(self) -> int:
        """Number of documents so far."""
        return len(np.unique(self._documents.view()))

    def entity_counts(self, kinds: Sequence[str]) -> dict[str, int]:
        """Number of entities of each type, sorted by its name; `kinds[t]` names type `t`."""
        return {name: self._entity_counts[kind] for kind, name in _by_name(kinds)}

    def finish(
        self, kinds: Sequence[str], label_set: LabelSet, label_all_tokens: bool
    ) -> TokenDataset:
        """Takes out all rows.

        Args:
            kinds: Name of each type number.
            label_set: The model's labels.
            label_all_tokens: See `align_labels`.

        Raises:
            DataError: There is a tag that the labels lack.
        """
        label_of = self._labels_of_tags(kinds, label_set)
        tags = self._tags.take()
        word_labels = np.empty(len(tags), dtype=label_of.dtype)
        for i in range(0, len(tags), _SLICE_TOKENS):
            word_labels[i : i + _SLICE_TOKENS] = label_of[tags[i : i + _SLICE_TOKENS]]
        del tags  # memory is at its peak below
        sentence_ends, token_ends = self._sentence_ends.take(), self._sentence_token_ends.take()
        token_starts = np.concatenate([np.zeros(1, token_ends.dtype), token_ends])
        word_ids = self._word_ids.take()
        labels = np.empty(len(word_ids), dtype=label_of.dtype)
        for _, tokens in _slices(token_starts):
            labels[tokens] = align_labels(
                word_labels, word_ids[tokens], label_set, label_all_tokens
            )
        return TokenDataset(
            input_ids=self._input_ids.take(),
            word_ids=word_ids,
            labels=labels,
            word_labels=word_labels,
            sentence_starts=np.concatenate([np.zeros(1, sentence_ends.dtype), sentence_ends]),
            sentence_token_starts=token_starts,
            sentence_lines=self._sentence_lines.take(),
            documents=self._documents.take(),
            rows=sentence_rows(token_starts),
            reading=CARD_READING,
            source=self.source,
            label_set=label_set,
            cls_id=self._tokenizer.cls_id,
            sep_id=self._tokenizer.sep_id,
            pad_id=self._tokenizer.pad_id,
        )

    def _labels_of_tags(self, kinds: Sequence[str], label_set: LabelSet) -> IntArray:
        """(num_tags,) label id of each tag number."""
        # IGNORE_INDEX fits both.
        dtype = np.int8 if len(label_set.names) <= np.iinfo(np.int8).max else np.int16
        num_tags = _tag_number(len(PREFIX_LETTERS), len(kinds))
        label_of: IntArray = np.full(num_tags, label_set.outside, dtype=dtype)
        for kind, kind_name in _by_name(kinds):
            for prefix, letter in enumerate(PREFIX_LETTERS[B:], B):
                tag, label = _tag_number(prefix, kind), label_set.of_tag.get((prefix, kind_name))
                if tag not in self._first_use:
                    continue
                line, word = self._first_use[tag]
                if label is None and prefix == B and self._scheme == "IOB1":
                    # Labels without B- cannot part neighbours of one type, and do not try to.
                    label = label_set.of_tag.get((I, kind_name))
                if label is None:
                    raise DataError(
                        f"{letter}-{kind_name:.40} ({short(word)}) is not among the model's labels "
                        f"({_some(label_set.names)}); correct the tag, or train on data with it",
                        self.source,
                        line,
                    )
                label_of[tag] = label
        return label_of


_Number = TypeVar("_Number", int, IntArray)


def _tag_number(prefix: _Number, kind: _Number) -> _Number:
    """One number for a prefix code and a type; 0 is for O."""
    return 4 * kind + prefix


def _by_name(kinds: Sequence[str]) -> list[tuple[int, str]]:
    """Types with their numbers, sorted by name."""
    return sorted(enumerate(kinds), key=lambda item: item[1])


def _slices(starts: IntArray) -> Iterator[tuple[slice, slice]]:
    """Splits parts into runs of about _SLICE_TOKENS tokens: slice of parts, slice of tokens."""
    begin, num_parts = 0, len(starts) - 1
    while begin < num_parts:
        end = int(np.searchsorted(starts, starts[begin] + _SLICE_TOKENS))
        end = min(max(end, begin + 1), num_parts)
        yield slice(begin, end), slice(int(starts[begin]), int(starts[end]))
        begin = end
