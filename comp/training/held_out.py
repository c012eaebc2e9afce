"""The held-out rows of a fold: scored during training, their predictions kept for the best and the last weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from comp.config import Task
from comp.data.batches import Encoded
from comp.data.tables import Table
from comp.metrics import evaluate
from comp.model.text_model import TextModel
from comp.runtime import Runtime
from comp.training import oof
from comp.training.checkpoint import save_weights
from comp.training.predict import Predictions, predict

__all__ = ["HeldOut"]


class HeldOut:
    """Scores `model` on `rows` of `table` by the metric of the first task; writes the best weights to `best_path`."""

    def __init__(
        self,
        model: TextModel,
        encoded: Encoded,
        rows: NDArray[np.int64],
        *,
        table: Table,
        tasks: Sequence[Task],
        metric: str,
        runtime: Runtime,
        best_path: Path,
    ) -> None:
        self.model, self.encoded, self.rows = model, encoded, rows
        self.ids, self.classes, self.tasks = table.ids, table.classes, tasks
        self.metric, self.runtime, self.best_path = metric, runtime, best_path
        self.kinds = {task.name: task.kind for task in tasks}
        self.targets = {name: values[rows] for name, values in table.targets.items()}
        self.best: Predictions | None = None
        self.last: Predictions | None = None

    def evaluate(self) -> float:
        """Predict the rows and return the metric of the first task; NaN when a prediction is not finite."""
        self.last = predict(self.model, self.encoded, self.ids, kinds=self.kinds, runtime=self.runtime, rows=self.rows)
        first = self.tasks[0].name
        if not np.isfinite(self.last.values[first]).all():
            return float("nan")
        return evaluate(self.metric, self.targets[first], self.last.values[first])

    def keep_best(self) -> None:
        """Keep the latest predictions, and the weights that made them, as the best."""
        self.best = self.last
        save_weights(self.best_path, self.model)

    def write(self, path: Path, fold: int) -> None:
        """Write the fold's out-of-fold rows."""
        assert self.best is not None and self.last is not None
        oof.write(
            path,
            fold=fold,
            tasks=self.tasks,
            classes=self.classes,
            targets=self.targets,
            best=self.best,
            last=self.last,
        )
