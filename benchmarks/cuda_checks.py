"""Whether a CUDA device computes what it should: what `bench_cuda` looks at before it times.

Each check returns what it measured and what it allows; none of them stops at the first that is
wrong. On a CPU those that are about CUDA alone are skipped by name.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench_training import Clock
from benchmarks.common import Parts, take_rows
from bertner import graphs, kernels
from bertner.batches import Bucket, bucket_of, collate, epoch_order, pack, packed_by_length
from bertner.config import BertConfig, TrainConfig
from bertner.data import TokenDataset
from bertner.errors import NotFiniteError
from bertner.evaluation import Evaluation, evaluate
from bertner.labels import IGNORE_INDEX
from bertner.loop import train
from bertner.model import BertForNER, autocast, token_loss

CPU = torch.device("cpu")
SEED = 42
VOCABULARY = 28996

# Shapes to check; `small` has heads of a size that every fused kernel takes.
SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 256,
    },
    "bert-base": {},
}

# Largest relative errors. float32 itself gives a tenth of these or less; TF32, whose mantissa has
# 10 bits, gives 1e-3, and a wrong gradient gives 1.
LOSS_ERROR = {"float32": 1e-5, "bfloat16": 1e-2}
GRADIENT_ERROR = {"float32": 1e-4, "bfloat16": 0.15}
DUMMY_ERROR = 2e-5
# Of any step's loss, with CUDA graphs against without; they differ in the sizes of batches alone.
GRAPHS_ERROR = {"float32": 1e-5, "bfloat16": 5e-2}
# Of the mean loss of a run, where the dropout is other: there is chance in it.
CHANCE = 0.05
# Of a product of two float32 matrices, as norms.
PRODUCT_ERROR = 1e-5
LOGIT_ERROR = 1e-4


@dataclass
class Check:
    """What a check found.

    Attributes:
        name: What was checked.
        passed: Whether it is as it should be; None if it was skipped.
        said: What was measured and what is allowed, or why it was skipped.
        values: The figures.
    """

    name: str
    passed: bool | None
    said: str
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        word = {None: "skipped", True: "ok", False: "WRONG"}[self.passed]
        return f"  {word:7s} {self.name}: {self.said}"


class Losses(Clock):
    """A watcher that keeps each step's loss, and the weights at the first evaluation."""

    def __init__(self, model: BertForNER) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []
        self.weights: dict[str, Tensor] | None = None

    def stepped(self, report: Any) -> None:
        """Keeps the step's loss."""
        self.losses.append(report.loss)

    def evaluated(self, *args: object) -> None:
        """Keeps the weights."""
        if self.weights is None:
            self.weights = weights_of(self.model)


class CountedCapture(graphs.Capture):
    """Captures as ever, and counts."""

    captured = 0
    replayed = 0

    def __call__(
        self, function: Callable[[], list[Tensor]]
    ) -> tuple[Callable[[], None], list[Tensor]]:
        """Captures a function; see `graphs.Capture`."""
        replay, results = super().__call__(function)
        CountedCapture.captured += 1

        def counted() -> None:
            CountedCapture.replayed += 1
            replay()

        return counted, results


def not_captured(device: torch.device) -> Callable[[], Any]:
    """In place of `graphs.Capture`: a replay takes the step kernel by kernel, from its inputs."""

    def capture(function: Callable[[], list[Tensor]]) -> tuple[Callable[[], Any], list[Tensor]]:
        result = torch.zeros(2, device=device)
        return lambda: result.copy_(function()[0]), [result]

    return lambda: capture


@contextmanager
def counting_graphs() -> Iterator[type[CountedCapture]]:
    """Counts graphs and replays while it is open."""
    CountedCapture.captured = CountedCapture.replayed = 0
    with patch.object(graphs, "Capture", CountedCapture):
        yield CountedCapture


def weights_of(model: BertForNER) -> dict[str, Tensor]:
    """The weights, on the host."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def repeated_batches(
    dataset: TokenDataset, batch_size: int, num_batches: int, times: int, unlike: bool = False
) -> TokenDataset:
    """The first batches of the dataset's first epoch, time after time, as one epoch.

    The same batches come again, in the same order, so that after the second time there is a graph
    for the size of each.

    Args:
        dataset: The whole.
        batch_size: Rows in a batch.
        num_batches: Different ones.
        times: How often each comes.
        unlike: Divide the same rows over the batches by their length: batches of many sizes.
    """
    rows = epoch_order(len(dataset), SEED, 0)[: batch_size * num_batches]
    if unlike:
        rows = rows[np.argsort(dataset.row_lengths[rows], kind="stable")]
    return take_rows(dataset, np.tile(rows, times))


def make_model(
    shape: str,
    parts: Parts,
    dropout: float,
    attention: str = "sdpa",
    initializer_range: float | None = None,
) -> BertForNER:
    """A model with random weights, always the same ones.

    Args:
        shape: One of SHAPES.
        parts: Whose labels it gives.
        dropout: All of it.
        attention: Of padded rows.
        initializer_range: Of the weights; None for so much that scores of attention differ, as
            those of BERT's own range hardly do: what is wrong with them then shows.
    """
    torch.manual_seed(SEED)
    config = BertConfig(
        vocab_size=VOCABULARY,
        id2label=parts.model.config.id2label,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **SHAPES[shape],
    )
    wide = 1.5 * config.hidden_size**-0.5
    config = replace(config, initializer_range=initializer_range or wide)
    return BertForNER(config, attention)


def run(
    model: BertForNER, dataset: TokenDataset, device: torch.device, steps: int, **settings: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Trains a copy of a model; the loss of each step, and the weights at the end."""
    model = copy.deepcopy(model).to(device)
    losses = Losses(model)
    config = TrainConfig(max_steps=steps, eval_strategy="no", save_strategy="no", **settings)
    train(model, dataset, config, watcher=losses)
    return losses.losses, weights_of(model)


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference of two runs' losses."""
    a, b = np.array(ours), np.array(theirs)
    return float(np.max(np.abs(a - b) / np.abs(b)))


# Losses and gradients of one step


def step_on(
    device: torch.device,
    model: BertForNER,
    dataset: TokenDataset,
    rows: Any,
    dtype: str,
    bucket: Bucket | None = None,
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a packed batch, computed as the loop does."""
    model = copy.deepcopy(model).to(device).train()
    model.stack_projections()
    batch = pack(dataset, rows, device, bucket)
    with (
        kernels.on_device(device, tf32=False, deterministic=True),
        kernels.hot_path("auto", device, dtype),
        kernels.gradient_buffers(model),
    ):
        with autocast(device, dtype):
            logits = model(batch.input_ids, **batch.layout).logits
        loss = token_loss(logits, batch.labels, "sum") / dataset.row_num_labelled[rows].sum()
        loss.backward()
        gradients = {
            name: parameter.grad.to_dense().double().cpu().clone()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
    return loss.item(), gradients


def exact_step(
    model: BertForNER, shape: str, parts: Parts, dataset: TokenDataset, rows: Any
) -> tuple[float, dict[str, Tensor]]:
    """The same in float64 on the CPU, from padded rows and by attention written out."""
    exact = make_model(shape, parts, 0.0, "eager").double().train()
    exact.load_state_dict(model.state_dict())
    batch = collate(dataset, rows, CPU)
    logits = exact(batch.input_ids, attention_mask=batch.attention_mask).logits
    loss = F.cross_entropy(
        logits.flatten(0, -2), batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    loss = loss / dataset.row_num_labelled[rows].sum()
    loss.backward()
    gradients = {n: p.grad for n, p in exact.named_parameters() if p.grad is not None}
    return loss.item(), gradients


def gradient_error(
    found: dict[str, Tensor], exact: dict[str, Tensor]
) -> tuple[float, float, str | None]:
    """The relative error of all gradients together, and that of the worst, with its name.

    One that is a hundredth of the whole or less is measured against that: what is zero but for
    rounding, as the keys' biases, has no relative error.
    """
    if found.keys() != exact.keys():
        return float("inf"), float("inf"), min(found.keys() ^ exact.keys())
    whole = sum(float(g.norm()) ** 2 for g in exact.values()) ** 0.5
    errors = {name: float((found[name] - g).norm()) for name, g in exact.items()}
    relative = {n: e / max(float(exact[n].norm()), 0.01 * whole) for n, e in errors.items()}
    worst = max(relative, key=lambda name: relative[name])
    return sum(e**2 for e in errors.values()) ** 0.5 / whole, relative[worst], worst


def check_step(device: torch.device, shape: str, parts: Parts, dtype: str) -> Check:
    """Losses and gradients of one packed step against float64 on the CPU."""
    model, dataset = make_model(shape, parts, 0.0), parts.train
    rows = epoch_order(len(dataset), SEED, 0)[:8]
    exact_loss, exact = exact_step(model, shape, parts, dataset, rows)
    loss, found = step_on(device, model, dataset, rows, dtype)
    loss_error = abs(loss - exact_loss) / exact_loss
    whole, worst, name = gradient_error(found, exact)
    allowed = LOSS_ERROR[dtype], GRADIENT_ERROR[dtype]
    return Check(
        f"{shape}, a step in {dtype} against float64",
        loss_error <= allowed[0] and worst <= allowed[1],
        f"loss off by {loss_error:.1e} (at most {allowed[0]:.0e}), gradients by {whole:.1e}, "
        f"the worst by {worst:.1e} ({name}; at most {allowed[1]:.0e})",
        {"loss": loss_error, "gradients": whole, "worst_gradient": worst, "worst_name": name},
    )


def check_dummies(device: torch.device, shape: str, parts: Parts) -> Check:
    """A batch that is filled up to a bucket against just the rows."""
    model, dataset = make_model(shape, parts, 0.0), parts.train
    order, errors = epoch_order(len(dataset), SEED, 0), []
    for num_rows in (1, 7, 8, min(40, len(dataset))):
        rows = order[:num_rows]
        bucket = bucket_of(num_rows, int(dataset.row_lengths[rows].sum()))
        loss, exact = step_on(device, model, dataset, rows, "float32")
        other_loss, other = step_on(device, model, dataset, rows, "float32", bucket)
        errors.append(max(abs(other_loss - loss) / loss, gradient_error(other, exact)[1]))
    return Check(
        f"{shape}, rows with dummies after them against the rows alone",
        max(errors) <= DUMMY_ERROR,
        f"losses and gradients off by {max(errors):.1e} (at most {DUMMY_ERROR:.0e})",
        {"errors": errors},
    )


# Runs of some steps


def check_graphs(device: torch.device, shape: str, parts: Parts, dtype: str) -> Check:
    """Losses of training with CUDA graphs against those without, dropout off."""
    model = make_model(shape, parts, 0.0)
    dataset = repeated_batches(parts.train, 8, 8, 4, unlike=True)
    with counting_graphs() as counted:
        ours, _ = run(model, dataset, device, 32, dtype=dtype)
        captured, replayed = counted.captured, counted.replayed
    eager, _ = run(model, dataset, device, 32, dtype=dtype, cuda_graphs=False)
    difference = largest_difference(ours, eager)
    allowed = GRAPHS_ERROR[dtype]
    return Check(
        f"{shape}, 32 steps in {dtype} with CUDA graphs against without",
        difference <= allowed and captured > 0 and replayed > 16,
        f"losses off by {difference:.1e} (at most {allowed:.0e}); {captured} graphs, "
        f"{replayed} replays (more than 16)",
        {"difference": difference, "graphs": captured, "replays": replayed},
    )


def check_bits(device: torch.device, shape: str, parts: Parts, dtype: str) -> Check:
    """Two runs with dropout give the same bits; another seed gives others."""
    model = make_model(shape, parts, 0.1)
    dataset = repeated_batches(parts.train, 8, 6, 4)
    first, second = (run(model, dataset, device, 24, dtype=dtype) for _ in range(2))
    other, _ = run(model, dataset, device, 24, dtype=dtype, seed=SEED + 1)
    same = first[0] == second[0]
    weights = [name for name in first[1] if not torch.equal(first[1][name], second[1][name])]
    return Check(
        f"{shape}, two runs in {dtype} of one seed, dropout on",
        same and not weights and other != first[0],
        f"{'the same' if same else 'NOT the same'} losses, {len(weights)} weights that differ "
        f"(0); another seed gives {'the same' if other == first[0] else 'other'} ones",
        {"same_losses": same, "different_weights": weights},
    )


def check_replayed_bits(device: torch.device, shape: str, parts: Parts, dtype: str) -> Check:
    """With dropout, replays give the bits of the same steps taken kernel by kernel."""
    model = make_model(shape, parts, 0.1)
    dataset = repeated_batches(parts.train, 8, 6, 4, unlike=True)
    replayed = run(model, dataset, device, 24, dtype=dtype)
    with patch.object(graphs, "Capture", not_captured(device)):
        launched = run(model, dataset, device, 24, dtype=dtype)
    eager, _ = run(model, dataset, device, 24, dtype=dtype, cuda_graphs=False)
    same = replayed[0] == launched[0] and all(
        torch.equal(tensor, launched[1][name]) for name, tensor in replayed[1].items()
    )
    chance = abs(np.mean(replayed[0]) / np.mean(eager) - 1)
    return Check(
        f"{shape}, replays in {dtype} against the same steps kernel by kernel, dropout on",
        same and chance <= CHANCE,
        f"{'the same bits' if same else 'NOT the same bits'}; with batches that are not filled up "
        f"a mean loss that differs by {chance:.1e} (at most {CHANCE:.0e})",
        {"same_bits": same, "mean_loss_without_graphs": float(chance)},
    )


def check_dropout(device: torch.device, shape: str, parts: Parts, dtype: str) -> Check:
    """One batch again and again at a rate of zero: the losses differ by their dropout alone."""
    dataset = repeated_batches(parts.train, 8, 1, 12)
    settings = {"dtype": dtype, "learning_rate": 0.0}
    on, _ = run(make_model(shape, parts, 0.1), dataset, device, 12, **settings)
    off, _ = run(make_model(shape, parts, 0.0), dataset, device, 12, **settings)
    spread = (max(off) - min(off)) / min(off)
    different = len(set(on))
    return Check(
        f"{shape}, dropout of the same batch at 12 steps in {dtype}",
        different == 12 and spread <= LOSS_ERROR[dtype] / 10,
        f"{different} different losses (12); without dropout they are within {spread:.1e} "
        f"(at most {LOSS_ERROR[dtype] / 10:.0e})",
        {"losses": on, "without_dropout": off},
    )


def check_not_finite(device: torch.device, shape: str, parts: Parts) -> Check:
    """A loss that is not finite ends the run, and neither that step nor a later one is taken.

    The eighth of ten batches has a word whose embedding is not a number; the weights from before it
    are those that an evaluation after seven steps sees.
    """
    model = make_model(shape, parts, 0.1)
    rows = epoch_order(len(parts.train), SEED, 0)[:8]
    dataset = take_rows(parts.train, np.tile(rows, 10))
    ids = dataset.input_ids.copy()
    special = {dataset.cls_id, dataset.sep_id, dataset.pad_id}
    used = set(np.unique(np.concatenate([ids, parts.validation.input_ids])).tolist())
    unused = min(set(range(1000)) - used - special)
    ids[dataset.rows.starts[epoch_order(80, SEED, 0)[7 * 8]]] = unused
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[unused] = float("nan")
    model = model.to(device)
    losses = Losses(model)
    config = TrainConfig(max_steps=10, eval_strategy="steps", eval_steps=7, save_strategy="no")
    name = f"{shape}, a loss that is not finite"
    try:
        train(
            model,
            replace(dataset, input_ids=ids),
            config,
            evaluation=parts.validation,
            watcher=losses,
        )
    except NotFiniteError as error:
        said = str(error).split(",")[0]
    else:
        return Check(name, False, "nobody said so")
    synchronize(device)
    before, after = losses.weights or {}, weights_of(model)
    changed = [
        each
        for each in after
        if each not in before
        or not torch.equal(torch.nan_to_num(before[each]), torch.nan_to_num(after[each]))
    ]
    return Check(
        name,
        "step 8" in said and not changed,
        f"«{said}» (step 8); {len(changed)} weights changed after step 7 (0)",
        {"said": said, "changed": changed},
    )


# Evaluation, and products


def token_logits(model: BertForNER, dataset: TokenDataset, device: torch.device) -> Tensor:
    """(num_tokens, C) logits of each of a dataset's tokens, on the host."""
    logits = torch.zeros(len(dataset.input_ids), model.config.num_labels)
    with torch.inference_mode(), kernels.hot_path("auto", device, "float32"):
        for batch in packed_by_length(dataset, 1024, device):
            found = model(batch.input_ids, **batch.layout).logits[batch.is_own]
            logits[torch.from_numpy(np.asarray(batch.token_index, dtype=np.int64))] = found.cpu()
    return logits


def check_evaluation(device: torch.device, shape: str, parts: Parts) -> list[Check]:
    """Scores on the device against those on the CPU."""
    model = make_model(shape, parts, 0.1).eval()
    dataset = parts.validation
    num_words = len(dataset.word_labels)
    here = copy.deepcopy(model).to(device)
    exact, found = evaluate(model, dataset), evaluate(here, dataset)
    theirs, ours = (token_logits(m, dataset, d) for m, d in ((model, CPU), (here, device)))
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    differ = (ours.argmax(1) != theirs.argmax(1)).nonzero()[:, 0]
    chosen = theirs[differ].gather(1, ours[differ].argmax(1)[:, None])[:, 0]
    margin = float((theirs[differ].max(1).values - chosen).max()) if len(differ) else 0.0
    margin /= float(theirs.abs().max())
    words = num_different(found, exact)
    loss = abs(found.loss - exact.loss) / exact.loss
    kinds = len(np.unique(exact.word_predictions))
    short = evaluate(here, dataset, dtype="bfloat16")
    share = num_different(short, exact) / num_words
    short_loss = abs(short.loss - exact.loss) / exact.loss
    return [
        Check(
            f"{shape}, evaluation in float32 against the CPU",
            loss <= LOSS_ERROR["float32"]
            and error <= LOGIT_ERROR
            and margin <= 2 * LOGIT_ERROR
            and words <= len(differ),
            f"loss off by {loss:.1e} (at most {LOSS_ERROR['float32']:.0e}), logits by {error:.1e} "
            f"(at most {LOGIT_ERROR:.0e}); {words} of {num_words} words get "
            f"another of {kinds} labels, {len(differ)} tokens by a margin of {margin:.1e} "
            f"(at most {2 * LOGIT_ERROR:.0e})",
            {"loss": loss, "logits": error, "words": words, "margin": margin, "labels": kinds},
        ),
        Check(
            f"{shape}, evaluation in bfloat16 against float32 on the CPU",
            short_loss <= 5e-2 and share <= 0.05,
            f"loss off by {short_loss:.1e} (at most 5e-02), {share:.1%} of the words get another "
            "label (at most 5%)",
            {"loss": short_loss, "share_of_words": share},
        ),
    ]


def num_different(ours: Evaluation, theirs: Evaluation) -> int:
    """Words that get another label."""
    return int((ours.word_predictions != theirs.word_predictions).sum())


def product_error(device: torch.device, tf32: bool) -> float:
    """Relative error of a float32 product of two random matrices."""
    generator = torch.Generator().manual_seed(SEED)
    x, y = (torch.randn(1024, 1024, generator=generator) for _ in range(2))
    exact = x.double() @ y.double()
    with kernels.on_device(device, tf32=tf32, deterministic=True):
        found = (x.to(device) @ y.to(device)).double().cpu()
    return float((found - exact).norm() / exact.norm())


def check_tf32(device: torch.device) -> Check:
    """Products are of float32 unless TF32 is asked for; then they are of TF32 where it exists."""
    off, on = product_error(device, tf32=False), product_error(device, tf32=True)
    has_tf32 = torch.cuda.get_device_capability(device) >= (8, 0)
    works = on > 10 * PRODUCT_ERROR if has_tf32 else on <= PRODUCT_ERROR
    return Check(
        "TF32 is off unless asked for",
        off <= PRODUCT_ERROR and works,
        f"products are off by {off:.1e} without (at most {PRODUCT_ERROR:.0e}), by {on:.1e} with",
        {"without": off, "with": on},
    )


def synchronize(device: torch.device) -> None:
    """Waits for the device, if it is one that works through a queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def plan(device: torch.device, parts: Parts, shapes: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The checks, each with its name; in place of the function the reason why it is skipped."""
    is_cuda = device.type == "cuda"
    no_graphs = f"there are no CUDA graphs on {device.type}"
    yield "TF32", (lambda: check_tf32(device)) if is_cuda else f"there is none on {device.type}"
    for shape in shapes:

        def of(check: Callable[..., Any], *more: Any, shape: str = shape) -> Callable[[], Any]:
            return lambda: check(device, shape, parts, *more)

        for dtype in ("float32", "bfloat16"):
            yield f"{shape}, step in {dtype}", of(check_step, dtype)
        yield f"{shape}, dummies", of(check_dummies)
        for dtype in ("float32", "bfloat16"):
            graphs_check = of(check_graphs, dtype) if is_cuda else no_graphs
            yield f"{shape}, CUDA graphs in {dtype}", graphs_check
            yield f"{shape}, same bits in {dtype}", of(check_bits, dtype)
            bits_check = of(check_replayed_bits, dtype) if is_cuda else no_graphs
            yield f"{shape}, replayed bits in {dtype}", bits_check
            yield f"{shape}, dropout in {dtype}", of(check_dropout, dtype)
        yield f"{shape}, not finite", of(check_not_finite)
        yield f"{shape}, evaluation", of(check_evaluation)


def check_all(device: torch.device, parts: Parts, shapes: Sequence[str]) -> list[Check]:
    """Does all checks, and prints each as it is done; one that fails for want of more is wrong."""
    found: list[Check] = []
    for name, work in plan(device, parts, shapes):
        checks: Any
        if isinstance(work, str):
            checks = Check(name, None, work)
        else:
            try:
                checks = work()
            except Exception as error:  # all that there is to know, from one run
                traceback.print_exc()
                said = f"{type(error).__name__}: {error}".splitlines()[0]
                checks = Check(name, False, said)
        for check in checks if isinstance(checks, list) else [checks]:
            print(check, flush=True)
            found.append(check)
    return found
