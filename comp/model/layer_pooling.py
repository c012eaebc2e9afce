"""Poolers over layers: what the blocks below the last one know.

Shapes as in token_pooling.py. The embeddings (index 0) are left out of every mixture: they are not normalised in
ELECTRA, ALBERT and XLNet. In models that normalise before each block (ModernBERT), the backbone hands out states that
have been through the final norm.
"""

from __future__ import annotations

import torch
from torch import nn

from comp.model.backbone import Backbone
from comp.model.token_pooling import Hidden, Pooler, at_cls, layer, masked_mean

__all__ = [
    "AttentionLayers",
    "ConcatLayers",
    "HierarchicalSum",
    "ParallelSum",
    "RecurrentLayers",
    "ScalarMix",
    "WeightedLayers",
    "first_layer",
    "last_layers",
]


def last_layers(backbone: Backbone, count: int, name: str) -> tuple[int, ...]:
    """Return the indices of the last `count` states, top first. ValueError when the backbone has fewer blocks."""
    if count > backbone.num_states:
        raise ValueError(
            f"pooler '{name}': num_layers is {count}, but the backbone has {backbone.num_states} blocks; set "
            f"model.pooler.num_layers to at most {backbone.num_states}"
        )
    return tuple(-1 - place for place in range(count))


def first_layer(backbone: Backbone, layer_start: int | None, name: str, *, least: int) -> tuple[int, ...]:
    """Return the indices layer_start..L, bottom first; None starts a third of the way up (4 of 12 blocks).

    Raises ValueError when fewer than `least` states are left.
    """
    states = backbone.num_states
    start = max(1, states // 3) if layer_start is None else layer_start
    if states - start + 1 < least:
        if least > states:
            raise ValueError(
                f"pooler '{name}' needs {least} blocks, but the backbone has {states}; use pooler 'mean' or 'cls'"
            )
        raise ValueError(
            f"pooler '{name}': layer_start is {start}, but the backbone has {states} blocks and {least} are needed; "
            f"set model.pooler.layer_start to at most {states - least + 1}"
        )
    return tuple(range(start, states + 1))


def cls_of_layers(hidden: Hidden, mask: torch.Tensor, layers: tuple[int, ...], *, cls_last: bool) -> torch.Tensor:
    """Return (B, n, H): the classification token in each of `layers`, in their order."""
    return torch.stack([at_cls(layer(hidden, index), mask, cls_last=cls_last) for index in layers], 1)


class ConcatLayers(Pooler):
    """The classification token of the last n layers side by side, the last layer first."""

    def __init__(self, backbone: Backbone, *, num_layers: int = 4) -> None:
        super().__init__(backbone)
        self.layers = last_layers(backbone, num_layers, "concat_layers")
        self.out_features = num_layers * backbone.hidden_size
        self.cls_last = backbone.cls_last

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        return cls_of_layers(hidden, mask, self.layers, cls_last=self.cls_last).flatten(1)


class _Mixture(Pooler):
    """sum_l share_l h_l over layers layer_start..L, then the mean over tokens or the classification token."""

    name: str
    no_decay: tuple[str, ...] = (
        "weight",
    )  # decay would pull the mixture towards an arbitrary point, and shrink what is scale-free

    def __init__(self, backbone: Backbone, *, layer_start: int | None = None, tokens: str = "mean") -> None:
        super().__init__(backbone)
        self.layers = first_layer(backbone, layer_start, self.name, least=1)
        self.tokens = tokens
        self.cls_last = backbone.cls_last

    def shares(self) -> torch.Tensor:
        """Return (n,) the weights of the layers; they sum to 1."""
        raise AssertionError("a mixture defines shares")

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        # Pooling over tokens is linear, so it may come before the mixture, where it is n times cheaper.
        if self.tokens == "cls":
            pooled = cls_of_layers(hidden, mask, self.layers, cls_last=self.cls_last)
        else:
            pooled = torch.stack([masked_mean(layer(hidden, index), mask) for index in self.layers], 1)
        return torch.einsum("bnh,n->bh", pooled, self.shares().to(pooled.dtype))


class WeightedLayers(_Mixture):
    """w_l / sum(w), w trained from ones: sentence-transformers' WeightedLayerPooling. The sum can come near 0."""

    name = "weighted_layers"

    def __init__(self, backbone: Backbone, *, layer_start: int | None = None, tokens: str = "mean") -> None:
        super().__init__(backbone, layer_start=layer_start, tokens=tokens)
        self.weight = nn.Parameter(torch.ones(len(self.layers)))

    def shares(self) -> torch.Tensor:
        return self.weight / self.weight.sum()


class ScalarMix(_Mixture):
    """softmax(w), w trained from zeros, times a trained scale: ELMo's mixture, safe at any w."""

    name = "scalar_mix"
    no_decay = ("weight", "scale")

    def __init__(self, backbone: Backbone, *, layer_start: int | None = None, tokens: str = "mean") -> None:
        super().__init__(backbone, layer_start=layer_start, tokens=tokens)
        self.weight = nn.Parameter(torch.zeros(len(self.layers)))
        self.scale = nn.Parameter(torch.ones(()))

    def shares(self) -> torch.Tensor:
        return self.scale * torch.softmax(self.weight, 0)


class RecurrentLayers(Pooler):
    """The last step of an LSTM or GRU that reads the classification token from block 1 up to block L.

    The published code (rhtsingh, Kaggle CommonLit 2021) reinterprets (B, H, L) as (B, L, H), which mixes all layers
    into each step; here step l is layer l.
    """

    def __init__(self, backbone: Backbone, *, cell: type[nn.LSTM] | type[nn.GRU], hidden_size: int = 256) -> None:
        super().__init__(backbone)
        self.layers = tuple(range(1, backbone.num_states + 1))
        self.out_features = hidden_size
        self.cls_last = backbone.cls_last
        self.cell = cell(backbone.hidden_size, hidden_size, batch_first=True)

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        steps, _ = self.cell(cls_of_layers(hidden, mask, self.layers, cls_last=self.cls_last))
        last: torch.Tensor = steps[:, -1]
        return last


class AttentionLayers(Pooler):
    """W^T sum_l softmax_l(q . h_l) h_l over the classification token of blocks 1..L, with a trained query q.

    In the published code q and W are no parameters: they never train, move or get saved.
    """

    no_decay = ("query",)

    def __init__(self, backbone: Backbone, *, hidden_size: int = 128) -> None:
        super().__init__(backbone)
        self.layers = tuple(range(1, backbone.num_states + 1))
        self.out_features = hidden_size
        self.cls_last = backbone.cls_last
        self.query = nn.Parameter(0.1 * torch.randn(backbone.hidden_size))
        self.project = nn.Linear(backbone.hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        states = cls_of_layers(hidden, mask, self.layers, cls_last=self.cls_last)
        share = torch.softmax(torch.einsum("bnh,h->bn", states, self.query.to(states.dtype)), 1)
        pooled: torch.Tensor = self.project(torch.einsum("bnh,bn->bh", states, share))
        return pooled


class ParallelSum(Pooler):
    """P-SUM: a fresh transformer block on each of the last n layers, one shared pooler, n vectors per text.

    Karimi, Rossi & Prati 2020, arXiv 2010.11731. Logits are the mean over the branches, the loss is the sum of their
    losses, both as in the authors' code. The blocks are torch's own, initialised like BERT's, so that any backbone
    takes them; dropout inside them is `dropout`. They learn at the head's rate.
    """

    name = "psum"
    half_precision = True

    def __init__(self, backbone: Backbone, *, num_layers: int = 4, dropout: float = 0.0) -> None:
        super().__init__(backbone)
        self.layers = last_layers(backbone, num_layers, self.name)
        self.num_branches = num_layers
        self.cls_last = backbone.cls_last
        size = backbone.hidden_size
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                size,
                int(getattr(backbone.config, "num_attention_heads", size // 64)),
                int(getattr(backbone.config, "intermediate_size", 4 * size)),
                dropout,
                activation="gelu",
                batch_first=True,
            )
            for _ in range(num_layers)
        )
        self.dense = nn.Linear(size, size)
        std = float(getattr(backbone.config, "initializer_range", 0.02))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        padding = mask.eq(0)
        branches = []
        before: torch.Tensor | None = None
        for index, block in zip(self.layers, self.blocks, strict=True):
            state = layer(hidden, index).masked_fill(padding[..., None], 0)
            before = block(self.feed(before, state), src_key_padding_mask=padding)
            branches.append(at_cls(before, mask, cls_last=self.cls_last).to(state.dtype))
        with torch.autocast(mask.device.type, enabled=False):
            return torch.tanh(self.dense(torch.stack(branches)))

    def feed(self, before: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
        """Return what a block reads: its layer alone."""
        return state


class HierarchicalSum(ParallelSum):
    """H-SUM: like P-SUM, but each block reads its layer plus the output of the block on the layer above it."""

    name = "hsum"

    def feed(self, before: torch.Tensor | None, state: torch.Tensor) -> torch.Tensor:
        """Return what a block reads: its layer, plus what the block above made."""
        return state if before is None else before + state
