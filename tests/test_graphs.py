"""The path of CUDA devices, walked without one.

On a CPU that is said to be queued, everything but the card's own kernels runs as it would there; on
the meta device nothing has a value that a step could wait for.
"""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.flop_counter  # which jagged attention looks for on the meta device
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nested._internal import sdpa
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from bertner import graphs, kernels, loop, progress
from bertner.attention import attention_jagged, attention_packed
from bertner.batches import LONGEST_DUMMY, Bucket, bucket_of, pack
from bertner.config import BertConfig, Reading, TrainConfig
from bertner.data import TokenDataset, labels_for, tokenize
from bertner.errors import NotFiniteError, UsageError
from bertner.graphs import why_no_graphs
from bertner.loop import Evaluation, StepReport, TrainState, train
from bertner.model import BertForNER, token_loss
from bertner.optimizer import build_optimizer, gradient_norm
from bertner.packing import JaggedPacking, Packing
from bertner.readers import read_file
from bertner.record import hash_tensors
from bertner.tokenizer import Tokenizer
from tests.capture import CaptureOnCpu
from tests.conftest import (
    REPOSITORY,
    SHARED_DATA,
    needs_cased_vocab,
    needs_conll,
    write_conll,
    write_model_folder,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Of a CPU's way of computing jagged attention, row by row.
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

CPU = torch.device("cpu")


def load(folder: Path, dropout: float) -> tuple[BertForNER, TokenDataset]:
    """A tiny model, and 40 rows."""
    folder.mkdir()
    write_model_folder(
        folder / "tiny", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    corpus = read_file(write_conll(folder / "train.txt", 40))
    labels = labels_for(corpus)
    torch.manual_seed(3)
    id2label = dict(enumerate(labels.names))
    model = BertForNER.from_pretrained(folder / "tiny", id2label=id2label)
    tokenizer = Tokenizer.from_pretrained(folder / "tiny", model.config)
    return model, tokenize(corpus, tokenizer, labels, reading=Reading())


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertForNER, TokenDataset]:
    """Without dropout: what is left to chance differs with the shapes of batches."""
    return load(tmp_path_factory.mktemp("parts") / "parts", 0.0)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> tuple[BertForNER, TokenDataset]:
    """With dropout."""
    return load(tmp_path_factory.mktemp("parts") / "parts", 0.1)


@pytest.fixture
def queued(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the CPU for a CUDA device."""
    monkeypatch.setattr(kernels, "QUEUED", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "Capture", CaptureOnCpu)
    monkeypatch.setattr(CaptureOnCpu, "captured", 0)
    monkeypatch.setattr(CaptureOnCpu, "replays", 0)


@dataclass
class Watched:
    """A watcher that keeps what it is told."""

    reports: list[tuple[int, float, float, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float, bool]] = field(default_factory=list)
    saves: list[tuple[int, str]] = field(default_factory=list)
    model: BertForNER | None = None

    def stepped(self, report: StepReport) -> None:
        self.reports.append((report.step, report.loss, report.grad_norm, report.learning_rate))

    def evaluating(self, num_rows: int) -> Any:
        return lambda rows: None

    def evaluated(self, step: int, epoch: float, evaluation: Evaluation, is_best: bool) -> None:
        self.evaluations.append((step, evaluation.loss, is_best))

    def save(self, state: TrainState) -> None:
        assert self.model is not None
        tensors = {**self.model.state_dict(), **state.optimizer}
        self.saves.append((state.step, hash_tensors(tensors)))

    @property
    def losses(self) -> list[float]:
        return [loss for _, loss, _, _ in self.reports]


def run(
    parts: tuple[BertForNER, TokenDataset], **settings: Any
) -> tuple[Watched, dict[str, Tensor]]:
    model = copy.deepcopy(parts[0])
    watched = Watched(model=model)
    config = TrainConfig(**{"max_steps": 15, "learning_rate": 1e-2, **settings})
    train(model, parts[1], config, evaluation=parts[1], watcher=watched, save=watched.save)
    return watched, model.state_dict()


# Buckets


@given(st.integers(1, 600), st.data())
def test_a_bucket_has_room_and_short_dummies(num_rows: int, data: st.DataObject) -> None:
    num_tokens = data.draw(st.integers(3 * num_rows, 60 * num_rows))
    bucket = bucket_of(num_rows, num_tokens)
    num_dummies, tail = bucket.num_rows - num_rows, bucket.num_tokens - num_tokens
    assert 1 <= num_dummies <= tail
    assert -(-tail // num_dummies) <= LONGEST_DUMMY
    assert tail <= max(64, num_tokens / 16) + num_dummies
    assert num_dummies <= 8 + num_tokens // 1024


def test_there_are_few_buckets() -> None:
    rng = np.random.default_rng(0)
    for batch_size, most in ((8, 8), (32, 12), (128, 14)):
        tokens = rng.gamma(3.0, 7.0, (2000, batch_size)).astype(int).clip(3, 120).sum(1)
        assert len({bucket_of(batch_size, int(count)) for count in tokens}) <= most


def test_a_filled_up_batch(parts: tuple[BertForNER, TokenDataset]) -> None:
    dataset = parts[1]
    exact, filled = (pack(dataset, [5, 3, 8], CPU, bucket) for bucket in (None, Bucket(9, 128)))
    size = len(exact.input_ids)
    assert filled.input_ids.shape == filled.labels.shape == filled.is_own.shape == (128,)
    for name in ("input_ids", "labels", "is_own"):
        assert torch.equal(getattr(filled, name)[:size], getattr(exact, name))
    assert filled.cu_seqlens[:4].tolist() == exact.cu_seqlens.tolist()
    assert filled.cu_seqlens[-1] == 128
    assert len(filled.cu_seqlens) == 10
    assert filled.cu_seqlens.diff().min() >= 1
    assert filled.labels[size:].unique().tolist() == [-100]
    assert not filled.is_own[size:].any()
    assert np.array_equal(filled.rows, exact.rows)
    assert np.array_equal(filled.token_index, exact.token_index)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dummies_change_neither_loss_nor_gradients(
    parts: tuple[BertForNER, TokenDataset], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    model, dataset = parts
    model.train()
    rng = np.random.default_rng(1)

    def compute(queued: bool, bucket: Bucket | None) -> tuple[float, dict[str, Tensor]]:
        monkeypatch.setattr(kernels, "QUEUED", ("cpu",) if queued else ())
        model.zero_grad()
        batch = pack(dataset, rows, CPU, bucket)
        with kernels.gradient_buffers(model), loop.autocast(CPU, dtype):
            logits = model(batch.input_ids, **batch.layout).logits
            loss = token_loss(logits, batch.labels, "sum")
            with torch.autocast("cpu", enabled=False):  # as the loop does it
                loss.backward()
            grads = {n: p.grad.to_dense().clone() for n, p in model.named_parameters()}
        return float(loss.detach()), grads

    for num_rows in (1, 7, 8, 23):
        rows = rng.choice(len(dataset), num_rows, replace=False)
        bucket = bucket_of(num_rows, int(dataset.row_lengths[rows].sum()))
        loss, grads = compute(False, None)
        for queued, size in ((False, bucket), (True, None), (True, bucket)):
            other_loss, other_grads = compute(queued, size)
            tolerance = 1e-6 if dtype == "float32" else 5e-3
            assert other_loss == pytest.approx(loss, rel=tolerance)
            tolerance = 1e-5 if dtype == "float32" else 0.1
            # The biases of keys have no gradient but rounding.
            floor = 1e-2 * max(grad.norm() for grad in grads.values())
            for name, grad in grads.items():
                difference = (other_grads[name] - grad).norm()
                assert difference < tolerance * (grad.norm() + floor), name


@pytest.mark.parametrize(("heads", "size"), [(1, 8), (3, 16), (2, 13), (3, 4)])
def test_jagged_attention(heads: int, size: int) -> None:
    lengths = [1, 2, 5, 5, 40]
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(53, 3 * heads * size, generator=generator)
    weights = torch.randn(53, heads * size, generator=generator)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)])
    found = []
    for jagged in (False, True):
        x = qkv.clone().requires_grad_()
        if jagged:
            out = attention_jagged(x, cu_seqlens, 44, heads, 0.0)
        else:
            out = attention_packed(x, Packing(cu_seqlens, False).places(heads), None)
        (out * weights).sum().backward()
        found.append((out.detach(), x.grad))
        with torch.no_grad():
            again = attention_jagged(qkv, cu_seqlens, 44, heads, 0.0)
        torch.testing.assert_close(again, out.detach(), rtol=1e-5, atol=1e-6)
    for exact, other in zip(*found, strict=True):
        torch.testing.assert_close(other, exact, rtol=1e-4, atol=1e-6)
    positions = JaggedPacking(cu_seqlens, 53, 40, training=False).position_ids
    assert torch.equal(positions, Packing(cu_seqlens, False).position_ids)


def test_the_model_asks_for_the_longest_row_if_nobody_says(
    parts: tuple[BertForNER, TokenDataset], queued: None
) -> None:
    model, dataset = copy.deepcopy(parts[0]).eval(), parts[1]
    batch = pack(dataset, [1, 2], CPU)
    told = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
    asked = model(batch.input_ids, cu_seqlens=batch.cu_seqlens)
    assert torch.equal(told.logits, asked.logits)
    with pytest.raises(ValueError, match="129 tokens in a row, but the model has 128 positions"):
        model(torch.zeros(129, dtype=torch.int64), cu_seqlens=torch.tensor([0, 129]))


# The loop


@pytest.mark.parametrize(
    "settings",
    [
        {"class_weights": "sqrt", "label_smoothing_factor": 0.1},
        {"train_batch_tokens": 70},
        {"max_grad_norm": 0.1, "freeze_embeddings": True},
        {"max_grad_norm": 0.0, "per_device_train_batch_size": 3, "weight_decay": 0.1},
        {"packing": False},
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_training_on_a_queued_device_is_training(
    parts: tuple[BertForNER, TokenDataset], queued: None, settings: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "QUEUED", ("cuda",))
        exact, weights = run(parts, **settings)
    for cuda_graphs in (True, False):
        found, other = run(parts, **settings, cuda_graphs=cuda_graphs)
        assert [r[0] for r in found.reports] == list(range(1, 16))
        for column in (1, 2, 3):  # loss, norm, rate
            values = [[report[column] for report in each.reports] for each in (found, exact)]
            assert values[0] == pytest.approx(values[1], rel=1e-4 if column == 2 else 2e-6)
        for name, tensor in weights.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-4, msg=name)


def test_a_step_is_captured_once_for_each_bucket(
    dropping: tuple[BertForNER, TokenDataset], queued: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    seed_dropout = kernels.seed_dropout

    def note(seed: int, device: torch.device) -> None:
        seeds.append(seed)
        seed_dropout(seed, device)

    monkeypatch.setattr(kernels, "seed_dropout", note)
    captured, weights = run(dropping, max_steps=30)
    buckets = Counter(
        bucket_of(len(rows), int(dropping[1].row_lengths[rows].sum()))
        for _, (rows,) in itertools.islice(
            loop.Schedule(dropping[1].row_lengths, TrainConfig()).steps_from(0), 30
        )
    )
    often = [bucket for bucket, count in buckets.items() if count > 2]
    assert len(often) >= 1
    assert len(often) <= CaptureOnCpu.captured <= len(buckets)
    assert CaptureOnCpu.replays >= 20
    # Every step has dropout of its own, by its seed alone.
    assert set(seeds) == {loop.dropout_seed(42, step, 0) for step in range(30)}
    again, same = run(dropping, max_steps=30)
    assert again.losses == captured.losses
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())


def test_a_step_that_cannot_be_captured_is_taken_all_the_same(
    dropping: tuple[BertForNER, TokenDataset],
    queued: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    captured, weights = run(dropping)

    class Unable(CaptureOnCpu):
        def __call__(self, function: Callable[[], list[Tensor]]) -> Any:
            torch.rand(3)  # as a capture may
            raise RuntimeError("operation not permitted when stream is capturing\nmore of that")

    monkeypatch.setattr(graphs, "Capture", Unable)
    eager, same = run(dropping)
    assert eager.reports == captured.reports
    assert all(torch.equal(same[name], tensor) for name, tensor in weights.items())
    assert [record.getMessage() for record in caplog.records if record.name == "bertner"] == [
        "CUDA graphs: off: a step cannot be captured here: operation not permitted when stream is "
        "capturing"
    ]


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_running_ahead_changes_nothing_that_is_seen(
    dropping: tuple[BertForNER, TokenDataset],
    queued: None,
    monkeypatch: pytest.MonkeyPatch,
    cuda_graphs: bool,
) -> None:
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 7,
        "cuda_graphs": cuda_graphs,
    }
    ahead = run(dropping, **settings)[0]
    assert [step for step, _ in ahead.saves if step % 7 == 0] == [7, 14]
    assert [step for step, _, _ in ahead.evaluations] == [4, 8, 12, 15]
    monkeypatch.setattr(loop, "InFlight", lambda device: progress.InFlight(device, most=0))
    behind = run(dropping, **settings)[0]
    assert ahead.reports == behind.reports
    assert ahead.evaluations == behind.evaluations
    assert ahead.saves == behind.saves


def test_a_run_on_a_queued_device_is_carried_on_to_the_same_bits(
    dropping: tuple[BertForNER, TokenDataset], queued: None
) -> None:
    _, weights = run(dropping)
    for stop_at in (1, 6, 11):
        model = copy.deepcopy(dropping[0])
        watched = Watched()
        config = TrainConfig(max_steps=15, learning_rate=1e-2)
        stopped = train(
            model,
            dropping[1],
            config,
            watcher=watched,
            should_stop=lambda at=stop_at, w=watched: len(w.reports) >= at,
        )
        assert stopped.stopped
        # What the device had been given was done, too.
        assert stop_at <= stopped.step == len(watched.reports) <= stop_at + 4
        train(model, dropping[1], config, state=stopped.state)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, weights[name])


def test_a_run_of_a_cpu_goes_on_on_a_card(
    parts: tuple[BertForNER, TokenDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(max_steps=10, learning_rate=1e-2)
    watched, model = Watched(), copy.deepcopy(parts[0])
    stopped = train(
        model, parts[1], config, watcher=watched, should_stop=lambda: len(watched.reports) == 5
    )
    name = "bert.embeddings.word_embeddings.weight"
    rows = stopped.state.optimizer[f"{name}.rows"]
    assert 0 < len(rows) < len(model.bert.embeddings.word_embeddings.weight)
    twin, state = copy.deepcopy(model), copy.deepcopy(stopped.state)
    expected = train(twin, parts[1], config, state=state)
    monkeypatch.setattr(kernels, "QUEUED", ("cpu",))
    monkeypatch.setattr(graphs, "Capture", CaptureOnCpu)
    found = train(model, parts[1], config, state=stopped.state)
    assert f"{name}.rows" not in found.state.optimizer
    whole = found.state.optimizer[f"{name}.exp_avg"]
    rows, average = (expected.state.optimizer[f"{name}.{key}"] for key in ("rows", "exp_avg"))
    torch.testing.assert_close(whole[rows], average, rtol=1e-3, atol=1e-4)
    for key, tensor in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_no_step_is_taken_from_a_bad_one_on(
    parts: tuple[BertForNER, TokenDataset],
    queued: None,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    monkeypatch.setattr(loop, "learning_rate_at", lambda *args: 1e-2)
    _, weights = run(parts, max_steps=5)
    calls: list[int] = []

    def poisoned(*args: Any) -> Tensor:
        calls.append(0)
        return token_loss(*args) * (float("nan") if len(calls) == 6 else 1.0)

    def endless(parameters: Any) -> Tensor:
        calls.append(0)
        return gradient_norm(parameters) * (float("inf") if len(calls) == 6 else 1.0)

    if what == "loss":
        monkeypatch.setattr(loop, "token_loss", poisoned)
    else:
        monkeypatch.setattr(loop, "gradient_norm", endless)
    model = copy.deepcopy(parts[0])
    with pytest.raises(NotFiniteError, match="step 6: "):
        train(model, parts[1], TrainConfig(max_steps=15))
    assert len(calls) > 6, "the host was ahead"
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])


# What a step does


class NothingWaits(TorchDispatchMode):
    """Fails where a captured step would: at a value of the device, or a copy from the host."""

    FORBIDDEN = (
        "_local_scalar_dense nonzero masked_select unique _unique2 is_nonzero item equal bincount "
        "repeat_interleave.Tensor allclose"
    ).split()

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        self.seen.add(name)
        assert name not in self.FORBIDDEN
        assert name.partition(".")[0] not in self.FORBIDDEN
        result = func(*args, **(kwargs or {}))
        for tensor in [*args, *(kwargs or {}).values(), result]:
            if isinstance(tensor, Tensor):
                # Numbers, and what a nested tensor keeps a number in, are on the host.
                assert tensor.device.type == "meta" or tensor.numel() <= 1, name
        if name.startswith(("index.", "index_put")):
            assert all(index.dtype == torch.int64 for index in args[1] if index is not None)
        return result


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Callable[[SDPBackend], None]:
    """Takes the meta device, where no tensor has values, for a CUDA device."""
    autocast, is_enabled = torch.autocast, torch.is_autocast_enabled

    def no_autocast(kind: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if kind == "meta" else autocast(kind, *args, **kwargs)

    monkeypatch.setattr(kernels, "QUEUED", ("cuda", "meta"))
    monkeypatch.setattr(torch, "autocast", no_autocast)
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind: kind != "meta" and is_enabled(kind)
    )
    # It has no form for this device; on CUDA it can be captured.
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: None)
    return lambda backend: monkeypatch.setattr(sdpa, "_select_sdp_backend", lambda *args: backend)


@pytest.mark.parametrize(
    ("backend", "kernel"),
    [
        (SDPBackend.EFFICIENT_ATTENTION, "_efficient_attention"),  # of float32
        (SDPBackend.FLASH_ATTENTION, "_flash_attention"),  # of bfloat16
    ],
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"class_weights": "balanced", "label_smoothing_factor": 0.1},
        {"freeze_embeddings": True, "max_grad_norm": 0.0},
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_nothing_in_a_step_waits_for_the_device(
    dropping: tuple[BertForNER, TokenDataset],
    meta: Callable[[SDPBackend], None],
    monkeypatch: pytest.MonkeyPatch,
    backend: SDPBackend,
    kernel: str,
    settings: dict[str, Any],
) -> None:
    meta(backend)
    modes: list[NothingWaits] = []

    def capture(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        modes.append(NothingWaits())
        with modes[-1]:
            results = function()
        assert [result.shape for result in results] == [(2,)]
        return (lambda: None), results

    class Landed(progress.InFlight[Any]):
        def launched(self, result: Tensor, facts: Any) -> None:
            super().launched(torch.ones(2), facts)

    monkeypatch.setattr(graphs, "Capture", lambda: capture)
    monkeypatch.setattr(loop, "InFlight", Landed)
    monkeypatch.setattr(progress.Progress, "_check_finite", lambda self: None)
    model = copy.deepcopy(dropping[0]).to("meta")
    config = TrainConfig(max_steps=12, train_batch_tokens=100, **settings)
    assert train(model, dropping[1], config).step == 12
    assert len(modes) >= 1
    for mode in modes:
        assert {f"{kernel}_forward", f"{kernel}_backward"} <= mode.seen
        assert {"embedding", "nll_loss_forward", "maximum.out"} <= mode.seen


def test_a_step_that_waits_is_found_out(meta: Callable[[SDPBackend], None]) -> None:
    x = torch.ones(3, device="meta")
    for wait in (
        lambda: x[x > 0],
        lambda: torch.unique(x),
        lambda: x.to("cpu") if x.sum() > 1 else x,
        lambda: x.clone().copy_(torch.ones(3)),
    ):
        with pytest.raises((AssertionError, NotImplementedError, RuntimeError)), NothingWaits():
            wait()


def test_when_steps_are_not_captured(parts: tuple[BertForNER, TokenDataset], queued: None) -> None:
    model = parts[0]
    assert why_no_graphs(TrainConfig(), model) is None
    settings: dict[str, Any]
    for settings, reason in [
        ({"cuda_graphs": False}, "as asked"),
        ({"packing": False}, "padded"),
        ({"gradient_accumulation_steps": 2}, "several micro-batches"),
    ]:
        assert reason in str(why_no_graphs(TrainConfig(**settings), model))
    short = BertForNER(BertConfig(hidden_size=12, max_position_embeddings=60, num_hidden_layers=1))
    assert "positions" in str(why_no_graphs(TrainConfig(), short))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "QUEUED", ("cuda",))
        assert why_no_graphs(TrainConfig(), model) == "there are none for cpu"
    with pytest.raises(UsageError, match="on a CPU, not on meta"):
        train(copy.deepcopy(model).to("meta"), parts[1], TrainConfig(dropout_by_row=True))


# What is the card's


def test_how_a_cuda_device_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> list[Any]:
        memory: Any = torch.utils.deterministic
        return [
            torch.backends.cuda.matmul.fp32_precision,  # type: ignore[attr-defined]
            torch.are_deterministic_algorithms_enabled(),
            memory.fill_uninitialized_memory,
        ]

    before, cuda = state(), torch.device("cuda")
    with kernels.on_device(cuda, tf32=False, deterministic=True):
        assert state() == ["ieee", True, False]
    assert state() == before
    with kernels.on_device(cuda, tf32=True, deterministic=False):
        assert state() == ["tf32", *before[1:]]
    assert state() == before
    with kernels.on_device(CPU, tf32=True, deterministic=True):
        assert state() == before


def test_only_the_generator_of_the_card_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    generators = [torch.Generator(), torch.Generator()]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    before = torch.random.get_rng_state()
    kernels.seed_dropout(7, torch.device("cuda:0"))
    kernels.seed_dropout(8, torch.device("cuda"))
    assert [generator.initial_seed() for generator in generators] == [7, 8]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_graphs_share_a_pool_and_are_captured_in_the_stream_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Any, Any]] = []

    class Graph:
        def pool(self) -> str:
            return "the pool"

        def replay(self) -> None:
            calls.append(("replay", None))

    @contextmanager
    def capturing(graph: Graph, pool: Any, stream: Any) -> Iterator[None]:
        calls.append((pool, stream))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    capture = graphs.Capture()
    for _ in range(2):
        replay, (result,) = capture(lambda: [torch.ones(2)])
        assert result.tolist() == [1, 1]
        replay()
    replayed = ("replay", None)
    assert calls == [(None, "the stream"), replayed, ("the pool", "the stream"), replayed]


def test_a_step_is_skipped_by_the_kernel_itself(queued: None) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(layer, TrainConfig())
    assert all(group["capturable"] for group in optimizer.param_groups)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for value, moves in ((1.0, True), (float("nan"), False), (1.0, False)):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.halt_unless_finite(torch.tensor(value), torch.tensor(2.0))
        optimizer.step()
        same = all(torch.equal(before[n], tensor) for n, tensor in layer.state_dict().items())
        assert same != moves
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        assert all(state["step"] == 1 for state in optimizer.state.values())


@pytest.mark.slow
@needs_conll
@needs_cased_vocab
def test_the_benchmark_walks_through_without_a_card(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench_cuda", "--data", str(SHARED_DATA)]
    environment = {**os.environ, "BERTNER_CACHE": str(tmp_path)}
    result = subprocess.run(
        [*command, "--dry-run", "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    for line in ("small, a step in float32 against float64", "batch 128, bfloat16", "not judged"):
        assert line in result.stdout
    if not torch.cuda.is_available():
        refused = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
        assert refused.returncode == 2
