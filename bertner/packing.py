"""Packed batches: rows one after another, without padding, and the blocks of their attention."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from bertner.kernels import KeepMasks


@dataclass(frozen=True)
class Block:
    """Neighbouring rows of a packed batch whose attention is computed in one go.

    Attributes:
        start: Place of its first token, in the grid that all blocks make up; see `HeadPlaces`.
        num_rows: Rows in it.
        length: Places of each row; those after a row's last token stay empty.
    """

    start: int
    num_rows: int
    length: int

    @property
    def stop(self) -> int:
        """The place after the last."""
        return self.start + self.num_rows * self.length


# Time of a block, forward and backward: a fixed part for its twenty or so calls, and a part for
# each of its scores. Only their ratio matters; `python -m benchmarks.attention_forms` measures it.
SCORES_PER_CALL = 2500

# Scores of a block, unless it is a single row: bounds memory, at no cost in time.
MOST_SCORES = 2**21


def plan_blocks(lengths: Sequence[int]) -> list[Block]:
    """Divides the rows of a packed batch into blocks, as cheap as possible in total.

    The rows of a block are computed as if all were as long as the longest of them. Joining rows
    pays while the scores wasted on that cost less than another round of calls, so that the waste
    is bounded and the whole stays linear in the number of tokens.

    Args:
        lengths: Tokens of each row, in their order. Sorted lengths give the fewest blocks.
    """
    runs: list[tuple[int, int]] = []  # (rows, length) of neighbours of the same length
    for length in lengths:
        rows = runs[-1][0] + 1 if runs and runs[-1][1] == length else 1
        if rows > 1 and rows * length**2 <= MOST_SCORES:
            runs[-1] = (rows, length)
        else:
            runs.append((1, length))
    # Shortest path over the borders between runs: best[k] is the least cost of the first k runs.
    best, begin_of = [0], [0]
    for stop in range(1, len(runs) + 1):
        num_rows, length = runs[stop - 1]
        cost, begin = best[-1] + SCORES_PER_CALL + num_rows * length**2, stop - 1
        for start in range(stop - 2, -1, -1):
            num_rows, length = num_rows + runs[start][0], max(length, runs[start][1])
            scores = num_rows * length**2
            if scores > MOST_SCORES or SCORES_PER_CALL + scores >= cost:
                break  # joining more rows only costs more
            if best[start] + SCORES_PER_CALL + scores < cost:
                cost, begin = best[start] + SCORES_PER_CALL + scores, start
        best.append(cost)
        begin_of.append(begin)
    joined, stop = [], len(runs)
    while stop:
        joined.append(runs[begin_of[stop] : stop])
        stop = begin_of[stop]
    blocks: list[Block] = []
    for block in reversed(joined):
        start = blocks[-1].stop if blocks else 0
        blocks.append(Block(start, sum(n for n, _ in block), max(length for _, length in block)))
    return blocks


@dataclass(frozen=True)
class HeadPlaces:
    """Where the vectors of each head of each token go for attention, and where they come from.

    Attention needs (rows, N, length, H), head by head; the layers have (P, N, H), token by token.
    With these indices one `index_select` of vectors of size H goes from one to the other, for all
    blocks. G is the number of places, P that of tokens, N that of heads.

    Attributes:
        num_heads: N.
        blocks: Their places lie one after the other, N times as many as without heads.
        masks: For each block (num_rows * N, 1, length), zero at places of tokens and minus infinity
            at empty ones, to be added to the scores; None where no place is empty.
        from_qkv: (3 * N * G,) rows of a (P * 3 * N, H) tensor: all queries, all keys, all values.
            An empty place repeats the first token of its row.
        to_qkv: (P * 3 * N,) the reverse.
        from_context: (N * G,) rows of a (P * N, H) tensor.
        to_context: (P * N,) the reverse.
        empty: Those of the N * G places that no token has.
    """

    num_heads: int
    blocks: Sequence[Block]
    masks: Sequence[Tensor | None]
    from_qkv: Tensor
    to_qkv: Tensor
    from_context: Tensor
    to_context: Tensor
    empty: Tensor

    @property
    def num_places(self) -> int:
        """N * G."""
        return len(self.from_context)

    @cached_property
    def num_scores(self) -> int:
        """Attention weights of all blocks."""
        return sum(b.num_rows * self.num_heads * b.length**2 for b in self.blocks)


class JaggedPacking:
    """The same as `Packing`, for a device that nobody is to ask for the lengths of rows.

    Everything is computed from `cu_seqlens` where that lies, in shapes that the arguments decide.

    Args:
        cu_seqlens: (B + 1,) where each row begins, and the number of tokens; none is empty.
        num_tokens: P.
        max_length: No row has more tokens.
        training: Whether to drop units.

    Attributes:
        position_ids: (P,) place of each token in its row.
    """

    def __init__(
        self, cu_seqlens: Tensor, num_tokens: int, max_length: int, training: bool
    ) -> None:
        self.cu_seqlens = cu_seqlens
        self.max_length = max_length
        self.training = training
        places = torch.arange(num_tokens, device=cu_seqlens.device)
        rows = torch.searchsorted(cu_seqlens, places, right=True) - 1
        self.position_ids = places - cu_seqlens[rows]

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Drops units of `x`, in training."""
        return F.dropout(x, p) if self.training and p > 0.0 else x


class RowMasks(KeepMasks):
    """Dropout's random masks, for each row by itself, on a CPU.

    What a row drops then depends on its seed alone, not on the rows beside it: however the rows of
    a step are divided, the same units are dropped.

    Args:
        seeds: Of each row.
        lengths: Tokens of each row.
        blocks: In which their attention is computed.
    """

    def __init__(
        self, seeds: Sequence[int], lengths: Sequence[int], blocks: Sequence[Block]
    ) -> None:
        self.device = torch.device("cpu")
        self.row_bits = [np.random.SFC64(seed) for seed in seeds]
        self.lengths = lengths
        self.blocks = blocks

    def _draw_units(self, shape: Sequence[int]) -> Tensor:
        """Of tokens, (P, D), or of all attention weights."""
        if len(shape) > 1:
            sizes = [length * shape[1] for length in self.lengths]
            parts = [_units(*each) for each in zip(self.row_bits, sizes, strict=True)]
            return torch.from_numpy(np.concatenate(parts)).view(*shape)
        result = np.zeros(shape, dtype=np.int16)  # also where there is no token
        num_heads = shape[0] // sum(b.num_rows * b.length**2 for b in self.blocks)
        place, row = 0, 0
        for block in self.blocks:
            size = num_heads * block.length**2
            for _ in range(block.num_rows):
                length = self.lengths[row]
                scores = result[place : place + size].reshape(num_heads, block.length, block.length)
                units = _units(self.row_bits[row], num_heads * length**2)
                scores[:, :length, :length] = units.reshape(num_heads, length, length)
                place, row = place + size, row + 1
        return torch.from_numpy(result)


def _units(bits: np.random.SFC64, count: int) -> NDArray[np.int16]:
    """Random integers, uniform over all values."""
    words: Any = bits.random_raw(-(-count // 4))
    units: NDArray[np.int16] = words.view(np.int16)[:count]
    return units


class Packing:
    """What the layers need to know of a packed batch.

    Args:
        cu_seqlens: (B + 1,) where each row begins, and the number of tokens.
        training: Whether to drop units.
        dropout_seeds: (B,) a seed for each row, see `RowMasks`; None to draw for all rows at once.

    Attributes:
        max_length: Tokens of the longest row.
        position_ids: (P,) place of each token in its row.
        blocks: The parts in which attention is computed.
        dropout_masks: Source of dropout's masks; None outside training.
    """

    def __init__(
        self, cu_seqlens: Tensor, training: bool, dropout_seeds: Sequence[int] | None = None
    ) -> None:
        starts: list[int] = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(starts)]
        if not lengths or min(lengths) < 1 or starts[0] != 0:
            raise ValueError(f"cu_seqlens must begin with 0 and ascend, not {starts[:5]}")
        self.device = cu_seqlens.device
        self.starts, self.lengths = np.array(starts[:-1]), np.array(lengths)
        self.max_length = max(lengths)
        self.positions = np.arange(starts[-1]) - np.repeat(self.starts, lengths)
        self.position_ids = torch.from_numpy(self.positions).to(self.device)
        self.blocks: list[Block] = plan_blocks(lengths)
        self.dropout_masks: KeepMasks | None = None
        if training and dropout_seeds is not None:
            self.dropout_masks = RowMasks(dropout_seeds, lengths, self.blocks)
        elif training:
            self.dropout_masks = KeepMasks(self.device)
        self._places: dict[int, HeadPlaces] = {}

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Drops units of `x`, in training."""
        if self.dropout_masks is None or p == 0.0:
            return x
        return self.dropout_masks.drop(x, p)

    def places(self, num_heads: int) -> HeadPlaces:
        """The same for all layers, so made once."""
        if num_heads not in self._places:
            self._places[num_heads] = self._make_places(num_heads)
        return self._places[num_heads]

    def _make_places(self, num_heads: int) -> HeadPlaces:
        blocks, heads = self.blocks, np.arange(num_heads)
        # Of each row: the length of its block's rows, and its first place.
        length = np.repeat([b.length for b in blocks], [b.num_rows for b in blocks])
        ends = np.cumsum(length) * num_heads
        first = ends - length * num_heads
        num_places = int(ends[-1])
        token = np.arange(len(self.positions))
        place = np.repeat(first, self.lengths) + self.positions  # (P,) of the first head
        place = place[:, None] + heads * np.repeat(length, self.lengths)[:, None]  # (P, N)

        from_context = np.repeat(self.starts * num_heads, length * num_heads)
        from_context[place] = token[:, None] * num_heads + heads
        # The same token and head, where each token has its queries, keys and values.
        from_query = from_context + from_context // num_heads * 2 * num_heads
        is_empty = np.ones(num_places, bool)
        is_empty[place] = False
        parts = np.arange(3)[:, None]

        def to_device(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
            return torch.from_numpy(array.ravel()).to(self.device)

        masks: list[Tensor | None] = []
        for block in blocks:
            part = is_empty[block.start * num_heads : block.stop * num_heads]
            mask = torch.from_numpy(np.where(part, np.float32(-np.inf), np.float32(0.0)))
            mask = mask.view(-1, 1, block.length).to(self.device)
            masks.append(mask if part.any() else None)
        return HeadPlaces(
            num_heads=num_heads,
            blocks=blocks,
            masks=masks,
            from_qkv=to_device(from_query + parts * num_heads),
            to_qkv=to_device(place[:, None] + parts * num_places),
            from_context=to_device(from_context),
            to_context=to_device(place),
            empty=to_device(np.flatnonzero(is_empty)),
        )
