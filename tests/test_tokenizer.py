"""The tokenizer: equal to transformers', honest about case, refused where it does not fit."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import transformers

from bertner.config import BertConfig
from bertner.errors import ModelError
from bertner.hub import find_model
from bertner.tokenizer import Tokenizer
from tests.conftest import CASED_VOCAB, MINILM, SHARED_DATA, needs_cased_vocab, needs_minilm

# Words that tokenizers disagree about: accents, CJK, controls, punctuation, nothing at all.
HARD_WORDS = [
    *["Zürich", "naïve", "東京", "co-operate", "U.S.", "don't", "", "\u00ad", "\u200b", "\ufeff"],
    *["\ufffd", "\u00a0", "\u2028", "\x7f", "\ue000", "İstanbul", "ﬁn", "e\u0301", "🙂", "[CLS]"],
    *["a" * 101, "1,250.5", "--", "x\u200dy", "ß", "\t", "HELLO", "Ⅷ", "\u0301"],
]


def config_with(vocab_size: int, **settings: object) -> BertConfig:
    return BertConfig.from_dict({"vocab_size": vocab_size, **settings})


def write_vocab(folder: Path, vocab: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return folder


UNCASED = [token for token in CASED_VOCAB if token == token.lower() or token.startswith("[")]


def tokens_of(tokenizer: Tokenizer, word: str) -> list[str]:
    return [tokenizer.fast.id_to_token(token_id) for token_id in tokenizer.encode([word]).ids]


def assert_same_tokens(ours: Tokenizer, theirs: transformers.PreTrainedTokenizerBase) -> None:
    for sentence in (HARD_WORDS, ["the"], [], HARD_WORDS[::-1]):
        expected = theirs(sentence, is_split_into_words=True, add_special_tokens=False)
        word_ids = expected.word_ids() if sentence else []
        encoding = ours.encode(sentence)
        assert (encoding.ids, encoding.word_ids) == (expected["input_ids"], word_ids)
        # What stands around a word does not matter.
        alone = [ours.encode([word]).ids for word in sentence]
        assert list(itertools.chain(*alone)) == expected["input_ids"]


@needs_minilm
def test_minilm_tokenizes_as_in_transformers(tmp_path: Path) -> None:
    folder = find_model(MINILM).folder
    ours = Tokenizer.from_pretrained(folder, config_with(30522))
    assert ours.lowercase
    assert ours.model_max_length == 512
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert_same_tokens(ours, theirs)
    row = theirs(["the"], is_split_into_words=True)["input_ids"]
    assert (ours.cls_id, ours.sep_id, ours.pad_id) == (row[0], row[-1], theirs.pad_token_id)

    ours.save(tmp_path)
    reopened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert reopened.model_max_length == 512
    assert_same_tokens(ours, reopened)
    assert_same_tokens(Tokenizer.from_pretrained(tmp_path, config_with(30522)), reopened)


@needs_cased_vocab
def test_a_bare_cased_vocabulary(tmp_path: Path) -> None:
    vocab = (SHARED_DATA / "bert-base-cased" / "vocab.txt").read_text(encoding="utf-8")
    (tmp_path / "vocab.txt").write_text(vocab, encoding="utf-8")
    ours = Tokenizer.from_pretrained(tmp_path, config_with(28996))
    assert not ours.lowercase
    assert ours.model_max_length == 512, "a bare vocabulary must not switch the limit off"
    assert_same_tokens(
        ours,
        transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"), do_lower_case=False),
    )
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "vocab.txt").read_text(encoding="utf-8") == vocab
    assert_same_tokens(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"))


def test_case_is_inferred_from_the_vocabulary(tmp_path: Path) -> None:
    cased = Tokenizer.from_pretrained(write_vocab(tmp_path / "a", CASED_VOCAB), config_with(200))
    assert not cased.lowercase
    assert tokens_of(cased, "Paris") == ["Paris"]
    uncased = Tokenizer.from_pretrained(write_vocab(tmp_path / "b", UNCASED), config_with(200))
    assert uncased.lowercase
    assert tokens_of(uncased, "THE") == ["the"]


@pytest.mark.parametrize(
    ("vocab", "do_lower_case", "message"),
    [
        (CASED_VOCAB, True, "lower-cases its input, but the vocabulary has capital letters"),
        (UNCASED, False, "keeps capital letters, but the vocabulary has none"),
    ],
)
def test_contradictions_about_case_are_refused(
    tmp_path: Path, vocab: list[str], do_lower_case: bool, message: str
) -> None:
    write_vocab(tmp_path, vocab)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": do_lower_case}))
    with pytest.raises(ModelError, match=message) as caught:
        Tokenizer.from_pretrained(tmp_path, config_with(200))
    assert caught.value.exit_code == 65


def test_scripts_without_capitals_need_no_lower_casing(tmp_path: Path) -> None:
    """bert-base-chinese: do_lower_case is false, and the vocabulary has no capital letter."""
    vocab = [*CASED_VOCAB[:5], *"abc的一是不了人我在有他这中大来上国", "##a"]
    write_vocab(tmp_path, vocab)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    tokenizer = Tokenizer.from_pretrained(tmp_path, config_with(200))
    assert not tokenizer.lowercase
    assert tokens_of(tokenizer, "中国") == ["中", "国"]


def test_accents_are_kept_where_the_base_model_keeps_them(tmp_path: Path) -> None:
    """German uncased models lower-case but do not strip accents; transformers must know."""
    write_vocab(tmp_path, [*UNCASED, "müller", "muller"])
    settings = {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer.from_pretrained(tmp_path, config_with(200))
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    for reopened in (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "saved"),
        Tokenizer.from_pretrained(tmp_path / "saved", config_with(200)).fast,
    ):
        encoding = reopened.encode("Müller", add_special_tokens=False)
        ids = encoding if isinstance(encoding, list) else encoding.ids
        assert ids == [ours.fast.token_to_id("müller")]


def test_another_word_splitter_is_refused(tmp_path: Path) -> None:
    write_vocab(tmp_path, CASED_VOCAB)
    settings = {"tokenizer_class": "BertJapaneseTokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="needs BertJapaneseTokenizer"):
        Tokenizer.from_pretrained(tmp_path, config_with(200))


def test_a_row_is_never_longer_than_the_model_takes(tokenizer: Tokenizer) -> None:
    assert tokenizer.row_limit(None) == 128
    assert tokenizer.row_limit(20) == 20
    assert tokenizer.row_limit(1024) == 128


def test_tokenizer_json_and_config_that_disagree_are_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    with pytest.raises(ModelError, match=r"says do_lower_case True, tokenizer\.json False"):
        Tokenizer.from_pretrained(tmp_path, config_with(200))


def test_a_vocabulary_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    folder = write_vocab(tmp_path, CASED_VOCAB)
    Tokenizer.from_pretrained(folder, config_with(len(CASED_VOCAB)))
    with pytest.raises(ModelError, match=f"{len(CASED_VOCAB)} entries, but the model only") as e:
        Tokenizer.from_pretrained(folder, config_with(len(CASED_VOCAB) - 1))
    assert "vocab.txt" in str(e.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer.json and no vocab.txt"),
        ({"vocab.txt": "[PAD]\n[UNK]\n[SEP]\nthe\n"}, r"has no \[CLS\]"),
        ({"vocab.txt": b"\xff\xfe"}, "cannot be read"),
        ({"tokenizer.json": "{}"}, "not a tokenizer"),
        ({"tokenizer.json": "{"}, "not JSON"),
        ({"vocab.txt": "the\n", "tokenizer_config.json": '{"cls_token": 5}'}, "special token"),
    ],
)
def test_damaged_tokenizers_are_refused(
    tmp_path: Path, files: dict[str, str | bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_pretrained(tmp_path, config_with(200))


def test_another_kind_of_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers.models import BPE

    Fast(BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match="BPE, not the WordPiece of BERT"):
        Tokenizer.from_pretrained(tmp_path, config_with(200))
