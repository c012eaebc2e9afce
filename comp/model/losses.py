"""LOSSES: (preds (B, K), targets (B, K), weights (B,) or None) -> (sum, count): accumulation stays exact.

B rows, K outputs, C classes. `preds` are logits (classification) or values (regression, ordinal). `targets` are float:
(B, K), for kind multiclass (B, 1) class indices or (B, C) probabilities; NaN = missing, which neither the sum nor the
count sees. The mean loss of a window of micro-batches is the sum of their sums over the sum of their counts, whatever
their sizes and weights: divide by the window's count, never average means. Losses of a whole batch (rmse, pearson,
pairwise_rank) are no sums: theirs is value x count, and one micro-batch is the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from comp.catalog import Row, pick
from comp.config import Task
from comp.config_variants import Loss as LossConfig

__all__ = ["LOSSES", "Decoder", "Loss", "LossRow", "build_decoder", "build_loss", "decode", "item_count", "num_outputs"]

ItemLoss: TypeAlias = Callable[..., Tensor]
Decoder: TypeAlias = Callable[[Tensor], Tensor]

# Smallest 1 - p that focal loss raises to gamma: the power's slope is infinite at 0 for gamma < 1.
TINY = 1e-7
FLAT = 1e-12  # variance below which a column has no correlation; under a root, where its slope would be infinite


@dataclass(frozen=True)
class LossRow(Row):
    """A row of LOSSES: `make(preds, targets, **options) -> losses`, one per item, not summed.

    With `whole`: `make(preds, targets, share, **options) -> value`, share (B, K) the weight of each cell, 0 = missing.
    """

    kinds: tuple[str, ...] = ()
    """Kinds of task it fits."""
    whole: bool = False
    """True for a loss of all rows of a batch together."""


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
    """Return cross-entropies (B, 1) of logits (B, C); `label_smoothing` goes evenly to all C classes.

    `targets`: (B, 1) class indices, or (B, C) probabilities.
    """
    soft = targets.shape == preds.shape
    index = targets if soft else _class_index(targets)
    return F.cross_entropy(preds, index, reduction="none", label_smoothing=label_smoothing)[:, None]


def focal(preds: Tensor, targets: Tensor, *, gamma: float = 2.0, softmax: bool = False) -> Tensor:
    """Return (1 - p)^gamma x cross-entropy, p the probability given to the truth; no alpha, as in torch's CE.

    `softmax` with (B, C) logits: (B, 1). (B, 1) class indices, or (B, C) probabilities, whose classes add up, each
    with |t - p|^gamma. Without: sigmoid form of equal shapes, (B, K), where a soft target t takes |t - sigmoid|^gamma
    (quality focal loss, arXiv 2006.04388), which is the same for t of 0 or 1.
    """
    if not softmax:
        loss = bce(preds, targets)
        missed = (targets - torch.sigmoid(preds)).abs()
    elif preds.shape == targets.shape:
        loss = -targets * F.log_softmax(preds, dim=1)
        missed = (targets - preds.softmax(1)).abs()
        return (missed.clamp_min(TINY) ** gamma * loss).sum(1, keepdim=True)
    else:
        loss = cross_entropy(preds, targets)
        missed = -torch.expm1(-loss)
    return missed.clamp_min(TINY) ** gamma * loss


def gaussian_nll(preds: Tensor, targets: Tensor, errors: Tensor, *, floor: float = 0.1) -> Tensor:
    """Return (B, 1) -log N(target; pred, error^2) without its constant; `errors` (B,) are at least `floor`."""
    known = errors.clamp(min=floor)[:, None]
    return known.log() + 0.5 * ((targets - preds) / known) ** 2


def ordinal(preds: Tensor, targets: Tensor, *, lowest: float) -> Tensor:
    """Return (B, 1) CORAL losses: over K - 1 logits (B, K - 1) of "above grade k", cross-entropies added up."""
    steps = torch.arange(preds.shape[1], device=preds.device, dtype=preds.dtype)
    above = (targets - lowest > steps).to(preds.dtype)
    return bce(preds, above).sum(1, keepdim=True)


def rmse(preds: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    """Return the root of the mean squared error over all cells."""
    return ((share * (preds - targets) ** 2).sum() / share.sum().clamp(min=FLAT) + FLAT).sqrt()


def pearson(preds: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    """Return 1 - correlation, the mean over the columns that vary; 0 when none does."""
    total = share.sum(0).clamp(min=FLAT)

    def centred(values: Tensor) -> Tensor:
        return values - (share * values).sum(0) / total

    p, t = centred(preds), centred(targets)
    spread_p, spread_t = (share * p**2).sum(0) / total, (share * t**2).sum(0) / total
    # Where all predictions are alike the slope would be infinite; the floor bounds it at 1e4 targets' deviations.
    floor = FLAT**2 + 1e-8 * spread_t**2
    correlation = (share * p * t).sum(0) / total / (spread_p * spread_t + floor).sqrt()
    varies = spread_t > FLAT
    return ((1 - correlation) * varies).sum() / varies.sum().clamp(min=1)


def pairwise_rank(preds: Tensor, targets: Tensor, share: Tensor, *, sigma: float = 1.0) -> Tensor:
    """Return the mean of softplus(-sigma (s_i - s_j)) over pairs of rows with y_i > y_j, of all columns; 0 without."""
    pair = share[:, None] * share[None] * (targets[:, None] > targets[None])
    losses = F.softplus(-sigma * (preds[:, None] - preds[None]))
    return (pair * losses).sum() / pair.sum().clamp(min=FLAT)


NUMBERS = ("regression", "ordinal")
COLUMNS = ("binary", "multilabel")

LOSSES: dict[str, LossRow] = {
    "mse": LossRow(mse, "squared error", "torch", NUMBERS),
    "smooth_l1": LossRow(smooth_l1, "squared error near 0, absolute error beyond beta", "arXiv 1504.08083", NUMBERS),
    "mae": LossRow(mae, "absolute error", "torch", NUMBERS),
    "rmse": LossRow(rmse, "root of the batch's mean squared error", "Kaggle CommonLit 2021", NUMBERS, whole=True),
    "gaussian_nll": LossRow(gaussian_nll, "likelihood under each row's own standard error", "torch", ("regression",)),
    "pearson": LossRow(pearson, "1 - correlation within the batch", "Kaggle US Patents 2022", NUMBERS, whole=True),
    "pairwise_rank": LossRow(
        pairwise_rank, "order of the pairs within the batch (RankNet)", "Burges et al. 2005, ICML", NUMBERS, whole=True
    ),
    "ordinal": LossRow(ordinal, "one logit per step between grades (CORAL)", "arXiv 1901.07884", ("ordinal",)),
    "bce": LossRow(bce, "binary cross-entropy, soft labels too", "torch", COLUMNS),
    "cross_entropy": LossRow(
        cross_entropy, "cross-entropy with label smoothing, soft labels too", "arXiv 1512.00567", ("multiclass",)
    ),
    "focal": LossRow(focal, "cross-entropy that fades on easy items", "arXiv 1708.02002", (*COLUMNS, "multiclass")),
}


@dataclass(frozen=True)
class Loss:
    """A loss of the catalogue, bound to its options and to the shape of one head."""

    items: ItemLoss
    """(preds, targets[, errors]) -> losses (B, K), multiclass and ordinal (B, 1); `whole`: (preds, targets, share)."""
    kind: str
    """Kind of the task."""
    num_outputs: int
    """Columns of `preds`: K, C for multiclass, K - 1 steps for CORAL."""
    num_targets: int
    """Columns of `targets`: K, 1 for class indices and grades."""
    whole: bool = False
    needs_errors: bool = False
    balanced: bool = False
    """Whether `fit` counts classes."""
    class_weights: Tensor | None = None
    """(C,) weight of each class, or (2, K) weights of 0 and 1 in each column; None = all 1."""

    def fit(self, targets: NDArray[np.floating]) -> Loss:
        """Return the loss with class weights counted on `targets` (N, K), the training rows of the fold.

        rows / (classes x rows of the class), as scikit-learn's class_weight="balanced"; soft labels count by their
        mass, missing ones not at all. A class without rows weighs 0: no row asks for it.
        """
        if not self.balanced:
            return self
        present = targets[~np.isnan(targets).any(axis=1)].astype(np.float64)
        if self.kind == "multiclass":
            one_hot = present if self.num_targets > 1 else present == np.arange(self.num_outputs)
            mass = one_hot.sum(axis=0)[:, None]
        else:
            filled = np.isfinite(targets)
            ones = np.where(filled, targets, 0).sum(axis=0)
            mass = np.stack([filled.sum(axis=0) - ones, ones])
        classes = (mass > 0).sum(axis=0)
        weights = np.divide(mass.sum(axis=0), classes * mass, out=np.zeros_like(mass, np.float64), where=mass > 0)
        flat = weights[:, 0] if self.kind == "multiclass" else weights
        return replace(self, class_weights=torch.from_numpy(flat.astype(np.float32)))

    def __call__(
        self, preds: Tensor, targets: Tensor, weights: Tensor | None = None, errors: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the item losses and the item count, both 0-d float32.

        `weights` (B,) are of the rows; `errors` (B,) standard errors, for the loss that needs them. `preds` are raised
        to float32 first (float64 stays, so that gradcheck works). Raises ValueError when a shape does not fit; nothing
        is broadcast, since (B, 1) against (B,) would silently compare every row with every other.
        """
        rows = len(preds)
        for what, tensor, shape in (
            ("preds", preds, (rows, self.num_outputs)),
            ("targets", targets, (rows, self.num_targets)),
            ("weights", weights, (rows,)),
            ("errors", errors, (rows,)),
        ):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{self.kind} loss: {what} must have shape {shape}, got {tuple(tensor.shape)}")
        preds = preds if preds.dtype == torch.float64 else preds.float()
        targets = targets.to(preds.dtype)
        count = item_count(targets, weights, self.kind)
        present = _present(targets, self.kind)
        known = torch.where(targets.isnan(), torch.zeros_like(targets), targets)
        share = present.to(preds.dtype) if weights is None else present * weights.to(preds.dtype)[:, None]
        if self.whole:
            if not bool(count > 0):
                return (preds * 0).sum(), count
            return self.items(preds, known, share) * count.to(preds.dtype), count
        items = self.items(
            preds, known, *([errors.to(preds.dtype)] if self.needs_errors and errors is not None else [])
        )
        if self.class_weights is not None:
            items = items * self._class_weight(known)
        return (items * share).sum(), count

    def _class_weight(self, targets: Tensor) -> Tensor:
        assert self.class_weights is not None
        weights = self.class_weights.to(targets)
        if self.kind != "multiclass":
            return (1 - targets) * weights[0] + targets * weights[1]
        return (targets @ weights)[:, None] if self.num_targets > 1 else weights[_class_index(targets)][:, None]


def _present(targets: Tensor, kind: str) -> Tensor:
    """Return which items have a target: (B, K) bool; (B, 1) for multiclass, where a row counts as one item."""
    present = ~targets.isnan()
    return present.all(1, keepdim=True) if kind == "multiclass" else present


def item_count(targets: Tensor, weights: Tensor | None, kind: str) -> Tensor:
    """Return what a loss's sum is divided by: the sum over items with a target of their row's weight (1 without).

    An item is a cell of `targets` (B, K), a row for multiclass. 0-d float32 on the targets' device. Known before the
    forward pass, so the whole window's count is too.
    """
    assert targets.ndim == 2, targets.shape
    present = _present(targets, kind).to(torch.float32)
    return (present if weights is None else present * weights.detach().to(torch.float32)[:, None]).sum()


def num_outputs(task: Task, num_classes: int | None) -> int:
    """Return the width of a task's head: its classes for multiclass, steps between grades for the ordinal loss, else
    its target columns. `num_classes`: classes or grades of the training table; ValueError where those are needed and
    fewer than 2."""
    if task.kind == "multiclass" and len(task.targets) > 1:
        return len(task.targets)
    if task.kind != "multiclass" and task.loss.name != "ordinal":
        return len(task.targets)
    if num_classes is None or num_classes < 2:
        raise ValueError(f"task '{task.name}': {task.kind} needs at least 2 classes, got {num_classes}")
    return num_classes if task.kind == "multiclass" else num_classes - 1


def build_loss(
    loss: LossConfig, kind: str, num_outputs: int, *, num_targets: int | None = None, lowest: float = 0.0
) -> Loss:
    """Return the loss of a head with `num_outputs` columns. Raises ValueError when it does not fit.

    `num_targets`: columns of the targets, None = 1 for class indices and CORAL, else `num_outputs`. `lowest`: lowest
    grade, for CORAL.
    """
    row = pick(LOSSES, loss.name, "loss")
    if kind not in row.kinds:
        raise ValueError(f"loss '{loss.name}' does not fit kind '{kind}'; it fits {', '.join(row.kinds)}")
    options: dict[str, Any] = loss.model_dump(exclude={"name", "class_weights", "standard_error", "decode"})
    if loss.name == "ordinal":
        options["lowest"] = lowest
    if loss.name == "focal":
        options["softmax"] = kind == "multiclass"
    if num_targets is None:
        num_targets = 1 if kind == "multiclass" or loss.name == "ordinal" else num_outputs
    return Loss(
        partial(row.make, **options),
        kind,
        num_outputs,
        num_targets,
        whole=row.whole,
        needs_errors=loss.name == "gaussian_nll",
        balanced=getattr(loss, "class_weights", None) == "balanced",
    )


def decode(logits: Tensor, kind: str) -> Tensor:
    """Return float32 predictions in the user's space: sigmoid (binary, multilabel), softmax (multiclass).

    Regression and ordinal values pass unchanged. Shape (B, K) or (B, C), as given.
    """
    logits = logits.float()
    if kind in COLUMNS:
        return logits.sigmoid()
    return logits.softmax(dim=1) if kind == "multiclass" else logits


def build_decoder(task: Task, classes: Sequence[str]) -> Decoder:
    """Return logits (B, K) -> predictions in the user's space, float32: `decode`, or grades (B, 1) from CORAL's steps.

    `classes`: the task's classes or grades, lowest first.
    """
    if task.loss.name != "ordinal":
        return partial(decode, kind=task.kind)
    lowest, by_rank = float(classes[0]), task.loss.decode == "rank"

    def grades(logits: Tensor) -> Tensor:
        above = logits.float().sigmoid()
        return lowest + ((above > 0.5).float() if by_rank else above).sum(1, keepdim=True)

    return grades
