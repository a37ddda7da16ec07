"""The plan of attention's blocks: nothing lost, never dearer than its simple alternatives."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from bertner.packing import MOST_SCORES, SCORES_PER_CALL, Block, Packing, plan_blocks


def cost(blocks: list[Block]) -> int:
    """Scores of a plan, and the calls' worth in scores."""
    return sum(SCORES_PER_CALL + block.num_rows * block.length**2 for block in blocks)


def every_cost(lengths: list[int]) -> list[int]:
    """Of every way to divide the rows."""
    costs = []
    for cuts in itertools.product([True, False], repeat=len(lengths) - 1):
        total, block = 0, [lengths[0]]
        for cut, length in zip([*cuts, True], [*lengths[1:], 0], strict=True):
            if cut:
                total += SCORES_PER_CALL + len(block) * max(block) ** 2
                block = []
            block.append(length)
        costs.append(total)
    return costs


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("seed", range(30))
def test_no_plan_is_cheaper(seed: int, in_order: bool) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([5, 12, 20, 33, 60, 150]) + rng.randint(0, 9) for _ in range(8)]
    if in_order:
        lengths.sort()
    plan = plan_blocks(lengths)
    assert sum(block.num_rows for block in plan) == 8
    assert cost(plan) == min(every_cost(lengths))


def test_cost_is_linear_in_the_tokens() -> None:
    rng = random.Random(0)
    costs = []
    for size in (100, 1000):
        lengths = sorted(rng.randint(5, 60) for _ in range(size))
        costs.append(cost(plan_blocks(lengths)) / sum(lengths))
    assert costs[1] < 1.2 * costs[0]


def test_blocks_lie_side_by_side_and_are_bounded() -> None:
    blocks = plan_blocks([3, 3, 4, 6, 200, 200, 210] + [511] * 64 + [2000])
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]
    assert sum(block.num_rows for block in blocks) == 72
    assert (blocks[0].num_rows, blocks[0].length) == (4, 6)
    assert blocks[-1].num_rows == 1
    assert max(block.num_rows * block.length**2 for block in blocks[:-1]) <= MOST_SCORES


@pytest.mark.parametrize("lengths", [[7], [4, 4], [3, 3, 4, 6, 90, 95], [60, 1, 2, 30]])
def test_vectors_of_heads_go_there_and_come_back(lengths: list[int]) -> None:
    heads, starts = 3, [0, *itertools.accumulate(lengths)]
    packing = Packing(torch.tensor(starts), training=False)
    places = packing.places(heads)
    num_tokens = sum(lengths)
    # Of each vector: token, part (query, key or value), head.
    qkv = torch.cartesian_prod(torch.arange(num_tokens), torch.arange(3), torch.arange(heads))
    there = qkv[places.from_qkv].view(3, -1, 3)
    assert torch.equal(there.flatten(0, 1)[places.to_qkv], qkv)
    context = torch.cartesian_prod(torch.arange(num_tokens), torch.arange(heads))
    assert torch.equal(context[places.from_context][places.to_context], context)
    assert torch.equal(context[places.from_context][:, 0], there[0, :, 0])

    empty = torch.zeros(places.num_places, dtype=torch.bool)
    empty[places.empty] = True
    assert (~empty).sum() == num_tokens * heads
    rows = iter(itertools.pairwise(starts))
    for block, mask in zip(packing.blocks, places.masks, strict=True):
        part = slice(block.start * heads, block.stop * heads)
        grid = there[:, part].view(3, block.num_rows, heads, block.length, 3)
        hidden = empty[part].view(block.num_rows, heads, block.length)
        expected = torch.zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
        assert (mask is None) == (not hidden.any())
        assert mask is None or torch.equal(mask.view(expected.shape), expected)
        for row in range(block.num_rows):
            start, stop = next(rows)
            for which, head in itertools.product(range(3), range(heads)):
                found = grid[which, row, head]
                assert found[: stop - start, 0].tolist() == list(range(start, stop))
                # An empty place has something of its own row: a bad value there stays there.
                assert found[stop - start :, 0].eq(start).all()
                assert found[:, 1].eq(which).all()
                assert found[: stop - start, 2].eq(head).all()
                assert hidden[row, head].tolist() == [
                    column >= stop - start for column in range(block.length)
                ]


def test_positions_begin_anew_in_each_row() -> None:
    packing = Packing(torch.tensor([0, 2, 5, 6]), training=False)
    assert packing.position_ids.tolist() == [0, 1, 0, 1, 2, 0]
    assert packing.max_length == 3
    assert packing.dropout_masks is None


@pytest.mark.parametrize("cu_seqlens", [[0], [1, 3], [0, 2, 2], [0, 4, 3]])
def test_bad_borders_are_refused(cu_seqlens: list[int]) -> None:
    with pytest.raises(ValueError, match="cu_seqlens"):
        Packing(torch.tensor(cu_seqlens), training=False)
