"""Order of the data, and batches of it as tensors."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bertner.batches import Schedule, collate, epoch_order, pack, packed_by_length
from bertner.config import Reading, TrainConfig
from bertner.data import TokenDataset, labels_for, tokenize
from bertner.labels import IGNORE_INDEX
from bertner.tokenizer import Tokenizer
from tests.conftest import corpus_of

CPU = torch.device("cpu")


def make_dataset(tokenizer: Tokenizer) -> TokenDataset:
    corpus = corpus_of("Paris/B-LOC", "the said of/B-LOC Paris/I-LOC", "said landing/B-LOC")
    return tokenize(corpus, tokenizer, labels_for(corpus))


def test_collate_pads_on_the_right(tokenizer: Tokenizer) -> None:
    dataset = make_dataset(tokenizer)
    batch = collate(dataset, [2, 0], CPU)
    assert batch.input_ids.shape == (2, 8)
    assert batch.attention_mask.tolist() == [[1] * 8, [1] * 3 + [0] * 5]
    assert batch.labels[1].tolist() == [-100, 1, -100] + [-100] * 5
    assert batch.input_ids[1, 3:].tolist() == [tokenizer.pad_id] * 5
    begin = dataset.rows.starts[2]
    assert batch.token_index.tolist() == [*range(begin, begin + 6), 0]
    assert batch.is_own.tolist() == [[False, *[True] * 6, False], [False, True, *[False] * 6]]
    assert dataset.input_ids[batch.token_index].tolist() == batch.input_ids[batch.is_own].tolist()
    assert batch.input_ids[:, 0].tolist() == [tokenizer.cls_id] * 2
    assert (batch.input_ids[0, 7], batch.input_ids[1, 2]) == (tokenizer.sep_id, tokenizer.sep_id)
    assert batch.labels.dtype == batch.input_ids.dtype == torch.int64
    assert (batch.labels[batch.attention_mask == 0] == IGNORE_INDEX).all()


def test_pack_leaves_nothing_out_and_puts_nothing_in(tokenizer: Tokenizer) -> None:
    dataset = make_dataset(tokenizer)
    batch = pack(dataset, [2, 1, 0], CPU)
    assert batch.rows.tolist() == [0, 2, 1] or batch.rows.tolist() == [0, 1, 2]
    lengths = dataset.row_lengths[batch.rows]
    assert (np.diff(lengths) >= 0).all()
    assert batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths)]
    places = [np.arange(*dataset.rows.starts[row : row + 2]) for row in batch.rows]
    assert batch.token_index.tolist() == np.concatenate(places).tolist()
    assert batch.input_ids[batch.is_own].tolist() == dataset.input_ids[batch.token_index].tolist()
    assert batch.labels[batch.is_own].tolist() == dataset.labels[batch.token_index].tolist()
    assert set(batch.labels[~batch.is_own].tolist()) == {IGNORE_INDEX}
    specials = [tokenizer.cls_id, tokenizer.sep_id] * 3
    assert batch.input_ids[~batch.is_own].tolist() == specials
    begins = batch.cu_seqlens[:-1]
    assert set(batch.input_ids[begins].tolist()) == {tokenizer.cls_id}
    assert batch.labels.dtype == batch.input_ids.dtype == torch.int64


@pytest.mark.parametrize("batch_tokens", [1, 9, 12, 1000])
def test_packed_batches_keep_to_their_budget(tokenizer: Tokenizer, batch_tokens: int) -> None:
    dataset = make_dataset(tokenizer)
    batches = list(packed_by_length(dataset, batch_tokens, CPU))
    visited = np.concatenate([batch.rows for batch in batches])
    assert sorted(visited) == [0, 1, 2]
    assert sorted(np.concatenate([b.token_index for b in batches])) == list(
        range(len(dataset.input_ids))
    )
    for batch in batches:
        assert len(batch.input_ids) <= batch_tokens or len(batch.rows) == 1
    longest = [int(dataset.row_lengths[batch.rows].max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_order_is_the_data_loaders() -> None:
    """What a shuffling DataLoader with the Trainer's sampler visits, epoch by epoch."""
    for epoch in range(3):
        generator = torch.Generator()
        generator.manual_seed(42 + epoch)
        sampler = torch.utils.data.RandomSampler(range(11), generator=generator)
        assert list(sampler) == epoch_order(11, 42, epoch).tolist()


def test_steps_visit_every_row_once() -> None:
    config = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, seed=1)
    steps = list(itertools.islice(Schedule(np.full(23, 5), config).steps_from(0), 6))
    assert [step for step, _ in steps] == list(range(6))
    assert [[len(rows) for rows in step] for _, step in steps] == 2 * [[4, 4], [4, 4], [4, 3]]
    for epoch in range(2):
        visited = np.concatenate([np.concatenate(step) for _, step in steps[3 * epoch :][:3]])
        assert visited.tolist() == epoch_order(23, 1, epoch).tolist()


@pytest.mark.parametrize("first", range(7))
def test_steps_begin_anywhere(first: int) -> None:
    config = TrainConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, seed=1)
    whole = list(itertools.islice(Schedule(np.full(23, 5), config).steps_from(0), 10))
    rest = list(itertools.islice(Schedule(np.full(23, 5), config).steps_from(first), 10 - first))
    for (step, batches), (other_step, other_batches) in zip(whole[first:], rest, strict=True):
        assert step == other_step
        assert [rows.tolist() for rows in batches] == [rows.tolist() for rows in other_batches]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "num_rows", "expected"),
    [
        (8, 1, 14041, 1756),  # the card's; its last batch holds one sentence
        (8, 1, 8, 1),
        (8, 1, 9, 2),
        (8, 1, 1, 1),
        (8, 4, 14041, 439),
        (8, 4, 32, 1),
        (8, 4, 33, 2),
        (1, 1, 7, 7),
        (32, 100, 50, 1),
    ],
)
def test_steps_per_epoch(batch_size: int, accumulation: int, num_rows: int, expected: int) -> None:
    config = TrainConfig(
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation
    )
    assert Schedule(np.full(num_rows, 5), config).steps_per_epoch == expected


def test_total_steps() -> None:
    def total_steps(num_rows: int, **settings: Any) -> int:
        return Schedule(np.full(num_rows, 5), TrainConfig(**settings)).total_steps

    assert total_steps(14041) == 5268  # as in the card
    assert total_steps(14041, num_train_epochs=1) == 1756
    assert total_steps(14041, num_train_epochs=0.5) == 878
    assert total_steps(14041, num_train_epochs=0.0001) == 1
    assert total_steps(17, num_train_epochs=1.5) == 5  # ceil(1.5 * 3)
    assert total_steps(14041, max_steps=7) == 7
    assert total_steps(1, max_steps=7, num_train_epochs=0) == 7
    assert total_steps(14041, gradient_accumulation_steps=4) == 3 * 439


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=80),
    batch_tokens=st.integers(1, 200),
    accumulation=st.integers(1, 3),
)
def test_batches_of_tokens(lengths: list[int], batch_tokens: int, accumulation: int) -> None:
    config = TrainConfig(
        train_batch_tokens=batch_tokens, gradient_accumulation_steps=accumulation, seed=5
    )
    schedule = Schedule(np.array(lengths, dtype=np.int32), config)
    even = sum(lengths) / schedule.num_micro_batches
    for epoch in range(3):
        batches = schedule.micro_batches(epoch)
        assert len(batches) == schedule.num_micro_batches, "each epoch has as many"
        assert np.concatenate(batches).tolist() == epoch_order(len(lengths), 5, epoch).tolist()
        for rows in batches:
            assert len(rows) > 0
            if batch_tokens >= max(lengths):
                assert abs(np.array(lengths)[rows].sum() - even) <= max(lengths)
    if batch_tokens >= max(lengths):
        assert even <= batch_tokens
    whole = list(itertools.islice(schedule.steps_from(0), 9))
    rest = list(itertools.islice(schedule.steps_from(4), 5))
    for (step, batches), (other_step, other_batches) in zip(whole[4:], rest, strict=True):
        assert step == other_step
        assert [rows.tolist() for rows in batches] == [rows.tolist() for rows in other_batches]


def test_rows_with_context_as_they_are_read(tokenizer: Tokenizer) -> None:
    corpus = corpus_of("Paris/B-LOC", "the said of/B-LOC Paris/I-LOC", "said landing/B-LOC")
    corpus = dataclasses.replace(corpus, marks_documents=True)
    reading = Reading(context="document", context_unit="sentence", context_tokens=2)
    dataset = tokenize(corpus, tokenizer, labels_for(corpus), reading)
    whole = tokenize(corpus, tokenizer, labels_for(corpus))
    assert dataset.row_lengths.tolist() == [5, 8, 10]
    batch = pack(dataset, [0, 1, 2], CPU)
    texts = [tokenizer.fast.id_to_token(int(token)) for token in batch.input_ids]
    assert texts == [
        *"[CLS] Paris the said [SEP]".split(),
        *"[CLS] Paris the said of Paris said [SEP]".split(),  # landing would be cut
        *"[CLS] of Paris said l ##a ##n ##d ##ing [SEP]".split(),
    ]
    assert batch.token_index.tolist() == list(range(len(whole.input_ids)))
    assert batch.labels[batch.is_own].tolist() == whole.labels.tolist()
    assert set(batch.labels[~batch.is_own].tolist()) == {IGNORE_INDEX}
    padded = collate(dataset, [0, 1, 2], CPU)
    real = padded.attention_mask.bool()
    for name in ("input_ids", "labels", "is_own"):
        assert getattr(padded, name)[real].tolist() == getattr(batch, name).tolist()
    assert padded.token_index.tolist() == batch.token_index.tolist()
    assert not padded.is_own[~real].any()
