"""predict(model, texts) -> Predictions. Length-sorted inside, in table order outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from comp.data.batches import collate, sorted_batches
from comp.data.tokens import Encoded
from comp.model.losses import Decoder
from comp.model.text_model import TextModel
from comp.runtime import Runtime

__all__ = ["Predictions", "batch_tokens_of", "predict"]

CPU_TOKENS, GPU_TOKENS = 2048, 8192  # a CPU is a tenth faster while a batch's activations fit its caches


def batch_tokens_of(runtime: Runtime) -> int:
    """Return how many padded tokens a batch holds on a device by default."""
    return CPU_TOKENS if runtime.device.type == "cpu" else GPU_TOKENS


@dataclass(frozen=True)
class Predictions:
    """Predictions with the ids they belong to; row i of every array is `ids[i]`."""

    ids: NDArray[np.object_]
    """(N,)"""
    values: dict[str, NDArray[np.float64]]
    """Task name -> (N, K) values, or probabilities."""

    def __post_init__(self) -> None:
        for name, values in self.values.items():
            assert values.ndim == 2 and len(values) == len(self.ids), f"{name}: {values.shape} for {len(self.ids)} ids"


@torch.inference_mode()
def predict(
    model: TextModel,
    encoded: Encoded,
    ids: NDArray[np.object_],
    *,
    decoders: Mapping[str, Decoder],
    runtime: Runtime,
    rows: NDArray[np.int64] | None = None,
    on_batch: Callable[[int], Any] | None = None,
    batch_tokens: int | None = None,
) -> Predictions:
    """Predict `rows` of `encoded` (None = all), returned in the order of `rows`.

    `ids` (N,) names all rows of `encoded`; `decoders` maps task name to what turns its logits into
    predictions; `on_batch` is called with the number of rows done; `batch_tokens` is the most padded tokens of a batch
    (None = by the device). The model is left in the mode it came in, and no random number is drawn.
    """
    assert len(ids) == len(encoded)
    rows = np.arange(len(encoded)) if rows is None else rows
    batches = sorted_batches(encoded.lengths[rows], max_tokens=batch_tokens or batch_tokens_of(runtime))
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in decoders}
    was_training = model.training
    model.eval()
    try:
        for places in batches:
            batch = collate(encoded, rows[places]).to(runtime.device)
            with runtime.autocast():
                outputs = model(batch)
            for name, decoder in decoders.items():
                pieces[name].append(decoder(outputs[name]))
            if on_batch is not None:
                on_batch(len(places))
    finally:
        model.train(was_training)
    order = np.concatenate(batches) if batches else np.zeros(0, np.int64)
    values = {}
    for name, parts in pieces.items():
        flat = torch.cat(parts).cpu().double().numpy()  # one copy from the device, after the last batch
        values[name] = np.empty_like(flat)
        values[name][order] = flat
    return Predictions(ids[rows], values)
