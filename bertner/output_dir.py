"""The folder of a run: whose it is, when it may be replaced, and what is removed then."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from bertner.checkpoint import STAGING, list_checkpoints, read_json, write_json
from bertner.errors import DataError, OutputDirectoryError, StorageError

# Every file that a run writes at the top of its folder. run.json, by which a run's folder is known,
# comes last: should removing them fail midway, it can be tried again.
RUN_FILES = [
    "metrics.jsonl",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "README.md",
    "all_results.json",
    "eval_results.json",
    "run.json",
]


def check_output_dir(output_dir: Path, overwrite: bool) -> None:
    """Refuses a folder that holds another run, or something that is not bertner's to replace.

    Raises:
        OutputDirectoryError: It does.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise OutputDirectoryError(f"{output_dir} is a file; choose another --output_dir")
    present = [name for name in RUN_FILES if (output_dir / name).exists()]
    present += [folder.name for _, folder in list_checkpoints(output_dir)]
    if not present:
        return
    if not _is_run_record(output_dir / "run.json"):
        raise OutputDirectoryError(
            f"{output_dir} holds {', '.join(present[:3])}, which no bertner run put there; "
            "choose another --output_dir"
        )
    if not overwrite:
        raise OutputDirectoryError(
            f"{output_dir} holds another run, or one is going on there; choose another "
            "--output_dir, or replace that run with --overwrite_output_dir"
        )


def _is_run_record(path: Path) -> bool:
    try:
        return "bertner" in read_json(path)["versions"]
    except (DataError, KeyError, TypeError):
        return False


def claim_output_dir(output_dir: Path, overwrite: bool, run: dict[str, Any]) -> None:
    """Empties the folder if that is wanted, and puts this run's record there, before any other.

    Args:
        output_dir: Made if it is missing.
        overwrite: Replace the run that it holds.
        run: Contents of `run.json`.

    Raises:
        OutputDirectoryError: It holds another run, or one began there meanwhile.
        StorageError: The disk fails.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        # Looked at again: since the first time another run may have begun here.
        check_output_dir(output_dir, overwrite)
        if overwrite:
            _remove_run(output_dir)
        # Of two runs that begin at the same moment, one finds that the other made the file.
        (output_dir / "run.json").touch(exist_ok=False)
    except FileExistsError:
        raise OutputDirectoryError(
            f"another run has just begun in {output_dir}; choose another --output_dir"
        ) from None
    except OSError as error:
        raise StorageError(f"{output_dir}: {error.strerror or error}") from None
    write_json(output_dir / "run.json", run)


def _remove_run(output_dir: Path) -> None:
    """Removes a run's checkpoints, what a killed one left half written, and its other files."""
    for _, folder in list_checkpoints(output_dir):
        shutil.rmtree(folder)
    for folder in output_dir.glob(f"{STAGING}checkpoint-*"):
        shutil.rmtree(folder)
    for name in RUN_FILES:
        for unfinished in output_dir.glob(f".{name}.*.tmp"):
            unfinished.unlink()
        (output_dir / name).unlink(missing_ok=True)
