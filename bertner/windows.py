"""Which tokens a row reads, and which of them are its own to decide.

Tokens are wordpieces in one flat array, all sentences one after another. The rows' own tokens
divide it: every token is the own of one row and of no other, so that nothing is lost and nothing
counted twice. What a row reads besides, before and after its own, is context: it carries no loss
and is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from bertner.labels import IntArray


@dataclass(frozen=True)
class Rows:
    """Rows over a flat array of tokens.

    Attributes:
        starts: (num_rows + 1,) where each row's own tokens begin; the last is the number of tokens.
        before: (num_rows,) tokens of context that are read before them.
        after: (num_rows,) tokens of context that are read after them.
        sentences: (num_rows,) sentence in which each row's own tokens begin, ascending.
        num_cut: Sentences that are longer than a row, and so are cut.
        num_parts: Rows that they are cut into.
    """

    starts: IntArray
    before: IntArray
    after: IntArray
    sentences: IntArray
    num_cut: int = 0
    num_parts: int = 0


def sentence_rows(sentence_starts: IntArray) -> Rows:
    """Each sentence as a row, however long."""
    num_sentences = len(sentence_starts) - 1
    nothing = np.zeros(num_sentences, dtype=np.int32)
    numbers = np.arange(num_sentences, dtype=np.int32)
    return Rows(sentence_starts.astype(np.int64), nothing, nothing, numbers)


def cut_rows(
    sentence_starts: IntArray,
    word_ids: IntArray,
    limit: int,
    overlap: int,
    *,
    documents: IntArray | None = None,
    join: bool = False,
    context: int = 0,
) -> Rows:
    """Divides tokens into rows.

    A row is a sentence, or as many neighbouring sentences of a document as it holds. A sentence
    that is longer is cut between words into rows that overlap; each of its words is own where it
    has most context, counted to the nearer end of the row.

    Args:
        sentence_starts: (num_sentences + 1,) where each sentence begins; the last is the number of
            tokens.
        word_ids: (num_tokens,) word of each token, ascending; no word has more than `limit` tokens.
        limit: Most tokens in a row, without special tokens.
        overlap: Tokens that neighbouring rows of a long sentence share.
        documents: (num_sentences,) the document of each sentence; None for no context.
        join: Fill rows with whole sentences; otherwise each sentence is a row.
        context: Most tokens that a row reads on each side of its own, from the same document.
    """
    rows = sentence_rows(sentence_starts)
    if documents is not None and join:
        firsts = _joined(sentence_starts, documents, max(limit - 2 * context, 1))
        starts = np.append(rows.starts[firsts], rows.starts[-1])
        rows = Rows(starts, rows.before[firsts], rows.after[firsts], rows.sentences[firsts])
    if documents is not None and context:
        before, after = _context(rows, sentence_starts, documents, limit, context)
        rows = replace(
            rows,
            before=_whole_words(before, lambda count: rows.starts[:-1] - count, word_ids),
            after=_whole_words(after, lambda count: rows.starts[1:] + count, word_ids),
        )
    long = np.flatnonzero(np.diff(rows.starts) > limit)
    return _cut_long(rows, long, word_ids, limit, overlap) if len(long) else rows


def _borders(documents: IntArray) -> IntArray:
    """The first sentence of each document but the first."""
    return np.flatnonzero(documents[1:] != documents[:-1]) + 1


def _joined(sentence_starts: IntArray, documents: IntArray, room: int) -> IntArray:
    """The first sentence of each row of whole sentences with up to `room` tokens."""
    firsts: list[int] = []
    begin = 0
    for end in [*_borders(documents).tolist(), len(documents)]:
        while begin < end:
            firsts.append(begin)
            fits = int(np.searchsorted(sentence_starts, sentence_starts[begin] + room, "right")) - 1
            begin = min(max(fits, begin + 1), end)
    return np.array(firsts, dtype=np.int64)


def _context(
    rows: Rows, sentence_starts: IntArray, documents: IntArray, limit: int, context: int
) -> tuple[IntArray, IntArray]:
    """Tokens that each row reads before and after its own, within its document and the limit."""
    borders = _borders(documents)
    begins = sentence_starts[np.append(0, borders)]
    ends = sentence_starts[np.append(borders, len(documents))]
    document = np.searchsorted(borders, rows.sentences, "right")
    before = np.minimum(rows.starts[:-1] - begins[document], context)
    after = np.minimum(ends[document] - rows.starts[1:], context)
    spare = np.maximum(limit - np.diff(rows.starts), 0)
    # Half of what is to spare for each side, and what the one does not need for the other.
    share = np.minimum(before, np.maximum(spare // 2, spare - after))
    return share, np.minimum(after, spare - share)


def _whole_words(
    context: IntArray, border_of: Callable[[IntArray], IntArray], word_ids: IntArray
) -> IntArray:
    """Less context where it would begin or end within a word.

    Args:
        context: (num_rows,) tokens on one side of each row's own.
        border_of: Gives the place where so much context begins, or ends.
        word_ids: (num_tokens,) word of each token.
    """
    context = context.copy()
    while True:
        border = border_of(context)
        (cut,) = np.nonzero((context > 0) & (border > 0) & (border < len(word_ids)))
        cut = cut[word_ids[border[cut]] == word_ids[border[cut] - 1]]
        if len(cut) == 0:
            return context.astype(np.int32)
        context[cut] -= 1


def _cut_long(rows: Rows, long: IntArray, word_ids: IntArray, limit: int, overlap: int) -> Rows:
    """Puts the windows of long rows, each of one sentence, in their places."""
    own_starts, starts, before, after, sentences = [], [], [], [], []
    done = 0
    for row in long.tolist():
        begin, end = int(rows.starts[row]), int(rows.starts[row + 1])
        windows = _windows(word_ids[begin:end], limit, overlap)
        first, own, stop = begin + windows[:, 0], begin + windows[:, 1], begin + windows[:, 2]
        own_starts.append(own)
        starts += [rows.starts[done:row], own]
        before += [rows.before[done:row], own - first]
        after += [rows.after[done:row], stop - np.append(own[1:], end)]
        sentences += [rows.sentences[done:row], np.full(len(own), rows.sentences[row])]
        done = row + 1
    return Rows(
        np.concatenate([*starts, rows.starts[done:]]),
        np.concatenate([*before, rows.before[done:]]).astype(np.int32),
        np.concatenate([*after, rows.after[done:]]).astype(np.int32),
        np.concatenate([*sentences, rows.sentences[done:]]).astype(np.int32),
        num_cut=len(long),
        num_parts=sum(map(len, own_starts)),
    )


def _windows(word_ids: IntArray, limit: int, overlap: int) -> IntArray:
    """(num_windows, 3) where each window begins, where its own tokens begin, where it ends."""
    end = len(word_ids)
    borders = np.append(np.flatnonzero(np.diff(word_ids, prepend=word_ids[0] - 1)), end)
    windows: list[tuple[int, int]] = []
    first = 0
    while end - first > limit:
        last = int(np.searchsorted(borders, first + limit, "right")) - 1
        stop = int(borders[last])
        windows.append((first, stop))
        # The next one must have room for a word more.
        next_first = max(stop - overlap, int(borders[last + 1]) - limit)
        first = int(borders[np.searchsorted(borders, next_first)])
    # The last one is filled up from before.
    windows.append((int(borders[np.searchsorted(borders, end - limit)]), end))

    own = [0]
    for (_, stop), (next_first, _) in pairwise(windows):
        # Beginnings of the words that both have, and the end of the last.
        both = slice(np.searchsorted(borders, next_first), np.searchsorted(borders, stop, "right"))
        words = borders[both]
        left, right = words[:-1] - next_first, stop - words[1:]
        own.append(int(words[np.count_nonzero(left < right)]))
    return np.column_stack([[w[0] for w in windows], own, [w[1] for w in windows]])
