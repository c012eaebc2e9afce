"""`comp lr-find`: the smoothing, the readings, the optimizers' ranges, and that nothing is left."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Call, TinyCompetition, contents

from comp import config_file
from comp.runtime import random_state
from comp.training.lr_find import RANGES, USUAL, has_diverged, lr_find, range_of, read_curve, smooth


@pytest.fixture
def config_of(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Callable[..., Any]:
    competition = tiny_competition()

    def make(*overrides: str, **sections: Any) -> Any:
        data = competition.config(tiny_model_folder("bert"), **sections)
        Path("tiny.yaml").write_text(yaml.safe_dump(data))
        return config_file.load("tiny.yaml", overrides)

    return make


# --- the readings ----------------------------------------------------------------------------------------------------


def test_the_average_is_corrected_for_its_start() -> None:
    assert smooth(np.array([3.0, 3.0, 3.0])) == pytest.approx([3, 3, 3])
    weights = np.array([0.9**2, 0.9, 1.0])
    wanted = (weights * [1.0, 5.0, 2.0]).sum() / weights.sum()
    assert smooth(np.array([1.0, 5.0, 2.0]))[-1] == pytest.approx(wanted)


def test_the_readings_of_a_known_curve() -> None:
    """The loss falls fastest at 1e-4, is lowest at 1e-3, and rises then; the average comes a few steps later."""
    lrs = np.geomspace(1e-7, 1e-1, 601)
    place = np.log10(lrs)
    losses = 1 - 0.5 / (1 + np.exp(-4 * (place + 4))) + 2 * np.clip(place + 3, 0, None) ** 2
    curve = read_curve("it", lrs, losses, diverged=True)
    assert curve.steepest == pytest.approx(1e-4, rel=0.5)
    assert curve.minimum == pytest.approx(1e-3, rel=0.5)
    assert curve.suggestion == pytest.approx(min(curve.steepest, curve.minimum / 10))
    table = curve.table()
    assert f"optimizer.lr={curve.suggestion:.1e}" in table and len(table.splitlines()) == 22
    assert "look further" in read_curve("it", lrs, losses, diverged=False).table()


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    curve = read_curve("it", np.geomspace(1e-5, 1, 40), np.linspace(1, 9, 40), diverged=True)
    assert curve.suggestion is None and "no suggestion" in curve.table()
    broken = read_curve("it", np.geomspace(1e-5, 1, 3), np.array([1.0, np.nan, 2.0]), diverged=True)
    assert len(broken.lrs) == 1 and "no suggestion" in broken.table()


def test_divergence_is_far_above_the_best_of_losses_of_any_sign() -> None:
    assert not has_diverged(np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 1.9]))
    assert has_diverged(np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 2.1]))
    assert has_diverged(np.array([1.0, np.inf])) and has_diverged(np.array([1.0, np.nan]))
    assert not has_diverged(np.array([-1.0, -1.1, -1.2, -1.3, -1.4, -1.5, 2.9]))
    assert has_diverged(np.array([-1.0, -1.1, -1.2, -1.3, -1.4, -1.5, 3.1]))
    assert not has_diverged(np.array([0.1, 9.0])), "the first losses say nothing yet"


def test_each_optimizer_has_its_range(config_of: Callable[..., Any]) -> None:
    assert range_of(config_of()) == USUAL
    assert range_of(config_of("optimizer.name=madgrad")) == RANGES["madgrad"]
    assert range_of(config_of("optimizer.name=adafactor"), 1e-4) == (1e-4, RANGES["adafactor"][1])
    with pytest.raises(ValueError, match="the lowest below the highest"):
        range_of(config_of(), 1e-2, 1e-3)


# --- the test itself -------------------------------------------------------------------------------------------------


def test_rates_grow_and_nothing_is_left(config_of: Callable[..., Any], isolated: Path) -> None:
    config = config_of(optimizer={"lr": 2e-5, "head_lr": 1e-3}, stability={"adversarial": {"name": "fgm"}})
    before, said = contents(isolated), []
    random.seed(7)
    torch.manual_seed(7)
    state = random_state()
    curve = lr_find(config, steps=30, lowest=1e-6, highest=1e-3, say=said.append)
    assert contents(isolated) == before and not (isolated / "runs").exists()
    after = random_state()
    assert after["python"] == state["python"] and torch.equal(after["torch"], state["torch"])
    assert torch.equal(after["numpy"][1], state["numpy"][1])
    assert said == ["adversarial of the config has no part in the range test"]
    assert not curve.diverged
    assert curve.lrs == pytest.approx(np.geomspace(1e-6, 1e-3, 30))
    again = lr_find(config, steps=30, lowest=1e-6, highest=1e-3, say=said.append)
    assert again.losses.tolist() == curve.losses.tolist(), "the seed of the config decides"


def test_losses_are_those_of_training(config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate that hardly grows, micro-batches or not, they are the losses that comp train logs."""
    import json

    from comp.training import crossval, trainer

    config = config_of(
        schedule={"name": "constant"},
        training={"epochs": 3, "batch_size": 8, "micro_batch_size": 3, "precision": "fp32"},
    )
    curve = lr_find(config, steps=12, lowest=2e-5, highest=2.0001e-5)
    monkeypatch.setattr(trainer, "LOG_STEPS", 1)
    crossval.run(config, "it", "0", say=lambda line: None)
    lines = [json.loads(line) for line in Path("runs/it/fold0/metrics.jsonl").read_text().splitlines()]
    logged = [line["train/loss"] for line in lines if "train/loss" in line]
    assert curve.losses == pytest.approx(logged, rel=1e-4)


@pytest.mark.parametrize("name", ["madgrad", "radam_lookahead"])
def test_it_stops_where_the_loss_diverges(name: str, config_of: Callable[..., Any]) -> None:
    curve = lr_find(config_of(f"optimizer.name={name}"), steps=40, lowest=1e-4, highest=1e4)
    assert curve.diverged and len(curve.lrs) < 40
    assert np.isfinite(curve.smoothed).all()


def test_the_command(config_of: Callable[..., Any], isolated: Path, call: Call) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `report`, is not installed")
    config_of()
    before = contents(isolated)
    optimizers = ["--optimizer", "adamw", "--optimizer", "madgrad"]
    status, out, err = call("lr-find", "--config", "tiny.yaml", "--steps", "12", *optimizers)
    assert status == 0, err
    assert "adamw" in out and "MADGRAD wants a sweep of its own" in out and "wrote lr-find-tiny.png" in out
    assert set(contents(isolated)) - set(before) == {"lr-find-tiny.png"}
    assert Path("lr-find-tiny.png").read_bytes().startswith(b"\x89PNG")
    Path("lr-find-tiny.png").unlink()
    status, out, _ = call("lr-find", "--config", "tiny.yaml", "--steps", "12", "--text")
    assert status == 0 and contents(isolated) == before
