"""The machine under a run: device, precision, seeds. torch is imported inside, so that layer 0 stays light."""

from __future__ import annotations

import os
import platform
import random
import signal
import threading
import traceback
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from comp.doctor import cpu_has_bf16, kernel_fault

if TYPE_CHECKING:
    import torch

__all__ = [
    "Runtime",
    "Stopper",
    "check_devices",
    "choose_devices",
    "is_ours",
    "keep_freed_memory",
    "open_runtime",
    "random_state",
    "release_memory",
    "seed_everything",
    "set_random_state",
    "visible_devices",
]


PRECISIONS = ("auto", "bf16", "fp16", "fp32")
FALLBACKS = ("stop", "cpu")


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

    def halve_linear_(self, module: torch.nn.Module) -> None:
        """Keep the weights of linear layers in the type that `autocast` computes in. Not for a model to be trained.

        The same numbers in half the memory, and no weight is cast anew for every batch.
        """
        import torch

        if self.precision == "fp32":
            return
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        for own in module.modules():
            if type(own) is torch.nn.Linear:
                own.to(dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Return the loss scaler: working for fp16, a pass-through for the others."""
        import torch

        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    @property
    def kind(self) -> str:
        """The kind of device and the precision: what a prediction depends on."""
        import torch

        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{name}, {self.precision}"

    def describe(self, threads: int | None = None) -> str:
        """Return words for it; `threads`: of another process than this one, with the same device."""
        import torch

        if self.device.type == "cpu":
            return f"CPU ({threads or torch.get_num_threads()} threads), {self.precision}"
        return self.kind


def choose_devices(workers: int | None = None, names: str | None = None) -> list[str] | None:
    """Read --workers and --devices; return the devices, one per worker process, or None where neither is given.

    `names`: "cuda:0,cuda:1,cpu". `workers`: so many of the visible GPUs, over and over if there are fewer; without a
    GPU so many processes on the CPU. Raises ValueError when both are given.
    """
    if names is not None:
        if workers is not None:
            raise ValueError("--devices names one device a worker; leave out --workers")
        return [name.strip() for name in names.split(",")]
    if workers is None:
        return None
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    there = visible_devices()
    return [there[number % len(there)] for number in range(workers)]


def check_devices(devices: Sequence[str]) -> None:
    """Raise ValueError unless every device is one of this machine's."""
    allowed = list(dict.fromkeys([*visible_devices(), "cpu"]))
    absent = [device for device in devices if device not in allowed]
    if absent or not devices:
        raise ValueError(f"device '{absent[0] if absent else ''}' is not there; this machine has {', '.join(allowed)}")


def visible_devices() -> list[str]:
    """Return every GPU as "cuda:0", ..., or "mps", or "cpu"."""
    import torch

    if torch.cuda.is_available():
        return [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["mps" if torch.backends.mps.is_available() else "cpu"]


def open_runtime(precision: str = "auto", device: str | None = None, *, fallback: str = "stop") -> Runtime:
    """Choose the device (CUDA, MPS, CPU) and resolve `precision` auto | bf16 | fp16 | fp32 for it.

    `fallback`: what becomes of a GPU that this torch build has no kernels for (a P100 on Kaggle): stop raises
    ValueError, cpu takes the CPU with a warning, and fp16 is then auto. Raises ValueError for a precision the device
    cannot do.
    """
    import torch

    if fallback not in FALLBACKS:
        raise ValueError(f"fallback '{fallback}': allowed are {' and '.join(FALLBACKS)}")

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if precision not in PRECISIONS:
        raise ValueError(f"precision '{precision}': allowed are {', '.join(PRECISIONS)}")
    place = torch.device(device)
    if place.type == "cuda":
        fault = kernel_fault(torch.cuda.get_arch_list(), torch.cuda.get_device_capability(place))
        if fault and fallback == "cpu":
            warnings.warn(f"{torch.cuda.get_device_name(place)}: {fault}. The CPU is used instead", stacklevel=2)
            return open_runtime("auto" if precision == "fp16" else precision, "cpu")
        if fault:
            raise ValueError(f"{torch.cuda.get_device_name(place)}: {fault}")
        native_bf16 = torch.cuda.get_device_capability(place)[0] >= 8
        chosen = precision if precision != "auto" else "bf16" if native_bf16 else "fp16"
    elif place.type == "cpu":
        keep_freed_memory()
        chosen = precision if precision != "auto" else "bf16" if cpu_has_bf16() else "fp32"
        if chosen == "fp16":
            raise ValueError("precision fp16 needs a GPU, got the CPU; use precision bf16, fp32 or auto")
    else:
        chosen = "fp32" if precision == "auto" else precision
    return Runtime(place, chosen)


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc
MOST_MMAP = 32 * 2**20  # the most that glibc takes
ALLOCATION_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


@cache  # once: glibc's mallopt is not made for a process whose threads are at work
def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors on the CPU free, for the tensors to come; tell whether it does.

    glibc gives blocks of some MB back to the kernel at every free, and the kernel hands each page out anew, zeroed, at
    its next first touch, which the activations of a batch pay over and over. Nothing changes without glibc, or where
    the environment says how to allocate (MALLOC_*, GLIBC_TUNABLES, LD_PRELOAD).
    """
    import ctypes

    if platform.libc_ver()[0] != "glibc" or any(name.startswith(ALLOCATION_SETTINGS) for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {M_MMAP_THRESHOLD: MOST_MMAP, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}
    return all(mallopt(key, value) == 1 for key, value in wanted.items())


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device)."""
    import torch

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (libraries under us still draw from the global generator)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of every generator a run draws from, as what torch.load reads with weights_only."""
    import torch

    name, keys, place, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    assert isinstance(keys, np.ndarray)
    found = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(place), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    return {**found, "cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else found


def set_random_state(state: dict[str, Any]) -> None:
    """Set every generator to what `random_state` returned; of GPUs only as many as there are."""
    import torch

    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for device, own in enumerate(state.get("cuda", [])[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(own, device)


class Stopper:
    """Turns the first SIGTERM or Ctrl-C inside the block into `signal`, which the loop heeds after its step.

    A second Ctrl-C acts at once. Outside the main thread, where signals cannot be taken, nothing changes.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number


def is_ours(fault: BaseException) -> bool:
    """Tell whether `comp` itself raised it: a ValueError out of a library is a bug of ours, and keeps its traceback."""
    frames = traceback.extract_tb(fault.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def release_memory() -> None:
    """Give the memory of dropped models back between folds."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
