"""Bucketing, padding, labels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from comp.data.batches import Labels, collate, count_tokens, longest_window, sorted_batches, training_windows
from comp.data.tokens import encode
from comp.model.sources import load_tokenizer

TEXTS = ["the ship was golden", "a dull tram", "deer", "on the bridge she was happy and the market was bright"]


@pytest.fixture
def bert(tiny_model_folder: Callable[..., Path]) -> object:
    return load_tokenizer(str(tiny_model_folder("bert")))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=90),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_row_stands_in_one_micro_batch(
    lengths: list[int], batch_size: int, micro: int, bucketing: bool, epoch: int
) -> None:
    micro = min(micro, batch_size)
    rows = np.arange(3, 3 + len(lengths))
    all_lengths = np.array([0, 0, 0, *lengths])
    options = {"batch_size": batch_size, "micro_batch_size": micro, "bucketing": bucketing, "seed": 5, "epoch": epoch}
    windows = training_windows(rows, all_lengths, **options)
    flat = np.concatenate([part for window in windows for part in window])
    assert sorted(flat) == sorted(rows)
    assert len(windows) == -(-len(rows) // batch_size)
    sizes = sorted((sum(map(len, window)) for window in windows), reverse=True)
    assert all(size == batch_size for size in sizes[:-1])
    assert all(len(part) <= micro for window in windows for part in window)
    again = training_windows(rows, all_lengths, **options)
    assert all(np.array_equal(a, b) for w, v in zip(windows, again, strict=True) for a, b in zip(w, v, strict=True))


def test_order_changes_with_epoch_and_seed_and_bucketing_saves_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 250, 400)
    rows = np.arange(400)

    def order(**options: int) -> list[int]:
        windows = training_windows(rows, lengths, batch_size=8, **{"seed": 1, "epoch": 0, **options})
        return np.concatenate([part for window in windows for part in window]).tolist()

    assert order() != order(epoch=1)
    assert order() != order(seed=2)

    def padded(bucketing: bool) -> int:
        windows = training_windows(rows, lengths, batch_size=8, bucketing=bucketing, seed=1, epoch=0)
        return sum(int(lengths[part].max()) * len(part) for window in windows for part in window)

    assert padded(True) < 1.05 * lengths.sum() < padded(False)


def test_neither_the_longest_nor_the_ragged_window_has_a_fixed_place() -> None:
    lengths = np.arange(1, 42)
    last, longest = set(), set()
    for epoch in range(12):
        windows = training_windows(np.arange(41), lengths, batch_size=4, seed=0, epoch=epoch)
        sizes = [sum(map(len, window)) for window in windows]
        last.add(sizes.index(1))
        longest.add(next(place for place, window in enumerate(windows) if 40 in np.concatenate(window)))
    assert len(last) > 3
    assert len(longest) > 3


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=90),
    st.integers(1, 9),
    st.integers(1, 120),
    st.integers(1, 9),
    st.booleans(),
)
def test_windows_by_tokens_hold_what_fits(
    lengths: list[int], batch_size: int, budget: int, micro: int, bucketing: bool
) -> None:
    rows, all_lengths = np.arange(2, 2 + len(lengths)), np.array([0, 0, *lengths])
    options = {"batch_size": batch_size, "batch_tokens": budget, "micro_batch_size": micro}
    windows = training_windows(rows, all_lengths, **options, bucketing=bucketing, seed=5, epoch=1)
    assert sorted(np.concatenate([part for window in windows for part in window])) == sorted(rows)
    whole = [np.concatenate(window) for window in windows]
    assert all(len(one) <= batch_size for one in whole)
    assert all(len(one) == 1 or len(one) * all_lengths[one].max() <= budget for one in whole)
    assert all(len(part) <= micro for window in windows for part in window)
    if not bucketing:  # in the order they are cut, the next row never fits
        for one, after in pairwise(whole):
            longest = max(all_lengths[one].max(), all_lengths[after[0]])
            assert len(one) == batch_size or (len(one) + 1) * longest > budget
    again = training_windows(rows, all_lengths, **options, bucketing=bucketing, seed=5, epoch=1)
    assert str(again) == str(windows)
    longest = np.concatenate(longest_window(rows, all_lengths, **options))
    assert all_lengths[longest].max() == max(lengths)
    assert len(longest) == 1 or len(longest) * max(lengths) <= budget


def _cost(lengths: np.ndarray, batches: list[np.ndarray], max_tokens: int) -> int:
    return sum(int(lengths[part].max()) * len(part) + max_tokens // 64 for part in batches)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=10), st.integers(100, 3000), st.integers(1, 6))
def test_no_other_cut_of_the_sorted_rows_costs_less(lengths: list[int], max_tokens: int, max_rows: int) -> None:
    array = np.array(lengths)
    order = np.argsort(-array, kind="stable")
    found = sorted_batches(array, max_tokens=max_tokens, max_rows=max_rows)
    for cuts in product((False, True), repeat=len(array) - 1):
        other = np.split(order, np.flatnonzero(cuts) + 1)
        if all(len(p) == 1 or (len(p) <= max_rows and array[p].max() * len(p) <= max_tokens) for p in other):
            assert _cost(array, found, max_tokens) <= _cost(array, other, max_tokens)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=80), st.integers(0, 20))
def test_what_is_left_from_a_batch_on_gives_the_same_batches(lengths: list[int], skipped: int) -> None:
    array = np.array(lengths)
    parts = sorted_batches(array, max_tokens=400)
    skipped = min(skipped, len(parts) - 1)
    rest = np.concatenate(parts[skipped:])
    again = [rest[part] for part in sorted_batches(array[rest], max_tokens=400)]
    assert [part.tolist() for part in again] == [part.tolist() for part in parts[skipped:]]


def test_texts_of_many_lengths_are_padded_little_in_prediction() -> None:
    lengths = np.random.default_rng(0).gamma(6, 4.5, 1700).astype(np.int64) + 3
    parts = sorted_batches(lengths, max_tokens=2048)
    padded = sum(int(lengths[part].max()) * len(part) for part in parts)
    assert 1 - lengths.sum() / padded < 0.01
    assert len(parts) < 1.7 * padded / 2048


def test_tokens_are_counted_as_they_are_padded(bert: object) -> None:
    for windows in (None, {"stride": 2, "max_windows": 3}):
        encoded = encode(bert, (TEXTS,), max_length=8, windows=windows, cache=None)
        rows = [np.array([3, 1]), np.array([0]), np.array([2])]
        batches = [collate(encoded, own) for own in rows]
        expected = sum(batch.num_tokens for batch in batches), sum(batch.mask.numel() for batch in batches)
        assert count_tokens(encoded, rows) == expected


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60))
def test_prediction_batches_cover_all_rows_longest_first(lengths: list[int]) -> None:
    array = np.array(lengths)
    parts = sorted_batches(array, max_rows=7, max_tokens=500)
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))
    assert array[parts[0]].max() == array.max()
    assert all(len(part) == 1 or array[part].max() * len(part) <= 500 for part in parts)
    assert all(len(part) <= 7 for part in parts)


def test_labels_travel_with_their_rows(bert: object) -> None:
    encoded = encode(bert, (TEXTS,), max_length=16, cache=None)
    labels = Labels({"a": np.arange(4, dtype=np.float32)[:, None]}, np.array([1, 2, 3, 4], np.float32))
    batch = collate(encoded, np.array([2, 0]), labels)
    assert batch.targets["a"].tolist() == [[2.0], [0.0]]
    assert batch.weights is not None
    assert batch.weights.tolist() == [3.0, 1.0]
    assert batch.to(torch.device("cpu")) is batch
