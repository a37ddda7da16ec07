"""`bertner-eval`: scores of a model, or of a file of predictions, and of two against each other."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bertner import kernels
from bertner.analysis import (
    KINDS,
    Analysis,
    Inventory,
    Prediction,
    analyse,
    bootstrap_unit,
    compare_analyses,
    take_inventory,
)
from bertner.calibration import FILE as CALIBRATION
from bertner.corpus import Corpus
from bertner.data import tokenize
from bertner.errors import DataError, ModelError, UsageError, visible
from bertner.evaluation import Evaluation, evaluate
from bertner.files import check_target, read_json, write_json
from bertner.html_report import write_report
from bertner.hub import find_model
from bertner.model import BertForNER
from bertner.outcome import MIN_ENTITIES, calibrate, full_analysis, with_confidence
from bertner.output_dir import RECORD
from bertner.parts import columns_of, find_device, reading_of
from bertner.predict import find_calibration
from bertner.predictions import read_conlleval, read_predictions, write_conlleval
from bertner.readers import open_file, read_file
from bertner.report import escape_unknown, progress_bar
from bertner.tables import format_scores, format_table
from bertner.tokenizer import Tokenizer

logger = logging.getLogger("bertner")

# Sentences in which two models differ that the terminal shows.
_NUM_EXAMPLES = 5

# What no model is called, but files of predictions are.
_DATA_SUFFIXES = {".txt", ".conll", ".tsv", ".iob", ".bio", ".json", ".jsonl", ".parquet"}


def run_evaluation(options: argparse.Namespace) -> None:
    """`bertner-eval`: what the flags ask for, as tables and in files.

    Raises:
        BertnerError: See the exit codes in `errors`.
    """
    if (options.model is None) == (options.predictions is None):
        raise UsageError("give a model (--model) or a file of predictions (--predictions)")
    if options.scheme is not None and options.model is None:
        raise UsageError("scheme says what a model's labels are: give --model")
    if options.calibrate and (options.model is None or not Path(options.model).is_dir()):
        raise UsageError("calibrate needs --model with a folder, into which it writes")
    _check_targets(options)
    corpus, prediction = _read_data(options)
    bootstrap_unit(corpus, options.bootstrap_unit)
    if options.compare is not None and not _is_file(options.compare):
        find_model(options.compare)  # before minutes of work
    evaluation: Evaluation | None = None
    confidence: dict[str, Any] = {}
    if prediction is None:
        analysis, evaluation, confidence = _assess_model(options, options.model, corpus)
    else:
        analysis = analyse(corpus, prediction)
    other = None
    if options.compare is not None:
        other = _other_analysis(options, corpus)
    inventory = _find_inventory(options)
    sampling = {
        "unit": options.bootstrap_unit,
        "samples": options.bootstrap_samples,
        "seed": options.seed,
    }
    values = {
        "model": options.model or options.predictions,
        **full_analysis(analysis, evaluation, inventory, **sampling),
        **confidence,
    }
    comparison = None
    if other is not None:
        comparison = compare_analyses(analysis, other, **sampling)
        comparison = {"other": options.compare, **comparison}
    escape_unknown()
    print(_format(analysis, values, evaluation))
    if other is not None and comparison is not None:
        print(f"\n{_format_comparison(comparison)}")
        print(_format_examples(analysis, other))
    if options.conlleval:
        write_conlleval(options.conlleval, corpus, analysis.prediction)
    if options.report:
        write_report(
            Path(options.report),
            title=f"{Path(values['model']).name} on {Path(corpus.source).name}",
            evaluations={Path(corpus.source).name: (values, list(analysis.sentences(other)))},
            facts=[("model", values["model"]), ("data", corpus.source)],
            comparison=comparison,
        )
    if options.output_file:
        metrics = _word_metrics(analysis) if evaluation is None else evaluation.metrics()
        write_json(
            Path(options.output_file),
            {**metrics, "analysis": values}
            | ({} if comparison is None else {"comparison": comparison}),
        )


def _check_targets(options: argparse.Namespace) -> None:
    """Asks whether all files can be written, and that none of them is lost to another."""
    taken = {
        flag: Path(path)
        for flag in ("file", "predictions", "compare", "train_file")
        if (path := getattr(options, flag))
    }
    if (trained := _trained_on(options)) is not None:
        taken["train_file"] = trained[0]
    for flag in ("conlleval", "report", "output_file"):
        if path := getattr(options, flag):
            check_target(Path(path), flag, taken.items())
            taken[flag] = Path(path)


def _is_file(name: str) -> bool:
    """Whether a name is that of predictions, in a file or a pipe, and not of a model.

    Raises:
        DataError: It can only be a file, but there is none.
    """
    path = Path(name)
    is_package = name.startswith("package:")
    if not is_package and not path.exists() and path.suffix.lower() in _DATA_SUFFIXES:
        raise DataError("no such file; check the path", path)
    return path.exists() and not path.is_dir()


def _read_data(options: argparse.Namespace) -> tuple[Corpus, Prediction | None]:
    """The annotated data, and the prediction if it is in a file."""
    columns = columns_of(options)
    if options.file is not None:
        corpus = read_file(options.file, **columns)
        if options.predictions is None:
            return corpus, None
        return corpus, read_predictions(options.predictions, corpus, columns)
    if options.predictions is None:
        raise UsageError("give the annotated data to score on (--file)")
    # Both are in one file, as conlleval has them.
    return read_conlleval(options.predictions)


def _other_analysis(options: argparse.Namespace, corpus: Corpus) -> Analysis:
    """What --compare names: a file of predictions, or a model."""
    if _is_file(options.compare):
        return analyse(corpus, read_predictions(options.compare, corpus, columns_of(options)))
    without = argparse.Namespace(**{**vars(options), "calibrate": False})
    return _assess_model(without, options.compare, corpus)[0]


def _assess_model(
    options: argparse.Namespace, name: str, corpus: Corpus
) -> tuple[Analysis, Evaluation, dict[str, Any]]:
    """What a model says of a corpus, its scores, and how reliable its confidence is."""
    source = find_model(name)
    device = find_device(options.device)
    model = BertForNER.from_pretrained(source.folder).to(device)
    model.stack_projections()  # the move may have parted them
    products = kernels.choose_products(options.matmul, device, options.dtype)
    logger.info("matrix products: %s", products)
    tokenizer = Tokenizer.from_pretrained(source.folder, model.config)
    reading = reading_of(options, model.config)
    if reading.context != "none" and not corpus.marks_documents and options.context is None:
        logger.warning(
            "%s does not say where documents begin, so each sentence is read alone; the model was "
            "trained to read their neighbours too",
            corpus.source,
        )
        reading = dataclasses.replace(reading, context="none")
    label_set = model.label_set
    if options.scheme is not None:
        if not label_set.may_be(options.scheme):
            raise UsageError(
                f"scheme {options.scheme}: the model's labels are {label_set.scheme}; leave it out"
            )
        label_set = dataclasses.replace(label_set, given_scheme=options.scheme)
    calibration = None if options.calibrate else find_calibration(source.folder, model, reading)
    dataset = tokenize(corpus, tokenizer, label_set, reading)
    with progress_bar(len(dataset), " rows", "evaluate", show=True) as bar:
        evaluation = evaluate(
            model,
            dataset,
            options.batch_size,
            dtype=options.dtype,
            batch_tokens=options.batch_tokens,
            matmul=options.matmul,
            on_batch=bar.update,
        )
    analysis = analyse(corpus, Prediction.of_labels(evaluation.word_predictions, label_set))
    if options.calibrate:
        calibration = calibrate(analysis, evaluation, model, reading)
        if calibration is None:
            raise DataError(
                f"the model finds {len(analysis.found)} entities, too few to calibrate on; give "
                f"data in which it finds {MIN_ENTITIES} or more",
                corpus.source,
            )
        calibration.save(source.folder)
        logger.info("%s: calibrated on %s", source.folder / CALIBRATION, corpus.source)
    analysis, confidence = with_confidence(
        analysis, evaluation, calibration, is_fitted_on=options.calibrate
    )
    return analysis, evaluation, confidence


def _find_inventory(options: argparse.Namespace) -> Inventory | None:
    """What the training data hold: of --train_file, or of the file that run.json names.

    That one is read only if it is still what the model was trained on.
    """
    if options.train_file is not None:
        stream = open_file(options.train_file, **columns_of(options))
        return take_inventory(stream.blocks(), stream.builder.kinds)
    trained = _trained_on(options)
    if trained is None:
        return None
    path, digest, columns = trained
    stream = open_file(path, **columns)
    inventory = take_inventory(stream.blocks(), stream.builder.kinds)
    if stream.digest.hexdigest() != digest:
        logger.warning(
            "%s is not what the model was trained on any more, so entities seen in training are "
            "not told apart (--train_file names another file)",
            path,
        )
        return None
    return inventory


def _trained_on(options: argparse.Namespace) -> tuple[Path, str, dict[str, Any]] | None:
    """The training file that the model's run.json names, its hash and columns, if it is there."""
    folder = Path(options.model or "")
    if options.train_file or options.model is None or not (folder / RECORD).is_file():
        return None
    try:
        record = read_json(folder / RECORD)
        path, digest = record["config"]["train_file"], record["data"]["train"]["sha256"]
        columns = columns_of(argparse.Namespace(**record["config"]))
    except (ModelError, KeyError, TypeError, AttributeError):
        return None
    return (Path(path), digest, columns) if isinstance(path, str) and Path(path).is_file() else None


def _word_metrics(analysis: Analysis) -> dict[str, float]:
    """The scores of a file of predictions, by the names that those of a model have."""
    overall = analysis.word.overall
    return {
        "word_precision": overall.precision,
        "word_recall": overall.recall,
        "word_f1": overall.f1,
        "word_accuracy": analysis.word.accuracy,
    }


def _format(analysis: Analysis, values: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    """All tables of one model."""
    corpus, levels = analysis.corpus, values["levels"]
    bootstrap = values["bootstrap"]
    intervals = None
    if bootstrap["samples"]:
        scores = {**levels["word"]["per_type"], "all": levels["word"]["overall"]}
        intervals = {name: score["intervals"]["f1"] for name, score in scores.items()}
    documents = f"{corpus.num_documents:,} documents, " if corpus.marks_documents else ""
    parts = [
        f"{corpus.source}: {documents}{corpus.num_sentences:,} sentences, "
        f"{corpus.num_words:,} words, {len(analysis.true):,} entities",
        format_scores(analysis.word, "word level", intervals),
        f"accuracy over {corpus.num_words:,} words {analysis.word.accuracy:.4f}"
        + (
            f"; intervals: bootstrap over {bootstrap['unit']}s, {bootstrap['samples']:,} samples"
            if intervals
            else ""
        ),
    ]
    if evaluation is not None:
        subword = evaluation.subword
        parts += [
            "",
            format_scores(subword, "subword level"),
            f"accuracy over {subword.num_labels:,} wordpieces {subword.accuracy:.4f}, "
            f"loss {evaluation.loss:.4f}",
        ]
        if evaluation.num_repaired is not None:
            parts.append(
                f"Viterbi gave {evaluation.num_repaired:,} words another label than their best one"
            )
    ways = {
        f"strict ({analysis.prediction.scheme})": levels["word_strict"]["overall"],
        **{f"MUC {name}": scores for name, scores in values["muc"].items() if name != "strict"},
        "words by type": levels["tokens"]["overall"],
    }
    rows = [[name, *_three(scores)] for name, scores in ways.items()]
    parts += ["", format_table(["other ways to count", "precision", "recall", "f1"], rows)]
    if reliability := values.get("reliability"):
        how = "calibrated" if reliability["calibrated"] else "not calibrated (--calibrate)"
        parts += [
            "",
            f"confidence of entities, {how}: expected calibration error {reliability['ece']:.4f}, "
            f"Brier score {reliability['brier']:.4f}",
        ]
    errors = {**values["errors"]["per_type"], "all": values["errors"]["counts"]}
    rows = [[name, *(str(counts[kind]) for kind in KINDS)] for name, counts in errors.items()]
    parts += ["", format_table(["what became of them", *KINDS], rows)]
    groups = {f"of length {name}": score for name, score in values["by_length"].items()}
    for name, score in (values["by_training"] or {}).items():
        groups[f"{name} in training" if name != "other type" else "there with another type"] = score
    rows = [
        [name, *_three(score), str(score["num_gold"])]
        for name, score in groups.items()
        if score["num_gold"] or score["num_predicted"]
    ]
    parts += [
        "",
        format_table(["kinds of entities", "precision", "recall", "f1", "entities"], rows),
    ]
    return "\n".join(parts)


def _three(scores: Mapping[str, float]) -> list[str]:
    return [f"{scores[name]:.4f}" for name in ("precision", "recall", "f1")]


def _format_comparison(comparison: Mapping[str, Any]) -> str:
    """The table of differences, and what they say."""
    rows = [
        [
            name,
            f"{each['difference']:+.4f}",
            "{:+.4f} to {:+.4f}".format(*each["interval"]),
            f"{each['p_value']:.4f}",
        ]
        for name, each in [*comparison["per_type"].items(), ("all", comparison)]
    ]
    table = format_table(["less the other", "f1", "95% interval", "p"], rows)
    unit, samples = comparison["unit"], comparison["samples"]
    verdict = "a difference this large comes by chance in fewer than 1 of 20 cases"
    if comparison["p_value"] > 0.05:
        verdict = "the two cannot be told apart on these data"
    return (
        f"against {visible(comparison['other'])}\n{table}\n"
        f"all: {verdict} (paired randomization over {unit}s, {samples:,} samples; the interval is "
        "of the paired bootstrap)"
    )


def _format_examples(analysis: Analysis, other: Analysis) -> str:
    """Some sentences in which two models differ."""
    differ = [
        sentence
        for sentence in analysis.sentences(other)
        if [entity[:3] for entity in sentence["predicted"]]
        != [entity[:3] for entity in sentence["other"]]
    ]
    lines = [f"{len(differ):,} sentences differ" + (", the first of them:" if differ else "")]
    for sentence in itertools.islice(differ, _NUM_EXAMPLES):
        lines.append(f"{analysis.corpus.source}:{sentence['line']}:")
        for name in ("gold", "predicted", "other"):
            text = _bracketed(sentence["words"], sentence[name])
            lines.append(f"  {name:<9}  {visible(text)}")
    return "\n".join(lines)


def _bracketed(words: Sequence[str], entities: Sequence[Sequence[Any]]) -> str:
    """A sentence with its entities in brackets."""
    shown = list(words)
    for start, end, kind, *_ in entities:
        shown[start] = f"[{kind} {shown[start]}"
        shown[end - 1] += "]"
    return " ".join(shown)
