"""Re-initialisation of the top blocks: forget what the pre-training task taught them alone.

Zhang et al. 2020, arXiv:2006.05987, section 5 (best for 1-3 blocks of a base model, 4-6 of a large one). The
architecture's own scheme is used, children before parents, since a parent's rule may refine a child's (ModernBERT's
output projections). transformers 5 marks every loaded tensor and skips marked ones, so calling `_init_weights` on a
loaded model does nothing at all; the marks are taken off first. Blocks only: what they share (relative position tables,
final norms) stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from comp.model.backbone import Backbone

__all__ = ["reinit_blocks_", "reinit_linear_"]

MARK = "_is_hf_initialized"


def reinit_blocks_(backbone: Backbone, count: int) -> list[nn.Parameter]:
    """Re-initialise the top `count` blocks in place; return their parameters.

    Raises ValueError when there are fewer blocks, when they share one set of weights, or when the architecture's scheme
    leaves a matrix as it was.
    """
    if count and backbone.shares_blocks:
        raise ValueError(
            "stability.reinit_layers: this model's blocks share one set of weights (ALBERT), so re-initialising the "
            "top ones would forget all of them; set it to 0"
        )
    blocks = backbone.blocks
    if count > len(blocks):
        raise ValueError(f"stability.reinit_layers is {count}, but the backbone has {len(blocks)} blocks")
    chosen = blocks[len(blocks) - count :]  # blocks[-0:] would be all of them
    if any(not parameter.requires_grad for block in chosen for parameter in block.parameters()):
        raise ValueError(
            f"stability.reinit_layers {count} re-initialises blocks that model.freeze_layers keeps fixed at random; "
            "lower one of the two"
        )
    return [parameter for block in chosen for parameter in _reinit_(block, backbone.model)]


def _reinit_(block: nn.Module, model: Any) -> list[nn.Parameter]:
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    for module in block.modules():
        for thing in (module, *module.parameters(recurse=False), *module.buffers(recurse=False)):
            if hasattr(thing, MARK):
                delattr(thing, MARK)
    with torch.no_grad():
        block.apply(model._init_weights)
    same = [n for n, p in block.named_parameters() if p.ndim > 1 and torch.equal(p, before[n])]
    if same:
        raise ValueError(
            f"stability.reinit_layers: {type(model).__name__}'s own scheme leaves {same[0]} as it was; set it to 0"
        )
    return list(block.parameters())


def reinit_linear_(linear: nn.Module, std: float) -> list[nn.Parameter]:
    """Draw the weight of a linear layer from N(0, std^2) and zero its bias; return both."""
    assert isinstance(linear, nn.Linear)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return list(linear.parameters())
