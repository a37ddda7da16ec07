"""Files of predictions: against the words that they are of, and as conlleval has them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertner.analysis import Prediction, analyse
from bertner.corpus import Corpus
from bertner.errors import DataError
from bertner.labels import find_spans, split_tag
from bertner.predictions import read_conlleval, read_predictions, write_conlleval
from bertner.readers import read_file

GOLD = "Mary B-PER\nPoe I-PER\nof O\nA.B. B-ORG\n\nParis B-LOC\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    (tmp_path / "gold.txt").write_text(GOLD, encoding="utf-8")
    return read_file(tmp_path / "gold.txt")


def entities(prediction: Prediction, corpus: Corpus) -> list[tuple[int, int, str]]:
    spans = find_spans(prediction.prefixes, prediction.types, corpus.starts[:-1])
    kinds = [prediction.type_names[k] for k in spans.type]
    return list(zip(spans.start.tolist(), spans.end.tolist(), kinds, strict=True))


def test_columns_with_the_same_words(corpus: Corpus, tmp_path: Path) -> None:
    path = tmp_path / "said.txt"
    path.write_text(GOLD.replace("Mary B-PER", "Mary O").replace("B-LOC", "S-LOC"))
    prediction = read_predictions(path, corpus)
    assert entities(prediction, corpus) == [(1, 2, "PER"), (3, 4, "ORG"), (4, 5, "LOC")]
    assert prediction.confidence is None


def jsonl(tmp_path: Path, *records: object) -> Path:
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def record(text: str, *entities: tuple[int, int, str], score: object = 0.5) -> dict[str, object]:
    names = ("start", "end", "label", "score")
    return {
        "text": text,
        "entities": [dict(zip(names, (*each, score), strict=True)) for each in entities],
    }


def test_text_that_is_divided_into_other_words_and_sentences(
    corpus: Corpus, tmp_path: Path
) -> None:
    text = "Mary Poe of A.B. Paris"
    said = record(text, (9, 16, "ORG"), (17, 22, "LOC"), (0, 8, "PER"))
    said["entities"][0]["score"] = 0.25  # type: ignore[index]
    prediction = read_predictions(jsonl(tmp_path, said), corpus)
    assert entities(prediction, corpus) == [(0, 2, "PER"), (2, 4, "ORG"), (4, 5, "LOC")]
    assert prediction.confidence is not None
    assert prediction.confidence.tolist() == [0.5, 0.25, 0.5]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            [record("Mary Poe of A.C. Paris")],
            r"said.jsonl:1: has 'C' where .*gold.txt:4 has 'A.B.'",
        ),
        ([record("Mary Poe of A.B.")], r"ends after '.' where .*gold.txt:6 has 'Paris'"),
        (
            [record("Mary Poe of A.B."), record("Paris is")],
            r"jsonl:2: has 'is' .* ends after 'Paris'",
        ),
        (
            [record("Mary Poe of A.B.", (12, 13, "ORG")), record("Paris")],
            r"said.jsonl:1: entity 'A' does not begin and end between the words at .*gold.txt:4",
        ),
        (
            [record("Mary Poe of A.B. Paris", (12, 22, "ORG"))],
            r"entity 'A.B.Paris' is in two sentences of the words at .*gold.txt:4",
        ),
    ],
)
def test_predictions_of_other_words_are_refused(
    said: list[object], message: str, corpus: Corpus, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read_predictions(jsonl(tmp_path, *said), corpus)


@pytest.mark.parametrize("score", [None, "high", 1.5, float("nan")])
def test_what_is_no_score_is_no_confidence(score: object, corpus: Corpus, tmp_path: Path) -> None:
    said = [record("Mary Poe of A.B.", (0, 8, "PER"), score=score), record("Paris")]
    assert read_predictions(jsonl(tmp_path, *said), corpus).confidence is None


def test_words_and_tags_in_json(corpus: Corpus, tmp_path: Path) -> None:
    first = {"tokens": ["Mary", "Poe", "of", "A.B."], "ner_tags": ["B-PER", "I-PER", "O", "O"]}
    second = {"tokens": ["Paris"], "ner_tags": ["B-LOC"]}
    prediction = read_predictions(jsonl(tmp_path, first, second), corpus)
    assert entities(prediction, corpus) == [(0, 2, "PER"), (4, 5, "LOC")]


def test_entities_go_before_tags(corpus: Corpus, tmp_path: Path) -> None:
    """Tags beside them are the gold ones: bertner-predict puts out again what it was given."""
    words = {"tokens": ["Mary", "Poe", "of", "A.B."], "ner_tags": ["B-ORG", "O", "O", "O"]}
    first = {**words, **record("Mary Poe of A.B.", (0, 8, "PER"))}
    second = {"tokens": ["Paris"], "ner_tags": ["B-ORG"], **record("Paris")}
    prediction = read_predictions(jsonl(tmp_path, first, second), corpus)
    assert entities(prediction, corpus) == [(0, 2, "PER")]
    assert prediction.confidence is not None


@pytest.mark.parametrize("key", [None, ["Mary"], [{"label": "PER"}], {"a": 1}])
@pytest.mark.parametrize("text", [None, ["Mary"], ""])
def test_other_keys_are_passed_over(
    key: object, text: object, corpus: Corpus, tmp_path: Path
) -> None:
    if text == "" and key == [{"label": "PER"}]:
        return  # which is a text with an entity, but a broken one
    first = {"tokens": ["Mary", "Poe", "of", "A.B."], "ner_tags": ["B-PER", "I-PER", "O", "O"]}
    second = {"tokens": ["Paris"], "ner_tags": ["B-LOC"]}
    said = jsonl(tmp_path, {**first, "entities": key, "text": text}, second)
    prediction = read_predictions(said, corpus)
    assert entities(prediction, corpus) == [(0, 2, "PER"), (4, 5, "LOC")]
    assert prediction.confidence is None


@pytest.mark.parametrize("place", [0, 2, 5])
def test_an_entity_of_white_space_is_refused(place: int, corpus: Corpus, tmp_path: Path) -> None:
    words, tags = [*["Mary", "Poe", "of", "A.B.", "Paris"]], ["O"] * 5
    words.insert(place, " ")
    tags.insert(place, "B-LOC")
    said = jsonl(tmp_path, {"tokens": words, "ner_tags": tags})
    with pytest.raises(DataError, match=r"said.jsonl:1: an entity of nothing but white space"):
        read_predictions(said, corpus)


def test_a_pipe_gives_predictions(corpus: Corpus, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    content = jsonl(tmp_path, record("Mary Poe of A.B.", (0, 8, "PER")), record("Paris"))
    writer = threading.Thread(target=lambda: pipe.write_bytes(content.read_bytes()))
    writer.start()
    prediction = read_predictions(pipe, corpus)
    writer.join()
    assert entities(prediction, corpus) == [(0, 2, "PER")]


def test_columns_say_what_they_can_of_a_word(tmp_path: Path) -> None:
    words = ["New York", "", "-DOCSTART-", "a\ufeffb"]
    gold = read_file(jsonl(tmp_path, {"tokens": words, "ner_tags": ["B-LOC", "O", "O", "B-LOC"]}))
    columns = tmp_path / "columns.txt"
    write_conlleval(columns, gold, Prediction(gold.prefixes, gold.types, gold.type_names, "IOB2"))
    assert entities(read_predictions(columns, gold), gold) == [(0, 1, "LOC"), (3, 4, "LOC")]


def test_conllevals_columns(tmp_path: Path) -> None:
    path = tmp_path / "both.txt"
    path.write_text("Mary x B-PER O\nPoe x I-PER I-PER\n\nParis x O B-LOC\n", encoding="utf-8")
    corpus, prediction = read_conlleval(path)
    scores = analyse(corpus, prediction).word.overall
    assert (scores.num_correct, scores.num_predicted, scores.num_gold) == (0, 2, 1)
    path.write_text("Mary B-PER\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"2 columns instead of 3 or more: word ... tag tag"):
        read_conlleval(path)


words = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=4
) | st.sampled_from(["-DOCSTART-", "a b", "\u2028", " ", "", "\ufeff", "-DOCSTART- x"])
tags = st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"])


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sentences=st.lists(
        st.tuples(
            st.integers(0, 2), st.lists(st.tuples(words, tags, tags), min_size=1, max_size=5)
        ),
        min_size=1,
        max_size=4,
    ),
    marks=st.booleans(),
)
def test_what_is_written_reads_back(
    sentences: list[tuple[int, list[tuple[str, str, str]]]], marks: bool, tmp_path: Path
) -> None:
    path = jsonl(
        tmp_path,
        *(
            {
                "tokens": [word for word, _, _ in rows],
                "ner_tags": [tag for _, tag, _ in rows],
                **({"doc_id": document} if marks else {}),
            }
            for document, rows in sorted(sentences, key=lambda item: item[0])
        ),
    )
    corpus = read_file(path)
    said = [tag for _, rows in sorted(sentences, key=lambda item: item[0]) for *_, tag in rows]
    names = ("X", "Y")
    parsed = [split_tag(tag) for tag in said]
    prediction = Prediction(
        np.array([prefix for prefix, _ in parsed], dtype=np.int8),
        np.array([-1 if kind is None else names.index(kind) for _, kind in parsed]),
        names,
        "IOB2",
    )
    write_conlleval(tmp_path / "both.txt", corpus, prediction)
    again, repeated = read_conlleval(tmp_path / "both.txt")
    assert again.num_words == corpus.num_words
    np.testing.assert_array_equal(again.starts, corpus.starts)
    np.testing.assert_array_equal(again.raw_prefixes, corpus.raw_prefixes)
    np.testing.assert_array_equal(repeated.prefixes, prediction.prefixes)
    assert entities(repeated, again) == entities(prediction, corpus)
    if marks:
        np.testing.assert_array_equal(
            np.unique(again.documents, return_inverse=True)[1],
            np.unique(corpus.documents, return_inverse=True)[1],
        )
    before, after = analyse(corpus, prediction), analyse(again, repeated)
    assert before.word.overall == after.word.overall
    assert before.word.per_type == after.word.per_type
    # I-X alone is no tag of IOB2, and so may be taken for one of IOB1.
    assert before.word.accuracy == after.word.accuracy or prediction.scheme != repeated.scheme
    assert before.strict.overall.num_gold == after.strict.overall.num_gold or (
        corpus.scheme != again.scheme
    )
