"""Poolers over the tokens of one layer. Padding never takes part, on whichever side it stands.

Shapes: B batch, T tokens, H hidden size, L blocks. `hidden` is a sequence of L + 1 entries (B, T, H), index 0 the
embeddings; only the entries in the pooler's `layers` need to exist. `mask` (B, T): nonzero = real token. `input_ids`
(B, T). The result is (B, out_features), float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from comp.model.backbone import Backbone

__all__ = [
    "CLSPooling",
    "Conv1dPooling",
    "GeMPooling",
    "Hidden",
    "MaxPooling",
    "MeanMaxCLSPooling",
    "MeanMaxPooling",
    "MeanPooling",
    "Pooler",
    "PoolerOutput",
    "TokenAttention",
    "WordWeights",
    "at_cls",
    "cls_index",
    "masked_max",
    "masked_mean",
    "masked_softmax",
]

Hidden: TypeAlias = Sequence[torch.Tensor | None]


class Pooler(nn.Module):
    """Base of all poolers. Options are keyword parameters of the class, documented in config_variants.py."""

    layers: tuple[int, ...] = (-1,)
    """Hidden states the pooler reads, as indices into L + 1 entries."""
    needs_fields = False
    """True when `forward` also takes `fields` (B, T): the text column of each token, -1 for special tokens."""
    num_branches = 1
    """Vectors per text. Above 1 the result is (num_branches, B, out_features): logits are averaged, losses summed."""
    half_precision = False
    """True when it is as heavy as blocks of the backbone and runs under autocast like them; it returns float32."""
    no_decay: tuple[str, ...] = ()
    """Own parameters that weight decay would distort (mixing weights, exponents)."""
    out_features: int

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.out_features = backbone.hidden_size

    def fit(self, documents: Iterable[NDArray[np.integer]]) -> None:
        """Learn statistics from the token ids of the training fold's texts; most poolers have none."""

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a pooler defines forward")  # the base class is never built


def layer(hidden: Hidden, index: int = -1) -> torch.Tensor:
    """Return one hidden state (B, T, H) as float32 (float64 stays): sums over tokens in half precision lose digits."""
    found = hidden[index]
    assert found is not None, f"hidden state {index} was not asked for in `layers`"
    return found if found.dtype == torch.float64 else found.float()


def cls_index(mask: torch.Tensor, *, cls_last: bool) -> torch.Tensor:
    """Return (B,) the place of the classification token: the first real token, or the last (XLNet, BART's decoder)."""
    real = mask.ne(0).long()
    if cls_last:
        return mask.shape[1] - 1 - real.flip(1).argmax(1)
    return real.argmax(1)


def at_cls(tokens: torch.Tensor, mask: torch.Tensor, *, cls_last: bool) -> torch.Tensor:
    """Return (B, H): the vectors of `tokens` (B, T, H) at the classification token."""
    return tokens[torch.arange(len(tokens), device=tokens.device), cls_index(mask, cls_last=cls_last)]


def masked_mean(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (B, H): the mean of `tokens` (B, T, H) over real ones, special tokens included; 0 without any."""
    weight = mask.ne(0).to(tokens.dtype)
    total = torch.einsum("bth,bt->bh", tokens.masked_fill(mask.eq(0)[..., None], 0), weight)
    return total / weight.sum(1, keepdim=True).clamp(min=1)


def masked_max(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return (B, H): the maximum of `tokens` (B, T, H) over real ones, special tokens included; 0 without any."""
    empty = mask.eq(0).all(1, keepdim=True)
    best = tokens.masked_fill(mask.eq(0)[..., None], torch.finfo(tokens.dtype).min).amax(1)
    return best.masked_fill(empty, 0)


def masked_softmax(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Softmax of `scores` (B, T) over real tokens, 0 elsewhere; a text without any gives zeros."""
    share = torch.softmax(scores.masked_fill(mask.eq(0), torch.finfo(scores.dtype).min), dim=1)
    return share.masked_fill(mask.eq(0), 0)


class MeanPooling(Pooler):
    """Mean over the real tokens of the last layer: Reimers & Gurevych 2019, arXiv:1908.10084."""

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return masked_mean(layer(hidden), mask)


class MaxPooling(Pooler):
    """Maximum over the real tokens of the last layer: Reimers & Gurevych 2019, arXiv:1908.10084."""

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return masked_max(layer(hidden), mask)


class MeanMaxPooling(Pooler):
    """Mean and maximum side by side, (B, 2H): rhtsingh, Kaggle CommonLit 2021."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.out_features = 2 * backbone.hidden_size

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        last = layer(hidden)
        return torch.cat([masked_mean(last, mask), masked_max(last, mask)], 1)


class MeanMaxCLSPooling(Pooler):
    """Mean, maximum and classification token side by side, (B, 3H): rhtsingh, Kaggle CommonLit 2021."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.out_features = 3 * backbone.hidden_size
        self.cls_last = backbone.cls_last

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        last = layer(hidden)
        first = at_cls(last, mask, cls_last=self.cls_last)
        return torch.cat([masked_mean(last, mask), masked_max(last, mask), first], 1)


class CLSPooling(Pooler):
    """The classification token of one layer; `layer` counts as in a Python list, -1 = last, 0 = embeddings."""

    def __init__(self, backbone: Backbone, *, layer: int = -1) -> None:
        super().__init__(backbone)
        states = backbone.num_states
        if not -states - 1 <= layer <= states:
            raise ValueError(
                f"pooler 'cls': layer is {layer}, but the backbone has {states} blocks; set model.pooler.layer to "
                f"{-states - 1} .. {states} (0 = embeddings, -1 = last)"
            )
        self.layers = (layer,)
        self.cls_last = backbone.cls_last

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return at_cls(layer(hidden, self.layers[0]), mask, cls_last=self.cls_last)


class PoolerOutput(Pooler):
    """tanh(W h_cls + b) with the pretrained W and b of the checkpoint, moved out of the backbone."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        trained: Any = backbone.take_pooler()
        # ALBERT's pooler is the bare linear layer; elsewhere it is a module around `dense`.
        self.dense: nn.Module = trained if isinstance(trained, nn.Linear) else trained.dense
        self.cls_last = backbone.cls_last

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.dense(at_cls(layer(hidden), mask, cls_last=self.cls_last)))


class Conv1dPooling(Pooler):
    """Two convolutions over the text and the maximum over its places, as if each text had been alone, unpadded.

    The original (rhtsingh, Kaggle CommonLit 2021) lets padding into both convolutions and the maximum. Here the real
    tokens are moved to the left, padding is zeroed before each convolution, and places beyond a text's own output
    length, n + 2p - k + 1 after each, never win. The second convolution keeps `channels` outputs for the head, where
    the original has one, the prediction itself.
    """

    def __init__(self, backbone: Backbone, *, channels: int = 256, kernel_size: int = 2) -> None:
        super().__init__(backbone)
        self.out_features = channels
        self.padding = kernel_size // 2
        self.grown = 2 * self.padding - kernel_size + 1  # places a text gains by one convolution
        self.first = nn.Conv1d(backbone.hidden_size, channels, kernel_size, padding=self.padding)
        self.second = nn.Conv1d(channels, channels, kernel_size, padding=self.padding)

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        last = layer(hidden)
        order = mask.eq(0).to(torch.int8).argsort(dim=1, stable=True)  # real tokens first, in their order
        tokens = last.masked_fill(mask.eq(0)[..., None], 0).gather(1, order[..., None].expand_as(last))
        length = mask.ne(0).sum(1)
        once = F.relu(self.first(tokens.transpose(1, 2)))
        twice = self.second(once.masked_fill(_beyond(once, length + self.grown), 0))
        return twice.masked_fill(_beyond(twice, length + 2 * self.grown), torch.finfo(twice.dtype).min).amax(2)


def _beyond(places: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Return (B, 1, T): True at places of (B, C, T) that a text of `length` (B,) does not have."""
    return (torch.arange(places.shape[2], device=places.device)[None] >= length[:, None])[:, None]


class TokenAttention(Pooler):
    """Additive attention over tokens: softmax over real tokens of v . tanh(W h + b), without the query of a decoder."""

    def __init__(self, backbone: Backbone, *, hidden_size: int = 512) -> None:
        super().__init__(backbone)
        self.project = nn.Linear(backbone.hidden_size, hidden_size)
        self.score = nn.Linear(hidden_size, 1, bias=False)  # a bias would cancel in the softmax

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        last = layer(hidden).masked_fill(mask.eq(0)[..., None], 0)
        share = masked_softmax(self.score(torch.tanh(self.project(last)))[..., 0], mask)
        return torch.einsum("bth,bt->bh", last, share)


class GeMPooling(Pooler):
    """Generalised mean (mean of max(h, eps)^p over real tokens)^(1/p) with a trained exponent p.

    p = 1 is the mean of the positive parts, p -> infinity their maximum. From image retrieval (arXiv 1711.02512),
    where features are positive; negative features of a text encoder count as `eps`.
    """

    no_decay = ("p",)

    def __init__(self, backbone: Backbone, *, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__(backbone)
        self.p = nn.Parameter(torch.tensor(float(p)))
        self.eps = eps

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return masked_mean(layer(hidden).clamp(min=self.eps) ** self.p, mask) ** (1 / self.p)


class WordWeights(Pooler):
    """Mean of the last layer weighted by the inverse document frequency of each token.

    idf = ln((1 + N) / (1 + df)) + 1 over tokenizer ids, N texts of which df hold the id, fitted on the training fold
    alone (`fit`) and kept in the checkpoint as a buffer. An id of no training text has df = 0. The term frequency
    comes from repetition. sentence-transformers' WordWeights trains its table by accident; this one is fixed.
    """

    idf: torch.Tensor

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.register_buffer("idf", torch.ones(backbone.vocab_size))

    def fit(self, documents: Iterable[NDArray[np.integer]]) -> None:
        frequency = np.zeros(len(self.idf), np.int64)
        count = 0
        for ids in documents:
            frequency[np.unique(ids)] += 1
            count += 1
        self.idf.copy_(torch.from_numpy(np.log((1 + count) / (1 + frequency)) + 1))

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        last = layer(hidden)
        weight = self.idf[input_ids].to(last.dtype) * mask.ne(0)
        total = torch.einsum("bth,bt->bh", last.masked_fill(mask.eq(0)[..., None], 0), weight)
        return total / weight.sum(1, keepdim=True).clamp(min=1)  # an idf is at least 1
