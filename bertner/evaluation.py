"""Scoring a model on labelled data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bertner import kernels
from bertner.batches import PackedBatch, PaddedBatch, packed_by_length, padded_by_length
from bertner.config import EVAL_TOKENS
from bertner.data import TokenDataset, sum_parts
from bertner.decisions import Decider
from bertner.distributed import ALONE, Ranks
from bertner.labels import IGNORE_INDEX, IntArray
from bertner.metrics import EntityScores, score_entities
from bertner.model import BertForNER, autocast, token_loss


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a dataset.

    Attributes:
        loss: Mean over the labelled tokens.
        loss_batch_mean: The Trainer's `eval_loss`: the mean over batches of their means, weighted
            by rows, which depends on the batch size.
        subword: Scores on the wordpieces that carry a label, each wordpiece with its own best one,
            as in Trainer-made model cards; however words are decided.
        word: Scores on words, each decided once, by default by its first wordpiece, as in
            CoNLL-2003.
        word_predictions: (num_words,) predicted label of every word.
        word_scores: (num_words,) probability of each of them.
        num_repaired: Words that Viterbi gave another label; None without it.
        runtime: Seconds.
        num_rows: Rows read.
    """

    loss: float
    loss_batch_mean: float
    subword: EntityScores
    word: EntityScores
    word_predictions: IntArray
    word_scores: NDArray[np.float32]
    num_repaired: int | None
    runtime: float
    num_rows: int

    def metrics(self) -> dict[str, float]:
        """The scores by name, without a prefix; names without a level are at subword level."""
        repaired = {} if self.num_repaired is None else {"words_repaired": self.num_repaired}
        return {
            "loss": self.loss,
            "loss_batch_mean": self.loss_batch_mean,
            "precision": self.subword.overall.precision,
            "recall": self.subword.overall.recall,
            "f1": self.subword.overall.f1,
            "accuracy": self.subword.accuracy,
            "word_precision": self.word.overall.precision,
            "word_recall": self.word.overall.recall,
            "word_f1": self.word.overall.f1,
            "word_accuracy": self.word.accuracy,
            **repaired,
            "runtime": self.runtime,
            "samples_per_second": self.num_rows / self.runtime,
        }


class Stopped(Exception):
    """An evaluation was asked to stop, and has."""


@torch.inference_mode()
def evaluate(
    model: BertForNER,
    dataset: TokenDataset,
    batch_size: int = 8,
    *,
    dtype: str = "float32",
    packing: bool = True,
    batch_tokens: int = EVAL_TOKENS,
    matmul: str = "auto",
    on_batch: Callable[[int], object] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Scores a model; what is kept of each batch is one label and one loss a token (see `Decider`).

    With packed rows the C library keeps freed memory from then on, as with `train`.

    Args:
        model: Its mode (training or evaluation) is left as it was.
        dataset: Labelled rows; its `reading` says how words are decided.
        batch_size: Rows in a padded batch; for packed ones it says only over how many rows
            `loss_batch_mean` averages.
        dtype: "float32" or "bfloat16" arithmetic.
        packing: Compute real tokens only; else pad rows, as the Trainer does.
        batch_tokens: Most tokens in a packed batch.
        matmul: See `TrainConfig.matmul`; for packed rows.
        on_batch: Is told the number of rows of each batch done, or about those of all ranks.
        should_stop: Is asked after each batch.
        ranks: Several share the batches, and each has all results: those of one, to the bit.

    Raises:
        Stopped: It was asked to.
    """
    start = time.perf_counter()
    device, was_training = model.device, model.training
    decider = Decider(dataset)
    model.eval()
    losses = np.zeros(len(dataset.input_ids), dtype=np.float32)
    batches: Iterator[PackedBatch | PaddedBatch] = (
        packed_by_length(dataset, batch_tokens, device, ranks)
        if packing
        else padded_by_length(dataset, batch_size, device, ranks)
    )
    stopped, num_left = False, len(dataset)
    try:
        with kernels.hot_path(matmul, device, dtype) if packing else nullcontext():
            for batch in batches:
                with autocast(device, dtype):
                    logits = model(batch.input_ids, **batch.layout).logits  # (P, C) or (B, T, C)
                loss = token_loss(logits, batch.labels, "none")
                decider.add(batch, logits)
                losses[batch.token_index] = loss[batch.is_own].cpu().numpy()
                if on_batch is not None:
                    # The other ranks do about as many rows meanwhile.
                    num_done = min(len(batch.rows) * ranks.world_size, num_left)
                    num_left -= num_done
                    on_batch(num_done)
                if stopped := should_stop():
                    break
    finally:
        model.train(was_training)
    if on_batch is not None and num_left and not stopped:
        on_batch(num_left)
    if ranks.any(stopped):
        raise Stopped
    ranks.sum([torch.from_numpy(losses)])

    row_losses = sum_parts(losses, dataset.rows.starts, np.float64)
    scored = dataset.labels != IGNORE_INDEX
    label_set, decisions = dataset.label_set, decider.decide(ranks)
    return Evaluation(
        loss=float(row_losses.sum() / max(dataset.row_num_labelled.sum(), 1)),
        loss_batch_mean=_mean_of_batch_means(row_losses, dataset.row_num_labelled, batch_size),
        subword=score_entities(
            decisions.token_labels[scored],
            dataset.labels[scored],
            dataset.labelled_sentence_starts,
            label_set,
        ),
        word=score_entities(
            decisions.labels, dataset.word_labels, dataset.sentence_starts[:-1], label_set
        ),
        word_predictions=decisions.labels,
        word_scores=decisions.scores,
        num_repaired=decisions.num_repaired if dataset.reading.decoding == "viterbi" else None,
        runtime=time.perf_counter() - start,
        num_rows=len(dataset),
    )


def _mean_of_batch_means(
    row_losses: np.ndarray[Any, Any], row_counts: IntArray, batch_size: int
) -> float:
    starts = np.arange(0, len(row_losses), batch_size)
    means = np.add.reduceat(row_losses, starts) / np.maximum(np.add.reduceat(row_counts, starts), 1)
    return float(np.average(means, weights=np.diff(np.append(starts, len(row_losses)))))
