"""Weights as safetensors, written atomically, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from comp.runs import write_atomic

__all__ = ["BestWeights", "bytes_of", "load_weights", "save_weights", "step_of"]

PIECE = 2**21  # numbers read at a time


def save_weights(path: Path, weights: nn.Module | Mapping[str, torch.Tensor], *, step: int | None = None) -> None:
    """Write parameters and persistent buffers, and of which `step` they are; the old file stays until it is whole.

    `weights`: a model, or its state dict.
    """
    named = weights.state_dict() if isinstance(weights, nn.Module) else weights
    state = {name: tensor.detach().contiguous() for name, tensor in named.items()}
    # Tied weights are one tensor under two names, which safetensors refuses: keep the first, loading ties them again.
    seen: dict[int, str] = {}
    unique = {name: t for name, t in state.items() if seen.setdefault(t.data_ptr(), name) == name or not t.numel()}
    # One entry only: safetensors writes several in an order of its own, and files of equal weights would differ.
    about = {"format": "pt"} if step is None else {"step": str(step)}
    write_atomic(path, lambda temporary: save_file(unique, temporary, metadata=about))


class BestWeights:
    """The best weights so far: in memory until they must be on disk, in the file `path`.

    Weights that better ones replace before a state is saved need no file: with many evaluations most are of that kind,
    and writing a large model takes longer than the evaluation that found it. A killed run goes on from its state, so
    `write` comes before every state, at the end, and when training fails. The first are written at once: a disk that
    takes none is better known early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.step = 0
        self.waiting: dict[str, torch.Tensor] = {}
        """By name, on the CPU, until they are written; tied weights are one tensor."""

    def keep(self, weights: Mapping[str, torch.Tensor], step: int) -> None:
        """Copy `weights`, of `step`."""
        copies: dict[int, torch.Tensor] = {}
        waiting = {}
        for name, tensor in weights.items():
            if tensor.data_ptr() not in copies or not tensor.numel():
                copies[tensor.data_ptr()] = tensor.detach().to("cpu", copy=True)
            waiting[name] = copies[tensor.data_ptr()]
        self.waiting, self.step = waiting, step
        if not self.path.exists():
            self.write()

    def write(self) -> None:
        """Write what waits."""
        if self.waiting:
            save_weights(self.path, self.waiting, step=self.step)
            self.waiting = {}


def bytes_of(model: nn.Module) -> int:
    """Return how many bytes the weights of a model take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def step_of(path: Path) -> int | None:
    """Return the step that `save_weights` wrote into a file, or None where there is none."""
    with safe_open(path, "pt") as file:
        step = (file.metadata() or {}).get("step")
    return None if step is None else int(step)


def load_weights(path: Path, model: nn.Module, *, without: str | None = None) -> None:
    """Load every weight of `model` from `path`, in place. `without`: prefix of weights that the file may have more.

    Raises ValueError when the file is missing or broken, or when names or shapes differ: nothing is skipped.
    """
    if not path.exists():
        raise ValueError(f"weights {path} not found; was the fold trained to its end?")
    try:
        with safe_open(path, "pt") as file:
            sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as fault:  # safetensors raises its own class for a damaged file
        raise ValueError(f"weights {path} cannot be read ({fault}); train the fold again with --restart") from None
    own = model.state_dict()
    pointers = {tensor.data_ptr() for name, tensor in own.items() if name in sizes}
    missing = [name for name, tensor in own.items() if name not in sizes and tensor.data_ptr() not in pointers]
    sizes = {name: size for name, size in sizes.items() if without is None or not name.startswith(without)}
    unknown = [name for name in sizes if name not in own]
    shapes = [name for name in sizes if name in own and tuple(own[name].shape) != sizes[name]]
    if missing or unknown or shapes:
        faults = [
            f"{len(names)} {what} ({names[0]})"
            for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
            if names
        ]
        raise ValueError(f"weights {path} do not fit this model: {', '.join(faults)}; config and checkpoint disagree")
    with torch.no_grad():
        _copy(path, {name: own[name] for name in sizes})


def _copy(path: Path, own: Mapping[str, torch.Tensor]) -> None:
    """Copy weights piece by piece: read at once they would lie in memory a second time, beside those of the model.

    What was read stays mapped as long as the file is open, so it is opened again for every few megabytes.
    """
    pieces: list[tuple[str, slice | None]] = []
    for name, tensor in own.items():
        rows = len(tensor) if tensor.ndim else 0
        step = max(1, PIECE * rows // max(1, tensor.numel()))
        pieces += [(name, slice(start, min(rows, start + step))) for start in range(0, rows, step)] or [(name, None)]
    while pieces:
        left = PIECE
        with safe_open(path, "pt") as file:
            while pieces and left > 0:
                name, rows_of = pieces.pop(0)
                if rows_of is None:
                    own[name].copy_(file.get_tensor(name))
                    continue
                part = own[name][rows_of]
                part.copy_(file.get_slice(name)[rows_of])
                left -= part.numel()
