"""METRICS on numpy, in float64, each with the task kinds it fits and the direction that is better.

Shapes: N rows, K target columns, C classes. `targets` (N, K) numbers; for kind multiclass (N, 1) class
indices. `preds` in the user's space: regression and ordinal (N, K) values, binary and multilabel (N, K)
probabilities, multiclass (N, C) probabilities. Call `evaluate`, which checks all of that; the functions
below it trust it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.catalog import Row, pick

__all__ = ["METRICS", "Metric", "evaluate", "evaluate_known", "is_better", "row_losses"]

Floats: TypeAlias = NDArray[np.float64]
CLIP = 1e-15  # Kaggle's and scikit-learn's classic epsilon of log loss for float64


@dataclass(frozen=True)
class Metric(Row):
    """A row of METRICS: `make(targets, preds) -> float`."""

    higher_is_better: bool = False
    """Direction of improvement."""
    kinds: tuple[str, ...] = ()
    """Kinds of task it fits."""
    losses: Callable[[Floats, Floats], Floats] | None = None
    """Loss of each row (N,), never below 0, of whose mean the metric is `of_mean`; None = it is no such mean."""
    of_mean: Callable[[float], float] = float
    """Mean loss -> the metric; monotone."""
    counts: bool = False
    """Every loss is 0 or 1, so that their sums are exact."""
    labels: bool = False
    """It scores labels or grades: of a probability or a value only what it is rounded to counts."""


def _squares(targets: Floats, preds: Floats) -> Floats:
    return np.asarray(((targets - preds) ** 2).mean(axis=1))


def _distances(targets: Floats, preds: Floats) -> Floats:
    return np.asarray(np.abs(targets - preds).mean(axis=1))


# --- numbers ------------------------------------------------------------------------------------------------


def rmse(targets: Floats, preds: Floats) -> float:
    """Return the root mean squared error over all N x K cells."""
    return float(np.sqrt(np.mean((targets - preds) ** 2)))


def mcrmse(targets: Floats, preds: Floats) -> float:
    """Return the mean over columns of each column's RMSE."""
    return float(np.mean(np.sqrt(np.mean((targets - preds) ** 2, axis=0))))


def mae(targets: Floats, preds: Floats) -> float:
    """Return the mean absolute error over all N x K cells."""
    return float(np.mean(np.abs(targets - preds)))


def r2(targets: Floats, preds: Floats) -> float:
    """Return the coefficient of determination, averaged over columns.

    A constant target column counts 1 when predicted exactly and 0 otherwise, as in scikit-learn.
    """
    error = np.sum((targets - preds) ** 2, axis=0)
    spread = np.sum((targets - targets.mean(axis=0)) ** 2, axis=0)
    constant = np.ptp(targets, axis=0) == 0
    share = error / np.where(constant, 1.0, spread)
    return float(np.mean(np.where(constant, error == 0, 1.0 - share)))


def _correlation(x: Floats, y: Floats) -> float:
    """Return Pearson's r of two (N,) vectors; 0.0 when one of them is constant, where r is undefined."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    x, y = x / np.abs(x).max(), y / np.abs(y).max()  # squares of tiny numbers would underflow
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def _ranks(x: Floats) -> Floats:
    """Return the ranks 1..N of an (N,) vector, ties sharing their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2.0)[inverse]
    return ranks


def pearson(targets: Floats, preds: Floats) -> float:
    """Return Pearson's r, averaged over columns; a constant column counts 0.0."""
    return float(np.mean([_correlation(t, p) for t, p in zip(targets.T, preds.T, strict=True)]))


def spearman(targets: Floats, preds: Floats) -> float:
    """Return Spearman's rank correlation, averaged over columns; a constant column counts 0.0."""
    pairs = zip(targets.T, preds.T, strict=True)
    return float(np.mean([_correlation(_ranks(t), _ranks(p)) for t, p in pairs]))


# --- labels -------------------------------------------------------------------------------------------------


def _labels(targets: Floats, preds: Floats, metric: str) -> tuple[Floats, Floats]:
    """Return targets and predictions as whole numbers, both (N, K).

    Multiclass: the likeliest class. Else rounded, halves up: a probability from 0.5 on is a 1, a value of
    2.5 is grade 3. Not clipped to the grades of this fold, which are not known at inference.
    """
    if np.any(targets != np.round(targets)):
        odd = targets[targets != np.round(targets)][0]
        raise ValueError(
            f"{metric} needs targets that are labels (0/1, classes or whole grades), got {odd:g}; "
            "for soft labels use log_loss"
        )
    if preds.shape[1] != targets.shape[1]:
        return targets, preds.argmax(axis=1)[:, None].astype(np.float64)
    return targets, np.floor(preds + 0.5)


def accuracy(targets: Floats, preds: Floats) -> float:
    """Return the share of right rows; a multilabel row needs every column right, as in scikit-learn."""
    truth, guess = _labels(targets, preds, "accuracy")
    return float(np.mean(np.all(truth == guess, axis=1)))


def _misses(targets: Floats, preds: Floats) -> Floats:
    truth, guess = _labels(targets, preds, "accuracy")
    return 1.0 - np.all(truth == guess, axis=1)


def _f1(truth: NDArray[np.bool_], guess: NDArray[np.bool_]) -> float:
    hits, total = np.sum(truth & guess), np.sum(truth) + np.sum(guess)
    return float(2.0 * hits / total) if total else 0.0


def f1_macro(targets: Floats, preds: Floats) -> float:
    """Return the mean F1 over the classes that occur in targets or predictions (multilabel: over columns).

    Binary: the mean over class 0 and class 1. A multilabel column without a 1 on either side counts 0.0.
    All as in scikit-learn's `f1_score(average="macro", zero_division=0)`.
    """
    truth, guess = _labels(targets, preds, "f1_macro")
    if truth.shape[1] > 1:
        return float(np.mean([_f1(t == 1, g == 1) for t, g in zip(truth.T, guess.T, strict=True)]))
    return float(np.mean([_f1(truth == label, guess == label) for label in np.union1d(truth, guess)]))


def f1(targets: Floats, preds: Floats) -> float:
    """Return the F1 of class 1, of all cells together: binary F1, and micro F1 of multilabel columns.

    0.0 without a 1 on either side, as in scikit-learn (zero_division=0).
    """
    truth, guess = _labels(targets, preds, "f1")
    return _f1(truth == 1, guess == 1)


def qwk(targets: Floats, preds: Floats) -> float:
    """Return Cohen's kappa with quadratic weights, over grades as numbers: a missing grade keeps its gap.

    1 - mean (t_i - p_i)^2 / mean over all pairs (t_i - p_j)^2. Everything one and the same grade: 1.0.
    """
    truth, guess = _labels(targets, preds, "qwk")
    by_chance = truth.var() + guess.var() + (truth.mean() - guess.mean()) ** 2
    disagreement = np.mean((truth - guess) ** 2)
    return float(1.0 - disagreement / by_chance) if disagreement > 0 else 1.0


# --- probabilities ------------------------------------------------------------------------------------------


def _check_probabilities(preds: Floats, metric: str) -> None:
    if preds.min() < 0 or preds.max() > 1:
        raise ValueError(
            f"{metric} needs probabilities between 0 and 1, got {preds.min():g} to {preds.max():g}; "
            "apply a sigmoid or softmax first"
        )


def log_loss(targets: Floats, preds: Floats) -> float:
    """Return the mean negative log likelihood; probabilities clipped to [1e-15, 1 - 1e-15].

    Binary and multilabel: mean over all cells (so over columns), soft targets allowed. Multiclass: rows are
    scaled to sum 1 first; a class missing in the fold changes nothing.
    """
    return float(-np.mean(_log_likelihoods(targets, preds)))


def _log_likelihoods(targets: Floats, preds: Floats) -> Floats:
    """Return the log likelihood of each cell, (N, K)."""
    _check_probabilities(preds, "log_loss")
    if preds.shape[1] != targets.shape[1]:
        likely = preds / np.maximum(preds.sum(axis=1, keepdims=True), CLIP)
        likely = np.take_along_axis(likely, targets.astype(np.int64), axis=1)
        return np.asarray(np.log(np.clip(likely, CLIP, 1 - CLIP)))
    if targets.min() < 0 or targets.max() > 1:
        raise ValueError(f"log_loss needs targets between 0 and 1, got {targets.min():g} to {targets.max():g}")
    likely = np.clip(preds, CLIP, 1 - CLIP)
    return np.asarray(targets * np.log(likely) + (1 - targets) * np.log1p(-likely))


def _surprises(targets: Floats, preds: Floats) -> Floats:
    return np.asarray(-_log_likelihoods(targets, preds).mean(axis=1))


def _auc(positive: NDArray[np.bool_], scores: Floats) -> float:
    """Return the area under the ROC curve by rank sums (Mann-Whitney), ties counting half."""
    ones = int(positive.sum())
    above = _ranks(scores)[positive].sum() - ones * (ones + 1) / 2.0
    return float(above / (ones * (len(positive) - ones)))


def roc_auc(targets: Floats, preds: Floats) -> float:
    """Return the area under the ROC curve; multiclass one-vs-rest, multilabel by column, both macro-averaged.

    A class or column that is all 0 or all 1 in this fold has no curve and is left out of the mean. Raises
    ValueError when none is left.
    """
    if preds.shape[1] != targets.shape[1]:
        truth = targets == np.arange(preds.shape[1])
    else:
        if not np.isin(targets, (0.0, 1.0)).all():
            odd = targets[~np.isin(targets, (0.0, 1.0))][0]
            raise ValueError(f"roc_auc needs targets of 0 and 1, got {odd:g}; for soft labels use log_loss")
        truth = targets == 1
    both = [k for k in range(truth.shape[1]) if 0 < truth[:, k].sum() < len(truth)]
    if not both:
        raise ValueError(
            f"roc_auc is not defined: the {len(truth)} targets hold a single class; "
            "score more rows, or use a stratified splitter"
        )
    return float(np.mean([_auc(truth[:, k], preds[:, k]) for k in both]))


# --- the catalogue ------------------------------------------------------------------------------------------

NUMBERS = ("regression", "ordinal", "binary", "multilabel")  # targets between 0 and 1 are numbers too
CLASSES = ("binary", "multiclass", "multilabel", "ordinal")
PROBABILITIES = ("binary", "multiclass", "multilabel")

METRICS: dict[str, Metric] = {
    "rmse": Metric(rmse, "root mean squared error over all cells", "scikit-learn", False, NUMBERS, _squares, math.sqrt),
    "mae": Metric(mae, "mean absolute error over all cells", "scikit-learn", False, NUMBERS, _distances),
    "r2": Metric(r2, "coefficient of determination, mean over columns", "scikit-learn", True, NUMBERS),
    "pearson": Metric(pearson, "linear correlation, mean over columns", "SciPy", True, NUMBERS),
    "spearman": Metric(spearman, "rank correlation, mean over columns", "SciPy", True, NUMBERS),
    "mcrmse": Metric(mcrmse, "mean over columns of each column's RMSE", "Kaggle", False, ("regression", "multilabel")),
    "accuracy": Metric(
        accuracy,
        "share of rows that are all right",
        "scikit-learn",
        True,
        CLASSES,
        losses=_misses,
        of_mean=lambda mean: 1.0 - mean,
        counts=True,
        labels=True,
    ),
    "f1": Metric(f1, "F1 of class 1 (multilabel: micro)", "scikit-learn", True, ("binary", "multilabel"), labels=True),
    "f1_macro": Metric(
        f1_macro, "mean F1 over classes (multilabel: columns)", "scikit-learn", True, CLASSES, labels=True
    ),
    "log_loss": Metric(log_loss, "mean negative log likelihood", "scikit-learn", False, PROBABILITIES, _surprises),
    "roc_auc": Metric(roc_auc, "area under the ROC curve, macro (one-vs-rest)", "scikit-learn", True, PROBABILITIES),
    "qwk": Metric(
        qwk, "quadratic weighted kappa of grades", "Cohen 1968", True, ("ordinal", "multiclass"), labels=True
    ),
}


def soft_log_loss(targets: Floats, preds: Floats) -> float:
    """Return the mean cross-entropy of rows of probabilities (N, C) against rows of probabilities (N, C)."""
    return float(np.mean(_soft_surprises(targets, preds)))


def _soft_surprises(targets: Floats, preds: Floats) -> Floats:
    _check_probabilities(preds, "log_loss")
    likely = preds / np.maximum(preds.sum(axis=1, keepdims=True), CLIP)
    return np.asarray(-(targets * np.log(np.clip(likely, CLIP, 1 - CLIP))).sum(axis=1))


def evaluate(name: str, targets: NDArray[np.floating], preds: NDArray[np.floating], kind: str | None = None) -> float:
    """Return metric `name` of `preds` (N, K or C) against `targets` (N, K), computed in float64.

    `kind` matters for multiclass alone, whose targets may be probabilities (N, C): log_loss is then their
    cross-entropy, every other metric takes the likeliest class as the truth.

    Raises ValueError on an unknown name, on shapes that do not fit, on no rows, and on NaN or infinite
    values.
    """
    row, truth, found = _checked(name, targets, preds, kind)
    return row.make(truth, found)


def row_losses(
    name: str, targets: NDArray[np.floating], preds: NDArray[np.floating], kind: str | None = None
) -> Floats:
    """Return the loss of each row (N,), of whose mean metric `name` is `METRICS[name].of_mean`, but for rounding.

    Raises ValueError where `evaluate` does, and for a metric that is no function of a mean over rows.
    """
    row, truth, found = _checked(name, targets, preds, kind)
    if row.losses is None:
        fitting = ", ".join(key for key, one in METRICS.items() if one.losses is not None)
        raise ValueError(f"{name} is no mean over rows; those that are: {fitting}")
    return row.losses(truth, found)


def _checked(
    name: str, truth: NDArray[np.floating], found: NDArray[np.floating], kind: str | None
) -> tuple[Metric, Floats, Floats]:
    """Return the metric, and targets and predictions in float64, as its functions want them."""
    row = pick(METRICS, name, "metric")
    targets: Floats = np.asarray(truth, dtype=np.float64)
    preds: Floats = np.asarray(found, dtype=np.float64)
    if targets.ndim != 2 or preds.ndim != 2 or len(targets) != len(preds):
        raise ValueError(
            f"{name}: targets and predictions must be tables of the same number of rows (N, K), "
            f"got {targets.shape} and {preds.shape}"
        )
    if not targets.size or not preds.size:
        raise ValueError(f"{name}: there is nothing to score, got {targets.shape} and {preds.shape}")
    for what, values in (("targets", targets), ("predictions", preds)):
        bad = int(np.sum(~np.isfinite(values)))
        if bad:
            raise ValueError(f"{name}: {bad} of {values.size} {what} are NaN or infinite")
    num_classes = preds.shape[1]
    if kind == "multiclass" and targets.shape[1] == num_classes > 1:
        if name == "log_loss":
            return replace(row, make=soft_log_loss, losses=_soft_surprises), targets, preds
        targets = targets.argmax(axis=1)[:, None].astype(np.float64)
    if targets.shape[1] != num_classes:
        if targets.shape[1] != 1 or "multiclass" not in row.kinds:
            raise ValueError(
                f"{name}: predictions have {num_classes} columns where the targets have {targets.shape[1]}"
            )
        if np.any(targets != np.floor(targets)) or targets.min() < 0 or targets.max() >= num_classes:
            raise ValueError(
                f"{name}: targets must be class indices 0..{num_classes - 1} for {num_classes} columns of "
                f"predictions, got {targets.min():g} to {targets.max():g}"
            )
    return row, targets, preds


def evaluate_known(
    name: str, targets: NDArray[np.floating], preds: NDArray[np.floating], kind: str | None = None
) -> float | None:
    """Return `evaluate` over the rows without a missing target (NaN); None where it is not defined on them."""
    known = np.isfinite(targets).all(axis=1)
    try:
        return evaluate(name, targets[known], preds[known], kind)
    except ValueError:
        return None


def is_better(name: str, a: float, b: float | None) -> bool:
    """Return whether score `a` is strictly better than `b` under metric `name`; any number beats None."""
    higher = pick(METRICS, name, "metric").higher_is_better
    if b is None:
        return a == a
    return a > b if higher else a < b
