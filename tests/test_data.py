"""Tokenising, aligning and cutting on flat arrays."""

from __future__ import annotations

import dataclasses
import logging
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bertner import data, readers
from bertner.config import BertConfig, Reading
from bertner.corpus import CorpusBuilder, CorpusStream
from bertner.data import TokenDataset, align_labels, labels_for, prepare, tokenize
from bertner.errors import DataError
from bertner.labels import IGNORE_INDEX, LabelSet, label_list
from bertner.readers import open_file, read_file
from bertner.tokenizer import Tokenizer
from tests.conftest import SHARED_DATA, corpus_of, needs_cased_vocab, needs_conll


def test_alignment_by_hand(tokenizer: Tokenizer) -> None:
    corpus = corpus_of("Mary/B-PER Poe/I-PER said the landing/B-MISC", "Paris/B-LOC")
    label_set = labels_for(corpus)
    assert label_set.names == ("O", "B-LOC", "I-LOC", "B-MISC", "I-MISC", "B-PER", "I-PER")
    dataset = tokenize(corpus, tokenizer, label_set)
    tokens = [tokenizer.fast.id_to_token(int(token_id)) for token_id in dataset.input_ids]
    assert tokens == "M ##a ##r ##y P ##o ##e said the l ##a ##n ##d ##ing Paris".split()
    names = [label_set.names[k] for k in dataset.labels]
    assert names == [
        *"B-PER I-PER I-PER I-PER I-PER I-PER I-PER O O".split(),
        *"B-MISC I-MISC I-MISC I-MISC I-MISC B-LOC".split(),
    ]
    assert dataset.word_ids.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 3, 4, 4, 4, 4, 4, 5]
    assert dataset.rows.starts.tolist() == [0, 14, 15]
    assert dataset.row_lengths.tolist() == [16, 3]
    first_only = tokenize(corpus, tokenizer, label_set, Reading(label_all_tokens=False))
    names = [label_set.names[k] if k >= 0 else "-" for k in first_only.labels]
    assert names == "B-PER - - - I-PER - - O O B-MISC - - - - B-LOC".split()
    assert first_only.row_num_labelled.tolist() == [5, 1]


def course_alignment(word_labels: list[int], word_ids: list[int | None]) -> list[int]:
    """The alignment of the Hugging Face course, chapter 7.2, from its description.

    Special tokens get -100; the first piece of a word its label; later pieces the same, with an
    odd label (a B-) made the even one after it (its I-).
    """
    labels, current = [], None
    for word in word_ids:
        if word is None:
            labels.append(-100)
        elif word != current:
            labels.append(word_labels[word])
        else:
            label = word_labels[word]
            labels.append(label + 1 if label % 2 == 1 else label)
        current = word
    return labels


@needs_conll
@needs_cased_vocab
def test_conll2003_train_in_the_cased_vocabulary(tmp_path: Path) -> None:
    vocab = SHARED_DATA / "bert-base-cased" / "vocab.txt"
    tokenizer = Tokenizer.from_pretrained(vocab.parent, BertConfig(vocab_size=28996))
    corpus = read_file(SHARED_DATA / "conll2003" / "train.txt")
    label_set = labels_for(corpus)
    assert label_set.names == tuple(label_list(["PER", "ORG", "LOC", "MISC"]))
    assert label_set.names[1] == "B-PER", "CoNLL's own order"
    dataset = tokenize(corpus, tokenizer, label_set)
    assert dataset.num_read == 300_677
    assert len(dataset) == 14_041

    for sentence in range(corpus.num_sentences):
        words = slice(corpus.starts[sentence], corpus.starts[sentence + 1])
        tokens = slice(dataset.rows.starts[sentence], dataset.rows.starts[sentence + 1])
        word_ids = (dataset.word_ids[tokens] - corpus.starts[sentence]).tolist()
        labels = dataset.word_labels[words].tolist()
        expected = course_alignment(labels, [None, *word_ids, None])
        assert [-100, *dataset.labels[tokens], -100] == expected


def test_unknown_validation_tag_names_line_and_fix(tokenizer: Tokenizer) -> None:
    label_set = labels_for(corpus_of("Paris/B-LOC"))
    other = corpus_of("the", "Mary/B-PER")
    with pytest.raises(DataError, match=r"made-up:2: B-PER \('Mary'\) is not among") as caught:
        tokenize(other, tokenizer, label_set)
    assert caught.value.exit_code == 65
    assert "train on data" in str(caught.value)


def test_what_a_message_quotes_is_short(tokenizer: Tokenizer) -> None:
    corpus = corpus_of("x" * 9999 + "/B-" + "y" * 9999)
    label_set = LabelSet(tuple(label_list("z" * 9999 + str(k) for k in range(20))))
    with pytest.raises(
        DataError, match=r"made-up:1: B-yy.* \('xx.* is not among .*O, B-zz"
    ) as caught:
        tokenize(corpus, tokenizer, label_set)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("O B-X I-X E-X S-X", "B-X I-X E-X S-X S-X O B-X E-X"),
        ("O B-X I-X L-X U-X", "B-X I-X L-X U-X U-X O B-X L-X"),
        ("O B-X I-X", "B-X I-X I-X B-X B-X O B-X I-X"),
        ("O I-X", "I-X I-X I-X I-X I-X O I-X I-X"),
    ],
)
def test_gold_is_in_the_scheme_of_the_models_labels(
    names: str, expected: str, tokenizer: Tokenizer
) -> None:
    corpus = corpus_of("the/B-X said/I-X of/I-X in/B-X said/B-X the of/B-X in/I-X")
    dataset = tokenize(corpus, tokenizer, LabelSet(tuple(names.split())))
    assert [dataset.label_set.names[k] for k in dataset.word_labels] == expected.split()


def test_iob1_of_labels_that_have_b_too(tokenizer: Tokenizer) -> None:
    corpus = corpus_of("the/B-X said/I-X of/B-X in/B-Y", "said/B-Y")
    labels = LabelSet(tuple(label_list("XY")), given_scheme="IOB1")
    dataset = tokenize(corpus, tokenizer, labels)
    assert [labels.names[k] for k in dataset.word_labels] == "I-X I-X B-X I-Y I-Y".split()


def test_entities_are_counted_whatever_the_scheme(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "iob1.txt"
    path.write_text("the I-X\nof B-X\nin O\n\nsaid I-Y\n")
    prepared = prepare(open_file(path), tokenizer, LabelSet(("O", "I-X", "I-Y")))
    assert prepared.summary.entity_counts == {"X": 2, "Y": 1}


def test_a_corpus_without_entities_is_refused() -> None:
    with pytest.raises(DataError, match="every tag is O"):
        labels_for(corpus_of("the said"))


def test_continuation_of_labels_in_another_order() -> None:
    label_set = LabelSet(("I-X", "O", "B-X", "S-Y"))
    word_ids = np.array([0, 0, 1, 1, 2, 2])
    labels = align_labels(np.array([2, 1, 3]), word_ids, label_set, True)
    assert labels.tolist() == [2, 0, 1, 1, 3, 3]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sentences=st.lists(
        st.lists(
            st.sampled_from(
                ["Paris", "the", "landing", "\u200b", "", "said.", "abcdefgh", "x-y-z"]
            ),
            min_size=1,
            max_size=30,
        ),
        min_size=1,
        max_size=5,
    ),
    limit=st.integers(12, 40),
    label_all=st.booleans(),
)
def test_no_word_is_lost_however_long_the_sentence(
    tokenizer: Tokenizer, sentences: list[list[str]], limit: int, label_all: bool
) -> None:
    builder = CorpusBuilder("made-up")
    for words in sentences:
        builder.add(words, ["B-X"] * len(words), [1] * len(words))
    corpus = builder.finish("")
    label_set = labels_for(corpus)
    whole, cut = (
        tokenize(corpus, tokenizer, label_set, Reading(label_all, max_seq_length=length))
        for length in (128, limit)
    )
    assert cut.row_lengths.max() <= limit
    # The same pieces, words and labels in the same order, only in more rows.
    for name in ("input_ids", "word_ids", "labels"):
        assert np.array_equal(getattr(cut, name), getattr(whole, name))
    assert (cut.rows.starts[0], cut.rows.starts[-1]) == (0, len(cut.input_ids))
    for row in range(len(cut)):
        tokens = slice(cut.rows.starts[row], cut.rows.starts[row + 1])
        words = cut.word_ids[tokens]
        sentence = cut.rows.sentences[row]
        assert np.all((corpus.starts[sentence] <= words) & (words < corpus.starts[sentence + 1]))
        before = cut.word_ids[: cut.rows.starts[row]]
        assert not np.isin(words, before).any(), "a word is two rows' own"
    # Every word gets a decision: its first piece's, or the default where it has none.
    decided = cut.decide_words(np.arange(len(cut.input_ids)), -7)
    assert len(decided) == corpus.num_words
    has_pieces = np.isin(np.arange(corpus.num_words), cut.word_ids)
    assert np.all((decided == -7) == ~has_pieces)
    assert np.array_equal(cut.word_ids[decided[has_pieces]], np.flatnonzero(has_pieces))


def test_a_word_longer_than_a_row(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    corpus = corpus_of("the " + "-" * 200 + "/B-X Paris/B-X")
    with caplog.at_level(logging.WARNING, "bertner"):
        dataset = tokenize(corpus, tokenizer, labels_for(corpus), Reading(max_seq_length=20))
    assert dataset.row_lengths.max() <= 20
    assert set(dataset.word_ids) == {0, 1, 2}
    assert "made-up:1: a word of more than 18 pieces" in caplog.text
    assert "no word dropped" in caplog.text


def test_sentences_of_a_row_are_scored_apart(tokenizer: Tokenizer) -> None:
    corpus = corpus_of("the Poe/B-X", "Poe/I-X the", "\u200b", "Paris/B-X")
    label_set = labels_for(corpus)
    with pytest.raises(DataError, match="made-up: does not say where documents begin"):
        tokenize(corpus, tokenizer, label_set, Reading(context="document"))
    corpus = dataclasses.replace(corpus, marks_documents=True)
    dataset = tokenize(corpus, tokenizer, label_set, Reading(context="document"))
    assert (len(dataset), dataset.rows.starts.tolist()) == (1, [0, 9])
    assert dataset.labelled_sentence_starts.tolist() == [0, 4, 8, 8]
    first = Reading(label_all_tokens=False, context="document")
    assert tokenize(corpus, tokenizer, label_set, first).labelled_sentence_starts.tolist() == [
        *[0, 2, 4, 4]
    ]


# Blocks and narrow arrays

ARRAYS = [
    field.name
    for field in dataclasses.fields(TokenDataset)
    if field.name not in ("rows", "reading", "source", "label_set", "cls_id", "sep_id", "pad_id")
]
ROW_ARRAYS = ["starts", "before", "after", "sentences"]


def assert_same_data(left: TokenDataset, right: TokenDataset) -> None:
    pairs = [(name, getattr(left, name), getattr(right, name)) for name in ARRAYS]
    pairs += [(name, getattr(left.rows, name), getattr(right.rows, name)) for name in ROW_ARRAYS]
    for name, ours, theirs in pairs:
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
        assert ours.dtype == theirs.dtype, name
    for name in ("reading", "source", "label_set", "cls_id", "sep_id", "pad_id"):
        assert getattr(left, name) == getattr(right, name)


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sentences=st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(["Paris", "the", "landing", "\u200b", "said.", "x-y-z", "-" * 40]),
                st.sampled_from(["O", "B-B", "I-B", "S-A", "B-C"]),
            ),
            min_size=1,
            max_size=12,
        ),
        min_size=1,
        max_size=9,
    ),
    num_words=st.integers(1, 20),
    limit=st.integers(8, 40),
    label_all=st.booleans(),
    max_samples=st.none() | st.integers(1, 10),
)
def test_preparing_in_blocks_gives_what_the_whole_corpus_gives(
    tokenizer: Tokenizer,
    tmp_path: Path,
    sentences: list[list[tuple[str, str]]],
    num_words: int,
    limit: int,
    label_all: bool,
    max_samples: int | None,
) -> None:
    path = tmp_path / "corpus.txt"
    blocks = ["".join(f"{word} {tag}\n" for word, tag in sentence) for sentence in sentences]
    path.write_text("\n-DOCSTART- O\n".join(blocks), encoding="utf-8")
    corpus = read_file(path)
    used = corpus if max_samples is None else corpus.head(max_samples)
    label_set = labels_for(corpus) if corpus.type_names else None
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (readers, "_CHUNK_BYTES", 16),
            (data, "_KNOWN_WORDS", 2),
            (data, "_SLICE_TOKENS", 10),
            (CorpusStream, "blocks", partialmethod(CorpusStream.blocks, num_words)),
        ):
            patch.setattr(module, name, value)
        reading = Reading(label_all_tokens=label_all, max_seq_length=limit)
        options = {"reading": reading, "max_samples": max_samples}
        if label_set is None:
            with pytest.raises(DataError, match="every tag is O"):
                prepare(open_file(path), tokenizer, None, **options)
            return
        prepared = prepare(open_file(path), tokenizer, None, **options)
        counts = prepared.dataset.row_num_labelled
    expected = tokenize(used, tokenizer, label_set, reading)
    assert_same_data(prepared.dataset, expected)
    summary = prepared.summary
    assert (summary.source, summary.sha256) == (corpus.source, corpus.sha256)
    assert (summary.scheme, summary.type_names) == (corpus.scheme, corpus.type_names)
    assert summary.entity_counts == used.entity_counts()
    assert list(summary.entity_counts) == list(corpus.type_names)
    assert summary.num_documents == used.num_documents
    assert (summary.num_sentences, summary.num_words) == (used.num_sentences, used.num_words)
    for row in range(len(expected)):
        tokens = slice(expected.rows.starts[row], expected.rows.starts[row + 1])
        assert counts[row] == np.count_nonzero(expected.labels[tokens] != IGNORE_INDEX)


def test_warnings_come_once_a_file(
    tokenizer: Tokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(("Paris B-X\n\n" + "the I-X\nsaid O\n" * 9 + f"{'-' * 50} O\n\n") * 5)
    whole = read_file(path)
    tokenize(whole, tokenizer, labels_for(whole), Reading(max_seq_length=10))
    expected = [record.getMessage() for record in caplog.records]
    assert [message.removeprefix(str(path)) for message in expected] == [
        ":1: 5 tags do not fit IOB1, the first is B-X on 'Paris'; read as conlleval does",
        f":21: a word of more than 8 pieces ('{'-' * 19}...); its later pieces are not read",
        ": 5 sentences are longer than 10 tokens; cut between words into 20 overlapping rows, no "
        "word dropped",
    ]
    caplog.clear()
    monkeypatch.setattr(CorpusStream, "blocks", partialmethod(CorpusStream.blocks, 4))
    prepared = prepare(open_file(path), tokenizer, None, reading=Reading(max_seq_length=10))
    assert [record.getMessage() for record in caplog.records] == expected
    assert list(prepared.warnings) == expected


def test_a_tag_that_the_labels_lack_in_a_later_block(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("Paris B-LOC\n\n" * 20 + "said O\nMary B-PER\n\n" + "Poe B-PER\n\n" * 9)
    monkeypatch.setattr(CorpusStream, "blocks", partialmethod(CorpusStream.blocks, 4))
    label_set = LabelSet(("O", "B-LOC", "I-LOC"))
    with pytest.raises(DataError, match=r"corpus.txt:42: B-PER \('Mary'\) is not among"):
        prepare(open_file(path), tokenizer, label_set, reading=Reading(max_seq_length=10))
    # Sentences that are not used may hold what they like, as long as it is a tag.
    prepare(
        open_file(path), tokenizer, label_set, reading=Reading(max_seq_length=10), max_samples=20
    )
    path.write_text("Paris B-LOC\n\n" * 20 + "said LOC\n")
    with pytest.raises(DataError, match=r"corpus.txt:41: tag 'LOC'"):
        prepare(
            open_file(path),
            tokenizer,
            label_set,
            reading=Reading(max_seq_length=10),
            max_samples=20,
        )


@pytest.mark.parametrize(("num_ids", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_ids_are_as_narrow_as_the_vocabulary(tmp_path: Path, num_ids: int, dtype: type) -> None:
    vocab = [*"[PAD] [UNK] [CLS] [SEP] [MASK] A".split(), *(f"w{k}" for k in range(6, num_ids))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + "\n")
    tokenizer = Tokenizer.from_pretrained(tmp_path, BertConfig(vocab_size=num_ids))
    dataset = tokenize(corpus_of(f"A/B-X w{num_ids - 1}"), tokenizer, LabelSet(("O", "B-X")))
    assert dataset.input_ids.dtype == dtype
    assert dataset.input_ids.tolist() == [5, num_ids - 1]


@pytest.mark.parametrize(("num_labels", "dtype"), [(127, np.int8), (129, np.int16)])
def test_labels_are_as_narrow_as_their_number(
    tokenizer: Tokenizer, num_labels: int, dtype: type
) -> None:
    label_set = LabelSet(tuple(label_list(f"T{k:03}" for k in range(num_labels // 2))))
    assert len(label_set.names) == num_labels
    last = label_set.names[-1].removeprefix("I-")
    dataset = tokenize(corpus_of(f"Paris/B-{last} London/I-{last} the"), tokenizer, label_set)
    assert dataset.labels.dtype == dataset.word_labels.dtype == dtype
    assert dataset.labels.tolist() == [num_labels - 2, num_labels - 1, 0]
    assert dataset.word_ids.dtype == np.int32
    assert dataset.rows.starts.dtype == np.int64


@pytest.mark.parametrize("own_pages_bytes", [data._OWN_PAGES_BYTES, 400])
def test_a_growing_array_widens_when_a_value_needs_it(
    own_pages_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_HEAP_BYTES", 200)
    monkeypatch.setattr(data, "_OWN_PAGES_BYTES", own_pages_bytes)
    array, values = data._GrowingArray(np.int32), [-1, 2**31 - 1]
    array.append(np.array(values))
    for k in range(200):
        array.append(np.arange(k))
        values += range(k)
    taken = array.take()
    assert (taken.dtype, taken.tolist()) == (np.int32, values)
    for more in (values, [2**31], [7]):
        array.append(np.array(more))
    taken = array.take()
    assert (taken.dtype, taken.tolist()) == (np.int64, [*values, 2**31, 7])
    assert array.take().tolist() == []
