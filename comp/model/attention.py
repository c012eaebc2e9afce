"""Attention for training on a CPU: plain products over a few heads at a time, so that the scores stay in its caches.

torch's fused attention (sdpa) has a slow backward pass on CPUs, and the eager one of transformers writes the scores of
the whole batch to memory several times over. Here a few matrices of scores (T x T of one text and head) are computed,
normalised in float32 and used while they are in the caches; what the backward pass needs is kept once, in the type of
the queries. The softmax's gradient is P * (dP - rowsum(P * dP)), as in Dao et al. 2022 (arXiv:2205.14135, appendix
B.2), and nothing is approximated. Which attention is fastest here is measured: see kernels.py.

It is registered with transformers as `blocked`, for every architecture that takes its attention from there, and once
more as `packed`, for texts that are laid end to end (see packing.py): each of them attends to itself alone.

Shapes: B texts, H heads, T queries, S keys, D numbers a head, N tokens of packed texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

__all__ = ["BLOCKED", "PACKED", "blocked_attention", "packed_attention"]

BLOCKED, PACKED = "blocked", "packed"
SCORES = 500_000  # numbers of a block: 2 MB in float32, about the second cache of two cores
CALL = 35_000  # scores of a head that take as long as a call more


def blocked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Return softmax(scaling * query key^T + mask) value, (B, H, T, E); `dropout` falls on the probabilities.

    `query` (B, H, T, D), `key` (B, H, S, D) and `value` (B, H, S, E) of one type; `mask` (B or 1, 1 or H, T or 1, S) is
    added, float32 or that type; `scaling`: None = D ** -0.5.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    found: torch.Tensor = _Blocked.apply(query, key, value, mask, scaling, dropout)
    return found


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[int],
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """Return attention within each of the texts laid end to end, (1, N, H, E).

    `query` and `key` (1, H, N, D), `value` (1, H, N, E); `lengths`: tokens of each text, N together; `window`: tokens
    attend to those less than so far away, None = to all of their text. Neighbours of like lengths go together, padded
    to the longest of them here alone.
    """
    groups = _groups(tuple(lengths), window, query.device)
    parts = [own.split([group.tokens for group in groups], dim=2) for own in (query, key, value)]
    found = []
    for group, *own in zip(groups, *parts, strict=True):
        if group.pad is not None:
            own = [part.index_select(2, group.pad) for part in own]
        q, k, v = (part[0].unflatten(1, group.shape).transpose(0, 1) for part in own)
        output = blocked_attention(q, k, v, group.mask, scaling=scaling, dropout=dropout).transpose(1, 2).flatten(0, 1)
        found.append(output if group.real is None else output.index_select(0, group.real))
    return (torch.cat(found) if len(found) > 1 else found[0])[None]


@dataclass(frozen=True)
class _Group:
    """Neighbouring texts that attend in one call."""

    tokens: int
    shape: tuple[int, int]
    """Texts, tokens of the longest."""
    pad: torch.Tensor | None
    """Where among the group's tokens each place of the padded texts comes from; None = no padding."""
    real: torch.Tensor | None
    """Which of those places are tokens."""
    mask: torch.Tensor | None


@lru_cache(maxsize=4)  # every block of a pass asks for the same
@torch.inference_mode(mode=False)  # a training pass may get what an evaluation of the same lengths made
def _groups(lengths: tuple[int, ...], window: int | None, device: torch.device) -> list[_Group]:
    cuts, longest = [0], lengths[0]
    for place, length in enumerate(lengths):
        # what the rest saves when it is not padded to the longest, against a call more; other orders cost time only
        if length > longest or (len(lengths) - place) * (longest**2 - length**2) > CALL:
            cuts.append(place)
            longest = length
    found = []
    for start, stop in pairwise([*cuts, len(lengths)]):
        own = np.array(lengths[start:stop])
        shape, places = (len(own), int(own.max())), np.arange(own.max())
        inside = places < own[:, None]
        pad = real = mask = None
        if not inside.all():
            pad = torch.from_numpy(np.where(inside, np.cumsum(own)[:, None] - own[:, None] + places, 0).ravel()).to(
                device
            )
            real = torch.from_numpy(np.flatnonzero(inside)).to(device)
        seen = inside[:, None, None, :]
        if window is not None and shape[1] > window:
            seen = seen & (np.abs(places[:, None] - places) < window)
        if not seen.all():
            mask = (
                torch.zeros(seen.shape).masked_fill(~torch.from_numpy(seen), torch.finfo(torch.float32).min).to(device)
            )
        found.append(_Group(int(own.sum()), shape, pad, real, mask))
    return found


def _blocks(shape: tuple[int, int, int, int]) -> Iterator[tuple[slice, slice]]:
    """Part the scores (B, H, T, S) into whole texts, or heads of one text, of at most SCORES numbers if they can be."""
    texts, heads, *side = shape
    one = max(1, side[0] * side[1])
    if heads * one > SCORES:
        many = max(1, SCORES // one)
        for text in range(texts):
            for head in range(0, heads, many):
                yield slice(text, text + 1), slice(head, head + many)
        return
    many = SCORES // (heads * one)
    for text in range(0, texts, many):
        yield slice(text, text + many), slice(None)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        query, key, value = (own.contiguous() for own in (query, key, value))
        shape = (*query.shape[:3], key.shape[2])
        output, wanted = query.new_empty(*shape[:3], value.shape[-1]), any(ctx.needs_input_grad[:3])
        exact = torch.promote_types(query.dtype, torch.float32)
        weights = query.new_empty(shape) if wanted else None
        kept = torch.empty(shape, dtype=torch.bool, device=query.device) if wanted and dropout else None
        with torch.autocast(query.device.type, enabled=False):
            for texts, heads in _blocks(shape):
                scores = query[texts, heads] @ key[texts, heads].transpose(-1, -2)
                if mask is None:
                    scores = scores.to(exact, copy=True).mul_(scaling)
                else:
                    few = mask if mask.shape[0] == 1 else mask[texts]
                    few = few if few.shape[1] == 1 else few[:, heads]
                    scores = torch.add(few.to(exact), scores, alpha=scaling)
                probs = torch.softmax(scores, -1, out=scores).to(query.dtype)
                if weights is not None:
                    weights[texts, heads] = probs
                if dropout:
                    keep = torch.empty(probs.shape, dtype=torch.bool, device=probs.device).bernoulli_(1 - dropout)
                    if kept is not None:
                        kept[texts, heads] = keep
                    probs = probs * keep
                output[texts, heads] = probs @ value[texts, heads]
            if dropout:
                output /= 1 - dropout
        ctx.save_for_backward(query, key, value, weights, kept)
        ctx.scaling, ctx.dropout = scaling, dropout
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        query, key, value, weights, kept = ctx.saved_tensors
        grad = grad.contiguous()
        if ctx.dropout:
            grad = grad / (1 - ctx.dropout)
        of_query, of_key, of_value = (torch.empty_like(own) for own in (query, key, value))
        with torch.autocast(query.device.type, enabled=False):
            for block in _blocks(tuple(weights.shape)):
                probs, given = weights[block], grad[block]
                of_probs = given @ value[block].transpose(-1, -2)
                if kept is not None:
                    keep = kept[block]
                    of_probs *= keep
                    of_value[block] = (probs * keep).transpose(-1, -2) @ given
                else:
                    of_value[block] = probs.transpose(-1, -2) @ given
                of_scores = torch._softmax_backward_data(of_probs, probs, -1, probs.dtype)
                of_query[block] = of_scores @ key[block]
                of_key[block] = of_scores.transpose(-1, -2) @ query[block]
        return of_query.mul_(ctx.scaling), of_key.mul_(ctx.scaling), of_value, None, None, None


def _of_transformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers calls it; returns (B, T, H, D), and no weights.

    Raises ValueError for what the architecture wants beyond a mask.
    """
    _check(BLOCKED, query, key, others)
    found = blocked_attention(query, key, value, attention_mask, scaling=scaling, dropout=dropout)
    return found.transpose(1, 2).contiguous(), None


def _packed_of_transformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    text_lengths: Sequence[int],
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within texts of `text_lengths`; as for `_of_transformers`, B being 1. No mask is made for it."""
    _check(PACKED, query, key, others)
    assert attention_mask is None
    found = packed_attention(query, key, value, text_lengths, scaling=scaling, dropout=dropout, window=sliding_window)
    return found, None


def _check(name: str, query: torch.Tensor, key: torch.Tensor, others: dict[str, Any]) -> None:
    more = [word for word in ("position_bias", "softcap", "s_aux") if others.get(word) is not None]
    if more or key.shape[1] != query.shape[1]:
        what = more[0] if more else f"{key.shape[1]} keys' heads for {query.shape[1]} queries'"
        raise ValueError(f"model.attention is '{name}', which has no {what}; set it to auto, sdpa or eager")


AttentionInterface.register(BLOCKED, _of_transformers)
AttentionMaskInterface.register(BLOCKED, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
AttentionInterface.register(PACKED, _packed_of_transformers)  # without a mask: (N, N) numbers that nobody reads
