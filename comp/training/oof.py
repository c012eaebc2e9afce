"""Out-of-fold rows: each row predicted by the one fold model that did not see it.

Columns: id, fold, then per task and output `target_<task>_<column>`, `pred_<task>_<output>` (best weights) and
`last_<task>_<output>` (weights at the end of training). An output is a target column, or a class of a multiclass task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.config import Task
from comp.metrics import evaluate
from comp.runs import RunFolder, write_atomic
from comp.training.predict import Predictions

__all__ = ["Scores", "gather", "output_names", "score", "write"]


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
) -> None:
    """Write the rows of one fold atomically. `targets`: task name -> (N, K), in the order of `best.ids`."""
    assert (best.ids == last.ids).all(), "best and last predictions are of different rows"
    columns: dict[str, NDArray[np.generic] | int] = {"id": best.ids, "fold": fold}
    for task in tasks:
        for place, column in enumerate(task.targets):
            columns[f"target_{task.name}_{column}"] = targets[task.name][:, place]
        for kind, predictions in (("pred", best), ("last", last)):
            for place, output in enumerate(output_names(task, classes)):
                columns[f"{kind}_{task.name}_{output}"] = predictions.values[task.name][:, place]
    frame = pd.DataFrame(columns)
    write_atomic(path, lambda temporary: frame.to_parquet(temporary, index=False))


def gather(folder: RunFolder, folds: Sequence[int]) -> pd.DataFrame:
    """Put the finished folds' rows together, audit them and write the run's oof.parquet.

    Raises ValueError when an id comes twice or a prediction is not finite.
    """
    frame = pd.concat([pd.read_parquet(folder.fold(fold).oof) for fold in folds], ignore_index=True)
    twice = frame["id"][frame["id"].duplicated()].unique()
    if len(twice):
        raise ValueError(
            f"{folder.path}: {len(twice)} ids are in the out-of-fold rows of two folds (for example {twice[0]}); the "
            "folds were trained on different fold files: train again with --restart"
        )
    numbers = frame.drop(columns=["id", "fold"]).to_numpy(np.float64)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{folder.path}: out-of-fold rows hold NaN or infinite values; train again with --restart")
    write_atomic(folder.oof, lambda temporary: frame.to_parquet(temporary, index=False))
    return frame


@dataclass(frozen=True)
class Scores:
    """One task's metric over the out-of-fold rows, by best and by last weights."""

    metric: str
    folds: dict[int, float]
    """Fold -> score of its own rows, best weights."""
    pooled: float
    """Score of all rows at once, best weights."""
    last_folds: dict[int, float]
    last_pooled: float
    num_rows: int

    @property
    def mean(self) -> float:
        """Mean of the folds' scores, best weights."""
        return float(np.mean(list(self.folds.values())))

    @property
    def std(self) -> float:
        """Standard deviation between folds (ddof 1; 0 for one fold), best weights."""
        values = list(self.folds.values())
        return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0

    @property
    def last_mean(self) -> float:
        """Mean of the folds' scores, last weights."""
        return float(np.mean(list(self.last_folds.values())))

    def as_dict(self) -> dict[str, object]:
        """Return what scores.json holds."""
        return {
            "metric": self.metric,
            "num_rows": self.num_rows,
            "best": {"folds": self.folds, "mean": self.mean, "std": self.std, "pooled": self.pooled},
            "last": {"folds": self.last_folds, "mean": self.last_mean, "pooled": self.last_pooled},
        }

    def table(self) -> str:
        """Return the scores as text, best beside last."""
        lines = [f"{self.metric:<16}{'best':>10}{'last':>10}"]
        lines += [f"fold {fold:<11}{self.folds[fold]:>10.5f}{self.last_folds[fold]:>10.5f}" for fold in self.folds]
        lines.append(f"{'mean of folds':<16}{self.mean:>10.5f}{self.last_mean:>10.5f}   (spread {self.std:.5f})")
        lines.append(f"{'pooled':<16}{self.pooled:>10.5f}{self.last_pooled:>10.5f}   ({self.num_rows:,} rows)")
        return "\n".join(lines)


def score(frame: pd.DataFrame, task: Task, metric: str) -> Scores:
    """Score out-of-fold rows three ways: per fold, mean of folds, pooled."""

    def columns(part: pd.DataFrame, kind: str) -> NDArray[np.float64]:
        prefix = f"{kind}_{task.name}_"
        names = [name for name in part.columns if name.startswith(prefix)]
        if kind == "target":
            names = [f"{prefix}{column}" for column in task.targets]
        return part[names].to_numpy(np.float64)

    def scored(part: pd.DataFrame, kind: str) -> float:
        return evaluate(metric, columns(part, "target"), columns(part, kind))

    parts = {int(fold): frame[frame["fold"] == fold] for fold in sorted(frame["fold"].unique())}
    return Scores(
        metric=metric,
        folds={fold: scored(part, "pred") for fold, part in parts.items()},
        pooled=scored(frame, "pred"),
        last_folds={fold: scored(part, "last") for fold, part in parts.items()},
        last_pooled=scored(frame, "last"),
        num_rows=len(frame),
    )
