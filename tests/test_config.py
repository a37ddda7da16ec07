"""The two configurations: checks, JSON and back, arithmetic of steps, settings from files."""

from __future__ import annotations

import builtins
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertner import config as config_module
from bertner.config import (
    ACTIVATIONS,
    METRICS,
    RECIPES,
    BertConfig,
    Reading,
    TrainConfig,
    check_settings,
    read_settings,
)
from bertner.errors import ModelError, UsageError

HUGE = 10**400  # no float can hold it


def through_json(values: dict[str, Any]) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(json.dumps(values))
    return parsed


# BertConfig


def test_bert_defaults_are_bert_base() -> None:
    config = BertConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        768,
        12,
        12,
    )
    assert config.num_labels == 2
    assert config.label_names == ["LABEL_0", "LABEL_1"]
    assert config.shape == "12 layers, hidden size 768, 12 heads"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]


bert_configs = st.builds(
    lambda heads, width, **rest: BertConfig(
        hidden_size=heads * width, num_attention_heads=heads, **rest
    ),
    heads=st.integers(1, 16),
    width=st.integers(1, 64),
    vocab_size=st.integers(5, 10**6),
    num_hidden_layers=st.integers(1, 48),
    intermediate_size=st.integers(1, 10**5),
    hidden_act=st.sampled_from(ACTIVATIONS),
    hidden_dropout_prob=st.floats(0, 1),
    attention_probs_dropout_prob=st.floats(0, 1) | st.sampled_from([0, 1]),
    classifier_dropout=st.none() | st.floats(0, 1),
    max_position_embeddings=st.integers(1, 10**5),
    type_vocab_size=st.integers(1, 4),
    initializer_range=st.floats(0, 1),
    layer_norm_eps=st.floats(0, 1),
    pad_token_id=st.none() | st.integers(0, 4),
    id2label=st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=9).map(
        lambda names: dict(enumerate(names))
    ),
)


@settings(deadline=None)
@given(bert_configs)
def test_bert_config_survives_json(config: BertConfig) -> None:
    values = through_json(config.to_dict())
    assert BertConfig.from_dict(values) == config
    assert values["label2id"] == {name: k for k, name in enumerate(config.label_names)}
    assert values["architectures"] == ["BertForTokenClassification"]


def test_bert_config_from_a_published_file() -> None:
    """The keys of bert-base-cased's config.json; those that shape no encoder are passed over."""
    config = BertConfig.from_dict(
        {
            "architectures": ["BertForMaskedLM"],
            "attention_probs_dropout_prob": 0.1,
            "gradient_checkpointing": False,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": 768,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 512,
            "model_type": "bert",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "pad_token_id": 0,
            "position_embedding_type": "absolute",
            "transformers_version": "4.6.0.dev0",
            "type_vocab_size": 2,
            "use_cache": True,
            "vocab_size": 28996,
        }
    )
    assert config == BertConfig(vocab_size=28996)


def test_labels_of_a_config() -> None:
    config = BertConfig.from_dict({"id2label": {"1": "B-X", "0": "O", "2": "I-X"}})
    assert config.label_names == ["O", "B-X", "I-X"]
    assert BertConfig.from_dict({"num_labels": 3}).label_names == ["LABEL_0", "LABEL_1", "LABEL_2"]
    both = BertConfig.from_dict({"num_labels": 7, "id2label": {"0": "O"}})
    assert both.num_labels == 1


def test_head_dropout() -> None:
    assert BertConfig(hidden_dropout_prob=0.3).head_dropout == 0.3
    assert BertConfig(hidden_dropout_prob=0.3, classifier_dropout=0.0).head_dropout == 0.0


SIZES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size "
    "max_position_embeddings type_vocab_size"
).split()
PROBABILITIES = "hidden_dropout_prob attention_probs_dropout_prob classifier_dropout".split()

BAD_SHAPES: list[tuple[str, Any]] = [
    *[(name, value) for name in SIZES for value in (0, -1, 1.0, True, None, "8", [8])],
    *[
        (name, value)
        for name in PROBABILITIES
        for value in (-0.1, 1.1, math.nan, math.inf, True, "0.1", [], HUGE)
    ],
    *[(name, None) for name in PROBABILITIES[:2]],
    *[
        (name, value)
        for name in ("initializer_range", "layer_norm_eps")
        for value in (-1e-9, math.nan, math.inf, None, False, "0", HUGE)
    ],
    ("hidden_size", 767),  # no multiple of the heads
    *[("hidden_act", value) for value in ("Gelu", "", None, ["gelu"], 1)],
    *[("pad_token_id", value) for value in (-1, 30522, 0.0, "0", True)],
]
BAD_LABELS: list[Any] = [
    {},
    {1: "O"},
    {0: "O", 2: "B-X"},
    {0: "O", 1: "O"},
    {0: "O", "1": "B-X"},
    {"0": "O"},
    {0: None},
    {0: ""},
    {0: ["O"]},
    ["O", "B-X"],
    None,
    "O",
]


@pytest.mark.parametrize(("name", "value"), BAD_SHAPES)
def test_bert_config_refuses(name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=name):
        BertConfig(**{name: value})
    with pytest.raises(ModelError, match=f"model/config.json: {name}") as caught:
        BertConfig.from_dict({name: value}, "model/config.json")
    assert caught.value.exit_code == 65


@pytest.mark.parametrize("labels", BAD_LABELS)
def test_bert_config_refuses_labels(labels: Any) -> None:
    with pytest.raises(ModelError, match="id2label"):
        BertConfig(id2label=labels)


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"model_type": "roberta"}, "model_type is 'roberta'; bertner computes only BERT"),
        ({"model_type": None}, "model_type is None"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"id2label": ["O"]}, "not a BERT configuration"),
        ({"id2label": {"zero": "O"}}, "not a BERT configuration"),
        ({"id2label": {"0": "O", "2": "B-X"}}, "id2label must name the labels 0, 1, 2"),
        ({"id2label": {"0": "O", "1": "O"}}, "names a label twice"),
        ({"id2label": {}}, "id2label must name"),
        ({"num_labels": 0}, "num_labels must be an integer >= 1"),
        ({"num_labels": "3"}, "num_labels must be an integer >= 1"),
    ],
)
def test_bert_config_refuses_files(values: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ModelError, match=pattern) as caught:
        BertConfig.from_dict(values, "m/config.json")
    assert str(caught.value).startswith("m/config.json: ")


# TrainConfig


def test_train_defaults_are_the_cards() -> None:
    config = TrainConfig()
    assert config.model_name_or_path == "bert-base-cased"
    assert config.train_source == "conll2003"
    assert config.output_dir == "bert-finetuned-ner"
    assert config.learning_rate == 2e-5
    assert (config.per_device_train_batch_size, config.per_device_eval_batch_size) == (8, 8)
    assert (config.adam_beta1, config.adam_beta2, config.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert (config.weight_decay, config.max_grad_norm) == (0.01, 1.0)
    assert (config.num_train_epochs, config.seed) == (3.0, 42)
    assert (config.warmup_steps, config.warmup_ratio) == (0, 0.0)
    assert config.logging_steps == 500
    assert config.label_all_tokens
    assert TrainConfig(train_file="a.txt").train_source == "a.txt"
    assert TrainConfig(dataset_name="x/y").train_source == "x/y"


def _values_of(item: dataclasses.Field[Any]) -> st.SearchStrategy[Any]:
    """Values that are fine for a field whatever the others are."""
    if item.name in ("dataset_name", "train_file", "validation_file", "test_file"):
        return st.none()
    if item.name == "metric_for_best_model":
        return st.sampled_from([*METRICS, *(f"eval_{name}" for name in METRICS)])
    if item.name in ("load_best_model_at_end", "early_stopping_patience"):
        return st.just(item.default)  # others need evaluations
    if item.name == "early_stopping_threshold":
        return st.just(0.0)  # others need a patience
    if item.name == "seeds":
        return st.just(1)  # more leave nothing to resume_from_checkpoint
    if item.name == "attn_implementation":
        return st.just("sdpa")  # eager is for padded rows alone
    if item.name == "matmul":
        return st.sampled_from(["auto", "default"])  # onednn for packed ones
    if item.name == "context_tokens":
        return st.none()  # others need context, and room in a row
    if item.name == "window_overlap":
        return st.sampled_from([None, 0])  # at most half of the longest row
    if item.name == "word_decision":
        return st.just("first")  # all needs label_all_tokens
    if item.name == "dropout_by_row":
        return st.just(False)  # for packed rows
    if item.metadata["choices"]:
        return st.sampled_from(item.metadata["choices"])
    kind = str(item.type)
    if kind.startswith("bool"):
        values: st.SearchStrategy[Any] = st.booleans()
    elif kind.startswith("int"):
        values = st.integers(3, 2**63 - 1)
    elif kind.startswith("float"):
        values = st.floats(0.001, 0.999)
    else:
        values = st.text(min_size=1)
    return values | st.none() if kind.endswith("| None") else values


train_values = st.fixed_dictionaries(
    {}, optional={item.name: _values_of(item) for item in dataclasses.fields(TrainConfig)}
)


def test_choices_that_belong_to_one_layout_of_rows() -> None:
    with pytest.raises(UsageError, match="add --no-packing"):
        TrainConfig(attn_implementation="eager")
    with pytest.raises(UsageError, match="leave out --no-packing"):
        TrainConfig(packing=False, matmul="onednn")
    with pytest.raises(UsageError, match="leave out --no-packing"):
        TrainConfig(packing=False, dropout_by_row=True)
    assert TrainConfig(attn_implementation="eager", packing=False).attn_implementation == "eager"
    assert TrainConfig(matmul="onednn").matmul == "onednn"


@settings(deadline=None)
@given(train_values)
def test_train_config_survives_json(values: dict[str, Any]) -> None:
    config = TrainConfig.from_dict(values)
    again = TrainConfig.from_dict(through_json(config.to_dict()))
    assert again == config
    assert config.to_dict().keys() == {item.name for item in dataclasses.fields(TrainConfig)}


INTEGERS_ABOVE_0 = (
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps "
    "logging_steps eval_steps save_steps save_total_limit max_train_samples max_eval_samples "
    "early_stopping_patience seeds"
).split()
FLOATS = (
    "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm warmup_ratio "
    "num_train_epochs early_stopping_threshold label_smoothing_factor"
).split()
FIELDS = {item.name: item for item in dataclasses.fields(TrainConfig)}
STRINGS = [name for name, item in FIELDS.items() if str(item.type).startswith("str")]
BOOLEANS = [name for name, item in FIELDS.items() if str(item.type).startswith("bool")]
CHOICES = [name for name, item in FIELDS.items() if item.metadata["choices"]]
NOT_NONE = [name for name, item in FIELDS.items() if not str(item.type).endswith("None")]

BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    *[({name: value}, name) for name in INTEGERS_ABOVE_0 for value in (0, -1, 1.0, True, "1", [])],
    *[({name: 2**63}, f"{name} must be below") for name in [*INTEGERS_ABOVE_0, "seed"]],
    *[
        ({name: value}, name)
        for name in FLOATS
        for value in (-0.1, math.nan, math.inf, -math.inf, "1", True, [], HUGE)
    ],
    *[({name: value}, name) for name in STRINGS for value in (1, True, [], b"x", "")],
    *[({name: value}, name) for name in BOOLEANS for value in (0, 1, "true", [])],
    *[({name: "other"}, f"{name} must be one of") for name in CHOICES],
    *[({name: None}, f"{name} must be") for name in NOT_NONE],
    *[({"max_steps": value}, "max_steps must be at least 1, or -1") for value in (0, -2)],
    ({"max_steps": 1.0}, "max_steps must be int"),
    ({"max_steps": -(2**63)}, "max_steps must be below"),
    *[({"max_seq_length": value}, "max_seq_length must be at least 3") for value in (2, 0, -1)],
    ({"word_decision": "all", "label_all_tokens": False}, "all needs label_all_tokens"),
    ({"max_seq_length": 20, "window_overlap": 10}, "window_overlap 10 .*; use at most 9"),
    (
        {"context": "document", "context_unit": "sentence", "context_tokens": 0},
        "context_tokens 0 gives a sentence no context",
    ),
    (
        {"context": "document", "max_seq_length": 20, "context_tokens": 9},
        "context_tokens 9 on each side .*; use at most 8",
    ),
    *[({name: -1}, name) for name in ("window_overlap", "context_tokens", "train_batch_tokens")],
    *[({"seed": value}, "seed") for value in (-1, 1.5, 2**64)],
    *[({"warmup_steps": value}, "warmup_steps") for value in (-1, 0.5)],
    ({"warmup_ratio": 1.01}, "warmup_ratio must be between 0 and 1"),
    *[
        ({name: 1.0}, f"{name} must be below 1")
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor")
    ],
    ({"num_train_epochs": 0}, "num_train_epochs must be above 0"),
    ({"num_train_epochs": 1e308}, "num_train_epochs must be at most"),
    ({"metric_for_best_model": "accuracy_"}, "metric_for_best_model 'accuracy_' is not measured"),
    ({"dataset_name": "x", "train_file": "y"}, "not both"),
    ({"dataset_name": "x", "validation_file": "y"}, "a dataset brings its own splits"),
    ({"dataset_name": "x", "test_file": "y"}, "a dataset brings its own splits"),
    ({"validation_file": "y"}, "validation_file needs train_file"),
    ({"test_file": "y"}, "test_file needs train_file"),
    ({"load_best_model_at_end": True, "eval_strategy": "no"}, "needs eval_strategy"),
    ({"early_stopping_patience": 1, "eval_strategy": "no"}, "needs eval_strategy steps or epoch"),
    ({"early_stopping_threshold": 0.1}, "early_stopping_threshold needs early_stopping_patience"),
    ({"seeds": 2, "seed": 2**63 - 1}, "leaves no room for 2 seeds"),
    ({"seeds": 2, "resume_from_checkpoint": "x"}, "is for one seed: leave it out"),
]


@pytest.mark.parametrize(("values", "pattern"), BAD_SETTINGS, ids=lambda value: str(value)[:60])
def test_train_config_refuses(values: dict[str, Any], pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern) as caught:
        TrainConfig(**values)
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match=pattern):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0},  # an integer is a fine float
        {"max_grad_norm": 0.0},
        {"adam_beta1": 0.0},
        {"warmup_ratio": 1},
        {"num_train_epochs": 0.0, "max_steps": 1},
        {"num_train_epochs": 0.01},
        {"max_seq_length": 3},
        {"seed": 2**63 - 1},
        {"seed": 2**63 - 2, "seeds": 2},
        {"metric_for_best_model": "eval_f1"},
        {"train_file": "a", "validation_file": "b", "test_file": "c"},
        {"load_best_model_at_end": True},
        {"early_stopping_patience": 1, "early_stopping_threshold": 0},
        {"save_total_limit": None},
    ],
)
def test_train_config_accepts(values: dict[str, Any]) -> None:
    config = TrainConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"decoding": "Viterbi"}, "decoding must be one of argmax viterbi, not 'Viterbi'"),
        ({"context": "doc"}, "context must be one of"),
        ({"word_decision": "ALL"}, "word_decision must be one of"),
        ({"max_seq_length": 2}, "max_seq_length must be at least 3"),
        ({"window_overlap": -3}, "window_overlap must be at least 0"),
        ({"label_all_tokens": None}, "label_all_tokens must be bool"),
    ],
)
def test_a_reading_is_checked_as_settings_are(values: dict[str, Any], pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern):
        Reading(**values)


@pytest.mark.parametrize("name", ["x\x1b[2J\nbertner-train: all is well", "learning_rate"])
def test_a_model_cannot_ask_to_be_read_in_unknown_ways(name: str) -> None:
    with pytest.raises(ModelError, match=name[:1]) as caught:
        BertConfig.from_dict({"bertner_reading": {name: 1}}, "config.json")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("settings", "limit", "tokens"),
    [
        ({}, 10, 0),
        ({"context_tokens": 9}, 10, 0),
        ({"context": "document"}, 10, 0),
        ({"context": "document", "context_tokens": 4}, 10, 4),
        ({"context": "document", "context_unit": "sentence"}, 10, 64),
        ({"context": "document", "context_unit": "sentence", "context_tokens": 9}, 10, 9),
    ],
)
def test_context_on_each_side(settings: dict[str, Any], limit: int, tokens: int) -> None:
    assert Reading(**settings).context_budget(limit) == tokens


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_recipes_are_valid(recipe: str) -> None:
    TrainConfig.from_dict(RECIPES[recipe])


def test_warmup_steps() -> None:
    assert TrainConfig().resolved_warmup_steps(100) == 0
    assert TrainConfig(warmup_ratio=0.1).resolved_warmup_steps(100) == 10
    assert TrainConfig(warmup_ratio=0.1).resolved_warmup_steps(101) == 11  # up, as the Trainer
    assert TrainConfig(warmup_ratio=1).resolved_warmup_steps(7) == 7
    assert TrainConfig(warmup_steps=3, warmup_ratio=0.5).resolved_warmup_steps(100) == 3


# Settings from files


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], str]:
    def write_file(name: str, content: str | bytes) -> str:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write_file


Write = Callable[[str, "str | bytes"], str]


def test_settings_from_json_and_toml(write: Write) -> None:
    expected = {"learning_rate": 3e-5, "max_steps": 10, "train_file": "a.txt", "disable_tqdm": True}
    assert read_settings(write("a.json", json.dumps(expected))) == expected
    toml = 'learning_rate = 3e-5\nmax-steps = 10\n"train_file" = "a.txt"\ndisable_tqdm = true\n'
    for name in ("a.toml", "b.TOML"):
        assert read_settings(write(name, toml)) == expected
    assert read_settings(write("bom.json", b'\xef\xbb\xbf{"seed": 1}\r\n')) == {"seed": 1}
    assert read_settings(write("bom.toml", b"\xef\xbb\xbfseed = 1\r\n")) == {"seed": 1}
    assert read_settings(write("empty.json", "{}")) == {}
    assert read_settings(write("empty.toml", "")) == {}


def test_settings_may_have_any_name_of_a_flag(write: Write) -> None:
    path = write("a.json", '{"model": "x", "train-batch-size": 4, "eval_batch_size": 2}')
    assert read_settings(path) == {
        "model_name_or_path": "x",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
    }


def test_toml_is_read_in_python_3_10(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 has no tomllib; tomli is its twin."""
    toml = 'learning_rate = 3e-5\ntrain_file = "a.txt"\n'
    path = write("a.toml", toml)
    asked: list[str] = []
    twin = SimpleNamespace(loads=lambda text: asked.append(text) or {"seed": 7})
    monkeypatch.setitem(sys.modules, "tomli", twin)
    monkeypatch.setattr(config_module, "sys", SimpleNamespace(version_info=(3, 10, 13)))
    really_import = builtins.__import__

    def import_as_3_10(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tomllib":
            raise ModuleNotFoundError(name)
        return really_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_as_3_10)
    assert read_settings(path) == {"seed": 7}
    assert asked == [toml]


@pytest.mark.parametrize(
    ("name", "content", "pattern"),
    [
        ("a.json", "", "not JSON"),
        ("a.json", '{"seed": 1', "not JSON"),
        ("a.json", b'{"seed": "\xff"}', "not JSON.*utf-8"),
        ("a.json", "[" * 100_000, "not JSON"),
        ("a.json", "[1]", "must hold one object of settings"),
        ("a.json", "null", "must hold one object of settings"),
        ("a.json", '{"learning_rat": 1}', "no such setting: learning_rat; did you mean learning_r"),
        ("a.json", '{"train-fil": 1}', "no such setting: train_fil; did you mean train_file"),
        ("a.json", '{"zzz": 1, "qqq": 1}', "no such setting: qqq, zzz$"),
        ("a.json", '{"max-steps": 1, "max_steps": 2}', "max_steps is given twice"),
        ("a.json", '{"model": "x", "model_name_or_path": "y"}', "model_name_or_path is given twi"),
        ("a.toml", "seed = ", "not TOML"),
        ("a.toml", '{"seed": 1}', "not TOML"),
        ("a.toml", b"seed = '\xff'", "not TOML.*utf-8"),
        ("a.toml", "seed = " + "[" * 100_000, "not TOML"),
        ("a.toml", "[train]\nseed = 1\n", "no such setting: train"),
    ],
)
def test_read_settings_refuses(name: str, content: str | bytes, pattern: str, write: Write) -> None:
    path = write(name, content)
    with pytest.raises(UsageError, match=pattern) as caught:
        read_settings(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.exit_code == 2


def test_read_settings_refuses_what_is_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UsageError, match=f"^{path}: ") as caught:
            read_settings(str(path))
        assert caught.value.exit_code == 2


def test_unknown_settings_have_a_hint() -> None:
    with pytest.raises(UsageError, match="no such setting: num_epochs; did you mean num_train_e"):
        TrainConfig.from_dict({"num_epochs": 3})
    with pytest.raises(UsageError, match=r"^run\.json: no such setting: Seed; did you mean seed\?"):
        check_settings({"Seed": 1, "max_steps": 1}, "run.json")
    check_settings({"seed": 1})
