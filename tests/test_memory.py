"""Memory that runs out: the step is done again with smaller micro-batches, to the bits of a run that began with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from comp import config_file
from comp.data.batches import longest_window
from comp.model.text_model import TextModel
from comp.runs import RunFolder
from comp.training import crossval, one_fold, predict
from comp.training.memory import Exhausted, cut, running_out
from comp.training.resume import Saver, read_state

DROPOUT = ["model.dropout=0.2", "training.epochs=2", "evaluation.every=2 steps"]


def run(name: str, *more: str, fold: str = "0", **options: Any) -> None:
    config = config_file.load("tiny.yaml", [*DROPOUT, *more])
    crossval.run(config, name, fold, say=lambda line: None, **options)


def small_memory(
    monkeypatch: pytest.MonkeyPatch, most: int, *, training: bool = True, fault: Exception | None = None, after: int = 0
) -> list[int]:
    """Let the model run out of memory with more rows than `most`; return the rows of each pass."""
    real, passes = TextModel.forward, []
    fault = fault or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    def forward(self: TextModel, batch: Any) -> Any:
        if self.training == training:
            passes.append(len(batch.rows))
            torch.rand(3)  # what was drawn before memory ran out is drawn again
            if len(batch.rows) > most and len(passes) > after:
                raise fault
        return real(self, batch)

    monkeypatch.setattr(TextModel, "forward", forward)
    return passes


def weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(f"runs/{name}/fold0/last.safetensors")


def same(one: str, two: str) -> bool:
    first, second = weights(one), weights(two)
    rows = [pd.read_parquet(f"runs/{name}/fold0/oof.parquet") for name in (one, two)]
    return all(torch.equal(first[name], second[name]) for name in first) and rows[0].equals(rows[1])


FAULTS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    "numpy": MemoryError("Unable to allocate 9.00 GiB for an array"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_the_micro_batch_is_halved_until_it_fits(kind: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = small_memory(monkeypatch, 2, fault=FAULTS[kind])
    run("small", "training.micro_batch_size=2")
    assert set(passes) == {2} or set(passes) == {1, 2}
    passes.clear()
    with pytest.warns(RuntimeWarning) as said:
        run("halved")
    lines = [str(one.message) for one in said]
    assert [line for line in lines if "at step 1 with 8 rows at a time" in line and "from here on 4 at a time" in line]
    assert [line for line in lines if "with 4 rows at a time" in line and "training.micro_batch_size 2" in line]
    assert passes[:3] == [8, 4, 2] and max(passes[2:]) == 2, "once cut, it stays cut"
    assert same("small", "halved")


@pytest.mark.parametrize("attack", ["{name: fgm}", "{name: awp, start_epoch: 0}"])
def test_an_attack_that_runs_out_leaves_the_weights_as_they_were(
    attack: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass of the first step fits; the second, at moved weights, does not."""
    run("small", f"stability.adversarial={attack}", "training.micro_batch_size=4")
    real, calls = TextModel.forward, []

    def forward(self: TextModel, batch: Any) -> Any:
        calls.append(len(batch.rows))
        if self.training and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(TextModel, "forward", forward)
    with pytest.warns(RuntimeWarning, match="from here on 4 at a time"):
        run("halved", f"stability.adversarial={attack}")
    assert calls[:4] == [8, 8, 4, 4]
    assert same("small", "halved")


def test_a_run_that_goes_on_knows_its_micro_batch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in the third step only; what is killed after it goes on with the smaller micro-batch."""

    def trouble(patch: pytest.MonkeyPatch) -> None:
        small_memory(patch, 4, after=2)

    warned = "at step 3 with 8 rows"
    with monkeypatch.context() as patch:
        trouble(patch)
        with pytest.warns(RuntimeWarning, match=warned):
            run("whole")

    def stop(self: Saver, step: int, evaluated: bool) -> bool:
        if step == 6:
            raise KeyboardInterrupt
        return step == 5

    with monkeypatch.context() as patch:
        trouble(patch)
        patch.setattr(Saver, "due", stop)
        with pytest.warns(RuntimeWarning, match=warned), pytest.raises(KeyboardInterrupt):
            run("cut")
    state = read_state(RunFolder("runs/cut").fold(0), print)
    assert state is not None and state["train"]["micro_rows"] == 4
    with monkeypatch.context() as patch:
        passes = small_memory(patch, 4)
        run("cut")
        assert max(passes) == 4
    assert same("whole", "cut")


def test_what_cannot_be_parted_stops_with_the_reason(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_memory(monkeypatch, 4)
    with pytest.raises(
        ValueError, match=r"stability.supcon compares the rows of a whole batch, .* lower training.batch"
    ):
        run("contrast", "stability.supcon.weight=0.5")


@pytest.mark.filterwarnings("default:memory ran out")
def test_one_row_that_does_not_fit_stops_with_advice(
    here: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    small_memory(monkeypatch, 0)
    status, _, err = call("train", "--config", "tiny.yaml", "--run", "new", "--fold", "0")
    assert status == 2
    assert "warning: memory ran out at step 1 with 2 rows at a time" in err
    assert "with 1 rows at a time" in err and "model.gradient_checkpointing true" in err and "Traceback" not in err


def test_memory_that_runs_out_elsewhere_is_one_message(
    here: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    """As in the optimizer, whose moments no smaller batch makes smaller."""

    def step(*_: Any, **__: Any) -> None:
        raise FAULTS["cuda"]

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    status, _, err = call("train", "--config", "tiny.yaml", "--run", "new", "--fold", "0")
    assert status == 1 and "Traceback" not in err
    assert "comp: memory ran out (CUDA out of memory. Tried to allocate 20.00 MiB); what is saved is whole. Try" in err


def test_other_faults_are_not_taken_for_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_memory(monkeypatch, 4, fault=RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        run("broken")
    with pytest.raises(Exhausted, match="^CUDA out of memory$"), running_out():
        raise FAULTS["cuda"]


def test_the_longest_window_is_tried_after_the_first_step(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: it changes no bit, and what does not fit is known at step 1."""
    run("plain")
    tried: list[Any] = []

    class Eager(one_fold.Parts):  # type: ignore[misc]
        def __init__(self, **parts: Any) -> None:
            window = [np.arange(8), np.arange(8, 16)]
            tried.append(window)
            super().__init__(**{**parts, "largest": window})

    with monkeypatch.context() as patch:
        patch.setattr(one_fold, "Parts", Eager)
        run("tried")
        passes = small_memory(patch, 4)
        with pytest.warns(RuntimeWarning, match="memory ran out at step 1 "):
            run("small")
        assert tried and passes[0] == 8
    assert same("plain", "tried")
    lengths = np.array([3, 9, 4, 9, 1, 7])
    window = longest_window(np.array([0, 1, 2, 4, 5]), lengths, batch_size=3, micro_batch_size=2)
    assert [part.tolist() for part in window] == [[1, 5], [2]]
    assert [part.tolist() for part in cut(window, 1)] == [[1], [5], [2]]


def test_prediction_goes_on_with_half_the_batch(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comp.ship.infer import infer

    frame = pd.read_csv(infer(["runs/tiny"], out="before.csv", say=lambda line: None))
    for file in Path("runs/.cache/predictions").iterdir():
        file.unlink()
    passes = small_memory(monkeypatch, 3, training=False)
    monkeypatch.setattr(predict, "sorted_batches", lambda lengths, **options: [np.argsort(-lengths, kind="stable")])
    with pytest.warns(RuntimeWarning) as said:
        again = pd.read_csv(infer(["runs/tiny"], out="after.csv", say=lambda line: None))
    lines = [str(one.message) for one in said]
    assert "memory ran out in predicting 20 rows at once (CUDA out of memory); going on with 10" in lines
    assert passes[:4] == [20, 10, 5, 2] and max(passes[3:11]) == 2
    assert list(frame["id"]) == list(again["id"]) and np.allclose(frame["target"], again["target"], atol=1e-6)
    small_memory(monkeypatch, 0, training=False)
    for file in Path("runs/.cache/predictions").iterdir():
        file.unlink()
    one_row = pytest.raises(ValueError, match=r"memory ran out in predicting one row .*--precision bf16")
    with pytest.warns(RuntimeWarning), one_row:
        infer(["runs/tiny"], say=lambda line: None)


# --- steps that are not finite ---------------------------------------------------------------------------------------


def test_the_batch_of_a_step_that_is_not_finite_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
) -> None:
    """Losses are read every ten steps; the rows are those of the step itself."""
    real, seen = TextModel.forward, []

    def forward(self: TextModel, batch: Any) -> Any:
        outputs = real(self, batch)
        if self.training:
            seen.append(batch.rows)
            if len(seen) == 3:
                return {name: output * float("nan") for name, output in outputs.items()}
        return outputs

    monkeypatch.setattr(TextModel, "forward", forward)
    status, _, err = call(
        "train", "--config", "tiny.yaml", "--run", "new", "--fold", "0", "--set", "training.epochs=2",
        "--set", "evaluation.every=null",
    )  # fmt: skip
    assert status == 1 and "training stopped at step 3: loss nan" in err
    found = json.loads(Path("runs/new/fold0/bad_batch.json").read_text())
    ids = pd.read_csv("data/train.csv")["id"]
    assert found["ids"] == [ids[row] for row in seen[2]]
    assert (found["step"], found["loss"], found["grad_norm"]) == (3, "nan", "nan")
    assert f"its rows are {found['ids'][0]}, {found['ids'][1]}" in err and "bad_batch.json" in err
    monkeypatch.setattr(TextModel, "forward", real)
    run("new", "model.dropout=0.0", "evaluation.every=null", restart=True)
    assert not Path("runs/new/fold0/bad_batch.json").exists()
