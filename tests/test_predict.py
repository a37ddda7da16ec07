"""Text to entities: offsets, long texts, the same answer whatever the company."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from bertner.corpus import split_words
from bertner.model import BertForNER
from bertner.predict import Tagger

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
    torch.manual_seed(2)
    model = BertForNER.from_pretrained(model_folder, id2label=LABELS)
    with torch.no_grad():
        model.classifier.weight *= 50
    model.save_pretrained(model_folder)
    return Tagger.from_pretrained(model_folder)


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


def test_a_bare_string_is_not_a_list_of_letters(tagger: Tagger) -> None:
    with pytest.raises(TypeError, match="list of texts"):
        tagger("Paris")
