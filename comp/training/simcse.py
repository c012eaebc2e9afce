"""The objective of unsupervised SimCSE: two passes of a text, with other dropout, find each other in the batch.

Gao et al. 2021, arXiv:2104.08821: for each row of the first pass the cross-entropy of its own row of the second among
all of them, by cosine / temperature 0.05; one direction, as published. Alignment and uniformity: Wang & Isola 2020,
arXiv:2005.10242.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from comp.data.batches import Batch, collate
from comp.data.tokens import Encoded
from comp.model.text_model import VECTOR
from comp.runtime import Runtime, random_state, seed_everything, set_random_state

__all__ = ["TwinPasses", "alignment", "contrast", "uniformity"]

Rows = NDArray[np.int64]
ITEMS = "rows*"
MOST = 4096  # rows whose pairs are looked at: 8 million


def contrast(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return (B,) the loss of each row of two passes (B, H)."""
    cosines = F.normalize(first.float(), dim=-1) @ F.normalize(second.float(), dim=-1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(first), device=first.device), reduction="none")


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean squared distance of two passes (N, H) on the unit sphere; lower is better."""
    return float((F.normalize(first, dim=-1) - F.normalize(second, dim=-1)).square().sum(-1).mean())


def uniformity(vectors: torch.Tensor) -> float:
    """Return log of the mean of exp(-2 d^2) over the pairs of (N, H) on the unit sphere; lower is better.

    Of more than 4,096 rows the first are taken.
    """
    return float(torch.pdist(F.normalize(vectors[:MOST], dim=-1)).square().mul(-2).exp().mean().log())


@dataclass
class TwinPasses:
    """Texts to train on, and held-out ones, scored by the same loss in batches that stay, with dropout that stays."""

    encoded: Encoded
    held_out: Encoded
    temperature: float
    batch_size: int
    seed: int
    score_name: str = "contrastive loss"
    epoch: int = 0
    latest: dict[str, float] = field(default_factory=dict)

    def collate(self, rows: Rows) -> Batch:
        return collate(self.encoded, rows)

    def count(self, rows: Rows) -> dict[str, float]:
        """Return the number of a window's rows."""
        return {ITEMS: float(len(rows))}

    def share(self, outputs: dict[str, torch.Tensor], batch: Batch, items: dict[str, float]) -> torch.Tensor:
        """Return the mean loss of a window, which is one micro-batch; VECTOR (2, B, H) holds its two passes."""
        first, second = outputs[VECTOR]
        return contrast(first, second, self.temperature).sum() / items[ITEMS]

    @torch.inference_mode()
    def score(self, model: nn.Module, runtime: Runtime) -> float:
        """Return the mean loss of the held-out rows; the generators are put back to where they were."""
        state = random_state()
        was_training = model.training
        model.train()  # the two passes differ by dropout
        seed_everything(self.seed)
        order = np.random.default_rng([self.seed, 2]).permutation(len(self.held_out))
        pairs, losses = [], []
        for rows in np.array_split(order, max(1, len(order) // self.batch_size)):
            batch = collate(self.held_out, rows).to(runtime.device)
            with runtime.autocast():
                pair = torch.stack([model(batch)[VECTOR], model(batch)[VECTOR]]).float()
            losses.append(contrast(pair[0], pair[1], self.temperature))
            pairs.append(pair)
        model.train(was_training)
        set_random_state(state)
        first, second = torch.cat(pairs, dim=1)
        self.latest = {"valid/alignment": alignment(first, second), "valid/uniformity": uniformity(first)}
        return float(torch.cat(losses).mean())

    def others(self) -> dict[str, float]:
        return self.latest
