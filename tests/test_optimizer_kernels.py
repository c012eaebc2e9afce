"""Optimizers in fused or list form: parity with the packages' own, loss scaler, states that go over."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from madgrad import MADGRAD as Authors
from torch import nn

from comp.optim import build_optimizer
from comp.optim.bertadam import BERTAdam
from comp.optim.groups import ParameterGroup
from comp.optim.lookahead import Lookahead
from comp.optim.madgrad import MADGRAD, PIECE
from comp.optim.radam import RAdam
from comp.stability.prior_decay import PriorDecay

SHAPES = [(7, 5), (3,), (PIECE // 64 + 1, 64), (1,)]  # the third is walked in two pieces
Params = list[nn.Parameter]


def weights(dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(tensor.to(dtype)) for tensor in found]


def groups(params: Params, decay: float = 0.0) -> list[dict[str, Any]]:
    """Two groups: half the rate and no decay for the second."""
    first = {"params": params[:2], "lr": 1e-2, "weight_decay": decay}
    return [first, {"params": params[2:], "lr": 5e-3, "weight_decay": 0.0}]


def walk(optimizer: torch.optim.Optimizer, params: Params, steps: Sequence[int], idle: bool = True) -> None:
    """Take steps at a warmed-up rate; the last parameter has no gradient at every third when `idle`."""
    peaks = [1e-2, 5e-3]
    for step in steps:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * min(1.0, step / 5)  # 0 at first, as under a warm-up
        for parameter in params:
            parameter.grad = torch.sin(7 * parameter.detach() + step)
        if idle and step % 3 == 0:
            params[-1].grad = None
        optimizer.step()


def furthest(mine: Params, theirs: Params) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(mine, theirs, strict=True))


# --- MADGRAD ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("decay", "decoupled"), [(0.0, False), (0.1, False), (0.1, True)])
@pytest.mark.parametrize("in_pieces", [True, False], ids=["in pieces", "in lists"])
def test_madgrad_is_the_authors(
    momentum: float, decay: float, decoupled: bool, in_pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = weights(), weights()
    options = {"momentum": momentum, "eps": 1e-6, "decouple_decay": decoupled}
    ours = MADGRAD(groups(mine, decay), **options)
    if not in_pieces:  # as on a GPU: one call per operation
        monkeypatch.setattr(MADGRAD, "_together", lambda self, rows: [tuple(map(list, zip(*rows, strict=True)))])
    authors = Authors(groups(theirs, decay), **options)
    start = weights()
    walk(ours, mine, range(60))
    walk(authors, theirs, range(60))
    assert furthest(mine, theirs) < 1e-12
    assert furthest(mine, start) > 0.01


def test_madgrad_in_float32_stays_with_the_authors() -> None:
    mine, theirs = weights(torch.float32), weights(torch.float32)
    walk(build_optimizer("madgrad", named(mine), momentum=0.9, eps=1e-6, decouple_decay=False), mine, range(200))
    walk(Authors(groups(theirs), momentum=0.9, eps=1e-6), theirs, range(200))
    assert furthest(mine, theirs) < 1e-5


def test_madgrad_with_eps_0_leaves_what_has_had_no_gradient() -> None:
    mine, theirs = weights(), weights()
    for made, params in ((MADGRAD, mine), (Authors, theirs)):
        optimizer = made(groups(params), momentum=0.9, eps=0.0)
        for parameter in params:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        walk(optimizer, params, range(1, 20))
    assert furthest(mine, theirs) < 1e-12
    assert all(torch.isfinite(parameter).all() for parameter in mine)


def test_madgrad_goes_on_from_a_state_of_the_authors() -> None:
    """A fold that was half trained with the package goes on."""
    mine, theirs = weights(), weights()
    authors = Authors(groups(theirs, 0.1), momentum=0.9)
    walk(authors, theirs, range(7))
    file = io.BytesIO()
    torch.save(authors.state_dict(), file)
    file.seek(0)
    ours = MADGRAD(groups(mine, 0.1), momentum=0.9)
    ours.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        torch._foreach_copy_(mine, theirs)
    walk(ours, mine, range(7, 30))
    walk(authors, theirs, range(7, 30))
    assert furthest(mine, theirs) < 1e-12


def test_madgrad_leaves_the_gradient_as_it_is() -> None:
    params = weights()
    optimizer = MADGRAD(groups(params, 0.5))
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in params)


def test_madgrad_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"needs float32 parameters, got torch.bfloat16; use autocast"):
        MADGRAD(groups(weights(torch.bfloat16)))
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\) and eps at least 0 are allowed, got 1.0 and 1e-06"):
        MADGRAD(groups(weights()), momentum=1.0)
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = MADGRAD([{"params": [table.weight]}])
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="takes no sparse gradients; use adamw"):
        optimizer.step()


def test_madgrad_needs_no_package() -> None:
    code = (
        "import sys; sys.modules['madgrad'] = sys.modules['torch_optimizer'] = None\n"
        "import comp.ship.infer\nfrom comp.optim import OPTIMIZERS\nOPTIMIZERS['madgrad'].make([{'params': []}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- RAdam, BERTAdam, AdamW ------------------------------------------------------------------------------------------


def named(params: Params, decay: float = 0.0) -> list[ParameterGroup]:
    return [
        ParameterGroup(str(place), group["lr"], group["weight_decay"], [], group["params"])
        for place, group in enumerate(groups(params, decay))
    ]


@pytest.mark.parametrize("decay", [0.0, 0.2])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.9)])
def test_radam_is_torchs(decay: float, betas: tuple[float, float]) -> None:
    mine, theirs = weights(), weights()
    ours = build_optimizer("radam", named(mine, decay), betas=betas, eps=1e-4)
    assert type(ours) is RAdam
    theirs_radam = torch.optim.RAdam(
        groups(theirs, decay), betas=betas, eps=1e-4, decoupled_weight_decay=True, foreach=False
    )
    walk(ours, mine, range(60))
    walk(theirs_radam, theirs, range(60))
    # The kernel reads its rates as doubles and corrects the bias in float32 at worst.
    assert furthest(mine, theirs) < 1e-8


@pytest.mark.parametrize("there", ["torch's goes on from ours", "ours goes on from torch's"])
def test_radams_states_go_over(there: str) -> None:
    """A fold may be begun on a CPU and ended on a GPU, or the other way."""

    def ours(params: Params) -> torch.optim.Optimizer:
        return RAdam(groups(params), betas=(0.9, 0.99), eps=1e-6)

    def torchs(params: Params) -> torch.optim.Optimizer:
        return torch.optim.RAdam(groups(params), betas=(0.9, 0.99), eps=1e-6, decoupled_weight_decay=True)

    makers: list[Callable[[Params], torch.optim.Optimizer]] = [ours, torchs]
    before, after = makers if there.startswith("torch") else reversed(makers)
    whole, params = weights(), weights()
    reference = before(whole)
    walk(reference, whole, range(15))
    first = before(params)
    walk(first, params, range(9))
    second = after(params)
    second.load_state_dict(first.state_dict())
    walk(second, params, range(9, 15))
    assert furthest(params, whole) < 1e-8


def test_bertadam_in_the_kernel_is_bertadam_in_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = weights(), weights()
    walk(BERTAdam(groups(mine, 0.1)), mine, range(40))
    calls = []
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **options: calls.append(args))
    optimizer = BERTAdam(groups(theirs, 0.1))
    monkeypatch.setattr("comp.optim.bertadam.KERNEL_ON", ())
    walk(optimizer, theirs, range(40))
    assert not calls
    assert furthest(mine, theirs) < 1e-12


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "NAdam"])
def test_classes_of_torch_are_fused_where_torch_can_and_the_same_as_its_loop(name: str) -> None:
    mine, theirs = weights(), weights()
    options = {"momentum": 0.9} if name == "SGD" else {}
    ours = build_optimizer("class", named(mine, 0.1), path=f"torch.optim.{name}", options=options)
    assert bool(ours.param_groups[0].get("fused")) == (name in ("Adam", "AdamW"))
    reference = getattr(torch.optim, name)(groups(theirs, 0.1), foreach=False, **options)
    walk(ours, mine, range(40))
    walk(reference, theirs, range(40))
    assert furthest(mine, theirs) < 1e-8


@pytest.mark.parametrize("name", ["adamw", "madgrad", "radam", "bertadam", "radam_lookahead"])
def test_a_step_that_the_loss_scaler_skips_changes_nothing(name: str) -> None:
    """Fused kernels are told of an infinite gradient, the others are not called."""
    params = weights(torch.float32)
    own: dict[str, Any] = {"momentum": 0.9, "eps": 1e-6, "decouple_decay": False}
    if name != "madgrad":
        own = {"betas": (0.9, 0.999), "eps": 1e-6}
    if name == "radam_lookahead":
        own |= {"steps": 2, "alpha": 0.5}
    optimizer = build_optimizer(name, named(params, 0.1), **own)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    steps = []
    for factor in (1.0, float("inf"), 1.0):
        before = [parameter.detach().clone() for parameter in params]
        optimizer.zero_grad()
        scaler.scale(torch.stack([(parameter * factor).sum() for parameter in params]).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        steps.append(max(float((a - b).detach().abs().max()) for a, b in zip(params, before, strict=True)))
    assert steps[1] == 0 and steps[0] > 0 and steps[2] > 0


def test_the_prior_does_not_pull_in_a_step_that_is_skipped_under_a_fused_optimizer() -> None:
    weight = nn.Parameter(torch.randn(5))
    group = ParameterGroup("a", 0.1, 0.0, ["w"], [weight], prior_decay=1.0)
    optimizer = build_optimizer("adamw", [group], betas=(0.9, 0.999), eps=1e-6)
    assert optimizer.param_groups[0]["fused"]
    PriorDecay(optimizer)
    with torch.no_grad():
        weight.add_(1)
    moved = weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale((weight * float("inf")).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(weight, moved)


def test_lookahead_moves_all_slow_weights_as_one_by_one() -> None:
    mine, theirs = weights(), weights()
    ours = Lookahead(torch.optim.SGD(groups(mine)), steps=3, alpha=0.3)
    inner = torch.optim.SGD(groups(theirs))
    slow = [parameter.detach().clone() for parameter in theirs]
    for step in range(10):
        walk(ours, mine, [step])
        walk(inner, theirs, [step])
        if step % 3 == 2:
            with torch.no_grad():
                for parameter, own in zip(theirs, slow, strict=True):
                    own += 0.3 * (parameter - own)
                    parameter.copy_(own)
    assert furthest(mine, theirs) < 1e-12
