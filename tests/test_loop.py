"""The loop's own promises: pure functions of the step, no bad step taken, harmless watchers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor, nn

from bertner import progress
from bertner.batches import Schedule, collate, epoch_order
from bertner.config import Reading, TrainConfig
from bertner.data import TokenDataset, labels_for, tokenize
from bertner.distributed import ALONE
from bertner.errors import CheckpointError, NotFiniteError, UsageError
from bertner.loop import (
    TrainState,
    class_weights,
    dropout_seed,
    evaluate,
    learning_rate_at,
    train,
)
from bertner.model import BertForNER, BertSelfAttention
from bertner.optimizer import build_optimizer
from bertner.readers import read_file
from bertner.tokenizer import Tokenizer
from tests.conftest import REPOSITORY, write_conll
from tests.parity.trainer import Losses


@pytest.fixture
def parts(model_folder: Path, tmp_path: Path) -> tuple[BertForNER, TokenDataset, TokenDataset]:
    corpora = [read_file(write_conll(tmp_path / f"{k}.txt", 20, seed=k)) for k in range(2)]
    label_set = labels_for(corpora[0])
    torch.manual_seed(0)
    model = BertForNER.from_pretrained(model_folder, id2label=dict(enumerate(label_set.names)))
    tokenizer = Tokenizer.from_pretrained(model_folder, model.config)
    rows, dev = (tokenize(corpus, tokenizer, label_set) for corpus in corpora)
    return model, rows, dev


Parts = tuple[BertForNER, TokenDataset, TokenDataset]


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (0, 1)])
def test_rate_is_that_of_transformers(warmup: int, total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        expected = optimizer.param_groups[0]["lr"]
        assert learning_rate_at(step, 0.5, warmup, total) == pytest.approx(expected, abs=1e-12)
        optimizer.step()
        schedule.step()


def test_dropout_seeds_are_all_different_and_fit_torch() -> None:
    seeds = {dropout_seed(s, step, k) for s in (0, 42) for step in range(50) for k in range(4)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert dropout_seed(42, 7, 0) == 5236832352017723729, "part of what a run is: never changes"


def test_a_run_learns(parts: Parts) -> None:
    model, rows, dev = parts
    config = TrainConfig(learning_rate=5e-3, num_train_epochs=15, eval_strategy="no")
    watched = Losses()
    result = train(model, rows, config, evaluation=dev, watcher=watched)
    assert result.step == len(watched.loss) == 45
    assert result.epoch == 15.0
    assert result.evaluation is None
    assert watched.loss[-1] < 0.5 * watched.loss[0]
    assert watched.learning_rate[0] == 5e-3
    assert watched.learning_rate[-1] == pytest.approx(5e-3 / 45)
    assert result.loss == pytest.approx(np.mean(watched.loss))
    scores = evaluate(model, dev)
    assert scores.word.overall.f1 > 0.5
    assert not model.training


@pytest.mark.parametrize("packing", [True, False])
def test_frozen_embeddings_stay_as_they_were(parts: Parts, packing: bool) -> None:
    model, rows, _ = parts
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = TrainConfig(max_steps=3, freeze_embeddings=True, learning_rate=1e-3, packing=packing)
    result = train(model, rows, config)
    unchanged = {name for name, tensor in model.state_dict().items() if tensor.equal(before[name])}
    assert unchanged == {name for name in before if "embeddings" in name}
    assert not any("embeddings" in name for name in result.state.optimizer)
    train(model, rows, replace(config, freeze_embeddings=False, learning_rate=1e-2))
    assert not any(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("packing", "recording"), [(False, "tiny_losses.txt"), (True, "tiny_losses_packed.txt")]
)
def test_the_losses_of_a_recorded_run(parts: Parts, packing: bool, recording: str) -> None:
    """Guards against any change of the mathematics; rewrite the file only with a reason."""
    model, rows, _ = parts
    watched = Losses()
    config = TrainConfig(max_steps=12, learning_rate=3e-3, warmup_steps=3, packing=packing)
    train(model, rows, config, watcher=watched)
    recorded = (REPOSITORY / "tests" / "golden" / recording).read_text().split()
    assert watched.loss == pytest.approx([float(loss) for loss in recorded], rel=1e-4)


def test_the_same_run_twice_is_the_same_to_the_bit(parts: Parts) -> None:
    model, rows, _ = parts
    twin = copy.deepcopy(model)
    config = TrainConfig(max_steps=7, learning_rate=1e-3)
    train(model, rows, config)
    torch.rand(17)  # whatever else happened in the process
    train(twin, rows, config)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_class_weights(parts: Parts) -> None:
    rows = parts[1]
    labels = rows.labels[rows.labels != -100]
    names = np.array(rows.label_set.names)
    assert rows.label_counts.tolist() == [int((labels == k).sum()) for k in range(7)]
    assert class_weights(rows, "none") == {}
    # The data have no I-LOC: it weighs nothing, and the others as if there were no such label.
    present = np.unique(labels)
    assert names[np.setdiff1d(np.arange(7), present)] == ["I-LOC"]
    balanced, root = class_weights(rows, "balanced"), class_weights(rows, "sqrt")
    assert list(balanced) == list(root) == names.tolist()
    assert balanced["I-LOC"] == root["I-LOC"] == 0.0
    theirs = compute_class_weight("balanced", classes=present, y=labels)
    assert [balanced[name] for name in names[present]] == pytest.approx(theirs)
    assert root["B-PER"] / root["O"] == pytest.approx((balanced["B-PER"] / balanced["O"]) ** 0.5)
    for weights in (balanced, root):
        assert np.mean([weights[name] for name in names[labels]]) == pytest.approx(1.0)
    nothing = replace(rows, labels=np.full_like(rows.labels, -100))
    assert set(class_weights(nothing, "balanced").values()) == {0.0}


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_of_weighted_steps(parts: Parts, packing: bool) -> None:
    """Their tokens' weighted mean; what is evaluated is neither weighted nor smoothed."""
    model, rows, dev = parts
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, BertSelfAttention):
            module.dropout_prob = 0.0
    # A row of one label, and a frequent one, so that its weight is below 1, as no count can be.
    labels = rows.labels.copy()
    labels[: rows.rows.starts[1]] = -100
    labels[0] = rows.label_set.outside
    rows = replace(rows, labels=labels)
    watched = Losses()
    config = TrainConfig(
        num_train_epochs=1,
        per_device_train_batch_size=1,
        learning_rate=0.0,
        packing=packing,
        class_weights="balanced",
        label_smoothing_factor=0.2,
    )
    result = train(model, rows, config, evaluation=dev, watcher=watched)
    weight_of = np.array(list(class_weights(rows, "balanced").values()))
    expected, total_weights = [], []
    with torch.inference_mode():
        for row in epoch_order(len(rows), config.seed, 0):
            batch = collate(rows, [row], model.device)
            logits = model(batch.input_ids, batch.attention_mask).logits
            gold = batch.labels[batch.labels != -100]
            losses = F.cross_entropy(
                logits[batch.labels != -100], gold, reduction="none", label_smoothing=0.2
            )
            weights = weight_of[gold.numpy()]
            expected.append(np.average(losses.numpy(), weights=weights))
            total_weights.append(weights.sum())
        batch = collate(dev, range(len(dev)), model.device)
        logits = model(batch.input_ids, batch.attention_mask).logits
        plain = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert watched.loss == pytest.approx(expected, rel=1e-5)
    assert 0.0 < min(total_weights) < 1.0
    assert result.evaluation is not None
    assert result.evaluation.loss == pytest.approx(plain.item(), rel=1e-5)


def test_without_class_weights_no_label_is_counted(parts: Parts) -> None:
    model, rows, _ = parts
    train(model, rows, TrainConfig(max_steps=1))
    assert "label_counts" not in vars(rows)


def test_watching_changes_nothing(parts: Parts) -> None:
    model, rows, dev = parts
    twin = copy.deepcopy(model)
    train(model, rows, TrainConfig(max_steps=7, learning_rate=1e-3, eval_strategy="no"))
    saved: list[int] = []
    watched_config = TrainConfig(
        max_steps=7,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=3,
    )

    def save(state: TrainState) -> None:
        saved.append(state.step)
        torch.rand(5)

    train(twin, rows, watched_config, evaluation=dev, watcher=Losses(), save=save)
    assert saved == [3, 6, 7]
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_train_goes_on_from_a_state(parts: Parts, packing: bool, stop_at: int) -> None:
    """In Python, without any files: what `save` and the result are given is enough."""
    model, rows, _ = parts
    broken, fresh = copy.deepcopy(model), copy.deepcopy(model)
    config = TrainConfig(max_steps=7, learning_rate=1e-3, packing=packing, eval_strategy="no")
    whole = train(model, rows, config)
    assert not whole.stopped
    watched = Losses()
    part = train(
        broken, rows, config, watcher=watched, should_stop=lambda: len(watched.loss) == stop_at
    )
    assert (part.stopped, part.stopped_early) == (True, False)
    assert part.step == part.state.step == stop_at
    fresh.load_state_dict(broken.state_dict())
    result = train(fresh, rows, config, state=part.state)
    assert (result.step, result.loss) == (7, whole.loss)
    assert result.state.counters["position"] == 1
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # At the end there is nothing left to do.
    again = train(fresh, rows, config, state=result.state)
    assert (again.step, again.loss) == (7, whole.loss)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("counters", "message"),
    [
        ({"step": "4"}, "its step is '4'"),
        ({"losses": None}, "its losses is None"),
        ({"best": True}, "its best is True"),
        ({"step": 8}, "it is of step 8, the run has 7 steps"),
        ({"step": -1}, "it is of step -1"),
    ],
)
def test_a_state_of_nonsense_is_refused(
    parts: Parts, counters: dict[str, object], message: str
) -> None:
    model, rows, _ = parts
    config = TrainConfig(max_steps=7, eval_strategy="no")
    state = train(model, rows, config).state
    with pytest.raises(CheckpointError, match=message):
        train(model, rows, config, state=replace(state, counters={**state.counters, **counters}))


class _Events:
    """A watcher that keeps the steps of evaluations."""

    def __init__(self) -> None:
        self.evaluations: list[tuple[int, bool]] = []

    def stepped(self, report: object) -> None: ...

    def evaluating(self, num_rows: int) -> Callable[[int], None]:
        return lambda rows: None

    def evaluated(self, step: int, epoch: float, evaluation: object, is_best: bool) -> None:
        self.evaluations.append((step, is_best))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_strategy": "epoch", "num_train_epochs": 2}, [3, 6]),
        ({"eval_strategy": "epoch", "num_train_epochs": 1.5}, [3, 5]),
        ({"eval_strategy": "steps", "eval_steps": 2, "max_steps": 5}, [2, 4, 5]),
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "epoch", "gradient_accumulation_steps": 2, "max_steps": 4}, [2, 4]),
    ],
)
def test_when_it_evaluates(parts: Parts, settings: dict[str, object], steps: list[int]) -> None:
    model, rows, dev = parts
    events = _Events()
    train(model, rows, TrainConfig(**settings), evaluation=dev, watcher=events)
    assert [step for step, _ in events.evaluations] == steps


def test_the_best_is_always_saved(parts: Parts) -> None:
    model, rows, dev = parts
    events, saved = _Events(), []
    config = TrainConfig(
        num_train_epochs=6,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    result = train(
        model,
        rows,
        config,
        evaluation=dev,
        watcher=events,
        save=lambda state: saved.append((state.step, state.best_step)),
    )
    best = [step for step, is_best in events.evaluations if is_best]
    assert saved == [(step, step) for step in best]
    assert result.best_step == best[-1]


@pytest.mark.parametrize(
    "settings", [{"load_best_model_at_end": True}, {"early_stopping_patience": 1}]
)
def test_what_needs_validation_data_is_refused_without(
    parts: Parts, settings: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))} needs validation data"):
        train(parts[0], parts[1], TrainConfig(**settings))


class _Scored:
    """An evaluation of which only the scores matter."""

    def __init__(self, value: float) -> None:
        self.value = value

    def metrics(self) -> dict[str, float]:
        return {"f1": self.value, "loss": self.value}


def score_with(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Lets the evaluations to come find these values."""
    scores = iter(values)
    monkeypatch.setattr(progress, "evaluate", lambda *args, **kwargs: _Scored(next(scores)))


def stops_in_transformers(values: Sequence[float], config: TrainConfig) -> int:
    """The evaluation, from 1, after which the Trainer's callback ends training."""
    callback = transformers.EarlyStoppingCallback(
        config.early_stopping_patience, config.early_stopping_threshold
    )
    arguments = SimpleNamespace(
        metric_for_best_model=config.metric_for_best_model,
        greater_is_better=config.metric_for_best_model != "loss",
    )
    state, control = SimpleNamespace(best_metric=None), SimpleNamespace(should_training_stop=False)
    better = max if arguments.greater_is_better else min
    for number, value in enumerate(values, 1):
        metrics = {f"eval_{config.metric_for_best_model}": value}
        callback.on_evaluate(arguments, state, control, metrics)
        if control.should_training_stop:
            return number
        # As the Trainer does after each evaluation.
        state.best_metric = value if number == 1 else better(value, state.best_metric)
    return len(values)


def test_it_stops_early_where_the_trainer_does(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows, dev = parts
    rng = np.random.default_rng(3)
    found: list[int] = []
    for _ in range(100):
        values = rng.choice([0.1, 0.2, 0.25, 0.3, 0.5], 12).tolist()
        config = TrainConfig(
            max_steps=12,
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model=str(rng.choice(["f1", "loss"])),
            early_stopping_patience=int(rng.integers(1, 5)),
            early_stopping_threshold=float(rng.choice([0.0, 0.1, 0.2])),
        )
        score_with(monkeypatch, values)
        optimizer = build_optimizer(model, config)
        schedule = Schedule(rows.row_lengths, config)
        run = progress.Progress(
            config, model, optimizer, schedule, dev, None, None, lambda: False, ALONE
        )
        while not run.finished:
            run.after_step(1.0, 1.0, 1e-5, 1)
        result = run.result()
        found.append(stops_in_transformers(values, config))
        assert result.step == found[-1], (values, config)
        assert (result.stopped, result.stopped_early) == (False, result.step < 12)
        assert result.total_steps == 12
    assert len(set(found)) > 5


# No score rises by more than 1: the second evaluation is the first that counts against the run.
HOPELESS = {
    "early_stopping_threshold": 1.0,
    "max_steps": 12,
    "learning_rate": 1e-3,
    "eval_strategy": "steps",
    "eval_steps": 2,
}


def test_a_run_that_stops_early_is_carried_on_to_the_same_step(parts: Parts) -> None:
    model, rows, dev = parts
    fresh = copy.deepcopy(model)
    config = TrainConfig(early_stopping_patience=2, save_strategy="steps", save_steps=1, **HOPELESS)
    saved: list[tuple[TrainState, dict[str, Tensor]]] = []

    def save(state: TrainState) -> None:
        saved.append(copy.deepcopy((state, model.state_dict())))

    watched = Losses()
    result = train(model, rows, config, evaluation=dev, watcher=watched, save=save)
    assert result.stopped_early
    assert [state.step for state, _ in saved] == [1, 2, 3, 4, 5, 6]
    # The rate is still that of the steps that were planned.
    assert watched.learning_rate == [learning_rate_at(step, 1e-3, 0, 12) for step in range(6)]
    for state, weights in saved:
        fresh.load_state_dict(weights)
        watched = Losses()
        again = train(fresh, rows, config, evaluation=dev, watcher=watched, state=state)
        assert len(watched.loss) == 6 - state.step, "from the last, there is nothing left to do"
        assert (again.step, again.stopped_early, again.loss) == (6, True, result.loss)
        for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_the_model_says_how_it_was_trained_to_read(parts: Parts) -> None:
    model, rows, _ = parts
    once = TrainConfig(max_steps=1)
    before = replace(rows, reading=Reading(max_seq_length=99, decoding="viterbi"))
    train(model, before, once)
    assert model.config.reading == before.reading
    train(model, rows, once)
    assert model.config.reading == rows.reading


def test_what_was_best_by_another_metric_counts_no_more(parts: Parts) -> None:
    model, rows, dev = parts
    config = TrainConfig(early_stopping_patience=3, **HOPELESS)
    # Three evaluations, of which the last two did not improve enough.
    half = train(model, rows, replace(config, max_steps=6), evaluation=dev)
    state = copy.deepcopy(half.state)
    for metric, steps in (("loss", 12), ("f1", 8)):
        events = _Events()
        changed = replace(config, metric_for_best_model=metric)
        result = train(model, rows, changed, evaluation=dev, watcher=events, state=state)
        assert result.step == steps
        assert metric == "f1" or events.evaluations[0] == (8, True)


@pytest.mark.parametrize(
    ("save_strategy", "steps"), [("epoch", [3, 4]), ("steps", [4]), ("no", [])]
)
def test_where_it_stops_early_it_saves_as_at_the_end(
    parts: Parts, save_strategy: str, steps: list[int]
) -> None:
    model, rows, dev = parts
    config = TrainConfig(early_stopping_patience=1, save_strategy=save_strategy, **HOPELESS)
    saved: list[int] = []
    train(model, rows, config, evaluation=dev, save=lambda state: saved.append(state.step))
    assert saved == steps


def test_stopping_early_at_the_last_step_is_no_stopping_early(parts: Parts) -> None:
    model, rows, dev = parts
    config = TrainConfig(**{**HOPELESS, "max_steps": 4}, early_stopping_patience=1)
    result = train(model, rows, config, evaluation=dev)
    assert (result.step, result.stopped_early) == (4, False)


def poison_weight(model: BertForNER) -> None:
    model.classifier.bias.data[0] = math.nan


def poison_loss(model: BertForNER) -> None:
    model.classifier.register_forward_hook(lambda m, i, out: out * math.inf)


def poison_gradient(model: BertForNER) -> None:
    model.classifier.weight.register_hook(lambda grad: grad * math.inf)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("poison", [poison_weight, poison_loss, poison_gradient])
def test_not_finite_stops_before_the_step(
    parts: Parts, poison: Callable[[BertForNER], None], packing: bool
) -> None:
    model, rows, _ = parts
    config = TrainConfig(num_train_epochs=2, per_device_train_batch_size=6, packing=packing)

    class Poisoner(Losses):
        def stepped(self, report: object) -> None:
            super().stepped(report)  # type: ignore[arg-type]
            if len(self.loss) == 2:
                poison(model)
                self.before = copy.deepcopy(model.state_dict())

    watcher, saved = Poisoner(), []
    with pytest.raises(NotFiniteError, match=r"step 3: loss") as caught:
        train(model, rows, config, watcher=watcher, save=lambda *event: saved.append(event))
    assert caught.value.exit_code == 70
    assert "learning_rate" in str(caught.value)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(42)).numpy()[12:18]
    lines = ", ".join(str(rows.sentence_lines[row]) for row in order)
    assert f"{rows.source}, lines {lines}\n" in str(caught.value)
    assert not saved
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.nan_to_num(7.0), watcher.before[name].nan_to_num(7.0)), (
            f"{name} was touched"
        )


def test_evaluation_does_not_depend_on_the_batch(parts: Parts) -> None:
    model, _, dev = parts
    one = evaluate(model, dev, 1, packing=False)
    for many in (evaluate(model, dev, 20, packing=False), evaluate(model, dev)):
        assert one.word == many.word
        assert one.subword == many.subword
        assert one.loss == pytest.approx(many.loss, rel=1e-6)
        assert np.array_equal(one.word_predictions, many.word_predictions)
    assert one.word.num_labels == len(dev.word_labels)


def test_evaluation_leaves_the_mode(parts: Parts) -> None:
    model, _, dev = parts
    for training in (True, False):
        model.train(training)
        evaluate(model, dev)
        assert model.training is training


@pytest.mark.parametrize("packing", [True, False])
def test_bfloat16_is_close_and_keeps_float32_weights(parts: Parts, packing: bool) -> None:
    model, rows, dev = parts
    twin = copy.deepcopy(model)
    exact, rough = Losses(), Losses()
    config = TrainConfig(max_steps=6, learning_rate=1e-3, packing=packing)
    train(model, rows, config, watcher=exact)
    config = replace(config, dtype="bfloat16")
    train(twin, rows, config, evaluation=dev, watcher=rough)
    assert all(parameter.dtype == torch.float32 for parameter in twin.parameters())
    assert rough.loss != exact.loss
    assert np.allclose(rough.loss, exact.loss, rtol=0.02)
