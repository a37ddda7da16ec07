"""Annotated files, read and checked: CoNLL columns, JSON lines, parquet."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bertner.corpus import Corpus, CorpusBuilder, split_words
from bertner.errors import DataError, StorageError


def read_file(
    path: str | Path,
    *,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    label_names: Sequence[str] | None = None,
) -> Corpus:
    """Reads an annotated file; its ending and first line tell the format.

    Args:
        path: `.json`/`.jsonl` (one object a line), `.parquet`, or CoNLL columns (any other ending).
        text_column: Key or column of the words.
        label_column: Key or column of the tags.
        label_names: Names of tags that are integers.

    Raises:
        DataError: The file is missing, damaged, or breaks its format; says where and how to fix it.
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            return _read_parquet(path, text_column, label_column, label_names)
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError("no such file", path) from None
    except IsADirectoryError:
        raise DataError("is a folder; give a file in it", path) from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
    text = _decode(content, path)
    builder = CorpusBuilder(str(path), label_names)
    if path.suffix in (".json", ".jsonl"):
        _read_json_lines(text, builder, text_column, label_column)
    else:
        _read_conll(text, builder)
    return builder.finish(hashlib.sha256(content).hexdigest())


def _decode(content: bytes, path: Path) -> str:
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise DataError("holds a NUL byte: not a text file, or damaged", path, line)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"byte 0x{content[error.start]:02x} is not UTF-8; convert the file "
            "(iconv -f latin1 -t utf-8)",
            path,
            line,
        ) from None


def _read_conll(text: str, builder: CorpusBuilder) -> None:
    """CoNLL columns: the word first, its tag last; blank lines between sentences."""
    words: list[str] = []
    tags: list[str] = []
    lines: list[int] = []
    num_columns = 0
    # Only \n ends a line: U+2028, U+0085 and their like may be words.
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip(" \t\r")
        if not stripped or stripped.startswith("-DOCSTART-"):
            builder.add(words, tags, lines)
            words, tags, lines = [], [], []
            if stripped:
                builder.document += bool(builder.documents)
            continue
        # With tabs an empty or spaced word is possible; without, runs of spaces part the columns.
        columns = line.rstrip("\r").split("\t") if "\t" in stripped else re.split(" +", stripped)
        if len(columns) < 2 or (num_columns and len(columns) != num_columns):
            wanted = f"{num_columns} as above" if num_columns else "2 or more: word ... tag"
            raise DataError(
                f"{len(columns)} column{'s' if len(columns) != 1 else ''} instead of {wanted}; "
                "separate word and tag with a space or tab, and sentences with an empty line",
                builder.source,
                number,
            )
        num_columns = len(columns)
        words.append(columns[0])
        tags.append(columns[-1].strip())
        lines.append(number)
    builder.add(words, tags, lines)


def _read_json_lines(
    text: str, builder: CorpusBuilder, text_column: str, label_column: str
) -> None:
    """JSON lines of words and tags, or of a text and its entities."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise DataError(
                f"not JSON ({reason}); each line must be one object, and the last may be cut off",
                builder.source,
                number,
            ) from None
        if not isinstance(record, dict):
            raise DataError("must be one JSON object a line", builder.source, number)
        if "text" in record and "entities" in record:
            spans = split_words(_checked_text(record["text"], builder, number))
            words = [record["text"][start:end] for start, end in spans]
            tags = _tags_from_entities(record, spans, builder, number)
        elif text_column in record and label_column in record:
            words, tags = record[text_column], record[label_column]
            _check_columns(words, tags, builder, number, text_column, label_column)
            tags = _named_tags(tags, builder, number)
        else:
            raise DataError(
                f"needs {text_column!r} and {label_column!r}, or 'text' and 'entities', but has "
                f"{', '.join(map(repr, record)) or 'nothing'} "
                "(--text_column_name and --label_column_name name other keys)",
                builder.source,
                number,
            )
        builder.add(words, tags, [number] * len(words))


def _checked_text(text: Any, builder: CorpusBuilder, number: int) -> str:
    if not isinstance(text, str):
        raise DataError("'text' must be a string", builder.source, number)
    if "\0" in text:
        raise DataError("'text' holds a NUL character", builder.source, number)
    return text


def _check_columns(
    words: Any, tags: Any, builder: CorpusBuilder, number: int, text_column: str, label_column: str
) -> None:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(f"{text_column!r} must be a list of strings", builder.source, number)
    if not isinstance(tags, list) or len(tags) != len(words):
        count = len(tags) if isinstance(tags, list) else "no list of"
        raise DataError(
            f"{len(words)} words in {text_column!r} but {count} tags in {label_column!r}",
            builder.source,
            number,
        )
    if any("\0" in word for word in words):
        raise DataError("a word holds a NUL character", builder.source, number)


def _named_tags(tags: Sequence[Any], builder: CorpusBuilder, number: int) -> list[str]:
    """Names for integer tags; strings stay."""
    names = builder.label_names
    named = []
    for tag in tags:
        if isinstance(tag, int) and not isinstance(tag, bool):
            if names is None:
                raise DataError(
                    f"tag {tag} is an integer; name them, in order, with "
                    "--label_names O,B-PER,I-PER,...",
                    builder.source,
                    number,
                )
            if not 0 <= tag < len(names):
                raise DataError(
                    f"tag {tag} is outside the {len(names)} label names", builder.source, number
                )
            named.append(names[tag])
        elif isinstance(tag, str):
            named.append(tag)
        else:
            raise DataError(
                f"tag {tag!r} is neither a string nor an integer", builder.source, number
            )
    return named


def _tags_from_entities(
    record: dict[str, Any], spans: list[tuple[int, int]], builder: CorpusBuilder, number: int
) -> list[str]:
    """IOB2 tags of the words at `spans` for annotations in characters."""

    def problem(message: str) -> DataError:
        return DataError(message, builder.source, number)

    text = record["text"]
    if not isinstance(record["entities"], list):
        raise problem("'entities' must be a list")
    entities = []
    for entity in record["entities"]:
        try:
            start, end, label = entity["start"], entity["end"], entity["label"]
        except (TypeError, KeyError):
            raise problem(f"entity {entity!r} needs start, end and label") from None
        if type(start) is not int or type(end) is not int or not isinstance(label, str):
            raise problem(f"entity {entity!r}: start and end must be integers, label a string")
        if not label:
            raise problem(f"entity {entity!r} has an empty label")
        if not 0 <= start < end <= len(text):
            raise problem(
                f"entity {start}-{end} is outside the text, which has {len(text)} characters; "
                "offsets count characters from 0, and end is exclusive"
            )
        entities.append((start, end, label))
    entities.sort()
    for (start, end, label), (next_start, next_end, next_label) in itertools.pairwise(entities):
        if next_start < end:
            raise problem(
                f"entities overlap: {label} {start}-{end} and {next_label} "
                f"{next_start}-{next_end}; keep one of them"
            )
    tags = ["O"] * len(spans)
    starts = [start for start, _ in spans]
    for start, end, label in entities:
        first, last = np.searchsorted(starts, [start, end])
        # White space at an entity's border is forgiven; half a word is not.
        inside = range(int(first), int(last))
        whole = "".join(text[spans[k][0] : spans[k][1]] for k in inside)
        if not inside or whole != "".join(text[start:end].split()):
            raise problem(
                f"entity {label} {start}-{end} {text[start:end]!r} does not begin and end between "
                "words; move its offsets to the borders of words"
            )
        for k in inside:
            tags[k] = f"{'B' if k == first else 'I'}-{label}"
    return tags


def _read_parquet(
    path: Path, text_column: str, label_column: str, label_names: Sequence[str] | None
) -> Corpus:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DataError("no such file", path)
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable parquet file: {error}", path) from None
    if label_names is None:
        # Files that `datasets` writes carry the names of their integer tags.
        metadata = (table.schema.metadata or {}).get(b"huggingface")
        label_names = _class_label_names(metadata, label_column)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return corpus_from_table(table, str(path), text_column, label_column, label_names, sha256)


def _class_label_names(metadata: bytes | None, label_column: str) -> list[str] | None:
    try:
        features = json.loads(metadata or b"{}")["info"]["features"][label_column]
        # "feature" since datasets 4, an unnamed list before.
        inner = features["feature"] if isinstance(features, dict) else features[0]
        return list(inner["names"])
    except (KeyError, TypeError, IndexError, ValueError):
        return None


def corpus_from_table(
    table: Any,
    source: str,
    text_column: str,
    label_column: str,
    label_names: Sequence[str] | None,
    sha256: str | None = None,
) -> Corpus:
    """Turns an Arrow table with a column of words and one of tags into a corpus.

    Args:
        table: `pyarrow.Table`; a `document_id` or `doc_id` column tells documents apart.
        source: Named in messages.
        text_column: Column of lists of words.
        label_column: Column of lists of tags, strings or integers.
        label_names: Names of integer tags.
        sha256: Of the file; None to hash words and tags.
    """
    for column in (text_column, label_column):
        if column not in table.column_names:
            raise DataError(
                f"has no column {column!r} but {', '.join(table.column_names)} "
                "(--text_column_name and --label_column_name name other columns)",
                source,
            )
    builder = CorpusBuilder(source, label_names)
    documents = _document_numbers(table)
    digest = hashlib.sha256()
    columns = zip(
        table.column(text_column).to_pylist(), table.column(label_column).to_pylist(), strict=True
    )
    for number, (words, tags) in enumerate(columns, 1):
        _check_columns(words, tags, builder, number, text_column, label_column)
        tags = _named_tags(tags, builder, number)
        builder.document = documents[number - 1] if documents else 0
        builder.add(words, tags, [number] * len(words))
        if sha256 is None:
            digest.update(json.dumps([words, tags]).encode())
    return builder.finish(sha256 or digest.hexdigest())


def _document_numbers(table: Any) -> list[int] | None:
    for column in ("document_id", "doc_id"):
        if column in table.column_names:
            numbers: dict[Any, int] = {}
            values = table.column(column).to_pylist()
            return [numbers.setdefault(value, len(numbers)) for value in values]
    return None


def read_lines(path: str | Path) -> Iterator[str]:
    """Lines of a plain text file, without their ends; checked as in `read_file`."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path) from None
    for line in _decode(content, Path(path)).split("\n"):
        yield line.rstrip("\r")
