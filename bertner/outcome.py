"""What a run leaves beside its weights and scores: the calibration, and the report.

Neither is ever a reason for a run to fail: what stands in their way is said, and they are left out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertner.analysis import Analysis, Inventory, Prediction, analyse, level_to_dict, take_inventory
from bertner.calibration import (
    Calibration,
    cross_validated_confidence,
    entity_evidence,
    fit,
    reliability,
)
from bertner.config import Reading, TrainConfig
from bertner.corpus import Corpus, CorpusStream, CorpusSummary
from bertner.errors import BertnerError
from bertner.evaluation import Evaluation
from bertner.model import BertForNER
from bertner.parts import Parts, find_sources, open_source
from bertner.predict import fingerprint_of

logger = logging.getLogger("bertner")

MIN_ENTITIES = 10  # that a calibration is fitted on


def assess_run(
    config: TrainConfig, parts: Parts, evaluations: Mapping[str, Evaluation], folder: Path
) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Analyses what a trained model said of each split, and calibrates it on the validation data.

    The words of the data, which training does not keep, are read again; a source that cannot be, or
    that has changed, is left out.

    Args:
        config: Of the run.
        parts: With the kept weights.
        evaluations: By split.
        folder: Where `calibration.json` goes.

    Returns:
        By split: the analysis and its sentences, as `html_report.write_report` takes them.
    """
    if not evaluations:
        return {}
    sources = find_sources(config)
    # Only the report shows what takes long to find out.
    inventory = None
    if config.report:
        inventory = _inventory(_open_again(config, sources["train"]), parts.corpora["train"])
    sampling = {} if config.report else {"samples": 0}
    calibration = None
    pages = {}
    for split, evaluation in evaluations.items():  # the validation data first
        corpus = _read_again(_open_again(config, sources[split]), parts.corpora[split])
        if corpus is None:
            continue
        label_set = parts.datasets[split].label_set
        analysis = analyse(corpus, Prediction.of_labels(evaluation.word_predictions, label_set))
        if split == "validation":
            calibration = calibrate(analysis, evaluation, parts.model, config.reading)
            if calibration is None:
                logger.warning(
                    "scores of entities are not calibrated: the model finds %d entities in the "
                    "validation data, and it takes %d or more",
                    len(analysis.found),
                    MIN_ENTITIES,
                )
            else:
                calibration.save(folder)
        analysis, values = with_confidence(
            analysis, evaluation, calibration, is_fitted_on=split == "validation"
        )
        pages[split] = (
            {
                "model": str(folder),
                **full_analysis(analysis, evaluation, inventory, **sampling),
                **values,
            },
            list(analysis.sentences()),
        )
    return pages


def full_analysis(
    analysis: Analysis,
    evaluation: Evaluation | None,
    inventory: Inventory | None,
    **sampling: Any,
) -> dict[str, Any]:
    """An analysis as JSON values, with what only a model's evaluation knows.

    Args:
        analysis: The prediction.
        evaluation: Its scores, if a model made it.
        inventory: What the training data hold.
        sampling: See `Analysis.to_dict`.
    """
    values = analysis.to_dict(inventory=inventory, **sampling)
    if evaluation is not None:
        values["levels"]["subword"] = level_to_dict(evaluation.subword)
        values["loss"] = evaluation.loss
    return values


def calibrate(
    analysis: Analysis, evaluation: Evaluation, model: BertForNER, reading: Reading
) -> Calibration | None:
    """Fits the confidence of entities to how often they are right.

    Args:
        analysis: What the model said of the data to calibrate on.
        evaluation: With the probabilities of words.
        model: Of which it is.
        reading: How it read.

    Returns:
        The calibration; None on fewer than `MIN_ENTITIES` predicted entities, which say nothing.
    """
    if len(analysis.found) < MIN_ENTITIES:
        return None
    names = analysis.type_names
    num_gold = dict.fromkeys(names, 0)
    num_gold.update({name: score.num_gold for name, score in analysis.word.per_type.items()})
    return fit(
        _evidence(analysis, evaluation),
        [names[k] for k in analysis.found.type],
        analysis.is_right,
        num_gold,
        source=analysis.corpus.source,
        weights=fingerprint_of(model),
        reading=reading,
    )


def with_confidence(
    analysis: Analysis,
    evaluation: Evaluation,
    calibration: Calibration | None,
    *,
    is_fitted_on: bool = False,
) -> tuple[Analysis, dict[str, Any]]:
    """The same analysis with a confidence for each entity, and how reliable that is.

    Args:
        analysis: The prediction.
        evaluation: With the probabilities of words.
        calibration: Of the model; without one, confidence is the mean probability of the words.
        is_fitted_on: These are the data that it was fitted on: then each part of them is judged by
            a calibration that has not seen it.
    """
    evidence = _evidence(analysis, evaluation)
    kinds = [analysis.type_names[k] for k in analysis.found.type]
    right = analysis.is_right
    if calibration is None:
        confidence = evidence[:, 0]
    elif is_fitted_on:
        units = analysis.units(analysis.unit())[analysis.sentence_of(analysis.found)]
        confidence = cross_validated_confidence(evidence, kinds, right, units)
    else:
        confidence = calibration.apply(evidence, kinds)
    values = reliability(confidence, right, calibrated=calibration is not None)
    return analysis.with_confidence(confidence), {"reliability": values}


def _evidence(analysis: Analysis, evaluation: Evaluation) -> Any:
    found, starts = analysis.found, analysis.corpus.starts
    return entity_evidence(evaluation.word_scores, found.start, found.end, starts)


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_facts(record: Mapping[str, Any], arguments: Sequence[str]) -> list[tuple[str, str]]:
    """What stands at the head of a report, by name.

    Args:
        record: The contents of run.json.
        arguments: Of the command.
    """
    data = record["data"]
    facts = [
        ("model", record["model"]["name"]),
        *(
            (f"{split} data", f"{values['source']}: {values['sentences']:,} sentences")
            for split, values in data.items()
        ),
        ("seed", str(record["config"]["seed"])),
        ("hardware", record["device"]),
        ("versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())),
        ("started", record["started"]),
        ("command", " ".join(["bertner-train", *arguments])),
    ]
    return [(name, str(value)) for name, value in facts]


def _inventory(stream: CorpusStream | None, summary: CorpusSummary) -> Inventory | None:
    if stream is None:
        return None
    try:
        inventory = take_inventory(stream.blocks(), stream.builder.kinds)
    except BertnerError as error:
        logger.warning("entities seen in training are not told apart: %s", error)
        return None
    return inventory if _is_same(stream.digest.hexdigest(), summary) else None


def _read_again(stream: CorpusStream | None, summary: CorpusSummary) -> Corpus | None:
    """A split with its words, if it is still what was read before."""
    if stream is None:
        return None
    corpus = stream.read()
    if not _is_same(corpus.sha256, summary):
        return None
    return corpus.head(summary.num_sentences)


def _open_again(config: TrainConfig, source: Path | CorpusStream) -> CorpusStream | None:
    if isinstance(source, Path) and not source.is_file():  # a pipe gives its words once
        logger.warning("%s cannot be read again: it is not in the report", source)
        return None
    return open_source(source, config)


def _is_same(digest: str, summary: CorpusSummary) -> bool:
    if digest != summary.sha256:
        logger.warning("%s has changed meanwhile: it is not in the report", summary.source)
    return digest == summary.sha256
