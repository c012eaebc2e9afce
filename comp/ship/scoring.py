"""Scores a submission against a file of true targets, as Kaggle does: by id, and for each `Usage` apart.

N rows, K target columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.catalog import pick
from comp.data.frames import listed, parse_numbers
from comp.metrics import METRICS, evaluate
from comp.ship.submission import check_same_ids, numbers_of, read_submission

__all__ = ["score_submission"]

Floats: TypeAlias = NDArray[np.float64]
TEXT_METRICS = ("accuracy", "f1_macro")  # can compare labels that are text
USAGE = "Usage"  # Kaggle's solution files say here which rows are Public, Private or Ignored


def score_submission(
    submission_path: Path, truth_path: Path, metric: str, id_column: str | None = None
) -> dict[str, float]:
    """Return {"total": score} of a submission against the truth, and a score per value of `Usage`.

    Rows are matched by id (None = the submission's first column) and must be the same on both sides, but
    for those whose Usage is Ignored. The submission's columns are looked up in the truth; other columns
    there are left alone. Multiclass: labels against labels (accuracy, f1_macro), or one probability column
    per label against one column of labels or against one-hot columns. Raises ValueError on files that do
    not fit.
    """
    pick(METRICS, metric, "metric")
    guess = read_submission(submission_path, id_column)
    key = id_column if id_column is not None else str(guess.columns[0])
    truth = read_submission(truth_path, key)
    by_usage = USAGE in truth.columns and USAGE not in guess.columns
    if by_usage:
        ignored = truth[USAGE] == "Ignored"
        guess = guess[~guess[key].isin(list(truth[key][ignored]))]
        truth = truth[~ignored]
    check_same_ids(list(guess[key]), list(truth[key]), str(submission_path), str(truth_path))
    guess = guess.set_index(key).loc[list(truth[key])]
    usage = truth[USAGE].to_numpy(dtype=object) if by_usage else None
    targets, preds = _scored(truth.drop(columns=[key, *([USAGE] if by_usage else [])]), guess, metric)
    scores = {"total": evaluate(metric, targets, preds)}
    for part in sorted(set(usage)) if usage is not None else ():
        rows = usage == part
        try:
            scores[str(part)] = evaluate(metric, targets[rows], preds[rows])
        except ValueError as fault:
            raise ValueError(f"rows whose {USAGE} is '{part}': {fault}") from None
    return scores


def _scored(truth: pd.DataFrame, guess: pd.DataFrame, metric: str) -> tuple[Floats, Floats]:
    """Return targets and predictions as `evaluate` wants them, from text tables whose rows already match."""
    columns = [str(name) for name in guess.columns]
    for_classes = "multiclass" in METRICS[metric].kinds
    if not columns:
        raise ValueError("the submission has no column besides its ids")
    if strange := [name for name in columns if name not in truth.columns]:
        labelled = [name for name in truth.columns if set(truth[name]) <= set(columns)]
        if for_classes and len(strange) == len(columns) > 1 and len(labelled) == 1:
            index = [[columns.index(label)] for label in truth[labelled[0]]]
            return np.asarray(index, dtype=np.float64), _table(guess, columns, "the submission")
        raise ValueError(
            f"the submission's columns {listed(strange, 5)} are not in the truth, which has {listed(truth.columns, 5)}"
        )
    if len(columns) == 1 and metric in TEXT_METRICS and not _numeric(truth, guess, columns[0]):
        return _label_indices(truth[columns[0]], guess[columns[0]], columns[0])
    targets, preds = _table(truth, columns, "the truth"), _table(guess, columns, "the submission")
    if for_classes and len(columns) > 1 and _one_hot(targets) and _sums_to_one(preds):
        return targets.argmax(axis=1)[:, None].astype(np.float64), preds
    return targets, preds


def _table(frame: pd.DataFrame, columns: Sequence[str], what: str) -> Floats:
    return np.stack([numbers_of(frame, name, what) for name in columns], axis=1)


def _numeric(truth: pd.DataFrame, guess: pd.DataFrame, column: str) -> bool:
    return all(bool(np.isfinite(parse_numbers(frame[column])[0]).all()) for frame in (truth, guess))


def _label_indices(truth: pd.Series, guess: pd.Series, column: str) -> tuple[Floats, Floats]:
    """Return both columns of labels as indices (N, 1) into their common sorted labels."""
    for what, cells in (("the truth", truth), ("the submission", guess)):
        if empty := sum(not str(cell).strip() for cell in cells):
            raise ValueError(f"{what}: column '{column}' has {empty} empty labels")
    if not set(truth) & set(guess):
        raise ValueError(
            f"column '{column}': none of the submission's labels {listed(guess, 5)} occurs in the "
            f"truth, which has {listed(truth, 5)}"
        )
    index = {label: float(number) for number, label in enumerate(sorted({*truth, *guess}))}
    targets, preds = (np.asarray([[index[cell]] for cell in cells]) for cells in (truth, guess))
    return targets, preds


def _one_hot(targets: Floats) -> bool:
    return bool(np.isin(targets, (0.0, 1.0)).all() and (targets.sum(axis=1) == 1).all())


def _sums_to_one(preds: Floats) -> bool:
    return bool(preds.min() >= 0 and np.abs(preds.sum(axis=1) - 1).max() < 1e-3)
