"""The options of each pooler, one class per row of POOLERS. No torch in here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from comp.config_section import Section

__all__ = ["DensePooler", "MeanPooler", "Pooler"]


class MeanPooler(Section):
    """model.pooler.name mean, the default; it has no options."""

    name: Literal["mean"] = "mean"


class MaxPooler(Section):
    name: Literal["max"] = "max"


class MeanMaxPooler(Section):
    name: Literal["mean_max"] = "mean_max"


class MeanMaxCLSPooler(Section):
    name: Literal["mean_max_cls"] = "mean_max_cls"


class CLSPooler(Section):
    name: Literal["cls"] = "cls"
    layer: int = -1
    """Hidden state it is taken from, counted as in a Python list: -1 = last, -2 = the one below, 0 = embeddings."""


class PoolerOutputPooler(Section):
    name: Literal["pooler_output"] = "pooler_output"


class Conv1dPooler(Section):
    name: Literal["conv1d"] = "conv1d"
    channels: int = Field(256, ge=1)
    """Outputs of both convolutions, and so of the pooler."""
    kernel_size: int = Field(2, ge=1)
    """Tokens a convolution sees at once; padded by half of it."""


class TokenAttentionPooler(Section):
    name: Literal["token_attention"] = "token_attention"
    hidden_size: int = Field(512, ge=1)
    """Width of the layer that scores a token."""


class GeMPooler(Section):
    name: Literal["gem"] = "gem"
    p: float = Field(3.0, gt=0)
    """Exponent training starts from; 1 = mean, large = maximum, of the positive parts."""
    eps: float = Field(1e-6, gt=0)
    """Smallest value; negative features count as this."""


class WordWeightsPooler(Section):
    name: Literal["word_weights"] = "word_weights"


class ConcatLayersPooler(Section):
    name: Literal["concat_layers"] = "concat_layers"
    num_layers: int = Field(4, ge=1)
    """Layers counted from the top."""


class LayerMixture(Section):
    layer_start: int | None = Field(None, ge=1)
    """Lowest block that takes part; null = a third of the way up (4 of 12 blocks)."""
    tokens: Literal["mean", "cls"] = "mean"
    """What is taken of the mixed layer: the mean over tokens, or the classification token."""


class WeightedLayersPooler(LayerMixture):
    name: Literal["weighted_layers"] = "weighted_layers"


class ScalarMixPooler(LayerMixture):
    name: Literal["scalar_mix"] = "scalar_mix"


class LSTMLayersPooler(Section):
    name: Literal["lstm_layers"] = "lstm_layers"
    hidden_size: int = Field(256, ge=1)
    """Width of the recurrent state, and so of the pooler."""


class GRULayersPooler(Section):
    name: Literal["gru_layers"] = "gru_layers"
    hidden_size: int = Field(256, ge=1)
    """Width of the recurrent state, and so of the pooler."""


class AttentionLayersPooler(Section):
    name: Literal["attention_layers"] = "attention_layers"
    hidden_size: int = Field(128, ge=1)
    """Width of the projection after the attention, and so of the pooler."""


class SBERTWKPooler(Section):
    name: Literal["sbert_wk"] = "sbert_wk"
    layer_start: int | None = Field(None, ge=1)
    """Lowest block that takes part; at least three must be left; null = a third of the way up (4 of 12 blocks)."""
    window: int = Field(2, ge=1)
    """Neighbouring layers on each side that a layer is compared with."""
    windows: Literal["repo", "paper"] = "repo"
    """repo = the authors' code, from which the published numbers come; paper = the neighbours the paper means."""


class BlocksOnLayers(Section):
    num_layers: int = Field(4, ge=1)
    """Layers counted from the top; each gets a transformer block of its own."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside the new blocks; 0 = off."""


class ParallelSumPooler(BlocksOnLayers):
    name: Literal["psum"] = "psum"


class HierarchicalSumPooler(BlocksOnLayers):
    name: Literal["hsum"] = "hsum"


class DenseLayer(Section):
    out_features: int | None = Field(None, ge=1)
    """Width of a dense layer; null = that of its input."""
    activation: Literal["tanh", "gelu", "relu", "identity"] = "tanh"
    """What follows the dense layer; identity = nothing."""


class DensePooler(DenseLayer):
    """The options of model.pooler.name dense."""

    name: Literal["dense"] = "dense"
    of: Pooler = MeanPooler()
    """The pooler before the dense layer, with its own options."""


class TwoTowerPooler(DenseLayer):
    name: Literal["two_tower"] = "two_tower"


Pooler = Annotated[
    MeanPooler
    | MaxPooler
    | MeanMaxPooler
    | MeanMaxCLSPooler
    | CLSPooler
    | PoolerOutputPooler
    | Conv1dPooler
    | TokenAttentionPooler
    | GeMPooler
    | WordWeightsPooler
    | ConcatLayersPooler
    | WeightedLayersPooler
    | ScalarMixPooler
    | LSTMLayersPooler
    | GRULayersPooler
    | AttentionLayersPooler
    | SBERTWKPooler
    | ParallelSumPooler
    | HierarchicalSumPooler
    | DensePooler
    | TwoTowerPooler,
    Field(discriminator="name"),
]
DensePooler.model_rebuild()
