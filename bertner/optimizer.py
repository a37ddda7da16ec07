"""AdamW for the loop: exactly PyTorch's, with state in one piece and tables stepped row by row.

Shape legend: V rows of a table (an embedding's weight), D its width.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bertner.config import TrainConfig
from bertner.distributed import Ranks
from bertner.kernels import is_queued, sum_of_squares

AVERAGES = ("exp_avg", "exp_avg_sq")

# Rows of a table in one call of the kernel: few enough that they stay in the cache from one
# operation to the next, enough to make little of the calls.
ROWS_PER_CALL = 1024


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """The optimizer of a run; biases and LayerNorm do not decay, as in BERT."""
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
    return AdamW(
        [
            {"params": decay, "weight_decay": config.weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
        capturable=any(is_queued(parameter.device) for parameter in (*decay, *no_decay)),
    )


def sum_gradients(parameters: Sequence[Tensor], ranks: Ranks, *others: Tensor) -> None:
    """Adds up the gradients of all ranks, in place; every rank has the same bits then.

    Args:
        parameters: Those that are trained; a rank without rows of its own has no gradients yet.
        ranks: Of the run.
        others: Tensors to be added up besides.
    """
    if ranks.world_size == 1:
        return
    dense = [*others]
    for parameter in parameters:
        if hasattr(parameter, "sparse_grad"):
            parameter.grad = _sum_rows(parameter, ranks)
            continue
        if parameter.grad is None:
            buffer = getattr(parameter, "grad_buffer", None)
            parameter.grad = torch.zeros_like(parameter) if buffer is None else buffer.zero_()
        dense.append(parameter.grad)
    ranks.sum(dense)
    for parameter in parameters:
        if getattr(parameter, "grad_square", None) is not None:
            parameter.grad_square = sum_of_squares(parameter.grad)  # type: ignore[attr-defined, arg-type]


def _sum_rows(table: Tensor, ranks: Ranks) -> Tensor:
    """The sum of a table's sparse gradients, sparse too: the rows that any rank has."""
    grad = table.grad
    if grad is None:
        rows, values = torch.zeros(0, dtype=torch.int64), table.new_zeros(0, table.shape[1])
    elif not grad.is_sparse:  # something else has a gradient on it, too
        rows, values = torch.arange(len(table)), grad
    else:
        rows, values = grad.indices()[0], grad.values()
    rows, place = torch.unique(torch.cat(ranks.gather_rows(rows)), return_inverse=True)
    # Rank after rank, so that the order of summation is always the same.
    total = table.new_zeros(len(rows), table.shape[1])
    total.index_add_(0, place, torch.cat(ranks.gather_rows(values)))
    return torch.sparse_coo_tensor(
        rows[None], total, table.shape, is_coalesced=True, check_invariants=False
    )


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of the gradients of `parameters`, each of which has one.

    Read from memory they cost a twentieth of a step; so on a CPU `linear` adds up the squares of a
    gradient as soon as it is computed. On a CUDA device few large kernels are faster than that.
    """
    if is_queued(parameters[0].device):
        return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
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
        if is_queued(norm.device):
            optimizer.grad_scale = scale.clamp(min=1.0)  # type: ignore[attr-defined]
        else:
            optimizer.grad_scale = scale if scale > 1.0 else None  # type: ignore[attr-defined]
    else:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


class AdamW(torch.optim.AdamW):
    """AdamW (Loshchilov and Hutter, 2019), to the bit the fused one of PyTorch.

    Two things differ. What it keeps for all parameters that start at the same step lies in one
    piece of memory. And a parameter whose gradient is sparse is stepped as if it were dense, where
    PyTorch's refuses it; such a gradient is None after the step. `state_dict` has PyTorch's form,
    and reads it. `amsgrad` and `maximize` are not supported.

    Attributes:
        halted: 1 after `halt_unless_finite` has seen a value that is not finite: no step is taken
            from then on. On the device, so that nobody waits for it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.halted = torch.zeros((), device=self.param_groups[0]["params"][0].device)
        self.found_inf: Tensor | None = None
        # Steps that are taken kernel by kernel are meant to be.
        self._warned_capturable_if_run_uncaptured = True

    def halt_unless_finite(self, *values: Tensor) -> None:
        """Takes no step from now on if one of the values, which are scalars, is not finite."""
        is_bad = (~torch.isfinite(torch.stack(values))).any().to(self.halted.dtype)
        torch.maximum(self.halted, is_bad, out=self.halted)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes a step; a closure is not supported."""
        assert closure is None
        if is_queued(self.halted.device):
            # Where gradient scaling of float16 says that a step is to be skipped.
            self.found_inf = self.halted
        elif self.halted.item() > 0:
            return
        fresh, sparse = [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    sparse.append((parameter, parameter.grad, group))
                    parameter.grad = None  # PyTorch's would refuse it
                    continue
                self.state[parameter] = _in_full(self.state[parameter])
                if not self.state[parameter]:
                    fresh.append(parameter)
        _start(fresh, self.state)
        super().step()
        for parameter, grad, group in sparse:
            state = self.state[parameter]
            if "table" not in state:
                state = self.state[parameter] = _by_rows(state, parameter)
            state["step"] += 1
            scale = getattr(self, "grad_scale", None)
            state["table"].step(parameter, grad, state["step"], group, scale)

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's; averages of a table are spread out to all of its rows."""
        result = super().state_dict()
        result["state"] = {key: _in_full(state) for key, state in result["state"].items()}
        return result


def named_state(optimizer: AdamW, model: nn.Module) -> dict[str, Tensor]:
    """What the optimizer keeps, by the parameters' names; the tensors are its own.

    A parameter has `<name>.step`, `<name>.exp_avg` and `<name>.exp_avg_sq`; of a table that is
    stepped by rows, the averages are (R, D), those of the rows in `<name>.rows`, (R,). One that
    has had no gradient yet has nothing.
    """
    result = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if not state:
            continue
        result[f"{name}.step"] = state["step"]
        if "table" in state:
            table = state["table"]
            result[f"{name}.rows"] = table.rows
            averages = [average[: len(table.rows)] for average in table.averages]
        else:
            averages = [state[average] for average in AVERAGES]
        result.update({f"{name}.{k}": v for k, v in zip(AVERAGES, averages, strict=True)})
    return result


def load_named_state(optimizer: AdamW, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts back what `named_state` gave; the next step is the same, to the bit.

    Names, shapes and types are compared before anything is copied.

    Raises:
        ValueError: The tensors are not those of this model's optimizer; nothing has changed.
    """
    whole, tables = [], []
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        if f"{name}.step" not in tensors:
            continue
        wanted[f"{name}.step"] = (torch.float32, ())
        shape = tuple(parameter.shape)
        if f"{name}.rows" in tensors and parameter.dim() == 2:
            num_rows = min(tensors[f"{name}.rows"].numel(), len(parameter))
            wanted[f"{name}.rows"] = (torch.int64, (num_rows,))
            shape = (num_rows, *shape[1:])
            tables.append((name, parameter))
        else:
            whole.append((name, parameter))
        wanted.update({f"{name}.{average}": (parameter.dtype, shape) for average in AVERAGES})
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if wrong := sorted({name for name, _ in wanted.items() ^ found.items()}):
        raise ValueError(f"not this model's optimizer state: {', '.join(wrong[:5])}")
    rows_of = {name: tensors[f"{name}.rows"] for name, _ in tables}
    for name, parameter in tables:
        rows = rows_of[name]
        if len(set(rows.tolist())) < len(rows) or bool(
            ((rows < 0) | (rows >= len(parameter))).any()
        ):
            raise ValueError(f"{name}.rows are not rows of a table of {len(parameter)}")
    optimizer.state.clear()
    _start([parameter for _, parameter in whole], optimizer.state)
    for name, parameter in whole:
        for key, value in optimizer.state[parameter].items():
            value.copy_(tensors[f"{name}.{key}"])
    for name, parameter in tables:
        if parameter.device.type != "cpu" or is_queued(parameter.device):
            # Of a run on a CPU, which goes on elsewhere: where no gradient is sparse.
            _start([parameter], optimizer.state)
            state, rows = optimizer.state[parameter], rows_of[name].to(parameter.device)
            for key in AVERAGES:
                state[key][rows] = tensors[f"{name}.{key}"].to(parameter.device)
            state["step"].copy_(tensors[f"{name}.step"])
            continue
        table = _Rows(parameter)
        table.add(rows_of[name].clone())
        for average, key in zip(table.averages, AVERAGES, strict=True):
            average[: len(table.rows)] = tensors[f"{name}.{key}"]
        optimizer.state[parameter] = {"step": tensors[f"{name}.step"].clone(), "table": table}


def _start(parameters: Sequence[Tensor], states: Any) -> None:
    """Gives parameters the state of step 0, as PyTorch's own first step would, but in one piece.

    By itself that step allocates every average alone, in the gaps that the first batch has left in
    memory, and the next batches then need memory of their own: 80 MB with bert-base.
    """
    if not parameters:
        return
    like = parameters[0]
    for parameter in parameters:
        states[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=like.device)
    sizes = [-(-parameter.numel() // 16) * 16 for parameter in parameters]  # whole cache lines
    for name in AVERAGES:
        flat = torch.zeros(sum(sizes), dtype=like.dtype, device=like.device)
        for parameter, part in zip(parameters, torch.split(flat, sizes), strict=True):
            states[parameter][name] = part[: parameter.numel()].view_as(parameter)


def _by_rows(state: dict[str, Any], table: Tensor) -> dict[str, Any]:
    """A table's state in PyTorch's form (or none yet) as one that keeps its rows in `_Rows`."""
    result = {"step": state.get("step", torch.zeros(())), "table": _Rows(table)}
    if state:
        averages = [state[name] for name in AVERAGES]
        result["table"].add(sum(average.ne(0).any(1) for average in averages).nonzero()[:, 0])
        result["table"].fill(averages)
    return result


def _in_full(state: dict[str, Any]) -> dict[str, Any]:
    """State in PyTorch's form; the inverse of `_by_rows`."""
    if "table" not in state:
        return state
    return {"step": state["step"], **dict(zip(AVERAGES, state["table"].in_full(), strict=True))}


class _Rows:
    """AdamW's averages for those rows of a table that have had a gradient so far.

    Of the others both averages are zero, and a step without weight decay leaves them as they are,
    to the bit. So they need neither time nor memory: of a vocabulary of 30,000 pieces English
    CoNLL-2003 has half, of a multilingual one a tenth.

    Attributes:
        rows: (R,) rows of the table, in the order in which they came.
        averages: Two of (V, D); the first R rows are those of `rows`.
    """

    def __init__(self, table: Tensor) -> None:
        self.rows = torch.zeros(0, dtype=torch.int64)
        self._place = torch.full((len(table),), -1)  # in `rows`
        # NumPy's zeros are the system's, which takes no memory for them until they are written to.
        self.averages = [
            torch.from_numpy(np.zeros(table.nbytes, np.uint8)).view(table.dtype).view(table.shape)
            for _ in AVERAGES
        ]
        self._weights, self._grads = table.new_zeros(
            2, min(ROWS_PER_CALL, len(table)), table.shape[1]
        )

    def add(self, rows: Tensor) -> None:
        """Takes in rows that are not there yet."""
        self._place[rows] = torch.arange(len(self.rows), len(self.rows) + len(rows))
        self.rows = torch.cat([self.rows, rows])

    def fill(self, averages: Sequence[Tensor]) -> None:
        """Sets the averages of `rows` from those of the whole table, (V, D)."""
        for mine, other in zip(self.averages, averages, strict=True):
            mine[: len(self.rows)] = other[self.rows]

    def in_full(self) -> list[Tensor]:
        """The averages of the whole table, (V, D) each."""
        return [
            torch.zeros_like(mine).index_copy_(0, self.rows, mine[: len(self.rows)])
            for mine in self.averages
        ]

    @torch.no_grad()
    def step(
        self, table: Tensor, grad: Tensor, step: Tensor, group: dict[str, Any], scale: Tensor | None
    ) -> None:
        """Steps the table with a sparse gradient, as PyTorch's kernel would with a dense one."""
        ids = grad.indices()[0]
        new = ids[self._place[ids] < 0]
        if len(new):
            self.add(new)
        if group["weight_decay"]:
            table.mul_(1 - group["lr"] * group["weight_decay"])
        places, order = self._place[ids].sort()
        values = grad.values()[order]
        starts = range(0, len(self.rows), ROWS_PER_CALL)
        bounds = torch.searchsorted(places, torch.tensor([*starts, len(self.rows)])).tolist()
        for start, (first, last) in zip(starts, itertools.pairwise(bounds), strict=True):
            rows = self.rows[start : start + ROWS_PER_CALL]
            weights, grads = self._weights[: len(rows)], self._grads[: len(rows)]
            exp_avg, exp_avg_sq = (a[start : start + len(rows)] for a in self.averages)
            here = places[first:last] - start
            torch.index_select(table, 0, rows, out=weights)
            grads[here] = values[first:last]
            torch._fused_adamw_(
                [weights],
                [grads],
                [exp_avg],
                [exp_avg_sq],
                [],
                [step],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=0.0,  # done
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=scale,
            )
            table.index_copy_(0, rows, weights)
            grads[here] = 0.0
