"""What the commands do once their arguments are understood: build the parts and call them."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import platform
import shlex
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from bertner import __version__, kernels
from bertner.card import RunFacts, model_card
from bertner.checkpoint import (
    Weights,
    list_checkpoints,
    read_json,
    save_checkpoint,
    write_json,
    write_text,
)
from bertner.config import BertConfig, TrainConfig
from bertner.corpus import CorpusStream, CorpusSummary
from bertner.data import PreparedData, TokenDataset, prepare
from bertner.data_cache import prepare_file
from bertner.errors import DataError, UsageError
from bertner.hub import ModelSource, find_model
from bertner.hub_datasets import open_dataset
from bertner.loop import Evaluation, StepReport, TrainResult, evaluate, train
from bertner.model import BertForNER
from bertner.output_dir import check_output_dir, claim_output_dir
from bertner.predict import Tagger
from bertner.readers import check_file, decode_lines, open_file, read_lines
from bertner.report import RunReport, format_scores, progress_bar, say
from bertner.tokenizer import Tokenizer

logger = logging.getLogger("bertner")

# Whose versions are recorded, besides PyTorch's.
PACKAGES = ["tokenizers", "safetensors", "numpy", "huggingface_hub", "datasets"]


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a run is built of."""

    source: ModelSource
    corpora: dict[str, CorpusSummary]
    datasets: dict[str, TokenDataset]
    model: BertForNER
    tokenizer: Tokenizer

    def save_model(self, folder: Path) -> None:
        """Writes a complete model folder, as `transformers` would."""
        self.model.save_pretrained(folder)
        self.tokenizer.save(folder)


def run_training(config: TrainConfig, recipe: str) -> None:
    """`bertner-train`: from a configuration to a model folder.

    Raises:
        BertnerError: See the exit codes in `errors`.
    """
    output_dir = Path(config.output_dir)
    check_output_dir(output_dir, config.overwrite_output_dir)  # before minutes of downloading
    parts = _build(config)
    total_steps = config.total_steps(len(parts.datasets["train"]))
    _announce(config, parts, total_steps)

    run = _run_record(config, recipe, parts)
    claim_output_dir(output_dir, config.overwrite_output_dir, run)
    with RunReport(
        output_dir, total_steps, config.logging_steps, not config.disable_tqdm
    ) as report:
        report.event(
            "start", {"total_steps": total_steps, "num_rows": len(parts.datasets["train"])}
        )
        result = _fit(config, parts, output_dir, report)
        kept_step = result.step
        if config.load_best_model_at_end and result.best_step is not None:
            kept_step = result.best_step
            _load_weights(parts.model, output_dir / f"checkpoint-{kept_step}")
        parts.save_model(output_dir)

        evaluations = _final_evaluations(config, parts, result, kept_step, report)
        results = _all_results(result, evaluations)
        report.event("end", results)
    write_json(output_dir / "all_results.json", results)
    write_json(
        output_dir / "eval_results.json",
        {name: value for name, value in results.items() if name.startswith("eval_")},
    )
    facts = RunFacts(
        config=config,
        base_model=parts.source.name,
        base_commit=parts.source.commit,
        corpora=parts.corpora,
        num_train_tokens=len(parts.datasets["train"].input_ids),
        model=parts.model.config,
        num_parameters=parts.model.num_parameters,
        max_length=parts.tokenizer.row_limit(config.max_seq_length),
        lowercase=parts.tokenizer.lowercase,
        result=result,
        rows=report.rows,
        evaluations=evaluations,
        kept_step=kept_step,
        versions=run["versions"],
        device=run["device"],
    )
    write_text(output_dir / "README.md", model_card(facts))
    for split, evaluation in evaluations.items():
        say(f"\n{format_scores(evaluation.word, f'{split}, word level')}")
    say(f"\nModel, model card and scores: {output_dir}")
    predict = f"{_command('bertner-predict')} --model {shlex.quote(str(output_dir))}"
    say(f"Try it: echo 'Angela Merkel visited Paris .' | {predict}")


def _command(name: str) -> str:
    """How to call one of our commands from where this one was called."""
    beside = Path(sys.argv[0]).with_name(name)
    return str(beside) if shutil.which(name) is None and beside.is_file() else name


def _build(config: TrainConfig) -> _Parts:
    """Reads the tokenizer, the data, and then the weights: mistakes are in the data."""
    device = find_device(config.device)
    _products(config, device)  # a choice that cannot be had here is said first
    data = _find_data(config)
    source = find_model(config.model_name_or_path, config.model_revision, weights=False)
    folder, output_dir = source.folder.resolve(), Path(config.output_dir).resolve()
    if folder == output_dir or folder in [path for _, path in list_checkpoints(output_dir)]:
        raise UsageError(
            f"output_dir {config.output_dir} holds the model to start from; choose another folder"
        )
    tokenizer = _load_tokenizer(folder)
    prepared = _prepare_data(config, data, tokenizer)
    label_set = prepared["train"].dataset.label_set
    if source.commit is not None:
        find_model(source.name, source.commit)  # the weights too
    # Seeded first, so that a new head is the same in every run with this seed.
    torch.manual_seed(config.seed)
    model = BertForNER.from_pretrained(
        source.folder,
        id2label=dict(enumerate(label_set.names)),
        attn_implementation=config.attn_implementation,
    ).to(device)
    return _Parts(
        source,
        {split: each.summary for split, each in prepared.items()},
        {split: each.dataset for split, each in prepared.items()},
        model,
        tokenizer,
    )


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "config.json"
    return Tokenizer.from_pretrained(folder, BertConfig.from_dict(read_json(path), path))


def _fit(config: TrainConfig, parts: _Parts, output_dir: Path, report: RunReport) -> TrainResult:
    # Without regular saves the best checkpoint is there only to be loaded at the end.
    keep = 1 if config.save_strategy == "no" else config.save_total_limit

    def save(step: StepReport, best_step: int | None) -> None:
        folder = save_checkpoint(
            output_dir,
            step.step,
            parts.save_model,
            keep=keep,
            best_step=best_step if config.load_best_model_at_end else None,
        )
        report.saved(step, folder)

    return train(
        parts.model,
        parts.datasets["train"],
        config,
        evaluation=parts.datasets.get("validation"),
        watcher=report,
        save=save,
    )


def find_device(name: str) -> torch.device:
    """The device that a user names; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        UsageError: There is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UsageError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def _find_data(config: TrainConfig) -> dict[str, Path | CorpusStream]:
    """The data by split, training data first: files that are there, or splits of a dataset."""
    data: dict[str, Path | CorpusStream] = {}
    if config.train_file is None:
        data.update(
            open_dataset(
                config.train_source,
                config_name=config.dataset_config_name,
                **_columns(config.text_column_name, config.label_column_name, config.label_names),
            )
        )
    else:
        files = {
            "train": config.train_file,
            "validation": config.validation_file,
            "test": config.test_file,
        }
        data.update({split: Path(path) for split, path in files.items() if path})
        for path in filter(None, files.values()):
            check_file(path)
    if config.load_best_model_at_end and "validation" not in data:
        raise UsageError("load_best_model_at_end needs validation data: give --validation_file")
    if config.eval_strategy != "no" and "validation" not in data:
        logger.warning("no validation data, so nothing is scored during training")
    return data


def _columns(text_column: str, label_column: str, label_names: str | None) -> dict[str, Any]:
    """What readers are told of a source's columns."""
    return {
        "text_column": text_column,
        "label_column": label_column,
        "label_names": label_names.split(",") if label_names else None,
    }


def _prepare_data(
    config: TrainConfig, data: dict[str, Path | CorpusStream], tokenizer: Tokenizer
) -> dict[str, PreparedData]:
    """Reads and tokenises all data; the training data say what the labels are."""
    columns = _columns(config.text_column_name, config.label_column_name, config.label_names)
    row_limit = tokenizer.row_limit(config.max_seq_length)
    prepared: dict[str, PreparedData] = {}
    label_set = None
    for split, source in data.items():
        settings: dict[str, Any] = {
            "label_all_tokens": config.label_all_tokens,
            "row_limit": row_limit,
            "max_samples": config.max_train_samples
            if split == "train"
            else config.max_eval_samples,
        }
        # A pipe can be read only once, and so not be hashed first.
        if isinstance(source, Path) and source.is_file() and config.data_cache:
            prepared[split] = prepare_file(
                source, tokenizer, label_set, name=split, columns=columns, settings=settings
            )
        else:
            stream = open_file(source, **columns) if isinstance(source, Path) else source
            prepared[split] = prepare(stream, tokenizer, label_set, **settings)
        label_set = prepared["train"].dataset.label_set
    return prepared


def _announce(config: TrainConfig, parts: _Parts, total_steps: int) -> None:
    source, model = parts.source, parts.model
    commit = f" at {source.commit[:12]}" if source.commit else ""
    logger.info(
        "model: %s%s, %s, %s parameters",
        source.name,
        commit,
        model.config.shape,
        f"{model.num_parameters:,}",
    )
    for split, corpus in parts.corpora.items():
        logger.info(
            "%s: %s sentences, %s words, %s entities, %s tokens from %s",
            split,
            f"{corpus.num_sentences:,}",
            f"{corpus.num_words:,}",
            f"{sum(corpus.entity_counts.values()):,}",
            f"{len(parts.datasets[split].input_ids):,}",
            corpus.source,
        )
    logger.info(
        "%d steps on %s with %d threads, %s, rows %s, seed %d, into %s",
        total_steps,
        model.device,
        torch.get_num_threads(),
        config.dtype,
        "packed" if config.packing else f"padded, attention {config.attn_implementation}",
        config.seed,
        config.output_dir,
    )
    logger.info("matrix products: %s", _products(config, model.device))


def _products(config: TrainConfig, device: torch.device) -> kernels.Products:
    """How matrices are multiplied; padded rows keep to PyTorch's default."""
    matmul = config.matmul if config.packing else "default"
    return kernels.choose_products(matmul, device, config.dtype)


def _run_record(config: TrainConfig, recipe: str, parts: _Parts) -> dict[str, Any]:
    """The contents of run.json: everything that it takes to do this run again."""
    source, device = parts.source, parts.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "recipe": recipe,
        "config": config.to_dict(),
        "model": {
            "name": source.name,
            "folder": str(source.folder.resolve()),
            "commit": source.commit,
            **dataclasses.asdict(parts.model.config),
        },
        "data": {
            split: {
                "source": corpus.source,
                "sha256": corpus.sha256,
                "scheme": corpus.scheme,
                "documents": corpus.num_documents,
                "sentences": corpus.num_sentences,
                "words": corpus.num_words,
                "entities": corpus.entity_counts,
            }
            for split, corpus in parts.corpora.items()
        },
        "versions": {
            "bertner": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # says which build, as the package's metadata may not
            **{package: version(package) for package in PACKAGES},
        },
        "device": f"{device.type}, {name}, {torch.get_num_threads()} threads",
        # Another choice, another sum of roundings: it is part of what the bits depend on.
        "products": dataclasses.asdict(_products(config, device)),
    }


def processor_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _load_weights(model: BertForNER, folder: Path) -> None:
    weights = Weights(folder)
    model.load_state_dict({name: weights[name] for name in weights.shapes}, strict=True)


def _final_evaluations(
    config: TrainConfig, parts: _Parts, result: TrainResult, kept_step: int, report: RunReport
) -> dict[str, Evaluation]:
    """Scores of the kept weights; what the run has just computed is not computed again."""
    evaluations: dict[str, Evaluation] = {}
    for split in ("validation", "test"):
        if split not in parts.datasets:
            continue
        if split == "validation" and result.evaluation and kept_step == result.step:
            evaluations[split] = result.evaluation
        else:
            evaluations[split] = evaluate(
                parts.model,
                parts.datasets[split],
                config.per_device_eval_batch_size,
                dtype=config.dtype,
                packing=config.packing,
                batch_tokens=config.eval_batch_tokens,
                matmul=config.matmul,
                on_batch=report.evaluating(len(parts.datasets[split])),
            )
    return evaluations


def _all_results(result: TrainResult, evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    results: dict[str, Any] = {
        "epoch": result.epoch,
        "step": result.step,
        "train_loss": result.loss,
        "train_runtime": result.runtime,
        "train_steps_per_second": result.steps_per_second,
        "train_tokens_per_second": result.tokens_per_second,
    }
    prefixes = {"validation": "eval_", "test": "test_"}
    for split, evaluation in evaluations.items():
        for name, value in evaluation.metrics().items():
            results[prefixes[split] + name] = value
        results[f"{prefixes[split]}word_per_type"] = {
            kind: {"precision": s.precision, "recall": s.recall, "f1": s.f1, "entities": s.num_gold}
            for kind, s in evaluation.word.per_type.items()
        }
    return results


def _labelling(folder: Path) -> dict[str, Any]:
    """How a model's training data was labelled and cut; as by default if others trained it."""
    try:
        config = read_json(folder / "run.json")["config"]
        return {name: config[name] for name in ("label_all_tokens", "max_seq_length")}
    except (DataError, KeyError, TypeError):
        return {"label_all_tokens": True, "max_seq_length": None}


def run_evaluation(options: argparse.Namespace) -> None:
    """`bertner-eval`: scores of a model on a file."""
    source = find_model(options.model)
    device = find_device(options.device)
    model = BertForNER.from_pretrained(source.folder).to(device)
    model.stack_projections()  # the move may have parted them
    products = kernels.choose_products(options.matmul, device, options.dtype)
    logger.info("matrix products: %s", products)
    tokenizer = Tokenizer.from_pretrained(source.folder, model.config)
    columns = _columns(options.text_column_name, options.label_column_name, options.label_names)
    labelling = _labelling(source.folder)
    dataset = prepare(
        open_file(options.file, **columns),
        tokenizer,
        model.label_set,
        label_all_tokens=labelling["label_all_tokens"],
        row_limit=tokenizer.row_limit(labelling["max_seq_length"]),
    ).dataset
    with progress_bar(len(dataset), " sentences", "evaluate", show=True) as bar:
        evaluation = evaluate(
            model,
            dataset,
            options.batch_size,
            dtype=options.dtype,
            batch_tokens=options.batch_tokens,
            matmul=options.matmul,
            on_batch=bar.update,
        )
    print(format_scores(evaluation.word, "word level"))
    print(f"accuracy over {evaluation.word.num_labels:,} words {evaluation.word.accuracy:.4f}\n")
    print(format_scores(evaluation.subword, "subword level"))
    print(
        f"accuracy over {evaluation.subword.num_labels:,} wordpieces "
        f"{evaluation.subword.accuracy:.4f}, loss {evaluation.loss:.4f}"
    )
    if options.output_file:
        write_json(Path(options.output_file), evaluation.metrics())


def run_prediction(options: argparse.Namespace) -> None:
    """`bertner-predict`: entities of the lines of files or stdin, in order, as JSON lines."""
    device = find_device(options.device)
    products = kernels.choose_products(options.matmul, device, options.dtype)
    logger.info("matrix products: %s", products)
    tagger = Tagger.from_pretrained(
        options.model,
        device=str(device),
        batch_tokens=options.batch_tokens,
        dtype=options.dtype,
        matmul=options.matmul,
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is, whatever the locale
    lines = _lines(options.files)
    # Some at a time: enough to sort by length, and memory does not grow with the input.
    while texts := list(islice(lines, 1024)):
        for text, entities in zip(texts, tagger(texts), strict=True):
            record = {"text": text, "entities": [dataclasses.asdict(e) for e in entities]}
            print(json.dumps(record, ensure_ascii=False))


def _lines(files: list[str]) -> Iterator[str]:
    if not files:
        # Bytes, since what the locale says of text files need not be what comes in.
        yield from decode_lines(sys.stdin.buffer, "standard input")
    for path in files:
        yield from read_lines(path)
