"""METRICS against scikit-learn and by hand; shapes, kinds, and every error."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
from sklearn import metrics as sk

from comp.config import Kind
from comp.metrics import METRICS, evaluate, is_better

N = 200


def _rng() -> np.random.Generator:
    return np.random.default_rng(7)


def _numbers(columns: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = _rng()
    targets = rng.normal(size=(N, columns)).round(1)  # rounded: ties for the rank metrics
    return targets, (targets + rng.normal(size=(N, columns))).round(1)


def _classes(classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = _rng()
    targets = rng.integers(0, classes, size=(N, 1)).astype(float)
    logits = rng.normal(size=(N, classes)) + np.eye(classes)[targets[:, 0].astype(int)]
    return targets, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def _columns(columns: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = _rng()
    targets = (rng.random((N, columns)) < 0.4).astype(float)
    return targets, np.clip(0.5 * targets + 0.6 * rng.random((N, columns)), 0, 1).round(2)


def test_catalogue_has_the_twelve_metrics_with_directions():
    higher = {name for name, row in METRICS.items() if row.higher_is_better}
    assert higher == {"r2", "pearson", "spearman", "accuracy", "f1", "f1_macro", "roc_auc", "qwk"}
    assert set(METRICS) - higher == {"rmse", "mae", "mcrmse", "log_loss"}
    for name, row in METRICS.items():
        assert row.kinds, name
        assert set(row.kinds) <= set(get_args(Kind))
        assert row.about
    assert METRICS["mcrmse"].kinds == ("regression", "multilabel")
    for name in ("rmse", "mae", "r2", "pearson", "spearman"):  # soft labels, trained by bce, are scored by these
        assert set(METRICS[name].kinds) == {"regression", "ordinal", "binary", "multilabel"}
    assert set(METRICS["qwk"].kinds) == {"ordinal", "multiclass"}


@pytest.mark.parametrize("columns", [1, 3])
def test_numeric_metrics_equal_scikit_learn(columns: int):
    t, p = _numbers(columns)
    assert evaluate("rmse", t, p) == pytest.approx(np.sqrt(sk.mean_squared_error(t, p)), rel=1e-12)
    assert evaluate("mae", t, p) == pytest.approx(sk.mean_absolute_error(t, p), rel=1e-12)
    assert evaluate("r2", t, p) == pytest.approx(sk.r2_score(t, p), rel=1e-12)
    by_column = [sk.root_mean_squared_error(t[:, k], p[:, k]) for k in range(columns)]
    assert evaluate("mcrmse", t, p) == pytest.approx(np.mean(by_column), rel=1e-12)


@pytest.mark.parametrize("columns", [1, 3])
def test_correlations_equal_scipy(columns: int):
    from scipy.stats import pearsonr, spearmanr

    t, p = _numbers(columns)
    for name, reference in (("pearson", pearsonr), ("spearman", spearmanr)):
        wanted = np.mean([reference(t[:, k], p[:, k]).statistic for k in range(columns)])
        assert evaluate(name, t, p) == pytest.approx(wanted, rel=1e-10)
    assert evaluate("spearman", t, np.exp(t)) == pytest.approx(1.0)
    assert evaluate("pearson", t, -3 * t + 1) == pytest.approx(-1.0)
    assert evaluate("pearson", t, 1e-200 * t) == pytest.approx(1.0)


def test_mcrmse_is_not_rmse_of_all_cells():
    t, p = np.zeros((2, 2)), np.array([[3.0, 1.0], [3.0, 1.0]])
    assert evaluate("mcrmse", t, p) == pytest.approx(2.0)
    assert evaluate("rmse", t, p) == pytest.approx(np.sqrt(5.0))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_constant_predictions_correlate_zero_without_a_warning(name: str):
    t, _ = _numbers()
    assert evaluate(name, t, np.full_like(t, 0.1)) == 0.0
    assert evaluate(name, np.full_like(t, 0.1), t) == 0.0


def test_r2_of_a_constant_target():
    t = np.full((4, 1), 2.0)
    assert evaluate("r2", t, t) == 1.0
    assert evaluate("r2", t, t + 1) == 0.0


def test_multiclass_metrics_equal_scikit_learn():
    t, p = _classes()
    guess = p.argmax(axis=1)
    assert evaluate("accuracy", t, p) == pytest.approx(sk.accuracy_score(t, guess))
    assert evaluate("f1_macro", t, p) == pytest.approx(sk.f1_score(t[:, 0], guess, average="macro"))
    assert evaluate("qwk", t, p) == pytest.approx(sk.cohen_kappa_score(t[:, 0], guess, weights="quadratic"))
    assert evaluate("log_loss", t, p) == pytest.approx(sk.log_loss(t[:, 0], p))
    wanted = sk.roc_auc_score(t[:, 0], p, multi_class="ovr", average="macro")
    assert evaluate("roc_auc", t, p) == pytest.approx(wanted, rel=1e-12)


def test_two_classes_of_kind_multiclass():
    t, p = _classes(2)
    assert evaluate("roc_auc", t, p) == pytest.approx(sk.roc_auc_score(t[:, 0], p[:, 1]))
    assert evaluate("accuracy", t, p) == pytest.approx(sk.accuracy_score(t, p[:, 1] > 0.5))


def test_a_class_missing_in_the_fold_breaks_nothing():
    t, p = _classes()
    rows = t[:, 0] != 2
    t, p = t[rows], p[rows]
    assert evaluate("log_loss", t, p) == pytest.approx(sk.log_loss(t[:, 0], p, labels=range(4)))
    guess = p.argmax(axis=1)
    assert evaluate("f1_macro", t, p) == pytest.approx(sk.f1_score(t[:, 0], guess, average="macro"))
    assert evaluate("accuracy", t, p) == pytest.approx(sk.accuracy_score(t, guess))
    by_class = [sk.roc_auc_score(t[:, 0] == k, p[:, k]) for k in (0, 1, 3)]
    assert evaluate("roc_auc", t, p) == pytest.approx(np.mean(by_class))
    wanted = sk.cohen_kappa_score(t[:, 0], guess, weights="quadratic", labels=range(4))
    assert evaluate("qwk", t, p) == pytest.approx(wanted)


def test_binary_metrics_equal_scikit_learn():
    t, p = _columns(1)
    guess = p[:, 0] >= 0.5
    assert evaluate("accuracy", t, p) == pytest.approx(sk.accuracy_score(t, guess))
    assert evaluate("f1_macro", t, p) == pytest.approx(sk.f1_score(t[:, 0], guess, average="macro"))
    assert evaluate("f1", t, p) == pytest.approx(sk.f1_score(t[:, 0], guess))
    assert evaluate("f1", t, 0.4 * p) == 0.0
    assert evaluate("f1", 0 * t, 0.4 * p) == 0.0
    assert evaluate("roc_auc", t, p) == pytest.approx(sk.roc_auc_score(t[:, 0], p[:, 0]), rel=1e-12)
    assert evaluate("log_loss", t, p) == pytest.approx(sk.log_loss(t[:, 0], np.clip(p[:, 0], 1e-15, 1 - 1e-15)))


def test_multilabel_metrics_equal_scikit_learn():
    t, p = _columns(3)
    guess = (p >= 0.5).astype(float)
    assert evaluate("accuracy", t, p) == pytest.approx(sk.accuracy_score(t, guess))  # all columns right
    assert evaluate("accuracy", t, p) < np.mean(t == guess)
    assert evaluate("f1_macro", t, p) == pytest.approx(sk.f1_score(t, guess, average="macro"))
    assert evaluate("f1", t, p) == pytest.approx(sk.f1_score(t, guess, average="micro"))
    assert evaluate("roc_auc", t, p) == pytest.approx(sk.roc_auc_score(t, p, average="macro"), rel=1e-12)
    clipped = np.clip(p, 1e-15, 1 - 1e-15)
    by_column = [sk.log_loss(t[:, k], clipped[:, k]) for k in range(3)]
    assert evaluate("log_loss", t, p) == pytest.approx(np.mean(by_column))


def test_multilabel_column_without_a_one():
    t, p = _columns(3)
    wanted = np.mean([sk.roc_auc_score(t[:, k], p[:, k]) for k in (0, 2)])
    t[:, 1], p[:, 1] = 0.0, 0.1
    assert evaluate("roc_auc", t, p) == pytest.approx(wanted)
    guess = (p >= 0.5).astype(float)
    assert evaluate("f1_macro", t, p) == pytest.approx(sk.f1_score(t, guess, average="macro", zero_division=0))


def test_log_loss_takes_soft_targets_and_clips():
    t, p = np.array([[0.3], [1.0]]), np.array([[0.3], [0.0]])
    entropy = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7))
    assert evaluate("log_loss", t, p) == pytest.approx((entropy - np.log(1e-15)) / 2)


def test_log_loss_scales_rows_of_classes_to_one():
    t, p = np.array([[0.0], [1.0]]), np.array([[0.2, 0.2], [0.1, 0.3]])
    assert evaluate("log_loss", t, p) == pytest.approx(-(np.log(0.5) + np.log(0.75)) / 2)


def test_ordinal_values_round_halves_up():
    t, p = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([[0.5], [2.49], [2.5], [9.0]])
    assert evaluate("accuracy", t, p) == pytest.approx(0.75)
    assert evaluate("qwk", t, p) == pytest.approx(
        sk.cohen_kappa_score([1, 2, 3, 4], [1, 2, 3, 9], weights="quadratic", labels=range(1, 10))
    )


def test_qwk_keeps_the_gap_of_a_missing_grade():
    t, p = np.array([[1.0], [1.0], [6.0], [6.0]]), np.array([[1.0], [2.0], [6.0], [6.0]])
    wanted = sk.cohen_kappa_score([1, 1, 6, 6], [1, 2, 6, 6], weights="quadratic", labels=range(1, 7))
    assert evaluate("qwk", t, p) == pytest.approx(wanted)
    assert evaluate("qwk", np.ones((3, 1)), np.ones((3, 1))) == 1.0
    assert evaluate("qwk", np.ones((3, 1)), np.array([[1.0], [2.0], [2.0]])) == pytest.approx(0.0)


def test_float32_is_scored_in_float64():
    t = np.full((1000, 1), 1e4, dtype=np.float32)
    assert evaluate("rmse", t, t + np.float32(1)) == 1.0
    assert evaluate("log_loss", np.ones((1, 1), np.float32), np.ones((1, 1), np.float32)) < 1e-14


def test_is_better():
    assert is_better("rmse", 0.4, 0.5)
    assert not is_better("rmse", 0.5, 0.4)
    assert is_better("qwk", 0.5, 0.4)
    assert not is_better("qwk", 0.5, 0.5)
    assert not is_better("rmse", 0.5, 0.5)
    assert is_better("rmse", 0.5, None)
    assert not is_better("rmse", float("nan"), None)
    assert not is_better("rmse", float("nan"), 0.5)
    with pytest.raises(ValueError, match="unknown metric 'rms'; did you mean 'rmse'"):
        is_better("rms", 1.0, None)


ONE = np.array([[0.0], [1.0]])


@pytest.mark.parametrize(
    ("name", "targets", "preds", "message"),
    [
        ("rsme", ONE, ONE, "unknown metric 'rsme'; did you mean 'rmse'"),
        ("rmse", ONE[:, 0], ONE, r"rmse: targets and predictions must be tables .* got \(2,\) and \(2, 1\)"),
        (
            "rmse",
            ONE,
            ONE[:, 0],
            r"must be tables of the same number of rows \(N, K\), got \(2, 1\) and \(2,\)",
        ),
        ("rmse", ONE, np.zeros((3, 1)), r"same number of rows \(N, K\), got \(2, 1\) and \(3, 1\)"),
        ("rmse", ONE, np.zeros((2, 2)), "rmse: predictions have 2 columns where the targets have 1"),
        (
            "accuracy",
            np.zeros((2, 2)),
            np.zeros((2, 3)),
            "predictions have 3 columns where the targets have 2",
        ),
        ("rmse", np.zeros((0, 1)), np.zeros((0, 1)), "rmse: there is nothing to score"),
        ("rmse", ONE, np.array([[np.nan], [1.0]]), "rmse: 1 of 2 predictions are NaN or infinite"),
        ("rmse", ONE, np.array([[np.inf], [np.nan]]), "2 of 2 predictions are NaN or infinite"),
        ("rmse", np.array([[np.nan], [1.0]]), ONE, "rmse: 1 of 2 targets are NaN or infinite"),
        ("accuracy", np.array([[3.0], [1.0]]), np.eye(2), r"class indices 0\.\.1 .*, got 1 to 3"),
        ("accuracy", np.array([[-1.0], [1.0]]), np.eye(2), r"class indices 0\.\.1 .*, got -1 to 1"),
        ("log_loss", np.array([[0.5], [1.0]]), np.eye(2), r"class indices 0\.\.1 .*, got 0\.5 to 1"),
        (
            "accuracy",
            np.array([[0.3], [1.0]]),
            ONE,
            r"accuracy needs targets that are labels .* got 0\.3;.*log_loss",
        ),
        ("f1_macro", np.array([[0.3], [1.0]]), ONE, "f1_macro needs targets that are labels"),
        ("roc_auc", np.array([[0.3], [1.0]]), ONE, r"roc_auc needs targets of 0 and 1, got 0\.3;.*log_loss"),
        ("roc_auc", np.ones((2, 1)), ONE, "roc_auc is not defined: the 2 targets hold a single class"),
        ("roc_auc", np.ones((2, 1)), np.full((2, 3), 1 / 3), "the 2 targets hold a single class"),
        ("roc_auc", np.ones((2, 2)), np.full((2, 2), 0.5), "the 2 targets hold a single class"),
        (
            "log_loss",
            ONE,
            np.array([[-1.0], [2.0]]),
            "log_loss needs probabilities between 0 and 1, got -1 to 2",
        ),
        ("log_loss", np.array([[0.0], [3.0]]), ONE, "log_loss needs targets between 0 and 1, got 0 to 3"),
    ],
)
def test_errors(name: str, targets: np.ndarray, preds: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        evaluate(name, targets, preds)


def test_importing_metrics_loads_neither_torch_nor_scikit_learn():
    code = "import comp.metrics, sys; sys.exit(any(m in sys.modules for m in ('torch', 'sklearn', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
