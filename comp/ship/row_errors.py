"""The error of each out-of-fold row, by kind of task, and its mean over parts of the rows.

Shapes: N rows, K target columns, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from comp.metrics import CLIP

__all__ = ["ERRORS", "NORMAL_95", "Part", "length_bins", "mean_errors", "row_errors"]

Floats = NDArray[np.float64]
NORMAL_95 = 1.96

ERRORS = {
    "regression": "absolute error",
    "ordinal": "absolute error",
    "binary": "log loss",
    "multilabel": "log loss",
    "multiclass": "log loss",
}
"""Kind of task -> what `row_errors` returns."""


def row_errors(kind: str, targets: Floats, preds: Floats) -> Floats:
    """Return the error (N,) of predictions (N, K or C) against targets (N, K), the mean over a row's known columns.

    Regression and ordinal: the absolute error. Binary, multilabel and multiclass: the log loss in nats, soft labels
    too. NaN where a row has no target.
    """
    if kind == "multiclass":
        likely = np.clip(preds / np.maximum(preds.sum(axis=1, keepdims=True), CLIP), CLIP, 1.0)
        if targets.shape[1] == preds.shape[1] > 1:
            soft: Floats = -(targets * np.log(likely)).sum(axis=1)
            return soft
        found = np.full(len(targets), np.nan)
        known = np.isfinite(targets[:, 0])
        found[known] = -np.log(likely[known, targets[known, 0].astype(np.int64)])
        return found
    if kind in ("binary", "multilabel"):
        likely = np.clip(preds, CLIP, 1 - CLIP)
        cells = -(targets * np.log(likely) + (1 - targets) * np.log1p(-likely))
    else:
        cells = np.abs(targets - preds)
    known = np.isfinite(cells)
    count = known.sum(axis=1)
    total = np.where(known, cells, 0.0).sum(axis=1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


@dataclass(frozen=True)
class Part:
    """Rows that have something in common, and their mean error."""

    name: str
    rows: NDArray[np.int64]
    """Their places, rows without an error left out."""
    mean: float
    margin: float
    """Half the 95% interval of the mean (normal, rows independent); 0 for one row."""


def mean_errors(errors: Floats, names: Sequence[str], of_row: NDArray[np.int64]) -> list[Part]:
    """Return the mean of `errors` (N,) over the rows of each name; `of_row` (N,) is a place in `names`.

    Names without a row that has an error are left out.
    """
    parts = []
    for place, name in enumerate(names):
        rows = np.flatnonzero((of_row == place) & np.isfinite(errors))
        if len(rows):
            own = errors[rows]
            margin = NORMAL_95 * float(own.std(ddof=1)) / len(own) ** 0.5 if len(own) > 1 else 0.0
            parts.append(Part(name, rows, float(own.mean()), margin))
    return parts


def length_bins(lengths: NDArray[np.int64], most: int = 8, least_rows: int = 20) -> tuple[list[str], NDArray[np.int64]]:
    """Cut (N,) lengths into at most `most` bins of about equal numbers of rows, at least `least_rows` where there are
    as many; return the bins' names ("12-30") and the bin (N,) of each row."""
    number = max(1, min(most, len(lengths) // least_rows))
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, number + 1)[1:-1], method="higher"))
    bins = np.searchsorted(edges, lengths, side="right").astype(np.int64)
    names = []
    for place in range(len(edges) + 1):
        own = lengths[bins == place]
        names.append("" if not len(own) else f"{own.min()}" if own.min() == own.max() else f"{own.min()}-{own.max()}")
    return names, bins
