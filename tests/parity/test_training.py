"""The loop against the real Trainer: the loss of every step, and the recipe's scores."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

from bertner.batches import Schedule
from bertner.config import TrainConfig
from bertner.data import TokenDataset, labels_for, tokenize
from bertner.hub import find_model
from bertner.loop import evaluate, train
from bertner.model import BertForNER
from bertner.readers import read_file
from bertner.tokenizer import Tokenizer
from tests.conftest import (
    MINILM,
    SHARED_DATA,
    needs_conll,
    needs_minilm,
    write_conll,
    write_model_folder,
)
from tests.parity.trainer import Losses, relative_difference, train_with_trainer


def _load(
    base: Path, data: Path, validation: Path, folder: Path, config: TrainConfig
) -> tuple[BertForNER, Tokenizer, TokenDataset, TokenDataset]:
    """A model with a new head, saved in `folder` as the common starting point, and its data."""
    corpus = read_file(data)
    label_set = labels_for(corpus)
    torch.manual_seed(config.seed)
    model = BertForNER.from_pretrained(
        base,
        id2label=dict(enumerate(label_set.names)),
        attn_implementation=config.attn_implementation,
    )
    model.save_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(base, model.config)
    return (
        model,
        tokenizer,
        tokenize(corpus, tokenizer, label_set),
        tokenize(read_file(validation), tokenizer, label_set),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attn_implementation": "eager"},
        {"warmup_steps": 4, "max_grad_norm": 0.5, "weight_decay": 0.1},
        {"max_grad_norm": 0.0, "num_train_epochs": 2.5},
        {"freeze_embeddings": True, "weight_decay": 0.1},
    ],
    ids=["defaults", "eager", "warmup-clip-decay", "no-clip-half-epoch", "frozen-embeddings"],
)
def test_tiny_model_trains_to_the_same_bits(tmp_path: Path, settings: dict[str, object]) -> None:
    config = TrainConfig(learning_rate=1e-3, packing=False, **settings)
    base = write_model_folder(tmp_path / "base")
    files = [write_conll(tmp_path / f"{k}.txt", 30, seed=k) for k in range(2)]
    model, tokenizer, rows, _ = _load(base, *files, tmp_path / "start", config)
    ours = Losses()
    train(model, rows, config, watcher=ours)
    trainer = train_with_trainer(tmp_path / "start", rows, tokenizer, config, tmp_path / "out")
    assert len(ours.loss) == Schedule(rows.row_lengths, config).total_steps
    assert relative_difference(ours.loss, trainer.recorded) <= 1e-5
    expected = trainer.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("packing", [True, False])
def test_label_smoothing_is_the_trainers(tmp_path: Path, packing: bool) -> None:
    """Dropout is off, so that packed rows can be compared too."""
    base = write_model_folder(
        tmp_path / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    config = TrainConfig(learning_rate=1e-3, label_smoothing_factor=0.2, packing=packing)
    files = [write_conll(tmp_path / f"{k}.txt", 30, seed=k) for k in range(2)]
    model, tokenizer, rows, _ = _load(base, *files, tmp_path / "start", config)
    ours = Losses()
    train(model, rows, config, watcher=ours)
    trainer = train_with_trainer(tmp_path / "start", rows, tokenizer, config, tmp_path / "out")
    assert relative_difference(ours.loss, trainer.recorded) <= 1e-5


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_equals_the_trainers(tmp_path: Path, packing: bool) -> None:
    config = TrainConfig(learning_rate=3e-3, num_train_epochs=4, packing=False)
    base = write_model_folder(tmp_path / "base")
    files = [write_conll(tmp_path / f"{k}.txt", 30, seed=k) for k in range(2)]
    model, tokenizer, rows, dev = _load(base, *files, tmp_path / "start", config)
    trainer = train_with_trainer(
        tmp_path / "start", rows, tokenizer, config, tmp_path / "out", evaluation=dev
    )
    model.load_state_dict(trainer.model.state_dict())
    batch_size = config.per_device_eval_batch_size
    ours = evaluate(model, dev, batch_size, packing=packing).metrics()

    theirs = trainer.predict(trainer.eval_dataset)
    assert ours["loss_batch_mean"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-5)
    names = dev.label_set.names
    keep = [row != -100 for row in theirs.label_ids]
    gold = [[names[k] for k in row[m]] for row, m in zip(theirs.label_ids, keep, strict=True)]
    best = theirs.predictions.argmax(-1)
    found = [[names[k] for k in row[m]] for row, m in zip(best, keep, strict=True)]
    assert 0.0 < ours["f1"] < 1.0
    assert ours["precision"] == pytest.approx(precision_score(gold, found), abs=1e-12)
    assert ours["recall"] == pytest.approx(recall_score(gold, found), abs=1e-12)
    assert ours["f1"] == pytest.approx(f1_score(gold, found), abs=1e-12)
    assert ours["accuracy"] == pytest.approx(accuracy_score(gold, found), abs=1e-12)


@pytest.mark.parametrize(
    "objective", [{}, {"class_weights": "balanced", "label_smoothing_factor": 0.1}]
)
@pytest.mark.parametrize("packing", [True, False])
def test_splitting_a_batch_changes_nothing(
    tmp_path: Path, packing: bool, objective: dict[str, object]
) -> None:
    """Accumulation: 1 x 12 and 4 x 3 sentences are the same step (the Trainer's are not)."""
    base = write_model_folder(
        tmp_path / "base", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    files = [write_conll(tmp_path / f"{k}.txt", 34, seed=k) for k in range(2)]
    whole = TrainConfig(
        per_device_train_batch_size=12, learning_rate=1e-3, packing=packing, **objective
    )
    parts = replace(whole, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    model, _, rows, _ = _load(base, *files, tmp_path / "start", whole)
    twin = copy.deepcopy(model)
    ours, split = Losses(), Losses()
    train(model, rows, whole, watcher=ours)
    train(twin, rows, parts, watcher=split)
    assert len(ours.loss) == 9
    assert relative_difference(split.loss, ours.loss) <= 1e-5
    assert relative_difference(split.grad_norm, ours.grad_norm) <= 1e-4


@needs_conll
@needs_minilm
@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_200_steps_on_conll2003(tmp_path: Path, attention: str) -> None:
    config = TrainConfig(max_steps=200, attn_implementation=attention, packing=False)
    data = SHARED_DATA / "conll2003"
    model, tokenizer, rows, _ = _load(
        find_model(MINILM).folder,
        data / "train.txt",
        data / "valid.txt",
        tmp_path / "start",
        config,
    )
    ours = Losses()
    train(model, rows, config, watcher=ours)
    trainer = train_with_trainer(tmp_path / "start", rows, tokenizer, config, tmp_path / "out")
    difference = relative_difference(ours.loss, trainer.recorded)
    same = int(np.sum(np.array(ours.loss) == np.array(trainer.recorded)))
    print(f"\n{attention}: largest relative difference {difference:.1e}, {same} of 200 equal bits")
    assert difference <= 1e-5
