"""Weights as safetensors, written atomically, read strictly."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from comp.runs import write_atomic

__all__ = ["bytes_of", "load_weights", "save_weights", "step_of"]


def save_weights(path: Path, model: nn.Module, *, step: int | None = None) -> None:
    """Write parameters and persistent buffers, and of which `step` they are; the old file stays until it is whole."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    # Tied weights are one tensor under two names, which safetensors refuses: keep the first, loading ties them again.
    seen: dict[int, str] = {}
    unique = {name: t for name, t in state.items() if seen.setdefault(t.data_ptr(), name) == name or not t.numel()}
    # One entry only: safetensors writes several in an order of its own, and files of equal weights would differ.
    about = {"format": "pt"} if step is None else {"step": str(step)}
    write_atomic(path, lambda temporary: save_file(unique, temporary, metadata=about))


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
        state = load_file(path)
    except Exception as fault:  # safetensors raises its own class for a damaged file
        raise ValueError(f"weights {path} cannot be read ({fault}); train the fold again with --restart") from None
    own = model.state_dict()
    pointers = {tensor.data_ptr() for name, tensor in own.items() if name in state}
    missing = [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in pointers]
    state = {name: tensor for name, tensor in state.items() if without is None or not name.startswith(without)}
    unknown = [name for name in state if name not in own]
    shapes = [name for name in state if name in own and own[name].shape != state[name].shape]
    if missing or unknown or shapes:
        faults = [
            f"{len(names)} {what} ({names[0]})"
            for names, what in ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape"))
            if names
        ]
        raise ValueError(f"weights {path} do not fit this model: {', '.join(faults)}; config and checkpoint disagree")
    with torch.no_grad():
        for name, tensor in state.items():
            own[name].copy_(tensor)
