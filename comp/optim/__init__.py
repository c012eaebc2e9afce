"""OPTIMIZERS and the builder that turns parameter groups into one of them."""

from __future__ import annotations

from typing import Any

import torch

from comp.catalog import Row, pick
from comp.optim.groups import ParameterGroup

__all__ = ["OPTIMIZERS", "build_optimizer"]


def adamw(groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """Build torch's AdamW, fused where the device has the kernel."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=devices <= {"cpu", "cuda"})


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row(adamw, "Adam with bias correction and decoupled weight decay", "arXiv:1711.05101"),
}


def build_optimizer(name: str, groups: list[ParameterGroup], **options: Any) -> torch.optim.Optimizer:
    """Build optimizer `name` over `groups`; `options` are its own.

    Each of its param_groups also carries `name` and `peak_lr`: the loop sets lr = peak_lr x schedule(step).
    """
    rows = [
        {
            "params": group.params,
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "name": group.name,
            "peak_lr": group.lr,
        }
        for group in groups
    ]
    optimizer: torch.optim.Optimizer = pick(OPTIMIZERS, name, "optimizer").make(rows, **options)
    return optimizer
