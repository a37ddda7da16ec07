"""Datasets from the Hugging Face Hub, read by the `datasets` library; CoNLL-2003 among them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bertner.corpus import Corpus
from bertner.errors import DataError, StorageError
from bertner.hub import unreachable
from bertner.labels import CONLL_TYPES, label_list
from bertner.readers import corpus_from_table

logger = logging.getLogger("bertner")

# load_dataset("conll2003") runs a script, which `datasets` has refused since release 4. These hold
# the same rows as parquet (huggingface/datasets#7693).
CONLL2003_MIRRORS = (
    ("eriktks/conll2003", "refs/convert/parquet"),
    ("lhoestq/conll2003", None),
    ("tomaarsen/conll2003", None),
)
CONLL2003_ROWS = {"train": 14041, "validation": 3250, "test": 3453}
CONLL2003_LABELS = label_list(CONLL_TYPES)


def read_dataset(
    name: str,
    *,
    config_name: str | None = None,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    label_names: Sequence[str] | None = None,
) -> dict[str, Corpus]:
    """Reads the splits of a Hub dataset (or of a folder that holds one).

    Args:
        name: Hub id, folder, or `conll2003`, which is looked for in its mirrors.
        config_name: Configuration of the dataset.
        text_column: Column of the words.
        label_column: Column of the tags.
        label_names: Names of integer tags that the dataset does not name itself.

    Returns:
        `train` and, where the dataset has them, `validation` and `test`.

    Raises:
        DataError: The dataset does not exist or has not the shape that is needed.
        StorageError: The Hub cannot be reached.
    """
    if name == "conll2003" and not Path(name).exists():
        return _read_conll2003(text_column, label_column)
    corpora = {}
    for split, dataset in _load_dataset(name, config_name, None).items():
        split = {"dev": "validation", "valid": "validation"}.get(split, split)
        if split in CONLL2003_ROWS:
            corpora[split] = _from_dataset(
                dataset, f"{name}[{split}]", text_column, label_column, label_names
            )
    if "train" not in corpora:
        raise DataError("has no train split", name)
    return corpora


def _load_dataset(name: str, config_name: str | None, revision: str | None) -> Any:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DefunctDatasetError
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return datasets.load_dataset(name, config_name, revision=revision)
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        missing = isinstance(error, DatasetNotFoundError | DefunctDatasetError)
        if missing and not isinstance(error.__cause__, ConnectionError):
            raise DataError("no such dataset on the Hub, and no such folder", name) from None
        raise StorageError(unreachable(name, error)) from None
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(f"cannot be loaded as a dataset: {reason}", name) from None


def _from_dataset(
    dataset: Any,
    source: str,
    text_column: str,
    label_column: str,
    label_names: Sequence[str] | None,
) -> Corpus:
    feature = dataset.features.get(label_column)
    names = getattr(getattr(feature, "feature", None), "names", None) or label_names
    table = dataset.with_format("arrow")[:]
    return corpus_from_table(table, source, text_column, label_column, names)


def _read_conll2003(text_column: str, label_column: str) -> dict[str, Corpus]:
    """The alias: the first mirror that answers with the right rows and label order."""
    failures: list[str] = []
    unreachable_hub: StorageError | None = None
    for name, revision in CONLL2003_MIRRORS:
        try:
            splits = _load_dataset(name, None, revision)
            _check_conll2003(splits, name)
        except StorageError as error:
            unreachable_hub = error
            continue
        except DataError as error:
            failures.append(str(error))
            continue
        logger.info("conll2003 from %s%s", name, f" at {revision}" if revision else "")
        return {
            split: _from_dataset(splits[split], f"{name}[{split}]", text_column, label_column, None)
            for split in CONLL2003_ROWS
        }
    if unreachable_hub is not None and not failures:
        raise StorageError(
            str(unreachable_hub).replace(repr(CONLL2003_MIRRORS[-1][0]), "conll2003")
        )
    raise DataError("no mirror holds it: " + "; ".join(failures), "conll2003")


def _check_conll2003(splits: Any, name: str) -> None:
    for split, rows in CONLL2003_ROWS.items():
        if split not in splits:
            raise DataError(f"has no {split} split", name)
        if len(splits[split]) != rows:
            raise DataError(f"has {len(splits[split])} rows in {split} instead of {rows}", name)
        feature = splits[split].features.get("ner_tags")
        names = getattr(getattr(feature, "feature", None), "names", None)
        if names != CONLL2003_LABELS:
            raise DataError(f"names its labels {names} instead of {CONLL2003_LABELS}", name)
