"""What confidence an entity should have: evidence and calibrations, on documents held out.

    python -m benchmarks.calibration --data DATA --model FOLDER [FOLDER ...]

Each model predicts CoNLL-2003's validation split. In each round its documents are dealt out to five
folds anew, and the entities of a fold get their confidence from the other four. It is chosen by
Brier score and log-loss, which only the true probability makes small; the expected calibration
error (ECE, ten bins) stands beside them. Differences from bertner's own have a standard error over
documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression

from benchmarks.common import arguments
from benchmarks.machine import write_result
from bertner import kernels
from bertner.batches import packed_by_length
from bertner.calibration import (
    cross_validated_confidence,
    entity_evidence,
    fit,
    fit_logistic,
    reliability,
)
from bertner.config import EVAL_TOKENS, Reading
from bertner.data import tokenize
from bertner.decisions import Decider
from bertner.errors import UsageError
from bertner.labels import Spans
from bertner.model import BertForNER
from bertner.readers import read_file
from bertner.tokenizer import Tokenizer

FOLDS = 5
SIZES = (1, 3, 10, 30, 100)  # documents that are fitted on
DRAWS = 20  # of documents, for each size
PRECISIONS = (0.95, 0.98, 0.99)
RECALLS = (0.8, 0.85)

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass
class Entities:
    """What a model predicted.

    Attributes:
        scores: (n,) by name: what is made of the words' probabilities; "mean; beside" is (n, 2).
        lengths: (n,) words.
        kinds: (n,) number of the type.
        names: Of types.
        right: (n,) whether there is such a gold entity.
        documents: (n,) number of the document, from 0.
        gold_kinds: (num_gold,) number of the type of each gold entity.
        gold_documents: (num_gold,) number of its document.
    """

    scores: dict[str, Array]
    lengths: Array
    kinds: Ints
    names: tuple[str, ...]
    right: Bools
    documents: Ints
    gold_kinds: Ints
    gold_documents: Ints


# The confidence of the entities that are not `seen`, from those that are.
Method = Callable[[Entities, Bools], Array]


def predict(folder: Path, data: Path) -> tuple[Entities, dict[str, Any]]:
    """The entities of the validation split, and what there is to say of the model."""
    model = BertForNER.from_pretrained(folder)
    tokenizer = Tokenizer.from_pretrained(folder, model.config)
    reading = model.config.reading or Reading()
    corpus = read_file(data / "conll2003" / "valid.txt")
    dataset = tokenize(corpus, tokenizer, model.label_set, reading)
    decider, device = Decider(dataset), model.device
    with torch.inference_mode(), kernels.hot_path("auto", device, "float32"):
        for batch in packed_by_length(dataset, EVAL_TOKENS, device):
            decider.add(batch, model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits)
    decisions, starts = decider.decide(), dataset.sentence_starts[:-1].astype(np.int64)
    found = model.label_set.spans(decisions.labels, starts)
    gold = model.label_set.spans(dataset.word_labels, starts)
    _, document_of = np.unique(dataset.documents, return_inverse=True)

    def documents(spans: Spans) -> Ints:
        return np.asarray(document_of[np.searchsorted(starts, spans.start, side="right") - 1])

    true = set(triples(gold))
    pieces = zip(found.start, found.end, strict=True)
    words = [decisions.scores[start:end].astype(np.float64) for start, end in pieces]
    product = np.array([each.prod() for each in words])
    lengths = (found.end - found.start).astype(np.float64)
    evidence = entity_evidence(decisions.scores, found.start, found.end, starts)
    entities = Entities(
        scores={
            "mean": evidence[:, 0],
            "min": np.array([each.min() for each in words]),
            "product": product,
            "geometric mean": product ** (1 / lengths),
            "product with beside": product * evidence[:, 1],
            "mean; beside": evidence,
        },
        lengths=lengths,
        kinds=found.type.astype(np.int64),
        names=model.label_set.types,
        right=np.array([triple in true for triple in triples(found)]),
        documents=documents(found),
        gold_kinds=gold.type.astype(np.int64),
        gold_documents=documents(gold),
    )
    about = {
        "model": folder.name,
        "context": reading.context,
        "decoding": reading.decoding,
        "num_documents": len(np.unique(document_of)),
        "num_gold": len(gold),
        "num_predicted": len(found),
        "num_correct": int(entities.right.sum()),
    }
    return entities, about


def triples(spans: Spans) -> Iterator[tuple[int, int, int]]:
    return zip(spans.start.tolist(), spans.end.tolist(), spans.type.tolist(), strict=True)


def as_it_is(name: str, entities: Entities, seen: Bools) -> Array:
    return entities.scores[name][~seen]


def isotonic(name: str, entities: Entities, seen: Bools) -> Array:
    # At 0 and 1 the first mistake would be infinitely bad.
    regression = IsotonicRegression(y_min=0.001, y_max=0.999, out_of_bounds="clip")
    regression.fit(entities.scores[name][seen], entities.right[seen])
    return np.asarray(regression.predict(entities.scores[name][~seen]))


def logistic(
    features: Callable[[Entities], Array],
    num_slopes: int,
    with_types: bool,
    entities: Entities,
    seen: Bools,
) -> Array:
    """As bertner's own, of other features; the first ones are slopes, and not negative."""
    columns = features(entities)
    right, num_right = entities.right[seen], int(entities.right[seen].sum())
    num_wrong = len(right) - num_right
    used = list(range(columns.shape[1]))
    while True:
        found = fit_logistic(
            columns[seen][:, used],
            entities.kinds[seen],
            len(entities.names),
            targets=np.where(right, (num_right + 1) / (num_right + 2), 1 / (num_wrong + 2)),
            prior=np.array([float(column < num_slopes) for column in used]),
            precision=np.ones(len(used)),
            offset_precision=4.0 if with_types else 1e12,
        )
        slopes = [k for k, column in enumerate(used) if column < num_slopes]
        lowest = min(slopes, key=lambda k: found[k])
        if found[lowest] >= 0:
            break
        del used[lowest]
    odds = columns[~seen][:, used] @ found[: len(used)]
    odds += found[len(used) :][entities.kinds[~seen]]
    return np.asarray(1 / (1 + np.exp(-odds)))


def own(entities: Entities, seen: Bools) -> Array:
    """The very code that models are calibrated with; one of its two folds is what was not seen."""
    types = [entities.names[kind] for kind in entities.kinds]
    groups, evidence = seen.astype(np.int64), entities.scores["mean; beside"]
    return cross_validated_confidence(evidence, types, entities.right, groups, folds=2)[~seen]


def log_of(score: Array) -> Array:
    return np.log(np.maximum(score, 1e-6))


def temperature(name: str, entities: Entities) -> Array:
    score = entities.scores[name]
    return (log_of(score) - log_of(1 - score))[:, None]


def platt(name: str, entities: Entities) -> Array:
    return np.column_stack([temperature(name, entities), np.ones(len(entities.right))])


def platt_beside(entities: Entities) -> Array:
    inside, beside = entities.scores["mean; beside"].T
    columns = [log_of(p) - log_of(1 - p) for p in (inside, beside)]
    return np.column_stack([columns[0], columns[1] - np.log(999), np.ones(len(inside))])


def beta(name: str, entities: Entities) -> Array:
    score = entities.scores[name]
    return np.column_stack([log_of(score), -log_of(1 - score), np.ones(len(score))])


def beta_length(entities: Entities) -> Array:
    return np.column_stack([beta("product", entities), np.log(entities.lengths)])


def beta_beside(entities: Entities) -> Array:
    inside, beside = entities.scores["mean; beside"].T
    odds = -log_of(1 - beside) - np.log(1000)
    return np.column_stack([log_of(inside), -log_of(1 - inside), odds, np.ones(len(odds))])


METHODS: dict[tuple[str, str], Method] = {
    **{
        (name, "as it is"): partial(as_it_is, name)
        for name in ("mean", "min", "product", "geometric mean")
    },
    ("mean", "temperature"): partial(logistic, partial(temperature, "mean"), 1, False),
    ("mean", "Platt"): partial(logistic, partial(platt, "mean"), 1, False),
    ("mean", "Platt, types"): partial(logistic, partial(platt, "mean"), 1, True),
    ("mean", "isotonic"): partial(isotonic, "mean"),
    ("mean", "beta"): partial(logistic, partial(beta, "mean"), 2, False),
    **{
        (name, "beta, types"): partial(logistic, partial(beta, name), 2, True)
        for name in ("mean", "min", "product", "geometric mean", "product with beside")
    },
    ("product; length", "beta, types"): partial(logistic, beta_length, 2, True),
    ("mean; beside", "Platt, types"): partial(logistic, platt_beside, 2, True),
    ("mean; beside", "beta"): partial(logistic, beta_beside, 3, False),
    ("mean; beside", "beta, types"): own,
}
OWN = ("mean; beside", "beta, types")
LEARNERS = [("mean", "as it is"), ("mean", "Platt"), ("mean", "isotonic"), OWN]


def losses(confidence: Array, right: Bools) -> dict[str, Array]:
    """(n,) by name."""
    said = np.where(right, confidence, 1 - confidence)
    return {"brier": (1 - said) ** 2, "log_loss": -log_of(said)}


def folds_of(entities: Entities, seed: int) -> tuple[Ints, Ints]:
    """Fold of each predicted entity and of each gold one."""
    order = np.random.default_rng(seed).permutation(int(entities.gold_documents.max()) + 1) % FOLDS
    return order[entities.documents], order[entities.gold_documents]


def compare(entities: Entities, rounds: int) -> list[dict[str, Any]]:
    """Every method on every fold."""
    found: dict[tuple[str, str], list[Array]] = {name: [] for name in METHODS}
    for seed in range(rounds):
        fold_of, _ = folds_of(entities, seed)
        for name, method in METHODS.items():
            confidence = np.empty(len(fold_of))
            for fold in range(FOLDS):
                confidence[fold_of == fold] = method(entities, fold_of != fold)
            found[name].append(confidence)
    results = []
    for (evidence, calibration), each in found.items():
        result: dict[str, Any] = {"evidence": evidence, "calibration": calibration}
        errors = [reliability(one, entities.right, calibrated=True)["ece"] for one in each]
        result["ece"] = spread_of(errors)
        for loss in ("brier", "log_loss"):
            values = np.array([losses(one, entities.right)[loss] for one in each])
            owns = np.array([losses(one, entities.right)[loss] for one in found[OWN]])
            result[loss] = spread_of(values.mean(axis=1).tolist())
            # Documents are what is independent, not entities, and not rounds.
            more = (values - owns).mean(axis=0)
            sums = np.bincount(entities.documents, more)
            error = float(sums.std(ddof=1) * np.sqrt(len(sums)) / len(more))
            result[f"{loss}_over_own"] = {"mean": float(more.mean()), "standard_error": error}
        results.append(result)
    return results


def spread_of(values: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}


def learn(entities: Entities) -> list[dict[str, Any]]:
    """Fitted on few documents, scored on the rest."""
    results = []
    for size in SIZES:
        for name in LEARNERS:
            draws: list[dict[str, float]] = []
            for seed in range(DRAWS):
                order = np.random.default_rng(seed).permutation(entities.documents.max() + 1)
                seen = order[entities.documents] < size
                scores = losses(METHODS[name](entities, seen), entities.right[~seen])
                means = {loss: float(values.mean()) for loss, values in scores.items()}
                draws.append({"num_entities": float(seen.sum()), **means})
            means = {key: float(np.mean([each[key] for each in draws])) for key in draws[0]}
            results.append(
                {"num_documents": size, "evidence": name[0], "calibration": name[1], **means}
            )
    return results


def keep_promises(entities: Entities, rounds: int) -> list[dict[str, Any]]:
    """What thresholds that were found on four folds leave of the fifth."""
    wanted = [{"precision": each} for each in PRECISIONS] + [{"recall": each} for each in RECALLS]
    kept: dict[tuple[str | None, int], Array] = {}
    types, evidence = np.array(entities.names)[entities.kinds], entities.scores["mean; beside"]
    for seed in range(rounds):
        fold_of, gold_fold_of = folds_of(entities, seed)
        for fold in range(FOLDS):
            seen, held_out = fold_of != fold, fold_of == fold
            gold_seen = entities.gold_kinds[gold_fold_of != fold]
            gold_held_out = entities.gold_kinds[gold_fold_of == fold]
            calibration = fit(
                evidence[seen],
                types[seen].tolist(),
                entities.right[seen],
                dict(zip(entities.names, np.bincount(gold_seen).tolist(), strict=True)),
                source="four folds",
                weights="",
                reading=Reading(),
            )
            confidence = calibration.apply(evidence, types.tolist())
            for kind in (None, *entities.names):
                mine = held_out & ((types == kind) | (kind is None))
                of_gold = np.array(entities.names)[gold_held_out]
                num_gold = int(np.sum((of_gold == kind) | (kind is None)))
                for number, target in enumerate(wanted):
                    try:
                        point = calibration.threshold_for(kind, **target)
                    except UsageError:
                        counts = [0.0, 0.0, 0.0, 1.0]
                    else:
                        left = mine & (confidence >= point.threshold)
                        num_right = int(entities.right[left].sum())
                        counts = [float(num_right), float(left.sum()), float(num_gold), 0.0]
                    key = (kind, number)
                    kept[key] = kept.get(key, np.zeros(4)) + counts
    return [
        {
            "type": kind,
            "wanted": wanted[number],
            "precision": float(correct / left) if left else None,
            "recall": float(correct / gold) if gold else None,
            "folds_out_of_reach": int(out_of_reach),
        }
        for (kind, number), (correct, left, gold, out_of_reach) in kept.items()
    ]


def show(result: dict[str, Any]) -> None:
    print({key: value for key, value in result.items() if not isinstance(value, list)})
    print(f"{'':36s}Brier, over own (e-4)    log-loss, over own (e-4) ECE")
    for row in result["comparison"]:
        cells = [f"{row['evidence']:22s}{row['calibration']:14s}"]
        for loss in ("brier", "log_loss"):
            more = row[f"{loss}_over_own"]
            cells.append(
                f"{row[loss]['mean']:.4f} {1e4 * more['mean']:+7.1f} "
                f"({1e4 * more['standard_error']:5.1f})   "
            )
        print("".join(cells) + f"{row['ece']['mean']:.4f}")
    for row in result["few_documents"] + result["thresholds"]:
        print(*row.values())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, nargs="+", required=True, help="model folders")
    options = parser.parse_args()
    models = []
    for folder in options.model:
        entities, about = predict(folder, options.data)
        models.append(
            {
                **about,
                "comparison": compare(entities, options.rounds),
                "few_documents": learn(entities),
                "thresholds": keep_promises(entities, options.rounds),
            }
        )
        show(models[-1])
    settings = {"rounds": options.rounds, "folds": FOLDS, "draws": DRAWS}
    print(write_result("calibration", {**settings, "models": models}))


if __name__ == "__main__":
    main()
