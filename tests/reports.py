"""A made-up evaluation in the form that a report is written from."""

from __future__ import annotations

from typing import Any

KINDS = ("correct", "type", "boundary", "boundary and type", "missed", "spurious")
TYPES = ("LOC", "MISC", "ORG", "PER")


def score(correct: int, predicted: int, gold: int, **more: Any) -> dict[str, Any]:
    return {
        "precision": correct / predicted if predicted else 0.0,
        "recall": correct / gold if gold else 0.0,
        "f1": 2 * correct / (predicted + gold) if predicted + gold else 0.0,
        "num_correct": correct,
        "num_predicted": predicted,
        "num_gold": gold,
        **more,
    }


def sentence(
    words: str,
    gold: list[list[Any]],
    predicted: list[list[Any]],
    matches: list[list[Any]],
    **more: Any,
) -> dict[str, Any]:
    return {
        "line": 1,
        "document": 0,
        "words": words.split(),
        "gold": gold,
        "predicted": predicted,
        "matches": matches,
        **more,
    }


def right(words: str = "Paris is large .", confidence: float | None = 0.99) -> dict[str, Any]:
    entity = [0, 1, "LOC"]
    return sentence(words, [entity], [[*entity, confidence]], [[0, 0, "correct"]])


def example_sentences() -> list[dict[str, Any]]:
    """50 sentences: 45 right, one error of each kind, one in all, and in the ones with errors 6."""
    errors = [
        sentence(
            "Reuters met Ann Poe in Rome",
            [[0, 1, "ORG"], [2, 4, "PER"], [5, 6, "LOC"]],
            [[0, 1, "LOC", 0.95], [2, 4, "PER", 0.9], [5, 6, "LOC", 0.8]],
            [[0, 0, "type"], [1, 1, "correct"], [2, 2, "correct"]],
        ),
        sentence(
            "the Bank of Rome",
            [[1, 4, "ORG"]],
            [[1, 2, "ORG", 0.4], [3, 4, "LOC", 0.6]],
            [[0, 0, "boundary"], [-1, 1, "spurious"]],
        ),
        sentence(
            "Old Trafford", [[0, 2, "LOC"]], [[1, 2, "PER", 0.3]], [[0, 0, "boundary and type"]]
        ),
        sentence("Ashes to ashes", [[0, 1, "MISC"]], [], [[0, -1, "missed"]]),
        sentence("Monday in May", [], [[0, 1, "MISC", 0.7]], [[-1, 0, "spurious"]]),
    ]
    many = [right() for _ in range(45)]
    many[4:4] = errors[:3]
    return [*many, *errors[3:]]


def analysis_of(sentences: list[dict[str, Any]], types: tuple[str, ...] = TYPES) -> dict[str, Any]:
    """An analysis whose counts are those of the sentences."""
    confusion = [[0] * (len(types) + 1) for _ in range(len(types) + 1)]
    errors = {t: dict.fromkeys(KINDS, 0) for t in types}
    for of in sentences:
        for g, p, kind in of["matches"]:
            gold = of["gold"][g][2] if g >= 0 else None
            predicted = of["predicted"][p][2] if p >= 0 else None
            row, column = (len(types) if t is None else types.index(t) for t in (gold, predicted))
            confusion[row][column] += 1
            errors[gold or predicted][kind] += 1
    counts = {kind: sum(of[kind] for of in errors.values()) for kind in KINDS}
    interval = {share: [0.6, 0.9] for share in ("precision", "recall", "f1")}

    def level(**more: Any) -> dict[str, Any]:
        per_type = {}
        for k, t in enumerate(types):
            row, column = sum(confusion[k]), sum(line[k] for line in confusion)
            per_type[t] = score(errors[t]["correct"], column, row, **more)
        sums = [sum(s[n] for s in per_type.values()) for n in ("num_predicted", "num_gold")]
        overall = score(counts["correct"], *sums, **more)
        return {"overall": overall, "per_type": per_type, "accuracy": 0.9, "num_labels": 999}

    way = {"correct": 5, "incorrect": 1, "partial": 0, "missed": 1, "spurious": 1}
    shares = {"precision": 0.7, "recall": 0.8, "f1": 0.75}
    return {
        "model": "tiny",
        "source": "made-up",
        "num_documents": 1,
        "num_sentences": len(sentences),
        "num_words": sum(len(of["words"]) for of in sentences),
        "levels": {
            "word": level(intervals=interval),
            **{name: level() for name in ("word_strict", "tokens", "subword")},
        },
        "loss": 0.25,
        "bootstrap": {"unit": "document", "samples": 1000, "seed": 1, "level": 0.95},
        "muc": {name: {**way, **shares} for name in ("strict", "exact", "partial", "type")},
        "errors": {"counts": counts, "per_type": errors},
        "confusion": {"types": list(types), "counts": confusion},
        "by_training": {name: score(3, 4, 5) for name in ("seen", "other type", "unseen")},
        "by_length": {length: score(3, 4, 5) for length in ("1", "2", "3", "4+")},
        "reliability": {
            "num_entities": 10,
            "calibrated": False,
            "brier": 0.1,
            "ece": 0.05,
            "bins": [
                {"low": 0.0, "high": 0.5, "count": 2, "confidence": 0.4, "precision": 0.5},
                {"low": 0.5, "high": 1.0, "count": 8, "confidence": 0.9, "precision": 0.75},
            ],
        },
    }


def example_events() -> list[dict[str, Any]]:
    """The log of a run of 20 steps that was evaluated twice."""
    logs = [
        {
            "event": "log",
            "step": step,
            "loss": 1 / step,
            "learning_rate": 2e-5 * (1 - step / 20),
            "tokens_per_second": 1000.0 + step,
        }
        for step in range(1, 21)
    ]
    evaluations = [
        {"event": "eval", "step": step, "eval_loss": 0.5, "eval_f1": 0.7, "eval_word_f1": 0.8}
        for step in (10, 20)
    ]
    return [{"event": "start"}, *logs, *evaluations, {"event": "end"}]


def example_comparison() -> dict[str, Any]:
    difference = {"difference": 0.01, "interval": [-0.005, 0.02], "p_value": 0.2}
    return {
        "other": "another",
        "metric": "f1",
        "unit": "document",
        "samples": 1000,
        "num_differ": 2,
        **difference,
        "per_type": dict.fromkeys(TYPES, difference),
    }
