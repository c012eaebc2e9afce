"""Weight decay towards the pretrained weights: w <- w - lr decay (w - w0), before the optimizer's own update.

Zhang et al. 2020, arXiv:2006.05987, section 5.2 (there "pretrained weight decay"). The rate is the scheduled one of the
parameter's group. Heads and re-initialised blocks have no pretrained value and keep plain decay; biases and norms have
none. In the authors' code the last group is pulled towards its random start, and switching the technique off switches
weight decay off too. The pull is exp(-decay x sum of the rates): at lr 2e-5 over 1,000 steps decay must be about 1 to
100 to be felt.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["PriorDecay"]


class PriorDecay:
    """Pulls the parameters of the groups that carry `prior_decay` towards where they are now.

    It acts from within `optimizer.step()`, so a step that a loss scaler skips does not pull either.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.prior = {
            parameter: parameter.detach().clone()
            for group in optimizer.param_groups
            if group.get("prior_decay")
            for parameter in group["params"]
        }
        self.handle = optimizer.register_step_pre_hook(self._before_step)
        if self.prior:
            # A fused optimizer takes a step that the loss scaler skips too, and leaves the weights as they are in it;
            # the hook would pull all the same. So the scaler does the skipping, as for every other optimizer.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            decay = group.get("prior_decay", 0.0)
            moving = [p for p in group["params"] if decay and p.grad is not None]
            if moving and group["lr"]:
                with torch.no_grad():
                    # lerp leaves what is at its prior exactly there.
                    torch._foreach_lerp_(moving, [self.prior[p] for p in moving], group["lr"] * decay)
