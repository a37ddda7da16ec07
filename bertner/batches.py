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
    def layout(self) -> dict[str, Tensor]:
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
        labels: (P,) label ids, IGNORE_INDEX for all but the rows' own tokens.
        rows: (B,) the rows, in their order in the batch.
        is_own: (P,) whether a token is its row's own.
        token_index: (num_own_tokens,) place of each row's own tokens in the dataset.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    labels: Tensor
    rows: IntArray
    is_own: Tensor
    token_index: IntArray

    @property
    def layout(self) -> dict[str, Tensor]:
        """What the model is told of the rows."""
        return {"cu_seqlens": self.cu_seqlens}


def pack(
    dataset: TokenDataset, rows: IntArray | Sequence[int], device: torch.device
) -> PackedBatch:
    """Puts `rows` one after another, shortest first, as attention takes them fastest."""
    rows = np.asarray(rows)
    flat = _flatten(dataset, rows[np.argsort(dataset.row_lengths[rows], kind="stable")])
    return PackedBatch(
        input_ids=_tensor(flat.input_ids, device),
        cu_seqlens=_tensor(np.concatenate([[0], np.cumsum(flat.lengths)]), device),
        labels=_tensor(flat.labels, device),
        rows=flat.rows,
        is_own=torch.from_numpy(flat.is_own).to(device),
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
    return torch.from_numpy(array.astype(np.int64)).to(device)


def padded_by_length(
    dataset: TokenDataset, batch_size: int, device: torch.device
) -> Iterator[PaddedBatch]:
    """Yields all rows in padded batches of like length, longest first."""
    by_length = _by_length(dataset)
    for i in range(0, len(dataset), batch_size):
        yield collate(dataset, by_length[i : i + batch_size], device)


def packed_by_length(
    dataset: TokenDataset, batch_tokens: int, device: torch.device
) -> Iterator[PackedBatch]:
    """Yields all rows in packed batches of like length, longest first.

    Args:
        dataset: The rows.
        batch_tokens: Most tokens in a batch; a longer row is one by itself.
        device: Where to.
    """
    by_length = _by_length(dataset)
    ends = np.cumsum(dataset.row_lengths[by_length])
    start, tokens = 0, 0
    while start < len(by_length):
        stop = max(int(np.searchsorted(ends, tokens + batch_tokens, side="right")), start + 1)
        yield pack(dataset, by_length[start:stop], device)
        start, tokens = stop, int(ends[stop - 1])


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
        num_micro_batches: In an epoch.
        steps_per_epoch: Optimizer steps in one pass over the data.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: How many of them are warmup.
    """

    def __init__(self, row_lengths: IntArray, config: TrainConfig) -> None:
        """Counts the steps.

        Args:
            row_lengths: (num_rows,) tokens that each row of the training data reads.
            config: Batch sizes, accumulation, length of the run, seed.
        """
        self._lengths = row_lengths
        self._config = config
        num_rows = len(row_lengths)
        if config.train_batch_tokens is None:
            self.num_micro_batches = math.ceil(num_rows / config.per_device_train_batch_size)
        else:
            num_tokens = int(row_lengths.sum(dtype=np.int64))
            wanted = math.ceil(num_tokens / config.train_batch_tokens)
            self.num_micro_batches = min(wanted, num_rows)
        self.steps_per_epoch = math.ceil(
            self.num_micro_batches / config.gradient_accumulation_steps
        )
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
            The step, and for each of its micro-batches the rows.
        """
        accumulation = self._config.gradient_accumulation_steps
        epoch, position = divmod(first, self.steps_per_epoch)
        step = first
        while True:
            micro_batches: list[IntArray] = self.micro_batches(epoch)
            for i in range(position * accumulation, len(micro_batches), accumulation):
                yield step, micro_batches[i : i + accumulation]
                step += 1
            epoch, position = epoch + 1, 0


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
