"""The optimizer against PyTorch's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from bertner import kernels
from bertner.config import TrainConfig
from bertner.model import BertForNER
from bertner.optimizer import build_optimizer, clip, gradient_norm, optimizer_step


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


def test_a_sparse_gradient_is_stepped_as_a_dense_one() -> None:
    """Three calls of rows and a remainder; rows that come and stay away; clipped or not."""
    num_rows = 3 * kernels.ROWS_PER_CALL + 5
    torch.manual_seed(0)
    table = nn.Embedding(num_rows, 16)
    twin = copy.deepcopy(table)
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.95), "fused": True}
    optimizers = [torch.optim.AdamW(each.parameters(), **settings) for each in (table, twin)]
    with kernels.gradient_buffers(table):
        for step in range(5):
            for optimizer in optimizers:
                optimizer.zero_grad()
                optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            for _ in range(1 + step % 2):  # micro-batches
                ids = torch.randint(0, num_rows, (40,))
                ids[:4], ids[4:6] = num_rows - 1, ids[6:8]
                grad = torch.randn(40, 16)
                kernels.embedding(ids, table).backward(grad)  # type: ignore[no-untyped-call]
                twin(ids).backward(grad)
            assert table.weight.grad is not None
            assert twin.weight.grad is not None
            assert table.weight.grad.is_sparse
            assert torch.allclose(table.weight.grad.to_dense(), twin.weight.grad, atol=1e-6)
            for each, optimizer in zip((table, twin), optimizers, strict=True):
                norm = gradient_norm([each.weight])
                clip(optimizer, (1e9, 0.5)[step % 2], norm, fold=True)
            optimizer_step(optimizers[0])
            optimizers[1].step()
            assert table.weight.grad is None
            assert not table.weight.row_buffer.any(), "left as it was found"  # type: ignore[attr-defined]
            assert torch.allclose(table.weight, twin.weight, rtol=1e-6, atol=1e-7)
    ours, theirs = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-6, atol=1e-7), name
        assert ours[name].dtype == theirs[name].dtype
