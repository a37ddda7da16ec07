"""One recipe with several seeds: N ordinary runs, their mean, and the best of them at the top."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import ModelCard

from bertner import loop, parts, run, seeds
from bertner.checkpoint import list_checkpoints
from bertner.cli import train_main
from bertner.output_dir import RUN_FILES
from tests.runs import TOTAL_STEPS, Runner, outcome, send_once, sha256, write_inputs

SEEDS = (42, 43, 44)
FOLDERS = [f"seed-{seed}" for seed in SEEDS]
CALLS = 2 * TOTAL_STEPS  # of `loop.dropout_seed` in one seed's run
SHORT = ["--max_steps", "2", "--seeds", "2"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "arguments.json").write_text(json.dumps(write_inputs(folder)))
    assert train_main([*shared(folder), "--seeds", "3", "--output_dir", str(folder / "whole")]) == 0
    return folder


def shared(inputs: Path) -> list[str]:
    arguments: list[str] = json.loads((inputs / "arguments.json").read_text())
    return arguments


@pytest.fixture
def whole(inputs: Path) -> Path:
    """What comes of three seeds if nothing happens to them; only to be read."""
    return inputs / "whole"


@pytest.fixture
def arguments(inputs: Path, tmp_path: Path) -> list[str]:
    return [*shared(inputs), "--output_dir", str(tmp_path / "out")]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def results_of(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return results


def state_of(folder: Path) -> dict[Path, int]:
    """By which one sees that nothing in a folder was touched."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def outcomes(folder: Path) -> dict[str, Any]:
    """What several seeds leave, as far as it does not tell the time."""
    kept = results_of(folder)["seeds"]
    return {
        "weights": sha256(folder / "model.safetensors"),
        "seeds": kept,
        **{f"seed-{run['seed']}": outcome(folder / f"seed-{run['seed']}") for run in kept["runs"]},
    }


def test_a_seed_of_several_is_the_run_that_it_would_be_alone(
    whole: Path, arguments: list[str], out: Path
) -> None:
    for seed in SEEDS:
        alone = str(out / str(seed))
        assert train_main([*arguments, "--seed", str(seed), "--output_dir", alone]) == 0
        assert outcome(out / str(seed)) == outcome(whole / f"seed-{seed}")
    assert len({sha256(whole / name / "model.safetensors") for name in FOLDERS}) == 3


def test_the_top_is_the_best_seed_with_the_scores_of_all(whole: Path) -> None:
    files = {path.name for path in whole.iterdir()}
    assert files == {*RUN_FILES, *FOLDERS} - {"report.html"}  # which these runs leave out
    runs = {seed: results_of(whole / f"seed-{seed}") for seed in SEEDS}
    best = max(SEEDS, key=lambda seed: runs[seed]["eval_f1"])
    assert best != 42, "the test needs a best that is not the first"
    assert runs[best]["eval_f1"] > sorted(run["eval_f1"] for run in runs.values())[1]

    calibration = (whole / f"seed-{best}" / "calibration.json").read_bytes()
    assert (whole / "calibration.json").read_bytes() == calibration
    results = results_of(whole)
    summary = results.pop("seeds")
    assert results == runs[best]
    assert (summary["best_seed"], summary["best_by"]) == (best, "eval_f1")
    assert [run["seed"] for run in summary["runs"]] == list(SEEDS)
    levels = ("", "word_")
    names = {f"{level}{name}" for level in levels for name in ("precision", "recall", "f1")}
    names |= {"accuracy", "word_accuracy", "loss", "loss_batch_mean"}
    wanted = {f"{split}_{name}" for split in ("eval", "test") for name in names}
    assert summary["mean"].keys() == summary["std"].keys() == wanted
    for name in wanted:
        values = [run[name] for run in runs.values()]
        assert [run[name] for run in summary["runs"]] == values
        mean = sum(values) / 3
        assert summary["mean"][name] == pytest.approx(mean)
        variance = sum((value - mean) ** 2 for value in values) / 2
        assert summary["std"][name] == pytest.approx(variance**0.5)

    kept = whole / f"seed-{best}"
    for name in ("model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl"):
        assert sha256(whole / name) == sha256(kept / name), name
    assert (whole / "eval_results.json").read_text() == (kept / "eval_results.json").read_text()
    record = json.loads((whole / "run.json").read_text())
    assert record["config"]["seeds"] == 3
    assert "finished" in record

    model = transformers.AutoModelForTokenClassification.from_pretrained(whole)
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    tagger = transformers.pipeline("token-classification", model=model, tokenizer=tokenizer)
    assert tagger("Mary Poe said the United Bank of London")


def test_the_card_shows_all_seeds(whole: Path) -> None:
    summary = results_of(whole)["seeds"]
    best = summary["best_seed"]
    card = ModelCard.load(whole / "README.md")
    assert card.data.model_name == "whole"
    assert len(card.data.eval_results) == 16
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    header = next(row for row in rows if row[0] == "| Seed")
    shown = {row[0][2:]: row[1:] for row in rows[rows.index(header) + 2 :][:5]}
    assert list(shown) == [
        *(f"**{seed}** (kept)" if seed == best else str(seed) for seed in SEEDS),
        *["mean", "standard deviation"],
    ]
    names = [f"{split}_{name}" for split in ("eval", "test") for name in ("word_f1", "f1", "loss")]
    for row, values in zip(
        shown.values(), [*summary["runs"], summary["mean"], summary["std"]], strict=True
    ):
        assert " | ".join(row) == " | ".join(f"{values[name]:.4f}" for name in names) + " |"
    assert "chosen on the validation data alone" in card.text
    assert f"- seed: {best}" in card.text
    assert f"seed-{best}" not in (whole / "README.md").read_text(), "it names itself, not the seed"
    assert 'Tagger.from_pretrained("whole")' in card.text
    one = "Scores are of one run with one seed"
    assert one not in card.text
    assert "Scores are of the best of 3 seeds" in card.text
    assert one in (whole / f"seed-{best}" / "README.md").read_text()


def test_the_table_of_the_terminal(
    arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*arguments, *SHORT]) == 0
    output = capsys.readouterr().out
    assert f"Seed 43 (2 of 2), in {out}/seed-43\n" in output
    assert output.count("Try it:") == 1
    lines = output.splitlines()
    first = next(k for k, line in enumerate(lines) if line.startswith("seed "))
    names = lines[first].split()[1:]
    assert names == "eval_word_f1 eval_f1 eval_loss test_word_f1 test_f1 test_loss".split()
    runs = [results_of(out / name) for name in FOLDERS[:2]]
    columns = [[run[name] for run in runs] for name in names]
    for k, seed in enumerate(("42", "43")):
        assert lines[first + 1 + k].split() == [seed, *(f"{run[k]:.4f}" for run in columns)]
    means = [f"{statistics.mean(column):.4f}" for column in columns]
    assert lines[first + 3].split() == ["mean", *means]
    assert lines[first + 4].split() == ["std", *(f"{statistics.stdev(c):.4f}" for c in columns)]
    best = results_of(out)["seeds"]["best_seed"]
    assert lines[first + 5] == f"Kept: seed {best}, the best by eval_f1."


@pytest.mark.parametrize(
    ("metric", "best"), [("eval_f1", 2), ("eval_loss", 3), ("eval_word_recall", 1)]
)
def test_the_best_is_chosen_by_the_metric(metric: str, best: int) -> None:
    """Of equals the first; a loss is better if it is lower; test scores do not count."""
    scores = {
        1: {"eval_f1": 0.5, "eval_loss": 0.3, "eval_word_recall": 0.5, "test_f1": 0.7},
        2: {"eval_f1": 0.7, "eval_loss": 0.2, "eval_word_recall": 0.5, "test_f1": 0.5},
        3: {"eval_f1": 0.6, "eval_loss": 0.1, "eval_word_recall": 0.4, "test_f1": 0.9},
    }
    assert seeds._best_seed(scores, metric) == best


def test_a_metric_that_is_not_in_the_table_and_no_test_data(
    arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = arguments.index("--test_file")
    without = arguments[:at] + arguments[at + 2 :]
    recall = ["--metric_for_best_model", "word_recall"]
    assert train_main([*without, *SHORT, *recall]) == 0
    assert "seed  eval_word_recall  eval_word_f1  eval_f1  eval_loss\n" in capsys.readouterr().out
    assert "| Seed | `eval_word_recall` | Validation word F1 |" in (out / "README.md").read_text()
    assert results_of(out)["seeds"]["best_by"] == "eval_word_recall"


@pytest.mark.parametrize("call", [CALLS + 1, CALLS + 13, 3 * CALLS - 1])
def test_stopped_by_a_signal_it_ends_in_the_same_bits(
    whole: Path,
    arguments: list[str],
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    call: int,
) -> None:
    several = [*arguments, "--seeds", "3"]
    with monkeypatch.context() as patch:
        send_once(patch, loop, "dropout_seed", signal.SIGTERM, call)
        assert train_main(several) == 75
    message = capsys.readouterr().err.splitlines()[-2:]
    assert f"{out}/seed-{43 if call < 2 * CALLS else 44}/checkpoint-" in message[0]
    assert message[1].startswith("Carry on with: ")
    assert message[1].endswith(f"bertner-train {' '.join(several)}")
    assert not (out / "model.safetensors").exists()
    before = state_of(out / "seed-42")
    assert train_main(several) == 0
    assert "It is finished." in capsys.readouterr().out
    assert outcomes(out) == outcomes(whole)
    assert state_of(out / "seed-42") == before


def test_stopped_between_two_seeds(
    whole: Path,
    arguments: list[str],
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    several = [*arguments, "--seeds", "3"]
    with monkeypatch.context() as patch:
        # Too late for the first seed to notice.
        send_once(patch, run, "model_card", signal.SIGTERM, 1)
        assert train_main(several) == 75
    message = capsys.readouterr().err.splitlines()[-2:]
    assert message[0] == "bertner-train: stopped by SIGTERM before seed 43 (2 of 3)"
    assert message[1].startswith("Carry on with: ")
    assert message[1].endswith(f"bertner-train {' '.join(several)}")
    assert not (out / "seed-43").exists()
    assert train_main(several) == 0
    assert outcomes(out) == outcomes(whole)


def kill_at(module: str, name: str, number: int) -> str:
    """Code that kills the process when a function is called for the n-th time."""
    return f"""
import os, signal, {module}
before, calls = {module}.{name}, []
def patched(*args, **kwargs):
    calls.append(0)
    if len(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*args, **kwargs)
{module}.{name} = patched
"""


def test_killed_anywhere_it_ends_in_the_same_bits(
    whole: Path, arguments: list[str], out: Path
) -> None:
    """Killed at its beginning, in a seed, between two, and with the results half written."""
    several = [*arguments, "--seeds", "3"]
    with Runner() as runner:
        for moment in (
            kill_at("bertner.seeds", "write_json", 1),
            kill_at("bertner.loop", "dropout_seed", 13),
            kill_at("bertner.run", "model_card", 1),
            kill_at("bertner.seeds", "open_run", 3),
            kill_at("bertner.loop", "dropout_seed", CALLS // 2),
            kill_at("bertner.seeds", "replace_file", 1),
            kill_at("bertner.seeds", "write_text", 1),
            kill_at("bertner.seeds", "write_json", 4),
        ):
            assert runner.run(several, code=moment)[0] == -signal.SIGKILL
        assert "finished" not in json.loads((out / "run.json").read_text())
        assert runner.run(several)[0] == 0
    assert outcomes(out) == outcomes(whole)
    assert "finished" in json.loads((out / "run.json").read_text())


def test_the_same_command_after_the_end_does_nothing(
    inputs: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [*shared(inputs), "--seeds", "3", "--output_dir", str(whole)]
    before = state_of(whole)
    capsys.readouterr()
    assert train_main(several) == 0
    assert "it is finished: nothing to do." in capsys.readouterr().out
    for other, told in (
        (["--seed", "43"], "seed 42 -> 43"),
        (["--learning_rate", "1e-3"], "learning_rate 0.005 -> 0.001"),
        (["--metric_for_best_model", "loss"], "metric_for_best_model f1 -> loss"),
    ):
        assert train_main([*several, *other]) == 73
        assert f"is finished ({told}" in capsys.readouterr().err
    assert state_of(whole) == before


def test_another_choice_of_the_best_is_another_run(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where no seed keeps its best: the metric then decides between the seeds alone."""
    last = [*arguments, *SHORT, "--load_best_model_at_end", "false"]
    assert train_main(last) == 0
    assert train_main([*last, "--metric_for_best_model", "loss"]) == 73
    assert "metric_for_best_model f1 -> loss" in capsys.readouterr().err


def test_what_would_be_another_run_is_listed(
    arguments: list[str],
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    several = [*arguments, "--seeds", "3"]
    with monkeypatch.context() as patch:
        send_once(patch, loop, "dropout_seed", signal.SIGTERM, CALLS + 5)
        assert train_main(several) == 75
    other = [*several, "--learning_rate", "1e-3"]
    capsys.readouterr()
    assert train_main(other) == 78
    assert "learning_rate 0.005 -> 0.001" in capsys.readouterr().err
    # What is finished cannot become part of a mean of something else.
    assert train_main([*other, "--allow_inexact_resume"]) == 73
    assert f"{out}/seed-42 holds another run, which is finished" in capsys.readouterr().err


def test_seeds_can_be_added(
    whole: Path, arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*arguments, "--seeds", "2"]) == 0
    started = json.loads((out / "run.json").read_text())["started"]
    before = [state_of(out / name) for name in FOLDERS[:2]]
    assert train_main([*arguments, "--seeds", "3", "--learning_rate", "1"]) == 78
    assert train_main([*arguments, "--seeds", "3"]) == 0
    assert [state_of(out / name) for name in FOLDERS[:2]] == before
    assert outcomes(out) == outcomes(whole)
    assert json.loads((out / "run.json").read_text())["started"] == started
    # Fewer: those that are not asked for stay, and do not count.
    assert train_main([*arguments, "--seeds", "2"]) == 0
    assert len(results_of(out)["seeds"]["runs"]) == 2
    assert outcome(out / "seed-44") == outcome(whole / "seed-44")


def test_one_seed_and_several_do_not_mix(
    arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, several = [*arguments, "--max_steps", "2"], [*arguments, *SHORT]
    assert train_main(one) == 0
    before = state_of(out)
    assert train_main(several) == 73
    assert f"{out} holds a run of one seed: leave out --seeds" in capsys.readouterr().err
    assert state_of(out) == before
    # A run in a folder of such a name that the one above did not put there.
    mine = [*one, "--output_dir", str(out / "seed-7")]
    assert train_main(mine) == 0
    assert train_main([*several, "--overwrite_output_dir"]) == 0
    assert not list_checkpoints(out)
    assert (out / "seed-7" / "run.json").exists()

    before = state_of(out)
    assert train_main(one) == 73
    assert f"{out} holds a run of several seeds: give --seeds too" in capsys.readouterr().err
    checkpoint = ["--resume_from_checkpoint", str(out / "seed-42" / "checkpoint-2")]
    assert train_main([*one, "--overwrite_output_dir", *checkpoint]) == 73
    model = ["--model", str(out / "seed-43")]
    assert train_main([*one, "--overwrite_output_dir", *model]) == 2
    assert "holds the model to start from" in capsys.readouterr().err
    assert state_of(out) == before
    assert train_main([*one, "--overwrite_output_dir"]) == 0
    assert not (out / "seed-42").exists()
    assert not (out / "seed-43").exists()
    assert outcome(out)["last checkpoint"] == "checkpoint-2"


def test_a_run_that_was_there_before_is_not_made_one_of_several(
    arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = ["--max_steps", "2", "--seed", "43", "--output_dir", str(out / "seed-43")]
    assert train_main([*arguments, *mine]) == 0
    before = state_of(out / "seed-43")
    for extra in ([], ["--overwrite_output_dir"]):
        assert train_main([*arguments, *SHORT, *extra]) == 73
        assert f"{out}/seed-43 holds a run already" in capsys.readouterr().err
    assert state_of(out / "seed-43") == before
    assert [path.name for path in out.iterdir()] == ["seed-43"]


def test_overwriting_replaces_all_but_what_it_began_itself(
    whole: Path, arguments: list[str], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_main([*arguments, *SHORT]) == 0
    overwrite = [*arguments, "--seeds", "3", "--overwrite_output_dir"]
    with monkeypatch.context() as patch:
        send_once(patch, loop, "dropout_seed", signal.SIGTERM, CALLS + 13)
        assert train_main(overwrite) == 75
    before = state_of(out / "seed-42")
    assert train_main(overwrite) == 0
    assert state_of(out / "seed-42") == before, "carried on, not begun again"
    assert outcomes(out) == outcomes(whole)


def test_one_process_at_a_time(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    several = [*arguments, *SHORT]
    train_run, codes = run.train_run, []

    def train_and_try(*args: Any) -> None:
        codes.append(train_main(several))
        codes.append(train_main([*several, "--overwrite_output_dir"]))
        train_run(*args)

    monkeypatch.setattr(seeds, "train_run", train_and_try)
    assert train_main(several) == 0
    assert codes == [73] * 4
    assert capsys.readouterr().err.count(f"in use by process {os.getpid()} on ") == 4


def test_a_seed_that_is_damaged_can_be_trained_anew(
    whole: Path,
    arguments: list[str],
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    several = [*arguments, "--seeds", "3"]
    with monkeypatch.context() as patch:
        send_once(patch, loop, "dropout_seed", signal.SIGTERM, CALLS + 13)
        assert train_main(several) == 75
    for _, folder in list_checkpoints(out / "seed-43"):
        (folder / "optimizer.safetensors").write_bytes(b"")
    assert train_main(several) == 76
    message = capsys.readouterr().err.splitlines()[-2:]
    assert "seed-43: no checkpoint can be loaded" in message[0]
    assert f"or remove {out}/seed-43, and the same command trains that seed anew" in message[1]
    shutil.rmtree(out / "seed-43")
    (out / "seed-42" / "all_results.json").write_text("{}")
    assert train_main(several) == 76
    message = capsys.readouterr().err.splitlines()[-2:]
    assert message[0].endswith("seed-42/all_results.json: has no number eval_f1")
    assert f"remove {out}/seed-42" in message[1]
    shutil.rmtree(out / "seed-42")
    assert train_main(several) == 0
    assert outcomes(out) == outcomes(whole)


def test_without_validation_data_there_is_no_best(
    arguments: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = arguments.index("--validation_file")
    without = arguments[:at] + arguments[at + 2 :]
    assert train_main([*without, *SHORT, "--load_best_model_at_end", "false"]) == 2
    message = capsys.readouterr().err
    assert "several seeds needs validation data: give --validation_file" in message
    assert not out.exists()


def test_data_are_read_once(arguments: list[str], inputs: Path, tmp_path: Path) -> None:
    """As a pipe can be."""
    os.mkfifo(tmp_path / "pipe")
    content = (inputs / "train.txt").read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content])
    writer.start()
    assert train_main([*arguments, *SHORT, "--train_file", str(tmp_path / "pipe")]) == 0
    writer.join()


def test_the_model_of_the_seed_before_has_left_the_memory(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first_model, train_run, models, alive = parts._first_model, run.train_run, [], []

    def make_and_note(*args: Any) -> Any:
        model = first_model(*args)
        models.append(weakref.ref(model))
        return model

    def count_and_train(*args: Any) -> None:
        alive.append(sum(model() is not None for model in models))
        train_run(*args)

    monkeypatch.setattr(parts, "_first_model", make_and_note)
    monkeypatch.setattr(seeds, "train_run", count_and_train)
    assert train_main([*arguments, *SHORT, "--seeds", "3"]) == 0
    assert alive == [1, 1, 1]


def test_verify_says_which_folders_to_give(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main(["--verify", str(whole)]) == 76
    assert f"give one of {whole}/seed-42, {whole}/seed-43" in capsys.readouterr().err
    assert train_main(["--verify", str(whole / "seed-43")]) == 0
