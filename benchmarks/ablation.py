"""What each part of the `best` recipe adds, and what was tried and left out; over several seeds.

Variants are settings over the card's recipe. Each is trained with each seed, on the training split
alone, and scored on the validation split under every way of deciding words, which takes no other
training. Runs are kept as lines of a file, so that a list can be added to, or done in parts:

    python -m benchmarks.ablation run --data $DATA --runs runs.jsonl
    python -m benchmarks.ablation time --data $DATA --runs runs.jsonl
    python -m benchmarks.ablation report --runs runs.jsonl --name ablation_minilm

`--model FOLDER` takes any other model; `--test` scores the test split too, for a list that is
settled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import MINILM
from benchmarks.machine import provenance, write_result
from bertner import loop
from bertner.card import markdown_table
from bertner.config import RECIPES, TrainConfig
from bertner.data import labels_for, tokenize
from bertner.evaluation import Evaluation, evaluate
from bertner.hub import find_model
from bertner.loop import train
from bertner.model import BertForNER
from bertner.optimizer import AdamW, build_optimizer
from bertner.progress import StepReport, TrainResult, TrainState, Watcher
from bertner.readers import read_file
from bertner.tokenizer import Tokenizer

RATE = {"learning_rate": 1e-4, "warmup_ratio": 0.1}
WINDOWS = {**RATE, "context": "document", "max_seq_length": 128, "train_batch_tokens": 171}
BEST = {name: RECIPES["best"][name] for name in RECIPES["best"] if name != "output_dir"}

# Settings by name. Those in capitals are no settings of bertner: this script does them.
VARIANTS: dict[str, dict[str, Any]] = {
    # From the card's recipe to the best, part by part
    "card": {},
    "rate": RATE,
    "windows": WINDOWS,
    "smaller batches": {**WINDOWS, "train_batch_tokens": 128},
    "best": BEST,
    # Other windows
    "windows of 64": {**BEST, "max_seq_length": 64},
    "windows of 256": {**BEST, "max_seq_length": 256},
    "windows of 512": {**BEST, "max_seq_length": 512},
    "32 tokens of context": {**BEST, "context_tokens": 32},
    "a sentence and 64 tokens each side": {
        **BEST,
        "max_seq_length": None,
        "context_unit": "sentence",
        "context_tokens": 64,
    },
    # Other rates
    "rate 5e-5": {**BEST, "learning_rate": 5e-5},
    "rate 1.5e-4": {**BEST, "learning_rate": 1.5e-4},
    "rate 2e-4": {**BEST, "learning_rate": 2e-4},
    "layer decay 0.9": {**BEST, "LAYER_DECAY": 0.9},
    # Other losses
    "first wordpieces": {**BEST, "label_all_tokens": False},
    "windows, label smoothing": {**WINDOWS, "label_smoothing_factor": 0.1},
    "class weights": {**BEST, "class_weights": "sqrt"},
    # Other regularisation
    "no dropout": {**BEST, "DROPOUT": 0.0},
    "averaged weights": {**BEST, "AVERAGE": 0.998},
    # Other batches
    "batches of 342 tokens": {**BEST, "train_batch_tokens": 342},
}

DECIDING = {
    "argmax": {},
    "viterbi": {"decoding": "viterbi"},
    "all": {"word_decision": "all"},
    "all, viterbi": {"word_decision": "all", "decoding": "viterbi"},
}


class _Watcher:
    """A `progress.Watcher` of runs in which nothing is evaluated."""

    def evaluating(self, num_rows: int) -> Callable[[int], None]:
        raise AssertionError("nothing is evaluated")

    def evaluated(self, step: int, epoch: float, evaluation: Evaluation, is_best: bool) -> None:
        raise AssertionError("nothing is evaluated")


class _Average(_Watcher):
    """Keeps an exponential moving average of the weights."""

    EVERY = 10  # steps, which makes its cost a tenth and the average no other

    def __init__(self, model: BertForNER, decay: float) -> None:
        self.parameters = list(model.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.decay = decay**self.EVERY

    @torch.no_grad()
    def stepped(self, report: StepReport) -> None:
        count = report.step // self.EVERY
        if report.step % self.EVERY == 0:
            # An average of few weights at first, so that the start is soon forgotten.
            share = 1 - min(self.decay, count / (count + 9))
            torch._foreach_lerp_(self.average, self.parameters, share)

    @torch.no_grad()
    def take(self) -> None:
        """Puts the average in the weights' place."""
        torch._foreach_copy_(self.parameters, self.average)


class _Clock(_Watcher):
    """Times steps, from the end of the first one: that one lays out memory."""

    def __init__(self, steps: int, average: _Average | None) -> None:
        self.left = 1 + steps
        self.average = average
        self.start: float | None = None
        self.seconds = 0.0
        self.num_tokens = 0

    def stepped(self, report: StepReport) -> None:
        if self.average is not None:
            self.average.stepped(report)
        self.left -= 1
        if self.start is None:
            self.start = time.perf_counter()
        else:
            self.seconds = time.perf_counter() - self.start
            self.num_tokens += report.num_tokens

    def is_over(self) -> bool:
        return self.left <= 0


@contextmanager
def _layer_decay(decay: float) -> Iterator[None]:
    """Lets the rate fall from layer to layer, from the head down, in runs within the context."""

    class Scaled(AdamW):
        def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["lr"] *= group["scale"]
            super().step(closure)

    def build(model: BertForNER, config: TrainConfig) -> AdamW:
        names = {parameter: name for name, parameter in model.named_parameters()}
        groups: dict[tuple[float, int], list[torch.nn.Parameter]] = defaultdict(list)
        for group in build_optimizer(model, config).param_groups:
            for parameter in group["params"]:
                parts = names[parameter].split(".")
                depth = model.config.num_hidden_layers  # below the head: of the embeddings
                if "layer" in parts:
                    depth -= 1 + int(parts[parts.index("layer") + 1])
                depth = -1 if parts[0] == "classifier" else depth
                groups[group["weight_decay"], depth].append(parameter)
        return Scaled(
            [
                {"params": parameters, "weight_decay": weight_decay, "scale": decay ** (depth + 1)}
                for (weight_decay, depth), parameters in groups.items()
            ],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )

    loop.build_optimizer = build  # type: ignore[assignment]
    try:
        yield
    finally:
        loop.build_optimizer = build_optimizer


class Lab:
    """Data and model, read once.

    Args:
        model: As `--model` of bertner-train.
        data: Folder that holds `conll2003/`.
        test: Score the test split too.
    """

    def __init__(self, model: str, data: Path, test: bool) -> None:
        self.name = model
        self.folder = find_model(model).folder
        files = {"train": "train", "validation": "valid", **({"test": "test"} if test else {})}
        self.corpora = {
            split: read_file(data / "conll2003" / f"{file}.txt") for split, file in files.items()
        }
        self.scored = [split for split in files if split != "train"]
        self.label_set = labels_for(self.corpora["train"])

    def start(self, seed: int, dropout: float | None = None) -> tuple[BertForNER, Tokenizer]:
        """The model as `bertner-train` begins with it."""
        torch.manual_seed(seed)
        id2label = dict(enumerate(self.label_set.names))
        model = BertForNER.from_pretrained(self.folder, id2label=id2label)
        if dropout is not None:
            names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
            other = BertForNER(dataclasses.replace(model.config, **dict.fromkeys(names, dropout)))
            other.load_state_dict(model.state_dict())
            model = other
        return model, Tokenizer.from_pretrained(self.folder, model.config)

    def run(self, variant: str, seed: int) -> dict[str, Any]:
        """Trains a variant and scores it."""
        run = _Run(self, variant, seed)
        model, tokenizer, config = run.model, run.tokenizer, run.config
        start = time.perf_counter()
        result = run.train()
        seconds = time.perf_counter() - start
        if run.average is not None:
            run.average.take()
        scores: dict[str, Any] = {}
        for split in self.scored:
            for name, deciding in DECIDING.items():
                if name.startswith("all") and not config.label_all_tokens:
                    continue
                plain = {"word_decision": "first", "decoding": "argmax"}
                reading = dataclasses.replace(config.reading, **{**plain, **deciding})
                dataset = tokenize(self.corpora[split], tokenizer, self.label_set, reading)
                scores[f"{split}, {name}"] = _scores(evaluate(model, dataset))
        return {
            "variant": variant,
            "settings": VARIANTS[variant],
            "seed": seed,
            "model": self.name,
            "steps": result.step,
            "num_tokens": round(result.tokens_per_second * result.step / result.steps_per_second),
            "seconds": seconds,
            **provenance(),
            "scores": scores,
        }


class _Run:
    """One variant in training with one seed."""

    def __init__(self, lab: Lab, variant: str, seed: int) -> None:
        settings = dict(VARIANTS[variant])
        dropout, average, self.decay = (
            settings.pop(name, None) for name in ("DROPOUT", "AVERAGE", "LAYER_DECAY")
        )
        self.config = TrainConfig.from_dict(
            {**settings, "seed": seed, "eval_strategy": "no", "load_best_model_at_end": False}
        )
        self.model, self.tokenizer = lab.start(seed, dropout)
        reading = self.config.reading
        self.rows = tokenize(lab.corpora["train"], self.tokenizer, lab.label_set, reading)
        self.average = None if average is None else _Average(self.model, average)
        self.state: TrainState | None = None

    def train(
        self, watcher: Watcher | None = None, should_stop: Callable[[], bool] = lambda: False
    ) -> TrainResult:
        """Trains to the end, or until it is asked to stop; carries on from there the next time."""
        with nullcontext() if self.decay is None else _layer_decay(self.decay):
            result = train(
                self.model,
                self.rows,
                self.config,
                watcher=watcher or self.average,
                state=self.state,
                should_stop=should_stop,
            )
        self.state = result.state
        return result

    def time(self, steps: int) -> float:
        """Seconds an epoch, by the next `steps` steps; variants differ in what an epoch reads."""
        clock = _Clock(steps, self.average)
        self.train(clock, clock.is_over)
        return clock.seconds / clock.num_tokens * self.rows.num_read


def _scores(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "word_f1": evaluation.word.overall.f1,
        "word_precision": evaluation.word.overall.precision,
        "word_recall": evaluation.word.overall.recall,
        "subword_f1": evaluation.subword.overall.f1,
        "repaired": evaluation.num_repaired,
        "per_type": {kind: score.f1 for kind, score in evaluation.word.per_type.items()},
    }


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _runs(path: Path, model: str) -> dict[tuple[str, int], dict[str, Any]]:
    """By variant and seed the newest run of a model, of those with the settings of now."""
    runs: dict[tuple[str, int], dict[str, Any]] = {}
    for record in _read(path):
        variant = record.get("variant")
        if record["model"] == model and record["settings"] == VARIANTS.get(variant):
            runs[variant, record["seed"]] = record
    return runs


def _times(path: Path, model: str) -> dict[str, dict[int, float]]:
    """By variant and round what an epoch takes, in seconds."""
    times: dict[str, dict[int, float]] = defaultdict(dict)
    for record in _read(path):
        variant = record.get("time_of")
        if record["model"] == model and record["settings"] == VARIANTS.get(variant):
            times[variant][record["round"]] = record["epoch_seconds"]
    return times


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def run_all(options: argparse.Namespace) -> None:
    """Does the runs that are not done yet, one seed after another: all variants of each."""
    lab = Lab(options.model, options.data, options.test)
    for seed in range(options.seed, options.seed + options.seeds):
        for variant in options.variants:
            done = _runs(options.runs, lab.name).get((variant, seed))
            if done and all(f"{split}, argmax" in done["scores"] for split in lab.scored):
                continue
            record = lab.run(variant, seed)
            _append(options.runs, record)
            shown = {name: round(s["word_f1"], 4) for name, s in record["scores"].items()}
            print(variant, seed, f"{record['seconds']:.0f} s", shown, flush=True)


def time_all(options: argparse.Namespace) -> None:
    """Times a few steps of each variant in turn; nothing else may run on the machine.

    Short turns see the same moods of a machine that others use too; many of them make up for those
    that did not.
    """
    lab = Lab(options.model, options.data, test=False)
    runs = {variant: _Run(lab, variant, 42) for variant in options.variants}
    # Rounds are compared within themselves, so those of before keep their numbers.
    before = _times(options.runs, lab.name)
    first = 1 + max((number for rounds in before.values() for number in rounds), default=-1)
    for round_ in tqdm(range(options.rounds), unit="round", disable=None):
        for variant in options.variants[:: 1 if round_ % 2 else -1]:
            record = {
                "time_of": variant,
                "settings": VARIANTS[variant],
                "model": lab.name,
                "round": first + round_,
                "epoch_seconds": runs[variant].time(options.steps),
            }
            _append(options.runs, record)


def report(options: argparse.Namespace) -> None:
    """Prints the table and writes it to `results/`."""
    runs, times = _runs(options.runs, options.model), _times(options.runs, options.model)
    rows = []
    for variant in VARIANTS:
        of_variant = [runs[key] for key in sorted(runs) if key[0] == variant]
        ratios = [
            value / times["card"][round_]
            for round_, value in times[variant].items()
            if round_ in times["card"]
        ]
        if of_variant or ratios:
            row = {
                "variant": variant,
                "settings": VARIANTS[variant],
                "seeds": [run["seed"] for run in of_variant],
                "time_of_card_quartiles": statistics.quantiles(ratios) if len(ratios) > 1 else None,
                **_summary(of_variant),
            }
            rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row if ", " in name))
    header = ["variant", "seeds", *names, "subword, argmax", "time"]
    print(markdown_table(header, [_cells(row, names) for row in rows]))
    if options.name:
        print(write_result(options.name, {"model": options.model, "variants": rows}))


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the runs of a variant have in common, and their scores by split and way of deciding."""
    if not runs:
        return {}
    summary: dict[str, Any] = {name: runs[0][name] for name in ("steps", "num_tokens")}
    for name in runs[0]["scores"]:
        scores = [run["scores"][name] for run in runs if name in run["scores"]]
        values = [score["word_f1"] for score in scores]
        summary[name] = {
            "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
            # In the order of the seeds
            "word_f1": values,
            "word_precision": [score["word_precision"] for score in scores],
            "word_recall": [score["word_recall"] for score in scores],
            "per_type": {
                kind: [score["per_type"][kind] for score in scores]
                for kind in scores[0]["per_type"]
            },
        }
        if name.endswith(", argmax"):  # however words are decided, it is the same
            summary[name]["subword_f1"] = statistics.mean(score["subword_f1"] for score in scores)
    return summary


def _cells(row: dict[str, Any], names: list[str]) -> list[str]:
    """A variant's line of the table; the deviation only where there are several seeds."""
    cells = [row["variant"], " ".join(map(str, row["seeds"]))]
    for name in names:
        scores = row.get(name)
        cell = "" if scores is None else f"{scores['mean']:.4f}"
        if scores is not None and scores["std"] is not None:
            cell += f" ({scores['std']:.4f})"
        cells.append(cell)
    plain = row.get("validation, argmax")
    cells.append("" if plain is None else f"{plain['subword_f1']:.4f}")
    if row["time_of_card_quartiles"] is None:
        return [*cells, ""]
    low, median, high = row["time_of_card_quartiles"]
    return [*cells, f"{median:.2f} ({low:.2f}-{high:.2f})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["run", "time", "report"])
    parser.add_argument("--runs", type=Path, required=True, help="file that keeps what was done")
    parser.add_argument("--data", type=Path, help="folder that holds conll2003/")
    parser.add_argument("--model", default=MINILM)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=42, help="the first one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of PyTorch; two runs of one each do more")
    parser.add_argument("--rounds", type=int, default=40, help="of timings")
    parser.add_argument("--steps", type=int, default=12, help="of each timing")
    parser.add_argument("--test", action="store_true", help="score conll2003/test.txt too")
    parser.add_argument("--name", help="write results/NAME.json")
    options = parser.parse_args()
    if options.command != "report" and options.data is None:
        parser.error("--data is needed")
    if options.threads:
        torch.set_num_threads(options.threads)
    {"run": run_all, "time": time_all, "report": report}[options.command](options)


if __name__ == "__main__":
    main()
