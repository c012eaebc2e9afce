"""When an evaluation may stop: its first rows say whether the weights beat the best so far. Pure numbers, no model.

Everything here compares row by row the losses of new weights with those of the best, for metrics that are a monotone
function of a mean over rows (`Metric.losses`).

exact: stop when even a perfect rest could not win. What is kept is bit for bit what full evaluation keeps.

race: the rows come in a fixed random order, in blocks that are alike in their targets, each look seeing a quarter more
than the one before. After each a two-sided t-test of the mean difference says wins, loses or go on; the mean is that of
a regression on what earlier predictions of all rows foretell (covariates.py). The question is what all rows would say,
not what a population would: so the variance is that of a sample without replacement, and where all rows would say that
nothing differs, the partial sums are a Brownian bridge. The bound is the same number of standard errors at every look
(Pocock 1977), such that the bridge crosses it with the probability that is asked for, by recursive integration
(Armitage, McPherson and Rowe 1969). Losses are taken as nearly normal in the mean of a look; a verdict needs ten rows
that differ. Blocks are strata (targets sorted, one row of each run to every block), which the variance leaves out, to
the safe side.

Shapes: N rows, K targets, n rows seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from comp.training.covariates import mean_over_all

__all__ = ["Evaluation", "blocks", "bound", "cannot_win", "estimate", "looks_that_decide", "most_worse", "race"]

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
LEAST_ROWS, GROWTH = 40, 1.25  # rows of the first look; rows seen after a look, over those before it
LEAST_DIFFERENT = 10  # rows that must differ before a t-test is trusted
NODES = 96


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    score: float
    """Over all rows, or an estimate of that; NaN when a prediction is not finite."""
    best: float | None
    """The score to beat, which a race may know better than before; None: nothing to beat."""
    rows: float = 1.0
    """Share of the held-out rows that was scored; below 1 the score is an estimate."""
    tie: bool = False
    """These weights are to be kept, but not because they are better."""


def cannot_win(seen: Floats, best: Floats, *, columns: int = 1, counts: bool = False) -> bool:
    """Tell whether losses `seen` (n,) of some rows cannot end below those of the `best` (N,), whatever the rest.

    Only where that is certain in spite of rounding, of the losses and of the metric itself: both sides are sums of
    non-negative numbers, so they are off by less than (N x K) roundings each. `counts`: losses are 0 or 1, sums exact.
    """
    slack = 0.0 if counts else 8 * (len(best) * columns + 16) * np.finfo(np.float64).eps
    return bool(seen.sum() >= best.sum() * (1 + slack))


def estimate(seen: Floats, best_mean: float, difference: float, num_rows: int) -> float:
    """Return the mean loss over all N rows, estimated from some: the mean of the best, moved by the mean `difference`.

    `seen` (n,) are the losses of some rows. Not below what a perfect rest would give. Without bias for the blocks of a
    race; rough where `exact` stops, which begins with the rows on which the best is worst.
    """
    return max(best_mean + difference, float(seen.sum()) / num_rows)


# --- the race --------------------------------------------------------------------------------------------------------


def blocks(targets: Floats, *, seed: int) -> list[Rows]:
    """Part N rows into random blocks, the first of 40 rows, each a quarter of those before, alike in `targets`.

    `targets` (N, K): rows are sorted by them (several columns: by the mean of the standardised ones), ties at random;
    of every run of as many rows as there are forties each forty gets one. A block is one forty or more.
    """
    number = max(1, len(targets) // LEAST_ROWS)
    draw = np.random.default_rng(seed)
    spread = targets.std(axis=0)
    key = ((targets - targets.mean(axis=0)) / np.where(spread > 0, spread, 1.0)).mean(axis=1)
    shuffled = draw.permutation(len(targets))
    order = shuffled[np.argsort(key[shuffled], kind="stable")]
    block = np.empty(len(targets), np.int64)
    for start in range(0, len(order), number):
        run = order[start : start + number]
        block[run] = draw.permutation(number)[: len(run)]
    ends = [1]
    while ends[-1] < number:
        ends.append(min(number, max(ends[-1] + 1, int(ends[-1] * GROWTH))))
    return [np.flatnonzero((block >= start) & (block < end)) for start, end in pairwise([0, *ends])]


def race(
    differences: Floats, places: Rows, num_rows: int, limit: float, known: Floats | None = None
) -> tuple[int, float]:
    """Return -1 when the new weights lose, 1 when they win, 0 when more rows must be seen; and the mean difference.

    `differences` (n,): loss of the new weights less that of the best, of the rows at `places` (n,) of N; `limit`:
    `bound`; `known` (N, F): covariates of all rows. The mean difference is that of all N rows, as estimated.
    """
    from scipy.special import ndtr, stdtrit

    if len(differences) < 2:
        return 0, float(differences.mean())
    mean, error, freedom = mean_over_all(differences, places, num_rows, known)
    if np.count_nonzero(differences) < LEAST_DIFFERENT or len(differences) >= num_rows:
        return 0, mean
    # so many of Student's standard errors as are as rare as `limit` of the normal law's
    if abs(mean) <= error * float(stdtrit(freedom, ndtr(limit))):
        return 0, mean
    return (1 if mean < 0 else -1), mean


def most_worse(differences: Floats, places: Rows, num_rows: int, known: Floats | None = None) -> float:
    """Return how much larger the new weights' mean loss of all rows is at most, by two standard errors; see `race`."""
    if np.count_nonzero(differences) < LEAST_DIFFERENT:
        return math.inf
    mean, error, _ = mean_over_all(differences, places, num_rows, known)
    return mean + 2 * error


def looks_that_decide(sizes: Sequence[int], most_percent: float) -> tuple[int, ...]:
    """Return after how many rows a test is made, of blocks of these `sizes`: never after the last, the first anyhow.

    With less than 100 percent, the last of them goes by the estimate where the test says nothing.
    """
    ends = np.cumsum(sizes)
    return tuple(int(end) for end in ends[:-1] if end == ends[0] or end <= ends[-1] * most_percent / 100)


@lru_cache
def bound(shares: Sequence[float], error_rate: float) -> float:
    """Return how many standard errors decide, at looks after `shares` (rising, below 1) of the rows.

    Where all rows would say that nothing differs, the chance that some look says wins is `error_rate`, and as much
    that one says loses; where they would say that the new weights lose, the chance of wins is smaller still.
    """
    low, high = 0.0, 10.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if _crossing(shares, middle) > 2 * error_rate else (low, middle)
    return high


def _crossing(shares: Sequence[float], limit: float) -> float:
    """Return the chance that a Brownian bridge leaves +-`limit` standard errors at one of the looks.

    At share t the bridge is (1 - t) times Brownian motion at the time t / (1 - t). Its density inside the bounds is
    carried from look to look on Gauss-Legendre nodes.
    """
    from scipy.special import ndtr

    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    times = [share / (1 - share) for share in shares]
    places, mass = np.zeros(1), np.ones(1)
    found, before = 0.0, 0.0
    for time in times:
        step, edge = math.sqrt(time - before), limit * math.sqrt(time)
        found += float(mass @ (ndtr((places - edge) / step) + ndtr((-places - edge) / step)))
        inside = nodes * edge
        density = np.exp(-0.5 * ((inside[:, None] - places) / step) ** 2) / (step * math.sqrt(2 * math.pi))
        places, mass, before = inside, weights * edge * (density @ mass), time
    return found
