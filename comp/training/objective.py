"""What a step minimises: the tasks' losses, summed by weight, each divided by its own item count in the window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from comp.config import Task
from comp.data.batches import Batch
from comp.data.tables import Table
from comp.model.heads import plan_heads
from comp.model.losses import build_loss, item_count
from comp.model.text_model import VECTOR
from comp.stability.consistency import disagreement
from comp.stability.contrast import SupCon

__all__ = ["Objective"]

ROWS = "rows*"  # no task can be called so


class Objective:
    """The losses of `tasks` on the rows of `table`; class weights are counted on `training` rows (N,) alone.

    `num_masks`: of multi-sample dropout, whose losses are averaged. `rdrop`: weight of the disagreement of the two
    passes that outputs then hold; 0 = one pass. `supcon`: the contrastive term of the first task, None = without.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        table: Table,
        training: NDArray[np.int64],
        *,
        num_masks: int = 1,
        rdrop: float = 0.0,
        supcon: SupCon | None = None,
    ) -> None:
        self.num_masks, self.rdrop, self.supcon = num_masks, rdrop, supcon
        heads = plan_heads(tasks, table.classes)
        self.tasks = tasks
        self.targets, self.weights = table.targets, table.weights
        self.losses = {
            task.name: build_loss(
                task.loss,
                task.kind,
                heads[task.name].num_outputs,
                num_targets=table.targets[task.name].shape[1],
                lowest=float(table.classes[task.name][0]) if task.kind == "ordinal" else 0.0,
            ).fit(table.targets[task.name][training])
            for task in tasks
        }

    def count(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Return task name -> items of a window's rows, missing targets left out; and ROWS -> their total weight."""
        weights = None if self.weights is None else torch.from_numpy(self.weights[rows])
        counts = {
            task.name: float(item_count(torch.from_numpy(self.targets[task.name][rows]), weights, task.kind))
            for task in self.tasks
        }
        return {**counts, ROWS: float(len(rows) if weights is None else weights.sum())}

    def share(self, outputs: dict[str, torch.Tensor], batch: Batch, items: dict[str, float]) -> torch.Tensor:
        """Return a micro-batch's share of the window's loss, 0-d; `items` are those of the whole window."""
        total = torch.zeros((), device=batch.input_ids.device)
        for task in self.tasks:
            output, loss = outputs[task.name], self.losses[task.name]
            # A pooler's branches and R-Drop's passes have one output (B, K) each, and their losses add up.
            for view in output if output.ndim == 3 else output[None]:
                summed, _ = loss(view, batch.targets[task.name], batch.weights, batch.errors.get(task.name))
                # A window whose rows all weigh 0 has nothing to teach: its sum is 0, and so is its share.
                total = total + task.weight * summed / (items[task.name] or 1.0) / self.num_masks
            if self.rdrop:
                kind = "steps" if task.loss.name == "ordinal" else task.kind
                apart = disagreement(output, kind)
                apart = apart if batch.weights is None else apart * batch.weights
                total = total + task.weight * self.rdrop * apart.sum() / (items[ROWS] or 1.0)
        if self.supcon:
            targets = batch.targets[self.tasks[0].name]  # of the first task, which has no missing ones
            each = self.supcon(outputs[VECTOR], targets, passes=2 if self.rdrop else 1)
            each = each if batch.weights is None else each * batch.weights
            total = total + each.sum() / (items[ROWS] or 1.0)
        return total
