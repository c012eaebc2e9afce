"""Lookahead around any optimizer: k steps of the inner one, then the slow weights go part of the way after them.

Zhang et al. 2019, arXiv:1907.08610. slow = theta_0 at the start; every `steps` inner steps slow += alpha (fast - slow)
and fast = slow. The slow weights are the model: evaluation and checkpoints use them (`slow_weights`). The inner moments
are kept ("none" in the paper). torch_optimizer's Lookahead starts from theta_1 and cannot be saved on current torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["Lookahead"]


class Lookahead(torch.optim.Optimizer):
    """Wraps `inner`, with which it shares param_groups: rates set here reach it.

    Only real steps count: one that a loss scaler skips never comes here.
    """

    def __init__(self, inner: torch.optim.Optimizer, *, steps: int = 5, alpha: float = 0.5) -> None:
        if steps < 1 or not 0 < alpha <= 1:
            raise ValueError(f"lookahead: steps must be at least 1 and alpha in (0, 1], got {steps} and {alpha}")
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        self.inner, self.steps, self.alpha = inner, steps, alpha
        self.count = 0
        for parameter in self._parameters():
            self.state[parameter] = {"slow": parameter.detach().clone()}

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _slow(self) -> list[torch.Tensor]:
        return [self.state[parameter]["slow"] for parameter in self._parameters()]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one inner step; every `steps`-th moves the slow weights and starts again from them."""
        assert closure is None, "closures are not used here"
        self.inner.step()
        self.count += 1
        if self.count % self.steps == 0:
            parameters, slow = self._parameters(), self._slow()
            torch._foreach_lerp_(slow, parameters, self.alpha)
            torch._foreach_copy_(parameters, slow)

    @contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Put the slow weights into the model; the fast ones come back bit by bit."""
        parameters = self._parameters()
        fast = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            torch._foreach_copy_(parameters, self._slow())
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, fast)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner state, the slow weights in the order of the groups, and the count of steps."""
        slow = [tensor.clone() for tensor in self._slow()]
        return {"inner": self.inner.state_dict(), "slow": slow, "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; the groups stay shared with the inner optimizer."""
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups  # torch makes new ones on loading
        self.count = state_dict["count"]
        with torch.no_grad():
            for own, slow in zip(self._slow(), state_dict["slow"], strict=True):
                own.copy_(slow)
