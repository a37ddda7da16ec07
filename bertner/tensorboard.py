"""What TensorBoard shows of a run: the numbers of `metrics.jsonl`, in an event file.

The file is written anew from the log each time that a run is started or carried on, so that the two
never differ. TensorBoard itself is imported only where something is written for it.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bertner import files
from bertner.errors import CheckpointError, StorageError, UsageError
from bertner.files import make_folder, parse_json

# As the Trainer calls it.
RUNS = "runs"

# Of each kind of event in the log: how the names begin that are shown, and what stands there
# instead. TensorBoard groups by what is before the slash.
_GROUPS = {"log": ("", "train/"), "eval": ("eval_", "eval/"), "end": ("test_", "test/")}


def check_tensorboard() -> None:
    """Raises UsageError if TensorBoard is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(
            "report_to tensorboard needs TensorBoard: pip install 'bertner[tensorboard]'"
        )


def list_event_files(output_dir: Path) -> list[Path]:
    """The event files of a run, oldest first; those of other programs are not among them."""
    return sorted((output_dir / RUNS).glob("events.out.tfevents.*.bertner"))


class EventFile:
    """A log as TensorBoard reads it, in the folder `runs`."""

    def __init__(self, output_dir: Path, metrics: bytes) -> None:
        """Begins a file with what is in the log already, in place of earlier files.

        Args:
            output_dir: Of the run.
            metrics: The contents of `metrics.jsonl` so far.

        Raises:
            StorageError: The disk fails.
            CheckpointError: `metrics` is no such log.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        make_folder(output_dir / RUNS)
        earlier = list_event_files(output_dir)
        # By the time, since a board that is open goes from one file on to the next by name.
        self.path = output_dir / RUNS / f"events.out.tfevents.{time.time_ns():020d}.bertner"
        with self._disk_errors():
            self.file = self.path.open("xb")
            self.writer = RecordWriter(self.file)
            try:
                self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
                # A board that is open forgets what it has read of earlier files.
                start = SessionLog(status=SessionLog.START)
                self._write(Event(wall_time=time.time(), session_log=start))
                for line in metrics.splitlines():
                    self.add(line)
                for path in earlier:
                    if path.stat().st_size:
                        # Such a board would wait for ever for one that is removed.
                        os.truncate(path, 0)
                    else:
                        files.remove(path)
            except BaseException:
                self.close()
                raise

    def add(self, line: bytes) -> None:
        """Adds a line of `metrics.jsonl`.

        Raises:
            StorageError: The disk fails.
            CheckpointError: It is no such line.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        try:
            event = parse_json(line)
            values = [Summary.Value(tag=t, simple_value=v) for t, v in _scalars(event).items()]
            if values:
                summary = Summary(value=values)
                self._write(Event(wall_time=event["time"], step=event["step"], summary=summary))
        except (ValueError, LookupError, TypeError, OverflowError):
            raise CheckpointError("cannot be carried on from: a line of its log is none") from None

    def _write(self, event: Any) -> None:
        with self._disk_errors():
            self.writer.write(event.SerializeToString())
            self.writer.flush()

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            reason = error.strerror or error
            raise StorageError(f"{self.path}: cannot be written: {reason}") from None

    def close(self) -> None:
        """Closes the file."""
        with suppress(OSError):  # of a write that failed, and was told
            self.file.close()


def _scalars(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of the log that are shown, by their names in TensorBoard."""
    if event["event"] not in _GROUPS:
        return {}
    prefix, group = _GROUPS[event["event"]]
    return {
        group + name.removeprefix(prefix): float(value)
        for name, value in event.items()
        if name.startswith(prefix)
        and name not in ("time", "step")
        and isinstance(value, int | float)
    }
