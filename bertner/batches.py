"""Which rows make a step, in which order, and their tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bertner.config import TrainConfig
from bertner.data import TokenDataset
from bertner.distributed import ALONE, Ranks
from bertner.kernels import send
from bertner.labels import IGNORE_INDEX, IntArray


@dataclass(frozen=True)
class PaddedBatch:
    """Padded rows as tensors.

    Attributes:
        input_ids: (B, T) token ids.
        attention_mask: (B, T) 1 for tokens, 0 for padding.
        labels: (B, T) label ids, IGNORE_INDEX for all but the rows' own tokens.
        rows: (B,) the rows.
        is_own: (B, T) whether a token is its row's own.
        token_index: (num_own_tokens,) place of each row's own tokens in the dataset.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: IntArray
    is_own: Tensor
    token_index: IntArray

    @property
    def layout(self) -> dict[str, Any]:
        """What the model is told of the rows."""
        return {"attention_mask": self.attention_mask}


def collate(
    dataset: TokenDataset, rows: IntArray | Sequence[int], device: torch.device
) -> PaddedBatch:
    """Pads `rows` to the longest of them."""
    flat = _flatten(dataset, np.asarray(rows))
    is_token = np.arange(flat.lengths.max()) < flat.lengths[:, None]  # (B, T)

    def padded(values: NDArray[Any], filling: int) -> NDArray[Any]:
        result = np.full(is_token.shape, filling, dtype=values.dtype)
        result[is_token] = values
        return result

    return PaddedBatch(
        input_ids=_tensor(padded(flat.input_ids, dataset.pad_id), device),
        attention_mask=_tensor(is_token, device),
        labels=_tensor(padded(flat.labels, IGNORE_INDEX), device),
        rows=flat.rows,
        is_own=torch.from_numpy(padded(flat.is_own, False)).to(device),
        token_index=flat.token_index,
    )


@dataclass(frozen=True)
class PackedBatch:
    """Rows one after another, without padding, as tensors.

    Attributes:
        input_ids: (P,) token ids.
        cu_seqlens: (B + 1,) where each row begins, and the number of tokens.
        max_seqlen: Tokens of the longest row.
        labels: (P,) label ids, IGNORE_INDEX for all but the rows' own tokens.
        rows: (B,) the rows, in their order in the batch.
        is_own: (P,) whether a token is its row's own.
        token_index: (num_own_tokens,) place of each row's own tokens in the dataset.
        dropout_seeds: (B,) a seed for each row's dropout; None to draw for all at once.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor
    rows: IntArray
    is_own: Tensor
    token_index: IntArray
    dropout_seeds: Sequence[int] | None = None

    @property
    def layout(self) -> dict[str, Any]:
        """What the model is told of the rows."""
        return {
            "cu_seqlens": self.cu_seqlens,
            "max_seqlen": self.max_seqlen,
            "dropout_seeds": self.dropout_seeds,
        }


# No dummy of a bucket has more tokens.
LONGEST_DUMMY = 72


class Bucket(NamedTuple):
    """How large a packed batch is made, so that there are few sizes of them.

    Attributes:
        num_rows: Rows; those that are not there are dummies, at least one.
        num_tokens: Tokens, those of the dummies too.
    """

    num_rows: int
    num_tokens: int


def bucket_of(num_rows: int, num_tokens: int) -> Bucket:
    """The smallest bucket with room for so many rows and tokens, and a dummy.

    Rows go up in eights, tokens in steps of 64 or, if that is more, of a 16th to a 32nd of them.
    There are as many dummies as it takes for each to be short.
    """
    rows = -(-num_rows // 8) * 8 + 1 + num_tokens // 1024
    wanted = num_tokens + rows - num_rows  # a dummy has a token at least
    step = max(64, 2 ** (wanted.bit_length() - 1) // 16)
    return Bucket(rows, -(-wanted // step) * step)


def pack(
    dataset: TokenDataset,
    rows: IntArray | Sequence[int],
    device: torch.device,
    bucket: Bucket | None = None,
) -> PackedBatch:
    """Puts `rows` one after another, shortest first, as attention takes them fastest.

    Args:
        dataset: The rows.
        rows: Which of them.
        device: Where to.
        bucket: Fill up to this size with dummies, which have no labels: no row attends to them,
            and they change neither the loss nor a gradient.
    """
    rows = np.asarray(rows)
    flat = _flatten(dataset, rows[np.argsort(dataset.row_lengths[rows], kind="stable")])
    lengths = flat.lengths
    if bucket is not None:
        num_spare, tail = bucket.num_rows - len(rows), bucket.num_tokens - int(lengths.sum())
        spare = tail // num_spare + (np.arange(num_spare) < tail % num_spare)
        lengths = np.concatenate([lengths, spare])
        flat = flat._replace(
            input_ids=np.append(flat.input_ids, np.full(tail, dataset.sep_id)),
            labels=np.append(flat.labels, np.full(tail, IGNORE_INDEX)),
            is_own=np.append(flat.is_own, np.zeros(tail, dtype=bool)),
        )
    return PackedBatch(
        input_ids=_tensor(flat.input_ids, device),
        cu_seqlens=_tensor(np.concatenate([[0], np.cumsum(lengths)]), device),
        max_seqlen=int(lengths.max()),
        labels=_tensor(flat.labels, device),
        rows=flat.rows,
        is_own=send(torch.from_numpy(flat.is_own), device),
        token_index=flat.token_index,
    )


class _FlatRows(NamedTuple):
    """Rows one after another; see `PackedBatch`."""

    input_ids: IntArray
    labels: IntArray
    rows: IntArray
    lengths: IntArray
    is_own: NDArray[np.bool_]
    token_index: IntArray


def _flatten(dataset: TokenDataset, rows: IntArray) -> _FlatRows:
    """The tokens of rows, each between its special tokens."""
    lengths = dataset.row_lengths[rows]
    stops = np.cumsum(lengths)
    begins = stops - lengths
    own_begin, own_end = dataset.rows.starts[rows], dataset.rows.starts[rows + 1]
    # Of each place its token in the dataset; of special ones, what is before and after the row's.
    first = own_begin - dataset.rows.before[rows]
    index = np.arange(stops[-1]) + np.repeat(first - begins - 1, lengths)
    is_token = np.ones(len(index), dtype=bool)
    is_token[begins] = is_token[stops - 1] = False
    is_own = (np.repeat(own_begin, lengths) <= index) & (index < np.repeat(own_end, lengths))

    input_ids = np.full(len(index), dataset.sep_id)
    input_ids[begins] = dataset.cls_id
    input_ids[is_token] = dataset.input_ids[index[is_token]]
    labels = np.full(len(index), IGNORE_INDEX)
    labels[is_own] = dataset.labels[index[is_own]]
    return _FlatRows(input_ids, labels, rows, lengths, is_own, index[is_own])


def _tensor(array: NDArray[Any], device: torch.device) -> Tensor:
    return send(torch.from_numpy(array.astype(np.int64)), device)


def padded_by_length(
    dataset: TokenDataset, batch_size: int, device: torch.device, ranks: Ranks = ALONE
) -> Iterator[PaddedBatch]:
    """Yields rows in padded batches of like length, longest first; see `packed_by_length`."""
    by_length = _by_length(dataset)
    for i in range(ranks.rank * batch_size, len(dataset), ranks.world_size * batch_size):
        yield collate(dataset, by_length[i : i + batch_size], device)


def packed_by_length(
    dataset: TokenDataset, batch_tokens: int, device: torch.device, ranks: Ranks = ALONE
) -> Iterator[PackedBatch]:
    """Yields rows in packed batches of like length, longest first.

    Args:
        dataset: The rows.
        batch_tokens: Most tokens in a batch; a longer row is one by itself.
        device: Where to.
        ranks: Of several ranks each gets every n-th batch: the very batches of one.
    """
    by_length = _by_length(dataset)
    ends = np.cumsum(dataset.row_lengths[by_length])
    start, tokens, number = 0, 0, 0
    while start < len(by_length):
        stop = max(int(np.searchsorted(ends, tokens + batch_tokens, side="right")), start + 1)
        if number % ranks.world_size == ranks.rank:
            yield pack(dataset, by_length[start:stop], device)
        start, tokens, number = stop, int(ends[stop - 1]), number + 1


def _by_length(dataset: TokenDataset) -> IntArray:
    return np.argsort(-dataset.row_lengths, kind="stable")


def epoch_order(num_rows: int, seed: int, epoch: int) -> IntArray:
    """The order in which an epoch visits the rows: the Trainer's, as a pure function.

    Args:
        num_rows: Rows in the training data.
        seed: Of the run.
        epoch: From 0.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(num_rows, generator=generator).numpy()


class Schedule:
    """Which rows each optimizer step of a run takes: a pure function of the settings and the data.

    Attributes:
        num_micro_batches: In an epoch, of one rank's size.
        steps_per_epoch: Optimizer steps in one pass over the data.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: How many of them are warmup.
    """

    def __init__(self, row_lengths: IntArray, config: TrainConfig, world_size: int = 1) -> None:
        """Counts the steps.

        Args:
            row_lengths: (num_rows,) tokens that each row of the training data reads.
            config: Batch sizes, accumulation, length of the run, seed.
            world_size: How many ranks take each step together.
        """
        self._lengths = row_lengths
        self._config = config
        self._world_size = world_size
        num_rows = len(row_lengths)
        if config.train_batch_tokens is None:
            self.num_micro_batches = math.ceil(num_rows / config.per_device_train_batch_size)
        else:
            num_tokens = int(row_lengths.sum(dtype=np.int64))
            wanted = math.ceil(num_tokens / config.train_batch_tokens)
            self.num_micro_batches = min(wanted, num_rows)
        self._micro_batches_per_step = config.gradient_accumulation_steps * world_size
        self.steps_per_epoch = math.ceil(self.num_micro_batches / self._micro_batches_per_step)
        self.total_steps = config.max_steps
        if config.max_steps == -1:
            self.total_steps = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        self.warmup_steps = config.resolved_warmup_steps(self.total_steps)

    def micro_batches(self, epoch: int) -> list[IntArray]:
        """The rows of each micro-batch of an epoch (from 0), in order."""
        num_rows = len(self._lengths)
        order = epoch_order(num_rows, self._config.seed, epoch)
        if self._config.train_batch_tokens is None:
            size = self._config.per_device_train_batch_size
            borders: IntArray = np.arange(size, num_rows, size)
        else:
            borders = _even_borders(self._lengths[order], self.num_micro_batches)
        return np.split(order, borders)

    def steps_from(self, first: int) -> Iterator[tuple[int, list[IntArray]]]:
        """Yields each optimizer step from `first` (from 0) on, without end.

        Args:
            first: The first step; what comes before it is not computed.

        Yields:
            The step, and for each of its micro-batches the rows, those of all ranks.
        """
        size = self._micro_batches_per_step
        epoch, position = divmod(first, self.steps_per_epoch)
        step = first
        while True:
            micro_batches: list[IntArray] = self.micro_batches(epoch)
            for i in range(position * size, len(micro_batches), size):
                yield step, micro_batches[i : i + size]
                step += 1
            epoch, position = epoch + 1, 0

    def share(self, micro_batches: Sequence[IntArray], rank: int) -> list[IntArray]:
        """The micro-batches of one rank in a step; in the last step of an epoch some can be empty.

        As many of the step's as there are ranks are computed at the same time. Their rows are dealt
        so that all ranks have about as many tokens: the slowest decides how long a step takes.

        Args:
            micro_batches: Of the whole step.
            rank: Which one.
        """
        if self._world_size == 1:
            return list(micro_batches)
        shares = []
        for i in range(0, len(micro_batches), self._world_size):
            rows = np.concatenate(micro_batches[i : i + self._world_size])
            shares.append(rows[_deal(self._lengths[rows], self._world_size) == rank])
        return shares


def _deal(lengths: IntArray, num_parts: int) -> IntArray:
    """The part of each row: the longest row that is left to the part with the fewest tokens."""
    part: IntArray = np.zeros(len(lengths), dtype=np.int64)
    tokens: IntArray = np.zeros(num_parts, dtype=np.int64)
    for row in np.argsort(-lengths, kind="stable"):
        part[row] = tokens.argmin()
        tokens[part[row]] += lengths[row]
    return part


def _even_borders(lengths: IntArray, num_parts: int) -> IntArray:
    """Where to split rows so that the parts have like numbers of tokens; none is empty.

    So that all epochs have as many steps, whatever their order; filling up batch after batch
    would not give that.
    """
    ends: IntArray = np.cumsum(lengths, dtype=np.int64)
    part: IntArray = np.arange(1, num_parts)
    # A row is in the part in which its middle lies.
    middles, wanted = 2 * ends - lengths, 2 * ends[-1] * part / num_parts
    borders: IntArray = np.maximum(np.searchsorted(middles, wanted), part)
    borders = np.maximum.accumulate(borders - part) + part
    return np.minimum(borders, len(lengths) - num_parts + part)
