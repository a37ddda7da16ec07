"""`bertner-eval`: a model, a file of predictions, and two against each other."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from bertner.cli import eval_main
from tests.conftest import make_talkative, write_conll

LABELS = dict(enumerate("O B-PER I-PER B-LOC I-LOC B-ORG I-ORG".split()))


def make_model(folder: Path, labels: dict[int, str] = LABELS, seed: int = 2) -> Path:
    return make_talkative(folder, labels, folder.with_name(f"model-{seed}-{len(labels)}"), seed)


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    return write_conll(tmp_path / "gold.txt", 40, seed=1)


def test_a_model_and_its_predictions_give_the_same(
    model_folder: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(model_folder)
    of_model, of_file = tmp_path / "model.json", tmp_path / "file.json"
    columns = tmp_path / "columns.txt"
    command = ["--model", str(model), "--file", str(gold), "--train_file", str(gold)]
    command += ["--output_file", str(of_model), "--conlleval", str(columns)]
    assert eval_main(command) == 0
    output = capsys.readouterr().out
    assert "40 sentences" in output
    assert "word level  precision  recall      f1   95% interval  entities" in output
    assert "subword level" in output
    assert "unseen in training" in output
    assert "bootstrap over sentences, 2,000 samples" in output
    values = json.loads(of_model.read_text())
    analysis = values["analysis"]
    assert analysis["levels"]["word"]["overall"]["f1"] == values["word_f1"] > 0
    assert analysis["levels"]["subword"]["overall"]["f1"] == values["f1"]
    assert analysis["by_training"]["unseen"]["num_gold"] == 0

    assert eval_main(["--predictions", str(columns), "--output_file", str(of_file)]) == 0
    output = capsys.readouterr().out
    assert "subword level" not in output
    again = json.loads(of_file.read_text())
    for name in ("errors", "muc", "confusion", "by_length"):
        assert again["analysis"][name] == analysis[name]
    assert again["word_f1"] == values["word_f1"]
    assert again["analysis"]["levels"]["word"] == analysis["levels"]["word"]

    # The gold file and the predictions apart, as other tools have them.
    rows = [line.split() for line in columns.read_text().splitlines()]
    said = tmp_path / "said.txt"
    said.write_text("\n".join(f"{row[0]} {row[-1]}" if row else "" for row in rows) + "\n")
    command = ["--predictions", str(said), "--file", str(gold), "--output_file", str(of_file)]
    assert eval_main(command) == 0
    assert json.loads(of_file.read_text())["word_f1"] == values["word_f1"]


def test_two_models_against_each_other(
    model_folder: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, other = make_model(model_folder), make_model(model_folder, seed=3)
    scores = tmp_path / "scores.json"
    command = ["--model", str(model), "--file", str(gold), "--output_file", str(scores)]
    assert eval_main([*command, "--compare", str(model)]) == 0
    output = capsys.readouterr().out
    assert "the two cannot be told apart on these data" in output
    assert "0 sentences differ" in output
    comparison = json.loads(scores.read_text())["comparison"]
    assert (comparison["difference"], comparison["p_value"]) == (0.0, 1.0)

    assert eval_main([*command, "--compare", str(other)]) == 0
    output = capsys.readouterr().out
    assert "sentences differ, the first of them:" in output
    assert "  predicted  " in output
    values = json.loads(scores.read_text())
    assert eval_main(["--model", str(other), *command[2:]]) == 0
    other_f1 = json.loads(scores.read_text())["word_f1"]
    assert values["comparison"]["difference"] == pytest.approx(values["word_f1"] - other_f1)
    # A file in place of the second model: the gold tags themselves are better for sure.
    assert eval_main([*command, "--compare", str(gold)]) == 0
    assert "fewer than 1 of 20 cases" in capsys.readouterr().out
    comparison = json.loads(scores.read_text())["comparison"]
    assert comparison["interval"][1] < 0


def test_models_of_other_schemes(
    model_folder: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC", "ORG") for prefix in "BIES")]
    bioes = make_model(model_folder, dict(enumerate(names)))
    scores = tmp_path / "scores.json"
    command = ["--file", str(gold), "--output_file", str(scores)]
    assert eval_main(["--model", str(bioes), *command]) == 0
    assert "strict (BIOES)" in capsys.readouterr().out
    inside = make_model(model_folder, dict(enumerate(["O", "I-PER", "I-LOC", "I-ORG"])))
    assert eval_main(["--model", str(inside), *command]) == 0
    assert "strict (IOB1)" in capsys.readouterr().out
    iob1 = [*command, "--scheme", "IOB1", "--decoding", "viterbi"]
    assert eval_main(["--model", str(make_model(model_folder)), *iob1]) == 0
    assert "strict (IOB1)" in capsys.readouterr().out


def test_the_training_file_of_the_model(
    model_folder: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(model_folder)
    import hashlib

    digest = hashlib.sha256(gold.read_bytes()).hexdigest()
    columns = {"text_column_name": "tokens", "label_column_name": "ner_tags"}
    record = {
        "config": {"train_file": str(gold), "document_column_name": None, "label_names": None}
        | columns,
        "data": {"train": {"sha256": digest}},
    }
    (model / "run.json").write_text(json.dumps(record))
    command = ["--model", str(model), "--file", str(gold)]
    assert eval_main(command) == 0
    assert "seen in training" in capsys.readouterr().out
    other = write_conll(tmp_path / "other.txt", 5)
    lost = ["--model", str(model), "--file", str(other), "--conlleval", str(gold)]
    assert eval_main(lost) == 2
    assert f"conlleval {gold} would replace train_file" in capsys.readouterr().err
    gold.write_text(gold.read_text() + "more B-PER\n")
    assert eval_main(command) == 0
    output, errors = capsys.readouterr()
    assert "seen in training" not in output
    assert "not what the model was trained on any more" in errors
    for broken in ("{", "{}", '{"config": 1, "data": {}}', '{"config": {"train_file": 1}}'):
        (model / "run.json").write_text(broken)
        assert eval_main(command) == 0


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["--file", "gold.txt"], 2, "give a model (--model) or a file of predictions"),
        (["--model", "m", "--predictions", "gold.txt"], 2, "give a model (--model) or a file"),
        (["--model", "m"], 2, "give the annotated data to score on (--file)"),
        (["--predictions", "gold.txt"], 65, "gold.txt:1: 2 columns instead of 3 or more"),
        (["--predictions", "none.txt", "--file", "gold.txt"], 65, "none.txt: no such file"),
        (["--predictions", "gold.txt", "--file", "other.txt"], 65, "where other.txt:1 has"),
        (
            ["--predictions", "gold.txt", "--file", "gold.txt", "--compare", "other.txt"],
            65,
            "other.txt:1: has ",
        ),
        (["--model", "m", "--file", "gold.txt", "--bootstrap_samples", "5"], 2, "at least 100"),
    ],
)
def test_bad_input(
    command: list[str],
    code: int,
    message: str,
    gold: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other.txt").write_text("nothing O\nlike B-X\nit O\n")
    monkeypatch.chdir(tmp_path)
    try:
        result = eval_main(command)
    except SystemExit as end:
        result = int(end.code or 0)
    errors = capsys.readouterr().err
    assert result == code
    assert message in errors
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) <= 2


def test_confidence_is_calibrated_and_kept(
    model_folder: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, scores = make_model(model_folder), tmp_path / "scores.json"
    command = ["--model", str(model), "--file", str(gold), "--output_file", str(scores)]

    def reliability() -> dict[str, object]:
        values: dict[str, object] = json.loads(scores.read_text())["analysis"]["reliability"]
        return values

    assert eval_main(command) == 0
    assert "confidence of entities, not calibrated (--calibrate)" in capsys.readouterr().out
    before = reliability()
    assert before["calibrated"] is False
    assert eval_main([*command, "--calibrate"]) == 0
    assert "calibrated on " in capsys.readouterr().err
    cross_validated = reliability()
    assert eval_main(command) == 0
    assert "confidence of entities, calibrated" in capsys.readouterr().out
    after = reliability()
    assert after["brier"] < before["brier"]  # type: ignore[operator]
    assert cross_validated["brier"] >= after["brier"]  # type: ignore[operator]
    # Decided otherwise, the confidence is not what was calibrated.
    assert eval_main([*command, "--decoding", "viterbi"]) == 0
    assert reliability()["calibrated"] is False
    # Other weights in the same folder.
    make_model(model_folder, seed=3).joinpath("model.safetensors").rename(
        model / "model.safetensors"
    )
    assert eval_main(command) == 0
    assert "was fitted for other weights, so scores are not calibrated" in capsys.readouterr().err
    (model / "calibration.json").write_text("{")
    assert eval_main(command) == 65
    assert "calibrate the model again, or remove the file" in capsys.readouterr().err
    assert eval_main([*command, "--calibrate"]) == 0
    said = ["--predictions", str(gold), "--file", str(gold), "--calibrate"]
    assert eval_main(said) == 2
    assert "calibrate needs --model with a folder" in capsys.readouterr().err


def test_a_report(model_folder: Path, gold: Path, tmp_path: Path) -> None:
    model, other = make_model(model_folder), make_model(model_folder, seed=3)
    page = tmp_path / "report.html"
    command = ["--model", str(model), "--file", str(gold), "--report", str(page)]
    assert eval_main([*command, "--compare", str(other)]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.lstrip().startswith("<!doctype html>")
    assert str(other) in text
    said = ["--predictions", str(gold), "--file", str(gold), "--report", str(page)]
    assert eval_main([*said, "--compare", str(other)]) == 0
    assert str(other) in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("flag", ["--report", "--output_file", "--conlleval"])
def test_what_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = ["--predictions", str(tmp_path / "none"), flag]
    for target in (pipe, tmp_path):
        assert eval_main([*command, str(target)]) == 2
        assert f"{flag[2:]} {target} is no regular file" in capsys.readouterr().err
    assert pipe.is_fifo()
    assert eval_main([*command, str(tmp_path / "no folder" / "file")]) == 74
    assert "cannot be written: no such folder" in capsys.readouterr().err


def test_what_would_be_lost_to_another_file_is_told(
    gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--predictions", str(gold), "--file", str(gold)]
    content, page = gold.read_bytes(), str(tmp_path / "page")
    for flags, message in (
        (["--conlleval", str(gold)], f"conlleval {gold} would replace file"),
        (["--report", page, "--output_file", page], f"output_file {page} would replace report"),
    ):
        assert eval_main([*command, *flags]) == 2
        assert message in capsys.readouterr().err
    assert gold.read_bytes() == content
    # Of a loop nothing is lost, and it is no reason for a traceback.
    (tmp_path / "loop").symlink_to("loop")
    assert eval_main([*command, "--output_file", str(tmp_path / "loop")]) == 0


def test_flags_that_do_not_fit_the_data_or_the_model(
    model_folder: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", str(make_model(model_folder)), "--file", str(gold)]
    assert eval_main([*command, "--scheme", "BIOES"]) == 2
    assert "scheme BIOES: the model's labels are IOB2" in capsys.readouterr().err
    said = ["--predictions", str(gold), "--file", str(gold), "--scheme", "IOB1"]
    assert eval_main(said) == 2
    assert "give --model" in capsys.readouterr().err
    assert eval_main([*command, "--bootstrap_unit", "document"]) == 2
    assert "does not tell documents apart" in capsys.readouterr().err
    assert eval_main([*command, "--compare", str(tmp_path / "missing.txt")]) == 65
    assert "missing.txt: no such file" in capsys.readouterr().err
    assert eval_main([*command, "--compare", "none/such"]) == 74
    output = capsys.readouterr()
    assert "evaluate" not in output.err, "before minutes of work"
    assert output.out == ""


def test_predictions_to_compare_may_come_in_a_pipe(
    model_folder: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(gold.read_bytes()))
    writer.start()
    command = ["--predictions", str(gold), "--file", str(gold), "--compare", str(pipe)]
    assert eval_main(command) == 0
    writer.join()
    assert "0 sentences differ" in capsys.readouterr().out


def test_too_few_entities_do_not_replace_a_calibration(
    model_folder: Path, gold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(model_folder)
    command = ["--model", str(model), "--calibrate", "--file"]
    assert eval_main([*command, str(gold)]) == 0
    before = (model / "calibration.json").read_bytes()
    few = tmp_path / "few.txt"
    few.write_text("Paris B-LOC\n", encoding="utf-8")
    assert eval_main([*command, str(few)]) == 65
    assert "too few to calibrate on" in capsys.readouterr().err
    assert (model / "calibration.json").read_bytes() == before


def test_the_accuracy_of_a_file_is_that_of_the_model(
    model_folder: Path, gold: Path, tmp_path: Path
) -> None:
    scores, columns = tmp_path / "scores.json", tmp_path / "columns.txt"
    command = ["--output_file", str(scores)]
    names = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "LOC", "ORG") for prefix in "BIES")]
    for labels in (LABELS, dict(enumerate(names))):
        model = make_model(model_folder, labels)
        of_model = ["--model", str(model), "--file", str(gold), "--conlleval", str(columns)]
        assert eval_main([*of_model, *command]) == 0
        values = json.loads(scores.read_text())
        assert values["analysis"]["levels"]["word"]["accuracy"] == values["word_accuracy"] < 1
        if labels is not LABELS:
            continue  # in columns, tags of a model that knows nothing may be of any scheme
        assert eval_main(["--predictions", str(columns), *command]) == 0
        said = json.loads(scores.read_text())
        assert said["word_accuracy"] == values["word_accuracy"]
        rows = [line.split() for line in columns.read_text().splitlines() if line]
        same = sum(row[-1] == row[-2] for row in rows) / len(rows)
        assert same == pytest.approx(values["word_accuracy"])
