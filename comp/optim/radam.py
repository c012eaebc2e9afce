"""RAdam on the CPU, through the fused kernel of AdamW.

Liu et al. 2020, arXiv:1908.03265, with decoupled decay; the steps and the state are those of torch.optim.RAdam, which
passes over the weights a dozen times where the kernel passes once. Once the variance is known well enough (rho_t > 5)
RAdam's step is AdamW's with the rate times the rectification r_t, the decay divided by it, and eps divided by
sqrt(1 - beta2^t), since it stands outside the correction there and inside here. Before that it is momentum.
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["RAdam"]


class RAdam(torch.optim.RAdam):
    """torch's RAdam for parameters on the CPU; states go over from one to the other, and to a GPU."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, betas=betas, eps=eps, decoupled_weight_decay=True)
        assert all(p.device.type == "cpu" for group in self.param_groups for p in group["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient are left alone."""
        assert closure is None, "closures are not used here"
        for group in self.param_groups:
            by_step: dict[int, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state["step"] = torch.tensor(0.0)
                        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
                    state["step"] += 1
                    by_step.setdefault(int(state["step"]), []).append(parameter)
            for step, params in by_step.items():
                self._move(params, step, group)

    def _move(self, params: list[torch.Tensor], step: int, group: dict[str, Any]) -> None:
        lr, (first, second), eps, decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        gradients: Any = [parameter.grad for parameter in params]
        means, squares, steps = (
            [self.state[parameter][name] for parameter in params] for name in ("exp_avg", "exp_avg_sq", "step")
        )
        longest, correction = 2 / (1 - second) - 1, 1 - second**step
        length = longest - 2 * step * second**step / correction
        if length > 5:
            rectified = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
            torch._fused_adamw_(
                params,
                gradients,
                means,
                squares,
                [],
                steps,
                lr=lr * rectified,
                beta1=first,
                beta2=second,
                weight_decay=decay / rectified,
                eps=eps / math.sqrt(correction),
                amsgrad=False,
                maximize=False,
            )
            return
        torch._foreach_mul_(params, 1 - lr * decay)
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        torch._foreach_add_(params, means, alpha=-lr / (1 - first**step))
