"""map_jobs(fn, jobs, how): the same function for every job, one after the other or side by side. It knows no folds.

Side by side a job that fails, or whose process dies, costs no other: the rest are done, then JobsFailed says which
failed, why and where to read more. A signal reaches every job, which stops after its step.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from comp.progress import Lines, NullProgress, OpenProgress, open_progress
from comp.runs import DiskFullError, now
from comp.runtime import Stopper, is_ours, release_memory, visible_devices
from comp.training.memory import ADVICE, is_memory
from comp.training.trainer import Stopped
from comp.worker import Handle, Tell, Worker, WorkerFault, thread_variables

__all__ = ["How", "Job", "JobsFailed", "Link", "Say", "how_of", "map_jobs", "threads_each"]

Say: TypeAlias = Callable[[str], None]
Function: TypeAlias = Callable[..., Any]
GO_ON = "the same command goes on from what is saved"


class JobsFailed(RuntimeError):
    """Some jobs failed; the others are done. The message has a line for each that did."""


@dataclass(frozen=True)
class How:
    """Where jobs are done, and how many at a time."""

    where: Literal["serial", "processes"] = "serial"
    num: int = 1


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


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    job: Job
    kind: str
    """done | stopped | failed"""
    value: Any
    """What the function returned; or why and where the job ended, as words."""


def how_of(jobs: int | None) -> How:
    """Read --jobs. Raises ValueError that says what is allowed."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"--jobs {jobs}: at least 1 is needed")
    return How("processes", jobs) if jobs is not None and jobs > 1 else How()


def threads_each(how: How) -> int:
    """Return how many CPU threads a job computes with: its share of those that this process has."""
    import torch

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
    outcomes = _Processes(fn, jobs, how, say, inherit).run()
    return _settled(jobs, outcomes)


def _here(fn: Function, job: Job, say: Say) -> Any:
    with Stopper() as stopper:
        value = fn(*job.arguments, Link(say, open_progress, stopper))
    if stopper.signal is not None:  # it came when the job had nothing left to stop
        raise Stopped(f"stopped after {job.name}", stopper.signal)
    release_memory()
    return value


def _settled(jobs: Sequence[Job], found: tuple[Mapping[str, Outcome], int | None]) -> list[Any]:
    """Return the values in order, or raise for what is missing."""
    outcomes, signal = found
    told = [f"{name} {outcome.value}" for name, outcome in outcomes.items() if outcome.kind != "done"]
    if signal is not None:
        raise Stopped("; ".join(told) or f"stopped after {', '.join(outcomes)}", signal)
    if told:
        done = sum(outcome.kind == "done" for outcome in outcomes.values())
        rest = f"; the other {done} of {len(jobs)} are done" if done else ""
        raise JobsFailed(
            "\n".join(told) + f"\n{len(told)} of {len(jobs)} failed{rest}. What is saved is whole: {GO_ON}"
        )
    return [outcomes[job.name].value for job in jobs]


# --- processes -------------------------------------------------------------------------------------------------------


class _Processes:
    """`how.num` worker processes, each with its share of the threads and one device; a dead one is replaced.

    A thread waits for each worker; what they hear is queued, and everything is said by the thread that called.
    """

    def __init__(self, fn: Function, jobs: Sequence[Job], how: How, say: Say, inherit: Sequence[int]) -> None:
        self.fn, self.todo, self.say, self.inherit = fn, deque(jobs), say, inherit
        self.num, self.threads = min(how.num, len(jobs)), threads_each(how)
        self.events: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        self.workers: dict[int, Worker] = {}
        self.board = _Board(say)
        self.stopping = threading.Event()

    def run(self) -> tuple[dict[str, Outcome], int | None]:
        """Do the jobs; return their outcomes by name, and the signal that stopped them, if any."""
        threads = [threading.Thread(target=self._serve, args=(place,), daemon=True) for place in range(self.num)]
        outcomes: dict[str, Outcome] = {}
        try:
            with Stopper() as stopper:
                for thread in threads:
                    thread.start()
                ended = 0
                while ended < self.num:
                    if stopper.signal is not None and not self.stopping.is_set():
                        self._stop()
                    try:
                        kind, place, value = self.events.get(timeout=0.2)
                    except queue.Empty:
                        continue
                    if kind == "over":
                        ended += 1
                    elif kind == "outcome":
                        outcomes[value.job.name] = value
                        self.board.ended(place, value)
                    else:
                        self.board.hear(kind, place, value)
        except BaseException:  # a second Ctrl-C
            for worker in list(self.workers.values()):
                worker.kill()
            raise
        finally:
            self.board.close()
        for thread in threads:
            thread.join()
        return outcomes, stopper.signal

    def _stop(self) -> None:
        self.stopping.set()
        self.todo.clear()
        self.say("stopping: every job finishes its step and saves; Ctrl-C again ends them at once")
        for worker in list(self.workers.values()):
            worker.ask_to_stop()

    def _serve(self, place: int) -> None:
        """Have a worker do job after job, until there is none left; runs on a thread of its own."""
        worker: Worker | None = None
        while True:
            try:
                job = self.todo.popleft()
            except IndexError:
                break
            self.events.put(("begun", place, job))
            try:
                if worker is None:
                    worker = self.workers[place] = self._start(place)
                    worker.answer()
                if self.stopping.is_set():
                    outcome = Outcome(job, "stopped", "stopped before it began")
                else:
                    worker.ask((self.fn, job.arguments))
                    kind, value = worker.answer(lambda told: self.events.put((told[0], place, told[1:])))
                    outcome = Outcome(job, kind, value)
            except WorkerFault as fault:
                outcome = Outcome(job, "failed", f"ended {fault.how}{_read(job)}")
                if self.stopping.is_set():
                    outcome = Outcome(job, "stopped", "stopped before it had anything to save")
                if worker is not None:
                    self.workers.pop(place).close()
                worker = None
            except Exception as fault:  # what is sent cannot be pickled: a fault of ours, which must not hang
                outcome = Outcome(job, "failed", f"could not be given to a process: {fault}")
            self.events.put(("outcome", place, outcome))
        if worker is not None:
            worker.close()
            self.workers.pop(place, None)
        self.events.put(("over", place, None))

    def _start(self, place: int) -> Worker:
        """Start a worker; of several GPUs it sees one, which is the first there, as in a run alone."""
        environment = thread_variables(self.threads)
        devices = visible_devices()
        if devices[0].startswith("cuda"):
            number = place % len(devices)
            named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
            environment["CUDA_VISIBLE_DEVICES"] = named[number] if named else str(number)
        hear = partial(self._hear, place)
        return Worker("the process", settle, environment=environment, advice=GO_ON, hear=hear, inherit=self.inherit)

    def _hear(self, place: int, line: str) -> None:
        self.events.put(("heard", place, (line,)))


def _read(job: Job) -> str:
    return f"; read {job.log}" if job.log is not None else ""


class _Board:
    """Says what jobs say side by side: every line begins with its job's name, and is kept in the job's log."""

    def __init__(self, say: Say) -> None:
        self.say = say
        self.jobs: dict[int, Job] = {}
        self.bars: dict[int, NullProgress] = {}
        self.blocks: set[str] = set()

    def hear(self, kind: str, place: int, value: Any) -> None:
        if kind == "begun":
            self.jobs[place] = value
            self.note(place, f"--- {now()} {value.name}\n")
        elif kind == "say":
            self._say(place, *value)
        elif kind == "heard":
            self._aside(place, *value)
        elif kind == "open":
            total, done = value
            self._close(place)
            opener = open_progress if sys.stderr.isatty() else Lines
            self.bars[place] = opener(total, self.jobs[place].name, done=done)
        elif kind == "advance":
            count, shown = value
            if place in self.bars:
                self.bars[place].advance(count, **shown)
        elif kind == "mark":
            self.note(place, f"{value[0]}\n")
            if place in self.bars and sys.stderr.isatty():
                self.bars[place].say(f"{self.jobs[place].name}:{value[0]}")
            elif place in self.bars:
                self.bars[place].say(value[0])
        else:
            assert kind == "close", kind
            self._close(place)

    def ended(self, place: int, outcome: Outcome) -> None:
        self._close(place)
        if outcome.kind == "done":
            return
        line = f"{outcome.job.name} {outcome.value}"
        self.note(place, line + "\n")
        if outcome.kind == "failed":
            self.say(f"{line}; the others go on")

    def note(self, place: int, text: str) -> None:
        """Append to the log of the job; a full disk costs the log, not the job."""
        log = self.jobs[place].log
        if log is None:
            return
        with suppress(OSError):
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a", encoding="utf-8") as file:
                file.write(text)

    def _say(self, place: int, line: str) -> None:
        self.note(place, line + "\n")
        if "\n" in line:  # a table, which every job of a kind would show
            if line in self.blocks:
                return
            self.blocks.add(line)
            self.say(line)
        else:
            self.say(self._named(place, line))

    def _aside(self, place: int, line: str) -> None:
        self.note(place, line)
        sys.stderr.write(self._named(place, line))

    def _named(self, place: int, line: str) -> str:
        name = self.jobs[place].name
        return line if line.startswith(name) else f"{name}: {line}"

    def _close(self, place: int) -> None:
        bar = self.bars.pop(place, None)
        if bar is not None:
            bar.close()

    def close(self) -> None:
        for place in list(self.bars):
            self._close(place)


# --- in the process of a job -----------------------------------------------------------------------------------------


def settle(tell: Tell) -> Handle:
    """Return what does jobs in a worker, and tells what they say."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    return partial(do, say=lambda line: tell(("say", line)), opener=partial(_Relay, tell))


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


class _Relay(NullProgress):
    """Sends the progress of a loop to the one who gave the job."""

    def __init__(self, tell: Tell, total: int, label: str, done: int = 0) -> None:
        self.tell = tell
        tell(("open", total, done))

    def advance(self, count: int = 1, **shown: str) -> None:
        self.tell(("advance", count, shown))

    def say(self, line: str) -> None:
        self.tell(("mark", line))

    def close(self) -> None:
        self.tell(("close",))
