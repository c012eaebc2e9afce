"""SWA, EMA and soups: the right mean, restored bit by bit, scored and saved beside best and last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TinyCompetition
from safetensors.torch import load_file
from torch import nn

from comp import config_file
from comp.metrics import evaluate, is_better
from comp.runs import RunFolder, read_json
from comp.ship.infer import infer, load
from comp.stability.averaging import EMA, SWA, NoAverager, Soup
from comp.training import crossval

LOWER = partial(is_better, "rmse")


def model_at(value: float = 0.0) -> nn.Linear:
    model = nn.Linear(2, 2)
    put(model, value)
    return model


def put(model: nn.Linear, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def test_swa_is_the_equal_mean_of_its_points() -> None:
    model = model_at()
    swa = SWA(model, start=4, interval=3)
    for step in range(1, 12):
        put(model, step**2)
        assert swa.ready == (step > 4)
        swa.update(step)
    assert swa.count == 3
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    with swa.swapped_in():
        assert torch.allclose(model.weight, torch.full((2, 2), (4**2 + 7**2 + 10**2) / 3))
    assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), kept, strict=True))


def test_ema_is_the_recursion_with_its_warm_up() -> None:
    model, expected = model_at(5.0), 5.0
    ema = EMA(model, decay=0.8)
    for step in range(1, 60):
        put(model, float(step))
        ema.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    with ema.swapped_in():
        assert torch.allclose(model.bias, torch.full((2,), expected))


def test_soups_keep_the_best_and_greed_takes_what_is_strictly_better() -> None:
    model = model_at()
    scores = {1.0: 0.5, 2.0: 0.4, 3.0: 0.9, 4.0: 0.45, 5.0: 0.6}

    def soup(greedy: bool, size: int) -> Soup:
        made = Soup(model, size=size, greedy=greedy, is_better=LOWER)
        for step, (value, score) in enumerate(scores.items()):
            put(model, value)
            made.evaluated(step, score)
        return made

    uniform = soup(False, 3)
    assert [score for score, _ in uniform.ingredients] == [0.4, 0.45, 0.5]
    uniform.finish(None)
    with uniform.swapped_in():
        assert torch.allclose(model.weight, torch.full((2, 2), (2.0 + 4.0 + 1.0) / 3))
    tried: list[float] = []

    def held_out() -> float:
        tried.append(round(model.weight[0, 0].item(), 4))
        return {3.0: 0.4, 1.5: 0.3}.get(tried[-1], 0.35)

    greedy = soup(True, 3)
    greedy.finish(held_out)
    assert tried == [3.0, 1.5], "2 and 4 together are no better; 2 and 1 are"
    with greedy.swapped_in():
        assert torch.allclose(model.weight, torch.full((2, 2), 1.5))


def test_frozen_weights_are_not_copied_and_nothing_is_nothing() -> None:
    model = model_at()
    model.bias.requires_grad_(False)
    assert len(SWA(model, start=1, interval=1).params) == 1
    none = NoAverager()
    none.update(1)
    none.evaluated(1, 0.5)
    none.finish(None)
    assert not none.ready
    with none.swapped_in():
        assert model.weight.sum() == 0


RECIPES: dict[str, dict[str, Any]] = {
    "swa": {"name": "swa", "start_percent": 25, "points": 3},
    "ema": {"name": "ema", "decay": 0.5},
    "soup": {"name": "soup", "size": 3},
    "uniform soup": {"name": "soup", "size": 3, "greedy": False},
}


@pytest.fixture
def trained(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Callable[..., Any]:
    """Return `trained(averaging, folds)`: run it as "on", and the same without as "off"; return the competition."""

    def run(averaging: dict[str, Any], folds: str = "all") -> Any:
        competition = tiny_competition()
        data = competition.config(tiny_model_folder("bert"), optimizer={"lr": 1e-3}, evaluation={"every": "1 steps"})
        data["training"]["epochs"] = 2
        (isolated / "off.yaml").write_text(yaml.safe_dump(data))
        (isolated / "on.yaml").write_text(yaml.safe_dump(data | {"stability": {"averaging": averaging}}))
        for name in ("off", "on"):
            crossval.run(config_file.load(f"{name}.yaml"), name, folds, say=SAID.append)
        return competition

    SAID.clear()
    return run


SAID: list[str] = []


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_scored_saved_and_predicts(recipe: str, trained: Callable[..., Any]) -> None:
    competition = trained(RECIPES[recipe])
    folder = RunFolder("runs/on")
    scores = read_json(folder.scores)
    frame = pd.read_parquet(folder.oof)
    targets, averaged = frame[["target_main_target"]].to_numpy(), frame[["averaged_main_target"]].to_numpy()
    assert scores["averaged"]["pooled"] == evaluate("rmse", targets, averaged)
    means = {name: scores[name]["mean"] for name in ("averaged", "last", "best")}
    assert scores["ahead"] == min(means, key=lambda name: means[name])
    assert f"ahead by the mean of folds: {scores['ahead']} weights" in "\n".join(SAID)
    for fold in (0, 1):
        rows = frame[frame["fold"] == fold]
        texts = pd.read_csv(competition.train, dtype=str).set_index("id").loc[rows["id"]].reset_index()
        found = load("runs/on", folds=[fold], weights="averaged").predict(texts)["target"].to_numpy()
        assert np.abs(found - rows["averaged_main_target"].to_numpy()).max() < 1e-6
        own = rows[["target_main_target"]].to_numpy(), rows[["averaged_main_target"]].to_numpy()
        assert read_json(folder.fold(fold).done)["averaged"] == pytest.approx(evaluate("rmse", *own))
    infer(["runs/on"], weights="averaged", say=SAID.append)
    # The path of training is that of the run without, but for SWA's constant rate.
    on, off = (load_file(f"runs/{name}/fold0/last.safetensors") for name in ("on", "off"))
    assert all(torch.equal(on[key], off[key]) for key in on) == (recipe != "swa")
    assert "averaged" not in read_json(RunFolder("runs/off").scores)


def test_swa_holds_every_group_at_its_share_of_its_own_peak(trained: Callable[..., Any]) -> None:
    import json

    trained({"name": "swa", "start_percent": 50, "points": 2, "lr_factor": 0.3}, "0")
    lines = [json.loads(line) for line in RunFolder("runs/on").fold(0).metrics.read_text().splitlines()]
    rates = {line["step"]: line["train/lr"] for line in lines if "train/lr" in line}
    last = max(rates)
    assert rates[last] == pytest.approx(0.3 * 1e-3)


def test_a_full_run_averages_without_held_out_rows(trained: Callable[..., Any]) -> None:
    competition = trained({"name": "ema"}, "full")
    assert RunFolder("runs/on").fold("full").averaged.exists()
    load("runs/on", weights="averaged").predict(pd.read_csv(competition.test, dtype=str))


def test_a_soup_needs_held_out_rows(trained: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="'soup' chooses by held-out rows, which --fold full has not; use swa or ema"):
        trained({"name": "soup"}, "full")


def test_averaged_weights_that_are_not_there_are_said(trained: Callable[..., Any]) -> None:
    competition = trained({"name": "ema"}, "0")
    with pytest.raises(
        ValueError, match="has no averaged weights: stability.averaging was none; use --weights best or last"
    ):
        load("runs/off", weights="averaged").predict(pd.read_csv(competition.test, dtype=str))
    with pytest.raises(ValueError, match="allowed are best, last and averaged"):
        load("runs/off", weights="mean")


def test_lookahead_and_an_average_are_refused() -> None:
    base = Path(__file__).parents[1] / "configs" / "clear-minilm.yaml"
    for optimizer in ("optimizer.name=radam_lookahead", "optimizer.lookahead={}"):
        with pytest.raises(ValueError, match="'swa' and lookahead both average the weights along the run"):
            config_file.load(base, [optimizer, "stability.averaging.name=swa"])
