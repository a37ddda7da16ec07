"""Annotated files, read and checked: CoNLL columns, JSON lines, parquet."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short  # what a message shows of a value from a file
from typing import Any

from bertner.corpus import (
    Corpus,
    CorpusBuilder,
    CorpusStream,
    RawSentence,
    split_sentences,
    split_words,
)
from bertner.errors import DataError, StorageError
from bertner.files import json_object

# Characters that JSON and parquet can smuggle in and that no tokenizer takes: NUL, and halves of
# UTF-16 pairs.
_UNUSABLE = re.compile("[\0\ud800-\udfff]")

# Columns of a table that tell documents apart.
_DOCUMENT_COLUMNS = ("document_id", "doc_id")

# How much of a source is turned into Python objects at a time.
_CHUNK_BYTES = 1 << 18
_TABLE_ROWS = 1_000


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table, or of the keys of JSON objects.

    Attributes:
        text: The words.
        label: The tags.
        document: What tells documents apart; None for `document_id` or `doc_id`, if there is one.
        entities_first: Of a JSON object with words and tags, and with a text and its entities too,
            read the latter.
    """

    text: str
    label: str
    document: str | None
    entities_first: bool = False

    def find_document(
        self, names: Iterable[str], source: str, line: int | None = None
    ) -> str | None:
        """Of the columns that there are the one that tells documents apart.

        Raises:
            DataError: The one that was named is not there.
        """
        if self.document is None:
            return next((name for name in _DOCUMENT_COLUMNS if name in names), None)
        if self.document not in names:
            raise DataError(
                f"has no column {self.document!r} but {_listed(names)} "
                "(--document_column_name names another)",
                source,
                line,
            )
        return self.document


def read_file(
    path: str | Path,
    *,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    document_column: str | None = None,
    label_names: Sequence[str] | None = None,
    tag_column: int = -1,
    entities_first: bool = False,
) -> Corpus:
    """Reads an annotated file; its ending tells the format.

    Args:
        path: `.json`/`.jsonl` (one object a line), `.parquet`, or CoNLL columns (any other ending).
        text_column: Key or column of the words.
        label_column: Key or column of the tags.
        document_column: Key or column that tells documents apart; None for `document_id` or
            `doc_id`, if there is one.
        label_names: Names of tags that are integers.
        tag_column: Of CoNLL columns the one of the tags, counted from the last, which is -1.
        entities_first: Of a JSON object with words and tags, and with a text and its entities too,
            read the latter.

    Raises:
        DataError: The file is missing, damaged, or breaks its format; says where and how to fix it.
        StorageError: The file is there but the disk fails, or it may not be read.
    """
    return open_file(
        path,
        text_column=text_column,
        label_column=label_column,
        document_column=document_column,
        label_names=label_names,
        tag_column=tag_column,
        entities_first=entities_first,
    ).read()


def open_file(
    path: str | Path,
    *,
    text_column: str = "tokens",
    label_column: str = "ner_tags",
    document_column: str | None = None,
    label_names: Sequence[str] | None = None,
    tag_column: int = -1,
    entities_first: bool = False,
) -> CorpusStream:
    """What `read_file` reads, to be read in blocks; errors are raised while it is."""
    path = Path(path)
    builder = CorpusBuilder(str(path), label_names)
    digest = hashlib.sha256()
    columns = Columns(text_column, label_column, document_column, entities_first)
    sentences: Iterator[RawSentence]
    kind = file_format(path)
    if kind == "parquet":
        sentences = _parquet_sentences(path, builder, digest, columns)
    elif kind == "json":
        sentences = _json_sentences(_text_lines(path, digest), builder, columns)
    else:
        sentences = _conll_sentences(_text_lines(path, digest), builder, tag_column)
    return CorpusStream(builder, sentences, digest)


def file_format(path: Path) -> str:
    """How a file is read, by its ending: "parquet", "json" or "conll"."""
    ending = path.suffix.lower()
    return {".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(ending, "conll")


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes; raises what `read_file` does of a file that cannot be read."""
    path, digest = Path(path), hashlib.sha256()
    with _file_errors(path), path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_file(path: str | Path) -> None:
    """Raises what `read_file` does of a file that is missing or may not be read.

    A pipe is left alone: opening it is part of reading it.
    """
    path = Path(path)
    with _file_errors(path):
        if not path.is_fifo():
            path.open("rb").close()


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turns what the system says of a file into errors of ours."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("no such file; check the path", path) from None
    except IsADirectoryError:
        raise DataError("is a folder; give a file in it", path) from None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from None


def decode(content: bytes, source: object, first_line: int = 1) -> str:
    """Text from bytes; `source` and lines, counted from `first_line`, are named in errors."""
    if b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + first_line
        raise DataError(
            "holds a NUL byte, so it is damaged, no text, or UTF-16 "
            "(which iconv -f utf-16 -t utf-8 converts)",
            source,
            line,
        )
    try:
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        # Where it is counts from after the byte order mark, and so does `error.object`.
        line = error.object.count(b"\n", 0, error.start) + first_line
        raise DataError(
            f"byte 0x{error.object[error.start]:02x} is not UTF-8; convert the file "
            "(iconv -f latin1 -t utf-8)",
            source,
            line,
        ) from None


def _chunks(path: Path) -> Iterator[bytes]:
    """A file's bytes, in pieces of whole lines."""
    with _file_errors(path), path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk + stream.readline()


def _text_lines(path: Path, digest: hashlib._Hash) -> Iterator[str]:
    """The lines of a text file."""
    next_line = 1
    for chunk in _chunks(path):
        digest.update(chunk)
        # Only \n ends a line: U+2028, U+0085 and their like may be words.
        lines = decode(chunk, path, next_line).split("\n")
        if chunk.endswith(b"\n"):
            lines.pop()
        yield from lines
        next_line += len(lines)


def _conll_sentences(
    lines: Iterable[str], builder: CorpusBuilder, tag_column: int
) -> Iterator[RawSentence]:
    """CoNLL columns: the word first, its tag last or near; blank lines between sentences."""
    least = 1 - tag_column
    words: list[str] = []
    tags: list[str] = []
    num_columns = document = 0
    number, is_first = 0, True
    for number, line in enumerate(lines, 1):
        row = line.rstrip(" \t\r")
        if "\r" in row:  # also of -DOCSTART-, which would take the words after it along
            raise carriage_return(builder.source, number)
        if not row or (row[0] == "-" and begins_document(row)):
            if words:
                yield document, words, tags, range(number - len(words), number)
                words, tags, is_first = [], [], False
            if row:
                builder.marks_documents = True
                document += not is_first
            continue
        # With tabs an empty or spaced word is possible; without, runs of spaces part the columns.
        # Written out: a call for each row would take a tenth of the time of reading.
        if "\t" in row:
            columns = row.split("\t")
        else:
            columns = row.split(" ")
            if "" in columns:
                columns = [column for column in columns if column]
        if len(columns) < least or (num_columns and len(columns) != num_columns):
            wanted = f"{num_columns} as above"
            if not num_columns:
                wanted = f"{least} or more: word ... {'tag ' * (least - 1)}".rstrip()
            raise DataError(
                f"{len(columns)} column{'s' if len(columns) != 1 else ''} instead of {wanted}; "
                "separate word and tag with a space or tab, and sentences with an empty line",
                builder.source,
                number,
            )
        num_columns = len(columns)
        words.append(columns[0])
        tags.append(columns[tag_column])
    if words:
        yield document, words, tags, range(number + 1 - len(words), number + 1)


def carriage_return(source: object, line: int) -> DataError:
    """The error for a carriage return before the end of a line of columns."""
    return DataError(
        "a carriage return within the line; if it ends lines, convert the file (tr '\\r' '\\n')",
        source,
        line,
    )


def begins_document(row: str) -> bool:
    """Whether a line of CoNLL columns stands between documents."""
    return row == "-DOCSTART-" or row.startswith(("-DOCSTART- ", "-DOCSTART-\t"))


def has_entities(record: Mapping[str, Any]) -> bool:
    """Whether a JSON object has a text and its entities, and not something else of those names."""
    entities = record.get("entities")
    is_list = isinstance(entities, list) and all(isinstance(each, dict) for each in entities)
    return is_list and isinstance(record.get("text"), str)


def _json_sentences(
    lines: Iterable[str], builder: CorpusBuilder, columns: Columns
) -> Iterator[RawSentence]:
    """JSON lines of words and tags, or of a text and its entities."""
    text_column, label_column = columns.text, columns.label
    column, is_first = columns.document, True
    document_of: dict[Any, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record = parse_record(line, builder.source, number)
        has_tags = text_column in record and label_column in record
        if has_tags and not (columns.entities_first and has_entities(record)):
            words, tags = record[text_column], record[label_column]
            _check_columns(words, tags, builder, number, text_column, label_column)
            tags = _named_tags(tags, builder, number)
            sentences = [(words, tags)]
        elif "text" in record and "entities" in record:
            spans = split_words(_checked_text(record["text"], builder, number))
            tags = _tags_from_entities(record, spans, builder, number)
            sentences = list(_text_sentences(record["text"], spans, tags))
        else:
            raise DataError(
                f"needs {text_column!r} and {label_column!r}, or 'text' and 'entities', but has "
                f"{_listed(record)} (--text_column_name and --label_column_name name other keys)",
                builder.source,
                number,
            )
        if is_first:  # which says whether there is a key for documents
            column = columns.find_document(record, builder.source, number)
            builder.marks_documents, is_first = column is not None, False
        document = 0
        if column is not None:
            value = record.get(column)
            (document,) = number_documents([value], document_of, column, builder.source, number)
        for words, tags in sentences:
            yield document, words, tags, [number] * len(words)


_JSON = json.JSONDecoder(object_pairs_hook=json_object)


def parse_record(
    line: str, source: str, number: int, decoder: json.JSONDecoder = _JSON
) -> dict[str, Any]:
    """The JSON object in a line.

    Raises:
        DataError: There is none.
    """
    try:
        record = decoder.decode(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", str(error))
        raise DataError(
            f"not JSON ({reason}); each line must be one object, and the last may be cut off",
            source,
            number,
        ) from None
    if not isinstance(record, dict):
        raise DataError(
            "each line must be one JSON object, such as "
            '{"tokens": ["Paris"], "ner_tags": ["B-LOC"]}',
            source,
            number,
        )
    return record


def _listed(names: Iterable[str]) -> str:
    """Names of keys or columns for a message, which is to stay short."""
    names = list(names)
    shown = ", ".join(map(short, names[:8]))
    return shown + ", ..." if len(names) > 8 else shown or "nothing"


def _checked_text(text: Any, builder: CorpusBuilder, number: int) -> str:
    if not isinstance(text, str):
        raise DataError(f"'text' must be a string, not {short(text)}", builder.source, number)
    check_characters(text, builder.source, number)
    return text


def check_characters(text: str, source: str, number: int) -> None:
    """Raises DataError if text from JSON or parquet holds what stands for no character."""
    unusable = _UNUSABLE.search(text)
    if unusable:
        raise DataError(
            f"holds U+{ord(unusable.group()):04X}, which stands for no character; remove it",
            source,
            number,
        )


def _check_columns(
    words: Any, tags: Any, builder: CorpusBuilder, number: int, text_column: str, label_column: str
) -> None:
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise DataError(
            f"{text_column!r} must be a list of strings, not {short(words)}",
            builder.source,
            number,
        )
    if not isinstance(tags, list):
        raise DataError(
            f"{label_column!r} must be a list of tags, not {short(tags)}",
            builder.source,
            number,
        )
    if len(tags) != len(words):
        raise DataError(
            f"{len(words)} words in {text_column!r} but {len(tags)} tags in {label_column!r}; "
            "each word needs one tag",
            builder.source,
            number,
        )
    check_characters("".join(words), builder.source, number)


def _named_tags(tags: Sequence[Any], builder: CorpusBuilder, number: int) -> list[str]:
    """Names for integer tags; strings stay."""
    names = builder.label_names
    named = []
    for tag in tags:
        if isinstance(tag, int) and not isinstance(tag, bool):
            if names is None:
                raise DataError(
                    f"tag {short(tag)} is an integer; name them, in order, with "
                    "--label_names O,B-PER,I-PER,...",
                    builder.source,
                    number,
                )
            if not 0 <= tag < len(names):
                raise DataError(
                    f"tag {short(tag)} is outside the {len(names)} label names, whose "
                    "numbers begin at 0; correct it, or name all labels",
                    builder.source,
                    number,
                )
            named.append(names[tag])
        elif isinstance(tag, str):
            named.append(tag)
        else:
            raise DataError(
                f'tag {short(tag)} is neither a string, such as "B-PER", nor an integer',
                builder.source,
                number,
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
        raise problem(f"'entities' must be a list, not {short(record['entities'])}")
    entities = []
    for entity in record["entities"]:
        try:
            start, end, label = entity["start"], entity["end"], entity["label"]
        except (TypeError, KeyError):
            raise problem(f"entity {short(entity)} needs start, end and label") from None
        if type(start) is not int or type(end) is not int or not isinstance(label, str):
            raise problem(f"entity {short(entity)}: start and end must be integers, label a string")
        if not label.strip():
            raise problem(f"entity {short(entity)} has an empty label")
        if not 0 <= start < end <= len(text):
            raise problem(
                f"entity {short(start)}-{short(end)} is outside the text, which has {len(text)} "
                "characters; offsets count characters from 0, and end is exclusive"
            )
        entities.append((start, end, label))
    entities.sort()
    for (start, end, label), (next_start, next_end, next_label) in itertools.pairwise(entities):
        if next_start < end:
            raise problem(
                f"entities overlap: {short(label)} {start}-{end} and "
                f"{short(next_label)} {next_start}-{next_end}; keep one of them"
            )
    tags = ["O"] * len(spans)
    word_at_start = {start: k for k, (start, _) in enumerate(spans)}
    word_at_end = {end: k for k, (_, end) in enumerate(spans)}
    for start, end, label in entities:
        # White space at an entity's border is forgiven; half a word is not.
        annotated = text[start:end]
        first = word_at_start.get(end - len(annotated.lstrip()))
        last = word_at_end.get(start + len(annotated.rstrip()))
        if first is None or last is None or last < first:
            raise problem(
                f"entity {short(label)} {start}-{end} {short(annotated)} does not "
                "begin and end between words; move its offsets to the borders of words"
            )
        tags[first] = f"B-{label}"
        tags[first + 1 : last + 1] = [f"I-{label}"] * (last - first)
    return tags


def _text_sentences(
    text: str, spans: list[tuple[int, int]], tags: list[str]
) -> Iterator[tuple[list[str], list[str]]]:
    """Words and tags of each part of a text; a blank line in an entity is no border."""
    first = 0
    for _, last in split_sentences(text, spans):
        if last == len(tags) or not tags[last].startswith("I-"):
            yield [text[start:end] for start, end in spans[first:last]], tags[first:last]
            first = last


def _parquet_sentences(
    path: Path, builder: CorpusBuilder, digest: hashlib._Hash, columns: Columns
) -> Iterator[RawSentence]:
    import pyarrow
    import pyarrow.parquet

    with _file_errors(path):
        content = path.read_bytes()
    digest.update(content)
    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(content)).read()
        table.validate(full=True)
        _ = table.column_names  # decodes them
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise DataError(
            f"not a readable parquet file ({reason}); write it again, or give it the ending of "
            "what it is",
            path,
        ) from None
    if builder.label_names is None:
        # Files that `datasets` writes carry the names of their integer tags.
        metadata = (table.schema.metadata or {}).get(b"huggingface")
        builder.label_names = _class_label_names(metadata, columns.label)
    yield from _table_sentences(table, builder, None, columns)


def _class_label_names(metadata: bytes | None, label_column: str) -> list[str] | None:
    try:
        features = json.loads(metadata or b"{}")["info"]["features"][label_column]
        # "feature" since datasets 4, an unnamed list before.
        inner = features["feature"] if isinstance(features, dict) else features[0]
        names = inner["names"]
    except (KeyError, TypeError, IndexError, ValueError, RecursionError):
        return None
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    return None


def open_table(
    table: Any, source: str, columns: Columns, label_names: Sequence[str] | None
) -> CorpusStream:
    """An Arrow table with a column of words and one of tags, to be read.

    Args:
        table: `pyarrow.Table`.
        source: Named in messages.
        columns: Those of lists of words, and of lists of tags, strings or integers.
        label_names: Names of integer tags.
    """
    builder, digest = CorpusBuilder(source, label_names), hashlib.sha256()
    sentences = _table_sentences(table, builder, digest, columns)
    return CorpusStream(builder, sentences, digest)


def _table_sentences(
    table: Any,
    builder: CorpusBuilder,
    digest: hashlib._Hash | None,
    columns: Columns,
) -> Iterator[RawSentence]:
    """The records of a table; `digest`, if there is one, takes in all that comes of them."""
    source, text_column, label_column = builder.source, columns.text, columns.label
    for column in (text_column, label_column):
        _check_list_column(table, column, source)
    document_column = columns.find_document(table.column_names, source)
    if document_column is not None:
        _check_once(table, document_column, source)
    builder.marks_documents = document_column is not None
    document_of: dict[Any, int] = {}
    for begin in range(0, table.num_rows, _TABLE_ROWS):
        part = table.slice(begin, _TABLE_ROWS)
        documents: list[int] = [0] * part.num_rows
        if document_column is not None:
            values = _values(part, document_column, source)
            documents = number_documents(values, document_of, document_column, source)
        records = zip(
            documents,
            _values(part, text_column, source),
            _values(part, label_column, source),
            strict=True,
        )
        for number, (document, words, tags) in enumerate(records, begin + 1):
            _check_columns(words, tags, builder, number, text_column, label_column)
            tags = _named_tags(tags, builder, number)
            if digest is not None:
                read = [words, tags] if document_column is None else [words, tags, document]
                digest.update(json.dumps(read).encode())
            yield document, words, tags, [number] * len(words)


def _check_list_column(table: Any, column: str, source: str) -> None:
    import pyarrow.types as kinds

    names = table.column_names
    if column not in names:
        raise DataError(
            f"has no column {column!r} but {_listed(names)} "
            "(--text_column_name and --label_column_name name other columns)",
            source,
        )
    _check_once(table, column, source)
    kind = table.schema.field(column).type
    if not (kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)):
        raise DataError(
            f"column {column!r} must hold a list in each record, one element a word, not {kind}",
            source,
        )


def _check_once(table: Any, column: str, source: str) -> None:
    count = table.column_names.count(column)
    if count > 1:
        raise DataError(f"has {count} columns {column!r}; keep one", source)


def _values(table: Any, column: str, source: str) -> list[Any]:
    """The values of a column as Python objects."""
    try:
        values: list[Any] = table.column(column).to_pylist()
    except (ValueError, OverflowError) as error:  # strings that are not UTF-8, impossible dates
        raise DataError(f"column {column!r} holds what cannot be read: {error}", source) from None
    return values


def number_documents(
    values: Sequence[Any],
    document_of: dict[Any, int],
    column: str,
    source: str,
    line: int | None = None,
) -> list[int]:
    """The document of each record; `document_of` numbers them by what stands in their column.

    A record without a value is of none of the others' documents.
    """
    try:
        return [
            document_of.setdefault(object() if value is None else value, len(document_of))
            for value in values
        ]
    except TypeError:
        raise DataError(
            f"column {column!r} must hold one string or integer a record", source, line
        ) from None


def read_lines(path: str | Path) -> Iterator[str]:
    """Lines of a plain text file, one at a time, without their ends.

    Raises:
        DataError: The file is missing, or a line of it is not UTF-8.
        StorageError: The disk fails.
    """
    with _file_errors(Path(path)), Path(path).open("rb") as stream:
        yield from decode_lines(stream, path)


def read_text(path: str | Path) -> str:
    """All of a plain text file, ends of lines included; raises what `read_lines` does."""
    with _file_errors(Path(path)):
        content = Path(path).read_bytes()
    return decode(content, path)


def decode_lines(stream: Iterable[bytes], source: object, first_line: int = 1) -> Iterator[str]:
    """The same for lines of bytes, from wherever they come; `source` is named in errors."""
    for number, line in enumerate(stream, first_line):
        yield decode(line, source, number).rstrip("\r\n")
