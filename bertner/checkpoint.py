"""Model files in the Hugging Face layout, in and out, and the checkpoint folders of a run.

Reading never runs code from a file and never copies a tensor before its name and shape are checked.
All that bertner knows of other people's naming habits is in `canonical_name`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bertner.config import BertConfig
from bertner.errors import ModelError, StorageError

Shape = tuple[int, ...]

_FLOATING = ("F64", "F32", "F16", "BF16")  # safetensors' names


def canonical_name(name: str) -> str | None:
    """The name that `transformers` gives today to a tensor of a BERT checkpoint.

    Handles names from before `LayerNorm.weight` (`gamma`, `beta`) and checkpoints of the bare
    encoder (no `bert.` prefix). None for what a token classifier has no use for: the pretraining
    heads (`cls.*`), the pooler, and the position ids that old releases saved.
    """
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = "bert." + name
    if name.startswith(("cls.", "bert.pooler.")) or name.endswith(".position_ids"):
        return None
    return name


class Weights:
    """The tensors of a model folder: names and shapes at once, contents when asked for.

    Attributes:
        shapes: Shape of each tensor by its canonical name.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the weights in `folder`.

        Takes `model.safetensors`, sharded safetensors, `pytorch_model.bin` or sharded `.bin`, in
        this order.

        Raises:
            ModelError: There are none, or a file is damaged or unsafe.
        """
        self.shapes: dict[str, Shape] = {}
        self._read: dict[str, Callable[[], Tensor]] = {}
        for path in _weight_files(folder):
            if path.suffix == ".safetensors":
                self._add_safetensors(path)
            else:
                self._add_pickle(path)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as float32, in memory of its own rather than mapped from the file."""
        return self._read[name]().to(torch.float32, copy=True)

    def _add(
        self, path: Path, raw: str, shape: Shape, is_floating: bool, read: Callable[[], Tensor]
    ) -> None:
        name = canonical_name(raw)
        if name is None:
            return
        if name in self.shapes:
            raise ModelError(f"holds {name} twice", path)
        if not is_floating:
            raise ModelError(f"{name} holds integers; quantised weights cannot be trained", path)
        self.shapes[name] = shape
        self._read[name] = read

    def _add_safetensors(self, path: Path) -> None:
        try:
            # The handle stays open as long as a reader of one of its tensors does.
            file: Any = safe_open(path, framework="pt")
            for raw in file.keys():  # noqa: SIM118 - not a mapping
                part = file.get_slice(raw)
                is_floating = part.get_dtype() in _FLOATING
                read = lambda raw=raw: file.get_tensor(raw)  # noqa: E731
                self._add(path, raw, tuple(part.get_shape()), is_floating, read)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"not a readable safetensors file: {error}", path) from None

    def _add_pickle(self, path: Path) -> None:
        try:
            # weights_only builds tensors and plain containers and refuses everything else.
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a hostile or broken file provokes
            reason = str(error).strip().split("\n", 1)[0]
            raise ModelError(
                "not loaded: not a plain file of tensors, or a pickle that would run code "
                f"({type(error).__name__}: {reason[:200]})",
                path,
            ) from None
        if not isinstance(content, dict):
            raise ModelError(f"holds a {type(content).__name__}, not tensors by name", path)
        for raw, tensor in content.items():
            if not isinstance(raw, str) or not isinstance(tensor, Tensor):
                raise ModelError(f"holds {raw!r}, which is no tensor", path)
            read = lambda tensor=tensor: tensor  # noqa: E731
            self._add(path, raw, tuple(tensor.shape), tensor.is_floating_point(), read)


def _weight_files(folder: Path) -> list[Path]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            mapping = read_json(index).get("weight_map")
            if not isinstance(mapping, dict) or not mapping:
                raise ModelError("has no weight_map", index)
            names = sorted(set(map(str, mapping.values())))
            for name in names:
                if Path(name).name != name or Path(name).suffix != Path(single).suffix:
                    raise ModelError(f"names {name!r}, which is not a weight file beside it", index)
                if not (folder / name).is_file():
                    raise ModelError(f"names {name}, which is missing", index)
            return [folder / name for name in names]
    raise ModelError(
        "no weights: needs model.safetensors or pytorch_model.bin, whole or sharded", folder
    )


def check_weights(
    found: Mapping[str, Shape], wanted: Mapping[str, Shape], folder: Path
) -> tuple[list[str], list[str]]:
    """Compares the tensors of a folder with those of a model, before any is copied.

    Args:
        found: Shapes by canonical name, in the folder.
        wanted: Shapes by name, in the model.
        folder: Named in errors.

    Returns:
        Names of the head's tensors that the folder does not have in this shape, and names in the
        folder that are another model's head.

    Raises:
        ModelError: The encoder differs; every name that is missing, unexpected or of another shape
            is in the message.
    """
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    other_shape = [name for name in wanted if name in found and found[name] != wanted[name]]
    problems = []
    if bad := [name for name in missing if name.startswith("bert.")]:
        problems.append(f"{len(bad)} missing: {', '.join(bad)}")
    if bad := [name for name in unexpected if name.startswith("bert.")]:
        problems.append(f"{len(bad)} unexpected: {', '.join(bad)}")
    if bad := [name for name in other_shape if name.startswith("bert.")]:
        shapes = [f"{name} {list(found[name])} instead of {list(wanted[name])}" for name in bad]
        problems.append(f"{len(bad)} of another shape than config.json says: {', '.join(shapes)}")
    if problems:
        others = [name for name in unexpected if not name.startswith("bert.")]
        if others and len(others) == len(unexpected):
            problems.append(f"the file holds instead: {', '.join(others)}")
        raise ModelError(
            f"the weights are not those of this BERT encoder; {'; '.join(problems)}", folder
        )
    head = [name for name in wanted if not name.startswith("bert.")]
    new = [name for name in head if name in missing or name in other_shape]
    return new, unexpected


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ModelError: The file is missing or is not one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"has no {path.name}", path.parent) from None
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", path) from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"not JSON: {error}", path) from None
    if not isinstance(content, dict):
        raise ModelError("must hold one JSON object", path)
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes JSON that people can read and compare; the file appears whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file; it appears whole or not at all."""
    with _replacing(path) as temporary:
        # File names need not be text: what is none comes out as an escape, which JSON has too.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_model(folder: Path, config: BertConfig, state: Mapping[str, Tensor]) -> None:
    """Writes `config.json` and `model.safetensors` as `transformers` would.

    Args:
        folder: Made if it is missing.
        config: The model's shape and labels.
        state: Tensors by name; moved to the CPU.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be made: {error.strerror}") from None
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    path = folder / "model.safetensors"
    with _replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read; follow the user's umask instead.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
    write_json(folder / "config.json", config.to_dict())


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STAGING = ".staging-"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run as (step, folder), oldest first."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        match = _CHECKPOINT.fullmatch(folder.name)
        if match and folder.is_dir() and not folder.is_symlink():
            found.append((int(match[1]), folder))
    return sorted(found)


def save_checkpoint(
    output_dir: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep: int | None = None,
    best_step: int | None = None,
) -> Path:
    """Makes `checkpoint-<step>`: written aside, then renamed, so that it is whole or not there.

    Args:
        output_dir: The run's folder.
        step: Optimizer steps done.
        write: Fills the folder that it is given.
        keep: How many of the newest checkpoints stay; None for all.
        best_step: A checkpoint that stays in any case.
    """
    final = output_dir / f"checkpoint-{step}"
    staging = output_dir / f"{STAGING}{final.name}"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write(staging)
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
        if keep is not None:
            for old_step, folder in list_checkpoints(output_dir)[:-keep]:
                if old_step != best_step:
                    shutil.rmtree(folder)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{final}: cannot be written: {error}") from error
    return final
