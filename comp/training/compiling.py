"""torch.compile over the backbone's training passes, and whether that paid.

Compiling takes seconds to minutes and is paid back by faster steps, or is not: a short fold on a CPU seldom gains.
Before the first step the longest batch passes plain and compiled, and once more at another length, since shapes are
dynamic; what that took and what it saves a pass are known then, and said when the fold is finished. Evaluation runs
plain: it would be compiled a second time. Weights keep their names; going on after a stop compiles anew.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from comp.model.text_model import TextModel
from comp.runtime import Runtime, random_state, set_random_state
from comp.training.trainer import Parts

__all__ = ["CompileReport", "check_compiler", "compile_backbone"]

COMPILERS = ("g++", "clang++", "c++")
PASSES = 3


@dataclass(frozen=True)
class CompileReport:
    """What compiling took and what it saves, in seconds."""

    compiling: float
    plain: float
    """Forward and backward of the longest batch."""
    compiled: float

    def told(self, passes: int) -> str:
        """Say whether it paid over so many forward passes, each taken for as long as the longest batch's."""
        saved = (self.plain - self.compiled) * passes
        verdict = "it paid" if saved > self.compiling else "it did not pay: training.compile false is faster here"
        return (
            f"torch.compile took {self.compiling:.1f} s; a pass of the longest batch takes {1000 * self.compiled:.0f} "
            f"ms rather than {1000 * self.plain:.0f}, at most {saved:.1f} s in {passes:,} passes: {verdict}"
        )


def check_compiler(runtime: Runtime) -> None:
    """Raise ValueError where torch.compile cannot work: no C++ compiler for a CPU, no Triton for a GPU."""
    if runtime.device.type == "cuda":
        if find_spec("triton") is None:
            raise ValueError("training.compile needs the package triton on a GPU, which is not there; set it to false")
        return
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else list(COMPILERS)
    if not any(shutil.which(name) for name in wanted):
        raise ValueError(
            f"training.compile needs a C++ compiler ({', '.join(wanted)}), and this machine has none; install one (apt "
            "install g++), or set it to false"
        )


def compile_backbone(
    model: TextModel, parts: Parts, rows: NDArray[np.int64], *, backend: str = "inductor"
) -> CompileReport:
    """Compile the training passes of the backbone; `rows` (M,) are those of the longest batch.

    Draws no random number, moves no weight.
    """
    random, was_training = random_state(), model.training
    model.train()
    shorter = rows[-max(2, len(rows) // 2) :]
    try:
        plain = min(_pass(parts, rows) for _ in range(PASSES))
        model.backbone.compile_training(backend)
        first = _pass(parts, rows) + _pass(parts, shorter)
        compiled = min(_pass(parts, rows) for _ in range(PASSES))
    finally:
        parts.optimizer.zero_grad(set_to_none=True)
        model.train(was_training)
        set_random_state(random)
    return CompileReport(max(0.0, first - 2 * compiled), plain, compiled)


def _pass(parts: Parts, rows: NDArray[np.int64]) -> float:
    started = time.perf_counter()
    batch = parts.collate(rows).to(parts.device)
    with parts.autocast():
        outputs = parts.outputs(batch)
    parts.loss(outputs, batch, parts.count(rows)).backward()
    parts.optimizer.zero_grad(set_to_none=True)
    if parts.device.type == "cuda":
        torch.cuda.synchronize(parts.device)
    return time.perf_counter() - started
