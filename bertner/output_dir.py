"""The folder of a run: who writes to it, whose it is, and what is removed when it is replaced."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bertner import files
from bertner.calibration import FILE as CALIBRATION
from bertner.checkpoint import (
    MANIFEST,
    METRICS,
    list_checkpoints,
    remove_checkpoint,
    remove_leftovers,
)
from bertner.errors import DataError, OutputDirectoryError, StorageError
from bertner.files import make_folder, read_json
from bertner.tensorboard import RUNS, list_event_files

logger = logging.getLogger("bertner")

LOCK = ".lock"
RECORD = "run.json"
REPORT = "report.html"

# Every file that a run writes at the top of its folder. run.json, by which a run's folder is known,
# comes last: should removing them fail midway, it can be tried again.
RUN_FILES = [
    METRICS,
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
    "all_results.json",
    "eval_results.json",
    CALIBRATION,
    REPORT,
    RECORD,
]


_SEED = re.compile(r"seed-(0|[1-9][0-9]{0,18})")


def seed_folder(output_dir: Path, seed: int) -> Path:
    """Where in the folder of a run of several seeds the run of one of them is."""
    return output_dir / f"seed-{seed}"


def list_seeds(output_dir: Path) -> list[tuple[int, Path]]:
    """The folders that have the names of `seed_folder`, as (seed, folder), in order.

    Raises:
        OSError: The folder is there, but cannot be read.
    """
    paths = output_dir.iterdir() if output_dir.is_dir() else []
    matches = [(_SEED.fullmatch(path.name), path) for path in paths]
    return sorted(
        (int(match[1]), path)
        for match, path in matches
        if match and path.is_dir() and not path.is_symlink()
    )


def is_of_seeds(record: Mapping[str, Any]) -> bool:
    """Whether the record of a run, read from a file, is that of a run of several seeds."""
    config = record.get("config")
    return isinstance(config, dict) and config.get("seeds", 1) != 1


@contextmanager
def lock_output_dir(output_dir: Path) -> Iterator[None]:
    """Makes the folder if need be, and keeps every other run out of it.

    The system gives the lock back when the process ends, however it ends. A folder that was made
    for nothing is removed again.

    Raises:
        OutputDirectoryError: It is a file, or another process is at work in it.
        StorageError: The disk fails.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputDirectoryError(f"{output_dir} is a file; choose another --output_dir")
    made = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    make_folder(output_dir)
    path = output_dir / LOCK
    try:
        descriptor = _lock(path)
    except OSError as error:
        raise StorageError(f"{path}: cannot be locked: {error.strerror or error}") from None
    try:
        remove_leftovers(output_dir)
        for name in RUN_FILES:
            for unfinished in output_dir.glob(f".{name}.*.tmp"):
                files.remove(unfinished)
        yield
    finally:
        # While it is still locked: who opens it now finds that it is no longer there (see _lock).
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)
        with suppress(OSError):  # one that is not empty stays
            for folder in made:
                folder.rmdir()


def _lock(path: Path) -> int:
    while True:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who had it before may have removed the file after we opened it.
            if os.path.lexists(path) and os.path.samestat(os.fstat(descriptor), os.lstat(path)):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_myself()).encode())
                return descriptor
        except BlockingIOError:
            holder = os.read(descriptor, 4096)
            os.close(descriptor)
            raise OutputDirectoryError(
                f"{path.parent} is in use by {_describe(holder)}; wait for it, stop it, or choose "
                "another --output_dir"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _myself() -> dict[str, Any]:
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since}


def _describe(holder: bytes) -> str:
    try:
        process = files.parse_json(holder)
        return f"process {process['pid']} on {process['host']}, since {process['since']}"
    except (ValueError, LookupError):
        return "another process"


def find_run(output_dir: Path) -> dict[str, Any] | None:
    """The record (`run.json`) of the run that a folder holds; None if it holds none.

    Empty if the record is damaged, but there are checkpoints, which have a copy.

    Raises:
        OutputDirectoryError: The folder holds such files, but no bertner run put them there.
    """
    checkpoints = list_checkpoints(output_dir)
    present = [name for name in RUN_FILES if os.path.lexists(output_dir / name)]
    present += [folder.name for _, folder in checkpoints]
    if not present:
        return None
    try:
        record = read_json(output_dir / RECORD)
        if "bertner" in record["versions"]:
            return record
    except (DataError, LookupError, TypeError):
        pass
    if any((folder / MANIFEST).is_file() for _, folder in checkpoints):
        logger.warning("%s is missing or damaged; going by the checkpoints", output_dir / RECORD)
        return {}
    raise OutputDirectoryError(
        f"{output_dir} holds {', '.join(present[:3])}, which no bertner run put there; "
        "choose another --output_dir"
    )


def remove_run(output_dir: Path) -> None:
    """Removes a run's checkpoints, seeds and other files; what else is in the folder stays.

    Raises:
        StorageError: The disk fails.
    """
    try:
        # Only such a run has seeds: other folders of that name are not its own.
        if is_of_seeds(find_run(output_dir) or {}):
            for _, folder in list_seeds(output_dir):
                _remove_files(folder)
                with suppress(OSError):  # one that is not empty stays
                    folder.rmdir()
        _remove_files(output_dir)
        files.sync_folder(output_dir)
    except OSError as error:
        raise StorageError(f"{output_dir}: {error.strerror or error}") from None


def _remove_files(folder: Path) -> None:
    for _, checkpoint in list_checkpoints(folder):
        remove_checkpoint(checkpoint)
    for path in list_event_files(folder):
        files.remove(path)
    with suppress(OSError):  # one that is not empty, or is not there
        (folder / RUNS).rmdir()
    for name in RUN_FILES:
        files.remove(folder / name)
