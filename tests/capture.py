"""In place of CUDA graphs, where there is no card."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CaptureOnCpu:
    """Takes the place of `graphs.Capture`: a replay calls the function again.

    Attributes:
        captured: How many there are, in all.
        replays: How often they were replayed.
    """

    captured = 0
    replays = 0

    def __call__(
        self, function: Callable[[], list[Tensor]]
    ) -> tuple[Callable[[], None], list[Tensor]]:
        CaptureOnCpu.captured += 1
        results: list[Tensor] = []

        def replay() -> None:
            CaptureOnCpu.replays += 1
            found = function()
            if not results:
                results.extend(torch.empty_like(tensor) for tensor in found)
            for into, tensor in zip(results, found, strict=True):
                into.copy_(tensor)

        return replay, results
