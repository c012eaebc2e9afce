"""Supervised contrastive term: vectors of texts with like targets draw together, those of others apart.

Khosla et al. 2020, arXiv:2004.11362, equation 2, beside the task's own loss as in Gunel et al. 2020, arXiv:2011.01403.
For anchor i over all other texts a of the batch, with z the pooled vectors scaled to length 1:

    loss_i = - sum_a w_ia log softmax_a(z_i . z_a / temperature) / sum_a w_ia

For classes w is 1 for the same class and 0 otherwise. Other targets have no classes; there w is how like they are, as
in y-aware InfoNCE (Dufumier et al. 2021, arXiv:2106.08808), so that nothing is cut into bins.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

__all__ = ["SupCon"]


class SupCon:
    """The term for one task, whose `kind` says when two targets are alike.

    binary, multiclass: the probability of the same class, 0 or 1 for hard labels. multilabel: the labels both have
    over those either has. regression, ordinal: exp(-d / (2 bandwidth^2)), d the mean over columns of the squared
    difference in standard deviations of the training rows, `targets` (N, K).
    """

    def __init__(
        self, kind: str, targets: NDArray[np.floating], *, weight: float, temperature: float, bandwidth: float
    ) -> None:
        self.kind, self.weight, self.temperature, self.bandwidth = kind, weight, temperature, bandwidth
        std = torch.from_numpy(targets.astype(np.float64).std(axis=0)).float()
        self.std = torch.where(std > 0, std, torch.ones_like(std))

    def likeness(self, targets: torch.Tensor) -> torch.Tensor:
        """Return (B, B) in 0..1: how like the targets (B, K) are, two by two."""
        if self.kind == "multiclass":
            # Class indices (B, 1), or probabilities (B, C).
            return targets @ targets.T if targets.shape[1] > 1 else (targets == targets.T).float()
        if self.kind == "binary":
            return targets @ targets.T + (1 - targets) @ (1 - targets).T
        one, other = targets[:, None], targets[None]
        if self.kind == "multilabel":
            both, either = torch.minimum(one, other).sum(-1), torch.maximum(one, other).sum(-1)
            return torch.where(either > 0, both / either.clamp(min=1e-12), 1.0)  # two rows without labels are alike
        apart = ((one - other) / self.std.to(targets.device)).square().mean(-1)
        return torch.exp(-apart / (2 * self.bandwidth**2))

    def __call__(self, vectors: torch.Tensor, targets: torch.Tensor, *, passes: int = 1) -> torch.Tensor:
        """Return (B,) the loss of each row as the anchor, times `weight`.

        `vectors`: (B, F), or (passes x n, B, F) where the pooler has n branches. The passes of R-Drop are more texts
        with the same targets; branches are compared each with itself, and their mean is returned. An anchor with
        nothing like it in the batch counts as 0, and so does a batch of one.
        """
        views = vectors if vectors.ndim == 3 else vectors[None]
        rows, features = views.shape[1:]
        texts = views.float().unflatten(0, (passes, -1)).transpose(0, 1).reshape(-1, passes * rows, features)
        z = F.normalize(texts, dim=-1)
        own = torch.eye(passes * rows, dtype=torch.bool, device=z.device)
        scores = z @ z.transpose(1, 2) / self.temperature
        # The lowest number, not -inf: a batch of one has nothing else, and its gradient must be 0, not NaN.
        scores = scores.masked_fill(own, torch.finfo(scores.dtype).min)
        chosen = F.log_softmax(scores, dim=-1).masked_fill(own, 0.0)
        like = self.likeness(targets.float()).repeat(passes, passes).masked_fill(own, 0.0)
        total = like.sum(-1)
        known = total > 0
        loss = -(like * chosen).sum(-1) / torch.where(known, total, 1.0) * known
        return self.weight * loss.mean(0).unflatten(0, (passes, rows)).mean(0)
