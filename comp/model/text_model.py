"""Backbone -> pooler -> one head per task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comp.data.batches import Batch
from comp.model.backbone import Backbone, load_backbone, rebuild_backbone
from comp.model.heads import Head, build_head
from comp.model.lowest import skip_lowest
from comp.model.pooling import Pooler, build_pooler, needs_trained_pooler

__all__ = ["VECTOR", "TextModel", "build_model"]

VECTOR = "vector*"  # no task can be called so


def mean_of_windows(vector: torch.Tensor, window_of: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Average (..., P, F) over the windows of each row: (..., B, F). `window_of` (P,): row of each window."""
    total = vector.new_zeros(*vector.shape[:-2], num_rows, vector.shape[-1]).index_add(-2, window_of, vector)
    return total / torch.bincount(window_of, minlength=num_rows)[:, None]


class TextModel(nn.Module):
    """One vector per text, then a head per task.

    The windows of a long text are averaged as vectors, before the head: for a linear head the same as averaging its
    outputs.

    `forward(batch)` returns task name -> (B, K) float32: values for regression and ordinal, logits for the others. A
    pooler with branches gives (n, B, K) while training, one output per branch, whose losses are summed, and the mean
    of the branches, (B, K), otherwise. Multi-sample dropout (`num_masks` above 1; Inoue 2019, arXiv:1905.09788) gives
    (masks x n, B, K) while training: the mean of the losses is wanted, not the loss of the mean. With `with_vectors`
    there is also VECTOR -> what the heads read before their dropout, (B, F), or while training (n, B, F).
    """

    def __init__(
        self,
        backbone: Backbone,
        pooler: Pooler,
        heads: Mapping[str, int | Head],
        *,
        head_dropout: float = 0.0,
        num_masks: int = 1,
        with_vectors: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooler = pooler
        self.head_dropout = nn.Dropout(head_dropout)
        self.num_masks, self.with_vectors = num_masks, with_vectors
        self.lower: Callable[[Batch], torch.Tensor] | None = None
        """Where the states of the frozen part come from; None = they are computed."""
        std = float(getattr(backbone.config, "initializer_range", 0.02))
        self.heads = nn.ModuleDict({name: build_head(head, pooler.out_features, std) for name, head in heads.items()})

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        lower = None if self.lower is None else self.lower(batch)
        hidden = self.backbone(
            batch.input_ids,
            batch.mask,
            batch.token_type_ids,
            layers=self.pooler.layers,
            lower=lower,
            lengths=batch.lengths,
        )
        device = batch.input_ids.device.type
        # Pooler, heads and losses stay in float32 under autocast: they are cheap, and half precision costs digits.
        with torch.autocast(device, enabled=self.pooler.half_precision and torch.is_autocast_enabled(device)):
            fields = {"fields": batch.fields} if self.pooler.needs_fields else {}
            vector = self.pooler(hidden, batch.mask, batch.input_ids, **fields)
        with torch.autocast(device, enabled=False):
            if batch.window_of is not None:
                vector = mean_of_windows(vector, batch.window_of, len(batch.rows))
            kept = {VECTOR: vector} if self.with_vectors else {}
            if self.training and self.num_masks > 1:
                views = vector if vector.ndim == 3 else vector[None]
                vector = views.repeat(self.num_masks, 1, 1)
            vector = self.head_dropout(vector)
            outputs = {name: head(vector) for name, head in self.heads.items()}
            if self.pooler.num_branches > 1 and not self.training:
                return {name: output.mean(0) for name, output in {**outputs, **kept}.items()}
            return {**outputs, **kept}

    def depth_of(self, name: str) -> int:
        """Return the depth of a parameter: 0 = embeddings, 1..L = block, L + 1 = pooler and heads."""
        if name.startswith("backbone."):
            return self.backbone.depth_of(name.removeprefix("backbone."))
        return self.backbone.num_layers + 1


def build_model(
    source: str | Path,
    tokenizer: Any,
    *,
    pretrained: bool,
    pooler: Mapping[str, Any],
    heads: Mapping[str, int | Head],
    max_length: int,
    num_fields: int = 1,
    part: str = "encoder",
    new_tokens: Sequence[str] = (),
    dropout: float | None = 0.0,
    attention: str = "auto",
    head_dropout: float = 0.0,
    num_masks: int = 1,
    with_vectors: bool = False,
    freeze_embeddings: bool | str = False,
    freeze_layers: int = 0,
    cache_frozen: bool = False,
    gradient_checkpointing: bool = False,
    allow_pickle: bool = False,
) -> TextModel:
    """Build the model for training (`pretrained`: weights from `source`) or for inference (a run's backbone folder).

    `pooler`: its name and options. `heads`: task name -> its head; a number = a linear one with that many outputs.
    `num_fields`: text columns. `part`: half of an encoder-decoder that is read. `new_tokens`: of the tokenizer, which
    pretrained weights do not know. `attention` auto: as transformers has it. `allow_pickle`: of pretrained weights.
    Raises ValueError when pooler, length, attention or freezing do not fit the backbone.
    """
    options: dict[str, Any] = {"dropout": dropout, "with_pooler": needs_trained_pooler(pooler), "part": part}
    if pretrained:
        backbone = load_backbone(str(source), tokenizer, new_tokens=new_tokens, allow_pickle=allow_pickle, **options)
    else:
        backbone = rebuild_backbone(source, tokenizer, **options)
    if backbone.max_positions is not None and max_length > backbone.max_positions:
        raise ValueError(
            f"model.max_length is {max_length}, but '{source}' has {backbone.max_positions} positions; set it to at "
            f"most {backbone.max_positions}"
        )
    if attention != "auto":
        backbone.attend(training=attention, evaluating=attention)
    built = build_pooler(pooler, backbone, num_fields=num_fields)
    model = TextModel(backbone, built, heads, head_dropout=head_dropout, num_masks=num_masks, with_vectors=with_vectors)
    backbone.freeze(embeddings=freeze_embeddings, num_layers=freeze_layers)
    if cache_frozen:
        skip_lowest(backbone, freeze_layers, built.layers)
    if gradient_checkpointing:
        backbone.checkpoint_gradients()
    return model
