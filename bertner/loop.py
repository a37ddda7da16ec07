"""The training loop and evaluation, in the open.

A step is: zero the gradients, run each micro-batch forward and backward, clip, set the rate, step.
What a step does is a pure function of the seed and the step's number: the order of the data
(`batches.epoch_order`), the dropout (`dropout_seed`) and the rate (`learning_rate_at`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bertner import kernels
from bertner.batches import (
    PackedBatch,
    PaddedBatch,
    collate,
    pack,
    packed_by_length,
    padded_by_length,
    steps_from,
)
from bertner.config import EVAL_TOKENS, TrainConfig
from bertner.data import TokenDataset
from bertner.errors import CheckpointError, NotFiniteError, UsageError
from bertner.labels import IGNORE_INDEX, IntArray
from bertner.metrics import EntityScores, score_entities
from bertner.model import BertForNER, autocast, token_loss
from bertner.optimizer import (
    AdamW,
    build_optimizer,
    clip,
    gradient_norm,
    load_named_state,
    named_state,
)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step that is done.

    Attributes:
        step: Steps done, this one included.
        total_steps: Steps of the whole run.
        epoch: Passes over the data done, a fraction.
        loss: Mean over the labelled tokens of the step.
        grad_norm: Norm of the gradient before clipping.
        learning_rate: Rate that the step used.
        num_tokens: Real tokens that the step read, special tokens included.
        tokens_per_second: Real tokens so far, over the time in steps alone.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    tokens_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a dataset.

    Attributes:
        loss: Mean over the labelled tokens.
        loss_batch_mean: The Trainer's `eval_loss`: the mean over batches of their means, weighted
            by rows, which depends on the batch size.
        subword: Scores on the wordpieces that carry a label, as in Trainer-made model cards.
        word: Scores on words, each decided by its first wordpiece, as in CoNLL-2003.
        word_predictions: (num_words,) predicted label of every word.
        runtime: Seconds.
        num_rows: Rows read.
    """

    loss: float
    loss_batch_mean: float
    subword: EntityScores
    word: EntityScores
    word_predictions: IntArray
    runtime: float
    num_rows: int

    def metrics(self) -> dict[str, float]:
        """The scores by name, without a prefix; names without a level are at subword level."""
        return {
            "loss": self.loss,
            "loss_batch_mean": self.loss_batch_mean,
            "precision": self.subword.overall.precision,
            "recall": self.subword.overall.recall,
            "f1": self.subword.overall.f1,
            "accuracy": self.subword.accuracy,
            "word_precision": self.word.overall.precision,
            "word_recall": self.word.overall.recall,
            "word_f1": self.word.overall.f1,
            "word_accuracy": self.word.accuracy,
            "runtime": self.runtime,
            "samples_per_second": self.num_rows / self.runtime,
        }


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    Attributes:
        step: Optimizer steps done.
        epoch: Passes over the data done.
        loss: Mean of the steps' losses.
        runtime: Seconds, evaluation and saving included.
        steps_per_second: Over the time in steps alone.
        tokens_per_second: Real tokens, over the time in steps alone.
        evaluation: The last one, if there was any since the run was started or carried on.
        best_step: Step of the best evaluation by `metric_for_best_model`.
        state: What it takes to carry on from here.
        stopped: Whether it was asked to stop; steps, evaluations or saves are still to be done.
    """

    step: int
    epoch: float
    loss: float
    runtime: float
    steps_per_second: float
    tokens_per_second: float
    evaluation: Evaluation | None
    best_step: int | None
    state: TrainState
    stopped: bool


@dataclass(frozen=True)
class TrainState:
    """Where a run stands after a step: with the model's weights, all that it takes to carry on.

    Attributes:
        step: Optimizer steps done.
        best_step: Step of the best evaluation so far.
        counters: JSON values: the step's place in the data, sums, the best score.
        optimizer: See `optimizer.named_state`; in `train` these are the live tensors, which the
            next step changes.
    """

    step: int
    best_step: int | None
    counters: Mapping[str, Any]
    optimizer: Mapping[str, Tensor]


class Stopped(Exception):
    """An evaluation was asked to stop, and has."""


class Watcher(Protocol):
    """What may look at a run; nothing that it does changes what is trained."""

    def stepped(self, report: StepReport) -> None:
        """A step is done."""

    def evaluating(self, num_rows: int) -> Callable[[int], None]:
        """An evaluation begins; the returned function is told of every batch's rows."""

    def evaluated(self, step: int, epoch: float, evaluation: Evaluation, is_best: bool) -> None:
        """An evaluation after a step is done."""


# Saves the model and the state after a step.
Save = Callable[[TrainState], None]


def learning_rate_at(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of a step (from 0): linear warmup to `peak`, then linear decay to zero."""
    if step < warmup_steps:
        return peak * (step / max(1, warmup_steps))
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of the dropout of one micro-batch: the same however the run got there."""
    state = np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)
    return int(state[0]) >> 1  # torch takes 63 bits on every device


def train(
    model: BertForNER,
    dataset: TokenDataset,
    config: TrainConfig,
    *,
    evaluation: TokenDataset | None = None,
    watcher: Watcher | None = None,
    save: Save | None = None,
    state: TrainState | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Fine-tunes a model in place.

    Seeds the device's global generator before every micro-batch (see `dropout_seed`). With packed
    rows the C library keeps freed memory from then on (see `kernels.keep_freed_memory`).

    Args:
        model: On the device to train on.
        dataset: Training rows.
        config: Recipe; files, folders and names in it are not used here.
        evaluation: Rows to score, as often as `config.eval_strategy` says.
        watcher: Is told of steps and evaluations.
        save: Is called as often as `config.save_strategy` says, and after the best evaluation so
            far if the best model is to be kept.
        state: Carry on from here; the model has the weights that belong to it.
        should_stop: Is asked after each step and each batch of an evaluation.

    Raises:
        NotFiniteError: Loss or gradient norm is infinite or NaN; the step that it came up in is not
            taken. Or a weight is, when it was to be saved.
        CheckpointError: `state` is not one of such a run.
    """
    device = model.device
    parameters = list(model.parameters())
    optimizer = build_optimizer(model, config)
    total_steps = config.total_steps(len(dataset))
    warmup_steps = config.resolved_warmup_steps(total_steps)
    progress = _Progress(
        config, model, optimizer, len(dataset), evaluation, watcher, save, should_stop
    )
    if state is not None:
        progress.carry_on(state)
    model.train()
    make_batch, norm_of = (pack, gradient_norm) if config.packing else (collate, _reference_norm)

    with _short_ways(model, config):
        for step, micro_batches in steps_from(progress.step, len(dataset), config):
            if step == total_steps or progress.stopped:
                break
            optimizer.zero_grad()
            all_rows = np.concatenate(micro_batches)
            num_labelled = int(dataset.row_num_labelled[all_rows].sum())
            loss_sum = torch.zeros((), device=device)
            for k, rows in enumerate(micro_batches):
                batch = make_batch(dataset, rows, device)
                kernels.seed_dropout(dropout_seed(config.seed, step, k), device)
                with autocast(device, config.dtype):
                    logits = model(batch.input_ids, **batch.layout).logits
                share = token_loss(logits, batch.labels, "sum") / max(num_labelled, 1)
                share.backward()  # type: ignore[no-untyped-call]
                loss_sum += share.detach()
            norm = norm_of([p for p in parameters if p.grad is not None])
            # Waits for the device: weights must not take a bad step.
            loss, grad_norm = loss_sum.item(), norm.item()
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                raise _not_finite(step, loss, grad_norm, dataset, all_rows)
            if config.max_grad_norm > 0:
                clip(optimizer, config.max_grad_norm, norm, fold=config.packing)
            rate = learning_rate_at(step, config.learning_rate, warmup_steps, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()

            # What follows only watches: it changes no weight.
            num_tokens = int(dataset.row_lengths[all_rows].sum())
            progress.after_step(loss, grad_norm, rate, num_tokens)
    model.eval()
    return progress.result()


def _reference_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The gradient's norm as PyTorch computes it, to the bit."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@contextmanager
def _short_ways(model: BertForNER, config: TrainConfig) -> Iterator[None]:
    """The primitives of `kernels` for packed rows; none for padded ones, the reference."""
    if not config.packing:
        yield
        return
    model.stack_projections()
    with (
        kernels.hot_path(config.matmul, model.device, config.dtype),
        kernels.gradient_buffers(model),
    ):
        yield


def _not_finite(
    step: int,
    loss: float,
    grad_norm: float,
    dataset: TokenDataset,
    rows: IntArray,
) -> NotFiniteError:
    sentences = dataset.row_sentences[rows]
    lines = ", ".join(str(line) for line in dataset.sentence_lines[sentences])
    return NotFiniteError(
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, with the "
        f"sentences at {dataset.source}, lines {lines}\n"
        "The step was not taken; checkpoints from before stay. Try a lower learning_rate, more "
        "warmup_steps, or float32, and look at those sentences."
    )


class _Progress:
    """Counts, evaluates and saves after steps; keeps all of that out of the loop.

    Attributes:
        step: Steps done.
        stopped: Whether someone has asked to stop; nothing more is to be done then.
    """

    # Its attributes that are part of a run's state, and their types.
    _COUNTERS: Mapping[str, tuple[type, ...]] = {
        "step": (int,),
        "losses": (float,),
        "tokens": (int,),
        "best": (float, type(None)),
        "best_step": (int, type(None)),
        # Whether what is due after this step (an evaluation, a save) has been done.
        "watched": (bool,),
        "seconds": (float,),
        "seconds_watching": (float,),
    }

    def __init__(
        self,
        config: TrainConfig,
        model: BertForNER,
        optimizer: AdamW,
        num_rows: int,
        evaluation: TokenDataset | None,
        watcher: Watcher | None,
        save: Save | None,
        should_stop: Callable[[], bool],
    ) -> None:
        if config.load_best_model_at_end and evaluation is None:
            raise UsageError("load_best_model_at_end needs validation data to tell the best by")
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.total_steps = config.total_steps(num_rows)
        self.steps_per_epoch = config.steps_per_epoch(num_rows)
        self.dataset = evaluation
        self.watcher = watcher
        self.save = save
        self.should_stop = should_stop
        self.step = 0
        self.losses = 0.0
        self.tokens = 0
        self.best: float | None = None
        self.best_step: int | None = None
        self.watched = True
        self.seconds_watching = 0.0
        self.start = time.perf_counter()
        self.last: Evaluation | None = None
        self.stopped = False

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its being stopped and carried on."""
        return time.perf_counter() - self.start

    def state(self) -> TrainState:
        """Where the run stands."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        counters = {name: getattr(self, name) for name in self._COUNTERS}
        return TrainState(
            step=self.step,
            best_step=self.best_step,
            counters={**counters, "epoch": epoch, "position": position},
            optimizer=named_state(self.optimizer, self.model),
        )

    def carry_on(self, state: TrainState) -> None:
        """Puts the run where it stood, and does what was still due there."""
        try:
            load_named_state(self.optimizer, self.model, state.optimizer)
        except ValueError as error:
            raise CheckpointError(f"cannot be carried on from: {error}") from None
        for name, types in self._COUNTERS.items():
            value = state.counters.get(name)
            if type(value) not in types:
                raise CheckpointError(f"cannot be carried on from: its {name} is {value!r}")
            if name != "seconds":
                setattr(self, name, value)
        self.start -= float(state.counters["seconds"])
        if not 0 <= self.step <= self.total_steps:
            raise CheckpointError(
                f"cannot be carried on from: it is of step {self.step}, the run has "
                f"{self.total_steps} steps"
            )
        began = time.perf_counter()
        self._watch()
        self.seconds_watching += time.perf_counter() - began

    def after_step(self, loss: float, grad_norm: float, rate: float, num_tokens: int) -> None:
        began = time.perf_counter()
        self.step += 1
        self.losses += loss
        self.tokens += num_tokens
        self.watched = False
        if self.watcher is not None:
            self.watcher.stepped(
                StepReport(
                    step=self.step,
                    total_steps=self.total_steps,
                    epoch=self.step / self.steps_per_epoch,
                    loss=loss,
                    grad_norm=grad_norm,
                    learning_rate=rate,
                    num_tokens=num_tokens,
                    tokens_per_second=self.tokens / self._seconds_stepping(),
                )
            )
        self._watch()
        self.seconds_watching += time.perf_counter() - began

    def _watch(self) -> None:
        """Evaluates and saves if it is time; asked to stop, leaves that to who carries on."""
        config = self.config
        try:
            if not self.watched and not self.should_stop():
                if self._due(config.eval_strategy, config.eval_steps):
                    self._evaluate()
                self.watched = True
                save_due = self._due(config.save_strategy, config.save_steps)
                if config.load_best_model_at_end and self.best_step == self.step:
                    save_due = True  # what will be loaded at the end must be on disk
                if self.save is not None and save_due:
                    self._check_finite()
                    self.save(self.state())
        except Stopped:
            pass
        self.stopped = self.should_stop()

    def _seconds_stepping(self) -> float:
        """Time since the start that was not spent on evaluating and saving."""
        return max(self.seconds - self.seconds_watching, 1e-9)

    def _due(self, strategy: str, every: int) -> bool:
        """Whether it is time; the end of a run always is, unless the strategy is "no"."""
        if strategy == "no":
            return False
        if self.step == self.total_steps:
            return True
        return self.step % (self.steps_per_epoch if strategy == "epoch" else every) == 0

    def _evaluate(self) -> None:
        if self.dataset is None:
            return
        self.last = evaluate(
            self.model,
            self.dataset,
            self.config.per_device_eval_batch_size,
            dtype=self.config.dtype,
            packing=self.config.packing,
            batch_tokens=self.config.eval_batch_tokens,
            matmul=self.config.matmul,
            on_batch=self.watcher.evaluating(len(self.dataset)) if self.watcher else None,
            should_stop=self.should_stop,
        )
        name = self.config.metric_for_best_model.removeprefix("eval_")
        value = self.last.metrics()[name]
        better = -value if name == "loss" else value
        is_best = self.best is None or better > self.best
        if is_best:
            self.best, self.best_step = better, self.step
        if self.watcher is not None:
            epoch = self.step / self.steps_per_epoch
            self.watcher.evaluated(self.step, epoch, self.last, is_best)

    def _check_finite(self) -> None:
        """Lets no weight or average that is infinite or NaN leave the run."""
        tensors = {**self.model.state_dict(), **named_state(self.optimizer, self.model)}
        # A sum takes less time than a look at each value; it is finite if all are.
        for name, tensor in tensors.items():
            if not math.isfinite(tensor.sum().item()):
                raise NotFiniteError(
                    f"step {self.step}: {name} is infinite or NaN, and not saved; checkpoints from "
                    "before stay\nTry a lower learning_rate, more warmup_steps, or float32."
                )

    def result(self) -> TrainResult:
        self._check_finite()
        stepping = self._seconds_stepping()
        return TrainResult(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            loss=self.losses / max(self.step, 1),
            runtime=self.seconds,
            steps_per_second=self.step / stepping,
            tokens_per_second=self.tokens / stepping,
            evaluation=self.last,
            best_step=self.best_step,
            state=self.state(),
            stopped=self.stopped,
        )


@torch.inference_mode()
def evaluate(
    model: BertForNER,
    dataset: TokenDataset,
    batch_size: int = 8,
    *,
    dtype: str = "float32",
    packing: bool = True,
    batch_tokens: int = EVAL_TOKENS,
    matmul: str = "auto",
    on_batch: Callable[[int], object] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Scores a model; what is kept of each batch is one label and one loss a token.

    With packed rows the C library keeps freed memory from then on, as with `train`.

    Args:
        model: Its mode (training or evaluation) is left as it was.
        dataset: Labelled rows.
        batch_size: Rows in a padded batch; for packed ones it says only over how many rows
            `loss_batch_mean` averages.
        dtype: "float32" or "bfloat16" arithmetic.
        packing: Compute real tokens only; else pad rows, as the Trainer does.
        batch_tokens: Most tokens in a packed batch.
        matmul: See `TrainConfig.matmul`; for packed rows.
        on_batch: Is told the number of rows of each batch done.
        should_stop: Is asked after each batch.

    Raises:
        Stopped: It was asked to.
    """
    start = time.perf_counter()
    device, was_training = model.device, model.training
    model.eval()
    predicted = np.zeros(len(dataset.input_ids), dtype=np.int16)
    losses = np.zeros(len(dataset.input_ids), dtype=np.float32)
    batches: Iterator[PackedBatch | PaddedBatch] = (
        packed_by_length(dataset, batch_tokens, device)
        if packing
        else padded_by_length(dataset, batch_size, device)
    )
    try:
        with kernels.hot_path(matmul, device, dtype) if packing else nullcontext():
            for batch in batches:
                with autocast(device, dtype):
                    logits = model(batch.input_ids, **batch.layout).logits  # (P, C) or (B, T, C)
                loss = token_loss(logits, batch.labels, "none")
                predicted[batch.token_index] = batch.real(logits.argmax(-1)).cpu().numpy()
                losses[batch.token_index] = batch.real(loss).cpu().numpy()
                if on_batch is not None:
                    on_batch(len(batch.rows))
                if should_stop():
                    raise Stopped
    finally:
        model.train(was_training)

    row_losses = np.add.reduceat(losses, dataset.row_starts[:-1], dtype=np.float64)
    scored = dataset.labels != IGNORE_INDEX
    label_set = dataset.label_set
    word_predictions = dataset.decide_words(predicted, label_set.outside)
    return Evaluation(
        loss=float(row_losses.sum() / max(dataset.row_num_labelled.sum(), 1)),
        loss_batch_mean=_mean_of_batch_means(row_losses, dataset.row_num_labelled, batch_size),
        subword=score_entities(
            predicted[scored], dataset.labels[scored], dataset.labelled_row_starts, label_set
        ),
        word=score_entities(
            word_predictions, dataset.word_labels, dataset.sentence_starts[:-1], label_set
        ),
        word_predictions=word_predictions,
        runtime=time.perf_counter() - start,
        num_rows=len(dataset),
    )


def _mean_of_batch_means(
    row_losses: np.ndarray[Any, Any], row_counts: IntArray, batch_size: int
) -> float:
    starts = np.arange(0, len(row_losses), batch_size)
    means = np.add.reduceat(row_losses, starts) / np.maximum(np.add.reduceat(row_counts, starts), 1)
    return float(np.average(means, weights=np.diff(np.append(starts, len(row_losses)))))
