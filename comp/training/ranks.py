"""Several processes on one fold: every window's rows are shared out, and the gradients summed.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m -- comp train --config large

(`--` keeps torch.distributed.run from taking comp's `--run` for an option of its own.)

Each rank has the whole model, unless that is too large (shards.py). A loss is already divided by the items of its whole
window, so the sum of the ranks' gradients is that of one process, whatever the rows of each: a rank without rows in a
ragged window adds nothing. Rank 0 reads, decides and writes; the others are handed its plan, and hold no file open.
Held-out rows are parted too, and every prediction is gathered once. Dropout differs between ranks, so only without it
are the numbers those of one process, but for their last digits.

By torch.distributed alone: `DistributedDataParallel` takes the mean over ranks, which is not the window's mean where
they have unlike numbers of rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from comp.optim.groups import ParameterGroup
from comp.runtime import Runtime
from comp.training.checkpoint import load_weights

__all__ = ["ALONE", "OneRank", "Ranks", "asked_for", "join"]

Rows: TypeAlias = NDArray[np.int64]
Gather: TypeAlias = Callable[[torch.Tensor, int], tuple[torch.Tensor, int]]
PATIENCE = timedelta(hours=12)  # the others wait for rank 0 while it reads and tokenizes
LET_GO = 0.2  # seconds for gloo's threads, in the end
BUCKET = 2**24  # numbers that are summed at a time


def asked_for() -> bool:
    """Tell whether torch.distributed.run started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


class OneRank:
    """This process alone: everything is its own."""

    size, rank = 1, 0
    sharded = False
    """True where each rank has a part of the weights, so that all must make the same passes."""

    @property
    def first(self) -> bool:
        """True for the one that writes."""
        return self.rank == 0

    def share(self, window: Sequence[Rows]) -> Sequence[Rows]:
        """Return the micro-batches of a window that are this rank's; there may be none."""
        return window

    def idle(self, window: Sequence[Rows]) -> Sequence[Rows]:
        """Return micro-batches to be passed without effect after those of `share`, while other ranks still need us."""
        return []

    @contextmanager
    def summing(self, model: nn.Module) -> Iterator[Gather]:
        """Give what sums the gradients made in the block, a loss (0-d) and a number of tokens over the ranks."""
        yield lambda loss, tokens: (loss, tokens)

    def own_parts(self, groups: list[ParameterGroup]) -> list[ParameterGroup]:
        """Return the groups with what this rank's optimizer moves."""
        return groups

    def grad_scaler(self, runtime: Runtime) -> torch.amp.GradScaler:
        """Return the loss scaler."""
        return runtime.grad_scaler()

    def clip(self, trainable: Sequence[nn.Parameter], limit: float) -> torch.Tensor:
        """Clip the gradients of the optimizer's parameters by their norm over all ranks; return that, 0-d."""
        return nn.utils.clip_grad_norm_(trainable, limit)

    def part(self, rows: Rows) -> Rows:
        """Return the rows that this rank predicts."""
        return rows

    @contextmanager
    def in_step(self, passes: int) -> Iterator[None]:
        """Predict in the block, in so many passes of this rank; all ranks come here, each with its own number."""
        yield

    def together(self, own: dict[str, NDArray[np.float64]] | None, num_rows: int) -> dict[str, NDArray[np.float64]]:
        """Put the predictions of `part` together: name -> (N, K), in the order of all rows."""
        assert own is not None
        return own

    def most(self, number: int | None) -> int | None:
        """Return the largest of the ranks' numbers, None where all are None."""
        return number

    def of_first(self, value: Any) -> Any:
        """Return what the first rank has."""
        return value

    def each(self, value: Any) -> Any:
        """Return the values of all ranks, to be saved by the first."""
        return value

    def own(self, values: Any) -> Any:
        """Return this rank's of what `each` returned, whatever the number of ranks then."""
        return values[0] if isinstance(values, list) else values

    def check_same(self, mark: str) -> None:
        """Raise ValueError unless all ranks have the same mark of the weights that they start from."""

    def reseed(self, seed: int) -> None:
        """Draw other random numbers than the other ranks from here on."""

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Return the whole weights by name, to be saved by the first; all ranks come here."""
        return model.state_dict()

    def read_weights(self, path: Path, model: nn.Module) -> None:
        """Load weights, of which the first rank alone has the file, into the model of every rank."""
        load_weights(path, model)

    def stateful(self, thing: Any) -> Any:
        """Return what saves and restores a model or an optimizer whole; all ranks come to its two methods."""
        return thing

    def hand_out(self, saved: dict[str, Any] | None) -> dict[str, Any] | None:
        """Give every rank the saved state that the first has read, None where there is none."""
        return saved


ALONE = OneRank()


class Ranks(OneRank):
    """One of several processes."""

    def __init__(self) -> None:
        self.size, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()

    def share(self, window: Sequence[Rows]) -> Sequence[Rows]:
        return self._share(window, self.rank)

    def _share(self, window: Sequence[Rows], rank: int) -> Sequence[Rows]:
        # Every size-th row: rows lie sorted by length, so each rank has long and short ones.
        rows, micro = np.concatenate(window)[rank :: self.size], max(map(len, window))
        return [rows[start : start + micro] for start in range(0, len(rows), micro)]

    @contextmanager
    def summing(self, model: nn.Module) -> Iterator[Gather]:
        trained = self._summed_here(model)
        before = [parameter.grad for parameter in trained]  # of an earlier pass, summed already
        for parameter in trained:
            parameter.grad = None

        def gather(loss: torch.Tensor, tokens: int) -> tuple[torch.Tensor, int]:
            self._sum(trained)
            both = torch.stack([loss.double(), torch.tensor(float(tokens), dtype=torch.float64, device=loss.device)])
            torch.distributed.all_reduce(both)
            return both[0].to(loss.dtype), int(both[1])

        yield gather
        for parameter, kept in zip(trained, before, strict=True):
            if kept is not None:
                parameter.grad = kept if parameter.grad is None else parameter.grad.add_(kept)

    def _summed_here(self, model: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

    def _sum(self, trained: Sequence[nn.Parameter]) -> None:
        """Sum the gradients; one that no rank has stays None, as in one process, where the optimizer passes it over."""
        device = trained[0].device
        there = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(there, torch.distributed.ReduceOp.MAX)
        bucket: list[nn.Parameter] = []
        for parameter, anywhere in zip(trained, there.tolist(), strict=True):
            if anywhere:
                bucket.append(parameter)
            if sum(one.numel() for one in bucket) >= BUCKET:
                _sum_bucket(bucket)
                bucket = []
        if bucket:
            _sum_bucket(bucket)

    def part(self, rows: Rows) -> Rows:
        return rows[self.rank :: self.size]

    def together(self, own: dict[str, NDArray[np.float64]] | None, num_rows: int) -> dict[str, NDArray[np.float64]]:
        parts = self.each(own)
        names = next(part for part in parts if part is not None)
        found = {name: np.empty((num_rows, values.shape[1])) for name, values in names.items()}
        for rank, part in enumerate(parts):
            for name, values in (part or {}).items():
                found[name][rank :: self.size] = values
        return found

    def most(self, number: int | None) -> int | None:
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        most = torch.tensor(-1 if number is None else number, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return None if int(most) < 0 else int(most)

    def of_first(self, value: Any) -> Any:
        box = [value if self.first else None]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def each(self, value: Any) -> Any:
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def own(self, values: Any) -> Any:
        return values[self.rank % len(values)] if isinstance(values, list) else values

    def check_same(self, mark: str) -> None:
        if len(set(self.each(mark))) > 1:
            raise ValueError(
                "the processes of torch.distributed.run start from unlike weights: model.backbone, or a library, is "
                "not the same on all machines"
            )

    def reseed(self, seed: int) -> None:
        if not self.first:
            torch.manual_seed(seed + 1_000_003 * self.rank)

    def read_weights(self, path: Path, model: nn.Module) -> None:
        if self.first:
            load_weights(path, model)
        for tensor in model.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)

    def hand_out(self, saved: dict[str, Any] | None) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.of_first(saved)
        return found


def _sum_bucket(parameters: Sequence[nn.Parameter]) -> None:
    grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    torch.distributed.all_reduce(flat)
    start = 0
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = flat[start : start + grad.numel()].view_as(grad).clone()
        start += grad.numel()


@contextmanager
def join() -> Iterator[Ranks]:
    """Join the other processes that torch.distributed.run started, on one GPU each where there are any."""
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield Ranks()
    finally:
        # A thread of gloo that still holds the tensors of the last call would abort the interpreter at its end.
        time.sleep(LET_GO)
        torch.distributed.destroy_process_group()
