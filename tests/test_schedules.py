"""SCHEDULES against transformers.get_scheduler; warm-up units."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from transformers import get_scheduler

from comp import config
from comp.optim.schedules import SCHEDULES, build_schedule

LR = 3e-5
BEYOND = 4


def _schedule(**fields: Any) -> config.Schedule:
    return TypeAdapter(config.Schedule).validate_python(fields)


def _library(name: str, num_steps: int, warmup: int, **own: Any) -> list[float]:
    """Multipliers of the library's LambdaLR for steps 0 .. num_steps + BEYOND."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = get_scheduler(
        name,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=num_steps,
        scheduler_specific_kwargs=own,
    )
    return [float(scheduler.lr_lambdas[0](step)) for step in range(num_steps + 1 + BEYOND)]


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("constant", {}, {}),
    ("constant_with_warmup", {}, {}),
    ("linear", {}, {}),
    ("cosine", {}, {}),
    ("cosine", {"num_cycles": 1.25}, {"num_cycles": 1.25}),
    ("cosine_with_restarts", {"num_cycles": 1}, {"num_cycles": 1}),
    ("cosine_with_restarts", {"num_cycles": 3}, {"num_cycles": 3}),
    ("polynomial", {}, {"lr_end": 0.0, "power": 1.0}),
    ("polynomial", {"power": 2.5, "end_multiplier": 0.1}, {"lr_end": 0.1 * LR, "power": 2.5}),
]


@pytest.mark.parametrize(("name", "own", "theirs"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 0), (1, 1), (2, 1), (7, 0), (50, 5), (50, 49), (50, 50)])
def test_equals_transformers_at_every_step(
    name: str, own: dict[str, Any], theirs: dict[str, Any], num_steps: int, warmup: int
):
    warmed = {} if name == "constant" else {"warmup_steps": warmup}
    schedule = build_schedule(_schedule(name=name, **warmed, **own), num_steps=num_steps, steps_per_epoch=num_steps)
    ours = [schedule(step) for step in range(num_steps + 1 + BEYOND)]
    assert all(isinstance(value, float) for value in ours)
    if name == "polynomial" and warmup == num_steps:
        # the library divides by zero at that one step; here the end is reached at once
        with pytest.raises(ZeroDivisionError):
            _library(name, num_steps, warmup, **theirs)
        end = own.get("end_multiplier", 0.0)
        assert ours == [step / warmup for step in range(warmup)] + [end] * (1 + BEYOND)
        return
    assert ours == pytest.approx(_library(name, num_steps, warmup, **theirs), rel=1e-12, abs=1e-12)


def test_catalogue_keys_and_options_agree_with_the_config():
    variants = TypeAdapter(config.Schedule).json_schema()
    assert set(variants["discriminator"]["mapping"]) == set(SCHEDULES)
    for name, row in SCHEDULES.items():
        own = set(type(_schedule(name=name)).model_fields) - {"name"}
        if own:
            own = own - {"warmup_percent", "warmup_epochs"}
        assert set(inspect.signature(row.make).parameters) == {"step", "num_steps", *own}, name


def _peak(num_steps: int = 200, steps_per_epoch: int = 50, **fields: Any) -> int:
    """First step with the full rate."""
    schedule = build_schedule(_schedule(name="linear", **fields), num_steps=num_steps, steps_per_epoch=steps_per_epoch)
    return next(step for step in range(num_steps + 1) if schedule(step) == 1.0)


def test_warmup_in_every_unit():
    assert _peak() == 20  # 10% when nothing is said
    assert _peak(warmup_percent=5) == 10
    assert _peak(warmup_percent=0) == 0
    assert _peak(warmup_steps=7) == 7
    assert _peak(warmup_epochs=0.5) == 25
    assert _peak(warmup_percent=50) == 100


def test_warmup_rounds_to_the_nearest_step():
    assert _peak(num_steps=15, warmup_percent=10) == 2  # 1.5
    assert _peak(num_steps=14, warmup_percent=10) == 1  # 1.4
    assert _peak(warmup_epochs=0.01) == 1  # 0.5
    assert _peak(num_steps=4) == 0  # 0.4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"warmup_steps": 21},
            r"schedule\.warmup_steps: 21 is a warm-up of 21 steps, but the run has only 20 \(10 an epoch\)",
        ),
        ({"warmup_epochs": 2.5}, r"schedule\.warmup_epochs: 2\.5 is a warm-up of 25 steps, but the run has only 20"),
    ],
)
def test_a_warmup_longer_than_the_run_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        build_schedule(_schedule(name="cosine", **fields), num_steps=20, steps_per_epoch=10)


def test_two_units_are_refused_by_the_config():
    with pytest.raises(ValidationError, match="give the warm-up in one unit"):
        _schedule(name="linear", warmup_steps=3, warmup_percent=5)
