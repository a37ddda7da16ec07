"""The plan of attention's blocks: nothing lost, never dearer than its simple alternatives."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from bertner.packing import MOST_SCORES, SCORES_PER_CALL, Packing, make_blocks, plan_blocks

CPU = torch.device("cpu")


def cost(blocks: list[list[int]]) -> int:
    """Scores of a plan, and the calls' worth in scores."""
    total = 0
    for rows in blocks:
        same = len(set(rows)) == 1
        total += SCORES_PER_CALL + (len(rows) * rows[0] ** 2 if same else sum(rows) ** 2)
    return total


def every_plan(runs: list[list[int]]) -> list[list[list[int]]]:
    plans = []
    for cuts in itertools.product([True, False], repeat=len(runs) - 1):
        plan = [list(runs[0])]
        for cut, run in zip(cuts, runs[1:], strict=True):
            if cut:
                plan.append(list(run))
            else:
                plan[-1].extend(run)
        plans.append(plan)
    return plans


@pytest.mark.parametrize("seed", range(30))
def test_no_plan_is_cheaper(seed: int) -> None:
    rng = random.Random(seed)
    lengths = sorted(rng.choice([5, 12, 20, 33, 60, 150]) + rng.randint(0, 9) for _ in range(8))
    runs = [list(group) for _, group in itertools.groupby(lengths)]
    plan = plan_blocks(lengths)
    assert [length for rows in plan for length in rows] == lengths
    assert cost(plan) == min(map(cost, every_plan(runs)))


def test_cost_is_linear_in_the_tokens() -> None:
    rng = random.Random(0)
    costs = []
    for size in (100, 1000):
        lengths = sorted(rng.randint(5, 60) for _ in range(size))
        costs.append(cost(plan_blocks(lengths)) / sum(lengths))
    assert costs[1] < 1.2 * costs[0]


def test_blocks_cover_the_rows_and_mask_the_others() -> None:
    lengths = [3, 3, 4, 6, 200, 200, 210]
    blocks = make_blocks(lengths, CPU)
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert blocks[-1].stop == sum(lengths)
    joined = blocks[0]
    assert joined.mask is not None
    assert joined.batch == 1
    row_of = torch.repeat_interleave(torch.arange(4), torch.tensor([3, 3, 4, 6]))
    assert torch.equal(joined.mask == 0.0, row_of[:, None] == row_of)
    assert (blocks[1].batch, blocks[1].length, blocks[1].mask) == (2, 200, None)


def test_blocks_of_many_long_rows_are_bounded() -> None:
    blocks = make_blocks([512] * 64, CPU)
    assert {block.length for block in blocks} == {512}
    assert sum(block.batch for block in blocks) == 64
    assert max(block.batch * block.length**2 for block in blocks) <= MOST_SCORES


def test_positions_begin_anew_in_each_row() -> None:
    packing = Packing(torch.tensor([0, 2, 5, 6]), training=False)
    assert packing.position_ids.tolist() == [0, 1, 0, 1, 2, 0]
    assert packing.max_length == 3
    assert packing.dropout_masks is None


@pytest.mark.parametrize("cu_seqlens", [[0], [1, 3], [0, 2, 2], [0, 4, 3]])
def test_bad_borders_are_refused(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        Packing(torch.tensor(cu_seqlens), training=False)
