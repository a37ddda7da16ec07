"""Steps a second and peak memory of training: bertner against the Trainer, interleaved.

    python -m benchmarks.bench_training --data DATA --model minilm --model bert-base

Each round trains the same first steps of CoNLL-2003, in the Trainer's order, with each side in
turn; the first few of each are warm-up and are not counted. "floor" is the matrix products on real
tokens and AdamW of the layers alone: what they take on this machine bounds every implementation.

Peak memory is that of a process of its own, which trains the epoch's first steps; and of another,
one of whose steps has the epoch's largest batch. What bertner's optimizer would hold besides at the
end of the epoch, for words that those steps have not, is added.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Parts, arguments, interleave, load, ratios, take_rows
from benchmarks.common import spread as spread_of
from benchmarks.machine import write_result
from bertner.batches import epoch_order
from bertner.config import TrainConfig
from bertner.data import TokenDataset
from bertner.loop import train

WARM_UP = 4
PEAK_STEPS = 14
FLOOR = "floor"

# Settings of bertner's sides; the Trainer has its defaults.
SIDES: dict[str, dict[str, Any]] = {
    "bertner float32": {},
    "bertner bfloat16": {"dtype": "bfloat16"},
    "bertner padded": {"packing": False},
}


class Clock:
    """A watcher that keeps the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = time.perf_counter()

    def stepped(self, report: object) -> None:
        """Keeps the seconds since the last step."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now

    def evaluating(self, num_rows: int) -> Callable[[int], None]:
        """Never called: nothing is evaluated."""
        return lambda rows: None

    def evaluated(self, *args: object) -> None:
        """Never called."""


def bertner_seconds(parts: Parts, settings: dict[str, Any], steps: int) -> float:
    """Seconds of the counted steps, of bertner."""
    model = copy.deepcopy(parts.model)
    config = TrainConfig(max_steps=WARM_UP + steps, eval_strategy="no", **settings)
    clock = Clock()
    train(model, parts.train, config, watcher=clock)
    return sum(clock.seconds[WARM_UP:])


def floor_seconds(parts: Parts, steps: int) -> float:
    """Seconds of what no implementation can leave out, and nothing else.

    The matrix products of the layers on the steps' real tokens (forward, and both of backward into
    buffers that stay) and the sweep of fused AdamW over their weights, by the libraries of this
    machine.
    """
    config = parts.model.config
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = [(3 * hidden, hidden), (hidden, hidden), (wide, hidden), (hidden, wide)]
    weights = [torch.randn(shape) for _ in range(config.num_hidden_layers) for shape in shapes]
    gradients = [torch.zeros_like(weight) for weight in weights]
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer = torch.optim.AdamW(parameters, fused=True)
    order = epoch_order(len(parts.train), 42, 0)
    seconds = 0.0
    for step in range(WARM_UP + steps):
        tokens = int(parts.train.row_lengths[order[8 * step : 8 * step + 8]].sum())
        states = {size: torch.randn(tokens, size) for size in {3 * hidden, hidden, wide}}
        start = time.perf_counter()
        for weight in weights:
            states[weight.shape[1]] @ weight.t()
        for weight, gradient in zip(weights, gradients, strict=True):
            grad, x = states[weight.shape[0]], states[weight.shape[1]]
            torch.mm(grad.t(), x, out=gradient)
            torch.mm(grad, weight)
        optimizer.step()
        seconds += time.perf_counter() - start if step >= WARM_UP else 0.0
    return seconds


def trainer_seconds(parts: Parts, folder: Path, steps: int) -> float:
    """The same of the Trainer."""
    # Here, so that a process that measures bertner's memory does not hold it.
    from benchmarks.trainer_side import StepClock, make_trainer

    clock = StepClock()
    make_trainer(folder, parts, clock, max_steps=WARM_UP + steps, logging_steps=500).train()
    return sum(clock.seconds[WARM_UP:])


def first_batches(dataset: TokenDataset, num_steps: int, with_largest: bool) -> TokenDataset:
    """Rows whose own epoch has the first batches of the whole dataset's epoch.

    Args:
        dataset: The whole.
        num_steps: Batches.
        with_largest: Put the batch that is the largest when padded in the place of one of them.
    """
    batches = epoch_order(len(dataset), 42, 0)[: len(dataset) // 8 * 8].reshape(-1, 8)
    wanted = batches[:num_steps].copy()
    if with_largest:
        wanted[num_steps // 2] = batches[dataset.row_lengths[batches].max(1).argmax()]
    return take_rows(dataset, wanted.ravel())


def peak_of(side: str, name: str, data: Path, with_largest: bool) -> float:
    """Peak memory, in MB, of a process that trains a few steps."""
    command = [sys.executable, "-m", "benchmarks.bench_training", "--data", str(data)]
    command += ["--model", name, "--peak", side]
    command += ["--with-largest"] if with_largest else []
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(result.stdout.splitlines()[-1]))


def print_peak(side: str, name: str, data: Path, with_largest: bool) -> None:
    """Trains with one side and prints this process' peak memory."""
    parts = load(name, data)
    whole, parts.train = parts.train, first_batches(parts.train, PEAK_STEPS, with_largest)
    if side == "Trainer":
        with tempfile.TemporaryDirectory() as folder:
            parts.save(Path(folder))
            del parts.model
            trainer_seconds(parts, Path(folder), PEAK_STEPS - WARM_UP)
    else:
        model, parts.model = parts.model, None  # type: ignore[assignment]
        config = TrainConfig(max_steps=PEAK_STEPS, eval_strategy="no", **SIDES[side])
        train(model, parts.train, config)
    # Not getrusage's: that counts what the parent process held when it started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1]) / 1024
    if side != "Trainer" and config.packing:  # two averages of each row of the word embeddings
        unseen = len(np.unique(whole.input_ids)) - len(np.unique(parts.train.input_ids))
        peak += 2 * 4 * unseen * model.config.hidden_size / 2**20
    print(peak)


def measure(name: str, data: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Times all sides with one model."""
    parts = load(name, data)
    order = epoch_order(len(parts.train), 42, 0)
    counted = order[8 * WARM_UP : 8 * (WARM_UP + steps)]
    tokens = int(parts.train.row_lengths[counted].sum())
    padded = [parts.train.row_lengths[rows].max() * 8 for rows in counted.reshape(-1, 8)]
    with tempfile.TemporaryDirectory() as folder:
        parts.save(Path(folder))
        sides = {"Trainer": lambda: trainer_seconds(parts, Path(folder), steps)}
        for side, settings in SIDES.items():
            sides[side] = lambda settings=settings: bertner_seconds(parts, settings, steps)
        sides[FLOOR] = lambda: floor_seconds(parts, steps)
        seconds = interleave(sides, rounds)
    result: dict[str, Any] = {
        "steps": steps,
        "real_tokens_per_step": tokens / steps,
        "padded_tokens_per_step": float(np.sum(padded)) / steps,
        "sides": {},
    }
    print(f"\n{name}: {tokens / steps:.0f} real tokens a step, {sum(padded) / steps:.0f} padded")
    header = "steps/s (spread)    tokens/s   x Trainer (spread)   peak MB, with largest batch"
    print(" " * 21 + header)
    for side, values in seconds.items():
        rate, ratio = spread_of([steps / s for s in values]), ratios(seconds["Trainer"], values)
        peak, largest = (
            0.0 if side == FLOOR else peak_of(side, name, data, with_largest)
            for with_largest in (False, True)
        )
        result["sides"][side] = {
            "seconds": values,
            "steps_per_second": rate,
            "tokens_per_second": tokens / steps * rate["median"],
            "times_the_trainer": ratio,
            "peak_mb": peak,
            "peak_mb_with_largest_batch": largest,
        }
        print(
            f"{side:18s} {rate['median']:6.2f} ({rate['min']:.2f}-{rate['max']:.2f}) "
            f"{tokens / steps * rate['median']:10.0f}   {ratio['median']:6.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f}) {peak:8.0f} {largest:8.0f}"
        )
    return result


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", action="append", choices=["minilm", "bert-base"])
    parser.add_argument("--steps", type=int, default=20, help="counted steps in a round")
    parser.add_argument("--peak", choices=["Trainer", *SIDES], help="print one side's peak memory")
    parser.add_argument("--with-largest", action="store_true", help="for --peak")
    options = parser.parse_args()
    names = options.model or ["minilm", "bert-base"]
    if options.peak:
        print_peak(options.peak, names[0], options.data, options.with_largest)
        return
    for name in names:
        result = measure(name, options.data, options.rounds, options.steps)
        print(write_result(f"training_{name}", result), "\n")


if __name__ == "__main__":
    main()
