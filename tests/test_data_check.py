"""`--check_data`: everything that is wrong in these data on purpose is found, and where it is."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import sys
from pathlib import Path

import pytest

from bertner.cli import parse_train_config, train_main
from bertner.config import Reading
from bertner.corpus import CorpusStream, Misfit
from bertner.data import CARD_READING, prepare
from bertner.data_check import check_data, check_datasets
from bertner.findings import DataCheck, Finding, format_check
from bertner.parts import announce, build_parts
from bertner.readers import open_file, read_file
from bertner.tokenizer import Tokenizer
from tests.conftest import SAMPLE, corpus_of, needs_minilm, write_conll

NAMES = ["train", "validation", "test"]


def check(tokenizer: Tokenizer, *splits: list[str], reading: Reading = CARD_READING) -> DataCheck:
    corpora = {
        name: dataclasses.replace(corpus_of(*sentences), source=f"{name}.txt")
        for name, sentences in zip(NAMES, splits, strict=False)
    }
    return check_data(corpora, tokenizer, reading)


def found(result: DataCheck, name: str) -> list[Finding]:
    return [finding for finding in result.findings if finding.name == name]


def places(finding: Finding) -> list[tuple[str, int, str]]:
    return [(each.source, each.line, each.text) for each in finding.examples]


# Enough entities that no type is rare.
GOOD = [f"the Paris/B-LOC said {k}" for k in range(10)]


def test_good_data_have_no_findings(tokenizer: Tokenizer) -> None:
    result = check(tokenizer, GOOD, ["London/B-LOC in the land", "of London/B-LOC"])
    assert result.findings == ()
    assert result.row_limit == 128
    train, validation = result.splits.values()
    assert (train.num_sentences, train.num_with_entities, train.num_words) == (10, 10, 40)
    assert (train.scheme, train.entity_counts, train.by_training) == ("IOB2", {"LOC": 10}, None)
    assert train.lengths == {"p50": 6, "p95": 6, "p99": 6, "max": 6}
    assert validation.by_training == {"seen": 0, "other type": 0, "unseen": 2}


def test_types_that_training_lacks_are_all_listed(tokenizer: Tokenizer) -> None:
    result = check(
        tokenizer,
        GOOD,
        ["Paris/B-LOC x", "Mary/B-ANIMAL Poe/I-ANIMAL", "a/B-TOY"],
        ["a/B-TOY", "b/B-TOY said/B-LOC"],
    )
    validation, test = found(result, "types not in training")
    assert (validation.severity, validation.count) == ("error", 2)
    assert "validation: 2 entities of types that train lacks: ANIMAL (1), TOY (1)" in str(
        validation
    )
    assert places(validation) == [
        ("validation.txt", 2, "ANIMAL (1)"),
        ("validation.txt", 3, "TOY (1)"),
    ]
    assert places(test) == [("test.txt", 1, "TOY (2)")]
    assert result.findings[:2] == (validation, test), "the gravest come first"


def test_splits_without_entities(tokenizer: Tokenizer) -> None:
    train, validation = found(check(tokenizer, ["the", "of"], ["said"]), "no entities")
    assert (train.severity, validation.severity) == ("error", "warning")
    assert not found(check(tokenizer, GOOD, ["said"]), "types not scored")


def test_rare_types_and_types_that_are_not_scored(tokenizer: Tokenizer) -> None:
    result = check(tokenizer, [*GOOD, "a/B-TOY"], ["Paris/B-LOC"])
    (rare,), (absent,) = found(result, "rare types"), found(result, "types not scored")
    assert places(rare) == places(absent) == [("train.txt", 11, "TOY (1)")]
    assert (rare.severity, absent.severity) == ("warning", "note")


@pytest.mark.parametrize(
    ("kind", "other", "count", "alike"),
    [
        ("PERS", "PER", 1, True),
        ("PERSON", "PER", 1, True),
        ("LOCATION", "LOC", 1, True),
        ("Person", "Preson", 1, True),
        ("per", "PER", 40, True),
        ("PERS", "PER", 40, False),
        ("PERCENT", "PERSON", 1, False),
        ("event-war", "event-sport", 1, False),
        ("event-wars", "event-war", 1, True),
        ("T1", "T2", 1, False),
        ("LOC", "PER", 1, False),
    ],
)
def test_types_that_look_misspelt(
    tokenizer: Tokenizer, kind: str, other: str, count: int, alike: bool
) -> None:
    train = [f"a/B-{other}"] * 60 + [f"b/B-{kind}"] * count
    findings = found(check(tokenizer, train), "types alike")
    assert bool(findings) == alike
    if alike:
        assert f"{kind} ({count}) beside {other} (60)" in findings[0].title
        assert places(findings[0]) == [("train.txt", 61, f"{kind} ({count})")]
        assert not found(check(tokenizer, train), "rare types"), "said once is enough"


def test_schemes_and_tags_that_do_not_fit_them(tokenizer: Tokenizer) -> None:
    train = [*GOOD, "the Mary/I-LOC of", "Poe/I-LOC", "Mary/B-LOC Poe/I-TOY"]
    result = check(tokenizer, train, ["Paris/I-LOC", "said Mary/I-LOC"])
    (schemes,), (misfits,) = found(result, "schemes"), found(result, "misfits")
    assert "IOB2 in train, IOB1 in validation" in schemes.title
    assert misfits.count == 3
    assert places(misfits) == [
        ("train.txt", 11, "I-LOC on 'Mary', after O, before O"),
        ("train.txt", 12, "I-LOC on 'Poe', after the start, before the end"),
        ("train.txt", 13, "I-TOY on 'Poe', after B-LOC, before the end"),
    ]


def test_the_first_misfits_are_kept_in_blocks_too(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("Paris B-X\nsaid O\n\nof I-X\nthe O\n\n" + "x I-X\n\n" * 3 + "Poe B-X\n\n" * 9)
    whole = open_file(path).read()
    assert whole.num_misfits == 4
    assert whole.misfits[0] == Misfit(4, "of", "I-X", None, "O")
    stream = open_file(path)
    assert isinstance(stream, CorpusStream)
    for _ in stream.blocks(2):
        pass
    assert tuple(stream.builder._misfits["IOB2"]) == whole.misfits
    path.write_text("x I-X\n\n" * 9 + "Poe B-X\n\n" * 10)
    assert (read_file(path).num_misfits, len(read_file(path).misfits)) == (9, 5)


def test_sentences_that_stand_in_another_split(tokenizer: Tokenizer) -> None:
    validation = ["the Paris/B-LOC said 3", "the Paris said 4", "Paris/B-LOC", "Paris/B-LOC"]
    result = check(tokenizer, GOOD, validation, ["Paris/B-LOC", *GOOD[1:3]])
    leaks = found(result, "shared sentences")
    assert [finding.title for finding in leaks] == [
        "validation: 2 of 4 sentences (50.0 %) also in train, 1 of them with other tags",
        "test: 2 of 3 sentences (66.7 %) also in train",
        "test: 1 of 3 sentences (33.3 %) also in validation",
    ]
    assert places(leaks[0]) == [
        ("validation.txt", 1, "as train line 4: the Paris said 3"),
        ("validation.txt", 2, "as train line 5: the Paris said 4"),
    ]
    assert places(leaks[2]) == [("test.txt", 1, "as validation line 3: Paris")]
    (repeated,) = found(result, "repeated sentences")
    assert places(repeated) == [("validation.txt", 4, "as line 3: Paris")]
    (differing,) = found(result, "sentences tagged differently")
    assert places(differing) == [
        ("validation.txt", 2, "'Paris' is O, B-LOC in train line 5: the Paris said 4")
    ]


def test_long_copies_come_first_and_few_are_a_note(tokenizer: Tokenizer) -> None:
    train = [f"Paris/B-LOC {k}" for k in range(200)]
    others = [f"London/B-LOC {k}" for k in range(300)]
    (leak,) = found(check(tokenizer, train, [*others, train[7]]), "shared sentences")
    assert leak.severity == "note"
    train += ["the long land of Paris/B-LOC"]
    (leak,) = found(check(tokenizer, train, [train[7], *others, train[-1]]), "shared sentences")
    assert [line for _, line, _ in places(leak)] == [302, 1]


def test_strings_that_are_tagged_in_several_ways(tokenizer: Tokenizer) -> None:
    train = [f"{k} Paris/B-LOC" for k in range(40)]
    train += ["said Paris", "x Paris/B-ORG y"]
    train += ["of Mary/B-PER Poe/I-PER", "to Mary/B-ORG Poe/I-ORG", "in Mary Poe", "in Mary Poe"]
    train += ["of Mary/B-PER", "in Poe/B-PER Mary/I-PER Poe/I-PER"]
    result = check(tokenizer, train, ["a Mary Poe"])
    (slips,) = found(result, "slips")
    assert slips.count == 2
    assert places(slips) == [
        ("train.txt", 42, "'Paris' is ORG, but LOC 40 times"),
        ("train.txt", 41, "'Paris' is no entity, but LOC 40 times"),
    ]
    (mixed,) = found(result, "strings tagged differently")
    # Mary of "Poe Mary Poe" does not count: it is within a longer entity.
    assert places(mixed) == [
        ("train.txt", 43, "'Mary Poe' is PER here; no entity 3, PER 1, ORG 1"),
        ("train.txt", 47, "'Mary' is PER here; no entity 3, PER 1"),
    ]


def test_words_that_the_model_does_not_read(tokenizer: Tokenizer) -> None:
    train = [
        *GOOD,
        "\u200b/B-LOC said \xad",
        "Pari\u20ac \u65e5 x\u0416y \u65e5a",
        f"{'x' * 150} {'-' * 127}",
    ]
    result = check(tokenizer, train)
    (unseen,) = found(result, "unseen words")
    assert (unseen.severity, unseen.count) == ("warning", 2)
    assert places(unseen) == [("train.txt", 11, r"'\u200b'"), ("train.txt", 11, r"'\xad'")]
    (unknown,) = found(result, "unknown words")
    assert unknown.count == 5
    title = unknown.title.partition("spell: ")[2]
    assert title == "日 (U+65E5) in 2, € (U+20AC) in 1, Ж (U+0416) in 1, too long 1"
    (long,) = found(result, "long words")
    assert (long.count, long.examples[0].line) == (1, 13)
    assert not found(check(tokenizer, GOOD), "unknown words")


def test_sentence_lengths(tokenizer: Tokenizer) -> None:
    reading = Reading(max_seq_length=12)
    train = [*GOOD, "the " * 11, "the " * 10, "the " * 20]
    result = check(tokenizer, train, reading=reading)
    (cut,) = found(result, "cut sentences")
    assert (result.row_limit, cut.count, result.splits["train"].num_cut) == (12, 2, 2)
    assert [(line, text[:10]) for _, line, text in places(cut)] == [
        *[(13, "22 tokens:"), (11, "13 tokens:")]
    ]
    assert result.splits["train"].lengths["max"] == 22
    (alone,) = found(check(tokenizer, ["Paris/B-LOC", "said", "of the"]), "lone words")
    assert [line for _, line, _ in places(alone)] == [1, 2]


def test_context_needs_documents(tokenizer: Tokenizer) -> None:
    result = check(tokenizer, GOOD, reading=Reading(context="document"))
    (finding,) = found(result, "no documents")
    assert finding.severity == "error"


def test_arrays_tell_the_same_as_words(tokenizer: Tokenizer, tmp_path: Path) -> None:
    files = {
        "train": "Paris B-LOC\nsaid O\n\n" * 30 + "a B-TOY\n\n\u65e5 O\n\n\u65e5a O\nb B-LOC\n",
        "validation": "Paris I-LOC\nsaid O\n\nin O\nLondon I-LOC\n\n\u200b O\n\n",
    }
    corpora, prepared = {}, {}
    label_set = None
    for name, text in files.items():
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        corpora[name] = read_file(path)
        prepared[name] = prepare(open_file(path), tokenizer, label_set)
        label_set = prepared["train"].dataset.label_set
    short = check_datasets(
        {name: each.summary for name, each in prepared.items()},
        {name: each.dataset for name, each in prepared.items()},
        tokenizer,
    )
    assert [finding.name for finding in short] == [
        *["rare types", "schemes", "shared sentences", "unknown words"]
    ]
    whole = check_data(corpora, tokenizer)
    for finding in short:
        (same,) = found(whole, finding.name)
        assert (finding.severity, finding.count) == (same.severity, same.count)
        assert finding.examples == ()


def test_what_is_printed(tokenizer: Tokenizer) -> None:
    train = [*GOOD, *[f"the x\x1b[31my/B-LOC said {'land ' * 40}" for _ in range(8)]]
    text = format_check(check(tokenizer, train, ["Paris/B-LOC said", GOOD[2], "a/B-TOY"]))
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[:2] == ["train       train.txt", "validation  validation.txt"]
    rows = [line.split() for line in lines]
    assert ["sentences", "18", "3"] in rows
    assert ["TOY", "0", "1"] in rows
    assert ["with", "the", "same", "type", "66.7", "%"] in rows
    assert "error: validation: 1 entity of types that train lacks: TOY (1)" in lines
    assert "    validation.txt:3  TOY (1)" in lines
    examples = [line for line in lines if "as line 11: the x\\x1b[31my said land" in line]
    assert [line.split()[0] for line in examples] == [f"train.txt:{k}" for k in range(12, 17)]
    assert all(line.endswith("...") and len(line) < 120 for line in examples)
    assert lines[lines.index(examples[-1]) + 1] == "    and 2 more"
    assert lines[-1].endswith("(--check_data json gives more examples)")


# The command


@pytest.fixture
def flags(tmp_path: Path, model_folder: Path) -> list[str]:
    write_conll(tmp_path / "train.txt")
    write_conll(tmp_path / "dev.txt", seed=1)
    with (tmp_path / "dev.txt").open("a", encoding="utf-8") as file:
        file.write("a B-TOY\n\n\u65e5 O\n")
    return [
        *["--model", str(model_folder), "--train_file", str(tmp_path / "train.txt")],
        *["--validation_file", str(tmp_path / "dev.txt"), "--output_dir", str(tmp_path / "out")],
    ]


def test_the_command_prints_and_writes_nothing(
    tmp_path: Path, flags: list[str], cache_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny-bert" / "model.safetensors").unlink()  # the weights are not needed
    assert train_main(["--check_data", *flags]) == 0
    printed = capsys.readouterr().out
    assert "error: validation: 1 entity of types that train lacks: TOY (1)" in printed
    assert f"{tmp_path / 'dev.txt'}:" in printed
    assert not (tmp_path / "out").exists()
    assert not list(cache_folder.iterdir())


def test_the_command_as_json(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--max_train_samples", "5", "--max_eval_samples", "3", "--max_seq_length", "20"]
    assert train_main([*flags, *more, "--check-data", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["row_limit"] == 20
    assert {name: each["num_sentences"] for name, each in result["splits"].items()} == {
        "train": 5,
        "validation": 3,
    }
    for finding in result["findings"]:
        assert finding.keys() == {each.name for each in dataclasses.fields(Finding)}


def test_a_terminal_that_lacks_the_words(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", output)
    assert train_main(["--check_data", *flags]) == 0
    output.flush()
    assert b"\\u65e5 (U+65E5) in 1" in output.buffer.getvalue()


def test_data_that_cannot_be_read_end_as_ever(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dev.txt").write_text("a TOY\n")
    assert train_main(["--check_data", *flags]) == 65
    assert f"{tmp_path / 'dev.txt'}:1: tag 'TOY' has no B-" in capsys.readouterr().err


def test_a_file_is_no_value(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_main([*flags, "--check_data", "train.txt"])
    assert "choose from" in capsys.readouterr().err


def test_training_begins_with_what_is_found(
    tmp_path: Path, flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    dev = tmp_path / "dev.txt"
    dev.write_text((tmp_path / "train.txt").read_text())
    config, _ = parse_train_config(flags)
    with caplog.at_level(logging.INFO, "bertner"):
        announce(config, build_parts(config))
    messages = [record.getMessage() for record in caplog.records]
    assert "validation: 24 of 24 sentences (100.0 %) also in train, as wordpieces" in messages
    assert "the same command with --check_data shows where, and more" in messages


@needs_minilm
def test_the_sample_corpus_is_sound(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main(["--quickstart", "--check_data"]) == 0
    printed = capsys.readouterr().out
    assert str(SAMPLE / "test.txt") in printed
    assert "Found: 0 errors, 0 warnings, 1 note" in printed
