"""Which rows make a step, in which order, and their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bertner.data import TokenDataset
from bertner.labels import IGNORE_INDEX, IntArray


@dataclass(frozen=True)
class Batch:
    """Padded rows as tensors.

    Attributes:
        input_ids: (B, T) token ids.
        attention_mask: (B, T) 1 for tokens, 0 for padding.
        labels: (B, T) label ids, IGNORE_INDEX for special tokens and padding.
        token_index: (num_real_tokens,) place of each real token in the dataset, row after row.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    token_index: IntArray


def collate(dataset: TokenDataset, rows: IntArray | Sequence[int], device: torch.device) -> Batch:
    """Pads `rows` to the longest of them."""
    starts = dataset.row_starts[rows]
    lengths = dataset.row_starts[np.asarray(rows) + 1] - starts
    column = np.arange(lengths.max())
    is_token = column < lengths[:, None]  # (B, T)
    index = np.where(is_token, starts[:, None] + column, 0)
    input_ids = np.where(is_token, dataset.input_ids[index], dataset.pad_id)
    labels = np.where(is_token, dataset.labels[index], IGNORE_INDEX)

    def tensor(array: IntArray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return Batch(tensor(input_ids), tensor(is_token), tensor(labels), index[is_token])


def batches_by_length(
    dataset: TokenDataset, batch_size: int, device: torch.device
) -> Iterator[tuple[IntArray, Batch]]:
    """Yields all rows in batches of like length, longest first: (rows, batch)."""
    by_length = np.argsort(-dataset.row_lengths, kind="stable")
    for i in range(0, len(dataset), batch_size):
        rows = by_length[i : i + batch_size]
        yield rows, collate(dataset, rows, device)


def epoch_order(num_rows: int, seed: int, epoch: int) -> IntArray:
    """The order in which an epoch visits the rows: the Trainer's, as a pure function.

    Args:
        num_rows: Rows in the training data.
        seed: Of the run.
        epoch: From 0.
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(num_rows, generator=generator).numpy()


def step_batches(
    num_rows: int, batch_size: int, accumulation: int, seed: int, epoch: int
) -> Iterator[list[IntArray]]:
    """Yields, for each optimizer step of an epoch, the rows of its micro-batches."""
    order = epoch_order(num_rows, seed, epoch)
    micro_batches = [order[i : i + batch_size] for i in range(0, num_rows, batch_size)]
    for i in range(0, len(micro_batches), accumulation):
        yield micro_batches[i : i + accumulation]
