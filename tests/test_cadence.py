"""When to evaluate."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from comp.training.cadence import Cadence, Never

TABLE = [(0.50, 16), (0.49, 8), (0.48, 4), (0.47, 2), (-1.0, 1)]


def steps_of(cadence: Cadence, score: float = 0.0) -> list[int]:
    found, last, last_score = [], 0, None
    for step in range(1, cadence.num_steps + 1):
        if cadence.due(step, last, last_score):
            found.append(step)
            last, last_score = step, score
    return found


def made(every: tuple[float, str] | None, steps: int = 30, per_epoch: int = 10, **options: object) -> Cadence:
    return Cadence.from_unit(
        num_steps=steps, steps_per_epoch=per_epoch, every=every, **{"table": None, "start_percent": 0, **options}
    )


def test_percent_of_an_epoch_and_steps() -> None:
    assert steps_of(made((50, "percent"))) == [5, 10, 15, 20, 25, 30]
    assert steps_of(made((7, "steps"))) == [7, 14, 21, 28, 30]
    assert steps_of(made((100, "percent"))) == [10, 20, 30]
    assert steps_of(made((30, "percent"), steps=10)) == [3, 6, 9, 10], "the tail of the run must be scored"


def test_fractions_do_not_drift() -> None:
    # 10% of 25 steps is 2.5: 40 evaluations in 4 epochs, 10 in each
    assert len(steps_of(made((10, "percent"), steps=100, per_epoch=25))) == 40
    assert steps_of(made((10, "percent"), steps=25, per_epoch=25)) == [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]


def test_nothing_asked_for_means_the_end_only() -> None:
    assert steps_of(made(None)) == [30]


def test_no_evaluation_before_the_start() -> None:
    assert steps_of(made((2, "steps"), start_percent=50)) == [16, 18, 20, 22, 24, 26, 28, 30]


def test_the_well_known_table() -> None:
    cadence = made(None, table=TABLE)
    expected = {0.6: 16, 0.5: 16, 0.495: 8, 0.49: 8, 0.485: 4, 0.47: 2, 0.465: 1, -5.0: 1}
    assert {score: cadence.steps_after(score) for score in expected} == expected
    assert steps_of(made(None, steps=40, table=TABLE), score=0.485) == [16, 20, 24, 28, 32, 36, 40]
    assert steps_of(made(None, steps=30, table=TABLE, start_percent=50), score=0.465)[:2] == [30]


@given(st.integers(1, 60), st.integers(1, 40), st.floats(0.5, 300), st.floats(0, 99))
def test_last_step_always_and_never_the_same_step_twice(
    steps: int, per_epoch: int, percent: float, start: float
) -> None:
    found = steps_of(made((percent, "percent"), steps=steps, per_epoch=per_epoch, start_percent=start))
    assert found[-1] == steps
    assert len(set(found)) == len(found)
    interval = percent / 100 * per_epoch
    gaps = [b - a for a, b in pairwise(found)][:-1]
    assert all(abs(gap - max(interval, 1)) <= 1 for gap in gaps)


def test_never() -> None:
    assert not any(Never().due(step, 0, None) for step in range(10))
