"""MADGRAD: dual averaging with a cube root in the denominator, in lists of tensors.

Defazio & Jelassi 2021, arXiv:2101.11075, algorithm 1; the steps and the state are those of the authors' package madgrad
(facebookresearch/madgrad), which takes one parameter after the other and reads its count of steps from a tensor. Here
each operation is one call for all parameters of a group, one kernel on a GPU; on a CPU they are walked in pieces that
stay in the cache. Differences: the gradient is left as it is where the package adds the decay to it, half-precision
parameters and sparse gradients are refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["MADGRAD"]

Tensors = list[torch.Tensor]
Row = tuple[torch.Tensor, ...]
PIECE = 2**16  # numbers: the five tensors of a piece are 1.3 MB, which a core's second cache holds


class MADGRAD(torch.optim.Optimizer):
    """Groups may differ in lr, weight_decay, momentum and eps; a state of the authors' class can be loaded.

    `eps` is added to the root, and to every rate above 0; `decouple_decay` decays the weights themselves. Raises
    ValueError for momentum 0 with eps 0, which divides 0 by 0 at the first step, for half-precision parameters and, at
    a step, for sparse gradients.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-6,
        decouple_decay: bool = False,
    ) -> None:
        if momentum == 0 and eps == 0:
            raise ValueError(
                "optimizer 'madgrad': momentum 0 with eps 0 divides 0 by 0 at the first step; set eps to 1e-6"
            )
        if not (0 <= momentum < 1 and eps >= 0):
            raise ValueError(
                f"optimizer 'madgrad': momentum in [0, 1) and eps at least 0 are allowed, got {momentum} and {eps}"
            )
        own = {"momentum": momentum, "eps": eps, "weight_decay": weight_decay, "decouple_decay": decouple_decay}
        super().__init__(groups, {"lr": lr, **own})
        halves = {p.dtype for group in self.param_groups for p in group["params"]} & {torch.float16, torch.bfloat16}
        if halves:
            raise ValueError(f"optimizer 'madgrad' needs float32 parameters, got {halves.pop()}; use autocast")

    @property
    def count(self) -> int:
        """Steps done: one count for all parameters, as in the paper."""
        whole: Any = self.state  # the authors keep it under a key that is no parameter
        return int(whole["k"]) if "k" in whole else 0  # on the CPU always: no sync point

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient are left alone."""
        assert closure is None, "closures are not used here"
        count = self.count
        for group in self.param_groups:
            params: Tensors = [parameter for parameter in group["params"] if parameter.grad is not None]
            if any(parameter.grad.is_sparse for parameter in params if parameter.grad is not None):
                raise ValueError("optimizer 'madgrad' takes no sparse gradients; use adamw")
            for parameter in params:
                self._prepare(parameter, group["momentum"])
            for lists in self._together(self._rows(params)):
                _move(*lists, group=group, count=count)
        whole: Any = self.state
        whole["k"] = torch.tensor([count + 1])

    def _prepare(self, parameter: torch.Tensor, momentum: float) -> None:
        state = self.state[parameter]
        if not state:
            state["grad_sum_sq"], state["s"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            if momentum:
                state["x0"] = parameter.detach().clone()

    def _rows(self, params: Tensors) -> list[Row]:
        """Return of each parameter what a step works on: itself, gradient, sum of squares, sum, first weights."""
        found: list[Row] = []
        for parameter in params:
            state = self.state[parameter]
            assert parameter.grad is not None
            own = parameter.detach()
            found.append((own, parameter.grad, state["grad_sum_sq"], state["s"], state.get("x0", own)))
        return found

    def _together(self, rows: list[Row]) -> list[tuple[Tensors, ...]]:
        """Return the lists that one call works on."""
        heaps = [rows] if rows else []
        if rows and rows[0][0].device.type == "cpu":
            heaps, size = [], PIECE
            for piece in (piece for row in rows for piece in _cut(row)):
                if size + piece[0].numel() > PIECE:
                    heaps.append([])
                    size = 0
                heaps[-1].append(piece)
                size += piece[0].numel()
        return [tuple(list(column) for column in zip(*heap, strict=True)) for heap in heaps]


def _cut(row: Row) -> list[Row]:
    """Cut tensors of one shape into views of PIECE numbers; as they are where one is not contiguous."""
    if row[0].numel() <= PIECE or not all(tensor.is_contiguous() for tensor in row):
        return [row]
    return list(zip(*(tensor.view(-1).split(PIECE) for tensor in row), strict=True))


def _move(
    params: Tensors,
    gradients: Tensors,
    squares: Tensors,
    sums: Tensors,
    firsts: Tensors,
    *,
    group: dict[str, Any],
    count: int,
) -> None:
    momentum, eps, decay = group["momentum"], group["eps"], group["weight_decay"]
    lr = group["lr"] + eps if group["lr"] else 0.0
    weight = lr * math.sqrt(count + 1)
    before = None
    if decay and group["decouple_decay"]:
        before = torch._foreach_mul(params, lr * decay)
    elif decay:
        gradients = list(torch._foreach_add(gradients, params, alpha=decay))
    if not momentum:
        # The first weights follow from the sums before this step.
        firsts = list(torch._foreach_addcdiv(params, sums, _roots(squares, eps)))
    torch._foreach_addcmul_(squares, gradients, gradients, weight)
    torch._foreach_add_(sums, gradients, alpha=weight)
    places = torch._foreach_addcdiv(firsts, sums, _roots(squares, eps), -1.0)
    if momentum:
        torch._foreach_lerp_(params, places, 1 - momentum)
    else:
        torch._foreach_copy_(params, places)
    if before is not None:
        torch._foreach_sub_(params, before)


def _roots(squares: Tensors, eps: float) -> Tensors:
    roots = list(torch._foreach_pow(squares, 1 / 3))
    if eps:
        torch._foreach_add_(roots, eps)
    else:
        for root in roots:
            root.masked_fill_(root == 0, math.inf)  # nothing has come yet: stay
    return roots
