"""What each primitive of the hot path gains over PyTorch's default, interleaved.

    python -m benchmarks.bench_kernels

At the sizes of a step: 160 packed tokens, bert-base's layers and embeddings.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.attention_forms import sdpa
from benchmarks.common import interleave, ratios, spread
from benchmarks.machine import write_result
from bertner import kernels
from bertner.attention import attention_packed
from bertner.kernels import KeepMasks
from bertner.optimizer import AdamW
from bertner.packing import Packing

CPU = torch.device("cpu")
TOKENS, HIDDEN = 160, 768
REPEATS = 20


def milliseconds(run: Callable[[], object]) -> Callable[[], float]:
    """A function that times some calls of another: ms a call."""

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(REPEATS):
            run()
        return 1e3 * (time.perf_counter() - start) / REPEATS

    return timed


def forward_backward(
    layers: Sequence[nn.Module], forward: Callable[[], Tensor], grad: Tensor
) -> Callable[[], None]:
    """A step of some layers, from gradients of None."""

    def run() -> None:
        for layer in layers:
            layer.zero_grad()
        forward().backward(grad)  # type: ignore[no-untyped-call]

    return run


def step(optimizer: torch.optim.Optimizer, weight: nn.Parameter, grad: Tensor) -> None:
    """A step with a gradient."""
    weight.grad = grad
    optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with ExitStack() as stack:
        measure(options.rounds, stack)


def measure(rounds: int, stack: ExitStack) -> None:
    """Times every case; buffers for gradients stay until `stack` is closed."""
    torch.manual_seed(0)
    kernels.keep_freed_memory()
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    masks = KeepMasks(CPU)
    grad, wide = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, 4 * HIDDEN)

    # More weights than a cache holds, as in training.
    plain = nn.ModuleList(nn.Linear(HIDDEN, 4 * HIDDEN) for _ in range(6))
    hot = copy.deepcopy(plain)
    projections = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
    stacked = copy.deepcopy(projections)
    kernels.stack([stacked[0], stacked[1], stacked[2]])
    table = nn.Embedding(28996, HIDDEN)
    hot_table = copy.deepcopy(table)
    for layers in (hot, stacked, hot_table):
        stack.enter_context(kernels.gradient_buffers(layers))
    ids = torch.randint(0, 28996, (TOKENS,))
    gradients = [torch.randn(4 * HIDDEN, HIDDEN) for _ in range(24)]
    lengths = [8, 10, 12, 15, 18, 22, 30, 45]
    qkv = torch.randn(TOKENS, 3 * HIDDEN, requires_grad=True)
    packing = Packing(torch.tensor([0, *itertools.accumulate(lengths)]), training=True)
    row = torch.repeat_interleave(torch.tensor(lengths))
    mask = row[:, None] == row

    def all_of(layers: nn.ModuleList, apply: Callable[[nn.Module], Tensor]) -> Tensor:
        return sum((apply(layer) for layer in layers), torch.zeros(()))

    settings: dict[str, Any] = {"lr": 2e-5, "weight_decay": 0.01, "fused": True}
    dense = torch.optim.AdamW(table.parameters(), **settings)
    by_rows = AdamW(hot_table.parameters(), **settings)
    dense_grad = torch.zeros_like(table.weight).index_fill_(0, ids, 1.0)
    sparse_grad = dense_grad.to_sparse(1)
    seen = torch.zeros_like(dense_grad).index_fill_(0, torch.randperm(len(table.weight))[::2], 1.0)
    step(by_rows, hot_table.weight, seen.to_sparse(1))

    cases: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "dropout of hidden states: masks in bulk": (
            lambda: F.dropout(x, 0.1),
            lambda: masks.drop(x, 0.1),
        ),
        "linear layer: gradient in a lasting buffer": (
            forward_backward(plain, lambda: all_of(plain, lambda f: f(x)), wide),
            forward_backward(hot, lambda: all_of(hot, lambda f: kernels.linear(x, f)), wide),
        ),
        "query, key and value in one product": (
            forward_backward(
                projections, lambda: torch.cat([f(x) for f in projections], -1), wide[:, :2304]
            ),
            forward_backward(stacked, lambda: kernels.linear(x, *stacked), wide[:, :2304]),
        ),
        "word embeddings: gradient of the batch's rows": (
            forward_backward([table], lambda: table(ids), grad),
            forward_backward([hot_table], lambda: kernels.embedding(ids, hot_table), grad),
        ),
        "AdamW of word embeddings, half of them seen": (
            lambda: step(dense, table.weight, dense_grad),
            lambda: step(by_rows, hot_table.weight, sparse_grad),
        ),
        "squares of gradients: a product of vectors": (
            lambda: torch._foreach_norm(gradients),
            lambda: [kernels.sum_of_squares(each) for each in gradients],
        ),
        "attention with dropout: in blocks": (
            lambda: sdpa(qkv, 12, mask).backward(grad),  # type: ignore[no-untyped-call]
            lambda: attention_packed(  # type: ignore[no-untyped-call]
                qkv, packing.places(12), lambda shape: masks.draw(shape, 0.1)
            ).backward(grad),
        ),
    }
    result = {}
    print(f"{'':48s} default ms  bertner ms   times as fast (spread)")
    for name, (default, ours) in cases.items():
        default(), ours()
        sides = {"default": milliseconds(default), "bertner": milliseconds(ours)}
        found = interleave(sides, rounds, show=False)
        gain = ratios(found["default"], found["bertner"])
        result[name] = {**found, "times_as_fast": gain}
        print(
            f"{name:48s} {spread(found['default'])['median']:10.3f} "
            f"{spread(found['bertner'])['median']:11.3f}   {gain['median']:6.2f} "
            f"({gain['min']:.2f}-{gain['max']:.2f})",
            flush=True,
        )
    for dtype in ("float32", "bfloat16"):
        print(f"{dtype}: {kernels.choose_products('auto', CPU, dtype)}")
    print(write_result("kernels", result))


if __name__ == "__main__":
    main()
