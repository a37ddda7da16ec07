"""Several processes train what one does; they stop, fail and go on together."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bertner import graphs, kernels
from bertner.batches import Schedule, pack
from bertner.checkpoint import list_checkpoints
from bertner.config import Reading, TrainConfig
from bertner.data import TokenDataset, labels_for, tokenize
from bertner.distributed import ALONE, join
from bertner.errors import UsageError
from bertner.loop import Evaluation, StepReport, evaluate, train
from bertner.model import BertForNER, BertSelfAttention
from bertner.packing import Packing
from bertner.readers import read_file
from bertner.record import hash_tensors
from bertner.tokenizer import Tokenizer
from tests.capture import CaptureOnCpu
from tests.conftest import MINILM, REPOSITORY, SHARED_DATA, needs_conll, needs_minilm
from tests.runs import Runner, outcome, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "arguments.json").write_text(json.dumps(write_inputs(folder)))
    return folder


@pytest.fixture
def arguments(inputs: Path, tmp_path: Path) -> list[str]:
    shared: list[str] = json.loads((inputs / "arguments.json").read_text())
    return [*shared, "--output_dir", str(tmp_path / "out")]


class Losses:
    """A watcher that keeps the loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.tokens: list[int] = []

    def stepped(self, report: StepReport) -> None:
        self.values.append(report.loss)
        self.tokens.append(report.num_tokens)

    def evaluating(self, num_rows: int) -> Any:
        return lambda rows: None

    def evaluated(self, *args: object) -> None:
        pass


def load(
    folder: Path, reading: Reading | None = None, dropout: bool = True
) -> tuple[BertForNER, TokenDataset]:
    """A tiny model, and rows of the test's data."""
    corpus = read_file(folder / "train.txt")
    labels = labels_for(corpus)
    torch.manual_seed(3)
    id2label = dict(enumerate(labels.names))
    model = BertForNER.from_pretrained(folder / "tiny-bert", id2label=id2label)
    with torch.no_grad():
        model.classifier.weight *= 50  # says something about every word
    if not dropout:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif isinstance(module, BertSelfAttention):
                module.dropout_prob = 0.0
    tokenizer = Tokenizer.from_pretrained(folder / "tiny-bert", model.config)
    return model, tokenize(corpus, tokenizer, labels, reading=reading or Reading())


# What a rank does in place of a run, and the file that it leaves its results in.


def train_share(inputs: str, settings: Mapping[str, Any], result: str) -> None:
    """Trains; leaves the losses and what the weights and the optimizer come to."""
    torch.set_num_threads(1)
    model, rows = load(Path(inputs), dropout=settings["dropout_by_row"])
    losses = Losses()
    with join("cpu") as ranks:
        done = train(model, rows, TrainConfig(**settings), watcher=losses, ranks=ranks)
        state = {**model.state_dict(), **done.state.optimizer}
        found = {
            "losses": losses.values,
            "tokens": losses.tokens,
            "weights": model.state_dict(),
            "hash": hash_tensors(state),
            "replays": CaptureOnCpu.replays,
        }
        torch.save(found, f"{result}-{ranks.rank}")


def replay_share(inputs: str, settings: Mapping[str, Any], result: str) -> None:
    """Trains as on CUDA devices: gradients are captured, what ranks exchange is not."""
    kernels.QUEUED = ("cpu",)
    graphs.Capture = CaptureOnCpu  # type: ignore[misc, assignment]
    train_share(inputs, settings, result)


def evaluate_share(inputs: str, readings: list[Mapping[str, Any]], result: str) -> None:
    """Evaluates in several ways."""
    torch.set_num_threads(1)
    found = []
    with join("cpu") as ranks:
        for settings in readings:
            settings = dict(settings)
            how = {name: settings.pop(name) for name in ("packing", "batch_tokens")}
            model, rows = load(Path(inputs), Reading(**settings))
            found.append(comparable(evaluate(model, rows, 3, ranks=ranks, **how)))
        torch.save(found, f"{result}-{ranks.rank}")


def comparable(evaluation: Evaluation) -> dict[str, Any]:
    """All of an evaluation but the time."""
    values = {item.name: getattr(evaluation, item.name) for item in fields(evaluation)}
    del values["runtime"]
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            values[name] = value.tolist()
    return values


def share(
    runner: Runner, world_size: int, function: str, inputs: Path, settings: Any, folder: Path
) -> list[Any]:
    """What the ranks leave that call a function of this module."""
    result = folder / f"{function}-{world_size}"
    code = (
        f"from tests.test_distributed import {function}\n"
        f"{function}({str(inputs)!r}, {settings!r}, {str(result)!r})\n"
        "os._exit(0)"
    )
    statuses, log = runner.run_ranks(world_size, [], folder / "log", code)
    assert statuses == [0] * world_size, log
    return [torch.load(f"{result}-{rank}", weights_only=False) for rank in range(world_size)]


# The data have 24 rows: with micro-batches of 23 or 7, fewer are left for the last step of an epoch
# than there are ranks.
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("world_size", "settings"),
    [
        (2, {"per_device_train_batch_size": 5, "class_weights": "sqrt"}),
        (3, {"per_device_train_batch_size": 7, "label_smoothing_factor": 0.1}),
        (4, {"per_device_train_batch_size": 23, "freeze_embeddings": True}),
        (2, {"train_batch_tokens": 40}),
        (3, {"per_device_train_batch_size": 2, "packing": False}),
    ],
)
def test_several_ranks_train_what_one_does(
    runner: Runner,
    inputs: Path,
    tmp_path: Path,
    world_size: int,
    settings: dict[str, Any],
    accumulation: int,
) -> None:
    settings = {
        **settings,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "dropout_by_row": settings.get("packing", True),
        "gradient_accumulation_steps": accumulation,
    }
    ranks = share(runner, world_size, "train_share", inputs, settings, tmp_path)
    assert len({rank["hash"] for rank in ranks}) == 1, "the same bits on every rank"
    # One process takes the same rows in one step.
    settings["gradient_accumulation_steps"] = accumulation * world_size
    model, rows = load(inputs, dropout=settings["dropout_by_row"])
    losses = Losses()
    train(model, rows, TrainConfig(**settings), watcher=losses)
    assert [rank["losses"] for rank in ranks] == [ranks[0]["losses"]] * world_size
    assert ranks[0]["losses"] == pytest.approx(losses.values, rel=2e-6)
    assert all(rank["tokens"] == losses.tokens for rank in ranks)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], tensor, rtol=1e-4, atol=2e-5)


def test_several_ranks_replay_what_one_computes(
    runner: Runner, inputs: Path, tmp_path: Path
) -> None:
    # 24 rows: in each second step one is left, and two ranks have none.
    settings = {
        "max_steps": 24,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 23,
        "dropout_by_row": False,  # without dropout, which the CPU draws otherwise
    }
    found = share(runner, 3, "replay_share", inputs, settings, tmp_path)
    assert len({rank["hash"] for rank in found}) == 1
    assert found[0]["replays"] >= 5
    model, rows = load(inputs, dropout=False)
    losses = Losses()
    train(
        model,
        rows,
        TrainConfig(**{**settings, "gradient_accumulation_steps": 3}),
        watcher=losses,
    )
    assert found[0]["losses"] == pytest.approx(losses.values, rel=1e-5)


READINGS: list[dict[str, Any]] = [
    {"packing": True, "batch_tokens": 60},
    {"packing": True, "batch_tokens": 5, "decoding": "viterbi", "word_decision": "all"},
    {"packing": True, "batch_tokens": 20, "decoding": "viterbi", "max_seq_length": 8},
    {"packing": False, "batch_tokens": 1, "word_decision": "all", "max_seq_length": 9},
]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_several_ranks_score_what_one_does_to_the_bit(
    runner: Runner, inputs: Path, tmp_path: Path, world_size: int
) -> None:
    ranks = share(runner, world_size, "evaluate_share", inputs, READINGS, tmp_path)
    (alone,) = share(runner, 1, "evaluate_share", inputs, READINGS, tmp_path)
    assert alone[1]["num_repaired"] > 0
    assert any(score.overall.f1 > 0 for score in (alone[0]["word"], alone[2]["word"]))
    assert alone[2]["num_rows"] > 24, "sentences are in several rows"
    for rank in ranks:
        assert rank == alone


@given(st.lists(st.integers(1, 60), min_size=1, max_size=70), st.integers(1, 6), st.integers(1, 5))
def test_every_row_is_in_one_share(lengths: list[int], size: int, world_size: int) -> None:
    config = TrainConfig(per_device_train_batch_size=size, gradient_accumulation_steps=2)
    schedule = Schedule(np.array(lengths), config, world_size)
    steps = list(itertools.islice(schedule.steps_from(0), schedule.steps_per_epoch))
    seen = []
    for _, micro_batches in steps:
        shares = [schedule.share(micro_batches, rank) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert len(shares[0]) <= 2
        for together in zip(*shares, strict=True):
            tokens = [sum(lengths[row] for row in rows) for rows in together]
            assert max(tokens) - min(tokens) <= max(lengths)
            seen += [int(row) for rows in together for row in rows]
    assert sorted(seen) == list(range(len(lengths)))


def test_a_row_drops_the_same_whatever_stands_beside_it(inputs: Path) -> None:
    model, rows = load(inputs)
    model.train()

    def logits(*numbers: int) -> dict[int, torch.Tensor]:
        batch = pack(rows, numbers, CPU)
        seeds = [1000 + row for row in batch.rows]
        found = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, dropout_seeds=seeds).logits
        parts = torch.split(found, batch.cu_seqlens.diff().tolist())
        return dict(zip(batch.rows.tolist(), parts, strict=True))

    together, apart = logits(3, 1, 7, 5, 2), {**logits(1, 3), **logits(5), **logits(2, 7)}
    assert together.keys() == apart.keys()
    for row, expected in together.items():
        torch.testing.assert_close(apart[row], expected, rtol=1e-4, atol=1e-4)
    batch = pack(rows, [3], CPU)
    other = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, dropout_seeds=[7]).logits
    assert not torch.allclose(other, together[3], atol=1e-2)
    # As many are dropped as without seeds, also of the weights of attention.
    packing = Packing(torch.tensor([0, 30, 60, 90]), True, dropout_seeds=[1, 2, 2])
    masks = packing.dropout_masks
    assert masks is not None
    for keep in (masks.draw((90, 50), 0.25), masks.draw((3 * 4 * 30**2,), 0.25)):
        assert keep.unique().tolist() == [0.0, pytest.approx(4 / 3)]
        assert (keep == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
        first, second, third = keep.chunk(3)
        assert torch.equal(second, third), "the same seed"
        assert not torch.equal(first, second)


@pytest.fixture(scope="module")
def unbroken(runner: Runner, inputs: Path) -> dict[int, dict[str, Any]]:
    """What comes of the run with 2 and with 3 ranks if nothing happens to it."""
    shared = json.loads((inputs / "arguments.json").read_text())
    found = {}
    for world_size in (2, 3):
        folder = inputs / f"unbroken-{world_size}"
        statuses, log = runner.run_ranks(
            world_size, [*shared, "--output_dir", str(folder)], inputs / "log", ONE_THREAD
        )
        assert statuses == [0] * world_size, log
        # One of them speaks.
        assert log.count("Training loss  Epoch") == log.count("Try it:") == 1
        assert log.count("steps on ") == log.count("Model, model card and scores:") == 1
        found[world_size] = outcome(folder)
    return found


ONE_THREAD = "torch.set_num_threads(1)\n"

# Sends a signal to one rank as a function is called in it for the n-th time.
AT = """
torch.set_num_threads(1)
if rank == {rank}:
    import pkgutil
    owner, name, calls = pkgutil.resolve_name("{owner}"), "{name}", []
    before = getattr(owner, name)
    def patched(*args, **kwargs):
        calls.append(name)
        if len(calls) == {call}:
            os.kill(os.getpid(), {number})
        return before(*args, **kwargs)
    setattr(owner, name, patched)
"""


def at(number: int, rank: int, owner: str, name: str, call: int) -> str:
    owner = f"bertner.{owner}"
    return AT.format(number=int(number), rank=rank, owner=owner, name=name, call=call)


def steps_of(arguments: list[str]) -> list[int]:
    return [step for step, _ in list_checkpoints(Path(arguments[-1]))]


@pytest.mark.parametrize(
    ("world_size", "moment", "step"),
    [
        (2, ("loop", "dropout_seed", 8), 5),  # in the fifth step
        (3, ("evaluation", "packed_by_length", 1), 4),
        (3, ("checkpoint", "_write_manifest", 1), 3),
    ],
)
def test_a_signal_to_one_rank_stops_all_and_they_carry_on_to_the_same_bits(
    runner: Runner,
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[int, dict[str, Any]],
    world_size: int,
    moment: tuple[str, str, int],
    step: int,
) -> None:
    rank = 0 if moment[0] == "checkpoint" else world_size - 1
    code = at(signal.SIGTERM, rank, *moment)
    statuses, log = runner.run_ranks(world_size, arguments, tmp_path / "log", code)
    assert statuses == [75] * world_size, log
    assert log.count(f"stopped by SIGTERM after step {step}; ") == 1
    assert log.count(f"Carry on under torchrun, with {world_size} processes again: ") == 1
    assert steps_of(arguments)[-1] == step
    statuses, log = runner.run_ranks(world_size, arguments, tmp_path / "log", ONE_THREAD)
    assert statuses == [0] * world_size, log
    assert outcome(Path(arguments[-1])) == unbroken[world_size]


@pytest.mark.parametrize(
    ("world_size", "rank", "moment", "saved"),
    [
        (2, 1, ("loop", "dropout_seed", 11), 6),  # in step 7
        (3, 0, ("loop", "dropout_seed", 7), 3),  # in step 4
        (3, 2, ("evaluation", "packed_by_length", 1), 3),  # after step 4
        (2, 0, ("checkpoint", "_write_manifest", 2), 3),  # as step 6 is saved
        (2, 1, ("distributed:Ranks", "lead", 5), 3),  # as the other saves step 4
    ],
)
def test_a_killed_rank_ends_all_and_no_checkpoint_comes_of_it(
    runner: Runner,
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[int, dict[str, Any]],
    world_size: int,
    rank: int,
    moment: tuple[str, str, int],
    saved: int,
) -> None:
    start = time.monotonic()
    code = at(signal.SIGKILL, rank, *moment)
    statuses, log = runner.run_ranks(world_size, arguments, tmp_path / "log", code)
    assert time.monotonic() - start < 30
    expected = [74] * world_size
    expected[rank] = -signal.SIGKILL
    assert statuses == expected, log
    assert "has lost another one" in log
    assert "Traceback" not in log
    assert steps_of(arguments)[-1] == saved
    statuses, log = runner.run_ranks(world_size, arguments, tmp_path / "log", ONE_THREAD)
    assert statuses == [0] * world_size, log
    assert outcome(Path(arguments[-1])) == unbroken[world_size]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_killed_at_random_moments(
    runner: Runner, arguments: list[str], inputs: Path, tmp_path: Path, world_size: int
) -> None:
    whole = [*arguments[:-1], str(inputs / f"whole-{world_size}")]
    start = time.monotonic()
    assert set(runner.run_ranks(world_size, whole, tmp_path / "log", ONE_THREAD)[0]) == {0}
    seconds = time.monotonic() - start
    rng = random.Random(world_size)
    for attempt in range(8):
        command = [*arguments[:-1], str(tmp_path / f"killed-{attempt}")]
        for _ in range(3):
            victim = rng.randrange(world_size), rng.uniform(0.0, seconds)
            statuses, log = runner.run_ranks(
                world_size, command, tmp_path / "log", ONE_THREAD, victim
            )
            # All have ended; those that had not begun to train, at the signal itself.
            assert set(statuses) <= {-signal.SIGKILL, -signal.SIGTERM, 74, 0}, log
            assert "Traceback" not in log
        statuses, log = runner.run_ranks(world_size, command, tmp_path / "log", ONE_THREAD)
        assert set(statuses) == {0}, log
        assert outcome(Path(command[-1])) == outcome(Path(whole[-1]))


@pytest.mark.slow
@needs_minilm
@needs_conll
def test_ranks_with_minilm_on_conll(runner: Runner, tmp_path: Path) -> None:
    """One process with a batch of 16, two with 8 each, four with 4 each; dropout on."""
    data = SHARED_DATA / "conll2003"
    command = [
        *["--model", MINILM, "--train_file", str(data / "train.txt"), "--max_steps", "40"],
        *["--validation_file", str(data / "valid.txt"), "--max_eval_samples", "600"],
        *["--learning_rate", "1e-4", "--logging_steps", "1", "--dropout_by_row"],
        *["--save_strategy", "no", "--no_report", "--disable_tqdm"],
    ]
    losses, scores = {}, {}
    for world_size in (1, 2, 4):
        folder = tmp_path / str(world_size)
        batch_size = ["--per_device_train_batch_size", str(16 // world_size)]
        arguments = [*command, *batch_size, "--output_dir", str(folder)]
        statuses, log = runner.run_ranks(world_size, arguments, tmp_path / "log", ONE_THREAD)
        assert set(statuses) == {0}, log
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        events = [json.loads(line) for line in lines]
        losses[world_size] = [event["loss"] for event in events if event["event"] == "log"]
        scores[world_size] = next(event for event in events if event["event"] == "eval")
    assert len(losses[1]) == 40
    for world_size in (2, 4):
        assert losses[world_size] == pytest.approx(losses[1], rel=1e-6)
        for name in ("eval_f1", "eval_word_f1", "eval_accuracy"):
            assert scores[world_size][name] == scores[1][name]
        assert scores[world_size]["eval_loss"] == pytest.approx(scores[1]["eval_loss"], rel=1e-6)


def save_on_the_first(inputs: str, settings: Mapping[str, Any], result: str) -> None:
    """A script that saves on the first rank alone, as its watcher watches there alone."""
    torch.set_num_threads(1)
    model, rows = load(Path(inputs))
    saved: list[int] = []
    with join("cpu") as ranks:
        save = (lambda state: saved.append(state.step)) if ranks.is_first else None
        train(model, rows, TrainConfig(**settings), save=save, ranks=ranks)
        torch.save(saved, f"{result}-{ranks.rank}")


def test_only_the_first_rank_need_save(runner: Runner, inputs: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    found = share(runner, 2, "save_on_the_first", inputs, settings, tmp_path)
    assert found == [[2, 4, 5], []]


def shift(arguments: list[str], **settings: object) -> list[str]:
    """The same command with other settings."""
    given = list(arguments)
    for name, value in settings.items():
        if f"--{name}" in given:
            given[given.index(f"--{name}") + 1] = str(value)
        else:
            given[:0] = [f"--{name}", str(value)]
    return given


def test_what_fails_on_one_rank_fails_on_all_and_is_told_once(
    runner: Runner, arguments: list[str], inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.txt").write_text("Oslo B-LOC\nwaits\n")

    def run(arguments: list[str], code: str = "", world_size: int = 2) -> str:
        statuses, log = runner.run_ranks(world_size, arguments, tmp_path / "log", ONE_THREAD + code)
        assert statuses == statuses[:1] * world_size
        assert "Traceback" not in log
        messages = [line for line in log.splitlines() if line.startswith("bertner-train: ")]
        assert len(messages) == len(set(messages)), log
        return f"{statuses[0]} {log}"

    broken = shift(arguments, validation_file=tmp_path / "broken.txt")
    assert run(broken).startswith("65 ")
    assert not Path(arguments[-1]).exists()
    # The message is that of the rank on which it went wrong.
    log = run(arguments, f"if rank == 1: arguments = {broken!r}")
    assert log.startswith("65 ")
    assert "bertner-train: rank 1: " in log
    other = shift(arguments, train_file=inputs / "test.txt")
    log = run(arguments, f"if rank == 1: arguments = {other!r}")
    assert log.startswith("65 ")
    assert "rank 1: does not train what rank 0 does: train data SHA-256" in log
    log = run(arguments, f"if rank == 1: arguments = {shift(arguments, save_steps=5)!r}")
    assert log.startswith("65 ")
    assert "rank 1: does not train what rank 0 does: save_steps\n" in log
    log = run(shift(arguments, learning_rate=1e30, max_grad_norm=0), world_size=3)
    assert log.startswith("70 ")
    tanh = tmp_path / "tanh-bert"
    shutil.copytree(inputs / "tiny-bert", tanh)
    config = json.loads((tanh / "config.json").read_text())
    (tanh / "config.json").write_text(json.dumps({**config, "hidden_act": "tanh"}))
    fresh = [*arguments[:-1], str(tmp_path / "fresh")]
    log = run(fresh, f"if rank == 1: arguments = {shift(fresh, model=tanh)!r}")
    assert log.startswith("65 ")
    assert "rank 1: does not train what rank 0 does: hidden_act\n" in log
    log = run(fresh, f"if rank == 1: arguments = {shift(fresh, device='cuda')!r}")
    assert log.startswith("2 ")
    assert "rank 1: device 'cuda' cannot be used here" in log
    os.mkfifo(tmp_path / "pipe")
    log = run(shift(fresh, train_file=tmp_path / "pipe"))
    assert log.startswith("2 ")
    assert "several processes cannot all read it" in log
    full = "import bertner.files\nbertner.files.free_bytes = lambda path: 0"
    log = run([*arguments[:-1], str(tmp_path / "full")], full)
    assert log.startswith("74 ")
    assert "only 0.0 MB are free there" in log


def test_a_run_goes_on_with_as_many_ranks_as_it_had(
    runner: Runner, arguments: list[str], tmp_path: Path
) -> None:
    code = at(signal.SIGTERM, 0, "loop", "dropout_seed", 5)
    statuses, log = runner.run_ranks(2, arguments, tmp_path / "log", code)
    assert statuses == [75, 75], log
    for world_size in (1, 3):
        statuses, log = runner.run_ranks(world_size, arguments, tmp_path / "log", ONE_THREAD)
        assert statuses == [78] * world_size
        assert f"world_size 2 -> {world_size}" in log
    statuses, log = runner.run_ranks(
        3, [*arguments[:-2], "--allow_inexact_resume", *arguments[-2:]], tmp_path / "log"
    )
    assert statuses == [0, 0, 0], log
    resumes = json.loads((Path(arguments[-1]) / "run.json").read_text())["resumes"]
    assert "world_size 2 -> 3" in resumes[0]["differences"]


def test_several_seeds_on_several_ranks(
    runner: Runner, arguments: list[str], tmp_path: Path
) -> None:
    several = shift(arguments, seeds=2, num_train_epochs=2)
    code = at(signal.SIGTERM, 1, "loop", "dropout_seed", 10)  # in the second seed's run
    statuses, log = runner.run_ranks(2, several, tmp_path / "log", code)
    assert statuses == [75, 75], log
    assert log.count("Seed 43 (2 of 2)") == 1
    statuses, log = runner.run_ranks(2, several, tmp_path / "log", ONE_THREAD)
    assert statuses == [0, 0], log
    assert log.count("Kept: seed ") == 1
    results = json.loads((Path(arguments[-1]) / "all_results.json").read_text())
    assert [run["seed"] for run in results["seeds"]["runs"]] == [42, 43]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT says nothing"),
        (
            {"RANK": "x", "WORLD_SIZE": "2"},
            "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT says nothing",
        ),
    ],
)
def test_half_an_environment(
    monkeypatch: pytest.MonkeyPatch, names: dict[str, str], message: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with join() as ranks:
        assert ranks == ALONE
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), join():
        pass


def test_what_does_not_fit_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UsageError, match="4 ranks cannot share cuda:1"), join("cuda:1"):
        pass
    with pytest.raises(UsageError, match="nccl is for CUDA"), join("cpu", "nccl"):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="2 CUDA devices, but local rank 3"), join():
        pass


def test_torchrun_starts_ranks_again_and_they_carry_on(
    arguments: list[str], tmp_path: Path, unbroken: dict[int, dict[str, Any]]
) -> None:
    script = tmp_path / "train.py"
    kill = at(signal.SIGKILL, 1, "loop", "dropout_seed", 11)  # in step 7
    script.write_text(
        "import os, sys, torch\n"
        "from bertner.cli import train_main\n"
        "rank = int(os.environ['RANK'])\n"
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        f"    exec({kill!r})\n"
        "sys.exit(train_main())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--max-restarts", "1", str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Model, model card and scores:") == 1
    assert result.stderr.count("carrying on after step 6 of 12") == 1
    record = json.loads((Path(arguments[-1]) / "run.json").read_text())
    assert record["machine"]["world_size"] == 2
    assert "2 processes with 1 threads" in record["device"]
    assert outcome(Path(arguments[-1])) == unbroken[2]
