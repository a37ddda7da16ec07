"""From a checked corpus to token rows: tokenise, align labels, cut long sentences.

Everything is flat: the tokens of all rows stand one after another, and `row_starts` says where each
row begins. A row is `[CLS] pieces [SEP]` of one sentence, or of a part of a sentence that is longer
than the model's window; it is cut between words, and nothing is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertner.corpus import Corpus
from bertner.errors import DataError
from bertner.labels import IGNORE_INDEX, B, I, IntArray, LabelSet, O, label_list
from bertner.tokenizer import Tokenizer

logger = logging.getLogger("bertner")

NumberArray = NDArray[Any]


@dataclass(frozen=True)
class TokenDataset:
    """Tokenised rows in flat arrays.

    Attributes:
        input_ids: (num_tokens,) token ids, special tokens included.
        word_ids: (num_tokens,) index of each token's word in the corpus; -1 for special tokens.
        labels: (num_tokens,) label ids, IGNORE_INDEX where a token carries none.
        row_starts: (num_rows + 1,) where each row begins; the last is the number of tokens.
        row_sentences: (num_rows,) sentence that each row is of, ascending.
        word_labels: (num_words,) label ids of the corpus' words.
        sentence_starts: (num_sentences + 1,) where each sentence begins, in words.
        sentence_lines: (num_sentences,) line or record at which each sentence begins.
        source: File or dataset, as named in messages.
        label_set: What the label ids mean.
        pad_id: Id that fills rows up.
    """

    input_ids: IntArray
    word_ids: IntArray
    labels: IntArray
    row_starts: IntArray
    row_sentences: IntArray
    word_labels: IntArray
    sentence_starts: IntArray
    sentence_lines: IntArray
    source: str
    label_set: LabelSet
    pad_id: int

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.row_sentences)

    @cached_property
    def row_lengths(self) -> IntArray:
        """(num_rows,) tokens in each row."""
        return np.diff(self.row_starts)

    @cached_property
    def row_num_labelled(self) -> IntArray:
        """(num_rows,) tokens in each row that carry a label."""
        return np.add.reduceat(self.labels != IGNORE_INDEX, self.row_starts[:-1], dtype=np.int64)

    @property
    def labelled_row_starts(self) -> IntArray:
        """(num_rows,) where each row begins among the tokens that carry a label."""
        return np.cumsum(self.row_num_labelled) - self.row_num_labelled

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


def labels_for(train: Corpus) -> LabelSet:
    """The labels that a training corpus needs, in a stable order.

    Raises:
        DataError: The corpus has no entity at all.
    """
    if not train.type_names:
        raise DataError("every tag is O: there is nothing to learn", train.source)
    return LabelSet(tuple(label_list(train.type_names)))


def label_words(corpus: Corpus, label_set: LabelSet) -> IntArray:
    """(num_words,) label ids of a corpus' tags.

    Raises:
        DataError: The corpus has an entity type that `label_set` lacks.
    """
    table = np.zeros((3, len(corpus.type_names) + 1), dtype=np.int16)
    for prefix, letter in ((B, "B"), (I, "I")):
        for k, kind in enumerate(corpus.type_names):
            tag = f"{letter}-{kind}"
            if tag not in label_set.index:
                used = np.flatnonzero((corpus.types == k) & (corpus.prefixes == prefix))
                if len(used) == 0:
                    continue
                word = int(used[0])
                raise DataError(
                    f"{tag} ({corpus.words[word]!r}) is not among the model's labels "
                    f"({_some(label_set.names)}); correct the tag, or train on data with it",
                    corpus.source,
                    int(corpus.lines[word]),
                )
            table[prefix, k] = label_set.index[tag]
    table[O] = label_set.outside
    return table[corpus.prefixes, corpus.types]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def begins_word(word_ids: IntArray) -> NDArray[np.bool_]:
    """(num_tokens,) whether a token is the first piece of its word; special tokens are not."""
    first = word_ids >= 0
    first[1:] &= word_ids[1:] != word_ids[:-1]
    return first


def align_labels(
    word_labels: IntArray, word_ids: IntArray, label_set: LabelSet, label_all_tokens: bool
) -> IntArray:
    """Gives each token the label of its word.

    A word's first piece takes the word's label. Later pieces take it too, with `B-X` turned into
    `I-X`, or none (IGNORE_INDEX) if `label_all_tokens` is off. Special tokens take none.

    Args:
        word_labels: (num_words,) label ids.
        word_ids: (num_tokens,) word of each token, -1 for special tokens.
        label_set: What the ids mean.
        label_all_tokens: Label every piece, as the Hugging Face course does.

    Returns:
        (num_tokens,) label ids.
    """
    labels = word_labels[word_ids].astype(np.int16)
    later = (word_ids >= 0) & ~begins_word(word_ids)
    labels[later] = label_set.continuation[labels[later]] if label_all_tokens else IGNORE_INDEX
    labels[word_ids < 0] = IGNORE_INDEX
    return labels


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    label_set: LabelSet,
    *,
    label_all_tokens: bool = True,
    max_seq_length: int | None = None,
) -> TokenDataset:
    """Tokenises a corpus, aligns its labels and cuts what is longer than the window.

    Args:
        corpus: The sentences.
        tokenizer: The model's tokenizer.
        label_set: The model's labels.
        label_all_tokens: See `align_labels`.
        max_seq_length: Longest row in tokens; None for the model's own limit.

    Raises:
        DataError: The corpus has a tag that the labels lack.
    """
    limit = tokenizer.row_limit(max_seq_length)
    word_labels = label_words(corpus, label_set)
    encodings = tokenizer.encode([corpus.sentence(i) for i in range(corpus.num_sentences)])
    num_pieces: IntArray = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
    total = int(num_pieces.sum())
    pieces: IntArray = np.fromiter(chain.from_iterable(e.ids for e in encodings), np.int32, total)
    word_in_sentence = np.fromiter(
        chain.from_iterable(e.word_ids for e in encodings), np.int64, total
    )
    word_ids: IntArray = word_in_sentence + np.repeat(corpus.starts[:-1], num_pieces)

    pieces, word_ids, num_pieces = _shorten_words(pieces, word_ids, num_pieces, limit - 2, corpus)
    row_sentences, row_pieces = _cut_rows(num_pieces, word_ids, limit - 2)
    cut = len(row_sentences) - corpus.num_sentences
    if cut:
        long = int(np.count_nonzero(num_pieces > limit - 2))
        logger.warning(
            "%s: %d sentences are longer than %d tokens; cut between words into %d rows, "
            "no word dropped",
            corpus.source,
            long,
            limit,
            cut + long,
        )

    row_starts = np.concatenate([[0], np.cumsum(row_pieces + 2)])
    is_piece = np.ones(row_starts[-1], dtype=bool)
    is_piece[row_starts[:-1]] = False
    is_piece[row_starts[1:] - 1] = False
    input_ids = np.empty(len(is_piece), dtype=np.int32)
    input_ids[row_starts[:-1]] = tokenizer.cls_id
    input_ids[row_starts[1:] - 1] = tokenizer.sep_id
    input_ids[is_piece] = pieces
    all_word_ids = np.full(len(is_piece), -1, dtype=np.int64)
    all_word_ids[is_piece] = word_ids
    return TokenDataset(
        input_ids=input_ids,
        word_ids=all_word_ids,
        labels=align_labels(word_labels, all_word_ids, label_set, label_all_tokens),
        row_starts=row_starts,
        row_sentences=row_sentences,
        word_labels=word_labels,
        sentence_starts=corpus.starts,
        sentence_lines=corpus.lines[corpus.starts[:-1]],
        source=corpus.source,
        label_set=label_set,
        pad_id=tokenizer.pad_id,
    )


def _shorten_words(
    pieces: IntArray, word_ids: IntArray, num_pieces: IntArray, limit: int, corpus: Corpus
) -> tuple[IntArray, IntArray, IntArray]:
    """Keeps the first `limit` pieces of a word that alone is longer than a row."""
    if len(pieces) == 0:
        return pieces, word_ids, num_pieces
    first = np.flatnonzero(np.concatenate([[True], word_ids[1:] != word_ids[:-1]]))
    length = np.diff(np.append(first, len(pieces)))
    if length.max() <= limit:
        return pieces, word_ids, num_pieces
    word = int(word_ids[first[np.argmax(length > limit)]])
    logger.warning(
        "%s:%d: a word of more than %d pieces (%.20r...); its later pieces are not read",
        corpus.source,
        corpus.lines[word],
        limit,
        corpus.words[word],
    )
    keep = np.arange(len(pieces)) - np.repeat(first, length) < limit
    sentence = np.repeat(np.arange(len(num_pieces)), num_pieces)
    return pieces[keep], word_ids[keep], np.bincount(sentence[keep], minlength=len(num_pieces))


def _cut_rows(num_pieces: IntArray, word_ids: IntArray, limit: int) -> tuple[IntArray, IntArray]:
    """Sentence and number of pieces of each row: whole sentences, or parts cut between words."""
    if len(num_pieces) == 0 or num_pieces.max() <= limit:
        return np.arange(len(num_pieces)), num_pieces
    sentences: list[int] = []
    lengths: list[int] = []
    end = 0
    for sentence, count in enumerate(num_pieces):
        begin, end = end, end + int(count)
        while end - begin > limit:
            # The last word border that still fits; words are at most `limit` long.
            border = begin + limit
            while word_ids[border] == word_ids[border - 1]:
                border -= 1
            sentences.append(sentence)
            lengths.append(border - begin)
            begin = border
        sentences.append(sentence)
        lengths.append(end - begin)
    return np.array(sentences), np.array(lengths)
