"""Memory that runs out: recognised, and answered with smaller micro-batches.

A window whose micro-batches are halved gives the same gradient, but for the order of its sums, since every loss is
divided by the items of the whole window.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["ADVICE", "Exhausted", "cut", "halved", "is_memory", "running_out"]

Rows = NDArray[np.int64]
SIGNS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
    "defaultcpuallocator",
)
ADVICE = "model.gradient_checkpointing true, a shorter model.max_length, training.precision bf16 or a smaller backbone"


class Exhausted(Exception):
    """Memory ran out inside `running_out`. What it came from keeps the activations: go on outside the except block."""


def is_memory(fault: BaseException) -> bool:
    """Tell whether a fault says that memory ran out."""
    if isinstance(fault, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(fault, RuntimeError) and any(sign in str(fault).lower() for sign in SIGNS)


@contextmanager
def running_out() -> Iterator[None]:
    """Turn the devices' several ways to say that memory is out into Exhausted."""
    reason = None
    try:
        yield
    except (RuntimeError, MemoryError) as fault:
        if not is_memory(fault):
            raise
        reason = str(fault).strip().split("\n")[0].split(". ")[0] or type(fault).__name__
    if reason is not None:
        raise Exhausted(reason)


def cut(window: Sequence[Rows], most: int | None) -> Sequence[Rows]:
    """Return a window in micro-batches of `most` rows; None = as it is."""
    if most is None:
        return window
    rows = np.concatenate(window)
    return [rows[start : start + most] for start in range(0, len(rows), most)]


def halved(window: Sequence[Rows], whole_batch: str | None, step: int, reason: object) -> int:
    """Return the micro-batch to try instead of the `window`'s; say so.

    Raises ValueError where it is one row already, or where the rows of a batch cannot be parted: `whole_batch` says
    why.
    """
    largest = max(map(len, window))
    where = f"memory ran out at step {step} with {largest} rows at a time ({reason})"
    if whole_batch is not None:
        raise ValueError(
            f"{where}; {whole_batch} compares the rows of a whole batch, so it cannot be parted: lower "
            f"training.batch_size, or try {ADVICE}"
        )
    if largest == 1:
        raise ValueError(f"{where}, and fewer there are not; try {ADVICE}")
    smaller = largest // 2
    warnings.warn(
        f"{where}: from here on {smaller} at a time, the gradient stays the same; training.micro_batch_size {smaller} "
        "says so from the start",
        RuntimeWarning,
        stacklevel=2,
    )
    return smaller
