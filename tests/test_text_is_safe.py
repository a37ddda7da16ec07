"""Text is safe: whatever is in a file, its words come out as they went in, or it is refused.

Files of each kind are made with odd words, odd tags and odd values, then damaged, all from a seed.
What a file says is told by an oracle that knows nothing of bertner's readers.
"""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tokenizers.normalizers import BertNormalizer

from bertner.cli import eval_main, train_main
from bertner.config import BertConfig, Reading
from bertner.corpus import Corpus
from bertner.data import TokenDataset, prepare
from bertner.data_cache import prepare_file
from bertner.errors import DataError
from bertner.labels import LabelSet, label_list
from bertner.model import BertForNER
from bertner.readers import open_file, read_file
from bertner.tokenizer import Tokenizer
from tests.conftest import CASED_VOCAB, write_model_folder
from tests.test_data import assert_same_data

ENDINGS = {"conll": ".txt", "tokens": ".jsonl", "spans": ".json"}

# What numbers stand for in files of tokens.
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]

SECONDS = 1.0  # of the processor, for one file


# Making files

PLAIN_WORDS = (
    "Paris London the said of landing Mary Poe U.S. x-y-z 1996-08-22 Zoë 日本 😀 don't".split()
)
LINE_ENDS = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]  # to splitlines
ZERO_WIDTH = ["\u200b", "\xad", "\ufeff", "\u200d", "\u2060", "\u180e", "\u0301"]
SPACES = ["\xa0", "\u3000", "\u2003"]
ODD_WORDS = [
    *LINE_ENDS,
    *ZERO_WIDTH,
    *SPACES,
    *[f"a{odd}b" for odd in (*LINE_ENDS, *ZERO_WIDTH, *SPACES)],
    *["[CLS]", "[SEP]a", "##ing", "-", "--", "O", "B-PER", "#", '"', "\\", "\\n", "-DOCSTART-x"],
    *["e\u0301", "👩‍👩‍👧", "🇫🇷", "العربية", "नमस्ते", "가각", "İ", "ﷺ", "\ufffd"],
    *["\x7f", "\x01", "\ue000"],
    *["x" * 150, "-" * 90, "\u200b" * 70],
]
HUGE_PARTS = ["x", "-", "a.", "\u200b", "a\u0301", "日", "\ufeff", "😀", "\u3000", "[SEP]"]
BAD_WORDS = ["", " ", "\0", "\ud800", "a\udfff", "a b", "a\rb", "a\nb", "a\tb", "-DOCSTART-"]

SCHEMES = {
    "IOB1": "O O I-PER I-PER I-LOC B-PER",
    "IOB2": "O O B-PER I-PER B-LOC I-LOC B-a-b",
    "BIOES": "O O S-PER B-PER I-PER E-PER S-LOC",
    "BILOU": "O O U-PER B-PER I-PER L-PER U-LOC",
    "any": "O I-PER E-LOC S-PER B-LOC L-LOC I-地名",
}
BAD_TAGS = ["PER", "", "B-", "b-PER", "B_PER", "o", "-", "B-\x01", "B-\u2028", "X-PER", "B -PER"]
BAD_VALUES: list[Any] = [
    *[None, True, False, 0, 1, -1, 4, 5, 1.0, 10**25, float("nan"), float("inf"), -(10**4200)],
    *["", "O", [], [[]], ["O"], {}, {"start": 0}, "\ud800"],
]

Sentence = list[tuple[str, Any]]  # (word, tag)


def make_sentences(rng: random.Random, odd: float, bad: float) -> list[Sentence]:
    """Sentences with tags of one scheme; `odd` and `bad` are shares of words and of tags."""
    tags = SCHEMES[rng.choice(list(SCHEMES))].split()

    def word() -> str:
        if rng.random() < bad:
            return rng.choice(BAD_WORDS)
        if rng.random() < odd / 1500:
            return huge(rng.choice(HUGE_PARTS).encode(), rng).decode()
        return rng.choice(ODD_WORDS if rng.random() < odd else PLAIN_WORDS)

    def tag() -> str:
        return rng.choice(BAD_TAGS if rng.random() < bad else tags)

    lengths = [rng.choice((1, 2, 3, 5, 8)) for _ in range(rng.randint(1, 6))]
    return [[(word(), tag()) for _ in range(length)] for length in lengths]


def huge(part: bytes, rng: random.Random) -> bytes:
    """Something repeated until it is hundreds of kilobytes."""
    return part * (rng.randint(60_000, 200_000) // len(part))


def make_conll(rng: random.Random, odd: float, bad: float) -> bytes:
    separator = rng.choice([" ", " ", "\t", "\t", " N x ", "\tN\t\t", "   "])
    rows: list[str] = []
    for sentence in make_sentences(rng, odd, bad):
        if rng.random() < 0.3:
            rows += rng.choice([["-DOCSTART- -X- O"], ["-DOCSTART-", ""], ["-DOCSTART-\tO"] * 2])
        rows += [f"{word}{separator}{tag}" for word, tag in sentence]
        rows += [""] * rng.choice((1, 1, 1, 2))
    return "\n".join(rows).encode(errors="surrogatepass")


def make_tokens(rng: random.Random, odd: float, bad: float) -> bytes:
    records = []
    for sentence in make_sentences(rng, odd, bad):
        words: list[Any] = [word for word, _ in sentence]
        tags: list[Any] = [tag for _, tag in sentence]
        if rng.random() < 0.3:
            tags = [rng.randrange(len(NAMES)) for _ in tags]
        elif rng.random() < odd:
            tags = [f" {tag}\u2028" for tag in tags]  # white space around a tag means nothing
        records.append({"tokens": words, "ner_tags": tags})
    return json_lines(rng, records, bad)


def make_spans(rng: random.Random, odd: float, bad: float) -> bytes:
    records = []
    for sentence in make_sentences(rng, odd, bad):
        text, entities = "", []
        for word, tag in sentence:
            if word.strip() and tag != "O":
                span = {"start": len(text), "end": len(text) + len(word), "label": tag[2:]}
                entities.append(span)
            text += word + rng.choice([" ", " ", " ", "  ", "\n", "\u2028", "\xa0", ". "])
        if bad and entities and rng.random() < 0.2:
            span = rng.choice(entities)
            if rng.random() < 0.5:
                entities.append({**span, "label": "Y"})  # in the same place
            else:
                span[rng.choice(["start", "end"])] += rng.choice([-1, 1, -9, 9, -100, 100])
        rng.shuffle(entities)
        records.append({"text": text, "entities": entities})
    return json_lines(rng, records, bad)


def json_lines(rng: random.Random, records: list[dict[str, Any]], bad: float) -> bytes:
    """One record a line; if some are to be bad, a value may be what it must not, or a key twice."""
    if bad and rng.random() < 0.4:
        spoil(rng, rng.choice(records))
    ascii_only = rng.random() < 0.5
    lines = [json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records]
    if bad and rng.random() < 0.2:
        again = rng.choice(['{"tokens": ["a"], ', '{"ner_tags": ["O"], ', '{"text": "a", '])
        lines[0] = lines[0].replace("{", again, 1)
    return "".join(lines).encode(errors="surrogatepass")


def spoil(rng: random.Random, values: Any) -> None:
    """Replaces or drops something within a record: the nearer to the leaves, the likelier."""
    keys = list(values) if isinstance(values, dict) else range(len(values))
    key = rng.choice(keys)
    if isinstance(values[key], list | dict) and values[key] and rng.random() < 0.8:
        spoil(rng, values[key])
    elif rng.random() < 0.8:
        values[key] = rng.choice(BAD_VALUES)
    else:
        del values[key]


MAKERS: dict[str, Callable[[random.Random, float, float], bytes]] = {
    "conll": make_conll,
    "tokens": make_tokens,
    "spans": make_spans,
}


# Damaging files

BITS = [
    *[b"\0", b"\xff", b"\xc2", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\x1a"],
    *[b" ", b"\t", b"\xc2\xa0", b"\r", b"\n", b"\r\n", b"\n\n", b"\n \t\r\n"],
    *[text.encode() for text in (*LINE_ENDS, *ZERO_WIDTH)],
    *[b"\n-DOCSTART- O\n", b"-DOCSTART-", b" -DOCSTART- O", b"I-X", b"S-X", b"B-", b"O"],
    *[b'"', b"\\", b"\\ud800", b"\\ud83d\\ude00", b"\\u0000", b"\\u2028", b"\\n", b"{}", b"[]"],
    *[b"[", b"]", b"{", b"}", b",", b":", b"null", b"true", b"1.0", b"-1", b"NaN", b"-Infinity"],
    *[b"1e999", b"9" * 25, b"9" * 5000, b'"tokens": [], ', b'"ner_tags": ["O"], ', b'"text": 1, '],
    *[b'"entities": [], ', b'"start": 1, ', b'"end": 9, ', b"[" * 2000, b'{"a":' * 2000],
]
HUGE_BITS = [
    *[b"x", b"-", b"a-", b" ", b"\t", b"1", b"[", b'"a",', b'"O",', b"a O\n", b"\n", b"\r", b"\\n"],
    *[odd.encode() for odd in ("\u200b", "a\u0301", "日", "\ufeff", "\u2028", "😀")],
    *[b"\na B-%d", b"\na\tI-%d", b'"S-%d", ', b'{"start": %d}, '],  # numbered
]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + rng.choice(BITS) + content[at:]


def overwrite(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    bit = rng.choice(BITS)
    return content[:at] + bit + content[at + len(bit) :]


def delete(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + content[at + rng.choice((1, 1, 2, 5, 40)) :]


def flip(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return content
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def rearrange(content: bytes, rng: random.Random) -> bytes:
    """Swaps two lines, or repeats or drops one."""
    lines = content.split(b"\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(3)
    if kind == 0:
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == 1:
        lines.insert(one, lines[other])
    else:
        del lines[one]
    return b"\n".join(lines)


def join(content: bytes, rng: random.Random) -> bytes:
    """Makes two lines one."""
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    joint = rng.choice([b"\r", b"\r", b" ", b"\t", b"", *(end.encode() for end in LINE_ENDS)])
    lines[at : at + 2] = [joint.join(lines[at : at + 2])]
    return b"\n".join(lines)


def change_line_ends(content: bytes, rng: random.Random) -> bytes:
    ends = rng.choice([[b"\r\n"], [b"\r\n", b"\n"], [b"\r"], [b"\n", b"\n", b"\r"], [b" \t\r\r\n"]])
    first, *others = content.split(b"\n")
    return first + b"".join(rng.choice(ends) + line for line in others)


def change_spaces(content: bytes, rng: random.Random) -> bytes:
    parts = content.split(rng.choice([b" ", b"\t"]))
    spaces = rng.choice([[b" ", b"  "], [b"\t"], [b" ", b" ", b"\t"], [b"\xc2\xa0"], [b" \t"]])
    return parts[0] + b"".join(rng.choice(spaces) + part for part in parts[1:])


def mark(content: bytes, rng: random.Random) -> bytes:
    return b"\xef\xbb\xbf" * rng.choice((1, 1, 1, 1, 1, 2)) + content


def recode(content: bytes, rng: random.Random) -> bytes:
    encoding = rng.choice(["utf-16", "utf-32", "cp1252"])
    return content.decode(errors="replace").encode(encoding, "replace")


def empty(content: bytes, rng: random.Random) -> bytes:
    return b"".join(rng.choice((b" ", b"\n", b"\r\n", b"\t")) for _ in range(rng.randrange(9)))


def swell(content: bytes, rng: random.Random) -> bytes:
    at, swollen = rng.randrange(len(content) + 1), huge(rng.choice(HUGE_BITS), rng)
    numbers = itertools.count()
    swollen = re.sub(b"%d", lambda _: b"%d" % next(numbers), swollen)
    return content[:at] + swollen + content[at:]


ACCIDENTS = [
    *[insert, insert, overwrite, delete, flip, truncate, rearrange, rearrange],
    *[join, join, change_line_ends, change_spaces, mark, mark],
]


def make_mutant(kind: str, seed: int) -> bytes:
    """A file of a kind; the same for the same seed."""
    rng = random.Random(f"{kind} {seed}")
    content = MAKERS[kind](rng, rng.choice([0, 0.1, 0.5]), rng.choice([0, 0, 0.01, 0.1]))
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2, 3))):
        content = rng.choice(ACCIDENTS)(content, rng)
    # Rare: what swells takes long, and the others are seldom good for more than one refusal.
    rare = rng.random()
    if rare < 0.05:
        content = (swell if rare < 0.02 else recode if rare < 0.035 else empty)(content, rng)
    return content


# What a file says, from the description of the formats


class Word(NamedTuple):
    text: str
    type: str | None  # of its entity; None for O
    line: int


def oracle(kind: str, content: bytes) -> list[list[Word]]:
    """The sentences of a file that is good; if it is not, whatever comes of it."""
    assert b"\0" not in content
    lines = content.decode("utf-8-sig").split("\n")
    if kind == "conll":
        sentences = conll_oracle(lines)
    else:
        sentences = [
            sentence
            for number, line in enumerate(lines, 1)
            if line.strip()
            for sentence in json_oracle(json.loads(line, object_pairs_hook=unique), number)
        ]
    return [sentence for sentence in sentences if sentence]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len({name for name, _ in pairs}) == len(pairs), "a key that stands twice"
    return dict(pairs)


def conll_oracle(lines: list[str]) -> list[list[Word]]:
    sentences: list[list[Word]] = [[]]
    for number, line in enumerate(lines, 1):
        line = line.rstrip(" \t\r")
        assert "\r" not in line
        if re.match(r"(-DOCSTART-([ \t].*)?)?\Z", line, re.DOTALL):
            sentences.append([])
            continue
        columns = line.split("\t") if "\t" in line else re.findall("[^ ]+", line)
        word, *_, tag = columns
        sentences[-1].append(Word(word, type_of(tag), number))
    return sentences


def json_oracle(record: dict[str, Any], number: int) -> list[list[Word]]:
    if "tokens" not in record or "ner_tags" not in record:
        return [
            [Word(word, kind, number) for word, kind in sentence]
            for sentence in span_oracle(**record)
        ]
    pairs = list(zip(record["tokens"], record["ner_tags"], strict=True))
    assert all(type(word) is str and type(tag) in (str, int) for word, tag in pairs)
    return [
        [
            Word(word, type_of(tag if isinstance(tag, str) else NAMES[tag]), number)
            for word, tag in pairs
        ]
    ]


def span_oracle(
    text: str, entities: list[dict[str, Any]], **_: Any
) -> list[list[tuple[str, str | None]]]:
    """Words of a text, each with the one type that all its characters have, by sentence."""
    entity_at: list[int | None] = [None] * len(text)
    for number, entity in enumerate(entities):
        start, end = entity["start"], entity["end"]
        assert type(start) is int
        assert type(end) is int
        assert 0 <= start < end <= len(text)
        assert entity_at[start:end] == [None] * (end - start), "entities overlap"
        entity_at[start:end] = [number] * (end - start)
    groups = [None if c.isspace() else k if is_alone(c) else -1 for k, c in enumerate(text)]
    sentences: list[list[tuple[str, str | None]]] = [[]]
    gap, before = "", None
    for group, positions in itertools.groupby(range(len(text)), groups.__getitem__):
        where = list(positions)
        characters = "".join(text[k] for k in where)
        if group is None:
            gap = characters
            continue
        (number,) = {entity_at[k] for k in where}
        if gap.count("\n") > 1 and (number is None or number != before):
            sentences.append([])
        kind = None if number is None else entities[number]["label"].strip()
        sentences[-1].append((characters, kind))
        gap, before = "", number
    return sentences


@lru_cache(None)
def is_alone(character: str) -> bool:
    """Whether a character is a word of its own: a mark, a symbol, or what BERT sets apart."""
    normalizer = BertNormalizer(clean_text=False, strip_accents=False, lowercase=False)
    return (
        unicodedata.category(character)[0] in "PS"
        or normalizer.normalize_str(character) == f" {character} "
    )


def type_of(tag: str) -> str | None:
    tag = tag.strip()
    if tag == "O":
        return None
    assert re.match("[BIELSU]-", tag)
    return tag[2:].strip()


# What must hold


def check_words(corpus: Corpus, expected: list[list[Word]]) -> None:
    """Words in, words out, each with its type and line."""
    types = [*corpus.type_names, None]
    words = [
        Word(word, types[kind], int(line))
        for word, kind, line in zip(corpus.words, corpus.types, corpus.lines, strict=True)
    ]
    assert [words[a:b] for a, b in itertools.pairwise(corpus.starts)] == expected
    assert len(corpus.prefixes) == len(words)


def check_dataset(
    dataset: TokenDataset, expected: list[list[Word]], tokenizer: Tokenizer, row_limit: int
) -> None:
    """Every word has a label, its pieces in order in a row of its sentence, and a decision."""
    words = [word for sentence in expected for word in sentence]
    lengths = [len(sentence) for sentence in expected]
    np.testing.assert_array_equal(dataset.sentence_starts, np.cumsum([0, *lengths]))
    assert dataset.sentence_lines.tolist() == [sentence[0].line for sentence in expected]
    labels = [dataset.label_set.names[label] for label in dataset.word_labels]
    assert [type_of(label) for label in labels] == [word.type for word in words]

    # Each different word by itself, and no more pieces than go into a row.
    pieces = {
        text: tokenizer.encode([text]).ids[: row_limit - 2] for text in {w.text for w in words}
    }
    counts = [len(pieces[word.text]) for word in words]
    word_ids = dataset.word_ids
    np.testing.assert_array_equal(word_ids, np.repeat(np.arange(len(words)), counts))
    expected_ids = list(itertools.chain.from_iterable(pieces[word.text] for word in words))
    assert dataset.input_ids.tolist() == expected_ids
    assert dataset.labels.min(initial=0) >= 0

    starts = dataset.rows.starts
    assert (starts[0], starts[-1]) == (0, len(dataset.input_ids))
    assert np.diff(starts).min() >= 0
    assert dataset.row_lengths.max() <= row_limit
    row_of = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    sentence_of = np.repeat(np.arange(len(expected)), lengths)[word_ids]
    np.testing.assert_array_equal(dataset.rows.sentences[row_of], sentence_of)
    np.testing.assert_array_equal(np.unique(dataset.rows.sentences), np.arange(len(expected)))
    assert not np.any(np.diff(row_of)[np.diff(word_ids) == 0]), "a word is two rows' own"

    decided = dataset.decide_words(np.arange(len(word_ids)), -1)
    assert len(decided) == len(words)
    has_pieces = np.array(counts) > 0
    np.testing.assert_array_equal(decided >= 0, has_pieces)
    np.testing.assert_array_equal(dataset.word_ids[decided[has_pieces]], np.flatnonzero(has_pieces))


OF_THE_WHOLE_FILE = re.compile("holds no sentence|has more than 10000 types|every tag is O")


def check_refusal(error: DataError, path: Path, content: bytes) -> None:
    """It names file and line; only what is no matter of one line names the file alone."""
    message = str(error)
    assert (type(error), error.exit_code, str(error.path)) == (DataError, 65, str(path))
    where = f"{path}: " if error.line is None else f"{path}:{error.line}: "
    assert message.startswith(where)
    if error.line is None:
        assert OF_THE_WHOLE_FILE.match(message.removeprefix(where))
    else:
        assert 1 <= error.line <= content.count(b"\n") + 1
    assert len(message.splitlines()) <= 2
    assert len(message) < len(where) + 500


def check_file(path: Path, kind: str, content: bytes, tokenizer: Tokenizer, row_limit: int) -> str:
    """Reads a file and checks what comes of it: "accepted" or "refused"."""
    path.write_bytes(content)
    columns = {} if kind == "conll" else {"label_names": NAMES}
    reading = Reading(max_seq_length=row_limit)
    start = time.process_time()
    try:
        corpus = read_file(path, **columns)
    except DataError as error:
        assert time.process_time() - start < SECONDS
        check_refusal(error, path, content)
        with pytest.raises(DataError):
            prepare(open_file(path, **columns), tokenizer, None, reading=reading)
        return "refused"
    label_set = LabelSet(tuple(label_list(corpus.type_names)))
    prepared = prepare(open_file(path, **columns), tokenizer, label_set, reading=reading)
    assert time.process_time() - start < SECONDS
    expected = oracle(kind, content)
    check_words(corpus, expected)
    check_dataset(prepared.dataset, expected, tokenizer, row_limit)
    for warning in prepared.warnings:
        assert len(warning.splitlines()) == 1
        assert len(warning) < len(str(path)) + 500
    # As training data without labels of its own, and as data for a model that has other labels.
    for labels in (None, LabelSet(tuple(NAMES))):
        try:
            prepare(open_file(path, **columns), tokenizer, labels, reading=reading)
        except DataError as error:
            check_refusal(error, path, content)
    return "accepted"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    """One that keeps capitals and accents, and one that strips them."""
    folder = tmp_path_factory.mktemp("models")
    lowercase = dict.fromkeys(w if w.startswith("[") else w.lower() for w in CASED_VOCAB)
    loaded = []
    for name, vocab in (("cased", CASED_VOCAB), ("uncased", list(lowercase))):
        write_model_folder(folder / name, vocab)
        config = BertConfig(vocab_size=len(vocab), max_position_embeddings=128)
        loaded.append(Tokenizer.from_pretrained(folder / name, config))
    assert [tokenizer.lowercase for tokenizer in loaded] == [False, True]
    return loaded


@pytest.fixture
def _quiet() -> Iterator[None]:
    """Warnings are fine, but thousands of them cost more than the tests."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def check_mutants(kind: str, num_mutants: int, folder: Path, tokenizers: list[Tokenizer]) -> None:
    """Runs mutants 0, 1, ...; neither all of them may be accepted nor all refused."""
    path, outcomes = folder / f"mutant{ENDINGS[kind]}", Counter[str]()
    for seed in range(num_mutants):
        content = make_mutant(kind, seed)
        try:
            outcome = check_file(path, kind, content, tokenizers[seed % 2], 8 + seed % 30)
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            raise AssertionError(f"make_mutant({kind!r}, {seed}): {error!r:.2000}") from error
        outcomes[outcome] += 1
    assert min(outcomes["accepted"], outcomes["refused"]) > num_mutants // 4, outcomes


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("kind", ENDINGS)
def test_mutants(kind: str, tmp_path: Path, tokenizers: list[Tokenizer]) -> None:
    check_mutants(kind, 500, tmp_path, tokenizers)


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("kind", ENDINGS)
def test_twenty_thousand_mutants(kind: str, tmp_path: Path, tokenizers: list[Tokenizer]) -> None:
    check_mutants(kind, 6_667, tmp_path, tokenizers)


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("kind", ENDINGS)
def test_what_is_only_odd_is_read(kind: str, tmp_path: Path, tokenizers: list[Tokenizer]) -> None:
    path = tmp_path / f"odd{ENDINGS[kind]}"
    for seed in range(100):
        # With a byte order mark, so that a first word that is one stays a word.
        content = b"\xef\xbb\xbf" + MAKERS[kind](random.Random(seed), 0.5, 0)
        assert check_file(path, kind, content, tokenizers[seed % 2], 12) == "accepted", seed


@pytest.mark.usefixtures("_quiet")
@pytest.mark.parametrize("kind", ENDINGS)
def test_mutants_from_the_cache(kind: str, tmp_path: Path, tokenizers: list[Tokenizer]) -> None:
    path, columns = tmp_path / f"mutant{ENDINGS[kind]}", {"label_names": NAMES}
    reading = Reading(label_all_tokens=False, max_seq_length=12)
    num_cached = 0
    for seed in range(40):
        path.write_bytes(make_mutant(kind, seed))
        try:
            anew = prepare(open_file(path, **columns), tokenizers[0], None, reading=reading)
        except DataError:
            continue
        for _ in range(2):
            cached = prepare_file(
                path,
                tokenizers[0],
                None,
                name="train",
                columns=columns,
                reading=reading,
                max_samples=None,
            )
            assert (cached.summary, cached.warnings) == (anew.summary, anew.warnings), seed
            assert_same_data(cached.dataset, anew.dataset)
        num_cached += not cached.dataset.labels.flags.writeable
    assert num_cached > 5


def test_mutants_and_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An exit code and a line on stderr, whatever is in the file."""
    labels = {str(label): name for label, name in enumerate(NAMES)}
    model = write_model_folder(tmp_path / "model", id2label=labels)
    assert BertForNER.from_pretrained(model).label_set.names == tuple(NAMES)
    given = ["--model", str(model), "--label_names", ",".join(NAMES)]
    out = ["--output_dir", str(tmp_path / "out"), "--overwrite_output_dir", "--disable_tqdm"]
    codes: Counter[tuple[str, int]] = Counter()
    for kind, seed in itertools.product(ENDINGS, range(12)):
        path, content = tmp_path / f"mutant{ENDINGS[kind]}", make_mutant(kind, seed)
        path.write_bytes(content)
        if len(content) > 10_000:
            continue  # would keep the model busy, and says no more
        if seed % 3:
            program, code = "bertner-eval", eval_main([*given, "--file", str(path)])
        else:
            arguments = [*given, *out, "--train_file", str(path), "--max_steps", "1"]
            program, code = "bertner-train", train_main(arguments)
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert code in (0, 65), (kind, seed, errors)
        if code == 65:
            assert errors.splitlines()[-1].startswith(f"{program}: {path}:"), (kind, seed)
        codes[program, code] += 1
    assert len(codes) == 4
    assert min(codes.values()) >= 3, codes
