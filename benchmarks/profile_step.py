"""Where a training step goes: the time of each kind of operation, as a table, JSON and a trace.

    python -m benchmarks.profile_step --data DATA --model minilm [--trace step.json]

Self time of every operation, from PyTorch's profiler, summed by kind; the profiler itself slows
small operations down, so the last lines matter less than they seem, and it does not see NumPy draw
the random numbers of dropout. The trace opens in
https://ui.perfetto.dev or chrome://tracing.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_training import SIDES, Clock
from benchmarks.common import arguments, load
from benchmarks.machine import write_result
from bertner.config import TrainConfig
from bertner.loop import train

# The first kind whose words are part of an operation's name.
KINDS = {
    "matrix products of the layers": ["aten::mm", "aten::addmm", "aten::linear", "mkldnn"],
    "loss": ["log_softmax", "nll_loss"],
    "attention": ["bmm", "softmax", "PackedAttention", "scaled_dot"],
    "optimizer": ["adamw", "Optimizer"],
    "gradient norm": ["norm_for", "linalg_vector_norm", "foreach_norm", "aten::dot"],
    "GELU": ["gelu"],
    "LayerNorm": ["layer_norm"],
    "dropout": ["aten::ge", "bernoulli", "dropout", "random"],
    "embeddings": ["embedding", "index", "unique", "Embedding"],
    "copies and fills": ["copy_", "fill_", "zero_", "cat", "clone"],
    "elementwise": ["aten::mul", "aten::add", "aten::sum", "aten::div", "aten::sub"],
}


def kind_of(name: str) -> str:
    """The kind of an operation."""
    for kind, words in KINDS.items():
        if any(word in name for word in words):
            return kind
    return "the rest (views, autograd, Python)"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=["minilm", "bert-base"], default="minilm")
    parser.add_argument("--side", choices=list(SIDES), default="bertner float32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--trace", type=Path, help="also write a trace")
    options = parser.parse_args()
    parts = load(options.model, options.data, max_sentences=2000)
    settings = {"eval_strategy": "no", **SIDES[options.side]}
    # Warm-up in the same process, then the profiled steps begin from the start again.
    clock = Clock()
    train(parts.model, parts.train, TrainConfig(max_steps=12, **settings), watcher=clock)
    with torch.profiler.profile() as profile:
        train(parts.model, parts.train, TrainConfig(max_steps=options.steps, **settings))
    kinds: dict[str, float] = {}
    operations: list[Any] = list(profile.key_averages())
    for operation in operations:
        kind = kind_of(operation.key)
        kinds[kind] = kinds.get(kind, 0.0) + operation.self_cpu_time_total / 1e3 / options.steps
    total = sum(kinds.values())
    unprofiled = statistics.median(clock.seconds[4:]) * 1e3
    print(f"{options.model}, {options.side}: {total:.1f} ms a step under the profiler, ", end="")
    print(f"{unprofiled:.1f} ms without it\n\n{'kind':40s} ms a step  share")
    for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{kind:40s} {ms:9.2f}  {ms / total:5.1%}")
    print(f"\n{'operation':40s} ms a step  calls a step")
    for operation in sorted(operations, key=lambda each: -each.self_cpu_time_total)[:15]:
        ms = operation.self_cpu_time_total / 1e3 / options.steps
        print(f"{operation.key[:40]:40s} {ms:9.2f}  {operation.count / options.steps:8.1f}")
    if options.trace:
        profile.export_chrome_trace(str(options.trace))
    name = f"profile_{options.model}_{options.side.split()[-1]}"
    print(write_result(name, {"ms_a_step": kinds, "unprofiled_ms": unprofiled}))


if __name__ == "__main__":
    main()
