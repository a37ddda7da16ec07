"""Runs of `bertner-train` to be interrupted: what they are told, and what must come out of them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY, write_conll, write_model_folder

TOTAL_STEPS = 18


def write_inputs(folder: Path) -> list[str]:
    """A tiny model, data, and the arguments of a run with dropout, accumulation and all watching.

    3 steps an epoch, logged every 2, scored every 4, saved every 3: so at the steps 12 and 18
    everything happens at once, and at most others nothing.
    """
    write_model_folder(folder / "tiny-bert")
    for k, split in enumerate(("train", "validation", "test")):
        write_conll(folder / f"{split}.txt", 24, seed=k)
    return [
        *["--model", str(folder / "tiny-bert"), "--train_file", str(folder / "train.txt")],
        *["--validation_file", str(folder / "validation.txt")],
        *["--test_file", str(folder / "test.txt"), "--num_train_epochs", "6"],
        *["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"],
        *["--logging_steps", "2", "--eval_strategy", "steps", "--eval_steps", "4"],
        *["--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "2"],
        *["--learning_rate", "5e-3", "--disable_tqdm", "--load_best_model_at_end"],
        "--no_report",  # takes longer than all the rest
    ]


def without_clocks(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in values.items()
        if name != "time" and not name.endswith(("runtime", "per_second"))
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outcome(output_dir: Path) -> dict[str, Any]:
    """What a finished run leaves, as far as it does not tell the time."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = max(output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))
    return {
        "weights": sha256(output_dir / "model.safetensors"),
        "last checkpoint": last.name,
        "last weights": sha256(last / "model.safetensors"),
        "optimizer": sha256(last / "optimizer.safetensors"),
        "metrics": [without_clocks(json.loads(line)) for line in lines],
        "results": without_clocks(json.loads((output_dir / "all_results.json").read_text())),
    }


def send_once(
    monkeypatch: pytest.MonkeyPatch, module: object, name: str, number: int, call: int
) -> None:
    """Sends this process a signal as a function is called for the n-th time."""
    before, calls = getattr(module, name), []

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return before(*args, **kwargs)

    monkeypatch.setattr(module, name, patched)


# A process that has everything imported and forks for each run, which takes a second off each.
# It reads arguments, after how many seconds to kill (or null) and code to run before, as a JSON
# line, and answers with the exit status and the seconds that it took.
_SERVER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
import bertner.run, bertner.seeds, bertner.loop, bertner.kernels, bertner.checkpoint
from bertner.cli import train_main
import torch._dynamo
for line in sys.stdin:
    arguments, delay, code = json.loads(line)
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        log = os.open(os.devnull, os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        status = 99
        try:
            exec(code)
            status = train_main(arguments)
        finally:
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - start]), flush=True)
"""


class Runner:
    """Runs `bertner-train` in processes of their own, and kills them."""

    def __init__(self, num_threads: int = 1) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(num_threads)],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, arguments: list[str], kill_after: float | None = None, code: str = ""
    ) -> tuple[int, float]:
        """Exit status (-9 if it was killed) and seconds."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([arguments, kill_after, code]) + "\n")
        self.process.stdin.flush()
        status, seconds = json.loads(self.process.stdout.readline())
        return status, seconds

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
