"""The trials of a search in several processes: `--jobs 4`. They share nothing but the journal.

A worker is a fresh interpreter with this one's sys.path. It asks the study for trials until the budget is spent, says
its lines on standard output, and ends when its standard input closes, so that none outlives its parent, kill -9
included. The machine's threads are shared out, and its GPUs go round.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from comp.runtime import is_ours
from comp.training.search import Order, Search, open_search, work
from comp.training.study import Study, hours_of
from comp.training.trainer import Stopped

__all__ = ["run_workers"]

COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from comp.training.search_workers import be_worker; "
)
COMMAND += "be_worker()"
MOST_DEATHS = 3  # of workers, before the search gives up
MISTAKE = "\0"  # how a line begins that says what was wrong
Say = Callable[[str], None]


def run_workers(found: Search, study: Study, give_up: Callable[[], None], say: Say) -> None:
    """Have `--jobs` processes run trials until the budget is spent. `give_up`: for the trials of dead workers.

    Raises ValueError for what a worker was refused, RuntimeError when workers keep dying, Stopped on SIGTERM or Ctrl-C.
    """
    deaths = 0
    while not _spent(found, study):
        statuses, mistakes = _round(found, say)
        give_up()  # nobody runs any more
        if mistakes:
            raise ValueError(mistakes[0])
        deaths += sum(status != 0 for status in statuses)
        if deaths >= MOST_DEATHS:
            logs = ", ".join(str(log_of(found.order.folder, place)) for place, status in enumerate(statuses) if status)
            raise RuntimeError(
                f"{deaths} workers of the search died (exit status {', '.join(map(str, filter(None, statuses)))}; see "
                f"{logs}); -9 is often the system's answer to too little memory: try fewer --jobs"
            )


def log_of(folder: Path, place: int) -> Path:
    """Return the file of what a worker says on standard error."""
    return folder / f"worker{place}.log"


def _spent(found: Search, study: Study) -> bool:
    order, tried = found.order, study.tried()
    if order.trials is not None:
        return sum(one.finished for one in tried) >= order.trials
    return order.hours is not None and hours_of(tried) >= order.hours


def _round(found: Search, say: Say) -> tuple[list[int], list[str]]:
    """Start the workers and wait for all of them; return their exit statuses, and what they were refused."""
    folder, jobs = found.order.folder, found.order.jobs
    processes: list[subprocess.Popen[str]] = []
    listeners, mistakes = [], list[str]()
    with _stopping(processes) as asked:
        try:
            for place in range(jobs):
                if asked:
                    break
                with open(log_of(folder, place), "a", encoding="utf-8") as log:
                    process = subprocess.Popen(
                        [sys.executable, "-u", "-c", COMMAND, json.dumps([str(path) for path in sys.path])],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env={**os.environ, **_share(place, jobs)},
                        start_new_session=True,  # Ctrl-C is for the parent, which stops its workers
                        text=True,
                    )
                processes.append(process)
                assert process.stdin is not None and process.stdout is not None
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(asdict(found.order)) + "\n")
                    process.stdin.flush()
                listener = threading.Thread(target=_listen, args=(process.stdout, mistakes, say), daemon=True)
                listener.start()
                listeners.append(listener)
            statuses = [process.wait() for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.terminate()
            for process in processes:
                process.wait()
                assert process.stdin is not None and process.stdout is not None
                with suppress(OSError):
                    process.stdin.close()
            for listener in listeners:
                listener.join()
            for process in processes:
                if process.stdout is not None:
                    process.stdout.close()
    return statuses, mistakes


def _listen(lines: IO[str], mistakes: list[str], say: Say) -> None:
    for line in lines:
        if line.startswith(MISTAKE):
            mistakes.append(json.loads(line[1:]))
        else:
            say(line.rstrip("\n"))


@contextmanager
def _stopping(processes: list[subprocess.Popen[str]]) -> Iterator[list[int]]:
    """Stop the workers on SIGTERM or Ctrl-C, which they heed after their step, then raise Stopped."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        for process in processes:
            if process.poll() is None:
                process.terminate()

    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)} if main else {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        raise Stopped("the search was stopped", asked[0])


def _share(place: int, jobs: int) -> dict[str, str]:
    """Return the environment of a worker: its share of the threads, and its GPU."""
    import torch

    threads = str(max(1, torch.get_num_threads() // jobs))
    found = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TQDM_DISABLE": "1"}
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        there = named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]
        found["CUDA_VISIBLE_DEVICES"] = there[place % len(there)]
    return found


# --- one worker ------------------------------------------------------------------------------------------------------


def be_worker() -> None:
    """Run trials until the budget is spent. Called in a fresh interpreter; the order comes by standard input."""
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    status = 0
    try:
        found = open_search(Order(**order))
        work(found, found.study(), say=lambda line: print(line, flush=True))
    except Stopped as stopped:
        status = 128 + stopped.signal
    except ValueError as fault:
        if not is_ours(fault):
            raise
        print(MISTAKE + json.dumps(str(fault)), flush=True)
    sys.stderr.flush()
    os._exit(status)  # the thread below waits for standard input, which would hold up the usual end


def _end_with_parent() -> None:
    """Wait until the parent is gone, or lets go."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
