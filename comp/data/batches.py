"""Padded batches: bucketed by length in training, longest first in prediction.

Shapes: N rows, B rows of a batch, P pieces of text (B, or more where long texts are windows), T tokens of its longest
piece, K targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from comp.data.tokens import Encoded, within

__all__ = ["Batch", "Labels", "collate", "longest_window", "sorted_batches", "training_windows"]

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
    bucketing: bool = True,
    seed: int,
    epoch: int,
) -> list[list[NDArray[np.int64]]]:
    """Cut one epoch into windows (one optimizer step each) of micro-batches of row numbers.

    These are windows of rows, not the overlapping windows of a long text, which always travel with their row. Every
    row stands in exactly one micro-batch; the order depends on `seed` and `epoch` alone. With `bucketing`, rows are
    shuffled, sorted by length within mega-batches of 50 windows, cut, and the windows shuffled: so neither the longest
    nor the ragged window has a fixed place. `lengths` (N,) is indexed by row number.
    """
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(rows)
    if bucketing:
        mega = batch_size * MEGA_BATCHES
        parts = [order[start : start + mega] for start in range(0, len(order), mega)]
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
    windows = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    if bucketing:
        windows = [windows[place] for place in generator.permutation(len(windows))]
    micro = micro_batch_size or batch_size
    return [[window[start : start + micro] for start in range(0, len(window), micro)] for window in windows]


def longest_window(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], *, batch_size: int, micro_batch_size: int | None = None
) -> list[NDArray[np.int64]]:
    """Return a window of the longest of `rows`, which takes as much memory as any of `training_windows`."""
    longest = rows[np.argsort(-lengths[rows], kind="stable")[:batch_size]]
    micro = micro_batch_size or batch_size
    return [longest[start : start + micro] for start in range(0, len(longest), micro)]


def sorted_batches(
    lengths: NDArray[np.int64], *, max_tokens: int = 8192, max_rows: int = 256
) -> list[NDArray[np.int64]]:
    """Cut all N rows into batches for prediction: at most `max_tokens` padded tokens and `max_rows` rows each.

    Longest first, so that memory runs out at once or never. A batch has at least one row. Cut again from where a batch
    starts, the rest gives the same batches.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + max(1, min(max_rows, max_tokens // longest))
        batches.append(order[start:stop])
        start = stop
    return batches
