"""Inference over many models: order, time budget, going on after a kill, and what must not change the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TinyCompetition
from typer.testing import CliRunner

from comp import config_file, load
from comp.blend.crossfit import read_blend
from comp.cli import app
from comp.ship import infer as ship
from comp.ship.jobs import Job, Jobs, parse_duration
from comp.training import crossval, predict

# --- jobs ------------------------------------------------------------------------------------------------------------


def test_durations() -> None:
    assert [parse_duration(text) for text in ("8h", "1.5 h", "90min", "300s")] == [28800, 5400, 5400, 300]
    for text in ("", "8", "h", "0h", "-1h", "nan h", "8 hours", "inf s"):
        with pytest.raises(ValueError, match="--time-budget .*: allowed are like 8h, 90min or 300s"):
            parse_duration(text)


def plan(seconds: float | None, now: list[float], weights: tuple[float, ...] = (0.2, 0.5, 0.3)) -> Jobs:
    planned = [Job(run, fold, 1.0) for run in range(len(weights)) for fold in (0, 1)]
    return Jobs(weights, planned, seconds, clock=lambda: now[0])


def play(jobs: Jobs, now: list[float], each: float) -> list[tuple[int, Any]]:
    played = []
    while (job := jobs.next()) is not None:
        now[0] += each
        played.append((job.run, job.fold))
        jobs.finished(job, each)
    return played


def test_without_a_budget_all_play_heaviest_first() -> None:
    now = [0.0]
    assert play(plan(None, now), now, 100.0) == [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (700, [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]),
        (600, [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0)]),  # the lightest run's second fold goes first
        (400, [(1, 0), (2, 0), (0, 0)]),  # then every second fold
        (250, [(1, 0), (2, 0)]),  # then the lightest run
        (120, [(1, 0)]),
        (10, [(1, 0)]),  # one model always plays
    ],
)
def test_what_will_not_fit_is_dropped_from_the_lightest_up(budget: float, expected: list[tuple[int, int]]) -> None:
    now = [0.0]
    jobs = plan(budget, now)
    assert play(jobs, now, 100.0) == expected
    assert len(jobs.dropped) == 6 - len(expected)
    assert budget < 200 or now[0] <= budget


def test_costs_are_projected_by_size_and_kept_jobs_measure_nothing() -> None:
    now = [0.0]
    jobs = Jobs((1.0, 1.0), [Job(0, 0, 1.0), Job(0, 1, 1.0), Job(1, 0, 5.0)], 700.0, clock=lambda: now[0])
    first = jobs.next()
    assert first is not None
    jobs.finished(first, None)
    assert jobs.projected() == 0.0
    second = jobs.next()
    assert second is not None
    now[0] = 100.0
    jobs.finished(second, 100.0)
    assert jobs.projected() == 500.0
    assert jobs.next() is not None and jobs.next() is None and not jobs.dropped


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> TinyCompetition:
    """Two runs of two folds, one with a full-data model too, and a ridge blend of both."""
    competition = tiny_competition()
    data = competition.config(tiny_model_folder("bert"), optimizer={"lr": 1e-3})
    data["training"] = data.get("training", {}) | {"precision": "fp32"}
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    for name, overrides in (("a", []), ("b", ["model.pooler.name=max"])):
        crossval.run(config_file.load("tiny.yaml", overrides), name, save_every="never", say=lambda line: None)
    crossval.run(config_file.load("tiny.yaml"), "a", "full", save_every="never", say=lambda line: None)
    assert CliRunner().invoke(app, ["blend", *both(), "--method", "ridge"]).exit_code == 0
    return competition


def both() -> list[str]:
    return ["--run", "runs/a", "--run", "runs/b"]


def submitted(*words: str) -> pd.Series:
    found = CliRunner().invoke(app, ["infer", *words, "--out", "out.csv"])
    assert found.exit_code == 0, found.exception
    return pd.read_csv("out.csv", dtype={"id": str}).set_index("id")["target"]


def forget() -> None:
    for file in ship.PREDICTIONS.glob("*.npy"):
        file.unlink()


def test_order_of_rows_runs_and_size_of_batches_change_nothing(
    trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = submitted(*both())
    blended = submitted("--blend", "blends/blend")
    forget()
    assert submitted("--run", "runs/b", "--run", "runs/a").to_numpy() == pytest.approx(first.to_numpy(), abs=1e-6)
    real = predict.sorted_batches
    for rows in (1, 7):
        forget()
        monkeypatch.setattr(predict, "sorted_batches", lambda lengths, rows=rows: real(lengths, max_rows=rows))
        assert submitted(*both()).to_numpy() == pytest.approx(first.to_numpy(), abs=1e-6)
    monkeypatch.setattr(predict, "sorted_batches", real)
    test = pd.read_csv(trained.test, dtype=str)
    test.sample(frac=1, random_state=3).to_csv("shuffled.csv", index=False)
    turned = submitted("--blend", "blends/blend", "--test", "shuffled.csv")
    assert turned.loc[blended.index].to_numpy() == pytest.approx(blended.to_numpy(), abs=1e-6)


def test_a_full_data_model_counts_as_any_other_model(trained: TinyCompetition) -> None:
    test = pd.read_csv(trained.test, dtype=str)
    each = [load("runs/a", folds=[fold]).predict(test)["target"].to_numpy() for fold in (0, 1, "full")]
    found = submitted("--run", "runs/a", "--fold", "0,1,full").loc[test["id"]].to_numpy()
    assert found == pytest.approx(np.mean(each, axis=0), abs=1e-5)
    alone = submitted("--run", "runs/a", "--fold", "full").loc[test["id"]].to_numpy()
    assert alone == pytest.approx(each[2], abs=1e-5)
    refused = CliRunner().invoke(app, ["infer", "--run", "runs/a", "--fold", "0,0"])
    assert "allowed are full, numbers like 0,2, or both like 0,1,full" in str(refused.exception)


def test_a_killed_call_goes_on(trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = submitted(*both())
    forget()
    real, calls = ship.predict, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(ship, "predict", counted)
    CliRunner().invoke(app, ["infer", *both(), "--out", "out.csv"])
    assert len(calls) == 3
    assert submitted(*both()).to_numpy() == pytest.approx(whole.to_numpy(), abs=1e-12)
    assert len(calls) == 3 + 2, "two of four models were there"
    assert submitted(*both()).equals(whole)
    assert len(calls) == 5
    # another model under the same name is another prediction
    crossval.run(config_file.load("tiny.yaml", ["training.seed=9"]), "a", restart=True, say=lambda line: None)
    assert not np.allclose(submitted(*both()), whole, atol=1e-4)


def test_a_time_budget_leaves_a_valid_file_and_says_what_it_left_out(
    trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(ship.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ship, "Jobs", partial(Jobs, clock=lambda: now[0]))
    real, files = ship.predict, []

    def slow(*args: Any, **options: Any) -> Any:
        files.append(Path("out.csv").exists())
        now[0] += 100.0
        return real(*args, **options)

    monkeypatch.setattr(ship, "predict", slow)
    said = CliRunner().invoke(app, ["infer", "--blend", "blends/blend", "--time-budget", "240s", "--out", "out.csv"])
    assert said.exit_code == 0, said.exception
    assert files == [False, True], "the file is written after every model"
    assert said.output.count("left out, the time budget would not do: runs/") == 2
    models = [run["models"] for run in json.loads(Path("out.json").read_text())["runs"]]
    assert models == [1, 1]
    forget()
    now[0] = 0.0
    said = CliRunner().invoke(app, ["infer", "--blend", "blends/blend", "--time-budget", "110s", "--out", "out.csv"])
    models = [run["models"] for run in json.loads(Path("out.json").read_text())["runs"]]
    assert sorted(models) == [0, 1]
    blend, test = read_blend("blends/blend"), pd.read_csv(trained.test, dtype=str)
    heaviest = models.index(1)
    preds = load(blend.runs[heaviest], folds=[0]).predict(test)[["target"]].to_numpy()
    expected = blend.among([heaviest]).apply(preds[None])[:, 0]
    found = pd.read_csv("out.csv", dtype={"id": str}).set_index("id").loc[test["id"], "target"].to_numpy()
    assert found == pytest.approx(expected, abs=1e-5), "the blend is fitted again to the runs there are"
