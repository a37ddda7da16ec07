"""What a run shows while it works: progress, the growing table, `metrics.jsonl`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from bertner.errors import StorageError
from bertner.loop import Evaluation, StepReport
from bertner.metrics import EntityScores

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


class RunReport:
    """Watches a run (a `loop.Watcher`): terminal to people, `metrics.jsonl` to programs.

    Attributes:
        rows: The table's rows so far, as printed.
    """

    def __init__(
        self, output_dir: Path, total_steps: int, logging_steps: int, show_bars: bool
    ) -> None:
        self.rows: list[tuple[str, ...]] = []
        self.logging_steps = logging_steps
        self.show_bars = show_bars
        self.window: list[StepReport] = []
        self.training_loss = "no log"
        try:
            self.file: IO[str] = (output_dir / "metrics.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"{output_dir / 'metrics.jsonl'}: {error.strerror}") from None
        self.bar = progress_bar(total_steps, " step", "train", show_bars, leave=True)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        """Appends one line to `metrics.jsonl`."""
        record = {"event": name, "time": round(time.time(), 3), **values}
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise StorageError(f"metrics.jsonl: cannot be written: {error.strerror}") from None

    def stepped(self, report: StepReport) -> None:
        """Moves the bar; every `logging_steps` steps, logs the mean loss since the last time."""
        self.window.append(report)
        self.bar.set_postfix_str(
            f"loss {report.loss:.4f}, rate {report.learning_rate:.2e}, "
            f"{report.tokens_per_second:,.0f} tokens/s",
            refresh=False,
        )
        self.bar.update()
        if report.step % self.logging_steps == 0:
            loss = sum(step.loss for step in self.window) / len(self.window)
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
            self.window = []

    def evaluating(self, num_rows: int) -> Callable[[int], None]:
        """Opens a bar for an evaluation."""
        bar = progress_bar(num_rows, " sentences", "evaluate", self.show_bars)

        def on_batch(rows: int) -> None:
            bar.update(rows)
            if bar.n >= num_rows:
                bar.close()

        return on_batch

    def evaluated(self, report: StepReport, evaluation: Evaluation, is_best: bool) -> None:
        """Adds a line to the table."""
        scores = evaluation.metrics()
        self.event(
            "eval",
            {
                "step": report.step,
                "epoch": report.epoch,
                **{f"eval_{name}": value for name, value in scores.items()},
                "best": is_best,
            },
        )
        names = ["precision", "recall", "f1", "accuracy", "word_f1"]
        row = (
            self.training_loss,
            f"{report.epoch:.2f}".rstrip("0").rstrip(".")
            if report.epoch % 1
            else f"{report.epoch:.1f}",
            str(report.step),
            f"{scores['loss']:.4f}",
            *(f"{scores[name]:.4f}" for name in names),
        )
        if not self.rows:
            say("  ".join(TABLE_COLUMNS))
        self.rows.append(row)
        say("  ".join(cell.rjust(len(c)) for cell, c in zip(row, TABLE_COLUMNS, strict=True)))

    def saved(self, report: StepReport, folder: Path) -> None:
        """Records that a checkpoint is complete."""
        self.event("save", {"step": report.step, "checkpoint": folder.name})

    def __enter__(self) -> RunReport:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()
        self.file.close()


def progress_bar(total: int, unit: str, name: str, show: bool, leave: bool = False) -> tqdm[Any]:
    """A bar on stderr; where that is a file, a line now and then."""
    return tqdm(
        total=total,
        unit=unit,
        desc=name,
        leave=leave,
        disable=not show,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 30.0,
    )


def say(text: str) -> None:
    """Prints for people; that nobody reads any more, as after `| head`, must not stop a run."""
    try:
        with tqdm.external_write_mode(file=sys.stdout):
            print(text, flush=True)
    except BrokenPipeError:
        # As Python's documentation has it: what is still buffered goes to nowhere, silently.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def format_scores(scores: EntityScores, title: str) -> str:
    """A table of precision, recall, F1 and support per entity type, as text."""
    rows = [*scores.per_type.items(), ("all", scores.overall)]
    width = max(len(title), *(len(name) for name, _ in rows))
    lines = [f"{title:<{width}}  precision  recall      f1  entities"]
    lines += [
        f"{name:<{width}}  {s.precision:9.4f}  {s.recall:.4f}  {s.f1:.4f}  {s.num_gold:8d}"
        for name, s in rows
    ]
    return "\n".join(lines)
