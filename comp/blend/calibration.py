"""CALIBRATORS: from blended predictions (N, K) to better ones of the same kind, fitted to rows with a target.

A calibrator gives parameters that JSON can hold. Like weights, thresholds flatter the rows they were chosen on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.blend.ensemble import PROBABILITIES, Parameters, Problem
from comp.catalog import Row, pick

__all__ = ["CALIBRATORS", "apply_calibration", "fit_calibration"]

Floats: TypeAlias = NDArray[np.float64]
ROUNDS = 4  # of the search of thresholds; most metrics need one, and a second that moves nothing


def none(problem: Problem, values: Floats) -> Parameters:
    """Fit nothing."""
    return {}


def as_they_are(parameters: Parameters, values: Floats) -> Floats:
    return values


def grade_thresholds(problem: Problem, values: Floats) -> Parameters:
    """Search the borders between grades that score best, from halves on (the "optimised rounder")."""
    from scipy.optimize import minimize

    lowest, highest = int(problem.targets.min()), int(problem.targets.max())
    start = np.arange(lowest, highest) + 0.5

    def loss(borders: Floats) -> float:
        return problem.loss(to_grades({"lowest": lowest, "borders": np.sort(borders).tolist()}, values))

    if not len(start):
        return {"lowest": lowest, "borders": []}
    first = np.vstack([start, start + 0.3 * np.eye(len(start)), start - 0.3 * np.eye(len(start))])[: len(start) + 1]
    found = minimize(
        loss, start, method="Nelder-Mead", options={"initial_simplex": first, "xatol": 1e-3, "fatol": 1e-7}
    )
    best = min((start, np.sort(found.x)), key=loss)
    return {"lowest": lowest, "borders": [float(border) for border in best]}


def to_grades(parameters: Parameters, values: Floats) -> Floats:
    found: Floats = parameters["lowest"] + np.searchsorted(parameters["borders"], values, side="right").astype(float)
    return found


def best_thresholds(problem: Problem, values: Floats) -> Parameters:
    """Search each column's threshold that scores best beside those of the others, among midpoints of its predictions.

    The columns take turns until none moves, since a metric may tie them together: a row is right when all are.
    """
    bent, chosen = values.copy(), [0.5] * values.shape[1]
    for _ in range(ROUNDS if len(chosen) > 1 else 1):
        before = list(chosen)
        for place, column in enumerate(values.T):
            losses = {}
            for border in (chosen[place], 0.5, *_middles(column)):
                bent[:, place] = around_half({"thresholds": border}, column)
                losses[border] = problem.loss(bent)
            chosen[place] = min(losses, key=losses.__getitem__)  # of equals the first
            bent[:, place] = around_half({"thresholds": chosen[place]}, column)
        if chosen == before:
            break
    return {"thresholds": chosen}


def _middles(column: Floats) -> list[float]:
    """Return what lies midway between neighbours of 200 quantiles of (N,) predictions, inside 0..1."""
    distinct = np.unique(np.quantile(column, np.linspace(0, 1, 201)))
    return [float(border) for border in (distinct[1:] + distinct[:-1]) / 2 if 0 < border < 1]


def around_half(parameters: Parameters, values: Floats) -> Floats:
    """Return probabilities bent so that each column's threshold becomes 0.5, their order unchanged."""
    border = np.asarray(parameters["thresholds"])
    return np.where(values < border, 0.5 * values / border, 0.5 + 0.5 * (values - border) / (1 - border))


def isotonic(problem: Problem, values: Floats) -> Parameters:
    """Fit a rising step function per column by least squares."""
    from sklearn.isotonic import IsotonicRegression

    columns = []
    for place in range(values.shape[1]):
        model = IsotonicRegression(out_of_bounds="clip").fit(values[:, place], problem.truth[:, place])
        columns.append({"x": model.X_thresholds_.tolist(), "y": model.y_thresholds_.tolist()})
    return {"columns": columns, "sums_to_one": problem.kind == "multiclass"}


def along_steps(parameters: Parameters, values: Floats) -> Floats:
    found = np.stack(
        [np.interp(values[:, k], own["x"], own["y"]) for k, own in enumerate(parameters["columns"])], axis=1
    )
    if not parameters["sums_to_one"]:
        return found
    found = np.clip(found, 1e-6, None)  # a class that no row of its level had is rare, not impossible
    return found / found.sum(axis=1, keepdims=True)


def temperature(problem: Problem, values: Floats) -> Parameters:
    """Fit the number that log probabilities are divided by, to the log loss (Guo et al. 2017, arXiv:1706.04599)."""
    from scipy.optimize import minimize_scalar

    several = problem.kind == "multiclass"

    def loss(log_t: float) -> float:
        cooled = np.clip(cool({"temperature": float(np.exp(log_t)), "several": several}, values), 1e-15, 1 - 1e-15)
        truth = problem.truth
        each = truth * np.log(cooled) + (0 if several else (1 - truth) * np.log1p(-cooled))
        return float(-each.sum())

    found = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")
    return {"temperature": float(np.exp(found.x)), "several": several}


def cool(parameters: Parameters, values: Floats) -> Floats:
    values = np.clip(values, 1e-15, 1 - 1e-15)
    if not parameters["several"]:
        found: Floats = 1 / (1 + np.exp(-(np.log(values) - np.log1p(-values)) / parameters["temperature"]))
        return found
    logits = np.log(values) / parameters["temperature"]
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Calibrator(Row):
    """A row of CALIBRATORS: `make(problem, values (N, K)) -> parameters`."""

    apply: Callable[[Parameters, Floats], Floats] = as_they_are
    kinds: tuple[str, ...] = ("regression", "ordinal", *PROBABILITIES)


CALIBRATORS: dict[str, Calibrator] = {
    "none": Calibrator(none, "predictions as they are", "common practice"),
    "grade_thresholds": Calibrator(
        grade_thresholds, "borders between grades that score best, for qwk", "Kaggle, PetFinder 2019", to_grades,
        ("ordinal",),
    ),
    "thresholds": Calibrator(
        best_thresholds, "each column's threshold that scores best, for f1", "common practice", around_half,
        ("binary", "multilabel"),
    ),
    "isotonic": Calibrator(
        isotonic, "a rising step function per column", "Zadrozny & Elkan 2002; scikit-learn", along_steps,
    ),
    "temperature": Calibrator(
        temperature, "one temperature for all probabilities", "Guo et al. 2017, arXiv:1706.04599", cool, PROBABILITIES,
    ),
}  # fmt: skip


def fit_calibration(name: str, problem: Problem, values: Floats) -> Parameters:
    """Fit a calibrator of the catalogue to blended values (N, K); return its parameters, which JSON can hold.

    Raises ValueError when there is none of this name, or it does not fit the kind of task.
    """
    row = pick(CALIBRATORS, name, "calibration")
    if problem.kind not in row.kinds:
        raise ValueError(f"calibration '{name}' does not fit kind '{problem.kind}'; it fits {', '.join(row.kinds)}")
    found: Parameters = row.make(problem, values)
    return found


def apply_calibration(name: str, parameters: Parameters, values: Floats) -> Floats:
    """Return (N, K) calibrated values."""
    found: Floats = pick(CALIBRATORS, name, "calibration").apply(parameters, values)
    return found
