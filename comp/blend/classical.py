"""ESTIMATORS: scikit-learn on features, over the same folds as the fine-tuned runs. N rows, D features, K outputs.

`run_classical` leaves an ordinary run: out-of-fold rows, scores, folds that infer on a test table and blend with
others. Hyperparameters are chosen inside the fold, by cross-validation on its training rows alone. An estimator is kept
as the numbers it was fitted to, and fitted again when it is loaded: a file can hold none without pickle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from comp.blend.ensemble import PROBABILITIES, Problem, fit_predict, one_hot
from comp.blend.features import CACHE, Source, check_folds_of_runs, check_runs, keep_backbone, parse_features, transform
from comp.catalog import Row, pick
from comp.config import Config
from comp.data.splitters import group_codes
from comp.data.tables import Table
from comp.lock import hold
from comp.metrics import evaluate
from comp.progress import open_progress
from comp.runs import FoldFolder, RunFolder, claim, digest, read_json, write_json, write_stream
from comp.runtime import Runtime, open_runtime
from comp.training import oof
from comp.training.crossval import open_tables, parse_folds, score_run
from comp.training.plan import Fold, rows_of
from comp.training.predict import Predictions
from comp.training.preflight import check_rows

__all__ = ["ESTIMATORS", "Estimator", "predict_classical", "run_classical"]

Floats: TypeAlias = NDArray[np.float64]
NUMBERS = ("regression", "ordinal")
INNER_FOLDS = 3


@dataclass(frozen=True)
class Estimator(Row):
    """A row of ESTIMATORS: `make(classes, **options) -> scikit-learn estimator`, `classes` for probabilities."""

    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Hyperparameters that are chosen inside the fold, and their candidates."""
    kinds: tuple[str, ...] = (*NUMBERS, *PROBABILITIES)
    dense: bool = True
    """False where it takes sparse features as they are."""


def ridge(classes: bool, *, alpha: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge

    return LogisticRegression(C=1 / alpha, max_iter=2000) if classes else Ridge(alpha)


def svm(classes: bool, *, C: float) -> Any:
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import SVC, SVR

    return CalibratedClassifierCV(SVC(C=C), ensemble=False) if classes else SVR(C=C)


def kernel_ridge(classes: bool, *, alpha: float, gamma: float) -> Any:
    from sklearn.kernel_ridge import KernelRidge

    return KernelRidge(kernel="rbf", alpha=alpha, gamma=gamma)


def gaussian_process(classes: bool) -> Any:
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    kernel = ConstantKernel(1.0) * RBF(10.0) + WhiteKernel(0.5)
    return GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)


def lightgbm(classes: bool, *, num_leaves: int) -> Any:
    try:
        from lightgbm import LGBMClassifier, LGBMRegressor
    except ImportError:
        raise ValueError(
            "estimator 'lightgbm' needs LightGBM; install the extra: pip install 'comp[features]'"
        ) from None
    return (LGBMClassifier if classes else LGBMRegressor)(
        num_leaves=num_leaves, n_estimators=300, learning_rate=0.03, subsample=0.8, subsample_freq=1, random_state=0,
        deterministic=True, force_row_wise=True, verbose=-1,
    )  # fmt: skip


ESTIMATORS: dict[str, Estimator] = {
    "ridge": Estimator(
        ridge, "linear with a penalty; for classes logistic", "scikit-learn",
        {"alpha": (0.1, 1.0, 10.0, 100.0, 1000.0)}, dense=False,
    ),
    "svm": Estimator(svm, "support vectors with an RBF kernel", "scikit-learn", {"C": (0.3, 1.0, 3.0, 10.0)}),
    "kernel_ridge": Estimator(
        kernel_ridge, "ridge with an RBF kernel", "scikit-learn",
        {"alpha": (0.1, 1.0, 10.0), "gamma": (1e-4, 3e-4, 1e-3, 3e-3)}, NUMBERS,
    ),
    "gaussian_process": Estimator(
        gaussian_process, "Gaussian process, length and noise by likelihood", "Rasmussen & Williams 2006", {}, NUMBERS
    ),
    "lightgbm": Estimator(lightgbm, "boosted trees (extra `features`)", "Ke et al. 2017", {"num_leaves": (7, 15, 31)}),
}  # fmt: skip


# --- one fold --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """What an estimator is fitted to, and how well it should do."""

    name: str
    kind: str
    metric: str
    seen: Any
    """(N, D) CSR."""
    targets: Floats
    """(N, K), or (N, 1) class indices."""
    num_outputs: int
    groups: NDArray[np.int64] | None = None
    """(N,) numbers of rows that go together, for the inner folds; None where rows stand alone."""

    def predict(self, options: Mapping[str, Any], wanted: Any) -> Floats:
        """Fit with the given hyperparameters; return (M, K) for the features `wanted`."""
        row = pick(ESTIMATORS, self.name, "estimator")
        seen = self.seen.toarray() if row.dense else self.seen
        there = wanted.toarray() if row.dense else wanted
        truth = one_hot(self.targets, self.num_outputs, self.kind)
        return fit_predict(lambda: row.make(self.kind in PROBABILITIES, **options), self.kind, seen, truth, there)

    def grid(self, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the hyperparameters to choose from: `given` ones as they are, the others those of the catalogue."""
        from sklearn.model_selection import ParameterGrid

        row = pick(ESTIMATORS, self.name, "estimator")
        unknown = [name for name in given if name not in row.grid]
        if unknown:
            raise ValueError(
                f"estimator '{self.name}' has no option '{unknown[0]}'; allowed: {', '.join(row.grid) or 'none'}"
            )
        return list(ParameterGrid({**row.grid, **{name: [value] for name, value in given.items()}}))

    def choose(self, given: Mapping[str, Any], advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Return the best of the grid by inner folds; `advance` is called after each of it."""
        from sklearn.model_selection import GroupKFold, KFold

        grid = self.grid(given)
        if len(grid) == 1:
            advance()
            return dict(grid[0])
        number = INNER_FOLDS if self.groups is None else min(INNER_FOLDS, len(np.unique(self.groups)))
        if self.groups is None or number < 2:
            inner = list(KFold(INNER_FOLDS, shuffle=True, random_state=0).split(self.targets))
        else:  # as the outer folds: held-out rows are of other groups
            inner = list(GroupKFold(number).split(self.targets, groups=self.groups))

        def loss(options: dict[str, Any]) -> float:
            found = np.zeros((len(self.targets), self.num_outputs))
            for rows, held in inner:
                part = replace(self, seen=self.seen[rows], targets=self.targets[rows], groups=None)
                found[held] = part.predict(options, self.seen[held])
            return Problem(found[None], self.targets, self.kind, self.metric).loss(found)

        losses = []
        for one in grid:
            losses.append(loss(one))
            advance()
        return grid[losses.index(min(losses))]


def _save(folder: FoldFolder, fit: Fit, options: Mapping[str, Any], states: Sequence[Any]) -> None:
    write_stream(folder.path / "seen.npz", lambda file: sparse.save_npz(file, fit.seen))
    write_stream(folder.path / "targets.npy", lambda file: np.save(file, fit.targets, allow_pickle=False))
    write_json(folder.path / "fitted.json", {"options": dict(options), "states": list(states)})


# --- a run -----------------------------------------------------------------------------------------------------------


def run_classical(
    config: Config,
    name: str,
    *,
    features: Sequence[str],
    estimator: str,
    options: Mapping[str, Any] | None = None,
    folds: str = "all",
    restart: bool = False,
    say: Callable[[str], None] = print,
) -> oof.Scores | None:
    """Fit the estimator to the features on every fold that is not finished; gather and score the run.

    Returns the scores of the first task, which is the only one that is fitted. Raises ValueError for whatever does not
    fit, or when another process trains this run.
    """
    with hold(Path("runs") / name):
        return _run(config, name, features, estimator, dict(options or {}), folds, restart, say)


def _run(
    config: Config,
    name: str,
    features: Sequence[str],
    estimator: str,
    options: Mapping[str, Any],
    folds: str,
    restart: bool,
    say: Callable[[str], None],
) -> oof.Scores | None:
    wanted, chosen = parse_folds(folds, config.folds.num_folds), parse_features(features)
    row = pick(ESTIMATORS, estimator, "estimator")
    task = config.tasks[0]
    if config.pseudo is not None:
        raise ValueError("estimators are fitted to true rows alone; leave the label set out: --set pseudo=null")
    if task.kind not in row.kinds:
        raise ValueError(f"estimator '{estimator}' does not fit kind '{task.kind}'; it fits {', '.join(row.kinds)}")
    check_runs(chosen, wanted)
    config = config.model_copy(update={"tasks": [task]})
    folder = RunFolder(Path("runs") / name)
    table, folding = open_tables(config, wanted, say)
    check_folds_of_runs(chosen, folding)
    for fold in wanted:
        check_rows(config, table, fold, *rows_of(fold, config, table, folding))
    about = {"features": list(features), "estimator": estimator, "options": options}
    marks = {"data": table.fingerprint(), "classical": digest([repr(about)])}
    marks |= {"folds": folding.fingerprint} if folding else {}
    runtime = open_runtime(config.training.precision)
    claim(
        folder,
        config,
        marks,
        {"runtime": runtime.describe(), "classes": table.classes},
        restart=wanted if restart else [],
    )
    write_json(folder.classical, about)
    groups = None if config.folds.group is None else group_codes(table, config.folds)
    if ("embeddings", "") in chosen:
        keep_backbone(config, folder.backbone)
    for fold in wanted:
        own = folder.fold(fold)
        if own.done.exists():
            say(f"fold {fold}: finished before, skipped (--restart fits it again)")
            continue
        started = time.perf_counter()
        training, held = rows_of(fold, config, table, folding)
        matrix, states = transform(
            Source(table, config, runtime, fold, config.model.backbone), chosen, training=training
        )
        targets = table.targets[task.name].astype(np.float64)
        num_outputs = len(oof.output_names(task, table.classes))
        fit = Fit(estimator, task.kind, config.metric, matrix[training], targets[training], num_outputs)
        fit = fit if groups is None else replace(fit, groups=groups[training])
        size = len(fit.grid(options)) + 1  # the last is the fit that counts
        later = [one for one in wanted[wanted.index(fold) + 1 :] if not folder.fold(one).done.exists()]
        progress = open_progress(size, f"fold {fold}", "fit", to_come=len(later) * size)
        try:
            best = fit.choose(options, progress.advance)
            values = fit.predict(best, matrix[held]) if fold != "full" else np.zeros((0, num_outputs))
            progress.advance()
        finally:
            progress.close()
        score: float | None = None
        if fold != "full":
            found = Predictions(table.ids[held], {task.name: values})
            score = evaluate(config.metric, targets[held], values, task.kind)
            own_targets = {task.name: table.targets[task.name][held]}
            oof.write(
                own.oof,
                fold=int(fold),
                tasks=[task],
                classes=table.classes,
                targets=own_targets,
                best=found,
                last=found,
            )
        _save(own, fit, best, states)
        seconds = round(time.perf_counter() - started, 1)
        told = ", ".join(f"{key} {value:g}" for key, value in best.items())
        shown = "" if score is None else f"{config.metric} {score:.5f}, "
        say(f"fold {fold}: {matrix.shape[1]:,} features, {estimator} {told}: {shown}{seconds:.0f} s")
        write_json(own.done, {"seconds": seconds, "best": score, "last": score, "options": best})
    return score_run(folder, config, table, say)


def predict_classical(
    folder: RunFolder, config: Config, table: Table, fold: Fold, runtime: Runtime, *, cached: bool = True
) -> Floats:
    """Return (N, K) predictions of one fold for another table. `cached`: keep its tokens and embeddings on disk."""
    about, own = read_json(folder.classical, "features", "estimator"), folder.fold(fold)
    fitted = read_json(own.path / "fitted.json", "options", "states")
    # A run whose vectors it reads stands beside it, in a bundle too.
    cache = CACHE if cached else None
    source = Source(table, config, runtime, fold, str(folder.backbone), cache, folder.path.parent)
    matrix, _ = transform(source, parse_features(about["features"]), states=fitted["states"])
    seen, targets = sparse.load_npz(own.path / "seen.npz"), np.load(own.path / "targets.npy", allow_pickle=False)
    classes = read_json(folder.manifest)["classes"]
    num_outputs = len(oof.output_names(config.tasks[0], classes))
    fit = Fit(about["estimator"], config.tasks[0].kind, config.metric, seen, targets, num_outputs)
    return fit.predict(fitted["options"], matrix)
