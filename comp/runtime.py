"""The machine under a run: device, precision, seeds. torch is imported inside, so that layer 0 stays light."""

from __future__ import annotations

import os
import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from comp.doctor import cpu_has_bf16, kernel_fault

if TYPE_CHECKING:
    import torch

__all__ = ["Runtime", "open_runtime", "release_memory", "seed_everything"]


@dataclass(frozen=True)
class Runtime:
    """Where tensors live and in which type the forward pass runs. Weights are always float32."""

    device: torch.device
    precision: str
    """bf16 | fp16 | fp32"""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context a forward pass runs in."""
        import torch

        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler: working for fp16, a pass-through for the others."""
        import torch

        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def describe(self) -> str:
        import torch

        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {self.precision}"
        if self.device.type == "cpu":
            return f"CPU ({torch.get_num_threads()} threads), {self.precision}"
        return f"{self.device.type}, {self.precision}"


def open_runtime(precision: str = "auto", device: str | None = None) -> Runtime:
    """Choose the device (CUDA, MPS, CPU) and resolve `precision` auto | bf16 | fp16 | fp32 for it.

    Raises ValueError for a GPU that this torch build has no kernels for, or a precision the device cannot do.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    place = torch.device(device)
    if place.type == "cuda":
        fault = kernel_fault(torch.cuda.get_arch_list(), torch.cuda.get_device_capability(place))
        if fault:
            raise ValueError(f"{torch.cuda.get_device_name(place)}: {fault}")
        native_bf16 = torch.cuda.get_device_capability(place)[0] >= 8
        chosen = precision if precision != "auto" else "bf16" if native_bf16 else "fp16"
    elif place.type == "cpu":
        chosen = precision if precision != "auto" else "bf16" if cpu_has_bf16() else "fp32"
        if chosen == "fp16":
            raise ValueError("precision fp16 needs a GPU, got the CPU; use precision bf16, fp32 or auto")
    else:
        chosen = "fp32" if precision == "auto" else precision
    return Runtime(place, chosen)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries under us still draw from the global generator)
    torch.manual_seed(seed)


def release_memory() -> None:
    """Give the memory of dropped models back between folds."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
