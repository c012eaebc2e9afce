"""A job of `map_jobs`: what it is, what it is given, and how it ends."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from comp.progress import OpenProgress
from comp.runs import DiskFullError
from comp.runtime import Stopper, is_ours, release_memory
from comp.training.memory import ADVICE, is_memory
from comp.training.ranks import ALONE, OneRank
from comp.training.trainer import Stopped

__all__ = ["Found", "Function", "How", "Job", "Link", "Outcome", "Say", "do", "read_more"]

Say: TypeAlias = Callable[[str], None]
Function: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class How:
    """Where jobs are done, and how many at a time."""

    where: Literal["serial", "processes", "ray", "ranks"] = "serial"
    num: int = 1
    resources: Mapping[str, float] = field(default_factory=dict)
    """What a job asks of a Ray cluster: cpu, gpu, memory (GiB) and what it has by other names; 1 cpu by default."""
    ranks: OneRank = ALONE
    """This process among those that do every job together."""


@dataclass(frozen=True)
class Job:
    """One call of the function; `name` it has in what is said."""

    name: str
    arguments: tuple[Any, ...]
    log: Path | None = None
    """Where what it says is kept, where others speak at the same time."""


@dataclass(frozen=True)
class Link:
    """What a job has of the one who gave it: its last argument."""

    say: Say
    """Takes lines for the user."""
    open_progress: OpenProgress
    stopper: Stopper
    """Its `signal` says that the job is to stop."""
    ranks: OneRank = ALONE
    """The processes that do this job together."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: Job
    kind: str
    """done | stopped | failed"""
    value: Any
    """What the function returned; or why and where the job ended, as words."""


Found: TypeAlias = tuple[dict[str, Outcome], int | None]
"""Outcomes by the names of their jobs, and the signal that stopped them, if one did."""


def read_more(job: Job) -> str:
    """Return words that lead to a job's log."""
    return f"; read {job.log}" if job.log is not None else ""


def do(fn: Function, arguments: tuple[Any, ...], *, say: Say, opener: OpenProgress) -> tuple[str, Any]:
    """Do a job; return how it ended, as (kind, value) of an Outcome."""
    with Stopper() as stopper:
        try:
            return "done", fn(*arguments, Link(say, opener, stopper))
        except Stopped as stopped:
            return "stopped", str(stopped)
        except Exception as fault:
            return "failed", _told(fault)
        finally:
            release_memory()


def _told(fault: Exception) -> str:
    """Return a fault in a few words; one that is a fault of ours leaves its traceback on stderr, in the log."""
    if isinstance(fault, ValueError | ArithmeticError) and is_ours(fault):
        return f"failed: {fault}"
    if is_memory(fault):
        reason = str(fault).strip().split("\n")[0] or "no more is given"
        return f"failed: memory ran out ({reason}); try {ADVICE}, or fewer --jobs"
    if isinstance(fault, DiskFullError):
        return f"failed: the disk is full ({fault.filename}); free some space"
    traceback.print_exception(fault)
    return f"failed: {type(fault).__name__}: {fault}"
