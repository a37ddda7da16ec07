"""The errors that a user can cause, each with the exit code that the commands end with.

Every message is one or two lines: it names the file and the line where it can, and the fix.
"""

from __future__ import annotations

import re

# Characters that steer a terminal or turn the order of what is shown round, and halves of pairs,
# which are none.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Text as it may go to a terminal, whoever wrote it: on one line, what steers it spelt out."""
    return _UNSEEN.sub(lambda match: ascii(match[0])[1:-1], text)


class BertnerError(Exception):
    """Base of all errors that a command reports without a traceback.

    Attributes:
        exit_code: What the process ends with (see docs/exit-codes.md).
        is_told_elsewhere: Whether another process of the same run tells of it.
    """

    exit_code = 1
    is_told_elsewhere = False


class UsageError(BertnerError, ValueError):
    """A flag or setting has a value that makes no sense, alone or beside another one."""

    exit_code = 2


class DataError(BertnerError, ValueError):
    """A data file, or a value in it, cannot be used.

    Args:
        message: What is wrong, and the fix.
        path: The file, dataset or folder.
        line: Line (text files) or record (parquet, Hub datasets), counted from 1.
    """

    exit_code = 65

    def __init__(self, message: str, path: object = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + message)
        self.path = path
        self.line = line


class ModelError(DataError):
    """A model or tokenizer folder cannot be loaded, or is unsafe to load."""


class NotFiniteError(BertnerError, ArithmeticError):
    """The loss or the norm of the gradient became infinite or not a number."""

    exit_code = 70


class OutputDirectoryError(BertnerError):
    """The output directory is in use, or holds another run."""

    exit_code = 73


class StorageError(BertnerError, OSError):
    """A disk or the network failed: nothing is wrong with what the user wrote."""

    exit_code = 74


class PeerError(BertnerError):
    """Another process of the same run is gone, or cannot be reached."""

    exit_code = 74


class RunStoppedError(BertnerError):
    """A signal has stopped the run; a verified checkpoint is there to carry on from."""

    exit_code = 75


class CheckpointError(BertnerError):
    """A checkpoint cannot be loaded: it is damaged, unsafe, or not there."""

    exit_code = 76


class ResumeMismatchError(BertnerError):
    """Carrying on would not be the same run: something that it depends on has changed."""

    exit_code = 78
