"""Who predicts: this process, or one worker process for each device. Each has one model in memory at a time.

The rows of a model are shared out, not the models: with five folds on two GPUs the last fold would leave one of them
idle, and a model is the unit that is timed, kept and dropped. Rows travel as tokens, in shares of whole batches,
longest first; a worker takes the next share when it is done with one, so that a slow device gets fewer. Batches are
those of one process, so the numbers are too. The price: every worker reads every model's weights.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.runtime import release_memory
from comp.worker import Handle, Tell, Worker, WorkerFault, thread_variables

__all__ = ["Alone", "Crew", "Predictor", "WorkerFault", "open_crew"]

Fold: TypeAlias = int | str
Floats: TypeAlias = NDArray[np.float64]
SHARES_EACH = 8  # shares of a model's rows per worker: at most about a sixteenth of a model's time is waited at its end
ADVICE = "what is finished is kept: the same command goes on, with --workers 1 in one process"


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
                environment = thread_variables(threads)
                self.workers.append(
                    Worker(f"the worker on {device}", _settle, device, environment=environment, advice=ADVICE)
                )
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


def _settle(tell: Tell, device: str) -> Handle:
    """Take the device, in a worker; return what answers its requests."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    return Resident().predict
