"""The estimate of keep-best's flattery against simulations in which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from comp.training.optimism import flattery


def world(draw: np.random.Generator, rows: int, checkpoints: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Checkpoints that are equally good in truth: each has errors of its own beside those that all share."""
    targets = draw.normal(size=(rows, 1))
    shared = draw.normal(size=(rows, 1))
    return targets, [targets + 0.5 * shared + 0.3 * draw.normal(size=(rows, 1)) for _ in range(checkpoints)]


@pytest.mark.parametrize(("rows", "checkpoints"), [(200, 5), (200, 20), (800, 20)])
def test_the_estimate_is_the_flattery_there_is(rows: int, checkpoints: int) -> None:
    draw = np.random.default_rng(0)
    truth, estimates = [], []
    for _ in range(40):
        targets, evaluations = world(draw, rows, checkpoints)
        scores = [np.sqrt(((targets - one) ** 2).mean()) for one in evaluations]
        truth.append(np.sqrt(0.5**2 + 0.3**2) - min(scores))
        estimates.append(flattery(targets, evaluations, "rmse", "regression", splits=20))
    assert np.mean(estimates) == pytest.approx(np.mean(truth), rel=0.35)
    assert np.mean(truth) > 0.003


def test_one_that_is_really_best_flatters_little() -> None:
    targets, evaluations = world(np.random.default_rng(1), 400, 10)
    equal = flattery(targets, evaluations, "rmse", "regression")
    clear = flattery(targets, [*evaluations[1:], targets + 0.1 * (evaluations[0] - targets)], "rmse", "regression")
    assert equal is not None and clear is not None and clear < 0.2 * equal


def test_the_edges() -> None:
    targets, evaluations = world(np.random.default_rng(2), 40, 3)
    assert flattery(targets, evaluations[:1], "rmse", "regression") == 0.0
    assert flattery(targets[:3], [one[:3] for one in evaluations], "rmse", "regression") is None
    assert flattery(targets, [targets, targets], "rmse", "regression") == 0.0
    higher = flattery(targets, evaluations, "pearson", "regression")
    assert higher is not None and higher >= 0
    alone = np.zeros((40, 1))
    assert flattery(alone, [alone + 0.2, alone + 0.3], "roc_auc", "binary") is None
    again = [flattery(targets, evaluations, "rmse", "regression") for _ in range(2)]
    assert again[0] == again[1]
