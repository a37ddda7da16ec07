"""`bertner-train --seeds N`: one recipe with several seeds, its mean scores, and the best model.

The run of each seed is an ordinary one, in a folder of its own. The folder that they are in has at
its top what the best of them has at its, and the scores of all.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from bertner.calibration import FILE as CALIBRATION
from bertner.card import card_of_seeds, markdown_table
from bertner.checkpoint import METRICS, WEIGHTS
from bertner.config import TrainConfig
from bertner.errors import CheckpointError, ModelError, OutputDirectoryError, RunStoppedError
from bertner.files import read_json, replace_file, write_json, write_text
from bertner.output_dir import (
    RECORD,
    REPORT,
    find_run,
    is_of_seeds,
    list_seeds,
    remove_run,
    seed_folder,
)
from bertner.parts import Parts, announce
from bertner.report import say
from bertner.resume import Start, load_weights
from bertner.run import how_to_carry_on, join_ranks, open_run, say_what_next, train_run
from bertner.stopping import StopSignals
from bertner.tables import format_table
from bertner.weights import TensorFile

# Scores that the tables show, where there are any, and how the card calls them.
_COLUMNS = {
    "eval_word_f1": "Validation word F1",
    "eval_f1": "Validation subword F1",
    "eval_loss": "Validation loss",
    "test_word_f1": "Test word F1",
    "test_f1": "Test subword F1",
    "test_loss": "Test loss",
}


def run_seeds(config: TrainConfig, recipe: str, arguments: Sequence[str]) -> None:
    """`bertner-train --seeds N`: N runs, and their results together.

    Args:
        config: All settings; `seed` is the first one's.
        recipe: The one that they start from.
        arguments: Of the command, to name it in messages.

    Raises:
        BertnerError: See the exit codes in `errors`.
    """
    output_dir = Path(config.output_dir)
    seeds = range(config.seed, config.seed + config.seeds)
    with ExitStack() as stack:
        ranks = stack.enter_context(join_ranks(config))
        parts, start, record = open_run(config, recipe, stack, ranks)
        if start.finished:
            say(f"{output_dir} holds just this run, and it is finished: nothing to do.")
            return
        announce(config, parts, ranks)
        stop = stack.enter_context(StopSignals())
        ranks.lead(partial(_begin, output_dir, seeds, start, record))
        for number, seed in enumerate(seeds, 1):
            if names := list(filter(None, ranks.gather(stop.name))):
                raise RunStoppedError(
                    f"stopped by {names[0]} before seed {seed} ({number} of {len(seeds)})\n"
                    f"{how_to_carry_on(arguments, ranks)}"
                )
            folder = seed_folder(output_dir, seed)
            one = dataclasses.replace(
                config, seed=seed, seeds=1, output_dir=str(folder), overwrite_output_dir=False
            )
            say(f"\nSeed {seed} ({number} of {len(seeds)}), in {folder}")
            with ExitStack() as inner:
                with _naming_the_way_out(folder, CheckpointError):
                    # The old name, so that the model of the seed before leaves the memory.
                    parts, seed_start, seed_record = open_run(one, recipe, inner, ranks, parts)
                if seed_start.finished:
                    say("It is finished.")
                else:
                    train_run(one, parts, seed_start, seed_record, arguments, stop, ranks)
        ranks.lead(partial(_write_results, config, parts, record, seeds))
        say_what_next(output_dir)


def _begin(output_dir: Path, seeds: range, start: Start, record: dict[str, Any]) -> None:
    """Makes the directory this run's; the runs of its seeds are looked at when it is their turn."""
    if start.record is None and not is_of_seeds(find_run(output_dir) or {}):
        for seed, folder in list_seeds(output_dir):
            if seed in seeds and find_run(folder) is not None:
                raise OutputDirectoryError(
                    f"{folder} holds a run already, which --seeds did not begin; choose another "
                    "--output_dir"
                )
    if start.replaces:
        remove_run(output_dir)
    if start.record is not None:
        record["started"] = start.record.get("started", record["started"])
    write_json(output_dir / RECORD, record)


@contextmanager
def _naming_the_way_out(folder: Path, *errors: type[Exception]) -> Iterator[None]:
    """Starting over, as what is damaged in one run is told, would cost the other seeds too."""
    try:
        yield
    except errors as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{reason}\nPut back a copy; or remove {folder}, and the same command trains that seed "
            "anew."
        ) from None


def _write_results(
    config: TrainConfig, parts: Parts, record: dict[str, Any], seeds: Sequence[int]
) -> None:
    """Puts the best seed's results at the top, with the scores of all; `finished` comes last."""
    output_dir = Path(config.output_dir)
    metric = f"eval_{config.metric_for_best_model.removeprefix('eval_')}"
    scores = {seed: _read_scores(seed_folder(output_dir, seed), metric) for seed in seeds}
    best = _best_seed(scores, metric)
    kept = seed_folder(output_dir, best)
    with _naming_the_way_out(kept, ModelError, OSError):
        load_weights(TensorFile(kept / WEIGHTS), parts.model, kept)
        results = read_json(kept / "all_results.json")
        metrics = (kept / METRICS).read_bytes()
        # Which a run may be without.
        paths = [kept / name for name in (CALIBRATION, REPORT)]
        extras = {path.name: path.read_bytes() for path in paths if path.is_file()}
        # Whoever edited it need not have used UTF-8.
        card = (kept / "README.md").read_text(encoding="utf-8", errors="backslashreplace")
    parts.save_model(output_dir)
    replace_file(output_dir / METRICS, [metrics])
    for name, content in extras.items():
        replace_file(output_dir / name, [content])
    names = [name for name in scores[best] if all(name in each for each in scores.values())]
    columns = [metric] * (metric not in _COLUMNS) + [name for name in _COLUMNS if name in names]
    summary = {
        "best_seed": best,
        "best_by": metric,
        "mean": {name: statistics.mean(each[name] for each in scores.values()) for name in names},
        "std": {name: statistics.stdev(each[name] for each in scores.values()) for name in names},
        "runs": [{"seed": seed, **each} for seed, each in scores.items()],
    }
    write_json(output_dir / "all_results.json", {**results, "seeds": summary})
    write_json(
        output_dir / "eval_results.json",
        {name: value for name, value in results.items() if name.startswith("eval_")},
    )
    write_text(
        output_dir / "README.md",
        card_of_seeds(
            card,
            (kept.name, output_dir.resolve().name),
            _section(summary, columns),
            f"Scores are of the best of {len(seeds)} seeds; the table of seeds shows the others.",
        ),
    )
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    write_json(output_dir / RECORD, {**record, "finished": finished})
    say(f"\n{_format(summary, columns)}\nKept: seed {best}, the best by {metric}.")


def _read_scores(folder: Path, metric: str) -> dict[str, float]:
    """What a finished run scored, by the names of its `all_results.json`; not how long it took."""
    path = folder / "all_results.json"
    with _naming_the_way_out(folder, ModelError):
        results = read_json(path)
        scores = {
            name: float(value)
            for name, value in results.items()
            if name.startswith(("eval_", "test_"))
            and not name.endswith(("runtime", "per_second"))
            and isinstance(value, int | float)
        }
        if metric not in scores:
            raise ModelError(f"has no number {metric}", path)
    return scores


def _best_seed(scores: Mapping[int, Mapping[str, float]], metric: str) -> int:
    """The first of the best ones."""
    sign = 1 if metric.endswith("loss") else -1
    return min(scores, key=lambda seed: sign * scores[seed][metric])


def _rows(summary: Mapping[str, Any], columns: Sequence[str]) -> list[list[str]]:
    """A row of text for each seed, one for the mean and one for the standard deviation."""
    named = [(str(run["seed"]), run) for run in summary["runs"]]
    named += [("mean", summary["mean"]), ("std", summary["std"])]
    return [[name, *(f"{values[column]:.4f}" for column in columns)] for name, values in named]


def _format(summary: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The table of the terminal."""
    return format_table(["seed", *columns], _rows(summary, columns))


def _section(summary: Mapping[str, Any], columns: Sequence[str]) -> str:
    """The card's section."""
    runs, best = summary["runs"], summary["best_seed"]
    header = ["Seed", *(_COLUMNS.get(column, f"`{column}`") for column in columns)]
    names = {str(best): f"**{best}** (kept)", "mean": "mean", "std": "standard deviation"}
    rows = [[names.get(row[0], row[0]), *row[1:]] for row in _rows(summary, columns)]
    return (
        f"The same recipe was trained with {len(runs)} seeds, each a whole run in its folder "
        f"`seed-<number>`. This is the model of seed {best}, the best by `{summary['best_by']}`: "
        "chosen on the validation data alone, which makes its own validation scores optimistic. "
        "The mean says what to expect of the recipe with one more seed.\n\n"
        f"{markdown_table(header, rows)}\n\n"
        f"The standard deviation is that of a sample: over {len(runs) - 1}, not {len(runs)}."
    )
