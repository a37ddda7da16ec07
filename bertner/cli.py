"""The commands: parse, build, call.

PyTorch takes a second to import, so nothing here imports it before the arguments are understood.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bertner import __version__
from bertner.config import EVAL_TOKENS, RECIPES, TrainConfig, read_settings
from bertner.errors import BertnerError, StorageError, UsageError, visible

SAMPLE = Path(__file__).parent / "sample"

EXIT_INTERRUPTED = 130  # what shells report for Ctrl-C

_MAX_MESSAGE = 1 << 15  # characters; all names of a large model's weights have fewer


class _Parser(argparse.ArgumentParser):
    """argparse with errors of one line; `-` and `_` in flags are the same."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args([_underscored(arg) for arg in args], namespace)


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _boolean(text: str) -> bool:
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"must be true or false, not {text!r}")


def _train_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="bertner-train",
        description="Fine-tunes BERT for named entity recognition. Without arguments: "
        "bert-base-cased on CoNLL-2003, as in the published card.",
        epilog="A flag wins over --config, which wins over --recipe. In flags, - and _ are the "
        "same. Exit codes: 0 done, 2 usage, 65 bad data or model, 70 loss not finite, "
        "73 output directory in use or holds another run, 74 disk or network, 75 stopped by a "
        "signal, with a verified checkpoint to carry on from, 76 no checkpoint can be loaded, "
        "78 the run to carry on is not the same. The same command again carries an interrupted "
        "run on.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"bertner {__version__}")
    parser.add_argument("--recipe", choices=sorted(RECIPES), help="named settings (default: card)")
    parser.add_argument(
        "--quickstart",
        action="store_true",
        help="the quickstart recipe on the sample corpus in this package; needs no network; with "
        "--recipe another one, with the same model",
    )
    parser.add_argument("--config", metavar="FILE", help="settings from a JSON or TOML file")
    parser.add_argument(
        "--verify",
        metavar="DIR",
        help="train nothing: check every checkpoint of the run in DIR, and do steps between two of "
        "them again to compare; settings are those of the run",
    )
    parser.add_argument(
        "--check_data",
        nargs="?",
        const="text",
        choices=["text", "json"],
        help="train nothing: look for what is wrong or odd in the data that the other flags name, "
        "and print it, as text or as JSON",
    )
    for item in dataclasses.fields(TrainConfig):
        names = [f"--{name}" for name in (item.name, *item.metadata["aliases"])]
        kind = str(item.type).split(" ")[0]
        default = "" if item.default is None else f" (default: {item.default})"
        options: dict[str, Any] = {"dest": item.name, "help": item.metadata["help"] + default}
        if kind == "bool":
            parser.add_argument(*names, nargs="?", const=True, type=_boolean, **options)
            parser.add_argument(
                f"--no_{item.name}",
                dest=item.name,
                action="store_const",
                const=False,
                help=argparse.SUPPRESS,
            )
        else:
            types = {"str": str, "int": int, "float": float}
            choices = item.metadata["choices"] or None
            parser.add_argument(*names, type=types[kind], choices=choices, **options)
    return parser


# Settings that say the same as others in another way, which would win over them: given later than
# the other, as over a recipe, each is in its place.
_REPLACES = {
    "per_device_train_batch_size": "train_batch_tokens",
    "warmup_steps": "warmup_ratio",
    "warmup_ratio": "warmup_steps",
}


def parse_train_config(arguments: Sequence[str] | None = None) -> tuple[TrainConfig, str]:
    """Reads the command line of `bertner-train`.

    Returns:
        The configuration and the name of the recipe that it starts from.

    Raises:
        UsageError: A value that makes no sense.
    """
    given = vars(_train_parser().parse_args(arguments))
    given.pop("check_data", None)
    quickstart = given.pop("quickstart", False)
    recipe = given.pop("recipe", "quickstart" if quickstart else "card")
    config_file = given.pop("config", None)
    settings = dict(RECIPES[recipe])
    if quickstart:  # another recipe with it is tried on the same model
        for name in ("model_name_or_path", "output_dir"):
            settings.setdefault(name, RECIPES["quickstart"][name])
    for later in ({} if config_file is None else read_settings(config_file), given):
        for name, other in _REPLACES.items():
            if name in later and other not in later:
                settings.pop(other, None)
        settings.update(later)
    # The sample corpus is for those who name no data, and is never mixed with theirs.
    files = {f"{split}_file": SAMPLE / f"{split}.txt" for split in ("train", "validation", "test")}
    if quickstart and not any(settings.get(name) for name in (*files, "dataset_name")):
        settings.update({name: str(path) for name, path in files.items()})
    return TrainConfig.from_dict(settings), recipe


def train_main(arguments: Sequence[str] | None = None) -> int:
    """`bertner-train`."""

    def command() -> None:
        given = vars(_train_parser().parse_args(arguments))
        if "verify" in given:
            if len(given) > 1:
                raise UsageError("verify takes all settings from the run: give --verify DIR alone")
            from bertner.verify import run_verification

            run_verification(given["verify"])
            return
        config, recipe = parse_train_config(arguments)
        if "check_data" in given:
            from bertner.run import run_data_check

            run_data_check(config, given["check_data"])
            return
        from bertner.run import run_training
        from bertner.seeds import run_seeds

        run = run_training if config.seeds == 1 else run_seeds
        run(config, recipe, sys.argv[1:] if arguments is None else arguments)

    return _guarded("bertner-train", command)


def eval_main(arguments: Sequence[str] | None = None) -> int:
    """`bertner-eval`."""

    def command() -> None:
        parser = _Parser(
            prog="bertner-eval",
            description="Scores a model, or a file of predictions, on annotated data: entities at "
            "word and at subword level, with intervals; errors by kind; two models against each "
            "other.",
            allow_abbrev=False,
        )
        parser.add_argument("--model", "--model_name_or_path", help="folder, Hub id, or package:")
        parser.add_argument(
            "--predictions",
            metavar="FILE",
            help="in place of a model: the same words with the tags that were predicted; without "
            "--file, columns with the gold tag last but one and the predicted tag last",
        )
        parser.add_argument("--file", help="annotated: CoNLL columns, JSON lines or parquet")
        parser.add_argument(
            "--compare",
            metavar="OTHER",
            help="a second model, or file of predictions: is the difference more than chance?",
        )
        parser.add_argument(
            "--train_file",
            metavar="FILE",
            help="tell entities apart that were seen in training (default: the file that the "
            "model's run.json names, if it is there)",
        )
        parser.add_argument(
            "--bootstrap_samples",
            type=_at_least(100),
            default=2000,
            help="samples of intervals and tests (default: 2000)",
        )
        parser.add_argument(
            "--bootstrap_unit",
            choices=["auto", "document", "sentence"],
            default="auto",
            help="what is drawn: documents if 30 or more are marked, else sentences",
        )
        parser.add_argument(
            "--seed", type=_at_least(0), default=42, help="of the samples (default: 42)"
        )
        parser.add_argument(
            "--scheme",
            choices=["BIOES", "IOB2", "IOB1"],
            help="tag scheme of the model's labels (default: what their names say)",
        )
        parser.add_argument(
            "--batch_size",
            type=_at_least(1),
            default=8,
            help="rows over which the Trainer's eval_loss averages (default: 8)",
        )
        _add_fields(parser, [*_DECIDING, *_CONTEXT], "as trained")
        _add_machine_flags(parser)
        parser.add_argument("--label_names", help="names of integer tags: O,B-PER,I-PER")
        parser.add_argument("--text_column_name", default="tokens")
        parser.add_argument("--label_column_name", default="ner_tags")
        parser.add_argument("--document_column_name")
        parser.add_argument("--output_file", metavar="FILE", help="write all of it as JSON too")
        parser.add_argument(
            "--conlleval",
            metavar="FILE",
            help="write word, gold tag and predicted tag in columns, as conlleval reads them",
        )
        parser.add_argument(
            "--report", metavar="FILE", help="write a report as one HTML page, with all errors"
        )
        parser.add_argument(
            "--calibrate",
            action="store_true",
            help="fit the confidence of entities to these data, and keep it in the model's folder",
        )
        options = parser.parse_args(arguments)
        from bertner.assess import run_evaluation

        run_evaluation(options)

    return _guarded("bertner-eval", command)


def predict_main(arguments: Sequence[str] | None = None) -> int:
    """`bertner-predict`."""
    can_print = sys.stdout is not None

    def command() -> None:
        parser = _Parser(
            prog="bertner-predict",
            description="Finds entities in text, one document a line, and writes one JSON object "
            'a line: {"text": ..., "entities": [{"start", "end", "label", "text", "score"}]}. '
            "Other forms of text are read and written too.",
            allow_abbrev=False,
        )
        parser.add_argument("--model", "--model_name_or_path", required=True)
        parser.add_argument(
            "files", nargs="*", metavar="FILE", help="default, and -: standard input"
        )
        parser.add_argument(
            "--input_format",
            choices=["auto", "lines", "document", "jsonl", "conll"],
            default="auto",
            help="a text a line; a text a file; JSON lines with text or tokens; CoNLL columns, the "
            "word first; or by the file's ending: .json, .jsonl, .conll, else lines, unless a file "
            "begins as columns do (default)",
        )
        parser.add_argument(
            "--output_format",
            choices=["jsonl", "conll", "text", "html"],
            default="jsonl",
            help="JSON lines (default); columns with the tag last; text with entities in brackets, "
            "coloured on a terminal; an HTML page",
        )
        parser.add_argument(
            "--output_file", metavar="FILE", help="write there once all is done (default: print)"
        )
        parser.add_argument("--text_column_name", default="tokens", help="key of words in JSON")
        parser.add_argument(
            "--document_column_name",
            help="with context, key of what tells documents apart in JSON (default: document_id or "
            "doc_id, if there is one)",
        )
        parser.add_argument(
            "--labels", type=_names, help="entity types to find, such as PER,LOC (default: all)"
        )
        parser.add_argument(
            "--threshold",
            type=_bound,
            action="append",
            default=[],
            metavar="[TYPE=]SCORE",
            help="leave entities out whose score is lower; several times for several types",
        )
        for name, meaning in (
            ("precision", "so large a share of what is found is right"),
            ("recall", "so large a share of what there is to find is found"),
        ):
            parser.add_argument(
                f"--{name}",
                type=_bound,
                action="append",
                default=[],
                metavar="[TYPE=]SHARE",
                help=f"find the threshold at which {meaning}, by the model's calibration",
            )
        _add_fields(parser, [*_DECIDING, *_CONTEXT], "as trained")
        _add_machine_flags(parser)
        options = parser.parse_args(arguments)
        if options.output_file is None and not can_print:
            raise UsageError("there is no standard output; name --output_file")
        from bertner.tagging import run_prediction

        run_prediction(options)

    return _guarded("bertner-predict", command)


# What a trained model may also be told of how it reads and decides.
_DECIDING = ["max_seq_length", "window_overlap", "word_decision", "decoding"]
_CONTEXT = ["context", "context_unit", "context_tokens"]


def _add_fields(
    parser: argparse.ArgumentParser, names: Sequence[str], default: str | None = None
) -> None:
    """Flags of `TrainConfig` that other commands have too.

    Args:
        parser: Gets the flags.
        names: Of the fields.
        default: What is said to hold where a flag is not given, and then is None; None for the
            field's own default.
    """
    fields = {item.name: item for item in dataclasses.fields(TrainConfig)}
    for name in names:
        item = fields[name]
        kind = int if str(item.type).startswith("int") else str
        shown = item.metadata["help"].split(" (default")[0]
        parser.add_argument(
            f"--{name}",
            type=kind,
            default=item.default if default is None else None,
            choices=item.metadata["choices"] or None,
            help=f"{shown} (default: {default or item.default})",
        )


def _add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """How a trained model is computed."""
    _add_fields(parser, ["device", "dtype", "matmul"])
    parser.add_argument(
        "--batch_tokens",
        type=_at_least(1),
        default=EVAL_TOKENS,
        help=f"tokens that are computed at a time (default: {EVAL_TOKENS})",
    )


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch's class for it is that of CUDA; the CPU's allocator raises a bare RuntimeError."""
    name = type(error).__name__
    return name in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in str(error)


def _bound(text: str) -> tuple[str, float]:
    """`0.9` or `PER=0.9` as (type, number); the type is "" for all."""
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(
            f"must be a number from 0 to 1, or TYPE=number, not {text}"
        )
    return name, value


def _names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError("names no type")
    return names


def _at_least(minimum: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {text}")
        return value

    return integer


def _message(text: object) -> str:
    """What goes to the terminal of a message that may quote any file: two lines, all visible."""
    lines = str(text)[:_MAX_MESSAGE].split("\n", 1)
    return "\n".join(map(visible, lines))[:_MAX_MESSAGE]


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _message(super().format(record))


def _guarded(program: str, command: Callable[[], None]) -> int:
    """Runs a command; what a user can cause ends in a line on stderr and an exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before we began
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
    logger = logging.getLogger("bertner")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(f"{program}: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        command()
        sys.stdout.flush()
    except BertnerError as error:
        if not error.is_told_elsewhere:
            print(_message(f"{program}: {error}"), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does: not an error, and nothing to say. What
        # is still buffered goes to nowhere, or Python would complain of it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(_message(f"{program}: {error}"), file=sys.stderr)
        return StorageError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"{program}: out of memory; use smaller batches (--per_device_train_batch_size and "
            "--eval_batch_tokens of bertner-train, --batch_tokens of the others) or a shorter "
            "--max_seq_length",
            file=sys.stderr,
        )
        return UsageError.exit_code
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        logger.removeHandler(handler)
    return 0


if __name__ == "__main__":  # for `torchrun -m bertner.cli`
    sys.exit(train_main())
