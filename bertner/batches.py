"""Which rows make a step, in which order, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
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
        labels: (B, T) label ids, IGNORE_INDEX for special tokens and padding.
        rows: (B,) the rows.
        token_index: (num_real_tokens,) place of each real token in the dataset, row after row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: IntArray
    token_index: IntArray

    @property
    def layout(self) -> dict[str, Tensor]:
        """What the model is told of the rows."""
        return {"attention_mask": self.attention_mask}

    def real(self, values: Tensor) -> Tensor:
        """Of (B, T) values those of the real tokens, in the order of `token_index`."""
        return values[self.attention_mask.bool()]


def collate(
    dataset: TokenDataset, rows: IntArray | Sequence[int], device: torch.device
) -> PaddedBatch:
    """Pads `rows` to the longest of them."""
    rows = np.asarray(rows)
    starts, lengths = dataset.row_starts[rows], dataset.row_lengths[rows]
    column = np.arange(lengths.max())
    is_token = column < lengths[:, None]  # (B, T)
    index = np.where(is_token, starts[:, None] + column, 0)
    input_ids = np.where(is_token, dataset.input_ids[index], dataset.pad_id)
    labels = np.where(is_token, dataset.labels[index], IGNORE_INDEX)

    return PaddedBatch(
        _tensor(input_ids, device),
        _tensor(is_token.astype(np.int64), device),
        _tensor(labels, device),
        rows,
        index[is_token],
    )


@dataclass(frozen=True)
class PackedBatch:
    """Rows one after another, without padding, as tensors.

    Attributes:
        input_ids: (P,) token ids.
        cu_seqlens: (B + 1,) where each row begins, and the number of tokens.
        labels: (P,) label ids, IGNORE_INDEX for special tokens.
        rows: (B,) the rows, in their order in the batch.
        token_index: (P,) place of each token in the dataset.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    labels: Tensor
    rows: IntArray
    token_index: IntArray

    @property
    def layout(self) -> dict[str, Tensor]:
        """What the model is told of the rows."""
        return {"cu_seqlens": self.cu_seqlens}

    def real(self, values: Tensor) -> Tensor:
        """Of (P,) values those of the real tokens: all."""
        return values


def pack(
    dataset: TokenDataset, rows: IntArray | Sequence[int], device: torch.device
) -> PackedBatch:
    """Puts `rows` one after another, shortest first, as attention takes them fastest."""
    rows = np.asarray(rows)
    rows = rows[np.argsort(dataset.row_lengths[rows], kind="stable")]
    lengths = dataset.row_lengths[rows]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    index = np.arange(cu_seqlens[-1]) + np.repeat(
        dataset.row_starts[rows] - cu_seqlens[:-1], lengths
    )

    return PackedBatch(
        input_ids=_tensor(dataset.input_ids[index], device),
        cu_seqlens=_tensor(cu_seqlens, device),
        labels=_tensor(dataset.labels[index], device),
        rows=rows,
        token_index=index,
    )


def _tensor(array: IntArray, device: torch.device) -> Tensor:
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


def steps_from(
    first: int, num_rows: int, config: TrainConfig
) -> Iterator[tuple[int, list[IntArray]]]:
    """Yields each optimizer step from `first` (from 0) on, without end: the rows of its batches.

    Args:
        first: The first step; what comes before it is not computed.
        num_rows: Rows in the training data.
        config: Seed, batch size and accumulation.

    Yields:
        The step, and for each of its micro-batches the rows.
    """
    batch_size = config.per_device_train_batch_size
    accumulation = config.gradient_accumulation_steps
    epoch, position = divmod(first, config.steps_per_epoch(num_rows))
    step = first
    while True:
        order = epoch_order(num_rows, config.seed, epoch)
        micro_batches = [order[i : i + batch_size] for i in range(0, num_rows, batch_size)]
        for i in range(position * accumulation, len(micro_batches), accumulation):
            yield step, micro_batches[i : i + accumulation]
            step += 1
        epoch, position = epoch + 1, 0
