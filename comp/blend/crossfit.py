"""How good is a blend? Fitted to all rows it flatters itself; cross-fitted, each fold is scored by weights that did not
see it.

The runs' out-of-fold rows are honest one by one. What is fitted to them is not, on the same rows: so everything that
is fitted (weights, thresholds, calibration) is fitted again for each fold on the other folds' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.blend.calibration import apply_calibration, fit_calibration
from comp.blend.ensemble import BLENDERS, Floats, Parameters, Problem, apply_blend, fit_blend
from comp.blend.members import Members
from comp.catalog import pick
from comp.metrics import METRICS
from comp.progress import DELAY, open_progress
from comp.runs import commit, now, read_json, write_atomic, write_json, write_stream

__all__ = [
    "Blend",
    "Recipe",
    "Report",
    "cross_fit",
    "examine",
    "read_blend",
    "write_blend",
    "write_blend_for_inference",
]

ROWS = "rows.npz"
"""The rows of a blend in a bundle."""


@dataclass(frozen=True)
class Recipe:
    """What is fitted: a blend method with its options, then a calibration."""

    method: str = "mean"
    options: Mapping[str, Any] | None = None
    calibration: str = "none"

    @property
    def fitted(self) -> bool:
        """Whether targets decide anything."""
        return pick(BLENDERS, self.method, "blend method").fitted or self.calibration != "none"

    def fit(self, problem: Problem) -> dict[str, Parameters]:
        """Return the parameters of the blend and of the calibration."""
        weights = fit_blend(self.method, problem, self.options)
        blended = apply_blend(self.method, weights, problem, problem.preds)
        return {"blend": weights, "calibration": fit_calibration(self.calibration, problem, blended)}

    def apply(self, parameters: Mapping[str, Parameters], problem: Problem, preds: Floats) -> Floats:
        """Return (N, K) from preds (R, N, K), by parameters that were fitted to `problem`."""
        blended = apply_blend(self.method, parameters["blend"], problem, preds)
        return apply_calibration(self.calibration, parameters["calibration"], blended)


def cross_fit(problem: Problem, fold: NDArray[np.int64], recipe: Recipe) -> Floats:
    """Return (N, K): each fold's rows by what was fitted to the other folds'. `fold` (N,)."""
    found = np.zeros(problem.preds.shape[1:])
    for one in np.unique(fold):
        held, seen = problem.rows(fold == one), problem.rows(fold != one)
        found[fold == one] = recipe.apply(recipe.fit(seen), seen, held.preds)
    return found


@dataclass(frozen=True)
class Report:
    """A blend and its runs, scored."""

    names: list[str]
    metric: str
    fitted: float
    """Score on the rows it was fitted to."""
    crossfit: float | None
    """Score by parameters that did not see the fold; None for one fold only."""
    folds: dict[int, float | None]
    """Cross-fitted score of each fold's rows; None where the metric is not defined on them."""
    single: list[float]
    """Score of each run alone, calibrated like the blend, cross-fitted."""
    without: list[float | None]
    """Cross-fitted score of the blend without each run; None for a blend of one."""
    weights: list[float | None]
    """Mean weight of each run over outputs; None where the method has none."""
    correlation: Floats
    """(R, R) of the runs' errors."""
    num_rows: int

    @property
    def honest(self) -> float:
        """The score to believe."""
        return self.fitted if self.crossfit is None else self.crossfit

    @property
    def gap(self) -> float | None:
        """How much the fitted score flatters: cross-fitted minus fitted, its sign turned where higher is better."""
        if self.crossfit is None:
            return None
        gap = (self.crossfit - self.fitted) * (-1 if METRICS[self.metric].higher_is_better else 1)
        return 0.0 if abs(gap) < 1e-9 else gap

    def table(self) -> str:
        """Return what `comp blend` prints."""
        width = max(4, *map(len, self.names))

        def number(value: float | None, form: str = ".5f") -> str:
            return f"{'-' if value is None else format(value, form):>10}"

        lines = [f"{'run':<{width}}{'alone':>10}{'weight':>10}{'without':>10}   correlation of errors"]
        for place, name in enumerate(self.names):
            others = " ".join(f"{value:5.2f}" for value in self.correlation[place])
            lines.append(
                f"{name:<{width}}{number(self.single[place])}{number(self.weights[place], '.3f')}"
                f"{number(self.without[place])}   {others}"
            )
        lines += [f"{'fold ' + str(fold):<{width}}{number(score)}" for fold, score in self.folds.items()]
        known = [score for score in self.folds.values() if score is not None]
        spread = f"   (spread {np.std(known, ddof=1):.5f})" if len(known) > 1 else ""
        lines.append(f"{self.metric} of the blend, {self.num_rows:,} rows")
        lines.append(f"  cross-fitted    {number(self.crossfit)}{spread}")
        lines.append(f"  fitted on all   {number(self.fitted)}")
        lines.append(f"  flatters by     {number(self.gap)}")
        return "\n".join(lines)


def examine(members: Members, recipe: Recipe) -> tuple[dict[str, Parameters], Report]:
    """Fit a blend to all rows and score it, its runs, and itself without each of them."""
    problem = members.problem
    runs = list(range(len(problem.preds)))
    size = 1 + (1 if len(runs) < 2 else 2) * len(runs)
    progress = open_progress(1 + size, "blending", "fit", delay=DELAY)
    try:
        return _examine(members, recipe, runs, progress.advance)
    finally:
        progress.close()


def _examine(
    members: Members, recipe: Recipe, runs: list[int], advance: Callable[[], None]
) -> tuple[dict[str, Parameters], Report]:
    problem, fold = members.problem, members.fold
    parameters = recipe.fit(problem)
    advance()
    several = len(np.unique(fold)) > 1

    def honest(part: Problem, how: Recipe) -> Floats:
        found = cross_fit(part, fold, how) if several else how.apply(how.fit(part), part, part.preds)
        advance()
        return found

    blended = honest(problem, recipe)
    alone = Recipe("mean", None, recipe.calibration)
    single = [problem.score(honest(problem.runs([run]), alone)) for run in runs]
    rest = [[other for other in runs if other != run] for run in runs]
    without = [problem.score(honest(problem.runs(others), recipe)) if others else None for others in rest]
    errors = (problem.preds - problem.truth).reshape(len(runs), -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.atleast_2d(np.corrcoef(errors))
    weights = parameters["blend"].get("weights")
    return parameters, Report(
        names=members.names,
        metric=problem.metric,
        fitted=problem.score(recipe.apply(parameters, problem, problem.preds)),
        crossfit=problem.score(blended) if several else None,
        folds={int(one): _score(problem.rows(fold == one), blended[fold == one]) for one in np.unique(fold)},
        single=single,
        without=without,
        weights=[None] * len(runs) if weights is None else [float(w) for w in np.mean(weights, axis=1)],
        correlation=correlation,
        num_rows=len(fold),
    )


def _score(problem: Problem, blended: Floats) -> float | None:
    try:
        return problem.score(blended)
    except ValueError:  # a fold may hold a single class
        return None


# --- blend.json ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blend:
    """A fitted blend, ready for the predictions of its runs on new rows."""

    path: Path
    recipe: Recipe
    parameters: dict[str, Parameters]
    runs: list[str]
    """Run folders, in the order of the weights."""
    weights: str
    """best | last | averaged"""
    fingerprints: list[dict[str, str]]
    """Of each run when the blend was fitted."""
    problem: Problem
    """The rows it was fitted to."""

    @property
    def shares(self) -> list[float]:
        """How much each run counts: its mean weight's size, or the same for all where the method has no weights."""
        weights = self.parameters["blend"].get("weights")
        return [1.0] * len(self.runs) if weights is None else [float(w) for w in np.abs(weights).mean(axis=1)]

    def among(self, runs: list[int]) -> Blend:
        """Return the blend of some of its runs, fitted again to their rows."""
        problem = self.problem.runs(runs)
        return replace(
            self,
            parameters=self.recipe.fit(problem),
            runs=[self.runs[run] for run in runs],
            fingerprints=[self.fingerprints[run] for run in runs],
            problem=problem,
        )

    def apply(self, preds: Floats) -> Floats:
        """Return (N, K) from the runs' predictions (R, N, K)."""
        return self.recipe.apply(self.parameters, self.problem, preds)


def write_blend(
    folder: Path, members: Members, recipe: Recipe, parameters: dict[str, Parameters], report: Report
) -> Path:
    """Write blends/<name>/blend.json and the rows it was fitted to beside it; return the path of blend.json.

    Runs that weigh nothing are left out: they need not predict.
    """
    weights = parameters["blend"].get("weights")
    if weights is not None:
        used = [run for run, own in enumerate(weights) if any(own)]
        parameters = {**parameters, "blend": {**parameters["blend"], "weights": [weights[run] for run in used]}}
        members = members.among(used)
        report = replace(report, single=[report.single[run] for run in used])
    problem = members.problem
    columns: dict[str, Any] = {"id": members.ids, "fold": members.fold}
    columns |= {f"target_{place}": column for place, column in enumerate(problem.targets.T)}
    for run, preds in enumerate(problem.preds):
        columns |= {f"run{run}_{place}": column for place, column in enumerate(preds.T)}
    rows = pd.DataFrame(columns)
    write_atomic(folder / "rows.parquet", lambda temporary: rows.to_parquet(temporary, index=False))
    about = {
        "created": now(),
        "commit": commit(),
        "method": recipe.method,
        "options": dict(recipe.options or {}),
        "calibration": recipe.calibration,
        "kind": problem.kind,
        "metric": problem.metric,
        "outputs": members.members[0].outputs,
        "weights": members.weights,
        "runs": [
            {"run": str(member.folder.path), "fingerprints": member.manifest["fingerprints"], "alone": alone}
            for member, alone in zip(members.members, report.single, strict=True)
        ],
        "parameters": parameters,
        "scores": {
            "crossfit": report.crossfit,
            "fitted": report.fitted,
            "folds": report.folds,
            "rows": report.num_rows,
        },
    }
    write_json(folder / "blend.json", about)
    return folder / "blend.json"


def _rows(folder: Path, num_runs: int, num_outputs: int) -> tuple[Floats, Floats]:
    """Return preds (R, N, K) and targets (N, K) of the rows a blend was fitted to.

    In a bundle they are NumPy arrays: pyarrow may be missing there.
    """
    arrays = folder / ROWS
    if arrays.exists():
        with np.load(arrays, allow_pickle=False) as found:
            return found["preds"], found["targets"]
    frame = pd.read_parquet(folder / "rows.parquet")
    names = [name for name in frame.columns if name.startswith("target_")]
    preds = [frame[[f"run{run}_{place}" for place in range(num_outputs)]].to_numpy(float) for run in range(num_runs)]
    return np.stack(preds), frame[names].to_numpy(float)


def write_blend_for_inference(blend: Blend, folder: Path, runs: Sequence[str]) -> None:
    """Write a blend whose runs stand at other paths, with all that `read_blend` needs and no more."""
    about = read_json(blend.path)
    about["runs"] = [{**own, "run": run} for own, run in zip(about["runs"], runs, strict=True)]
    write_json(folder / "blend.json", about)
    problem = blend.problem
    write_stream(folder / ROWS, lambda file: np.savez(file, preds=problem.preds, targets=problem.targets))


def read_blend(path: str | Path) -> Blend:
    """Read a blend by its folder or its blend.json. Raises ValueError when it is none."""
    file = Path(path) / "blend.json" if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise ValueError(f"{path} is no blend: blend.json is missing; make one with `comp blend`")
    about = read_json(file)
    try:
        runs = about["runs"]
        preds, targets = _rows(file.parent, len(runs), len(about["outputs"]))
        problem = Problem(preds, targets, about["kind"], about["metric"])
        recipe = Recipe(about["method"], about["options"], about["calibration"])
        marks = [run["fingerprints"] for run in runs]
        names = [run["run"] for run in runs]
        return Blend(file, recipe, about["parameters"], names, about["weights"], marks, problem)
    except (KeyError, OSError) as fault:
        raise ValueError(
            f"{file} cannot be used ({type(fault).__name__}: {fault}); make it anew with `comp blend`"
        ) from None
