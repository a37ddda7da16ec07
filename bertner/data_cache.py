"""Data files that were prepared before: read and tokenised once, mapped into memory ever after.

An entry is a folder of `.npy` files and an `entry.json`, named by a hash of all that its contents
follow from. It is written beside its place and renamed into it, so that it is there whole or not at
all; it may be deleted at any time, also while a run has it mapped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bertner import __version__
from bertner.config import Reading
from bertner.corpus import CorpusSummary
from bertner.data import (
    CARD_READING,
    PreparedData,
    TokenDataset,
    labels_for,
    prepare_tokens,
    with_rows,
)
from bertner.labels import LabelSet
from bertner.readers import file_format, hash_file, open_file
from bertner.tokenizer import Tokenizer
from bertner.windows import sentence_rows

logger = logging.getLogger("bertner")

# To be raised whenever the same file and settings no longer give the same arrays or files.
_FORMAT = 4

_ARRAYS = (
    "input_ids",
    "word_ids",
    "labels",
    "word_labels",
    "sentence_starts",
    "sentence_token_starts",
    "sentence_lines",
    "documents",
)


def cache_folder() -> Path | None:
    """Where entries are kept: $BERTNER_CACHE, $XDG_CACHE_HOME/bertner, or ~/.cache/bertner.

    None if none of them can be told, as where a process has no home.
    """
    if named := os.environ.get("BERTNER_CACHE"):
        return Path(named)
    # A relative path in this variable is to be ignored, says its specification.
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if Path(shared).is_absolute():
        return Path(shared) / "bertner"
    try:
        return Path("~/.cache/bertner").expanduser()
    except RuntimeError:
        return None


def prepare_file(
    path: str | Path,
    tokenizer: Tokenizer,
    label_set: LabelSet | None,
    *,
    name: str,
    columns: Mapping[str, Any],
    reading: Reading,
    max_samples: int | None,
) -> PreparedData:
    """`data.prepare` for a file, or what came of it the last time.

    What is kept are tokens; they are divided into rows each time, which costs little.

    A cache that cannot be written costs a line in the log, and one that is damaged not even that.

    Args:
        path: The file.
        tokenizer: The model's tokenizer.
        label_set: The model's labels; None for training data.
        name: Of the data, for the log: "train".
        columns: Other arguments of `readers.open_file`.
        reading: See `data.prepare`.
        max_samples: See `data.prepare`.

    Raises:
        DataError: See `open_file` and `prepare`.
        StorageError: The file cannot be read.
    """
    settings = {
        "label_all_tokens": reading.label_all_tokens,
        "row_limit": tokenizer.row_limit(reading.max_seq_length),
        "max_samples": max_samples,
    }
    prepared = _tokens_of(path, tokenizer, label_set, name, columns, settings)
    return with_rows(prepared, tokenizer, reading)


def _tokens_of(
    path: str | Path,
    tokenizer: Tokenizer,
    label_set: LabelSet | None,
    name: str,
    columns: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> PreparedData:
    """`data.prepare_tokens` for a file, from the cache if it is there."""
    folder = cache_folder()
    if folder is None:
        logger.warning("no home folder to keep prepared data in; set BERTNER_CACHE to one")
        return prepare_tokens(open_file(path, **columns), tokenizer, label_set, **settings)
    sha256 = hash_file(path)
    key = _key(sha256, path, tokenizer, label_set, columns, settings)
    entry = folder / key
    cached = _load(entry, key, str(path), label_set, tokenizer)
    if cached is not None:
        logger.info("%s: prepared before, from the cache at %s", name, entry)
        for warning in cached.warnings:
            logger.warning("%s", warning)
        return cached
    prepared = prepare_tokens(open_file(path, **columns), tokenizer, label_set, **settings)
    if prepared.summary.sha256 == sha256:  # or the file has changed meanwhile
        _save(entry, key, prepared)
    return prepared


def _key(
    sha256: str,
    path: str | Path,
    tokenizer: Tokenizer,
    label_set: LabelSet | None,
    columns: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> str:
    return _hash(
        {
            "format": _FORMAT,
            "file": [sha256, file_format(Path(path))],
            "columns": dict(columns),
            "settings": dict(settings),
            "tokenizer": [tokenizer.fast.to_str(), tokenizer.special_tokens],
            "labels": None if label_set is None else label_set.names,
            # Other releases may split, normalise or align otherwise.
            "versions": [__version__, version("tokenizers"), unicodedata.unidata_version],
        }
    )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _load(
    entry: Path, key: str, source: str, label_set: LabelSet | None, tokenizer: Tokenizer
) -> PreparedData | None:
    """What an entry holds; None if it is not there or not what was written.

    Every byte is checked: hashing an entry takes no longer than hashing the file that it was made
    of, and a flipped bit in a label would show up nowhere else.
    """
    try:
        record = json.loads((entry / "entry.json").read_text(encoding="utf-8"))
        content = record["content"]
        if record["sha256"] != _hash(content) or content["key"] != key:
            return None
        arrays = {}
        for name in _ARRAYS:
            path = entry / f"{name}.npy"
            if hash_file(path) != content["arrays"][name]:
                return None
            arrays[name] = np.load(path, mmap_mode="r").view(np.ndarray)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    # The file may have been elsewhere, or named otherwise, when it was prepared.
    summary = CorpusSummary(
        **{
            **content["summary"],
            "source": source,
            "type_names": tuple(content["summary"]["type_names"]),
        }
    )
    dataset = TokenDataset(
        **arrays,
        rows=sentence_rows(arrays["sentence_token_starts"]),
        reading=CARD_READING,
        source=source,
        label_set=label_set or labels_for(summary),
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        pad_id=tokenizer.pad_id,
    )
    return PreparedData(summary, dataset, tuple(source + text for text in content["warnings"]))


def _save(entry: Path, key: str, prepared: PreparedData) -> None:
    """Writes an entry; where that is not possible, says so."""
    summary = dataclasses.asdict(prepared.summary)
    source = summary.pop("source")
    content: dict[str, Any] = {
        "key": key,
        "summary": summary,
        "warnings": [text.removeprefix(source) for text in prepared.warnings],
        "arrays": {},
    }
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix="unfinished-", dir=entry.parent))
        try:
            for name in _ARRAYS:
                path = staging / f"{name}.npy"
                np.save(path, getattr(prepared.dataset, name))
                content["arrays"][name] = hash_file(path)
            record = {"sha256": _hash(content), "content": content}
            (staging / "entry.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
            # What is there was found wanting, or another process has just put the same there.
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
            staging.rename(entry)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        if not (entry / "entry.json").is_file():  # and no other process has been quicker
            logger.warning("prepared data not kept for the next run: %s", error)
