"""Out-of-fold rows: each row predicted by the one fold model that did not see it.

Columns: id, fold, then per task and output `target_<task>_<column>`, `pred_<task>_<output>` (best weights) and
`last_<task>_<output>` (weights at the end of training) and, where weights are averaged, `averaged_<task>_<output>`. An
output is a target column, or a class of a multiclass task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.config import Task
from comp.data.frames import read_frame
from comp.metrics import evaluate, evaluate_known, is_better
from comp.runs import RunFolder, read_json, write_atomic
from comp.training.optimism import flattery
from comp.training.predict import Predictions

__all__ = [
    "COLUMN",
    "FLATTERY_UNKNOWN",
    "Scores",
    "gather",
    "keep_best_flattery",
    "output_names",
    "read_rows",
    "score",
    "write",
]

COLUMN = {"best": "pred", "last": "last", "averaged": "averaged"}
"""Which weights -> how their columns start."""
FLATTERY_UNKNOWN = (
    "how much choosing the best evaluation flatters `best` is not known: some stopped early (evaluation.decide '{}')"
)


def output_names(task: Task, classes: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of a task's predicted columns: its targets, or its classes for kind multiclass."""
    return list(classes[task.name]) if task.kind == "multiclass" else list(task.targets)


def write(
    path: Path,
    *,
    fold: int,
    tasks: Sequence[Task],
    classes: Mapping[str, Sequence[str]],
    targets: Mapping[str, NDArray[np.float32]],
    best: Predictions,
    last: Predictions,
    averaged: Predictions | None = None,
) -> None:
    """Write the rows of one fold atomically. `targets`: task name -> (N, K), in the order of `best.ids`."""
    assert (best.ids == last.ids).all(), "best and last predictions are of different rows"
    columns: dict[str, NDArray[np.generic] | int] = {"id": best.ids, "fold": fold}
    for task in tasks:
        for place, column in enumerate(task.targets):
            columns[f"target_{task.name}_{column}"] = targets[task.name][:, place]
        for kind, predictions in (("pred", best), ("last", last), ("averaged", averaged)):
            if predictions is None:
                continue
            for place, output in enumerate(output_names(task, classes)):
                columns[f"{kind}_{task.name}_{output}"] = predictions.values[task.name][:, place]
    frame = pd.DataFrame(columns)
    write_atomic(path, lambda temporary: frame.to_parquet(temporary, index=False))


def read_rows(folder: RunFolder, folds: Sequence[int]) -> pd.DataFrame:
    """Put the finished folds' rows together and audit them; nothing is written.

    Raises ValueError when an id comes twice or a prediction is not finite. A missing target of an auxiliary task is
    NaN in its target column.
    """
    frame = pd.concat([read_frame(folder.fold(fold).oof, "id") for fold in folds], ignore_index=True)
    twice = frame["id"][frame["id"].duplicated()].unique()
    if len(twice):
        raise ValueError(
            f"{folder.path}: {len(twice)} ids are in the out-of-fold rows of two folds (for example {twice[0]}); the "
            "folds were trained on different fold files: train again with --restart"
        )
    numbers = frame[[name for name in frame.columns if name.startswith(("pred_", "last_", "averaged_"))]].to_numpy(
        np.float64
    )
    if not np.isfinite(numbers).all():
        raise ValueError(f"{folder.path}: out-of-fold rows hold NaN or infinite values; train again with --restart")
    return frame


def gather(folder: RunFolder, folds: Sequence[int], *, seed: int) -> pd.DataFrame:
    """Put the finished folds' rows together and write the run's oof.parquet. Raises ValueError as `read_rows`.

    It gets a column `seed`, and the fingerprints of data, folds and config as `attrs["fingerprints"]`.
    """
    frame = read_rows(folder, folds)
    frame.insert(2, "seed", seed)
    frame.attrs["fingerprints"] = read_json(folder.manifest)["fingerprints"]
    write_atomic(folder.oof, lambda temporary: frame.to_parquet(temporary, index=False))
    return frame


Score: TypeAlias = float | None


@dataclass(frozen=True)
class Scores:
    """One task's metric over the out-of-fold rows, by best and by last weights.

    None where the metric is not defined on a fold: an auxiliary task may have no target there.
    """

    metric: str
    folds: dict[int, Score]
    """Fold -> score of its own rows, best weights."""
    pooled: Score
    """Score of all rows at once, best weights."""
    last_folds: dict[int, Score]
    last_pooled: Score
    num_rows: int
    """Rows with a target."""
    averaged_folds: dict[int, Score] | None = None
    """By averaged weights; None where there are none."""
    averaged_pooled: Score = None

    @property
    def mean(self) -> Score:
        """Mean of the folds' scores, best weights."""
        return _mean(self.folds)

    @property
    def std(self) -> float:
        """Standard deviation between folds (ddof 1; 0 for one fold), best weights."""
        return _std(self.folds)

    @property
    def last_mean(self) -> Score:
        """Mean of the folds' scores, last weights."""
        return _mean(self.last_folds)

    @property
    def averaged_mean(self) -> Score:
        """Mean of the folds' scores, averaged weights; None where there are none."""
        return None if self.averaged_folds is None else _mean(self.averaged_folds)

    @property
    def spreads(self) -> list[float]:
        """Standard deviation between folds by best, last and, where there are such, averaged weights."""
        return [_std(folds) for folds in (self.folds, self.last_folds, self.averaged_folds) if folds is not None]

    @property
    def ahead(self) -> str | None:
        """Which weights score best by the mean of the folds: best, last or averaged; None without averaged ones.

        Scores alike: averaged, then last, since `best` is flattered by its choice.
        """
        if self.averaged_folds is None:
            return None
        chosen, score = None, None
        for name, folds in (("averaged", self.averaged_folds), ("last", self.last_folds), ("best", self.folds)):
            mean = _mean(folds)
            if mean is not None and is_better(self.metric, mean, score):
                chosen, score = name, mean
        return chosen

    def as_dict(self) -> dict[str, object]:
        """Return what scores.json holds."""
        return {
            "metric": self.metric,
            "num_rows": self.num_rows,
            "best": {"folds": self.folds, "mean": self.mean, "std": self.std, "pooled": self.pooled},
            "last": {"folds": self.last_folds, "mean": self.last_mean, "pooled": self.last_pooled},
            **({"averaged": self._averaged(), "ahead": self.ahead} if self.averaged_folds is not None else {}),
        }

    def _averaged(self) -> dict[str, object]:
        return {"folds": self.averaged_folds, "mean": self.averaged_mean, "pooled": self.averaged_pooled}

    def table(self, title: str | None = None) -> str:
        """Return the scores as text, best beside last, under `title` (the metric by default)."""

        columns = [
            (self.folds, self.mean, self.pooled),
            (self.last_folds, self.last_mean, self.last_pooled),
            *([(f, self.averaged_mean, self.averaged_pooled)] if (f := self.averaged_folds) is not None else []),
        ]

        def line(name: str, scores: Sequence[Score], more: str = "") -> str:
            return f"{name:<16}" + "".join(f"{'-' if x is None else f'{x:.5f}':>10}" for x in scores) + more

        heads = "".join(f"{name:>10}" for name in ("best", "last", "averaged")[: len(columns)])
        lines = [f"{title or self.metric:<16}{heads}"]
        lines += [line(f"fold {fold}", [column[0][fold] for column in columns]) for fold in self.folds]
        spread = f"   (spread {self.std:.5f})" if len(self.folds) > 1 else ""
        lines.append(line("mean of folds", [column[1] for column in columns], spread))
        lines.append(line("pooled", [column[2] for column in columns], f"   ({self.num_rows:,} rows)"))
        if self.ahead is not None:
            lines.append(f"ahead by the mean of folds: {self.ahead} weights (comp infer --weights {self.ahead})")
        return "\n".join(lines)


def keep_best_flattery(folder: RunFolder, folds: Sequence[int], task: Task, metric: str) -> tuple[float, int] | None:
    """Return by how much keep-best flatters the first task's score, mean over folds, and the most evaluations of one.

    None where the evaluations are not there, or stopped early, or their metric is not defined on half a fold.
    """
    found, most = [], 0
    for fold in folds:
        own = folder.fold(fold)
        if not own.evaluations.exists():
            return None
        rows, history = pd.read_parquet(own.oof), pd.read_parquet(own.evaluations).drop(columns="id")
        targets = rows[[f"target_{task.name}_{column}" for column in task.targets]].to_numpy(np.float64)
        outputs = sum(name.startswith("eval0_") for name in history.columns)
        values = history.to_numpy(np.float64)
        if np.isnan(values).any():  # the rows that are left would tell of fewer choices, and less flattery
            return None
        steps = [values[:, start : start + outputs] for start in range(0, values.shape[1], outputs)]
        found.append(flattery(targets, steps, metric, task.kind))
        most = max(most, len(steps))
    known = [value for value in found if value is not None]
    return (float(np.mean(known)), most) if known else None


def _mean(folds: Mapping[int, Score]) -> Score:
    values = [score for score in folds.values() if score is not None]
    return float(np.mean(values)) if values else None


def _std(folds: Mapping[int, Score]) -> float:
    values = [score for score in folds.values() if score is not None]
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def score(
    frame: pd.DataFrame, task: Task, metric: str, classes: Mapping[str, Sequence[str]], *, complete: bool = True
) -> Scores:
    """Score out-of-fold rows three ways: per fold, mean of folds, pooled.

    `complete`: the task has every target, and a metric that is not defined raises ValueError; otherwise rows without
    a target are left out, and what cannot be scored is None.
    """
    names = {"target": [f"target_{task.name}_{column}" for column in task.targets]}
    for kind in ("pred", "last", "averaged"):
        names[kind] = [f"{kind}_{task.name}_{output}" for output in output_names(task, classes)]
    rate = evaluate if complete else evaluate_known

    def scored(part: pd.DataFrame, kind: str) -> Score:
        targets, preds = (part[names[which]].to_numpy(np.float64) for which in ("target", kind))
        return rate(metric, targets, preds, task.kind)

    parts = {int(fold): frame[frame["fold"] == fold] for fold in sorted(frame["fold"].unique())}
    averaged = set(names["averaged"]) <= set(frame.columns) and frame[names["averaged"]].notna().all(axis=None)
    return Scores(
        metric=metric,
        folds={fold: scored(part, "pred") for fold, part in parts.items()},
        pooled=scored(frame, "pred"),
        last_folds={fold: scored(part, "last") for fold, part in parts.items()},
        last_pooled=scored(frame, "last"),
        num_rows=int(frame[names["target"]].notna().all(axis=1).sum()),
        averaged_folds={fold: scored(part, "averaged") for fold, part in parts.items()} if averaged else None,
        averaged_pooled=scored(frame, "averaged") if averaged else None,
    )
