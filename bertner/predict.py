"""From text to entities with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bertner import kernels
from bertner.batches import packed_by_length
from bertner.config import EVAL_TOKENS, Reading
from bertner.corpus import Corpus, split_words
from bertner.data import TokenDataset, tokenize
from bertner.decisions import Decider, Decisions
from bertner.hub import find_model
from bertner.labels import IntArray
from bertner.model import BertForNER, autocast
from bertner.tokenizer import Tokenizer


@dataclass(frozen=True)
class Entity:
    """An entity in a text.

    Attributes:
        start: First character, from 0.
        end: Character after the last.
        label: Entity type, such as "PER".
        text: The slice `text[start:end]`.
        score: Mean over its words of the probability of the predicted label.
    """

    start: int
    end: int
    label: str
    text: str
    score: float


class Tagger:
    """Finds entities in running text.

    Args:
        model: Trained model.
        tokenizer: Its tokenizer.
        batch_tokens: Tokens that are computed at a time.
        dtype: "float32" or "bfloat16" arithmetic.
        matmul: See `TrainConfig.matmul`.
        reading: How rows are made and words decided; None for how the model was trained to. Each
            text is a document of one sentence.
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
    ) -> None:
        self.model = model.eval()
        self.model.stack_projections()
        self.dtype = dtype
        self.matmul = matmul
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.label_set = model.label_set
        self.reading = reading or model.config.reading or Reading()

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
    ) -> Tagger:
        """Loads a model folder, or a model from the Hub.

        Raises:
            ModelError: The files cannot be used, or hold no model for named entities.
        """
        source = find_model(model_name_or_path)
        model = BertForNER.from_pretrained(source.folder).to(device)
        tokenizer = Tokenizer.from_pretrained(source.folder, model.config)
        return cls(model, tokenizer, batch_tokens, dtype=dtype, matmul=matmul, reading=reading)

    def __call__(self, texts: Sequence[str]) -> list[list[Entity]]:
        """Entities of each text, in order; a text longer than the model's window is no problem."""
        if isinstance(texts, str):
            raise TypeError("give a list of texts: tagger([text])")
        entities: list[list[Entity]] = [[] for _ in texts]
        word_spans = [split_words(text) for text in texts]
        # A text without words has no entities, and would be a sentence without words below.
        numbers = [number for number, spans in enumerate(word_spans) if spans]
        if not numbers:
            return entities
        words = [texts[number][a:b] for number in numbers for a, b in word_spans[number]]
        starts = np.cumsum([0, *(len(word_spans[number]) for number in numbers)])
        corpus = _unlabelled(words, starts)
        dataset = tokenize(corpus, self.tokenizer, self.label_set, self.reading)
        decisions = self._decide(dataset)
        labels, scores = decisions.labels, decisions.scores
        spans = self.label_set.spans(labels, starts[:-1])
        sentence_of = np.searchsorted(starts, spans.start, side="right") - 1
        for k, sentence in enumerate(sentence_of):
            number, offset = numbers[sentence], starts[sentence]
            text = texts[number]
            start = word_spans[number][spans.start[k] - offset][0]
            end = word_spans[number][spans.end[k] - 1 - offset][1]
            score = float(scores[spans.start[k] : spans.end[k]].mean())
            label = self.label_set.types[spans.type[k]]
            entities[number].append(Entity(start, end, label, text[start:end], score))
        return entities

    @torch.inference_mode()
    def _decide(self, dataset: TokenDataset) -> Decisions:
        decider, device = Decider(dataset), self.model.device
        with kernels.hot_path(self.matmul, device, self.dtype):
            for batch in packed_by_length(dataset, self.batch_tokens, device):
                with autocast(device, self.dtype):
                    logits = self.model(batch.input_ids, cu_seqlens=batch.cu_seqlens).logits
                decider.add(batch, logits)
        return decider.decide()


def _unlabelled(words: list[str], starts: IntArray) -> Corpus:
    """Texts as a corpus of one sentence each, every word tagged O."""
    outside = np.zeros(len(words), dtype=np.int8)
    return Corpus(
        source="text",
        words=words,
        prefixes=outside,
        raw_prefixes=outside,
        types=np.full(len(words), -1, dtype=np.int16),
        type_names=(),
        starts=starts,
        documents=np.arange(len(starts) - 1),
        lines=np.repeat(np.arange(1, len(starts)), np.diff(starts)),
        scheme="IOB2",
        sha256="",
        marks_documents=True,
    )
