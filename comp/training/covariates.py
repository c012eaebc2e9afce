"""What a race knows of all rows before it sees them, and what that says of a mean over them. Pure numbers, no model.

Two checkpoints of a run differ mostly in ways that an earlier one foretells: all predictions lie higher, or further
apart. How the loss of each row would change then is known from earlier predictions of all rows, and the difference of
two losses, seen on a few rows, is explained by it: on CLEAR to 70 to 98 percent. So a regression on these columns tells
the mean difference over all rows from a fraction of them (the linear regression estimator of survey sampling: Cochran
1977, Sampling Techniques, chapter 7).

Shapes: N rows, K targets, F columns, n rows seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["covariates_of", "mean_over_all"]

Floats: TypeAlias = NDArray[np.float64]
MOST_CLASSES = 5  # whose scores are moved one by one
ROWS_PER_COLUMN = 5  # seen, below which there is no regression
EXTREME = 8.0  # standard deviations, where a column is cut off: no row may decide by itself
LEVERAGE = 0.9  # of a row in the regression, at most, where its own part in it is made up for
APART, WIDER = 0.5, 1.25  # standard deviations that predictions are moved, factor that they are spread


def covariates_of(values: Floats, targets: Floats, losses_of: Callable[[Floats], Floats], kind: str) -> Floats:
    """Return (N, F): the losses of predictions `values` (N, K), of these moved and spread a little, and their means.

    `losses_of` gives losses (N,) of predictions; `targets` (N, K'); `kind`: of the task. Probabilities are moved as
    logits.
    """
    columns = [losses_of(values), *(losses_of(moved) for moved in _moved(values, kind))]
    if kind != "multiclass":
        columns += [values.mean(axis=1), targets.mean(axis=1)]
    return np.stack(columns, axis=1)


def _moved(values: Floats, kind: str) -> list[Floats]:
    if kind == "multiclass":
        logits = np.log(np.clip(values, 1e-6, 1.0))
        steps = np.eye(values.shape[1]) if 2 < values.shape[1] <= MOST_CLASSES else np.zeros((0, values.shape[1]))
        found = [logits * WIDER, logits / WIDER, *(logits + APART * logits.std() * step for step in steps)]
        powers = [np.exp(moved - moved.max(axis=1, keepdims=True)) for moved in found]
        return [power / power.sum(axis=1, keepdims=True) for power in powers]
    if kind in ("binary", "multilabel"):
        clipped = np.clip(values, 1e-6, 1 - 1e-6)
        return [1 / (1 + np.exp(-moved)) for moved in _shifted(np.log(clipped / (1 - clipped)), 0.0)]
    return _shifted(values, values.mean(axis=0))


def _shifted(values: Floats, centre: Floats | float) -> list[Floats]:
    step = APART * values.std(axis=0)
    return [values + step, values - step, centre + (values - centre) * WIDER, centre + (values - centre) / WIDER]


def mean_over_all(
    seen: Floats, places: NDArray[np.int64], num_rows: int, known: Floats | None
) -> tuple[float, float, int]:
    """Return the mean over all N rows of what `seen` (n,) shows of some, its standard error and degrees of freedom.

    `places` (n,): which rows they are, a random sample; `known` (N, F): covariates, or None. With too few rows for the
    columns the mean of those seen is taken. The error is that of a sample without replacement; rows differ in how
    far they stray, and those that draw the regression to themselves look nearer than they are: residuals are enlarged
    by their leverage (HC3 of MacKinnon and White 1985).
    """
    columns = np.ones((num_rows, 1))
    if known is not None:
        centre, spread = known.mean(axis=0), known.std(axis=0)
        moves = spread > 1e-9 * (1 + np.abs(centre))
        if len(seen) >= ROWS_PER_COLUMN * (1 + int(moves.sum())):
            standard = (known[:, moves] - centre[moves]) / spread[moves]
            columns = np.concatenate([columns, np.clip(standard, -EXTREME, EXTREME)], axis=1)
    own = columns[places]
    left, sizes, right = np.linalg.svd(own, full_matrices=False)
    kept = sizes > 1e-3 * sizes[0]  # columns may say the same, or nothing of the rows seen
    left, sizes, right = left[:, kept], sizes[kept], right[kept]
    weights = left @ (right @ columns.mean(axis=0) / sizes)  # of the rows seen in the mean over all
    leverage = np.minimum((left**2).sum(axis=1), LEVERAGE)
    squares = ((seen - left @ (left.T @ seen)) / (1 - leverage)) ** 2
    unseen = num_rows - len(seen)
    variance = float(((weights - 1 / num_rows) ** 2) @ squares) + unseen / num_rows**2 * float(squares.mean())
    return float(weights @ seen), math.sqrt(variance), len(seen) - int(kept.sum())
