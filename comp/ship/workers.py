"""Who predicts: this process, or one worker process for each device. Each has one model in memory at a time.

The rows of a model are shared out, not the models: with five folds on two GPUs the last fold would leave one of them
idle, and a model is the unit that is timed, kept and dropped. Rows travel as tokens, in shares of whole batches,
longest first; a worker takes the next share when it is done with one, so that a slow device gets fewer. Batches are
those of one process, so the numbers are too. The price: every worker reads every model's weights.

A worker is a fresh interpreter with this one's sys.path, talked to by pickles over its pipes. Unlike a process of
`multiprocessing` it never imports the script that called, which needs no `if __name__ == "__main__"`, and may be a
notebook. It ends when its pipe closes, so that none outlives its parent.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.runtime import is_ours, release_memory

__all__ = ["Alone", "Crew", "Predictor", "WorkerFault", "open_crew", "work"]

Fold: TypeAlias = int | str
Floats: TypeAlias = NDArray[np.float64]
SHARES_EACH = 8  # shares of a model's rows per worker: at most about a sixteenth of a model's time is waited at its end
COMMAND = "import json, os, sys; sys.path[:] = json.loads(sys.argv[1]); from comp.ship.workers import work; work()"
COMMAND += "; sys.stderr.flush(); os._exit(0)"  # nothing is left to tidy up, which takes torch seconds
LAST_LINES = 20  # of a worker's stderr, shown when it dies


class WorkerFault(RuntimeError):
    """A worker died, or failed for a reason that is no mistake of the user's."""


class Predictor(Protocol):
    """A run that can predict; it is sent to the workers."""

    @property
    def key(self) -> str:
        """What its model depends on but for the fold."""

    def build(self) -> Any:
        """Return its model on its device, no fold's weights in it yet."""

    def fill(self, model: Any, fold: Fold) -> None:
        """Put the weights of a fold into the model."""

    def predict_with(self, model: Any, fold: Fold, content: Any, on_batch: Callable[[int], Any] | None) -> Floats:
        """Return (N, K) predictions of the rows of `content`."""

    def shares(self, content: Any, number: int) -> list[tuple[NDArray[np.int64], Any]]:
        """Cut the rows of `content` into about `number` shares: their places and their own content."""

    def on(self, place: int) -> Predictor:
        """Return the run for the device of the worker at `place`."""


class Resident:
    """The one model that is in memory."""

    def __init__(self) -> None:
        self._key: str | None = None
        self._fold: Fold | None = None
        self._model: Any = None

    def predict(self, run: Predictor, fold: Fold, content: Any, on_batch: Callable[[int], Any] | None = None) -> Floats:
        """Return (N, K) predictions of one fold's model, which is built and filled where it is not there yet."""
        if run.key != self._key:
            self._key = self._fold = self._model = None  # the model before goes first
            release_memory()
            self._model, self._key = run.build(), run.key
        if fold != self._fold:
            self._fold = None
            run.fill(self._model, fold)
            self._fold = fold
        return run.predict_with(self._model, fold, content, on_batch)


@dataclass
class Alone:
    """This process predicts."""

    resident: Resident = field(default_factory=Resident)

    def predict(self, run: Predictor, fold: Fold, content: Any, on_rows: Callable[[int], Any]) -> Floats:
        """Return (N, K) predictions of one fold's model; `on_rows` is called with the number of rows done."""
        return self.resident.predict(run.on(0), fold, content, on_rows)

    def close(self) -> None:
        """Nothing is left behind."""


class Crew:
    """One process for each device predicts its shares of the rows."""

    def __init__(self, devices: Sequence[str]) -> None:
        import torch

        threads = max(1, torch.get_num_threads() // len(devices))
        self.workers: list[Worker] = []
        try:
            for device in devices:
                self.workers.append(Worker(device, threads))
            for worker in self.workers:  # all start at once, then all are waited for
                worker.answer()
        except BaseException:
            self.kill()
            raise

    def predict(self, run: Predictor, fold: Fold, content: Any, on_rows: Callable[[int], Any]) -> Floats:
        """As `Alone.predict`. Raises what a worker raised, or WorkerFault when one died; then the crew is gone."""
        shares = run.shares(content, SHARES_EACH * len(self.workers))
        todo = deque(shares)
        answers: SimpleQueue[tuple[NDArray[np.int64], Floats] | BaseException] = SimpleQueue()
        threads = [
            threading.Thread(target=_serve, args=(worker, run.on(place), fold, todo, answers), daemon=True)
            for place, worker in enumerate(self.workers)
        ]
        found: list[tuple[NDArray[np.int64], Floats]] = []
        try:
            for thread in threads:
                thread.start()
            while len(found) < len(shares):
                answer = answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                found.append(answer)
                on_rows(len(answer[0]))
        except BaseException:
            self.kill()  # which ends the threads that wait for an answer
            raise
        for thread in threads:
            thread.join()
        rows = np.concatenate([places for places, _ in found])
        values = np.concatenate([part for _, part in found])
        ordered = np.empty_like(values)
        ordered[rows] = values
        return ordered

    def close(self) -> None:
        """Let the workers end, and wait for them."""
        for worker in self.workers:
            worker.dismiss()
        for worker in self.workers:
            worker.close()

    def kill(self) -> None:
        """End the workers at once."""
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.close()


def _serve(worker: Worker, run: Predictor, fold: Fold, todo: deque[Any], answers: SimpleQueue[Any]) -> None:
    """Have a worker predict share after share, until there is none left or it fails."""
    try:
        while True:
            try:
                places, content = todo.popleft()
            except IndexError:
                return
            worker.ask((run, fold, content))
            answers.put((places, worker.answer()))
    except BaseException as fault:
        answers.put(fault)


def open_crew(devices: Sequence[str]) -> Alone | Crew:
    """Return who predicts on these devices."""
    return Crew(devices) if len(devices) > 1 else Alone()


# --- one worker ------------------------------------------------------------------------------------------------------


class Worker:
    """A process that answers requests (run, fold, content) with (N, K) predictions."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", COMMAND, json.dumps([str(path) for path in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers
        )
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.ask((device, threads))

    @property
    def pid(self) -> int:
        return self._process.pid

    def _listen(self) -> None:
        """Pass on what it says: in a notebook its stderr would end in a log that nobody reads."""
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace")
            self._said.append(text)
            with suppress(OSError, ValueError):  # nobody may listen to us any more
                sys.stderr.write(text)

    def ask(self, request: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(request, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            self._process.stdin.flush()
        except OSError:
            raise self._death() from None

    def answer(self) -> Any:
        """Wait for an answer. Raises ValueError for a user's mistake, WorkerFault for what else goes wrong there."""
        assert self._process.stdout is not None
        try:
            outcome, value = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            raise self._death() from None
        if outcome == "mistake":
            raise ValueError(value)
        if outcome == "failure":
            raise WorkerFault(f"the worker on {self.device} failed:\n{value}")
        return value

    def _death(self) -> WorkerFault:
        """Return how the process ended, its last words included."""
        status = self._process.wait()
        self._listener.join(timeout=5)
        words = "".join(self._said).strip()
        how = f"with exit status {status}"
        if status < 0:
            how = f"by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += ", which is often the system's answer to too little memory"
        advice = "what is finished is kept: the same command goes on, with --workers 1 in one process"
        heard = f"; it said:\n{words}" if words else ""
        return WorkerFault(f"the worker on {self.device} ended {how}; {advice}{heard}")

    def dismiss(self) -> None:
        """Let it end after what it is at."""
        assert self._process.stdin is not None
        with suppress(OSError):  # it may be gone, and what was to be sent with it
            self._process.stdin.close()

    def close(self, patience: float = 20.0) -> None:
        """Wait for its end, and take its pipes away; a worker that does not end is killed."""
        assert self._process.stdout is not None and self._process.stderr is not None
        self.dismiss()
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._listener.join(timeout=5)
        self._process.stderr.close()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


def work() -> None:
    """Be a worker: answer requests from standard input until it closes. Called in a fresh interpreter."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not fall between the answers
    requests = sys.stdin.buffer

    def reply(outcome: str, value: Any) -> None:
        pickle.dump((outcome, value), answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

    resident: Resident | None = None
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        except Exception:  # what was sent cannot be opened here
            reply("failure", traceback.format_exc())
            return
        try:
            if resident is None:
                _settle(*request)
                resident = Resident()
                reply("ready", None)
            else:
                reply("values", resident.predict(*request))
        except BrokenPipeError:
            return
        except ValueError as fault:
            reply("mistake", str(fault)) if is_ours(fault) else reply("failure", traceback.format_exc())
        except Exception:
            reply("failure", traceback.format_exc())


def _settle(device: str, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
