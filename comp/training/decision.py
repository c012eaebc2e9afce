"""How an evaluation decides which weights are better, from the predictions of some of the rows. No model in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from comp.config import Task
from comp.metrics import METRICS, row_losses
from comp.training.covariates import covariates_of
from comp.training.early import bound, cannot_win, estimate, looks_that_decide, most_worse, race

__all__ = ["Decision", "where_seen"]

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]
FEW_ROWS = 80  # by fewer, wrong weights were chosen now and then (benchmarks/results/eval_cost.md)
TIE = 0.001  # of the score: so much worse, the last weights are kept rather than a best that must be scored first


@dataclass
class Decision:
    """Compares predictions (N, K) of the first task by the latest weights and by the best; not scored: NaN.

    `decide`, `error_rate`, `race_percent`: of `evaluation` in the config. `places`: of the N rows, below.
    """

    task: Task
    metric: str
    targets: Floats
    """(N, K')"""
    lengths: NDArray[np.int64]
    """(N,) tokens."""
    looks: list[Rows]
    """Places, scored one look after the other."""
    decide: Literal["full", "exact", "race"] = "full"
    error_rate: float = 0.05
    race_percent: float = 100
    foretold: Floats | None = field(default=None, init=False)
    """Of a race: the latest predictions (N, K) that cover all rows."""

    @property
    def warning(self) -> str | None:
        """What to tell of a cap that leaves too few rows to choose weights by; None where there is none."""
        ends, num_rows = self._ends(), len(self.targets)
        if not self.capped or not ends or ends[-1] >= FEW_ROWS:
            return None
        every = looks_that_decide([len(look) for look in self.looks], 100)
        more = next((f"{math.ceil(100 * end / num_rows)} leaves {end}, " for end in every if end >= FEW_ROWS), "")
        return (
            f"evaluation.race_percent {self.race_percent:g} leaves {ends[-1]} of {num_rows:,} held-out rows to choose "
            f"the best weights by, which may then be some that are percents worse; {more}null lets all rows decide"
        )

    @property
    def capped(self) -> bool:
        """True for a race that some of the rows end."""
        return self.decide == "race" and self.race_percent < 100

    def order(self, best: Floats | None, full: bool) -> list[Rows]:
        """Return the looks in the order that decides soonest: exact begins where the best loses most per token.

        Where nothing is decided all rows come at once, which wastes least; but the first evaluation of a capped race,
        which has nothing to beat, needs no more of them than the others.
        """
        if self.decide == "race" and (full or best is None):
            first = not full and self.capped
            return [np.concatenate(self.looks[: max(1, len(self._ends()))] if first else self.looks)]
        if self.decide != "exact" or best is None:
            return self.looks
        losses = self._losses(best, self._everything)
        return sorted(self.looks, key=lambda places: -float(losses[places].sum() / self.lengths[places].sum()))

    def verdict(self, new: Floats, best: Floats) -> tuple[int, float]:
        """Return -1 when the latest weights lose, 1 when they win, 0 when more rows are needed.

        Then their mean loss less that of the best, over all rows, as far as it is known. The best are scored wherever
        the latest are.
        """
        seen = where_seen(new)
        if len(seen) == len(new):
            return 0, float(self._differences(new, best, seen).mean())
        if self.decide == "race":
            verdict, difference = self.raced(new, best, seen)
            if verdict == 0 and self.capped and len(seen) >= self._ends()[-1]:
                verdict = 1 if difference < 0 else -1
            return verdict, difference
        metric, columns = METRICS[self.metric], self.targets.shape[1]
        losses = self._losses(new, seen)
        lost = cannot_win(losses, self._losses(best, self._everything), columns=columns, counts=metric.counts)
        return -int(lost), float((losses - self._losses(best, seen)).mean())

    def raced(self, new: Floats, best: Floats, seen: Rows) -> tuple[int, float]:
        """Return what `race` says of the rows at `seen`, which both are scored on."""
        limit = bound(tuple(end / len(new) for end in self._ends()), self.error_rate)
        return race(self._differences(new, best, seen), seen, len(new), limit, self._covariates())

    def tied(self, new: Floats, best: Floats, seen: Rows) -> bool:
        """Tell whether the latest weights, scored on all rows, are surely at most `TIE` worse than the best.

        Of a capped race, from its cap on; the best are scored on the rows at `seen`.
        """
        if not self.capped or len(seen) < self._ends()[-1]:
            return False
        worse = most_worse(self._differences(new, best, seen), seen, len(new), self._covariates())
        mean = self.mean(new)
        score, beyond = (METRICS[self.metric].of_mean(value) for value in (mean, max(0.0, mean - worse)))
        return worse <= 0 or abs(score - beyond) <= TIE * abs(beyond)

    def mean(self, found: Floats) -> float:
        """Return the mean loss over the rows that are scored."""
        return float(self._losses(found, where_seen(found)).mean())

    def estimated(self, new: Floats, best_mean: float, difference: float) -> float:
        """Return the mean loss of the latest weights over all rows, estimated; see `estimate`."""
        return estimate(self._losses(new, where_seen(new)), best_mean, difference, len(new))

    @property
    def _everything(self) -> Rows:
        return np.arange(len(self.targets))

    def _ends(self) -> tuple[int, ...]:
        return looks_that_decide([len(look) for look in self.looks], self.race_percent)

    def _losses(self, found: Floats, places: Rows) -> Floats:
        return row_losses(self.metric, self.targets[places], found[places], self.task.kind)

    def _differences(self, new: Floats, best: Floats, seen: Rows) -> Floats:
        return self._losses(new, seen) - self._losses(best, seen)

    def _covariates(self) -> Floats | None:
        """Return what the latest predictions of all rows say of each (N, F)."""
        if self.foretold is None:
            return None
        losses_of = partial(row_losses, self.metric, self.targets, kind=self.task.kind)
        return covariates_of(self.foretold.astype(np.float64), self.targets, losses_of, self.task.kind)


def where_seen(found: Floats) -> Rows:
    """Return the places that have predictions."""
    return np.flatnonzero(np.isfinite(found).all(axis=1))
