"""Stopping a run by a signal: now a flag, soon a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """While it is open, SIGTERM, SIGINT and SIGUSR1 only ask to stop; calling it tells whether.

    A second one ends the process at once, as if nothing had been set up. What was ignored before,
    as SIGINT is in a shell's background jobs, stays ignored. Outside of the main thread, where
    Python handles no signals, it does nothing.

    Attributes:
        name: Of the signal that has come; None before.
        is_leaving: Set it to pay no heed to signals any more, also once this is closed: torchrun
            sends one to all processes as soon as one has ended.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_leaving = False
        self._before: dict[signal.Signals, Any] = {}

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.is_leaving else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.is_leaving:
            return
        if self.name is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.name = signal.Signals(number).name
