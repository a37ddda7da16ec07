"""Files: written so that they last, read so that they cannot harm.

Every operation on the disk that a save depends on is in here and goes through `os`, so that a test
can put another `os` in its place that records what is done, or fails anywhere.

A file is written aside, brought to the disk (fsync) and only then renamed: under its own name it is
whole, whatever happens. A rename lasts once the folder that holds the name is brought to the disk.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import repr as short  # what a message shows of a name from a file
from typing import Any

from bertner.errors import ModelError, StorageError, UsageError

# The most that is read of a JSON file, unless more is said to be.
MAX_JSON_BYTES = 4 << 20
# Parsed, a value can take a hundred bytes and more. The largest vocabulary has half as many.
_MAX_JSON_VALUES = 1 << 20
# What we write has six levels. Whoever walks over a thousand runs out of stack.
_MAX_JSON_DEPTH = 32

_WRITE_BYTES = 1 << 26  # in one call; Linux takes no more than 2 GiB


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Makes a file that is not there yet, and brings it to the disk; its name may still get lost.

    Raises:
        OSError: It is there, or the disk fails; what was written so far is left.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk).cast("B")
            while rest:
                # What is written may be less than what is given.
                rest = rest[os.write(descriptor, rest[:_WRITE_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file; it appears whole or not at all, and then lasts.

    Raises:
        StorageError: The disk fails; the file is as it was before, or whole as it is to be.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            remove(temporary)  # of a process that had the same number
            write_file(temporary, chunks)
            os.rename(temporary, path)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what is to be told
                remove(temporary)
            raise
        sync_folder(path.parent)
    except StorageError:  # of what the chunks come from
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_target(path: Path, flag: str, kept: Iterable[tuple[str, Path]] = ()) -> None:
    """Asks, before minutes of work, whether a flag names what `replace_file` may put a file at.

    Args:
        path: The file to be.
        flag: That names it.
        kept: Files that it must not be, each with what it is.

    Raises:
        UsageError: It is one of them, or something else than a file, such as a pipe.
        StorageError: There is no such folder.
    """
    if path.exists() and not path.is_file():
        raise UsageError(f"{flag} {path} is no regular file, and would be replaced; name another")
    if not path.parent.is_dir():
        raise StorageError(f"{path}: cannot be written: no such folder; make it, or name another")
    for name, other in kept:
        if _is_same_file(path, other):
            raise UsageError(f"{flag} {path} would replace {name}; name another file")


def _is_same_file(path: Path, other: Path) -> bool:
    """Whether two paths are of one file, or would be."""
    try:
        return path.samefile(other)
    except OSError:  # one of them is not there
        return path.absolute() == other.absolute()


def write_text(path: Path, text: str) -> None:
    """Writes a text file; see `replace_file`."""
    # File names need not be text: what is none comes out as an escape, which JSON has too.
    replace_file(path, [text.encode("utf-8", "backslashreplace")])


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that people can read and compare; see `replace_file`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where they are missing; their names then last.

    Raises:
        StorageError: The disk fails.
    """
    try:
        missing = [each for each in (folder, *folder.parents) if not each.is_dir()]
        for each in reversed(missing):
            try:
                os.mkdir(each, 0o777)
            except FileExistsError:
                if not each.is_dir():  # or else another process was faster
                    raise
            with suppress(PermissionError):  # one may make names in a folder that one may not read
                sync_folder(each.parent)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}") from None


def make_new_folder(folder: Path) -> None:
    """Makes a folder that is not there yet."""
    os.mkdir(folder, 0o777)


def move(source: Path, target: Path) -> None:
    """Renames within one folder, and brings that to the disk."""
    os.rename(source, target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the file system knows how."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file, a link, or a folder with all that is in it; links are not followed."""
    try:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            for name in sorted(os.listdir(path)):
                remove(path / name)
            os.rmdir(path)
        else:
            os.unlink(path)
    except FileNotFoundError:
        pass


def free_bytes(folder: Path) -> int:
    """How much more the file system of a folder takes from this user."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


class UnsafeFileError(ValueError):
    """A file is not what one reads: a link, a pipe, too large."""


@contextmanager
def open_regular(path: Path, *, max_bytes: int | None = None, links: bool = True) -> Iterator[int]:
    """Opens a file to read, and nothing that only has the name of one.

    Args:
        path: The file.
        max_bytes: The largest that is opened.
        links: Follow a link, as the Hub's cache is made of.

    Yields:
        Its descriptor.

    Raises:
        UnsafeFileError: A pipe, device, folder, or forbidden link; or it is too large.
        OSError: There is none, or the disk fails.
    """
    # A pipe would keep us waiting for someone who writes to it.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeFileError("is a link") from None
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeFileError("is not a regular file")
        if max_bytes is not None and status.st_size > max_bytes:
            raise UnsafeFileError(f"has {status.st_size:,} bytes; at most {max_bytes:,} are read")
        yield descriptor
    finally:
        os.close(descriptor)


def read_bytes(path: Path, max_bytes: int, *, links: bool = True) -> bytes:
    """Reads a whole file; see `open_regular`."""
    with (
        open_regular(path, max_bytes=max_bytes, links=links) as descriptor,
        open(descriptor, "rb", closefd=False) as file,
    ):
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnsafeFileError(f"has more than the {max_bytes:,} bytes that are read at most")
    return content


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object from bytes.

    Raises:
        ValueError: They are none, or one that would take too much memory or stack.
    """
    # Every value but the first of each object or list comes after a comma.
    if sum(map(content.count, (b",", b"[", b"{"))) > _MAX_JSON_VALUES:
        raise ValueError(f"holds more than {_MAX_JSON_VALUES:,} values")
    try:
        values = json.loads(content.decode("utf-8"), object_pairs_hook=json_object)
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError("must hold one JSON object")
    if not _is_flat(values, _MAX_JSON_DEPTH):
        raise ValueError(f"nested more than {_MAX_JSON_DEPTH} levels deep")
    return values


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that it has twice, one value would be lost in silence.

    Raises:
        ValueError: It has one.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {short(twice)} twice in one object")
    return values


def _is_flat(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(levels > 1 and _is_flat(v, levels - 1) for v in inner if isinstance(v, dict | list))


def read_json(path: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads a JSON object of a model's folder.

    Raises:
        ModelError: The file is missing, too large, or is none.
    """
    try:
        return parse_json(read_bytes(path, max_bytes))
    except FileNotFoundError:
        raise ModelError(f"has no {path.name}", path.parent) from None
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", path) from None
    except ValueError as error:
        raise ModelError(str(error), path) from None
