"""Several seeds of one config: the measure of its stability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comp.config import Config
from comp.metrics import METRICS
from comp.runs import write_json
from comp.training import crossval
from comp.training.dispatch import How, JobsFailed, map_jobs
from comp.training.one_fold import train_job
from comp.training.oof import Score, Scores

__all__ = ["SeedScores", "parse_seeds", "run_seeds", "summarize"]


def parse_seeds(text: str) -> list[int]:
    """Read "0,1,2". Raises ValueError that says what is allowed."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise ValueError(f"--seeds '{text}': allowed are different whole numbers like 0,1,2")
    return [int(part) for part in parts]


@dataclass(frozen=True)
class SeedScores:
    """Scores of one metric over seeds, pooled over each seed's folds."""

    metric: str
    pooled: dict[int, Score]
    """Seed -> score by best weights."""
    last: dict[int, Score]
    """Seed -> score by last weights."""

    def as_dict(self) -> dict[str, object]:
        """Return what runs/<name>.seeds.json holds."""
        return {
            "metric": self.metric,
            **{
                kind: {"seeds": scores, **dict(zip(("mean", "std", "worst"), self.spread(scores), strict=True))}
                for kind, scores in (("best", self.pooled), ("last", self.last))
            },
        }

    def spread(self, scores: dict[int, Score]) -> tuple[Score, Score, Score]:
        """Return mean, standard deviation (ddof 1; None for one seed) and worst over the seeds that have a score."""
        values = [score for score in scores.values() if score is not None]
        if not values:
            return None, None, None
        worst = min(values) if METRICS[self.metric].higher_is_better else max(values)
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, worst

    def table(self) -> str:
        """Return the scores as text, best beside last."""

        def line(name: str, *values: Score) -> str:
            return f"{name:<16}" + "".join(f"{'-' if value is None else f'{value:.5f}':>10}" for value in values)

        lines = [f"{self.metric:<16}{'best':>10}{'last':>10}"]
        lines += [line(f"seed {seed}", self.pooled[seed], self.last[seed]) for seed in self.pooled]
        both = zip(("mean", "deviation", "worst"), self.spread(self.pooled), self.spread(self.last), strict=True)
        return "\n".join([*lines, *(line(*row) for row in both)])


def summarize(scores: dict[int, Scores]) -> SeedScores:
    """Gather the scores of each seed's run."""
    return SeedScores(
        metric=next(iter(scores.values())).metric,
        pooled={seed: own.pooled for seed, own in scores.items()},
        last={seed: own.last_pooled for seed, own in scores.items()},
    )


def run_seeds(
    config: Config,
    name: str,
    folds: str,
    seeds: Sequence[int],
    *,
    restart: bool = False,
    save_every: str = "auto",
    how: How = How(),  # noqa: B008 - frozen
    say: Callable[[str], None] = print,
) -> SeedScores | None:
    """Train runs/<name>-seed<s> for each seed on the same folds; print mean and spread; write runs/<name>.seeds.json.

    A seed decides head initialisation, dropout and batch order. Finished folds are skipped as in one run. Side by side
    (`how`) the folds of all seeds are one list of jobs. Returns None when nothing was validated (--fold full).
    """
    own = {
        seed: config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})
        for seed in seeds
    }
    options: dict[str, Any] = {"restart": restart, "save_every": save_every, "how": how, "say": say}
    if how.where in ("serial", "ranks"):  # one fold at a time
        found = {seed: crossval.run(own[seed], f"{name}-seed{seed}", folds, **options) for seed in seeds}
        return _summed_up(name, found, say)
    with ExitStack() as stack:
        begun = {
            seed: stack.enter_context(crossval.begin(own[seed], f"{name}-seed{seed}", folds, of_many=True, **options))
            for seed in seeds
        }
        jobs = [job for one in begun.values() for job in one.jobs]
        try:
            map_jobs(train_job, jobs, how, say=say, inherit=[one.lock for one in begun.values()])
        except JobsFailed:
            _summed_up(name, {seed: one.score() for seed, one in begun.items()}, say)
            raise
        return _summed_up(name, {seed: one.score() for seed, one in begun.items()}, say)


def _summed_up(name: str, found: dict[int, Scores | None], say: Callable[[str], None]) -> SeedScores | None:
    scores = {seed: own for seed, own in found.items() if own is not None}
    if not scores:
        return None
    summary = summarize(scores)
    write_json(Path("runs") / f"{name}.seeds.json", summary.as_dict())
    say(summary.table())
    return summary
