"""`bertner-predict`: tags text from files or standard input as it comes."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NoReturn

import torch

from bertner import kernels
from bertner.calibration import Calibration
from bertner.errors import UsageError
from bertner.files import check_target, replace_file
from bertner.hub import find_model
from bertner.model import BertForNER
from bertner.parts import find_device, reading_of
from bertner.predict import Tagger, Text, find_calibration, gather
from bertner.readers import check_file
from bertner.report import progress_bar
from bertner.tag_output import Writer
from bertner.text_input import STANDARD_INPUT, Item, read_items
from bertner.tokenizer import Tokenizer

logger = logging.getLogger("bertner")


def run_prediction(options: argparse.Namespace) -> None:
    """`bertner-predict`: entities of texts, in order.

    Raises:
        BertnerError: See the exit codes in `errors`.
    """
    files = options.files or [STANDARD_INPUT]
    for file in files:  # before seconds of loading
        if file != STANDARD_INPUT:
            check_file(file)
    output_file = None if options.output_file is None else Path(options.output_file)
    if output_file is not None:
        read = [("what is read", Path(file)) for file in files]
        check_target(output_file, "output_file", read)
    device = find_device(options.device)
    products = kernels.choose_products(options.matmul, device, options.dtype)
    if options.matmul != "auto":
        logger.info("matrix products: %s", products)
    tagger = _load_tagger(options, device)
    documents = "none"
    if tagger.reading.context != "none":
        documents = "marked" if options.context is None else "needed"
    writer = Writer(
        options.output_format,
        tagger.label_set.types,
        title="Entities in " + ", ".join("standard input" if f == "-" else f for f in files),
        colour=output_file is None and sys.stdout.isatty() and "NO_COLOR" not in os.environ,
    )
    # On one terminal with the output, it would be in the way.
    show = sys.stderr.isatty() and (output_file is not None or not sys.stdout.isatty())
    with progress_bar(None, " words", "tag", show) as bar:

        def items() -> Iterator[Item | None]:
            for path in files:
                yield from read_items(
                    path,
                    options.input_format,
                    text_column=options.text_column_name,
                    document_column=options.document_column_name,
                    documents=documents,
                )

        with closing(_pieces(tagger, items(), writer, bar.update)) as pieces:
            if output_file is not None:
                encoded = (piece.encode("utf-8", "backslashreplace") for piece in pieces)
                with _ended_by_exception():
                    replace_file(output_file, encoded)
            else:
                _print(pieces)


def _load_tagger(options: argparse.Namespace, device: torch.device) -> Tagger:
    """The model, reading and choosing entities as the flags say."""
    source = find_model(options.model)
    model = BertForNER.from_pretrained(source.folder).to(device)
    reading = reading_of(options, model.config)
    calibration = find_calibration(source.folder, model, reading)
    return Tagger(
        model,
        Tokenizer.from_pretrained(source.folder, model.config),
        options.batch_tokens,
        dtype=options.dtype,
        matmul=options.matmul,
        reading=reading,
        calibration=calibration,
        labels=options.labels,
        threshold=_thresholds(options, model.label_set.types, calibration),
    )


def _thresholds(
    options: argparse.Namespace, types: Sequence[str], calibration: Calibration | None
) -> dict[str, float]:
    """The threshold of each type that is looked for.

    What is said of a type goes before what is said of all, whatever the flag.
    """
    wanted: dict[str, tuple[str, float]] = {}  # by type; "" is for those that are not named
    for flag in ("threshold", "precision", "recall"):
        for name, value in getattr(options, flag):
            other, _ = wanted.get(name, (flag, value))
            if other != flag:
                raise UsageError(f"{name or 'all types'}: give {other} or {flag}, not both")
            wanted[name] = flag, value
    of_others = wanted.pop("", ("threshold", 0.0))
    wanted = {**dict.fromkeys(options.labels or types, of_others), **wanted}
    thresholds = {}
    for kind, (flag, value) in wanted.items():
        thresholds[kind] = value
        if flag == "threshold":
            continue
        if calibration is None:
            raise UsageError(
                f"{flag} needs a calibration in the model's folder; make one with "
                "bertner-eval --calibrate --file ANNOTATED"
            )
        point = calibration.threshold_for(kind, **{flag: value})
        thresholds[kind] = point.threshold
        logger.info(
            "%s: threshold %.3f, precision %.3f and recall %.3f on %s",
            kind,
            point.threshold,
            point.score.precision,
            point.score.recall,
            calibration.source,
        )
    return thresholds


def _pieces(
    tagger: Tagger,
    items: Iterator[Item | None],
    writer: Writer,
    on_words: Callable[[int], object],
) -> Generator[str, None, None]:
    """The output, a text at a time; an empty piece where the next may take its time."""
    waiting: list[Item] = []

    def texts() -> Iterator[Text | None]:
        for item in items:
            if item is not None:
                waiting.append(item)
            yield None if item is None else item.text

    yield writer.head()
    for part in gather(texts()):
        tagged, waiting[:] = waiting[: len(part)], waiting[len(part) :]
        for item, entities in zip(tagged, tagger.tag(part), strict=True):
            yield writer.item(item, entities)
            on_words(len(item.text.words))
        yield ""
    yield writer.foot()


def _print(pieces: Iterator[str]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # JSON is, whatever the locale; and names of files need not be text.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    for piece in pieces:
        sys.stdout.write(piece)
        if not piece:
            sys.stdout.flush()


@contextmanager
def _ended_by_exception() -> Iterator[None]:
    """While it is open, SIGTERM ends the process by way of an exception, which cleans up."""

    def leave(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
