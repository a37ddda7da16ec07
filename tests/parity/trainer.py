"""The Trainer, fed with the rows that bertner reads, for step-by-step comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bertner.batches import Schedule, pack
from bertner.config import TrainConfig
from bertner.data import TokenDataset
from bertner.loop import StepReport, dropout_seed
from bertner.tokenizer import Tokenizer


@dataclass
class Losses:
    """A watcher that keeps every step's numbers."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)

    def stepped(self, report: StepReport) -> None:
        self.loss.append(report.loss)
        self.grad_norm.append(report.grad_norm)
        self.learning_rate.append(report.learning_rate)

    def evaluating(self, num_rows: int) -> Any:
        return lambda rows: None

    def evaluated(self, step: int, epoch: float, evaluation: Any, is_best: bool) -> None:
        pass


def rows_for_trainer(dataset: TokenDataset) -> list[dict[str, list[int]]]:
    """The rows as lists, the form that the data collator takes."""
    rows = []
    for row in range(len(dataset)):
        batch = pack(dataset, [row], torch.device("cpu"))
        rows.append(
            {
                "input_ids": batch.input_ids.tolist(),
                "attention_mask": [1] * len(batch.input_ids),
                "labels": batch.labels.tolist(),
            }
        )
    return rows


class _Recorder(Trainer):
    """Keeps each step's loss exactly; the Trainer's own log has it rounded."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.recorded.append(loss.item())
        return loss


class _SeedDropout(TrainerCallback):
    """Seeds each step as bertner does, so that both drop the same units."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(dropout_seed(self.seed, state.global_step, 0))


def train_with_trainer(
    folder: Path,
    dataset: TokenDataset,
    tokenizer: Tokenizer,
    config: TrainConfig,
    output_dir: Path,
    *,
    evaluation: TokenDataset | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
) -> _Recorder:
    """Runs the real Trainer from a saved starting point with bertner's recipe and rows.

    It evaluates during training only if it is told how, by `compute_metrics`.
    """
    # What the Trainer does otherwise, or is not told here.
    assert config.gradient_accumulation_steps == 1
    assert config.dtype == "float32"
    model = AutoModelForTokenClassification.from_pretrained(
        folder, attn_implementation=config.attn_implementation
    )
    hf_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.fast, **tokenizer.special_tokens
    )
    model.bert.embeddings.requires_grad_(not config.freeze_embeddings)
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        learning_rate=config.learning_rate,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        weight_decay=config.weight_decay,
        warmup_steps=Schedule(dataset.row_lengths, config).warmup_steps,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_epsilon=config.adam_epsilon,
        eval_steps=config.eval_steps,
        max_grad_norm=config.max_grad_norm,
        label_smoothing_factor=config.label_smoothing_factor,
        seed=config.seed,
        use_cpu=True,
        report_to=[],
        logging_steps=10**6,
        save_strategy="no",
        eval_strategy="no" if compute_metrics is None else config.eval_strategy,
        disable_tqdm=True,
    )
    trainer = _Recorder(
        model=model,
        args=arguments,
        train_dataset=rows_for_trainer(dataset),
        eval_dataset=None if evaluation is None else rows_for_trainer(evaluation),
        data_collator=DataCollatorForTokenClassification(hf_tokenizer),
        callbacks=[_SeedDropout(config.seed)],
        compute_metrics=compute_metrics,
    )
    trainer.recorded = []
    trainer.train()
    return trainer


def relative_difference(ours: Any, theirs: Any) -> float:
    """Largest |a - b| / |b|."""
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert a.shape == b.shape
    return float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-12)))
