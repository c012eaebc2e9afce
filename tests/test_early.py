"""Evaluations that stop early: what is kept is what full evaluation keeps, and what is an estimate is marked as one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TinyCompetition
from hypothesis import given, settings
from hypothesis import strategies as st
from test_resume import Killed, kill_at, leavings

from comp import config_file
from comp.config import Task
from comp.data.batches import sorted_batches
from comp.metrics import METRICS, evaluate, is_better, row_losses
from comp.runs import RunFolder
from comp.ship.report_panels import report_page
from comp.ship.report_run import read_run
from comp.training import crossval, early, held_out, predict
from comp.training.covariates import covariates_of, mean_over_all
from comp.training.decision import Decision
from comp.training.early import blocks, bound, cannot_win, estimate, looks_that_decide, most_worse, race
from comp.training.held_out import HeldOut
from comp.training.resume import Saver

SUMS = [name for name, row in METRICS.items() if row.losses is not None]
KIND = {"rmse": "regression", "mae": "regression", "log_loss": "multilabel", "accuracy": "multilabel"}
WILD = {"name": "adamw", "lr": 2e-3, "head_lr": 5e-2}
SAID: list[str] = []


# --- exact -----------------------------------------------------------------------------------------------------------


def trajectory(metric: str, draw: np.random.Generator, rows: int, columns: int, steps: int, coarse: bool) -> Any:
    """Targets and the predictions of a few checkpoints; coarse ones tie often, in their rows and in their scores."""
    whole = metric in ("accuracy", "log_loss")
    targets = draw.integers(0, 2, (rows, columns)).astype(float) if whole else draw.normal(size=(rows, columns))
    found = []
    for _ in range(steps):
        preds = draw.random((rows, columns)) if whole else targets + draw.normal(size=targets.shape) * draw.random()
        found.append(np.round(preds * 2) / 2 if coarse else preds)
        if draw.random() < 0.3:  # the same losses again, in other rows: a tie up to rounding
            found[-1] = found[draw.integers(len(found))].copy()
            if not whole:
                found[-1] = 2 * targets - found[-1]
    return targets, found


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(SUMS),
    st.integers(0, 10**6),
    st.integers(1, 60),
    st.integers(1, 3),
    st.integers(1, 9),
    st.booleans(),
)
def test_the_exact_bound_never_changes_what_is_kept(
    metric: str, seed: int, rows: int, columns: int, looks: int, coarse: bool
) -> None:
    draw = np.random.default_rng(seed)
    targets, found = trajectory(metric, draw, rows, columns, 8, coarse)
    kind, counts = KIND[metric], METRICS[metric].counts
    best, best_score, full_score = found[0], evaluate(metric, targets, found[0], kind), None
    for preds in found:
        score = evaluate(metric, targets, preds, kind)
        full_score = score if is_better(metric, score, full_score) else full_score
    for preds in found[1:]:
        losses, kept = row_losses(metric, targets, preds, kind), row_losses(metric, targets, best, kind)
        order = draw.permutation(rows)
        stops = (rows * np.arange(1, looks)) // looks
        stopped = any(
            cannot_win(losses[order[:stop]], kept, columns=columns, counts=counts) for stop in stops if stop > 0
        )
        score = evaluate(metric, targets, preds, kind)
        if stopped:
            assert not is_better(metric, score, best_score)
        elif is_better(metric, score, best_score):
            best, best_score = preds, score
    assert best_score == full_score


@given(st.sampled_from(SUMS), st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 3))
def test_the_mean_of_the_losses_is_the_metric(metric: str, seed: int, rows: int, columns: int) -> None:
    targets, (preds, *_) = trajectory(metric, np.random.default_rng(seed), rows, columns, 1, False)
    losses = row_losses(metric, targets, preds, KIND[metric])
    assert losses.shape == (rows,) and (losses >= 0).all()
    found = METRICS[metric].of_mean(losses.mean())
    assert found == pytest.approx(evaluate(metric, targets, preds, KIND[metric]), rel=1e-12, abs=1e-12)


def test_losses_of_classes_and_of_soft_labels() -> None:
    draw = np.random.default_rng(0)
    preds = draw.dirichlet(np.ones(4), 50)
    hard, soft = draw.integers(0, 4, (50, 1)).astype(float), draw.dirichlet(np.ones(4), 50)
    for metric in ("log_loss", "accuracy"):
        for targets in (hard, soft):
            losses = row_losses(metric, targets, preds, "multiclass")
            expected = evaluate(metric, targets, preds, "multiclass")
            assert METRICS[metric].of_mean(losses.mean()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="qwk is no mean over rows; those that are: rmse, mae, accuracy, log_loss"):
        row_losses("qwk", hard, preds, "multiclass")


def test_a_tie_is_not_certain_and_a_perfect_best_is() -> None:
    losses = np.random.default_rng(1).random(1000)
    assert not cannot_win(losses, losses[::-1]), "the same sum in another order differs by roundings"
    assert cannot_win(losses * (1 + 1e-9), losses)
    assert cannot_win(np.array([1.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0]), counts=True), "as many misses do not win"
    assert not cannot_win(np.array([1.0, 0.0]), np.array([0.0, 1.0, 1.0, 0.0]), counts=True)
    assert cannot_win(np.zeros(1), np.zeros(9))


def test_the_estimate_is_exact_with_all_rows_and_never_below_a_perfect_rest() -> None:
    draw = np.random.default_rng(2)
    best, new = draw.random(200), draw.random(200)
    assert estimate(new, float(best.mean()), float((new - best).mean()), 200) == pytest.approx(new.mean())
    samples = [draw.permutation(200)[:60] for _ in range(400)]
    found = [
        estimate(new[rows], float(best.mean()), race(new[rows] - best[rows], rows, 200, 2.0)[1], 200)
        for rows in samples
    ]
    assert np.mean(found) == pytest.approx(new.mean(), abs=0.005)
    assert estimate(np.array([5.0, 0.0]), 1.0, -6.5, 10) == 0.5


# --- race ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 39, 79, 80, 567, 3000])
def test_blocks_hold_every_row_once_and_are_alike(rows: int) -> None:
    targets = np.random.default_rng(0).normal(size=(rows, 2)).cumsum(axis=1)
    found = blocks(targets, seed=3)
    assert sorted(np.concatenate(found).tolist()) == list(range(rows))
    ends = np.cumsum([len(block) for block in found])
    if len(found) > 1:
        assert len(found[0]) in (40, 41, 42), "the first look is short, however many rows there are"
        assert all(after <= 1.25 * before + 42 for before, after in pairwise(ends))
    again, other = blocks(targets, seed=3), blocks(targets, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    if len(found) > 1:
        assert not all(np.array_equal(a, b) for a, b in zip(found, other, strict=True))
        key = ((targets - targets.mean(0)) / targets.std(0)).mean(1)
        means = [key[block].mean() for block in found]
        assert np.std(means) < 0.25 * key.std() / np.sqrt(len(found[0])), "a random draw would spread by that root"


def test_one_look_has_the_textbook_bound_and_more_looks_ask_for_more() -> None:
    assert bound((0.5,), 0.05) == pytest.approx(1.6449, abs=1e-3)
    limits = [bound(tuple(k / looks for k in range(1, looks)), 0.05) for looks in (2, 4, 8, 12)]
    assert all(a < b for a, b in pairwise(limits))
    union = 2.61  # of 11 looks at 0.05 / 11 each
    assert limits[-1] < union


@pytest.mark.parametrize("rate", [0.05, 0.2])
@pytest.mark.parametrize("tails", ["normal", "heavy", "counted"])
def test_the_error_rate_is_kept(rate: float, tails: str) -> None:
    """Differences that sum to nothing over all rows: each side wins by error as often as it is told, within 3 sigma."""
    draw, trials, rows, wins, losses = np.random.default_rng(7), 1500, 600, 0, 0
    ends = [rows * k // 12 for k in range(1, 12)]
    limit = bound(tuple(end / rows for end in ends), rate)
    for _ in range(trials):
        if tails == "counted":
            differences = draw.permutation(np.repeat([-1.0, 0.0, 1.0], [60, rows - 120, 60]))
        else:
            differences = draw.normal(size=rows) if tails == "normal" else draw.standard_t(3, size=rows)
            differences -= differences.mean()
        seen = np.arange(rows)
        verdict = next((found for end in ends if (found := race(differences[:end], seen[:end], rows, limit)[0])), 0)
        wins, losses = wins + (verdict > 0), losses + (verdict < 0)
    slack = 3 * np.sqrt(rate * (1 - rate) / trials)
    assert wins / trials < rate + slack
    assert losses / trials < rate + slack
    assert (wins + losses) / (2 * trials) > rate - 2 * slack, "the bound is not wastefully high"


def test_the_looks_of_a_capped_race() -> None:
    assert looks_that_decide([50, 50, 50, 50], 100) == (50, 100, 150)
    assert looks_that_decide([50, 50, 50, 50], 50) == (50, 100)
    assert looks_that_decide([50, 50, 50, 50], 1) == (50,)
    assert looks_that_decide([70], 25) == ()


def test_how_much_worse_the_new_weights_are_at_most() -> None:
    draw = np.random.default_rng(0)
    differences = draw.normal(0.1, 1.0, 400)
    shortfalls = []
    for _ in range(300):
        places = np.sort(draw.choice(400, 60, replace=False))
        shortfalls.append(most_worse(differences[places], places, 400) < differences.mean())
    assert 0.005 < np.mean(shortfalls) < 0.05, "two standard errors, one side"
    places = np.arange(60)
    assert most_worse(np.full(60, -0.2), places, 400) == pytest.approx(-0.2), "surely better"
    assert most_worse(np.r_[np.full(9, -0.2), np.zeros(51)], places, 400) == np.inf, "too few rows differ"


def test_a_clear_difference_is_seen_at_once_and_few_rows_say_nothing() -> None:
    draw = np.random.default_rng(0)
    clear, seen = draw.normal(0.5, 0.5, 50), np.arange(50)
    assert race(clear, seen, 600, 2.5) == (-1, pytest.approx(clear.mean()))
    assert race(-clear, seen, 600, 2.5) == (1, pytest.approx(-clear.mean()))
    assert race(np.zeros(50), seen, 600, 2.5) == (0, 0)
    assert race(np.r_[np.ones(9), np.zeros(41)], seen, 600, 2.5)[0] == 0, "nine rows that differ are too few"
    assert race(clear, seen, 50, 2.5)[0] == 0, "all rows are compared by their score"
    assert race(clear[:1], seen[:1], 50, 2.5) == (0, clear[0])


# --- what is foretold ------------------------------------------------------------------------------------------------


def drifting(metric: str, rows: int, draw: np.random.Generator) -> Any:
    """Targets, earlier predictions, and two later ones that differ from these by a shift, a spread and some noise."""
    kind = {"rmse": "regression", "mae": "regression", "log_loss": "binary"}[metric]
    truth = draw.normal(size=(rows, 1))
    earlier = 0.7 * truth + draw.normal(0, 0.6, truth.shape)
    best, new = (
        draw.normal(0, 0.1) + draw.uniform(0.9, 1.1) * earlier + draw.normal(0, 0.05, truth.shape) for _ in range(2)
    )
    if kind == "binary":
        earlier, best, new = (1 / (1 + np.exp(-2 * one)) for one in (earlier, best, new))
        truth = (draw.random(truth.shape) < 1 / (1 + np.exp(-2 * truth))).astype(float)
    return truth, earlier, best, new, kind


@pytest.mark.parametrize("metric", ["rmse", "mae", "log_loss"])
def test_covariates_sharpen_the_difference_without_bias(metric: str) -> None:
    draw, rows, few, apart = np.random.default_rng(3), 600, 60, []
    for _ in range(150):
        truth, earlier, best, new, kind = drifting(metric, rows, draw)
        losses_of = partial(row_losses, metric, truth, kind=kind)
        known = covariates_of(earlier, truth, losses_of, kind)
        assert known.shape == (rows, 7) and np.array_equal(known[:, 0], losses_of(earlier))
        differences, places = losses_of(new) - losses_of(best), draw.permutation(rows)[:few]
        plain = mean_over_all(differences[places], places, rows, None)
        sharp = mean_over_all(differences[places], places, rows, known)
        exact = differences.mean()
        apart.append([sharp[0] - exact, sharp[1], plain[0] - exact, plain[1]])
        assert plain[0] == pytest.approx(differences[places].mean()) and plain[2] == few - 1
        usual = differences[places].std(ddof=1) * np.sqrt((1 - few / rows) / few)
        assert plain[1] == pytest.approx(usual, rel=1 / few)
    off, error, plainly, wide = np.array(apart).T
    assert abs((off / error).mean()) < 3 / np.sqrt(len(off)), "no bias"
    assert 0.75 < (off / error).std() < 1.35, "the error is the one that is made"
    assert np.median(error) < 0.75 * np.median(wide)
    assert off.std() < 0.75 * plainly.std()


@pytest.mark.parametrize("metric", ["rmse", "log_loss"])
def test_the_error_rate_is_kept_with_covariates(metric: str) -> None:
    """Checkpoints that are the same over all rows but for their noise: by error, each side wins at most as told."""
    draw, trials, rows, rate = np.random.default_rng(11), 500, 600, 0.1
    verdicts = []
    for _ in range(trials):
        truth, earlier, best, new, kind = drifting(metric, rows, draw)
        losses_of = partial(row_losses, metric, truth, kind=kind)
        known = covariates_of(earlier, truth, losses_of, kind)
        differences = losses_of(new) - losses_of(best)
        differences -= differences.mean()
        order = np.concatenate(blocks(truth, seed=int(draw.integers(10**6))))
        ends = looks_that_decide([len(block) for block in blocks(truth, seed=0)], 100)
        limit = bound(tuple(end / rows for end in ends), rate)
        looks = (race(differences[order[:end]], order[:end], rows, limit, known)[0] for end in ends)
        verdicts.append(next((found for found in looks if found), 0))
    slack = 3 * np.sqrt(rate * (1 - rate) / trials)
    assert np.mean(np.array(verdicts) > 0) < rate + slack
    assert np.mean(np.array(verdicts) < 0) < rate + slack


@pytest.mark.parametrize(("metric", "kind"), [(name, kind) for name in SUMS for kind in METRICS[name].kinds])
def test_every_metric_of_a_race_has_covariates(metric: str, kind: str) -> None:
    draw, shape = np.random.default_rng(0), (80, 3 if kind == "multilabel" else 1)
    values, targets = draw.normal(size=shape), draw.normal(size=shape)
    if kind == "ordinal":
        values, targets = (draw.integers(1, 6, shape).astype(float) for _ in range(2))
    elif kind != "regression":
        values, targets = draw.random(shape), draw.integers(0, 2, shape).astype(float)
    if kind == "multiclass":
        values = draw.dirichlet(np.ones(4), 80)
    losses_of = partial(row_losses, metric, targets, kind=kind)
    known = covariates_of(values, targets, losses_of, kind)
    assert known.shape == (80, 7) and np.isfinite(known).all() and np.array_equal(known[:, 0], losses_of(values))


@pytest.mark.parametrize("classes", [2, 4, 9])
def test_covariates_of_classes(classes: int) -> None:
    draw = np.random.default_rng(0)
    values, targets = draw.dirichlet(np.ones(classes), 80), draw.integers(0, classes, (80, 1)).astype(float)
    losses_of = partial(row_losses, "log_loss", targets, kind="multiclass")
    known = covariates_of(values, targets, losses_of, "multiclass")
    assert known.shape == (80, 3 + (classes if classes == 4 else 0)) and np.isfinite(known).all()
    assert np.array_equal(known[:, 0], losses_of(values))


def test_covariates_that_say_nothing_cost_nothing() -> None:
    draw = np.random.default_rng(0)
    seen, places = draw.normal(size=50), draw.permutation(200)[:50]
    plain = mean_over_all(seen, places, 200, None)
    flat = np.c_[np.ones(200), np.full(200, 1e9)]
    assert mean_over_all(seen, places, 200, flat) == pytest.approx(plain)
    many = draw.normal(size=(200, 20))
    assert mean_over_all(seen, places, 200, many) == pytest.approx(plain), "too few rows for so many columns"
    twice = np.c_[many[:, :2], many[:, :2]]
    assert mean_over_all(seen, places, 200, twice) == pytest.approx(mean_over_all(seen, places, 200, many[:, :2]))
    wild = many[:, :1].copy()
    wild[np.setdiff1d(np.arange(200), places)[0]] = 1e6  # a row that is not seen
    assert abs(mean_over_all(seen, places, 200, wild)[0] - plain[0]) < 1


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_of(
    isolated: Path,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Write a config of 10 steps at wild rates, each with an evaluation of 60 rows: in batches of 8 or so, or 5 blocks."""
    monkeypatch.setattr(early, "LEAST_ROWS", 12)
    monkeypatch.setattr(crossval, "release_memory", lambda: None)  # a third of the time of so small a run
    for module in (held_out, predict):
        monkeypatch.setattr(module, "batch_tokens_of", lambda runtime: 250)

    def make(kind: str = "regression", metric: str | None = None, **own: Any) -> Any:
        competition = tiny_competition(kind, train_rows=120)
        data = competition.config(tiny_model_folder("bert"))
        data |= {"metric": metric or {"regression": "rmse", "binary": "log_loss"}.get(kind, "accuracy")}
        data |= {"optimizer": WILD, "schedule": {"name": "constant"}}
        data["model"] = data["model"] | own.pop("model", {})
        data["training"] = {"epochs": 1, "batch_size": 6, "precision": "fp32"} | own.pop("training", {})
        data["evaluation"] = {"every": "1 steps"} | own.pop("evaluation", {})
        (isolated / "tiny.yaml").write_text(yaml.safe_dump({**data, **own}))
        return config_file.load("tiny.yaml")

    return make


def run(config: Any, name: str, **options: Any) -> Any:
    SAID.clear()
    crossval.run(config, name, options.pop("folds", "0"), say=SAID.append, **options)
    own = RunFolder(Path("runs") / name).fold(0)
    done = json.loads(own.done.read_text())
    lines = [json.loads(line) for line in own.metrics.read_text().splitlines()]
    return own, done, [line for line in lines if "valid/score" in line]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    ["rmse", "accuracy", *(pytest.param(case, marks=SLOW) for case in ("mae", "log_loss", "windows", "lookahead"))],
)
def test_exact_keeps_the_same_bits_as_full(case: str, config_of: Callable[..., Any]) -> None:
    kind = {"log_loss": "binary", "accuracy": "multiclass"}.get(case, "regression")
    own: dict[str, Any] = {"metric": case} if case in SUMS else {}
    if case == "windows":
        own["model"] = {"max_length": 16, "windows": {"stride": 4, "max_windows": 3}}
    if case == "lookahead":
        own["optimizer"] = {**WILD, "lookahead": {"steps": 3}}
    full, full_done, full_lines = run(config_of(kind, **own), "full", save_every="never")
    config = config_of(kind, **own, evaluation={"every": "1 steps", "decide": "exact"})
    exact, done, lines = run(config, "exact", save_every="never")
    for name in ("best", "last"):
        assert getattr(exact, name).read_bytes() == getattr(full, name).read_bytes()
    assert exact.oof.read_bytes() == full.oof.read_bytes()
    for name in ("best", "best_step", "last", "steps", "evaluations"):
        assert done[name] == full_done[name], name
    assert full_done["rows_scored"] == 1 > done["rows_scored"]
    better = 1 if METRICS[config.metric].higher_is_better else -1
    for ours, theirs in zip(lines, full_lines, strict=True):
        assert "valid/rows" not in theirs
        assert (ours["step"], ours["valid/best"]) == (theirs["step"], theirs["valid/best"])
        assert ours["valid/best_rows"] == 1
        if ours["valid/rows"] == 1:
            assert ours["valid/score"] == theirs["valid/score"]
        else:
            assert (ours["valid/score"] - ours["valid/best"]) * better <= 0, "a stopped one is never the best"
    history, whole = (pd.read_parquet(one.evaluations).drop(columns="id") for one in (exact, full))
    known = history.notna()
    assert not known.all(axis=None)
    assert (history == whole)[known].sum(axis=None) == known.sum(axis=None)
    assert any(line.endswith("some stopped early (evaluation.decide 'exact')") for line in SAID)
    shares = [f"{done['padding'][what]:.1%} of tokens in {what}" for what in ("training", "evaluation")]
    assert f"fold 0: padding {', '.join(shares)}" in SAID
    assert full_done["padding"] == done["padding"] and done["padding"]["training"] < 0.5
    assert done["padding"]["training"] > 0 or case == "windows", "windows of long texts are all full"
    assert json.loads(Path("runs/exact/scores.json").read_text())["keep_best_flatters"] is None


def test_looks_of_exact_are_the_batches_of_full() -> None:
    """Cut out of the whole, in runs, a batch stays the same batch: else its predictions were other bits."""
    for seed in range(20):
        lengths = np.random.default_rng(seed).integers(3, 60, 300)
        batches = sorted_batches(lengths, max_tokens=400)
        for most in (len(batches), 7):
            for part in held_out._runs(len(batches), most):
                look = np.concatenate([batches[k] for k in part])
                again = [look[own] for own in sorted_batches(lengths[look], max_tokens=400)]
                assert [own.tolist() for own in again] == [batches[k].tolist() for k in part]


def test_a_race_scores_what_it_keeps_on_all_rows(config_of: Callable[..., Any]) -> None:
    config = config_of(evaluation={"every": "1 steps", "decide": "race", "error_rate": 0.1})
    own, done, lines = run(config, "race", save_every="never")
    rows = pd.read_parquet(own.oof)
    assert rows.notna().all(axis=None) and len(rows) == 60
    score = evaluate("rmse", rows[["target_main_target"]].to_numpy(), rows[["pred_main_target"]].to_numpy())
    assert done["best"] == pytest.approx(score, rel=1e-6)
    last = evaluate("rmse", rows[["target_main_target"]].to_numpy(), rows[["last_main_target"]].to_numpy())
    assert done["last"] == pytest.approx(last, rel=1e-6)
    shares = [line["valid/rows"] for line in lines]
    assert shares[0] == shares[-1] == 1 == lines[-1]["valid/best_rows"]
    assert min(shares) < 0.5, "some are decided by the first of five blocks"
    assert any(line["valid/best_rows"] < 1 for line in lines), "some that won were not scored wholly at once"
    assert done["rows_scored"] < 1
    # whoever wins, the weights on disk are those of the predictions
    from comp.ship.infer import load

    predicted = load("runs/race").predict(
        pd.read_csv(config.competition.train).set_index("id").loc[rows["id"]].reset_index()
    )
    assert np.isfinite(predicted.iloc[:, -1]).all()
    report = read_run("runs/race")
    assert report.flattery is None
    assert report.logs[0].chosen == done["best_step"]


def test_a_capped_race_never_scores_more_rows_until_the_end(config_of: Callable[..., Any]) -> None:
    config = config_of(evaluation={"every": "1 steps", "decide": "race", "race_percent": 40})
    own, done, lines = run(config, "race", save_every="never")
    assert len(lines) == 10
    assert lines[-1]["valid/rows"] == lines[-1]["valid/best_rows"] == 1
    assert all(line["valid/rows"] <= 0.4 for line in lines[:-1]), "the first is one of them"
    told = "fold 0: evaluation.race_percent 40 leaves 24 of 60 held-out rows to choose the best weights by"
    assert sum(line.startswith(told) for line in SAID) == 1
    rows = pd.read_parquet(own.oof)
    assert rows.notna().all(axis=None) and len(rows) == 60
    score = evaluate("rmse", rows[["target_main_target"]].to_numpy(), rows[["pred_main_target"]].to_numpy())
    assert done["best"] == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize(
    ("num_rows", "percent", "told"),
    [
        (
            200,
            25,
            "race_percent 25 leaves 40 of 200 held-out rows to choose the best weights by, which may then be some ",
        ),
        (200, 25, "percents worse; 40 leaves 80, null lets all rows decide"),
        (210, 25, "percents worse; 40 leaves 84, null lets all rows decide"),
        (210, 39, "39 leaves 42 of 210"),
        (210, 40, None),
        (80, 50, "leaves 40 of 80 held-out rows to choose the best weights by"),
        (80, 50, "percents worse; null lets all rows decide"),
        (1706, 5, None),
        (200, 40, None),
        (200, 100, None),
        (39, 5, None),
    ],
)
def test_a_cap_that_leaves_too_few_rows_is_told(num_rows: int, percent: float, told: str | None) -> None:
    targets = np.random.default_rng(0).normal(size=(num_rows, 1))
    task = Task.model_validate({"name": "main", "kind": "regression", "targets": ["y"], "loss": {"name": "mse"}})
    looks, lengths = early.blocks(targets, seed=0), np.ones(num_rows, np.int64)
    warning = Decision(task, "rmse", targets, lengths, looks, decide="race", race_percent=percent).warning
    assert warning is None if told is None else told in str(warning)


def predict_with(errors_of: Callable[[int], np.ndarray], monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Have the weights of the i-th evaluation predict the targets of the 120 rows with the errors (120, 1) of i.

    Returns the weights seen so far.
    """
    known: list[bytes] = []

    def values(own: HeldOut, rows: np.ndarray) -> dict[str, np.ndarray]:
        weights = b"".join(tensor.numpy().tobytes() for tensor in own.model.state_dict().values())
        if weights not in known:
            known.append(weights)
        truth = np.full((120, 1), np.nan)
        truth[own.rows] = own.targets["main"]
        return {"main": truth[rows] + errors_of(known.index(weights))[rows]}

    monkeypatch.setattr(HeldOut, "_values", values)
    return known


@pytest.mark.parametrize(
    ("errors", "noises", "scored", "kept"),
    [
        pytest.param((1, 0.2), (0, 1), 72, 10, id="the last win"),
        pytest.param((0.2, 1), (0, 1), 120, 5, id="the last lose"),
        pytest.param((1, 1.0002), (0, 0), 72, 10, id="a tie: better by less than a thousandth"),
        pytest.param((1, 1.0002), (0, 1), 120, 10, id="unknown"),
    ],
)
def test_the_best_are_scored_to_the_end_only_where_they_may_be_kept(
    errors: tuple[float, float],
    noises: tuple[int, int],
    scored: int,
    kept: int,
    config_of: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The best so far, of a capped race, has rows that are not scored; that the last weights win takes none of them."""

    def errors_of(at: int) -> np.ndarray:
        draw = np.random.default_rng(noises[at])
        return errors[at] * (draw.choice([-1.0, 1.0], (120, 1)) + draw.normal(0, 0.1, (120, 1)))

    known = predict_with(errors_of, monkeypatch)
    config = config_of(evaluation={"every": "5 steps", "decide": "race", "race_percent": 20})
    own, done, lines = run(config, "race", save_every="never")
    assert [line["valid/rows"] for line in lines] == [0.2, 1] and len(known) == 2
    assert round(done["rows_scored"] * 2 * 60) == scored
    assert done["best_step"] == kept
    rows = pd.read_parquet(own.oof)
    assert rows.notna().all(axis=None)
    score = evaluate("rmse", rows[["target_main_target"]].to_numpy(), rows[["pred_main_target"]].to_numpy())
    assert done["best"] == pytest.approx(score, rel=1e-6)


def test_a_tie_does_not_renew_the_patience(config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that get worse by less than a thousandth each time: the third are kept, and training ends there."""
    predict_with(lambda at: (1 + 2e-4 * at) * np.random.default_rng(0).normal(1, 0.1, (120, 1)), monkeypatch)
    evaluation = {"every": "1 steps", "decide": "race", "race_percent": 20, "patience": 2}
    _, done, lines = run(config_of(evaluation=evaluation), "race", save_every="never")
    assert done["stopped_early"] and [line["valid/rows"] for line in lines] == [0.2, 0.2, 1]
    assert done["best_step"] == 3 and done["best"] == done["last"]


def test_estimates_are_told_apart_in_a_report(config_of: Callable[..., Any]) -> None:
    from comp.ship.report import report_text

    run(config_of(evaluation={"every": "2 steps", "decide": "race"}), "race", save_every="never")
    page = report_text("runs/race")
    assert "rows scored" in page
    shown = next(panel.blocks for panel in report_page(read_run("runs/race")).panels if panel.name == "training")
    assert "crosses are estimates from some of the rows" in str(shown)
    assert "some stopped early (evaluation.decide 'race')" in page


def test_a_race_of_several_tasks_logs_the_others_on_the_rows_seen(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [{"name": name, "kind": "regression", "targets": ["target"]} for name in ("main", "other")]
    for decide in ("race", "exact"):
        own, _, lines = run(config_of(tasks=tasks, evaluation={"decide": decide}), decide, save_every="never")
        partial = [line for line in lines if line["valid/rows"] < 1]
        assert partial
        assert all("valid/other" in line for line in lines if line["valid/rows"] == 1)
        assert all(("valid/other" in line) == (decide == "race") for line in partial)
        assert pd.read_parquet(own.oof).notna().all(axis=None)


@pytest.mark.parametrize("decide", ["exact", "race"])
@pytest.mark.parametrize("kills", [(7, 4), pytest.param((3, 5), marks=SLOW)])
def test_a_killed_run_ends_with_the_same_bits(
    decide: str, kills: tuple[int, int], config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice, with best weights on disk that are newer than the state: a race wants the ones of the state."""
    config = config_of(evaluation={"every": "1 steps", "decide": decide}, model={"dropout": 0.1, "freeze_layers": 1})
    run(config, "whole", save_every="never")
    for call in kills:
        kill_at(monkeypatch, Saver, "due", call)
        with pytest.raises(Killed):
            run(config, "cut", save_every="4 steps" if call > 4 else "2 steps")
    run(config, "cut", save_every="3 steps")
    assert any("goes on after step" in line for line in SAID)
    assert leavings("cut") == leavings("whole")


@pytest.mark.parametrize("decide", ["exact", pytest.param("race", marks=SLOW)])
def test_patience_ends_with_an_evaluation_of_all_rows(decide: str, config_of: Callable[..., Any]) -> None:
    evaluation = {"every": "1 steps", "patience": 2}
    _, full, _ = run(config_of(evaluation=evaluation, optimizer={**WILD, "head_lr": 0.2}), "full", save_every="never")
    config = config_of(evaluation={**evaluation, "decide": decide}, optimizer={**WILD, "head_lr": 0.2})
    own, done, lines = run(config, decide, save_every="never")
    assert done["stopped_early"] and lines[-1]["valid/rows"] == 1
    assert pd.read_parquet(own.oof).notna().all(axis=None)
    if decide == "exact":
        assert {name: done[name] for name in ("best", "best_step", "steps")} == {
            name: full[name] for name in ("best", "best_step", "steps")
        }


def test_memory_that_runs_out_halves_the_batches_of_a_look(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, full, _ = run(config_of(), "full", save_every="never")
    real, failed = predict.collate, []

    def collate(encoded: Any, rows: Any, *rest: Any) -> Any:
        if len(rows) > 2:
            failed.append(len(rows))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(encoded, rows, *rest)

    monkeypatch.setattr(predict, "collate", collate)
    with pytest.warns(RuntimeWarning, match="memory ran out in predicting"):
        _, done, _ = run(config_of(evaluation={"every": "5 steps", "decide": "race"}), "small", save_every="never")
    assert failed
    assert done["last"] == pytest.approx(full["last"], abs=1e-5)


def test_predictions_that_are_not_finite_are_seen_in_the_first_look(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(evaluation={"decide": "race"})
    real, calls = HeldOut._add, []

    def add(self: HeldOut, found: Any, places: Any) -> None:
        real(self, found, places)
        calls.append(1)
        if len(calls) == 6:
            found.values["main"][places[0]] = np.nan

    monkeypatch.setattr(HeldOut, "_add", add)
    with pytest.raises(ArithmeticError, match="the held-out predictions are not finite"):
        run(config, "nan", save_every="never")
    assert len(calls) == 6
