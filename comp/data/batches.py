"""Padded batches: bucketed by length in training, longest first in prediction.

Shapes: N rows, B rows of a batch, P pieces of text (B, or more where long texts are windows), T tokens of its longest
piece, K targets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from comp.data.tokens import Encoded, within

__all__ = [
    "Batch",
    "Labels",
    "collate",
    "count_tokens",
    "longest_window",
    "sorted_batches",
    "training_windows",
]

OVERHEAD = 64  # a batch of prediction costs so much as a 64th of a full one more than its tokens
MEGA_BATCHES = 50  # windows sorted together: long enough to pad little, short enough to stay shuffled


@dataclass(frozen=True)
class Labels:
    """What the loss needs of N rows."""

    targets: dict[str, NDArray[np.float32]]
    """Task name -> (N, K)."""
    weights: NDArray[np.float32] | None = None
    """(N,) or None."""
    errors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Task name -> (N,) standard errors of its target, for the loss that reads them."""


@dataclass
class Batch:
    """One padded batch. `mask`: nonzero = real token."""

    rows: NDArray[np.int64]
    """(B,) row numbers in the table the batch was cut from."""
    input_ids: torch.Tensor
    """(P, T)"""
    mask: torch.Tensor
    """(P, T)"""
    num_tokens: int
    """Real tokens of the batch."""
    token_type_ids: torch.Tensor | None = None
    """(P, T)"""
    fields: torch.Tensor | None = None
    """(P, T) text column of each token, -1 for special tokens and padding; None for one column."""
    window_of: torch.Tensor | None = None
    """(P,) place in the batch of the row each piece belongs to; None when every row has one piece."""
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: torch.Tensor | None = None
    errors: dict[str, torch.Tensor] = field(default_factory=dict)
    lengths: tuple[int, ...] | None = None
    """(P,) tokens of each piece; None where nobody counted them."""

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device` (itself when it is there already)."""
        if self.input_ids.device == device:
            return self

        def sent(tensor: torch.Tensor) -> torch.Tensor:
            # A copy to a GPU waits for all that runs there unless it comes out of pinned memory.
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        def move(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else sent(tensor)

        return replace(
            self,
            input_ids=sent(self.input_ids),
            mask=sent(self.mask),
            token_type_ids=move(self.token_type_ids),
            fields=move(self.fields),
            window_of=move(self.window_of),
            targets={name: sent(target) for name, target in self.targets.items()},
            weights=move(self.weights),
            errors={name: sent(error) for name, error in self.errors.items()},
        )


# --- batches ---------------------------------------------------------------------------------------------------------


def collate(encoded: Encoded, rows: NDArray[np.int64], labels: Labels | None = None) -> Batch:
    """Pad the pieces of `rows` (B,) to the longest of them."""
    counts = encoded.first[rows + 1] - encoded.first[rows]
    pieces = np.repeat(encoded.first[rows], counts) + within(counts)
    starts, lengths = encoded.offsets[pieces], encoded.offsets[pieces + 1] - encoded.offsets[pieces]
    shape = len(pieces), int(lengths.max())
    ids = np.full(shape, encoded.pad_id, np.int64)
    mask = np.zeros(shape, np.int64)
    types = None if encoded.type_ids is None else np.full(shape, encoded.pad_type_id, np.int64)
    fields = None if encoded.fields is None else np.full(shape, -1, np.int64)
    for place, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        where = slice(shape[1] - length, shape[1]) if encoded.pad_left else slice(0, length)
        ids[place, where] = encoded.ids[start : start + length]
        mask[place, where] = 1
        if types is not None and encoded.type_ids is not None:
            types[place, where] = encoded.type_ids[start : start + length]
        if fields is not None and encoded.fields is not None:
            fields[place, where] = encoded.fields[start : start + length]
    batch = Batch(rows, torch.from_numpy(ids), torch.from_numpy(mask), int(lengths.sum()))
    batch.lengths = tuple(lengths.tolist())
    if types is not None:
        batch.token_type_ids = torch.from_numpy(types)
    if fields is not None:
        batch.fields = torch.from_numpy(fields)
    if len(pieces) > len(rows):
        batch.window_of = torch.from_numpy(np.repeat(np.arange(len(rows)), counts))
    if labels is not None:
        batch.targets = {name: torch.from_numpy(target[rows]) for name, target in labels.targets.items()}
        batch.weights = None if labels.weights is None else torch.from_numpy(labels.weights[rows])
        batch.errors = {name: torch.from_numpy(error[rows]) for name, error in labels.errors.items()}
    return batch


def training_windows(
    rows: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    batch_tokens: int | None = None,
    bucketing: bool = True,
    seed: int,
    epoch: int,
) -> list[list[NDArray[np.int64]]]:
    """Cut one epoch into windows (one optimizer step each) of micro-batches of row numbers.

    These are windows of rows, not the overlapping windows of a long text, which always travel with their row. Every
    row stands in exactly one micro-batch; the order depends on `seed` and `epoch` alone. With `bucketing`, rows are
    shuffled, sorted by length within mega-batches of 50 windows, cut, and the windows shuffled: so neither the longest
    nor the ragged window has a fixed place. `lengths` (N,) is indexed by row number.

    A window has `batch_size` rows; with `batch_tokens`, as many of them as hold at most so many padded tokens, and at
    least one. Then the number of windows differs a little from epoch to epoch.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(rows)
    if bucketing:
        mega = batch_size * MEGA_BATCHES
        parts = [order[start : start + mega] for start in range(0, len(order), mega)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    if batch_tokens is None:
        windows = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    else:
        windows = _filled(order, lengths, batch_size, batch_tokens)
    if bucketing:
        windows = [windows[place] for place in generator.permutation(len(windows))]
    return [_parted(window, micro_batch_size) for window in windows]


def _filled(
    order: NDArray[np.int64], lengths: NDArray[np.int64], most_rows: int, most_tokens: int
) -> list[NDArray[np.int64]]:
    """Cut `order` into runs of at most `most_rows` rows and `most_tokens` padded tokens, at least one row each."""
    cuts, start, longest = [], 0, 0
    for place, length in enumerate(lengths[order].tolist()):
        longest, rows = max(longest, length), place - start + 1
        if rows > 1 and (rows > most_rows or rows * longest > most_tokens):
            cuts.append(place)
            start, longest = place, length
    return np.split(order, cuts)


def _parted(window: NDArray[np.int64], micro: int | None) -> list[NDArray[np.int64]]:
    """Return a window as micro-batches of `micro` rows; None = in one."""
    return [window[start : start + (micro or len(window))] for start in range(0, len(window), micro or len(window))]


def longest_window(
    rows: NDArray[np.int64],
    lengths: NDArray[np.int64],
    *,
    batch_size: int,
    micro_batch_size: int | None = None,
    batch_tokens: int | None = None,
) -> list[NDArray[np.int64]]:
    """Return a window of the longest of `rows` (M,), which takes as much memory as any of `training_windows`.

    `lengths` (N,): tokens of each row of the table. The window is a list of micro-batches of row numbers.
    """
    longest = rows[np.argsort(-lengths[rows], kind="stable")[:batch_size]]
    if batch_tokens is not None:
        longest = _filled(longest, lengths, batch_size, batch_tokens)[0]
    return _parted(longest, micro_batch_size)


def sorted_batches(
    lengths: NDArray[np.int64], *, max_tokens: int = 8192, max_rows: int = 256
) -> list[NDArray[np.int64]]:
    """Cut all N rows into batches of row numbers for prediction, `max_tokens` padded tokens and `max_rows` at most.

    `lengths` (N,): tokens of each row.

    Longest first, so that memory runs out at once or never. A batch has at least one row. Of all ways to cut the
    sorted rows, this one has the least padded tokens, where a batch more counts as a 64th of `max_tokens`: full batches
    of texts whose lengths differ are mostly padding, one-row batches mostly overhead. Cut again from where a batch
    starts, the rest gives the same batches.
    """
    order = np.argsort(-lengths, kind="stable")
    longest = np.maximum(1, lengths[order]).astype(np.int64)
    number = len(order)
    counts = np.arange(1, max_rows + 1)
    stops = np.zeros(number, np.int64)
    cost = np.zeros(number + 1, np.int64)  # of the rows from a place on, cut at best
    for start in range(number - 1, -1, -1):
        most = max(1, min(max_rows, max_tokens // int(longest[start]), number - start))
        whole = longest[start] * counts[:most] + cost[start + 1 : start + 1 + most]
        rows = most - int(whole[::-1].argmin())  # the largest of equals
        stops[start], cost[start] = start + rows, whole[rows - 1] + max_tokens // OVERHEAD
    batches, start = [], 0
    while start < number:
        batches.append(order[start : stops[start]])
        start = int(stops[start])
    return batches


def count_tokens(encoded: Encoded, batches: Iterable[NDArray[np.int64]]) -> tuple[int, int]:
    """Return the real and the padded number of tokens of batches of row numbers (B,), each padded to its longest."""
    sizes = np.diff(encoded.offsets)
    longest, pieces = np.maximum.reduceat(sizes, encoded.first[:-1]), np.diff(encoded.first)
    lengths, real, padded = encoded.lengths, 0, 0
    for rows in batches:
        real += int(lengths[rows].sum())
        padded += int(pieces[rows].sum() * longest[rows].max())
    return real, padded
