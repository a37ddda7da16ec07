"""A checkpoint is whole or not there: whatever fails, and whenever the process or machine stops."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bertner import files
from bertner.checkpoint import (
    CHECKPOINT_FILES,
    MANIFEST,
    METRICS,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    remove_leftovers,
    save_checkpoint,
    write_state,
)
from bertner.cli import train_main
from bertner.errors import CheckpointError, StorageError
from bertner.files import make_folder, write_json
from bertner.model import BertForNER
from bertner.tokenizer import Tokenizer
from tests.conftest import write_conll, write_model_folder

# --- Checkpoints that say which one they are ------------------------------------------------------

NEW = 0.5  # what is added to the step to tell a checkpoint from an earlier one of the same step


class Saver:
    """Saves checkpoints as a run does; all that can differ in them is made of one number."""

    def __init__(self, model_folder: Path) -> None:
        self.model = BertForNER.from_pretrained(model_folder)
        self.tokenizer = Tokenizer.from_pretrained(model_folder, self.model.config)

    def save(self, output_dir: Path, step: int, number: float, **options: Any) -> Path:
        def write(folder: Path) -> None:
            self.model.save_pretrained(folder)
            self.tokenizer.save(folder)
            write_state(folder, {"number": number}, optimizer, _metrics(number))

        with torch.no_grad():
            for weight in self.model.parameters():
                weight.fill_(number)
        weights = self.model.state_dict()
        names = [name for name in weights if name.startswith("classifier.")]  # they will do
        optimizer = {f"{k}.{name}": weights[name] for name in names for k in ("m", "v")}
        return save_checkpoint(output_dir, step, write, **options)


def _metrics(number: float) -> bytes:
    return f"{number}\n".encode() * 40


@pytest.fixture(scope="module")
def saver(tmp_path_factory: pytest.TempPathFactory) -> Saver:
    shape = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    folder = tmp_path_factory.mktemp("saver")
    return Saver(write_model_folder(folder, num_attention_heads=2, **shape))


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where thousands of checkpoints are made: in memory, where that is known to be."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def number_of(checkpoint: Checkpoint) -> float:
    """The number that a checkpoint was made of; never a mix of two."""
    number: float = checkpoint.state["number"]
    assert int(number) == checkpoint.step
    assert checkpoint.metrics == _metrics(number)
    for tensors in (checkpoint.weights, checkpoint.optimizer):
        content = tensors.path.read_bytes()
        values = np.frombuffer(content[8 + int.from_bytes(content[:8], "little") :], np.float32)
        assert len(values)
        assert (values == number).all()
    return number


def numbers_in(output_dir: Path) -> list[float]:
    """Of the checkpoints that are there, oldest first: each is whole, the newest is found."""
    folders = [folder for _, folder in list_checkpoints(output_dir)]
    newest = load_newest(output_dir)
    if newest is None:
        assert not folders
        return []
    assert newest.folder == folders[-1]
    return [number_of(each) for each in (*map(load_checkpoint, folders[:-1]), newest)]


def leftovers(output_dir: Path) -> list[str]:
    return sorted(p.name for p in output_dir.iterdir() if not p.name.startswith("checkpoint-"))


# --- A save, and what may be there when it does not come to its end -------------------------------


@dataclass(frozen=True)
class Scene:
    """A save of step 6 by a run that has checkpoints; `states` are in the order of time."""

    before: list[int]
    keep: int | None
    states: list[list[float]]

    def prepare(self, saver: Saver, output_dir: Path) -> None:
        make_folder(output_dir)
        for step in self.before:
            saver.save(output_dir, step, step)

    def save(self, saver: Saver, output_dir: Path) -> None:
        saver.save(output_dir, 6, 6 + NEW, keep=self.keep)


SCENES = {
    "all are kept": Scene([3], None, [[3], [3, 6.5]]),
    "one is kept": Scene([3], 1, [[3], [3, 6.5], [6.5]]),
    # The run went back to step 3 and comes to step 6 again.
    "a step again": Scene([3, 6, 9], 1, [[3, 6, 9], [3, 9], [3, 6.5, 9], [6.5, 9], [6.5]]),
}


@pytest.fixture(params=SCENES.values(), ids=SCENES)
def scene(request: pytest.FixtureRequest) -> Scene:
    chosen: Scene = request.param
    return chosen


class OtherOs:
    """Takes the place of `os` in `bertner.files`; what concerns the disk goes through `touch`."""

    TOUCHING = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return partial(self.touch, name, real) if name in self.TOUCHING else real

    def touch(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        raise NotImplementedError

    def __enter__(self) -> OtherOs:
        files.os = self  # type: ignore[assignment]
        return self

    def __exit__(self, *error: object) -> None:
        files.os = os


# --- 1. Every operation can be the last, or fail --------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


HALF = "half"  # of what is to be written is written
# What becomes of an operation: an error, HALF or None. It is told by how many operations it comes
# after one that was chosen, and its name.
Fault = Callable[[int, str], BaseException | str | None]


class FailingOs(OtherOs):
    """Counts the operations that change the disk, and lets some of them fail."""

    def __init__(self, fault: Fault = lambda *_: None, at: int = 0) -> None:
        self.fault = fault
        self.at = at
        self.operations: list[str] = []
        self.written: set[int] = set()

    def touch(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        if name == "open" and not args[1] & os.O_CREAT:
            return real(*args)
        if name == "close":
            real(*args)  # also of a process that ends, also if it fails
            if args[0] not in self.written:
                return None
            self.written.remove(args[0])
        fault = self.fault(len(self.operations) - self.at, name)
        self.operations.append(name)
        if isinstance(fault, BaseException):
            raise fault
        if name in ("fsync", "close"):
            return None  # really to bring it to the disk would only take time here
        if fault == HALF and name == "write":
            args = (args[0], args[1][: len(args[1]) // 2])
        result = real(*args)
        if name == "open":
            self.written.add(result)
        return result


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


KILLS: dict[str, Fault] = {
    "killed": lambda k, _: Killed() if k >= 0 else None,
    "killed within a write": lambda k, _: HALF if k == 0 else Killed() if k > 0 else None,
}
ERRORS: dict[str, Fault] = {
    "full": lambda k, _: error(errno.ENOSPC) if k == 0 else None,
    "full within a write": lambda k, _: [HALF, error(errno.ENOSPC)][k] if k in (0, 1) else None,
    "fails": lambda k, _: error(errno.EIO) if k == 0 else None,
    # As Linux does with a disk that fails.
    "fails, then read-only": lambda k, name: (
        error(errno.EIO) if k == 0 else error(errno.EROFS) if k > 0 and name != "close" else None
    ),
}
SHORT_WRITES: dict[str, Fault] = {
    "one": lambda k, _: HALF if k == 0 else None,
    "every second": lambda k, _: HALF if k % 2 == 0 else None,
}


@dataclass(frozen=True)
class Trial:
    """A save that is tried in many copies of one folder."""

    scene: Scene
    saver: Saver
    folder: Path

    def begin(self) -> Path:
        """A folder that is as before the save."""
        copy = self.folder / "trial"
        shutil.rmtree(copy, ignore_errors=True)
        # Links to the same files will do: none is ever changed, they are only removed.
        return Path(shutil.copytree(self.folder / "before", copy, copy_function=os.link))

    def save(self) -> None:
        self.scene.save(self.saver, self.folder / "trial")

    def points(self, kind: str, every: int = 1) -> list[int]:
        """Numbers of the operations to be tried: all, or all writes if that is the kind.

        Scenes differ only in the end, when the new checkpoint has come to the disk; what comes
        before is tried in one of them.
        """
        output_dir = self.begin()
        with FailingOs() as system:
            self.save()
        assert numbers_in(output_dir) == self.scene.states[-1]
        assert not leftovers(output_dir)
        names = system.operations
        assert set(names) >= {"open", "write", "fsync", "close", "mkdir", "rename"}
        end = len(names) - names[::-1].index("open") - 1  # the manifest's
        first = 0 if self.scene is SCENES["one is kept"] else end
        return [
            n for n in range(first, len(names), every) if "write" not in kind or names[n] == "write"
        ]


@pytest.fixture
def trial(scene: Scene, saver: Saver, folder: Path) -> Trial:
    scene.prepare(saver, folder / "before")
    return Trial(scene, saver, folder)


@pytest.mark.parametrize("kind", KILLS)
def test_killed_at_any_operation(trial: Trial, kind: str) -> None:
    seen = []
    for n in trial.points(kind):
        output_dir = trial.begin()
        with FailingOs(KILLS[kind], n), pytest.raises(Killed):
            trial.save()
        seen.append(numbers_in(output_dir))
        remove_leftovers(output_dir)  # as the next start does
        assert not leftovers(output_dir)
        assert [step for step, _ in list_checkpoints(output_dir)] == [int(n) for n in seen[-1]]
    # One after the other, and none is left out.
    states = [now for now, before in zip(seen, [None, *seen], strict=False) if now != before]
    assert states == (trial.scene.states if kind == "killed" else trial.scene.states[:1])


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_is_gone(trial: Trial, every: int) -> None:
    """The same with processes that really end, without anything of ours being run any more."""
    for n in trial.points("any", every):
        output_dir = trial.begin()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads
            pid = os.fork()
        if pid == 0:
            try:
                with FailingOs(lambda k, _: os._exit(9) if k == 0 else None, n):
                    trial.save()
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        found = numbers_in(output_dir)
        assert found in trial.scene.states
        remove_leftovers(output_dir)
        assert not leftovers(output_dir)


@pytest.mark.parametrize("kind", ERRORS)
def test_any_operation_fails(trial: Trial, kind: str) -> None:
    reason = os.strerror(errno.ENOSPC if "full" in kind else errno.EIO)
    for n in trial.points(kind):
        output_dir = trial.begin()
        with FailingOs(ERRORS[kind], n), pytest.raises(StorageError, match=reason) as caught:
            trial.save()
        assert str(caught.value).startswith(f"{output_dir}/")
        assert caught.value.exit_code == 74
        assert numbers_in(output_dir) in trial.scene.states
        if "read-only" not in kind:  # there nothing can be removed either
            assert all(name.startswith(".removed-") for name in leftovers(output_dir))
        trial.saver.save(output_dir, 6, 6 + NEW / 2, keep=1)
        assert numbers_in(output_dir) == [6 + NEW / 2]
        remove_leftovers(output_dir)
        assert not leftovers(output_dir)


@pytest.mark.parametrize("kind", SHORT_WRITES)
def test_a_short_write_is_carried_on(trial: Trial, kind: str) -> None:
    for n in trial.points("write") if kind == "one" else [0, 1]:
        output_dir = trial.begin()
        with FailingOs(SHORT_WRITES[kind], n):
            trial.save()
        assert numbers_in(output_dir) == trial.scene.states[-1]


@pytest.mark.parametrize("kind", ERRORS)
def test_any_operation_fails_while_a_file_is_replaced(folder: Path, kind: str) -> None:
    path = folder / "run.json"
    reason = os.strerror(errno.ENOSPC if "full" in kind else errno.EIO)
    for n in [1] if "write" in kind else range(5):  # open, write, fsync, close, rename
        write_json(path, {"finished": False})
        with FailingOs(ERRORS[kind], n), pytest.raises(StorageError, match=f"{path}: .*{reason}"):
            write_json(path, {"finished": True})
        assert json.loads(path.read_bytes()) == {"finished": False}
        if "read-only" not in kind:
            assert leftovers(folder) == ["run.json"]


# --- 2. The power goes off ------------------------------------------------------------------------

Tree = dict[str, Any]  # names and what they are of: bytes, or another such


@dataclass(eq=False)
class Node:
    """A file or folder: what of it has come to the disk, and what was done since."""

    names: dict[str, Node] | None = None  # of a folder
    changes: list[dict[str, Node | None]] = field(default_factory=list)
    data: bytes = b""  # of a file
    written: bytes = b""

    def now(self) -> dict[str, Node]:
        """The names as a running system shows them."""
        return self.after(self.changes)

    def after(self, changes: Iterable[dict[str, Node | None]]) -> dict[str, Node]:
        names: dict[str, Node | None] = dict(self.names or {})
        for change in changes:
            names.update(change)
        return {name: node for name, node in names.items() if node is not None}

    def sync(self) -> None:
        if self.names is not None:
            self.names, self.changes = self.now(), []
        self.data = self.written

    def tree(self, names_that_came: Callable, data_that_came: Callable) -> Any:
        if self.names is None:
            return self.data if self.data == self.written else data_that_came(self)
        return {
            name: node.tree(names_that_came, data_that_came)
            for name, node in self.after(names_that_came(self.changes)).items()
        }


class PowerLoss(OtherOs):
    """Does what is asked for, and collects the disks that could be found if the power went off.

    What is taken for granted, and no more than that:

    - What was there at first is on the disk.
    - What is written to a file is on the disk when fsync of that file has returned. Before, the
      file may be found as it was then, or with zeros in place of what was written since, or with a
      part of it, or with all.
    - A change of a folder (a name made, renamed or removed) is on the disk when fsync of that
      folder has returned: not that of the file, nor that of another folder. Before, each may or may
      not be found, also a later one without an earlier one. A change is found entirely or not at
      all: no rename leaves both names or none.
    - What is on the disk stays as it is.

    Args:
        root: The folder that is looked at.
        draws: How many random choices of changes are tried after every operation.
    """

    def __init__(self, root: Path, draws: int) -> None:
        self.root = root
        self.top = _node_of(root)
        self.opened: dict[int, Node] = {}
        self.rng = random.Random(1)
        self.draws = draws
        self.num_operations = 0
        self.disks: list[Tree] = []
        self.collect()

    def touch(self, name: str, real: Callable[..., Any], *args: Any) -> Any:
        result = None if name == "fsync" else real(*args)
        if name == "open":
            path, flags = args[:2]
            if flags & os.O_CREAT:
                assert flags & os.O_EXCL, "a file that is there is never changed"
                self.change({path: Node()})
            self.opened[result] = self.find(path)
        elif name == "write":
            self.opened[args[0]].written += bytes(args[1][:result])
        elif name == "fsync":
            self.opened[args[0]].sync()
        elif name == "mkdir":
            self.change({args[0]: Node(names={})})
        elif name == "rename":
            self.change({args[0]: None, args[1]: self.find(args[0])})
        elif name in ("unlink", "rmdir"):
            self.change({args[0]: None})
        if name != "close" and not (name == "open" and not args[1] & os.O_CREAT):
            self.num_operations += 1
            self.collect()
        return result

    def find(self, path: Path) -> Node:
        node = self.top
        for name in path.relative_to(self.root).parts:
            node = node.now()[name]
        return node

    def change(self, nodes: dict[Path, Node | None]) -> None:
        (parent,) = {path.parent for path in nodes}
        self.find(parent).changes.append({path.name: node for path, node in nodes.items()})

    def collect(self) -> None:
        def first_ones(changes: list) -> list:
            return changes[: self.rng.randint(0, len(changes))]

        def any_ones(changes: list) -> list:
            return [change for change in changes if self.rng.random() < 0.5]

        data = [
            lambda file: file.data,
            lambda file: file.data.ljust(len(file.written), b"\0"),
            lambda file: file.written[: self.rng.randint(0, len(file.written))],
            lambda file: file.written,
        ]
        for names in [lambda _: [], list, *[first_ones, any_ones] * self.draws]:
            self.disks += [self.top.tree(names, each) for each in data]


def _node_of(path: Path) -> Node:
    if path.is_dir():
        return Node(names={child.name: _node_of(child) for child in path.iterdir()})
    return Node(data=path.read_bytes(), written=path.read_bytes())


def _write_tree(path: Path, tree: Tree | bytes) -> None:
    if isinstance(tree, bytes):
        path.write_bytes(tree)
    else:
        path.mkdir()
        for name, child in tree.items():
            _write_tree(path / name, child)


def _key(tree: Tree | bytes) -> Any:
    if isinstance(tree, bytes):
        return tree
    return tuple(sorted((name, _key(child)) for name, child in tree.items()))


def numbers_on(tree: Tree, folder: Path, seen: dict[Any, list[float]]) -> list[float]:
    """`numbers_in` for a disk; those in which the same checkpoints are found are read only once."""
    found = {name: child for name, child in tree.items() if name.startswith("checkpoint-")}
    key = _key(found)
    if key not in seen:
        disk = Path(tempfile.mkdtemp(dir=folder)) / "disk"
        _write_tree(disk, found)
        seen[key] = numbers_in(disk)
    return seen[key]


@pytest.mark.parametrize("draws", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_power_loss_at_any_operation(trial: Trial, folder: Path, draws: int) -> None:
    output_dir = trial.begin()
    with PowerLoss(output_dir, draws) as power:
        trial.save()
        during, power.disks = power.disks, []
        power.collect()
    assert power.num_operations > 70
    seen: dict[Any, list[float]] = {}
    for disk in during:
        assert numbers_on(disk, folder, seen) in trial.scene.states
    for disk in power.disks:
        assert numbers_on(disk, folder, seen) == trial.scene.states[-1], "a save that is done lasts"
    assert sorted(set(map(tuple, seen.values()))) == sorted(map(tuple, trial.scene.states))
    # What else is found on them is no hindrance.
    for disk in power.rng.sample(during, 20):
        _write_tree(folder / "found", disk)
        remove_leftovers(folder / "found")
        assert not leftovers(folder / "found")
        trial.saver.save(folder / "found", 9, 9 + NEW, keep=1)
        assert numbers_in(folder / "found") == [9 + NEW]
        shutil.rmtree(folder / "found")


def test_power_loss_after_the_first_save(saver: Saver, folder: Path) -> None:
    """Also the name of the run's folder must be on the disk, and of those above that were made."""
    with PowerLoss(folder, 4) as power:
        make_folder(folder / "runs" / "out")
        saver.save(folder / "runs" / "out", 6, 6 + NEW)
        power.disks = []
        power.collect()
    for disk in power.disks:
        assert numbers_on(disk["runs"]["out"], folder, {}) == [6 + NEW]


def test_power_loss_while_a_file_is_replaced(folder: Path) -> None:
    path = folder / "run.json"
    write_json(path, {"finished": False})
    before = path.read_bytes()
    with PowerLoss(folder, 20) as power:
        write_json(path, {"finished": True})
        during, power.disks = power.disks, []
        power.collect()
    assert {disk["run.json"] for disk in during} == {before, path.read_bytes()}
    assert {disk["run.json"] for disk in power.disks} == {path.read_bytes()}
    assert power.num_operations == 5, "open, write, fsync, rename, fsync of the folder"


# --- 3. The disk is full --------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Gives a disk the size that is asked for."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here; that needs root")

    def resize(size: str) -> Path:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(path)], check=True)
        return path

    try:
        yield resize
    finally:
        # Lazily: checkpoints that were carried on from may still be mapped.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_becomes_full(
    model_folder: Path,
    tmp_path: Path,
    small_disk: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    foreseen: bool,
) -> None:
    output_dir = small_disk("6m" if foreseen else "2m") / "out"
    arguments = [
        *["--model", str(model_folder), "--train_file", str(write_conll(tmp_path / "train.txt"))],
        *["--num_train_epochs", "12", "--disable_tqdm", "--output_dir", str(output_dir)],
    ]
    with monkeypatch.context() as patch:
        if not foreseen:
            patch.setattr(files, "free_bytes", lambda folder: 1 << 40)
        assert train_main(arguments) == 74
    last_line = capsys.readouterr().err.splitlines()[-1]
    saved = [step for step, _ in list_checkpoints(output_dir)]
    assert 1 < len(saved) < 12
    if foreseen:
        needs = rf"checkpoint-{saved[-1] + 3} needs \d\.\d MB, but only \d\.\d MB are free there"
        assert re.search(f"{re.escape(str(output_dir))}: {needs}; make room", last_line)
    else:
        assert str(output_dir) in last_line
        assert "No space left on device" in last_line
    assert not list(output_dir.glob(".*"))
    for _, checkpoint in list_checkpoints(output_dir):
        load_checkpoint(checkpoint)
    small_disk("60m")
    assert train_main(arguments) == 0
    assert f"carrying on after step {saved[-1]} of 36" in capsys.readouterr().err
    assert [step for step, _ in list_checkpoints(output_dir)] == [*range(3, 37, 3)]


# --- 4. Corruption is seen ------------------------------------------------------------------------


@pytest.fixture
def two(saver: Saver, folder: Path) -> Path:
    """A folder with checkpoints of the steps 3 and 6."""
    for step in (3, 6):
        saver.save(folder, step, step)
    return folder


def swap(path: Path, folder: Path) -> None:
    path.write_bytes((folder / "checkpoint-3" / path.name).read_bytes())


def link(path: Path, folder: Path) -> None:
    path.rename(folder / "copy")
    path.symlink_to(folder / "copy")


def make_a_folder_of(path: Path, folder: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "truncated": lambda path, _: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path, _: path.write_bytes(b""),
    "deleted": lambda path, _: path.unlink(),
    "a byte more": lambda path, _: path.write_bytes(path.read_bytes() + b" "),
    "of another checkpoint": swap,
    "a link to a copy": link,
    "a folder": make_a_folder_of,
}
DIFFERENT = [WEIGHTS, OPTIMIZER, STATE, METRICS, MANIFEST]  # in any two checkpoints of a run


@pytest.mark.parametrize(
    ("damage", "name"),
    [
        pytest.param(damage, name, id=f"{name} {kind}")
        for kind, damage in DAMAGE.items()
        for name in (DIFFERENT if damage is swap else [*CHECKPOINT_FILES, MANIFEST])
    ],
)
def test_damage_is_seen_and_costs_steps(
    two: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path, Path], Any], name: str
) -> None:
    newest = two / "checkpoint-6"
    damage(newest / name, two)
    with pytest.raises(CheckpointError, match=f"{newest}: damaged: .*{name}") as caught:
        load_checkpoint(newest)
    assert caught.value.exit_code == 76
    found = load_newest(two)
    assert found is not None
    assert number_of(found) == 3
    assert [record.getMessage() for record in caplog.records] == [
        str(caught.value),
        "going back to checkpoint-3: 3 steps are lost",
    ]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


@pytest.mark.parametrize("name", [*CHECKPOINT_FILES, MANIFEST])
def test_any_bit_counts(two: Path, name: str) -> None:
    path = two / "checkpoint-6" / name
    whole = path.read_bytes()
    bits = random.Random(name).sample(range(8 * len(whole)), 200)
    for number, bit in enumerate(bits):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"checkpoint-6: damaged: .*{name}"):
            load_checkpoint(path.parent)
        if number % 40 == 0:
            found = load_newest(two)
            assert found is not None
            assert number_of(found) == 3
    path.write_bytes(whole)
    assert numbers_in(two) == [3, 6]


def test_all_are_damaged(two: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _, checkpoint in list_checkpoints(two):
        (checkpoint / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="all 2 are damaged"):
        load_newest(two)
    named = ["--resume_from_checkpoint", str(two / "checkpoint-6")]
    arguments = ["--model", str(model_folder), "--output_dir", str(two)]
    assert train_main([*arguments, *named]) == 76
    assert f"{two}/checkpoint-6: damaged: {WEIGHTS} is missing\n" in capsys.readouterr().err


def test_checkpoints_under_each_other_s_name(two: Path) -> None:
    (two / "checkpoint-3").rename(two / "other")
    (two / "checkpoint-6").rename(two / "checkpoint-3")
    (two / "other").rename(two / "checkpoint-6")
    for step, was in [(3, 6), (6, 3)]:
        with pytest.raises(CheckpointError, match=f"-{step}: damaged: .* is that of step {was}"):
            load_checkpoint(two / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match="all 2 are damaged"):
        load_newest(two)


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise error(errno.EACCES)

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        for name in ("listdir", "scandir"):
            patch.setattr(os, name, refuse)
        load_newest(two)


# --- 5. What is kept ------------------------------------------------------------------------------


def stays(there: set[int], step: int, keep: int | None, best: int | None) -> set[int]:
    """What is to be there after a save of `step`, beside what was there before."""

    def is_kept(old: int) -> bool:
        num_newer = sum(old < other <= step for other in there | {step})
        return old <= step and (keep is None or num_newer < keep or old == best)

    return {old for old in there | {step} if is_kept(old)}


def found_in(output_dir: Path) -> dict[int, float | None]:
    """Numbers of the checkpoints by step; None for those that are damaged."""
    found: dict[int, float | None] = {}
    for step, checkpoint in list_checkpoints(output_dir):
        try:
            found[step] = number_of(load_checkpoint(checkpoint))
        except CheckpointError:
            found[step] = None
    return found


def train_badly(saver: Saver, output_dir: Path, rng: random.Random, num_events: int) -> list[str]:
    """A run to which all sorts of things happen; returns what."""
    keep = rng.choice([1, 1, 2, 3, None])
    happened = []
    there: dict[int, float | None] = {}  # as it must be
    step = 0  # where the run stands: at a checkpoint that is whole, once there is one
    best: int | None = None
    for event in range(num_events):
        whole = [old for old, number in there.items() if number is not None]
        chance = rng.random()
        if chance < 0.7 or not whole:
            new = step + rng.randint(1, 2)
            if rng.random() < 0.3:
                best = new
            number = new + (event + 1) / 1024
            # Anywhere, or where folders are renamed and removed, or after the end of the save.
            kill = rng.choice([rng.randrange(100), rng.randrange(70, 120), 1000, 1000])
            try:
                with FailingOs(KILLS["killed"], kill):
                    saver.save(output_dir, new, number, keep=keep, best_step=best)
                happened.append("saved")
                kept = stays(set(there), new, keep, best)
                there = {old: {**there, new: number}[old] for old in kept}
                assert found_in(output_dir) == there
                assert not leftovers(output_dir)
                step = new
            except Killed:
                happened.append("killed")
                remove_leftovers(output_dir)
                found = found_in(output_dir)
                for old in found:
                    assert found[old] in ([there.get(old), number] if old == new else [there[old]])
                there = found
                newest = load_newest(output_dir) if whole else None
                assert newest is not None or not whole
                assert newest is None or newest.step >= step, "never older than the one before"
                step = newest.step if newest else max(found, default=0)
        elif chance < 0.85 and len(whole) > 1:
            happened.append("damaged")
            victim = rng.choice(whole)
            path = output_dir / f"checkpoint-{victim}" / rng.choice(CHECKPOINT_FILES)
            path.write_bytes(path.read_bytes() + b"!")
            there[victim] = None
            newest = load_newest(output_dir)
            assert newest is not None
            assert newest.step == max(set(whole) - {victim})
            step = newest.step
        else:
            happened.append("went back")
            step = rng.choice(whole)
        if best is not None and (best > step or there.get(best) is None):
            best = None
    return happened


@pytest.mark.parametrize("num_runs", [8, pytest.param(150, marks=pytest.mark.slow)])
def test_what_is_kept(saver: Saver, folder: Path, num_runs: int) -> None:
    happened: Counter[str] = Counter()
    for seed in range(num_runs):
        output_dir = folder / str(seed)
        make_folder(output_dir)
        happened.update(train_badly(saver, output_dir, random.Random(seed), 30))
    assert sorted(happened) == ["damaged", "killed", "saved", "went back"]
    assert min(happened.values()) > num_runs
