"""The training loop, in the open.

A step is: zero the gradients, run each micro-batch forward and backward, clip, set the rate, step.
What a step does is a pure function of the seed and the step's number: the order of the data
(`batches.epoch_order`), the dropout (`dropout_seed`) and the rate (`learning_rate_at`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from bertner import kernels
from bertner.batches import PackedBatch, Schedule, collate, pack
from bertner.config import TrainConfig
from bertner.data import NumberArray, TokenDataset
from bertner.distributed import ALONE, Ranks
from bertner.errors import NotFiniteError, UsageError
from bertner.evaluation import Evaluation, evaluate
from bertner.graphs import Batches, StepGraphs, side_stream, why_no_graphs
from bertner.labels import IntArray
from bertner.model import BertForNER, autocast, token_loss
from bertner.optimizer import build_optimizer, clip, gradient_norm, sum_gradients
from bertner.progress import (
    InFlight,
    Progress,
    Save,
    StepReport,
    TrainResult,
    TrainState,
    Watcher,
)

# What goes in and out of `train`, from one place.
__all__ = [
    "Evaluation",
    "Save",
    "StepReport",
    "TrainResult",
    "TrainState",
    "Watcher",
    "class_weights",
    "dropout_seed",
    "evaluate",
    "learning_rate_at",
    "train",
]


def learning_rate_at(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Rate of a step (from 0): linear warmup to `peak`, then linear decay to zero."""
    if step < warmup_steps:
        return peak * (step / max(1, warmup_steps))
    return peak * max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def dropout_seed(seed: int, step: int, micro_batch: int) -> int:
    """Seed of the dropout of one micro-batch: the same however the run got there.

    Args:
        seed: Of the run.
        step: From 0.
        micro_batch: Number in the step, from 0, those of all ranks counted; or a row.
    """
    state = np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)
    return int(state[0]) >> 1  # torch takes 63 bits on every device


def class_weights(dataset: TokenDataset, scheme: str) -> dict[str, float]:
    """Weights of the labels in the training loss; their mean over the labelled tokens is 1.

    Args:
        dataset: Training rows.
        scheme: "balanced": in inverse proportion to how many tokens carry a label; "sqrt": to the
            square root of that; "none".

    Returns:
        For each label in order its weight, zero if no token carries it; empty for "none".
    """
    if scheme == "none":
        return {}
    counts = dataset.label_counts
    power = {"balanced": 1.0, "sqrt": 0.5}[scheme]
    weights = np.where(counts > 0, np.maximum(counts, 1.0) ** -power, 0.0)
    weights *= counts.sum() / max(counts @ weights, 1.0)
    return dict(zip(dataset.label_set.names, weights.tolist(), strict=True))


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
    ranks: Ranks = ALONE,
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
        ranks: Several train together (see `distributed.join`): each has the same model, data and
            settings, and computes its share of every step. `save` is called on the first alone.

    Raises:
        NotFiniteError: Loss or gradient norm is infinite or NaN; the step that it came up in is not
            taken. Or a weight is, when it was to be saved.
        CheckpointError: `state` is not one of such a run.
    """
    device = model.device
    if config.dropout_by_row and device.type != "cpu":
        raise UsageError(f"dropout_by_row is for packed rows on a CPU, not on {device.type}")
    model.config = replace(model.config, reading=dataset.reading)  # goes where the weights go
    parameters = list(model.parameters())
    optimizer = build_optimizer(model, config)
    schedule = Schedule(dataset.row_lengths, config, ranks.world_size)
    total_steps, warmup_steps = schedule.total_steps, schedule.warmup_steps
    progress = Progress(
        config, model, optimizer, schedule, evaluation, watcher, save, should_stop, ranks
    )
    if state is not None:
        progress.carry_on(state)
    model.train()
    smoothing = config.label_smoothing_factor
    label_weights, row_weights = _weights(dataset, config.class_weights, device)
    make_batch, norm_of = (pack, gradient_norm) if config.packing else (collate, _reference_norm)
    in_flight: InFlight[tuple[int, float, IntArray]] = InFlight(device)

    def compute(batches: Batches, weight: Tensor | float) -> Tensor:
        """Forward and backward: this rank's gradients, and its part of the step's loss."""
        optimizer.zero_grad()
        loss_sum = torch.zeros((), device=device)
        for batch, seed in batches:
            if seed is not None:
                kernels.seed_dropout(seed, device)
            with autocast(device, config.dtype):
                logits = model(batch.input_ids, **batch.layout).logits
            share = token_loss(logits, batch.labels, "sum", smoothing, label_weights) / weight
            share.backward()  # type: ignore[no-untyped-call]
            loss_sum += share.detach()
        return loss_sum

    def update(loss_sum: Tensor, rate: Tensor | float) -> Tensor:
        """The sums over all ranks, and the step; loss and gradient norm, (2,)."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        sum_gradients(trained, ranks, loss_sum)
        norm = norm_of([parameter for parameter in trained if parameter.grad is not None])
        # Without waiting for the device, which must not take a bad step.
        optimizer.halt_unless_finite(loss_sum, norm)
        if config.max_grad_norm > 0:
            clip(optimizer, config.max_grad_norm, norm, fold=config.packing)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        return torch.stack([loss_sum, norm])

    def micro_batches_of(step: int, micro_batches: Sequence[IntArray]) -> Batches:
        """This rank's micro-batches of a step, each with the seed of its dropout."""
        for k, rows in enumerate(schedule.share(micro_batches, ranks.rank)):
            if len(rows) == 0:
                continue  # fewer are left at the end of an epoch than there are ranks
            batch = make_batch(dataset, rows, device)
            if config.dropout_by_row and isinstance(batch, PackedBatch):
                seeds = [dropout_seed(config.seed, step, row) for row in batch.rows]
                batch = replace(batch, dropout_seeds=seeds)
            number = k * ranks.world_size + ranks.rank
            yield batch, dropout_seed(config.seed, step, number)

    def land(wait: bool) -> None:
        """Sees to the steps whose results are there."""
        for (loss, norm), (step, rate, rows) in in_flight.landed(wait):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise _not_finite(step, loss, norm, dataset, rows)
            # What follows only watches: it changes no weight.
            progress.after_step(loss, norm, rate, int(dataset.row_lengths[rows].sum()))

    with (
        kernels.on_device(device, tf32=config.tf32, deterministic=config.deterministic),
        _frozen(model, config),
        _short_ways(model, config),
        side_stream(device),
    ):
        graphs = None
        if why_no_graphs(config, model) is None:
            graphs = StepGraphs(compute, update, parameters, dataset, device, ranks)
        for step, micro_batches in schedule.steps_from(progress.step):
            if step == total_steps or progress.finished or progress.stopped:
                break
            all_rows = np.concatenate(micro_batches)
            weight = row_weights[all_rows].sum().item() or 1  # of the whole step's labelled tokens
            rate = learning_rate_at(step, config.learning_rate, warmup_steps, total_steps)
            if graphs is None:
                result = update(compute(micro_batches_of(step, micro_batches), weight), rate)
            else:
                (rows,) = schedule.share(micro_batches, ranks.rank)
                seed = dropout_seed(config.seed, step, ranks.rank)
                result = graphs.step(rows, seed, weight, rate)
            in_flight.launched(result, (step, rate, all_rows))
            land(progress.is_due_after(step + 1))
        land(True)
    optimizer.zero_grad()  # a graph's memory would stay with it
    model.eval()
    return progress.result()


def _weights(
    dataset: TokenDataset, scheme: str, device: torch.device
) -> tuple[Tensor | None, NumberArray]:
    """Weights of labels, (C,), and their sums over each row, (num_rows,); without any, counts."""
    weights = np.array(list(class_weights(dataset, scheme).values()))
    if not len(weights):
        return None, dataset.row_num_labelled
    return torch.tensor(weights, dtype=torch.float32, device=device), dataset.row_sums(weights)


def _reference_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The gradient's norm as PyTorch computes it, to the bit."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@contextmanager
def _frozen(model: BertForNER, config: TrainConfig) -> Iterator[None]:
    """Keeps what is not to be trained out of backward; without a gradient no step changes it."""
    frozen = list(model.bert.embeddings.parameters()) if config.freeze_embeddings else []
    before = [parameter.requires_grad for parameter in frozen]
    for parameter in frozen:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter, required in zip(frozen, before, strict=True):
            parameter.requires_grad = required


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
    sentences = dataset.rows.sentences[rows]
    lines = ", ".join(str(line) for line in dataset.sentence_lines[sentences])
    return NotFiniteError(
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}, with the "
        f"rows that begin at {dataset.source}, lines {lines}\n"
        "The step was not taken; checkpoints from before stay. Try a lower learning_rate, more "
        "warmup_steps, or float32, and look at those rows."
    )
