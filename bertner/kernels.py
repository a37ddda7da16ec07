"""The few places where the hot path takes a faster primitive than PyTorch's default.

Each computes what the default computes, and says why it is here. The gains are measured by
`python -m benchmarks.kernels`; the model uses them for packed tokens only, so that padded rows stay
the plain reference.

Shape legend: P packed tokens, K and N sizes of a layer's input and output.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertner.errors import UsageError


class KeepMasks:
    """Dropout's random masks, drawn in bulk.

    PyTorch's Bernoulli numbers cost 10 ns each on a CPU, a fifth of a step of a small model. Here a
    64-bit word of NumPy's SFC64 decides four units, at 2 ns each. A unit is dropped with
    probability round(p * 65536) / 65536, and what stays is scaled for just that probability.

    Args:
        device: Where the masks are needed; elsewhere than on a CPU PyTorch's own are used.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cpu":
            # From the global generator, so that `torch.manual_seed` decides, as for other dropout.
            self.bits = np.random.SFC64(int(torch.randint(2**63 - 1, ())))

    def draw(self, shape: Sequence[int], p: float) -> Tensor:
        """A float32 tensor of zeros, with probability `p`, and 1 / (1 - p)."""
        if self.device.type != "cpu":
            return F.dropout(torch.ones(*shape, device=self.device), p)
        num_units = math.prod(shape)
        words: Any = self.bits.random_raw(-(-num_units // 4))
        units = torch.from_numpy(words.view(np.int16)[:num_units])  # uniform over 16 bits
        drop = round(p * 65536)
        scale = 65536 / (65536 - drop) if drop < 65536 else 0.0
        return (units >= drop - 32768).view(*shape).float().mul_(scale)


@dataclass(frozen=True)
class Products:
    """How matrices are multiplied.

    Attributes:
        library: "default" (PyTorch's choice, MKL on x86) or "onednn", for float32.
        emulates_bfloat16: Whether products of bfloat16 are computed as float32 ones.
        reason: What the choice rests on, for the log.
    """

    library: str = "default"
    emulates_bfloat16: bool = False
    reason: str = "not measured"

    def __str__(self) -> str:
        emulated = ", bfloat16 by way of float32" if self.emulates_bfloat16 else ""
        return f"{self.library}{emulated} ({self.reason})"


_products = Products()


@contextmanager
def multiply_by(products: Products) -> Iterator[None]:
    """Multiplies matrices in the chosen way while it is open; other threads are affected, too."""
    global _products
    before = _products, _get_precision()
    _products = products
    _set_precision("bf16" if products.library == "onednn" else "none")
    try:
        yield
    finally:
        _products = before[0]
        _set_precision(before[1])


# Allowing oneDNN to compute float32 products by way of bfloat16 sends them to oneDNN at all, which
# computes them exactly unless the processor has tiles for bfloat16 (AMX): hence the check below.
def _get_precision() -> str:
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    return getattr(settings, "fp32_precision", "none")


def _set_precision(precision: str) -> None:
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is not None and hasattr(settings, "fp32_precision"):
        settings.fp32_precision = precision


@lru_cache
def choose_products(matmul: str, device: torch.device, dtype: str) -> Products:
    """Finds the fastest way of multiplying matrices that is exact.

    On AMD's processors with AVX-512, MKL keeps to AVX2 and oneDNN is 2.5 times as fast; elsewhere
    they are about equal, and which is faster differs by machine. So where there is AVX-512 both are
    timed, which takes a tenth of a second. The answer is kept for the life of the process.

    Args:
        matmul: "auto", "default" or "onednn".
        device: Where; on others than a CPU the default is taken.
        dtype: "float32" or "bfloat16" of autocast.

    Raises:
        UsageError: "onednn" is asked for, but is not exact here, or not there at all.
    """
    if device.type != "cpu":
        return Products(reason=f"{device.type} has its own")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 768, generator=generator)
    weights = [torch.randn(768, 768, generator=generator) for _ in range(6)]
    emulates = dtype == "bfloat16" and _is_bfloat16_slow(x, weights[0])
    if matmul == "default":
        return Products("default", emulates, "as asked")
    if matmul == "auto" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return Products("default", emulates, "without AVX-512 the libraries are equal")
    onednn = Products("onednn", emulates, "as asked")
    with multiply_by(onednn):
        error = _error(x, weights[0])
    if error > 1e-5:
        reason = f"oneDNN's products are not exact here (relative error {error:.0e})"
        if matmul == "onednn":
            raise UsageError(f"{reason}; use --matmul default")
        return Products("default", emulates, reason)
    if matmul == "onednn":
        return onednn
    seconds = {"default": math.inf, "onednn": math.inf}
    for _ in range(3):
        for library in seconds:
            with multiply_by(Products(library)):
                seconds[library] = min(seconds[library], _seconds([x] * len(weights), weights))
    gain = seconds["default"] / seconds["onednn"]
    # A clear gain only, so that noise does not change the bits of a run from one start to the next.
    library = "onednn" if gain > 1.15 else "default"
    return Products(library, emulates, f"oneDNN takes {1 / gain:.2f} of MKL's time, exactly")


def _is_bfloat16_slow(x: Tensor, weight: Tensor) -> bool:
    """Whether products of bfloat16 take longer than those of float32, for want of hardware."""
    short = [x.bfloat16()], [weight.bfloat16()]
    return min(_seconds(*short) for _ in range(2)) > min(_seconds([x], [weight]) for _ in range(2))


def _error(x: Tensor, weight: Tensor) -> float:
    """Largest error of a product, relative to its largest value."""
    exact = x.double() @ weight.double()
    return float(((x @ weight).double() - exact).abs().max() / exact.abs().max())


def _seconds(inputs: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    """Time of the products of a step: forward, and the two of backward."""
    start = time.perf_counter()
    for x, weight in zip(inputs, weights, strict=True):
        y = x @ weight.t()
        torch.mm(y, weight)
        torch.mm(y.t(), x)
    return time.perf_counter() - start


def stack(layers: Sequence[nn.Linear]) -> None:
    """Moves the weights of layers that share their input one above the other in memory.

    They keep their names and values, and `linear` computes all of them in one product, which is
    faster than several small ones.
    """
    for tensors in ([layer.weight for layer in layers], [layer.bias for layer in layers]):
        if _joined(tensors) is None:
            joined = torch.cat([tensor.detach() for tensor in tensors])
            for tensor, part in zip(
                tensors, torch.split(joined, [len(t) for t in tensors]), strict=True
            ):
                tensor.data = part


def _joined(tensors: Sequence[Tensor]) -> Tensor | None:
    """One tensor over several that lie one after the other in memory; None if they do not."""
    first, size = tensors[0].detach(), 0
    for tensor in tensors:
        if tensor.data_ptr() != first.data_ptr() + size * first.element_size():
            return None
        size += tensor.numel()
    if len(tensors) == 1:
        return first
    if first.untyped_storage().nbytes() < (first.storage_offset() + size) * first.element_size():
        return None  # neighbours by chance, in allocations of their own
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride())


def linear(x: Tensor, *layers: nn.Linear) -> Tensor:
    """Applies layers that share their input; outputs stand side by side.

    Under autocast it rounds inputs, weights and results to bfloat16, as PyTorch's own layers do.

    Args:
        x: (P, K).
        layers: One or more; see `stack`.

    Returns:
        (P, N), N summed over the layers.
    """
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    weight, bias = _joined(weights), _joined(biases)
    if weight is None or bias is None:
        return torch.cat([linear(x, layer) for layer in layers], dim=-1)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)[0]
    if all(map(has_buffer, weights)):
        result: Tensor = _Linear.apply(x, weight, bias, *weights, *biases)  # type: ignore[no-untyped-call]
        return result
    return torch.cat([F.linear(x, layer.weight, layer.bias) for layer in layers], dim=-1)


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, torch.dtype | None]:
    """A linear layer; also its input as it went into the product, and autocast's dtype if it is on.

    Whatever autocast would do here is done by hand, so it is off within.
    """
    kind = x.device.type
    rounded = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with torch.autocast(kind, enabled=False):
        factor = _rounded(x, rounded)
        result = torch.addmm(_rounded(bias, rounded), factor, _rounded(weight, rounded).t())
        return (result if rounded is None else result.to(rounded)), factor, rounded


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`x` as a factor of a product in `dtype`: of that dtype, or float32 with rounded values.

    Without hardware for it a product of bfloat16 takes 7 times as long as one of float32. A float32
    product of rounded factors is the same: bfloat16 hardware adds up in float32, too.
    """
    if dtype is None:
        return x
    return x.to(dtype).float() if _products.emulates_bfloat16 else x.to(dtype)


class _Linear(torch.autograd.Function):
    """Linear layers whose weight gradients go straight into buffers that stay.

    A product that allocates its result pays for it in page faults, one for each 4 KB of the weight,
    which takes as long as the product itself where that is fast.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *parameters: Tensor) -> Tensor:
        result, factor, ctx.rounded = _product(x, weight, bias)
        ctx.save_for_backward(factor)
        ctx.weight, ctx.parameters, ctx.dtype = weight, parameters, x.dtype
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        half = len(ctx.parameters) // 2
        weights, biases = ctx.parameters[:half], ctx.parameters[half:]
        grad = _rounded(grad, ctx.rounded)
        buffer = _joined([weight.grad_buffer for weight in weights])
        assert buffer is not None, "adjacent as the weights are"
        if weights[0].grad is not None:
            buffer.add_(grad.t() @ x)
        elif x.dtype == buffer.dtype:
            torch.mm(grad.t(), x, out=buffer)
        else:
            buffer.copy_(grad.t() @ x)
        for weight in weights:
            weight.grad = weight.grad_buffer
        grad_bias = grad.sum(0, dtype=torch.float32)
        grad_biases = torch.split(grad_bias, [len(bias) for bias in biases])
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _rounded(ctx.weight, ctx.rounded)
            grad_x = (grad_x if ctx.rounded is None else grad_x.to(ctx.rounded)).to(ctx.dtype)
        return grad_x, None, None, *[None] * half, *grad_biases


def embedding(ids: Tensor, layer: nn.Embedding) -> Tensor:
    """(P,) ids to (P, D)."""
    if torch.is_grad_enabled() and has_buffer(layer.weight):
        return _Embedding.apply(ids, layer.weight, layer.padding_idx)  # type: ignore[no-any-return, no-untyped-call]
    return layer(ids)  # type: ignore[no-any-return]


class _Embedding(torch.autograd.Function):
    """An embedding whose gradient touches only the rows of the batch.

    The dense gradient of bert-base's word embeddings is 89 MB to allocate and to fill with zeros,
    of which a batch of 160 tokens needs half a megabyte. Here it lives in a buffer that stays, in
    which the rows of the last step alone are set back to zero.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        weight, buffer = ctx.weight, ctx.weight.grad_buffer
        if weight.grad is None:
            buffer[weight.grad_rows] = 0.0
            weight.grad, weight.grad_rows = buffer, ids[:0]
        if ctx.padding_idx is not None:
            grad = grad * (ids != ctx.padding_idx)[:, None]
        buffer.index_add_(0, ids, grad)
        weight.grad_rows = torch.unique(torch.cat([weight.grad_rows, ids]))
        return None, None, None


def has_buffer(parameter: Tensor) -> bool:
    """Whether the parameter's gradient has a place that stays; see `gradient_buffers`."""
    return hasattr(parameter, "grad_buffer")


@contextmanager
def gradient_buffers(model: nn.Module) -> Iterator[None]:
    """Gives the gradients of a model's linear layers and embeddings places that stay.

    While it is open, `linear` and `embedding` write gradients there themselves, past autograd's
    hooks. All else is as ever: `grad` is None after `zero_grad`, and backward adds to it.
    """
    with_buffer: list[Any] = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.requires_grad:
            with_buffer.append(module.weight)
    # In one piece and in the order of the weights, so that what is stacked there is stacked here.
    flat = torch.zeros(sum(w.numel() for w in with_buffer), device=with_buffer[0].device)
    for weight, part in zip(
        with_buffer, torch.split(flat, [w.numel() for w in with_buffer]), strict=True
    ):
        weight.grad = None
        weight.grad_buffer = part.view_as(weight)
        weight.grad_rows = torch.zeros(0, dtype=torch.int64, device=flat.device)
    try:
        yield
    finally:
        for weight in with_buffer:
            weight.grad = None
            del weight.grad_buffer, weight.grad_rows


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all gradients; of an embedding, only the rows that are not zero."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        rows = getattr(parameter, "grad_rows", ())
        gradients.append(parameter.grad[rows] if len(rows) else parameter.grad)
    return nn.utils.get_total_norm(gradients)


@contextmanager
def hot_path(matmul: str, device: torch.device, dtype: str) -> Iterator[None]:
    """What training, evaluation and prediction on packed rows run in; see `choose_products`."""
    _keep_freed_memory()
    with multiply_by(choose_products(matmul, device, dtype)):
        yield


def _keep_freed_memory() -> None:
    """Lets the C library keep memory that is freed, in place of giving it back to the system.

    Activations of some megabytes are freed and allocated anew in every step; given back, each 4 KB
    page of them costs a fault when it is first touched again. Does nothing where the C library is
    not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(m_mmap_threshold, 32 * 2**20)  # the most that it takes
    mallopt(m_trim_threshold, 2**30)
    mallopt(m_top_pad, 64 * 2**20)


def clip(optimizer: torch.optim.Optimizer, max_norm: float, norm: Tensor, *, fold: bool) -> None:
    """Scales the gradients down to a norm of at most `max_norm`.

    Args:
        optimizer: Fused AdamW.
        max_norm: Above 0.
        norm: Of all gradients.
        fold: Let the optimizer divide by the factor as it reads the gradients, in place of a pass
            over them of its own; equal but for the last bit.
    """
    if fold:
        # Where gradient scaling of float16 hands its factor over; fused optimizers divide by it.
        scale = (norm + 1e-6) / max_norm
        optimizer.grad_scale = scale.clamp(min=1.0)  # type: ignore[attr-defined]
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
