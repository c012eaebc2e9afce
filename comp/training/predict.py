"""predict(model, texts) -> Predictions. Length-sorted inside, in table order outside."""

from __future__ import annotations

import warnings
from collections import deque
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
from comp.runtime import Runtime, release_memory
from comp.training.memory import Exhausted, running_out

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
    halving: bool = True,
) -> Predictions:
    """Predict `rows` of `encoded` (None = all), returned in the order of `rows`.

    `ids` (N,) names all rows of `encoded`; `decoders` maps task name to what turns its logits into
    predictions; `on_batch` is called with the number of rows done; `batch_tokens` is the most padded tokens of a batch
    (None = by the device). The model is left in the mode it came in, and no random number is drawn. Where memory runs
    out, batches are halved from there on, and that is said. Raises ValueError when it runs out with one row at a time,
    or without `halving` at all.
    """
    assert len(ids) == len(encoded)
    rows = np.arange(len(encoded)) if rows is None else rows
    waiting = deque(sorted_batches(encoded.lengths[rows], max_tokens=batch_tokens or batch_tokens_of(runtime)))
    done: list[NDArray[np.int64]] = []
    pieces: dict[str, list[torch.Tensor]] = {name: [] for name in decoders}
    was_training = model.training
    model.eval()
    try:
        with runtime.autocast():  # around all batches: what it casts of the weights is cast once
            while waiting:
                places = waiting.popleft()
                try:
                    with running_out():
                        batch = collate(encoded, rows[places]).to(runtime.device)
                        outputs = model(batch)
                        with torch.autocast(runtime.device.type, enabled=False):
                            found = {name: decoder(outputs[name]) for name, decoder in decoders.items()}
                    reason = None
                except Exhausted as fault:
                    reason = str(fault)
                if reason is not None:
                    release_memory()
                    waiting = _smaller([places, *waiting], reason, halving)
                    continue
                done.append(places)
                for name, decoded in found.items():
                    pieces[name].append(decoded)
                if on_batch is not None:
                    on_batch(len(places))
    finally:
        model.train(was_training)
    order = np.concatenate(done) if done else np.zeros(0, np.int64)
    values = {}
    for name, parts in pieces.items():
        flat = torch.cat(parts).cpu().double().numpy()  # one copy from the device, after the last batch
        values[name] = np.empty_like(flat)
        values[name][order] = flat
    return Predictions(ids[rows], values)


def _smaller(waiting: list[NDArray[np.int64]], reason: str, halving: bool) -> deque[NDArray[np.int64]]:
    """Return the batches to come with at most half the rows of the first, which ran out of memory."""
    rows = len(waiting[0])
    if rows == 1 or not halving:
        many = "one row" if rows == 1 else f"{rows} rows at once"
        raise ValueError(
            f"memory ran out in predicting {many} ({reason}); try --precision bf16, or another machine: a shorter "
            "model.max_length or a smaller backbone needs a new run"
        )
    warnings.warn(
        f"memory ran out in predicting {rows} rows at once ({reason}); going on with {rows // 2}",
        RuntimeWarning,
        stacklevel=3,
    )
    half = rows // 2
    return deque(places[start : start + half] for places in waiting for start in range(0, len(places), half))
