"""The held-out rows of a fold: scored during training, their predictions kept for the best and the last weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from comp.config import Task
from comp.data.tables import Table
from comp.data.tokens import Encoded
from comp.metrics import evaluate, evaluate_known
from comp.model.losses import build_decoder
from comp.model.text_model import TextModel
from comp.progress import DELAY, open_progress
from comp.runs import write_atomic
from comp.runtime import Runtime
from comp.training import oof
from comp.training.checkpoint import load_weights, save_weights, step_of
from comp.training.predict import Predictions, predict

__all__ = ["HeldOut"]


class HeldOut:
    """Scores `model` on `rows` of `table`; writes the best weights to `best_path`.

    `metrics`: one per task; the first task's decides which weights are best.
    """

    def __init__(
        self,
        model: TextModel,
        encoded: Encoded,
        rows: NDArray[np.int64],
        *,
        table: Table,
        tasks: Sequence[Task],
        metrics: Sequence[str],
        runtime: Runtime,
        best_path: Path,
    ) -> None:
        self.model, self.encoded, self.rows = model, encoded, rows
        self.ids, self.classes, self.tasks = table.ids, table.classes, tasks
        self.metrics, self.runtime, self.best_path = metrics, runtime, best_path
        self.decoders = {task.name: build_decoder(task, table.classes.get(task.name, [])) for task in tasks}
        self.targets = {name: values[rows] for name, values in table.targets.items()}
        self.best: Predictions | None = None
        self.last: Predictions | None = None
        self.averaged: Predictions | None = None
        self.history: list[NDArray[np.float32]] = []
        """Predictions (N, K) of the first task at each evaluation."""

    def evaluate(self) -> float:
        """Predict the rows and return the metric of the first task; NaN when a prediction is not finite."""
        self.last = self._predict()
        self.history.append(self.last.values[self.tasks[0].name].astype(np.float32))
        return self._score(self.last)

    def try_weights(self) -> float:
        """Score the weights in the model, by the way."""
        return self._score(self._predict())

    def keep_averaged(self) -> float:
        """Score the weights in the model, an average, and keep their predictions."""
        self.averaged = self._predict()
        return self._score(self.averaged)

    def _predict(self) -> Predictions:
        progress = open_progress(len(self.rows), "evaluating", "row", delay=DELAY)
        try:
            return predict(
                self.model,
                self.encoded,
                self.ids,
                decoders=self.decoders,
                runtime=self.runtime,
                rows=self.rows,
                on_batch=progress.advance,
            )
        finally:
            progress.close()

    def _score(self, found: Predictions) -> float:
        first = self.tasks[0].name
        if not all(np.isfinite(values).all() for values in found.values.values()):
            return float("nan")
        return evaluate(self.metrics[0], self.targets[first], found.values[first], self.tasks[0].kind)

    def others(self) -> dict[str, float]:
        """Return "valid/<task>" -> score of the latest predictions, for the auxiliary tasks that can be scored."""
        assert self.last is not None
        values = self.last.values
        found = {
            f"valid/{task.name}": evaluate_known(metric, self.targets[task.name], values[task.name], task.kind)
            for task, metric in zip(self.tasks[1:], self.metrics[1:], strict=True)
        }
        return {name: score for name, score in found.items() if score is not None}

    def keep_best(self, step: int) -> None:
        """Keep the latest predictions, and the weights that made them at `step`, as the best."""
        self.best = self.last
        save_weights(self.best_path, self.model, step=step)

    def settle(self, best_step: int) -> tuple[int, float] | None:
        """Make sure that the best predictions are those of the best weights on disk.

        A killed run may leave weights that are newer than its state; where going on does not repeat it bit by bit
        (another machine), they stay. Then the model gets those weights, the rows are predicted anew, and their step
        and score are returned.
        """
        step = step_of(self.best_path)
        if step is None or step == best_step:
            return None
        load_weights(self.best_path, self.model)
        self.best = self._predict()
        return step, self._score(self.best)

    def state_dict(self) -> dict[str, Any]:
        """Return the predictions that the end of the fold needs."""
        kept = {"best": self.best, "last": self.last}
        history = [torch.from_numpy(values) for values in self.history]
        return {"history": history} | {
            kind: {name: torch.from_numpy(values) for name, values in found.values.items()}
            for kind, found in kept.items()
            if found is not None
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        kept = {
            kind: Predictions(self.ids[self.rows], {name: values.numpy() for name, values in found.items()})
            for kind, found in state_dict.items()
            if kind != "history"
        }
        self.history = [values.numpy() for values in state_dict["history"]]
        self.best, self.last = kept.get("best"), kept.get("last")

    def write_history(self, path: Path) -> None:
        """Write the predictions of the first task at each evaluation: id, then eval<i>_<output>."""
        names = oof.output_names(self.tasks[0], self.classes)
        columns: dict[str, Any] = {"id": self.ids[self.rows]}
        for number, values in enumerate(self.history):
            columns |= {f"eval{number}_{name}": values[:, place] for place, name in enumerate(names)}
        frame = pd.DataFrame(columns)
        write_atomic(path, lambda temporary: frame.to_parquet(temporary, index=False))

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
            averaged=self.averaged,
        )
