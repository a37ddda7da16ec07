"""How long until something happens: help, and the first optimizer step, against the Trainer.

    python -m benchmarks.bench_startup --data DATA

Whole commands in fresh processes, interleaved. bertner's first run (nothing prepared) and its next
(prepared data in the cache) are told apart; `datasets` gets an empty cache each time, as it would
have for a new file.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import MINILM, arguments, interleave, ratios, spread
from benchmarks.machine import write_result
from bertner.hub import find_model


def command_seconds(command: list[str]) -> float:
    """Seconds of a whole command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    options = arguments(__doc__).parse_args()
    train_command = str(Path(sys.executable).with_name("bertner-train"))
    conll = options.data / "conll2003"
    files = [str(conll / "train.txt"), str(conll / "valid.txt")]

    helps = interleave(
        {
            "python -c pass": lambda: command_seconds([sys.executable, "-c", "pass"]),
            "bertner-train --help": lambda: command_seconds([train_command, "--help"]),
        },
        3 * options.rounds,
        show=False,
    )

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        count = 0

        def bertner(cache: str | None) -> float:
            nonlocal count
            count += 1
            out = folder / f"out{count}"
            command = [train_command, "--model", MINILM, "--max_steps", "1", "--logging_steps", "1"]
            command += ["--train_file", files[0], "--validation_file", files[1]]
            command += ["--eval_strategy", "no", "--save_strategy", "no", "--output_dir", str(out)]
            environment = {**os.environ, "BERTNER_CACHE": str(folder / (cache or f"cache{count}"))}
            start = time.time()
            subprocess.run(command, check=True, capture_output=True, env=environment)
            events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            return float(next(e["time"] for e in events if e["event"] == "log")) - start

        def trainer() -> float:
            nonlocal count
            count += 1
            command = [sys.executable, "-m", "benchmarks.course_script"]
            command += [str(find_model(MINILM).folder), *files, str(folder / f"out{count}")]
            environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / f"cache{count}")}
            start = time.time()
            result = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            )
            found = re.search(r"first step at ([0-9.]+)", result.stdout)
            assert found, result.stderr
            return float(found.group(1)) - start

        bertner("shared")  # fills the cache of the second side
        sides: dict[str, Callable[[], float]] = {
            "Trainer": trainer,
            "bertner": lambda: bertner(None),
            "bertner, data prepared": lambda: bertner("shared"),
        }
        starts = interleave(sides, options.rounds)

    result = {"help": helps, "first_step": starts, "share_of_the_trainer": {}}
    print(f"\n{'':24s} seconds (spread)")
    for name, values in {**helps, **starts}.items():
        took = spread(values)
        line = f"{name:24s} {took['median']:6.3f} ({took['min']:.3f}-{took['max']:.3f})"
        if name in starts:
            share = ratios(values, starts["Trainer"])
            result["share_of_the_trainer"][name] = share
            line += f"   {share['median']:.2f} of the Trainer's ({share['min']:.2f}-"
            line += f"{share['max']:.2f})"
        print(line)
    print(write_result("startup", result))


if __name__ == "__main__":
    main()
