"""From the scores of tokens to a label for every word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bertner.batches import PackedBatch, PaddedBatch
from bertner.data import TokenDataset, begins_word, sum_parts
from bertner.decoding import repair, stranded_types
from bertner.distributed import ALONE, Ranks
from bertner.errors import UsageError
from bertner.labels import IntArray


@dataclass(frozen=True)
class Decisions:
    """What a model says of every word, each decided once.

    Attributes:
        labels: (num_words,) label ids; O for words without wordpieces.
        scores: (num_words,) probability of each label; 1 for words without wordpieces.
        token_labels: (num_tokens,) each wordpiece's own best label id, however words are decided.
        num_repaired: Words whose best label was not legal where it stood, or had to change for one
            that was not.
    """

    labels: IntArray
    scores: NDArray[np.float32]
    token_labels: IntArray
    num_repaired: int


class Decider:
    """Takes in batch after batch of a dataset, and then decides its words.

    What is kept of a batch is one label and one score a token. With Viterbi a score for each word
    and label is kept as long as a part of the word's sentence is still to come.

    Args:
        dataset: Its `reading` says how words are decided; each of its rows is in one batch.

    Raises:
        UsageError: There is no tag scheme for Viterbi to keep to.
    """

    def __init__(self, dataset: TokenDataset) -> None:
        names = dataset.label_set.names
        if dataset.reading.decoding == "viterbi" and (lost := stranded_types(dataset.label_set)):
            raise UsageError(
                f"decoding viterbi cannot be used: the labels ({', '.join(names[:4])}"
                f", ...) are of no tag scheme that has room for {lost[0]}; use argmax"
            )
        self.dataset = dataset
        self.reading = dataset.reading
        num_words = len(dataset.word_labels)
        self._token_labels = np.zeros(len(dataset.input_ids), dtype=np.int16)
        # Words without wordpieces stay O, whatever stands beside them.
        self._labels = np.full(num_words, dataset.label_set.outside, dtype=np.int16)
        self._scores = np.zeros(num_words, dtype=np.float32)
        self._num_repaired = 0
        how = self.reading.word_decision, self.reading.decoding
        self._takes_first_piece = how == ("first", "argmax")
        self._has_pieces = np.zeros(num_words, dtype=bool)
        self._has_pieces[dataset.word_ids] = True
        if self.reading.decoding == "viterbi":
            # Of each sentence: how many words there are to come.
            self._num_words = sum_parts(self._has_pieces, dataset.sentence_starts, np.int32)
            self._parts: dict[int, list[_Words]] = {}  # of sentences that are not all there yet

    def add(self, batch: PackedBatch | PaddedBatch, logits: Tensor) -> None:
        """Takes in a batch's logits, (P, L) or (B, T, L)."""
        own = logits[batch.is_own].float()  # (num_own_tokens, L)
        if len(own) == 0:
            return
        log_probabilities = F.log_softmax(own, dim=-1)
        labels = own.argmax(-1)
        scores = log_probabilities.gather(-1, labels[:, None])[:, 0]
        token_labels = labels.cpu().numpy()
        self._token_labels[batch.token_index] = token_labels
        # A row ends between words, so that all pieces of a word are in the same batch.
        words = self.dataset.word_ids[batch.token_index]
        first = begins_word(words)
        if self._takes_first_piece:
            self._scores[words[first]] = np.exp(scores.cpu().numpy()[first])
            return
        values = log_probabilities.cpu().numpy()
        found = _Words(words[first], token_labels[first], values[first])
        if self.reading.word_decision == "all":
            # A later piece of a word of B-X speaks of it as I-X.
            later = values[~first][:, self.dataset.label_set.continuation]
            np.add.at(found.scores, np.cumsum(first)[~first] - 1, later)
            found = found._replace(labels=found.scores.argmax(1))
        if self.reading.decoding == "viterbi":
            self._collect(found)
        else:
            self._decide(found)

    def _collect(self, found: _Words) -> None:
        """Decides the sentences that are all there now, and keeps parts of others."""
        starts = self.dataset.sentence_starts
        sentences = np.searchsorted(starts, found.numbers, side="right") - 1
        order = np.argsort(sentences, kind="stable")
        present, begins = np.unique(sentences[order], return_index=True)
        whole: list[int] = []
        parts: list[_Words] = []
        for sentence, rows in zip(present.tolist(), np.split(order, begins[1:]), strict=True):
            pieces = self._parts.setdefault(sentence, [])
            pieces.append(_Words(found.numbers[rows], found.labels[rows], found.scores[rows]))
            if sum(len(piece.numbers) for piece in pieces) == self._num_words[sentence]:
                whole.append(sentence)
                parts += self._parts.pop(sentence)
        if whole:
            numbers, labels, scores = (np.concatenate(each) for each in zip(*parts, strict=True))
            self._repair(np.array(whole), _Words(numbers, labels, scores))

    def _repair(self, sentences: IntArray, found: _Words) -> None:
        """Gives whole sentences labels that the scheme allows, and decides their words."""
        label_set, starts = self.dataset.label_set, self.dataset.sentence_starts
        lengths = (starts[sentences + 1] - starts[sentences]).astype(np.int64)
        first = np.cumsum(lengths) - lengths
        numbers = np.arange(lengths.sum()) + np.repeat(starts[sentences] - first, lengths)
        place = np.searchsorted(numbers, found.numbers)
        scores = np.full((len(numbers), len(label_set.names)), -np.inf, dtype=np.float32)
        scores[:, label_set.outside] = 0.0  # words without wordpieces
        scores[place] = found.scores
        labels = np.full(len(numbers), label_set.outside, dtype=found.labels.dtype)
        labels[place] = found.labels
        labels, num_repaired = repair(labels, scores, first, label_set)
        self._num_repaired += num_repaired
        self._decide(_Words(numbers, labels, scores))

    def _decide(self, found: _Words) -> None:
        self._labels[found.numbers] = found.labels
        best = np.take_along_axis(found.scores, found.labels[:, None].astype(np.int64), 1)[:, 0]
        everything = np.logaddexp.reduce(found.scores, axis=1)
        self._scores[found.numbers] = np.exp(best - everything)

    def _exchange(self, ranks: Ranks) -> None:
        """Takes in what other ranks have decided, and then what none could decide alone."""
        outside = self.dataset.label_set.outside
        # What a rank has not decided is zero there. Neither backend sums 16-bit integers.
        token_labels = torch.from_numpy(self._token_labels.astype(np.int32))
        labels = torch.from_numpy(self._labels.astype(np.int32) - outside)
        num_repaired = torch.tensor(self._num_repaired)
        ranks.sum([token_labels, labels, torch.from_numpy(self._scores), num_repaired])
        self._token_labels = token_labels.numpy().astype(np.int16)
        self._labels = (labels.numpy() + outside).astype(np.int16)
        self._num_repaired = int(num_repaired)
        if self.reading.decoding == "viterbi":
            size = len(self.dataset.label_set.names)
            nothing = _Words(
                np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, size), np.float32)
            )
            parts = [nothing, *(part for parts in self._parts.values() for part in parts)]
            self._parts.clear()
            numbers, labels_of, scores = (
                torch.cat(ranks.gather_rows(torch.from_numpy(np.concatenate(each)))).numpy()
                for each in zip(*parts, strict=True)
            )
            if len(numbers):
                self._collect(_Words(numbers, labels_of, scores))

    def decide(self, ranks: Ranks = ALONE) -> Decisions:
        """The decisions, once all batches are in; each rank may have had some of them."""
        if ranks.world_size > 1:
            self._exchange(ranks)
        self._scores[~self._has_pieces] = 1.0
        labels = self._labels
        if self._takes_first_piece:
            labels = self.dataset.decide_words(self._token_labels, self.dataset.label_set.outside)
        return Decisions(labels, self._scores, self._token_labels, self._num_repaired)


class _Words(NamedTuple):
    """Words with what the model says of them.

    Attributes:
        numbers: (n,) which they are in the corpus.
        labels: (n,) their best labels.
        scores: (n, L) a log probability for each label, or a sum of such.
    """

    numbers: IntArray
    labels: IntArray
    scores: NDArray[np.float32]
