"""The optimizer against PyTorch's own."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from bertner import kernels
from bertner.config import TrainConfig
from bertner.model import BertForNER
from bertner.optimizer import (
    ROWS_PER_CALL,
    AdamW,
    build_optimizer,
    clip,
    gradient_norm,
    load_named_state,
    named_state,
)

Pair = tuple[nn.Embedding, torch.optim.AdamW]


def test_decay_is_left_out_where_the_trainer_leaves_it_out(model_folder: Path) -> None:
    model = BertForNER.from_pretrained(model_folder)
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.25))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups
    }
    theirs = transformers.Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert groups[0.25] == set(theirs)
    assert "classifier.weight" in groups[0.25]
    assert "bert.embeddings.word_embeddings.weight" in groups[0.25]
    assert "bert.embeddings.LayerNorm.weight" in groups[0.0]


def test_clipping_folded_into_the_optimizer_is_clipping() -> None:
    def run(how: str) -> torch.Tensor:
        parameter = nn.Parameter(torch.linspace(-1, 1, 50))
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
        for k, size in enumerate([0.01, 10.0, 0.1, 100.0]):  # some to be clipped, some not
            parameter.grad = size * torch.linspace(-1, 2, 50).roll(k)
            if how != "unclipped":
                norm = gradient_norm([parameter])
                clip(optimizer, 1.0, norm, fold=how == "folded")
            optimizer.step()
        return parameter.detach()

    assert torch.allclose(run("folded"), run("apart"), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(run("folded"), run("unclipped"), rtol=1e-2)


def run_pair(weight_decay: float, num_steps: int = 6) -> tuple[Pair, Pair]:
    """A table stepped with sparse gradients, and its twin by PyTorch with the same, but dense."""
    num_rows, width = 3 * ROWS_PER_CALL + 5, 16
    torch.manual_seed(0)
    table = nn.Embedding(num_rows, width)
    twin = copy.deepcopy(table)
    settings: dict[str, Any] = {"weight_decay": weight_decay, "betas": (0.8, 0.95), "fused": True}
    ours, theirs = (
        AdamW(table.parameters(), **settings),
        torch.optim.AdamW(twin.parameters(), **settings),
    )
    with kernels.gradient_buffers(table):
        for step in range(num_steps):
            for optimizer in (ours, theirs):
                optimizer.zero_grad()
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            ids = torch.randint(0, num_rows, (700 * step + 5,))
            ids[:5] = torch.tensor([3, 3, num_rows - 1, 4, 3])
            hidden = kernels.embedding(ids, table)
            hidden.backward(torch.randn(len(ids), width))  # type: ignore[no-untyped-call]
            grad = table.weight.grad
            assert grad is not None
            assert grad.is_sparse
            twin.weight.grad = grad.to_dense()
            norm = gradient_norm([table.weight])
            for optimizer in (ours, theirs):
                clip(optimizer, (1e9, 0.5)[step % 2], norm, fold=True)
                optimizer.step()
            assert torch.equal(table.weight, twin.weight), step
        assert [each.weight.grad is None for each in (table, twin)] == [True, False]
    return (table, ours), (twin, theirs)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_a_sparse_gradient_is_stepped_as_a_dense_one(weight_decay: float) -> None:
    """In every bit: several calls of rows, rows that come and stay away, clipped or not."""
    (_, ours), (_, theirs) = run_pair(weight_decay)
    found, expected = (optimizer.state_dict()["state"][0] for optimizer in (ours, theirs))
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
        assert found[name].dtype == expected[name].dtype


def test_rows_without_a_gradient_have_no_averages() -> None:
    (table, ours), (_, theirs) = run_pair(0.3)
    used = theirs.state_dict()["state"][0]["exp_avg_sq"].ne(0).any(1).nonzero()[:, 0]
    rows = ours.state[table.weight]["table"].rows
    assert len(rows) < len(table.weight)
    assert torch.equal(rows.sort().values, used)


def test_state_goes_to_pytorch_and_back() -> None:
    """Saved after some steps by either, it is carried on by either, with gradients of any kind."""
    settings: dict[str, Any] = {"lr": 0.01, "fused": True}
    results = []
    for after in itertools.product(run_pair(0.0), (AdamW, torch.optim.AdamW), (True, False)):
        (table, saved), kind, is_sparse = after
        if kind is torch.optim.AdamW and is_sparse:
            continue  # which is what it cannot do
        table = copy.deepcopy(table)
        optimizer = kind(table.parameters(), **settings)
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        for ids in (torch.tensor([3, 9, 9]), torch.tensor([9, 1000])):
            grad = torch.zeros_like(table.weight)
            grad[ids] = 0.5
            table.weight.grad = grad.to_sparse(1) if is_sparse else grad
            optimizer.step()
        results.append((table.weight.detach(), optimizer.state_dict()["state"][0]))
    assert len(results) == 6
    for weight, state in results[1:]:
        assert torch.equal(weight, results[0][0])
        assert all(torch.equal(state[name], results[0][1][name]) for name in state)


def test_gradients_may_change_their_kind() -> None:
    (table, ours), (twin, theirs) = run_pair(0.0, 3)
    for is_sparse in (False, True, False):
        grad = torch.zeros_like(table.weight)
        grad[7:40] = 0.5
        twin.weight.grad = grad
        table.weight.grad = grad.to_sparse(1) if is_sparse else grad.clone()
        ours.step()
        theirs.step()
        assert torch.equal(table.weight, twin.weight)


def test_state_lies_in_one_piece() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    twin = copy.deepcopy(model)
    ours = AdamW(model.parameters(), fused=True)
    theirs = torch.optim.AdamW(twin.parameters(), fused=True)
    x = torch.randn(4, 3)
    twin[1].weight.requires_grad_(False)
    model[1].weight.requires_grad_(False)
    for step in range(4):
        if step == 2:  # one that starts later
            for each in (model, twin):
                each[1].weight.requires_grad_(True)
        for each, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(mine, other)
    assert ours.state_dict()["state"].keys() == theirs.state_dict()["state"].keys()
    pieces = {ours.state[p]["exp_avg"].untyped_storage().data_ptr() for p in model.parameters()}
    assert len(pieces) == 2


def test_a_row_whose_mean_is_zero_keeps_its_square() -> None:
    table = nn.Embedding(8, 4)
    optimizer = AdamW(table.parameters(), fused=True)
    state = {name: torch.zeros(8, 4) for name in ("exp_avg", "exp_avg_sq")}
    state["exp_avg_sq"][5] = 1.0
    saved = optimizer.state_dict()
    optimizer.load_state_dict({**saved, "state": {0: {"step": torch.tensor(3.0), **state}}})
    table.weight.grad = torch.ones(8, 4).to_sparse(1)
    optimizer.step()
    squares = optimizer.state_dict()["state"][0]["exp_avg_sq"]
    assert torch.allclose(squares[:5], torch.tensor(0.001))
    assert torch.allclose(squares[5], torch.tensor(1.0))


class Small(nn.Module):
    """A table that is stepped by rows, a layer, and a parameter that never has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Embedding(50, 16)
        self.layer = nn.Linear(16, 4)
        self.idle = nn.Parameter(torch.ones(3))

    def take_step(self, optimizer: AdamW, ids: list[int]) -> None:
        optimizer.zero_grad()
        with kernels.gradient_buffers(self):
            x = kernels.embedding(torch.tensor(ids), self.table)
            self.layer(x).square().sum().backward()
            optimizer.step()


def small_with_state() -> tuple[Small, AdamW]:
    model = Small()
    optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
    for ids in ([9, 4, 4], [7, 4]):
        model.take_step(optimizer, ids)
    return model, optimizer


def test_state_by_name_goes_out_and_in() -> None:
    model, optimizer = small_with_state()
    state = {name: tensor.clone() for name, tensor in named_state(optimizer, model).items()}
    assert state["table.weight.rows"].tolist() == [4, 9, 7]
    assert state["table.weight.exp_avg"].shape == (3, 16)
    assert state["layer.weight.exp_avg_sq"].shape == (4, 16)
    assert state["layer.bias.step"] == 2
    assert not any(name.startswith("idle") for name in state)

    twin = Small()
    twin.load_state_dict(model.state_dict())
    other = AdamW(twin.parameters(), lr=0.1, fused=True)
    load_named_state(other, twin, state)
    for ids in ([7, 1], [9]):
        model.take_step(optimizer, ids)
        twin.take_step(other, ids)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    for name, tensor in named_state(other, twin).items():
        assert torch.equal(tensor, named_state(optimizer, model)[name]), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layer.weight.exp_avg", None),
        ("layer.weight.exp_avg", torch.zeros(16, 4)),
        ("layer.weight.exp_avg", torch.zeros(4, 16, dtype=torch.float64)),
        ("layer.bias.step", torch.zeros(1)),
        ("other.step", torch.zeros(())),
        ("idle.exp_avg", torch.zeros(3)),
        ("table.weight.rows", torch.tensor([4, 9, 4])),
        ("table.weight.rows", torch.tensor([4, 9, 50])),
        ("table.weight.rows", torch.tensor([4, -1, 7])),
        ("table.weight.rows", torch.tensor([4.0, 9.0, 7.0])),
        ("table.weight.rows", torch.tensor([4, 9])),
        ("table.weight.rows", torch.arange(60)),
        ("layer.bias.rows", torch.arange(4)),
    ],
)
def test_state_of_another_model_is_refused(name: str, value: torch.Tensor | None) -> None:
    model, optimizer = small_with_state()
    before = {name: tensor.clone() for name, tensor in named_state(optimizer, model).items()}
    state: dict[str, Any] = {**before, name: value}
    if value is None:
        del state[name]
    with pytest.raises(ValueError, match=name.split(".")[0]):
        load_named_state(optimizer, model, state)
    for key, tensor in named_state(optimizer, model).items():
        assert torch.equal(tensor, before[key]), "nothing has changed"
