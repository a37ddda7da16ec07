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
# It reads arguments, whom to kill after how many seconds (or null), code to run before, the number
# of ranks and the file for what they print, as a JSON line, and answers with the exit status of
# each rank and the seconds that they took. As torchrun does, it tells the others of one that was
# killed.
_SERVER = """
import json, os, signal, socket, sys, time
import torch
torch.set_num_threads(int(sys.argv[1]))
import bertner.run, bertner.seeds, bertner.loop, bertner.kernels, bertner.checkpoint
from bertner.cli import train_main
import torch._dynamo
for line in sys.stdin:
    arguments, kill, code, world_size, path = json.loads(line)
    start = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids = []
    for rank in range(world_size):
        pids.append(os.fork())
        if pids[-1] == 0:
            if world_size > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
                os.environ.update(WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1")
            log = os.open(path, os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            status = 99
            try:
                exec(code)
                status = train_main(arguments)
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
    if kill is not None:
        time.sleep(kill[1])
        os.kill(pids[kill[0]], signal.SIGKILL)
        victim = os.waitid(os.P_PID, pids[kill[0]], os.WEXITED | os.WNOWAIT)
        for pid in pids if victim.si_status else []:
            os.kill(pid, signal.SIGTERM)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps([statuses, time.monotonic() - start]), flush=True)
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
        kill = None if kill_after is None else (0, kill_after)
        (status,), seconds = self._run(arguments, kill, code, 1, Path(os.devnull))
        return status, seconds

    def run_ranks(
        self,
        world_size: int,
        arguments: list[str],
        log: Path,
        code: str = "",
        kill: tuple[int, float] | None = None,
    ) -> tuple[list[int], str]:
        """Exit status of each rank, and all that they print.

        Args:
            world_size: How many.
            arguments: Of `bertner-train`.
            log: File for what they print.
            code: To run before, in each rank; `rank` is its number.
            kill: A rank, and after how many seconds it is killed.
        """
        log.write_text("", encoding="utf-8")
        statuses, _ = self._run(arguments, kill, code, world_size, log)
        return statuses, log.read_text(encoding="utf-8")

    def _run(self, *request: Any) -> tuple[list[int], float]:
        *values, log = request
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([*values, str(log)]) + "\n")
        self.process.stdin.flush()
        statuses, seconds = json.loads(self.process.stdout.readline())
        return statuses, seconds

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()
