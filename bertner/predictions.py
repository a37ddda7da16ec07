"""Files of predictions: read against the data that they are of, and written for `conlleval`.

A file of predictions is an annotated file of any format (see `readers`) whose tags are a model's.
`conlleval`, the evaluation script of CoNLL-2000 to 2003, takes columns with the word first, the
gold tag last but one and the predicted tag last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from reprlib import repr as short  # what a message shows of a word from a file
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bertner.analysis import Prediction
from bertner.corpus import Corpus
from bertner.errors import DataError
from bertner.files import replace_file
from bertner.labels import PREFIX_LETTERS, B, I, IntArray, O, find_spans
from bertner.readers import file_format, has_entities, read_file, read_lines


def read_predictions(
    path: str | Path, corpus: Corpus, columns: Mapping[str, Any] | None = None
) -> Prediction:
    """Reads what somebody predicted of a corpus.

    Args:
        path: An annotated file; of JSON objects with both, the entities and not the tags are what
            was predicted, as `bertner-predict` writes them. It must have the words of the corpus in
            their order, as columns can hold them; where it divides the same characters into other
            words or sentences, entities must begin and end with words of the corpus.
        corpus: The data.
        columns: What `read_file` is told of the columns of JSON or parquet.

    Raises:
        DataError: The file cannot be read, or is of other words; says where.
        StorageError: The disk fails.
    """
    said = read_file(path, **(columns or {}), entities_first=True)
    prefixes, types, scheme = said.raw_prefixes, said.types, said.scheme
    if not (np.array_equal(said.starts, corpus.starts) and _are_same(said.words, corpus.words)):
        prefixes, types = _carried_over(said, corpus)
        scheme = "IOB2"
    confidence = None
    if file_format(Path(path)) == "json" and Path(path).is_file():  # a pipe gives its words once
        num_entities = len(find_spans(prefixes, types, corpus.starts[:-1]))
        confidence = _read_scores(path, num_entities)
    return Prediction(prefixes, types, said.type_names, scheme, confidence)


def read_conlleval(path: str | Path) -> tuple[Corpus, Prediction]:
    """Reads columns as `conlleval` does: the gold tag is last but one, the predicted tag last.

    Raises:
        DataError: The file cannot be read, or has fewer than three columns.
        StorageError: The disk fails.
    """
    corpus = read_file(path, tag_column=-2)
    return corpus, read_predictions(path, corpus)


def write_conlleval(path: str | Path, corpus: Corpus, prediction: Prediction) -> None:
    """Writes word, gold tag and predicted tag, as `conlleval` and `read_conlleval` read them.

    White space in a word, which cannot stand in a column, becomes `_`, and so does an empty word.

    Raises:
        StorageError: The disk fails.
    """
    gold = _tags(corpus.raw_prefixes, corpus.types, corpus.type_names)
    predicted = _tags(prediction.prefixes, prediction.types, prediction.type_names)

    def sentences() -> Iterator[bytes]:
        document = None
        for k in range(corpus.num_sentences):
            lines = []
            if corpus.marks_documents and corpus.documents[k] != document:
                document = corpus.documents[k]
                lines = ["-DOCSTART- O O", ""]
            for word in range(int(corpus.starts[k]), int(corpus.starts[k + 1])):
                lines.append(f"{column_of(corpus.words[word])} {gold[word]} {predicted[word]}")
            yield "\n".join([*lines, "", ""]).encode()

    replace_file(Path(path), sentences())


def _tags(prefixes: IntArray, types: IntArray, type_names: Sequence[str]) -> list[str]:
    return [
        "O" if kind < 0 else f"{PREFIX_LETTERS[prefix]}-{column_of(type_names[kind])}"
        for prefix, kind in zip(prefixes.tolist(), types.tolist(), strict=True)
    ]


def column_of(text: str) -> str:
    """A word as it can stand in a column: without white space, and not empty."""
    # U+FEFF, a space of no width, would be taken for a byte order mark at the head of the file.
    text = "_".join(text.replace("\ufeff", " ").split()) or "_"
    return "_DOCSTART_" if text == "-DOCSTART-" else text


def _are_same(words: Sequence[str], ours: Sequence[str]) -> bool:
    """Whether words are ours, or what stands for them in columns."""
    return all(a == b or a == column_of(b) for a, b in zip(words, ours, strict=True))


def _carried_over(said: Corpus, corpus: Corpus) -> tuple[IntArray, IntArray]:
    """(prefixes, types) of the corpus' words, for tags of the same characters cut otherwise."""
    ours, theirs = _Characters(corpus), _Characters(said)
    if ours.text != theirs.text:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(ours.text, theirs.text, strict=False))
        at = sum(1 for _ in same)
        where, word = ours.word_at(at)
        line, other = theirs.word_at(at)
        raise DataError(
            f"{other} where {corpus.source}:{where} {word}; predictions must be of the same words "
            "in the same order",
            said.source,
            line,
        )
    spans = find_spans(said.prefixes, said.types, said.starts[:-1])
    begin, end = theirs.starts[spans.start], theirs.ends[spans.end - 1]
    if np.any(begin == end):
        raise DataError(
            "an entity of nothing but white space, which is no word of the data; predict on the "
            "words of that file",
            said.source,
            int(said.lines[spans.start[np.argmax(begin == end)]]),
        )
    first = np.searchsorted(ours.ends, begin, side="right")
    last = np.searchsorted(ours.ends, end, side="left")
    sentence = np.searchsorted(corpus.starts, first, side="right")
    for wrong, what in (
        (
            (ours.starts[first] != begin) | (ours.ends[last] != end),
            "does not begin and end between",
        ),
        (sentence != np.searchsorted(corpus.starts, last, side="right"), "is in two sentences of"),
    ):
        if np.any(wrong):
            k = int(np.argmax(wrong))
            raise DataError(
                f"entity {short(theirs.text[begin[k] : end[k]])} {what} the words at "
                f"{corpus.source}:{corpus.lines[first[k]]}; predict on the words of that file",
                said.source,
                int(said.lines[spans.start[k]]),
            )
    prefixes = np.full(corpus.num_words, O, dtype=np.int8)
    types = np.full(corpus.num_words, -1, dtype=np.int16)
    for a, b, kind in zip(first.tolist(), last.tolist(), spans.type, strict=True):
        prefixes[a : b + 1], types[a : b + 1] = I, kind
        prefixes[a] = B
    return prefixes, types


class _Characters:
    """A corpus as one text without white space, and where in it each word is."""

    def __init__(self, corpus: Corpus) -> None:
        words = ["".join(word.split()) for word in corpus.words]
        self.corpus = corpus
        self.text = "".join(words)
        self.ends = np.cumsum([len(word) for word in words])
        self.starts = np.append(0, self.ends[:-1])

    def word_at(self, place: int) -> tuple[int, str]:
        """Line of the word that a character is in, and that it is there; or that all ends there."""
        word = min(int(np.searchsorted(self.ends, place, side="right")), len(self.ends) - 1)
        verb = "ends after" if place >= len(self.text) else "has"
        return int(self.corpus.lines[word]), f"{verb} {short(self.corpus.words[word])}"


def _read_scores(path: str | Path, num_entities: int) -> NDArray[np.float64] | None:
    """(num_entities,) the scores in a file of `bertner-predict`; None if it is none."""
    scores: list[float] = []
    for line in read_lines(path):
        record = json.loads(line) if line.strip() else {"text": "", "entities": []}
        if not has_entities(record):
            return None
        for entity in sorted(record["entities"], key=lambda entity: int(entity["start"])):
            score = entity.get("score")
            if not isinstance(score, int | float) or not 0 <= score <= 1:
                return None
            scores.append(score)
    return np.array(scores) if len(scores) == num_entities and scores else None
