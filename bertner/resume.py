"""How a run begins: anew, or where it was when it was interrupted."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bertner.checkpoint import Checkpoint, load_checkpoint, load_newest
from bertner.config import TrainConfig
from bertner.distributed import Ranks
from bertner.errors import CheckpointError, OutputDirectoryError, ResumeMismatchError
from bertner.hub import is_commit
from bertner.kernels import Products, keep_products
from bertner.model import BertForNER
from bertner.output_dir import find_run, is_of_seeds
from bertner.progress import TrainState
from bertner.record import differences, part_of

logger = logging.getLogger("bertner")


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        record: Of the run that is to be carried on; None for a new one.
        checkpoint: Where that run stood; None for the first step.
        finished: Whether that run is finished.
        replaces: Whether the output directory is to be emptied first.
    """

    record: Mapping[str, Any] | None = None
    checkpoint: Checkpoint | None = None
    finished: bool = False
    replaces: bool = False

    def commit_of(self, config: TrainConfig) -> str | None:
        """The Hub's commit of the model that the run began with, if the same one is named now."""
        model, then = (part_of(self.record or {}, name) for name in ("model", "config"))
        names = ("model_name_or_path", "model_revision")
        commit = model.get("commit")
        is_same = all(then.get(name) == getattr(config, name) for name in names)
        return commit if is_same and isinstance(commit, str) and is_commit(commit) else None


def find_start(config: TrainConfig, output_dir: Path) -> Start:
    """Looks for what there is to carry on; for who holds the directory's lock.

    With `overwrite_output_dir` the run that is there is replaced, unless it began with just that
    and was interrupted: the same command then carries it on, like any other.

    Raises:
        OutputDirectoryError: The directory holds something else.
        CheckpointError: The checkpoint that is named, or each one that is there, is damaged.
    """
    record = find_run(output_dir)
    overwrite = config.overwrite_output_dir
    if record is not None and is_of_seeds(record) != (config.seeds > 1):
        if overwrite and config.resume_from_checkpoint is None:
            return Start(replaces=True)
        kind = (
            "several seeds: give --seeds too"
            if is_of_seeds(record)
            else "one seed: leave out --seeds"
        )
        raise OutputDirectoryError(
            f"{output_dir} holds a run of {kind}, choose another --output_dir, or replace that run "
            "with --overwrite_output_dir"
        )
    if config.resume_from_checkpoint is not None:
        checkpoint = load_checkpoint(Path(config.resume_from_checkpoint))
        is_inside = checkpoint.folder.resolve().parent == output_dir.resolve()
        if record is not None and not is_inside and not overwrite:
            raise OutputDirectoryError(
                f"{output_dir} holds a run, and {checkpoint.folder} is not of it; choose another "
                "--output_dir, or replace that run with --overwrite_output_dir"
            )
        replaces = record is not None and not is_inside
        return Start(record_of(checkpoint), checkpoint, replaces=replaces)
    if record is None:
        return Start()
    finished = "finished" in record
    if overwrite and (finished or not _began_with_overwriting(record)):
        return Start(replaces=True)
    if finished and part_of(record, "config").get("seeds", 1) == config.seeds:
        return Start(record, finished=True)
    try:
        newest = load_newest(output_dir)
    except CheckpointError:
        if overwrite:
            return Start(replaces=True)
        raise
    return Start(record, None) if newest is None else Start(record_of(newest), newest)


def _began_with_overwriting(record: Mapping[str, Any]) -> bool:
    return not record or bool(part_of(record, "config").get("overwrite_output_dir"))


def record_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The record of the run that a checkpoint is of.

    Raises:
        CheckpointError: There is none.
    """
    record = checkpoint.state.get("run")
    if not isinstance(record, dict):
        raise CheckpointError(f"{checkpoint.folder}: damaged: says nothing of its run")
    return record


def keep_choices(
    start: Start, config: TrainConfig, device: torch.device, machine: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Lets a run that is carried on multiply as it began, where it still can, while it is open.

    Which library is the fastest is measured, and so may come out otherwise the next time.

    Args:
        start: As found.
        config: Settings of now.
        device: Of the run.
        machine: See `record.machine_facts`.
    """
    record = start.record or {}
    products = part_of(record, "products")
    library, emulates = products.get("library"), products.get("emulates_bfloat16")
    if (
        record.get("machine") != machine
        or part_of(record, "config").get("matmul") != config.matmul
        or library not in ("default", "onednn")
        or not isinstance(emulates, bool)
    ):
        return nullcontext()
    matmul = config.matmul if config.packing else "default"
    kept = Products(library, emulates, "as this run began")
    return keep_products(matmul, device, config.dtype, kept)


def settle_start(start: Start, config: TrainConfig, record: dict[str, Any]) -> Start:
    """Compares the run that was with what is to be done now, and enters it into the new record.

    Args:
        start: As found.
        config: Settings of now.
        record: `record.run_record` of now; is added to.

    Raises:
        ResumeMismatchError: It would not be the same run.
        OutputDirectoryError: Another run is finished there.
    """
    if start.record is None:
        return start
    found = differences(start.record, record)
    if start.finished:
        if not found.task:
            return start
        raise OutputDirectoryError(
            f"{config.output_dir} holds another run, which is finished ({_few(found.task)}); "
            "choose another --output_dir, or replace that run with --overwrite_output_dir"
        )
    if found.task and config.overwrite_output_dir and config.resume_from_checkpoint is None:
        return Start(replaces=True)
    where = config.output_dir if start.checkpoint is None else start.checkpoint.folder
    if found and not config.allow_inexact_resume:
        raise ResumeMismatchError(
            f"{where} is of a run that was not this one: {found}\n"
            "Carry on all the same, which is recorded, with --allow_inexact_resume; or choose "
            "another --output_dir, or start over with --overwrite_output_dir."
        )
    if start.checkpoint is None:
        return start
    if found:
        logger.warning("carrying on, but not as the same run: %s", found)
    before = start.record.get("resumes", [])
    if not _are_resumes(before):
        raise CheckpointError(f"{where}: damaged: its list of resumes is none")
    record["started"] = start.record.get("started", record["started"])
    record["resumes"] = [
        *before,
        {
            "step": start.checkpoint.step,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "differences": [*found.task, *found.machine],
        },
    ]
    return start


def _are_resumes(values: object) -> bool:
    """Whether this is what `run_record` says of how a run was carried on."""
    return isinstance(values, list) and all(
        isinstance(value, dict)
        and isinstance(value.get("step"), int)
        and isinstance(value.get("differences"), list)
        and all(isinstance(text, str) for text in value["differences"])
        for value in values
    )


def _few(items: list[str]) -> str:
    return "; ".join(items[:3]) + ("; ..." if len(items) > 3 else "")


def state_of(checkpoint: Checkpoint) -> TrainState:
    """What `loop.train` needs, besides the weights, to carry on from a checkpoint.

    Raises:
        CheckpointError: The state is not one that this release reads.
    """
    counters = checkpoint.state.get("counters")
    if not isinstance(counters, dict) or counters.get("step") != checkpoint.step:
        raise CheckpointError(f"{checkpoint.folder}: damaged: its counters are not of its step")
    for name, value in counters.items():
        # None of them can become that large, and no float could hold it.
        if isinstance(value, int) and not 0 <= value < 1 << 63:
            raise CheckpointError(f"{checkpoint.folder}: damaged: its {name} is {value}")
    return TrainState(
        step=checkpoint.step,
        best_step=counters.get("best_step"),
        counters=counters,
        optimizer=checkpoint.optimizer,
    )


def share_state(state: TrainState | None, model: BertForNER, ranks: Ranks) -> TrainState | None:
    """Gives all ranks the weights and the state that the first one has read; None for no state."""
    if ranks.world_size == 1:
        return state
    read = None
    if state is not None:
        kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in state.optimizer.items()}
        read = (state.step, state.best_step, dict(state.counters), kinds)
    shared = ranks.share(read)
    if shared is None:
        return None
    ranks.broadcast(list(model.state_dict().values()))
    step, best_step, counters, kinds = shared
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in kinds.items()}
    if state is not None:
        tensors = {name: state.optimizer[name] for name in kinds}
    ranks.broadcast(list(tensors.values()))
    return TrainState(step, best_step, counters, tensors)


@contextmanager
def naming(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Puts the folder in front of what the loop and the report find wrong with its state."""
    try:
        yield
    except CheckpointError as error:
        if checkpoint is None or not str(error).startswith("cannot be carried on from"):
            raise
        raise CheckpointError(f"{checkpoint.folder} {error}") from None


def load_weights(weights: Mapping[str, Tensor], model: nn.Module, folder: Path) -> None:
    """Copies weights into a model; names, shapes and types are compared before.

    Raises:
        ResumeMismatchError: They are not the model's.
    """
    state = model.state_dict()
    kinds = [
        {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        for tensors in (weights, state)
    ]
    if kinds[0] != kinds[1]:
        names = sorted({name for name, _ in kinds[0].items() ^ kinds[1].items()})
        raise ResumeMismatchError(
            f"{folder} has the weights of another model: {_few(names)} differ\n"
            "Choose another --output_dir, or start over with --overwrite_output_dir."
        )
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(weights[name])
