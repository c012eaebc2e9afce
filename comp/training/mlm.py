"""The objective of masked language modelling: cross-entropy of the chosen tokens, over all of a window; perplexity."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from comp.data.batches import Batch, sorted_batches
from comp.data.masking import FIXED, IGNORE, LABELS, Masker
from comp.data.tokens import Encoded
from comp.model.pretraining import LOGITS
from comp.runtime import Runtime
from comp.training.predict import batch_tokens_of

__all__ = ["MaskedWords"]

Rows = NDArray[np.int64]
ITEMS = "tokens*"


@dataclass
class MaskedWords:
    """Masked texts: those to train on, their masks drawn anew for each epoch, and held-out ones, whose masks stay."""

    training: Masker
    held_out: Masker
    score_name: str = "perplexity"
    epoch: int = 0

    @property
    def encoded(self) -> Encoded:
        return self.training.encoded

    def collate(self, rows: Rows) -> Batch:
        return self.training.collate(rows, self.epoch)

    def count(self, rows: Rows) -> dict[str, float]:
        """Return how many tokens of a window's rows are to be guessed."""
        return {ITEMS: float(self.training.count(rows, self.epoch))}

    def share(self, outputs: dict[str, torch.Tensor], batch: Batch, items: dict[str, float]) -> torch.Tensor:
        """Return a micro-batch's share of the window's mean cross-entropy, 0-d."""
        return summed(outputs, batch) / (items[ITEMS] or 1.0)

    @torch.inference_mode()
    def score(self, model: nn.Module, runtime: Runtime) -> float:
        """Return the perplexity of the held-out tokens to guess; draws no random number. NaN where it is not finite."""
        encoded = self.held_out.encoded
        was_training, total, count = model.training, 0.0, 0
        model.eval()
        for rows in sorted_batches(encoded.lengths, max_tokens=batch_tokens_of(runtime)):
            batch = self.held_out.collate(rows, FIXED).to(runtime.device)
            with runtime.autocast():
                outputs = model(batch)
            total += float(summed(outputs, batch))
            count += len(outputs[LOGITS])
        model.train(was_training)
        mean = total / max(count, 1)
        return math.exp(mean) if mean < 700 else float("nan")

    def others(self) -> dict[str, float]:
        return {}


def summed(outputs: dict[str, torch.Tensor], batch: Batch) -> torch.Tensor:
    """Return the cross-entropy of the chosen tokens (M, V), summed, in float32."""
    labels = batch.targets[LABELS]
    return F.cross_entropy(outputs[LOGITS].float(), labels[labels != IGNORE], reduction="sum")
