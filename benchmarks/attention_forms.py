"""Which form of packed attention is fastest, from short sentences to long ones: the crossover.

    python -m benchmarks.attention_forms

Forward and backward of one layer of bert-base's heads with dropout, for batches of more and longer
rows, with three plans: rows of unlike length by themselves, all rows under one mask, and
`packing.plan_blocks` between the two. Prints also what a block costs and what a score costs, whose
ratio is `packing.SCORES_PER_CALL`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.machine import write_result
from bertner import packing
from bertner.attention import attention_packed
from bertner.kernels import KeepMasks

CPU = torch.device("cpu")
PLANS = {"row by row": 1, "planned": packing.SCORES_PER_CALL, "one mask": 10**12}
MOST_SCORES = 3_000_000  # beyond this one mask is only a waste of time and memory


def timed(run: Callable[[], None]) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def layer(blocks: list[packing.Block], qkv: torch.Tensor, heads: int, masks: KeepMasks) -> None:
    """Attention of one layer, forward and backward."""
    qkv.grad = None
    context = attention_packed(qkv, heads, blocks, partial(masks.draw, p=0.1))
    context.backward(torch.ones_like(context))  # type: ignore[no-untyped-call]


def blocks_of(lengths: list[int], scores_per_call: int) -> list[packing.Block]:
    """The blocks of a plan that takes a call to be worth so many scores."""
    before, packing.SCORES_PER_CALL = packing.SCORES_PER_CALL, scores_per_call
    try:
        return packing.make_blocks(lengths, CPU)
    finally:
        packing.SCORES_PER_CALL = before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_size", type=int, default=64)
    options = parser.parse_args()
    rng = random.Random(0)
    masks = KeepMasks(CPU)
    shapes = [(8, 8), (8, 20), (8, 50), (8, 120), (8, 400), (32, 20), (64, 20), (64, 100)]
    results: list[dict[str, Any]] = []
    costs: list[tuple[float, float, float]] = []
    print(f"{'rows':>4s} {'length':>6s} {'tokens':>6s}  " + "".join(f"{p:>22s}" for p in PLANS))
    for rows, mean in shapes:
        lengths = sorted(rng.randint(mean // 2, mean * 3 // 2) for _ in range(rows))
        qkv = torch.randn(sum(lengths), 3 * options.heads * options.head_size, requires_grad=True)
        plans = {name: blocks_of(lengths, scores) for name, scores in PLANS.items()}
        if sum(lengths) ** 2 > MOST_SCORES:
            del plans["one mask"]
        found: dict[str, list[float]] = {name: [] for name in plans}
        for number in range(options.rounds + 1):
            for name, blocks in plans.items():
                ms = timed(partial(layer, blocks, qkv, options.heads, masks))
                if number:
                    found[name].append(ms)
        cells = []
        for name in PLANS:
            if name not in plans:
                cells.append(f"{'-':>22s}")
                continue
            scores = sum(block.batch * block.length**2 for block in plans[name])
            median = statistics.median(found[name])
            costs.append((len(plans[name]), scores, median))
            cells.append(f"{median:8.2f} ms, {len(plans[name]):2d} blocks")
        print(f"{rows:4d} {mean:6d} {sum(lengths):6d}  " + "".join(cells), flush=True)
        results.append({"lengths": lengths, "ms": found})
    # Least squares of relative errors, over all plans: ms = call * blocks + score * scores.
    table = np.array(costs)
    ones = np.ones(len(table))
    (call, score), *_ = np.linalg.lstsq(table[:, :2] / table[:, 2:], ones, rcond=None)
    print(f"\na block {1e3 * call:.0f} us, a score {1e6 * score:.0f} ns: ", end="")
    print(f"a block is worth {call / score:.0f} scores (packing.SCORES_PER_CALL is ", end="")
    print(f"{packing.SCORES_PER_CALL})")
    print(write_result("attention_forms", {"shapes": results, "scores_per_call": call / score}))


if __name__ == "__main__":
    main()
