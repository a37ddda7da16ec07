"""Words in are words decided: each once, and the same whatever the rows and the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bertner.batches import collate, pack, packed_by_length
from bertner.config import Reading
from bertner.corpus import Corpus, CorpusBuilder
from bertner.data import TokenDataset, labels_for, tokenize
from bertner.decisions import Decider, Decisions
from bertner.decoding import is_legal
from bertner.evaluation import evaluate
from bertner.labels import LabelSet
from bertner.model import BertForNER
from bertner.tokenizer import Tokenizer
from tests.conftest import corpus_of

CPU = torch.device("cpu")
WORDS = "Mary Poe said the landing of London \u200b Paris, United".split()


def corpus_with(sentences: list[list[str]], document_length: int = 7) -> Corpus:
    """Sentences of which so many make a document, tagged somehow."""
    builder = CorpusBuilder("made-up")
    builder.marks_documents = True
    for number, words in enumerate(sentences):
        builder.document = number // document_length
        tags = ["B-PER" if word[:1].isupper() else "O" for word in words]
        builder.add(words, tags, [number + 1] * len(words))
    return builder.finish("")


def some_words(count: int, seed: int = 0) -> list[str]:
    return np.random.default_rng(seed).choice(WORDS, count).tolist()


@pytest.fixture
def model(model_folder: Path) -> BertForNER:
    """A model whose random head says something about almost every word."""
    torch.manual_seed(2)
    labels = dict(enumerate(["O", "B-PER", "I-PER"]))
    model = BertForNER.from_pretrained(model_folder, id2label=labels)
    with torch.no_grad():
        model.classifier.weight *= 50
    return model.eval()


def decisions_of(model: BertForNER, dataset: TokenDataset, batch_tokens: int) -> Decisions:
    decider = Decider(dataset)
    with torch.inference_mode():
        for batch in packed_by_length(dataset, batch_tokens, CPU):
            decider.add(batch, model(batch.input_ids, **batch.layout).logits)
    return decider.decide()


LONG = {
    "a sentence of 1,000 words": [some_words(1000)],
    "a document of 200 sentences": [some_words(k % 11 + 1, k) for k in range(200)],
    "words of no pieces": [["\u200b"], ["\u200b", "Paris", "\u200b"], ["\u200b"] * 3],
    "nothing but words of no pieces": [["\u200b", ""], [""]],
}
READINGS: dict[str, dict[str, Any]] = {
    "sentences": {},
    "short rows": {"max_seq_length": 20},
    "rows of one word": {"max_seq_length": 3},
    "rows that share half": {"max_seq_length": 30, "window_overlap": 14},
    "windows of a document": {"max_seq_length": 60, "context": "document"},
    "windows with context": {"max_seq_length": 60, "context": "document", "context_tokens": 12},
    "sentences with context": {
        "context": "document",
        "context_unit": "sentence",
        "context_tokens": 40,
    },
}
DECIDING: dict[str, dict[str, Any]] = {
    "first": {},
    "all": {"word_decision": "all"},
    "viterbi": {"decoding": "viterbi"},
    "all, viterbi": {"word_decision": "all", "decoding": "viterbi"},
}


@pytest.mark.parametrize("deciding", DECIDING)
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("text", LONG)
def test_words_in_are_words_scored(
    model: BertForNER, tokenizer: Tokenizer, text: str, reading: str, deciding: str
) -> None:
    corpus = corpus_with(LONG[text])
    label_set = LabelSet(("O", "B-PER", "I-PER"))
    settings = Reading(**READINGS[reading], **DECIDING[deciding])
    dataset = tokenize(corpus, tokenizer, label_set, settings)
    evaluation = evaluate(model, dataset)
    assert len(evaluation.word_predictions) == evaluation.word.num_labels == corpus.num_words
    assert evaluation.word.overall.num_gold == sum(corpus.entity_counts().values())
    assert evaluation.subword.num_labels == len(dataset.input_ids)
    no_piece = np.setdiff1d(np.arange(corpus.num_words), dataset.word_ids)
    assert set(evaluation.word_predictions[no_piece]) <= {0}
    # Each word's decision does not depend on its neighbours in the batch.
    whole, parted = decisions_of(model, dataset, 5000), decisions_of(model, dataset, 50)
    for decisions in (whole, parted):
        assert decisions.labels.tolist() == evaluation.word_predictions.tolist()
        assert np.all((decisions.scores > 0) & (decisions.scores <= 1))
        assert set(decisions.scores[no_piece]) <= {1.0}
    np.testing.assert_allclose(whole.scores, parted.scores, atol=1e-5)
    if settings.decoding == "viterbi":
        assert is_legal(whole.labels, dataset.sentence_starts[:-1], label_set).all()
        assert evaluation.num_repaired == evaluation.metrics()["words_repaired"]
    else:
        assert evaluation.num_repaired is None


def test_viterbi_keeps_scores_of_unfinished_sentences_only(
    model: BertForNER, tokenizer: Tokenizer
) -> None:
    sentences = [some_words(300), *([word] for word in WORDS), some_words(40, 1)]
    corpus = corpus_with(sentences, document_length=1)
    reading = Reading(max_seq_length=30, decoding="viterbi")
    dataset = tokenize(corpus, tokenizer, LabelSet(("O", "B-PER", "I-PER")), reading)
    decider, most = Decider(dataset), 0
    for row in range(len(dataset)):
        batch = pack(dataset, [row], CPU)
        with torch.inference_mode():
            decider.add(batch, model(batch.input_ids, **batch.layout).logits)
        unfinished = set(dataset.rows.sentences[: row + 1]) & set(dataset.rows.sentences[row + 1 :])
        assert set(decider._parts) == unfinished
        most = max(most, len(unfinished))
    assert most == 1
    whole = decisions_of(model, dataset, 5000)
    assert decider.decide().labels.tolist() == whole.labels.tolist()
    assert decider.decide().num_repaired == whole.num_repaired > 0


def logits_for(dataset: TokenDataset, rows: dict[str, list[float]]) -> torch.Tensor:
    """Logits of a padded batch of all rows: those of each piece by its text; else all zero."""
    batch = collate(dataset, range(len(dataset)), CPU)
    logits = torch.zeros(*batch.input_ids.shape, len(dataset.label_set.names))
    for (row, column), token in np.ndenumerate(batch.input_ids.numpy()):
        logits[row, column] = torch.tensor(rows.get(str(token), [0.0] * logits.shape[-1]))
    return logits


def decide(dataset: TokenDataset, logits: torch.Tensor) -> Decisions:
    decider = Decider(dataset)
    decider.add(collate(dataset, range(len(dataset)), CPU), logits)
    return decider.decide()


def test_a_words_decision_by_hand(tokenizer: Tokenizer) -> None:
    corpus = corpus_of("Poe/B-PER said/O Poe/B-PER")  # P ##o ##e
    label_set = labels_for(corpus)  # O B-PER I-PER
    ids = {t: str(tokenizer.fast.token_to_id(t)) for t in ("P", "##o", "##e", "said")}
    scores = {
        ids["P"]: [1.0, 0.0, 0.0],
        ids["##o"]: [0.0, 0.0, 2.0],  # I-PER: speaks for a word of B-PER and of I-PER alike
        ids["##e"]: [0.0, -9.0, 2.0],
        ids["said"]: [0.0, -1.0, 0.5],
    }
    log_of = {name: np.array(row) - np.log(np.exp(row).sum()) for name, row in scores.items()}
    together = {"O": 0.0, "B-PER": 0.0, "I-PER": 0.0}
    for piece in ("P", "##o", "##e"):
        for k, label in enumerate(together):
            seen_as = 2 if piece != "P" and label == "B-PER" else k
            together[label] += log_of[ids[piece]][seen_as]
    assert max(together, key=together.__getitem__) == "B-PER"

    def of(**settings: Any) -> Decisions:
        dataset = tokenize(corpus, tokenizer, label_set, Reading(**settings))
        return decide(dataset, logits_for(dataset, scores))

    first = of()
    assert first.labels.tolist() == [0, 2, 0]
    own_best = [0, 2, 2, 2, 0, 2, 2]  # of the wordpieces, however words are decided
    assert first.token_labels.tolist() == own_best
    assert first.num_repaired == 0
    np.testing.assert_allclose(first.scores[0], np.exp(log_of[ids["P"]][0]), rtol=1e-6)

    all_pieces = of(word_decision="all")
    assert all_pieces.labels.tolist() == [1, 2, 1]
    assert all_pieces.token_labels.tolist() == own_best
    values = np.exp(list(together.values()))
    np.testing.assert_allclose(all_pieces.scores[0], values[1] / values.sum(), rtol=1e-5)

    viterbi = of(decoding="viterbi")
    assert viterbi.labels.tolist() == [0, 0, 0]
    assert viterbi.token_labels.tolist() == own_best
    assert viterbi.num_repaired == 1
    np.testing.assert_allclose(viterbi.scores[1], np.exp(log_of[ids["said"]][0]), rtol=1e-6)
    # B-PER of the first word makes I-PER of the second legal.
    assert of(word_decision="all", decoding="viterbi").num_repaired == 0


def test_packed_and_padded_batches_decide_alike(model: BertForNER, tokenizer: Tokenizer) -> None:
    corpus = corpus_with([some_words(k + 1, k) for k in range(9)])
    reading = Reading(max_seq_length=30, context="document", context_tokens=5)
    dataset = tokenize(corpus, tokenizer, labels_for(corpus), reading)
    found = []
    for make in (pack, collate):
        decider = Decider(dataset)
        with torch.inference_mode():
            for row in range(0, len(dataset), 4):
                rows = np.arange(row, min(row + 4, len(dataset)))
                batch = make(dataset, rows, CPU)
                decider.add(batch, model(batch.input_ids, **batch.layout).logits)
        found.append(decider.decide())
    assert found[0].labels.tolist() == found[1].labels.tolist()
    np.testing.assert_allclose(found[0].scores, found[1].scores, atol=1e-5)


def test_context_changes_what_a_model_sees(model: BertForNER, tokenizer: Tokenizer) -> None:
    """A word's scores depend on the sentences beside it, and not on another document's."""
    corpora = [corpus_with([["Paris"], [first], ["Poe"]], document_length=2) for first in WORDS[:2]]
    reading = Reading(context="document", context_unit="sentence", context_tokens=9)
    scores = []
    for corpus in corpora:
        dataset = tokenize(corpus, tokenizer, LabelSet(("O", "B-PER", "I-PER")), reading)
        scores.append(decisions_of(model, dataset, 1).scores)
    assert scores[0][0] != scores[1][0]
    assert scores[0][2] == scores[1][2]
