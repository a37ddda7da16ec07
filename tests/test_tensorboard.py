"""What TensorBoard shows of a run is what `metrics.jsonl` says, once for each step."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bertner.cli import train_main
from bertner.errors import CheckpointError, StorageError
from bertner.report import RunReport
from bertner.tensorboard import EventFile, list_event_files
from tests.runs import TOTAL_STEPS, outcome, write_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

REPORT = ["--report_to", "tensorboard"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    arguments = write_inputs(folder)
    (folder / "arguments.json").write_text(json.dumps(arguments))
    assert train_main([*arguments, "--output_dir", str(folder / "plain")]) == 0
    return folder


@pytest.fixture
def arguments(inputs: Path, out: Path) -> list[str]:
    return [*json.loads((inputs / "arguments.json").read_text()), "--output_dir", str(out)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def board(output_dir: Path) -> EventAccumulator:
    """A board on a run, as TensorBoard keeps one; it reads on at `Reload`."""
    return EventAccumulator(str(output_dir / "runs"))


def shown(accumulator: EventAccumulator) -> Counter[tuple[str, int, float, float]]:
    """Name, step, time and value of every point on a board."""
    accumulator.Reload()
    return Counter(
        (tag, point.step, point.wall_time, point.value)
        for tag in accumulator.Tags()["scalars"]
        for point in accumulator.Scalars(tag)
    )


def logged(output_dir: Path) -> Counter[tuple[str, int, float, float]]:
    """The same of `metrics.jsonl`; TensorBoard's numbers are float32."""
    points: Counter[tuple[str, int, float, float]] = Counter()
    for line in (output_dir / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        names: dict[str, str] = {}
        if event["event"] == "log":
            for name in ("loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second"):
                names[f"train/{name}"] = name
        for kind, split in (("eval", "eval"), ("end", "test")):
            if event["event"] == kind:
                of_split = [name for name in event if name.startswith(f"{split}_")]
                numbers = [name for name in of_split if isinstance(event[name], float)]
                names.update({name.replace("_", "/", 1): name for name in numbers})
        for tag, name in names.items():
            points[tag, event["step"], event["time"], float(np.float32(event[name]))] += 1
    return points


def test_the_board_has_the_numbers_of_the_log(
    inputs: Path, arguments: list[str], out: Path
) -> None:
    assert train_main([*arguments, *REPORT]) == 0
    points = shown(board(out))
    assert points == logged(out)
    assert set(points.values()) == {1}
    steps: dict[str, list[int]] = {}
    for tag, step, _, _ in sorted(points):
        steps.setdefault(tag, []).append(step)
    assert steps["train/loss"] == list(range(2, TOTAL_STEPS + 1, 2))
    assert steps["train/learning_rate"] == steps["train/epoch"] == steps["train/loss"]
    assert steps["eval/f1"] == steps["eval/word_f1"] == [4, 8, 12, 16, 18]
    assert steps["test/word_f1"] == [TOTAL_STEPS]
    # To look is not to touch.
    assert outcome(out) == outcome(inputs / "plain")


def kill_after(step: int, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """Runs until a step is logged, and leaves all as it is then, as a kill does."""
    stepped = RunReport.stepped

    def patched(self: RunReport, report: Any) -> None:
        stepped(self, report)
        if report.step == step:
            raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(RunReport, "stepped", patched)
        with pytest.raises(ZeroDivisionError):
            train_main(arguments)


def test_carried_on_after_kills_each_step_is_there_once(
    inputs: Path, arguments: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged steps come after the last save; one board is looked at throughout."""
    open_board = board(out)
    for last in (11, 17):
        kill_after(last, monkeypatch, [*arguments, *REPORT])
        before = shown(open_board)
        assert before == logged(out)
        assert max(step for tag, step, _, _ in before if tag == "train/loss") == last - 1
    assert train_main([*arguments, *REPORT]) == 0
    assert shown(board(out)) == shown(open_board) == logged(out)
    assert outcome(out) == outcome(inputs / "plain")
    empty = [path for path in list_event_files(out) if not path.stat().st_size]
    assert len(list_event_files(out)) == len(empty) + 1 == 2


def test_a_run_may_be_watched_from_the_middle_on(
    inputs: Path, arguments: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_after(11, monkeypatch, arguments)
    assert not (out / "runs").exists()
    kill_after(14, monkeypatch, [*arguments, *REPORT])
    assert shown(board(out)) == logged(out)
    assert train_main(arguments) == 0
    assert outcome(out) == outcome(inputs / "plain")


def test_a_run_that_is_replaced_takes_its_board_along(arguments: list[str], out: Path) -> None:
    short = [*arguments, "--max_steps", "2"]
    assert train_main([*short, *REPORT]) == 0
    assert list_event_files(out)
    assert train_main([*short, "--seed", "1", "--overwrite_output_dir"]) == 0
    assert not (out / "runs").exists()
    assert train_main([*short, *REPORT, "--overwrite_output_dir"]) == 0
    theirs = out / "runs" / "events.out.tfevents.1700000000.host.1.0"
    theirs.touch()
    assert train_main([*short, "--overwrite_output_dir"]) == 0
    assert list((out / "runs").iterdir()) == [theirs]


def test_each_seed_has_its_own(arguments: list[str], out: Path) -> None:
    assert train_main([*arguments, "--max_steps", "2", "--seeds", "2", *REPORT]) == 0
    for seed in (42, 43):
        assert shown(board(out / f"seed-{seed}")) == logged(out / f"seed-{seed}")
    assert not (out / "runs").exists()


def test_without_tensorboard_nothing_is_begun(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if name == "tensorboard" else find_spec(name, package),
    )
    missing = ["--model", "no/such", "--train_file", "no-such.txt", "--output_dir", str(out)]
    for seeds in ("1", "2"):
        assert train_main([*missing, *REPORT, "--seeds", seeds]) == 2
        assert capsys.readouterr().err == (
            "bertner-train: report_to tensorboard needs TensorBoard: pip install "
            "'bertner[tensorboard]'\n"
        )
    assert not out.exists()


def test_a_disk_that_fails(
    arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out.mkdir()
    (out / "runs").touch()
    assert train_main([*arguments, *REPORT]) == 74
    assert "runs: cannot be made" in capsys.readouterr().err
    (out / "runs").unlink()

    file = EventFile(out, b"")
    file.close()
    with file.path.open("rb") as only_to_read:
        file.writer._writer = only_to_read
        with pytest.raises(StorageError, match=r"bertner: cannot be written: "):
            file.add(b'{"event": "log", "time": 1.0, "step": 2, "loss": 0.5}')


@pytest.mark.parametrize(
    "line",
    [
        b"no JSON",
        b"[]",
        b"{}",
        b'{"event": ["log"], "time": 1.0, "step": 2, "loss": 0.5}',
        b'{"event": "log", "time": "now", "step": 2, "loss": 0.5}',
        b'{"event": "log", "time": 1.0, "loss": 0.5}',
        b'{"event": "log", "time": 1.0, "step": 2.5, "loss": 0.5}',
        b'{"event": "log", "time": 1.0, "step": 9223372036854775808, "loss": 0.5}',
        b'{"event": "log", "time": 1.0, "step": 2, "loss": 1' + b"0" * 400 + b"}",
        b'{"event": "log", "time": 1.0, "step": 2, "\\ud800": 0.5}',
    ],
)
def test_a_line_that_is_none(out: Path, line: bytes) -> None:
    """In a checkpoint from elsewhere."""
    with pytest.raises(CheckpointError, match="a line of its log is none"):
        EventFile(out, b'{"event": "start", "time": 1.0}\n' + line)
