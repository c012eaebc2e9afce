"""Which models predict, in which order, and what is dropped when the time will not do.

A job is one fold model of one run. Heavy runs (by their weight in the blend) go first. Before each job the rest is
projected from what was measured; when it will not fit, jobs are dropped from the lightest run up: first its folds
beyond the first, then whole runs. Finished jobs are kept on disk, so that a killed call goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

__all__ = ["Job", "Jobs", "parse_duration"]

SAFETY = 0.9  # share of the time budget that is planned with; the rest is for writing and for what is not measured
Fold = int | str


def parse_duration(text: str) -> float:
    """Read "8h", "90min", "1.5 h" or "300s"; return seconds. Raises ValueError that says what is allowed."""
    compact = text.replace(" ", "")
    for unit, size in (("min", 60.0), ("h", 3600.0), ("s", 1.0)):
        if compact.endswith(unit):
            try:
                number = float(compact[: -len(unit)])
            except ValueError:
                break
            if 0 < number < float("inf"):
                return number * size
            break
    raise ValueError(f"--time-budget '{text}': allowed are like 8h, 90min or 300s")


@dataclass(frozen=True)
class Job:
    """One fold model of one run."""

    run: int
    fold: Fold
    cost: float
    """Expected cost in any unit, the same for all jobs."""


@dataclass
class Jobs:
    """The jobs of all runs, heaviest run first."""

    weights: Sequence[float]
    """Of each run."""
    jobs: list[Job]
    seconds: float | None = None
    """Time budget; None = without."""
    clock: Callable[[], float] = time.monotonic
    began: float = field(init=False)
    done: list[tuple[Job, float]] = field(init=False, default_factory=list)
    """Finished jobs and their seconds."""
    covered: set[int] = field(init=False, default_factory=set)
    """Runs with a finished job."""
    dropped: list[Job] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.began = self.clock()
        order = sorted(range(len(self.weights)), key=lambda run: -self.weights[run])
        place = {run: rank for rank, run in enumerate(order)}
        self.jobs = sorted(self.jobs, key=lambda job: place[job.run])  # stable: folds stay in order

    def projected(self) -> float:
        """Return the seconds that the jobs to do will take, by the cost and time of those done; 0 before the first."""
        cost = sum(job.cost for job, _ in self.done)
        measured = sum(seconds for _, seconds in self.done)
        return measured / cost * sum(job.cost for job in self.jobs) if cost else 0.0

    def next(self) -> Job | None:
        """Return the next job, after dropping what will not fit; None when there is none left."""
        if self.seconds is not None:
            left = SAFETY * self.seconds - (self.clock() - self.began)
            while self.jobs and self.done and self.projected() > left:
                victim = self._weakest()
                self.jobs.remove(victim)
                self.dropped.append(victim)
        return self.jobs.pop(0) if self.jobs else None

    def _weakest(self) -> Job:
        """Return the job to drop: a further fold of the lightest run, else the lightest run's only one."""
        for job in reversed(self.jobs):
            first = next(other for other in self.jobs if other.run == job.run)
            if job is not first or job.run in self.covered:
                return job
        return self.jobs[-1]

    def finished(self, job: Job, seconds: float | None) -> None:
        """Note a job as done; `seconds` None = it was there already, and measures nothing."""
        self.covered.add(job.run)
        if seconds is not None:
            self.done.append((job, seconds))
