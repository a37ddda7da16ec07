"""Whole optimizer steps as CUDA graphs.

A step of a small batch is a thousand kernels of a few microseconds each: launched one by one, they
leave the card waiting for the host. Captured once and replayed, they follow each other at once. A
graph has fixed shapes, so batches are filled up to one of a few sizes (`batches.Bucket`), and each
size has a graph of its own; all share one pool of memory.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from bertner import kernels
from bertner.batches import LONGEST_DUMMY, Bucket, PackedBatch, PaddedBatch, bucket_of, pack
from bertner.config import TrainConfig
from bertner.data import TokenDataset
from bertner.distributed import Ranks
from bertner.labels import IntArray
from bertner.model import BertForNER

logger = logging.getLogger("bertner")

# Steps before the first capture: libraries set themselves up in them, which cannot be captured.
_WARM_UP = 3


# Micro-batches, each with the seed of its dropout; None to leave the generator alone.
Batches = Iterator[tuple[PackedBatch | PaddedBatch, int | None]]


class TakeStep(Protocol):
    """An optimizer step; what it returns, loss and gradient norm, (2,), nobody has waited for."""

    def __call__(
        self,
        batches: Batches,
        weight: Tensor | float,
        rate: Tensor | float,
    ) -> Tensor:
        """Takes the step.

        Args:
            batches: The step's micro-batches.
            weight: What the sum of the losses is divided by.
            rate: Learning rate.
        """


def why_no_graphs(config: TrainConfig, model: BertForNER, ranks: Ranks) -> str | None:
    """What keeps steps from being captured; None if nothing does."""
    if not kernels.is_queued(model.device):
        return f"there are none for {model.device.type}"
    if not config.cuda_graphs:
        return "as asked"
    if not config.packing:
        return "rows are padded"
    if config.gradient_accumulation_steps > 1:
        return "steps have several micro-batches"
    if ranks.world_size > 1:
        return "several ranks sum gradients"
    if model.config.max_position_embeddings < LONGEST_DUMMY:
        return f"the model has fewer than {LONGEST_DUMMY} positions"
    return None


@dataclass
class _Graph:
    """A captured step, where it reads its batch and where it leaves its result."""

    replay: Callable[[], None]
    batch: PackedBatch
    result: Tensor


class StepGraphs:
    """Takes steps by replaying them.

    The first steps, and the first one of every bucket, are taken kernel by kernel, from the same
    inputs: their bits are those of a replay.

    Args:
        take_step: Captured; does nothing that waits for the device, and has no shapes that depend
            on the values of its inputs.
        dataset: Training rows.
        device: A CUDA device.
        capture: Captures a function: what it returns replays it, and its result.
    """

    def __init__(
        self,
        take_step: TakeStep,
        dataset: TokenDataset,
        device: torch.device,
        capture: Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]] | None = None,
    ) -> None:
        self._take_step = take_step
        self._dataset = dataset
        self._device = device
        self._capture = capture or Capture()
        # One for all: what is known when a graph is captured holds for every replay.
        self._max_seqlen = max(int(dataset.row_lengths.max()), LONGEST_DUMMY)
        self._weight = torch.zeros((), device=device)
        self._rate = torch.zeros((), device=device)
        self._graphs: dict[Bucket, _Graph] = {}
        self._is_off = False
        self._seen: Counter[Bucket] = Counter()

    def step(self, rows: IntArray, seed: int, weight: float, rate: float) -> Tensor:
        """Takes a step with these rows as its only micro-batch; see `TakeStep`."""
        bucket = bucket_of(len(rows), int(self._dataset.row_lengths[rows].sum()))
        self._weight.fill_(weight)
        self._rate.fill_(rate)
        kernels.seed_dropout(seed, self._device)
        if bucket not in self._graphs:
            batch = pack(self._dataset, rows, self._device, bucket)
            batch = replace(batch, max_seqlen=self._max_seqlen)
            self._seen[bucket] += 1
            if self._is_off or self._seen.total() <= _WARM_UP or self._seen[bucket] == 1:
                return self._take(batch)
            try:
                replay, result = self._capture(lambda: self._take(batch))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().split("\n", 1)[0]
                logger.warning("CUDA graphs: off: a step cannot be captured here: %s", reason)
                self._is_off = True
                kernels.seed_dropout(seed, self._device)
                return self._take(batch)
            self._graphs[bucket] = _Graph(replay, batch, result)
            # Seeding is not captured, but capturing may have drawn from the generator.
            kernels.seed_dropout(seed, self._device)
        else:
            batch = pack(self._dataset, rows, torch.device("cpu"), bucket)
            inputs = self._graphs[bucket].batch
            for name in ("input_ids", "cu_seqlens", "labels"):
                _copy(getattr(batch, name), getattr(inputs, name))
        graph = self._graphs[bucket]
        graph.replay()
        return graph.result

    def _take(self, batch: PackedBatch) -> Tensor:
        return self._take_step(iter([(batch, None)]), self._weight, self._rate)


def _copy(values: Tensor, into: Tensor) -> None:
    """From the host to the device, without waiting."""
    into.copy_(values.pin_memory() if into.device.type == "cuda" else values, non_blocking=True)


class Capture:
    """Captures functions as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Captures a function, which does not run.

        Returns:
            What runs it, and the tensor that its result is in from then on.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            result = function()
        self._pool = graph.pool()
        return graph.replay, result


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Lets a device work in a stream of its own: in the default one nothing can be captured."""
    if device.type != "cuda":
        yield
        return
    stream = _stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        # Also after an error: what was in use there is about to be freed.
        torch.cuda.current_stream(device).wait_stream(stream)


@lru_cache
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """One for all runs of a process: each has a workspace and a cache of memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
