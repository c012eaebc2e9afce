"""The frozen part of the network, computed once per text: what the lowest n blocks give, kept for all later passes.

With the embeddings and the lowest n blocks fixed and no dropout in them, a text's states there never change. They are
computed in batches that depend on the table alone, so that a fold that goes on after a stop finds the same bits, and
serve every epoch, evaluation and fold of the process. Padding and batch change the last bits of a matrix product:
against training without the cache, states differ by about 1e-6 in float32 and by the rounding of half precision under
autocast.

Shapes: P pieces of text, T tokens, H hidden size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from comp.data.batches import Batch, collate, sorted_batches
from comp.data.tokens import Encoded, within
from comp.doctor import GIB, memory_bytes
from comp.model.lowest import lowest_states
from comp.model.text_model import TextModel
from comp.runtime import Runtime

__all__ = ["FrozenStates", "NoFrozenStates", "open_frozen_states"]

SHARE = 0.5  # of the memory, or of the free disk, that the states may take
BATCH_TOKENS = 4096


class NoFrozenStates:
    """Keeps nothing."""

    def serve(self, model: TextModel) -> None:
        """Let `model` take the states of its frozen part from here."""


class FrozenStates(NoFrozenStates):
    """Hidden states of the texts of `encoded`, computed when first asked for; `kept` (tokens, H) holds them."""

    def __init__(self, encoded: Encoded, runtime: Runtime, kept: NDArray[np.float32]) -> None:
        self.encoded, self.runtime, self.kept = encoded, runtime, kept
        self.batches = sorted_batches(encoded.lengths, max_tokens=BATCH_TOKENS)
        self.batch_of = np.empty(len(encoded), np.int64)
        for number, rows in enumerate(self.batches):
            self.batch_of[rows] = number
        self.done = np.zeros(len(self.batches), bool)

    def serve(self, model: TextModel) -> None:
        model.lower = lambda batch: self.states(model, batch)

    def states(self, model: TextModel, batch: Batch) -> torch.Tensor:
        """Return (P, T, H) float32 states of a batch of rows of `encoded`; 0 where there is padding."""
        for number in np.unique(self.batch_of[batch.rows]):
            if not self.done[number]:
                self._fill(model, self.batches[number])
                self.done[number] = True
        found = np.zeros((*batch.input_ids.shape, self.kept.shape[1]), np.float32)
        pieces = _pieces(self.encoded, batch.rows)
        lengths = self.encoded.offsets[pieces + 1] - self.encoded.offsets[pieces]
        assert int(lengths.sum()) == batch.num_tokens, "the batch was cut from another table"
        for place, (start, length) in enumerate(zip(self.encoded.offsets[pieces], lengths, strict=True)):
            found[place, self._where(length, found.shape[1])] = self.kept[start : start + length]
        states = torch.from_numpy(found)
        if self.runtime.device.type == "cuda":
            states = states.pin_memory()
        return states.to(self.runtime.device, non_blocking=True)

    def _where(self, length: int, width: int) -> slice:
        return slice(width - length, width) if self.encoded.pad_left else slice(0, length)

    def _fill(self, model: TextModel, rows: NDArray[np.int64]) -> None:
        batch = collate(self.encoded, rows).to(self.runtime.device)
        was_training = model.training
        model.eval()  # the same kernels whoever asks first
        try:
            with torch.no_grad(), self.runtime.autocast():
                found = lowest_states(model.backbone, batch.input_ids, batch.mask, batch.token_type_ids)
                states = found.float().cpu().numpy()
        finally:
            model.train(was_training)
        for place, piece in enumerate(_pieces(self.encoded, rows)):
            start, stop = self.encoded.offsets[piece : piece + 2]
            self.kept[start:stop] = states[place, self._where(stop - start, states.shape[1])]


def _pieces(encoded: Encoded, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    counts = encoded.first[rows + 1] - encoded.first[rows]
    found: NDArray[np.int64] = np.repeat(encoded.first[rows], counts) + within(counts)
    return found


def open_frozen_states(
    encoded: Encoded, *, hidden_size: int, runtime: Runtime, folder: Path, say: Callable[[str], None]
) -> NoFrozenStates:
    """Return room for the states of all texts: in memory, else in a file in `folder`, else none; `say` tells which.

    The file is removed from the folder at once and lives as long as the process.
    """
    shape = int(encoded.offsets[-1]), hidden_size
    size = 4 * shape[0] * shape[1]
    told = f"the frozen part's states of {shape[0]:,} tokens ({size / GIB:.2f} GiB)"
    memory = memory_bytes()
    if memory is not None and size <= SHARE * memory[1]:
        say(f"{told} are kept in memory")
        return FrozenStates(encoded, runtime, np.zeros(shape, np.float32))
    if size <= SHARE * shutil.disk_usage(folder).free:
        path = folder / ".frozen.part"
        kept: Any = np.memmap(path, np.float32, "w+", shape=shape)
        path.unlink()
        say(f"{told} are kept on disk: memory has no room for them")
        return FrozenStates(encoded, runtime, kept)
    say(f"{told} find no room in memory or on disk: they are computed anew in every pass")
    return NoFrozenStates()
