"""metrics.jsonl, W&B modes and fall-backs, and a real offline W&B run."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from comp import tracking_wandb
from comp.config import Tracking
from comp.tracking import JsonlTracker, NullTracker, Trackers, WandbTracker, open_tracker, wandb_mode


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_wandb, "find_spec", lambda name: SimpleNamespace(origin="somewhere"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _open(folder: Path, setting: str, **changes: Any):
    return open_tracker(
        Tracking(wandb=setting, **changes),
        competition="clear",
        run_name="large",
        fold=1,
        folder=folder,
        metrics_path=folder / "metrics.jsonl",
        config_dict={"model": {"max_length": 64}},
    )


# --- metrics.jsonl ---------------------------------------------------------------------------------------------


def test_jsonl_writes_each_line_at_once(tmp_path: Path):
    tracker = JsonlTracker(tmp_path / "fold0" / "metrics.jsonl")
    tracker.log({"loss": np.float32(0.5), "rows": np.int64(3), "note": "é", "best": None}, step=7)
    (line,) = _lines(tracker.path)  # before finish: flushed
    assert line.pop("time").endswith("+00:00")
    assert line == {"step": 7, "loss": 0.5, "rows": 3, "note": "é", "best": None}
    tracker.summary({"score": 0.4})
    tracker.finish()
    assert _lines(tracker.path)[1]["summary"] == {"score": 0.4}


def test_jsonl_writes_what_is_not_finite_as_null(tmp_path: Path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"a": float("nan"), "b": np.float32("inf"), "c": [1.0, float("-inf")], "d": {"e": float("nan")}}, 1)
    tracker.finish()
    (line,) = _lines(tracker.path)
    assert (line["a"], line["b"], line["c"], line["d"]) == (None, None, [1.0, None], {"e": None})


def test_jsonl_goes_on_after_a_kill_and_drops_the_torn_line(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    tracker = JsonlTracker(path)
    tracker.log({}, step=2)
    tracker.finish()
    assert [line["step"] for line in _lines(path)] == [1, 2]


# --- faults ----------------------------------------------------------------------------------------------------


class Broken:
    def __init__(self) -> None:
        self.calls = 0

    def log(self, values: Any, step: int) -> None:
        self.calls += 1
        raise OSError("disk full")

    def summary(self, values: Any) -> None:
        raise OSError("disk full")

    def finish(self) -> None:
        raise OSError("disk full")


def test_a_fault_is_warned_of_once_and_the_rest_goes_on(tmp_path: Path):
    broken, good = Broken(), JsonlTracker(tmp_path / "metrics.jsonl")
    trackers = Trackers([broken, good])
    with pytest.warns(RuntimeWarning, match=r"Broken\.log failed \(OSError: disk full\); training goes on"):
        trackers.log({"loss": 1.0}, step=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trackers.log({"loss": 0.5}, step=2)
        trackers.summary({"score": 0.5})
        trackers.finish()
    assert broken.calls == 2
    assert [line.get("step", "end") for line in _lines(good.path)] == [1, 2, "end"]


def test_an_interrupt_is_not_swallowed():
    class Interrupted(NullTracker):
        def log(self, values: Any, step: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()]).log({}, step=1)


# --- modes -----------------------------------------------------------------------------------------------------


def test_off_and_absent_package(monkeypatch: pytest.MonkeyPatch):
    assert wandb_mode("off") == ("off", "tracking.wandb is off")
    for absent in (None, SimpleNamespace(origin=None)):  # the second: a folder ./wandb of earlier runs
        monkeypatch.setattr(tracking_wandb, "find_spec", lambda name, found=absent: found)
        assert wandb_mode("auto") == ("off", "wandb is not installed")
        for setting in ("online", "offline"):
            with pytest.raises(ValueError, match=rf"wandb is {setting}, but .*`pip install wandb`.*comp\[track\]"):
                wandb_mode(setting)


@pytest.mark.usefixtures("installed")
def test_auto_looks_for_a_key(monkeypatch: pytest.MonkeyPatch):
    assert wandb_mode("auto") == ("offline", "no API key; set WANDB_API_KEY or run `wandb login`")
    assert wandb_mode("offline") == ("offline", "tracking.wandb is offline")
    with pytest.raises(ValueError, match="wandb is online, but there is no API key: set WANDB_API_KEY"):
        wandb_mode("online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("auto") == ("online", "an API key was found")
    assert wandb_mode("online") == ("online", "tracking.wandb is online")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == ("offline", "WANDB_MODE is offline")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode("auto") == ("off", "WANDB_MODE is disabled")


@pytest.mark.usefixtures("installed")
def test_a_key_in_netrc_counts_for_its_host_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "home" / ".netrc"
    file.parent.mkdir()
    file.write_text(f"machine api.wandb.ai\n  login user\n  password {'x' * 40}\n")
    file.chmod(0o600)
    assert wandb_mode("auto")[0] == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert wandb_mode("auto")[0] == "offline"
    monkeypatch.delenv("WANDB_BASE_URL")
    file.write_text("machine api.wandb.ai nonsense")
    assert wandb_mode("auto")[0] == "offline"


def test_off_is_jsonl_alone(tmp_path: Path):
    tracker = _open(tmp_path, "off")
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert _lines(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_explicit_offline_without_the_package_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(tracking_wandb, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install wandb"):
        _open(tmp_path, "offline")
    assert not (tmp_path / "metrics.jsonl").exists()


# --- W&B -------------------------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self) -> None:
        self.logged: list[tuple[dict, int]] = []
        self.summary: dict[str, Any] = {}
        self.finished, self.id = False, "a1b2"
        self.metrics: dict[str, dict[str, Any]] = {}

    def define_metric(self, name: str, **given: Any) -> None:
        self.metrics[name] = given

    def log(self, values: dict, step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


class FakeWandb:
    """As much of the wandb package as is called; `faults` are raised by the first calls of init."""

    class errors:
        class CommError(Exception):
            pass

        class UsageError(Exception):
            pass

    def __init__(self, *faults: Exception) -> None:
        self.faults, self.inits, self.run = list(faults), [], None

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def init(self, **given: Any) -> FakeRun:
        self.inits.append(given)
        if self.faults:
            raise self.faults.pop(0)
        return FakeRun()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, installed: None):
    def install(*faults: Exception) -> FakeWandb:
        module = FakeWandb(*faults)
        monkeypatch.setitem(__import__("sys").modules, "wandb", module)
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
        return module

    return install


def test_online_run_has_its_names_and_a_short_timeout(fake: Any, tmp_path: Path):
    module = fake()
    tracker = _open(tmp_path, "auto", tags=["a"])
    assert os.environ["WANDB_DIR"] == str(tmp_path)
    assert os.environ["WANDB_DATA_DIR"].startswith(str(tmp_path))
    assert os.environ["WANDB_CACHE_DIR"].startswith(str(tmp_path))
    (given,) = module.inits
    assert given.pop("settings") == {"console": "off", "silent": True, "init_timeout": 20}
    assert given == {
        "mode": "online",
        "dir": str(tmp_path),
        "project": "clear",
        "group": "large",
        "name": "large-fold1",
        "job_type": "train",
        "tags": ["a"],
        "config": {"model": {"max_length": 64}},
    }
    run = tracker.trackers[1].run
    tracker.log({"loss": 1.0}, step=3)
    tracker.summary({"score": 0.5})
    tracker.finish()
    assert (run.logged, run.summary, run.finished) == ([({"loss": 1.0, "step": 3}, 3)], {"score": 0.5}, True)
    assert "WANDB_DIR" not in os.environ  # put back: the next fold has its own


def test_a_resumed_fold_goes_on_in_its_own_run_and_file(fake: Any, tmp_path: Path):
    module = fake()
    first = _open(tmp_path, "auto")
    first.log({"loss": 1.0}, 1)
    mark = first.mark()
    first.log({"loss": 2.0}, 2)
    first.finish()
    options = {"competition": "clear", "run_name": "large", "fold": 1, "folder": tmp_path, "config_dict": {}}
    again = open_tracker(Tracking(), metrics_path=tmp_path / "metrics.jsonl", mark=mark, **options)
    again.log({"loss": 3.0}, 2)
    again.finish()
    lines = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1.0, 3.0], "what came after the mark is logged again"
    assert "id" not in module.inits[0]
    assert (module.inits[1]["id"], module.inits[1]["resume"]) == ("a1b2", "allow")


def test_project_group_and_full_fold(fake: Any, tmp_path: Path):
    module = fake()
    open_tracker(
        Tracking(project="p", group="g"),
        competition="clear",
        run_name="large",
        fold="full",
        folder=tmp_path,
        metrics_path=tmp_path / "metrics.jsonl",
        config_dict={},
        job_type="eval",
    ).finish()
    given = module.inits[0]
    assert (given["project"], given["group"], given["name"], given["job_type"]) == ("p", "g", "large-full", "eval")


@pytest.mark.parametrize("name", ["CommError", "UsageError"])
def test_online_falls_back_to_offline(fake: Any, tmp_path: Path, name: str):
    module = fake(getattr(FakeWandb.errors, name)("no route"))
    with pytest.warns(
        RuntimeWarning, match=rf"cannot be reached \({name}: no route\); tracking offline.*comp track sync"
    ):
        tracker = _open(tmp_path, "auto")
    assert [given["mode"] for given in module.inits] == ["online", "offline"]
    assert isinstance(tracker.trackers[1], WandbTracker)
    tracker.finish()


def test_training_goes_on_when_wandb_cannot_start_at_all(fake: Any, tmp_path: Path):
    fake(FakeWandb.errors.CommError("no route"), OSError("no space"))
    with pytest.warns(RuntimeWarning) as caught:
        tracker = _open(tmp_path, "auto")
    assert "W&B could not be started (OSError: no space); training goes on without it" in str(caught[1].message)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert len(_lines(tmp_path / "metrics.jsonl")) == 1
    assert "WANDB_DIR" not in os.environ


def test_a_run_left_open_is_finished_first(fake: Any, tmp_path: Path):
    module = fake()
    module.run = left = FakeRun()
    _open(tmp_path, "auto").finish()
    assert left.finished


def test_real_offline_runs_stay_in_their_folders(tmp_path: Path):
    pytest.importorskip("wandb")
    for fold in ("fold0", "fold1"):
        tracker = _open(tmp_path / fold, "auto")
        assert tracker.trackers[1].run.settings.mode == "offline"
        assert tracker.trackers[1].run.group == "large"
        tracker.log({"loss": 1.0}, step=1)
        tracker.summary({"score": np.float64(0.5)})
        tracker.finish()
        assert list((tmp_path / fold / "wandb").glob("offline-run-*/run-*.wandb"))
        assert _lines(tmp_path / fold / "metrics.jsonl")[0]["loss"] == 1.0
    assert {entry.name for entry in tmp_path.iterdir()} <= {"fold0", "fold1", "home"}
