"""Packed rows against the padded reference: losses, gradients, whole runs; dropout off."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bertner import kernels
from bertner.attention import attention_packed
from bertner.batches import collate, pack
from bertner.config import BertConfig, TrainConfig
from bertner.data import labels_for, tokenize
from bertner.hub import find_model
from bertner.labels import IGNORE_INDEX
from bertner.loop import train
from bertner.model import BertForNER, BertSelfAttention, token_loss
from bertner.optimizer import gradient_norm
from bertner.packing import Packing
from bertner.readers import read_file
from bertner.tokenizer import Tokenizer
from tests.conftest import MINILM, SHARED_DATA, needs_conll, needs_minilm
from tests.parity.trainer import Losses, relative_difference

LENGTHS = {
    "one row": [7],
    "one token": [1],
    "equal lengths": [9, 9, 9, 9],
    "all different": [2, 3, 5, 8, 13, 21, 34],
    "runs and singles": [3, 3, 4, 10, 10, 11, 30],
    "a long one among short": [4, 6, 6, 9, 512],
    "long ones": [200, 201, 230],
}


def without_dropout(model: BertForNER) -> BertForNER:
    """Dropout of probability zero; the model may be in training mode all the same."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, BertSelfAttention):
            module.dropout_prob = 0.0
    return model


def small_model(seed: int, **settings: object) -> BertForNER:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=60,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        id2label={k: f"L{k}" for k in range(5)},
        **settings,  # type: ignore[arg-type]
    )
    model = BertForNER(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return without_dropout(model)


def rows_of(lengths: list[int], seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 60, (length,), generator=generator)
        types = torch.randint(0, 2, (length,), generator=generator)
        labels = torch.randint(0, 5, (length,), generator=generator)
        labels[torch.rand(length, generator=generator) < 0.2] = IGNORE_INDEX
        labels[0] = 1
        rows.append((ids, types, labels))
    return rows


def padded(rows: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    size = (len(rows), max(len(ids) for ids, _, _ in rows))
    batch = {
        "input_ids": torch.zeros(size, dtype=torch.long),
        "token_type_ids": torch.zeros(size, dtype=torch.long),
        "labels": torch.full(size, IGNORE_INDEX),
        "attention_mask": torch.zeros(size, dtype=torch.long),
    }
    for k, (ids, types, labels) in enumerate(rows):
        batch["input_ids"][k, : len(ids)] = ids
        batch["token_type_ids"][k, : len(ids)] = types
        batch["labels"][k, : len(ids)] = labels
        batch["attention_mask"][k, : len(ids)] = 1
    return batch


def packed(rows: list[tuple[Tensor, Tensor, Tensor]]) -> dict[str, Tensor]:
    lengths = [len(ids) for ids, _, _ in rows]
    return {
        "input_ids": torch.cat([ids for ids, _, _ in rows]),
        "token_type_ids": torch.cat([types for _, types, _ in rows]),
        "labels": torch.cat([labels for _, _, labels in rows]),
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)]),
    }


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("with_buffers", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_logits_and_every_gradient(lengths: list[int], with_buffers: bool, stacked: bool) -> None:
    reference = small_model(sum(lengths)).train()
    model = copy.deepcopy(reference)
    if stacked:
        model.stack_projections()
    rows = rows_of(lengths, seed=len(lengths))
    expected = reference(**padded(rows))
    expected.loss.backward()
    mask = padded(rows)["attention_mask"].bool()

    with torch.no_grad():
        evaluated = model(**packed(rows))
    assert (evaluated.logits - expected.logits[mask]).abs().max() <= 1e-5
    with kernels.gradient_buffers(model) if with_buffers else torch.enable_grad():
        output = model(**packed(rows))
        assert (output.logits - expected.logits[mask]).abs().max() <= 1e-5
        assert abs(output.loss - expected.loss) <= 1e-5 * expected.loss
        output.loss.backward()
        assert_same_gradients(model, reference)
        norm = gradient_norm([p for p in model.parameters() if p.grad is not None])
        norms = torch.stack([p.grad.norm() for p in reference.parameters() if p.grad is not None])
        assert abs(norm - norms.norm()) <= 1e-5 * norm


def test_autocast_rounds_the_same_sums() -> None:
    """The residual stream of packed rows has the types that it has in padded ones."""
    model = small_model(3).eval()
    rows = rows_of([5, 9], seed=2)
    types: list[torch.dtype] = []
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: types.append(inputs[0].dtype))
    for batch in (padded(rows), packed(rows)):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(**batch)
    half = len(types) // 2
    assert half > 2
    assert types[:half] == types[half:]
    assert torch.float32 in types


def assert_same_gradients(model: BertForNER, reference: BertForNER) -> None:
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not theirs.requires_grad), name
        if ours.grad is None or theirs.grad is None:
            continue
        difference = (ours.grad.to_dense() - theirs.grad).norm()
        # Below this scale both are rounding around an exact zero (the key's bias, for one).
        assert difference <= 1e-4 * max(theirs.grad.norm(), 1e-3), name


def test_buffers_add_up_within_a_step_and_forget_the_last() -> None:
    """Two micro-batches, twice, with other words each time: nothing stays from step to step."""
    reference = small_model(5).train()
    model = copy.deepcopy(reference)
    with kernels.gradient_buffers(model):
        for step in range(2):
            model.zero_grad()
            reference.zero_grad()
            for k in range(2):
                rows = rows_of([5, 8, 8], seed=10 * step + k)
                reference(**padded(rows)).loss.backward()
                model(**packed(rows)).loss.backward()
            assert_same_gradients(model, reference)
    assert all(parameter.grad is None for parameter in model.parameters() if parameter.dim() == 2)
    assert not any(kernels.has_buffer(parameter) for parameter in model.parameters())


def test_a_padded_micro_batch_before_a_packed_one() -> None:
    """Autograd has put gradients of its own there first: they count too."""
    reference = small_model(9).train()
    model = copy.deepcopy(reference)
    with kernels.gradient_buffers(model):
        for step in range(2):
            model.zero_grad()
            reference.zero_grad()
            first, second = rows_of([4, 9], seed=step), rows_of([5, 5, 6], seed=step + 5)
            for rows in (first, second):
                reference(**padded(rows)).loss.backward()
            model(**padded(first)).loss.backward()
            model(**packed(second)).loss.backward()
            assert_same_gradients(model, reference)


@pytest.mark.parametrize("act", ["prelu", "gelu_new", "relu"])
def test_other_activations(act: str) -> None:
    reference = small_model(10, hidden_act=act).train()
    model = copy.deepcopy(reference)
    rows = rows_of([3, 8, 8, 20], seed=2)
    with kernels.gradient_buffers(model):
        reference(**padded(rows)).loss.backward()
        model(**packed(rows)).loss.backward()
        assert_same_gradients(model, reference)


def test_a_model_in_training_is_copied_and_saved(tmp_path: Path) -> None:
    model = small_model(11).train()
    model.stack_projections()
    rows = rows_of([6, 9], seed=1)
    with kernels.gradient_buffers(model):
        model(**packed(rows)).loss.backward()
        twin = copy.deepcopy(model)
        model.save_pretrained(tmp_path)
        torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = BertForNER.from_pretrained(tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
        assert torch.equal(state[name], tensor), name
        assert torch.equal(twin.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "lengths", [[8, 8, 8], [5, 5], [1], [3, 4, 6], [3, 3, 100, 100], [90, 2, 7]]
)
@pytest.mark.parametrize("p", [None, 0.3, 1.0])
def test_gradients_of_attention_with_dropout(lengths: list[int], p: float | None) -> None:
    """The backward that is written out, against autograd's row by row, with the same units kept."""
    torch.manual_seed(3)
    heads, size, total = 3, 4, sum(lengths)
    starts = [0, *itertools.accumulate(lengths)]
    packing = Packing(torch.tensor(starts), training=True)
    places = packing.places(heads)
    keep = (torch.rand(places.num_scores) >= (p or 0.0)).double() * (0.0 if p == 1.0 else 1.7)
    qkv = torch.randn(total, 3 * heads * size, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(total, heads * size, dtype=torch.float64)
    ours = attention_packed(qkv, places, None if p is None else lambda shape: keep.view(shape))
    (ours_grad,) = torch.autograd.grad(ours, qkv, grad)

    expected, rows, first_score = [], iter(itertools.pairwise(starts)), 0
    for block in packing.blocks:
        shape = (block.num_rows, heads, block.length, block.length)
        kept = keep[first_score : first_score + math.prod(shape)].view(shape)
        first_score += math.prod(shape)
        for row in range(block.num_rows):
            start, stop = next(rows)
            q, k, v = qkv[start:stop].view(-1, 3, heads, size).permute(1, 2, 0, 3)
            weights = (q @ k.transpose(-1, -2) / size**0.5).softmax(-1)
            if p is not None:
                weights = weights * kept[row, :, : stop - start, : stop - start]
            expected.append((weights @ v).transpose(0, 1).reshape(-1, heads * size))
    theirs = torch.cat(expected)
    (theirs_grad,) = torch.autograd.grad(theirs, qkv, grad)
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert torch.allclose(ours_grad, theirs_grad, atol=1e-12)
    with torch.no_grad():  # the way of evaluation, if there is no dropout
        again = attention_packed(qkv, places, None if p is None else lambda shape: keep.view(shape))
    assert torch.allclose(again, theirs, atol=1e-12)


@pytest.mark.parametrize(("hidden", "attention"), [(0.4, 0.0), (0.0, 0.4)])
def test_dropout_of_one_kind_only(hidden: float, attention: float) -> None:
    model = small_model(12).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = hidden
        elif isinstance(module, BertSelfAttention):
            module.dropout_prob = attention
    batch = packed(rows_of([6, 9, 9], seed=1))
    torch.manual_seed(1)
    first = model(**batch).logits
    second = model(**batch).logits
    torch.manual_seed(1)
    assert torch.equal(model(**batch).logits, first)
    assert not torch.equal(first, second)


def test_padding_rows_of_the_embedding_get_no_gradient() -> None:
    reference = small_model(6, pad_token_id=3).train()
    model = copy.deepcopy(reference)
    rows = rows_of([6, 9], seed=1)
    rows[0][0][2:4] = 3
    with kernels.gradient_buffers(model):
        reference(**padded(rows)).loss.backward()
        model(**packed(rows)).loss.backward()
        assert_same_gradients(model, reference)


def test_frozen_layers_stay_without_gradient() -> None:
    reference = small_model(8).train()
    frozen = ["word_embeddings", "layer.0.", "layer.1.attention.self.key"]
    for name, parameter in reference.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    model = copy.deepcopy(reference)
    model.stack_projections()
    rows = rows_of([6, 9], seed=1)
    with kernels.gradient_buffers(model):
        reference(**padded(rows)).loss.backward()
        model(**packed(rows)).loss.backward()
        assert_same_gradients(model, reference)


def test_rows_do_not_see_each_other() -> None:
    model = small_model(7).eval()
    rows = rows_of([5, 7, 7, 9, 14], seed=3)
    with torch.no_grad():
        together = model(**packed(rows)).logits
        alone = torch.cat([model(**packed([row])).logits for row in rows])
    assert (together - alone).abs().max() <= 1e-6


@needs_conll
@needs_minilm
def test_50_steps_on_conll2003() -> None:
    """MiniLM without dropout: each step's loss, and every gradient at the end."""
    data = SHARED_DATA / "conll2003"
    corpus = read_file(data / "train.txt").head(400)
    label_set = labels_for(corpus)
    folder = find_model(MINILM).folder
    torch.manual_seed(42)
    reference = without_dropout(
        BertForNER.from_pretrained(folder, id2label=dict(enumerate(label_set.names)))
    )
    rows = tokenize(corpus, Tokenizer.from_pretrained(folder, reference.config), label_set)
    model = copy.deepcopy(reference)
    runs = Losses(), Losses()
    train(model, rows, TrainConfig(max_steps=50), watcher=runs[0])
    train(reference, rows, TrainConfig(max_steps=50, packing=False), watcher=runs[1])
    difference = relative_difference(runs[0].loss, runs[1].loss)
    print(f"\nlargest relative difference of 50 losses: {difference:.1e}")
    assert difference <= 1e-5
    assert relative_difference(runs[0].grad_norm, runs[1].grad_norm) <= 1e-4
    for name, tensor in model.state_dict().items():
        other = reference.state_dict()[name]
        assert np.allclose(tensor, other, rtol=1e-4, atol=1e-5), name


@needs_conll
@needs_minilm
def test_gradients_of_a_real_batch() -> None:
    """MiniLM's every gradient, packed and padded, in the batch with CoNLL-2003's longest row."""
    corpus = read_file(SHARED_DATA / "conll2003" / "train.txt").head(1000)
    label_set = labels_for(corpus)
    folder = find_model(MINILM).folder
    torch.manual_seed(42)
    reference = without_dropout(
        BertForNER.from_pretrained(folder, id2label=dict(enumerate(label_set.names)))
    ).train()
    dataset = tokenize(corpus, Tokenizer.from_pretrained(folder, reference.config), label_set)
    chosen = np.append(np.arange(7), np.argmax(dataset.row_lengths))
    model = copy.deepcopy(reference)
    with kernels.gradient_buffers(model):
        for each, make in ((reference, collate), (model, pack)):
            batch = make(dataset, chosen, torch.device("cpu"))
            logits = each(batch.input_ids, **batch.layout).logits
            token_loss(logits, batch.labels, "mean").backward()
        assert_same_gradients(model, reference)
