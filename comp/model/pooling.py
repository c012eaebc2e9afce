"""POOLERS: from hidden states to one vector per text; and the poolers that are made of others.

The interface and shapes stand in token_pooling.py. A pooler that cannot work on a backbone raises ValueError when it
is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from comp.catalog import Row, pick
from comp.model.backbone import Backbone
from comp.model.layer_pooling import (
    AttentionLayers,
    ConcatLayers,
    HierarchicalSum,
    ParallelSum,
    RecurrentLayers,
    ScalarMix,
    WeightedLayers,
)
from comp.model.sbert_wk import SBERTWK
from comp.model.token_pooling import (
    CLSPooling,
    Conv1dPooling,
    GeMPooling,
    Hidden,
    MaxPooling,
    MeanMaxCLSPooling,
    MeanMaxPooling,
    MeanPooling,
    Pooler,
    PoolerOutput,
    TokenAttention,
    WordWeights,
    layer,
    masked_mean,
)

__all__ = ["POOLERS", "Pooler", "build_pooler", "needs_trained_pooler"]

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "identity": nn.Identity,
}


class DensePooling(Pooler):
    """activation(W x + b) on the vector of another pooler: sentence-transformers' Dense."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        of: Mapping[str, Any],
        out_features: int | None = None,
        activation: str = "tanh",
        num_fields: int = 1,
    ) -> None:
        super().__init__(backbone)
        self.of = build_pooler(of, backbone, num_fields=num_fields)
        self.layers, self.needs_fields, self.num_branches = self.of.layers, self.of.needs_fields, self.of.num_branches
        self.half_precision = self.of.half_precision
        self.out_features = out_features or self.of.out_features
        self.dense = nn.Linear(self.of.out_features, self.out_features)
        self.activation = pick(ACTIVATIONS, activation, "activation")()

    def fit(self, documents: Iterable[NDArray[np.integer]]) -> None:
        self.of.fit(documents)

    def forward(
        self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor, **fields: torch.Tensor
    ) -> torch.Tensor:
        vector = self.of(hidden, mask, input_ids, **fields)
        with torch.autocast(mask.device.type, enabled=False):
            pooled: torch.Tensor = self.activation(self.dense(vector))
        return pooled


class TwoTower(Pooler):
    """The mean of each text column's own tokens through a dense layer of its own, side by side.

    sentence-transformers' Asym has one dense layer per kind of text; here the texts share one encoder pass, so each
    has read the others. A column that is empty in a row counts as the zero vector.
    """

    needs_fields = True

    def __init__(
        self, backbone: Backbone, *, num_fields: int, out_features: int | None = None, activation: str = "tanh"
    ) -> None:
        super().__init__(backbone)
        if num_fields < 2:
            raise ValueError(
                "pooler 'two_tower' has one dense layer per text column and needs two columns, got one; name them in "
                "competition.text, or use pooler 'dense'"
            )
        size = out_features or backbone.hidden_size
        self.out_features = num_fields * size
        self.towers = nn.ModuleList(nn.Linear(backbone.hidden_size, size) for _ in range(num_fields))
        self.activation = pick(ACTIVATIONS, activation, "activation")()

    def forward(
        self, hidden: Hidden, mask: torch.Tensor, input_ids: torch.Tensor, *, fields: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert fields is not None, "the model hands them to a pooler that needs them"
        last = layer(hidden)
        means = [masked_mean(last, mask * fields.eq(number)) for number in range(len(self.towers))]
        return torch.cat([self.activation(tower(mean)) for tower, mean in zip(self.towers, means, strict=True)], 1)


BERT = "Devlin et al. 2019, arXiv:1810.04805"
SBERT = "Reimers & Gurevych 2019, arXiv:1908.10084"
RHTSINGH = "rhtsingh, Kaggle CommonLit 2021"
KARIMI = "Karimi et al. 2020, arXiv:2010.11731"

POOLERS: dict[str, Row] = {
    "mean": Row(MeanPooling, "mean of the last layer over real tokens", SBERT),
    "max": Row(MaxPooling, "maximum of the last layer over real tokens", SBERT),
    "mean_max": Row(MeanMaxPooling, "mean and max, concatenated", RHTSINGH),
    "mean_max_cls": Row(MeanMaxCLSPooling, "mean, max and classification token, concatenated", RHTSINGH),
    "cls": Row(CLSPooling, "classification token of any layer, the last by default", BERT),
    "pooler_output": Row(PoolerOutput, "the checkpoint's own trained pooler on the classification token", BERT),
    "conv1d": Row(Conv1dPooling, "two convolutions over the tokens, then the maximum", RHTSINGH),
    "token_attention": Row(TokenAttention, "additive attention over tokens", "Yang et al. 2016, NAACL N16-1174"),
    "gem": Row(GeMPooling, "generalised mean with a trained exponent", "Radenović et al. 2018, arXiv:1711.02512"),
    "word_weights": Row(WordWeights, "mean weighted by IDF, fitted on the training fold", f"{SBERT} (code)"),
    "concat_layers": Row(ConcatLayers, "classification token of the last n layers, concatenated", BERT),
    "weighted_layers": Row(WeightedLayers, "trained weights over layers, normalised by their sum", f"{SBERT} (code)"),
    "scalar_mix": Row(ScalarMix, "softmax weights over layers", "Peters et al. 2018, arXiv:1802.05365"),
    "lstm_layers": Row(
        partial(RecurrentLayers, cell=nn.LSTM), "LSTM up the layers of the classification token", RHTSINGH
    ),
    "gru_layers": Row(partial(RecurrentLayers, cell=nn.GRU), "GRU up the layers of the classification token", RHTSINGH),
    "attention_layers": Row(AttentionLayers, "attention over the layers of the classification token", RHTSINGH),
    "sbert_wk": Row(SBERTWK, "layers weighted by novelty, tokens by change", "Wang & Kuo 2020, arXiv:2002.06652"),
    "psum": Row(ParallelSum, "a fresh block on each of the last n layers, in parallel", KARIMI),
    "hsum": Row(HierarchicalSum, "fresh blocks from the top layer down, each fed by the one before", KARIMI),
    "dense": Row(DensePooling, "a dense layer after any other pooler", f"{SBERT} (code)"),
    "two_tower": Row(TwoTower, "one dense layer per text column", "sentence-transformers, Asym"),
}


def needs_trained_pooler(options: Mapping[str, Any]) -> bool:
    """Tell whether the pooler, or the one inside it, uses the checkpoint's own pooler."""
    return options["name"] == "pooler_output" or ("of" in options and needs_trained_pooler(options["of"]))


def build_pooler(options: Mapping[str, Any], backbone: Backbone, *, num_fields: int = 1) -> Pooler:
    """Build a pooler: `options` are its `name` and own options, `num_fields` the number of text columns.

    Raises ValueError, with the reason, when it does not fit the backbone.
    """
    own = {key: value for key, value in options.items() if key != "name"}
    if options["name"] in ("dense", "two_tower"):
        own["num_fields"] = num_fields
    pooler: Pooler = pick(POOLERS, options["name"], "pooler").make(backbone, **own)
    return pooler
