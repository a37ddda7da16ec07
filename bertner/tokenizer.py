"""BERT's wordpiece tokenizer: loading it from a model folder, checking it, writing it back.

The tokenizing itself is done by the `tokenizers` library.
"""

from __future__ import annotations

import hashlib
import json
import logging
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

logger = logging.getLogger("bertner")

# The largest in use, with 120,000 entries of many languages, has 3 MB.
_MAX_VOCABULARY_BYTES = 32 << 20

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

    def _id(self, role: str) -> int:
        token_id: int | None = self.fast.token_to_id(self.special_tokens[role])
        assert token_id is not None, "checked when it was loaded"
        return token_id

    def row_limit(self, max_seq_length: int | None) -> int:
        """Longest row in tokens: what the user asks for, at most what the model takes."""
        if max_seq_length is not None and max_seq_length > self.model_max_length:
            logger.warning(
                "max_seq_length %d is more than the model takes; rows have up to %d tokens",
                max_seq_length,
                self.model_max_length,
            )
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
        if (folder / "tokenizer.json").is_file():
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
        elif (folder / "vocab.txt").is_file():
            path = folder / "vocab.txt"
            kind = settings.get("tokenizer_class", "BertTokenizer")
            if kind not in ("BertTokenizer", "BertTokenizerFast"):
                raise ModelError(
                    f"needs {kind}, of which vocab.txt alone is not enough; give the model a "
                    "tokenizer.json",
                    folder,
                )
            vocab = _read_vocab(path)
            lowercase = says_lowercase if isinstance(says_lowercase, bool) else not _is_cased(vocab)
            _check_vocab(vocab, lowercase, special_tokens, config, path)
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
    return read_json(path) if path.is_file() else {}


def _token_text(token: Any, folder: Path) -> str:
    """A special token's string; `transformers` writes a string or an object that holds one."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ModelError(f"tokenizer_config.json: {token!r} is not a special token", folder)
    return text


def _load_tokenizer_json(path: Path) -> tuple[FastTokenizer, bool]:
    content = read_json(path, _MAX_VOCABULARY_BYTES)
    try:
        fast = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"not a tokenizer: {error}", path) from None
    if content.get("model", {}).get("type", "WordPiece") != "WordPiece":
        raise ModelError(f"is {content['model']['type']}, not the WordPiece of BERT", path)
    normalizer = content.get("normalizer") or {}
    parts = [normalizer, *(normalizer.get("normalizers") or [])]
    lowercase = any(part.get("lowercase") or part.get("type") == "Lowercase" for part in parts)
    return fast, lowercase


def _read_vocab(path: Path) -> dict[str, int]:
    try:
        lines = read_bytes(path, _MAX_VOCABULARY_BYTES).decode("utf-8").split("\n")
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
    size = max(vocab.values()) + 1
    if size > config.vocab_size:
        raise ModelError(
            f"the vocabulary has {size} entries, but the model only {config.vocab_size} word "
            "embeddings; tokenizer and weights are from different models",
            path,
        )


def _is_cased(vocab: dict[str, int]) -> bool:
    """Whether a vocabulary tells capitals from small letters; `[CLS]` and its like do not count."""
    return any(token != token.lower() for token in vocab if not token.startswith("["))
