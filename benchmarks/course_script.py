"""What a user of the Trainer runs: the Hugging Face course's recipe (chapter 7.2) on CoNLL files.

The other side of `bench_startup`: it reads, tokenises and aligns with `datasets`, trains one step
with the Trainer and prints when that step was done.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bertner.labels import CONLL_TYPES, label_list

NAMES = label_list(CONLL_TYPES)


def read(path: Path) -> Dataset:
    """A CoNLL file as a dataset of words and integer tags."""
    number = {name: k for k, name in enumerate(NAMES)}
    records: dict[str, list[Any]] = {"tokens": [], "ner_tags": []}
    for sentence in path.read_text(encoding="utf-8").split("\n\n"):
        rows = [line.split() for line in sentence.splitlines() if not line.startswith("-DOC")]
        if rows:
            records["tokens"].append([row[0] for row in rows])
            records["ner_tags"].append([number[row[-1]] for row in rows])
    return Dataset.from_dict(records)


def aligner(tokenizer: Any) -> Callable[[dict[str, Any]], Any]:
    """The course's function for `Dataset.map`: wordpieces, and a label for each."""

    def align(examples: dict[str, Any]) -> Any:
        inputs = tokenizer(examples["tokens"], truncation=True, is_split_into_words=True)
        inputs["labels"] = []
        for k, tags in enumerate(examples["ner_tags"]):
            labels, before = [], None
            for word in inputs.word_ids(k):
                if word is None:
                    labels.append(-100)
                elif word != before:
                    labels.append(tags[word])
                else:
                    labels.append(tags[word] + tags[word] % 2)  # B-X becomes I-X
                before = word
            inputs["labels"].append(labels)
        return inputs

    return align


def main() -> None:
    model_folder, train_file, validation_file, output_dir = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    align = aligner(tokenizer)
    splits = [
        read(Path(path)).map(align, batched=True, remove_columns=["tokens", "ner_tags"])
        for path in (train_file, validation_file)
    ]

    class FirstStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            print(f"first step at {time.time()}", flush=True)

    Trainer(
        model=AutoModelForTokenClassification.from_pretrained(
            model_folder,
            id2label=dict(enumerate(NAMES)),
            label2id={name: k for k, name in enumerate(NAMES)},
        ),
        args=TrainingArguments(
            output_dir=output_dir,
            max_steps=1,
            learning_rate=2e-5,
            weight_decay=0.01,
            save_strategy="no",
            use_cpu=True,
            report_to=[],
        ),
        train_dataset=splits[0],
        eval_dataset=splits[1],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        callbacks=[FirstStep()],
    ).train()


if __name__ == "__main__":
    main()
