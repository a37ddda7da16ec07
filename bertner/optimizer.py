"""AdamW for the loop: which parameters decay, clipping, and gradients of a table's rows alone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bertner.config import TrainConfig
from bertner.kernels import sum_of_squares


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019); biases and LayerNorm do not decay, as in BERT."""
    norms = {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for parameter, _ in module.named_parameters(recurse=False)
    }
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (no_decay if name in norms or name.endswith("bias") else decay).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of the gradients of `parameters`, each of which has one.

    Read from memory they cost a twentieth of a step; so `linear` adds up the squares of a gradient
    as soon as it is computed.
    """
    squares = []
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        square = getattr(parameter, "grad_square", None)
        if square is None:
            square = sum_of_squares(grad.values() if grad.is_sparse else grad)
        squares.append(square)
    return torch.stack(squares).sum().sqrt()


def clip(optimizer: torch.optim.Optimizer, max_norm: float, norm: Tensor, *, fold: bool) -> None:
    """Scales the gradients down to a norm of at most `max_norm`.

    Args:
        optimizer: Fused AdamW.
        max_norm: Above 0.
        norm: Of all gradients.
        fold: Let the optimizer divide by the factor as it reads the gradients, in place of a pass
            over them of its own; equal but for the last bit.
    """
    # PyTorch's fused AdamW divides on these; the one of MPS pays no heed to the factor.
    if fold and norm.device.type in ("cpu", "cuda"):
        # Where gradient scaling of float16 hands its factor over; fused optimizers divide by it.
        scale = (norm + 1e-6) / max_norm
        optimizer.grad_scale = scale if scale > 1.0 else None  # type: ignore[attr-defined]
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def optimizer_step(optimizer: torch.optim.AdamW) -> None:
    """A step of fused AdamW, also for parameters with a sparse gradient.

    Those are updated as if it were dense, some rows in a call, for which their gradient is written
    into a buffer of zeros. It is then set to None.
    """
    sparse = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.is_sparse:
                sparse.append((parameter, parameter.grad, group))
                parameter.grad = None  # AdamW would refuse it
    optimizer.step()
    with torch.no_grad():
        for parameter, grad, group in sparse:
            _step_by_rows(optimizer, parameter, grad, group)


def _step_by_rows(
    optimizer: torch.optim.AdamW, parameter: Any, grad: Tensor, group: dict[str, Any]
) -> None:
    state, buffer = optimizer.state[parameter], parameter.row_buffer
    if not state:  # as AdamW begins
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    state["step"] += 1
    rows, values = grad.indices()[0], grad.values()
    starts = range(0, len(parameter), len(buffer))
    bounds = torch.searchsorted(rows, torch.tensor([*starts, len(parameter)])).tolist()
    for start, (first, last) in zip(starts, itertools.pairwise(bounds), strict=True):
        part = slice(start, start + len(buffer))
        here = rows[first:last] - start
        buffer[here] = values[first:last]
        torch._fused_adamw_(
            [parameter[part]],
            [buffer[: len(parameter) - start]],
            [state["exp_avg"][part]],
            [state["exp_avg_sq"][part]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=getattr(optimizer, "grad_scale", None),
        )
        buffer[here] = 0.0
