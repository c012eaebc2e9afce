"""The state of a half-trained fold: written while it trains, read when it goes on.

It holds all that the rest of the fold depends on: weights, optimizer, loss scaler, averages, best and last predictions,
random generators, place in the data, what is not logged yet. What is built anew from the config and the pretrained
checkpoint (the anchors of mixout and prior_decay, the batches of an epoch) is not in it; a digest of the weights that
training started from makes sure that it is the same. A fold that is killed at any moment and started again therefore
ends with the bits of one that was not.
"""

from __future__ import annotations

import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from comp.runs import FoldFolder, digest, write_atomic
from comp.runtime import random_state, set_random_state
from comp.training.checkpoint import BestWeights
from comp.training.ranks import ALONE, OneRank
from comp.training.trainer import Parts, TrainState

__all__ = ["SaveEvery", "Saver", "closing", "parse_save_every", "read_state", "start_digest"]

FIRST_SIZE = 3  # a state before any is written, in sizes of the model: weights and two moments
SPARE = 1.2  # free space that is wanted, in sizes of a state
MOST_TIME = 0.05  # share of the training time that `auto` spends on saving
ALLOWED = "auto, evaluation, never, or like '10 minutes' and '200 steps'"


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class SaveEvery:
    """When the state is saved. `auto`: at evaluations, as long as saving takes under a twentieth of the time."""

    unit: Literal["auto", "evaluation", "never", "minutes", "steps"] = "auto"
    number: float = 0.0


def parse_save_every(text: str) -> SaveEvery:
    """Read "auto", "evaluation", "never", "10 minutes" or "200 steps". Raises ValueError that says what is allowed."""
    words = text.split()
    if len(words) == 1 and words[0] in ("auto", "evaluation", "never"):
        return SaveEvery(words[0])  # type: ignore[arg-type]
    if len(words) == 2 and words[1].rstrip("s") in ("minute", "step"):
        try:
            number = float(words[0])
        except ValueError:
            number = 0.0
        if words[1].startswith("minute") and 0 < number < float("inf"):
            return SaveEvery("minutes", number)
        if words[1].startswith("step") and number >= 1 and number == int(number):
            return SaveEvery("steps", number)
    raise ValueError(f"--save-every '{text}': allowed are {ALLOWED}")


class Saver:
    """Saves and restores one fold.

    `parts`: name -> what has a state of its own. `start`: digest of the first weights; `weight_bytes`: their size.
    `mark` gives what the tracker needs to go on; `seconds`: what earlier sittings spent on the fold. `best` is written
    first: its weights are of the state, or newer.
    """

    def __init__(
        self,
        folder: FoldFolder,
        parts: Mapping[str, Stateful],
        *,
        start: str,
        weight_bytes: int = 0,
        mark: Callable[[], dict[str, Any]],
        best: BestWeights,
        every: SaveEvery,
        seconds: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
        ranks: OneRank = ALONE,
    ) -> None:
        self.folder, self.parts, self.start, self.mark, self.every = folder, parts, start, mark, every
        self.clock, self.began, self.before = clock, clock(), seconds
        self.saved_at, self.saving = self.began, 0.0
        self.best = best
        self.weight_bytes, self.warned, self.ranks = weight_bytes, False, ranks

    @property
    def seconds(self) -> float:
        """Seconds spent on the fold, earlier sittings included."""
        return self.before + self.clock() - self.began

    def due(self, step: int, evaluated: bool) -> bool:
        """Tell whether to save after optimizer step `step`, which was `evaluated` or not: the first rank's clock."""
        return bool(self.ranks.of_first(self._due(step, evaluated)))

    def _due(self, step: int, evaluated: bool) -> bool:
        unit, number = self.every.unit, self.every.number
        if unit == "steps":
            return step % int(number) == 0
        if unit == "minutes":
            return self.clock() - self.saved_at >= 60 * number
        if unit == "auto":
            return evaluated and self.saving <= MOST_TIME * (self.clock() - self.began)
        return evaluated and unit == "evaluation"

    def save(self, state: TrainState) -> bool:
        """Write the state and return True; the one before is kept beside it until the next time, if there is room.

        Without room for one more, a warning is given and none is written (False): training matters more.
        """
        started = self.clock()
        self.best.write()
        random = self.ranks.each(random_state())
        if not self.ranks.of_first(self._room() if self.ranks.first else None):
            return False
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        if self.ranks.first:
            self._write(state, {"random": random, **parts}, started)
        return True

    def _write(self, state: TrainState, parts: dict[str, Any], started: float) -> None:
        whole = {
            "start": self.start,
            "seconds": self.seconds,
            "train": asdict(state),
            "tracker": self.mark(),
            **parts,
        }

        def write(temporary: Any) -> None:
            torch.save(whole, temporary)
            if self.folder.state.exists():
                self.folder.state.replace(self.folder.state_before)

        write_atomic(self.folder.state, write)
        self.saved_at = self.clock()
        self.saving += self.saved_at - started

    def _room(self) -> bool:
        """Tell whether the disk has room for a state, after letting go of the one before if need be."""
        size = self.folder.state.stat().st_size if self.folder.state.exists() else FIRST_SIZE * self.weight_bytes
        self.folder.path.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self.folder.path).free < SPARE * size:
            self.folder.state_before.unlink(missing_ok=True)
        free = shutil.disk_usage(self.folder.path).free
        if free >= SPARE * size:
            return True
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"the disk of {self.folder.path} has {free / 2**30:.1f} GiB left, too little for a state of "
                f"{size / 2**30:.1f} GiB: a stop now loses what is not saved; free some, or use --save-every never",
                RuntimeWarning,
                stacklevel=3,
            )
        return False

    def restore(self, saved: dict[str, Any]) -> TrainState:
        """Put everything where it was. Raises ValueError when training did not start from the same weights."""
        if saved["start"] != self.start:
            raise ValueError(
                f"{self.folder.path} was begun from other weights than the backbone gives now: it, or a library, has "
                "changed since; start the fold anew with --restart"
            )
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        set_random_state(self.ranks.own(saved["random"]))
        return TrainState(**saved["train"])


def read_state(folder: FoldFolder, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the newest whole state of a fold, or None. A damaged one is said and the one before is taken."""
    for path in (folder.state, folder.state_before):
        if not path.exists():
            continue
        try:
            # torch does not check the sums that it writes
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is None:
                found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
                return found
            reason = f"{damaged} is damaged"
        except Exception as fault:  # of zipfile, of torch's reader, of the file system
            reason = f"{type(fault).__name__}: {fault}".splitlines()[0]
        say(f"{path} cannot be read ({reason}); trying the state before it")
    return None


def start_digest(model: nn.Module) -> str:
    """Return a digest of the weights and buffers that training starts from."""

    def parts() -> Iterator[str | bytes]:
        for name, tensor in model.state_dict().items():
            yield name
            yield tensor.detach().cpu().contiguous().numpy().tobytes()

    return digest(parts())


@contextmanager
def closing(parts: Parts, best: BestWeights) -> Iterator[None]:
    """End progress and tracker when a training ends; where it fails, the best weights are written first."""
    try:
        yield
    except Exception:
        best.write()
        raise
    finally:
        parts.progress.close()
        parts.tracker.finish()
