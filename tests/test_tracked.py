"""What reaches the trackers is what the run folder says: W&B runs read back, TensorBoard and trackio; sending later."""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import Call, write_tiny_competition

from comp import config_file
from comp.config import Tracking
from comp.lock import hold
from comp.runs import read_json
from comp.ship import track_sync
from comp.ship.report_page import Grid
from comp.ship.report_panels import report_page
from comp.ship.report_run import read_run
from comp.ship.track_sync import offline_runs, sync
from comp.ship.tracked import track_scores
from comp.tracking import best_values, open_tracker
from comp.tracking_others import TRACKERS
from comp.tracking_wandb import relocate

wandb_is_there = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb, of the extra `track`, is not installed")
PNG = bytes.fromhex(  # one red pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)


def read_back(file: Path) -> dict[str, Any]:
    """Return a fresh copy of what `_read` found."""
    return copy.deepcopy(_read(file, file.stat().st_mtime_ns))


@cache
def _read(file: Path, modified: int) -> dict[str, Any]:
    """Return what a .wandb file holds by `wandb leet inspect`: the run, metrics, history lines, summary, artifacts."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, Any] = {"history": [], "summary": {}, "metric": {}, "artifact": [], "files": []}
    for record in map(json.loads, done.stdout.splitlines()):
        kind, value = record["type"], record.get(record["type"], {})
        if kind == "run":
            found["run"] = value
        elif kind == "history":
            found["history"].append(value["item"])
        elif kind == "summary":
            found["summary"] |= value.get("update", {})
        elif kind == "metric":
            found["metric"][value.get("name") or value["glob_name"]] = value
        elif kind == "artifact":
            found["artifact"].append(value)
        elif kind == "files":
            found["files"] += [entry["path"] for entry in value["files"]]
    return found


def nested(summary: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what a summary says of `name`, which the records may name by "name" or "name.key"."""
    parts = {key[len(name) + 1 :]: value for key, value in summary.items() if key.startswith(f"{name}.")}
    return parts | (summary[name] if isinstance(summary.get(name), dict) else {})


# --- a run with W&B offline ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> Path:
    """A folder with runs/tiny, trained by `comp train` with W&B offline: regression and an auxiliary task."""
    pytest.importorskip("wandb", reason="wandb, of the extra `track`, is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `report`, is not installed")
    folder = tmp_path_factory.mktemp("tracked")
    competition = write_tiny_competition(folder / "data", "regression")
    frame = pd.read_csv(competition.train)
    frame["side"] = (frame["target"] > 0).astype(float)
    frame.to_csv(competition.train, index=False)
    tasks = [
        {"name": "main", "kind": "regression", "targets": ["target"]},
        {"name": "side", "kind": "binary", "targets": ["side"], "metric": "roc_auc"},
    ]
    config = competition.config(
        tiny_model_folder("bert"),
        tasks=tasks,
        training={"epochs": 3, "batch_size": 4, "precision": "fp32"},
        evaluation={"every": "50%"},
        tracking={"wandb": "offline", "tags": ["x"]},
    )
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        from comp import cli

        patch.chdir(folder)
        patch.setattr("warnings.showwarning", None)
        patch.setattr(sys, "argv", ["comp", "train", "--config", "tiny.yaml"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
    return folder


def _file(folder: Path, part: str) -> Path:
    (found,) = (folder / "runs" / "tiny" / part / "wandb").glob("offline-run-*/run-*.wandb")
    return found


def test_a_fold_in_wandb_is_its_metrics_jsonl(tracked: Path) -> None:
    home = tracked / "runs" / "tiny"
    for fold in (0, 1):
        found = read_back(_file(tracked, f"fold{fold}"))
        lines = [json.loads(line) for line in (home / f"fold{fold}" / "metrics.jsonl").read_text().splitlines()]
        run = found["run"]
        assert (run["display_name"], run["run_group"], run["job_type"]) == (f"tiny-fold{fold}", "tiny", "train")
        assert run["tags"] == ["x"]
        config = config_file.load(home / "config.yaml").model_dump(mode="json")
        logged = {key: value for key, value in run["config"]["update"].items() if key != "_wandb"}
        assert logged == config

        wanted = [{key: value for key, value in line.items() if key != "time"} for line in lines if "step" in line]
        rows = [{key: value for key, value in row.items() if key[0] != "_"} for row in found["history"]]
        merged: dict[int, dict[str, Any]] = {}
        for line in wanted:  # W&B has one row a step, metrics.jsonl one for the loss and one for the evaluation
            merged.setdefault(line["step"], {}).update(line)
        assert len(rows) > 5 and [row["step"] for row in rows] == list(merged)
        for row in rows:
            assert row == pytest.approx(merged[row["step"]], rel=1e-12), row["step"]
        assert [row["_step"] for row in found["history"]] == list(merged)

        summary = next(line["summary"] for line in lines if "summary" in line)
        padding = summary.pop("padding")
        assert {name: found["summary"].get(name) for name in summary} == pytest.approx(summary)
        assert found["summary"].get("padding") == pytest.approx(padding)
        scores = [line["valid/score"] for line in wanted if "valid/score" in line]
        areas = [line["valid/side"] for line in wanted if "valid/side" in line]
        assert nested(found["summary"], "valid/score")["min"] == pytest.approx(min(scores))
        assert nested(found["summary"], "valid/side")["max"] == pytest.approx(max(areas))
        assert found["metric"]["valid/score"]["step_metric"] == "step"
        assert found["metric"]["train/*"]["step_metric"] == "step"


def test_best_values_follow_the_metrics(tracked: Path) -> None:
    best = best_values(config_file.load(tracked / "tiny.yaml"))
    assert (best["valid/score"], best["valid/side"], best["train/loss"]) == ("min", "max", "min")


def test_the_eval_run_holds_the_report(tracked: Path) -> None:
    home = tracked / "runs" / "tiny"
    found = read_back(_file(tracked, ""))
    run = found["run"]
    assert (run["display_name"], run["run_group"], run["job_type"]) == ("tiny-eval", "tiny", "eval")
    assert run["config"]["update"]["fingerprints"] == read_json(home / "manifest.json")["fingerprints"]
    scores = read_json(home / "scores.json")["tasks"]
    for task in ("main", "side"):
        for key in ("mean", "std", "pooled"):
            assert found["summary"][f"{task}/best/{key}"] == pytest.approx(scores[task]["best"][key])
        assert found["summary"][f"{task}/best/folds/1"] == pytest.approx(scores[task]["best"]["folds"]["1"])

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tracked)
        page = report_page(read_run("runs/tiny"))
    files = _file(tracked, "").parent / "files"
    logged = {key for item in found["history"] for key in item}
    names = {key.removesuffix("._type") for key in logged if key.endswith("._type")}
    assert names >= {f"plots/{picture.name}" for picture in page.pictures}
    grids = [block for panel in page.panels for block in panel.blocks if isinstance(block, Grid) and block.rows]
    assert len(grids) > 10 and names >= {"oof", "report", *(f"tables/{grid.name}" for grid in grids)}
    for path in found["files"]:
        assert (files / path).exists(), path
    (oof,) = files.glob("media/table/oof_*.json")
    table = json.loads(oof.read_text())
    rows = pd.DataFrame(table["data"], columns=table["columns"]).set_index("id")
    true = pd.read_parquet(home / "oof.parquet").set_index("id")
    assert len(rows) == 60
    assert np.allclose(rows.loc[true.index, "pred_main_target"], true["pred_main_target"])
    assert np.allclose(rows.loc[true.index, "error"], (true["pred_main_target"] - true["target_main_target"]).abs())
    (html,) = files.glob("media/html/report_*.html")
    assert f"{scores['main']['best']['pooled']:.5f}" in html.read_text()


def test_everything_is_inside_the_run_folder(tracked: Path) -> None:
    assert {path.name for path in tracked.iterdir()} == {"data", "tiny.yaml", "runs", "folds"}
    for artifact in read_back(_file(tracked, ""))["artifact"]:
        for entry in artifact["manifest"]["contents"]:
            assert (
                Path(entry["local_path"]).is_relative_to(tracked / "runs" / "tiny")
                and Path(entry["local_path"]).exists()
            )


def test_scores_are_tracked_once(tracked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tracked, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setattr("comp.ship.tracked._pictures", lambda tracker, page: None)  # they take their time
    told: list[str] = []
    before = offline_runs(Path("runs/tiny"))
    assert not track_scores("runs/tiny", say=told.append) and "tracked already" in told[0]
    assert offline_runs(Path("runs/tiny")) == before
    assert track_scores("runs/tiny", again=True, say=told.append) and "send it with `comp track sync`" in told[1]
    (new,) = set(offline_runs(Path("runs/tiny"))) - set(before)
    assert new.name == _file(tracked, "").name, "the same W&B run"


# --- a folder that was moved, and sending ----------------------------------------------------------------------------


def test_a_moved_run_finds_its_staged_files(tracked: Path, tmp_path: Path) -> None:
    home = tmp_path / "elsewhere"
    shutil.copytree(tracked / "runs" / "tiny", home)
    (file,) = (home / "wandb").glob("offline-run-*/*.wandb")
    before = read_back(file)
    assert relocate(file) == 0, "the files are where they were"
    hidden = tracked.with_name("hidden")
    tracked.rename(hidden)
    try:
        whole = file.read_bytes()
        count = relocate(file)
        assert count == sum(len(artifact["manifest"]["contents"]) for artifact in before["artifact"]) > 3
        assert relocate(file) == 0
    finally:
        hidden.rename(tracked)
    after = read_back(file)
    for artifact in after["artifact"]:
        for entry in artifact["manifest"]["contents"]:
            assert Path(entry["local_path"]).is_relative_to(home) and Path(entry["local_path"]).exists()
            entry["local_path"] = ""
    for artifact in before["artifact"]:
        for entry in artifact["manifest"]["contents"]:
            entry["local_path"] = ""
    assert after == before, "nothing else changes"
    for damage in (b"no log", whole[:20000] + bytes(8) + whole[20008:]):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"no file of W&B's|damaged at byte"):
            relocate(file)


@pytest.fixture
def waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """runs/a and runs/b with W&B files, as `comp train` leaves them; b's fold was stopped and gone on with."""
    monkeypatch.chdir(tmp_path)
    for name in ("a/fold0/wandb/offline-run-1-x/run-x", "a/wandb/offline-run-2-y/run-y",
                 "b/fold0/wandb/offline-run-1-z/run-z", "b/fold0/wandb/offline-run-3-z/run-z"):  # fmt: skip
        file = Path(f"runs/{name}.wandb")
        file.parent.mkdir(parents=True)
        file.write_bytes(b":W&B\xe1\xbe\x00")
    for run in "ab":
        Path(f"runs/{run}/config.yaml").write_text("")
    monkeypatch.setattr(track_sync, "_can_send", lambda number: None)
    return tmp_path


def _mark(files: Sequence[Path]) -> None:
    for file in files:
        file.with_name(f"{file.name}.synced").touch()


@wandb_is_there
def test_sync_sends_what_was_not_sent(waiting: Path) -> None:
    told: list[str] = []
    asked: list[list[str]] = []

    def send(files: Sequence[Path]) -> str | None:
        asked.append([file.parent.name for file in files])
        if files[0].name == "run-y.wandb":
            return "no route"
        _mark(files)
        return None

    assert not sync(say=told.append, send=send)
    assert asked == [["offline-run-1-x"], ["offline-run-2-y"], ["offline-run-1-z", "offline-run-3-z"]]
    assert told == [
        "runs/a/wandb/offline-run-2-y: not sent: no route",
        "runs/a: 1 sent, 1 not",
        "runs/b: 2 sent",
        "1 of 4 were not sent; the same command tries them again",
    ]
    told.clear(), asked.clear()
    assert sync(say=told.append, send=lambda files: asked.append([file.name for file in files]) or _mark(files))
    assert asked == [["run-y.wandb"]] and told == ["runs/b: all 2 are sent already", "runs/a: 1 sent"]
    told.clear()
    assert sync(["runs/a"], say=told.append, send=lambda files: pytest.fail("sent twice"))
    assert told == ["runs/a: all 2 are sent already"]


@wandb_is_there
def test_sync_believes_the_mark_alone_and_hides_keys(waiting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "5ecre7" * 7)
    told: list[str] = []
    assert not sync(["runs/a"], say=told.append, send=lambda files: None)
    assert "did not mark it as sent" in told[0]
    assert not sync(["runs/a"], say=told.append, send=lambda files: f"bad key {'5ecre7' * 7}")
    assert not any("5ecre7" in line for line in told) and any("bad key ***" in line for line in told)


def test_a_run_that_is_being_trained_is_not_sent(waiting: Path) -> None:
    script = "import sys, time; from pathlib import Path; from comp.lock import hold\nwith hold(Path('runs/a')): print('in', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        with pytest.raises(ValueError, match="has been writing into it"):
            sync(["runs/a"], send=lambda files: pytest.fail("sent"))
        other.communicate("")
    with hold(Path("runs/a")):
        pass


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["HTTPS_PROXY", "https_proxy", "NETRC"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


BAD = {
    "no run": (["track", "sync", "runs/none"], ["runs/none is no run folder", "config.yaml is missing"]),
    "no key": (["track", "sync", "runs/tiny"], ["1 W&B runs are waiting, but there is no API key", "WANDB_API_KEY"]),
    "no tracker": (["track", "scores", "runs/tiny"], ["no tracker is on (tracking.wandb is off)", "tracking.also"]),
    "scores of no run": (["track", "scores", "runs/none"], ["runs/none is no run folder"]),
    "another key": (["track", "scores", "runs/tiny", "--set", "metric=mae"], ["--set metric=mae: only keys of tracking"]),
    "unknown tracker": (
        ["train", "--config", "tiny.yaml", "--run", "new", "--set", "tracking.also=[tensorbord]"],
        ["tracking.also", "tensorbord", "tensorboard", "trackio"],
    ),
    "one tracker, no list": (
        ["train", "--config", "tiny.yaml", "--run", "new", "--set", "tracking.also=mlflow"], ["tracking.also", "list"],
    ),
}  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.usefixtures("no_key")
@pytest.mark.parametrize("case", BAD)
def test_refusals(case: str, here: Path, refuses: Callable[..., str]) -> None:
    if case == "no key":
        pytest.importorskip("wandb", reason="wandb, of the extra `track`, is not installed")
        file = here / "runs/tiny/fold0/wandb/offline-run-1-x/run-x.wandb"
        file.parent.mkdir(parents=True)
        file.write_bytes(b":W&B\xe1\xbe\x00")
    refuses(*BAD[case])


@pytest.mark.bad_input
@pytest.mark.usefixtures("no_key")
def test_no_wandb_and_no_network_are_said(waiting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(waiting)
    monkeypatch.setattr(track_sync, "installed", lambda: False)
    with pytest.raises(ValueError, match=r"4 W&B runs are waiting, but wandb is not installed: `pip install wandb`"):
        sync()
    monkeypatch.setattr(track_sync, "installed", lambda: True)
    monkeypatch.setenv("WANDB_API_KEY", "5ecre7" * 7)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.delenv("https_proxy", raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(ValueError, match=r"127\.0\.0\.1 cannot be reached \(.*refused") as fault:
            sync()
    assert "5ecre7" not in str(fault.value)


@pytest.mark.bad_input
@pytest.mark.parametrize("name", TRACKERS)
def test_an_absent_package_names_its_extra(
    name: str, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("comp.tracking_others.find_spec", lambda package: None)
    refuses(
        ["train", "--config", "tiny.yaml", "--run", "new", "--set", f"tracking.also=[{name}]"],
        [f"tracking.also has {name}", f"comp[{name}]"],
    )


def test_sync_without_runs_says_so(isolated: Path, call: Call) -> None:
    assert call("track", "sync") == (0, "no run in runs/\n", "")


# --- other trackers --------------------------------------------------------------------------------------------------


def _open(folder: Path, name: str, mark: dict[str, Any] | None = None) -> Any:
    return open_tracker(
        Tracking(wandb="off", also=[name]),  # type: ignore[list-item]
        competition="clear", run_name="large", fold=1, folder=folder, metrics_path=folder / "metrics.jsonl",
        config_dict={"model": {"max_length": 64}}, mark=mark,
    )  # fmt: skip


def _report(tracker: Any) -> None:
    tracker.table("oof", ["id", "error"], [["a|b", 0.5], ["c", None]])
    tracker.picture("plots/x", PNG, "a pixel")
    tracker.page("report", "<p>hi</p>")
    tracker.summary({"best": 0.5})
    tracker.finish()


def test_tensorboard_has_the_curves_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard, of the extra `tensorboard`, is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = _open(tmp_path, "tensorboard")
    first.log({"train/loss": np.float32(1.0), "none": None}, 1)
    mark = first.mark()
    first.log({"train/loss": 9.0}, 2)
    first.finish()  # killed after the mark: step 2 comes again
    again = _open(tmp_path, "tensorboard", mark)
    again.log({"train/loss": 0.5}, 2)
    _report(again)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0, "images": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
    assert events.Tags()["scalars"] == ["train/loss"]
    assert events.Images("plots/x")[0].width == 1
    texts = {name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode() for name in
             ("config", "oof", "summary", "plots/x/about")}  # fmt: skip
    assert '"max_length": 64' in texts["config"]
    assert texts["oof"] == "|id|error|\n|---|---|\n|a\\|b|0.5|\n|c||"
    assert texts["plots/x/about"] == "a pixel" and "|best|0.5|" in texts["summary"]


def test_trackio_has_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="trackio, of the extra `trackio`, is not installed")
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_tracked import _open, _report
tracker = _open(Path({str(tmp_path)!r}), "trackio")
tracker.log({{"train/loss": 1.0}}, 1)
mark = tracker.mark()
tracker.finish()
tracker = _open(Path({str(tmp_path)!r}), "trackio", mark)
tracker.log({{"train/loss": 0.5}}, 2)
_report(tracker)
import trackio, json
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("clear")
print(json.dumps([run.name, run.config, SQLiteStorage.get_logs("clear", run.name)]))
"""
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "store")},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    name, config, logs = json.loads(next(line for line in told.stdout.splitlines() if line.startswith("[")))
    assert name == "large-fold1" and config["model"] == {"max_length": 64} and config["_Group"] == "large"
    assert [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row] == [(1, 1.0), (2, 0.5)]
    kinds = {key: value["_type"] for row in logs for key, value in row.items() if isinstance(value, dict)}
    assert kinds == {"oof": "trackio.table", "plots/x": "trackio.image", "summary": "trackio.table"}
