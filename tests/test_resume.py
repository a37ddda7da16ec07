"""An interrupted run goes on with the same command, and ends in the same bits."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bertner import checkpoint, evaluation, kernels, loop, parts, progress, record, run
from bertner.checkpoint import list_checkpoints, load_checkpoint
from bertner.cli import train_main
from bertner.loop import dropout_seed
from bertner.model import token_loss
from bertner.optimizer import gradient_norm, named_state
from bertner.stopping import SIGNALS
from tests.conftest import MINILM, SHARED_DATA, needs_conll, needs_minilm, write_model_folder
from tests.runs import (
    TOTAL_STEPS,
    Runner,
    outcome,
    send_once,
    sha256,
    without_clocks,
    write_inputs,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "arguments.json").write_text(json.dumps(write_inputs(folder)))
    return folder


@pytest.fixture
def arguments(inputs: Path, tmp_path: Path) -> list[str]:
    shared: list[str] = json.loads((inputs / "arguments.json").read_text())
    return [*shared, "--output_dir", str(tmp_path / "out")]


@pytest.fixture(scope="module")
def unbroken(inputs: Path) -> dict[str, Any]:
    """What comes of the run if nothing happens to it."""
    shared = json.loads((inputs / "arguments.json").read_text())
    assert train_main([*shared, "--output_dir", str(inputs / "unbroken")]) == 0
    return outcome(inputs / "unbroken")


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as runner:
        yield runner


def run_with_kills(
    runner: Runner, arguments: list[str], output_dir: Path, num_kills: int, code: str = ""
) -> list[dict[str, Any]]:
    """Starts runs, kills them at random moments and starts them again, until enough were killed.

    Returns:
        What came of each run.
    """
    rng = random.Random(7)
    status, seconds = runner.run([*arguments, "--output_dir", str(output_dir / "timed")], code=code)
    assert status == 0
    outcomes = [outcome(output_dir / "timed")]
    killed = 0
    while killed < num_kills:
        out = output_dir / f"run-{len(outcomes)}"
        command = [*arguments, "--output_dir", str(out)]
        while killed < num_kills:
            status, _ = runner.run(command, rng.uniform(0.0, seconds), code)
            killed += status != 0
            assert status in (0, -signal.SIGKILL)
            if status == 0:
                break
        assert runner.run(command, code=code)[0] == 0
        outcomes.append(outcome(out))
    return outcomes


@pytest.mark.parametrize("num_kills", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_in_the_same_bits(
    inputs: Path, tmp_path: Path, runner: Runner, num_kills: int
) -> None:
    shared = json.loads((inputs / "arguments.json").read_text())
    whole, *others = run_with_kills(runner, shared, tmp_path, num_kills)
    assert [event["event"] for event in whole["metrics"]].count("save") >= 6
    for other in others:
        assert other == whole


# What a resume has to get right, left out: see that the test above would notice.
NO_SEED = "bertner.kernels.seed_dropout = lambda seed, device: None"
NEXT_STEP = """
steps = bertner.loop.Schedule.steps_from
bertner.loop.Schedule.steps_from = lambda self, first: steps(self, first + (first > 0))
"""
FRESH_AVERAGES = "bertner.progress.load_named_state = lambda *args: None"


@pytest.mark.parametrize("code", [NO_SEED, NEXT_STEP, FRESH_AVERAGES])
def test_a_resume_that_forgets_something_is_noticed(
    inputs: Path, tmp_path: Path, runner: Runner, code: str
) -> None:
    shared = json.loads((inputs / "arguments.json").read_text())
    whole = [*shared, "--output_dir", str(tmp_path / "whole")]
    broken = [*shared, "--output_dir", str(tmp_path / "broken")]
    assert runner.run(whole, code=code)[0] == 0
    stop = "import os, signal, bertner.report\n" + stop_at("stepped", 8)
    assert runner.run(broken, code=code + "\n" + stop)[0] == 75
    assert runner.run(broken, code=code)[0] == 0
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "broken")
    assert found["last weights"] != expected["last weights"]


def stop_at(method: str, number: int) -> str:
    """Code that sends the process a signal when the watcher is called for the n-th time."""
    return f"""
before = bertner.report.RunReport.{method}
calls = [0]
def patched(self, *args):
    calls[0] += 1
    if calls[0] == {number}:
        os.kill(os.getpid(), signal.SIGTERM)
    return before(self, *args)
bertner.report.RunReport.{method} = patched
"""


MOMENTS: dict[str, tuple[object, str, int]] = {
    "first batch": (loop, "dropout_seed", 1),
    "training": (loop, "dropout_seed", 14),
    "last step": (loop, "dropout_seed", 2 * TOTAL_STEPS - 1),
    "evaluation": (evaluation, "packed_by_length", 2),
    "evaluation before a save": (evaluation, "packed_by_length", 3),
    "last evaluation": (evaluation, "packed_by_length", 5),
    "saving": (checkpoint, "_write_manifest", 2),
    "last save": (checkpoint, "_write_manifest", 6),
    "final evaluation": (evaluation, "packed_by_length", 6),
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *[(moment, signal.SIGTERM) for moment in MOMENTS],
        ("training", signal.SIGINT),
        ("evaluation", signal.SIGUSR1),
    ],
)
def test_stopped_by_a_signal_it_ends_in_the_same_bits(
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    number: signal.Signals,
) -> None:
    out = tmp_path / "out"
    before = [signal.getsignal(each) for each in SIGNALS]
    with monkeypatch.context() as patch:
        module, name, call = MOMENTS[moment]
        send_once(patch, module, name, number, call)
        assert train_main(arguments) == 75
    assert [signal.getsignal(each) for each in SIGNALS] == before
    message = capsys.readouterr().err.splitlines()[-2:]
    assert message[0].startswith(f"bertner-train: stopped by {number.name} after step ")
    assert message[0].endswith("is saved and verified")
    assert message[1].startswith("Carry on with: ")
    assert message[1].endswith(f"--output_dir {out}")
    step = int(message[0].split("after step ")[1].split(";")[0])
    assert load_checkpoint(out / f"checkpoint-{step}").step == step
    assert step <= len(list_checkpoints(out)) * TOTAL_STEPS
    assert train_main(arguments) == 0
    assert outcome(out) == unbroken


OTHER_WAYS = {
    "padded rows": ["--no-packing"],
    "bfloat16": ["--dtype", "bfloat16"],
    "no regular saves": ["--save_strategy", "no"],
    "no saves, last weights kept": ["--save_strategy", "no", "--load_best_model_at_end", "false"],
    "no evaluation": ["--eval_strategy", "no", "--load_best_model_at_end", "false"],
    "another loss": ["--class_weights", "sqrt", "--label_smoothing_factor", "0.1"],
    "embeddings frozen": ["--freeze_embeddings"],
    "part of an epoch": ["--max_steps", "16", "--save_strategy", "epoch"],
}


@pytest.mark.parametrize("extra", OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_stopped_twice_in_other_ways_of_training(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: list[str]
) -> None:
    whole, broken = ([*arguments, *extra, "--output_dir", str(tmp_path / x)] for x in ("a", "b"))
    assert train_main(whole) == 0
    for call in (9, 6):
        with monkeypatch.context() as patch:
            send_once(patch, loop, "dropout_seed", signal.SIGTERM, call)
            assert train_main(broken) == 75
    assert train_main(broken) == 0
    # Where nothing is saved regularly, the stops have left a checkpoint.
    tops = [sha256(tmp_path / x / "model.safetensors") for x in ("a", "b")]
    assert tops[0] == tops[1]
    logs = [(tmp_path / x / "metrics.jsonl").read_text().splitlines() for x in ("a", "b")]
    events = [[without_clocks(json.loads(line)) for line in log] for log in logs]
    assert events[0] == events[1]


def test_a_run_that_stops_early(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the fourth evaluation, of step 16, where no save is due otherwise."""
    early = ["--early_stopping_patience", "3", "--early_stopping_threshold", "1"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train_main([*arguments, *early, "--output_dir", str(whole)]) == 0
    told = (
        "stopped early after step 16 of 18 planned; evaluations in a row that did not improve on "
        "the best f1 by more than 1: 3"
    )
    errors = capsys.readouterr().err
    assert errors.count(told) == 1
    assert "the last weights are kept" not in errors
    card = (whole / "README.md").read_text()
    assert f"- {told}\n" in card
    assert "linear decay to zero at step 18, 0 warmup steps" in card
    assert "epochs: 5.33333, steps: 16" in card
    expected = outcome(whole)
    assert expected["results"]["step"] == 16
    assert expected["last checkpoint"] == "checkpoint-16"
    assert "finished" in json.loads((whole / "run.json").read_text())
    assert train_main(["--verify", str(whole)]) == 0

    for module, name, call in [
        (loop, "dropout_seed", 14),  # in step 7
        (evaluation, "packed_by_length", 2),  # in the evaluation of step 12
        (checkpoint, "_write_manifest", 2),  # in the save of step 16
        (evaluation, "packed_by_length", 2),  # in the scoring of the test data
    ]:
        with monkeypatch.context() as patch:
            send_once(patch, module, name, signal.SIGTERM, call)
            assert train_main([*arguments, *early]) == 75
    capsys.readouterr()
    assert train_main([*arguments, *early]) == 0
    errors = capsys.readouterr().err
    assert "carrying on after step 16 of 18" in errors
    assert told in errors
    assert outcome(out) == expected

    named = ["--resume_from_checkpoint", str(out / "checkpoint-16")]
    other = tmp_path / "other"
    assert train_main([*arguments, *early, *named, "--output_dir", str(other)]) == 0
    assert outcome(other)["weights"] == expected["weights"]
    assert outcome(other)["results"] == expected["results"]
    # With more patience it is another run.
    more = ["--early_stopping_patience", "4", "--output_dir", str(tmp_path / "more"), *named]
    capsys.readouterr()
    assert train_main([*arguments, *early, *more]) == 78
    assert "early_stopping_patience 3 -> 4" in capsys.readouterr().err
    assert train_main([*arguments, *early, *more, "--allow_inexact_resume"]) == 0
    assert outcome(tmp_path / "more")["results"]["step"] == 18


def test_stopping_early_makes_the_evaluations_part_of_the_run(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    last = ["--load_best_model_at_end", "false"]
    patient = [*arguments, *last, "--early_stopping_patience", "9"]
    stop_after(monkeypatch, patient)
    errors = capsys.readouterr().err
    assert "the last weights are kept; --load_best_model_at_end keeps the best" in errors
    assert train_main([*patient, "--eval_steps", "5"]) == 78
    assert "eval_steps 4 -> 5" in capsys.readouterr().err
    assert train_main([*arguments, *last, "--eval_steps", "5"]) == 78
    errors = capsys.readouterr().err
    assert "eval_steps 4 -> 5; " in errors
    assert "early_stopping_patience 9 -> none" in errors
    assert train_main(patient) == 0


def test_a_stop_while_the_test_data_are_scored_when_nothing_was_saved(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra = ["--save_strategy", "no", "--load_best_model_at_end", "false"]
    send_once(monkeypatch, evaluation, "packed_by_length", signal.SIGTERM, 6)
    assert train_main([*arguments, *extra]) == 75
    assert [step for step, _ in list_checkpoints(tmp_path / "out")] == [TOTAL_STEPS]
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert train_main([*arguments, *extra]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def start_command(arguments: list[str], before: str = "") -> subprocess.Popen[str]:
    code = f"{before}\nimport sys; from bertner.cli import train_main; sys.exit(train_main())"
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.01)


# Takes so long over every step that there is time to see what happens meanwhile.
SLOWLY = """
import time, bertner.loop
before = bertner.loop.dropout_seed
def slowly(*args):
    time.sleep(0.3)
    return before(*args)
bertner.loop.dropout_seed = slowly
"""


def test_a_second_signal_ends_it_at_once(arguments: list[str], tmp_path: Path) -> None:
    before = SLOWLY.replace("0.3", "30")
    with start_command(arguments, before) as process:
        wait_for(tmp_path / "out" / "metrics.jsonl")
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, "the first one waits for the end of the step"
        process.send_signal(signal.SIGTERM)
        # At once: as soon as the operation under way returns; here a sleep, which goes on.
        assert process.wait(60) == -signal.SIGTERM
    assert not list_checkpoints(tmp_path / "out")


def test_two_writers(
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with start_command(arguments, SLOWLY) as first:
        wait_for(out / "checkpoint-3")
        for extra in ([], ["--overwrite_output_dir"]):
            assert train_main([*arguments, *extra]) == 73
            assert f"in use by process {first.pid} on " in capsys.readouterr().err
        first.kill()
        assert first.wait(30) == -signal.SIGKILL
    assert (out / ".lock").exists(), "a killed process cannot remove it"
    assert train_main(arguments) == 0
    assert outcome(out) == unbroken
    assert not (out / ".lock").exists()


@pytest.mark.parametrize(
    "watching",
    [
        ["--logging_steps", "1", "--eval_steps", "1", "--save_steps", "1"],
        ["--logging_steps", "7", "--eval_strategy", "epoch", "--save_strategy", "epoch"],
        ["--logging_steps", "500", "--eval_strategy", "no", "--save_steps", "100"],
        ["--eval_steps", "5", "--eval_batch_tokens", "50", "--save_steps", "2"],
    ],
)
def test_watching_changes_nothing(
    arguments: list[str], tmp_path: Path, unbroken: dict[str, Any], watching: list[str]
) -> None:
    assert train_main([*arguments, "--load_best_model_at_end", "false", *watching]) == 0
    found = outcome(tmp_path / "out")
    for what in ("last weights", "optimizer"):
        assert found[what] == unbroken[what]


def stop_after(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], num_micro_batches: int = 13
) -> None:
    """Leaves a run stopped after step 7, with checkpoints of 4, the best, 6 and 7 or so."""
    with monkeypatch.context() as patch:
        send_once(patch, loop, "dropout_seed", signal.SIGTERM, num_micro_batches)
        assert train_main(arguments) == 75


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--learning_rate", "4e-3"], ["learning_rate 0.005 -> 0.004"]),
        (["--per_device_train_batch_size", "8"], ["per_device_train_batch_size 4 -> 8"]),
        (["--seed", "43"], ["seed 42 -> 43", "first weights SHA-256"]),
        (["--max_steps", "20"], ["max_steps -1 -> 20"]),
        (["--class_weights", "sqrt"], ["class_weights none -> sqrt"]),
        (["--metric_for_best_model", "loss"], ["metric_for_best_model f1 -> loss"]),
        (["--no-label_all_tokens"], ["label_all_tokens True -> False"]),
        ("train data", ["train data SHA-256"]),
        ("test data", ["test data SHA-256"]),
        ("labels", ["train data SHA-256", "labels O,B-LOC,I-LOC,B-ORG,I-ORG,B-PER,I-PER -> "]),
        ("base model", ["first weights SHA-256"]),
        ("tokenizer", ["tokenizer SHA-256"]),
        ("threads", ["threads 1 -> 2"]),
        ("torch", [f"torch {torch.__version__} -> 2.99.0"]),
        ("processor", ["processor "]),
    ],
)
def test_what_would_be_another_run_is_listed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    change: list[str] | str,
    told: list[str],
) -> None:
    out = tmp_path / "out"
    arguments = [*write_inputs(tmp_path), "--output_dir", str(out)]
    stop_after(monkeypatch, arguments)
    kept = sorted(path.name for path in out.iterdir())
    if isinstance(change, list):
        arguments += change
    elif change.endswith(" data"):
        path = tmp_path / f"{change.split()[0]}.txt"
        path.write_text(path.read_text() + "\nthe O\n")
    elif change == "labels":
        path = tmp_path / "train.txt"
        path.write_text(path.read_text() + "\nthe B-NEW\n")
    elif change == "base model":
        write_model_folder(tmp_path / "tiny-bert", initializer_range=0.03)
    elif change == "tokenizer":
        (tmp_path / "tiny-bert" / "tokenizer_config.json").write_text(
            json.dumps({"model_max_length": 100})
        )
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    elif change == "torch":
        monkeypatch.setattr(torch, "__version__", "2.99.0")
    elif change == "processor":
        monkeypatch.setattr(record, "processor_name", lambda: "another one")
    capsys.readouterr()
    assert train_main(arguments) == 78
    message = capsys.readouterr().err
    for text in told:
        assert text in message
    assert "--allow_inexact_resume" in message
    assert sorted(path.name for path in out.iterdir()) == kept, "nothing is lost"
    code = train_main([*arguments, "--allow_inexact_resume"])
    if change == "labels":
        assert code == 78, "a head of another shape cannot be carried on"
        assert "weights of another model: classifier.bias" in capsys.readouterr().err
        return
    assert code == 0
    resumes = json.loads((out / "run.json").read_text())["resumes"]
    assert [resume["step"] for resume in resumes] == [7]
    assert told[0] in "; ".join(resumes[0]["differences"])
    newest = list_checkpoints(out)[-1][1]
    assert load_checkpoint(newest).state["run"]["resumes"] == resumes, "recorded for good"
    assert f"carried on after step 7 with differences: {told[0]}" in (out / "README.md").read_text()


def test_what_makes_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unbroken: dict[str, Any]
) -> None:
    """Data that lie elsewhere, and other intervals of logging and saving."""
    arguments = [*write_inputs(tmp_path), "--output_dir", str(tmp_path / "out")]
    stop_after(monkeypatch, arguments)
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("train.txt", "validation.txt", "test.txt", "tiny-bert"):
        (tmp_path / name).rename(moved / name)
    text = json.dumps(arguments)
    for name in ("train.txt", "validation.txt", "test.txt", "tiny-bert"):
        text = text.replace(str(tmp_path / name), str(moved / name))
    watching = ["--logging_steps", "3", "--save_steps", "5", "--save_total_limit", "5"]
    assert train_main([*json.loads(text), *watching]) == 0
    found = outcome(tmp_path / "out")
    assert found["last weights"] == unbroken["last weights"]
    assert found["optimizer"] == unbroken["optimizer"]
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["resumes"][0]["differences"] == []


def damage(folder: Path, name: str = "optimizer.safetensors") -> None:
    content = bytearray((folder / name).read_bytes())
    content[-9] ^= 4
    (folder / name).write_bytes(content)


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_after(monkeypatch, arguments)
    out = tmp_path / "out"
    damage(out / "checkpoint-7")
    named = ["--resume_from_checkpoint", str(out / "checkpoint-7")]
    assert train_main([*arguments, *named]) == 76
    assert "optimizer.safetensors is not as it was written" in capsys.readouterr().err
    assert train_main(arguments) == 0
    errors = capsys.readouterr().err
    assert "checkpoint-7: damaged: optimizer.safetensors is not as it was written" in errors
    assert "going back to checkpoint-6: 1 steps are lost" in errors
    assert outcome(out) == unbroken


def test_no_checkpoint_can_be_loaded(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_after(monkeypatch, arguments)
    for _, folder in list_checkpoints(tmp_path / "out"):
        damage(folder, "training_state.json")
    assert train_main(arguments) == 76
    assert "--overwrite_output_dir" in capsys.readouterr().err.splitlines()[-1]
    nowhere = ["--resume_from_checkpoint", str(tmp_path / "checkpoint-5")]
    assert train_main([*arguments, *nowhere]) == 76
    assert "checkpoint-5: damaged: checkpoint-5 is missing" in capsys.readouterr().err
    assert train_main([*arguments, "--overwrite_output_dir"]) == 0


def test_back_to_an_earlier_checkpoint_and_into_another_folder(
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop_after(monkeypatch, arguments, 31)
    out = tmp_path / "out"
    first = list_checkpoints(out)[0][0]
    named = ["--resume_from_checkpoint", str(out / f"checkpoint-{first}")]
    other = ["--output_dir", str(tmp_path / "other")]
    assert train_main([*arguments, *named, *other]) == 0
    assert outcome(tmp_path / "other") == unbroken
    assert train_main([*arguments, *named, *other]) == 73, "that one holds a run of its own now"
    capsys.readouterr()
    with monkeypatch.context() as patch:
        send_once(patch, loop, "dropout_seed", signal.SIGTERM, 1)
        assert train_main([*arguments, *named]) == 75
    errors = capsys.readouterr().err
    assert "is removed: the run went back" in errors
    assert "--resume_from_checkpoint" not in errors, "the next start takes the newest"
    assert list_checkpoints(out)[-1][0] == first + 1
    assert train_main(arguments) == 0
    assert outcome(out) == unbroken


def test_the_best_of_before_is_there_at_the_end(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    still = [*arguments, "--learning_rate", "0"]  # so that the first to be scored is the best
    stop_after(monkeypatch, still)
    out, other = tmp_path / "out", tmp_path / "other"
    named = ["--resume_from_checkpoint", str(out / "checkpoint-7"), "--output_dir", str(other)]
    assert train_main([*still, *named]) == 0
    assert "step 4" in (other / "README.md").read_text()
    for name in ("model.safetensors", "optimizer.safetensors", "manifest.json"):
        assert sha256(other / "checkpoint-4" / name) == sha256(out / "checkpoint-4" / name)
    damage(out / "checkpoint-4")
    capsys.readouterr()
    assert train_main(still) == 76, "told now, and not after hours"
    message = capsys.readouterr().err
    assert "checkpoint-4: damaged" in message
    assert "the best so far" in message
    without = ["--load_best_model_at_end", "false", "--allow_inexact_resume"]
    assert train_main([*still, *without]) == 0


def test_a_stop_at_the_step_of_an_abandoned_checkpoint(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After going back with another rate, what was saved at this step before is not this run's."""
    stop_after(monkeypatch, arguments)
    out = tmp_path / "out"
    steps = [step for step, _ in list_checkpoints(out)]
    assert steps[-2:] == [6, 7]
    abandoned = sha256(out / "checkpoint-7" / "model.safetensors")
    back = ["--resume_from_checkpoint", str(out / "checkpoint-6"), "--learning_rate", "1e-3"]
    stop_after(monkeypatch, [*arguments, *back, "--allow_inexact_resume"], 1)
    assert [step for step, _ in list_checkpoints(out)][-1] == 7
    assert sha256(out / "checkpoint-7" / "model.safetensors") != abandoned
    assert train_main([*arguments, "--learning_rate", "1e-3"]) == 0


def test_the_same_command_after_the_end_does_nothing(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(arguments) == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    capsys.readouterr()
    assert train_main(arguments) == 0
    assert "it is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert train_main([*arguments, "--seed", "1"]) == 73
    assert "is finished (seed 42 -> 1" in capsys.readouterr().err


def test_killed_while_the_results_are_written(
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(BaseException):
        pass

    def kill(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(run, "model_card", kill)
        with pytest.raises(Killed):
            train_main(arguments)
    out = tmp_path / "out"
    assert not (out / "README.md").exists()
    assert train_main(arguments) == 0
    assert outcome(out) == unbroken
    assert (out / "README.md").exists()


def test_overwriting_replaces_other_runs_but_not_itself(
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    overwrite = [*arguments, "--overwrite_output_dir"]
    stop_after(monkeypatch, [*arguments, "--seed", "1"])
    stop_after(monkeypatch, overwrite)
    assert "carrying on" not in capsys.readouterr().err, "it replaced the other seed's"
    assert train_main(overwrite) == 0
    assert "carrying on after step 7 of 18" in capsys.readouterr().err
    assert outcome(tmp_path / "out") == unbroken
    stop_after(monkeypatch, overwrite, 9)
    assert "carrying on" not in capsys.readouterr().err, "the run was finished"
    stop_after(monkeypatch, [*overwrite, "--seed", "1"])
    assert "carrying on" not in capsys.readouterr().err, "another run, begun by overwriting too"
    monkeypatch.setattr(record, "processor_name", lambda: "another one")
    assert train_main([*overwrite, "--seed", "1"]) == 78, "not replaced for a change of machine"


@pytest.mark.parametrize("content", [None, "{", '{"versions": 1}'])
def test_without_its_record_a_run_goes_by_its_checkpoints(
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
) -> None:
    stop_after(monkeypatch, arguments)
    path = tmp_path / "out" / "run.json"
    path.unlink() if content is None else path.write_text(content)
    assert train_main(arguments) == 0
    assert outcome(tmp_path / "out") == unbroken


def test_a_run_without_a_checkpoint_begins_again(
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "token_loss", fail)
        assert train_main(arguments) == 130
    assert train_main([*arguments, "--seed", "1"]) == 78
    assert train_main(arguments) == 0
    assert "had no checkpoint yet: it begins again" in capsys.readouterr().err
    assert outcome(tmp_path / "out") == unbroken


def test_the_way_of_multiplying_is_kept(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_chosen", {})
    first = kernels.Products("default", False, "measured")
    monkeypatch.setattr(kernels, "_measure_products", lambda *args: first)
    stop_after(monkeypatch, [*arguments, "--dtype", "bfloat16"])
    monkeypatch.setattr(kernels, "_chosen", {})
    second = kernels.Products("default", True, "measured otherwise")
    monkeypatch.setattr(kernels, "_measure_products", lambda *args: second)
    capsys.readouterr()
    stop_after(monkeypatch, [*arguments, "--dtype", "bfloat16"], 5)
    assert "matrix products: default (as this run began)" in capsys.readouterr().err
    kept = json.loads((tmp_path / "out" / "run.json").read_text())["products"]
    assert kept["emulates_bfloat16"] is False


def test_verify(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert train_main(arguments) == 0
    out = tmp_path / "out"
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert train_main(["--verify", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{out}/checkpoint-18: sound" in printed
    assert "The 3 steps from checkpoint-15 to checkpoint-18: same bits." in printed
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before, "it only reads"
    assert train_main(["--verify", str(out), "--seed", "1"]) == 2
    assert train_main(["--verify", str(tmp_path)]) == 76

    # Steps that come out otherwise.
    with monkeypatch.context() as patch:
        patch.setattr(loop, "dropout_seed", lambda *args: 1)
        assert train_main(["--verify", str(out)]) == 78
    assert "come out otherwise: " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(record, "processor_name", lambda: "another one")
        assert train_main(["--verify", str(out)]) == 78
    assert "cannot be done again exactly: processor " in capsys.readouterr().err

    damage(out / "checkpoint-15")
    assert train_main(["--verify", str(out)]) == 76
    assert capsys.readouterr().err.endswith("damaged: checkpoint-15\n")


@pytest.mark.parametrize("where", ["loss", "gradient", "weight", "average"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_kept(
    arguments: list[str],
    tmp_path: Path,
    unbroken: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    value: float,
) -> None:
    """At step 8; a weight or average that no step meets again is found when it is to be saved."""
    out, models = tmp_path / "out", []
    build = parts.build_parts

    def build_and_keep(*args: Any) -> parts.Parts:
        built = build(*args)
        models.append(built.model)
        return built

    spoil_after = {"loss": 15, "gradient": 15, "weight": 16, "average": 16}[where]
    seen, states = [], []

    def seed(*args: int) -> int:
        seen.append(args)
        states.append({name: t.clone() for name, t in models[-1].state_dict().items()})
        if len(seen) == spoil_after and where == "weight":
            # A word that the data do not have.
            models[-1].bert.embeddings.word_embeddings.weight.data[-1, 0] = value
        return dropout_seed(*args)

    def spoiled_loss(*args: Any) -> torch.Tensor:
        loss = token_loss(*args)
        return loss * value if len(seen) == spoil_after and where == "loss" else loss

    def spoiled_norm(parameters: list[torch.Tensor]) -> torch.Tensor:
        if len(seen) >= spoil_after and where == "gradient":
            parameters[-1].grad[0] = value  # type: ignore[index]
        return gradient_norm(parameters)

    def spoiled_state(optimizer: Any, model: Any) -> dict[str, torch.Tensor]:
        state = named_state(optimizer, model)
        if len(seen) >= spoil_after and where == "average":
            state["classifier.bias.exp_avg_sq"][0] = value
        return state

    with monkeypatch.context() as patch:
        patch.setattr(run, "build_parts", build_and_keep)
        patch.setattr(loop, "dropout_seed", seed)
        patch.setattr(loop, "token_loss", spoiled_loss)
        patch.setattr(loop, "gradient_norm", spoiled_norm)
        patch.setattr(progress, "named_state", spoiled_state)
        assert train_main(arguments) == 70
    errors = capsys.readouterr().err
    if where in ("loss", "gradient"):
        assert "step 8: loss " in errors
        assert "The step was not taken" in errors
        # The first micro-batch of step 8 saw the weights of step 7, and so does who comes after.
        for name, tensor in models[-1].state_dict().items():
            assert torch.equal(tensor, states[14][name])
    else:
        assert "is infinite or NaN, and not saved" in errors
    newest = list_checkpoints(out)[-1]
    assert newest[0] == 6
    for name, tensor in load_checkpoint(newest[1]).weights.items():
        assert tensor.isfinite().all(), name
    assert train_main(arguments) == 0
    assert outcome(out) == unbroken


@needs_minilm
@needs_conll
@pytest.mark.slow
def test_minilm_on_conll_killed_five_times(tmp_path: Path) -> None:
    """With as many threads as there are, which the others leave out."""
    data = SHARED_DATA / "conll2003"
    arguments = [
        *["--model", MINILM, "--train_file", str(data / "train.txt"), "--max_steps", "60"],
        *["--validation_file", str(data / "valid.txt"), "--max_eval_samples", "200"],
        *["--gradient_accumulation_steps", "2", "--logging_steps", "10", "--disable_tqdm"],
        *["--eval_strategy", "steps", "--eval_steps", "20", "--learning_rate", "5e-5"],
        *["--save_strategy", "steps", "--save_steps", "6", "--save_total_limit", "2"],
    ]
    with Runner(os.cpu_count() or 1) as runner:
        whole, *others = run_with_kills(runner, arguments, tmp_path, 5)
    assert others
    for other in others:
        assert other == whole
