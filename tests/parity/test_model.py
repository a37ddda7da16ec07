"""BertForNER against transformers: logits, gradients, training mode, files in both directions."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.trainer_pt_utils import LabelSmoother

from bertner.config import ACTIVATIONS, BertConfig
from bertner.hub import find_model
from bertner.model import BertForNER, token_loss
from tests.conftest import MINILM, needs_minilm
from tests.parity.trainer import relative_difference

NUM_CASES = 4 + len(ACTIVATIONS)
PADDINGS = ["none", "right", "left", "holes"]


@dataclass
class Case:
    """A random tiny model in both libraries, and a batch for it with each kind of padding."""

    ours: BertForNER
    theirs: torch.nn.Module
    batches: list[dict[str, Tensor | None]]


def make_case(seed: int, attention: str) -> Case:
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3, 4])
    config = BertConfig(
        vocab_size=rng.randint(20, 60),
        hidden_size=heads * rng.choice([4, 6, 8, 16]),
        num_hidden_layers=rng.randint(1, 4),
        num_attention_heads=heads,
        intermediate_size=rng.randint(8, 70),
        # The first cases are plain BERT; then every activation comes up once.
        hidden_act="gelu" if seed < 4 else ACTIVATIONS[(seed - 4) % len(ACTIVATIONS)],
        hidden_dropout_prob=rng.choice([0.0, 0.1, 0.5]),
        attention_probs_dropout_prob=rng.choice([0.0, 0.1, 0.5]),
        classifier_dropout=rng.choice([None, 0.0, 0.3]),
        max_position_embeddings=rng.randint(16, 40),
        type_vocab_size=rng.randint(1, 3),
        initializer_range=rng.choice([0.02, 0.2]),
        layer_norm_eps=rng.choice([1e-12, 1e-5]),
        pad_token_id=rng.choice([0, 0, 3, None]),
        id2label={k: f"L{k}" for k in range(rng.randint(2, 9))},
    )
    torch.manual_seed(seed)
    ours = BertForNER(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in ours.parameters():  # biases and norms that are not zero and one
            parameter += 0.02 * torch.randn_like(parameter)
    settings = config.to_dict()
    theirs = transformers.BertForTokenClassification(transformers.BertConfig.from_dict(settings))
    theirs.set_attn_implementation(attention)
    theirs.load_state_dict(ours.state_dict(), strict=True)

    batches = [make_batch(rng, config, padding) for padding in PADDINGS]
    return Case(ours, theirs, batches)


def make_batch(rng: random.Random, config: BertConfig, padding: str) -> dict[str, Tensor | None]:
    batch_size, length = rng.randint(1, 5), rng.randint(2, 16)
    mask = torch.ones(batch_size, length, dtype=torch.long)
    for row in mask:
        size = rng.randint(1, length)
        if padding == "right":
            row[size:] = 0
        elif padding == "left":
            row[: length - size] = 0
        elif padding == "holes":
            row[torch.randperm(length)[size:]] = 0
    labels = torch.randint(0, config.num_labels, (batch_size, length))
    labels[(mask == 0) | (torch.rand(batch_size, length) < 0.2)] = -100
    labels[0, mask[0].argmax()] = 0  # at least one
    token_types = torch.randint(0, config.type_vocab_size, (batch_size, length))
    return {
        "input_ids": torch.randint(0, config.vocab_size, (batch_size, length)),
        "attention_mask": None if padding == "none" else mask,
        "token_type_ids": token_types if rng.random() < 0.5 else None,
        "labels": labels,
    }


def test_every_activation_is_compared() -> None:
    compared = {make_case(seed, "eager").ours.config.hidden_act for seed in range(NUM_CASES)}
    assert compared == set(ACTIVATIONS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_logits_and_gradients(seed: int, attention: str) -> None:
    case = make_case(seed, attention)
    case.ours.eval()
    case.theirs.eval()
    for batch in case.batches:
        case.ours.zero_grad()
        case.theirs.zero_grad()
        ours, theirs = case.ours(**batch), case.theirs(**batch)
        assert (ours.logits - theirs.logits).abs().max() <= 1e-5
        assert abs(ours.loss - theirs.loss) <= 1e-5
        ours.loss.backward()
        theirs.loss.backward()
        expected = {name: parameter.grad for name, parameter in case.theirs.named_parameters()}
        for name, parameter in case.ours.named_parameters():
            norm = expected[name].norm()
            # Below this scale both are rounding around an exact zero (the key's bias, for one).
            assert (parameter.grad - expected[name]).norm() <= 1e-4 * max(norm, 1e-3), name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_training_mode_draws_the_same_dropout(seed: int, attention: str) -> None:
    case = make_case(seed, attention)
    case.ours.train()
    case.theirs.train()
    for batch in case.batches:
        torch.manual_seed(seed)
        ours = case.ours(**batch)
        after_ours = torch.rand(3)
        torch.manual_seed(seed)
        theirs = case.theirs(**batch)
        after_theirs = torch.rand(3)
        assert (ours.logits - theirs.logits).abs().max() <= 1e-5
        assert torch.equal(after_ours, after_theirs), "as many random numbers were drawn"


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("shape", [(3, 7, 5), (21, 5)], ids=["padded", "packed"])
def test_smoothed_loss(shape: tuple[int, ...], epsilon: float) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(shape, generator=generator)
    labels = torch.randint(5, shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < 0.4] = -100
    losses = token_loss(logits, labels, "none", epsilon)
    assert losses.shape == labels.shape
    assert (losses[labels == -100] == 0).all()
    mean = token_loss(logits, labels, "mean", epsilon)
    labelled = (labels != -100).sum()
    assert mean.item() == pytest.approx((losses.sum() / labelled).item(), rel=1e-6)
    total = token_loss(logits, labels, "sum", epsilon)
    assert total.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    theirs = LabelSmoother(epsilon)({"logits": logits}, labels)
    assert mean.item() == pytest.approx(theirs.item(), rel=1e-6)
    # Written out.
    scores = logits[labels != -100].double().log_softmax(-1)
    nll = -scores.gather(1, labels[labels != -100][:, None]).sum()
    expected = (1 - epsilon) * nll - epsilon * scores.mean(-1).sum()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(3, 7, 5), (21, 5)], ids=["padded", "packed"])
def test_weighted_loss(shape: tuple[int, ...], reduction: str) -> None:
    generator = torch.Generator().manual_seed(6)
    logits = 4 * torch.randn(shape, generator=generator)
    labels = torch.randint(5, shape[:-1], generator=generator)
    labels[torch.rand(shape[:-1], generator=generator) < 0.4] = -100
    weights = torch.tensor([0.3, 2.0, 0.0, 1.0, 17.0])
    ours = token_loss(logits, labels, reduction, label_weights=weights)
    flat = logits.flatten(0, -2), labels.flatten()
    theirs = F.cross_entropy(*flat, weights, reduction=reduction)
    assert torch.allclose(ours.flatten(), theirs, rtol=1e-6)
    # Smoothed: the weight is that of the token's label, whatever its target is spread over.
    smoothed = token_loss(logits, labels, "none", 0.3)
    expected = torch.where(labels == -100, 0.0, smoothed * weights[labels.clamp(min=0)])
    assert torch.equal(token_loss(logits, labels, "none", 0.3, weights), expected)


def test_state_dict_keys_shapes_and_dtypes_are_those_of_transformers() -> None:
    case = make_case(1, "sdpa")
    ours = {k: (v.shape, v.dtype) for k, v in case.ours.state_dict().items()}
    theirs = {k: (v.shape, v.dtype) for k, v in case.theirs.state_dict().items()}
    assert ours == theirs
    assert list(ours) == list(theirs)


def _round_trip(folder: Path, base: str | Path, num_labels: int) -> None:
    """Ours -> files -> transformers -> files -> ours, with weights and logits compared."""
    torch.manual_seed(0)
    first = BertForNER.from_pretrained(base, id2label={k: f"L{k}" for k in range(num_labels)})
    first.save_pretrained(folder / "ours")
    middle, info = transformers.AutoModelForTokenClassification.from_pretrained(
        folder / "ours", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert middle.config.id2label == first.config.id2label
    middle.save_pretrained(folder / "theirs")
    last = BertForNER.from_pretrained(folder / "theirs")
    assert last.config == first.config
    states = [model.state_dict() for model in (first, middle, last)]
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
        assert torch.equal(tensor, states[2][name]), name

    vocab_size = first.config.vocab_size
    input_ids = torch.randint(0, vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[1, 25:] = 0
    with torch.no_grad():
        logits = [m.eval()(input_ids, attention_mask=mask).logits for m in (first, middle, last)]
    assert (logits[0] - logits[1]).abs().max() <= 1e-5
    assert torch.equal(logits[0], logits[2])


@needs_minilm
def test_minilm_goes_to_transformers_and_back(tmp_path: Path) -> None:
    _round_trip(tmp_path, MINILM, 9)


def test_bert_base_shape_goes_to_transformers_and_back(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=28996, id2label={k: f"L{k}" for k in range(9)})
    torch.manual_seed(0)
    model = BertForNER(config)
    assert sum(p.numel() for p in model.parameters()) == 107_726_601
    model.save_pretrained(tmp_path / "base")
    _round_trip(tmp_path, tmp_path / "base", 9)


@needs_minilm
def test_minilm_hidden_states_equal_those_of_bert_model(tmp_path: Path) -> None:
    """The encoder under the head, from the package's own files, with no bertner in between."""
    folder = find_model(MINILM).folder
    ours = BertForNER.from_pretrained(folder)
    theirs = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    input_ids = torch.arange(1000, 1030)[None]
    with torch.no_grad():
        hidden = ours.bert(input_ids, None, None)
        assert (hidden - theirs(input_ids).last_hidden_state).abs().max() <= 1e-5


@needs_minilm
def test_gradients_of_minilm() -> None:
    torch.manual_seed(3)
    ours = BertForNER.from_pretrained(MINILM, num_labels=9)
    theirs = transformers.BertForTokenClassification(
        transformers.BertConfig.from_dict(ours.config.to_dict())
    )
    theirs.load_state_dict(ours.state_dict())
    input_ids = torch.randint(1, 30000, (4, 30))
    labels = torch.randint(0, 9, (4, 30))
    ours(input_ids, labels=labels).loss.backward()
    theirs.eval()(input_ids, labels=labels).loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if not name.endswith("key.bias"):  # exactly zero but for rounding
            assert (parameter.grad - expected[name].grad).norm() <= 1e-4 * expected[
                name
            ].grad.norm(), name
    loss = theirs(input_ids, labels=labels).loss.item()
    assert relative_difference([ours(input_ids, labels=labels).loss.item()], [loss]) <= 1e-6
