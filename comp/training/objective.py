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

__all__ = ["Objective"]


class Objective:
    """The losses of `tasks` on the rows of `table`; class weights are counted on `training` rows (N,) alone."""

    def __init__(self, tasks: Sequence[Task], table: Table, training: NDArray[np.int64]) -> None:
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
        """Return task name -> items of a window's rows, missing targets left out."""
        weights = None if self.weights is None else torch.from_numpy(self.weights[rows])
        return {
            task.name: float(item_count(torch.from_numpy(self.targets[task.name][rows]), weights, task.kind))
            for task in self.tasks
        }

    def share(self, outputs: dict[str, torch.Tensor], batch: Batch, items: dict[str, float]) -> torch.Tensor:
        """Return a micro-batch's share of the window's loss, 0-d; `items` are those of the whole window."""
        total = torch.zeros((), device=batch.input_ids.device)
        for task in self.tasks:
            output, loss = outputs[task.name], self.losses[task.name]
            # A pooler with branches has one output (B, K) per branch, and their losses add up.
            for branch in output if output.ndim == 3 else output[None]:
                summed, _ = loss(branch, batch.targets[task.name], batch.weights, batch.errors.get(task.name))
                # A window whose rows all weigh 0 has nothing to teach: its sum is 0, and so is its share.
                total = total + task.weight * summed / (items[task.name] or 1.0)
        return total
