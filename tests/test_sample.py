"""The embedded corpus: large enough, clean, original, and in documents."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bertner.corpus import Corpus
from bertner.readers import read_file
from tests.conftest import SAMPLE, SHARED_DATA, needs_conll

SPLITS = {"train": 400, "validation": 100, "test": 100}


@pytest.fixture(scope="module")
def corpora() -> dict[str, Corpus]:
    return {split: read_file(SAMPLE / f"{split}.txt") for split in SPLITS}


def sentences(corpus: Corpus) -> list[str]:
    return [" ".join(corpus.sentence(i)) for i in range(corpus.num_sentences)]


def test_size_scheme_and_types(corpora: dict[str, Corpus]) -> None:
    for split, minimum in SPLITS.items():
        corpus = corpora[split]
        assert corpus.num_sentences >= minimum
        assert corpus.num_documents >= 15
        assert corpus.type_names == ("LOC", "MISC", "ORG", "PER")
        assert corpus.scheme == "IOB2"
        assert min(corpus.entity_counts().values()) >= 50
        assert all(word.isascii() for word in corpus.words)
        # Every tag is written as IOB2 in the file itself.
        text = (SAMPLE / f"{split}.txt").read_text(encoding="utf-8")
        tags = {line.split(" ")[1] for line in text.splitlines() if line}
        assert tags == {"O", *(f"{p}-{t}" for p in "BI" for t in corpus.type_names)}


def test_no_sentence_stands_twice(corpora: dict[str, Corpus]) -> None:
    everything = [sentence for corpus in corpora.values() for sentence in sentences(corpus)]
    assert len(set(everything)) == len(everything)


def test_variety(corpora: dict[str, Corpus]) -> None:
    train = sentences(corpora["train"])
    assert sum(sentence.isupper() for sentence in train) >= 20, "headlines"
    assert sum('"' in sentence for sentence in train) >= 50, "quotes"
    openings = {" ".join(sentence.split()[:2]) for sentence in train}
    assert len(openings) > 0.85 * len(train), "no templates"
    lengths = np.diff(corpora["train"].starts)
    assert np.percentile(lengths, 10) <= 6
    assert np.percentile(lengths, 90) >= 25
    is_plain = [not corpora["train"].prefixes[a:b].any() for a, b in
                itertools.pairwise(corpora["train"].starts)]  # fmt: skip
    assert 0.1 < np.mean(is_plain) < 0.4, "sentences without an entity"


@needs_conll
def test_no_eight_words_in_a_row_are_shared_with_conll2003(corpora: dict[str, Corpus]) -> None:
    def grams(corpus: Corpus) -> set[tuple[str, ...]]:
        return {
            tuple(words[i : i + 8])
            for words in (corpus.sentence(k) for k in range(corpus.num_sentences))
            for i in range(len(words) - 7)
        }

    theirs = set()
    for name in ("train.txt", "valid.txt"):
        theirs |= grams(read_file(SHARED_DATA / "conll2003" / name))
    for split, corpus in corpora.items():
        assert not grams(corpus) & theirs, split
