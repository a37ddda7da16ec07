"""The primitives of the hot path against PyTorch's own, and what their choice rests on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bertner import kernels
from bertner.errors import UsageError
from bertner.kernels import (
    KeepMasks,
    Products,
    choose_products,
    linear,
    multiply_by,
    recomputed,
    stack,
)
from bertner.model import autocast

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1 / 3])
def test_masks_drop_with_the_right_probability_and_keep_the_mean(p: float) -> None:
    torch.manual_seed(1)
    masks = KeepMasks(CPU)
    drawn = torch.stack([masks.draw((100, 999), p) for _ in range(10)])
    count = drawn.numel()
    spread = math.sqrt(p * (1 - p) / count)
    assert abs((drawn == 0).float().mean().item() - p) < 5 * spread + 1e-5
    assert drawn.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-4)
    assert drawn.mean().item() == pytest.approx(1.0, abs=5 * spread / (1 - p))
    # Neighbours, within a mask and from one to the next, know nothing of each other.
    kept = (drawn > 0).double().flatten().numpy()
    for shift in (1, 2, 3, 4, 999, 99_900):
        assert abs(np.corrcoef(kept[shift:], kept[:-shift])[0, 1]) < 5 / math.sqrt(count)


def test_masks_of_the_extremes() -> None:
    masks = KeepMasks(CPU)
    assert masks.draw((3, 5), 0.0).eq(1.0).all()
    assert masks.draw((3, 5), 1.0).eq(0.0).all()


def test_masks_follow_the_global_seed() -> None:
    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        masks = KeepMasks(CPU)
        return torch.cat([masks.draw((7, 3), 0.5), masks.draw((7, 3), 0.5)])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(*draw(1).chunk(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops_the_same_units_of_the_gradient(dtype: torch.dtype) -> None:
    def masks() -> KeepMasks:
        torch.manual_seed(3)
        return KeepMasks(CPU)

    keep = masks().draw((7, 9), 0.3)
    x = torch.randn(7, 9, dtype=dtype, requires_grad=True)
    dropped = masks().drop(x, 0.3)
    grad = torch.randn(7, 9, dtype=dtype)
    dropped.backward(grad)  # type: ignore[no-untyped-call]
    assert torch.equal(dropped, x * keep.to(dtype))
    assert x.grad is not None
    assert torch.equal(x.grad, grad * keep.to(dtype))


def saved_bytes(work: Callable[[], torch.Tensor]) -> int:
    """What autograd keeps of some work, each tensor counted once."""
    sizes: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    del result
    return sum(sizes.values())


def running_sums(x: torch.Tensor) -> torch.Tensor:
    """A function whose result autocast rounds."""
    return x @ torch.ones(64, 64).tril()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "function",
    [F.gelu, nn.LayerNorm(64), nn.PReLU(), running_sums],
    ids=["gelu", "LayerNorm", "PReLU", "running_sums"],
)
def test_a_recomputed_input_is_not_kept(function: Any, dtype: str) -> None:
    torch.manual_seed(0)
    layer, function = nn.Linear(64, 8), copy.deepcopy(function)
    x = torch.randn(1000, 64, requires_grad=True)
    if isinstance(function, nn.LayerNorm):
        nn.init.normal_(function.weight)
    leaves = [x, *layer.parameters(), *getattr(function, "parameters", list)()]

    def gradients(apply: Callable[[Any, torch.Tensor], torch.Tensor]) -> list[torch.Tensor | None]:
        with autocast(CPU, dtype):
            linear(apply(function, x), layer).float().square().sum().backward()  # type: ignore[no-untyped-call]
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return [grad if grad is None else grad.clone() for grad in found]

    with kernels.gradient_buffers(layer):
        kept = saved_bytes(lambda: linear(function(x), layer))
        less = saved_bytes(lambda: linear(recomputed(function, x), layer))
        assert kept - less == (0 if function is running_sums else x.nbytes)  # which keeps no input
        expected = gradients(lambda function, x: function(x))
        for mine, other in zip(gradients(recomputed), expected, strict=True):
            assert mine is not None
            assert other is not None
            assert torch.equal(mine, other)


def test_a_result_that_was_changed_is_kept() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(5, 4, requires_grad=True)
    with kernels.gradient_buffers(layer):
        changed = recomputed(torch.sin, x).mul_(3.0)
        linear(changed, layer).sum().backward()  # type: ignore[no-untyped-call]
        assert layer.weight.grad is not None
        assert torch.allclose(layer.weight.grad, changed.sum(0).expand(3, 4))


def test_hooks_see_a_recomputed_module_once() -> None:
    layer, norm, calls = nn.Linear(4, 3), nn.LayerNorm(4), []
    norm.register_forward_hook(lambda *_: calls.append(1))
    with kernels.gradient_buffers(layer):
        x = torch.randn(5, 4, requires_grad=True)
        linear(recomputed(norm, x), layer).sum().backward()  # type: ignore[no-untyped-call]
    assert calls == [1]


def test_stacked_layers_keep_values_and_names() -> None:
    layers = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))
    before = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    stack(list(layers))  # type: ignore[arg-type]
    after = layers.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    addresses = [layer.weight.data_ptr() for layer in layers]
    stack(list(layers))  # type: ignore[arg-type]
    assert [layer.weight.data_ptr() for layer in layers] == addresses, "done already"
    x = torch.randn(5, 6)
    expected = torch.cat([layer(x) for layer in layers], dim=-1)
    with torch.no_grad():
        assert torch.allclose(linear(x, *layers), expected, atol=1e-6)


@pytest.mark.parametrize("emulates", [True, False])
def test_bfloat16_rounds_where_autocast_does(emulates: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 48), torch.randn(20, 64)
    grad = torch.randn(20, 48).bfloat16()
    results = []
    for ours in (True, False):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        with multiply_by(Products(emulates_bfloat16=emulates)), kernels.gradient_buffers(layer):
            with torch.autocast("cpu", torch.bfloat16):
                y = linear(leaf, layer) if ours else F.linear(leaf, layer.weight, layer.bias)
            y.backward(grad)
            assert y.dtype == torch.bfloat16
            assert leaf.grad is not None
            assert layer.weight.grad is not None
            assert layer.bias.grad is not None
            results.append([y, leaf.grad, layer.weight.grad.clone(), layer.bias.grad.clone()])
    for a, b in zip(*results, strict=True):
        # One unit in the last of bfloat16's eight places, where sums are rounded in another order.
        assert torch.allclose(a.float(), b.float(), rtol=2**-7, atol=2**-7 * b.abs().max().item())
    # Rounded factors, an exact sum, a rounded result: nearly every bit is decided by that.
    x, weight = x.bfloat16().double(), layer.weight.bfloat16().double()
    exact = F.linear(x, weight, layer.bias.bfloat16().double()).bfloat16()
    assert (results[0][0] == exact).float().mean() > 0.97
    unrounded = F.linear(leaf, layer.weight, layer.bias).bfloat16()
    assert (results[0][0] == unrounded).float().mean() < 0.9


def test_the_choice_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = kernels._measure_products
    assert choose("default", CPU, "bfloat16") == Products("default", False, "as asked")
    assert choose("auto", torch.device("meta"), "float32").library == "default"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert choose("auto", CPU, "float32").library == "default"

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    before = kernels._get_precision()
    times = {"default": 1.0, "onednn": 0.5}
    monkeypatch.setattr(kernels, "_seconds", lambda *_: times[kernels._choices[-1].library])
    monkeypatch.setattr(kernels, "_error", lambda *_: 1e-7)
    assert choose("auto", CPU, "float32").library == "onednn"
    times["onednn"] = 0.95
    assert choose("auto", CPU, "float32").library == "default", "no clear gain"
    times["onednn"] = 0.1
    monkeypatch.setattr(kernels, "_error", lambda *_: 1e-3)
    chosen = choose("auto", CPU, "float32")
    assert chosen.library == "default"
    assert "not exact" in chosen.reason
    with pytest.raises(UsageError, match="--matmul default"):
        choose("onednn", CPU, "float32")
    assert kernels._get_precision() == before, "the setting is put back"


def test_the_setting_is_put_back_by_the_last_to_leave() -> None:
    before = kernels._get_precision()
    first, second = multiply_by(Products("onednn", False, "1")), multiply_by(Products())
    first.__enter__()
    second.__enter__()
    assert kernels._get_precision() == "none"
    first.__exit__(None, None, None)  # as another thread may, in any order
    assert kernels._get_precision() == "none"
    second.__exit__(None, None, None)
    assert kernels._get_precision() == before

    def fail() -> None:
        with multiply_by(Products("onednn")):
            assert kernels._get_precision() == "bf16"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert kernels._get_precision() == before
    assert not kernels._choices


def test_onednn_where_there_is_none() -> None:
    with pytest.raises(UsageError, match="no oneDNN for meta"):
        choose_products("onednn", torch.device("meta"), "float32")


def test_buffers_of_shared_frozen_and_missing_weights() -> None:
    layer, twin = nn.Linear(3, 3), nn.Linear(3, 3)
    twin.weight = layer.weight
    with kernels.gradient_buffers(nn.ModuleList([layer, twin])):
        assert kernels.has_buffer(layer.weight)
        with pytest.raises(RuntimeError, match="already"):
            kernels.gradient_buffers(layer).__enter__()
    assert not kernels.has_buffer(layer.weight)
    layer.weight.requires_grad_(False)
    with kernels.gradient_buffers(layer):  # only the bias is trained
        assert not kernels.has_buffer(layer.weight)


def test_exactness_is_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(24, 48, generator=generator), torch.randn(48, 48, generator=generator)
    assert kernels._error(x, w) < 1e-6
    x, w = x.bfloat16().float(), w.bfloat16().float()
    assert kernels._error(x, w) < 1e-6
    # What a library does that rounds the factors on the way.
    with pytest.MonkeyPatch.context() as patch:
        multiply = torch.Tensor.__matmul__
        rough = lambda a, b: multiply(a.bfloat16(), b.bfloat16()).float()  # noqa: E731
        patch.setattr(
            torch.Tensor,
            "__matmul__",
            lambda a, b: multiply(a, b) if a.dtype == torch.float64 else rough(a, b),
        )
        assert kernels._error(x, w) > 1e-4


def test_a_table_that_is_also_a_layer_has_a_dense_gradient() -> None:
    table, layer = nn.Embedding(7, 3), nn.Linear(3, 7)
    layer.weight = table.weight
    with kernels.gradient_buffers(nn.ModuleList([table, layer])):
        ids = torch.tensor([1, 1, 5])
        hidden = kernels.embedding(ids, table)
        kernels.linear(hidden, layer).sum().backward()
        found = table.weight.grad
        assert found is not None
        found = found.clone()
    table.weight.grad = None
    F.linear(table(ids), layer.weight, layer.bias).sum().backward()
    assert table.weight.grad is not None
    assert torch.allclose(found, table.weight.grad)
