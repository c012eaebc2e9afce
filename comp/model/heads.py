"""Heads: from the pooled vector to the outputs of one task. F features, K outputs.

A head maps (..., F) to (..., K), so that a pooler's branches pass through it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from comp.config import Task
from comp.model.losses import num_outputs

__all__ = ["CORALHead", "Head", "LinearHead", "build_head", "plan_heads"]


@dataclass(frozen=True)
class Head:
    """What a head is, before it is built."""

    num_outputs: int
    coral: bool = False
    """One weight vector for all outputs, for the ordinal loss."""


class LinearHead(nn.Linear):
    """W x + b, W drawn from N(0, std^2), b = 0."""

    def __init__(self, in_features: int, num_outputs: int, std: float) -> None:
        super().__init__(in_features, num_outputs)
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)


class CORALHead(nn.Module):
    """w . x + b_k: one direction, one threshold per step between grades (Cao et al. 2020, arXiv 1901.07884).

    The shared w is what makes the probabilities fall from step to step once the b_k do; these start at
    (K, ..., 1) / K, as in the authors' coral-pytorch.
    """

    def __init__(self, in_features: int, num_outputs: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, in_features).normal_(std=std))
        self.bias = nn.Parameter(torch.arange(num_outputs, 0, -1) / num_outputs)

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(vector, self.weight) + self.bias


def build_head(head: int | Head, in_features: int, std: float) -> nn.Module:
    """Build a head; a number alone is a linear head with that many outputs."""
    head = Head(head) if isinstance(head, int) else head
    return (CORALHead if head.coral else LinearHead)(in_features, head.num_outputs, std)


def plan_heads(tasks: Sequence[Task], classes: Mapping[str, Sequence[str]]) -> dict[str, Head]:
    """Return task name -> its head. `classes`: task name -> classes or grades of the training table."""
    return {
        task.name: Head(num_outputs(task, len(classes.get(task.name, []))), coral=task.loss.name == "ordinal")
        for task in tasks
    }
