"""Datasets from the Hugging Face Hub, read by the `datasets` library; CoNLL-2003 among them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertner.corpus import Corpus, CorpusStream
from bertner.errors import DataError, StorageError
from bertner.hub import ask_hub, io_errors, is_hub_id, unreachable
from bertner.labels import CONLL_TYPES, label_list
from bertner.readers import Columns, open_table

logger = logging.getLogger("bertner")

# load_dataset("conll2003") runs a script, which `datasets` has refused since release 4. These hold
# the same rows as parquet (huggingface/datasets#7693).
CONLL2003_MIRRORS = (
    ("eriktks/conll2003", "refs/convert/parquet"),
    ("lhoestq/conll2003", None),
    ("tomaarsen/conll2003", None),
)
# These have a column that tells documents apart.
CONLL2003_WITH_DOCUMENTS = (
    ("tomaarsen/conll2003", "refs/convert/parquet"),
    ("tomaarsen/conll2003", None),
)
CONLL2003_ROWS = {"train": 14041, "validation": 3250, "test": 3453}
CONLL2003_LABELS = label_list(CONLL_TYPES)

# The splits of a dataset, each with the names that it may have.
_SPLITS = {"train": ["train"], "validation": ["validation", "valid", "dev"], "test": ["test"]}


def read_dataset(
    name: str,
    *,
    config_name: str | None = None,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    document_column: str | None = None,
    label_names: Sequence[str] | None = None,
    with_documents: bool = False,
) -> dict[str, Corpus]:
    """Reads the splits that `open_dataset` finds; takes and raises the same."""
    streams = open_dataset(
        name,
        config_name=config_name,
        text_column=text_column,
        label_column=label_column,
        document_column=document_column,
        label_names=label_names,
        with_documents=with_documents,
    )
    return {split: stream.read() for split, stream in streams.items()}


def open_dataset(
    name: str,
    *,
    config_name: str | None = None,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    document_column: str | None = None,
    label_names: Sequence[str] | None = None,
    with_documents: bool = False,
) -> dict[str, CorpusStream]:
    """Finds the splits of a Hub dataset (or of a folder that holds one), to be read.

    Args:
        name: Hub id, folder, or `conll2003`, which is looked for in its mirrors.
        config_name: Configuration of the dataset.
        text_column: Column of the words.
        label_column: Column of the tags.
        document_column: Column that tells documents apart; None for `document_id` or `doc_id`, if
            there is one.
        label_names: Names of integer tags; None for the dataset's own.
        with_documents: Of `conll2003`'s mirrors, take one that tells documents apart.

    Returns:
        `train` and, where the dataset has them, `validation` and `test`.

    Raises:
        DataError: The dataset does not exist or has not the shape that is needed.
        StorageError: The Hub cannot be reached.
    """
    columns = Columns(text_column, label_column, document_column)
    if name == "conll2003" and not Path(name).exists():
        return _open_conll2003(columns, with_documents)
    splits = _load_dataset(name, config_name, None)
    streams = {}
    for split, names in _SPLITS.items():
        found = next((each for each in names if each in splits), None)
        if found is not None:
            streams[split] = _from_dataset(splits[found], f"{name}[{found}]", columns, label_names)
    if "train" not in streams:
        raise DataError(f"has no train split but {', '.join(splits)}", name)
    return streams


def _load_dataset(name: str, config_name: str | None, revision: str | None) -> Any:
    """The splits of a folder or Hub dataset, by name."""
    if Path(name).is_dir():
        return _load(name, name, config_name, None)
    if Path(name).exists():
        raise DataError("is a file; give it as --train_file", name)
    if not is_hub_id(name):
        raise DataError("no such folder", name)
    try:
        info = ask_hub(name, revision, "dataset")
    except StorageError:
        splits = _load_cached(name, config_name)
        if splits is None:
            raise
        return splits
    # By its name of today, as `datasets` can no longer read ids without an owner; and at the
    # commit, for which it asks no other server than the Hub.
    return _load(name, info.id, config_name, info.sha)


def _load(name: str, path: str, config_name: str | None, revision: str | None) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return datasets.load_dataset(path, config_name, revision=revision)
    except Exception as error:  # of a bad file, whatever the library that reads it raises
        cause: BaseException = error
        # This very class is an empty wrapping; its subclasses speak for themselves.
        if type(error) is DatasetGenerationError and error.__cause__ is not None:
            cause = error.__cause__
        lines = [line.strip() for line in str(cause).split("\n") if line.strip()]
        reason = " ".join(lines[:2]) or type(cause).__name__
        # FileNotFoundError: the dataset has no such file, or the connection was lost on the way.
        lost = any(isinstance(each, LocalEntryNotFoundError) for each in (cause, cause.__cause__))
        absent = isinstance(cause, FileNotFoundError) and not lost
        if isinstance(cause, io_errors()) and not absent:
            raise StorageError(f"{name}: cannot be loaded: {reason}") from error
        raise DataError(f"cannot be loaded as a dataset: {reason}", name) from None


def _load_cached(name: str, config_name: str | None) -> Any:
    """What `datasets` has prepared before; None if it has not."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True  # or it tries to reach the Hub for half a minute
    try:
        return datasets.load_dataset(name, config_name)
    except (ConnectionError, ValueError):
        return None
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _from_dataset(
    dataset: Any, source: str, columns: Columns, label_names: Sequence[str] | None
) -> CorpusStream:
    names = label_names or _class_names(dataset, columns.label)
    table = dataset.with_format("arrow")[:]
    return open_table(table, source, columns, names)


def _class_names(dataset: Any, column: str) -> list[str] | None:
    """The names of a column of lists of ClassLabel; None if it is something else."""
    inner = getattr(dataset.features.get(column), "feature", None)
    return getattr(inner, "names", None)


def _open_conll2003(columns: Columns, with_documents: bool) -> dict[str, CorpusStream]:
    """The alias: the first mirror that answers with the right rows and label order."""
    failures: list[DataError] = []
    hub_down: StorageError | None = None
    for name, revision in CONLL2003_WITH_DOCUMENTS if with_documents else CONLL2003_MIRRORS:
        try:
            # Each question that the Hub does not answer costs seconds: one is enough.
            if hub_down is None:
                splits = _load_dataset(name, None, revision)
            else:
                splits = _load_cached(name, None)
            if splits is not None:
                _check_conll2003(splits, name)
        except StorageError as error:
            hub_down = error
            continue
        except DataError as error:
            failures.append(error)
            continue
        if splits is None:
            continue
        logger.info("conll2003 from %s%s", name, f" at {revision}" if revision else "")
        return {
            split: _from_dataset(splits[split], f"{name}[{split}]", columns, None)
            for split in CONLL2003_ROWS
        }
    if hub_down is not None:
        raise StorageError(unreachable("conll2003", hub_down.__cause__)) from hub_down
    raise DataError("no mirror holds it: " + "; ".join(map(str, failures)), "conll2003")


def _check_conll2003(splits: Any, name: str) -> None:
    for split, rows in CONLL2003_ROWS.items():
        if split not in splits:
            raise DataError(f"has no {split} split", name)
        if len(splits[split]) != rows:
            raise DataError(f"has {len(splits[split])} rows in {split} instead of {rows}", name)
        names = _class_names(splits[split], "ner_tags")
        if names != CONLL2003_LABELS:
            raise DataError(f"names its labels {names} instead of {CONLL2003_LABELS}", name)
