"""OPTIMIZERS and the builder that turns parameter groups into one of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from comp.catalog import Row, pick
from comp.optim.bertadam import BERTAdam
from comp.optim.groups import ParameterGroup
from comp.optim.lookahead import Lookahead
from comp.optim.madgrad import MADGRAD
from comp.optim.radam import RAdam

__all__ = ["OPTIMIZERS", "build_optimizer", "check_options"]

Groups = list[dict[str, Any]]
PACKAGES = ("torch.optim", "torch_optimizer")
FUSED = ("torch.optim.Adam", "torch.optim.AdamW")
FUSED_ON = {"cpu", "cuda"}
"""Devices for which torch has their fused kernels. (SGD's fails where a parameter gets its first gradient late.)"""
OWN_RATES = "ignores the groups' learning rates"
UNFIT = {
    "torch.optim.LBFGS": "has one rate for all parameters and evaluates the loss itself; use adamw",
    "torch.optim.Muon": "moves matrices only, and a model has biases and norms too; use adamw",
    "torch.optim.SparseAdam": "is for sparse gradients only; use adamw",
    "torch_optimizer.A2GradExp": f"{OWN_RATES}; use adamw",
    "torch_optimizer.A2GradInc": f"{OWN_RATES}; use adamw",
    "torch_optimizer.A2GradUni": f"{OWN_RATES}; use adamw",
    "torch_optimizer.Adahessian": "needs second derivatives, which training does not compute; use adamw",
    "torch_optimizer.Lookahead": "cannot be saved; use optimizer.lookahead around any other",
    "torch_optimizer.RAdam": f"{OWN_RATES}; use radam or torch.optim.RAdam",
}
"""Classes that cannot train here, and why."""
# They take lr and weight_decay from the groups, and these are no choice of the user's.
NOT_OPTIONS = ("self", "params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize")


def _devices(groups: Groups) -> set[str]:
    return {parameter.device.type for group in groups for parameter in group["params"]}


def adamw(groups: Groups, *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """Build torch's AdamW, fused where the device has the kernel."""
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=_devices(groups) <= FUSED_ON)


def radam(groups: Groups, *, betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    """Build RAdam with decoupled decay: our fused one on a CPU, torch's elsewhere, in foreach form on a GPU.

    torch_optimizer's ignores the groups' rates.
    """
    if _devices(groups) <= {"cpu"}:
        return RAdam(groups, betas=betas, eps=eps)
    return torch.optim.RAdam(groups, betas=betas, eps=eps, decoupled_weight_decay=True)


def radam_lookahead(
    groups: Groups, *, betas: tuple[float, float], eps: float, steps: int, alpha: float
) -> torch.optim.Optimizer:
    """Build RAdam inside Lookahead, known as Ranger."""
    return Lookahead(radam(groups, betas=betas, eps=eps), steps=steps, alpha=alpha)


def adafactor(groups: Groups, *, beta2_decay: float, clip_threshold: float) -> torch.optim.Optimizer:
    """Build torch's Adafactor at the given rates, relative to the size of each tensor."""
    if not hasattr(torch.optim, "Adafactor"):
        raise ValueError(f"optimizer 'adafactor' came with torch 2.5; this is {torch.__version__}")
    return torch.optim.Adafactor(groups, beta2_decay=beta2_decay, d=clip_threshold)


def by_path(groups: Groups, *, path: str, options: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Build the class at `path` with `options`. Raises ValueError when there is none, or an option is not its own."""
    check_options(path, options)
    module, name = path.rsplit(".", 1)
    # torch takes foreach by itself on a GPU, but never the fused kernel, which a CPU gains from too.
    fused = {"fused": True} if path in FUSED and _devices(groups) <= FUSED_ON else {}
    optimizer: torch.optim.Optimizer = getattr(import_module(module), name)(groups, **options, **fused)
    return optimizer


def check_options(path: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError that says what is wrong with the class or an option; nothing is built."""
    module, _, name = path.rpartition(".")
    if module not in PACKAGES:
        raise ValueError(f"optimizer '{path}': classes of {' and '.join(PACKAGES)} are allowed, e.g. torch.optim.NAdam")
    try:
        found = getattr(import_module(module), name, None)
    except ImportError:
        raise ValueError(f"optimizer '{path}' needs the package; pip install 'comp[optimizers]'") from None
    if not (inspect.isclass(found) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"optimizer '{path}': {module} has no optimizer '{name}'")
    if path in UNFIT:
        raise ValueError(f"optimizer '{path}' {UNFIT[path]}")
    known = [key for key in inspect.signature(found.__init__).parameters if key not in NOT_OPTIONS]
    wrong = [key for key in options if key not in known]
    if wrong:
        raise ValueError(f"optimizer '{path}' has no option '{wrong[0]}'; its options: {', '.join(known) or 'none'}")
    if path == "torch_optimizer.Adafactor" and options.get("relative_step", True):
        raise ValueError(f"optimizer '{path}' makes its own rates unless its option relative_step is false")


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row(adamw, "Adam with bias correction and decoupled weight decay", "arXiv:1711.05101"),
    "bertadam": Row(BERTAdam, "Adam without bias correction, for the ablation", "arXiv:1810.04805"),
    "radam": Row(radam, "Adam whose adaptive rate sets in as its variance falls", "arXiv:1908.03265"),
    "radam_lookahead": Row(radam_lookahead, "RAdam inside Lookahead", "arXiv:1908.03265, arXiv:1907.08610"),
    "madgrad": Row(MADGRAD, "dual averaging with a cube root; wants its own learning rate", "arXiv:2101.11075"),
    "adafactor": Row(adafactor, "second moments by rows and columns: little memory", "arXiv:1804.04235"),
    "class": Row(by_path, "any class of torch.optim or torch_optimizer, by its dotted name", "torch, torch_optimizer"),
}


def build_optimizer(
    name: str, groups: list[ParameterGroup], *, lookahead: Mapping[str, Any] | None = None, **options: Any
) -> torch.optim.Optimizer:
    """Build optimizer `name` over `groups`; `options` are its own. `lookahead` {steps, alpha} wraps it.

    Each of its param_groups also carries `name` and `peak_lr`: the loop sets lr = peak_lr x schedule(step).
    """
    rows = [
        {
            "params": group.params,
            "lr": group.lr,
            "weight_decay": group.weight_decay,
            "name": group.name,
            "peak_lr": group.lr,
            **({"prior_decay": group.prior_decay} if group.prior_decay else {}),
        }
        for group in groups
    ]
    optimizer: torch.optim.Optimizer = pick(OPTIMIZERS, name, "optimizer").make(rows, **options)
    return optimizer if lookahead is None else Lookahead(optimizer, **lookahead)
