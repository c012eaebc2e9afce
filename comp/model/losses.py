"""LOSSES: (preds (B, K), targets (B, K), weights (B,) or None) -> (sum, count): accumulation stays exact.

B rows, K outputs, C classes. `preds` are logits (classification) or values (regression, ordinal). `targets`
are float: (B, K), for kind multiclass (B, 1) class indices. The mean loss of a window of micro-batches is
the sum of their sums over the sum of their counts, whatever their sizes and weights: divide by the window's
count, never average means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from comp.catalog import Row, pick
from comp.config import Task
from comp.config_variants import Loss as LossConfig

__all__ = ["LOSSES", "Loss", "LossRow", "build_loss", "decode", "item_count", "num_outputs"]

ItemLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Smallest 1 - p that focal loss raises to gamma: the power's slope is infinite at 0 for gamma < 1.
TINY = 1e-7


@dataclass(frozen=True)
class LossRow(Row):
    """A row of LOSSES: `make(preds, targets, **options) -> losses`, one per item, not summed."""

    kinds: tuple[str, ...] = ()
    """Kinds of task it fits."""


def _class_index(targets: Tensor) -> Tensor:
    return targets[:, 0].long()


def mse(preds: Tensor, targets: Tensor) -> Tensor:
    """Return squared errors (B, K)."""
    return (preds - targets) ** 2


def smooth_l1(preds: Tensor, targets: Tensor, *, beta: float = 1.0) -> Tensor:
    """Return squared error / (2 beta) below an error of beta, |error| - beta / 2 above it, (B, K)."""
    return F.smooth_l1_loss(preds, targets, reduction="none", beta=beta)


def mae(preds: Tensor, targets: Tensor) -> Tensor:
    """Return absolute errors (B, K)."""
    return (preds - targets).abs()


def bce(preds: Tensor, targets: Tensor) -> Tensor:
    """Return binary cross-entropies (B, K) of logits; targets may be soft, 0..1."""
    return F.binary_cross_entropy_with_logits(preds, targets, reduction="none")


def cross_entropy(preds: Tensor, targets: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return cross-entropies (B, 1) of logits (B, C); `label_smoothing` goes evenly to all C classes."""
    index = _class_index(targets)
    return F.cross_entropy(preds, index, reduction="none", label_smoothing=label_smoothing)[:, None]


def focal(preds: Tensor, targets: Tensor, *, gamma: float = 2.0) -> Tensor:
    """Return (1 - p)^gamma x cross-entropy, p the probability given to the truth; no alpha, as in torch's CE.

    (B, C) logits with (B, 1) class indices: softmax form, (B, 1). Equal shapes: sigmoid form, (B, K), where
    a soft target t takes |t - sigmoid|^gamma (quality focal loss, arXiv 2006.04388), which is the same for
    t of 0 or 1.
    """
    if preds.shape != targets.shape:
        loss = cross_entropy(preds, targets)
        missed = -torch.expm1(-loss)
    else:
        loss = bce(preds, targets)
        missed = (targets - torch.sigmoid(preds)).abs()
    return missed.clamp_min(TINY) ** gamma * loss


NUMBERS = ("regression", "ordinal")
COLUMNS = ("binary", "multilabel")

LOSSES: dict[str, LossRow] = {
    "mse": LossRow(mse, "squared error", "torch", NUMBERS),
    "smooth_l1": LossRow(smooth_l1, "squared error near 0, absolute error beyond beta", "arXiv 1504.08083", NUMBERS),
    "mae": LossRow(mae, "absolute error", "torch", NUMBERS),
    "bce": LossRow(bce, "binary cross-entropy, soft labels too", "torch", COLUMNS),
    "cross_entropy": LossRow(cross_entropy, "cross-entropy with label smoothing", "arXiv 1512.00567", ("multiclass",)),
    "focal": LossRow(focal, "cross-entropy that fades on easy items", "arXiv 1708.02002", (*COLUMNS, "multiclass")),
}


@dataclass(frozen=True)
class Loss:
    """A loss of the catalogue, bound to its options and to the shape of one head."""

    items: ItemLoss
    """(preds, targets) -> losses (B, K), multiclass (B, 1)."""
    kind: str
    """Kind of the task."""
    num_outputs: int
    """Columns of `preds`: K, or C for multiclass."""

    def __call__(self, preds: Tensor, targets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the item losses and the item count, both 0-d float32.

        `preds` are raised to float32 first (float64 stays, so that gradcheck works). Raises ValueError when
        a shape does not fit; nothing is broadcast, since (B, 1) against (B,) would silently compare every
        row with every other.
        """
        rows = len(preds)
        columns = 1 if self.kind == "multiclass" else self.num_outputs
        for what, tensor, shape in (
            ("preds", preds, (rows, self.num_outputs)),
            ("targets", targets, (rows, columns)),
            ("weights", weights, (rows,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{self.kind} loss: {what} must have shape {shape}, got {tuple(tensor.shape)}")
        preds = preds if preds.dtype == torch.float64 else preds.float()
        items = self.items(preds, targets.to(preds.dtype))
        if weights is not None:
            items = items * weights.to(items.dtype)[:, None]
        return items.sum(), item_count(targets, weights, self.kind)


def item_count(targets: Tensor, weights: Tensor | None, kind: str) -> Tensor:
    """Return what a loss's sum is divided by: the sum of the weights (rows without) x K; for multiclass x 1.

    0-d float32 on the targets' device. Known before the forward pass, so the whole window's count is too.
    """
    assert targets.ndim == 2, targets.shape
    columns = 1 if kind == "multiclass" else targets.shape[1]
    if weights is None:
        return torch.tensor(float(len(targets) * columns), dtype=torch.float32, device=targets.device)
    return weights.detach().to(torch.float32).sum() * columns


def num_outputs(task: Task, num_classes: int | None) -> int:
    """Return the width of a task's head: its number of classes for multiclass, else of target columns."""
    if task.kind != "multiclass":
        return len(task.targets)
    if num_classes is None or num_classes < 2:
        raise ValueError(f"task '{task.name}': multiclass needs at least 2 classes, got {num_classes}")
    return num_classes


def build_loss(loss: LossConfig, kind: str, num_outputs: int) -> Loss:
    """Return the loss of a head with `num_outputs` columns. Raises ValueError when it does not fit."""
    row = pick(LOSSES, loss.name, "loss")
    if kind not in row.kinds:
        raise ValueError(f"loss '{loss.name}' does not fit kind '{kind}'; it fits {', '.join(row.kinds)}")
    return Loss(partial(row.make, **loss.model_dump(exclude={"name"})), kind, num_outputs)


def decode(logits: Tensor, kind: str) -> Tensor:
    """Return float32 predictions in the user's space: sigmoid (binary, multilabel), softmax (multiclass).

    Regression and ordinal values pass unchanged. Shape (B, K) or (B, C), as given.
    """
    logits = logits.float()
    if kind in COLUMNS:
        return logits.sigmoid()
    return logits.softmax(dim=1) if kind == "multiclass" else logits
