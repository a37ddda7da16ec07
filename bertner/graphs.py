"""Whole optimizer steps as CUDA graphs.

A step of a small batch is a thousand kernels of a few microseconds each: launched one by one, they
leave the card waiting for the host. Captured once and replayed, they follow each other at once. A
graph has fixed shapes, so batches are filled up to one of a few sizes (`batches.Bucket`), and each
size has a graph of its own; all share one pool of memory.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

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


def why_no_graphs(config: TrainConfig, model: BertForNER) -> str | None:
    """What keeps steps from being captured; None if nothing does."""
    if not kernels.is_queued(model.device):
        return f"there are none for {model.device.type}"
    if not config.cuda_graphs:
        return "as asked"
    if not config.packing:
        return "rows are padded"
    if config.gradient_accumulation_steps > 1:
        return "steps have several micro-batches"
    if model.config.max_position_embeddings < LONGEST_DUMMY:
        return f"the model has fewer than {LONGEST_DUMMY} positions"
    return None


@dataclass
class _Graph:
    """What was captured, where it reads its batch and where it leaves its results."""

    replay: Callable[[], None]
    batch: PackedBatch
    results: list[Tensor]


class StepGraphs:
    """Takes steps by replaying them.

    The first steps, and the first one of every bucket, are taken kernel by kernel, from the same
    inputs: their bits are those of a replay. Nothing that is captured waits for the device, or has
    shapes that depend on the values of its inputs.

    Args:
        compute: From micro-batches and what the sum of their losses is divided by to that loss; it
            leaves gradients.
        update: From that and the rate, through what the ranks exchange, to the step's loss and
            gradient norm, (2,).
        parameters: Those that may have gradients.
        dataset: Training rows.
        device: A CUDA device.
        ranks: Of the run. Of several, what they exchange is not captured, nor what comes after.
    """

    def __init__(
        self,
        compute: Callable[[Batches, Tensor], Tensor],
        update: Callable[[Tensor, Tensor], Tensor],
        parameters: Sequence[Tensor],
        dataset: TokenDataset,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self._compute = compute
        self._update = update
        self._parameters = parameters
        self._dataset = dataset
        self._device = device
        self._is_alone = ranks.world_size == 1
        self._capture = Capture()
        # One for all: what is known when a graph is captured holds for every replay.
        self._max_seqlen = max(int(dataset.row_lengths.max()), LONGEST_DUMMY)
        self._weight = torch.zeros((), device=device)
        self._rate = torch.zeros((), device=device)
        self._graphs: dict[Bucket, _Graph] = {}
        self._is_off = False
        self._seen: Counter[Bucket] = Counter()

    def step(self, rows: IntArray, seed: int, weight: float, rate: float) -> Tensor:
        """Takes a step.

        Args:
            rows: Its only micro-batch; none, if other ranks have them all.
            seed: Of its dropout.
            weight: What the sum of the losses is divided by.
            rate: Learning rate.

        Returns:
            Loss and gradient norm, (2,), which nobody has waited for.
        """
        self._weight.fill_(weight)
        self._rate.fill_(rate)
        kernels.seed_dropout(seed, self._device)
        if len(rows) == 0:
            return self._update(self._compute(iter(()), self._weight), self._rate)
        bucket = bucket_of(len(rows), int(self._dataset.row_lengths[rows].sum()))
        if bucket not in self._graphs:
            batch = pack(self._dataset, rows, self._device, bucket)
            batch = replace(batch, max_seqlen=self._max_seqlen)
            self._seen[bucket] += 1
            is_new = self._seen.total() <= _WARM_UP or self._seen[bucket] == 1
            if self._is_off or is_new or not self._try_to_capture(bucket, batch):
                kernels.seed_dropout(seed, self._device)
                return self._take(batch)
            # Seeding is not captured, but capturing may have drawn from the generator.
            kernels.seed_dropout(seed, self._device)
        else:
            batch = pack(self._dataset, rows, torch.device("cpu"), bucket)
            inputs = self._graphs[bucket].batch
            for name in ("input_ids", "cu_seqlens", "labels"):
                _copy(getattr(batch, name), getattr(inputs, name))
        graph = self._graphs[bucket]
        graph.replay()
        if self._is_alone:
            return graph.results[0]
        loss, *gradients = graph.results
        for parameter, gradient in zip(self._trained(), gradients, strict=True):
            parameter.grad = gradient
        return self._update(loss, self._rate)

    def _trained(self) -> list[Tensor]:
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    def _take(self, batch: PackedBatch) -> Tensor:
        loss = self._compute(iter([(batch, None)]), self._weight)
        return self._update(loss, self._rate)

    def _leave_gradients(self, batch: PackedBatch) -> list[Tensor]:
        loss = self._compute(iter([(batch, None)]), self._weight)
        return [loss, *(p.grad for p in self._trained() if p.grad is not None)]

    def _try_to_capture(self, bucket: Bucket, batch: PackedBatch) -> bool:
        """Captures a step with this batch; False, from then on, if that cannot be done here."""
        try:
            replay, results = self._capture(
                lambda: [self._take(batch)] if self._is_alone else self._leave_gradients(batch)
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().split("\n", 1)[0]
            logger.warning("CUDA graphs: off: a step cannot be captured here: %s", reason)
            self._is_off = True
            return False
        self._graphs[bucket] = _Graph(replay, batch, results)
        return True


def _copy(values: Tensor, into: Tensor) -> None:
    """From the host to the device, without waiting."""
    into.copy_(values.pin_memory() if into.device.type == "cuda" else values, non_blocking=True)


class Capture:
    """Captures functions as CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(
        self, function: Callable[[], list[Tensor]]
    ) -> tuple[Callable[[], None], list[Tensor]]:
        """Captures a function, which does not run.

        Returns:
            What runs it, and the tensors that its results are in from then on.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=torch.cuda.current_stream()):
            results = function()
        self._pool = graph.pool()
        return graph.replay, results


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
