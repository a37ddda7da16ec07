"""The model card: a README.md in which every section is filled from what the run knows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from bertner import __version__
from bertner.config import BertConfig, TrainConfig
from bertner.corpus import CorpusSummary
from bertner.evaluation import Evaluation
from bertner.metrics import EntityScores
from bertner.progress import TrainResult
from bertner.report import TABLE_COLUMNS

# What `_limits` says of scores, which `card_of_seeds` knows better.
_ONE_SEED = (
    "Scores are of one run with one seed; expect other seeds to differ by some tenths of a point, "
    "more on small data."
)


@dataclass(frozen=True)
class RunFacts:
    """What a card is made of.

    Attributes:
        config: The recipe.
        base_model: As the user named it.
        base_commit: Its commit on the Hub, if it came from there.
        corpora: `train`, and `validation` and `test` where there are any.
        num_train_tokens: Tokens in one epoch, special tokens included.
        class_weights: Of the labels in the training loss, if there were any.
        model: Shape and labels of the model.
        num_parameters: Of the whole model.
        max_length: Longest row in tokens.
        lowercase: Whether the tokenizer lower-cases.
        result: What training did.
        rows: The table of the run.
        evaluations: By split: the kept model's scores.
        kept_step: Step of the kept weights.
        versions: Library versions by name.
        device: What it ran on.
        resumes: Each time that the run was carried on (see `record.run_record`).
        reliability: Of the confidence of entities on the validation data; None if it is unknown.
    """

    config: TrainConfig
    base_model: str
    base_commit: str | None
    corpora: Mapping[str, CorpusSummary]
    num_train_tokens: int
    class_weights: Mapping[str, float]
    model: BertConfig
    num_parameters: int
    max_length: int
    lowercase: bool
    result: TrainResult
    rows: Sequence[Sequence[str]]
    evaluations: Mapping[str, Evaluation]
    kept_step: int
    versions: Mapping[str, str]
    device: str
    resumes: Sequence[Mapping[str, Any]] = ()
    reliability: Mapping[str, Any] | None = None


def model_card(facts: RunFacts) -> str:
    """The card as Markdown, with the Hub's YAML in front."""
    name = Path(facts.config.output_dir).resolve().name
    sections = [
        f"---\n{_metadata(facts, name).to_yaml()}\n---",
        f"# {name}",
        _summary(facts),
        "## Use\n\n" + _use(name),
        "## Scores\n\n" + _scores(facts),
        "## Training data\n\n" + _data(facts),
        "## Training procedure\n\n" + _procedure(facts),
        "## Intended use and limits\n\n" + _limits(facts),
        "## Versions\n\n" + "\n".join(f"- {k} {v}" for k, v in facts.versions.items()),
    ]
    return "\n\n".join(sections) + "\n"


def card_of_seeds(card: str, names: tuple[str, str], seeds: str, limits: str) -> str:
    """The card of a run of several seeds: that of the one whose model is kept, and of the others.

    Args:
        card: What `model_card` wrote of the run that is kept.
        names: Of the folder that the model was in, and of the one that it is in now.
        seeds: What there is to say of all seeds, as Markdown.
        limits: One sentence: whose scores are shown.
    """
    old, new = names
    # In the metadata, the title and the examples; a JSON string is one in YAML and Python too.
    quoted = json.dumps(new, ensure_ascii=False)
    for before, after in (
        (f"\n- name: {old}\n", f"\n- name: {quoted}\n"),
        (f"\n# {old}\n", f"\n# {new}\n"),
        (f'"{old}"', quoted),
        (_ONE_SEED, limits),
    ):
        card = card.replace(before, after)
    scores, heading, rest = card.partition("\n## Training data\n")
    return f"{scores}\n## Seeds\n\n{seeds}\n{heading}{rest}"


def data_name(source: str) -> str:
    """A data source as a card shows it: Hub datasets in full, files without their folders."""
    package = Path(__file__).parent
    path = Path(source)
    if path.is_relative_to(package):
        return str(Path("bertner") / path.relative_to(package))
    return path.name if path.is_absolute() or path.exists() else source


def _metadata(facts: RunFacts, name: str) -> ModelCardData:
    source = facts.config.train_source
    is_hub_dataset = facts.config.train_file is None and not Path(source).exists()
    results = []
    for split, evaluation in facts.evaluations.items():
        for level, scores in (("word", evaluation.word), ("subword", evaluation.subword)):
            values = {
                "precision": scores.overall.precision,
                "recall": scores.overall.recall,
                "f1": scores.overall.f1,
                "accuracy": scores.accuracy,
            }
            results += [
                EvalResult(
                    task_type="token-classification",
                    task_name="Token Classification",
                    dataset_type=source if is_hub_dataset else "custom",
                    dataset_name=data_name(facts.corpora[split].source),
                    dataset_split=split,
                    metric_type=metric,
                    metric_name=f"{metric} ({level} level)",
                    metric_value=round(value, 6),
                )
                for metric, value in values.items()
            ]
    is_hub_model = facts.base_commit is not None
    return ModelCardData(
        language=None,
        library_name="transformers",
        pipeline_tag="token-classification",
        tags=["bertner", "named-entity-recognition", "token-classification", "bert"],
        base_model=facts.base_model if is_hub_model else None,
        datasets=[source] if is_hub_dataset else None,
        model_name=name,
        eval_results=results or None,
    )


def _summary(facts: RunFacts) -> str:
    types = sorted({label[2:] for label in facts.model.label_names if label != "O"})
    commit = f" (commit `{facts.base_commit}`)" if facts.base_commit else ""
    return (
        f"A token classifier that finds {', '.join(types)} entities in text: "
        f"`{facts.base_model}`{commit} fine-tuned on `{data_name(facts.config.train_source)}` "
        f"with bertner {__version__}. BERT encoder of "
        f"{facts.model.shape}, {facts.num_parameters:,} parameters, "
        f"{'uncased' if facts.lowercase else 'cased'}, rows of up to {facts.max_length} tokens."
    )


def _use(name: str) -> str:
    return f"""With bertner (texts of any length; offsets are into your text):

```python
from bertner.predict import Tagger

tagger = Tagger.from_pretrained("{name}")
for entity in tagger(["Angela Merkel visited Paris ."])[0]:
    print(entity.start, entity.end, entity.label, entity.text, entity.score)
```

With `transformers`:

```python
from transformers import pipeline

tagger = pipeline("token-classification", model="{name}", aggregation_strategy="first")
print(tagger("Angela Merkel visited Paris ."))
```"""


def _scores(facts: RunFacts) -> str:
    if not facts.evaluations:
        return "Not evaluated: the run had no validation or test data."
    parts = [
        "An entity counts as found if its first and last word and its type are right (the rule of "
        f"CoNLL-2003's `conlleval`). **Word level** decides each word {_decision(facts)}, and is "
        "what papers report. **Subword level** counts over labelled wordpieces, each by its own "
        "best label, as cards made by the Hugging Face Trainer do; the two cannot be compared."
    ]
    for split, evaluation in facts.evaluations.items():
        parts.append(
            f"### {split.capitalize()}\n\n"
            f"Loss {evaluation.loss:.4f} (mean over labelled tokens; "
            f"{evaluation.loss_batch_mean:.4f} as the Trainer averages it).\n\n"
            + _score_table(evaluation.word, "Word level")
            + "\n\n"
            + _score_table(evaluation.subword, "Subword level")
        )
        if evaluation.num_repaired is not None:
            parts.append(
                f"Viterbi gave {evaluation.num_repaired:,} of {evaluation.word.num_labels:,} words "
                "another label than their best one, so that every sequence is legal."
            )
    if facts.reliability is not None and facts.reliability["calibrated"]:
        parts.append(
            "The score of an entity is its confidence: the probability that its borders and its "
            "type are right, calibrated on the validation data (`calibration.json`). There, "
            "cross-validated, the expected calibration error is "
            f"{facts.reliability['ece']:.4f} and the Brier score {facts.reliability['brier']:.4f}, "
            f"over {facts.reliability['num_entities']:,} predicted entities."
        )
    return "\n\n".join(parts)


def _decision(facts: RunFacts) -> str:
    """How a word is decided."""
    reading = facts.config.reading
    pieces = "first wordpiece" if reading.word_decision == "first" else "wordpieces together"
    if reading.decoding == "viterbi":
        return f"by the scores of its {pieces} and the transitions that the tag scheme allows"
    return f"by its {pieces}"


def _rows(facts: RunFacts) -> str:
    """What a row is."""
    reading, limit = facts.config.reading, facts.max_length - 2
    context, overlap = reading.context_budget(limit), reading.overlap(limit)
    text = f"a sentence each, up to {facts.max_length} tokens"
    if reading.context != "none" and reading.context_unit == "window":
        room = facts.max_length - 2 * context
        text = f"as many neighbouring sentences of a document as fit into {room} tokens"
    if context:
        text += f", with up to {context} tokens of the document on each side"
    # The last part is filled up from before.
    return f"{text}; longer sentences in parts that share {overlap} tokens, the last two often more"


def _score_table(scores: EntityScores, title: str) -> str:
    rows = [
        [n, f"{s.precision:.4f}", f"{s.recall:.4f}", f"{s.f1:.4f}", str(s.num_gold)]
        for n, s in [*scores.per_type.items(), ("**all**", scores.overall)]
    ]
    table = markdown_table([title, "Precision", "Recall", "F1", "Entities"], rows)
    return f"{table}\n\nAccuracy over {scores.num_labels:,} labels: {scores.accuracy:.4f}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _data(facts: RunFacts) -> str:
    rows = []
    for split, corpus in facts.corpora.items():
        counts = corpus.entity_counts
        rows.append(
            [
                split,
                f"`{data_name(corpus.source)}`",
                f"{corpus.num_documents:,}",
                f"{corpus.num_sentences:,}",
                f"{corpus.num_words:,}",
                f"{sum(counts.values()):,} ({', '.join(f'{k} {v:,}' for k, v in counts.items())})",
                corpus.scheme,
                f"`{corpus.sha256[:16]}`",
            ]
        )
    config = facts.config
    subset = ""
    if config.max_train_samples or config.max_eval_samples:
        subset = " Only the first sentences of a source were used, as counted here."
    header = ["Split", "Source", "Documents", "Sentences", "Words", "Entities", "Tags", "SHA-256"]
    return (
        markdown_table(header, rows)
        + "\n\nThe hash begins the SHA-256 of the file, or of what was read of a dataset; "
        f"`run.json` has it whole.{subset} One pass over the training data is "
        f"{facts.num_train_tokens:,} tokens, special tokens included. Labels, in order: "
        + ", ".join(f"`{label}`" for label in facts.model.label_names)
        + "."
    )


def _procedure(facts: RunFacts) -> str:
    config, result = facts.config, facts.result
    warmup = config.resolved_warmup_steps(result.total_steps)
    labelling = (
        "every wordpiece of a word (`B-X` goes on as `I-X`)"
        if config.label_all_tokens
        else "the first wordpiece of a word"
    )
    size, batch = config.per_device_train_batch_size, "{} rows"
    if config.train_batch_tokens is not None:
        size, batch = config.train_batch_tokens, "about {} tokens"
    accumulation = config.gradient_accumulation_steps
    batch = f"{batch.format(size)} x {accumulation} micro-batches = {size * accumulation}"
    clipping = f"{config.max_grad_norm:g}" if config.max_grad_norm else "off"
    rows = "packed" if config.packing else f"padded, attention {config.attn_implementation}"
    loss = "cross-entropy, mean over labelled tokens"
    if config.label_smoothing_factor:
        loss += f", label_smoothing_factor {config.label_smoothing_factor:g}"
    if facts.class_weights:
        weights = (f"`{label}` {weight:.3g}" for label, weight in facts.class_weights.items())
        loss += f", class_weights {config.class_weights}: {', '.join(weights)}"
    kept = "last"
    if config.load_best_model_at_end:
        kept = f"best by {config.metric_for_best_model} on the validation data"
    lines = [
        f"- learning_rate: {config.learning_rate:g}, linear decay to zero at step "
        f"{result.total_steps}, {warmup} warmup steps",
        f"- train_batch_size: {batch}",
        f"- eval_batch_size: {config.per_device_eval_batch_size}",
        f"- optimizer: AdamW, betas ({config.adam_beta1:g}, {config.adam_beta2:g}), "
        f"epsilon {config.adam_epsilon:g}",
        f"- trained: {'all but the embeddings' if config.freeze_embeddings else 'all weights'}",
        f"- weight_decay: {config.weight_decay:g}, none for biases and LayerNorm",
        f"- max_grad_norm: {clipping}",
        f"- rows: {_rows(facts)}",
        f"- labelled: {labelling}; decided: each word {_decision(facts)}",
        f"- training loss: {loss}",
        f"- epochs: {result.epoch:g}, steps: {result.step}",
        f"- seed: {config.seed}",
        f"- dtype: {config.dtype}, rows {rows}",
        f"- kept weights: the {kept}: step {facts.kept_step}",
        f"- hardware: {facts.device}",
        f"- time: {result.runtime:.0f} s in all, {result.steps_per_second:.2f} steps/s, "
        f"{result.tokens_per_second:,.0f} tokens/s without padding",
        f"- mean training loss: {result.loss:.4f}",
    ]
    if result.stopped_early:
        lines.append(f"- stopped early after {early_stop(config, result)}")
    lines += [
        f"- carried on after step {resume['step']} with differences: "
        + "; ".join(resume["differences"])
        for resume in facts.resumes
        if resume["differences"]
    ]
    table = (
        markdown_table(TABLE_COLUMNS, facts.rows)
        if facts.rows
        else "Not evaluated during training."
    )
    return (
        "\n".join(lines)
        + "\n\n"
        + table
        + "\n\nTraining loss is the mean of the last finished logging window; precision, recall, "
        "F1 and accuracy are at subword level, Word F1 at word level."
    )


def early_stop(config: TrainConfig, result: TrainResult) -> str:
    """Where a run stopped early, and why."""
    threshold, patience = config.early_stopping_threshold, config.early_stopping_patience
    more = f" by more than {threshold:g}" if threshold else ""
    return (
        f"step {result.step} of {result.total_steps} planned; evaluations in a row that did not "
        f"improve on the best {config.metric_for_best_model}{more}: {patience}"
    )


def _limits(facts: RunFacts) -> str:
    reads = "Each sentence is read alone"
    if facts.config.reading.context != "none":
        reads = (
            "It reads neighbouring sentences of a document together; where documents are not "
            "marked, each sentence alone: expect lower scores there"
        )
    case = (
        "It does not see capital letters: `us` and `US` are the same to it."
        if facts.lowercase
        else "It relies on capital letters: text in all capitals or all small letters scores lower."
    )
    return (
        "For text like the training data, in its language and its conventions of annotation; on "
        "other text expect lower scores, and measure them (`bertner-eval`). Entities do not nest "
        f"or overlap. {case} {reads}. A sentence longer than {facts.max_length} tokens is read in "
        "parts. The data's errors and biases, such as which names it knows, are the model's. "
        f"{_ONE_SEED}"
    )
