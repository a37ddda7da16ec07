"""`bertner-predict` from end to end: every form of input and output, streams, bad input."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from bertner.cli import eval_main, predict_main
from bertner.corpus import split_words
from bertner.hub import find_model
from bertner.model import BertForNER
from bertner.predict import Tagger, gather
from bertner.readers import read_file
from bertner.text_input import read_items
from bertner.tokenizer import Tokenizer
from tests.conftest import (
    MINILM,
    REPOSITORY,
    SHARED_DATA,
    make_talkative,
    needs_conll,
    needs_minilm,
)

LABELS = dict(enumerate("O B-PER I-PER B-LOC I-LOC".split()))
TEXT = "Mary Poe said Paris is the landing of London."

# What text can hold that is not letters and spaces.
ODD = [
    "",
    "   ",
    "Paris \U0001f642 London\U0001f1eb\U0001f1f7!",
    "Pari\u0301s de\u0301ja\u0300 vu e\u0308\u0323",
    "\u05e9\u05dc\u05d5\u05dd London \u0645\u0631\u062d\u0628\u0627",
    "Pa\u200bris \u200d\u2060 London\ufeff",
    "\u6771\u4eac is Tokyo",
    "tab\tand\x0bfeed\x0c\x85line\u2028sep",
    "x" * 700,
]


@pytest.fixture
def model(model_folder: Path) -> str:
    """A model whose random head says something about almost every word."""
    return str(make_talkative(model_folder, LABELS))


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    try:
        result = predict_main(list(arguments))
    except SystemExit as end:
        result = int(end.code or 0)
    output, errors = capsys.readouterr()
    assert result == code, errors
    if code:
        assert "Traceback" not in errors
        return errors
    return output


def records(output: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.split("\n") if line]


def check_entities(text: str, entities: list[dict[str, object]]) -> None:
    borders = split_words(text)
    end = 0
    for entity in entities:
        assert entity["text"] == text[entity["start"] : entity["end"]]  # type: ignore[misc]
        assert entity["start"] in [a for a, _ in borders]
        assert entity["end"] in [b for _, b in borders]
        assert entity["start"] >= end  # type: ignore[operator]
        end = entity["end"]  # type: ignore[assignment]


def test_lines_of_any_text(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.txt"
    path.write_bytes("\r\n".join([TEXT, *ODD]).encode())
    lines = records(run(capsys, "--model", model, str(path)))
    assert [line["text"] for line in lines] == [TEXT, *ODD]
    for line in lines:
        check_entities(str(line["text"]), line["entities"])  # type: ignore[arg-type]
    assert lines[0]["entities"]
    one_by_one = []
    for text in [TEXT, *ODD]:
        path.write_text(text + "\n", encoding="utf-8", newline="")
        one_by_one += records(run(capsys, "--model", model, "--batch_tokens", "7", str(path)))
    for ours, theirs in zip(lines, one_by_one, strict=True):
        assert [e["start"] for e in ours["entities"]] == [  # type: ignore[attr-defined]
            e["start"]
            for e in theirs["entities"]  # type: ignore[attr-defined]
        ]


def test_words_in_are_words_tagged(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.txt"
    path.write_text("\n".join([TEXT, *ODD, TEXT * 100]), encoding="utf-8", newline="")
    output = run(capsys, "--model", model, "--output_format", "conll", str(path))
    words = [line.split()[0] for line in output.split("\n") if line.split()]
    expected = [text[a:b] for text in [TEXT, *ODD, TEXT * 100] for a, b in split_words(text)]
    assert len(words) == len(expected)
    assert words[: len(split_words(TEXT))] == TEXT.replace(".", " .").split()


def test_a_file_as_one_document(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(f"{TEXT}\n\n{TEXT}", encoding="utf-8")
    (record,) = records(run(capsys, "--model", model, "--input_format", "document", str(path)))
    assert record["text"] == f"{TEXT}\n\n{TEXT}"
    check_entities(str(record["text"]), record["entities"])  # type: ignore[arg-type]
    assert record["entities"][-1]["end"] > len(TEXT)  # type: ignore[index]
    # Offsets are those of the file.
    text = f"{TEXT}\r\nParis\r\n"
    path.write_bytes(text.encode("utf-8-sig"))
    (record,) = records(run(capsys, "--model", model, "--input_format", "document", str(path)))
    assert record["text"] == text
    check_entities(text, record["entities"])  # type: ignore[arg-type]
    path.write_bytes(b"Paris\n\nof\xff\n")
    command = ["--model", model, "--input_format", "document", str(path)]
    assert f"{path}:3: byte 0xff is not UTF-8" in run(capsys, *command, code=65)


def test_nothing_is_said_of_long_text(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "text.txt"
    path.write_text((TEXT * 50 + "x" * 500 + "\n") * 3, encoding="utf-8")
    assert predict_main(["--model", model, "--input_format", "lines", str(path)]) == 0
    assert "longer than" not in caplog.text
    assert "more than" not in caplog.text


def test_json_lines_keep_what_else_they_hold(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.jsonl"
    given = [
        {"id": 7, "text": TEXT, "entities": []},
        {"words": TEXT.split(), "source": {"a": [1]}},
        {"text": ""},
    ]
    path.write_text("\n\n".join(map(json.dumps, given)), encoding="utf-8")
    output = run(capsys, "--model", model, "--text_column_name", "words", str(path))
    lines = records(output)
    assert lines[0]["id"] == 7
    assert lines[0]["entities"]
    assert lines[1]["words"] == TEXT.split()
    assert lines[1]["text"] == TEXT
    assert lines[1]["source"] == {"a": [1]}
    assert lines[2] == {"text": "", "entities": []}


def test_conll_columns_keep_theirs(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.conll"
    path.write_text(
        "-DOCSTART- -X- O\n\nMary NNP B-PER\nPoe NNP I-PER\n\n\nParis NNP B-LOC\r\n"
        "-DOCSTART- -X- O\n\nLondon NNP O\n",
        encoding="utf-8",
    )
    command = ["--model", model, str(path)]
    output = run(capsys, *command, "--output_format", "conll")
    lines = output.split("\n")
    assert [line.split()[:3] for line in lines if line] == [
        *[["-DOCSTART-", "-X-", "O"], ["Mary", "NNP", "B-PER"], ["Poe", "NNP", "I-PER"]],
        *[["Paris", "NNP", "B-LOC"], ["-DOCSTART-", "-X-", "O"], ["London", "NNP", "O"]],
    ]
    assert {len(line.split()) for line in lines if line} == {4}
    (tmp_path / "both.txt").write_text(output, encoding="utf-8")
    said = read_file(tmp_path / "both.txt")
    assert said.words == ["Mary", "Poe", "Paris", "London"]
    assert said.num_documents == 2
    texts = [line["text"] for line in records(run(capsys, *command))]
    assert texts == ["Mary Poe", "Paris", "London"]


def test_words_of_columns_are_those_that_training_reads(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.conll"
    path.write_text("-DOCSTART-\n\n10\xa0000  CD O\n\u3000 X O\nParis NNP B-LOC\n", "utf-8")
    assert read_file(path).words == ["10\xa0000", "\u3000", "Paris"]
    lines = run(capsys, "--model", model, "--output_format", "conll", str(path)).split("\n")
    assert [line.split(" ")[:-1] for line in lines if line] == [
        *[["-DOCSTART-", "O", "O"], ["10\xa0000", "CD", "O"], ["\u3000", "X", "O"]],
        ["Paris", "NNP", "B-LOC"],
    ]


@pytest.mark.parametrize(
    ("content", "is_conll"),
    [
        ("-DOCSTART- -X- O\n", True),
        ("\n\n-DOCSTART-\r\n", True),
        ("\ufeffEU NNP B-ORG\n\nrejects VBZ O\n", True),
        ("EU\tB-ORG\r\nx\tO", True),
        ("\xe9 O\n" * 500 + "x O", True),
        ("EU B-ORG\n", False),  # one row may be anything
        ("Vitamin O\nand more\n", False),
        ("EU NNP B-ORG\nrejects O\n", False),
        ("O\nO\n", False),
        ("", False),
    ],
)
def test_columns_are_told_from_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str, is_conll: bool
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content.encode())
    with caplog.at_level("INFO", "bertner"):
        items = list(read_items(str(path), "auto"))
    assert all(bool(item and item.rows) is is_conll for item in items)
    assert ("--input_format lines reads it as text" in caplog.text) is is_conll
    lines = list(read_items(str(path), "lines"))
    assert len(lines) == len(content.splitlines())
    assert not any(item and item.rows for item in lines)


def test_columns_are_read_with_their_neighbours_or_alone(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.conll"
    path.write_text("Mary\nPoe\n\nParis\n\n-DOCSTART-\n\nLondon\n", encoding="utf-8")
    command = ["--model", model, str(path)]
    error = run(capsys, *command, "--context", "document", code=65)
    assert "text.conll: does not say where documents begin, which --context document" in error
    run(capsys, *command, "--context", "none")
    config = Path(model) / "config.json"
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, "bertner_reading": {"context": "document"}}), "utf-8")
    assert predict_main(command) == 0
    assert "text.conll does not say where documents begin" in capsys.readouterr().err


def test_a_long_document_is_not_gathered_for_a_model_that_reads_sentences(tmp_path: Path) -> None:
    path = tmp_path / "text.conll"
    path.write_text("-DOCSTART-\n\n" + "Mary\n\n" * 5000, encoding="utf-8")

    def parts(documents: str) -> list[int]:
        items = read_items(str(path), "conll", documents=documents)
        return [len(part) for part in gather(item.text for item in items if item)]

    assert parts("marked") == [5000]
    assert max(parts("none")) < 2000


def test_json_lines_are_read_with_their_neighbours(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentences = [["Mary", "Poe"], ["Paris"], ["said"], ["London", "is"]] * 5
    columns = tmp_path / "text.conll"
    content = "".join(
        ("" if k % 10 else "-DOCSTART-\n\n") + "\n".join(words) + "\n\n"
        for k, words in enumerate(sentences)
    )
    columns.write_text(content, encoding="utf-8")
    context = ["--context", "document"]

    def scores(path: Path, *flags: str) -> list[object]:
        lines = records(run(capsys, "--model", model, *context, *flags, str(path)))
        return [line["entities"] for line in lines]

    expected = scores(columns)
    assert scores(columns, str(columns)) == expected * 2, "given twice, they are two documents"
    path = tmp_path / "text.jsonl"

    def write(key: str) -> None:
        lines = [{"tokens": words, key: k // 10} for k, words in enumerate(sentences)]
        path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")

    write("document_id")
    assert scores(path) == expected
    write("page")
    assert scores(path, "--document_column_name", "page") == expected
    error = run(capsys, "--model", model, *context, str(path), code=65)
    assert "does not say where documents begin" in error
    # The first records need not have it.
    lines = [{"text": "Oslo"}, *({"tokens": words, "doc_id": 1} for words in sentences[:10])]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert scores(path)[1:] == expected[:10]
    # A text can be a document.
    path.write_text(json.dumps({"text": "Mary Poe\n\nParis"}), encoding="utf-8")
    assert len(scores(path)) == 1
    path.write_text(json.dumps({"tokens": ["a"], "doc_id": [1]}), encoding="utf-8")
    error = run(capsys, "--model", model, *context, str(path), code=65)
    assert "text.jsonl:1: column 'doc_id' must hold one string or integer" in error


def test_columns_of_text_have_its_blank_lines(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Mary Poe\n\n \nParis\nof\n\nLondon\n", encoding="utf-8")
    command = ["--model", model, "--input_format", "document", "--output_format", "conll"]
    lines = run(capsys, *command, str(path)).split("\n")
    assert [line.split(" ")[0] for line in lines] == [
        *["Mary", "Poe", "", "Paris", "of", "", "London", "", ""]
    ]


def test_what_is_read_is_not_replaced(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Paris\n", encoding="utf-8")
    error = run(capsys, "--model", model, str(path), "--output_file", str(path), code=2)
    assert "would replace what is read" in error
    assert path.read_text(encoding="utf-8") == "Paris\n"


def test_closed_streams(model: str, tmp_path: Path) -> None:
    path, output = tmp_path / "text.txt", tmp_path / "out.jsonl"
    path.write_text("Paris\n", encoding="utf-8")

    def result(redirection: str, *arguments: str) -> int:
        command = [sys.executable, "-c", _COMMAND, "--model", model, *arguments, str(path)]
        shell = f"{shlex.join(command)} {redirection}"
        return subprocess.run(shell, shell=True, cwd=REPOSITORY, check=False).returncode

    assert result(">&-") == 2
    assert result(">&- 2>&-", "--output_file", str(output)) == 0
    assert len(output.read_text(encoding="utf-8").splitlines()) == 1
    assert result(f"> {output}.2 2>&-") == 0
    assert output.with_name("out.jsonl.2").read_bytes() == output.read_bytes()


def test_what_stands_before_a_mistake_is_tagged(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"Paris\nLondon\n\xff\n")
    assert predict_main(["--model", model, str(path)]) == 65
    output, errors = capsys.readouterr()
    assert [line["text"] for line in records(output)] == ["Paris", "London"]
    assert "text.txt:3: byte 0xff" in errors


def test_text_for_people(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Paris \x1b[31m of London\n", encoding="utf-8")
    output = run(capsys, "--model", model, "--output_format", "text", str(path))
    assert "\x1b" not in output
    assert "\\x1b" in output
    assert "[LOC " in output or "[PER " in output


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = tmp_path / "<b>.txt", tmp_path / "page.html"
    hostile = 'Paris <script>alert(1)</script> & "London" </p><img src=x onerror=y>'
    path.write_text(f"{TEXT}\n{hostile}\n", encoding="utf-8")
    command = ["--model", model, "--output_format", "html", "--output_file", str(page), str(path)]
    assert run(capsys, *command) == ""
    parsed = _Page()
    parsed.feed(page.read_text(encoding="utf-8"))
    assert not {"script", "img", "b"} & set(parsed.tags)
    assert parsed.tags.count("p") == 2
    assert "mark" in parsed.tags
    assert "Entities in 2 texts" in parsed.text
    assert "alert" in parsed.text
    assert parsed.tags.count("input") == 2, "one for each type, to hide it"
    path.write_text("Paris\x1b[31m \u202e London\n", encoding="utf-8")
    assert run(capsys, *command) == ""
    content = page.read_text(encoding="utf-8")
    assert content.replace("\n", "").isprintable()
    assert r"\x1b" in content
    assert r"\u202e" in content


def test_what_is_to_be_found(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 5, encoding="utf-8")
    command = ["--model", model, str(path)]

    def found(*more: str) -> list[dict[str, object]]:
        (record,) = records(run(capsys, *command, *more))
        return record["entities"]  # type: ignore[return-value]

    every = found()
    assert {entity["label"] for entity in every} == {"PER", "LOC"}
    assert found("--labels", "PER") == [e for e in every if e["label"] == "PER"]
    bound = str(sorted(float(e["score"]) for e in every)[4])  # type: ignore[arg-type]
    assert found("--threshold", bound) == [e for e in every if e["score"] >= float(bound)]
    assert found("--threshold", "PER=1", "--threshold", "LOC=0") == [
        e for e in every if e["label"] == "LOC"
    ]
    error = run(capsys, *command, "--labels", "ORG", code=2)
    assert "the model has no type 'ORG', but PER, LOC" in error
    assert "must be a number from 0 to 1" in run(capsys, *command, "--threshold", "PER=2", code=2)
    assert "needs a calibration" in run(capsys, *command, "--precision", "0.9", code=2)


@pytest.fixture
def calibrated(model: str, tmp_path: Path) -> str:
    """The same, calibrated."""
    gold = tmp_path / "gold.txt"
    gold.write_text("Mary B-PER\nPoe I-PER\nsaid O\nParis B-LOC\n\n" * 60, encoding="utf-8")
    assert eval_main(["--model", model, "--file", str(gold), "--calibrate"]) == 0
    return model


def test_a_threshold_for_a_precision(
    calibrated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    assert len(records(run(capsys, "--model", calibrated, "--recall", "0.0", str(path)))) == 1
    error = run(capsys, "--model", calibrated, "--precision", "PER=0.99", str(path), code=2)
    assert "PER on " in error
    assert "precision 0.99" in error


def test_what_is_asked_for_a_type_goes_before_what_is_asked_for_all(
    calibrated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")

    def found(*flags: str) -> dict[str, int]:
        (line,) = records(run(capsys, "--model", calibrated, *flags, str(path)))
        labels = [entity["label"] for entity in line["entities"]]  # type: ignore[attr-defined]
        return {kind: labels.count(kind) for kind in ("PER", "LOC")}

    everything = found()
    assert min(everything.values()) > 0
    for flags in (
        ["--threshold", "LOC=1", "--threshold", "0"],
        ["--threshold", "LOC=1", "--recall", "0"],
        ["--labels", "PER", "--threshold", "0"],
    ):
        assert found(*flags) == {**everything, "LOC": 0}, flags
    # What is out of reach for a type is no matter if that type is not asked for.
    unreachable = ["--precision", "0.99"]
    assert "PER on" in run(capsys, "--model", calibrated, *unreachable, str(path), code=2)
    assert found(*unreachable, "--threshold", "PER=0", "--threshold", "LOC=0") == everything
    for flags, message in (
        (["--threshold", "0.5", "--recall", "0.5"], "all types: give threshold or recall"),
        (["--precision", "PER=0.5", "--recall", "PER=0.5"], "PER: give precision or recall"),
        (["--labels", ""], "names no type"),
    ):
        assert message in run(capsys, "--model", calibrated, *flags, str(path), code=2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "Paris"}\n{"text":\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"txt": "Paris"}\n', "a.jsonl:1: needs 'text', a string, or 'tokens'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl:1: holds U+D800"),
        ("a.jsonl", b'{"text": "a", "n": NaN}\n', "a.jsonl:1: not JSON (NaN is no number"),
        ("a.jsonl", b'{"text": "a", "n": 1e999}\n', "a.jsonl:1: not JSON (1e999 is no number"),
        ("a.conll", b"Paris O\n\nLondon\n", "a.conll:3: 1 columns instead of 2 as above"),
        ("a.txt", b"Paris\n\xff\n", "a.txt:2: byte 0xff is not UTF-8"),
        ("a.txt", b"P\0a\n", "a.txt:1: holds a NUL byte"),
        ("a.conll", b"Paris\rLondon\n", "a.conll:1: a carriage return within the line"),
    ],
)
def test_bad_input_names_the_line(
    name: str,
    content: bytes,
    message: str,
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, output = tmp_path / name, tmp_path / "output"
    path.write_bytes(content)
    output.write_text("of before")
    command = ["--model", model, "--output_file", str(output), str(path)]
    assert message in run(capsys, *command, code=65)
    assert output.read_text() == "of before", "nothing is half replaced"
    assert [each.name for each in tmp_path.iterdir() if each.name.endswith(".tmp")] == []
    assert "no such file" in run(capsys, "--model", model, str(tmp_path / "none"), code=65)


_COMMAND = "import sys; from bertner.cli import predict_main; sys.exit(predict_main())"


def start(model: str, *arguments: str, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, "--model", model, *arguments],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )


def test_standard_input_is_answered_line_by_line_and_a_closed_pipe_ends_it(model: str) -> None:
    pipe = subprocess.PIPE
    with start(model, "-", stdin=pipe, stdout=pipe) as process:
        assert process.stdin
        assert process.stdout
        for text in (TEXT, "", "Paris"):
            process.stdin.write(text.encode() + b"\n")
            process.stdin.flush()
            # The answer comes before there is another line, or the end.
            assert json.loads(process.stdout.readline())["text"] == text
        process.stdout.close()
        process.stdin.write(b"Paris\n" * 20_000)
        process.stdin.close()
        assert process.wait(60) == 0
        assert process.stderr
        assert b"Traceback" not in process.stderr.read()


def test_a_run_that_is_ended_leaves_no_part_of_its_file(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    output = str(folder / "out.jsonl")
    with start(model, "--output_file", output, stdin=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(b"Paris\n" * 100)
        process.stdin.flush()
        timer = threading.Timer(60, process.kill)
        timer.start()
        while process.poll() is None and not any(p.stat().st_size for p in folder.iterdir()):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
        timer.cancel()
    assert list(folder.iterdir()) == []


def test_what_is_no_file_is_not_replaced(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, pipe = tmp_path / "text.txt", tmp_path / "pipe"
    path.write_text(TEXT, encoding="utf-8")
    os.mkfifo(pipe)
    command = ["--model", model, str(path)]
    for output in (pipe, tmp_path):
        error = run(capsys, *command, "--output_file", str(output), code=2)
        assert "is no regular file, and would be replaced" in error
    assert pipe.is_fifo()
    assert "no such file" in run(capsys, *command, str(tmp_path / "none"), code=65)
    output = tmp_path / "no folder" / "out"
    assert "cannot be written" in run(capsys, *command, "--output_file", str(output), code=74)


def test_colours_on_a_terminal(
    model: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    command = ["--model", model, "--output_format", "text", str(path)]
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b" not in run(capsys, *command)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = run(capsys, *command)
    assert "\x1b[1;38;5;" in coloured
    assert coloured.count("\x1b[0m") == coloured.count("\x1b[1;")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run(capsys, *command)


@pytest.mark.slow
@needs_conll
@needs_minilm
def test_conll_text_with_real_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Documents of 10, 1,000 and 100,000 words, in batches of any size, and one at a time."""
    torch.manual_seed(3)
    model = BertForNER.from_pretrained(MINILM, id2label=LABELS)
    with torch.no_grad():
        model.classifier.weight *= 50
    tokenizer = Tokenizer.from_pretrained(find_model(MINILM).folder, model.config)
    corpus = read_file(SHARED_DATA / "conll2003" / "valid.txt")
    texts = [" ".join(corpus.sentence(k)) for k in range(300)]
    words = corpus.words * 2
    texts += [" ".join(words[:count]) for count in (10, 1_000, 100_000)]
    expected = list(Tagger(model, tokenizer).stream(texts))
    assert expected[-1][-1].end > len(texts[-1]) - 200
    for batch_tokens in (32, 256, 16_384):
        other = list(Tagger(model, tokenizer, batch_tokens).stream(texts))
        for ours, theirs in zip(expected, other, strict=True):
            assert [(e.start, e.end, e.label) for e in ours] == [
                (e.start, e.end, e.label) for e in theirs
            ]
    alone = Tagger(model, tokenizer)
    for text, entities in zip(texts[:300], expected, strict=False):
        assert [(e.start, e.end, e.label) for e in alone(text)] == [
            (e.start, e.end, e.label) for e in entities
        ]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["lines", "jsonl", "conll"])
def test_memory_does_not_grow_with_the_input(model: str, tmp_path: Path, format: str) -> None:
    def peak(num_texts: int) -> int:
        path = tmp_path / "text"
        with path.open("w", encoding="utf-8") as stream:
            for number in range(num_texts):
                text = f"{TEXT} {number}"
                if format == "jsonl":
                    text = json.dumps({"text": text})
                elif format == "conll":
                    text = "\n".join(["-DOCSTART-", "", *text.split(), ""])
                stream.write(text + "\n")
        with (tmp_path / "tagged").open("wb") as output:
            command = ["--input_format", format, str(path)]
            with start(model, *command, stdout=output) as process:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_maxrss

    assert peak(200_000) < 1.1 * peak(20_000)
