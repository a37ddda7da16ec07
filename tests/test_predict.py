"""Text to entities: offsets, long texts, the same answer whatever the company."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bertner.calibration import fit
from bertner.config import BertConfig, Reading
from bertner.corpus import split_words
from bertner.errors import ModelError, UsageError
from bertner.predict import Entity, Tagger, Text, fingerprint_of, gather
from tests.conftest import make_talkative

LABELS = dict(enumerate(["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]))

TEXTS = [
    "Mary Poe said Paris is the landing of London.",
    "",
    "   ",
    "Paris\tand\u00a0London\u200b - \U0001f642 é e\u0301 \u05e9\u05dc\u05d5\u05dd",
    "the United-Paris (London) 'said': " * 20,
    "\u200b",
    "",
]


@pytest.fixture
def tagger(model_folder: Path) -> Tagger:
    """A tagger whose random head says something about almost every word."""
    return Tagger.from_pretrained(make_talkative(model_folder, LABELS))


def test_entities_are_slices_of_the_text(tagger: Tagger) -> None:
    results = tagger(TEXTS)
    assert len(results) == len(TEXTS)
    assert results[1] == results[2] == []
    assert sum(map(len, results)) > 20
    for text, entities in zip(TEXTS, results, strict=True):
        borders = split_words(text)
        end = 0
        for entity in entities:
            assert text[entity.start : entity.end] == entity.text
            assert entity.start >= end, "entities are in order and apart"
            end = entity.end
            assert entity.start in [a for a, _ in borders], "no entity begins inside a word"
            assert entity.end in [b for _, b in borders], "no entity ends inside a word"
            assert entity.label in ("PER", "LOC")
            assert 0.0 < entity.score <= 1.0


def test_the_same_alone_and_in_company(tagger: Tagger) -> None:
    together = tagger(TEXTS)
    for text, entities in zip(TEXTS, together, strict=True):
        alone = tagger([text])[0]
        assert [(e.start, e.end, e.label) for e in alone] == [
            (e.start, e.end, e.label) for e in entities
        ]
        assert [e.score for e in alone] == pytest.approx([e.score for e in entities], abs=1e-5)


def test_a_text_longer_than_the_window_is_read_to_its_end(tagger: Tagger) -> None:
    text = "London said Paris is of the landing. " * 60
    entities = tagger([text])[0]
    assert entities[-1].end > len(text) - 80
    starts = [entity.start for entity in entities]
    assert max(b - a for a, b in itertools.pairwise(starts)) < 150


def test_nothing_in_nothing_out(tagger: Tagger) -> None:
    assert tagger([]) == []


def test_one_text_and_lists_of_words(tagger: Tagger) -> None:
    text = "Mary Poe said Paris is the landing of London ."
    entities = tagger(text)
    assert entities == tagger([text])[0]
    words = text.split()
    of_words = tagger.tag_words(words)
    assert of_words == tagger.tag_words([["of"], words])[1]
    assert [(e.label, e.text) for e in of_words] == [(e.label, e.text) for e in entities]
    for entity in of_words:
        assert " ".join(words[entity.start : entity.end]) == entity.text
    assert tagger.tag_words([]) == []
    # Words that tokenise to nothing, and words with spaces, keep their places.
    odd = tagger.tag_words(["", "\u200b", "Paris London", "", "Mary"])
    assert {place for entity in odd for place in range(entity.start, entity.end)} <= {2, 4}


@pytest.mark.parametrize("batch_tokens", [1, 40, 5000])
def test_the_same_whatever_the_batch(tagger: Tagger, batch_tokens: int) -> None:
    expected = tagger(TEXTS)
    other = Tagger(tagger.model, tagger.tokenizer, batch_tokens)
    for ours, theirs in zip(expected, other.stream(iter(TEXTS)), strict=True):
        assert [(e.start, e.end, e.label) for e in ours] == [
            (e.start, e.end, e.label) for e in theirs
        ]
        assert [e.score for e in ours] == pytest.approx([e.score for e in theirs], abs=1e-5)


def test_the_stream_reads_no_further_than_it_must(
    tagger: Tagger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bertner.predict._STREAM_TEXTS", 3)
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield "Paris"

    stream = tagger.stream(endless())
    assert [len(next(stream)) for _ in range(7)] == [1] * 7
    assert taken <= 10


def test_no_entity_goes_across_a_blank_line(tagger: Tagger) -> None:
    tagger.reading = Reading(context="document")
    paragraphs = ["Mary Poe", "said Paris"] * 20
    entities = tagger("\n\n".join(paragraphs))
    assert len(entities) > 20
    assert not any("\n" in entity.text for entity in entities)
    # And they are read together, as the sentences of a document are.
    together = tagger.tag([Text.of_words(each.split(), "a document") for each in paragraphs])
    assert [e.score for e in entities] == [e.score for each in together for e in each]


def test_parts_hold_whole_documents_and_do_not_wait() -> None:
    def text(document: object = None) -> Text:
        return Text("a", [(0, 1)], document)

    documents = [*[text(1)] * 1500, *[text(2)] * 3, text(), text()]
    assert [len(part) for part in gather(documents)] == [1500, 5]
    # What is there goes ahead when the next one takes its time, but not half a document.
    paused = [text(), None, None, text(1), None, text(1), text(), None]
    assert [len(part) for part in gather(paused)] == [1, 3]


def test_labels_and_thresholds(tagger: Tagger) -> None:
    every = [e for entities in tagger(TEXTS) for e in entities]
    middle = sorted(e.score for e in every if e.label == "LOC")[3]

    def found(**options: Any) -> list[Entity]:
        other = Tagger(tagger.model, tagger.tokenizer, **options)
        return [e for entities in other(TEXTS) for e in entities]

    assert found(labels=["LOC"]) == [e for e in every if e.label == "LOC"]
    assert found(threshold=middle) == [e for e in every if e.score >= middle]
    assert found(threshold={"LOC": middle}) == [
        e for e in every if e.label == "PER" or e.score >= middle
    ]
    assert found(threshold={"": 1.0, "LOC": middle}) == [
        e for e in every if e.label == "LOC" and e.score >= middle
    ]
    for wrong in ({"labels": ["ORG"]}, {"threshold": {"ORG": 0.5}}):
        with pytest.raises(UsageError, match="no type 'ORG', but PER, LOC"):
            found(**wrong)


def test_scores_are_calibrated_if_the_model_is(
    tagger: Tagger, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = [e.score for entities in tagger(TEXTS) for e in entities]
    evidence = np.full((40, 2), 0.9)
    right = np.arange(40) % 4 == 0  # a model that is sure and mostly wrong
    calibration = fit(
        evidence,
        ["LOC"] * 40,
        right,
        {"LOC": 40},
        source="made-up",
        weights=fingerprint_of(tagger.model),
        reading=Reading(),
    )
    calibration.save(model_folder)
    calibrated = Tagger.from_pretrained(model_folder)
    after = [e.score for entities in calibrated(TEXTS) for e in entities]
    assert len(after) == len(before)
    assert sum(after) < 0.8 * sum(before)
    # Words decided in another way are not what was calibrated.
    viterbi = Tagger.from_pretrained(model_folder, reading=Reading(decoding="viterbi"))
    assert viterbi.calibration is None
    assert "was fitted for words that are decided by argmax and first wordpieces" in caplog.text
    with torch.no_grad():
        tagger.model.classifier.bias += 1
    tagger.model.save_pretrained(model_folder)
    caplog.clear()
    assert Tagger.from_pretrained(model_folder).calibration is None
    assert "was fitted for other weights, so scores are not calibrated" in caplog.text


def test_a_model_keeps_the_way_that_words_are_split(model_folder: Path) -> None:
    path = model_folder / "config.json"
    config = BertConfig.from_dict(json.loads(path.read_text()))
    trained = replace(config, reading=Reading()).to_dict()
    assert trained["bertner_word_splitter"] == "bertner-1"
    path.write_text(json.dumps({**trained, "bertner_word_splitter": "bertner-9"}))
    with pytest.raises(ModelError, match="split into words in a way that is not known here"):
        Tagger.from_pretrained(model_folder)
