"""map_jobs(fn, jobs, how): the same function for every job, one after the other or side by side. It knows no folds.

Side by side a job that fails, or whose process dies, costs no other: the rest are done, then JobsFailed says which
failed, why and where to read more. A signal reaches every job, which stops after its step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from comp.progress import NullProgress, open_progress
from comp.runtime import Stopper, release_memory
from comp.training.cluster import Cluster, find_ray
from comp.training.job import Found, Function, How, Job, Link, Say
from comp.training.processes import ADVICE, Processes
from comp.training.ranks import ALONE, OneRank, asked_for, join
from comp.training.trainer import Stopped

__all__ = ["How", "Job", "JobsFailed", "Link", "Say", "how_of", "joined", "map_jobs", "threads_each"]

ALL = 1_000_000  # jobs at a time on a cluster, which knows best


class JobsFailed(RuntimeError):
    """Some jobs failed; the others are done. The message has a line for each that did."""


def how_of(jobs: int | None, on: str | None = None, resources: str | None = None) -> How:
    """Read --jobs, --on and --resources. Raises ValueError that says what is allowed."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least 1 is needed")
    if asked_for():
        if on is not None or (jobs or 1) > 1:
            raise ValueError(
                "torch.distributed.run shares one fold among its processes: leave out --jobs and --on, or start comp "
                "without it"
            )
        return How("ranks")
    if on not in (None, "ray"):
        raise ValueError(f"--on '{on}': allowed is ray; without it this machine does the work")
    if on == "ray":
        how = How("ray", jobs or ALL, _parse_resources(resources or ""))
        find_ray()
        return how
    if resources is not None:
        raise ValueError("--resources says what a job asks of a Ray cluster; use it with --on ray")
    return How("processes", jobs) if jobs is not None and jobs > 1 else How()


def _parse_resources(text: str) -> dict[str, float]:
    """Read "cpu=4,gpu=1,accelerator_type:A100=0.1"."""
    found = {"cpu": 1.0}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = part.rpartition("=")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            name = ""
        if not name or not 0 <= found[name.strip()] < float("inf"):
            raise ValueError(
                f"--resources '{part}': allowed are like cpu=4,gpu=1,memory=16 (GiB), or the cluster's own"
            )
    if found["cpu"] < 1 or found["cpu"] != int(found["cpu"]):
        raise ValueError(f"--resources cpu={found['cpu']:g}: a job computes with whole threads, 1 at least")
    return found


def threads_each(how: How) -> int:
    """Return how many CPU threads a job computes with: its share of those that this process has."""
    import torch

    if how.where == "ray":
        return int(how.resources.get("cpu", 1))
    return max(1, torch.get_num_threads() // how.num) if how.where == "processes" else torch.get_num_threads()


def map_jobs(
    fn: Function, jobs: Sequence[Job], how: How, *, say: Say = print, inherit: Sequence[int] = ()
) -> list[Any]:
    """Return `fn(*job.arguments, link)` for every job, in their order.

    `say` takes lines for the user. `inherit`: open files of locks, which workers keep too. Serial, what a job raises
    is raised at once. Otherwise `fn` must be found by its name in its module; raises JobsFailed after the other jobs
    are done. Raises Stopped after SIGTERM or Ctrl-C, when all have stopped.
    """
    if how.where == "serial" or len(jobs) == 0:
        return [_here(fn, job, say) for job in jobs]
    if how.where == "ranks":
        return [_together(fn, job, say, how.ranks) for job in jobs]
    if how.where == "ray":
        return _settled(jobs, Cluster(fn, jobs, how, say).run())
    return _settled(jobs, Processes(fn, jobs, how.num, threads_each(how), say, inherit).run())


def _together(fn: Function, job: Job, say: Say, ranks: OneRank) -> Any:
    """Hand a job to the other ranks, and do it with them."""
    ranks.of_first((fn, job.arguments))
    return _here(fn, job, say, ranks)


@contextmanager
def joined(how: How) -> Iterator[How | None]:
    """Join the processes that torch.distributed.run started, if it did; give the `how` of this one.

    None = it is not the first, and has done its part when the block begins.
    """
    if how.where != "ranks":
        yield how
        return
    with join() as ranks:
        if not ranks.first:
            _follow(ranks)
            yield None
            return
        try:
            yield replace(how, ranks=ranks)
        finally:
            ranks.of_first(None)  # the others may go


def _follow(ranks: OneRank) -> None:
    """Do with the first rank what it hands out, silently, until it has no more."""
    while (given := ranks.of_first(None)) is not None:
        fn, arguments = given
        # what goes wrong goes wrong in the first rank too, which says so
        with Stopper() as stopper, suppress(Stopped, ArithmeticError):
            fn(*arguments, Link(_unheard, _unseen, stopper, ranks))
        release_memory()


def _unheard(line: str) -> None:
    """Say nothing."""


def _unseen(total: int, label: str, done: int = 0, to_come: float = 0) -> NullProgress:
    return NullProgress()


def _here(fn: Function, job: Job, say: Say, ranks: OneRank = ALONE) -> Any:
    with Stopper() as stopper:
        value = fn(*job.arguments, Link(say, open_progress, stopper, ranks))
    if stopper.signal is not None:  # it came when the job had nothing left to stop
        raise Stopped(f"stopped after {job.name}", stopper.signal)
    release_memory()
    return value


def _settled(jobs: Sequence[Job], found: Found) -> list[Any]:
    """Return the values in order, or raise for what is missing."""
    outcomes, signal = found
    told = [f"{name} {outcome.value}" for name, outcome in outcomes.items() if outcome.kind != "done"]
    if signal is not None:
        raise Stopped("; ".join(told) or f"stopped after {', '.join(outcomes)}", signal)
    if told:
        done = sum(outcome.kind == "done" for outcome in outcomes.values())
        rest = f"; the other {done} of {len(jobs)} are done" if done else ""
        raise JobsFailed(
            "\n".join(told) + f"\n{len(told)} of {len(jobs)} failed{rest}. What is saved is whole: {ADVICE}"
        )
    return [outcomes[job.name].value for job in jobs]
