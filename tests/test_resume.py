"""A fold that is stopped anywhere and started again ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import conftest
import pandas as pd
import pytest
import torch
import yaml
from conftest import KILL_TEST, TinyCompetition

from comp import config_file
from comp.runs import FoldFolder, RunFolder
from comp.runtime import Stopper, random_state, seed_everything, set_random_state
from comp.training import checkpoint, crossval, held_out, one_fold, resume
from comp.training.checkpoint import BestWeights, step_of
from comp.training.objective import Objective
from comp.training.resume import SaveEvery, Saver, parse_save_every, read_state
from comp.training.trainer import NonFiniteError, Stopped, TrainState

SAID: list[str] = []


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture
def config_of(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Callable[..., Any]:
    """Write a config of 12 steps in 3 epochs, two of five micro-batches a window, evaluated every 3 steps."""
    competition = tiny_competition()

    def make(kind: str = "bert", **own: Any) -> Any:
        data = competition.config(tiny_model_folder(kind), evaluation={"every": "3 steps"})
        data["model"] = data.get("model", {}) | {"dropout": 0.1, "pooler": {"name": "mean"}} | own.pop("model", {})
        data["optimizer"] = {"name": "adamw", "lr": 1e-3} | own.pop("optimizer", {})
        data["training"] = {"epochs": 3, "batch_size": 8, "micro_batch_size": 5, "precision": "fp32"} | own.pop(
            "training", {}
        )
        (isolated / "tiny.yaml").write_text(yaml.safe_dump({**data, **own}))
        return config_file.load("tiny.yaml")

    return make


def run(config: Any, name: str, save_every: str = "4 steps", folds: str = "0") -> None:
    SAID.clear()
    crossval.run(config, name, folds, save_every=save_every, say=SAID.append)


def leavings(name: str, fold: int = 0) -> dict[str, Any]:
    """Return everything a finished fold leaves, but for times."""
    found = conftest.leavings(name, [fold])
    assert not found[f"fold {fold} left over"], "a finished fold drops its state"
    return found


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, *, after: bool = False) -> None:
    """Raise Killed at the `call`-th call of owner.name, before or after it has done its work; then be as before."""
    real, calls = getattr(owner, name), []

    def killing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) != call:
            return real(*args, **options)
        if after:
            real(*args, **options)
        monkeypatch.setattr(owner, name, real)
        raise Killed

    monkeypatch.setattr(owner, name, killing)


RECIPES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "bertadam": {"optimizer": {"name": "bertadam"}},
    "radam_lookahead": {"optimizer": {"name": "radam_lookahead", "steps": 5}},
    "lookahead": {"optimizer": {"lookahead": {"steps": 3}}},
    "madgrad": {"optimizer": {"name": "madgrad"}},
    "adafactor": {"optimizer": {"name": "adafactor"}},
    "class": {"optimizer": {"name": "class", "path": "torch.optim.NAdam"}},
    "llrd and cycles": {
        "groups": {"layout": "llrd", "decay": 0.8},
        "schedule": {"name": "cosine_with_restarts", "num_cycles": 2, "warmup_percent": 10},
    },
    "mixout": {"model": {"dropout": 0.0}, "stability": {"mixout": 0.4, "reinit_layers": 1}},
    "prior_decay": {"stability": {"prior_decay": 20.0}},
    "swa": {"stability": {"averaging": {"name": "swa", "start_percent": 20}}},
    "ema": {"stability": {"averaging": {"name": "ema", "decay": 0.7}}},
    "soup": {"stability": {"averaging": {"name": "soup", "size": 3}}},
    "fgm": {"stability": {"adversarial": {"name": "fgm"}}},
    "awp": {"stability": {"adversarial": {"name": "awp", "start_epoch": 0.5, "start_score": 0.6}}},
    "rdrop and masks": {
        "stability": {"rdrop": 1.0},
        "model": {"multi_sample_dropout": 3, "head_dropout": 0.2, "pooler": {"name": "hsum", "num_layers": 2}},
    },
    "cache_frozen": {"model": {"dropout": 0.0, "freeze_embeddings": True, "freeze_layers": 2, "cache_frozen": True}},
    "supcon": {"stability": {"supcon": {"weight": 0.3}}, "training": {"micro_batch_size": None}},
    "word_weights": {"model": {"pooler": {"name": "word_weights"}}},
    "patience": {"evaluation": {"every": "1 steps", "patience": 3}, "optimizer": {"lr": 3e-2}, "kills": [3, 2]},
    "batches by tokens": {"training": {"batch_size": 16, "batch_tokens": 160, "micro_batch_size": None}},
    "by score": {"evaluation": {"every": None, "schedule": [[0.2, 5], [-1, 2]]}},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_killed_run_ends_with_the_same_bits(
    recipe: str, config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed twice, at steps that are neither saved nor evaluated; the state is from one to three steps before."""
    own = json.loads(json.dumps(RECIPES[recipe]))
    kills = own.pop("kills", [7, 4])
    config, save_every = config_of(**own), "2 steps" if kills[0] < 4 else "4 steps"
    run(config, "whole")
    for call in kills:
        kill_at(monkeypatch, Saver, "due", call)
        with pytest.raises(Killed):
            run(config, "cut", save_every)
    run(config, "cut", save_every)
    assert any("goes on after step" in line for line in SAID)
    assert leavings("cut") == leavings("whole")


@pytest.mark.parametrize("kind", ["deberta-v2", "xlnet", "bart", "albert"])
def test_other_backbones_too(kind: str, config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(kind)
    run(config, "whole")
    kill_at(monkeypatch, Saver, "due", 6)
    with pytest.raises(Killed):
        run(config, "cut")
    run(config, "cut")
    assert leavings("cut") == leavings("whole")


MOMENTS: dict[str, tuple[Any, str, int, bool]] = {
    "before the first save": (Saver, "due", 2, False),
    "inside an accumulation window": (Objective, "share", 14, False),
    "inside an evaluation": (held_out.HeldOut, "evaluate", 3, False),
    "when better weights are found": (held_out.HeldOut, "keep_best", 3, False),
    "when better weights are kept": (held_out.HeldOut, "keep_best", 3, True),
    "before the best weights are written": (BestWeights, "write", 3, False),
    "after the best weights are written": (BestWeights, "write", 3, True),
    "before a state is written": (Saver, "save", 2, False),
    "while a state is written": (torch, "save", 2, True),
    "after a state is written": (Saver, "save", 2, True),
    "after the last step": (one_fold, "save_weights", 1, False),
    "after the last weights": (one_fold, "save_weights", 1, True),
    "before the out-of-fold rows": (held_out.HeldOut, "write", 1, False),
    "after the out-of-fold rows": (held_out.HeldOut, "write", 1, True),
    "before the state is dropped": (FoldFolder, "drop_state", 1, False),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("save_every", ["evaluation", "2 steps"])
def test_whatever_the_moment(
    moment: str, save_every: str, config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    run(config, "whole", "never")
    kill_at(monkeypatch, *MOMENTS[moment][:3], after=MOMENTS[moment][3])
    with pytest.raises(Killed):
        run(config, "cut", save_every)
    run(config, "cut", save_every)
    assert leavings("cut") == leavings("whole")


def test_the_best_weights_are_written_before_a_state_and_at_the_end_only(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that better ones replace before that are never written, but for the first; what fails leaves the best."""
    written: list[int | None] = []
    real = checkpoint.save_weights

    def save_weights(path: Path, weights: Any, *, step: int | None = None) -> None:
        real(path, weights, step=step)
        written.append(step)

    monkeypatch.setattr(checkpoint, "save_weights", save_weights)
    monkeypatch.setattr(one_fold, "is_better", lambda *_: True)
    config = config_of(evaluation={"every": "1 steps"})
    run(config, "never", "never")
    assert written == [1, 12]
    written.clear()
    run(config, "states", "5 steps")
    assert written == [1, 5, 10, 12]
    assert leavings("states") == leavings("never")
    written.clear()
    kill_at(monkeypatch, held_out.HeldOut, "evaluate", 8)
    with pytest.raises(Killed):
        run(config, "killed", "5 steps")
    assert written == [1, 5]
    monkeypatch.setattr(Saver, "due", lambda own, step, evaluated: 1 / (step - 7))
    monkeypatch.setattr(Saver, "save", lambda own, state: True)
    with pytest.raises(ZeroDivisionError):
        run(config, "failed", "never")
    assert written == [1, 5, 1, 7] and step_of(RunFolder("runs/failed").fold(0).best) == 7


def test_halves_of_files_are_swept_away(config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and the one that safetensors keeps beside the file while it writes; a large model leaves gigabytes."""
    config = config_of()
    kill_at(monkeypatch, Saver, "due", 9)
    with pytest.raises(Killed):
        run(config, "cut")
    halves = [
        Path("runs/cut") / name for name in ("fold0/.best.safetensors.7.part", "fold0/.tmpA1b2", ".oof.parquet.7.part")
    ]
    for half in halves:
        half.write_bytes(b"half")
    run(config, "cut")
    assert "fold 0: goes on after step 8" in SAID
    assert not any(half.exists() for half in halves)


def test_ten_real_kills() -> None:
    """SIGKILL at random moments, in processes of their own: what `benchmarks/kill_test.py --kills 100` does longer."""
    command = [sys.executable, str(KILL_TEST), "--kills", "10", "--seed", "3"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "10 of 10 identical to the uninterrupted run" in found.stdout


def test_between_folds_and_in_the_second(config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    run(config, "whole", folds="all")
    kill_at(monkeypatch, Saver, "due", 15 + 5)
    with pytest.raises(Killed):
        run(config, "cut", folds="all")
    run(config, "cut", folds="all")
    assert "fold 0: finished before, skipped (--restart trains it again)" in SAID
    for fold in (0, 1):
        assert leavings("cut", fold) == leavings("whole", fold)
    scores = [Path(f"runs/{name}/scores.json").read_text() for name in ("cut", "whole")]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_state_gives_way_to_the_one_before(
    damage: str, config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    run(config, "whole")
    kill_at(monkeypatch, Saver, "due", 9)
    with pytest.raises(Killed):
        run(config, "cut", "2 steps")
    state = RunFolder("runs/cut").fold(0).state
    raw = bytearray(state.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 4096] = bytes(byte ^ 1 for byte in raw[middle : middle + 4096])  # one might be padding
    state.write_bytes({"cut": raw[:-5000], "flipped": raw, "empty": b""}[damage])
    run(config, "cut", "2 steps")
    assert any("cannot be read" in line and "trying the state before it" in line for line in SAID), SAID
    assert "fold 0: goes on after step 6" in SAID
    assert leavings("cut") == leavings("whole")
    # with both gone there is nothing to go on from
    kill_at(monkeypatch, Saver, "due", 9)
    with pytest.raises(Killed):
        run(config, "again", "2 steps")
    for path in Path("runs/again/fold0").glob("state*"):
        path.write_bytes(b"nothing")
    run(config, "again")
    assert "fold 0: was not finished and left no state to go on from, starts anew" in SAID
    assert leavings("again") == leavings("whole")


def test_a_begun_run_is_not_mixed_with_another_config(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill_at(monkeypatch, Saver, "due", 9)
    with pytest.raises(Killed):
        run(config_of(), "cut")
    other = config_of(training={"batch_size": 16})
    with pytest.raises(ValueError, match="made from another config: training.batch_size 8 -> 16; name a new run"):
        run(other, "cut")
    SAID.clear()
    crossval.run(other, "cut", "0", restart=True, say=SAID.append)
    assert not any("goes on" in line for line in SAID)


def test_another_backbone_of_the_same_name_is_refused(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Callable[..., Path]
) -> None:
    config = config_of()
    kill_at(monkeypatch, Saver, "due", 9)
    with pytest.raises(Killed):
        run(config, "cut")
    monkeypatch.setattr(resume, "digest", lambda parts: "another")
    monkeypatch.setattr(one_fold, "start_digest", lambda model: "another")
    with pytest.raises(ValueError, match="begun from other weights than the backbone gives now: .* --restart"):
        run(config, "cut")


def test_best_weights_that_are_newer_than_the_state_are_scored_anew(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after going on elsewhere, where training does not repeat the step that wrote them."""
    config = config_of()
    run(config, "whole")
    kill_at(monkeypatch, held_out.HeldOut, "write", 1)
    with pytest.raises(Killed):
        run(config, "cut", "evaluation")
    best = RunFolder("runs/cut").fold(0).best
    from safetensors.torch import load_file, save_file

    weights = load_file(best)
    weights["heads.main.bias"] += 0.25
    save_file(weights, best, metadata={"step": "99"})
    run(config, "cut", "evaluation")
    assert "fold 0: the best weights are those of step 99, from before the stop" in SAID
    whole, cut = (pd.read_parquet(f"runs/{name}/fold0/oof.parquet") for name in ("whole", "cut"))
    assert (cut["pred_main_target"] - whole["pred_main_target"]).to_numpy() == pytest.approx(0.25, abs=1e-5)
    done = json.loads(Path("runs/cut/fold0/done.json").read_text())
    score = ((cut["pred_main_target"] - cut["target_main_target"]) ** 2).mean() ** 0.5
    assert (done["best_step"], done["best"]) == (99, pytest.approx(score, abs=1e-6))


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("save_every", ["auto", "never"])
def test_a_signal_finishes_the_step_and_saves(
    number: int, save_every: str, config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    run(config, "whole")
    real, calls = Objective.share, []

    def share(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(Objective, "share", share)
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Stopped) as stopped:
        run(config, "cut", save_every)
    assert (str(stopped.value), stopped.value.signal) == ("stopped after step 5, and saved", number)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    run(config, "cut", save_every)
    assert "fold 0: goes on after step 5" in SAID
    assert leavings("cut") == leavings("whole")


def test_a_signal_while_the_fold_is_written_stops_before_the_next(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = config_of(), held_out.HeldOut.write

    def write(*args: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(*args)

    monkeypatch.setattr(held_out.HeldOut, "write", write)
    with pytest.raises(Stopped, match="stopped after fold 0"):
        run(config, "cut", folds="all")
    assert RunFolder("runs/cut").finished_folds() == [0]


def test_no_state_is_saved_of_a_step_that_is_not_finite(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real, calls = config_of(), Objective.share, []

    def share(*args: Any) -> Any:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) > 8 else 1.0)

    monkeypatch.setattr(Objective, "share", share)
    with pytest.raises(NonFiniteError, match="training stopped at step 5"):
        run(config, "cut", "1 steps")
    saved = read_state(RunFolder("runs/cut").fold(0), SAID.append)
    assert saved is not None and saved["train"]["step"] == 4


def test_a_stop_without_room_does_not_claim_to_be_saved(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Saver, "_room", lambda self: False)
    monkeypatch.setattr(Saver, "due", lambda self, step, evaluated: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="stopped after step 2, but there was no room to save it"):
        run(config_of(), "cut")


def test_the_second_ctrl_c_acts_at_once() -> None:
    with Stopper() as stopper:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_command_says_how_to_go_on(config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from comp.cli import app

    config_of()
    real, calls = Objective.share, []

    def share(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(Objective, "share", share)
    found = CliRunner().invoke(app, ["train", "--config", "tiny.yaml", "--fold", "0"])
    assert found.exit_code == 143
    assert "comp: stopped after step 2, and saved; the same command goes on from what is saved" in found.output
    found = CliRunner().invoke(app, ["train", "--config", "tiny.yaml", "--fold", "0", "--save-every", "sometimes"])
    assert isinstance(found.exception, ValueError)
    assert "--save-every 'sometimes': allowed are auto, evaluation, never, or like" in str(found.exception)
    found = CliRunner().invoke(app, ["train", "--config", "tiny.yaml", "--fold", "0"])
    assert found.exit_code == 0
    assert "fold 0: goes on after step 2" in found.output


# --- parts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("auto", SaveEvery("auto")),
        ("evaluation", SaveEvery("evaluation")),
        ("never", SaveEvery("never")),
        ("10 minutes", SaveEvery("minutes", 10)),
        ("0.5 minute", SaveEvery("minutes", 0.5)),
        ("200 steps", SaveEvery("steps", 200)),
    ],
)
def test_when_to_save(text: str, expected: SaveEvery) -> None:
    assert parse_save_every(text) == expected


@pytest.mark.parametrize("text", ["", "often", "10", "0 steps", "1.5 steps", "-1 minutes", "nan minutes", "x steps"])
def test_when_not_to_save(text: str) -> None:
    with pytest.raises(ValueError, match="--save-every .*: allowed are auto, evaluation, never, or like '10 minutes'"):
        parse_save_every(text)


def test_auto_keeps_saving_under_a_twentieth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter([0.0, 10.0, 10.0, 10.0, 13.0, 20.0, 61.0, 59.0])
    best, clock = BestWeights(tmp_path / "best.safetensors"), partial(next, times)
    saver = Saver(FoldFolder(tmp_path), {}, start="", mark=dict, best=best, every=SaveEvery(), clock=clock)
    assert not saver.due(1, False)
    assert saver.due(1, True), "nothing was spent yet"  # at 10
    saver.save(TrainState())  # 10 to 13
    assert not saver.due(2, True), "3 of 20 seconds"
    assert saver.due(3, True), "3 of 61 seconds"
    assert not saver.due(3, True), "3 of 59 seconds"


def test_a_disk_without_room_costs_the_state_and_nothing_else(
    config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the state before is let go of, then none is written, which is said once; the run ends as ever."""
    config = config_of()
    run(config, "whole")
    real, room = resume.shutil.disk_usage, [*5 * [10**12], 0, 10**12, 0, 0]
    found: list[bool] = []

    def usage(path: Any) -> Any:
        found.append((Path(path) / "state.before.pt").exists())
        return real(path)._replace(free=room.pop(0) if room else 0)

    monkeypatch.setattr(resume.shutil, "disk_usage", usage)
    with pytest.warns(RuntimeWarning, match="too little for a state of .*--save-every never") as warned:
        run(config, "full", "2 steps")
    assert len(warned) == 1
    assert found[1:9] == [False, False, False, False, True, False, True, False], found
    assert leavings("full") == leavings("whole")


def test_random_generators_go_on_where_they_were() -> None:
    import random

    import numpy as np

    seed_everything(3)
    torch.randn(5), np.random.randn(3), random.random()  # noqa: NPY002
    np.random.standard_normal()  # noqa: NPY002
    saved = random_state()
    first = torch.randn(4), np.random.randn(5), random.random()  # noqa: NPY002
    set_random_state(saved)
    again = torch.randn(4), np.random.randn(5), random.random()  # noqa: NPY002
    assert torch.equal(first[0], again[0]) and (first[1] == again[1]).all() and first[2] == again[2]


def test_a_state_holds_no_pickle(config_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    kill_at(monkeypatch, Saver, "due", 9)
    with pytest.raises(Killed):
        run(config_of(), "cut")
    folder = RunFolder("runs/cut").fold(0)
    assert torch.load(folder.state, weights_only=True)["train"]["step"] == 8
    assert read_state(folder, SAID.append) is not None
