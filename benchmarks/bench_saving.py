"""What saving costs: `bertner-train` with a checkpoint every 100 steps and without, interleaved.

    python -m benchmarks.bench_saving --data DATA --model bert-base

Both sides are the real command on CoNLL-2003, batch 8, without evaluation; their time is all that
training takes, saving included. Of two checkpoints the first is removed, as `--save_total_limit 1`
says. Besides, each part of a save is timed by itself.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import arguments, interleave, load, ratios, spread
from benchmarks.machine import write_result
from bertner import checkpoint, run
from bertner.cli import train_main


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", choices=["minilm", "bert-base"], default="bert-base")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save_steps", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        load(options.model, options.data, max_sentences=100).save(folder / "model")
        saves: list[float] = []
        sizes: list[int] = []

        def timed_save(*args: Any, **kwargs: Any) -> Path:
            start = time.perf_counter()
            saved = checkpoint.save_checkpoint(*args, **kwargs)
            saves.append(time.perf_counter() - start)
            sizes.append(sum(path.stat().st_size for path in saved.iterdir()))
            return saved

        def seconds(extra: list[str]) -> float:
            out = str(folder / "out")
            command = [
                *["--model", str(folder / "model"), "--output_dir", out, "--overwrite_output_dir"],
                *["--train_file", str(options.data / "conll2003" / "train.txt"), "--disable_tqdm"],
                *["--max_steps", str(options.steps), "--eval_strategy", "no"],
            ]
            assert train_main([*command, *extra]) == 0
            results = json.loads((folder / "out" / "all_results.json").read_text())
            return float(results["train_runtime"])

        run.save_checkpoint = timed_save
        every = ["--save_strategy", "steps", "--save_steps", str(options.save_steps)]
        found = interleave(
            {
                "without": lambda: seconds(["--save_strategy", "no"]),
                "with": lambda: seconds([*every, "--save_total_limit", "1"]),
            },
            options.rounds,
        )
        newest = checkpoint.list_checkpoints(folder / "out")[-1][1]
        checks = []
        for _ in range(3):
            start = time.perf_counter()
            checkpoint.verify_checkpoint(newest)
            checks.append(time.perf_counter() - start)
    result = {
        "model": options.model,
        "steps": options.steps,
        "save_steps": options.save_steps,
        "steps_per_second": {
            side: options.steps / spread(s)["median"] for side, s in found.items()
        },
        "speed_with_saving": ratios(found["without"], found["with"]),
        "seconds_of_a_save": spread(saves),
        "seconds_of_a_check": spread(checks),
        "megabytes": max(sizes) / 1e6,
        "seconds": found,
    }
    print(json.dumps(result, indent=2))
    print(write_result(f"saving_{options.model}", result))


if __name__ == "__main__":
    main()
