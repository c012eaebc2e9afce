"""When to evaluate: every n percent of an epoch, every n steps, or driven by the score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Cadence", "Never"]


@dataclass(frozen=True)
class Cadence:
    """Says after which optimizer steps (counted from 1) the held-out fold is scored.

    The last step is always due. An interval counts over epoch borders, so it never drifts and no tail stays unseen; an
    interval below one step means every step, never two evaluations without a step between.
    """

    num_steps: int
    """Optimizer steps of the whole run."""
    interval: float | None = None
    """Steps between evaluations, may be fractional; None = by `table`, or at the end only."""
    table: Sequence[tuple[float, int]] | None = None
    """[(threshold, steps)], thresholds falling: the first row with threshold <= score gives the steps to the next."""
    start: int = 0
    """No evaluation up to this step."""
    lead: int = 0
    """Steps before the run, of a stage that is not scored; the steps asked about count them, all others do not."""

    @classmethod
    def from_unit(
        cls,
        *,
        num_steps: int,
        steps_per_epoch: int,
        every: tuple[float, Literal["percent", "steps"]] | None,
        table: Sequence[tuple[float, int]] | None,
        start_percent: float,
        lead: int = 0,
    ) -> Cadence:
        """Build from the config's units."""
        interval = None
        if every is not None:
            interval = every[0] if every[1] == "steps" else every[0] / 100 * steps_per_epoch
        return cls(num_steps, interval, table, start=int(start_percent / 100 * num_steps), lead=lead)

    def due(self, step: int, last_step: int, last_score: float | None) -> bool:
        """Tell whether to evaluate after `step`.

        `last_step` and `last_score` are those of the latest evaluation; 0 and None before the first.
        """
        step, last_step = step - self.lead, last_step - self.lead
        if step >= self.num_steps:
            return True
        if step <= self.start:
            return False
        if self.interval is not None:
            # Points at round(k x interval): equal spacing without drift, whatever the fraction.
            return _points(step, self.interval) > _points(step - 1, self.interval)
        if self.table is not None:
            return step >= max(last_step, self.start) + self.steps_after(last_score)
        return False

    def steps_after(self, score: float | None) -> int:
        """Return the table's steps until the next evaluation; before the first score, its first row's."""
        assert self.table
        if score is not None:
            for threshold, steps in self.table:
                if threshold <= score:
                    return steps
            return self.table[-1][1]
        return self.table[0][1]


def _points(step: int, interval: float) -> int:
    """Return how many evaluation points lie in 1..step."""
    if interval <= 1:
        return step
    # Point k lies at floor(k x interval + 1/2); the largest k with that <= step.
    return int((step + 0.5) / interval - 1e-9)


class Never:
    """The cadence of a run without held-out rows."""

    def due(self, step: int, last_step: int, last_score: float | None) -> bool:
        return False
