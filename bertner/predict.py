"""From text to entities with a trained model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import cast, overload

import numpy as np
import torch

from bertner import kernels
from bertner.batches import packed_by_length
from bertner.calibration import FILE, Calibration, entity_evidence, fingerprint, load
from bertner.config import EVAL_TOKENS, Reading
from bertner.corpus import Corpus, split_sentences, split_words
from bertner.data import TokenDataset, tokenize
from bertner.decisions import Decider, Decisions
from bertner.errors import BertnerError, UsageError
from bertner.hub import find_model
from bertner.labels import IntArray
from bertner.model import BertForNER, autocast
from bertner.tokenizer import Tokenizer

logger = logging.getLogger("bertner")

# Texts are read this many words at a time, about: enough to sort rows by length, and memory does
# not grow with the input.
_STREAM_WORDS = 16_384
_STREAM_TEXTS = 1024


@dataclass(frozen=True)
class Entity:
    """An entity in a text.

    Attributes:
        start: First character, from 0; of a list of words, first word.
        end: Character (or word) after the last.
        label: Entity type, such as "PER".
        text: The slice `text[start:end]`; of a list of words, its words with a space between.
        score: Confidence: how probable it is that the entity is right, in borders and type, if the
            model's folder has a calibration; else the mean over its words of the probability of the
            predicted label.
    """

    start: int
    end: int
    label: str
    text: str
    score: float


@dataclass(frozen=True)
class Text:
    """A text to tag.

    Attributes:
        text: All of it.
        words: (start, end) of each word, in characters.
        document: What it is a part of; texts that follow each other and have the same document here
            are its sentences. None for a text of its own.
    """

    text: str
    words: Sequence[tuple[int, int]]
    document: object = None

    @classmethod
    def of(cls, text: str, document: object = None) -> Text:
        """Running text."""
        return cls(text, split_words(text), document)

    @classmethod
    def of_words(cls, words: Sequence[str], document: object = None) -> Text:
        """Words that somebody has split, with a space between."""
        ends = list(accumulate(len(word) + 1 for word in words))
        spans = [(end - 1 - len(word), end - 1) for word, end in zip(words, ends, strict=True)]
        return cls(" ".join(words), spans, document)


class Tagger:
    """Finds entities in text.

    Args:
        model: Trained model.
        tokenizer: Its tokenizer.
        batch_tokens: Tokens that are computed at a time.
        dtype: "float32" or "bfloat16" arithmetic.
        matmul: See `TrainConfig.matmul`.
        reading: How rows are made and words decided; None for how the model was trained to. Each
            text is a document, unless it says otherwise; blank lines separate its sentences.
        calibration: Makes scores of what the model says of words; None for their mean probability.
        labels: Entity types to find; None for all.
        threshold: Entities with a lower score are left out; or by type, where "" is for the others.

    Raises:
        UsageError: The model has no such type.
    """

    def __init__(
        self,
        model: BertForNER,
        tokenizer: Tokenizer,
        batch_tokens: int = EVAL_TOKENS,
        *,
        dtype: str = "float32",
        matmul: str = "auto",
        reading: Reading | None = None,
        calibration: Calibration | None = None,
        labels: Sequence[str] | None = None,
        threshold: float | Mapping[str, float] = 0.0,
    ) -> None:
        self.model = model.eval()
        self.model.stack_projections()
        self.dtype = dtype
        self.matmul = matmul
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.label_set = model.label_set
        self.reading = reading or model.config.reading or Reading()
        self.calibration = calibration
        thresholds = threshold if isinstance(threshold, Mapping) else {"": threshold}
        types = self.label_set.types
        for name in [*(labels or ()), *thresholds]:
            if name and name not in types:
                raise UsageError(f"the model has no type {name!r:.40}, but {', '.join(types)}")
        # Above 1 for types that are not to be found.
        self.thresholds = np.array(
            [
                thresholds.get(name, thresholds.get("", 0.0))
                if labels is None or name in labels
                else 2.0
                for name in types
            ]
        )

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | Path,
        *,
        device: str = "cpu",
        batch_tokens: int = EVAL_TOKENS,
        dtype: str = "float32",
        matmul: str = "auto",
        reading: Reading | None = None,
        labels: Sequence[str] | None = None,
        threshold: float | Mapping[str, float] = 0.0,
    ) -> Tagger:
        """Loads a model folder, or a model from the Hub.

        Raises:
            ModelError: The files cannot be used, or hold no model for named entities.
            UsageError: The model has no type of a name in `labels` or `threshold`.
        """
        source = find_model(model_name_or_path)
        model = BertForNER.from_pretrained(source.folder).to(device)
        reading = reading or model.config.reading or Reading()
        return cls(
            model,
            Tokenizer.from_pretrained(source.folder, model.config),
            batch_tokens,
            dtype=dtype,
            matmul=matmul,
            reading=reading,
            calibration=find_calibration(source.folder, model, reading),
            labels=labels,
            threshold=threshold,
        )

    @overload
    def __call__(self, texts: str) -> list[Entity]: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, texts: Sequence[str]) -> list[list[Entity]]: ...

    def __call__(self, texts: str | Sequence[str]) -> list[Entity] | list[list[Entity]]:
        """Entities of a text, or of each of several, in order.

        A text longer than the model's window is no problem, and what stands beside a text in the
        list does not matter.
        """
        if isinstance(texts, str):
            return self.tag([Text.of(texts)])[0]
        return list(self.stream(texts))

    def tag_words(
        self, sentences: Sequence[str] | Sequence[Sequence[str]]
    ) -> list[Entity] | list[list[Entity]]:
        """Entities of a list of words, or of each of several; `start` and `end` count words."""
        is_one = bool(sentences) and isinstance(sentences[0], str)
        all_words = cast("Sequence[Sequence[str]]", [sentences] if is_one else sentences)
        texts = [Text.of_words(words) for words in all_words]
        results = [
            [
                replace(entity, start=first, end=last)
                for entity, (first, last) in zip(entities, word_ranges(entities, text), strict=True)
            ]
            for text, entities in zip(texts, self._stream(texts), strict=True)
        ]
        return results[0] if is_one else results

    def stream(self, texts: Iterable[str]) -> Iterator[list[Entity]]:
        """Entities of each text in turn; only some texts are in memory at a time."""
        return self._stream(map(Text.of, texts))

    def _stream(self, texts: Iterable[Text]) -> Iterator[list[Entity]]:
        for part in gather(texts):
            yield from self.tag(part)

    def tag(self, texts: Sequence[Text]) -> list[list[Entity]]:
        """Entities of each text, computed together."""
        entities: list[list[Entity]] = [[] for _ in texts]
        # A text without words has no entities, and no sentences.
        parts = [
            (k, *part)
            for k, text in enumerate(texts)
            for part in split_sentences(text.text, text.words)
        ]
        if not parts:
            return entities
        words = [texts[k].text[a:b] for k, i, j in parts for a, b in texts[k].words[i:j]]
        starts = np.cumsum([0, *(j - i for _, i, j in parts)])
        keys = [
            (None, k) if text.document is None else text.document for k, text in enumerate(texts)
        ]
        documents = [keys[k] for k, _, _ in parts]
        corpus = _unlabelled(words, starts, documents)
        # That text is longer than a row is nothing to say each time that some is read.
        dataset = tokenize(corpus, self.tokenizer, self.label_set, self.reading, warn=False)
        decisions = self._decide(dataset)
        spans = self.label_set.spans(decisions.labels, starts[:-1])
        types = [self.label_set.types[kind] for kind in spans.type]
        scores = entity_evidence(decisions.scores, spans.start, spans.end, starts)
        confidence = scores[:, 0]
        if self.calibration is not None:
            confidence = self.calibration.apply(scores, types)
        sentence_of = np.searchsorted(starts, spans.start, side="right") - 1
        for k in np.flatnonzero(confidence >= self.thresholds[spans.type]):
            number, first, _ = parts[sentence_of[k]]
            offset = first - starts[sentence_of[k]]
            text = texts[number]
            start = text.words[spans.start[k] + offset][0]
            end = text.words[spans.end[k] - 1 + offset][1]
            entity = Entity(start, end, types[k], text.text[start:end], float(confidence[k]))
            entities[number].append(entity)
        return entities

    @torch.inference_mode()
    def _decide(self, dataset: TokenDataset) -> Decisions:
        decider, device = Decider(dataset), self.model.device
        with kernels.hot_path(self.matmul, device, self.dtype):
            for batch in packed_by_length(dataset, self.batch_tokens, device):
                with autocast(device, self.dtype):
                    logits = self.model(batch.input_ids, **batch.layout).logits
                decider.add(batch, logits)
        return decider.decide()


def gather(texts: Iterable[Text | None]) -> Iterator[list[Text]]:
    """Texts in parts that are tagged together; a document is never divided.

    Args:
        texts: None among them says that the next one may take its time: what is there goes ahead.
    """
    part: list[Text] = []
    num_words = 0
    try:
        for text in texts:
            if text is not None and part:
                is_full = num_words >= _STREAM_WORDS or len(part) >= _STREAM_TEXTS
                goes_on = text.document is not None and text.document == part[-1].document
                if is_full and not goes_on:
                    yield part
                    part, num_words = [], 0
            if text is not None:
                part.append(text)
                num_words += len(text.words)
            # A document may go on after the pause.
            elif part and part[-1].document is None:
                yield part
                part, num_words = [], 0
    except BertnerError:  # a mistake in a file: what stands before it is tagged all the same
        if part:
            yield part
        raise
    if part:
        yield part


def word_ranges(entities: Sequence[Entity], text: Text) -> list[tuple[int, int]]:
    """(first, after the last) word of each entity of a text."""
    starts = np.array([start for start, _ in text.words], dtype=np.int64)
    first = np.searchsorted(starts, [entity.start for entity in entities])
    last = np.searchsorted(starts, [entity.end for entity in entities])
    return list(zip(first.tolist(), last.tolist(), strict=True))


def find_calibration(folder: Path, model: BertForNER, reading: Reading) -> Calibration | None:
    """The calibration of a model's folder, if it is one of these weights and this way to decide.

    Otherwise scores are as the model has them, and the log says so.

    Raises:
        ModelError: It is damaged.
    """
    calibration = load(folder)
    if calibration is None:
        return None
    reason = ""
    if calibration.weights != fingerprint_of(model):
        reason = "was fitted for other weights"
    elif not calibration.is_for(reading):
        reason = f"was fitted for words that are decided by {calibration.decoding} and "
        reason += f"{calibration.word_decision} wordpieces"
    if reason:
        logger.warning(
            "%s %s, so scores are not calibrated; bertner-eval --calibrate does it again",
            folder / FILE,
            reason,
        )
        return None
    return calibration


def fingerprint_of(model: BertForNER) -> str:
    """Tells the model's weights from others; see `calibration.fingerprint`."""
    head = model.classifier
    return fingerprint(*(part.detach().float().cpu().numpy() for part in (head.weight, head.bias)))


def _unlabelled(words: list[str], starts: IntArray, documents: Sequence[object]) -> Corpus:
    """Sentences as a corpus, every word tagged O; neighbours of equal documents are of one."""
    outside = np.zeros(len(words), dtype=np.int8)
    begins = [True, *(a != b for a, b in pairwise(documents))]
    return Corpus(
        source="text",
        words=words,
        prefixes=outside,
        raw_prefixes=outside,
        types=np.full(len(words), -1, dtype=np.int16),
        type_names=(),
        starts=starts,
        documents=np.cumsum(begins),
        lines=np.repeat(np.arange(1, len(starts)), np.diff(starts)),
        scheme="IOB2",
        sha256="",
        marks_documents=True,
    )
