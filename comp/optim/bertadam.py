"""BERTAdam: Adam without bias correction, as BERT was first fine-tuned. For the ablation; use adamw.

Devlin et al. 2019, github.com/google-research/bert optimization.py; the update of the MXNet and TensorFlow code:
m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, w -= lr (m / (sqrt(v) + eps) + decay w). Without the correction the
first updates are up to 6.6 times too long (step 12 at 0.9, 0.999) and stay 10% too long for 1,750 steps, the whole of
a small competition's run: Zhang et al. 2020, arXiv:2006.05987, trace the instability of few-sample training to it. The
original clips each tensor's gradient to norm 1; here the loop clips the global norm, as for every optimizer.

On a CPU the step is one pass of AdamW's fused kernel, told that infinitely many steps are done: nothing is left to
correct then.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["BERTAdam"]

KERNEL_ON = ("cpu",)
FOREVER = torch.tensor(float("inf"))


class BERTAdam(torch.optim.Optimizer):
    """Adam without bias correction, decoupled decay inside the step; groups may differ in lr and weight_decay."""

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ) -> None:
        super().__init__(groups, {"lr": 2e-5, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient are left alone."""
        assert closure is None, "closures are not used here"
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            for parameter in params:
                if not self.state[parameter]:
                    self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("m", "v")}
            gradients = [parameter.grad for parameter in params]
            firsts = [self.state[parameter]["m"] for parameter in params]
            seconds = [self.state[parameter]["v"] for parameter in params]
            first, second = group["betas"]
            if params[0].device.type in KERNEL_ON:
                torch._fused_adamw_(
                    params,
                    gradients,
                    firsts,
                    seconds,
                    [],
                    [FOREVER] * len(params),
                    lr=group["lr"],
                    beta1=first,
                    beta2=second,
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=False,
                )
                continue
            torch._foreach_lerp_(firsts, gradients, 1 - first)
            torch._foreach_mul_(seconds, second)
            torch._foreach_addcmul_(seconds, gradients, gradients, 1 - second)
            roots = torch._foreach_sqrt(seconds)
            torch._foreach_add_(roots, group["eps"])
            updates = torch._foreach_div(firsts, roots)
            if group["weight_decay"]:
                torch._foreach_add_(updates, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-group["lr"])
