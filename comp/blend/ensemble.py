"""BLENDERS: from the predictions of several runs to one. R runs, N rows, K outputs (C classes of a multiclass task).

A blender is fitted to a Problem and gives parameters that JSON can hold; applied, they turn predictions (R, N, K) of
any rows into (N, K). What is fitted to the rows that it is then scored on flatters itself: see crossfit.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.catalog import Row, pick
from comp.metrics import METRICS, evaluate

__all__ = ["BLENDERS", "Blender", "Problem", "apply_blend", "fit_blend", "fit_predict", "one_hot"]

Floats: TypeAlias = NDArray[np.float64]
Parameters: TypeAlias = dict[str, Any]
PROBABILITIES = ("binary", "multilabel", "multiclass")
RANK_METRICS = ("roc_auc", "spearman")
TIE = 1e-12  # losses closer than this are the same


@dataclass(frozen=True)
class Problem:
    """What a blend is fitted to."""

    preds: Floats
    """(R, N, K) in the user's space: values, or probabilities."""
    targets: Floats
    """(N, K), or (N, 1) class indices."""
    kind: str
    """Kind of the task."""
    metric: str

    def score(self, blended: Floats) -> float:
        """Return the metric of (N, K) predictions."""
        return evaluate(self.metric, self.targets, blended, self.kind)

    def loss(self, blended: Floats) -> float:
        """Return what is minimised: the metric, its sign turned where higher is better."""
        score = self.score(blended)
        return -score if METRICS[self.metric].higher_is_better else score

    def rows(self, chosen: NDArray[Any]) -> Problem:
        """Return the problem on some rows, a mask or numbers."""
        return replace(self, preds=self.preds[:, chosen], targets=self.targets[chosen])

    def runs(self, chosen: list[int]) -> Problem:
        """Return the problem on some runs."""
        return replace(self, preds=self.preds[chosen])

    def column(self, place: int) -> Problem:
        """Return the problem of one output column alone: of a mean F1 over columns, the F1 of this one."""
        one = slice(place, place + 1)
        metric = "f1" if (self.kind, self.metric) == ("multilabel", "f1_macro") else self.metric
        return replace(self, preds=self.preds[:, :, one], targets=self.targets[:, one], metric=metric)

    @property
    def truth(self) -> Floats:
        """Targets as (N, K) numbers: class indices as one-hot rows."""
        return one_hot(self.targets, self.preds.shape[2], self.kind)


def one_hot(targets: Floats, num_outputs: int, kind: str) -> Floats:
    """Return targets as (N, K): class indices (N, 1) of a multiclass task as one-hot rows, others as they are."""
    if kind == "multiclass" and targets.shape[1] != num_outputs:
        found: Floats = (targets == np.arange(num_outputs)).astype(np.float64)
        return found
    return targets


def tidy(values: Floats, kind: str) -> Floats:
    """Return values that the kind allows: probabilities in 0..1, of multiclass rows that sum to 1."""
    if kind not in PROBABILITIES:
        return values
    values = np.clip(values, 0.0, 1.0)
    if kind == "multiclass":
        total = values.sum(axis=1, keepdims=True)
        values = np.divide(values, total, out=np.full_like(values, 1 / values.shape[1]), where=total > 0)
    return values


# --- means -----------------------------------------------------------------------------------------------------------


def weigh(parameters: Parameters, problem: Problem, preds: Floats) -> Floats:
    """Return the weighted sum of the runs. `weights` (R, K); `intercept` (K,), 0 where there is none."""
    weights = np.asarray(parameters["weights"], np.float64)
    found: Floats = np.einsum("rnk,rk->nk", preds, weights) + np.asarray(parameters.get("intercept", 0.0))
    return tidy(found, problem.kind)


def _same(problem: Problem, weights: Floats) -> Parameters:
    """Return weights (R,) as those of every column."""
    return {"weights": np.repeat(weights[:, None], problem.preds.shape[2], axis=1).tolist()}


def mean(problem: Problem) -> Parameters:
    """Fit nothing: every run weighs the same."""
    runs = len(problem.preds)
    return _same(problem, np.full(runs, 1 / runs))


def no_parameters(problem: Problem) -> Parameters:
    return {}


def mean_of_ranks(parameters: Parameters, problem: Problem, preds: Floats) -> Floats:
    """Return the mean over runs of each column's ranks among the rows that are predicted, 0 to 1, ties shared."""
    from scipy.stats import rankdata

    found: Floats = (rankdata(preds, axis=1) / preds.shape[1]).mean(axis=0)
    return found


def geometric_mean_of_probabilities(parameters: Parameters, problem: Problem, preds: Floats) -> Floats:
    """Return exp(mean log p), scaled so that p and 1 - p, or the classes, sum to 1 again."""
    preds = np.clip(preds, 1e-15, 1 - 1e-15)
    found: Floats = np.exp(np.log(preds).mean(axis=0))
    if problem.kind == "multiclass":
        return found / found.sum(axis=1, keepdims=True)
    return found / (found + np.exp(np.log1p(-preds).mean(axis=0)))


# --- fitted weights --------------------------------------------------------------------------------------------------


def hill_climb(problem: Problem, *, most: int = 100) -> Parameters:
    """Add one run after another, again and again the same if it helps, each time the one that scores best.

    `most` additions are made, and the best prefix is kept. Of runs that score the same, one that is in already wins.
    """
    runs = len(problem.preds)
    counts, total = np.zeros(runs, np.int64), np.zeros(problem.preds.shape[1:])
    path: list[tuple[float, Floats]] = []
    for added in range(1, most + 1):
        losses = np.array([problem.loss(tidy((total + one) / added, problem.kind)) for one in problem.preds])
        tied = np.flatnonzero(losses <= losses.min() + TIE)
        chosen = max(tied, key=lambda run: (counts[run], -run))
        counts[chosen] += 1
        total = total + problem.preds[chosen]
        path.append((float(losses[chosen]), counts / added))
    best = min(path, key=lambda step: step[0])[0]
    return _same(problem, next(weights for loss, weights in path if loss <= best + TIE))


def nelder_mead(problem: Problem, *, simplex: bool = True, per_column: bool = False) -> Parameters:
    """Search weights without derivatives, from equal ones and from the best run; for any metric.

    `simplex`: weights >= 0 that sum to 1; else free. `per_column`: for each output on its own.
    """
    return _search(problem, _nelder_mead, simplex=simplex, per_column=per_column)


def slsqp(problem: Problem, *, simplex: bool = True, per_column: bool = False) -> Parameters:
    """Search weights by slopes, from equal ones and from the best run; for smooth metrics (rmse, log_loss, ...).

    `simplex`: weights >= 0 that sum to 1; else free. `per_column`: for each output on its own.
    """
    return _search(problem, _slsqp, simplex=simplex, per_column=per_column)


Search: TypeAlias = Callable[[Callable[[Floats], float], Floats, bool], Floats]


def _search(problem: Problem, search: Search, *, simplex: bool, per_column: bool) -> Parameters:
    outputs = problem.preds.shape[2]
    if not per_column:
        return _same(problem, _best_weights(problem, search, simplex))
    if problem.kind == "multiclass":
        raise ValueError("per_column: the probabilities of a multiclass task belong together; leave it out")
    columns = [_best_weights(problem.column(place), search, simplex) for place in range(outputs)]
    return {"weights": np.stack(columns, axis=1).tolist()}


def _best_weights(problem: Problem, search: Search, simplex: bool) -> Floats:
    """Return the best weights (R,) of a search from equal ones and from the best run; never worse than either."""
    runs = len(problem.preds)

    def loss(weights: Floats) -> float:
        return problem.loss(tidy(np.einsum("rnk,r->nk", problem.preds, weights), problem.kind))

    corners = np.eye(runs)
    starts = [np.full(runs, 1 / runs), min(corners, key=loss)]
    found = [search(loss, start, simplex) for start in starts]
    return min([*starts, *found], key=loss)


def _onto_simplex(weights: Floats) -> Floats:
    size = np.abs(weights).sum()
    return np.abs(weights) / size if size > 0 else np.full(len(weights), 1 / len(weights))


def _nelder_mead(loss: Callable[[Floats], float], start: Floats, simplex: bool) -> Floats:
    from scipy.optimize import minimize

    shape = _onto_simplex if simplex else np.asarray
    # A first simplex wide enough to leave flat steps of a metric such as accuracy.
    first = np.vstack([start, start + 0.25 * np.eye(len(start))])
    options = {"initial_simplex": first, "xatol": 1e-4, "fatol": 1e-9, "maxiter": 400 * len(start), "adaptive": True}
    found: Floats = shape(minimize(lambda x: loss(shape(x)), start, method="Nelder-Mead", options=options).x)
    return found


def _slsqp(loss: Callable[[Floats], float], start: Floats, simplex: bool) -> Floats:
    from scipy.optimize import minimize

    limits: dict[str, Any] = (
        {"bounds": [(0.0, 1.0)] * len(start), "constraints": {"type": "eq", "fun": lambda x: x.sum() - 1}}
        if simplex
        else {}
    )
    found: Floats = minimize(loss, start, method="SLSQP", options={"ftol": 1e-10, "maxiter": 500}, **limits).x
    return _onto_simplex(np.clip(found, 0, None)) if simplex else found


def ridge(problem: Problem) -> Parameters:
    """Fit each output by linear regression on the runs' same output; the penalty by scikit-learn's leave-one-out."""
    from sklearn.linear_model import RidgeCV

    columns = []
    for place in range(problem.preds.shape[2]):
        model = RidgeCV(alphas=np.logspace(-4, 4, 17))
        columns.append(model.fit(problem.preds[:, :, place].T, problem.truth[:, place]))
    weights = np.stack([model.coef_ for model in columns], axis=1)
    return {"weights": weights.tolist(), "intercept": [float(model.intercept_) for model in columns]}


def stack(problem: Problem, *, estimator: str = "sklearn.linear_model.Ridge", **options: Any) -> Parameters:
    """Check the estimator, any of scikit-learn by its dotted name; it is fitted when it is applied.

    It sees every output of every run, (N, R x K). A file can hold no estimator without pickle, so a blend keeps the
    rows it was fitted to, and fits again.
    """
    _estimator(estimator, options)
    return {"estimator": estimator, "options": options}


def predict_stack(parameters: Parameters, problem: Problem, preds: Floats) -> Floats:
    """Fit the estimator to the problem and predict."""

    def features(values: Floats) -> Floats:
        return values.transpose(1, 0, 2).reshape(values.shape[1], -1)

    def fresh() -> Any:
        return _estimator(parameters["estimator"], parameters["options"])

    return fit_predict(fresh, problem.kind, features(problem.preds), problem.truth, features(preds))


def fit_predict(fresh: Callable[[], Any], kind: str, seen: Any, truth: Floats, wanted: Any) -> Floats:
    """Fit scikit-learn estimators to features `seen` and targets `truth` (N, K), one-hot for classes; return (M, K) of
    the features `wanted`: classes by their probabilities, where the estimator gives any."""
    if kind not in PROBABILITIES or not hasattr(fresh(), "predict_proba"):
        columns = [fresh().fit(seen, column).predict(wanted) for column in truth.T]
        return tidy(np.stack(columns, axis=1), kind)
    if kind == "multiclass":
        found, labels = np.zeros((wanted.shape[0], truth.shape[1])), truth.argmax(axis=1)
        if len(set(labels)) < 2:
            found[:, labels[0]] = 1.0
            return found
        model = fresh().fit(seen, labels)
        found[:, model.classes_.astype(int)] = model.predict_proba(wanted)
        return found
    columns = []
    for column in truth.T:
        labels = (column >= 0.5).astype(int)
        model = fresh().fit(seen, labels) if len(set(labels)) > 1 else None
        columns.append(model.predict_proba(wanted)[:, 1] if model else np.full(wanted.shape[0], float(labels[0])))
    return np.stack(columns, axis=1)


def _estimator(path: str, options: Mapping[str, Any]) -> Any:
    """Build a scikit-learn estimator. Raises ValueError that says what is wrong with its name or options."""
    module, _, name = path.rpartition(".")
    if not module.startswith("sklearn"):
        raise ValueError(f"stack: estimator '{path}' must be a class of scikit-learn, like sklearn.linear_model.Ridge")
    try:
        built = getattr(import_module(module), name)(**options)
    except (ImportError, AttributeError, TypeError) as fault:
        raise ValueError(f"stack: estimator '{path}' with {dict(options)}: {fault}") from None
    if "random_state" in built.get_params() and "random_state" not in options:
        built.set_params(random_state=0)
    return built


# --- the catalogue ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blender(Row):
    """A row of BLENDERS: `make(problem, **options) -> parameters`."""

    apply: Callable[[Parameters, Problem, Floats], Floats] = weigh
    """(parameters, the problem they were fitted to, preds (R, N, K)) -> (N, K)."""
    fitted: bool = True
    """Whether targets decide anything; if not, the score on all rows is honest."""
    kinds: tuple[str, ...] = ("regression", "ordinal", *PROBABILITIES)
    metrics: tuple[str, ...] = tuple(METRICS)


CARUANA = "Caruana et al. 2004, ICML"

BLENDERS: dict[str, Blender] = {
    "mean": Blender(mean, "every run weighs the same", "common practice", fitted=False),
    "rank_mean": Blender(
        no_parameters, "mean of the ranks, for metrics of order", "common practice", mean_of_ranks, False,
        metrics=RANK_METRICS,
    ),
    "geometric_mean": Blender(
        no_parameters, "mean of log probabilities", "common practice", geometric_mean_of_probabilities, False,
        kinds=PROBABILITIES,
    ),
    "hill_climb": Blender(hill_climb, "greedy additions with replacement, best prefix", CARUANA),
    "nelder_mead": Blender(nelder_mead, "weights searched on the metric itself", "Nelder & Mead 1965; SciPy"),
    "slsqp": Blender(slsqp, "weights searched by slopes, for smooth metrics", "Kraft 1988; SciPy"),
    "ridge": Blender(ridge, "linear regression with a penalty, per output", "scikit-learn RidgeCV"),
    "stack": Blender(stack, "any scikit-learn estimator on all outputs", "Wolpert 1992", predict_stack),
}  # fmt: skip


def fit_blend(method: str, problem: Problem, options: Mapping[str, Any] | None = None) -> Parameters:
    """Fit a blender of the catalogue. Raises ValueError when it does not fit the task, or does not know an option."""
    row = pick(BLENDERS, method, "blend method")
    for what, value, allowed in (("kind", problem.kind, row.kinds), ("metric", problem.metric, row.metrics)):
        if value not in allowed:
            raise ValueError(f"blend method '{method}' does not fit {what} '{value}'; it fits {', '.join(allowed)}")
    try:
        found: Parameters = row.make(problem, **(options or {}))
    except TypeError as fault:
        if "unexpected keyword" not in str(fault):
            raise
        raise ValueError(f"blend method '{method}': {fault}; see `comp list blenders`") from None
    return found


def apply_blend(method: str, parameters: Parameters, problem: Problem, preds: Floats) -> Floats:
    """Return (N, K) from preds (R, N, K), by parameters that were fitted to `problem`."""
    return pick(BLENDERS, method, "blend method").apply(parameters, problem, preds)
