"""The lowest blocks of a backbone by themselves, and the blocks above them from given states on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from comp.model.backbone import Backbone

__all__ = ["Lowest", "lowest_states", "skip_lowest"]


class Lowest:
    """Parts a chain of blocks: those not wanted hand on what they get.

    Each block's `forward` is replaced on the instance, so that names of parameters and hooks for hidden states stay.
    """

    def __init__(self, blocks: Sequence[nn.Module], num_layers: int) -> None:
        self.mode = "whole"
        self.state: torch.Tensor | None = None
        self.num_returned: int | None = None
        """How many things a block returns; None = the state by itself."""
        for number, block in enumerate(blocks, start=1):
            own = partial(self._forward, block.forward, below=number <= num_layers, top=number == num_layers)
            block.__dict__["forward"] = own

    def _forward(self, forward: Callable[..., Any], *args: Any, below: bool, top: bool, **options: Any) -> Any:
        if self.mode == "whole" or (self.mode == "alone") == below:
            output = forward(*args, **options)
            if self.mode == "alone":
                whole = output if isinstance(output, tuple) else (output,)
                if any(part is not None for part in whole[1:]):
                    raise TypeError("its blocks return more than hidden states")
                self.num_returned = len(whole) if isinstance(output, tuple) else None
                self.state = whole[0] if top else None
            return output
        state = args[0] if args else options.get("hidden_states")
        if self.mode == "above" and top:
            state = self.state
        return state if self.num_returned is None else (state, *[None] * (self.num_returned - 1))

    @contextmanager
    def _in(self, mode: str, state: torch.Tensor | None) -> Iterator[None]:
        self.mode, self.state = mode, state
        try:
            yield
        finally:
            self.mode, self.state = "whole", None

    def going_on_from(self, state: torch.Tensor) -> AbstractContextManager[None]:
        """Take `state` (B, T, H) for what the lowest blocks give."""
        return self._in("above", state)

    def alone(self) -> AbstractContextManager[None]:
        """Compute the lowest blocks only; `state` holds what they give."""
        return self._in("alone", None)


def lowest_states(
    backbone: Backbone, input_ids: torch.Tensor, mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the states (B, T, H) above the blocks of `skip_lowest`; the blocks over them are not computed."""
    with backbone.lowest.alone():
        backbone(input_ids, mask, token_type_ids)
        found: torch.Tensor = backbone.lowest.state
    packing = backbone.packing(mask)
    return found if packing is None else packing.unpack(found)


def skip_lowest(backbone: Backbone, num_layers: int, layers: Sequence[int]) -> None:
    """Make ready for `lowest_states`, and for going on from them to the hidden states `layers`.

    Raises ValueError when something in the lowest blocks is trained, a hidden state below their top is wanted, or the
    architecture's blocks are not a plain chain.
    """
    trained = [n for n, p in backbone.named_parameters() if p.requires_grad and backbone.depth_of(n) <= num_layers]
    below = [index % (backbone.num_states + 1) for index in layers]
    if trained:
        reason = f"'{trained[0]}' is trained, and lies below the frozen part's top"
    elif min(below) < num_layers:
        reason = f"the pooler reads the states of layer {min(below)}, and those above {num_layers} alone are kept"
    elif backbone.model.config.is_encoder_decoder and backbone.num_states != backbone.num_layers:
        reason = "its blocks are two chains"
    else:
        backbone.lowest = Lowest(backbone.blocks, num_layers)
        reason = _fault(backbone)
    if reason:
        raise ValueError(
            f"model.cache_frozen does not work here ({backbone.config.model_type}): {reason}; set it to false"
        )


def _fault(backbone: Backbone) -> str:
    """Try both halves on two short texts; tell what is wrong, or nothing."""
    was_training = backbone.training
    backbone.eval()
    ids = torch.arange(4, 14, device=next(backbone.parameters()).device).view(2, 5)
    mask = torch.ones_like(ids)
    try:
        with torch.no_grad():
            states = lowest_states(backbone, ids, mask)
            if states.shape != (2, 5, backbone.hidden_size):
                return f"its blocks' states are {tuple(states.shape)}, not texts x tokens x {backbone.hidden_size}"
            whole, short = backbone(ids, mask)[-1], backbone(ids, mask, lower=states)[-1]
        return "" if torch.allclose(whole, short, atol=1e-4) else "its blocks are not a plain chain"
    except TypeError as fault:
        return str(fault)
    finally:
        backbone.train(was_training)
