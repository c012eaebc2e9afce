"""Jobs side by side in worker processes of this machine, each with its share of the threads and one device."""

from __future__ import annotations

import os
import queue
import sys
import threading
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from comp.progress import NullProgress, open_progress
from comp.runs import now
from comp.runtime import Stopper, visible_devices
from comp.training.job import Found, Function, Job, Outcome, Say, do, read_more
from comp.worker import Handle, Tell, Worker, WorkerFault, thread_variables

__all__ = ["Processes", "settle"]

ADVICE = "the same command goes on from what is saved"


class Processes:
    """`num` worker processes at most, of `threads` each; a dead one is replaced.

    A thread waits for each worker; what they hear is queued, and everything is said by the thread that called.
    """

    def __init__(
        self, fn: Function, jobs: Sequence[Job], num: int, threads: int, say: Say, inherit: Sequence[int]
    ) -> None:
        self.fn, self.todo, self.say, self.inherit = fn, deque(jobs), say, inherit
        self.num, self.threads = min(num, len(jobs)), threads
        self.events: queue.SimpleQueue[tuple[str, int, Any]] = queue.SimpleQueue()
        self.workers: dict[int, Worker] = {}
        self.board = _Board(say)
        self.stopping = threading.Event()

    def run(self) -> Found:
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
                outcome = Outcome(job, "failed", f"ended {fault.how}{read_more(job)}")
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
        return Worker("the process", settle, environment=environment, advice=ADVICE, hear=hear, inherit=self.inherit)

    def _hear(self, place: int, line: str) -> None:
        self.events.put(("heard", place, (line,)))


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
            self.bars[place] = open_progress(total, self.jobs[place].name, done=done)
        elif kind == "advance":
            count, shown = value
            if place in self.bars:
                self.bars[place].advance(count, **shown)
        elif kind == "mark":
            self.note(place, f"{value[0]}\n")
            if place in self.bars:
                self.bars[place].say(f"{self.jobs[place].name}:{value[0]}")
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


# --- in a worker -----------------------------------------------------------------------------------------------------


def settle(tell: Tell) -> Handle:
    """Return what does jobs in a worker, and tells what they say."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    return partial(do, say=lambda line: tell(("say", line)), opener=partial(_Relay, tell))


class _Relay(NullProgress):
    """Sends the progress of a loop to the one who gave the job."""

    def __init__(self, tell: Tell, total: int, label: str, done: int = 0, to_come: float = 0) -> None:
        self.tell = tell
        tell(("open", total, done))

    def advance(self, count: int = 1, **shown: str) -> None:
        self.tell(("advance", count, shown))

    def say(self, line: str) -> None:
        self.tell(("mark", line))

    def close(self) -> None:
        self.tell(("close",))
