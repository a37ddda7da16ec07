"""What a model gets right and wrong, entity by entity: more than one number.

Gold and predicted entities are matched one to one; all counts by kind of error, by type, by length
and by what the training data hold follow from that. Everything is at word level.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertner.corpus import Corpus, Sentences
from bertner.errors import UsageError
from bertner.labels import IntArray, LabelSet, Spans, find_spans, from_iob2, strict_spans
from bertner.metrics import EntityScores, Score, count_entities
from bertner.significance import LEVEL, Difference, Intervals, bootstrap, compare

# What can become of an entity. "type": the right words, another type; "boundary": other words that
# overlap, the right type. Each gold and each predicted entity is in one pair at most; what is in
# none was missed, or is spurious.
KINDS = ("correct", "type", "boundary", "boundary and type", "missed", "spurious")
CORRECT, TYPE, BOUNDARY, BOUNDARY_AND_TYPE, MISSED, SPURIOUS = range(len(KINDS))

# How the evaluations of MUC and SemEval-2013 task 9 count each kind: correct, incorrect or partial.
_MUC = {
    "strict": {CORRECT: "correct"},
    "exact": {CORRECT: "correct", TYPE: "correct"},
    "partial": {
        CORRECT: "correct",
        TYPE: "correct",
        BOUNDARY: "partial",
        BOUNDARY_AND_TYPE: "partial",
    },
    "type": {CORRECT: "correct", BOUNDARY: "correct"},
}

LENGTHS = ("1", "2", "3", "4+")
FAMILIARITY = ("seen", "other type", "unseen")

# Fewer documents than this say little of how documents vary; then sentences are drawn again.
_MIN_DOCUMENTS = 30

# Types of the entities of a training corpus by their words.
Inventory = Mapping[tuple[str, ...], AbstractSet[str]]


@dataclass(frozen=True)
class Prediction:
    """A tag for every word of a corpus, whoever gave it.

    Attributes:
        prefixes: (num_words,) prefix codes.
        types: (num_words,) number of each word's entity type, -1 for O.
        type_names: What the numbers mean.
        scheme: Tag scheme, by which strict scores are made.
        confidence: (num_entities,) of each entity, in order; None if there is none.
    """

    prefixes: IntArray
    types: IntArray
    type_names: tuple[str, ...]
    scheme: str
    confidence: NDArray[np.floating[Any]] | None = None

    @classmethod
    def of_labels(cls, labels: IntArray, label_set: LabelSet) -> Prediction:
        """What a model says: (num_words,) label ids."""
        prefixes, types = label_set.prefix_of[labels], label_set.type_of[labels]
        return cls(prefixes, types, label_set.types, label_set.scheme)

    def spans(self, starts: IntArray) -> Spans:
        """Its entities, by conlleval's rule; sentences begin at `starts`."""
        return find_spans(self.prefixes, self.types, starts)


@dataclass(frozen=True)
class Matching:
    """Which gold entity belongs to which predicted one, in order of their words.

    Attributes:
        true: (num_matches,) index of the gold entity; -1 for a spurious one.
        found: (num_matches,) index of the predicted entity; -1 for a missed one.
        kinds: (num_matches,) index into `KINDS`.
    """

    true: IntArray
    found: IntArray
    kinds: IntArray


def match_entities(true: Spans, found: Spans) -> Matching:
    """Pairs gold entities with predicted ones that share words with them.

    The same words go first; then the same type, then more words in common. Every entity is in one
    pair at most.
    """
    # The entities found that overlap a gold one stand side by side: `low` to `high`.
    low = np.searchsorted(found.end, true.start, side="right")
    high = np.searchsorted(found.start, true.end, side="left")
    counts = np.maximum(high - low, 0)
    at_true = np.repeat(np.arange(len(true)), counts)
    at_found = np.arange(counts.sum()) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    same_type = true.type[at_true] == found.type[at_found]
    first = np.maximum(true.start[at_true], found.start[at_found])
    last = np.minimum(true.end[at_true], found.end[at_found])
    same_words = (true.start[at_true] == found.start[at_found]) & (
        true.end[at_true] == found.end[at_found]
    )
    found_of = np.full(len(true), -1, dtype=np.int64)
    is_taken = np.zeros(len(found), dtype=bool)
    for pair in np.lexsort((at_true, first - last, ~same_type, ~same_words)):
        t, f = at_true[pair], at_found[pair]
        if found_of[t] < 0 and not is_taken[f]:
            found_of[t], is_taken[f] = f, True

    pair_of = np.flatnonzero(found_of >= 0)
    partner = found_of[pair_of]
    other_words = (true.start[pair_of] != found.start[partner]) | (
        true.end[pair_of] != found.end[partner]
    )
    other_type = true.type[pair_of] != found.type[partner]
    missed, spurious = np.flatnonzero(found_of < 0), np.flatnonzero(~is_taken)
    all_true = np.concatenate([pair_of, missed, np.full(len(spurious), -1)])
    all_found = np.concatenate([partner, np.full(len(missed), -1), spurious])
    kinds = np.concatenate(
        [
            BOUNDARY * other_words + TYPE * other_type,
            np.full(len(missed), MISSED),
            np.full(len(spurious), SPURIOUS),
        ]
    )
    begin = np.concatenate([true.start[pair_of], true.start[missed], found.start[spurious]])
    order = np.argsort(begin, kind="stable")
    return Matching(all_true[order], all_found[order], kinds[order])


def take_inventory(blocks: Iterable[Sentences], type_names: Sequence[str]) -> Inventory:
    """The types that each entity of a training corpus has there, by its words.

    Args:
        blocks: The corpus, in parts of any size.
        type_names: Of its types; may grow with each block.
    """
    inventory: dict[tuple[str, ...], set[str]] = {}
    for block in blocks:
        spans = find_spans(block.prefixes, block.types, block.starts[:-1])
        for words, kind in zip(_texts(block, spans), spans.type, strict=True):
            inventory.setdefault(words, set()).add(type_names[kind])
    return inventory


def familiarity(
    sentences: Sentences, spans: Spans, type_names: Sequence[str], inventory: Inventory
) -> IntArray:
    """(num_spans,) index into `FAMILIARITY` of each entity.

    Args:
        sentences: That the entities are in.
        spans: The entities.
        type_names: Of their types.
        inventory: What the training data hold.
    """
    known = (inventory.get(words, ()) for words in _texts(sentences, spans))
    return np.array(
        [
            0 if type_names[kind] in types else 1 if types else 2
            for types, kind in zip(known, spans.type, strict=True)
        ],
        dtype=np.int64,
    )


def _texts(sentences: Sentences, spans: Spans) -> list[tuple[str, ...]]:
    return [
        tuple(sentences.words[start:end])
        for start, end in zip(spans.start.tolist(), spans.end.tolist(), strict=True)
    ]


def bootstrap_unit(corpus: Corpus, wanted: str = "auto") -> str:
    """See `Analysis.unit`."""
    num_documents = corpus.num_documents if corpus.marks_documents else 0
    if wanted == "auto":
        return "document" if num_documents >= _MIN_DOCUMENTS else "sentence"
    if wanted == "document" and num_documents < 2:
        raise UsageError(
            f"bootstrap_unit document: {corpus.source} does not tell documents apart (-DOCSTART- "
            "lines, or a column document_id); draw sentences"
        )
    return wanted


@dataclass(frozen=True)
class Analysis:
    """A prediction held against a corpus.

    Attributes:
        corpus: The data.
        prediction: With types numbered as `type_names` has them.
        type_names: Entity types of both, sorted.
        true: Gold entities.
        found: Predicted entities.
    """

    corpus: Corpus
    prediction: Prediction
    type_names: tuple[str, ...]
    true: Spans
    found: Spans

    @cached_property
    def matching(self) -> Matching:
        """Which gold entity belongs to which predicted one."""
        return match_entities(self.true, self.found)

    @cached_property
    def word(self) -> EntityScores:
        """Scores by conlleval's rule, which is lenient: an entity may begin with I."""
        return self._scores(self.found, self.true)

    @cached_property
    def strict(self) -> EntityScores:
        """Scores by seqeval's strict rule: only what is written as its scheme has it counts."""
        corpus, starts = self.corpus, self.corpus.starts[:-1]
        prediction = self.prediction
        return self._scores(
            strict_spans(prediction.prefixes, prediction.types, starts, prediction.scheme),
            strict_spans(corpus.raw_prefixes, self._true_types, starts, corpus.scheme),
        )

    def _scores(self, found: Spans, true: Spans) -> EntityScores:
        overall, per_type = count_entities(found, true, self.type_names)
        corpus, prediction = self.corpus, self.prediction
        # Gold tags as the prediction's scheme has them, as for a model's loss.
        prefixes = from_iob2(corpus.prefixes, corpus.types, corpus.starts[:-1], prediction.scheme)
        same = (prefixes == prediction.prefixes) & (self._true_types == prediction.types)
        return EntityScores(overall, per_type, _mean(same), corpus.num_words)

    @cached_property
    def _true_types(self) -> IntArray:
        return _renumbered(self.corpus.types, self.corpus.type_names, self.type_names)

    @cached_property
    def tokens(self) -> EntityScores:
        """Scores of single words: whether each is of an entity of its type, borders aside."""
        true, found, size = self._true_types, self.prediction.types, len(self.type_names)
        same = true == found
        counts = [np.bincount(k[k >= 0], minlength=size) for k in (true[same], found, true)]
        per_type = {
            name: Score(*(int(count[k]) for count in counts))
            for k, name in enumerate(self.type_names)
            if counts[1][k] or counts[2][k]
        }
        overall = Score(*(int(count.sum()) for count in counts))
        return EntityScores(overall, per_type, _mean(same), len(true))

    def muc(self) -> dict[str, dict[str, float]]:
        """The four ways of MUC and SemEval-2013 to count partial matches."""
        counts = np.bincount(self.matching.kinds, minlength=len(KINDS))
        return {name: _muc_scores(counts, ways) for name, ways in _MUC.items()}

    def errors(self) -> IntArray:
        """(num_types, num_kinds) entities of each type and kind; spurious ones by their own."""
        matching = self.matching
        table = np.zeros((len(self.type_names), len(KINDS)), dtype=np.int64)
        is_gold = matching.true >= 0
        kinds = np.empty(len(is_gold), dtype=np.int64)
        kinds[is_gold] = self.true.type[matching.true[is_gold]]
        kinds[~is_gold] = self.found.type[matching.found[~is_gold]]
        np.add.at(table, (kinds, matching.kinds), 1)
        return table

    def confusion(self) -> IntArray:
        """(num_types + 1, num_types + 1) pairs by gold and predicted type; the last is none."""
        size, matching = len(self.type_names), self.matching
        table = np.zeros((size + 1, size + 1), dtype=np.int64)
        rows = np.append(self.true.type, size)[matching.true]
        columns = np.append(self.found.type, size)[matching.found]
        np.add.at(table, (rows, columns), 1)
        return table

    def by_length(self) -> dict[str, Score]:
        """Scores of entities of one word, two, three, and more."""
        found, true = (
            np.minimum(spans.end - spans.start, len(LENGTHS)) - 1
            for spans in (self.found, self.true)
        )
        return dict(zip(LENGTHS, self._split(found, true, len(LENGTHS)), strict=True))

    def by_training(self, inventory: Inventory) -> dict[str, Score]:
        """Scores of entities that the training data have, have with another type, or have not."""
        found, true = (
            familiarity(self.corpus, spans, self.type_names, inventory)
            for spans in (self.found, self.true)
        )
        parts = self._split(found, true, len(FAMILIARITY))
        return dict(zip(FAMILIARITY, parts, strict=True))

    def _split(self, of_found: IntArray, of_true: IntArray, size: int) -> list[Score]:
        """Scores of parts of the entities, of which each side's arrays say which."""
        correct = self.matching.true[self.matching.kinds == CORRECT]
        counts = [np.bincount(k, minlength=size) for k in (of_true[correct], of_found, of_true)]
        return [Score(*map(int, part)) for part in zip(*counts, strict=True)]

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """(num_found,) whether each predicted entity is right, in borders and type."""
        right = np.zeros(len(self.found), dtype=bool)
        right[self.matching.found[self.matching.kinds == CORRECT]] = True
        return right

    def sentence_of(self, spans: Spans) -> IntArray:
        """(num_spans,) sentence that each entity is in."""
        return np.searchsorted(self.corpus.starts, spans.start, side="right") - 1

    def unit(self, wanted: str = "auto") -> str:
        """What is drawn again for intervals: "document" or "sentence".

        Args:
            wanted: One of them, or "auto" for documents if the data mark 30 or more.

        Raises:
            UsageError: There are no documents to draw.
        """
        return bootstrap_unit(self.corpus, wanted)

    def units(self, unit: str) -> IntArray:
        """(num_sentences,) number of the document or sentence that each sentence is."""
        if unit == "sentence":
            return np.arange(self.corpus.num_sentences)
        numbers: IntArray = np.unique(self.corpus.documents, return_inverse=True)[1]
        return numbers

    def with_confidence(self, confidence: NDArray[np.floating[Any]]) -> Analysis:
        """The same with a confidence, (num_found,), of each predicted entity."""
        return replace(self, prediction=replace(self.prediction, confidence=confidence))

    def counts(self, unit: str) -> IntArray:
        """(num_units, num_types, 3) correct, predicted and gold entities, as `significance` has it.

        Args:
            unit: "document" or "sentence".
        """
        units = self.units(unit)
        table = np.zeros((int(units.max()) + 1, len(self.type_names), 3), dtype=np.int64)
        right = self.is_right
        correct = Spans(self.found.start[right], self.found.end[right], self.found.type[right])
        for k, spans in enumerate((correct, self.found, self.true)):
            np.add.at(table[..., k], (units[self.sentence_of(spans)], spans.type), 1)
        return table

    def sentences(self, other: Analysis | None = None) -> Iterator[dict[str, Any]]:
        """Each sentence with its entities, as JSON values; see `to_dict` for the rest.

        Args:
            other: Another model's prediction of the same corpus, to stand beside.
        """
        corpus, matching = self.corpus, self.matching
        # Where a match stands: its gold entity, or else its predicted one.
        place = np.where(
            matching.true >= 0,
            np.append(self.true.start, 0)[matching.true],
            np.append(self.found.start, 0)[matching.found],
        )
        pairs = zip(matching.true.tolist(), matching.found.tolist(), matching.kinds, strict=True)
        matches = self._by_sentence(place, [[t, f, KINDS[kind]] for t, f, kind in pairs])
        gold = self._by_sentence(self.true.start, _rows(self.true, self.type_names))
        predicted = self._by_sentence(self.found.start, self._predicted_rows())
        others: Iterator[list[Any]] = repeat([])
        if other is not None:
            others = self._by_sentence(other.found.start, other._predicted_rows())
        num_true = num_found = 0  # in the sentences before
        for k, (own_gold, own_predicted, own_matches, own_others) in enumerate(
            zip(gold, predicted, matches, others, strict=False)
        ):
            offset = int(corpus.starts[k])
            sentence = {
                "line": int(corpus.lines[offset]),
                "document": int(corpus.documents[k]),
                "words": corpus.sentence(k),
                "gold": _moved(own_gold, offset),
                "predicted": _moved(own_predicted, offset),
                "matches": [
                    [t - num_true if t >= 0 else -1, f - num_found if f >= 0 else -1, kind]
                    for t, f, kind in own_matches
                ],
            }
            if other is not None:
                sentence["other"] = _moved(own_others, offset)
            yield sentence
            num_true, num_found = num_true + len(own_gold), num_found + len(own_predicted)

    def _by_sentence(self, begins: IntArray, rows: list[Any]) -> Iterator[list[Any]]:
        """The rows of each sentence, in which their words `begins` are."""
        bounds = np.searchsorted(begins, self.corpus.starts).tolist()
        return (rows[begin:end] for begin, end in pairwise(bounds))

    def _predicted_rows(self) -> list[list[Any]]:
        """Words, type and confidence of each predicted entity."""
        confidence = self.prediction.confidence
        values = repeat(None) if confidence is None else (round(float(c), 4) for c in confidence)
        rows = _rows(self.found, self.type_names)
        return [[*row, value] for row, value in zip(rows, values, strict=False)]

    def to_dict(
        self,
        *,
        unit: str = "auto",
        samples: int = 2000,
        seed: int = 42,
        inventory: Inventory | None = None,
    ) -> dict[str, Any]:
        """All of it but the sentences, as JSON values.

        Args:
            unit: What is drawn again for intervals: "document", "sentence" or "auto".
            samples: How many times; 0 for no intervals.
            seed: Of the draws.
            inventory: What the training data hold, for scores of seen and unseen entities.
        """
        unit, names = self.unit(unit), self.type_names
        levels = {
            name: level_to_dict(scores)
            for name, scores in (
                ("word", self.word),
                ("word_strict", self.strict),
                ("tokens", self.tokens),
            )
        }
        if samples:
            intervals = bootstrap(self.counts(unit), samples, seed)
            for k, name in enumerate(names):
                if name in levels["word"]["per_type"]:
                    levels["word"]["per_type"][name]["intervals"] = _bounds(intervals, k)
            levels["word"]["overall"]["intervals"] = _bounds(intervals, len(names))
        errors = self.errors()
        return {
            "source": self.corpus.source,
            "num_documents": self.corpus.num_documents,
            "num_sentences": self.corpus.num_sentences,
            "num_words": self.corpus.num_words,
            "levels": levels,
            "bootstrap": {"unit": unit, "samples": samples, "seed": seed, "level": LEVEL},
            "muc": self.muc(),
            "errors": {
                "counts": dict(zip(KINDS, errors.sum(0).tolist(), strict=True)),
                "per_type": {
                    name: dict(zip(KINDS, row.tolist(), strict=True))
                    for name, row in zip(names, errors, strict=True)
                },
            },
            "confusion": {"types": list(names), "counts": self.confusion().tolist()},
            "by_training": None
            if inventory is None
            else {k: score_to_dict(s) for k, s in self.by_training(inventory).items()},
            "by_length": {k: score_to_dict(s) for k, s in self.by_length().items()},
        }


def analyse(corpus: Corpus, prediction: Prediction) -> Analysis:
    """Holds a prediction against the corpus that it is of."""
    if len(prediction.types) != corpus.num_words:
        raise ValueError(f"{len(prediction.types)} tags for {corpus.num_words} words")
    names = tuple(sorted({*corpus.type_names, *prediction.type_names}))
    types = _renumbered(prediction.types, prediction.type_names, names)
    prediction = replace(prediction, types=types, type_names=names)
    starts = corpus.starts[:-1]
    true_types = _renumbered(corpus.types, corpus.type_names, names)
    return Analysis(
        corpus,
        prediction,
        names,
        true=find_spans(corpus.prefixes, true_types, starts),
        found=prediction.spans(starts),
    )


def compare_analyses(
    first: Analysis, second: Analysis, *, unit: str = "auto", samples: int = 2000, seed: int = 42
) -> dict[str, Any]:
    """What tells two models apart on the same corpus, as JSON values.

    Args:
        first: The one.
        second: The other; differences are the first's scores less its.
        unit: What is drawn again and swapped: "document", "sentence" or "auto".
        samples: How many times.
        seed: Of the draws.
    """
    names = tuple(sorted({*first.type_names, *second.type_names}))
    unit = first.unit(unit)
    ours, theirs = (_aligned(a.counts(unit), a.type_names, names) for a in (first, second))
    result = compare(ours, theirs, samples, seed)
    said = [{tuple(row) for row in _rows(each.found, each.type_names)} for each in (first, second)]
    places = [start for start, _, _ in said[0] ^ said[1]]
    differ = np.unique(np.searchsorted(first.corpus.starts, places, side="right"))
    kinds = {**first.word.per_type, **second.word.per_type}
    return {
        "metric": "f1",
        "unit": unit,
        "samples": samples,
        "seed": seed,
        "level": LEVEL,
        "num_differ": len(differ),
        **_difference(result, len(names)),
        "per_type": {name: _difference(result, k) for k, name in enumerate(names) if name in kinds},
    }


def level_to_dict(scores: EntityScores) -> dict[str, Any]:
    """Scores of one level as JSON values."""
    return {
        "overall": score_to_dict(scores.overall),
        "per_type": {name: score_to_dict(score) for name, score in scores.per_type.items()},
        "accuracy": scores.accuracy,
        "num_labels": scores.num_labels,
    }


def score_to_dict(score: Score) -> dict[str, Any]:
    """A score and its counts as JSON values."""
    return {
        "precision": score.precision,
        "recall": score.recall,
        "f1": score.f1,
        "num_correct": score.num_correct,
        "num_predicted": score.num_predicted,
        "num_gold": score.num_gold,
    }


def _muc_scores(counts: IntArray, ways: Mapping[int, str]) -> dict[str, float]:
    pairs = (CORRECT, TYPE, BOUNDARY, BOUNDARY_AND_TYPE)
    result: dict[str, float] = {
        way: sum(int(counts[k]) for k in pairs if ways.get(k, "incorrect") == way)
        for way in ("correct", "incorrect", "partial")
    }
    result["missed"], result["spurious"] = int(counts[MISSED]), int(counts[SPURIOUS])
    num_pairs = sum(int(counts[k]) for k in pairs)
    credit = result["correct"] + result["partial"] / 2
    num_gold, num_found = num_pairs + result["missed"], num_pairs + result["spurious"]
    result["precision"] = credit / num_found if num_found else 0.0
    result["recall"] = credit / num_gold if num_gold else 0.0
    both = num_found + num_gold
    return {**result, "f1": 2 * credit / both if both else 0.0}


def _renumbered(types: IntArray, old: Sequence[str], new: Sequence[str]) -> IntArray:
    """(num_words,) the same types, numbered as `new` has them."""
    # The last element is for O, whose type is -1.
    number = np.array([*(new.index(name) for name in old), -1], dtype=np.int64)
    return number[types]


def _aligned(counts: IntArray, old: Sequence[str], new: Sequence[str]) -> IntArray:
    aligned = np.zeros((len(counts), len(new), 3), dtype=np.int64)
    aligned[:, [new.index(name) for name in old]] = counts
    return aligned


def _mean(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _bounds(intervals: Intervals, k: int) -> dict[str, list[float]]:
    return {name: values[k].tolist() for name, values in vars(intervals).items()}


def _difference(result: Difference, k: int) -> dict[str, Any]:
    return {
        "difference": float(result.f1[k]),
        "interval": result.interval[k].tolist(),
        "p_value": float(result.p_value[k]),
    }


def _rows(spans: Spans, type_names: Sequence[str]) -> list[list[Any]]:
    """First word, word after the last, and type of each entity."""
    kinds = [type_names[k] for k in spans.type]
    return [list(row) for row in zip(spans.start.tolist(), spans.end.tolist(), kinds, strict=True)]


def _moved(entities: list[list[Any]], offset: int) -> list[list[Any]]:
    return [[start - offset, end - offset, *rest] for start, end, *rest in entities]
