"""Mixout: dropout towards the pretrained weights instead of towards 0.

Lee et al. 2020, arXiv:1909.11299. In training every call of a linear layer uses u + M (w - u) / (1 - p), with w its
weight, u the pretrained one and M one Bernoulli(1 - p) per input column, shared by all rows ("mixout", not
"mixconnect"). This is the paper's ((1 - M) u + M w - p u) / (1 - p), ten times more exact in half precision. Its
gradient is M / (1 - p); the authors' code and its copies lose the factor. Biases are not mixed. Evaluation uses w.

The mask comes from the global generator, so that recomputed activations see the same one. The layer stays an nn.Linear
with its own parameter, and u is a buffer that is not saved: checkpoints have the same names with and without mixout.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["MixedLinear", "mix_", "mixed_weight"]


def mixed_weight(weight: torch.Tensor, anchor: torch.Tensor, p: float) -> torch.Tensor:
    """Return u + M (w - u) / (1 - p) for weight w and anchor u (O, I); p = 1 gives u."""
    if p >= 1:
        return anchor
    keep = torch.rand(1, weight.shape[1], device=weight.device) >= p
    return anchor + keep * (weight - anchor) / (1 - p)


class MixedLinear(nn.Linear):
    """A linear layer whose weight is mixed with its pretrained value while training."""

    anchor: torch.Tensor

    def __init__(self, linear: nn.Linear, p: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.p = p
        self.register_buffer("anchor", linear.weight.detach().clone(), persistent=False)
        self.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = mixed_weight(self.weight, self.anchor, self.p) if self.training else self.weight
        return F.linear(input, weight, self.bias)


def mix_(model: nn.Module, p: float, *, fresh: Collection[nn.Parameter] = ()) -> int:
    """Put mixout with probability `p` into the linear layers of `model`, in place; return how many.

    Left alone: layers whose weight is in `fresh` (re-initialised: no pretrained value to mix with), is frozen (it is
    its pretrained value), or belongs to another module too (tied). p = 0 changes nothing. Raises ValueError when no
    layer is left.
    """
    if not p:
        return 0
    skipped = {id(parameter) for parameter in fresh}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
        and child.weight.requires_grad
        and id(child.weight) not in skipped
        and owners[id(child.weight)] == 1
    ]
    if not chosen:
        raise ValueError("stability.mixout: no linear layer is left to mix (all frozen or re-initialised); set it to 0")
    for parent, name, child in chosen:
        setattr(parent, name, MixedLinear(child, p))
    return len(chosen)
