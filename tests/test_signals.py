"""SIGTERM in every phase of a fold: the run stops, saved, and goes on to the bits of one that was not stopped."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from test_resume import leavings

from comp import config_file
from comp.lock import lock_of
from comp.runs import FoldFolder
from comp.training import crossval, held_out, one_fold
from comp.training.checkpoint import BestWeights
from comp.training.objective import Objective
from comp.training.trainer import Stopped

SETTINGS = ["model.dropout=0.1", "training.epochs=2", "training.micro_batch_size=5", "evaluation.every=3 steps"]


def run(name: str) -> None:
    crossval.run(config_file.load("tiny.yaml", SETTINGS), name, "0", save_every="2 steps", say=lambda line: None)


PHASES: dict[str, tuple[Any, str, int]] = {
    "in an accumulation window": (Objective, "share", 8),
    "in an evaluation": (held_out.HeldOut, "evaluate", 2),
    "while the best weights are written": (BestWeights, "write", 2),
    "while a state is written": (torch, "save", 2),
    "while the last weights are written": (one_fold, "save_weights", 1),
    "while the out-of-fold rows are written": (held_out.HeldOut, "write", 1),
    "when the fold is done": (FoldFolder, "drop_state", 1),
}


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_each_phase(phase: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, call = PHASES[phase]
    real, calls = getattr(owner, name), []

    def signalled(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(Stopped, match=r"stopped after (step \d+, and saved|fold 0)") as stopped:
            run("cut")
    assert stopped.value.signal == signal.SIGTERM
    run("cut")
    run("whole")
    assert leavings("cut") == leavings("whole")


def test_sigterm_outside_the_training_of_a_fold(here: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    real = crossval.encode

    def signalled(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(crossval, "encode", signalled)
        status, _, said = call("train", "--config", "tiny.yaml", "--run", "cut", "--fold", "0")
    assert status == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in said and "the same command goes on" in said
    assert not lock_of(Path("runs/cut")).exists()
    assert call("train", "--config", "tiny.yaml", "--run", "cut", "--fold", "0")[0] == 0
