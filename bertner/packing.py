"""Packed batches: rows one after another, without padding, and the blocks of their attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bertner.kernels import KeepMasks


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of a packed batch whose attention is computed in one go.

    Attributes:
        start: First token, in the packed batch.
        batch: How many sequences the block is viewed as.
        length: Tokens in each of them.
        mask: (length, length) to be added to the scores where a sequence joins several rows, each
            of which sees only itself; None where a sequence is one row.
    """

    start: int
    batch: int
    length: int
    mask: Tensor | None

    @property
    def stop(self) -> int:
        """The token after the last."""
        return self.start + self.batch * self.length


# Time of a block, forward and backward: a fixed part for its twenty or so calls, and a part for
# each of its scores. Only their ratio matters; `python -m benchmarks.attention_forms` measures it.
SCORES_PER_CALL = 3000

# Scores of a block of equal rows, unless it is a single row: bounds memory, at no cost in time.
MOST_SCORES = 2**21


def plan_blocks(lengths: Sequence[int]) -> list[list[int]]:
    """Divides the rows of a packed batch into blocks, as cheap as possible in total.

    A run of rows of the same length is a block as it stands, and wastes nothing. Short rows of
    different lengths are joined under a mask, which computes t * t scores for t tokens: worth it
    while that is less than another round of calls costs. Long rows stay alone, so that the whole is
    linear in the number of tokens.

    Args:
        lengths: Tokens of each row, in their order. Sorted lengths give the fewest blocks.

    Returns:
        The lengths of the rows of each block.
    """
    runs: list[list[int]] = []
    for length in lengths:
        same = bool(runs) and runs[-1][0] == length
        if same and (len(runs[-1]) + 1) * length**2 <= MOST_SCORES:
            runs[-1].append(length)
        else:
            runs.append([length])
    # Shortest path over the borders between runs: best[k] is the least cost of the first k runs.
    best, begin_of = [0], [0]
    for stop in range(1, len(runs) + 1):
        run = runs[stop - 1]
        cost, begin = best[-1] + SCORES_PER_CALL + len(run) * run[0] ** 2, stop - 1
        tokens = len(run) * run[0]
        for start in range(stop - 2, -1, -1):
            tokens += len(runs[start]) * runs[start][0]
            joined = SCORES_PER_CALL + tokens**2
            if joined >= cost:
                break  # best[] grows with the rows and joining more only costs more
            if best[start] + joined < cost:
                cost, begin = best[start] + joined, start
        best.append(cost)
        begin_of.append(begin)
    blocks: list[list[int]] = []
    stop = len(runs)
    while stop:
        start = begin_of[stop]
        blocks.append([length for run in runs[start:stop] for length in run])
        stop = start
    return blocks[::-1]


def make_blocks(lengths: Sequence[int], device: torch.device) -> list[Block]:
    """The blocks of `plan_blocks` with their places and masks."""
    blocks, start = [], 0
    for rows in plan_blocks(lengths):
        if len(set(rows)) == 1:
            block = Block(start, len(rows), rows[0], None)
        else:
            block = Block(start, 1, sum(rows), _join_mask(rows, device))
        blocks.append(block)
        start = block.stop
    return blocks


def _join_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(t, t) zeros where a token sees another of its row, minus infinity elsewhere."""
    row = torch.repeat_interleave(torch.tensor(lengths, device=device))
    mask = torch.full((len(row), len(row)), -torch.inf, device=device)
    return mask.masked_fill_(row[:, None] == row, 0.0)


class Packing:
    """What the layers need to know of a packed batch.

    Args:
        cu_seqlens: (B + 1,) where each row begins, and the number of tokens.
        training: Whether to drop units.

    Attributes:
        max_length: Tokens of the longest row.
        position_ids: (P,) place of each token in its row.
        blocks: The parts in which attention is computed.
        dropout_masks: Source of dropout's masks; None outside training.
    """

    def __init__(self, cu_seqlens: Tensor, training: bool) -> None:
        starts: list[int] = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(starts)]
        if not lengths or min(lengths) < 1 or starts[0] != 0:
            raise ValueError(f"cu_seqlens must begin with 0 and ascend, not {starts[:5]}")
        device = cu_seqlens.device
        self.max_length = max(lengths)
        begin = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=starts[-1])
        self.position_ids = torch.arange(starts[-1], device=device) - begin
        self.blocks: list[Block] = make_blocks(lengths, device)
        self.dropout_masks = KeepMasks(device) if training else None

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Drops units of `x`, in training."""
        if self.dropout_masks is None or p == 0.0:
            return x
        return x * self.dropout_masks.draw(x.shape, p).to(x.dtype)
