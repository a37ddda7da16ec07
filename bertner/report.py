"""What a run shows while it works: progress, the growing table, `metrics.jsonl`."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from bertner.errors import CheckpointError, StorageError
from bertner.evaluation import Evaluation
from bertner.files import replace_file
from bertner.progress import StepReport
from bertner.tensorboard import EventFile

# The columns of the published card, and the word-level F1 that CoNLL results are compared by.
TABLE_COLUMNS = (
    "Training loss",
    "Epoch",
    "Step",
    "Validation loss",
    "Precision",
    "Recall",
    "F1",
    "Accuracy",
    "Word F1",
)


# Attributes of a RunReport that a run which is carried on needs, and their types in JSON.
_STATE: dict[str, type] = {
    "window_loss": float,
    "window_steps": int,
    "training_loss": str,
    "rows": list,
}


class RunReport:
    """Watches a run (a `progress.Watcher`): terminal to people, `metrics.jsonl` to programs.

    Attributes:
        rows: The table's rows so far, as printed.
        total_steps: Of the run.
    """

    def __init__(
        self,
        output_dir: Path,
        total_steps: int,
        logging_steps: int,
        show_bars: bool,
        *,
        report_to: str = "none",
        step: int = 0,
        state: Mapping[str, Any] | None = None,
        metrics: bytes = b"",
    ) -> None:
        """Opens the log.

        Args:
            output_dir: Where `metrics.jsonl` is put.
            total_steps: Of the run.
            logging_steps: Log every so many steps.
            show_bars: Show progress bars.
            report_to: "tensorboard" to write its event file too.
            step: Steps done before, by a run that is carried on.
            state: What `state` gave then.
            metrics: The log's contents then.

        Raises:
            StorageError: The disk fails.
            CheckpointError: `state` is none.
        """
        self.rows: list[tuple[str, ...]] = []
        self.total_steps = total_steps
        self.logging_steps = logging_steps
        self.show_bars = show_bars
        self.window_loss = 0.0
        self.window_steps = 0
        self.training_loss = "no log"
        if state is not None:
            self._restore(state)
        self.path = output_dir / "metrics.jsonl"
        replace_file(self.path, [metrics])
        self.event_file = EventFile(output_dir, metrics) if report_to == "tensorboard" else None
        try:
            self.file: IO[str] = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from None
        self.bar = progress_bar(total_steps, " step", "train", show_bars, leave=True, initial=step)
        self.eval_bar: tqdm[Any] | None = None

    def state(self) -> dict[str, Any]:
        """What it takes to go on as if nothing had been, as JSON values."""
        return {name: getattr(self, name) for name in _STATE}

    def _restore(self, state: Any) -> None:
        for name, kind in _STATE.items():
            value = state.get(name) if isinstance(state, dict) else None
            fits = type(value) is kind
            if isinstance(value, int):  # a number of steps, of which no float need hold more
                fits = fits and 0 <= value < 1 << 63
            if not fits:
                raise CheckpointError(
                    f"cannot be carried on from: the log's {name} is no {kind.__name__}"
                )
            setattr(self, name, value)
        are_lists = all(isinstance(row, list) for row in self.rows)
        self.rows = [tuple(map(str, row)) for row in self.rows] if are_lists else [()]
        widths = {len(row) for row in self.rows} | {len(TABLE_COLUMNS)}
        cells = [self.training_loss, *(cell for row in self.rows for cell in row)]
        if len(widths) > 1 or not "".join(cells).isprintable():
            raise CheckpointError("cannot be carried on from: the log's table is none")
        for row in self.rows:
            self._show(row, is_first=row is self.rows[0])

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        self._append(_line(name, values))

    def _append(self, line: str) -> None:
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise StorageError(f"metrics.jsonl: cannot be written: {error.strerror}") from None
        if self.event_file is not None:
            self.event_file.add(line.encode())

    def metrics(self) -> bytes:
        """The contents of `metrics.jsonl` so far."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise StorageError(f"{self.path}: {error.strerror}") from None

    @contextmanager
    def saving(self, step: int) -> Iterator[bytes]:
        """Records a checkpoint once it is complete.

        Yields:
            The log as it will be then, which belongs into that checkpoint.
        """
        line = _line("save", {"step": step, "checkpoint": f"checkpoint-{step}"})
        yield self.metrics() + line.encode()
        self._append(line)

    def stepped(self, report: StepReport) -> None:
        """Moves the bar; every `logging_steps` steps, logs the mean loss since the last time."""
        self.window_loss += report.loss
        self.window_steps += 1
        self.bar.set_postfix_str(
            f"loss {report.loss:.4f}, rate {report.learning_rate:.2e}, "
            f"{report.tokens_per_second:,.0f} tokens/s",
            refresh=False,
        )
        self.bar.update()
        if report.step % self.logging_steps == 0:
            loss = self.window_loss / self.window_steps
            self.training_loss = f"{loss:.4f}"
            self.event(
                "log",
                {
                    "step": report.step,
                    "epoch": report.epoch,
                    "loss": loss,
                    "grad_norm": report.grad_norm,
                    "learning_rate": report.learning_rate,
                    "tokens_per_second": report.tokens_per_second,
                },
            )
            self.window_loss, self.window_steps = 0.0, 0

    def evaluating(self, num_rows: int) -> Callable[[int], None]:
        """Opens a bar for an evaluation."""
        bar = progress_bar(num_rows, " rows", "evaluate", self.show_bars)
        self.eval_bar = bar

        def on_batch(rows: int) -> None:
            bar.update(rows)
            if bar.n >= num_rows:
                bar.close()

        return on_batch

    def evaluated(self, step: int, epoch: float, evaluation: Evaluation, is_best: bool) -> None:
        """Adds a line to the table."""
        scores = evaluation.metrics()
        self.event(
            "eval",
            {
                "step": step,
                "epoch": epoch,
                **{f"eval_{name}": value for name, value in scores.items()},
                "best": is_best,
            },
        )
        names = ["precision", "recall", "f1", "accuracy", "word_f1"]
        row = (
            self.training_loss,
            f"{epoch:.2f}".rstrip("0").rstrip(".") if epoch % 1 else f"{epoch:.1f}",
            str(step),
            f"{scores['loss']:.4f}",
            *(f"{scores[name]:.4f}" for name in names),
        )
        self.rows.append(row)
        self._show(row, is_first=len(self.rows) == 1)

    def _show(self, row: tuple[str, ...], is_first: bool) -> None:
        if is_first:
            say("  ".join(TABLE_COLUMNS))
        say("  ".join(cell.rjust(len(c)) for cell, c in zip(row, TABLE_COLUMNS, strict=True)))

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, *error: object) -> None:
        if self.eval_bar is not None:
            self.eval_bar.close()
        self.bar.close()
        self.file.close()
        if self.event_file is not None:
            self.event_file.close()


def _line(event: str, values: Mapping[str, Any]) -> str:
    return json.dumps({"event": event, "time": round(time.time(), 3), **values}) + "\n"


def progress_bar(
    total: int | None,
    unit: str,
    name: str,
    show: bool,
    leave: bool = False,
    initial: int = 0,
) -> tqdm[Any]:
    """A bar on stderr; where that is a file, a line now and then. The total may be unknown."""
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        desc=name,
        leave=leave,
        disable=not show,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30.0,
    )


def escape_unknown() -> None:
    """From now on, characters that the output's encoding lacks are printed as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints for people; that nobody reads any more, as after `| head`, must not stop a run."""
    try:
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
    except BrokenPipeError:
        # As Python's documentation has it: what is still buffered goes to nowhere, silently.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
