"""The other side: the Trainer with its defaults, and a clock."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.common import Parts
from tests.parity.trainer import rows_for_trainer


class StepClock(TrainerCallback):
    """Seconds of each of the Trainer's steps, its data loading included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the seconds since the last step."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def make_trainer(
    folder: Path, parts: Parts, clock: StepClock | None = None, **settings: Any
) -> Trainer:
    """The Trainer with its defaults: fused AdamW, sdpa, dynamic padding, batch 8."""
    return Trainer(
        model=AutoModelForTokenClassification.from_pretrained(folder, attn_implementation="sdpa"),
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            weight_decay=0.01,
            learning_rate=2e-5,
            **settings,
        ),
        train_dataset=rows_for_trainer(parts.train),
        eval_dataset=rows_for_trainer(parts.validation),
        data_collator=DataCollatorForTokenClassification(
            PreTrainedTokenizerFast(
                tokenizer_object=parts.tokenizer.fast, **parts.tokenizer.special_tokens
            )
        ),
        callbacks=[clock] if clock else [],
    )
