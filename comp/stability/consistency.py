"""R-Drop: two passes with different dropout must agree.

Liang et al. 2021, arXiv:2106.14448: loss = L(first) + L(second) + weight x the mean over rows of the symmetric
Kullback-Leibler divergence, (KL(p || q) + KL(q || p)) / 2. For numbers, which have no distribution, the squared
difference takes its place. The published snippet sums the divergence over the batch where the loss is a mean, so that
its weight grows with the batch size; here both are means over the window's rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["disagreement", "twice"]

Outputs = dict[str, torch.Tensor]


def twice(model: Callable[[Any], Outputs]) -> Callable[[Any], Outputs]:
    """Return a model that passes a batch two times: task name -> (2 n, B, K), n branches of each pass in a row."""

    def passes(batch: Any) -> Outputs:
        first, second = model(batch), model(batch)
        return {name: torch.cat([_views(first[name]), _views(second[name])]) for name in first}

    return passes


def _views(output: torch.Tensor) -> torch.Tensor:
    return output if output.ndim == 3 else output[None]


def disagreement(output: torch.Tensor, kind: str) -> torch.Tensor:
    """Return (B,) how far the two passes of `output` (2 n, B, K), as `twice` makes it, lie apart; mean over branches.

    Logits of multiclass: symmetric KL of the softmax; of binary, multilabel and the steps of the ordinal loss: of each
    column's Bernoulli, added up; values: squared difference, added up over columns. `kind`: of the task, "steps" for
    the ordinal loss.
    """
    first, second = output.float().chunk(2)
    if kind == "multiclass":
        p, q = F.log_softmax(first, -1), F.log_softmax(second, -1)
        apart = 0.5 * ((p.exp() - q.exp()) * (p - q)).sum(-1)
    elif kind in ("binary", "multilabel", "steps"):
        # KL(p || q) + KL(q || p) of two Bernoullis is (p - q) times the difference of the logits.
        apart = 0.5 * ((first.sigmoid() - second.sigmoid()) * (first - second)).sum(-1)
    else:
        apart = (first - second).square().sum(-1)
    return apart.mean(0)
