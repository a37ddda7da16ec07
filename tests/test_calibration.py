"""Confidence: monotone, between 0 and 1, true on data that it can be true on, kept without loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertner.calibration import (
    Calibration,
    cross_validated_confidence,
    entity_evidence,
    fingerprint,
    fit,
    fit_logistic,
    load,
    reliability,
)
from bertner.config import Reading
from bertner.errors import ModelError
from tests.test_house import modules_after

some = settings(max_examples=30, deadline=None)

TYPES = ("LOC", "MISC", "PER")


def calibrate(
    evidence: np.ndarray,
    types: list[str],
    right: np.ndarray,
    num_gold: Mapping[str, int] | None = None,
) -> Calibration:
    if num_gold is None:
        num_gold = {kind: types.count(kind) for kind in types}
    return fit(evidence, types, right, num_gold, source="dev.txt", weights="", reading=Reading())


def beside(scores: Any, others: float = 0.999) -> np.ndarray:
    """Evidence of entities with these scores, between words that speak neither for nor against."""
    return np.stack([np.asarray(scores, float), np.full(len(scores), others)], axis=1)


@st.composite
def predictions(draw: st.DrawFn) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(evidence, types, right) of no entity, one or some: at the extremes too, right or wrong."""
    probability = st.one_of(
        st.floats(0, 1), st.sampled_from([0.0, 1.0, 0.5, 1e-300, 1 - 1e-16, 0.9999, 0.99])
    )
    rows = draw(
        st.lists(
            st.tuples(probability, probability, st.sampled_from(TYPES), st.booleans()), max_size=40
        )
    )
    right = [row[3] for row in rows]
    if outcome := draw(st.sampled_from(["all right", "all wrong", "", "", ""])):
        right = [outcome == "all right"] * len(rows)
    evidence = np.array([row[:2] for row in rows], dtype=float).reshape(-1, 2)
    return evidence, [row[2] for row in rows], np.array(right, dtype=bool)


def test_evidence_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.4, 0.7, 0.6, 1.0, 0.5], dtype=np.float32)
    starts, ends = np.array([0, 2, 3, 5, 6]), np.array([2, 3, 5, 6, 7])
    expected = [
        [0.85, 0.4],  # at the beginning of a sentence
        [0.4, 0.7],  # between two others
        [0.65, 0.4],  # the word after it is another sentence's
        [1.0, 0.5],  # nor is the word before it of its sentence
        [0.5, 1.0],  # at the end of the last sentence
    ]
    for sentence_starts in ([0, 5], [0, 5, 7], [0, 0, 5, 5, 7]):
        evidence = entity_evidence(scores, starts, ends, np.array(sentence_starts))
        np.testing.assert_allclose(evidence, expected, rtol=1e-6)
    alone = entity_evidence(scores, np.array([3]), np.array([4]), np.arange(8))
    np.testing.assert_allclose(alone, [[0.7, 1.0]], rtol=1e-6)


def test_evidence_of_nothing_and_of_broken_scores() -> None:
    none = np.zeros(0, dtype=np.int64)
    assert entity_evidence(np.ones(4), none, none, np.array([0])).shape == (0, 2)
    assert entity_evidence(np.ones(0), none, none, none).shape == (0, 2)
    scores = np.array([np.nan, 1.0, np.nan])
    found = entity_evidence(scores, np.array([0]), np.array([2]), np.array([0]))
    assert found.tolist() == [[0.5, 0.0]]


@some
@given(predictions())
def test_confidence_is_a_probability_and_monotone(case: tuple[Any, ...]) -> None:
    calibration = calibrate(*case)
    assert min(calibration.slopes) >= 0
    grid = [0.0, 1e-9, 0.01, 0.2, 0.5, 0.9, 0.99, 0.9999, 1 - 1e-9, 1.0]
    for kind in (*TYPES, "never seen"):
        table = np.array(
            [[calibration.apply(np.array([[p, q]]), [kind])[0] for q in grid] for p in grid]
        )
        assert np.all((table > 0) & (table < 1))
        for axis in (0, 1):
            assert np.all(np.diff(table, axis=axis) >= 0)


@some
@given(predictions(), st.randoms(use_true_random=False))
def test_the_order_of_entities_is_nothing(case: tuple[Any, ...], random: Any) -> None:
    evidence, types, right = case
    order = list(range(len(types)))
    random.shuffle(order)
    shuffled = (evidence[order], [types[k] for k in order], right[order])
    a, b = calibrate(*case), calibrate(*shuffled)
    np.testing.assert_allclose([*a.slopes, a.intercept], [*b.slopes, b.intercept], atol=1e-6)
    groups = np.arange(len(types)) // 3
    np.testing.assert_allclose(
        cross_validated_confidence(*case, groups)[order],
        cross_validated_confidence(*shuffled, groups[order]),
        atol=1e-6,
    )


@some
@given(predictions())
def test_nothing_is_lost_in_json(case: tuple[Any, ...]) -> None:
    calibration = calibrate(*case)
    again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict(), allow_nan=False)))
    assert again == calibration
    assert again.apply(*case[:2]).tolist() == calibration.apply(*case[:2]).tolist()


def test_without_entities_confidence_is_the_score_as_it_is() -> None:
    scores = np.array([0.01, 0.3, 0.9, 0.9999])
    calibration = calibrate(beside([]), [], np.zeros(0, bool))
    for evidence in (beside(scores), beside(scores, 0.2)):
        np.testing.assert_allclose(calibration.apply(evidence, ["PER"] * 4), scores, rtol=1e-9)
    assert calibration.num_entities == 0
    assert calibration.offsets == {}
    assert reliability(np.zeros(0), np.zeros(0, bool), calibrated=True) == {
        "num_entities": 0, "calibrated": True, "brier": 0.0, "ece": 0.0, "bins": []
    }  # fmt: skip


def test_one_entity_moves_confidence_a_little() -> None:
    for outcome in (False, True):
        calibration = calibrate(beside([0.8]), ["PER"], np.array([outcome]))
        (confidence,) = calibration.apply(beside([0.8]), ["PER"])
        assert 0.4 < confidence < 0.9
        assert (confidence > 0.8) == outcome or abs(confidence - 0.8) < 0.1


def test_all_right_and_all_wrong() -> None:
    scores = np.linspace(0.3, 0.999, 500)
    for outcome in (False, True):
        right = np.full(500, outcome)
        confidence = calibrate(beside(scores), ["PER"] * 500, right).apply(
            beside(scores), ["PER"] * 500
        )
        assert np.all(confidence > 0.97) if outcome else np.all(confidence < 0.03)


def draw(true: np.ndarray, seed: int = 0) -> np.ndarray:
    """Whether each is right, with these probabilities."""
    return np.asarray(np.random.default_rng(seed).random(len(true)) < true)


def test_what_is_calibrated_stays_so() -> None:
    scores = 1 / (1 + np.exp(-np.random.default_rng(1).normal(1.5, 2, 20_000)))
    calibration = calibrate(beside(scores), ["PER"] * 20_000, draw(scores))
    np.testing.assert_allclose(calibration.slopes[:2], [1, 1], atol=0.08)
    assert abs(calibration.intercept + calibration.offsets["PER"]) < 0.08


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_overconfidence_is_put_right(factor: float) -> None:
    odds = np.random.default_rng(2).normal(1, 1.2, 20_000)
    true, said = 1 / (1 + np.exp(-odds)), 1 / (1 + np.exp(-factor * odds - 0.7))
    confidence = calibrate(beside(said), ["PER"] * 20_000, draw(true)).apply(
        beside(said), ["PER"] * 20_000
    )
    assert np.abs(said - true).mean() > 0.08
    assert np.abs(confidence - true).mean() < 0.01


def test_the_words_beside_count() -> None:
    rng = np.random.default_rng(3)
    evidence = np.stack([rng.uniform(0.6, 0.99, 8000), rng.choice([0.55, 0.9999], 8000)], axis=1)
    true = np.where(evidence[:, 1] < 0.9, 0.4, 0.95)
    confidence = calibrate(evidence, ["PER"] * 8000, draw(true)).apply(evidence, ["PER"] * 8000)
    for value, share in ((0.55, 0.4), (0.9999, 0.95)):
        assert abs(confidence[evidence[:, 1] == value].mean() - share) < 0.02


def test_types_have_offsets_and_rare_ones_stay_with_the_rest() -> None:
    scores = np.random.default_rng(4).uniform(0.5, 0.99, 6000)
    types = ["PER" if k % 2 else "ORG" for k in range(6000)]
    true = np.where(np.array(types) == "PER", 0.95, 0.6)
    right = draw(true)
    types += ["RARE"] * 2
    evidence, right = beside([*scores, 0.8, 0.8]), np.append(right, [False, False])
    calibration = calibrate(evidence, types, right)
    confidence = calibration.apply(evidence, types)
    for kind, share in (("PER", 0.95), ("ORG", 0.6)):
        assert abs(confidence[np.array(types) == kind].mean() - share) < 0.02
    per, rare, unknown, org = calibration.apply(beside([0.8] * 4), ["PER", "RARE", "NEW", "ORG"])
    assert org < rare < unknown < per
    assert unknown - rare < 0.1


def test_the_fit_is_the_optimum_of_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    features, kinds = rng.normal(size=(60, 3)) * [1, 5, 1], rng.integers(0, 4, 60)
    targets, prior = rng.random(60), np.array([1.0, -2.0, 0.5])
    precision = np.array([0.3, 2.0, 1.0])

    def loss(parameters: np.ndarray) -> float:
        odds = features @ parameters[:3] + parameters[3:][kinds]
        cross_entropy = np.log1p(np.exp(odds)) - targets * odds
        penalty = precision @ (parameters[:3] - prior) ** 2 + 4 * (parameters[3:] ** 2).sum()
        return float(cross_entropy.sum() + penalty / 2)

    solve, steps = np.linalg.solve, []
    monkeypatch.setattr(np.linalg, "solve", lambda *args: steps.append(solve(*args)) or steps[-1])
    found = fit_logistic(features, kinds, 5, targets, prior, precision, 4.0)
    assert len(steps) < 12, "Newton's method takes few steps, or its Hessian is wrong"
    assert found.shape == (8,)
    assert found[7] == 0.0  # of the type that no entity has
    for change in (*np.eye(8), *-np.eye(8), *rng.normal(size=(20, 8))):
        assert loss(found + 1e-3 * change) > loss(found)
    slope = [(loss(found + 1e-5 * e) - loss(found - 1e-5 * e)) / 2e-5 for e in np.eye(8)]
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_folds_hold_out_what_they_score() -> None:
    rng = np.random.default_rng(6)
    evidence, types = beside(rng.random(300)), rng.choice(TYPES, 300).tolist()
    right, groups = draw(evidence[:, 0]), rng.integers(100, 130, 300)
    confidence = cross_validated_confidence(evidence, types, right, groups)
    fold = groups == 107  # and with it all of its fold
    changed = np.where(fold, ~right, right)
    again = cross_validated_confidence(evidence, types, changed, groups)
    assert again[fold].tolist() == confidence[fold].tolist()
    assert np.any(again != confidence)
    # Group numbers 100, 101, ... are dealt out in turn, so these are the fold of 107.
    in_fold = (groups - 100) % 5 == 2
    kinds = [kind for kind, held_out in zip(types, in_fold, strict=True) if not held_out]
    others = calibrate(evidence[~in_fold], kinds, right[~in_fold])
    np.testing.assert_allclose(
        confidence, np.where(in_fold, others.apply(evidence, types), confidence)
    )
    # With one group there is nothing to fit on.
    alone = cross_validated_confidence(evidence, types, right, np.zeros(300, int))
    np.testing.assert_allclose(alone, evidence[:, 0].clip(1e-6, 1 - 1e-6))


def test_reliability_of_known_numbers() -> None:
    confidence = np.array([0.0, 0.05, 0.1, 0.72, 0.78, 0.78, 0.78, 1.0])
    right = np.array([False, True, False, True, True, False, False, True])
    report = reliability(confidence, right, calibrated=False)
    assert report["num_entities"] == 8
    assert report["calibrated"] is False
    rows = [tuple(each.values()) for each in report["bins"]]
    expected = [
        (0.0, 0.1, 2, 0.025, 0.5),
        (0.1, 0.2, 1, 0.1, 0.0),
        (0.7, 0.8, 4, 0.765, 0.5),
        (0.9, 1.0, 1, 1.0, 1.0),
    ]
    assert len(rows) == len(expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row == pytest.approx(wanted)
    assert report["ece"] == pytest.approx((2 * 0.475 + 0.1 + 4 * 0.265 + 0) / 8)
    squares = [0, 0.95**2, 0.01, 0.28**2, 0.22**2, 0.78**2, 0.78**2, 0]
    assert report["brier"] == pytest.approx(sum(squares) / 8)
    json.dumps(report, allow_nan=False)
    assert [
        each["count"] for each in reliability(confidence, right, 2, calibrated=False)["bins"]
    ] == [
        3,
        5,
    ]


def test_what_does_not_fit_is_refused() -> None:
    good = (beside([0.5, 0.6]), ["PER", "PER"], np.array([True, False]))
    for evidence in (beside([np.nan, 0.5]), beside([1.1, 0.5]), beside([-0.1, 0.5]), np.ones(2)):
        with pytest.raises(ValueError, match="two probabilities"):
            calibrate(evidence, *good[1:])
        with pytest.raises(ValueError, match="two probabilities"):
            calibrate(*good).apply(evidence, good[1])
    with pytest.raises(ValueError, match="3 types"):
        calibrate(good[0], ["PER"] * 3, good[2])
    with pytest.raises(ValueError, match="1 predicted entities are right, of 0 gold"):
        calibrate(*good, num_gold={"LOC": 3})


@pytest.fixture
def calibration() -> Calibration:
    rng = np.random.default_rng(7)
    evidence, types = beside(rng.random(200)), rng.choice(TYPES, 200).tolist()
    calibrated = calibrate(evidence, types, draw(evidence[:, 0]))
    return replace(calibrated, weights=fingerprint(np.ones((3, 4)), np.zeros(3)))


def test_a_folder_keeps_it(calibration: Calibration, tmp_path: Path) -> None:
    assert load(tmp_path) is None
    calibration.save(tmp_path)
    assert load(tmp_path) == calibration


def test_a_fingerprint_tells_weights_apart() -> None:
    same = fingerprint(np.ones((3, 4)), np.zeros(3))
    assert same == fingerprint(np.ones((3, 4), dtype=np.float32), np.zeros(3))
    for weight, bias in (
        (np.full((3, 4), 1 + 1e-6), np.zeros(3)),
        (np.ones((3, 4)), np.full(3, 1e-9)),
        (np.ones((4, 3)), np.zeros(3)),
    ):
        assert fingerprint(weight, bias) != same


def test_certainty_is_never_whole(calibration: Calibration) -> None:
    for intercept in (-1e6, 1e6):
        (confidence,) = replace(calibration, intercept=intercept).apply(beside([0.5]), ["PER"])
        assert 0 < confidence < 1


def test_how_words_were_decided(calibration: Calibration) -> None:
    assert calibration.is_for(Reading())
    assert calibration.is_for(Reading(max_seq_length=100))
    assert not calibration.is_for(Reading(decoding="viterbi"))
    assert not calibration.is_for(Reading(word_decision="all"))


def nan_slope(values: dict[str, Any]) -> None:
    values["slopes"][0] = float("nan")


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "nothing in it": dict.clear,
    "no version": lambda v: v.pop("version"),
    "a version that is true": lambda v: v.update(version=True),
    "no source": lambda v: v.pop("source"),
    "a source that is a number": lambda v: v.update(source=3),
    "weights of nothing": lambda v: v.update(weights=None),
    "NaN": nan_slope,
    "a negative slope": lambda v: v.update(slopes=[1, 1, -0.1]),
    "too few slopes": lambda v: v.update(slopes=[1, 1]),
    "slopes that are a number": lambda v: v.update(slopes=3),
    "a slope that is text": lambda v: v.update(slopes=[1, 1, "1"]),
    "a huge intercept": lambda v: v.update(intercept=10**400),
    "infinity": lambda v: v.update(intercept=float("inf")),
    "types in a list": lambda v: v.update(types=["PER"]),
    "a type of nothing": lambda v: v["types"].update(PER=None),
    "an offset that is true": lambda v: v["types"]["PER"].update(offset=True),
    "a curve of nothing": lambda v: v.update(overall={}),
    "a negative count": lambda v: v["overall"].update(num_gold=-1),
    "half an entity": lambda v: v.update(num_entities=1.5),
    "columns that differ": lambda v: v["overall"]["thresholds"].pop(),
    "thresholds out of order": lambda v: v["overall"]["thresholds"].reverse(),
    "more left of a larger threshold": lambda v: v["overall"]["num_predicted"].append(
        v["overall"]["num_predicted"].pop() + 500
    ),
    "more right of a larger threshold": lambda v: v["overall"]["num_correct"].__setitem__(1, 0),
    "more right than predicted": lambda v: v["overall"].update(
        num_correct=v["overall"]["num_predicted"], num_predicted=v["overall"]["num_correct"]
    ),
    "more right than gold": lambda v: v["overall"].update(num_gold=3),
    "a long curve": lambda v: v["overall"].update(
        thresholds=[k / 200 for k in range(101)], num_predicted=[5] * 101, num_correct=[5] * 101
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_and_foreign_files(calibration: Calibration, damage: str, tmp_path: Path) -> None:
    values = json.loads(json.dumps(calibration.to_dict()))
    DAMAGE[damage](values)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match=r"calibration.json: .*calibrate the model again") as error:
        load(tmp_path)
    assert str(error.value).count("\n") == 0


def test_other_versions_and_no_json(calibration: Calibration, tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({**calibration.to_dict(), "version": 2}), encoding="utf-8")
    with pytest.raises(ModelError, match="is of version 2, not 1; calibrate"):
        load(tmp_path)
    for content, message in ((b"\0", "not JSON"), (b"{" + b" " * (5 << 20), "bytes")):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=f"calibration.json: .*{message}.*; calibrate the"):
            load(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    with pytest.raises(ModelError, match=r"has no calibration.json"):
        load(tmp_path)


def test_many_types_are_read_again(tmp_path: Path) -> None:
    """With 100 points each, their curves would grow beyond what is read of a JSON file."""
    names = [f"type-{k:05}" for k in range(300)]
    types = names * 100
    scores = np.random.default_rng(8).random(len(types))
    saved = calibrate(beside(scores), types, draw(scores), dict.fromkeys(names, 100))
    assert 15_000 < sum(len(curve.points) for curve in saved.per_type.values()) <= 20_000
    saved.save(tmp_path)
    assert load(tmp_path) == saved


def test_no_torch_is_needed() -> None:
    assert not modules_after("import bertner.calibration") & {"torch", "sklearn", "scipy"}
