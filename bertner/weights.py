"""Tensors by name in safetensors files, and model folders in the Hugging Face layout, in and out.

Reading never runs code from a file and never copies a tensor before its name and shape are checked.
All that bertner knows of other people's naming habits is in `canonical_name`.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor

from bertner.config import BertConfig
from bertner.errors import ModelError, visible
from bertner.files import (
    MAX_JSON_BYTES,
    UnsafeFileError,
    make_folder,
    open_regular,
    read_json,
    replace_file,
    write_json,
)

Shape = tuple[int, ...]

# What is written, and safetensors' names for it.
_DTYPES = {torch.float32: "F32", torch.int64: "I64"}

# All that the pickle of a state dict calls. `torch.load(weights_only=True)` runs no code either,
# but lets a file of some bytes ask for any amount of memory, and has tensors that lie nowhere.
_CALLS = {
    *["collections OrderedDict", "torch._utils _rebuild_parameter"],
    *["torch._utils _rebuild_tensor_v2", "torch DoubleStorage", "torch FloatStorage"],
    *["torch HalfStorage", "torch BFloat16Storage", "torch LongStorage", "torch IntStorage"],
    *["torch ShortStorage", "torch CharStorage", "torch ByteStorage", "torch BoolStorage"],
}
_MAX_TENSORS = 1 << 14  # of bert-large and its optimizer there are 1,564
_MAX_PICKLE_BYTES = 16 << 20
_MAX_PICKLE_STEPS = 1 << 18  # bert-large has 16,000
# How `torch.save` began before it wrote zip archives: a pickle of this number.
_OLD_BEGINNING = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, mapped from it: contents are read when used.

    Attributes:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        """Opens a file; the handle stays open as long as this object or a reader of its does.

        Raises:
            ModelError: It is damaged, or none.
        """
        self.path = path
        try:
            _check_header(path)
            file: Any = safe_open(path, framework="pt")
            names = file.keys()
            if len(names) > _MAX_TENSORS:
                raise UnsafeFileError(f"it has more than {_MAX_TENSORS:,} tensors")
            if odd := [name for name in names if visible(name) != name]:
                raise UnsafeFileError(f"it has a tensor of the name {odd[0]!r}")
            # All of them now: a type or shape that PyTorch does not have is found out here.
            self._tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
        except Exception as error:  # whatever a hostile or broken file provokes
            raise ModelError(f"not a readable safetensors file: {_reason(error)}", path) from None

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def close(self) -> None:
        """Lets the file go; until then the disk keeps it, even after it has been removed."""
        self._tensors = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _reason(error: Exception) -> str:
    """The first line of an error; PyTorch's go on with pages of its insides."""
    return str(error).strip().split("\n", 1)[0][:200]


def _check_header(path: Path) -> None:
    """Refuses a header that is out of all proportion before a parser sees it."""
    with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_JSON_BYTES:
        raise UnsafeFileError(f"the header has {size:,} bytes; at most {MAX_JSON_BYTES:,} are read")


def _check_pickle_file(path: Path) -> None:
    """Refuses a `.bin` file that would take more than it holds, before PyTorch sees it."""
    with open_regular(path) as descriptor, open(descriptor, "rb", closefd=False) as file:
        beginning = file.read(len(_OLD_BEGINNING))
        file.seek(0)
        if beginning == _OLD_BEGINNING:
            for _ in range(5):  # that number, a version, the machine, the tensors, their storages
                _check_pickle(file)
        elif beginning.startswith(b"PK\3\4"):
            _check_archive(file)
        else:
            raise UnsafeFileError("not what torch.save writes")


def _check_archive(file: IO[bytes]) -> None:
    size = os.fstat(file.fileno()).st_size
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UnsafeFileError("a compressed archive; torch.save does not compress")
        # A reader that passes over what stands in front of an archive finds other entries.
        if sum(entry.file_size for entry in entries) > size or entries[0].header_offset != 0:
            raise UnsafeFileError("an archive that says it holds more than it does")
        # PyTorch does not tell capitals from small letters here.
        for entry in entries:
            if entry.filename.lower().endswith(".pkl"):
                if entry.file_size > _MAX_PICKLE_BYTES:
                    raise UnsafeFileError(f"its pickle has {entry.file_size:,} bytes")
                _check_pickle(archive.read(entry))


def _check_pickle(file: IO[bytes] | bytes) -> None:
    """Reads a pickle without doing what it says. GLOBAL is all that PyTorch knows for names."""
    steps = islice(pickletools.genops(file), _MAX_PICKLE_STEPS)
    for number, (step, argument, _) in enumerate(steps, 1):
        if step.name == "GLOBAL" and argument not in _CALLS:
            raise UnsafeFileError(f"its pickle calls {argument}")
        if number == _MAX_PICKLE_STEPS:
            raise UnsafeFileError(f"its pickle has more than {number:,} steps")


def tensor_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yields a safetensors file piece by piece, without holding a second copy of it.

    The bytes are those of `safetensors.torch.save`, whose own function for files knows neither
    fsync nor how to say that a disk is full.

    Args:
        tensors: float32 and int64, on any device.
        metadata: Text to keep in the header.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if tensors[name].numel():  # memoryview has no cast for none
            array: Any = tensors[name].detach().cpu().contiguous().flatten().numpy()
            yield memoryview(array).cast("B")


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
    """The tensors of a model folder: names and shapes at once, contents when asked for."""

    def __init__(self, folder: Path) -> None:
        """Opens the weights in `folder`.

        Takes `model.safetensors`, sharded safetensors, `pytorch_model.bin` or sharded `.bin`, in
        this order.

        Raises:
            ModelError: There are none, or a file is damaged or unsafe.
        """
        self._tensors: dict[str, Tensor] = {}
        for path in _weight_files(folder):
            if path.suffix == ".safetensors":
                self._add_safetensors(path)
            else:
                self._add_pickle(path)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of each tensor by its canonical name."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor as float32, in memory of its own rather than mapped from the file."""
        return self._tensors[name].to(torch.float32, copy=True)

    def _add(self, path: Path, raw: str, tensor: Tensor) -> None:
        name = canonical_name(raw)
        if name is None:
            return
        if name in self._tensors:
            raise ModelError(f"holds {name} twice", path)
        if not tensor.is_floating_point():
            raise ModelError(f"{name} holds integers; quantised weights cannot be trained", path)
        self._tensors[name] = tensor

    def _add_safetensors(self, path: Path) -> None:
        for raw, tensor in TensorFile(path).items():
            self._add(path, raw, tensor)

    def _add_pickle(self, path: Path) -> None:
        try:
            _check_pickle_file(path)
            # weights_only builds tensors and plain containers and refuses everything else.
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a hostile or broken file provokes
            raise ModelError(
                "not loaded: not a plain file of tensors, or a pickle that would run code "
                f"({type(error).__name__}: {_reason(error)})",
                path,
            ) from None
        if not isinstance(content, dict):
            raise ModelError(f"holds a {type(content).__name__}, not tensors by name", path)
        for raw, tensor in content.items():
            if not isinstance(raw, str) or visible(raw) != raw or not isinstance(tensor, Tensor):
                raise ModelError(f"holds {raw!r}, which is no tensor", path)
            self._add(path, raw, tensor)
        # Views of one small storage can be of any size. What has no use may be: it is not copied.
        if sum(t.nbytes for n, t in content.items() if canonical_name(n)) > path.stat().st_size:
            raise ModelError("holds tensors that share their contents", path)


def _weight_files(folder: Path) -> list[Path]:
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        # What is there must be a file, but that is found out by who opens it.
        if os.path.lexists(folder / single):
            return [folder / single]
        if os.path.lexists(index):
            mapping = read_json(index).get("weight_map")
            if not isinstance(mapping, dict) or not mapping:
                raise ModelError("has no weight_map", index)
            names = sorted(set(map(str, mapping.values())))
            for name in names:
                if Path(name).name != name or Path(name).suffix != Path(single).suffix:
                    raise ModelError(f"names {name!r}, which is not a weight file beside it", index)
                if not os.path.lexists(folder / name):
                    raise ModelError(f"names {name!r}, which is missing", index)
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


def save_model(folder: Path, config: BertConfig, state: Mapping[str, Tensor]) -> None:
    """Writes `config.json` and `model.safetensors` as `transformers` would.

    Args:
        folder: Made if it is missing.
        config: The model's shape and labels.
        state: Tensors by name.

    Raises:
        StorageError: The disk fails.
    """
    make_folder(folder)
    replace_file(folder / "model.safetensors", tensor_chunks(state, {"format": "pt"}))
    write_json(folder / "config.json", config.to_dict())
