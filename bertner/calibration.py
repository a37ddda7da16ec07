"""Entity confidence: how probable it is that an entity is right, in its borders and its type.

A model's own probabilities are those of words, and they are too high. A calibration is fitted on
entities that were predicted on data with gold ones: a logistic regression on the probabilities
inside an entity and beside it (if the word beside it should be part of it, its borders are wrong),
with an offset for each type. Which probabilities, and which regression, was measured:
`benchmarks/calibration.py`.

Shapes: n entities.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from reprlib import repr as short  # what a message shows of a value from a file
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bertner.config import Reading
from bertner.errors import ModelError, UsageError, visible
from bertner.files import read_json, write_json
from bertner.labels import BoolArray, IntArray
from bertner.operating import MAX_POINTS, Curve, OperatingPoint, count_in, number_in

FILE = "calibration.json"

FloatArray = NDArray[np.float64]

_VERSION = 1
_MAX_POINTS = 20_000  # of all curves, so that the file can be read again, whatever the types
_FIX = "calibrate the model again, or remove the file"
_LARGEST = 1e6  # slope or intercept in a file; far above any that is fitted

# Probabilities closer to 0 or 1 count as this close.
_CLOSEST = 1e-6
# The probability of a word beside an entity that speaks neither for nor against it.
_BESIDE = 0.999

# What is believed of slopes, intercept and types' offsets before any entity is seen: they are
# normally distributed, with these means and precisions (1 / variance). By the means alone,
# confidence is the mean of the words' probabilities, as it is without a calibration.
_PRIOR = np.array([1.0, 1.0, 0.0, 0.0])
_PRECISION = np.array([1.0, 1.0, 1.0, 1.0])
_OFFSET_PRECISION = 4.0


@dataclass(frozen=True)
class Calibration:
    """What turns the evidence for entities into confidence; and what each threshold keeps.

    Of an entity with evidence (p, q), the log-odds that it is right are
    `slopes[0] * log(p) - slopes[1] * log(1 - p) - slopes[2] * log((1 - q) / 0.001) + intercept`
    and its type's offset. The first two terms are beta calibration (Kull, Silva Filho and Flach,
    2017), of which Platt's (1999) is the case of equal slopes. No slope is negative: more evidence
    is never less confidence.

    Attributes:
        slopes: See above.
        intercept: See above.
        offsets: By type; one that is not in it has none.
        overall: What thresholds keep of all entities of the split that it was fitted on.
        per_type: The same of each type's.
        num_entities: Predicted entities that it was fitted on.
        source: The file or dataset that they were predicted on.
        weights: `fingerprint` of the model that predicted them.
        decoding: How words were decided then; see `Reading`.
        word_decision: The same.
    """

    slopes: tuple[float, ...]
    intercept: float
    offsets: Mapping[str, float]
    overall: Curve
    per_type: Mapping[str, Curve]
    num_entities: int
    source: str
    weights: str
    decoding: str
    word_decision: str

    def apply(self, evidence: FloatArray, types: Sequence[str]) -> FloatArray:
        """Confidence of entities.

        Args:
            evidence: (n, 2) see `entity_evidence`.
            types: (n,) name of each one's type.

        Returns:
            (n,) probability that each is right; above 0 and below 1.

        Raises:
            ValueError: The evidence is not probabilities.
        """
        offsets = np.array([self.offsets.get(kind, 0.0) for kind in types], dtype=np.float64)
        return _sigmoid(_features(evidence) @ np.array([*self.slopes, self.intercept]) + offsets)

    def is_for(self, reading: Reading) -> bool:
        """Whether words are decided as those were that it was fitted on."""
        return (reading.decoding, reading.word_decision) == (self.decoding, self.word_decision)

    def threshold_for(
        self,
        kind: str | None = None,
        *,
        precision: float | None = None,
        recall: float | None = None,
    ) -> OperatingPoint:
        """The threshold that had a wanted precision or recall on the split it was fitted on.

        Args:
            kind: Entity type; None for one threshold over all.
            precision: For the smallest threshold with this share of right entities among those
                that it keeps; see `Curve.at_precision`.
            recall: For the largest threshold that keeps this share of the gold entities.

        Returns:
            The threshold, with the counts that it rests on.

        Raises:
            UsageError: There is none (the best that there is is named), or no such type.
        """
        if kind is not None and kind not in self.per_type:
            known = ", ".join(f"{name:.40}" for name in list(self.per_type)[:10])
            raise UsageError(
                f"no type {short(kind)} was calibrated, but {visible(known) or 'none'}"
            )
        curve = self.overall if kind is None else self.per_type[kind]
        try:
            if precision is not None and recall is None:
                return curve.at_precision(precision)
            if recall is not None and precision is None:
                return curve.at_recall(recall)
        except UsageError as error:
            of = "all types" if kind is None else visible(f"{kind:.40}")
            raise UsageError(f"{of} on {visible(self.source)}: {error}") from None
        raise UsageError("a threshold is for a precision or for a recall: give one of them")

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` makes the same calibration of it."""
        return {
            "version": _VERSION,
            "source": self.source,
            "num_entities": self.num_entities,
            "weights": self.weights,
            "decoding": self.decoding,
            "word_decision": self.word_decision,
            "slopes": list(self.slopes),
            "intercept": self.intercept,
            "overall": self.overall.to_dict(),
            "types": {
                kind: {"offset": self.offsets[kind], **curve.to_dict()}
                for kind, curve in self.per_type.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: object = None) -> Calibration:
        """Takes apart what `to_dict` made, and checks it.

        Args:
            values: From a file.
            path: The file, named in errors.

        Raises:
            ModelError: It is something else, or of another version.
        """
        version = values.get("version")
        if type(version) is int and version != _VERSION:
            raise ModelError(f"is of version {short(version)}, not {_VERSION}; {_FIX}", path)
        try:
            texts = [values[name] for name in ("source", "weights", "decoding", "word_decision")]
            types, slopes = values["types"], values["slopes"]
            if (
                type(version) is not int
                or not all(isinstance(text, str) for text in texts)
                or not isinstance(types, dict)
                or len(slopes) != len(_PRIOR) - 1
            ):
                raise ValueError("version, texts, types or slopes are not what they should be")
            return cls(
                tuple(number_in(slope, 0.0, _LARGEST) for slope in slopes),
                number_in(values["intercept"], -_LARGEST, _LARGEST),
                {k: number_in(v["offset"], -_LARGEST, _LARGEST) for k, v in types.items()},
                Curve.from_dict(values["overall"]),
                {kind: Curve.from_dict(value) for kind, value in types.items()},
                count_in(values["num_entities"]),
                *texts,
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else visible(str(error))
            raise ModelError(f"is no calibration, or damaged ({reason}); {_FIX}", path) from None

    def save(self, folder: str | Path) -> None:
        """Writes `calibration.json` into a model's folder.

        Raises:
            StorageError: The disk fails.
        """
        write_json(Path(folder) / FILE, self.to_dict())


def load(folder: str | Path) -> Calibration | None:
    """Reads the calibration of a model's folder; None if it has none.

    Raises:
        ModelError: The file is damaged.
    """
    path = Path(folder) / FILE
    if not lexists(path):
        return None
    try:
        values = read_json(path)
    except ModelError as error:
        raise ModelError(f"{error}; {_FIX}") from None
    return Calibration.from_dict(values, path)


def fingerprint(weight: ArrayLike, bias: ArrayLike) -> str:
    """Hash of a classifier's head: it tells weights apart that training has changed.

    The head is a few kilobytes, and no step of training leaves it as it is.

    Args:
        weight: (num_labels, D) as float32.
        bias: (num_labels,) as float32.
    """
    digest = hashlib.sha256()
    for array in (weight, bias):
        values = np.ascontiguousarray(array, dtype="<f4")
        digest.update(repr(values.shape).encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def entity_evidence(
    word_scores: NDArray[np.floating[Any]],
    starts: IntArray,
    ends: IntArray,
    sentence_starts: IntArray,
) -> FloatArray:
    """What words say for entities.

    Args:
        word_scores: (num_words,) probability of each word's label; NaN counts as 0.
        starts: (n,) first word of each entity.
        ends: (n,) word after its last one.
        sentence_starts: Indices at which sentences begin; the number of words may be among them.

    Returns:
        (n, 2) mean probability over an entity's words; and the smaller one of the two words beside
        it in its sentence, where none counts as 1.
    """
    scores = np.nan_to_num(np.asarray(word_scores, dtype=np.float64), nan=0.0)
    scores = np.concatenate([scores, [1.0]])
    # Every other part is an entity; those between them are not looked at.
    sums = np.add.reduceat(scores, np.stack([starts, ends], axis=1).ravel())[::2]
    before = np.where(np.isin(starts, sentence_starts), 1.0, scores[starts - 1])
    after = np.where(np.isin(ends, sentence_starts), 1.0, scores[ends])
    return np.stack([sums / (ends - starts), np.minimum(before, after)], axis=1)


def fit(
    evidence: FloatArray,
    types: Sequence[str],
    right: BoolArray,
    num_gold: Mapping[str, int],
    *,
    source: str,
    weights: str,
    reading: Reading,
) -> Calibration:
    """Fits a calibration to predicted entities.

    Few entities move it little from the probabilities as they are, and a type of few entities
    little from the others.

    Args:
        evidence: (n, 2) see `entity_evidence`.
        types: (n,) name of each one's type.
        right: (n,) whether there is a gold entity with the same borders and type.
        num_gold: Gold entities of each type.
        source: The file or dataset.
        weights: `fingerprint` of the model.
        reading: How it read.

    Raises:
        ValueError: The evidence is not probabilities, or shapes or counts do not fit.
    """
    names = sorted({*types, *num_gold})
    kinds, right = _indices(types, names), np.asarray(right, dtype=bool)
    parameters = _fit_parameters(evidence, kinds, len(names), right)
    confidence = _confidence(parameters, evidence, kinds)
    max_points = max(1, min(MAX_POINTS, _MAX_POINTS // (len(names) + 1)))

    def curve(of: BoolArray, gold: int) -> Curve:
        return Curve.of(confidence[of], right[of], gold, max_points)

    *slopes, intercept = parameters[: len(_PRIOR)].tolist()
    gold = [int(num_gold.get(name, 0)) for name in names]
    return Calibration(
        slopes=tuple(slopes),
        intercept=intercept,
        offsets=dict(zip(names, parameters[len(_PRIOR) :].tolist(), strict=True)),
        overall=curve(np.ones_like(right), sum(gold)),
        per_type={name: curve(kinds == k, gold[k]) for k, name in enumerate(names)},
        num_entities=len(right),
        source=source,
        weights=weights,
        decoding=reading.decoding,
        word_decision=reading.word_decision,
    )


def cross_validated_confidence(
    evidence: FloatArray,
    types: Sequence[str],
    right: BoolArray,
    groups: IntArray,
    folds: int = 5,
) -> FloatArray:
    """Confidence of the entities that one calibrates on, each by a fit that has not seen its group.

    So `reliability` can be told of the very split that a calibration is fitted on.

    Args:
        evidence: (n, 2) see `entity_evidence`.
        types: (n,) name of each one's type.
        right: (n,) whether there is a gold entity with the same borders and type.
        groups: (n,) number of each one's document, or of its sentence where there are none.
        folds: Parts that the groups are dealt out to in turn, in order of their numbers. There are
            no more than groups; with one group nothing is left to fit on.

    Returns:
        (n,) confidence.
    """
    names = sorted(set(types))
    kinds, right = _indices(types, names), np.asarray(right, dtype=bool)
    _, numbers = np.unique(groups, return_inverse=True)
    confidence = np.empty(len(right))
    for fold in range(folds):
        held_out = numbers % folds == fold
        seen = ~held_out
        parameters = _fit_parameters(evidence[seen], kinds[seen], len(names), right[seen])
        confidence[held_out] = _confidence(parameters, evidence[held_out], kinds[held_out])
    return confidence


def reliability(
    confidence: FloatArray, right: BoolArray, num_bins: int = 10, *, calibrated: bool
) -> dict[str, Any]:
    """How far confidence is what it says.

    Bins are equally wide, as in Guo et al. (2017), so that pictures of two models can be compared;
    those without entities are left out.

    Args:
        confidence: (n,) of entities.
        right: (n,) whether each is right.
        num_bins: Number of bins between 0 and 1.
        calibrated: Whether the confidence is a calibration's; it is only passed on.

    Returns:
        `num_entities`; `calibrated`; `brier`, the mean square of confidence minus outcome; `ece`,
        the expected calibration error: the mean over entities of how far their bin's mean
        confidence is from its precision; and for each of `bins` its `low` and `high` border,
        `count`, mean `confidence` and `precision`.
    """
    right = np.asarray(right, dtype=np.float64)
    bin_of = np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)
    bins = []
    for number in np.unique(bin_of).tolist():
        inside = bin_of == number
        bins.append(
            {
                "low": number / num_bins,
                "high": (number + 1) / num_bins,
                "count": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "precision": float(right[inside].mean()),
            }
        )
    gaps = [each["count"] * abs(each["confidence"] - each["precision"]) for each in bins]
    return {
        "num_entities": len(right),
        "calibrated": calibrated,
        "brier": float(np.mean((confidence - right) ** 2)) if len(right) else 0.0,
        "ece": sum(gaps) / max(len(right), 1),
        "bins": bins,
    }


def fit_logistic(
    features: FloatArray,
    kinds: IntArray,
    num_kinds: int,
    targets: FloatArray,
    prior: FloatArray,
    precision: FloatArray,
    offset_precision: float,
) -> FloatArray:
    """Logistic regression with a prior, by Newton's method.

    Args:
        features: (n, F).
        kinds: (n,) type of each, from 0.
        num_kinds: Number of types, K.
        targets: (n,) probabilities to meet.
        prior: (F,) mean of the coefficients before any entity is seen.
        precision: (F,) precision of each about that mean; above 0.
        offset_precision: The same of each type's offset, about 0.

    Returns:
        (F + K,) coefficients, then offsets.
    """
    size = len(prior)
    prior = np.append(prior, np.zeros(num_kinds))
    precision = np.append(precision, np.full(num_kinds, offset_precision))

    def odds_of(parameters: FloatArray) -> FloatArray:
        odds: FloatArray = features @ parameters[:size] + parameters[size:][kinds]
        return odds

    def loss_of(parameters: FloatArray) -> float:
        odds, distance = odds_of(parameters), parameters - prior
        return float(np.logaddexp(0, odds).sum() - odds @ targets + precision @ distance**2 / 2)

    def sum_kinds(values: FloatArray) -> FloatArray:
        return np.bincount(kinds, values, num_kinds).astype(np.float64)  # (K,)

    parameters = prior
    for _ in range(100):
        probabilities = _sigmoid(odds_of(parameters))
        error, weight = probabilities - targets, probabilities * (1 - probabilities)
        gradient = np.append(error @ features, sum_kinds(error)) + precision * (parameters - prior)
        # The Hessian is [[a, b], [b', c]] with a diagonal c, as no entity is of two types.
        a = (features.T * weight) @ features + np.diag(precision[:size])
        b = np.stack([sum_kinds(column * weight) for column in features.T])  # (F, K)
        c = sum_kinds(weight) + precision[size:]
        step = np.linalg.solve(a - b / c @ b.T, gradient[:size] - b / c @ gradient[size:])
        step = np.append(step, (gradient[size:] - step @ b) / c)
        loss = loss_of(parameters)
        while np.abs(step).max() > 1e-9 and loss_of(parameters - step) > loss:
            step /= 2  # far from the solution, a whole step may be too long
        parameters = parameters - step
        if np.abs(step).max() <= 1e-9:
            break
    return parameters


def _fit_parameters(
    evidence: FloatArray, kinds: IntArray, num_kinds: int, right: BoolArray
) -> FloatArray:
    """(4 + K,) slopes, intercept, offsets."""
    features = _features(evidence)
    if not len(features) == len(kinds) == len(right):
        raise ValueError(f"{len(features)} entities, {len(kinds)} types, {len(right)} outcomes")
    # Platt's targets: as if there were one more entity of each outcome.
    num_right = int(right.sum())
    targets = np.where(right, (num_right + 1) / (num_right + 2), 1 / (len(right) - num_right + 2))
    used = list(range(len(_PRIOR)))
    while True:
        fitted = fit_logistic(
            features[:, used],
            kinds,
            num_kinds,
            targets,
            _PRIOR[used],
            _PRECISION[used],
            _OFFSET_PRECISION,
        )
        slopes = fitted[: len(used) - 1]
        if np.all(slopes >= 0):
            break
        del used[int(slopes.argmin())]  # as beta calibration does: left out, and fitted again
    parameters = np.zeros(len(_PRIOR) + num_kinds)
    parameters[[*used, *range(len(_PRIOR), len(parameters))]] = fitted
    return parameters


def _confidence(parameters: FloatArray, evidence: FloatArray, kinds: IntArray) -> FloatArray:
    coefficients, offsets = parameters[: len(_PRIOR)], parameters[len(_PRIOR) :]
    return _sigmoid(_features(evidence) @ coefficients + offsets[kinds])


def _features(evidence: FloatArray) -> FloatArray:
    """(n, 4) what the slopes and the intercept are multiplied by."""
    if evidence.ndim != 2 or not np.all((evidence >= 0) & (evidence <= 1)):
        raise ValueError("the evidence for an entity is two probabilities")
    inside, beside = evidence.T
    return np.stack(
        [
            np.log(np.maximum(inside, _CLOSEST)),
            -np.log(np.maximum(1 - inside, _CLOSEST)),
            -np.log(np.maximum(1 - beside, _CLOSEST) / (1 - _BESIDE)),
            np.ones_like(inside),
        ],
        axis=1,
    )


def _sigmoid(odds: FloatArray) -> FloatArray:
    # Beyond 30, neighbouring numbers give the same probability, and soon 0 or 1.
    probabilities: FloatArray = 1 / (1 + np.exp(-np.clip(odds, -30, 30)))
    return probabilities


def _indices(types: Sequence[str], names: Sequence[str]) -> IntArray:
    number = {name: k for k, name in enumerate(names)}
    return np.array([number[kind] for kind in types], dtype=np.int64)
