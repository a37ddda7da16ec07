"""Which settings the quickstart should have: validation F1 and time of some candidates.

Chosen on the validation split; the test split is not looked at here.

    python -m benchmarks.quickstart_recipes --seeds 3
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.machine import write_result
from bertner.cli import SAMPLE
from bertner.config import RECIPES, TrainConfig
from bertner.data import labels_for, tokenize
from bertner.hub import find_model
from bertner.loop import evaluate, train
from bertner.model import BertForNER
from bertner.readers import read_file
from bertner.tokenizer import Tokenizer

CANDIDATES: list[dict[str, Any]] = [
    {"learning_rate": 3e-4, "num_train_epochs": 3.0},
    {"learning_rate": 3e-4, "num_train_epochs": 4.0},
]


def run(settings: dict[str, Any], seed: int) -> tuple[float, float]:
    """Word-level F1 on the validation split, and seconds in training."""
    corpora = {split: read_file(SAMPLE / f"{split}.txt") for split in ("train", "validation")}
    label_set = labels_for(corpora["train"])
    config = TrainConfig.from_dict({**RECIPES["quickstart"], **settings})
    config = replace(config, seed=seed, eval_strategy="no")
    folder = find_model(config.model_name_or_path).folder
    torch.manual_seed(seed)
    model = BertForNER.from_pretrained(folder, id2label=dict(enumerate(label_set.names)))
    tokenizer = Tokenizer.from_pretrained(folder, model.config)
    rows, dev = (tokenize(corpus, tokenizer, label_set) for corpus in corpora.values())
    start = time.perf_counter()
    train(model, rows, config)
    seconds = time.perf_counter() - start
    return evaluate(model, dev, 32).word.overall.f1, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = range(42, 42 + parser.parse_args().seeds)
    results = []
    # Seeds outside, candidates inside: each candidate meets the machine in every mood.
    measured: list[list[tuple[float, float]]] = [[] for _ in CANDIDATES]
    for seed in seeds:
        for settings, runs in zip(CANDIDATES, measured, strict=True):
            runs.append(run(settings, seed))
            print(settings, seed, *(f"{value:.4f}" for value in runs[-1]), flush=True)
    for settings, runs in zip(CANDIDATES, measured, strict=True):
        scores, seconds = zip(*runs, strict=True)
        results.append(
            {
                **settings,
                "word_f1_mean": statistics.mean(scores),
                "word_f1_min": min(scores),
                "word_f1_max": max(scores),
                "seconds_median": statistics.median(seconds),
            }
        )
    for result in sorted(results, key=lambda result: -result["word_f1_mean"]):
        print(result)
    print(write_result("quickstart_recipes", {"seeds": list(seeds), "candidates": results}))


if __name__ == "__main__":
    main()
