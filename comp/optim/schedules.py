"""SCHEDULES: pure functions (step, num_steps) -> multiplier of the learning rate.

`step` counts optimizer steps from 0, so step 0 of a warmed-up schedule has rate 0. Every function equals the
lambda of the same name in transformers.optimization (`get_scheduler`) at every step, also beyond the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from comp.catalog import Row, pick
from comp.config_variants import Schedule, WarmupSchedule

__all__ = ["SCHEDULES", "build_schedule"]


def _progress(step: int, num_steps: int, warmup_steps: int) -> float:
    """Return the share of the way from the end of warm-up (0) to the last step (1); larger beyond it."""
    return (step - warmup_steps) / max(1, num_steps - warmup_steps)


def _rise(step: int, warmup_steps: int) -> float:
    return step / max(1, warmup_steps)


def constant(step: int, num_steps: int) -> float:
    """Return 1."""
    return 1.0


def constant_with_warmup(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Rise linearly from 0 to 1, then stay."""
    return _rise(step, warmup_steps) if step < warmup_steps else 1.0


def linear(step: int, num_steps: int, *, warmup_steps: int = 0) -> float:
    """Rise linearly from 0 to 1, then fall linearly to 0."""
    if step < warmup_steps:
        return _rise(step, warmup_steps)
    return max(0.0, (num_steps - step) / max(1, num_steps - warmup_steps))


def cosine(step: int, num_steps: int, *, warmup_steps: int = 0, num_cycles: float = 0.5) -> float:
    """Rise linearly, then follow `num_cycles` waves of a cosine that starts at 1; 0.5 = one fall to 0.

    Beyond num_steps the wave goes on, as in the library.
    """
    if step < warmup_steps:
        return _rise(step, warmup_steps)
    wave = math.cos(2.0 * math.pi * num_cycles * _progress(step, num_steps, warmup_steps))
    return max(0.0, 0.5 * (1.0 + wave))


def cosine_with_restarts(step: int, num_steps: int, *, warmup_steps: int = 0, num_cycles: int = 2) -> float:
    """Rise linearly, then fall `num_cycles` times from 1 to 0 along half a cosine."""
    if step < warmup_steps:
        return _rise(step, warmup_steps)
    progress = _progress(step, num_steps, warmup_steps)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def polynomial(
    step: int, num_steps: int, *, warmup_steps: int = 0, power: float = 1.0, end_multiplier: float = 0.0
) -> float:
    """Rise linearly, then fall to `end_multiplier` (share of the peak) as (1 - progress) ** power.

    The library's `lr_end` is end_multiplier x lr. Without steps after the warm-up it divides by zero; here
    the end is reached at once.
    """
    if step < warmup_steps:
        return _rise(step, warmup_steps)
    if step >= num_steps:
        return end_multiplier
    left = 1.0 - _progress(step, num_steps, warmup_steps)
    return float((1.0 - end_multiplier) * left**power + end_multiplier)


SOURCE = "transformers.optimization"

SCHEDULES: dict[str, Row] = {
    "constant": Row(constant, "the same rate throughout", SOURCE),
    "constant_with_warmup": Row(constant_with_warmup, "linear warm-up, then constant", SOURCE),
    "linear": Row(linear, "linear warm-up, then linear fall to 0", SOURCE),
    "cosine": Row(cosine, "linear warm-up, then a cosine's fall to 0", SOURCE),
    "cosine_with_restarts": Row(
        cosine_with_restarts, "linear warm-up, then num_cycles falls to 0, each from the full rate", SOURCE
    ),
    "polynomial": Row(polynomial, "linear warm-up, then a power's fall to end_multiplier", SOURCE),
}

UNITS = ("warmup_percent", "warmup_steps", "warmup_epochs")


def build_schedule(schedule: Schedule, *, num_steps: int, steps_per_epoch: int) -> Callable[[int], float]:
    """Return step -> multiplier for a run of `num_steps` optimizer steps.

    The warm-up is converted to whole steps once, here. Raises ValueError when it is longer than the run.
    """
    assert num_steps >= 1, num_steps
    assert steps_per_epoch >= 1, steps_per_epoch
    make = pick(SCHEDULES, schedule.name, "schedule").make
    own = schedule.model_dump(exclude={"name", *UNITS})
    if isinstance(schedule, WarmupSchedule):
        own["warmup_steps"] = _warmup_steps(schedule, num_steps, steps_per_epoch)
    return partial(make, num_steps=num_steps, **own)


def _warmup_steps(schedule: WarmupSchedule, num_steps: int, steps_per_epoch: int) -> int:
    unit, length = next((unit, value) for unit in UNITS if (value := getattr(schedule, unit)) is not None)
    per_unit = {"warmup_percent": num_steps / 100, "warmup_steps": 1, "warmup_epochs": steps_per_epoch}[unit]
    steps = math.floor(length * per_unit + 0.5)
    if steps > num_steps:
        raise ValueError(
            f"schedule.{unit}: {length:g} is a warm-up of {steps} steps, but the run has only {num_steps} "
            f"({steps_per_epoch} an epoch); shorten the warm-up, or give it as warmup_percent"
        )
    return int(steps)
