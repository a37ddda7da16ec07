"""Prepared data kept between runs: the same as preparing it anew, whatever happens to the cache."""

from __future__ import annotations

import dataclasses
import errno
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bertner import data_cache
from bertner.batches import collate
from bertner.cli import train_main
from bertner.config import BertConfig, Reading
from bertner.data import PreparedData
from bertner.data_cache import cache_folder, prepare_file
from bertner.errors import DataError
from bertner.labels import LabelSet
from bertner.tokenizer import Tokenizer
from tests.conftest import CASED_VOCAB, REPOSITORY, write_conll
from tests.test_data import ARRAYS, assert_same_data

COLUMNS = {"text_column": "tokens", "label_column": "ner_tags", "label_names": None}
SETTINGS = {"label_all_tokens": True, "max_seq_length": 12}


@pytest.fixture
def prepare(conll_file: Path, tokenizer: Tokenizer) -> Callable[..., PreparedData]:
    """Prepares a file with other settings than these where they are given."""

    def prepare(path: Path = conll_file, **changes: Any) -> PreparedData:
        columns = {name: changes.pop(name, value) for name, value in COLUMNS.items()}
        reading = Reading(**{name: changes.pop(name, value) for name, value in SETTINGS.items()})
        max_samples = changes.pop("max_samples", None)
        label_set = changes.pop("label_set", None)
        return prepare_file(
            path,
            changes.pop("tokenizer", tokenizer),
            label_set,
            name="train",
            columns=columns,
            reading=reading,
            max_samples=max_samples,
        )

    return prepare


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def is_mapped(prepared: PreparedData) -> bool:
    return not prepared.dataset.labels.flags.writeable


def assert_same(left: PreparedData, right: PreparedData) -> None:
    assert (left.summary, left.warnings) == (right.summary, right.warnings)
    assert_same_data(left.dataset, right.dataset)


def test_a_second_time_is_the_same_without_reading(
    prepare: Callable[..., PreparedData],
    conll_file: Path,
    cache_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", "bertner")
    conll_file.write_text(conll_file.read_text() + "\na B-X\nb I-Y\n")
    first = prepare()
    assert not is_mapped(first)
    (entry,) = entries(cache_folder)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2, "tags that do not fit, sentences that were cut"
    caplog.clear()

    def no_reading(*_: object, **__: object) -> None:
        raise AssertionError("the file is read again")

    monkeypatch.setattr(data_cache, "open_file", no_reading)
    second = prepare()
    assert is_mapped(second)
    assert_same(second, first)
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"train: prepared before, from the cache at {entry}", *warnings]
    assert type(second.dataset.labels) is np.ndarray
    # The same file elsewhere, and by another name, is the same data from another source.
    caplog.clear()
    moved = conll_file.rename(conll_file.with_name("moved.conll"))
    third = prepare(moved)
    assert third.summary == dataclasses.replace(first.summary, source=str(moved))
    assert third.dataset.source == str(moved)
    expected = [text.replace(str(conll_file), str(moved)) for text in warnings]
    assert [record.getMessage() for record in caplog.records][1:] == expected
    assert entries(cache_folder) == [entry]


def other_tokenizer(tmp_path: Path) -> Tokenizer:
    vocab = [*CASED_VOCAB, "bank"]
    (tmp_path / "other").mkdir(exist_ok=True)
    (tmp_path / "other" / "vocab.txt").write_text("\n".join(vocab) + "\n")
    return Tokenizer.from_pretrained(tmp_path / "other", BertConfig(vocab_size=len(vocab)))


def rewrite(path: Path, content: str) -> dict[str, Any]:
    path.write_text(content)
    return {}


@pytest.mark.parametrize(
    "change",
    [
        lambda path, folder: {"label_all_tokens": False},
        lambda path, folder: {"max_seq_length": 13},
        lambda path, folder: {"max_samples": 23},
        lambda path, folder: {"max_samples": 24},
        lambda path, folder: {"text_column": "words"},
        lambda path, folder: {"label_column": "tags"},
        lambda path, folder: {"label_names": ["O", "B-X"]},
        lambda path, folder: {"tokenizer": other_tokenizer(folder)},
        lambda path, folder: {
            "label_set": LabelSet(("O", *(f"{p}-{t}" for t in ("PER", "ORG", "LOC") for p in "BI")))
        },
        lambda path, folder: rewrite(path, path.read_text() + "\n"),
        lambda path, folder: rewrite(path, path.read_text().replace("the O", "tho O")),
    ],
)
def test_all_that_matters_is_in_the_key(
    prepare: Callable[..., PreparedData],
    cache_folder: Path,
    conll_file: Path,
    tmp_path: Path,
    change: Callable[[Path, Path], dict[str, Any]],
) -> None:
    prepare()
    changes = change(conll_file, tmp_path)
    assert not is_mapped(prepare(**changes))
    assert len(entries(cache_folder)) == 2
    assert is_mapped(prepare(**changes))


@pytest.mark.parametrize("name", ["_FORMAT", "__version__"])
def test_another_release_prepares_anew(
    prepare: Callable[..., PreparedData], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    prepare()
    monkeypatch.setattr(data_cache, name, "another")
    assert not is_mapped(prepare())


def test_the_format_of_a_file_is_in_the_key(
    prepare: Callable[..., PreparedData], tmp_path: Path
) -> None:
    """Columns that happen to be JSON lines too are not the same data as JSON."""
    path = tmp_path / "a.txt"
    path.write_text('{"tokens": ["a"], "ner_tags": ["B-X"], "id": B-1\n')
    prepare(path)
    with pytest.raises(DataError, match="not JSON"):
        prepare(path.rename(path.with_suffix(".jsonl")))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], object]] = [
    flip_a_bit,
    replace_by_a_folder,
    Path.unlink,
    lambda path: path.write_bytes(path.read_bytes()[:-1]),
    lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    lambda path: path.write_bytes(path.read_bytes()[:50]),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\xff\xfe garbage"),
    lambda path: path.write_text("[]"),
    lambda path: path.write_text('{"sha256": "", "content": {}}'),
    lambda path: path.write_text('{"content": []}'),
    lambda path: path.write_text("[" * 100_000),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_again(
    prepare: Callable[..., PreparedData], cache_folder: Path, damage: Callable[[Path], object]
) -> None:
    first = prepare()
    (entry,) = entries(cache_folder)
    assert len(entries(entry)) == 1 + len(ARRAYS)
    for path in entries(entry):
        damage(path)
        again = prepare()
        assert not is_mapped(again), path.name
        assert_same(again, first)
        assert is_mapped(prepare()), path.name
        assert entries(cache_folder) == [entry]


def test_any_flipped_bit_is_noticed(
    prepare: Callable[..., PreparedData], cache_folder: Path
) -> None:
    first = prepare()
    (entry,) = entries(cache_folder)
    rng = random.Random(0)
    for _ in range(60):
        path = rng.choice(entries(entry))
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        # White space in the JSON means nothing, and may change.
        assert_same(prepare(), first)


def test_what_is_no_entry_gives_way(
    prepare: Callable[..., PreparedData], cache_folder: Path
) -> None:
    first = prepare()
    (entry,) = entries(cache_folder)
    shutil.rmtree(entry)
    entry.write_text("a file")
    assert_same(prepare(), first)
    assert is_mapped(prepare())
    # The entry of other settings, put in this one's place.
    prepare(max_seq_length=13)
    (other,) = set(entries(cache_folder)) - {entry}
    shutil.rmtree(entry)
    shutil.copytree(other, entry)
    assert_same(prepare(), first)


def test_a_cache_deleted_during_use(
    prepare: Callable[..., PreparedData], cache_folder: Path
) -> None:
    first, second = prepare(), prepare()
    assert is_mapped(second)
    shutil.rmtree(cache_folder)
    assert_same(second, first)
    rows = list(range(len(second.dataset)))
    ours, theirs = (collate(each.dataset, rows, torch.device("cpu")) for each in (first, second))
    assert torch.equal(ours.input_ids, theirs.input_ids)
    assert torch.equal(ours.labels, theirs.labels)
    with pytest.raises(ValueError, match="read-only"):
        second.dataset.labels[0] = 0
    assert_same(prepare(), first)
    assert is_mapped(prepare())


def test_a_cache_that_cannot_be_written(
    prepare: Callable[..., PreparedData],
    cache_folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = prepare(max_seq_length=128)
    assert not caplog.records
    (tmp_path / "file").write_text("")
    shutil.rmtree(cache_folder)
    monkeypatch.setenv("BERTNER_CACHE", str(tmp_path / "file" / "cache"))
    assert_same(prepare(max_seq_length=128), first)
    (record,) = caplog.records
    assert "prepared data not kept for the next run: " in record.getMessage()
    caplog.clear()

    monkeypatch.setenv("BERTNER_CACHE", str(cache_folder))

    def full_disk(path: Path, array: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full_disk)
    assert_same(prepare(max_seq_length=128), first)
    (record,) = caplog.records
    assert "No space left on device" in record.getMessage()
    assert entries(cache_folder) == []


def test_where_the_cache_is(
    tmp_path: Path,
    prepare: Callable[..., PreparedData],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("BERTNER_CACHE", str(tmp_path / "named"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("BERTNER_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "bertner"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / "home" / ".cache" / "bertner"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "bertner"

    def homeless(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache_folder() is None
    assert not is_mapped(prepare(max_seq_length=128))
    (record,) = caplog.records
    assert "set BERTNER_CACHE" in record.getMessage()


def test_another_process_that_is_quicker(
    prepare: Callable[..., PreparedData],
    cache_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = prepare(max_seq_length=128)
    (entry,) = entries(cache_folder)
    others = shutil.copytree(entry, cache_folder.with_name("others"))
    shutil.rmtree(entry)
    rename = Path.rename

    def rename_too_late(path: Path, target: Path) -> Path:
        shutil.copytree(others, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_too_late)
    assert_same(prepare(max_seq_length=128), first)
    assert not caplog.records
    assert entries(cache_folder) == [entry]
    assert is_mapped(prepare(max_seq_length=128))


def test_processes_that_prepare_the_same_at_once(
    prepare: Callable[..., PreparedData], cache_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    path = write_conll(tmp_path / "larger.txt", 3000)
    code = (
        "import json, sys; from pathlib import Path\n"
        "from bertner.config import BertConfig, Reading; from bertner.tokenizer import Tokenizer\n"
        "from bertner.data_cache import prepare_file\n"
        "folder, path, columns, settings = sys.argv[1:]\n"
        "config = BertConfig.from_dict(json.loads((Path(folder) / 'config.json').read_text()))\n"
        "tokenizer = Tokenizer.from_pretrained(folder, config)\n"
        "options = {'columns': json.loads(columns), 'reading': Reading(**json.loads(settings))}\n"
        "options |= {'name': 'train', 'max_samples': None}\n"
        "for _ in range(3):\n"
        "    found = prepare_file(path, tokenizer, None, **options)\n"
        "    print(found.summary.num_words, int(found.dataset.labels.sum(dtype=int)))\n"
    )
    arguments = [str(model_folder), str(path), json.dumps(COLUMNS), json.dumps(SETTINGS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    expected = prepare(path)
    line = f"{expected.summary.num_words} {expected.dataset.labels.sum(dtype=int)}\n"
    for output, errors in outputs:
        assert output == line * 3
        assert "Traceback" not in errors
        assert "not kept" not in errors
    assert is_mapped(expected)
    assert len(entries(cache_folder)) == 1


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    prepare: Callable[..., PreparedData],
    cache_folder: Path,
    conll_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    open_file = data_cache.open_file

    def open_changed(path: Path, **columns: Any) -> object:
        path.write_text("Paris B-LOC\n")
        return open_file(path, **columns)

    monkeypatch.setattr(data_cache, "open_file", open_changed)
    assert prepare().summary.num_words == 1
    assert entries(cache_folder) == []


def test_runs_with_and_without_the_cache_are_the_same(
    model_folder: Path,
    tmp_path: Path,
    cache_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [write_conll(tmp_path / f"{k}.txt", 24, seed=k) for k in range(3)]
    arguments = [
        *["--model", str(model_folder), "--train_file", str(files[0]), "--max_steps", "5"],
        *["--validation_file", str(files[1]), "--test_file", str(files[2]), "--disable_tqdm"],
    ]
    results = []
    for name, flags in (("no", ["--no-data-cache"]), ("new", []), ("old", [])):
        out = tmp_path / name
        assert train_main([*arguments, *flags, "--output_dir", str(out)]) == 0
        errors = capsys.readouterr().err
        for split in ("train", "validation", "test"):
            assert (f"{split}: prepared before, from the cache at" in errors) == (name == "old")
        assert len(entries(cache_folder)) == (0 if name == "no" else 3)
        scores = json.loads((out / "all_results.json").read_text())
        record = json.loads((out / "run.json").read_text())
        times = ("runtime", "per_second")
        same = {key: value for key, value in scores.items() if not key.endswith(times)}
        results.append((same, record["data"], (out / "model.safetensors").read_bytes()))
    assert results[0] == results[1] == results[2]
