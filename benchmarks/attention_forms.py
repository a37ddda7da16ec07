"""Which form of packed attention is fastest, from short sentences to long ones: the crossover.

    python -m benchmarks.attention_forms

Forward and backward of one layer of bert-base's heads with dropout, for batches of more and longer
rows: PyTorch's `scaled_dot_product_attention` with one mask over the whole batch, and the blocks of
`packing.plan_blocks` as they are, with rows of unlike length by themselves, and with all rows in
one block. Prints also what a block costs and what a score costs, whose ratio is
`packing.SCORES_PER_CALL`.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.machine import write_result
from bertner import packing
from bertner.attention import attention_packed
from bertner.kernels import KeepMasks, keep_freed_memory
from bertner.packing import Packing

# Constants of `packing` under which each form of the plan is the cheapest.
PLANS: dict[str, dict[str, int]] = {
    "planned": {"SCORES_PER_CALL": packing.SCORES_PER_CALL},
    "by length": {"SCORES_PER_CALL": 1},
    "one block": {"SCORES_PER_CALL": 10**12, "MOST_SCORES": 10**12},
}
MASK = "one mask"
MOST_SCORES = 5_000_000  # beyond this one mask or one block is only a waste of time and memory


def timed(run: Callable[[], None]) -> float:
    """Milliseconds of a call."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def planned(batch: Packing, qkv: torch.Tensor, heads: int, masks: KeepMasks) -> None:
    """Attention of one layer, forward and backward."""
    qkv.grad = None
    context = attention_packed(qkv, batch.places(heads), partial(masks.draw, p=0.1))
    context.backward(torch.ones_like(context))  # type: ignore[no-untyped-call]


def sdpa(qkv: torch.Tensor, heads: int, mask: torch.Tensor) -> torch.Tensor:
    """PyTorch's own attention with dropout, under one mask: (P, 3 * D) to (P, D)."""
    q, k, v = (part.view(1, len(qkv), heads, -1).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
    context = F.scaled_dot_product_attention(q, k, v, mask, 0.1)
    return context.transpose(1, 2).reshape(len(qkv), -1)


def with_mask(mask: torch.Tensor, qkv: torch.Tensor, heads: int) -> None:
    """The same as `planned` by PyTorch's own function."""
    qkv.grad = None
    context = sdpa(qkv, heads, mask)
    context.backward(torch.ones_like(context))  # type: ignore[no-untyped-call]


def forms_of(
    lengths: list[int], qkv: torch.Tensor, heads: int, masks: KeepMasks
) -> tuple[dict[str, Callable[[], None]], dict[str, Packing]]:
    """What to time, and the batches of the plans among it."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)])
    forms: dict[str, Callable[[], None]] = {}
    batches = {}
    for name, constants in PLANS.items():
        with mock.patch.multiple(packing, **constants):
            batch = Packing(cu_seqlens, training=True)
        if max(block.num_rows * block.length**2 for block in batch.blocks) <= MOST_SCORES:
            batches[name] = batch
            batch.places(heads)  # once a step, not once a layer
            forms[name] = partial(planned, batch, qkv, heads, masks)
    if sum(lengths) ** 2 <= MOST_SCORES:
        row = torch.repeat_interleave(torch.tensor(lengths))
        forms[MASK] = partial(with_mask, row[:, None] == row, qkv, heads)
    return forms, batches


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head_size", type=int, default=64)
    options = parser.parse_args()
    rng = random.Random(0)
    masks = KeepMasks(torch.device("cpu"))
    keep_freed_memory()  # as training does
    shapes = [(8, 8), (8, 20), (8, 50), (8, 120), (8, 400), (32, 20), (64, 20), (64, 100)]
    results: list[dict[str, Any]] = []
    costs: list[tuple[float, float, float]] = []
    names = [*PLANS, MASK]
    print(f"{'rows':>4s} {'length':>6s} {'tokens':>6s}  " + "".join(f"{n:>22s}" for n in names))
    for rows, mean in shapes:
        lengths = sorted(rng.randint(mean // 2, mean * 3 // 2) for _ in range(rows))
        qkv = torch.randn(sum(lengths), 3 * options.heads * options.head_size, requires_grad=True)
        forms, batches = forms_of(lengths, qkv, options.heads, masks)
        found: dict[str, list[float]] = {name: [] for name in forms}
        for number in range(options.rounds + 1):
            for name, run in forms.items():
                ms = timed(run)
                if number:
                    found[name].append(ms)
        cells = []
        for name in names:
            if name not in forms:
                cells.append(f"{'-':>22s}")
                continue
            median = statistics.median(found[name])
            blocks = batches[name].blocks if name in batches else []
            if blocks:
                scores = sum(block.num_rows * block.length**2 for block in blocks)
                costs.append((len(blocks), scores, median))
            cells.append(f"{median:8.2f} ms, {len(blocks) or 1:2d} blocks")
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
