"""Row errors, bins and bootstrap intervals against independent references."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import confusion_matrix, log_loss

from comp.blend.ensemble import Problem
from comp.metrics import METRICS
from comp.ship.compare import paired_bootstrap
from comp.ship.report_panels import sparkline
from comp.ship.report_tasks import confusion_counts, reliability_bins
from comp.ship.row_errors import length_bins, mean_errors, row_errors

DRAW = np.random.default_rng(0)


# --- row errors ------------------------------------------------------------------------------------------------------


def test_row_errors_of_numbers() -> None:
    targets, preds = (
        np.array([[1.0, np.nan], [2.0, 4.0], [np.nan, np.nan]]),
        np.array([[1.5, 9.0], [1.0, 1.0], [0.0, 0.0]]),
    )
    found = row_errors("regression", targets, preds)
    assert found[:2].tolist() == [0.5, 2.0]
    assert np.isnan(found[2])
    assert row_errors("ordinal", targets[:1, :1], preds[:1, :1]).tolist() == [0.5]


@pytest.mark.parametrize("kind", ["binary", "multilabel"])
def test_row_errors_of_probabilities(kind: str) -> None:
    columns = 1 if kind == "binary" else 3
    targets, preds = (DRAW.random((50, columns)) < 0.4).astype(float), DRAW.random((50, columns))
    each = [
        np.mean([log_loss([t], [p], labels=[0, 1]) for t, p in zip(row, own, strict=True)])
        for row, own in zip(targets, preds, strict=True)
    ]
    assert row_errors(kind, targets, preds) == pytest.approx(each)


def test_row_errors_of_classes_hard_soft_and_missing() -> None:
    preds = DRAW.dirichlet(np.ones(4), 30)
    labels = DRAW.integers(0, 4, 30)
    hard = row_errors("multiclass", labels[:, None].astype(float), preds)
    assert hard.mean() == pytest.approx(log_loss(labels, preds, labels=range(4)))
    assert row_errors("multiclass", np.eye(4)[labels], preds) == pytest.approx(hard)
    gone = row_errors("multiclass", np.array([[np.nan], [1.0]]), preds[:2])
    assert np.isnan(gone[0]) and gone[1] == pytest.approx(-np.log(preds[1, 1]))
    assert np.isfinite(row_errors("multiclass", np.array([[0.0]]), np.array([[0.0, 1.0]]))).all()


def test_parts_leave_out_rows_without_error_and_know_their_interval() -> None:
    errors = np.array([1.0, 3.0, np.nan, 5.0, np.nan])
    parts = mean_errors(errors, ["a", "b", "c", "d"], np.array([0, 0, 0, 1, 2]))
    assert [(part.name, part.rows.tolist(), part.mean) for part in parts] == [("a", [0, 1], 2.0), ("b", [3], 5.0)]
    assert parts[0].margin == pytest.approx(1.96 * np.std([1, 3], ddof=1) / 2**0.5)
    assert parts[1].margin == 0.0


def test_length_bins_hold_every_row_once_in_like_numbers() -> None:
    lengths = DRAW.integers(3, 400, 1000)
    names, bins = length_bins(lengths)
    counts = np.bincount(bins, minlength=len(names))
    assert len(names) == 8 and counts.sum() == 1000 and counts.min() > 90
    for place, name in enumerate(names):
        low, high = map(int, name.split("-"))
        own = lengths[bins == place]
        assert (own.min(), own.max()) == (low, high)
    same_names, same_bins = length_bins(np.full(100, 7))
    assert [name for name in same_names if name] == ["7"] and len(set(same_bins.tolist())) == 1
    assert len(length_bins(lengths[:30])[0]) == 1, "too few rows for two bins"


def test_reliability_bins_and_confusion() -> None:
    preds = np.concatenate([np.full(40, 0.5), DRAW.random(60)])
    targets = (DRAW.random(100) < preds).astype(float)
    bins = reliability_bins(targets, preds)
    assert sum(rows for rows, _, _ in bins) == 100
    assert sum(rows * actual for rows, _, actual in bins) == pytest.approx(targets.sum())
    assert sum(rows * predicted for rows, predicted, _ in bins) == pytest.approx(preds.sum())
    assert [predicted for _, predicted, _ in bins] == sorted(predicted for _, predicted, _ in bins)
    truth, guess = DRAW.integers(0, 5, 200), DRAW.integers(0, 4, 200)
    assert (confusion_counts(truth, guess, 5) == confusion_matrix(truth, guess, labels=range(5))).all()


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert len(sparkline(np.arange(1000))) == 60
    assert sparkline([]) == "" and sparkline([1.0, float("nan")]) == ""


# --- bootstrap -------------------------------------------------------------------------------------------------------


def problem(kind: str, metric: str, rows: int = 80, seed: int = 0, noise: float = 0.4) -> Problem:
    """Two runs whose errors are alike in part; the second is a little worse."""
    draw = np.random.default_rng(seed)
    if kind == "multiclass":
        truth = draw.integers(0, 3, rows)
        preds = np.stack([draw.dirichlet(np.ones(3), rows) + size * np.eye(3)[truth] for size in (0.8, 0.6)])
        return Problem(preds / preds.sum(axis=2, keepdims=True), truth[:, None].astype(float), kind, metric)
    columns = 2 if kind == "multilabel" or metric == "mcrmse" else 1
    shared = draw.normal(size=(rows, columns))
    own = draw.normal(size=(2, rows, columns)) * np.array([noise, noise + 0.1])[:, None, None]
    if kind in ("binary", "multilabel"):
        truth = (draw.random((rows, columns)) < 0.5).astype(float)
        return Problem(1 / (1 + np.exp(-(2 * truth - 1 + shared + own))), truth, kind, metric)
    truth = draw.normal(size=(rows, columns)) * 2
    truth = np.clip(np.round(truth + 3), 1, 5) if kind == "ordinal" else truth
    return Problem(truth + 0.5 * shared + own, truth, kind, metric)


@pytest.mark.parametrize(("metric", "kind"), [(name, kind) for name, row in METRICS.items() for kind in row.kinds])
def test_every_metric_can_be_compared(metric: str, kind: str) -> None:
    one = problem(kind, metric)
    found = paired_bootstrap(one, resamples=120)
    assert found.scores.tolist() == [one.score(preds) for preds in one.preds]
    assert found.low[0] == found.high[0] == 0 and found.better[0] == 0.5
    assert found.low[1] < found.high[1]
    assert found.resamples + found.undefined == 120
    worse = found.scores[1] - found.scores[0]
    assert found.low[1] - 1e-9 <= worse <= found.high[1] + 1e-9 or metric in ("accuracy", "f1_macro", "qwk")


def test_the_interval_is_that_of_scipy() -> None:
    one = problem("regression", "rmse", rows=150)
    found = paired_bootstrap(one, resamples=4000)

    def apart(target: np.ndarray, first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
        a, b = (np.sqrt(((preds - target) ** 2).mean(axis=axis)) for preds in (first, second))
        return b - a

    data = one.targets[:, 0], one.preds[0, :, 0], one.preds[1, :, 0]
    theirs = stats.bootstrap(
        data, apart, paired=True, vectorized=True, method="percentile", n_resamples=4000, rng=np.random.default_rng(5)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert found.low[1] == pytest.approx(theirs.low, abs=0.08 * width)
    assert found.high[1] == pytest.approx(theirs.high, abs=0.08 * width)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    one = problem("regression", "mae", rows=400)
    found = paired_bootstrap(one, resamples=2000)
    each = np.abs(one.preds[1] - one.targets)[:, 0] - np.abs(one.preds[0] - one.targets)[:, 0]
    margin = 1.96 * each.std(ddof=1) / 20
    assert found.scores[1] - found.scores[0] == pytest.approx(each.mean())
    assert found.high[1] - found.low[1] == pytest.approx(2 * margin, rel=0.08)
    # Better = lower: the share of draws whose mean difference is below zero.
    assert found.better[1] == pytest.approx(stats.norm.cdf(-each.mean() / (margin / 1.96)), abs=0.03)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for seed in range(120):
        one = problem("regression", "rmse", rows=80, seed=seed)
        found = paired_bootstrap(one, resamples=120, seed=seed)
        truth = np.sqrt(0.5**2 + 0.5**2) - np.sqrt(0.5**2 + 0.4**2)
        hits += bool(found.low[1] <= truth <= found.high[1])
    assert 0.86 <= hits / 120 <= 0.99


def test_whole_groups_are_drawn() -> None:
    """Each row five times over says no more than once: the interval stays; rows drawn one by one make it too narrow."""
    one = problem("regression", "mae", rows=100)
    five = Problem(np.repeat(one.preds, 5, axis=1), np.repeat(one.targets, 5, axis=0), one.kind, one.metric)
    groups = np.repeat(np.arange(100), 5)
    alone, grouped = paired_bootstrap(one, seed=3), paired_bootstrap(five, groups=groups, seed=3)
    assert grouped.low == pytest.approx(alone.low) and grouped.high == pytest.approx(alone.high)
    narrow = paired_bootstrap(five, seed=3)
    width = grouped.high[1] - grouped.low[1]
    assert narrow.high[1] - narrow.low[1] == pytest.approx(width / 5**0.5, rel=0.1)


def test_the_same_seed_gives_the_same_interval() -> None:
    one = problem("binary", "roc_auc")
    first, again, other = (paired_bootstrap(one, resamples=100, seed=seed) for seed in (0, 0, 1))
    assert first.low.tolist() == again.low.tolist() != other.low.tolist()


def test_draws_of_a_single_class_are_counted_and_too_many_refused() -> None:
    preds, few = DRAW.random((2, 30, 1)), np.zeros((30, 1))
    few[:2] = 1
    found = paired_bootstrap(Problem(preds, few, "binary", "roc_auc"), resamples=300)
    assert 0.05 < found.undefined / 300 < 0.25  # (28/30)^30 = .126
    with pytest.raises(ValueError, match=r"roc_auc is not defined on \d+ of 100 draws of 2 rows .*--metric"):
        paired_bootstrap(Problem(preds[:, :2], few[1:3], "binary", "roc_auc"), resamples=100, seed=2)
