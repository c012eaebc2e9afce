"""Every optimizer of the catalogue: rates by group, exact state, parity; Lookahead; what is refused."""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TinyCompetition
from pydantic import TypeAdapter
from torch import nn

from comp import config_file
from comp.config_optimizers import Optimizer
from comp.optim import OPTIMIZERS, PACKAGES, UNFIT, build_optimizer
from comp.optim.bertadam import BERTAdam
from comp.optim.groups import ParameterGroup
from comp.optim.lookahead import Lookahead
from comp.ship.infer import load
from comp.training import crossval

OWN: dict[str, dict[str, Any]] = {"class": {"path": "torch.optim.NAdam", "options": {"momentum_decay": 1e-3}}}
NAMES = [*OPTIMIZERS, "adamw + lookahead", "class torch_optimizer"]


def options_of(name: str) -> dict[str, Any]:
    """Return the config's own defaults for an optimizer, as crossval hands them on."""
    if name == "adamw + lookahead":
        section: dict[str, Any] = {"name": "adamw", "lookahead": {"steps": 3}}
    elif name == "class torch_optimizer":
        section = {"name": "class", "path": "torch_optimizer.DiffGrad"}
    else:
        section = {"name": name, **OWN.get(name, {})}
    checked: Any = TypeAdapter(Optimizer).validate_python(section)
    found: dict[str, Any] = checked.model_dump(exclude={"lr", "head_lr", "weight_decay", "clip_norm"})
    return found


def built(name: str, *, lr: float = 1e-3, decay: float = 0.0, size: int = 50) -> tuple[Any, list[nn.Parameter]]:
    """Two groups, the second with 100 times the rate."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(size, 4, generator=generator)) for _ in range(2)]
    groups = [
        ParameterGroup("slow", lr / 100, decay, ["a"], [params[0]]),
        ParameterGroup("fast", lr, decay, ["b"], [params[1]]),
    ]
    return build_optimizer(groups=groups, **options_of(name)), params


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    for parameter in params:
        parameter.grad = torch.sin(7 * parameter.detach() + step)


@pytest.mark.filterwarnings("ignore:This overload of add_ is deprecated")  # torch_optimizer
@pytest.mark.parametrize("name", NAMES)
def test_every_group_has_its_own_rate(name: str) -> None:
    """100 times the rate is 100 times the way on the first step, MADGRAD's cube root of its square apart."""
    optimizer, params = built(name)
    before = [parameter.detach().clone() for parameter in params]
    for parameter in params:
        parameter.grad = torch.full_like(parameter, 0.3)
    optimizer.step()
    moved = [(p.detach() - b).abs().mean().item() for p, b in zip(params, before, strict=True)]
    # Adafactor scales by the size of the tensor; madgrad adds its eps to the rate.
    expected = {"madgrad": ((1e-3 + 1e-6) / (1e-5 + 1e-6)) ** (2 / 3)}.get(name, 100)
    assert moved[1] / moved[0] == pytest.approx(expected, rel=0.15 if name == "adafactor" else 0.02)
    assert [(group["name"], group["peak_lr"]) for group in optimizer.param_groups] == [("slow", 1e-5), ("fast", 1e-3)]


@pytest.mark.filterwarnings("ignore:This overload of add_ is deprecated")
@pytest.mark.parametrize("name", NAMES)
def test_a_group_at_rate_0_stands_still(name: str) -> None:
    optimizer, params = built(name, decay=0.1)
    before = params[0].detach().clone()
    for step in range(4):
        optimizer.param_groups[0]["lr"] = 0.0
        give_gradients(params, step)
        optimizer.step()
    assert (params[0] - before).abs().max() < 1e-6


@pytest.mark.filterwarnings("ignore:This overload of add_ is deprecated")
@pytest.mark.parametrize("name", NAMES)
def test_its_state_goes_through_a_file_bit_by_bit(name: str) -> None:
    whole, params = built(name)
    for step in range(12):
        if step == 7:
            kept, file = [p.detach().clone() for p in params], io.BytesIO()
            torch.save(whole.state_dict(), file)
        whole.param_groups[1]["lr"] = 1e-3 / (step + 1)
        give_gradients(params, step)
        whole.step()
    resumed, own = built(name)
    with torch.no_grad():
        for parameter, value in zip(own, kept, strict=True):
            parameter.copy_(value)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for step in range(7, 12):
        resumed.param_groups[1]["lr"] = 1e-3 / (step + 1)
        give_gradients(own, step)
        resumed.step()
    for a, b in zip(params, own, strict=True):
        assert torch.equal(a, b)


def test_catalogue_and_config_agree() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Optimizer)
    assert set(adapter.json_schema()["discriminator"]["mapping"]) == set(OPTIMIZERS)
    assert all(row.about and row.source for row in OPTIMIZERS.values())


# --- parity ----------------------------------------------------------------------------------------------------------


def test_adamw_is_torchs() -> None:
    """Ours against torch's reference loop, decay only where the group has it."""
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(3)]
    mine = [nn.Parameter(t.clone()) for t in start]
    theirs = [nn.Parameter(t.clone()) for t in start]
    groups = [ParameterGroup("a", 1e-2, 0.1, ["w"], [mine[0]]), ParameterGroup("b", 1e-3, 0.0, ["b"], [mine[1]])]
    ours = build_optimizer("adamw", groups, betas=(0.8, 0.9), eps=1e-6)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[0]], "lr": 1e-2, "weight_decay": 0.1},
            {"params": [theirs[1]], "lr": 1e-3, "weight_decay": 0.0},
        ],
        betas=(0.8, 0.9),
        eps=1e-6,
        foreach=False,
        fused=False,
    )
    for step in range(5):
        give_gradients(mine, step)
        give_gradients(theirs, step)
        ours.step()
        reference.step()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_bertadam_is_the_formula(decay: float) -> None:
    weights = nn.Parameter(torch.linspace(-1, 1, 9, dtype=torch.float64))
    optimizer = BERTAdam([{"params": [weights], "lr": 0.02, "weight_decay": decay}], betas=(0.9, 0.99), eps=1e-5)
    w, m, v = weights.detach().numpy().copy(), np.zeros(9), np.zeros(9)
    for step in range(30):
        give_gradients([weights], step)
        gradient = np.sin(7 * w + step)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        w = w - 0.02 * (m / (np.sqrt(v) + 1e-5) + decay * w)
        optimizer.step()
    assert np.abs(weights.detach().numpy() - w).max() < 1e-12


def test_bertadam_starts_too_far_where_adamw_does_not() -> None:
    """The inflation (1 - b1^t) / sqrt(1 - b2^t) under a constant gradient: 3.16 at first, 6.57 at step 12."""
    way = {}
    for name in ("bertadam", "adamw"):
        weights = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        group = ParameterGroup("a", 1e-3, 0.0, ["w"], [weights])
        optimizer = build_optimizer(name, [group], betas=(0.9, 0.999), eps=1e-12)
        way[name] = []
        for _ in range(12):
            before = weights.item()
            weights.grad = torch.ones_like(weights)
            optimizer.step()
            way[name].append((before - weights.item()) / 1e-3)
    assert way["bertadam"][0] == pytest.approx(3.162, abs=1e-3)
    assert way["bertadam"][11] == pytest.approx(6.57, abs=0.01)
    assert way["adamw"] == pytest.approx([1.0] * 12, abs=1e-6)


def test_radam_decays_the_weights_themselves() -> None:
    weights = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(
        "radam", [ParameterGroup("a", 0.1, 0.5, ["w"], [weights])], betas=(0.9, 0.999), eps=1e-6
    )
    weights.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(weights, torch.full((3,), 1 - 0.1 * 0.5))


# --- Lookahead -------------------------------------------------------------------------------------------------------


def walker(steps: int = 5, alpha: float = 0.5) -> tuple[Lookahead, nn.Parameter]:
    weight = nn.Parameter(torch.zeros(1))
    return Lookahead(torch.optim.SGD([{"params": [weight], "lr": 1.0}]), steps=steps, alpha=alpha), weight


def test_lookahead_follows_the_paper() -> None:
    """Gradient -1, rate 1: four steps out, half of the fifth; torch_optimizer's starts one step late."""
    optimizer, weight = walker()
    found = []
    for _ in range(11):
        weight.grad = torch.tensor([-1.0])
        optimizer.step()
        found.append(weight.item())
    assert found == [1, 2, 3, 4, 2.5, 3.5, 4.5, 5.5, 6.5, 5.0, 6.0]
    with optimizer.slow_weights():
        assert weight.item() == 5.0
    assert weight.item() == 6.0


def test_lookahead_with_alpha_1_is_the_inner_optimizer() -> None:
    outer, plain = built("adamw + lookahead"), built("adamw")
    outer[0].alpha = 1.0
    for step in range(9):
        for optimizer, params in (outer, plain):
            give_gradients(params, step)
            optimizer.step()
    for a, b in zip(outer[1], plain[1], strict=True):
        assert torch.equal(a, b)


def test_rates_reach_the_inner_optimizer_after_a_load_too() -> None:
    optimizer, weight = walker()
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.25
    weight.grad = torch.tensor([-1.0])
    optimizer.step()
    assert weight.item() == 0.25


def test_a_step_that_the_loss_scaler_skips_does_not_count() -> None:
    optimizer, weight = walker(steps=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((weight * -value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.count == 2
    assert weight.item() == 1.0


def test_the_slow_weights_are_evaluated_and_kept(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> None:
    competition = tiny_competition()
    optimizer = {"name": "radam_lookahead", "lr": 1e-3, "head_lr": 1e-2, "steps": 3}
    data = competition.config(tiny_model_folder("bert"), optimizer=optimizer, evaluation={"every": "1 steps"})
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    crossval.run(config_file.load("tiny.yaml"), "tiny", "0", say=lambda line: None)
    rows = pd.read_parquet("runs/tiny/fold0/oof.parquet")
    frame = pd.read_csv(competition.train, dtype=str).set_index("id").loc[rows["id"]].reset_index()
    for weights, column in (("best", "pred_main_target"), ("last", "last_main_target")):
        found = load("runs/tiny", weights=weights).predict(frame)["target"].to_numpy()
        assert np.abs(found - rows[column].to_numpy()).max() < 1e-6, "scored and saved weights differ"


def test_slow_weights_that_would_never_move_are_refused(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> None:
    data = tiny_competition().config(tiny_model_folder("bert"), optimizer={"name": "adamw", "lookahead": {"steps": 5}})
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(
        ValueError, match="fold 0 trains for 4 steps, but lookahead moves its slow weights.*every 5 steps"
    ):
        crossval.run(config_file.load("tiny.yaml"), "tiny", "0", say=lambda line: None)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("torch.optim.NAdam", {"momentum": 1}, "has no option 'momentum'; its options: betas, eps, momentum_decay"),
        ("torch.optim.Nadam", {}, "torch.optim has no optimizer 'Nadam'"),
        ("torch.optim.Optimizr", {}, "has no optimizer 'Optimizr'"),
        ("os.path.join", {}, "classes of torch.optim and torch_optimizer are allowed, e.g. torch.optim.NAdam"),
        ("NAdam", {}, "classes of torch.optim and torch_optimizer are allowed"),
        ("torch_optimizer.RAdam", {}, "ignores the groups' learning rates; use radam"),
        ("torch_optimizer.Lookahead", {}, "cannot be saved; use optimizer.lookahead"),
        ("torch.optim.NAdam", {"lr": 1}, "has no option 'lr'"),
        ("torch.optim.LBFGS", {}, "has one rate for all parameters"),
        ("torch.optim.Muon", {}, "moves matrices only"),
        ("torch.optim.SparseAdam", {}, "is for sparse gradients only"),
        ("torch_optimizer.Adahessian", {}, "needs second derivatives"),
        ("torch_optimizer.Adafactor", {}, "makes its own rates unless its option relative_step is false"),
    ],
)
def test_a_class_by_name_is_checked(path: str, options: dict[str, Any], message: str) -> None:
    group = ParameterGroup("a", 1e-3, 0.0, ["w"], [nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        build_optimizer("class", [group], path=path, options=options)


def classes_of_the_packages() -> list[str]:
    """Return the dotted names of all optimizers that `class` could be asked for, those that are refused left out."""
    found = []
    for package in PACKAGES:
        module = import_module(package)
        classes = [name for name in dir(module) if inspect.isclass(getattr(module, name))]
        found += [
            f"{package}.{name}"
            for name in classes
            if issubclass(getattr(module, name), torch.optim.Optimizer) and name != "Optimizer"
        ]
    return [path for path in found if path not in UNFIT]


@pytest.mark.filterwarnings("ignore")  # torch_optimizer's classes use what torch calls old
@pytest.mark.parametrize("path", classes_of_the_packages())
def test_every_class_that_is_allowed_heeds_the_rates_of_its_groups(path: str) -> None:
    # All of them but a few that scale their steps are exact; what ignores the rates has a ratio of 1.
    options = {"relative_step": False} if path == "torch_optimizer.Adafactor" else {}
    slow, fast = (nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    groups = [ParameterGroup("slow", 1e-4, 0.0, ["a"], [slow]), ParameterGroup("fast", 1e-2, 0.0, ["b"], [fast])]
    optimizer = build_optimizer("class", groups, path=path, options=options)
    for _ in range(2):
        for parameter in (slow, fast):
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
    moved = [float((parameter.detach() - 1).abs().mean()) for parameter in (slow, fast)]
    assert moved[1] > 5 * moved[0] > 0


def test_what_cannot_work_together_is_refused() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Optimizer)
    with pytest.raises(ValueError, match="madgrad with momentum .* forgets what lookahead does; set momentum to 0"):
        adapter.validate_python({"name": "madgrad", "lookahead": {}})
    adapter.validate_python({"name": "madgrad", "lookahead": {}, "momentum": 0})
    with pytest.raises(ValueError, match="momentum 0 with eps 0 divides 0 by 0"):
        build_optimizer("madgrad", [], momentum=0.0, eps=0.0, decouple_decay=False)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        walker(steps=0)


def test_missing_packages_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch_optimizer", None)
    with pytest.raises(ValueError, match=r"'torch_optimizer.DiffGrad' needs the package"):
        build_optimizer("class", [], path="torch_optimizer.DiffGrad", options={})
