"""Text to be tagged: read from lines, whole files, JSON lines or CoNLL columns, as it comes."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from reprlib import repr as short  # what a message shows of a value from a file
from typing import Any, NoReturn, cast

from bertner.errors import DataError, UsageError
from bertner.files import json_object
from bertner.predict import Text
from bertner.readers import (
    Columns,
    begins_document,
    carriage_return,
    check_characters,
    decode,
    decode_lines,
    number_documents,
    parse_record,
    read_lines,
    read_text,
)

logger = logging.getLogger("bertner")

STANDARD_INPUT = "-"

_FORMAT_OF = {".json": "jsonl", ".jsonl": "jsonl", ".conll": "conll"}  # by ending
_TAG = re.compile(r"O|[BIESLU]-\S+")
_LOOKED_AT = 50  # rows, to tell columns from text

_READ_BYTES = 1 << 16  # as much as a pipe holds


@dataclass(frozen=True)
class Item:
    """A text, and what its source has beside it.

    Attributes:
        text: To be tagged.
        record: Of JSON lines: the object that it came in.
        rows: Of CoNLL columns: the columns of each word.
        heading: Of CoNLL columns: the columns of the `-DOCSTART-` line before it; else empty.
    """

    text: Text
    record: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Sequence[str]] = ()
    heading: Sequence[str] = ()


def read_items(
    path: str,
    format: str,
    *,
    text_column: str = "tokens",
    document_column: str | None = None,
    documents: str = "marked",
) -> Iterator[Item | None]:
    """Reads the texts of a file, one after another.

    Args:
        path: The file, or "-" for standard input.
        format: "lines", "document", "jsonl" or "conll". "auto" goes by the ending: `.json` and
            `.jsonl` are JSON lines, `.conll` is CoNLL columns, and all else is lines, unless a file
            begins with a `-DOCSTART-` line or rows whose last column holds a tag.
        text_column: Key of the words in JSON lines.
        document_column: Key of what tells documents apart in JSON lines; None for `document_id` or
            `doc_id`, if there is one.
        documents: Whether sentences are read as parts of documents, which `-DOCSTART-` lines or
            that key tell apart: "none"; "marked": if the file does so, else it is warned; "needed":
            it has to. A text in JSON lines can be a document of its own.

    Yields:
        Texts; and None where standard input has nothing more for now.

    Raises:
        DataError: The file is missing, or breaks its format.
        StorageError: The disk fails.
    """
    if format == "auto":
        ending = Path(path).suffix.lower()
        format = _FORMAT_OF.get(ending, "lines")
        if format == "lines" and Path(path).is_file() and _looks_like_conll(path):
            logger.info("%s: read as CoNLL columns; --input_format lines reads it as text", path)
            format = "conll"
    name = "standard input" if path == STANDARD_INPUT else path
    lines = _standard_input() if path == STANDARD_INPUT else read_lines(path)
    if format == "document":
        yield Item(Text.of(_whole(path, name)))
    elif format == "jsonl":
        columns = Columns(text_column, "", document_column)
        yield from _json_items(lines, name, columns, documents)
    elif format == "conll":
        yield from _conll_items(lines, name, documents)
    else:
        for line in lines:
            yield None if line is None else Item(Text.of(line))


def _looks_like_conll(path: str) -> bool:
    """Whether a file begins with -DOCSTART-, or with several rows that all have a tag last."""
    with Path(path).open("rb") as stream:
        # A line may be without end.
        begin = [stream.readline(_READ_BYTES).decode("utf-8-sig", "replace") for _ in range(200)]
    filled = (row for row in (line.rstrip(" \t\r\n") for line in begin) if row)
    rows = list(islice(filled, _LOOKED_AT))
    if rows and begins_document(rows[0]):
        return True
    columns = [_columns(row) for row in rows]
    widths = {len(row) for row in columns}
    has_columns = len(rows) > 1 and len(widths) == 1 and widths != {1}
    return has_columns and all(_TAG.fullmatch(row[-1]) for row in columns)


def _whole(path: str, name: str) -> str:
    """All of a file as it is, so that offsets count its own characters."""
    if path != STANDARD_INPUT:
        return read_text(path)
    if sys.stdin is None:
        raise UsageError("there is no standard input; name a FILE")
    return decode(sys.stdin.buffer.read(), name)


def _standard_input() -> Iterator[str | None]:
    """Lines as they arrive; None where the next one may not be there yet."""
    if sys.stdin is None:
        raise UsageError("there is no standard input; name a FILE")
    # Bytes, since what the locale says of text need not be what comes in.
    stream = cast(io.BufferedReader, sys.stdin.buffer)
    begun: list[bytes] = []  # parts of a line whose end is still to come
    number = 1
    while chunk := stream.read1(_READ_BYTES):
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if others:
            lines = [b"".join(begun), *others[:-1]]
            begun = [others[-1]]
            yield from decode_lines(lines, "standard input", number)
            number += len(lines)
        yield None
    if rest := b"".join(begun):
        yield from decode_lines([rest], "standard input", number)


def _numbered(lines: Iterable[str | None]) -> Iterator[tuple[int, str | None]]:
    """Each line with its number, from 1; a None between them has that of the line before."""
    number = 0
    for line in lines:
        number += line is not None
        yield number, line


def _not_json(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _not_json(text)


# What is in a record goes out again, and must be JSON there too.
_JSON = json.JSONDecoder(
    object_pairs_hook=json_object, parse_constant=_not_json, parse_float=_finite
)


def _json_items(
    lines: Iterable[str | None], source: str, columns: Columns, documents: str
) -> Iterator[Item | None]:
    of_file = object()  # the same document elsewhere is another one
    for number, line in _numbered(lines):
        if line is None:
            yield None
            continue
        if not line.strip():
            continue
        record = parse_record(line, source, number, _JSON)
        text, words = record.get("text"), record.get(columns.text)
        column = document = None
        if documents != "none":
            column = columns.find_document(record, source, number)
            if column is None and not isinstance(text, str) and documents != "warned":
                _check_documents(source, documents)
                documents = "warned"
        if column is not None and record[column] is not None:
            number_documents([record[column]], {}, column, source, number)  # refuses lists
            document = of_file, record[column]
        if isinstance(text, str):
            check_characters(text, source, number)
            yield Item(Text.of(text, document), record)
        elif isinstance(words, list) and all(isinstance(word, str) for word in words):
            check_characters("".join(words), source, number)
            yield Item(Text.of_words(words, document), record)
        else:
            raise DataError(
                f"needs 'text', a string, or {columns.text!r}, a list of words, but is "
                f"{short(record)} (--text_column_name names another key)",
                source,
                number,
            )


def _columns(row: str) -> list[str]:
    """As in training: what is a space only to Unicode may be part of a word."""
    return row.split("\t") if "\t" in row else [column for column in row.split(" ") if column]


def _conll_items(lines: Iterable[str | None], source: str, documents: str) -> Iterator[Item | None]:
    """Sentences of words, the first column; see `read_items` for their documents."""
    of_file = object()  # the same file may be given twice
    rows: list[list[str]] = []
    heading: list[str] = []
    document = num_columns = 0

    def sentence() -> Item:
        nonlocal documents
        if not document and documents != "none":
            _check_documents(source, documents)
            documents = "none"
        words = [row[0] for row in rows]
        is_part = document > 0 and documents != "none"
        text = Text.of_words(words, (of_file, document) if is_part else None)
        return Item(text, rows=list(rows), heading=list(heading))

    for number, line in _numbered(lines):
        if line is None:
            yield None
            continue
        row = line.rstrip(" \t\r")
        if "\r" in row:
            raise carriage_return(source, number)
        if row and not begins_document(row):
            rows.append(_columns(row))
            num_columns = num_columns or len(rows[0])
            if len(rows[-1]) != num_columns:
                raise DataError(
                    f"{len(rows[-1])} columns instead of {num_columns} as above; give all words "
                    "the same columns, and sentences an empty line between",
                    source,
                    number,
                )
            continue
        if rows:
            yield sentence()
            rows, heading = [], []
        if row:
            document += 1
            heading = row.split()
    if rows:
        yield sentence()


def _check_documents(source: str, documents: str) -> None:
    """There are sentences, but nothing that tells their documents apart."""
    if documents == "needed":
        raise DataError(
            "does not say where documents begin, which --context document needs: begin with a "
            "-DOCSTART- line, or give each record a document_id, or give --context none",
            source,
        )
    logger.warning(
        "%s does not say where documents begin (-DOCSTART- lines, or document_id in JSON), so each "
        "sentence is read alone; the model was trained to read their neighbours too",
        source,
    )
