"""POOLERS: from hidden states to one vector per text. Padding never takes part.

Shapes: B batch, T tokens, H hidden size, L blocks. `hidden` is a sequence of L + 1 entries (B, T, H), index 0 the
embeddings; only the entries in the pooler's `layers` need to exist. `mask` (B, T): nonzero = real token. `input_ids`
(B, T). The result is (B, out_features), float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from comp.catalog import Row, pick
from comp.model.backbone import Backbone

__all__ = ["POOLERS", "Pooler", "build_pooler", "cls_index"]

Hidden = Sequence[torch.Tensor | None]


class Pooler(nn.Module):
    """Base of all poolers."""

    layers: tuple[int, ...] = (-1,)
    """Hidden states the pooler reads, as indices into L + 1 entries."""
    needs_trained_pooler = False
    """True when it uses the checkpoint's own pooler."""
    out_features: int

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.out_features = backbone.hidden_size

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a pooler defines forward")  # the base class is never built


def _last(hidden: Hidden) -> torch.Tensor:
    last = hidden[-1]
    assert last is not None
    return last.float()  # sums over tokens in half precision lose digits


def cls_index(mask: torch.Tensor, *, cls_last: bool) -> torch.Tensor:
    """Return (B,) the place of the classification token: the first real token, or the last (XLNet)."""
    real = mask.ne(0).long()
    if cls_last:
        return mask.shape[1] - 1 - real.flip(1).argmax(1)
    return real.argmax(1)


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over real tokens, special tokens included; a text without any gives 0."""
    weight = mask.ne(0).to(tokens.dtype)
    total = torch.einsum("bth,bt->bh", tokens.masked_fill(mask.eq(0)[..., None], 0), weight)
    return total / weight.sum(1, keepdim=True).clamp(min=1)


def masked_max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Maximum over real tokens, special tokens included; a text without any gives 0."""
    empty = mask.eq(0).all(1, keepdim=True)
    best = tokens.masked_fill(mask.eq(0)[..., None], torch.finfo(tokens.dtype).min).amax(1)
    return best.masked_fill(empty, 0)


class MeanPooling(Pooler):
    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return masked_mean(_last(hidden), mask)


class MaxPooling(Pooler):
    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return masked_max(_last(hidden), mask)


class MeanMaxPooling(Pooler):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.out_features = 2 * backbone.hidden_size

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        last = _last(hidden)
        return torch.cat([masked_mean(last, mask), masked_max(last, mask)], 1)


class CLSPooling(Pooler):
    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.cls_last = backbone.cls_last

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        last = _last(hidden)
        return last[torch.arange(len(last), device=last.device), cls_index(mask, cls_last=self.cls_last)]


class PoolerOutput(Pooler):
    """tanh(W h_cls + b) with the pretrained W and b of the checkpoint, moved out of the backbone."""

    needs_trained_pooler = True

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        trained: Any = backbone.take_pooler()
        # ALBERT's pooler is the bare linear layer; elsewhere it is a module around `dense`.
        self.dense: nn.Module = trained if isinstance(trained, nn.Linear) else trained.dense
        self.cls_last = backbone.cls_last

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        last = _last(hidden)
        first = last[torch.arange(len(last), device=last.device), cls_index(mask, cls_last=self.cls_last)]
        return torch.tanh(self.dense(first))


BERT = "Devlin et al. 2019, arXiv:1810.04805"
SBERT = "Reimers & Gurevych 2019, arXiv:1908.10084"

POOLERS: dict[str, Row] = {
    "mean": Row(MeanPooling, "mean of the last layer over real tokens", SBERT),
    "max": Row(MaxPooling, "maximum of the last layer over real tokens", SBERT),
    "mean_max": Row(MeanMaxPooling, "mean and max, concatenated", "rhtsingh, Kaggle CommonLit 2021"),
    "cls": Row(CLSPooling, "last layer at the classification token", BERT),
    "pooler_output": Row(PoolerOutput, "the checkpoint's own trained pooler on the classification token", BERT),
}


def build_pooler(name: str, backbone: Backbone) -> Pooler:
    """Build the pooler called `name` on `backbone`."""
    pooler: Pooler = pick(POOLERS, name, "pooler").make(backbone)
    return pooler
