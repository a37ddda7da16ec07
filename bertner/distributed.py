"""What torchrun gives: the ranks of a run, sums over them, and what they do and decide together.

A rank is one of several processes that train one model. Each has the whole model and computes its
share of every step; what is summed here is all that they exchange. Without torchrun there is one
rank, `ALONE`, and every function is as good as not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from bertner.errors import (
    BertnerError,
    NotFiniteError,
    PeerError,
    RunStoppedError,
    StorageError,
    UsageError,
)

T = TypeVar("T")

# Tensors with fewer elements are put together before they are summed: each sum has a fixed cost.
_SMALL = 1 << 16


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them.

    Every method is called by all ranks, in the same order.

    Attributes:
        rank: Number of this one, from 0.
        world_size: How many there are.
        local_rank: Number of this one on its machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Adds up each tensor over the ranks, in place; all ranks get the same bits."""
        if self.world_size == 1:
            return
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        large = []
        for tensor in tensors:
            if tensor.numel() < _SMALL or not tensor.is_contiguous():
                groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
            else:
                large.append(tensor)
        joined = [torch.cat([tensor.reshape(-1) for tensor in group]) for group in groups.values()]
        with self._reaching_all():
            works = [dist.all_reduce(tensor, async_op=True) for tensor in (*large, *joined)]
            for work in works:
                work.wait()
        for flat, group in zip(joined, groups.values(), strict=True):
            parts = torch.split(flat, [tensor.numel() for tensor in group])
            for tensor, part in zip(group, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in order; they may differ in their number of rows."""
        if self.world_size == 1:
            return [tensor]
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(self.world_size)]
        with self._reaching_all():
            dist.all_gather(counts, torch.tensor(len(tensor)))
            sizes = [int(count) for count in counts]
            mine = tensor.new_zeros(max(sizes), *tensor.shape[1:])
            mine[: len(tensor)] = tensor
            found = [torch.empty_like(mine) for _ in sizes]
            dist.all_gather(found, mine)
        return [each[:size] for each, size in zip(found, sizes, strict=True)]

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Gives all ranks the first one's values, in place."""
        if self.world_size > 1:
            with self._reaching_all(), torch.no_grad():
                for tensor in tensors:
                    dist.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        if self.world_size == 1:
            return flag
        count = torch.tensor(int(flag))
        self.sum([count])
        return bool(count)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order: numbers, strings, lists and dicts of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        with self._reaching_all():
            dist.all_gather_object(values, value)
        return values

    def share(self, value: T) -> T:
        """The first rank's value; see `gather`."""
        if self.world_size == 1:
            return value
        values = [value]
        with self._reaching_all():
            dist.broadcast_object_list(values, 0)
        return values[0]

    def together(self, work: Callable[[], T]) -> T:
        """Does some work on every rank; it fails on all if it fails on any.

        Raises:
            BertnerError: What the work raised here, or on the lowest rank on which it failed.
        """
        if self.world_size == 1:
            return work()
        result: T | None = None
        error: BertnerError | OSError | None = None
        try:
            result = work()
        except (BertnerError, OSError) as raised:
            error = raised
        self._raise_any(self.gather(_report(error)), error)
        return cast(T, result)

    def in_turn(self, work: Callable[[], T]) -> T:
        """The same, but first on one rank of each machine: what it has put by serves the others."""
        first = self.together(lambda: work() if self.local_rank == 0 else None)
        rest = self.together(lambda: None if self.local_rank == 0 else work())
        return cast(T, first if self.local_rank == 0 else rest)

    def lead(self, work: Callable[[], T]) -> T | None:
        """Does some work on the first rank, while the others wait; it fails on all or on none.

        In the midst of it the first rank may call `meet`.

        Returns:
            What the work returned, on the first rank; None on the others.
        """
        if self.world_size == 1:
            return work()
        result: T | None = None
        error: BertnerError | OSError | None = None
        if self.is_first:
            try:
                result = work()
            except (BertnerError, OSError) as raised:
                error = raised
            try:
                self.gather({"done": True, "error": _report(error)})
            except PeerError:
                if error is None:  # what is done is done; who needs the others next will see
                    return result
            if error is not None:
                raise error
            return result
        while True:
            first = self.gather(cast(Any, None))[0]
            if first["done"]:
                self._raise_any([first["error"]], None)
                return None

    def meet(self) -> None:
        """Makes sure that all ranks are still there; of the first rank, within `lead`.

        Raises:
            PeerError: One is not.
        """
        self.gather({"done": False})

    def _raise_any(self, reports: Sequence[Any], own: BertnerError | OSError | None) -> None:
        """Raises the error of the lowest rank that reports one; the first rank tells of it."""
        for rank, report in enumerate(reports):
            if report is not None:
                if self.is_first and rank == 0 and own is not None:
                    raise own
                message = report["message"]
                error = BertnerError(f"rank {rank}: {message}" if rank else message)
                error.exit_code = report["exit_code"]
                error.is_told_elsewhere = not self.is_first
                raise error

    @contextmanager
    def _reaching_all(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ConnectionError) as error:
            # PyTorch has a class for it on CUDA devices alone.
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise
            reason = str(error).strip().split("\n", 1)[0]
            raise PeerError(
                f"rank {self.rank} of {self.world_size} has lost another one: {reason:.200}\n"
                "The same command carries on from the last checkpoint."
            ) from None


ALONE = Ranks()


def _report(error: BertnerError | OSError | None) -> dict[str, Any] | None:
    code = getattr(error, "exit_code", StorageError.exit_code)
    return None if error is None else {"message": str(error), "exit_code": code}


@contextmanager
def join(device: str = "auto", backend: str = "auto", timeout: int = 1800) -> Iterator[Ranks]:
    """Takes this process' place among those that torchrun has started, while it is open.

    Args:
        device: What the run is computed on; "auto" and "cuda" are the machine's n-th card for the
            process with local rank n.
        backend: "nccl" or "gloo" for what is exchanged between devices; "auto" is NCCL for CUDA.
        timeout: Seconds after which a rank that does not answer counts as lost.

    Yields:
        The ranks; `ALONE` without torchrun.

    Raises:
        UsageError: The environment names ranks, but not where to meet; or the machine has fewer
            cards than ranks.
        PeerError: The others cannot be reached.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    values = {name: os.environ.get(name, "") for name in names}
    if not values["RANK"] or values["WORLD_SIZE"] in ("", "1"):
        yield ALONE
        return
    numbers = names[:3]
    missing = [n for n in names if not (values[n].isdecimal() if n in numbers else values[n])]
    if missing:
        raise UsageError(
            f"RANK is set, but {', '.join(missing)} says nothing; start several processes with "
            "torchrun, or unset RANK for one"
        )
    ranks = Ranks(*(int(values[name]) for name in numbers))
    if not dist.is_available():
        raise UsageError("this build of PyTorch cannot train in several processes")
    others: dict[str, Callable[[], bool]] = {
        "xpu": torch.xpu.is_available,
        "mps": torch.backends.mps.is_available,
    }
    for kind, is_there in others.items():
        if device == kind or (device == "auto" and not torch.cuda.is_available() and is_there()):
            raise UsageError(f"several processes cannot train on {kind}; give --device cpu")
    index = _cuda_index(device, ranks)
    if index is not None:
        num_cards = torch.cuda.device_count()
        if index >= num_cards:
            raise UsageError(
                f"{num_cards} CUDA devices, but local rank {ranks.local_rank}: start at most "
                "that many with torchrun --nproc_per_node, or choose --device cpu"
            )
        torch.cuda.set_device(index)
    if backend == "auto":
        backend = "gloo" if index is None else "nccl"
    if backend == "nccl" and (index is None or not dist.is_nccl_available()):
        raise UsageError("ddp_backend nccl is for CUDA devices; use gloo")
    # What is decided on the host goes by gloo in any case.
    backends = "gloo" if index is None else f"cpu:gloo,cuda:{backend}"
    patience = timedelta(seconds=timeout)
    try:
        store = _store_of_attempt(patience)
        if store is None:
            dist.init_process_group(backends, timeout=patience)
        else:
            dist.init_process_group(
                backends,
                timeout=patience,
                store=store,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
    except (RuntimeError, ConnectionError, ValueError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise PeerError(
            f"rank {ranks.rank} of {ranks.world_size} cannot reach the others: {reason:.200}"
        ) from None
    try:
        yield ranks
    except (NotFiniteError, RunStoppedError) as error:  # which all ranks find at the same step
        error.is_told_elsewhere = not ranks.is_first
        raise
    # Not after an error: others may be gone, and this would wait for them.
    dist.destroy_process_group()


def _store_of_attempt(patience: timedelta) -> Any:
    """Where the ranks of one machine meet after torchrun has restarted them; None for as usual.

    torchrun keeps one store for all attempts (PyTorch 2.13), so that ranks find the addresses of
    those that are gone. On several machines their restarts are not counted alike.
    """
    environment = os.environ
    alone = environment.get("LOCAL_WORLD_SIZE") == environment["WORLD_SIZE"]
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not alone:
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    stores: Any = dist  # whose types do not say that it has them
    store = stores.TCPStore(address, port, is_master=False, timeout=patience)
    return stores.PrefixStore(f"attempt-{environment.get('TORCHELASTIC_RESTART_COUNT')}", store)


def _cuda_index(device: str, ranks: Ranks) -> int | None:
    """Which of the machine's cards a rank computes on; None for no card."""
    if device.startswith("cuda:"):
        raise UsageError(f"{ranks.world_size} ranks cannot share {device}; leave out --device")
    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return None
    return ranks.local_rank
