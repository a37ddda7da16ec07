"""What is counted, evaluated and saved beside training; where a run stands, to carry it on."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from bertner.batches import Schedule
from bertner.config import TrainConfig
from bertner.data import TokenDataset
from bertner.distributed import Ranks
from bertner.errors import CheckpointError, NotFiniteError, UsageError
from bertner.evaluation import Evaluation, Stopped, evaluate
from bertner.kernels import is_queued
from bertner.model import BertForNER
from bertner.optimizer import AdamW, load_named_state, named_state


@dataclass(frozen=True)
class StepReport:
    """One optimizer step that is done.

    Attributes:
        step: Steps done, this one included.
        total_steps: Steps of the whole run.
        epoch: Passes over the data done, a fraction.
        loss: Mean over the labelled tokens of the step, smoothed and weighted as the settings say.
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


@dataclass(frozen=True)
class TrainResult:
    """What `train` did.

    Attributes:
        step: Optimizer steps done.
        total_steps: Those that were planned.
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
    total_steps: int
    epoch: float
    loss: float
    runtime: float
    steps_per_second: float
    tokens_per_second: float
    evaluation: Evaluation | None
    best_step: int | None
    state: TrainState
    stopped: bool

    @property
    def stopped_early(self) -> bool:
        """Whether `early_stopping_patience` was at an end before the steps were."""
        return not self.stopped and self.step < self.total_steps


class Watcher(Protocol):
    """What may look at a run; nothing that it does changes what is trained."""

    def stepped(self, report: StepReport) -> None:
        """A step is done."""

    def evaluating(self, num_rows: int) -> Callable[[int], None]:
        """An evaluation begins; the returned function is told of every batch's rows."""

    def evaluated(self, step: int, epoch: float, evaluation: Evaluation, is_best: bool) -> None:
        """An evaluation after a step is done."""


# Saves the model and the state after a step; of several ranks, on the first one.
Save = Callable[[TrainState], None]


T = TypeVar("T")


class InFlight(Generic[T]):
    """Steps that a device has been given, and whose results the host has not read yet.

    A step's loss is needed to log it, not to take the next step. So on a device with a queue the
    host runs a few steps ahead: the device never waits for it.

    Args:
        device: Where the results are.
        most: Steps that the host runs ahead, at most.
    """

    def __init__(self, device: torch.device, most: int = 4) -> None:
        self._most = most if is_queued(device) else 0
        self._queue: deque[tuple[Tensor, torch.cuda.Event | None, T]] = deque()

    def launched(self, result: Tensor, facts: T) -> None:
        """Takes in a step's result, which is still being computed."""
        event = None
        if result.device.type == "cuda":
            copy = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
            result = copy.copy_(result, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        else:
            result = result.clone()  # what it is in may be used again
        self._queue.append((result, event, facts))

    def landed(self, wait: bool) -> Iterator[tuple[list[float], T]]:
        """Yields the results of steps, in order.

        Args:
            wait: For all that there are; else for those alone that are too many steps behind.
        """
        while len(self._queue) > (0 if wait else self._most):
            result, event, facts = self._queue.popleft()
            if event is not None:
                event.synchronize()
            yield result.tolist(), facts


class Progress:
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
        "metric": (str,),
        "best": (float, type(None)),
        "best_step": (int, type(None)),
        # Evaluations in a row without an improvement that counts.
        "early_stopping_patience_counter": (int,),
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
        schedule: Schedule,
        evaluation: TokenDataset | None,
        watcher: Watcher | None,
        save: Save | None,
        should_stop: Callable[[], bool],
        ranks: Ranks,
    ) -> None:
        for name in ("load_best_model_at_end", "early_stopping_patience"):
            if getattr(config, name) and evaluation is None:
                raise UsageError(f"{name} needs validation data: give train its evaluation rows")
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.total_steps = schedule.total_steps
        self.steps_per_epoch = schedule.steps_per_epoch
        self.dataset = evaluation
        self.watcher = watcher
        self.save = save
        self.should_stop = should_stop
        self.ranks = ranks
        self.saves = ranks.any(save is not None)
        self.step = 0
        self.losses = 0.0
        self.tokens = 0
        self.metric = config.metric_for_best_model.removeprefix("eval_")
        self.best: float | None = None
        self.best_step: int | None = None
        self.early_stopping_patience_counter = 0
        self.watched = True
        self.seconds_watching = 0.0
        self.start = time.perf_counter()
        self.last: Evaluation | None = None
        self.stopped = False

    @property
    def seconds(self) -> float:
        """Since the run began, without the time between its being stopped and carried on."""
        return time.perf_counter() - self.start

    @property
    def finished(self) -> bool:
        """Whether no step is left to be done: the last one was, or it is time to stop early."""
        patience = self.config.early_stopping_patience
        stops_early = patience is not None and self.early_stopping_patience_counter >= patience
        return stops_early or self.step == self.total_steps

    def is_due_after(self, step: int) -> bool:
        """Whether more than counting is due once so many steps are done."""
        config = self.config
        return step == self.total_steps or any(
            self._is_time(step, strategy, every)
            for strategy, every in (
                (config.eval_strategy, config.eval_steps),
                (config.save_strategy, config.save_steps),
            )
        )

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
            if name not in ("seconds", "metric"):
                setattr(self, name, value)
        self.start -= float(state.counters["seconds"])
        if state.counters["metric"] != self.metric:  # what was best by the other one says nothing
            self.best = self.best_step = None
            self.early_stopping_patience_counter = 0
        if not 0 <= self.step <= self.total_steps:
            raise CheckpointError(
                f"cannot be carried on from: it is of step {self.step}, the run has "
                f"{self.total_steps} steps"
            )
        began = time.perf_counter()
        self._watch()
        self.seconds_watching += time.perf_counter() - began

    def after_step(self, loss: float, grad_norm: float, rate: float, num_tokens: int) -> None:
        """Counts a step, and does what is due after it."""
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
            if not self.watched and not self._asked_to_stop():
                if self._due(config.eval_strategy, config.eval_steps):
                    self._evaluate()
                self.watched = True
                save_due = self._due(config.save_strategy, config.save_steps)
                if config.load_best_model_at_end and self.best_step == self.step:
                    save_due = True  # what will be loaded at the end must be on disk
                if self.saves and save_due:
                    self._check_finite()
                    self.ranks.lead(self._save)
        except Stopped:
            pass
        self.stopped = self._asked_to_stop()

    def _save(self) -> None:
        if self.save is not None:
            self.save(self.state())

    def _asked_to_stop(self) -> bool:
        """Whether any rank is asked to: they do the same steps, and stop after the same one."""
        return self.ranks.any(self.should_stop())

    def _seconds_stepping(self) -> float:
        """Time since the start that was not spent on evaluating and saving."""
        return max(self.seconds - self.seconds_watching, 1e-9)

    def _due(self, strategy: str, every: int) -> bool:
        """Whether it is time; the end of a run always is, unless the strategy is "no"."""
        if strategy == "no":
            return False
        return self.finished or self._is_time(self.step, strategy, every)

    def _is_time(self, step: int, strategy: str, every: int) -> bool:
        """Whether a strategy says so of a step, be it the last one or not."""
        every = self.steps_per_epoch if strategy == "epoch" else every
        return strategy != "no" and step % every == 0

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
            ranks=self.ranks,
        )
        value = self.last.metrics()[self.metric]
        better = -value if self.metric == "loss" else value
        is_best = self.best is None or better > self.best
        threshold = self.config.early_stopping_threshold
        if self.best is None or better - self.best > threshold:
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1
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
        """Sums the run up; what it leaves is finite."""
        self._check_finite()
        stepping = self._seconds_stepping()
        return TrainResult(
            step=self.step,
            total_steps=self.total_steps,
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
