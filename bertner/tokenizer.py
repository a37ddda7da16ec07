"""BERT's wordpiece tokenizer: loading it from a model folder, checking it, writing it back.

The tokenizing itself is done by the `tokenizers` library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import BertWordPieceTokenizer, Encoding
from tokenizers import Tokenizer as FastTokenizer

from bertner.config import BertConfig
from bertner.errors import ModelError
from bertner.files import read_bytes, read_json, write_json, write_text

# The largest in use, LaBSE's with 500,000 entries, has 5 MB; as JSON 10 MB.
_MAX_VOCABULARY_BYTES = 16 << 20

# What a tokenizer.json may be made of: all that BERT needs. With other components a file can take
# any time or memory, now or with a text, or end the process.
_COMPONENTS = {
    "normalizer": "BertNormalizer Lowercase NFC NFD NFKC NFKD Strip StripAccents Sequence".split(),
    "pre_tokenizer": "BertPreTokenizer Whitespace WhitespaceSplit Punctuation Digits "
    "Sequence".split(),
    "post_processor": ["BertProcessing", "TemplateProcessing"],
    "decoder": ["WordPiece"],
}
_MAX_PIECES = 16  # of a template; BERT's has five
_MAX_WORD = 1000  # characters; longer words are unknown, of shorter ones all parts are looked up

_SPECIAL_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}


@dataclass(frozen=True)
class Tokenizer:
    """A wordpiece tokenizer with what the data needs to know of it.

    Attributes:
        fast: The tokenizer; truncation and padding are off.
        lowercase: Whether it lower-cases its input.
        special_tokens: Strings of the special tokens by role (`cls_token`, ...).
        model_max_length: Longest row, in tokens, that the model takes.
    """

    fast: FastTokenizer
    lowercase: bool
    special_tokens: dict[str, str]
    model_max_length: int

    @property
    def sha256(self) -> str:
        """Hash of all that decides how text is split."""
        content = json.dumps([self.fast.to_str(), self.special_tokens, self.model_max_length])
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def cls_id(self) -> int:
        """Id of the token that begins a row."""
        return self._id("cls_token")

    @property
    def sep_id(self) -> int:
        """Id of the token that ends a row."""
        return self._id("sep_token")

    @property
    def pad_id(self) -> int:
        """Id of the token that fills rows up."""
        return self._id("pad_token")

    @property
    def unk_id(self) -> int:
        """Id of the token that stands for what has no pieces."""
        return self._id("unk_token")

    def _id(self, role: str) -> int:
        token_id: int | None = self.fast.token_to_id(self.special_tokens[role])
        assert token_id is not None, "checked when it was loaded"
        return token_id

    def row_limit(self, max_seq_length: int | None) -> int:
        """Longest row in tokens: what the user asks for, at most what the model takes."""
        return min(max_seq_length or self.model_max_length, self.model_max_length)

    @cached_property
    def num_ids(self) -> int:
        """One more than the highest id."""
        return max(self.fast.get_vocab().values()) + 1

    def encode(self, words: Sequence[str]) -> Encoding:
        """Wordpieces of words (`ids`, and `word_ids` into `words`), without special tokens.

        Each word is tokenised by itself, as BERT's pieces never span two: it does not matter which
        words are encoded together.
        """
        return self.fast.encode(words, is_pretokenized=True, add_special_tokens=False)

    @classmethod
    def from_pretrained(cls, folder: str | Path, config: BertConfig) -> Tokenizer:
        """Loads the tokenizer of a model folder.

        Args:
            folder: With `tokenizer.json`, or `vocab.txt` alone.
            config: The model it belongs to.

        Raises:
            ModelError: There is none, it contradicts itself about case, lacks a special token, or
                has more entries than the model has embeddings.
        """
        folder = Path(folder)
        settings = _optional_json(folder / "tokenizer_config.json")
        settings = {**_optional_json(folder / "special_tokens_map.json"), **settings}
        special_tokens = {
            role: _token_text(settings.get(role, default), folder)
            for role, default in _SPECIAL_TOKENS.items()
        }
        says_lowercase = settings.get("do_lower_case")
        if os.path.lexists(folder / "tokenizer.json"):
            path = folder / "tokenizer.json"
            fast, lowercase = _load_tokenizer_json(path)
            if isinstance(says_lowercase, bool) and says_lowercase != lowercase:
                raise ModelError(
                    f"tokenizer_config.json says do_lower_case {says_lowercase}, tokenizer.json "
                    f"{lowercase}; correct the wrong one",
                    folder,
                )
            vocab = fast.get_vocab()
            _check_vocab(vocab, lowercase, special_tokens, config, path)
        elif os.path.lexists(folder / "vocab.txt"):
            path = folder / "vocab.txt"
            kind = settings.get("tokenizer_class", "BertTokenizer")
            if kind not in ("BertTokenizer", "BertTokenizerFast"):
                raise ModelError(
                    f"needs {kind}, of which vocab.txt alone is not enough; give the model a "
                    "tokenizer.json",
                    folder,
                )
            vocab = _read_vocab(path, config)
            lowercase = says_lowercase if isinstance(says_lowercase, bool) else not _is_cased(vocab)
            _check_vocab(vocab, lowercase, special_tokens, config, path)
            for option in ("strip_accents", "tokenize_chinese_chars"):
                if not isinstance(settings.get(option), bool | None):
                    raise ModelError(
                        f"tokenizer_config.json: {option} is not true or false", folder
                    )
            # The option names are those of tokenizer_config.json.
            fast = BertWordPieceTokenizer(
                vocab,
                lowercase=lowercase,
                strip_accents=settings.get("strip_accents"),
                handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
                **special_tokens,
            )._tokenizer
        else:
            raise ModelError("has no tokenizer.json and no vocab.txt", folder)
        fast.no_truncation()
        fast.no_padding()
        # A tokenizer from a bare vocabulary claims 1e30, which would switch every limit off.
        limit = settings.get("model_max_length")
        if not isinstance(limit, int) or not 3 <= limit <= config.max_position_embeddings:
            limit = config.max_position_embeddings
        return cls(fast, lowercase, special_tokens, limit)

    def save(self, folder: str | Path) -> None:
        """Writes the files from which bertner and `transformers` make this tokenizer again."""
        folder = Path(folder)
        content = self.fast.to_str(pretty=True)
        write_text(folder / "tokenizer.json", content)
        normalizer = json.loads(content).get("normalizer") or {}
        by_id = sorted(self.fast.get_vocab().items(), key=lambda item: item[1])
        write_text(folder / "vocab.txt", "".join(f"{token}\n" for token, _ in by_id))
        write_json(folder / "special_tokens_map.json", self.special_tokens)
        write_json(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "BertTokenizer",
                "do_lower_case": self.lowercase,
                # transformers makes the normalizer anew from these.
                "strip_accents": normalizer.get("strip_accents"),
                "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
                "model_max_length": self.model_max_length,
                **self.special_tokens,
            },
        )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}


def _token_text(token: Any, folder: Path) -> str:
    """A special token's string; `transformers` writes a string or an object that holds one."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or any("\ud800" <= c <= "\udfff" for c in text):
        raise ModelError(f"tokenizer_config.json: {token!r} is not a special token", folder)
    return text


def _load_tokenizer_json(path: Path) -> tuple[FastTokenizer, bool]:
    content = read_json(path, _MAX_VOCABULARY_BYTES)
    _check_model(content.get("model"), path)
    parts = {name: _parts(content.get(name)) for name in _COMPONENTS}
    for name, kinds in _COMPONENTS.items():
        for part in parts[name]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in kinds:
                raise ModelError(f"its {name} is {kind!r}; BERT needs {' '.join(kinds)}", path)
            templates = [part.get("single", []), part.get("pair", [])]
            if not all(isinstance(t, list) and len(t) <= _MAX_PIECES for t in templates):
                raise ModelError(f"its {name} has more than {_MAX_PIECES} pieces", path)
    try:
        # What has been checked, and not what another parser makes of the file. Rows are cut and
        # padded elsewhere.
        text = json.dumps({**content, "truncation": None, "padding": None})
        fast = FastTokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"not a tokenizer: {error}", path) from None
    return fast, any(p.get("lowercase") or p["type"] == "Lowercase" for p in parts["normalizer"])


def _parts(component: Any) -> list[Any]:
    """A component, and those that it is a sequence of."""
    if component is None:
        return []
    parts = [component]
    for name in ("normalizers", "pretokenizers") if isinstance(component, dict) else ():
        inner = component.get(name) or []
        parts += [p for i in (inner if isinstance(inner, list) else [None]) for p in _parts(i)]
    return parts


def _check_model(model: Any, path: Path) -> None:
    if not isinstance(model, dict):
        raise ModelError("not a tokenizer: has no model", path)
    if model.get("type", "WordPiece") != "WordPiece":
        raise ModelError(f"is {model['type']}, not the WordPiece of BERT", path)
    vocab, unknown = model.get("vocab"), model.get("unk_token")
    if not isinstance(vocab, dict) or not isinstance(unknown, str) or unknown not in vocab:
        raise ModelError(f"has no {unknown} for unknown words in its vocabulary", path)
    longest = model.get("max_input_chars_per_word")
    if not isinstance(longest, int) or not 0 < longest <= _MAX_WORD:
        raise ModelError(f"max_input_chars_per_word must be 1 to {_MAX_WORD}, not {longest}", path)


def _read_vocab(path: Path, config: BertConfig) -> dict[str, int]:
    try:
        content = read_bytes(path, _MAX_VOCABULARY_BYTES)
        _check_size(content.count(b"\n"), config, path)
        lines = content.decode("utf-8").split("\n")
    except ModelError:
        raise
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read: {error}", path) from None
    if lines[-1] == "":
        lines.pop()
    return {line.rstrip("\r"): token_id for token_id, line in enumerate(lines)}


def _is_latin(vocab: dict[str, int]) -> bool:
    """Whether most of a vocabulary is in Latin letters; many other scripts have no capitals."""
    letters = [token.removeprefix("##") for token in vocab if not token.startswith("[")]
    words = [token for token in letters if token.isalpha()]
    return 2 * sum(token.isascii() for token in words) > len(words)


def _check_vocab(
    vocab: dict[str, int],
    lowercase: bool,
    special_tokens: dict[str, str],
    config: BertConfig,
    path: Path,
) -> None:
    """Refuses a vocabulary that does not fit its settings or the model."""
    for role in ("cls_token", "sep_token", "pad_token", "unk_token"):
        if special_tokens[role] not in vocab:
            raise ModelError(f"has no {special_tokens[role]} in the vocabulary", path)
    if lowercase and _is_cased(vocab):
        raise ModelError("lower-cases its input, but the vocabulary has capital letters", path)
    if not lowercase and not _is_cased(vocab) and _is_latin(vocab):
        raise ModelError(
            "keeps capital letters, but the vocabulary has none; set do_lower_case to true", path
        )
    _check_size(max(vocab.values()) + 1, config, path)


def _check_size(size: int, config: BertConfig, path: Path) -> None:
    if size > config.vocab_size:
        raise ModelError(
            f"the vocabulary has {size} entries, but the model only {config.vocab_size} word "
            "embeddings; tokenizer and weights are from different models",
            path,
        )


def _is_cased(vocab: dict[str, int]) -> bool:
    """Whether a vocabulary tells capitals from small letters; `[CLS]` and its like do not count."""
    return any(token != token.lower() for token in vocab if not token.startswith("["))
