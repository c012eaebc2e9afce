"""The trials of a search in several processes: `--jobs 4`. They share nothing but the journal.

Each is a job of processes.py, which asks the study for trials until the budget is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path

from comp.runtime import is_ours
from comp.training.dispatch import threads_each
from comp.training.job import How, Job, Link, Say
from comp.training.processes import Processes
from comp.training.search import Order, Search, open_search, work
from comp.training.study import Study, hours_of
from comp.training.trainer import Stopped

__all__ = ["run_workers"]

MOST_DEATHS = 3  # of workers, before the search gives up


def run_workers(
    found: Search, study: Study, give_up: Callable[[], None], say: Say, inherit: Sequence[int] = ()
) -> None:
    """Have `--jobs` processes run trials until the budget is spent. `give_up`: for the trials of dead workers.

    `inherit`: open files of locks, which workers keep too. Raises ValueError for what a worker was refused,
    RuntimeError when workers keep dying, Stopped on SIGTERM or Ctrl-C.
    """
    order, deaths = found.order, list[str]()
    how = How("processes", order.jobs)
    while not _spent(found, study):
        jobs = [Job(f"worker {n}", (order, n), log_of(order.folder, n)) for n in range(order.jobs)]
        outcomes, signal = Processes(run_trials, jobs, how.num, threads_each(how), say, inherit).run()
        give_up()  # nobody runs any more
        if signal is not None:
            raise Stopped("the search was stopped", signal)
        mistakes = [outcome.value for outcome in outcomes.values() if outcome.kind == "done" and outcome.value]
        if mistakes:
            raise ValueError(mistakes[0])
        deaths += [f"{name} {outcome.value}" for name, outcome in outcomes.items() if outcome.kind == "failed"]
        if len(deaths) >= MOST_DEATHS:
            raise RuntimeError(f"{len(deaths)} workers of the search died; try fewer --jobs. The last: {deaths[-1]}")


def log_of(folder: Path, place: int) -> Path:
    """Return the file of what a worker says."""
    return folder / f"worker{place}.log"


def _spent(found: Search, study: Study) -> bool:
    order, tried = found.order, study.tried()
    if order.trials is not None:
        return sum(one.finished for one in tried) >= order.trials
    return order.hours is not None and hours_of(tried) >= order.hours


def run_trials(order: Order, place: int, link: Link) -> str | None:
    """Run trials in a worker until the budget is spent; return what was wrong with the order, if anything."""

    def heed() -> None:
        if link.stopper.signal is not None:
            raise Stopped("stopped between two trials", link.stopper.signal)

    # The steps of trials side by side are for the log: they would bury the trials' own lines.
    with open(log_of(order.folder, place), "a", encoding="utf-8") as log, redirect_stderr(log):
        try:
            found = open_search(order)
            work(found, found.study(), link.say, heed)
        except ValueError as fault:
            if not is_ours(fault):
                raise
            return str(fault)
    return None
