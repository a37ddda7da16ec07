"""bertner on a CUDA card: is it right, how fast is it, and how near to what the card can do.

    python -m benchmarks.bench_cuda --data DATA

It looks first whether losses, gradients, dropout and scores are what they should be
(`cuda_checks`), and stops with exit status 1 if one is not. Then it measures what the card can do,
trains the bert-base shape with bertner and with the Trainer in turn, and runs the whole recipe of
the model card from the command to the card. At the end it prints what was aimed at and what was
measured. On an H100 that should take less than ten minutes; `--skip` leaves parts out.

    python -m benchmarks.bench_cuda --data DATA --dry-run --device cpu

goes through all of it in a minute with a tiny model, without a card, and judges nothing.

How a window of steps is timed: the host runs ahead of the card, so the time of a single step says
nothing. Each side trains for one call of its `train`, over the same few batches again and again.
The first rounds over them are warm-up, in which bertner captures a graph for each size; then the
clock is started and stopped with nothing in flight, and `torch.cuda.synchronize` called. That is
the case in bertner after a step at which an evaluation is due, for which it waits (there are no
rows to evaluate), and in the Trainer at the end of a step.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import cuda_checks, machine
from benchmarks.bench_training import Clock
from benchmarks.common import Parts, arguments, interleave, load, ratios, spread
from benchmarks.cuda_checks import counting_graphs, repeated_batches, synchronize
from bertner import kernels
from bertner.batches import epoch_order
from bertner.config import BertConfig, TrainConfig
from bertner.data import tokenize
from bertner.loop import train
from bertner.readers import read_file

PARTS = ("correctness", "speed", "recipe")
DTYPES = ("float32", "bfloat16")
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Different batches of each size; how often they are gone over to warm up, and again to be counted.
BATCHES = {8: 30, 32: 15, 128: 8}
TIMES = 3

# What AdamW reads and writes of each parameter at least: weight, gradient and two averages in,
# weight and two averages out, of 4 bytes each.
ADAMW_BYTES = 28

TRAINER, BERTNER, NO_GRAPHS = "Trainer", "bertner", "bertner without graphs"


@dataclass
class Size:
    """How large everything is.

    Attributes:
        shapes: Of the models whose results are checked.
        shape: Of the model that is timed; see `cuda_checks.SHAPES`.
        batches: Different batches of each size; see `BATCHES`.
        square: Side of the matrices whose product is timed, by dtype.
        copied_bytes: Of the large copy.
        max_sentences: Of each split; None for all.
        recipe: Flags of the recipe besides those of the card.
    """

    shapes: Sequence[str] = ("small", "bert-base")
    shape: str = "bert-base"
    batches: Callable[[int], int] = lambda size: BATCHES.get(size, max(8, 200 // size))
    square: dict[str, int] = field(default_factory=lambda: {"float32": 8192, "bfloat16": 8192})
    copied_bytes: int = 2**30
    max_sentences: int | None = None
    recipe: Sequence[str] = ()


DRY = Size(
    shapes=("small",),
    shape="small",
    batches=lambda size: 2,
    square={"float32": 256, "bfloat16": 256},
    copied_bytes=2**22,
    max_sentences=300,
    recipe=("--max_train_samples", "64", "--max_eval_samples", "32"),
)


# The clock


class Window(Clock):
    """A watcher that times the steps of a run from when one is done to when another is.

    Attributes:
        first: The step at whose end the clock is started.
        last: The step at whose end it is stopped.
        seconds_counted: Between them.
        peak: Largest memory of the device in the whole run, in MB: allocated, and reserved, which
            is with what graphs keep for themselves.
    """

    def __init__(self, device: torch.device, first: int, last: int) -> None:
        super().__init__()
        self.device, self.first, self.last = device, first, last
        self.seconds_counted = 0.0
        self.peak = {"allocated_mb": 0.0, "reserved_mb": 0.0}
        free_memory(device)
        self.before = _memory(device)

    def at(self, step: int) -> None:
        """Is told when so many steps are done and nothing is in flight but perhaps on the card."""
        if step == self.first:
            synchronize(self.device)
            self.begin = time.perf_counter()
        elif step == self.last:
            synchronize(self.device)
            self.seconds_counted = time.perf_counter() - self.begin
            after = _memory(self.device)
            self.peak = {name: after[name] - self.before[name] for name in after}

    def stepped(self, report: Any) -> None:
        """Starts or stops the clock."""
        self.at(report.step)


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {"allocated_mb": 0.0, "reserved_mb": 0.0}
    return {
        "allocated_mb": torch.cuda.max_memory_allocated(device) / 2**20,
        "reserved_mb": torch.cuda.max_memory_reserved(device) / 2**20,
    }


def free_memory(device: torch.device) -> None:
    """Gives back what earlier runs have left, and begins to look for the peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        # What cuBLAS keeps for each stream, which would count for the wrong side.
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def seconds_per_call(work: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds of a call, which the device does one after the other: the median of five windows."""
    for _ in range(3):
        work()
    windows = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        windows.append((time.perf_counter() - start) / calls)
    return statistics.median(windows)


# What the card can do


def square_rate(device: torch.device, dtype: str, size: int) -> float:
    """Floating-point operations a second of a large product."""
    x, y = (torch.randn(size, size, device=device, dtype=TORCH_DTYPES[dtype]) for _ in range(2))
    into = torch.empty_like(x)
    with kernels.on_device(device, tf32=False, deterministic=False):
        seconds = seconds_per_call(partial(torch.mm, x, y, out=into), device, 10)
    return 2 * size**3 / seconds


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of a large copy, those read and those written both counted."""
    source = torch.ones(num_bytes // 4, device=device)
    into = torch.empty_like(source)
    return 2 * num_bytes / seconds_per_call(partial(into.copy_, source), device, 10)


def weight_shapes(config: BertConfig) -> list[tuple[int, int]]:
    """Output and input sizes of the matrices of the layers, all of them."""
    hidden, wide = config.hidden_size, config.intermediate_size
    shapes = [(3 * hidden, hidden), (hidden, hidden), (wide, hidden), (hidden, wide)]
    return shapes * config.num_hidden_layers


def step_operations(config: BertConfig, num_tokens: float) -> float:
    """Floating-point operations of a step's products: of the layers alone, on real tokens.

    A product takes two for each token and weight, and there are three: forward, and backward to the
    input and to the weight.
    """
    return 3 * 2 * num_tokens * sum(rows * columns for rows, columns in weight_shapes(config))


def own_rate(device: torch.device, dtype: str, config: BertConfig, num_tokens: int) -> float:
    """Floating-point operations a second of the step's own products, and nothing else.

    Each weight is a matrix of its own, so that it comes from memory as in training. On a card they
    are captured in a graph, since launching them takes longer than computing them.
    """
    kind = {"device": device, "dtype": TORCH_DTYPES[dtype]}
    weights = [torch.randn(shape, **kind) for shape in weight_shapes(config)]
    into = [torch.empty_like(weight) for weight in weights]
    sizes = {size for shape in weight_shapes(config) for size in shape}
    states = {size: torch.randn(num_tokens, size, **kind) for size in sizes}

    def products() -> None:
        for weight in weights:
            states[weight.shape[1]] @ weight.t()
        for weight, gradient in zip(weights, into, strict=True):
            grad = states[weight.shape[0]]
            torch.mm(grad.t(), states[weight.shape[1]], out=gradient)
            grad @ weight

    with kernels.on_device(device, tf32=False, deterministic=False):
        seconds = seconds_per_call(captured(products, device), device, 10)
    return step_operations(config, num_tokens) / seconds


def captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What replays a CUDA graph of some work; on a CPU the work itself."""
    if device.type != "cuda":
        return work
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # libraries set themselves up, which cannot be captured
        work()
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work()
    return graph.replay


def measure_card(device: torch.device, size: Size, dtypes: Sequence[str]) -> dict[str, Any]:
    """Rates of large products, and the bandwidth of the memory."""
    found: dict[str, Any] = {
        "product_flops": {dtype: square_rate(device, dtype, size.square[dtype]) for dtype in dtypes}
    }
    free_memory(device)
    found["copy_bytes_per_second"] = copy_bandwidth(device, size.copied_bytes)
    free_memory(device)
    for dtype, rate in found["product_flops"].items():
        print(f"  a product of side {size.square[dtype]} in {dtype}: {rate / 1e12:.1f} TFLOP/s")
    bandwidth = found["copy_bytes_per_second"]
    print(f"  a copy of {size.copied_bytes >> 20} MB: {bandwidth / 1e9:.0f} GB/s", flush=True)
    return found


# Side by side


def bertner_seconds(
    parts: Parts, window: Window, rounds: dict[str, Any], settings: dict[str, Any]
) -> float:
    """Seconds of the counted steps, of bertner; adds to `rounds` what else there is to know."""
    model = copy.deepcopy(parts.model).to(window.device)
    config = TrainConfig(
        max_steps=window.last,
        # With no rows to evaluate it is a place to stop at: until all that is in flight has landed.
        eval_strategy="steps",
        eval_steps=window.first,  # and after the last step, twice as many
        save_strategy="no",
        **settings,
    )
    with counting_graphs() as counted:
        train(model, parts.train, config, watcher=window)
    rounds["graphs"] = counted.captured
    rounds["peak"] = window.peak
    return window.seconds_counted


def trainer_seconds(
    parts: Parts,
    folder: Path,
    rows: list[dict[str, list[int]]],
    window: Window,
    rounds: dict[str, Any],
    batch_size: int,
    dtype: str,
) -> float:
    """The same of the Trainer, with its defaults: fused AdamW, sdpa, dynamic padding."""
    from transformers import (
        AutoModelForTokenClassification,
        DataCollatorForTokenClassification,
        PreTrainedTokenizerFast,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers.utils import logging

    class Callback(TrainerCallback):
        """Tells the window of every step."""

        def on_step_end(self, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
            window.at(state.global_step)

    logging.disable_progress_bar()
    settings = TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=window.device.type == "cpu",
        per_device_train_batch_size=batch_size,
        max_steps=window.last,
        bf16=dtype == "bfloat16",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        weight_decay=0.01,
        learning_rate=2e-5,
    )
    assert settings.device == window.device, settings.device
    settings._n_gpu = min(settings.n_gpu, 1)  # of several cards it would take all
    trainer = Trainer(
        model=AutoModelForTokenClassification.from_pretrained(folder, attn_implementation="sdpa"),
        args=settings,
        train_dataset=rows,
        data_collator=DataCollatorForTokenClassification(
            PreTrainedTokenizerFast(
                tokenizer_object=parts.tokenizer.fast, **parts.tokenizer.special_tokens
            )
        ),
        callbacks=[Callback()],
    )
    trainer.remove_callback(PrinterCallback)
    expected = {"float32": "no", "bfloat16": "bf16"}[dtype]
    assert trainer.accelerator.mixed_precision == expected, trainer.accelerator.mixed_precision
    trainer.train()
    rounds["peak"] = window.peak
    return window.seconds_counted


def measure_setting(
    parts: Parts, folder: Path, device: torch.device, size: Size, setting: tuple[str, int], num: int
) -> dict[str, Any]:
    """Times all sides with one dtype and batch size."""
    from tests.parity.trainer import rows_for_trainer

    dtype, batch_size = setting
    num_batches = min(size.batches(batch_size), len(parts.train) // batch_size)
    dataset = repeated_batches(parts.train, batch_size, num_batches, 2 * TIMES)
    parts = replace(parts, train=dataset)
    rows = rows_for_trainer(parts.train)
    steps = TIMES * num_batches
    found: dict[str, dict[str, Any]] = {name: {} for name in (TRAINER, BERTNER, NO_GRAPHS)}

    def run(side: str) -> float:
        window = Window(device, steps, 2 * steps)
        if side == TRAINER:
            return trainer_seconds(parts, folder, rows, window, found[side], batch_size, dtype)
        settings = {"dtype": dtype, "per_device_train_batch_size": batch_size}
        settings["cuda_graphs"] = side == BERTNER
        return bertner_seconds(parts, window, found[side], settings)

    seconds = interleave({side: partial(run, side) for side in found}, num)
    lengths = np.array([len(row["input_ids"]) for row in rows])
    order = epoch_order(len(rows), cuda_checks.SEED, 0)[: batch_size * num_batches]
    batches = lengths[order].reshape(num_batches, batch_size)
    tokens = float(batches.sum() / num_batches)
    for side, values in seconds.items():
        rate = spread([steps / s for s in values])
        found[side] = {
            "seconds": values,
            "steps_per_second": rate,
            "real_tokens_per_second": tokens * rate["median"],
            "times_the_trainer": ratios(seconds[TRAINER], values),
            **found[side],
        }
    return {
        "dtype": dtype,
        "batch_size": batch_size,
        "counted_steps": steps,
        "real_tokens_per_step": tokens,
        "padded_tokens_per_step": float((batches.max(1) * batch_size).sum() / num_batches),
        "sides": found,
    }


def add_floor(
    result: dict[str, Any], card: dict[str, Any], parts: Parts, device: torch.device
) -> None:
    """Adds to a setting's result the floor of its steps, and how near to it each side comes."""
    dtype, tokens = result["dtype"], result["real_tokens_per_step"]
    config, rate = parts.model.config, card["product_flops"][result["dtype"]]
    operations = step_operations(config, tokens)
    adamw = ADAMW_BYTES * parts.model.num_parameters / card["copy_bytes_per_second"]
    floor = {
        "operations": operations,
        "products_seconds": operations / rate,
        "adamw_seconds": adamw,
        "seconds": operations / rate + adamw,
        "own_products_flops": own_rate(device, dtype, config, round(tokens)),
    }
    free_memory(device)
    result["floor"] = floor
    for side in result["sides"].values():
        step = 1 / side["steps_per_second"]["median"]
        side["share_of_floor"] = floor["seconds"] / step
        side["share_of_product_rate"] = operations / step / rate


def measure_speed(
    parts: Parts, device: torch.device, size: Size, options: argparse.Namespace
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The card's rates, and all sides in all settings."""
    print("what the card can do:", flush=True)
    card = measure_card(device, size, options.dtype)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts.save(folder)
        for batch_size in options.batch_size:
            for dtype in options.dtype:
                print(
                    f"batch size {batch_size}, {dtype}, seconds of the counted steps:", flush=True
                )
                try:
                    result = measure_setting(
                        parts, folder, device, size, (dtype, batch_size), options.rounds
                    )
                except torch.OutOfMemoryError as error:
                    print(f"  left out: {str(error).splitlines()[0]}", flush=True)
                    free_memory(device)
                    continue
                add_floor(result, card, parts, device)
                print_setting(result)
                results.append(result)
    return card, results


def print_setting(result: dict[str, Any]) -> None:
    """One line for each side."""
    floor = result["floor"]
    print(
        f"  {result['real_tokens_per_step']:.0f} real tokens a step "
        f"({result['padded_tokens_per_step']:.0f} padded); floor {floor['seconds'] * 1e3:.2f} ms: "
        f"products {floor['products_seconds'] * 1e3:.2f}, AdamW {floor['adamw_seconds'] * 1e3:.2f};"
        f" the step's own products alone run at {floor['own_products_flops'] / 1e12:.1f} TFLOP/s"
    )
    print(
        f"  {'':22s} steps/s (spread)        tokens/s  x Trainer (spread)   floor  products  "
        "peak MB, reserved"
    )
    for name, side in result["sides"].items():
        rate, ratio = side["steps_per_second"], side["times_the_trainer"]
        print(
            f"  {name:22s} {rate['median']:7.2f} ({rate['min']:.2f}-{rate['max']:.2f}) "
            f"{side['real_tokens_per_second']:12,.0f}  {ratio['median']:6.2f} "
            f"({ratio['min']:.2f}-{ratio['max']:.2f}) {side['share_of_floor']:7.1%} "
            f"{side['share_of_product_rate']:8.1%} {side['peak']['allocated_mb']:8.0f} "
            f"{side['peak']['reserved_mb']:8.0f}"
            + (f"  {side['graphs']} graphs" if side.get("graphs") else ""),
            flush=True,
        )


# The whole recipe


def run_recipe(
    folder: Path, data: Path, device: torch.device, dtype: str, flags: Sequence[str]
) -> dict[str, Any]:
    """`bertner-train` as a user calls it, from the command to the model card.

    Args:
        folder: With the model to start from; the run's own files go into another one.
        data: See `main`.
        device: Where to train.
        dtype: Of the arithmetic.
        flags: More of them.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run"
        command = [sys.executable, "-m", "bertner.cli", "--model_name_or_path", str(folder)]
        command += ["--train_file", str(data / "conll2003" / "train.txt")]
        command += ["--validation_file", str(data / "conll2003" / "valid.txt")]
        command += ["--output_dir", str(out), "--dtype", dtype, "--device", device.type, *flags]
        environment = {**os.environ, "BERTNER_CACHE": str(Path(temporary) / "cache")}
        begin, clock = time.time(), time.perf_counter()
        process = subprocess.run(
            command,
            cwd=Path(__file__).parent.parent,
            env=environment,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - clock
        result: dict[str, Any] = {
            "dtype": dtype,
            "exit_status": process.returncode,
            "seconds": seconds,
            "stderr": process.stderr[-4000:],
        }
        if process.returncode == 0:
            result.update(timeline(out, begin))
    return result


def timeline(out: Path, begin: float) -> dict[str, Any]:
    """When things happened in a run, in seconds since the command."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    results = json.loads((out / "all_results.json").read_text(encoding="utf-8"))
    return {
        "events": [
            {"event": e["event"], "step": e.get("step"), "at": round(e["time"] - begin, 2)}
            for e in events
            if e["event"] != "log"
        ],
        "evaluation_seconds": [e["eval_runtime"] for e in events if e["event"] == "eval"],
        "card_at": round((out / "README.md").stat().st_mtime - begin, 2),
        "steps": results["step"],
        "steps_per_second_without_watching": results["train_steps_per_second"],
        "eval_f1": results["eval_f1"],
        "train_loss": results["train_loss"],
    }


def measure_recipe(
    parts: Parts, device: torch.device, size: Size, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The recipe in each dtype, bfloat16 first."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        parts.save(Path(temporary))
        for dtype in sorted(options.dtype):
            print(f"the whole recipe in {dtype}:", flush=True)
            data = options.data.resolve()
            result = run_recipe(Path(temporary), data, device, dtype, size.recipe)
            found.append(result)
            print(f"  {result['seconds']:.1f} s, exit status {result['exit_status']}")
            if result["exit_status"]:
                print("  " + "\n  ".join(result["stderr"].splitlines()[-5:]), flush=True)
                continue
            for line in result["stderr"].splitlines():
                if "warn" in line.lower():  # a user would see it, too
                    print(f"  {line}")
            moments = [f"{e['event']} at {e['at']:.1f}" for e in result["events"]]
            print(f"  {', '.join(moments)}, card at {result['card_at']:.1f}")
            print(
                f"  {result['steps']} steps, {result['steps_per_second_without_watching']:.1f} a "
                "second between evaluations and checkpoints; evaluations of "
                + ", ".join(f"{s:.2f}" for s in result["evaluation_seconds"])
                + " s",
                flush=True,
            )
    return found


# What was aimed at


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target beside what was measured; `met` is None where it is not judged."""

    def side(dtype: str, batch_size: int, name: str = BERTNER) -> dict[str, Any]:
        for each in result.get("speed", []):
            if (each["dtype"], each["batch_size"]) == (dtype, batch_size):
                found: dict[str, Any] = each["sides"][name]
                return found
        return {}

    def at_least(what: str, wanted: float, measured: float | None, form: str) -> dict[str, Any]:
        met = None if measured is None else bool(measured >= wanted)
        return {"what": what, "wanted": wanted, "measured": measured, "form": form, "met": met}

    def ratio(found: dict[str, Any]) -> float | None:
        return found["times_the_trainer"]["median"] if found else None

    targets = [
        at_least("batch 8, bfloat16: steps/s, x Trainer", 10.0, ratio(side("bfloat16", 8)), "x"),
        at_least("batch 8, float32: steps/s, x Trainer", 5.0, ratio(side("float32", 8)), "x"),
        at_least(
            "batch 128, bfloat16: tokens/s, x Trainer", 2.5, ratio(side("bfloat16", 128)), "x"
        ),
        at_least(
            "batch 128, bfloat16: share of the measured product rate",
            0.5,
            side("bfloat16", 128).get("share_of_product_rate"),
            "%",
        ),
    ]
    recipes = {r["dtype"]: r for r in result.get("recipe", []) if r["exit_status"] == 0}
    seconds = recipes["bfloat16"]["card_at"] if "bfloat16" in recipes else None
    met = None if seconds is None else bool(seconds <= 20.0)
    what = "the whole recipe in bfloat16: seconds from the command to the card"
    targets.append({"what": what, "wanted": 20.0, "measured": seconds, "form": "s", "met": met})
    checks = [
        check
        for check in result.get("correctness", [])
        if "float32 with CUDA graphs against without" in check["name"] and check["values"]
    ]
    errors = [check["values"]["difference"] for check in checks]
    targets.append(
        {
            "what": "graphs against none, float32, dropout off: losses off by",
            "wanted": cuda_checks.GRAPHS_ERROR["float32"],
            "measured": max(errors, default=None),
            "form": "e",
            "met": all(check["passed"] for check in checks) if checks else None,
        }
    )
    return targets


def print_targets(targets: Sequence[dict[str, Any]]) -> None:
    """The table at the end."""
    shown: dict[str, Callable[[float], str]] = {
        "x": lambda value: f"{value:.2f} x",
        "%": lambda value: f"{value:.0%}",
        "s": lambda value: f"{value:.1f} s",
        "e": lambda value: f"{value:.0e}",
    }
    print(f"\n{'target':70s} {'wanted':>8s} {'measured':>10s}  met")
    for target in targets:
        show, measured = shown[target["form"]], target["measured"]
        found = "-" if measured is None else show(measured)
        word = {None: "not judged", True: "yes", False: "no"}[target["met"]]
        print(f"{target['what']:70s} {show(target['wanted']):>8s} {found:>10s}  {word}")


# All of it


def card_facts(device: torch.device) -> dict[str, Any]:
    """What the card is, and what it is driven by."""
    facts: dict[str, Any] = {"name": device.type, "cuda": torch.version.cuda, "driver": None}
    if device.type != "cuda":
        return facts
    properties = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        facts["driver"] = driver.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        pass
    return {
        **facts,
        "name": properties.name,
        "memory_mb": properties.total_memory / 2**20,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }


def parse() -> argparse.Namespace:
    """The command's options, with what was left out filled in."""
    parser = arguments(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--batch-size", type=int, action="append", help=f"default {[*BATCHES]}")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="default both")
    parser.add_argument("--skip", action="append", choices=PARTS, default=[])
    parser.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="of several cards the first one that CUDA_VISIBLE_DEVICES shows",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="a tiny model, few steps, nothing judged"
    )
    options = parser.parse_args()
    options.batch_size = options.batch_size or ([8, 32] if options.dry_run else [*BATCHES])
    options.dtype = options.dtype or [*DTYPES]
    options.rounds = min(options.rounds, 2) if options.dry_run else options.rounds
    return options


def main() -> int:
    """Does all that is not to be skipped.

    Returns:
        0; 1 if something is wrong; 2 if there is no card.
    """
    options = parse()
    # Read when cuBLAS is first used. It is the same for both sides, and on a Hopper card what it
    # would be anyway.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    if device.type != "cuda" and not options.dry_run:
        print(f"this is for CUDA devices, not {device.type}: add --dry-run to try it out")
        return 2
    if device.type == "cuda" and not torch.cuda.is_available():
        print("there is no CUDA device here; to try this out: --dry-run --device cpu")
        return 2
    if options.dry_run:
        machine.RESULTS = Path(tempfile.mkdtemp(prefix="bench_cuda-"))
    size, start = DRY if options.dry_run else Size(), time.perf_counter()
    result: dict[str, Any] = {
        "card": card_facts(device),
        "options": {k: str(v) if k == "data" else v for k, v in vars(options).items()},
    }
    print(f"{result['card']['name']}, torch {torch.__version__}", flush=True)
    parts = load("bert-base", options.data, size.max_sentences)
    parts.model = cuda_checks.make_model(size.shape, parts, 0.1, initializer_range=0.02)

    def keep(name: str, found: Any) -> None:
        """Writes what there is so far: what comes next may fail."""
        result[name] = found
        result["seconds"] = time.perf_counter() - start
        print(f"{result['seconds']:.0f} s so far", machine.write_result("cuda", result), flush=True)

    if "correctness" not in options.skip:
        print("is it right?", flush=True)
        # Few sentences to score, since the CPU scores them too.
        few = read_file(options.data / "conll2003" / "valid.txt").head(200)
        scored = tokenize(few, parts.tokenizer, parts.train.label_set)
        checks = cuda_checks.check_all(device, replace(parts, validation=scored), size.shapes)
        keep("correctness", [vars(check) for check in checks])
        if wrong := [check.name for check in checks if check.passed is False]:
            print(f"{len(wrong)} of {len(checks)} checks are wrong: {'; '.join(wrong)}")
            print("Nothing is timed before they are right; to do so anyway: --skip correctness")
            return 1
    if "speed" not in options.skip:
        card, speed = measure_speed(parts, device, size, options)
        result["rates"] = card
        keep("speed", speed)
    failed = False
    if "recipe" not in options.skip:
        recipe = measure_recipe(parts, device, size, options)
        keep("recipe", recipe)
        failed = any(each["exit_status"] for each in recipe)
    targets = judge(result)
    if options.dry_run:
        targets = [{**target, "met": None} for target in targets]
    print_targets(targets)
    keep("targets", targets)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
