"""From the scores of tokens to a label for every word."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bertner.batches import PackedBatch, PaddedBatch
from bertner.data import TokenDataset, begins_word
from bertner.decoding import repair, stranded_types
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

    What is kept of a batch is one label and one score a token; with Viterbi, or where all
    wordpieces of a word have a say, also a score for each word and label.

    Args:
        dataset: Its `reading` says how words are decided.

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
        num_tokens = len(dataset.input_ids)
        self._labels = np.zeros(num_tokens, dtype=np.int16)
        self._scores = np.zeros(num_tokens, dtype=np.float32)  # logarithms
        self._word_scores: NDArray[np.float32] | None = None
        if self.reading.decoding == "viterbi" or self.reading.word_decision == "all":
            shape = (len(dataset.word_labels), len(dataset.label_set.names))
            self._word_scores = np.zeros(shape, dtype=np.float32)

    def add(self, batch: PackedBatch | PaddedBatch, logits: Tensor) -> None:
        """Takes in a batch's logits, (P, L) or (B, T, L)."""
        own = logits[batch.is_own].float()  # (num_own_tokens, L)
        log_probabilities = F.log_softmax(own, dim=-1)
        labels = own.argmax(-1)
        scores = log_probabilities.gather(-1, labels[:, None])[:, 0]
        self._labels[batch.token_index] = labels.cpu().numpy()
        self._scores[batch.token_index] = scores.cpu().numpy()
        if self._word_scores is None:
            return
        values = log_probabilities.cpu().numpy()
        words = self.dataset.word_ids[batch.token_index]
        first = begins_word(words)
        self._word_scores[words[first]] = values[first]
        if self.reading.word_decision == "all":
            # A later piece of a word of B-X speaks of it as I-X.
            later = values[~first][:, self.dataset.label_set.continuation]
            np.add.at(self._word_scores, words[~first], later)

    def decide(self) -> Decisions:
        """The decisions, once all batches are in."""
        dataset, outside = self.dataset, self.dataset.label_set.outside
        labels = dataset.decide_words(self._labels, outside)
        if self._word_scores is None:
            scores = np.exp(dataset.decide_words(self._scores, 0))
            return Decisions(labels, scores, self._labels, num_repaired=0)
        word_scores = self._word_scores
        has_pieces = np.zeros(len(labels), dtype=bool)
        has_pieces[dataset.word_ids] = True
        word_scores[~has_pieces] = -np.inf  # such words are O, whatever stands beside them
        word_scores[~has_pieces, outside] = 0.0
        if self.reading.word_decision == "all":
            labels = word_scores.argmax(1)
        num_repaired = 0
        if self.reading.decoding == "viterbi":
            starts = dataset.sentence_starts[:-1]
            labels, num_repaired = repair(labels, word_scores, starts, dataset.label_set)
        best = np.take_along_axis(word_scores, labels[:, None].astype(np.int64), 1)[:, 0]
        scores = np.exp(best - np.logaddexp.reduce(word_scores, axis=1))
        return Decisions(labels, scores, self._labels, num_repaired)
