"""The few places where the hot path takes a faster primitive than PyTorch's default.

Each computes what the default computes, and says why it is here; what each gains is measured by
`python -m benchmarks.bench_kernels`. The model uses them for packed tokens only, so that padded
rows stay the plain reference.

Shape legend: P packed tokens, K and N sizes of a layer's input and output.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bertner.errors import UsageError

# Read at the process' first product on a CUDA device; without it products may differ from call to
# call, and PyTorch would refuse to compute what `on_device` asks for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Devices that work through a queue: whoever asks for a value there waits until the queue is empty.
QUEUED = ("cuda",)


def is_queued(device: torch.device) -> bool:
    """Whether the hot path must not ask this device for a value."""
    return device.type in QUEUED


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it to get there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def seed_dropout(seed: int, device: torch.device) -> None:
    """Seeds PyTorch's global generator of a device.

    That one alone: `torch.manual_seed` prepares every other device for its first use, too, which
    takes half a millisecond.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    else:
        torch.manual_seed(seed)


class KeepMasks:
    """Dropout's random masks, drawn in bulk.

    PyTorch draws Bernoulli numbers one by one, which takes an eighth of a small model's step. Here
    a 64-bit word of NumPy's SFC64 decides four units, several times faster. A unit is dropped with
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
        return _keep(self._draw_units(shape), p)

    def drop(self, x: Tensor, p: float) -> Tensor:
        """Dropout of `x`."""
        if self.device.type != "cpu":
            return F.dropout(x, p)
        result: Tensor = _Drop.apply(x, self._draw_units(x.shape), p)  # type: ignore[no-untyped-call]
        return result

    def _draw_units(self, shape: Sequence[int]) -> Tensor:
        """int16, uniform over all values."""
        num_units = math.prod(shape)
        words: Any = self.bits.random_raw(-(-num_units // 4))
        return torch.from_numpy(words.view(np.int16)[:num_units]).view(*shape)


def _keep(units: Tensor, p: float) -> Tensor:
    """What `KeepMasks.draw` describes, for random 16-bit integers."""
    drop = round(p * 65536)
    scale = 65536 / (65536 - drop) if drop < 65536 else 0.0
    return torch.ge(units, drop - 32768, out=torch.empty(units.shape)).mul_(scale)


class _Drop(torch.autograd.Function):
    """Dropout that keeps its random integers for backward: half the size of a float32 mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, units: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(units)
        ctx.p = p
        return _keep(units, p).to(x.dtype).mul_(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (units,) = ctx.saved_tensors
        return _keep(units, ctx.p).to(grad.dtype).mul_(grad), None, None


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


# The choices that are in force, the newest last: PyTorch's setting is one for the whole process, so
# whoever is the last to leave puts it back.
_choices: list[Products] = []
_choices_lock = threading.Lock()
_setting_before = "none"


@contextmanager
def multiply_by(products: Products) -> Iterator[None]:
    """Multiplies matrices in the chosen way while it is open; other threads are affected, too."""
    global _setting_before
    with _choices_lock:
        if not _choices:
            _setting_before = _get_precision()
        _choices.append(products)
        _set_precision(_precision_of(products))
    try:
        yield
    finally:
        with _choices_lock:
            _choices.remove(products)
            _set_precision(_precision_of(_choices[-1]) if _choices else _setting_before)


# Allowing oneDNN to compute float32 products by way of bfloat16 sends them to oneDNN at all, which
# computes them exactly unless the processor has tiles for bfloat16 (AMX): hence the check below.
def _precision_of(products: Products) -> str:
    return "bf16" if products.library == "onednn" else "none"


def _get_precision() -> str:
    return str(torch.backends.mkldnn.matmul.fp32_precision)  # type: ignore[attr-defined]


def _set_precision(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision  # type: ignore[attr-defined]


_chosen: dict[tuple[str, torch.device, str], Products] = {}


def choose_products(matmul: str, device: torch.device, dtype: str) -> Products:
    """Finds the fastest way of multiplying matrices that is exact.

    On AMD's processors with AVX-512, MKL keeps to AVX2 and oneDNN is 2.5 times as fast; elsewhere
    they are about equal, and which is faster differs by machine. So where there is AVX-512 both are
    timed, which takes a tenth of a second. The answer is kept for the life of the process.

    Args:
        matmul: "auto", "onednn", or "default": PyTorch's own, for bfloat16 too.
        device: Where; on others than a CPU the default is taken.
        dtype: "float32" or "bfloat16" of autocast.

    Raises:
        UsageError: "onednn" is asked for, but is not exact here, or not there at all.
    """
    key = (matmul, device, dtype)
    if key not in _chosen:
        _chosen[key] = _measure_products(*key)
    return _chosen[key]


@contextmanager
def keep_products(
    matmul: str, device: torch.device, dtype: str, products: Products
) -> Iterator[None]:
    """While it is open, `choose_products` answers what it did in a process that has ended.

    Another choice is as exact, but rounds otherwise.
    """
    key = (matmul, device, dtype)
    before = _chosen.get(key)
    _chosen[key] = products
    try:
        yield
    finally:
        if before is None:
            del _chosen[key]
        else:
            _chosen[key] = before


def _measure_products(matmul: str, device: torch.device, dtype: str) -> Products:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        if matmul == "onednn":
            raise UsageError(f"there is no oneDNN for {device.type} here; use --matmul default")
        return Products(reason=f"PyTorch's own for {device.type}")
    if matmul == "default":
        return Products(reason="as asked")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(160, 768, generator=generator)
    weights = [torch.randn(768, 768, generator=generator) for _ in range(6)]
    with torch.autocast("cpu", enabled=False):
        library, reason = _choose_library(matmul, x, weights)
        emulates = dtype == "bfloat16" and _is_bfloat16_slow(library, x, weights[0])
    return Products(library, emulates, reason)


def _choose_library(matmul: str, x: Tensor, weights: Sequence[Tensor]) -> tuple[str, str]:
    if matmul == "auto" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return "default", "without AVX-512 the libraries are equal"
    with multiply_by(Products("onednn")):
        error = _error(x, weights[0])
    if error > 1e-5:
        reason = f"oneDNN's products are not exact here, with a relative error of {error:.0e}"
        if matmul == "onednn":
            raise UsageError(f"{reason}; use --matmul default")
        return "default", reason
    if matmul == "onednn":
        return "onednn", "as asked"
    seconds = {"default": math.inf, "onednn": math.inf}
    for _ in range(3):
        for library in seconds:
            with multiply_by(Products(library)):
                seconds[library] = min(seconds[library], _seconds([x] * len(weights), weights))
    gain = seconds["default"] / seconds["onednn"]
    # A clear gain only, so that noise does not change the bits of a run from one start to the next.
    return (
        "onednn" if gain > 1.15 else "default",
        f"oneDNN is exact here and takes {1 / gain:.2f} of the default's time",
    )


def _is_bfloat16_slow(library: str, x: Tensor, weight: Tensor) -> bool:
    """Whether products of bfloat16 are no faster than those of float32, for want of hardware.

    With it they take half the time or less, without it several times as long: no close call.
    """
    short = [x.bfloat16()], [weight.bfloat16()]
    with multiply_by(Products(library)):
        seconds = [(_seconds(*short), _seconds([x], [weight])) for _ in range(3)]
    return min(a for a, _ in seconds) > 0.9 * min(b for _, b in seconds)


def _error(x: Tensor, weight: Tensor) -> float:
    """Largest error of the kinds of products that a step has, relative to the largest value."""
    found = torch.empty(x.shape[1], x.shape[1])
    torch.mm(x.t(), x, out=found)
    heads, head = x.view(len(x), 12, -1).transpose(0, 1), weight[: len(x)].view(len(x), 12, -1)
    head = head.permute(1, 2, 0)
    errors = [
        (x @ weight, x.double() @ weight.double()),
        (found, x.double().t() @ x.double()),
        (heads @ head, heads.double() @ head.double()),
    ]
    return max(
        float((ours.double() - exact).abs().max() / exact.abs().max()) for ours, exact in errors
    )


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

    They keep their names and values, and `linear` computes all of them in one product.
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
    if len(tensors) == 1:
        return tensors[0]
    first, size = tensors[0].detach(), 0
    for tensor in tensors:
        if tensor.data_ptr() != first.data_ptr() + size * first.element_size():
            return None
        size += tensor.numel()
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
        recipe = getattr(x, "recipe", None)
        if recipe is not None and x._version != recipe.version:
            recipe = None  # changed in place since
        result: Tensor = _Linear.apply(x, recipe, weight, bias, *weights, *biases)  # type: ignore[no-untyped-call]
        return result
    return torch.cat([_product(x, layer.weight, layer.bias)[0] for layer in layers], dim=-1)


def _product(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, _Rounding, Tensor]:
    """A linear layer; its input as it went into the product, how it was rounded, the weight too.

    Whatever autocast would do here is done by hand, so it is off within.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return torch.addmm(bias, x, weight.t()), x, _EXACT, weight
    emulates = bool(_choices) and _choices[-1].emulates_bfloat16
    rounded = _Rounding(torch.get_autocast_dtype(kind), emulates)
    with torch.autocast(kind, enabled=False):
        factor, short = rounded.factor(x), rounded.factor(weight)
        result = torch.addmm(rounded.factor(bias), factor, short.t())
        return rounded.result(result), factor, rounded, short


@dataclass(frozen=True)
class _Rounding:
    """How autocast rounds the factors and the result of a product; `dtype` None is not at all.

    Without hardware for it a product of bfloat16 takes several times as long as one of float32. A
    float32 product of rounded factors is the same: bfloat16 hardware adds up in float32, too.
    """

    dtype: torch.dtype | None
    emulates: bool

    def factor(self, x: Tensor) -> Tensor:
        if self.dtype is None:
            return x
        return x.to(self.dtype).float() if self.emulates else x.to(self.dtype)

    def apply(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Calls a function as autocast does."""
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return function(x)

    def result(self, x: Tensor) -> Tensor:
        return x if self.dtype is None else x.to(self.dtype)


_EXACT = _Rounding(None, False)


@dataclass(frozen=True)
class _Recipe:
    """How a tensor came to be; `version` tells whether it still is what came out."""

    function: Callable[[Tensor], Tensor]
    x: Tensor
    version: int


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Applies a function whose result `linear` shall not keep for backward, but compute again.

    The backward of an activation or of LayerNorm keeps the input; where the linear layer after it
    keeps the result besides, that takes a third of all that a step keeps.

    Args:
        function: Takes little time beside a product, and gives the same when called again.
        x: (P, K).
    """
    result: Any = function(x)
    if torch.is_grad_enabled():
        again = getattr(function, "forward", function)  # of a module, past its hooks
        result.recipe = _Recipe(again, x, result._version)
    return result  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """Linear layers whose weight gradients go straight into buffers that stay.

    A product that allocates its result pays for it in page faults, one for each 4 KB, unless the C
    library had such a piece at hand; and what stays is there for the optimizer and the norm.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        recipe: _Recipe | None,
        weight: Tensor,
        bias: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        result, factor, ctx.rounded, short = _product(x, weight, bias)
        ctx.function = recipe and recipe.function
        ctx.save_for_backward(recipe.x if recipe else factor)
        # A card has the memory to keep what it has rounded; a CPU rounds it again.
        ctx.weight = short if is_queued(x.device) else weight
        ctx.parameters, ctx.dtype = parameters, x.dtype
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if ctx.function is not None:
            x = ctx.rounded.factor(ctx.rounded.apply(ctx.function, x))
        half = len(ctx.parameters) // 2
        weights, biases = ctx.parameters[:half], ctx.parameters[half:]
        grad = ctx.rounded.factor(grad)
        buffer = _joined([weight.grad_buffer for weight in weights])
        assert buffer is not None, "adjacent as the weights are"
        if weights[0].grad is not None:
            for weight in weights:
                _move_to_buffer(weight)
            buffer.add_(grad.t() @ x)
        elif x.dtype == buffer.dtype:
            torch.mm(grad.t(), x, out=buffer)
        else:
            buffer.copy_(grad.t() @ x)
        for weight in weights:
            weight.grad = weight.grad_buffer
            if not is_queued(x.device):
                # Now, while it is in the cache: for `optimizer.gradient_norm`; the last call's.
                weight.grad_square = sum_of_squares(weight.grad)
        grad_bias = grad.sum(0, dtype=biases[0].dtype)
        sizes = [len(bias) for bias in biases]
        grad_biases = torch.split(grad_bias, sizes) if half > 1 else (grad_bias,)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.rounded.result(grad @ ctx.rounded.factor(ctx.weight)).to(ctx.dtype)
        return grad_x, None, None, None, *[None] * half, *grad_biases


def _move_to_buffer(weight: Any) -> bool:
    """Copies a gradient that something else has put there; whether there was one."""
    if weight.grad.data_ptr() == weight.grad_buffer.data_ptr():
        return False
    weight.grad_buffer.copy_(weight.grad)
    return True


def embedding(ids: Tensor, layer: nn.Embedding) -> Tensor:
    """(P,) ids to (P, D)."""
    if torch.is_grad_enabled() and hasattr(layer.weight, "sparse_grad"):
        return _Embedding.apply(ids, layer.weight, layer.padding_idx)  # type: ignore[no-any-return, no-untyped-call]
    return layer(ids)  # type: ignore[no-any-return]


class _Embedding(torch.autograd.Function):
    """An embedding whose gradient is sparse: it has the rows of the batch alone.

    The dense gradient of bert-base's word embeddings is 89 MB to allocate, to fill with zeros and
    to read again, of which a batch of 160 tokens needs half a megabyte. `optimizer.AdamW` takes
    it as it is.
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
        weight = ctx.weight
        if ctx.padding_idx is not None:
            grad = grad * (ids != ctx.padding_idx)[:, None]
        rows, place = torch.unique(ids, return_inverse=True)  # sorted
        values = grad.new_zeros(len(rows), grad.shape[1]).index_add_(0, place, grad)
        sparse = torch.sparse_coo_tensor(
            rows[None], values, weight.shape, is_coalesced=True, check_invariants=False
        )
        if weight.grad is not None:
            sparse = weight.grad + sparse  # dense, if what is there already is
            sparse = sparse.coalesce() if sparse.is_sparse else sparse
        weight.grad = sparse
        return None, None, None


def has_buffer(parameter: Tensor) -> bool:
    """Whether the parameter's gradient has a place that stays; see `gradient_buffers`."""
    return hasattr(parameter, "grad_buffer")


# Of so small a table, such as that of token types, a batch has about all rows.
_FEW_ROWS = 8


@contextmanager
def gradient_buffers(model: nn.Module) -> Iterator[None]:
    """Gives the gradients of a model's linear layers places that stay, and embeddings sparse ones.

    While it is open, `linear` and `embedding` write gradients themselves, past autograd's hooks.
    All else is as ever: `grad` is None after `zero_grad`, and backward adds to it. What else
    changes a linear layer's gradient in place (another term of the loss on the same weight, or
    noise added by hand) is not seen by `gradient_norm`: use no buffers then. Sparse gradients are
    for CPUs only, and need `optimizer.AdamW`.

    Raises:
        RuntimeError: The model has buffers already.
    """
    linear_weights, tables = _weights(model, nn.Linear), _weights(model, nn.Embedding)
    like = next(model.parameters())
    is_cpu = like.device.type == "cpu" and not is_queued(like.device)
    tables = [t for t in tables if all(t is not w for w in linear_weights)]
    sparse = [t for t in tables if is_cpu and len(t) > _FEW_ROWS]
    if any(map(has_buffer, linear_weights)):
        raise RuntimeError("this model is in training already: it has buffers for its gradients")
    # In one piece and in the order of the weights, so that what is stacked there is stacked here.
    sizes = [weight.numel() for weight in linear_weights]
    flat = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
    for weight, part in zip(linear_weights, torch.split(flat, sizes), strict=True):
        weight.grad = None
        weight.grad_buffer = part.view_as(weight)
        weight.grad_square = None
    for table in sparse:
        table.grad = None
        table.sparse_grad = True
    try:
        yield
    finally:
        for weight in linear_weights:
            weight.grad = None
            del weight.grad_buffer, weight.grad_square
        for table in tables:
            table.grad = None
        for table in sparse:
            del table.sparse_grad


def _weights(model: nn.Module, kind: type[nn.Module]) -> list[Any]:
    """Of the modules of a kind, to be trained; one that several modules share is there once."""
    modules: Any = (module for module in model.modules() if isinstance(module, kind))
    weights = (module.weight for module in modules)
    return list({id(weight): weight for weight in weights if weight.requires_grad}.values())


def sum_of_squares(x: Tensor) -> Tensor:
    """A product of a vector with itself takes half the time of `linalg.vector_norm`."""
    flat = x.flatten()
    return flat.dot(flat)


@contextmanager
def hot_path(matmul: str, device: torch.device, dtype: str) -> Iterator[None]:
    """What training, evaluation and prediction on packed rows run in.

    See `choose_products` and `keep_freed_memory`, which lasts beyond it.
    """
    keep_freed_memory()
    with multiply_by(choose_products(matmul, device, dtype)):
        yield


@contextmanager
def on_device(device: torch.device, *, tf32: bool, deterministic: bool) -> Iterator[None]:
    """How a CUDA device computes while it is open; elsewhere it does nothing.

    Args:
        device: Where the model is.
        tf32: Let products of float32 round their factors to 10 bits of mantissa, as Ampere and
            later do them fastest.
        deterministic: Use only kernels that give the same bits each time.
    """
    if device.type != "cuda":
        yield
        return
    products: Any = torch.backends.cuda.matmul
    memory: Any = torch.utils.deterministic
    before = (
        products.fp32_precision,
        torch.are_deterministic_algorithms_enabled(),
        memory.fill_uninitialized_memory,
    )
    products.fp32_precision = "tf32" if tf32 else "ieee"
    if deterministic:
        torch.use_deterministic_algorithms(True)
        # That finds what reads memory before it is written; here it would cost time alone.
        memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        products.fp32_precision = before[0]
        torch.use_deterministic_algorithms(before[1])
        memory.fill_uninitialized_memory = before[2]


@lru_cache
def keep_freed_memory() -> None:
    """Lets the C library keep memory that is freed, for the life of the process.

    Activations of some megabytes are freed and allocated anew in every step; given back to the
    system, each 4 KB page of them costs a fault when it is first touched again. Does nothing where
    the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(m_mmap_threshold, 32 * 2**20)  # the most that it takes
    mallopt(m_trim_threshold, 2**30)
    mallopt(m_top_pad, 64 * 2**20)
