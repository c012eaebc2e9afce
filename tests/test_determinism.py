"""`comp train --check-determinism`: says whether the same steps give the same bits, and leaves nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import contents

from comp import config_file
from comp.config import Config
from comp.training import determinism, trainer
from comp.training.determinism import check_determinism, compare, shortened
from comp.training.objective import Objective

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def launch(call: Call, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run the command line in this process, as the check does in one of its own."""

    def run(place: Path, arguments: Sequence[str], environment: dict[str, str]) -> None:
        with monkeypatch.context() as patch:
            patch.chdir(place)
            patch.setattr(trainer, "LOG_STEPS", 1)
            status, _, err = call(*arguments)
            assert status == 0, err

    return run


def test_the_same_bits_are_said_and_nothing_is_left(here: Path, launch: Any) -> None:
    config = config_file.load("tiny.yaml", ["model.dropout=0.1", "stability.averaging={name: ema}"])
    before, said = contents(here), []
    assert check_determinism(config, "0", say=said.append, launch=launch)
    assert said[0].startswith("the same bits: 20 steps twice, in two processes, ")
    assert contents(here) == before


def test_the_first_step_that_differs_is_named(
    here: Path, launch: Any, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Objective.share, []

    def share(*args: Any) -> Any:
        calls.append(1)
        return real(*args) * (1 + 1e-6 * (len(calls) == 20 + 7))  # the seventh step of the second trial

    monkeypatch.setattr(Objective, "share", share)
    monkeypatch.setattr(determinism, "_process", launch)
    status, out, err = call("train", "--config", "tiny.yaml", "--check-determinism")
    assert status == 1, err
    assert "not the same bits: step 7 is the first to differ, the loss is 0." in out and "OMP_NUM_THREADS" in out


def test_compare_looks_at_losses_gradients_and_weights() -> None:
    one: dict[str, Any] = {"steps": {1: (0.5, 1.0), 2: (0.4, 1.1)}, "weights": {"a": b"1", "b": b"2"}}
    assert compare(one, one) is None
    assert compare(one, {**one, "steps": {**one["steps"], 2: (0.4, 1.2)}}) == (
        "step 2 is the first to differ, the gradient norm is 1.1 and 1.2"
    )
    assert compare(one, {**one, "steps": {1: (0.5, 1.0)}}) == "step 2 is in one of the two only"
    assert compare(one, {**one, "weights": {"a": b"1", "b": b"3"}}) == (
        "losses agree, but 1 of 2 tensors of weights differ, b first"
    )


@pytest.mark.parametrize(("batch", "rows", "expected"), [(8, 30, (30, 5)), (8, 5000, (160, 1)), (16, 17, (17, 10))])
def test_a_trial_has_twenty_steps(batch: int, rows: int, expected: tuple[int, int], here: Path) -> None:
    config = config_file.load(
        "tiny.yaml", [f"training.batch_size={batch}", "schedule={name: linear, warmup_steps: 99}"]
    )
    found: Config = shortened(config, rows)
    assert (found.training.max_rows, found.training.epochs) == expected
    assert found.schedule.warmup_steps == 20 and found.evaluation.every is None


@pytest.mark.slow
def test_two_real_processes(here: Path, call: Call) -> None:
    before = contents(here)
    status, out, err = call("train", "--config", "tiny.yaml", "--check-determinism", "--fold", "1")
    assert status == 0, err
    assert "the same bits: 20 steps twice, in two processes" in out
    assert contents(here) == before
    status, _, err = call("train", "--config", "tiny.yaml", "--check-determinism", "--set", "model.max_length=65")
    assert status == 2 and "the trial of 20 steps failed: model.max_length is 65" in err
