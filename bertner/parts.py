"""What a run is built of: the model's source, tokenizer, data, first weights."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bertner import kernels
from bertner.batches import Schedule
from bertner.checkpoint import list_checkpoints
from bertner.config import BertConfig, Reading, TrainConfig
from bertner.corpus import Corpus, CorpusStream, CorpusSummary
from bertner.data import PreparedData, TokenDataset, prepare
from bertner.data_cache import prepare_file
from bertner.data_check import check_datasets
from bertner.distributed import ALONE, Ranks
from bertner.errors import UsageError
from bertner.files import read_json
from bertner.graphs import why_no_graphs
from bertner.hub import ModelSource, find_model
from bertner.hub_datasets import open_dataset
from bertner.labels import LabelSet
from bertner.loop import class_weights
from bertner.model import BertForNER
from bertner.output_dir import list_seeds
from bertner.readers import check_file, open_file
from bertner.tokenizer import Tokenizer

logger = logging.getLogger("bertner")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is built of."""

    source: ModelSource
    corpora: dict[str, CorpusSummary]
    datasets: dict[str, TokenDataset]
    model: BertForNER
    tokenizer: Tokenizer

    def schedule(self, config: TrainConfig, world_size: int = 1) -> Schedule:
        """The steps that training takes."""
        return Schedule(self.datasets["train"].row_lengths, config, world_size)

    def with_first_weights(self, config: TrainConfig) -> Parts:
        """The same parts, with the first weights of another seed."""
        label_set = self.datasets["train"].label_set
        return dataclasses.replace(self, model=_first_model(config, self.source, label_set))

    def save_model(self, folder: Path) -> None:
        """Writes a complete model folder, as `transformers` would."""
        self.model.save_pretrained(folder)
        self.tokenizer.save(folder)


def build_parts(config: TrainConfig, commit: str | None = None) -> Parts:
    """Reads the tokenizer, the data, and then the weights: mistakes are in the data.

    Args:
        config: All settings.
        commit: Take this commit of a model from the Hub, which may have moved on.
    """
    # A choice that cannot be had here is said first.
    products_for(config, find_device(config.device))
    data = _find_data(config)
    revision = commit or config.model_revision
    source = find_model(config.model_name_or_path, revision, weights=False)
    folder, output_dir = source.folder.resolve(), Path(config.output_dir).resolve()
    runs = [output_dir, *(path for _, path in list_seeds(output_dir))]
    if any(folder in (run, *(path for _, path in list_checkpoints(run))) for run in runs):
        raise UsageError(
            f"output_dir {config.output_dir} holds the model to start from; choose another folder"
        )
    tokenizer = _load_tokenizer(folder)
    prepared = _prepare_data(config, data, tokenizer)
    label_set = prepared["train"].dataset.label_set
    if source.commit is not None:
        find_model(source.name, source.commit)  # the weights too
    return Parts(
        source,
        {split: each.summary for split, each in prepared.items()},
        {split: each.dataset for split, each in prepared.items()},
        _first_model(config, source, label_set),
        tokenizer,
    )


def _first_model(config: TrainConfig, source: ModelSource, label_set: LabelSet) -> BertForNER:
    # Seeded first, so that a new head is the same in every run with this seed.
    torch.manual_seed(config.seed)
    model = BertForNER.from_pretrained(
        source.folder,
        id2label=dict(enumerate(label_set.names)),
        attn_implementation=config.attn_implementation,
    ).to(find_device(config.device))
    model.config = dataclasses.replace(model.config, reading=config.reading)
    return model


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "config.json"
    return Tokenizer.from_pretrained(folder, BertConfig.from_dict(read_json(path), path))


def find_device(name: str) -> torch.device:
    """The device that a user names; "auto" is CUDA, else XPU, else MPS, else the CPU.

    Raises:
        UsageError: There is no such device here.
    """
    if name == "auto":
        there: dict[str, Callable[[], bool]] = {
            "cuda": torch.cuda.is_available,
            "xpu": torch.xpu.is_available,
            "mps": torch.backends.mps.is_available,
        }
        return torch.device(next((kind for kind, is_there in there.items() if is_there()), "cpu"))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise UsageError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def read_corpora(config: TrainConfig) -> tuple[dict[str, Corpus], Tokenizer]:
    """The words of all data, by split, and the model's tokenizer."""
    data = _find_data(config)
    source = find_model(config.model_name_or_path, config.model_revision, weights=False)
    tokenizer = _load_tokenizer(source.folder)
    corpora = {}
    for split, found in data.items():
        corpus = open_source(found, config).read()
        max_samples = _max_samples(config, split)
        corpora[split] = corpus if max_samples is None else corpus.head(max_samples)
    return corpora, tokenizer


def find_sources(config: TrainConfig) -> dict[str, Path | CorpusStream]:
    """The data by split, training data first: files, or splits of a dataset."""
    data: dict[str, Path | CorpusStream] = {}
    if config.train_file is None:
        data.update(
            open_dataset(
                config.train_source,
                config_name=config.dataset_config_name,
                with_documents=config.context != "none",
                **columns_of(config),
            )
        )
    else:
        files = {
            "train": config.train_file,
            "validation": config.validation_file,
            "test": config.test_file,
        }
        data.update({split: Path(path) for split, path in files.items() if path})
    return data


def _find_data(config: TrainConfig) -> dict[str, Path | CorpusStream]:
    """The same, of files that are there, and all that the run needs."""
    data = find_sources(config)
    for source in data.values():
        if isinstance(source, Path):
            check_file(source)
    if "validation" not in data:
        needs = {
            "load_best_model_at_end": config.load_best_model_at_end,
            "early_stopping_patience": config.early_stopping_patience,
            "the best of several seeds": config.seeds > 1,
        }
        cure = f"{config.train_source} has no validation split"
        if config.train_file is not None:
            cure = "give --validation_file"
        for what, is_asked_for in needs.items():
            if is_asked_for:
                raise UsageError(f"{what} needs validation data: {cure}")
        if config.eval_strategy != "no":
            logger.warning("no validation data, so nothing is scored during training")
    return data


def columns_of(settings: TrainConfig | argparse.Namespace) -> dict[str, Any]:
    """What readers are told of a source's columns; settings have the names of TrainConfig."""
    names = settings.label_names
    return {
        "text_column": settings.text_column_name,
        "label_column": settings.label_column_name,
        "document_column": settings.document_column_name,
        "label_names": names.split(",") if names else None,
    }


def reading_of(options: argparse.Namespace, config: BertConfig) -> Reading:
    """How a model is to read: as it was trained to, but for what the command asks for."""
    settings = dataclasses.asdict(config.reading or Reading())
    asked = {name: getattr(options, name, None) for name in settings}
    settings.update({name: value for name, value in asked.items() if value is not None})
    return Reading(**settings)


def _prepare_data(
    config: TrainConfig, data: dict[str, Path | CorpusStream], tokenizer: Tokenizer
) -> dict[str, PreparedData]:
    """Reads and tokenises all data; the training data say what the labels are."""
    columns, row_limit = columns_of(config), tokenizer.row_limit(config.max_seq_length)
    if config.max_seq_length is not None and config.max_seq_length > row_limit:
        logger.warning(
            "max_seq_length %d is more than the model takes; rows have up to %d tokens",
            config.max_seq_length,
            row_limit,
        )
    prepared: dict[str, PreparedData] = {}
    label_set = None
    for split, source in data.items():
        settings: dict[str, Any] = {
            "reading": config.reading,
            "max_samples": _max_samples(config, split),
        }
        # A pipe can be read only once, and so not be hashed first.
        if isinstance(source, Path) and source.is_file() and config.data_cache:
            prepared[split] = prepare_file(
                source, tokenizer, label_set, name=split, columns=columns, **settings
            )
        else:
            prepared[split] = prepare(open_source(source, config), tokenizer, label_set, **settings)
        label_set = prepared["train"].dataset.label_set
    return prepared


def open_source(source: Path | CorpusStream, config: TrainConfig) -> CorpusStream:
    """A source that is to be read."""
    return open_file(source, **columns_of(config)) if isinstance(source, Path) else source


def _max_samples(config: TrainConfig, split: str) -> int | None:
    return config.max_train_samples if split == "train" else config.max_eval_samples


def announce(config: TrainConfig, parts: Parts, ranks: Ranks = ALONE) -> None:
    """Says in the log what is about to be trained, on what and how."""
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
            "%s: %s sentences, %s words, %s entities, %s tokens in %s rows from %s",
            split,
            f"{corpus.num_sentences:,}",
            f"{corpus.num_words:,}",
            f"{sum(corpus.entity_counts.values()):,}",
            f"{parts.datasets[split].num_read:,}",
            f"{len(parts.datasets[split]):,}",
            corpus.source,
        )
    findings = check_datasets(parts.corpora, parts.datasets, parts.tokenizer)
    for finding in findings:
        logger.warning("%s", finding.title)
    if findings:
        logger.warning("the same command with --check_data shows where, and more")
    logger.info(
        "%d steps on %s with %d threads, %s, rows %s, %s, into %s",
        parts.schedule(config, ranks.world_size).total_steps,
        model.device if ranks.world_size == 1 else f"{ranks.world_size} x {model.device.type}",
        torch.get_num_threads(),
        config.dtype,
        "packed" if config.packing else f"padded, attention {config.attn_implementation}",
        f"seed {config.seed}"
        if config.seeds == 1
        else f"each of the seeds {config.seed} to {config.seed + config.seeds - 1}",
        config.output_dir,
    )
    logger.info("matrix products: %s", products_for(config, model.device))
    if kernels.is_queued(model.device):
        reason = why_no_graphs(config, model)
        logger.info("CUDA graphs: %s", "on" if reason is None else f"off: {reason}")
    if weights := class_weights(parts.datasets["train"], config.class_weights):
        each = ", ".join(f"{label} {weight:.3g}" for label, weight in weights.items())
        logger.info("class weights: %s", each)
    if config.early_stopping_patience and not config.load_best_model_at_end:
        logger.info(
            "early stopping: the last weights are kept; --load_best_model_at_end keeps the best"
        )


def products_for(config: TrainConfig, device: torch.device) -> kernels.Products:
    """How matrices are multiplied; padded rows keep to PyTorch's default."""
    matmul = config.matmul if config.packing else "default"
    return kernels.choose_products(matmul, device, config.dtype)
