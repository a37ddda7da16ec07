"""How long data take to prepare, and how much memory: read, check, tokenise, align.

    python -m benchmarks.bench_data --data $DATA --sentences 250000 500000 1000000 2000000

1. CoNLL-2003's training file from columns to aligned tokens, against `datasets.map` with a fast
   tokenizer of `transformers`, as in the Hugging Face course; the two take turns. Theirs starts
   from words that are read already.
2. Made-up corpora of growing size, each in a process of its own, first without and then with an
   entry in the cache. Memory is the peak of the process's resident memory (VmHWM, which counts
   anonymous and file-backed pages alike) over what was resident before, imports and tokenizer done.
   Pages that the kernel keeps of files that were read or written belong to no process and are not
   counted.
3. The time to build a training batch of 8 rows at random, at each size: of arrays in memory, and of
   arrays that are mapped from the cache and read for the first time; and the tokens a second of the
   first training steps with MiniLM.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import MINILM, seconds_of
from benchmarks.machine import write_result
from bertner.batches import Schedule, pack
from bertner.config import BertConfig, Reading, TrainConfig
from bertner.data import prepare
from bertner.data_cache import prepare_file
from bertner.files import read_json
from bertner.hub import find_model
from bertner.loop import train
from bertner.model import BertForNER
from bertner.readers import open_file
from bertner.tokenizer import Tokenizer

COLUMNS = {"text_column": "tokens", "label_column": "ner_tags", "label_names": None}
BATCH_SIZE = 8
NUM_BATCHES = 3000
NUM_STEPS = 40


def load_tokenizer() -> Tokenizer:
    folder = find_model(MINILM).folder
    return Tokenizer.from_pretrained(
        folder, BertConfig.from_dict(read_json(folder / "config.json"))
    )


def bench_conll(path: Path, repeats: int) -> dict[str, Any]:
    """Ours from the file, theirs from a dataset in memory, taking turns."""
    import datasets
    import transformers

    from benchmarks.course_script import aligner

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer()
    fast = transformers.AutoTokenizer.from_pretrained(find_model(MINILM).folder)
    corpus = open_file(path).read()
    labels = prepare(open_file(path), tokenizer, None).dataset
    sentences = range(corpus.num_sentences)
    bounds = corpus.starts
    dataset = datasets.Dataset.from_dict(
        {
            "tokens": [corpus.sentence(k) for k in sentences],
            "ner_tags": [labels.word_labels[bounds[k] : bounds[k + 1]].tolist() for k in sentences],
        }
    )

    def ours() -> None:
        prepare(open_file(path), tokenizer, None)

    def theirs() -> None:
        options = {"batched": True, "remove_columns": dataset.column_names}
        dataset.map(aligner(fast), load_from_cache_file=False, keep_in_memory=True, **options)

    times: dict[str, list[float]] = {"bertner": [], "datasets_map": []}
    for _ in range(repeats):
        times["bertner"].append(seconds_of(ours))
        times["datasets_map"].append(seconds_of(theirs))
    num_tokens = labels.num_read
    result: dict[str, Any] = {"num_tokens": num_tokens}
    for name, each in times.items():
        median = statistics.median(each)
        result[name] = {
            "seconds": each,
            "median": median,
            "spread": max(each) - min(each),
            "tokens_per_second": num_tokens / median,
        }
    return result


def write_corpus(path: Path, num_sentences: int, tokenizer: Tokenizer) -> None:
    """Made-up sentences of about 20 tokens, entities among them, with words as uneven as real ones.

    The words are the whole words of the vocabulary, then ones made of two of them; how often each
    comes falls with its rank, as in text (Zipf's law).
    """
    rng = random.Random(0)
    words = sorted(w for w in tokenizer.fast.get_vocab() if w.isascii() and w.isalpha())
    rng.shuffle(words)
    words += ["".join(rng.choices(words, k=2)) for _ in range(100_000)]
    cumulative = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))
    with path.open("w", encoding="utf-8") as file:
        for begin in range(0, num_sentences, 10_000):
            drawn = iter(rng.choices(words, cum_weights=cumulative, k=10_000 * 18))
            for _ in range(min(10_000, num_sentences - begin)):
                file.write("".join(_sentence(rng, drawn)) + "\n")


def _sentence(rng: random.Random, words: Iterator[str]) -> Iterator[str]:
    kind, left = "", 0
    for _ in range(rng.randint(5, 18)):
        begins = left == 0 and rng.random() < 0.1
        if begins:
            kind, left = rng.choice(("PER", "LOC", "ORG", "MISC")), rng.choice((1, 1, 2, 3))
        tag = f"{'B' if begins else 'I'}-{kind}" if left else "O"
        left = max(left - 1, 0)
        yield f"{next(words)} {tag}\n"
    yield ". O\n"


def _memory(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status does not tell {name}")


def child(path: Path) -> None:
    """Prepares one file in this process, fresh or from the cache, and prints what it took."""
    tokenizer = load_tokenizer()
    tokenizer.encode(["warm"])
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    dataset = prepare_file(
        path, tokenizer, None, name="train", columns=COLUMNS, reading=Reading(), max_samples=None
    ).dataset
    seconds = time.perf_counter() - start
    growth, stays = _memory("VmHWM") - before, _memory("VmRSS") - before

    start = time.perf_counter()
    config = TrainConfig(per_device_train_batch_size=BATCH_SIZE)
    steps = list(itertools.islice(Schedule(dataset.row_lengths, config).steps_from(0), NUM_BATCHES))
    epoch_start = time.perf_counter() - start
    start = time.perf_counter()
    for _, (rows,) in steps:
        pack(dataset, rows, torch.device("cpu"))
    batch_seconds = (time.perf_counter() - start) / len(steps)

    model = BertForNER.from_pretrained(
        find_model(MINILM).folder, id2label=dict(enumerate(dataset.label_set.names))
    )
    trained = train(model, dataset, TrainConfig(max_steps=NUM_STEPS, eval_strategy="no"))
    result = {
        "seconds": seconds,
        "num_tokens": dataset.num_read,
        "num_words": len(dataset.word_labels),
        "peak_growth": growth,
        "growth": stays,
        "epoch_start_seconds": epoch_start,
        "batch_seconds": batch_seconds,
        "steps_per_second": trained.steps_per_second,
        "training_tokens_per_second": trained.tokens_per_second,
    }
    print(json.dumps(result))


def bench_size(num_sentences: int, folder: Path) -> dict[str, Any]:
    """A made-up corpus, prepared and then loaded from the cache, in processes of their own."""
    path = folder / f"{num_sentences}.txt"
    write_corpus(path, num_sentences, load_tokenizer())
    environment = {**os.environ, "BERTNER_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmarks.bench_data", "--child", str(path)]
    result: dict[str, Any] = {"num_sentences": num_sentences, "file_bytes": path.stat().st_size}
    for name in ("fresh", "cached"):
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        measured = json.loads(output.stdout)
        millions = measured["num_tokens"] / 1e6
        measured["seconds_per_million_tokens"] = measured["seconds"] / millions
        measured["peak_bytes_per_token"] = measured["peak_growth"] / measured["num_tokens"]
        result[name] = measured
    path.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, help="folder that holds conll2003/train.txt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sentences", type=int, nargs="*", default=[250_000, 500_000])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    result: dict[str, Any] = {"rayon_threads": os.environ.get("RAYON_NUM_THREADS", "all")}
    if options.data:
        result["conll2003"] = bench_conll(options.data / "conll2003" / "train.txt", options.repeats)
        for name in ("bertner", "datasets_map"):
            each = result["conll2003"][name]
            print(
                f"CoNLL-2003 train, {name}: {each['median']:.2f} s (spread {each['spread']:.2f}), "
                f"{each['tokens_per_second']:,.0f} tokens/s"
            )
    result["made_up"] = []
    columns = "sentences   tokens  from    seconds  s/M tokens  peak B/token  ms/batch  s/epoch"
    print(columns + " start  training tokens/s")
    for num_sentences in options.sentences:
        with tempfile.TemporaryDirectory() as folder:
            sizes = bench_size(num_sentences, Path(folder))
        result["made_up"].append(sizes)
        for name in ("fresh", "cached"):
            each = sizes[name]
            print(
                f"{num_sentences:9,}  {each['num_tokens'] / 1e6:6.2f}M  {name:6}  "
                f"{each['seconds']:7.2f}  {each['seconds_per_million_tokens']:10.2f}  "
                f"{each['peak_bytes_per_token']:12.2f}  {1000 * each['batch_seconds']:8.3f}  "
                f"{each['epoch_start_seconds']:13.2f}  {each['training_tokens_per_second']:9,.0f}",
                flush=True,
            )
    print(f"written: {write_result('data', result)}")


if __name__ == "__main__":
    main()
