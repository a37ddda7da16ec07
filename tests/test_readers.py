"""Annotated files of every format: what is read, what is refused, and that nothing else happens."""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import BertPreTokenizer

from bertner import readers
from bertner.corpus import MAX_TYPES, Corpus, split_sentences, split_words
from bertner.errors import DataError, StorageError
from bertner.labels import B, I, O, label_list
from bertner.readers import Columns, open_file, open_table, read_file, read_lines
from tests.conftest import SAMPLE, SHARED_DATA, needs_conll

Sentence = list[tuple[str, str]]  # (word, tag)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


def read(folder: Path, name: str, content: str | bytes, **options: Any) -> Corpus:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_file(path, **options)


def lines_of(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def table_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def tags_of(corpus: Corpus) -> list[str]:
    return [
        "O" if p == O else f"{' BI'[p]}-{corpus.type_names[t]}"
        for p, t in zip(corpus.prefixes, corpus.types, strict=True)
    ]


def sentences_of(corpus: Corpus) -> list[Sentence]:
    pairs = list(zip(corpus.words, tags_of(corpus), strict=True))
    return [pairs[a:b] for a, b in zip(corpus.starts[:-1], corpus.starts[1:], strict=True)]


def parse(*sentences: str) -> list[Sentence]:
    """Sentences from strings such as "Mary/B-PER said"; a word without a tag is O."""
    parsed = []
    for sentence in sentences:
        pairs = [(token + "/O").split("/")[:2] for token in sentence.split()]
        parsed.append([(word, tag) for word, tag in pairs])
    return parsed


def check_invariants(corpus: Corpus) -> None:
    """What every other module takes for granted of a corpus."""
    assert corpus.num_words == len(corpus.words) > 0
    for array in (corpus.prefixes, corpus.types, corpus.lines):
        assert array.shape == (corpus.num_words,)
    assert (corpus.prefixes.dtype, corpus.types.dtype) == (np.int8, np.int16)
    assert corpus.documents.shape == (corpus.num_sentences,)
    assert corpus.starts[0] == 0
    assert corpus.starts[-1] == corpus.num_words
    assert np.all(np.diff(corpus.starts) > 0)  # no sentence is empty
    assert np.all(np.diff(corpus.lines) >= 0)
    assert corpus.lines[0] >= 1
    assert 1 <= corpus.num_documents <= corpus.num_sentences
    assert corpus.scheme in ("IOB1", "IOB2", "BIOES")
    assert len(corpus.sha256) == 64
    for word in corpus.words:
        assert isinstance(word, str)
        assert "\0" not in word
        word.encode()  # no half of a UTF-16 pair

    assert list(corpus.type_names) == sorted(set(corpus.type_names))
    assert all(name and name == name.strip() for name in corpus.type_names)
    used = set(corpus.types.tolist()) - {-1}
    assert used == set(range(len(corpus.type_names)))
    assert set(corpus.prefixes.tolist()) <= {O, B, I}
    np.testing.assert_array_equal(corpus.types == -1, corpus.prefixes == O)
    inside = np.flatnonzero(corpus.prefixes == I)  # in IOB2 never first, nor after another type
    assert not np.any(np.isin(inside, corpus.starts))
    np.testing.assert_array_equal(corpus.types[inside - 1], corpus.types[inside])
    assert sum(corpus.entity_counts().values()) == np.count_nonzero(corpus.prefixes == B)


# CoNLL columns

SMALL = parse("Mary/B-PER Poe/I-PER said", "Paris/B-LOC London/B-LOC .")


@pytest.mark.parametrize(
    "content",
    [
        "Mary B-PER\nPoe I-PER\nsaid O\n\nParis B-LOC\nLondon B-LOC\n. O\n",
        "Mary B-PER\nPoe I-PER\nsaid O\n\nParis B-LOC\nLondon B-LOC\n. O",  # no final newline
        "Mary\tB-PER\nPoe\tI-PER\nsaid\tO\n\nParis\tB-LOC\nLondon\tB-LOC\n.\tO\n",
        "Mary   B-PER\n Poe I-PER\nsaid O  \n \nParis B-LOC \nLondon  B-LOC\n. O\n",
        "Mary\tB-PER \nPoe\tI-PER\t\nsaid\t O\n\t \nParis\tB-LOC\r\nLondon\tB-LOC\t\t\n.\tO\n",
        "Mary B-PER\r\nPoe I-PER\r\nsaid O\r\n\r\nParis B-LOC\r\nLondon B-LOC\r\n. O\r\n",
        "\ufeffMary B-PER\nPoe I-PER\nsaid O\n\nParis B-LOC\nLondon B-LOC\n. O\n",
        "\n\n\nMary B-PER\nPoe I-PER\nsaid O\n\n\n\n\nParis B-LOC\nLondon B-LOC\n. O\n\n\n",
        "Mary N x B-PER\nPoe N x I-PER\nsaid V x O\n\nParis N x B-LOC\nLondon N x B-LOC\n. . x O\n",
        "Mary\tN\tx\tB-PER\nPoe\tN\tx\tI-PER\nsaid\t\t\tO\n\nParis\t\t\tB-LOC\nLondon\t\t\tB-LOC\n"
        ".\t\t\tO\n",
        # IOB1 and BIOES are read as the same entities.
        "Mary I-PER\nPoe I-PER\nsaid O\n\nParis I-LOC\nLondon B-LOC\n. O\n",
        "Mary B-PER\nPoe E-PER\nsaid O\n\nParis S-LOC\nLondon S-LOC\n. O\n",
        "Mary B-PER\nPoe L-PER\nsaid O\n\nParis U-LOC\nLondon U-LOC\n. O\n",
    ],
)
def test_conll_spellings(folder: Path, content: str) -> None:
    for name in ("a.txt", "a.conll", "a.tsv", "a"):
        corpus = read(folder, name, content)
        check_invariants(corpus)
        assert sentences_of(corpus) == SMALL
        assert corpus.num_documents == 1


def test_conll_schemes_are_named(folder: Path) -> None:
    schemes = {
        "IOB1": "a I-X\nb I-X\n\nc I-X\nd B-X\n",
        "IOB2": "a B-X\nb I-X\n\nc B-X\nd B-X\n",
        "BIOES": "a B-X\nb E-X\n\nc S-X\nd S-X\n",
    }
    for scheme, content in schemes.items():
        corpus = read(folder, "a.txt", content)
        assert corpus.scheme == scheme
        assert tags_of(corpus) == ["B-X", "I-X", "B-X", "B-X"]


def test_conll_lines_and_hash(folder: Path) -> None:
    corpus = read(folder, "a.txt", "-DOCSTART- O\n\nMary B-PER\nPoe I-PER\n\n\nParis B-LOC\n")
    assert corpus.lines.tolist() == [3, 4, 7]
    assert corpus.source == str(folder / "a.txt")
    assert corpus.sha256 == hashlib.sha256((folder / "a.txt").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("a O\n\nb O\n", [0, 0]),
        ("-DOCSTART- O\n\na O\n\nb O\n", [0, 0]),
        ("-DOCSTART- -X- -X- O\n\na x x O\n\n-DOCSTART- -X- -X- O\n\nb x x O\n", [0, 1]),
        ("-DOCSTART-\n\na O\n\nb O\n\n-DOCSTART-\n\nc O\n", [0, 0, 1]),
        ("a O\n-DOCSTART- O\nb O\n", [0, 1]),  # no blank lines around
        ("a O\n\n-DOCSTART-\tO\n\nb O\n", [0, 1]),
        ("a\tO\r\n\r\n-DOCSTART-\r\n\r\nb\tO\r\n", [0, 1]),
        ("-DOCSTART- O\n-DOCSTART- O\n\na O\n\n-DOCSTART- O\n\n-DOCSTART- O\n\nb O\n", [0, 2]),
        ("a O\n-DOCSTART- (2)\nb O\n-DOCSTART- (3)\n", [0, 1]),
        ("-DOCSTART-x O\na O\n", [0]),  # a word that only looks like it
    ],
)
def test_conll_documents(folder: Path, content: str, documents: list[int]) -> None:
    corpus = read(folder, "a.txt", content)
    check_invariants(corpus)
    assert corpus.documents.tolist() == documents
    assert corpus.num_documents == len(set(documents))
    assert corpus.marks_documents == ("-DOCSTART-" in content.replace("-DOCSTART-x", ""))
    words = content.replace("\r", "").split("\n")
    assert corpus.num_words == sum(bool(line) and line.split()[0] != "-DOCSTART-" for line in words)


ODD_WORDS = [
    *["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"],  # "line ends" of str.splitlines
    *["\xa0", "\u3000", "a\xa0b", "\u2003x"],  # spaces that are no separator
    *["\u200b", "\xad", "\u200d", "\u2060", "\ufeff", "\ufffd", "\x7f", "\ue000"],  # invisible
    *["e\u0301", "\u0301", "👩‍👩‍👧", "🇫🇷", "地", "العربية", "א", "-", "O", "B-PER", "#", '"', "\\"],
    "x" * 5000,
]


def test_odd_words_are_words_in_every_format(folder: Path) -> None:
    rows = [f"{word} B-X\n{word}\u200b O\n\n" for word in ODD_WORDS]
    expected = [[(word, "B-X"), (word + "\u200b", "O")] for word in ODD_WORDS]
    corpus = read(folder, "a.txt", "".join(rows))
    check_invariants(corpus)
    assert sentences_of(corpus) == expected
    tabs = "".join(rows).replace(" B-X", "\tB-X").replace(" O\n", "\tO\n")
    assert sentences_of(read(folder, "a.txt", tabs)) == expected
    records = lines_of(
        *({"tokens": [w for w, _ in s], "ner_tags": [t for _, t in s]} for s in expected)
    )
    assert sentences_of(read(folder, "a.jsonl", records)) == expected
    table = pa.table(
        {
            "tokens": [[word for word, _ in sentence] for sentence in expected],
            "ner_tags": [[tag for _, tag in sentence] for sentence in expected],
        }
    )
    assert sentences_of(read(folder, "a.parquet", table_bytes(table))) == expected


def test_words_with_spaces_and_empty_words_between_tabs(folder: Path) -> None:
    corpus = read(folder, "a.txt", "New York\tN\tB-LOC\n\tN\tO\n \tN\tO\n a \tN\tI-LOC\n")
    check_invariants(corpus)
    assert corpus.words == ["New York", "", " ", " a "]
    assert read(folder, "a.txt", "\tO\n\n\tO\n").words == ["", ""]


# JSON lines of words and tags


def test_json_with_strings_and_integers(folder: Path) -> None:
    strings = lines_of(
        {"tokens": ["Mary", "Poe", "said"], "ner_tags": ["B-PER", "I-PER", "O"]},
        {"id": 7, "tokens": ["Paris", "London", "."], "ner_tags": ["B-LOC", "B-LOC", "O"]},
    )
    names = "O B-PER I-PER B-LOC I-LOC".split()
    integers = lines_of(
        {"tokens": ["Mary", "Poe", "said"], "ner_tags": [1, 2, 0]},
        {"id": 7, "tokens": ["Paris", "London", "."], "ner_tags": [3, 3, 0]},
    )
    for content, label_names in ((strings, None), (strings, names), (integers, names)):
        for name in ("a.json", "a.jsonl", "a.JSONL"):
            for spelling in (content, "\ufeff" + content, content.replace("\n", "\r\n\r\n")):
                corpus = read(folder, name, spelling, label_names=label_names)
                check_invariants(corpus)
                assert sentences_of(corpus) == SMALL
                assert (corpus.num_documents, corpus.scheme) == (1, "IOB2")
    assert read(folder, "a.jsonl", "\n" + strings).lines.tolist() == [2, 2, 2, 3, 3, 3]


def test_json_with_other_keys(folder: Path) -> None:
    content = lines_of({"text": ["a", "b"], "entities": ["B-X", "O"]})
    corpus = read(folder, "a.jsonl", content, text_column="text", label_column="entities")
    assert sentences_of(corpus) == [[("a", "B-X"), ("b", "O")]]
    content = lines_of({"text": "a b", "entities": [], "tokens": ["a"], "ner_tags": ["B-X"]})
    assert sentences_of(read(folder, "a.jsonl", content)) == [[("a", "B-X")]]


def test_json_converts_schemes_and_skips_empty_sentences(folder: Path) -> None:
    content = lines_of(
        {"tokens": [], "ner_tags": []},
        {"tokens": ["a", "b", "c"], "ner_tags": ["S-X", "B-X", "E-X"]},
    )
    corpus = read(folder, "a.jsonl", content)
    assert (corpus.scheme, tags_of(corpus)) == ("BIOES", ["B-X", "B-X", "I-X"])
    assert corpus.lines.tolist() == [2, 2, 2]


def test_json_escapes(folder: Path) -> None:
    content = '{"tokens": ["\\u00e9", "\\ud83d\\ude00", "\\u2028"], "ner_tags": ["O", "O", "O"]}'
    assert read(folder, "a.jsonl", content).words == ["é", "😀", "\u2028"]


def test_white_space_around_tags_means_nothing(folder: Path) -> None:
    content = lines_of({"tokens": ["a", "b", "c"], "ner_tags": ["B-X ", " I-X", "O\n"]})
    corpus = read(folder, "a.jsonl", content)
    assert (corpus.type_names, tags_of(corpus)) == (("X",), ["B-X", "I-X", "O"])
    corpus = read(folder, "a.jsonl", content, label_names=["O", " B-X"])
    assert corpus.type_names == ("X",)


# JSON lines of text and entities


def entity(start: int, end: int, label: str) -> dict[str, Any]:
    return {"start": start, "end": end, "label": label}


@pytest.mark.parametrize(
    ("text", "entities", "expected"),
    [
        ("Mary Poe said", [(0, 8, "PER")], "Mary/B-PER Poe/I-PER said"),
        ("Mary Poe said", [], "Mary Poe said"),
        ("Mary", [(0, 4, "PER")], "Mary/B-PER"),
        ("Paris London", [(0, 5, "LOC"), (6, 12, "LOC")], "Paris/B-LOC London/B-LOC"),
        ("Paris London", [(6, 12, "LOC"), (0, 5, "PER")], "Paris/B-PER London/B-LOC"),  # unsorted
        ("日本東京", [(0, 2, "LOC"), (2, 4, "LOC")], "日/B-LOC 本/I-LOC 東/B-LOC 京/I-LOC"),
        ("(Paris)London", [(1, 6, "X"), (7, 13, "X")], "( Paris/B-X ) London/B-X"),
        (" Mary  Poe  said", [(0, 12, "PER")], "Mary/B-PER Poe/I-PER said"),  # space at borders
        ("Mary Poe said", [(4, 9, "PER")], "Mary Poe/B-PER said"),
        ("a\tb\nc\u2028d", [(2, 5, "X")], "a b/B-X c/I-X d"),
        ("U.S.-based", [(0, 4, "LOC")], "U/B-LOC ./I-LOC S/I-LOC ./I-LOC - based"),
        ("Poe's $5,00!", [(0, 3, "PER")], "Poe/B-PER ' s $ 5 , 00 !"),
        ("😀Mary😀Poe", [(1, 5, "PER")], "😀 Mary/B-PER 😀 Poe"),
        ("👍🏽 ok", [(0, 2, "X")], "👍/B-X 🏽/I-X ok"),
        ("Cafe\u0301 Zoë", [(0, 5, "ORG")], "Cafe\u0301/B-ORG Zoë"),
        ("नमस्ते दिल्ली", [(7, 13, "LOC")], "नमस्ते दिल्ली/B-LOC"),
        ("a b", [(0, 1, " New type ")], "a/B-New_type b"),
    ],
)
def test_text_and_entities(
    folder: Path, text: str, entities: list[tuple[int, int, str]], expected: str
) -> None:
    record = {"text": text, "entities": [entity(*each) for each in entities]}
    corpus = read(folder, "a.jsonl", lines_of(record))
    check_invariants(corpus)
    words = [(word, tag.replace("_", " ")) for word, tag in parse(expected)[0]]
    assert sentences_of(corpus) == [words]
    assert "".join(corpus.words) == "".join(text.split())
    counts = corpus.entity_counts()
    assert sum(counts.values()) == len(entities)


def test_text_and_entities_may_say_more(folder: Path) -> None:
    record = {"text": "Paris", "entities": [{**entity(0, 5, "LOC"), "text": "Paris", "score": 1}]}
    corpus = read(folder, "a.jsonl", lines_of({"text": "", "entities": []}, record))
    assert sentences_of(corpus) == parse("Paris/B-LOC")
    assert corpus.lines.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" a b\n c\r\n \t\r\nd\n\n\n\ne\n\n", [(0, 3), (3, 4), (4, 5)]),
        ("a\n\nb", [(0, 1), (1, 2)]),
        ("a\nb", [(0, 2)]),
        ("a.\n\n(b", [(0, 2), (2, 4)]),
        ("\n\n", []),
        ("", []),
    ],
)
def test_blank_lines_part_a_text(text: str, expected: list[tuple[int, int]]) -> None:
    assert split_sentences(text, split_words(text)) == expected


def test_a_text_of_several_paragraphs(folder: Path) -> None:
    text = "Mary Poe\n\nParis\n\nUnited\n\nKingdom\n\nsaid"
    entities = [entity(0, 8, "PER"), entity(10, 15, "LOC"), entity(17, 32, "LOC")]
    corpus = read(folder, "a.jsonl", lines_of({"text": text, "entities": entities}))
    check_invariants(corpus)
    # No annotated entity is cut, whatever is in it.
    assert sentences_of(corpus) == parse(
        "Mary/B-PER Poe/I-PER", "Paris/B-LOC", "United/B-LOC Kingdom/I-LOC", "said"
    )
    assert corpus.lines.tolist() == [1] * 6


# Letters, digits, marks, joiners, punctuation, symbols, ideographs, spaces.
alphabet = "aZé9\u0301\u200d\u0915\u094d.,-'$+¿«。😀🏽©日本 \t\n\xa0\u2028"


@settings(deadline=None)
@given(st.text(alphabet, max_size=20))
@example("aa aa")
def test_split_words_loses_nothing_and_cuts_where_bert_does(text: str) -> None:
    spans = split_words(text)
    assert all(start < end for start, end in spans)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    words = [text[start:end] for start, end in spans]
    assert "".join(words) == "".join(text.split())
    assert all(not any(c.isspace() for c in word) for word in words)
    # Each word, and so each entity, lies between borders of BERT's own words, ideographs aside,
    # which its normalizer sets apart.
    inner = {p for start, end in spans for p in range(start + 1, end)}
    bert = BertPreTokenizer().pre_tokenize_str(text)
    assert not inner & {border for _, span in bert for border in span}


@settings(deadline=None)
@given(st.text(alphabet, max_size=12), st.integers(0, 12), st.integers(0, 12))
def test_an_entity_is_refused_just_if_it_cuts_a_word(
    folder: Path, text: str, start: int, end: int
) -> None:
    start, end = sorted((min(start, len(text)), min(end, len(text))))
    spans = split_words(text)
    inside = [k for k, (a, b) in enumerate(spans) if start < b and a < end]
    cut = any(a < start or end < b for a, b in spans if start < b and a < end)
    content = lines_of({"text": text + " .", "entities": [entity(start, end, "X")]})
    if cut or not inside:
        with pytest.raises(DataError):
            read(folder, "a.jsonl", content)
        return
    tags = tags_of(read(folder, "a.jsonl", content))
    assert [k for k, tag in enumerate(tags) if tag != "O"] == inside
    assert tags[inside[0]] == "B-X"


# Parquet


def test_parquet_with_strings(folder: Path) -> None:
    words = [[word for word, _ in sentence] for sentence in SMALL]
    tags = [[tag for _, tag in sentence] for sentence in SMALL]
    strings, wide = pa.list_(pa.string()), pa.large_list(pa.large_string())
    coded = pa.list_(pa.dictionary(pa.int32(), pa.string()))
    for kind in (strings, wide, coded, pa.list_(pa.string(), 3)):
        columns = [pa.array(words, kind), pa.array(tags, kind)]
        content = table_bytes(pa.table(columns, ["tokens", "ner_tags"]))
        for name in ("a.parquet", "a.PARQUET"):
            corpus = read(folder, name, content)
            check_invariants(corpus)
            assert sentences_of(corpus) == SMALL
            assert corpus.lines.tolist() == [1, 1, 1, 2, 2, 2]
            assert corpus.num_documents == 1


def test_parquet_with_class_labels_written_by_datasets(folder: Path) -> None:
    names = "O B-PER I-PER B-LOC I-LOC".split()
    columns = {
        "tokens": [[word for word, _ in sentence] for sentence in SMALL],
        "ner_tags": [[names.index(tag) for _, tag in sentence] for sentence in SMALL],
    }
    for sequence in (datasets.List, datasets.Sequence, datasets.LargeList):
        features = datasets.Features(
            tokens=sequence(datasets.Value("string")),
            ner_tags=sequence(datasets.ClassLabel(names=names)),
        )
        path = folder / "classes.parquet"
        datasets.Dataset.from_dict(columns, features).to_parquet(path)
        corpus = read_file(path)
        check_invariants(corpus)
        assert sentences_of(corpus) == SMALL
        # Names that are given win over those in the file.
        other = read_file(path, label_names="O B-LOC I-LOC B-PER I-PER".split())
        assert tags_of(other)[:2] == ["B-LOC", "I-LOC"]


def hugging_face(feature: Any) -> pa.Table:
    """A table of integer tags whose metadata describe them by `feature`, as `datasets` would."""
    table = pa.table({"tokens": [["a", "b"]], "ner_tags": [[1, 0]]})
    metadata = json.dumps({"info": {"features": {"ner_tags": feature}}})
    return table.replace_schema_metadata({"huggingface": metadata})


def test_parquet_with_class_labels_as_old_datasets_wrote_them(folder: Path) -> None:
    table = hugging_face([{"names": ["O", "B-X"], "_type": "ClassLabel"}])
    assert tags_of(read(folder, "a.parquet", table_bytes(table))) == ["B-X", "O"]


@pytest.mark.parametrize("column", ["document_id", "doc_id"])
@pytest.mark.parametrize(
    ("ids", "documents"),
    [
        (["a", "a", "b"], [0, 0, 1]),
        ([7, 3, 7], [0, 1, 0]),
        ([None, "x", None], [0, 1, 2]),  # of none we know that it is another's
    ],
)
def test_parquet_with_documents(
    folder: Path, column: str, ids: list[Any], documents: list[int]
) -> None:
    table = pa.table({"tokens": [["a"], ["b"], ["c"]], "ner_tags": [["O"]] * 3, column: ids})
    corpus = read(folder, "a.parquet", table_bytes(table))
    check_invariants(corpus)
    assert corpus.documents.tolist() == documents
    assert corpus.num_documents == len(set(documents))
    assert corpus.marks_documents
    records = [
        {"tokens": [word], "ner_tags": ["O"], column: value}
        for word, value in zip("abc", ids, strict=True)
    ]
    corpus = read(folder, "a.jsonl", lines_of(*records))
    check_invariants(corpus)
    assert corpus.documents.tolist() == documents
    assert corpus.marks_documents


def test_a_column_of_documents_by_name(folder: Path) -> None:
    record = {"tokens": ["a"], "ner_tags": ["O"]}
    named = [{**record, "document_id": 1, "page": page} for page in ("x", "x", "y")]
    texts = [{"text": "a", "entities": [], "page": page} for page in ("x", "x", "y")]
    table = table_bytes(pa.Table.from_pylist(named))
    for name, content in {
        "a.jsonl": lines_of(*named),
        "b.jsonl": lines_of(*texts),
        "a.parquet": table,
    }.items():
        corpus = read(folder, name, content, document_column="page")
        assert corpus.documents.tolist() == [0, 0, 1]
        with pytest.raises(DataError, match=r"has no column 'side' .*--document_column_name"):
            read(folder, name, content, document_column="side")
    # The first record says whether documents are told apart; of one without, nothing is known.
    corpus = read(folder, "a.jsonl", lines_of(named[0], record, record, named[2]))
    assert corpus.documents.tolist() == [0, 1, 2, 0]
    with pytest.raises(DataError, match=r"a.jsonl:2: column 'doc_id' must hold one string"):
        read(folder, "a.jsonl", lines_of(*({**record, "doc_id": x} for x in ("x", ["x"]))))
    for plain in (lines_of(record, record), lines_of(record, named[0])):
        corpus = read(folder, "a.jsonl", plain)
        assert (corpus.documents.tolist(), corpus.marks_documents) == ([0, 0], False)


def test_parquet_with_other_columns_and_row_groups(folder: Path) -> None:
    table = pa.table({"w": [["a"]] * 5, "t": [["B-X"]] * 5, "id": range(5), "x": [{"y": 1.0}] * 5})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=2)
    corpus = read(folder, "a.parquet", buffer.getvalue(), text_column="w", label_column="t")
    assert sentences_of(corpus) == parse("a/B-X") * 5


def test_a_folder_in_the_path_is_no_column(folder: Path) -> None:
    """Some readers take `name=value` folders for columns of the table."""
    partition = folder / "tokens=5"
    partition.mkdir(exist_ok=True)
    content = table_bytes(pa.table({"tokens": [["a"]], "ner_tags": [["O"]]}))
    assert read(partition, "a.parquet", content).words == ["a"]


COLUMNS = Columns("tokens", "ner_tags", None)


def test_table_without_a_file_is_hashed_by_content() -> None:
    def corpus_of(tags: list[list[Any]], words: Sequence[str] = ("a",)) -> Corpus:
        table = pa.table({"tokens": [list(words)], "ner_tags": tags})
        return open_table(table, "made-up[train]", COLUMNS, ["O", "B-X"]).read()

    corpus = corpus_of([["B-X"]])
    check_invariants(corpus)
    assert corpus.source == "made-up[train]"
    assert corpus.sha256 == corpus_of([[1]]).sha256
    assert corpus.sha256 != corpus_of([["O"]]).sha256
    assert corpus.sha256 != corpus_of([["B-X"]], "b").sha256


def test_the_hash_of_a_table_tells_documents_apart() -> None:
    def hash_of(documents: list[Any] | None) -> str:
        columns = {} if documents is None else {"doc_id": documents}
        table = pa.table({"tokens": [["a"], ["b"]], "ner_tags": [["B-X"], ["O"]], **columns})
        return open_table(table, "made-up[train]", COLUMNS, None).read().sha256

    assert hash_of([1, 1]) == hash_of(["x", "x"])
    assert len({hash_of(None), hash_of([1, 1]), hash_of([1, 2])}) == 3


def table_that_is_not_utf8() -> pa.Table:
    offsets, data = pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")
    words = pa.ListArray.from_arrays([0, 1], pa.StringArray.from_buffers(1, offsets, data))
    return pa.table([words, pa.array([["O"]])], ["tokens", "ner_tags"])


def test_strings_that_are_not_utf8(folder: Path) -> None:
    table = table_that_is_not_utf8()
    with pytest.raises(
        DataError, match=r"^made-up: column 'tokens' holds what cannot be read: .*0xff"
    ):
        open_table(table, "made-up", COLUMNS, None).read()
    path = folder / "a.parquet"
    path.write_bytes(table_bytes(table))
    assert_refused(path, None, "not a readable parquet file .*UTF")


# All formats

TYPES = ["PER", "LOC", "art-film", "地名"]


@st.composite
def corpora(draw: st.DrawFn, words: st.SearchStrategy[str]) -> list[list[Sentence]]:
    """Documents of sentences, tagged in IOB2."""

    def sentence(entities: list[tuple[list[str], str]]) -> Sentence:
        pairs = []
        for entity_words, kind in entities:
            tags = ["O" if not kind else f"I-{kind}"] * len(entity_words)
            if kind:
                tags[0] = f"B-{kind}"
            pairs += list(zip(entity_words, tags, strict=True))
        return pairs

    part = st.tuples(st.lists(words, min_size=1, max_size=3), st.sampled_from(["", "", *TYPES]))
    sentences = st.lists(part, min_size=1, max_size=4).map(sentence)
    return draw(st.lists(st.lists(sentences, min_size=1, max_size=3), min_size=1, max_size=3))


def as_conll(documents: list[list[Sentence]], separator: str) -> bytes:
    rows = []
    for document in documents:
        rows.append(f"-DOCSTART-{separator}O\n\n")
        for sentence in document:
            rows += [f"{word}{separator}{tag}\n" for word, tag in sentence]
            rows.append("\n")
    # With a byte order mark, so that a first word that is one stays a word.
    return "".join(rows).encode("utf-8-sig")


def as_text(sentence: Sentence) -> dict[str, Any]:
    entities: list[dict[str, Any]] = []
    text = ""
    for word, tag in sentence:
        if tag.startswith("B"):
            entities.append(entity(len(text), len(text) + len(word), tag[2:]))
        elif tag.startswith("I"):
            entities[-1]["end"] = len(text) + len(word)
        text += word + " "
    return {"text": text, "entities": entities[::-1]}


def check_all_formats(folder: Path, documents: list[list[Sentence]], plain: bool) -> None:
    """Writes a corpus in every format that can hold it, reads each, and compares."""
    sentences = [sentence for document in documents for sentence in document]
    names = label_list(TYPES)
    words = [[word for word, _ in sentence] for sentence in sentences]
    tags = [[tag for _, tag in sentence] for sentence in sentences]
    numbers = [[names.index(tag) for tag in row] for row in tags]
    numbered = [k for k, document in enumerate(documents) for _ in document]

    def records(tag_rows: list[Any]) -> str:
        rows = zip(words, tag_rows, strict=True)
        return lines_of(*({"tokens": w, "ner_tags": t} for w, t in rows))

    strings = pa.list_(pa.string())
    table = pa.table(
        {
            "tokens": pa.array(words, strings),
            "ner_tags": pa.array(tags, strings),
            "doc_id": numbered,
        }
    )
    integers = table.set_column(1, "ner_tags", pa.array(numbers, pa.list_(pa.int64())))
    with_documents = [
        read(folder, "a.txt", as_conll(documents, "\t")),
        read(folder, "a.parquet", table_bytes(table)),
        read(folder, "a.parquet", table_bytes(integers), label_names=names),
    ]
    without = [
        read(folder, "a.jsonl", records(tags)),
        read(folder, "a.jsonl", records(numbers), label_names=names),
    ]
    if plain:
        with_documents.append(read(folder, "a.txt", as_conll(documents, " ")))
        without.append(read(folder, "a.jsonl", lines_of(*map(as_text, sentences))))
    for corpus in with_documents + without:
        check_invariants(corpus)
        assert sentences_of(corpus) == sentences
        assert corpus.scheme == "IOB2"
        assert corpus.type_names == with_documents[0].type_names
    for corpus in with_documents:
        assert corpus.documents.tolist() == numbered
    for corpus in without:
        assert corpus.num_documents == 1


any_words = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r\t"), max_size=5
).filter(lambda word: word != "-DOCSTART-")
plain_words = st.text("aBé9\u0301\u0915\u094d", min_size=1, max_size=5) | st.sampled_from(
    [".", "-", "$", "«", "😀", "日"]
)


@settings(deadline=None, max_examples=60)
@given(corpora(any_words))
def test_formats_agree(folder: Path, documents: list[list[Sentence]]) -> None:
    check_all_formats(folder, documents, plain=False)


@settings(deadline=None, max_examples=60)
@given(corpora(plain_words))
def test_formats_agree_on_plain_words(folder: Path, documents: list[list[Sentence]]) -> None:
    check_all_formats(folder, documents, plain=True)


# What is refused

ONE = {"tokens": ["a"], "ner_tags": ["O"]}
TEXT = {"text": "Mary Poe", "entities": []}


def record(**changes: Any) -> str:
    """A good line, and one with changes, as line 2."""
    return lines_of(ONE, {key: v for key, v in {**ONE, **changes}.items() if v != "absent"})


def entities(*values: Any, text: Any = "Mary Poe said") -> str:
    return lines_of(TEXT, {"text": text, "entities": list(values)})


BAD_FILES: list[tuple[str, str | bytes, int | None, str]] = [
    # CoNLL columns
    ("a.txt", "", None, "holds no sentence; is it the right file"),
    ("a.txt", "\n \n\t\n\r\n", None, "holds no sentence"),
    ("a.txt", "\ufeff", None, "holds no sentence"),
    ("a.txt", "-DOCSTART- O\n\n", None, "holds no sentence"),
    ("a.txt", "a O\nb\n", 2, "1 column instead of 2 as above; separate word and tag with"),
    ("a.txt", "a\n", 1, "1 column instead of 2 or more: word ... tag"),
    ("a.txt", "a O\n\nb\t\n", 3, "1 column instead of 2 as above"),
    ("a.txt", "a N x O\nb N O\n", 2, "3 columns instead of 4 as above"),
    ("a.txt", "a\tO\nNew York B-LOC\n", 2, "3 columns instead of 2 as above"),
    ("a.txt", "a O\nb N x O\n", 2, "4 columns instead of 2 as above"),
    ("a.txt", "a O\r\nb\r\n", 2, "1 column instead of 2"),
    ("a.txt", "a O\n\nb PER\nc PER\n", 3, "tag 'PER' has no B-, I-, E- or S-.*; write O, or B-"),
    ("a.txt", "a B-X\nb B-\n", 2, "tag 'B-' has no B-"),
    ("a.txt", "a b-X\n", 1, "tag 'b-X' has no B-"),
    ("a.txt", "a\tN\tO\nb\t\t \xa0\n", 2, "tag .* has no B-"),
    ("a.txt", "# id 1\na B O\n", 1, "tag '1' has no B-"),
    ("a.txt", "a O\nb B-\x01\n", 2, "control character; write O"),
    ("a.txt", f"a {'x' * 9999}\n", 1, "has no B-"),
    ("a.txt", "a O\rb O\r", 1, "a carriage return within the line; .*tr"),
    ("a.txt", "a O\n\rb\rc O\n", 2, "a carriage return within the line"),
    ("a.txt", "a O\n\n-DOCSTART- O\rb O\rc O\n", 3, "a carriage return within the line"),
    ("a.txt", "-DOCSTART-\r\ra O\r", 1, "a carriage return within the line"),
    ("a.txt", "a O\nb\0 O\n", 2, "NUL byte"),
    ("a.txt", "a O\nb O\n".encode("utf-16"), 1, "NUL byte.*iconv -f utf-16"),
    ("a.txt", "a O\nMüller B-PER\n".encode("latin1"), 2, "0xfc is not UTF-8; convert.*iconv"),
    ("a.txt", b"\xef\xbb\xbfa O\n\nb\xe9 O\n", 3, "byte 0xe9 is not UTF-8"),
    ("a.txt", b"\xef\xbb\xbf\n\n\n\xff O\n", 4, "byte 0xff is not UTF-8"),
    ("a.txt", b"a\xed\xa0\x80 O\n", 1, "not UTF-8"),  # half of a UTF-16 pair
    ("a.txt", lines_of(ONE), 1, "has no B-"),
    ("a.txt", "".join(f"a B-{k}\n" for k in range(MAX_TYPES + 1)), None, "types of entities"),
    # JSON lines of any kind
    ("a.jsonl", "", None, "holds no sentence"),
    ("a.jsonl", "\n \r\n", None, "holds no sentence"),
    ("a.jsonl", lines_of(ONE) + '{"tokens": ["a"], "ner_t', 2, "not JSON .*may be cut off"),
    ("a.jsonl", '{\n"tokens": ["a"],\n"ner_tags": ["O"]}', 1, "not JSON .*each line must be one"),
    ("a.jsonl", "a O\n", 1, "not JSON"),
    ("a.jsonl", lines_of(ONE)[:-1] * 2, 1, "not JSON .*Extra data"),
    ("a.jsonl", lines_of(ONE)[:-2] + ', "tokens": []}', 1, "not JSON .key 'tokens' twice in one o"),
    ("a.jsonl", '{"id": {"a": 1, "a": 1}}', 1, "key 'a' twice in one object"),
    ("a.jsonl", "\ufeff\ufeff" + lines_of(ONE), 1, "not JSON"),
    ("a.jsonl", lines_of(ONE, [ONE]), 2, "each line must be one JSON object, such as {"),
    ("a.jsonl", lines_of("a"), 1, "one JSON object"),
    ("a.jsonl", "null\n", 1, "one JSON object"),
    ("a.jsonl", "1" * 5000, 1, "not JSON"),
    ("a.jsonl", "[" * 100_000, 1, "not JSON .*recursion"),
    ("a.jsonl", '{"a":' * 100_000, 1, "not JSON .*recursion"),
    ("a.jsonl", lines_of(ONE).encode() + b'{"tokens": ["\xff"]}', 2, "byte 0xff is not UTF-8"),
    ("a.jsonl", lines_of(ONE, {"tokens": []}), 2, "needs 'tokens' and 'ner_tags', or 'text'.*has "),
    ("a.jsonl", lines_of({"text": "a"}), 1, r"but has 'text' \(--text_column_name"),
    ("a.jsonl", "{}", 1, "but has nothing"),
    ("a.jsonl", lines_of({str(k): 0 for k in range(999)}), 1, r"'7', \.\.\. \("),
    # ... of words and tags
    ("a.jsonl", record(ner_tags="absent"), 2, "needs 'tokens' and 'ner_tags'"),
    (
        "a.jsonl",
        record(ner_tags=["O", "O"]),
        2,
        "1 words in 'tokens' but 2 tags in 'ner_tags'; eac",
    ),
    ("a.jsonl", record(ner_tags=[]), 2, "1 words in 'tokens' but 0 tags"),
    ("a.jsonl", record(tokens=[]), 2, "0 words in 'tokens' but 1 tags"),
    ("a.jsonl", record(tokens="a"), 2, "'tokens' must be a list of strings, not 'a'"),
    ("a.jsonl", record(tokens=[1]), 2, r"'tokens' must be a list of strings, not \[1\]"),
    ("a.jsonl", record(tokens=[None]), 2, "'tokens' must be a list of strings"),
    ("a.jsonl", record(tokens=None), 2, "'tokens' must be a list of strings, not None"),
    ("a.jsonl", record(ner_tags="O"), 2, "'ner_tags' must be a list of tags, not 'O'"),
    ("a.jsonl", record(ner_tags=None), 2, "'ner_tags' must be a list of tags, not None"),
    ("a.jsonl", record(ner_tags={"0": "O"}), 2, "'ner_tags' must be a list of tags"),
    ("a.jsonl", record(ner_tags=[1]), 2, "tag 1 is an integer; name them, in order, with --label"),
    ("a.jsonl", record(ner_tags=[True]), 2, 'tag True is neither a string, such as "B-PER", nor'),
    ("a.jsonl", record(ner_tags=[1.0]), 2, "tag 1.0 is neither"),
    ("a.jsonl", record(ner_tags=[None]), 2, "tag None is neither"),
    ("a.jsonl", record(ner_tags=[["O"]]), 2, r"tag \['O'\] is neither"),
    ("a.jsonl", record(ner_tags=["PER"]), 2, "tag 'PER' has no B-"),
    ("a.jsonl", record(ner_tags=[""]), 2, "tag '' has no B-"),
    ("a.jsonl", record(ner_tags=["B- "]), 2, "tag 'B-' has no B-"),
    ("a.jsonl", record(ner_tags=["B-a\nb"]), 2, "control character"),
    ("a.jsonl", '{"tokens": ["a"], "ner_tags": ["B-\\ud800"]}', 1, "control character"),
    ("a.jsonl", '{"tokens": ["a\\u0000"], "ner_tags": ["O"]}', 1, r"holds U\+0000.*remove it"),
    ("a.jsonl", '{"tokens": ["\\ud800"], "ner_tags": ["O"]}', 1, r"holds U\+D800.*remove it"),
    # ... of text and entities
    ("a.jsonl", entities(text=None), 2, "'text' must be a string, not None"),
    ("a.jsonl", entities(text=["Mary"]), 2, "'text' must be a string"),
    ("a.jsonl", '{"text": "a\\u0000", "entities": []}', 1, r"holds U\+0000"),
    ("a.jsonl", '{"text": "a\\udfff", "entities": []}', 1, r"holds U\+DFFF"),
    (
        "a.jsonl",
        lines_of({"text": "a", "entities": None}),
        1,
        "'entities' must be a list, not None",
    ),
    ("a.jsonl", lines_of({"text": "a", "entities": {}}), 1, "'entities' must be a list, not {}"),
    ("a.jsonl", entities([0, 4, "PER"]), 2, "needs start, end and label"),
    ("a.jsonl", entities(None), 2, "entity None needs start, end and label"),
    ("a.jsonl", entities("PER"), 2, "entity 'PER' needs start"),
    ("a.jsonl", entities({"start": 0, "end": 4}), 2, "needs start, end and label"),
    ("a.jsonl", entities({"start": 0, "label": "X"}), 2, "needs start, end and label"),
    ("a.jsonl", entities({"end": 1, "label": "X"}), 2, "needs start, end and label"),
    *[
        (
            "a.jsonl",
            entities({**entity(0, 4, "PER"), **change}),
            2,
            "start and end must be integers",
        )
        for change in (
            *({"start": value} for value in (0.0, False, "0", None, [])),
            *({"end": value} for value in (4.0, True, "4", None)),
            *({"label": value} for value in (1, None, ["PER"])),
        )
    ],
    ("a.jsonl", entities(entity(0, 4, "")), 2, "empty label"),
    ("a.jsonl", entities(entity(0, 4, " ")), 2, "empty label"),
    ("a.jsonl", entities(entity(0, 4, "a\nb")), 2, "control character"),
    *[
        ("a.jsonl", entities(entity(start, end, "PER")), 2, f"{start}-{end} is outside the text, w")
        for start, end in ((0, 14), (20, 30), (-4, 4), (-4, -1), (4, 4), (4, 0), (0, 10**20))
    ],
    ("a.jsonl", entities(entity(0, 4, "A"), entity(0, 4, "A")), 2, "overlap: 'A' 0-4 and 'A' 0-4;"),
    ("a.jsonl", entities(entity(5, 8, "B"), entity(0, 6, "A")), 2, "'A' 0-6 and 'B' 5-8; keep one"),
    ("a.jsonl", entities(entity(0, 8, "A"), entity(0, 4, "B")), 2, "entities overlap"),
    ("a.jsonl", entities(entity(1, 4, "A")), 2, "'A' 1-4 'ary' does not begin and end between wor"),
    ("a.jsonl", entities(entity(0, 3, "A")), 2, "does not begin and end between words; move its"),
    ("a.jsonl", entities(entity(0, 6, "A")), 2, "does not begin and end between words"),
    ("a.jsonl", entities(entity(4, 5, "A")), 2, "'A' 4-5 ' ' does not begin"),
    ("a.jsonl", entities(entity(0, 2, "A"), text="   a"), 2, "does not begin and end"),
    # The same letters, but not the same place.
    ("a.jsonl", entities(entity(1, 4, "A"), text="aa aa"), 2, "does not begin and end"),
]


def assert_refused(path: Path, line: int | None, pattern: str, **options: Any) -> None:
    with pytest.raises(DataError, match=pattern) as caught:
        read_file(path, **options)
    message = str(caught.value)
    assert caught.value.exit_code == 65
    assert message.startswith(f"{path}: " if line is None else f"{path}:{line}: ")
    assert (caught.value.path is not None, caught.value.line) == (True, line)
    assert message.count("\n") <= 1
    assert len(message) < len(str(path)) + 400


@pytest.mark.parametrize(
    ("name", "content", "line", "pattern"),
    BAD_FILES,
    ids=[f"{k}-{pattern[:40]}" for k, (_, _, _, pattern) in enumerate(BAD_FILES)],
)
def test_bad_file(
    folder: Path,
    name: str,
    content: str | bytes,
    line: int | None,
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(path, line, pattern)
    # The same from a file that is read a few bytes at a time and checked word by word.
    monkeypatch.setattr(readers, "_CHUNK_BYTES", 3)
    with pytest.raises(DataError, match=pattern) as caught:
        read_in_blocks(path, 1)
    assert caught.value.line == line


def read_in_blocks(path: Path, num_words: int) -> None:
    stream = open_file(path)
    for _ in stream.blocks(num_words):
        pass
    stream.builder.conclude()


def test_a_mistake_far_down_a_file_of_many_blocks(folder: Path) -> None:
    good = "Mary B-PER\nPoe I-PER\n\n"
    for bad, pattern in (
        ("Paris\n", "1 column instead of 2"),
        ("Paris LOC\n", "tag 'LOC'"),
        ("Paris B-LOC\0\n", "NUL byte"),
        ("Paris \udcff\n", "not UTF-8"),
    ):
        path = folder / "long.txt"
        path.write_bytes((good * 20_000 + bad + good * 20_000).encode(errors="surrogateescape"))
        assert_refused(path, 60_001, pattern)
        with pytest.raises(DataError, match=pattern) as caught:
            read_in_blocks(path, 100)
        assert caught.value.line == 60_001


def test_bad_integers(folder: Path) -> None:
    path = folder / "a.jsonl"
    for tag in (-1, 2, 10**30):
        path.write_text(record(ner_tags=[tag]))
        assert_refused(
            path, 2, f"tag {str(tag)[:3]}.* is outside the 2 label", label_names=["O", "B-X"]
        )
    path.write_text(record(ner_tags=[1]))
    assert_refused(path, 2, "tag 'X' has no B-", label_names=["O", "X"])


@pytest.mark.parametrize(
    "opening", ['{"tokens": ["a"], "ner_tags": [', '{"text": "a", "entities": [']
)
def test_deep_json_is_refused_whether_or_not_it_can_be_parsed(folder: Path, opening: str) -> None:
    path = folder / "deep.jsonl"
    for depth in (5, 500, *range(940, 1001, 5), 5000):
        path.write_text(opening + "[" * depth + "]" * depth + "]}")
        with pytest.raises(DataError) as caught:
            read_file(path)
        assert len(str(caught.value)) < 600


def parquet(**columns: Any) -> bytes:
    return table_bytes(pa.table({"tokens": [["a"], ["b"]], "ner_tags": [["O"], ["O"]], **columns}))


def duplicated(column: str) -> bytes:
    table = pa.table({"tokens": [["a"]], "ner_tags": [["O"]], "doc_id": [1]})
    return table_bytes(table.append_column(column, table.column(column)))


BAD_PARQUET: list[tuple[bytes, int | None, str]] = [
    (b"", None, "not a readable parquet file .*write it again"),
    (b"a O\n", None, "not a readable parquet file"),
    (b"PAR1" + bytes(100) + b"PAR1", None, "not a readable parquet file"),
    (parquet()[:-20], None, "not a readable parquet file"),
    (parquet()[:40] + bytes(60) + parquet()[100:], None, "not a readable parquet file"),
    (
        table_bytes(pa.table({"a": [1], "b": [2]})),
        None,
        r"has no column 'tokens' but 'a', 'b' \(--",
    ),
    (table_bytes(pa.table({"tokens": [["a"]]})), None, "has no column 'ner_tags' but 'tokens'"),
    (table_bytes(pa.table({})), None, "has no column 'tokens' but nothing"),
    (duplicated("tokens"), None, "has 2 columns 'tokens'; keep one"),
    (duplicated("ner_tags"), None, "has 2 columns 'ner_tags'; keep one"),
    (duplicated("doc_id"), None, "has 2 columns 'doc_id'; keep one"),
    (parquet()[:0] + table_bytes(pa.table({"tokens": ["a"], "ner_tags": [["O"]]})), None, "a list"),
    (parquet(ner_tags=["O", "O"]), None, "column 'ner_tags' must hold a list in each.* not string"),
    (parquet(ner_tags=[0, 0]), None, "column 'ner_tags' must hold a list .* not int64"),
    (parquet(tokens=[{"a": 1}] * 2), None, "column 'tokens' must hold a list"),
    (parquet(tokens=pa.nulls(2)), None, "column 'tokens' must hold a list"),
    (parquet(tokens=[["a"], None]), 2, "'tokens' must be a list of strings, not None"),
    (parquet(ner_tags=[["O"], None]), 2, "'ner_tags' must be a list of tags, not None"),
    (parquet(tokens=[["a"], [None]]), 2, "'tokens' must be a list of strings"),
    (parquet(ner_tags=[["O"], [None]]), 2, "tag None is neither"),
    (parquet(tokens=[[1], [2]]), 1, "'tokens' must be a list of strings"),
    (parquet(tokens=[[b"a"], [b"b"]]), 1, "'tokens' must be a list of strings"),
    (parquet(tokens=[[["a"]], [["b"]]]), 1, "'tokens' must be a list of strings"),
    (parquet(tokens=[["a"], ["b\0"]]), 2, r"holds U\+0000"),
    (parquet(ner_tags=[["O"], ["O", "O"]]), 2, "1 words in 'tokens' but 2 tags"),
    (parquet(ner_tags=[["O"], ["PER"]]), 2, "tag 'PER' has no B-"),
    (parquet(ner_tags=[[0], [1]]), 1, "tag 0 is an integer; name them"),
    (parquet(ner_tags=[[0.0], [1.0]]), 1, "tag 0.0 is neither"),
    (parquet(ner_tags=[[True], [False]]), 1, "tag True is neither"),
    (parquet(document_id=[["a"], ["b"]]), None, "column 'document_id' must hold one string or int"),
    (parquet(doc_id=[{"a": 1}, {"a": 2}]), None, "column 'doc_id' must hold one string or integer"),
    (
        parquet(doc_id=pa.array([1, 10**8], pa.date32())),  # after the year 9999
        None,
        "column 'doc_id' holds what cannot be read",
    ),
    (
        table_bytes(pa.table({"tokens": [["a"]], "ner_tags": [["O"]]}).slice(0, 0)),
        None,
        "no senten",
    ),
    (table_bytes(hugging_face({"feature": {"names": [1, 2]}})), 1, "tag 1 is an integer"),
    (table_bytes(hugging_face({"feature": {"names": "OB"}})), 1, "tag 1 is an integer"),
    (table_bytes(hugging_face({"feature": {"names": ["O"]}})), 1, "tag 1 is outside the 1 label"),
    (table_bytes(hugging_face([])), 1, "tag 1 is an integer"),
    (table_bytes(hugging_face("names")), 1, "tag 1 is an integer"),
    (table_bytes(hugging_face(None)), 1, "tag 1 is an integer"),
]


@pytest.mark.parametrize(
    ("content", "line", "pattern"),
    BAD_PARQUET,
    ids=[f"{k}-{pattern[:40]}" for k, (_, _, pattern) in enumerate(BAD_PARQUET)],
)
def test_bad_parquet(
    folder: Path,
    content: bytes,
    line: int | None,
    pattern: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = folder / "bad.parquet"
    path.write_bytes(content)
    assert_refused(path, line, pattern)
    monkeypatch.setattr(readers, "_TABLE_ROWS", 1)
    with pytest.raises(DataError, match=pattern) as caught:
        read_in_blocks(path, 1)
    assert caught.value.line == line


def test_parquet_metadata_may_be_anything(folder: Path) -> None:
    for metadata in (b"", b"{", b"\xff", b"null", b"[]", b"[" * 100_000, b'{"info": 1}'):
        table = hugging_face(None).replace_schema_metadata({"huggingface": metadata})
        with pytest.raises(DataError, match="tag 1 is an integer"):
            read(folder, "a.parquet", table_bytes(table))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_missing_file_and_folder(tmp_path: Path, ending: str) -> None:
    assert_refused(tmp_path / f"none.{ending}", None, "no such file; check the path")
    (tmp_path / "file").write_text("a O\n")
    assert_refused(tmp_path / "file" / f"below.{ending}", None, "no such file")
    (tmp_path / f"folder.{ending}").mkdir()
    assert_refused(tmp_path / f"folder.{ending}", None, "is a folder; give a file in it")
    with pytest.raises(DataError, match="no such file"):
        list(read_lines(tmp_path / f"none.{ending}"))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_a_disk_that_fails_is_not_bad_data(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", lambda *_: Failing())
    monkeypatch.setattr(Path, "read_bytes", lambda _: Failing().read())
    with pytest.raises(StorageError, match="cannot be read: Input/output error") as caught:
        read_file(tmp_path / f"a.{ending}")
    assert caught.value.exit_code == 74


def test_as_many_types_as_there_may_be(folder: Path) -> None:
    content = "".join(f"a B-{k:05}\n" for k in reversed(range(MAX_TYPES)))
    start = time.process_time()
    corpus = read(folder, "a.txt", content)
    assert time.process_time() - start < 0.5
    check_invariants(corpus)
    assert corpus.types.tolist() == [*reversed(range(MAX_TYPES))]


def test_irregular_tags_are_a_warning_that_names_the_first(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "bertner"):
        corpus = read(folder, "a.txt", "a B-X\n\nb B-X\nc O\nd I-X\ne B-Y\nf I-X\n")
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert warning.startswith(
        f"{folder / 'a.txt'}:5: 2 tags do not fit IOB2, the first is I-X on 'd'"
    )
    assert tags_of(corpus) == ["B-X", "B-X", "O", "B-X", "B-Y", "B-X"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "bertner"):
        read(folder, "a.txt", f"a B-X\n{'b' * 9999} S-{'x' * 9999}\nc B-X\n")
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert len(warning) < 300 + len(str(folder))
    caplog.clear()
    read(folder, "a.txt", "a I-X\nb B-X\n\nc I-X\n")
    assert not caplog.records
    # White space that is forgiven in a tag does not break the warning's line.
    read(folder, "a.jsonl", lines_of({"tokens": ["a", "b"], "ner_tags": ["B-X", "\nE-\u2028Y\n"]}))
    (warning,) = [entry.getMessage() for entry in caplog.records]
    assert "the first is E- Y on 'b'" in warning


# Whatever is in a file, the outcome is a corpus or a DataError.


def valid_files() -> dict[str, bytes]:
    sentences = [*SMALL, [("é", "B-art"), ("😀", "I-art"), ("x", "O")]]
    words = [[word for word, _ in sentence] for sentence in sentences]
    tags = [[tag for _, tag in sentence] for sentence in sentences]
    numbers = [[1, 2, 0], [3, 3, 0], [1, 2, 0]]
    columns = {"tokens": words, "ner_tags": tags, "document_id": ["a", "a", "b"]}
    plain = io.BytesIO()
    pq.write_table(pa.table(columns), plain, compression="none", use_dictionary=False)
    integers = pa.table({**columns, "ner_tags": numbers}).replace_schema_metadata(
        hugging_face({"feature": {"names": "O B-A I-A B-C".split()}}).schema.metadata
    )

    def records(rows: list[Any]) -> bytes:
        pairs = zip(words, rows, strict=True)
        return lines_of(*({"tokens": w, "ner_tags": t} for w, t in pairs)).encode()

    return {
        "spaces.txt": as_conll([sentences[:2], sentences[2:]], " "),
        "tabs.txt": as_conll([sentences], "\t").replace(b"\n", b"\r\n"),
        "four.txt": as_conll([sentences], " N x ").replace(b"B-LOC", b"S-LOC"),
        "strings.jsonl": records(tags),
        "integers.jsonl": records(numbers),
        "text.jsonl": lines_of(*map(as_text, sentences)).encode(),
        "strings.parquet": plain.getvalue(),
        "integers.parquet": table_bytes(integers),
    }


BITS = (
    *[
        b"\0",
        b"\n",
        b"\r",
        b"\r\n",
        b"\t",
        b" ",
        b"\xff",
        b"\xe2\x80\xa8",
        b"\xef\xbb\xbf",
        b"\xc2",
    ],
    *[b'"', b"\\", b"\\ud800", b"\\u0000", b"[", b"]", b"{", b"}", b",", b":", b"null", b"true"],
    *[
        b"-1",
        b"1.5",
        b"1e999",
        b"NaN",
        b"9" * 25,
        b"0",
        b'""',
        b"[[]]",
        b'{"start":0}',
        b"[" * 3000,
    ],
    *[b"-DOCSTART- O\n", b"B-", b"I-X", b"S-X", b"PER", b"O", b'"tokens"', b'"entities"', b'"end"'],
)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One to three small accidents."""
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        to = min(len(content), at + rng.choice((1, 1, 2, 5, 30)))
        kind = rng.randrange(7)
        if kind == 0:
            content = content[:at]
        elif kind == 1:
            content = content[:at] + content[to:]
        elif kind == 2:
            content = content[:at] + rng.choice(BITS) + content[at:]
        elif kind == 3:
            content = content[:at] + rng.choice(BITS) + content[to:]
        elif kind == 4:
            content = content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
        elif kind == 5:
            source = rng.randrange(len(content) + 1)
            content = content[:at] + content[source : source + to - at] + content[at:]
        else:
            rows = content.split(b"\n")
            rng.shuffle(rows)
            content = b"\n".join(rows)
    return content


@pytest.mark.parametrize("name", sorted(valid_files()))
def test_damaged_files_are_read_or_refused(folder: Path, name: str) -> None:
    content = valid_files()[name]
    names = ["O", "B-A", "I-A", "B-C"] if name == "integers.jsonl" else None
    check_invariants(read(folder, name, content, label_names=names))  # the undamaged one
    rng = random.Random(name)
    logging.getLogger("bertner").setLevel(logging.ERROR)
    corpora, refusals = [], []
    try:
        for _ in range(400):
            try:
                corpora.append(read(folder, name, mutate(content, rng), label_names=names))
            except DataError as error:
                refusals.append(str(error))
    finally:
        logging.getLogger("bertner").setLevel(logging.NOTSET)
    for corpus in corpora:
        check_invariants(corpus)
    assert all(message.count("\n") <= 1 for message in refusals)
    assert len(refusals) > 50
    assert len(corpora) > 10


# Plain lines


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", []),
        ("a", ["a"]),
        ("a\n", ["a"]),
        ("a\n\nb\n", ["a", "", "b"]),
        ("\n", [""]),
        ("a\r\nb\r\n", ["a", "b"]),
        ("\ufeffa\u2028b\x85c\n", ["a\u2028b\x85c"]),
    ],
)
def test_read_lines(folder: Path, content: str, expected: list[str]) -> None:
    path = folder / "plain.txt"
    path.write_bytes(content.encode())
    assert list(read_lines(path)) == expected


def test_read_lines_refuses(folder: Path) -> None:
    path = folder / "plain.txt"
    path.write_bytes(b"a\nb\xff\n")
    with pytest.raises(DataError, match=f"^{path}:2: byte 0xff is not UTF-8"):
        list(read_lines(path))


# Blocks

SCHEME_TAGS = {
    "IOB1": ["O", "I-X", "I-X", "B-X", "I-Y"],
    "IOB2": ["O", "B-X", "I-X", "B-Y", "I-Y"],
    "BIOES": ["O", "S-X", "B-X", "I-X", "E-X", "S-Y"],
    "any": ["O", "B-X", "I-X", "E-X", "S-Y", "L-Z", "I-Y"],
}


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(sorted(SCHEME_TAGS)).flatmap(
        lambda scheme: st.lists(
            st.lists(
                st.tuples(plain_words, st.sampled_from(SCHEME_TAGS[scheme])), min_size=1, max_size=6
            ),
            min_size=1,
            max_size=8,
        )
    ),
    st.integers(0, 9),
    st.integers(1, 12),
    st.integers(1, 40),
)
def test_blocks_are_the_corpus_in_parts(
    folder: Path, sentences: list[Sentence], ending: int, num_words: int, chunk_bytes: int
) -> None:
    words = [[word for word, _ in sentence] for sentence in sentences]
    tags = [[tag for _, tag in sentence] for sentence in sentences]
    documents = [k // 3 for k in range(len(sentences))]
    table = pa.table({"tokens": words, "ner_tags": tags, "doc_id": documents})
    grouped = [sentences[k : k + 3] for k in range(0, len(sentences), 3)]
    records = ({"tokens": w, "ner_tags": t} for w, t in zip(words, tags, strict=True))
    contents = {
        "blocks.txt": as_conll(grouped, " ")[: -ending or None],
        "blocks.jsonl": lines_of(*records).encode(),
        "blocks.parquet": table_bytes(table),
    }
    for name, content in contents.items():
        path = folder / name
        path.write_bytes(content)
        with pytest.MonkeyPatch.context() as patch:
            whole, message = outcome(lambda path=path: read_file(path))
            patch.setattr(readers, "_CHUNK_BYTES", chunk_bytes)
            patch.setattr(readers, "_TABLE_ROWS", num_words)
            stream = open_file(path)
            blocks, message_in_blocks = outcome(lambda s=stream: list(s.blocks(num_words)))
            if isinstance(blocks, list):
                scheme, message_in_blocks = outcome(stream.builder.conclude)
        assert message_in_blocks == message
        if not isinstance(whole, Corpus):
            continue  # what the last line lost made it a bad one
        assert isinstance(blocks, list)
        assert (scheme, stream.digest.hexdigest()) == (whole.scheme, whole.sha256)
        assert tuple(sorted(stream.builder.kinds)) == whole.type_names
        assert [word for block in blocks for word in block.words] == whole.words
        for field in ("prefixes", "documents", "lines"):
            parts = np.concatenate([getattr(block, field) for block in blocks])
            np.testing.assert_array_equal(parts, getattr(whole, field))
        lengths = np.concatenate([np.diff(block.starts) for block in blocks])
        np.testing.assert_array_equal(lengths, np.diff(whole.starts))
        kinds = [*stream.builder.kinds, None]
        names = [kinds[k] for block in blocks for k in block.types]
        assert names == [(*whole.type_names, None)[k] for k in whole.types]
        again = list(whole.blocks(num_words))
        assert [block.words for block in again] == [block.words for block in blocks]


def outcome(work: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What some work returns, or None, and what it warned of or was refused with."""
    logger, records = logging.getLogger("bertner"), []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        return work(), records
    except DataError as error:
        return None, [str(error)]
    finally:
        logger.removeHandler(handler)


# Corpora


def test_corpus(folder: Path) -> None:
    content = "a B-X\nb I-X\n\nc B-Y\n\n-DOCSTART-\n\nd O\n"
    corpus = read(folder, "a.txt", content)
    assert (corpus.num_sentences, corpus.num_words, corpus.num_documents) == (3, 4, 2)
    assert corpus.entity_counts() == {"X": 1, "Y": 1}
    assert [corpus.sentence(k) for k in range(3)] == [["a", "b"], ["c"], ["d"]]
    head = corpus.head(1)
    assert sentences_of(head) == parse("a/B-X b/I-X")
    assert (head.num_sentences, head.num_documents, head.lines.tolist()) == (1, 1, [1, 2])
    assert head.entity_counts() == {"X": 1, "Y": 0}
    assert sentences_of(corpus.head(2)) == parse("a/B-X b/I-X", "c/B-Y")
    for num_sentences in (3, 4):
        assert corpus.head(num_sentences) is corpus


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_sample_corpus(split: str) -> None:
    corpus = read_file(SAMPLE / f"{split}.txt")
    check_invariants(corpus)
    assert corpus.scheme == "IOB2"
    assert set(corpus.type_names) <= {"PER", "LOC", "ORG", "MISC"}


@needs_conll
def test_conll2003() -> None:
    start = time.process_time()
    train = read_file(SHARED_DATA / "conll2003" / "train.txt")
    seconds = time.process_time() - start
    check_invariants(train)
    assert (train.num_sentences, train.num_documents, train.num_words) == (14041, 946, 203621)
    assert sum(train.entity_counts().values()) == 23499
    assert (train.scheme, train.type_names) == ("IOB2", ("LOC", "MISC", "ORG", "PER"))
    validation = read_file(SHARED_DATA / "conll2003" / "valid.txt")
    check_invariants(validation)
    assert (validation.num_sentences, validation.num_documents) == (3250, 216)
    assert validation.num_words == 51362
    assert validation.entity_counts() == {"PER": 1842, "LOC": 1837, "ORG": 1341, "MISC": 922}
    assert seconds < 1.5
