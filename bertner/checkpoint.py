"""The checkpoints of a run: folders that are whole or not there, and checked before they are read.

A checkpoint is a complete model folder and the training state beside it: no pickle anywhere. Its
manifest has the size and the SHA-256 of every file and is written last. The folder gets its name
when all of it has come to the disk, and only then are older ones removed: so whenever a process or
a machine stops, what is found next is the old checkpoint or the new one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bertner import files
from bertner.errors import CheckpointError, ModelError, StorageError
from bertner.files import UnsafeFileError, write_json
from bertner.weights import TensorFile, tensor_chunks

logger = logging.getLogger("bertner")

MANIFEST = "manifest.json"
STATE = "training_state.json"
OPTIMIZER = "optimizer.safetensors"
METRICS = "metrics.jsonl"
WEIGHTS = "model.safetensors"

# All that a manifest names, and all that is ever read of a checkpoint.
CHECKPOINT_FILES = (
    "config.json",
    WEIGHTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    OPTIMIZER,
    STATE,
    METRICS,
)

_FORMAT = 1  # of the training state; another one is not read
_MAX_MANIFEST_BYTES = 1 << 16
_MAX_STATE_BYTES = 1 << 24  # it grows with the number of evaluations: enough for 100,000
_MAX_METRICS_BYTES = 1 << 28  # it is held in memory

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
# What is being written, and what is being removed; neither is ever read.
LEFTOVERS = (".staging-checkpoint-*", ".removed-checkpoint-*")


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run as (step, folder), oldest first.

    Raises:
        OSError: The folder is there, but cannot be read: not the same as that there are none.
    """
    try:
        paths = list(output_dir.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for folder in paths:
        match = _NAME.fullmatch(folder.name)
        if match and folder.is_dir() and not folder.is_symlink():
            found.append((int(match[1]), folder))
    return sorted(found)


def save_checkpoint(
    output_dir: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    num_bytes: int = 0,
    keep: int | None = None,
    best_step: int | None = None,
) -> Path:
    """Makes `checkpoint-<step>`, then removes those that are no longer to be kept.

    Args:
        output_dir: The run's folder.
        step: Optimizer steps done.
        write: Makes the files in the folder that it is given (see `write_state`); what it makes
            must have come to the disk when it returns.
        num_bytes: About how much it will write.
        keep: How many of the newest checkpoints stay; None for all.
        best_step: A checkpoint that stays in any case.

    Raises:
        StorageError: The disk is full or fails; the newest checkpoint from before is still there,
            or this one is.
    """
    final = output_dir / f"checkpoint-{step}"
    staging = output_dir / f".staging-{final.name}"
    check_free_space(output_dir, num_bytes, final.name)
    problem = "cannot be written"
    try:
        try:
            files.remove(staging)
            files.make_new_folder(staging)
            write(staging)
            _write_manifest(staging, step)
            files.sync_folder(staging)
            if os.path.lexists(final):  # damaged, or of steps that are being done again
                remove_checkpoint(final)
            files.move(staging, final)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what is to be told
                files.remove(staging)
            raise
        problem = "is saved, but what is no longer to be kept cannot be removed"
        _prune(output_dir, step, keep, best_step)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{final}: {problem}: {error.strerror or error}") from error
    return final


def copy_checkpoint(folder: Path, output_dir: Path) -> None:
    """Makes the same checkpoint, which is verified, in another run's folder.

    Raises:
        StorageError: The disk is full or fails.
    """

    def write(copy: Path) -> None:
        for name in CHECKPOINT_FILES:
            with files.open_regular(folder / name, links=False) as descriptor:
                files.write_file(copy / name, iter(lambda: os.read(descriptor, 1 << 20), b""))

    num_bytes = sum((folder / name).stat().st_size for name in CHECKPOINT_FILES)
    step = int(folder.name.rpartition("-")[2])
    save_checkpoint(output_dir, step, write, num_bytes=num_bytes)


def check_free_space(output_dir: Path, num_bytes: int, name: str) -> None:
    """Raises StorageError if a checkpoint would not fit on the disk."""
    free = files.free_bytes(output_dir)
    if free < num_bytes:
        raise StorageError(
            f"{output_dir}: {name} needs {_in_megabytes(num_bytes)}, but only "
            f"{_in_megabytes(free)} are free there; make room, or lower --save_total_limit"
        )


def _in_megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _prune(output_dir: Path, step: int, keep: int | None, best_step: int | None) -> None:
    """Removes all but the newest; the one just written, of `step`, counts as the newest.

    Later steps are from before the run went back to an earlier checkpoint, and now are history.
    """
    checkpoints = list_checkpoints(output_dir)
    newest = [old for old, _ in checkpoints if old <= step]
    kept = {*(newest if keep is None else newest[-keep:]), best_step}
    for old_step, folder in checkpoints:
        if old_step > step:
            logger.warning("%s is removed: the run went back and did other steps", folder)
        if old_step > step or old_step not in kept:
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Takes the name away first, so that a half removed checkpoint is not taken for one.

    Raises:
        OSError: The disk fails.
    """
    removed = folder.with_name(f".removed-{folder.name}")
    files.remove(removed)
    files.move(folder, removed)
    files.remove(removed)


def remove_leftovers(output_dir: Path) -> None:
    """Removes what a killed process was writing or removing; for who holds the folder's lock."""
    for pattern in LEFTOVERS:
        for path in output_dir.glob(pattern):
            files.remove(path)


def write_state(
    folder: Path, state: Mapping[str, Any], optimizer: Mapping[str, Tensor], metrics: bytes
) -> None:
    """Writes what a checkpoint has besides the model: for `save_checkpoint`.

    Args:
        folder: The one that is being made.
        state: JSON values.
        optimizer: Tensors by name.
        metrics: The run's log so far.
    """
    files.write_file(folder / OPTIMIZER, tensor_chunks(optimizer))
    files.write_file(folder / METRICS, [metrics])
    write_json(folder / STATE, {"format": _FORMAT, **state, "metrics_bytes": len(metrics)})


def _write_manifest(folder: Path, step: int) -> None:
    entries: dict[str, Any] = {}
    paths = sorted(folder.iterdir())
    # Hashing lets other threads run, and reads what has been written, not what was meant to be.
    with ThreadPoolExecutor(2) as pool:
        for path, (size, sha256) in zip(paths, pool.map(_digest, paths), strict=True):
            entries[path.name] = {"size": size, "sha256": sha256}
    content = _manifest_bytes({"step": step, "files": entries})
    files.write_file(folder / MANIFEST, [content])


def _manifest_bytes(content: Mapping[str, Any]) -> bytes:
    """A manifest in the only form that is accepted: with its own hash, to the byte."""
    sha256 = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    record = {"sha256": sha256, "content": content}
    return json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"


def _digest(path: Path, size: int | None = None) -> tuple[int, str]:
    """Size and SHA-256 of a file; reads nothing of it if it does not have the size.

    Raises:
        UnsafeFileError: It has another size, or is no plain file.
        OSError: It is missing, or the disk fails.
    """
    digest = hashlib.sha256()
    with files.open_regular(path, links=False) as descriptor:
        found = os.fstat(descriptor).st_size
        if size is not None and found != size:
            raise UnsafeFileError(f"has {found:,} bytes instead of {size:,}")
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            buffer = memoryview(bytearray(min(found + 1, 1 << 20)))
            while count := file.readinto(buffer):
                digest.update(buffer[:count])
    return found, digest.hexdigest()


def verify_checkpoint(folder: Path) -> None:
    """Checks every file of a checkpoint against its manifest, before any of it is parsed.

    Raises:
        CheckpointError: It is not there, or not in every bit what was written.
    """
    with _damage(folder):
        match = _NAME.fullmatch(folder.name)
        if match is None:
            raise CheckpointError(f"{folder}: no checkpoint; they are called checkpoint-<step>")
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise UnsafeFileError("is not a folder")
        with _naming(MANIFEST):
            manifest = files.read_bytes(folder / MANIFEST, _MAX_MANIFEST_BYTES, links=False)
            content = files.parse_json(manifest).get("content")
        if not isinstance(content, dict) or manifest != _manifest_bytes(content):
            raise UnsafeFileError(f"{MANIFEST} is not as it was written")
        if content["step"] != int(match[1]):
            raise UnsafeFileError(f"{MANIFEST} is that of step {content['step']!r}")
        entries = content["files"]
        if sorted(entries) != sorted(CHECKPOINT_FILES):
            raise UnsafeFileError(f"{MANIFEST} names other files than a checkpoint has")

        def check(name: str) -> None:
            with _naming(name):
                _, sha256 = _digest(folder / name, entries[name]["size"])
            if sha256 != entries[name]["sha256"]:
                raise UnsafeFileError(f"{name} is not as it was written")

        # Small files first: most damage is told at once.
        names = sorted(CHECKPOINT_FILES, key=lambda name: int(entries[name]["size"]))
        with ThreadPoolExecutor(2) as pool:
            for _ in pool.map(check, names):
                pass


@contextmanager
def _damage(folder: Path) -> Iterator[None]:
    """Whatever goes wrong with a file of a checkpoint, and it can hold anything, is one error."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, OverflowError, ModelError) as error:
        text = f"{folder}: damaged: {_reason(error)}"
        raise CheckpointError(text.replace(f"{folder}: damaged: {folder}/", f"{folder}/")) from None


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Says of which file of a checkpoint it is that something goes wrong with it."""
    try:
        yield
    except FileNotFoundError:
        raise  # `_reason` names it
    except (OSError, ValueError) as error:
        raise UnsafeFileError(f"{name}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        name = Path(os.fsdecode(error.filename)).name if error.filename else "a file"
        return f"{name} is missing"
    return str(getattr(error, "strerror", None) or error)


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        folder: Where it is.
        step: Optimizer steps done.
        state: The training state's JSON values.
        weights: The model's tensors.
        optimizer: The optimizer's tensors.
        metrics: The run's log up to here.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    weights: TensorFile
    optimizer: TensorFile
    metrics: bytes


def load_checkpoint(folder: Path) -> Checkpoint:
    """Opens a checkpoint after `verify_checkpoint`.

    Raises:
        CheckpointError: It is damaged or unsafe, or of another release's form.
    """
    verify_checkpoint(folder)
    with _damage(folder):
        state = files.parse_json(files.read_bytes(folder / STATE, _MAX_STATE_BYTES, links=False))
        if state.get("format") != _FORMAT:
            raise ValueError(f"{STATE} has format {state.get('format')!r}; {_FORMAT} is read")
        metrics = files.read_bytes(folder / METRICS, _MAX_METRICS_BYTES, links=False)
        if state["metrics_bytes"] != len(metrics):
            raise ValueError(f"{METRICS} is not that of {STATE}")
        return Checkpoint(
            folder=folder,
            step=int(folder.name.rpartition("-")[2]),
            state=state,
            weights=TensorFile(folder / WEIGHTS),
            optimizer=TensorFile(folder / OPTIMIZER),
            metrics=metrics,
        )


def load_newest(output_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that is as it was written; None where there never was one.

    Warns of each that is damaged, and of the steps that it costs.

    Raises:
        CheckpointError: There are some, and all are damaged.
    """
    damaged: list[int] = []
    for step, folder in reversed(list_checkpoints(output_dir)):
        try:
            checkpoint = load_checkpoint(folder)
        except CheckpointError as error:
            damaged.append(step)
            logger.warning("%s", error)
            continue
        if damaged:
            lost = damaged[0] - step
            logger.warning("going back to %s: %d steps are lost", folder.name, lost)
        return checkpoint
    if damaged:
        raise CheckpointError(
            f"{output_dir}: no checkpoint can be loaded: all {len(damaged)} are damaged\n"
            "Start over with --overwrite_output_dir or another --output_dir, or put back a copy."
        )
    return None
