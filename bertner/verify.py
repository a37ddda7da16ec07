"""`bertner-train --verify`: are checkpoints as they were written, and do steps come out again?"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bertner.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from bertner.config import TrainConfig
from bertner.errors import CheckpointError, ResumeMismatchError, UsageError
from bertner.evaluation import Evaluation
from bertner.loop import train
from bertner.output_dir import list_seeds
from bertner.parts import Parts, build_parts, find_device
from bertner.progress import StepReport, TrainState
from bertner.record import differences, machine_facts, part_of, run_record
from bertner.report import progress_bar, say
from bertner.resume import Start, keep_choices, load_weights, naming, record_of, state_of

logger = logging.getLogger("bertner")


def run_verification(directory: str) -> None:
    """Checks every checkpoint of a run, then does the steps between two of them again.

    Of two neighbours the nearest are taken: from the first, the steps must end in the weights and
    the optimizer state of the second, to the bit. Nothing is written.

    Args:
        directory: Output directory of a run.

    Raises:
        CheckpointError: A checkpoint is damaged, or there is none.
        ResumeMismatchError: The steps cannot be done again exactly, here and now; or they come out
            otherwise.
    """
    folders = [folder for _, folder in list_checkpoints(Path(directory))]
    if not folders:
        seeds = [str(folder) for _, folder in list_seeds(Path(directory))]
        fix = f"one of {', '.join(seeds)}" if seeds else "a run's output directory"
        raise CheckpointError(f"{directory}: holds no checkpoint; give {fix}")
    sound, damaged = [], []
    for folder in folders:
        try:
            sound.append(load_checkpoint(folder))
            say(f"{folder}: sound")
        except CheckpointError as error:
            if folder.exists():  # or a run that is going on has just removed it
                damaged.append(folder.name)
                logger.error("%s", error)
    pairs = [pair for pair in pairwise(sound) if not _changed_between(*pair)]
    world_size = part_of(record_of(sound[-1]), "machine").get("world_size", 1) if sound else 1
    if world_size != 1:
        say("A run of several processes: its steps are not done again.")
    elif pairs:
        _replay(*min(pairs, key=lambda pair: pair[1].step - pair[0].step))
    else:
        say("No two checkpoints of one unchanged run: there are no steps to do again.")
    if damaged:
        raise CheckpointError(f"{directory}: damaged: {', '.join(damaged)}")


def _changed_between(first: Checkpoint, second: Checkpoint) -> bool:
    """Whether the run was carried on with differences after the first."""
    resumes = record_of(second).get("resumes")
    try:
        return any(r["differences"] and r["step"] >= first.step for r in resumes or [])
    except (TypeError, LookupError):
        return True


def _replay(first: Checkpoint, second: Checkpoint) -> None:
    record = record_of(second)
    try:
        config = TrainConfig.from_dict(record["config"])
    except (LookupError, TypeError, UsageError) as error:
        raise CheckpointError(f"{second.folder}: its settings are none: {error}") from None
    for path in filter(None, (config.train_file, config.validation_file, config.test_file)):
        if not Path(path).is_file():  # of a pipe there is nothing left, or it never ends
            raise ResumeMismatchError(
                f"{first.folder}: the steps after it cannot be done again: {path} is no file\n"
                "The checkpoints themselves are sound; put the data of the run back there."
            )
    num_steps = second.step - first.step
    start = Start(record)
    device = find_device(config.device)
    machine = machine_facts(device)
    with keep_choices(start, config, device, machine), naming(first):
        parts = build_parts(config, start.commit_of(config))
        if found := differences(record, run_record(config, "", parts, machine)):
            raise ResumeMismatchError(
                f"{first.folder}: the steps after it cannot be done again exactly: {found}\n"
                "The checkpoints themselves are sound; verify on a machine like that of the run."
            )
        load_weights(first.weights, parts.model, first.folder)
        state = _take_steps(config, parts, state_of(first), num_steps)
    other = [
        *_other_names(parts.model.state_dict(), second.weights),
        *_other_names(state.optimizer, second.optimizer),
    ]
    if other:
        raise ResumeMismatchError(
            f"{second.folder}: the {num_steps} steps after {first.folder.name} come out otherwise: "
            f"{len(other)} tensors differ, such as {other[0]}\n"
            "Either something that bertner does not know of has changed, or memory or disk err."
        )
    say(f"The {num_steps} steps from {first.folder.name} to {second.folder.name}: same bits.")


def _take_steps(config: TrainConfig, parts: Parts, state: TrainState, num_steps: int) -> TrainState:
    """Does a number of steps again, and nothing but steps."""
    logger.info("doing %d steps again after step %d", num_steps, state.step)
    with progress_bar(num_steps, " step", "replay", show=True) as bar:
        watcher = _Counter(bar.update)
        steps_alone = dataclasses.replace(
            config,
            eval_strategy="no",
            load_best_model_at_end=False,
            early_stopping_patience=None,
            early_stopping_threshold=0.0,
        )
        return train(
            parts.model,
            parts.datasets["train"],
            steps_alone,
            watcher=watcher,
            state=state,
            should_stop=lambda: watcher.num_steps >= num_steps,
        ).state


def _other_names(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    names = sorted({*found, *wanted})
    return [n for n in names if n not in found or n not in wanted or not _same(found[n], wanted[n])]


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit: zeros of either sign differ, and NaN is equal to itself."""
    bits = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


class _Counter:
    """Counts steps; a `progress.Watcher`."""

    def __init__(self, on_step: Callable[[int], Any]) -> None:
        self.num_steps = 0
        self.on_step = on_step

    def stepped(self, report: StepReport) -> None:
        self.num_steps += 1
        self.on_step(1)

    def evaluating(self, num_rows: int) -> Callable[[int], None]:
        raise AssertionError("nothing is evaluated")

    def evaluated(self, step: int, epoch: float, evaluation: Evaluation, is_best: bool) -> None:
        raise AssertionError("nothing is evaluated")
