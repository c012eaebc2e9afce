"""Texts laid end to end: a padded batch without its padding, for the attention called `packed` (see attention.py).

Every part of an encoder but its attention works token by token, so that padding there is work for nothing. The tokens
of a batch go through the blocks as one text; positions start anew with each, and attention is told their lengths.

Shapes: P pieces of text, T tokens of the longest, N tokens of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["Packing"]


class Packing:
    """Where the tokens of a padded batch (P, T) lie, padded on the right, when they are laid end to end, longest first.

    `lengths` (P,): tokens of each piece, on the host, so that no device is waited for.
    """

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        self.shape = len(lengths), width
        order = np.argsort(-np.array(lengths, np.int64), kind="stable")  # neighbours of like lengths attend together
        counts = np.array(lengths, np.int64)[order]
        self.lengths = tuple(counts.tolist())
        places = np.concatenate([np.arange(count) for count in counts])
        self.places = torch.from_numpy(places).to(device, non_blocking=True)
        """(N,) place of each token in its piece."""
        self._index = self.places
        if len(counts) > 1:
            starts = np.repeat(order * width, counts)
            self._index = torch.from_numpy(starts + places).to(device, non_blocking=True)

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """Return (1, N, ...) of (P, T, ...)."""
        return padded.flatten(0, 1).index_select(0, self._index)[None]

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """Return (P, T, ...), 0 where there is padding, of (1, N, ...)."""
        rows, width = self.shape
        whole = packed[0]
        if packed.shape[1] < rows * width:
            whole = packed.new_zeros(rows * width, *packed.shape[2:]).index_copy(0, self._index, whole)
        return whole.unflatten(0, self.shape).clone()  # FSDP warns of a view

    def inputs(self, first_position: int, **padded: torch.Tensor) -> dict[str, Any]:
        """Return what an encoder is called with: the packed inputs, (1, N), their positions, and their lengths."""
        return {
            **{name: self.pack(tensor) for name, tensor in padded.items()},
            "position_ids": (self.places + first_position)[None],
            "text_lengths": self.lengths,
        }
