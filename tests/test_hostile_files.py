"""Files that mean harm: every loader and command refuses them soon, in a line, and runs no code.

Each case is a function that spoils a good folder. A process of its own takes all cases through all
that reads them, while a hook of the interpreter watches what is done; the tests look at its report.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bertner import checkpoint
from bertner.cli import eval_main, predict_main, train_main
from bertner.config import BertConfig
from bertner.errors import BertnerError
from bertner.model import BertForNER
from bertner.parts import _load_tokenizer
from bertner.predict import Tagger
from bertner.tokenizer import Tokenizer
from tests.conftest import REPOSITORY, write_conll, write_model_folder

Build = Callable[[Path], object]

MAX_SECONDS = 2.0  # of the processor; who waits for ever runs into the timeout below
MAX_MEGABYTES = 300  # what one case may add to the process
REFUSALS = {65, 73, 76, 78}

# By kind of case: what reads the spoiled file, and so has to refuse it.
MODEL = "BertForNER Tagger eval_main predict_main train_main"
READERS = {
    "config": f"{MODEL} Tokenizer",
    "weights": MODEL,
    "tokenizer": "Tokenizer Tagger eval_main predict_main train_main",
    "labels": "Tagger eval_main predict_main",
    "unread": "",
    "checkpoint": "verify_checkpoint load_checkpoint load_newest again resume --verify",
    "state": "again resume",
    "record": "again",
    "settings": "--verify",
    "unread of a run": "",
}
OF_A_MODEL = ("config", "weights", "tokenizer", "labels", "unread")


# What spoils a folder --------------------------------------------------------------------------


class Bomb:
    """A pickle that leaves a trace if it is run."""

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("/tmp/a-pickle-was-run",))


class Call:
    """A pickle that makes a call when it is loaded, and holds what comes of it."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def with_values(file: str, **values: object) -> Build:
    return lambda folder: edit_json(folder / file, lambda content: content.update(values))


def write(file: str, content: bytes | str) -> Build:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(data)


def huge(file: str, size: int = 400 << 20) -> Build:
    """Hundreds of megabytes, without taking them from the disk."""
    return lambda folder: os.truncate(folder / file, size)


def replaced(file: str, make: Callable[[Path], object]) -> Build:
    """Something else under a file's name."""

    def build(folder: Path) -> None:
        path = folder / file
        path.unlink(missing_ok=True)
        make(path)

    return build


def link_to_copy(path: Path) -> None:
    """A link to a file outside that would do very well."""
    path.symlink_to(path.parent.parent.parent / "good" / path.name)


NO_FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a device": lambda path: path.symlink_to("/dev/zero"),
}

BAD_JSON = {
    "deep": "[" * 100_000,
    "deep, but whole": '{"x":' * 900 + "1" + "}" * 900,
    "deep lists": '{"x":' + "[" * 900 + "]" * 900 + "}",
    "a long number": '{"vocab_size": ' + "9" * 1_000_000 + "}",
    "a list": "[]",
    "a word": '"BERT"',
    "nothing": "",
    "no UTF-8": b'{"x": "\xff\xfe"}',
    "keys twice": '{"model_type": "bert", "model_type": "bert"}',
}


def edit_header(
    change: Callable[[dict[str, Any]], object], file: str = "model.safetensors"
) -> Build:
    """Changes what a safetensors file says of itself."""

    def build(folder: Path) -> None:
        content = (folder / file).read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        data = content[8 + size :]
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data)

    return build


NAME = "bert.embeddings.LayerNorm.bias"  # 32 numbers


def entry(**values: object) -> Build:
    return edit_header(lambda header: header[NAME].update(values))


def extra(name: str, dtype: str, shape: list[Any]) -> Build:
    """One more tensor, without contents."""

    def change(header: dict[str, Any]) -> None:
        end = max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end]}

    return edit_header(change)


def raw_header(text: bytes, size: int | None = None) -> Build:
    length = len(text) if size is None else size
    return write("model.safetensors", struct.pack("<Q", length) + text)


def index(**weight_map: object) -> Build:
    def build(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        content = json.dumps({"weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(content)

    return build


def as_bin(
    save: Callable[[dict[str, Any], Path], object], name: str = "pytorch_model.bin"
) -> Build:
    """The weights in a pickle."""

    def build(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save(state, folder / name)
        if name != "pytorch_model.bin":
            (folder / "pytorch_model.bin.index.json").write_text(
                json.dumps({"weight_map": dict.fromkeys(state, name)})
            )

    return build


def bin_with(value: object, key: object = NAME, legacy: bool = False) -> Build:
    return as_bin(
        lambda state, path: torch.save(
            {**state, key: value}, path, _use_new_zipfile_serialization=not legacy
        )
    )


def rezipped(change: Callable[[zipfile.ZipFile], object], compression: int = 0) -> Build:
    """The weights in a pickle whose zip archive is made anew."""

    def save(state: dict[str, Any], path: Path) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w", compression) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
            change(new)

    return as_bin(save)


def set_size(archive: zipfile.ZipFile, size: int, stem: str) -> None:
    for entry_ in archive.filelist:
        if entry_.filename.endswith(stem):
            entry_.file_size = size
            entry_.compress_size = size


def expanded(folder: Path) -> None:
    """Two gigabytes in a file of some kilobytes: all rows of a table are the same one."""
    as_bin(
        lambda state, path: torch.save(
            {
                **state,
                "bert.embeddings.word_embeddings.weight": torch.zeros(1).expand(1 << 24, 32),
            },
            path,
        )
    )(folder)
    with_values("config.json", vocab_size=1 << 24)(folder)


def shared_storage(folder: Path) -> None:
    """Every tensor is a view of one: more than the file holds."""

    def save(state: dict[str, Any], path: Path) -> None:
        flat = torch.zeros(max(tensor.numel() for tensor in state.values()))
        torch.save({n: flat[: t.numel()].view(t.shape) for n, t in state.items()}, path)

    as_bin(save)(folder)


def edit_tokenizer(change: Callable[[dict[str, Any]], object]) -> Build:
    return lambda folder: edit_json(folder / "tokenizer.json", change)


def part(name: str, **values: object) -> Build:
    return edit_tokenizer(lambda content: content.update({name: values}))


def vocabulary(change: Callable[[dict[str, Any]], object]) -> Build:
    return edit_tokenizer(lambda content: change(content["model"]["vocab"]))


def only_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def both(*builds: Build) -> Build:
    return lambda folder: [build(folder) for build in builds]


REGEX = {"Regex": "(a*)*(a*)*(a*)*b"}
TEMPLATE = [{"Sequence": {"id": "A", "type_id": 0}}]


def seal(folder: Path) -> None:
    """A manifest in which all is right, as whoever made the files can write one."""
    digests = {name: checkpoint._digest(folder / name) for name in checkpoint.CHECKPOINT_FILES}
    entries = {name: {"size": size, "sha256": sha} for name, (size, sha) in digests.items()}
    step = int(folder.name.rpartition("-")[2])
    manifest = checkpoint._manifest_bytes({"step": step, "files": entries})
    (folder / checkpoint.MANIFEST).write_bytes(manifest)


def sealed(build: Build) -> Build:
    def build_and_seal(folder: Path) -> None:
        build(folder)
        seal(folder)

    return build_and_seal


def state(change: Callable[[dict[str, Any]], object]) -> Build:
    """Another training state, under the right hash."""
    return sealed(lambda folder: edit_json(folder / checkpoint.STATE, change))


def counters(**values: object) -> Build:
    return state(lambda content: content["counters"].update(values))


def report_state(**values: object) -> Build:
    return state(lambda content: content["report"].update(values))


def run_record(**values: object) -> Build:
    return state(lambda content: content["run"].update(values))


def manifest(content: object) -> Build:
    """A manifest of other contents, with its own hash right."""
    return lambda folder: (folder / checkpoint.MANIFEST).write_bytes(
        checkpoint._manifest_bytes(content)  # type: ignore[arg-type]
    )


def flip_byte(file: str, folder: Path) -> None:
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)


def replace_once(file: str, old: bytes, new: bytes, folder: Path) -> None:
    path = folder / file
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def edit_manifest(change: Callable[[dict[str, Any]], object]) -> Build:
    def build(folder: Path) -> None:
        content = json.loads((folder / checkpoint.MANIFEST).read_text())["content"]
        change(content)
        manifest(content)(folder)

    return build


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\nbertner-train: all is well"

JSON_FILES = {
    "config.json": "config",
    "tokenizer.json": "tokenizer",
    "tokenizer_config.json": "tokenizer",
    "special_tokens_map.json": "tokenizer",
}


def cases() -> Iterator[tuple[str, str, Build]]:
    """(kind, name, what spoils the folder)."""
    # JSON that is none, or too much of it.
    for file, kind in JSON_FILES.items():
        for name, content in BAD_JSON.items():
            yield kind, f"{file}: {name}", write(file, content)
        yield kind, f"{file}: hundreds of megabytes", huge(file)
        for name, make in NO_FILES.items():
            yield kind, f"{file}: {name}", replaced(file, make)
    for name, content in BAD_JSON.items():
        file = "model.safetensors.index.json"
        yield "weights", f"{file}: {name}", both(index(), write(file, content))

    # config.json
    for name, value in {
        "num_labels": 10**12,
        "num_hidden_layers": 10**9,
        "vocab_size": 10**18,
        "hidden_size": 10**30,
        "intermediate_size": 2**62,
        "max_position_embeddings": 2**63,
        "type_vocab_size": 10**4000,
        "initializer_range": 1e300,
        "layer_norm_eps": float("nan"),
        "hidden_dropout_prob": float("inf"),
        "num_attention_heads": [12],
        "hidden_act": {"gelu": 1},
        "model_type": ESCAPES,
        "id2label": {str(k): "O" for k in range(100_000)},
        "pad_token_id": "0",
    }.items():
        drop = {"id2label": None} if name == "num_labels" else {}
        change = with_values("config.json", **drop, **{name: value})
        yield "config", f"config.json: {name}", change
    for name, reading in {
        "a list": [1],
        "a string": "x",
        "an unknown setting": {ESCAPES: 1},
        "an unknown choice": {"decoding": ESCAPES},
        "a negative length": {"max_seq_length": -5},
        "a long length": {"max_seq_length": 10**4000},
        "an overlap of the whole": {"max_seq_length": 20, "window_overlap": 18},
    }.items():
        change = with_values("config.json", bertner_reading=reading)
        yield "config", f"config.json: reading is {name}", change
    for name, label in {"escapes": f"B-{ESCAPES}", "a lone surrogate": "B-\ud800"}.items():
        change = with_values("config.json", id2label={"0": "O", "1": label})
        yield "labels", f"config.json: a label of {name}", change

    # Pickles, under every name.
    for name in (
        "training_args.bin optimizer.pt optimizer.bin scheduler.pt rng_state.pth scaler.pt "
        "trainer_state.json model.bin"
    ).split():
        yield "unread", f"{name}: a pickle", write(name, pickle.dumps(Bomb()))
        yield "unread of a run", f"{name}: a pickle", write(name, pickle.dumps(Bomb()))
    for file, kind in {**JSON_FILES, "model.safetensors": "weights"}.items():
        yield kind, f"{file}: a pickle", write(file, pickle.dumps(Bomb()))
    yield "weights", "a pickle", as_bin(lambda _, path: path.write_bytes(pickle.dumps(Bomb())))
    yield "weights", "a pickle among tensors", bin_with(Bomb())
    yield "weights", "a pickle among tensors, old form", bin_with(Bomb(), legacy=True)
    yield "weights", "a pickle as name", bin_with(torch.zeros(32), key=NAME.encode())
    shard = as_bin(lambda _, path: torch.save(Bomb(), path), "pytorch_model-00001.bin")
    yield "weights", "a pickle as shard", shard

    # .bin files that are no pickle of tensors, or say that they are more than they are.
    for legacy in (False, True):
        for name, value in {
            "a call for memory": Call(bytearray, 4 << 30),
            "a tensor without contents": Call(torch.FloatTensor, 1 << 30),
            "a sparse tensor": torch.zeros(32).to_sparse(),
            "a tensor of the meta device": torch.zeros(32, device="meta"),
            "a list": [torch.zeros(32)],
            "a set": {1, 2},
            "a number": 5,
            "a tensor of integers": torch.zeros(32, dtype=torch.int8),
        }.items():
            form = "old .bin" if legacy else ".bin"
            yield "weights", f"{form}: {name}", bin_with(value, legacy=legacy)
    yield "weights", ".bin: expanded", expanded
    yield "weights", ".bin: one storage for all", shared_storage
    yield "weights", ".bin: no dict", as_bin(lambda s, path: torch.save(list(s.values()), path))
    yield "weights", ".bin: empty", as_bin(lambda _, path: path.write_bytes(b""))
    yield "weights", ".bin: noise", as_bin(lambda _, path: path.write_bytes(b"PK\3\4" * 999))
    yield "weights", ".bin: compressed", rezipped(lambda _: None, zipfile.ZIP_DEFLATED)
    for size in (1 << 31, 1 << 62):
        yield (
            "weights",
            f".bin: {size} bytes claimed",
            rezipped(partial(set_size, size=size, stem="/0")),
        )
    yield "weights", ".bin: fewer bytes claimed", rezipped(partial(set_size, size=4, stem="/0"))
    yield (
        "weights",
        ".bin: a long pickle",
        rezipped(
            lambda archive: archive.writestr("archive/DATA.PKL", b"\x80\x02" + b"N0" * 1_000_000)
        ),
    )
    yield (
        "weights",
        ".bin: twice the same",
        rezipped(lambda archive: archive.filelist.extend(archive.filelist * 100)),
    )
    for name, make in NO_FILES.items():
        if name != "a dangling link":
            yield "weights", f".bin: {name}", as_bin(lambda _, path, make=make: make(path))

    # safetensors
    for name, make in NO_FILES.items():
        yield "weights", f"model.safetensors: {name}", replaced("model.safetensors", make)
    yield "weights", "header: longer than the file", raw_header(b"{}", 1000)
    yield "weights", "header: longer than anything", raw_header(b"{}", 2**64 - 1)
    yield "weights", "header: 100 MB", raw_header(b"{}" + b" " * (100 << 20))
    yield "weights", "header: deep", raw_header(b'{"x":' * 200_000)
    yield "weights", "header: a list", raw_header(b"[]")
    yield "weights", "header: not UTF-8", raw_header(b'{"\xff": 1}')
    one = b'"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    yield "weights", "header: a name twice", raw_header(b"{" + one + b"," + one + b"}")
    many = {
        f"bert.{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(50_000)
    }
    yield "weights", "header: many names", raw_header(json.dumps(many).encode())
    for name, values in {
        "overlapping": {"data_offsets": [128, 256]},
        "outside": {"data_offsets": [0, 1 << 40]},
        "backwards": {"data_offsets": [128, 0]},
        "negative offsets": {"data_offsets": [-128, 0]},
        "a negative shape": {"shape": [-32]},
        "an enormous shape": {"shape": [2**63]},
        "a shape that overflows": {"shape": [2**33, 2**33]},
        "a shape that wraps round": {"shape": [2**32, 2**32, 32]},
        "a shape of many dimensions": {"shape": [32] + [1] * 100_000},
        "a shape of fractions": {"shape": [32.5]},
        "an unknown type": {"dtype": "F31"},
        "a type of another length": {"dtype": "F64"},
        "complex numbers": {"dtype": "C64", "shape": [16]},
        "unsigned integers": {"dtype": "U32"},
        "small numbers": {"dtype": "F4", "shape": [256]},
    }.items():
        yield "weights", f"header: {name}", entry(**values)
    for shape in ([0, 2**62], [0, 2**63], [0, 2**64 - 1], [2**62, 0, 2**62], [0] * 5000):
        for dtype in ("F32", "F8_E8M0", "BOOL"):
            change = extra("bert.x", dtype, shape)
            yield "weights", f"header: nothing in {str(shape)[:40]} {dtype}", change
    yield "weights", "header: a name of escapes", extra(f"bert.{ESCAPES}", "F32", [0])
    yield "weights", "header: a long name", extra("bert." + "x" * 3_000_000, "F32", [0])
    for name, metadata in {"list": [1], "number": 1, "deep": {"format": nested(100)}}.items():
        change = edit_header(lambda header, m=metadata: header.update(__metadata__=m))
        yield "weights", f"header: metadata is a {name}", change

    # An index
    for name, target in {
        "a file above": "../good/model.safetensors",
        "a file by its path": "/etc/passwd.safetensors",
        "a NUL": "a\0.safetensors",
        "a long name": "a" * 5000 + ".safetensors",
        "a lone surrogate": "\ud800.safetensors",
        "escapes": ESCAPES + ".safetensors",
        "nothing": "",
        "a list": ["shard.safetensors"],
        "itself": "model.safetensors.index.json",
    }.items():
        yield "weights", f"index: names {name}", index(x=target)
    yield (
        "weights",
        "index: a list",
        both(
            index(), write("model.safetensors.index.json", '{"weight_map": ["shard.safetensors"]}')
        ),
    )
    for name, make in NO_FILES.items():
        change = both(index(x="model-1.safetensors"), replaced("model-1.safetensors", make))
        yield "weights", f"index: names {name}", change

    # tokenizer.json
    charsmap = {"type": "Precompiled", "precompiled_charsmap": "/////w=="}
    for name, change in {
        "a charsmap": part("normalizer", **charsmap),
        "a charsmap inside": part("normalizer", type="Sequence", normalizers=[charsmap]),
        "a slow expression": part("normalizer", type="Replace", pattern=REGEX, content=""),
        "a growing replacement": part(
            "normalizer",
            type="Sequence",
            normalizers=[
                {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"},
            ]
            * 16,
        ),
        "a prepended text": part("normalizer", type="Prepend", prepend="a" * 1_000_000),
        "a slow split": part(
            "pre_tokenizer", type="Split", pattern=REGEX, behavior="Isolated", invert=False
        ),
        "a slow decoder": part("decoder", type="Replace", pattern=REGEX, content=""),
        "deep normalizers": edit_tokenizer(
            lambda c: c.update(normalizer=_deep("Sequence", "normalizers", 200))
        ),
        "a normalizer's name": edit_tokenizer(lambda c: c.update(normalizer="BertNormalizer")),
        "normalizers of numbers": part("normalizer", type="Sequence", normalizers=[1, None]),
        "a normalizer of escapes": part("normalizer", type=ESCAPES),
        "a normalizer of two kinds": part("normalizer", type=["BertNormalizer"]),
        "a template that repeats": part(
            "post_processor",
            type="TemplateProcessing",
            single=TEMPLATE * 10_000,
            pair=TEMPLATE,
            special_tokens={},
        ),
        "a model of bytes": part("model", type="BPE", vocab={}, merges=[]),
        "a model's name": edit_tokenizer(lambda c: c.update(model="WordPiece")),
        "no model": edit_tokenizer(lambda c: c.pop("model")),
        "ids of billions": vocabulary(lambda v: v.update(x=2**32 - 1)),
        "ids past all bounds": vocabulary(lambda v: v.update(x=2**64)),
        "negative ids": vocabulary(lambda v: v.update(x=-1)),
        "ids of fractions": vocabulary(lambda v: v.update(x=1.5)),
        "ids of words": vocabulary(lambda v: v.update(x="1")),
        "a vocabulary of lists": edit_tokenizer(lambda c: c["model"].update(vocab=[["a", 1]])),
        "an empty vocabulary": edit_tokenizer(lambda c: c["model"].update(vocab={})),
        "a lone surrogate": vocabulary(lambda v: v.update({"\ud800": 5})),
        "no unknown token": edit_tokenizer(lambda c: c["model"].update(unk_token="none")),
        "an unknown token of numbers": edit_tokenizer(lambda c: c["model"].update(unk_token=1)),
        "words of any length": edit_tokenizer(
            lambda c: c["model"].update(max_input_chars_per_word=2**63)
        ),
        "words of negative length": edit_tokenizer(
            lambda c: c["model"].update(max_input_chars_per_word=-1)
        ),
        "added tokens past the model": edit_tokenizer(
            lambda c: c["added_tokens"].append(
                {**c["added_tokens"][0], "id": 2**32 - 1, "content": "x y"}
            )
        ),
        "an added token of numbers": edit_tokenizer(lambda c: c["added_tokens"].append(5)),
        "added tokens by name": edit_tokenizer(lambda c: c.update(added_tokens={"id": 0})),
    }.items():
        yield "tokenizer", f"tokenizer.json: {name}", change
    for name, change in {
        "truncation to nothing": part("truncation", max_length=-1, strategy="x", stride=9),
        "padding to anything": part("padding", strategy={"Fixed": 2**70}, pad_id=-1),
    }.items():
        yield "unread", f"tokenizer.json: {name}", change
    for name, tokens in {"deep": nested(30), "a lone surrogate": "\ud800", "a number": 5}.items():
        change = with_values("tokenizer_config.json", mask_token=tokens)
        yield "tokenizer", f"tokenizer_config.json: {name} as token", change
        yield "tokenizer", f"vocab.txt: {name} as token", both(change, only_vocabulary)
    for name in ("strip_accents", "tokenize_chinese_chars"):
        change = both(with_values("tokenizer_config.json", **{name: [1]}), only_vocabulary)
        yield "tokenizer", f"vocab.txt: {name} is a list", change
    long = both(only_vocabulary, write("vocab.txt", "long\n" * 3_000_000))
    yield "tokenizer", "vocab.txt: long", long
    yield "tokenizer", "vocab.txt: huge", both(only_vocabulary, huge("vocab.txt"))
    for name, make in NO_FILES.items():
        yield "tokenizer", f"vocab.txt: {name}", both(only_vocabulary, replaced("vocab.txt", make))

    # The record of a run
    for name, content in BAD_JSON.items():
        yield "unread", f"run.json: {name}", write("run.json", content)
    for name, make in NO_FILES.items():
        yield "unread", f"run.json: {name}", replaced("run.json", make)
    for name, settings in {
        "a list": ["label_all_tokens"],
        "words": {"label_all_tokens": "x", "max_seq_length": "x"},
        "a negative length": {"label_all_tokens": True, "max_seq_length": -5},
        "a long length": {"label_all_tokens": True, "max_seq_length": 10**4000},
    }.items():
        yield "unread", f"run.json: settings are {name}", with_values("run.json", config=settings)
    # Without checkpoints that have a copy.
    for name, content in BAD_JSON.items():
        yield "record", f"run.json: {name}", write("run.json", content)
    for name, make in NO_FILES.items():
        yield "record", f"run.json: {name}", replaced("run.json", make)
    yield (
        "record",
        "run.json: versions of escapes",
        with_values("run.json", versions={"bertner": ESCAPES}, config={"seed": ESCAPES}),
    )

    # The files of a checkpoint
    for file in (*checkpoint.CHECKPOINT_FILES, checkpoint.MANIFEST):
        for name, make in {**NO_FILES, "a link to a copy": link_to_copy}.items():
            yield "checkpoint", f"checkpoint, {file}: {name}", replaced(file, make)
        yield "checkpoint", f"checkpoint, {file}: hundreds of megabytes", huge(file)
        yield "checkpoint", f"checkpoint, {file}: another byte", partial(flip_byte, file)
        yield "checkpoint", f"checkpoint, {file}: a pickle", write(file, pickle.dumps(Bomb()))
    for name, content in BAD_JSON.items():
        yield "checkpoint", f"manifest: {name}", write(checkpoint.MANIFEST, content)
        change = sealed(write(checkpoint.STATE, content))
        yield "state", f"state: {name}", change
    for name, content in {
        "nothing": {},
        "deep": {"step": nested(200), "files": {}},
        "another step": {"step": 3, "files": {}},
        "words": {"step": ESCAPES, "files": {}},
        "a list of files": {"step": 4, "files": list(checkpoint.CHECKPOINT_FILES)},
        "words for files": {"step": 4, "files": dict.fromkeys(checkpoint.CHECKPOINT_FILES, "x")},
    }.items():
        yield "checkpoint", f"manifest: {name}", manifest(content)
    change = partial(replace_once, checkpoint.MANIFEST, b"{", b"{ ")
    yield "checkpoint", "manifest: another form", change
    change = partial(replace_once, checkpoint.MANIFEST, b'"step": ', b'"x": 1, "step": ')
    yield "checkpoint", "manifest: more than its own hash says", change
    for name, size in {
        "a word": "x",
        "a fraction": 1.5,
        "negative": -1,
        "endless": float("inf"),
    }.items():
        change = edit_manifest(lambda c, s=size: c["files"]["vocab.txt"].update(size=s))
        yield "checkpoint", f"manifest: a size that is {name}", change
    for name in ("../vocab.txt", "/etc/passwd"):
        change = edit_manifest(lambda c, n=name: c["files"].update({n: c["files"]["vocab.txt"]}))
        yield "checkpoint", f"manifest: names {name}", change
        change = edit_manifest(
            lambda c, n=name: c["files"].update({n: c["files"].pop("vocab.txt")})
        )
        yield "checkpoint", f"manifest: names {name} in place of another", change

    # Under the right hashes
    for file in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER):
        name = NAME if file == checkpoint.WEIGHTS else f"{NAME}.exp_avg"
        yield "state", f"{file}, hash right: a pickle", sealed(write(file, pickle.dumps(Bomb())))
        yield "state", f"{file}, hash right: empty", sealed(write(file, b""))
        for kind, values in {
            "another shape": {"shape": [1, 32]},
            "another type": {"dtype": "U32"},
            "small numbers": {"dtype": "F4", "shape": [256]},
        }.items():
            change = edit_header(lambda header, n=name, v=values: header[n].update(v), file)
            yield "state", f"{file}, hash right: {kind}", sealed(change)
        change = edit_header(
            lambda header: header.update(
                x={"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}
            ),
            file,
        )
        yield "state", f"{file}, hash right: nothing in much", sealed(change)
    yield "state", "state, hash right: huge", sealed(huge(checkpoint.STATE, 17 << 20))
    yield "state", "state: another format", state(lambda s: s.update(format=2))
    yield "state", "state: no format", state(lambda s: s.update(format=nested(30)))
    yield "state", "state: another length of the log", state(lambda s: s.update(metrics_bytes=1.5))
    for name in ("counters", "run", "report"):
        for value in ([1], "x", 10**4000):
            yield (
                "state",
                f"state: {name} is {str(value)[:9]}",
                state(lambda s, n=name, v=value: s.update({n: v})),
            )
    for name, value in {
        "step": 10**4000,
        "tokens": 10**4000,
        "best_step": 10**4000,
        "losses": "x",
        "best": [1],
        "watched": 1,
        "seconds": None,
    }.items():
        yield "state", f"state: counter {name}", counters(**{name: value})
    for name, value in {
        "window_steps": -1,
        "window_loss": None,
        "training_loss": ESCAPES,
        "rows": [1],
    }.items():
        yield "state", f"state: report {name}", report_state(**{name: value})
    yield "state", "state: report of long numbers", report_state(window_steps=10**4000)
    for rows in ([["x"]], [{"x": 1}], [[ESCAPES] * 9], "x", [nested(30)]):
        yield "state", f"state: rows {str(rows)[:20]}", report_state(rows=rows)
    for name, value in {
        "config": {"seed": ESCAPES},
        "data": {"train": {"sha256": ESCAPES * 1000}},
        "labels": [ESCAPES] * 10_000,
        "sha256": {"tokenizer": nested(20)},
        "versions": ["bertner"],
        "machine": None,
        "resumes": [{"differences": ["x"]}],
    }.items():
        yield "state", f"state: run's {name}", run_record(**{name: value})
    for resumes in ([5], [{"step": 1, "differences": [5]}], [{"step": [], "differences": "x"}]):
        yield "state", f"state: resumes {resumes}", run_record(resumes=resumes)
    for name, value in {
        "a name that is none": {"x" * 1_000_000: 1},
        "a pipe as data": {"train_file": "PIPE"},
        "an endless file": {"train_file": "/dev/zero"},
    }.items():
        yield "settings", f"settings: {name}", run_config(value)


def run_config(values: dict[str, object]) -> Build:
    """Other settings for `--verify`, which takes them from the checkpoints."""

    def build(folder: Path) -> None:
        pipe = folder.parent / "pipe"
        if not pipe.exists():
            os.mkfifo(pipe)
        texts = {k: str(pipe) if v == "PIPE" else v for k, v in values.items()}
        state(lambda s: s["run"]["config"].update(texts))(folder)

    return build


def _deep(kind: str, inside: str, depth: int) -> dict[str, Any]:
    part_: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(depth):
        part_ = {"type": kind, inside: [part_]}
    return part_


# The process that loads them -------------------------------------------------------------------

FORBIDDEN = (
    "exec compile import os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn "
    "subprocess.Popen pickle.find_class marshal.loads code.__new__ pty.spawn "
    "os.kill os.putenv os.chmod os.chown os.link os.symlink"
).split()
CHANGES = "os.mkdir os.rename os.remove os.rmdir os.truncate os.utime shutil.rmtree".split()


class Watch:
    """What the interpreter tells of what is done, as far as loading has no business with it."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = str(scratch)
        self.seen: list[str] | None = None
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        if event in FORBIDDEN or (
            event.startswith(("socket.", "ctypes.")) and event != "socket.gethostname"
        ):
            self.seen.append(f"{event} {arguments[:1]!r:.80}")
        elif event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if writes and not self.is_inside(path):
                self.seen.append(f"open {path!r} {mode} {flags:o}")
        elif event in CHANGES and not self.is_inside(arguments[0]):
            self.seen.append(f"{event} {arguments!r:.80}")

    def is_inside(self, path: object) -> bool:
        return isinstance(path, int) or os.fsdecode(path).startswith(self.scratch)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def watching(self) -> Iterator[list[str]]:
        self.seen = seen = []
        try:
            yield seen
        finally:
            self.seen = None


class Loaders:
    """Everything that reads a model's folder or a run's, by name."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        base = write_model_folder(scratch / "base", num_hidden_layers=1)
        data = write_conll(scratch / "data.txt")
        self.short = ["--train_file", str(data), "--disable_tqdm", "--no_data_cache"]
        # The report comes of no hostile file, and its template is compiled: code of ours.
        self.short += ["--matmul", "default", "--eval_strategy", "no", "--no_report"]
        self.run = [*self.short, "--model", str(base), "--max_steps", "4"]
        self.run += ["--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "3"]

    def commands(self, kind: str, folder: Path) -> dict[str, Callable[[], object]]:
        """By name, those that a case of a kind is taken through."""
        at, text = ["--matmul", "default", "--model", str(folder)], str(self.scratch / "data.txt")
        if kind in OF_A_MODEL:
            other = [
                "--output_dir",
                f"{folder}-trained",
                "--max_steps",
                "1",
                "--save_strategy",
                "no",
            ]
            return {
                "BertForNER": lambda: BertForNER.from_pretrained(folder),
                "Tokenizer": lambda: _load_tokenizer(folder),
                "Tagger": lambda: Tagger.from_pretrained(folder, matmul="default")(["Mary aaaaab"]),
                "eval_main": lambda: eval_main([*at, "--file", text]),
                "predict_main": lambda: predict_main([*at, text]),
                "train_main": lambda: train_main([*self.short, "--model", str(folder), *other]),
            }
        last = folder / "checkpoint-4"
        again = [*self.run, "--output_dir", str(folder)]
        commands: dict[str, Callable[[], object]] = {
            "verify_checkpoint": lambda: checkpoint.verify_checkpoint(last),
            "load_checkpoint": lambda: checkpoint.load_checkpoint(last),
            "load_newest": lambda: checkpoint.load_newest(folder),
            "--verify": lambda: train_main(["--verify", str(folder)]),
            "resume": lambda: train_main([*again, "--resume_from_checkpoint", str(last)]),
            "again": lambda: train_main(again),
        }
        return {"again": commands["again"]} if kind == "record" else commands

    def good_run(self) -> Path:
        """A run that was killed just before its end; also a model's folder."""
        folder = self.scratch / "run"
        assert train_main([*self.run, "--output_dir", str(folder)]) == 0
        edit_json(folder / "run.json", lambda record: record.pop("finished"))
        shutil.copytree(folder / "checkpoint-4", self.scratch / "good")
        return folder


def spoil(kind: str, build: Build, run: Path, folder: Path) -> None:
    others = "checkpoint-*" if kind in OF_A_MODEL else "[!cr]*"  # but checkpoints and run.json
    ignore = shutil.ignore_patterns(others)
    shutil.copytree(
        run, folder, ignore=lambda at, names: ignore(at, names) if at == str(run) else ()
    )
    if kind == "record":  # no checkpoints, which have a copy of it
        for step in (2, 4):
            shutil.rmtree(folder / f"checkpoint-{step}")
    if kind in (*OF_A_MODEL, "record"):
        build(folder)
    else:
        for step in (2, 4):
            build(folder / f"checkpoint-{step}")


def attempt(command: Callable[[], object], watch: Watch) -> dict[str, Any]:
    """Runs one command; says how it ended and what it took."""
    errors = io.StringIO()
    result: dict[str, Any] = {"crash": "", "code": 0}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with (
        contextlib.redirect_stderr(errors),
        contextlib.redirect_stdout(io.StringIO()),
        watch.watching() as seen,
    ):
        try:
            code = command()
            result["code"] = code if isinstance(code, int) else 0
        except BertnerError as error:
            result["code"] = error.exit_code
            errors.write(str(error).replace("\n", " ").encode("ascii", "backslashreplace").decode())
        except BaseException:
            result["crash"] = traceback.format_exc()[-1500:]
    result["seconds"] = time.process_time() - start
    result["megabytes"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    return {**result, "errors": errors.getvalue().replace("\r", "\n"), "seen": seen}


# Those that write, and so get a folder of their own.
WRITERS = ("train_main", "resume", "again")


# What each case is taken through; besides, through one of the others, and the next through the
# next: they do the same and more.
ALWAYS = {
    "config": ["BertForNER", "Tokenizer"],
    "weights": ["BertForNER"],
    "tokenizer": ["Tokenizer"],
    "checkpoint": ["load_checkpoint"],
}


def main(scratch: Path, thorough: bool) -> None:
    """Takes every case through everything that reads it; prints a line of JSON for each."""
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    loaders = Loaders(scratch)
    watch = Watch(scratch)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = loaders.good_run()
        warm_up(loaders, run, watch)
    for number, (kind, name, build) in enumerate(cases()):
        results, folder = {}, scratch / f"case-{number}"
        commands = loaders.commands(kind, folder)
        always = ALWAYS.get(kind, [])
        others = [n for n in READERS[kind].split() or commands if n not in always]
        taken = list(commands) if thorough else [*always, others[number % len(others)]]
        for loader in taken:
            if loader in WRITERS or not folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
                spoil(kind, build, run, folder)
            results[loader] = attempt(commands[loader], watch)
        shutil.rmtree(folder)
        shutil.rmtree(f"{folder}-trained", ignore_errors=True)
        print(json.dumps({"kind": kind, "name": name, "results": results}), flush=True)


def warm_up(loaders: Loaders, run: Path, watch: Watch) -> None:
    """Loads folders that are good, or nearly: what is imported at first use is imported now."""
    for kind, build in [
        ("unread of a run", lambda _: None),
        ("unread", bin_with(torch.zeros(32))),
        ("unread", bin_with(torch.zeros(32), legacy=True)),
        ("weights", bin_with([1], legacy=True)),
        ("weights", rezipped(lambda _: None)),
    ]:
        folder = loaders.scratch / "warm"
        for name, command in loaders.commands(kind, folder).items():
            spoil(kind, build, run, folder)
            result = attempt(command, watch)
            assert not result["crash"], (name, result)
            assert kind == "weights" or result["code"] == 0, (name, result)
            shutil.rmtree(folder)


# The promises ----------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "thorough"]
)
def report(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> list[dict[str, Any]]:
    """What came of each case, with one command each; if thorough, with all."""
    scratch = tmp_path_factory.mktemp("hostile")
    code = "from tests.test_hostile_files import main; from pathlib import Path; "
    result = subprocess.run(
        [sys.executable, "-c", f"{code}main(Path({str(scratch)!r}), {request.param})"],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "BERTNER_CACHE": str(scratch / "cache")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"after {len(lines)} cases: {result.stderr[-3000:]}"
    assert len(lines) == len(list(cases())) > 400
    return lines


def each(report: list[dict[str, Any]]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    for case in report:
        for loader, result in case["results"].items():
            yield f"{case['name']} | {loader}", case["kind"], loader, result


def test_all_that_reads_a_hostile_file_refuses_it(report: list[dict[str, Any]]) -> None:
    wrong = []
    for name, kind, loader, result in each(report):
        refuses = loader in READERS[kind].split()
        if result["crash"]:
            wrong.append(f"{name}: {result['crash']}")
        elif result["code"] not in (REFUSALS if refuses else {0, *REFUSALS}):
            wrong.append(f"{name}: ends with {result['code']}")
        elif kind.startswith("unread") and result["code"] != 0:
            wrong.append(f"{name}: {result['errors']}")
    assert not wrong, "\n".join(wrong)


def test_the_message_names_the_folder_and_steers_no_terminal(report: list[dict[str, Any]]) -> None:
    wrong = []
    for name, kind, loader, result in each(report):
        errors = result["errors"]
        if result["code"] == 0 or loader not in ("eval_main", "predict_main", *WRITERS, "--verify"):
            continue
        program = {"eval_main": "bertner-eval", "predict_main": "bertner-predict"}.get(loader)
        start = f"\n{program or 'bertner-train'}: "  # no file can bring a line to begin so
        message = errors[("\n" + errors).rindex(start) :].strip()
        if (
            ("case-" not in message and kind != "labels")  # those name the label
            or message.count("\n") > 1
            or len(message) > 1 << 15
            or not errors.replace("\n", "").isprintable()
        ):
            wrong.append(f"{name}: {errors[-500:]!r}")
    assert not wrong, "\n".join(wrong)


def test_no_code_runs_and_nothing_is_written_elsewhere(report: list[dict[str, Any]]) -> None:
    wrong = [f"{name}: {result['seen']}" for name, _, _, result in each(report) if result["seen"]]
    assert not wrong, "\n".join(wrong)
    assert not Path("/tmp/a-pickle-was-run").exists()


def test_refusing_takes_little_time_and_memory(report: list[dict[str, Any]]) -> None:
    wrong = [
        f"{name}: {result['seconds']:.1f} s, {result['megabytes']:.0f} MB"
        for name, _, _, result in each(report)
        if result["seconds"] > MAX_SECONDS or result["megabytes"] > MAX_MEGABYTES
    ]
    assert not wrong, "\n".join(wrong)


KNOWN_PARTS: dict[str, dict[str, Any]] = {
    "uncased, in pieces": {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "NFD"}, {"type": "Lowercase"}, {"type": "StripAccents"}],
        },
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, {"type": "BertPreTokenizer"}],
        },
    },
    "no parts": {"normalizer": None, "pre_tokenizer": None, "post_processor": None},
    "no decoder": {"decoder": None},
    "cut and padded": {
        "truncation": {"max_length": 9, "strategy": "LongestFirst", "stride": 0},
    },
}


@pytest.mark.parametrize("parts", KNOWN_PARTS.values(), ids=KNOWN_PARTS)
def test_what_tokenizers_of_bert_are_made_of_is_taken(
    tokenizer: Tokenizer, tmp_path: Path, parts: dict[str, Any]
) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    edit_tokenizer(lambda content: content.update(parts))(tmp_path)
    if parts.get("normalizer"):
        vocabulary(_lower)(tmp_path)
    config = BertConfig(vocab_size=500)
    assert Tokenizer.from_pretrained(tmp_path, config).encode(["the"]).ids


def _lower(vocab: dict[str, int]) -> None:
    for token in list(vocab):
        if token != token.lower() and not token.startswith("["):
            del vocab[token]


def test_what_transformers_writes_is_taken(model_folder: Path, tmp_path: Path) -> None:
    import transformers  # takes seconds, which the process of the cases need not spend

    theirs = transformers.BertTokenizer(vocab=str(model_folder / "vocab.txt"), do_lower_case=False)
    theirs.add_tokens(["Zürich", "[new]"])
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.from_pretrained(tmp_path, BertConfig(vocab_size=500))
    words = ["Zürich", "the", "[new]", "landing"]
    expected = theirs(words, is_split_into_words=True, add_special_tokens=False)["input_ids"]
    assert ours.encode(words).ids == expected


def test_a_name_that_steers_a_terminal_is_spelt_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict_main(["--model", f"./nowhere{ESCAPES}"]) == 65
    errors = capsys.readouterr().err
    assert errors.replace("\n", "").isprintable()
    assert r"nowhere\x1b]0;owned\x07\x1b[2J\x9b31m\r" in errors
    assert errors.count("\n") == 2
