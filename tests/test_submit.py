"""comp submit and submissions/LOG.md: checked before it is sent, noted after; CV beside LB. No network."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TinyCompetition
from typer.testing import CliRunner

from comp.cli import app, main
from comp.runs import RunFolder, write_json, write_text
from comp.ship import submit as module
from comp.ship.leaderboard import LOG, Entry, add_entry, compare, note_score, read_log
from comp.ship.submission import write_submission
from comp.ship.submit import submit


@pytest.fixture
def written(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> TinyCompetition:
    """submissions/a.csv as comp infer writes it, and what is left of its run; no model."""
    competition = tiny_competition()
    folder = RunFolder("runs/a")
    write_text(folder.config, yaml.safe_dump(competition.config(tiny_model_folder("bert"))))
    write_json(folder.manifest, {"classes": {}, "fingerprints": {}})
    scores = {"metric": "rmse", "best": {"pooled": 0.5}, "last": {"pooled": 0.6}}
    frame = pd.read_csv(competition.sample_submission, dtype={"id": str}).assign(target=np.linspace(0, 1, 20))
    sidecar = {"weights": "best", "runs": [{"run": "runs/a", "scores": scores}]}
    write_submission(Path("submissions/a.csv"), frame, sidecar)
    return competition


class Client:
    """Stands for kaggle: remembers what it was asked."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def competition_submit(self, path: str, message: str, competition: str, quiet: bool) -> Any:
        self.sent.append((path, message, competition))
        return type("Answer", (), {"message": "Successfully submitted"})()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    own = Client()
    monkeypatch.setattr(module, "open_client", lambda: own)
    return own


def test_a_csv_is_checked_sent_and_noted(written: TinyCompetition, client: Client) -> None:
    said: list[str] = []
    submit(Path("submissions/a.csv"), competition="tiny-comp", message="first | try", say=said.append)
    assert client.sent == [("submissions/a.csv", "first | try", "tiny-comp")]
    (entry,) = read_log()
    assert (entry.what, entry.competition, entry.metric, entry.cv, entry.lb) == (
        "submissions/a.csv", "tiny-comp", "rmse", 0.5, None
    )  # fmt: skip
    assert entry.note == "first try" and entry.when[:2] == "20" and entry.how == "out of fold, pooled"
    submit(Path("submissions/a.csv"), score=0.451, say=said.append)
    (entry,) = read_log()
    assert entry.lb == 0.451 and len(client.sent) == 1, "a score sends nothing"
    assert "0.451" in LOG.read_text() and said[-1].startswith("submissions/LOG.md: noted submissions/a.csv, CV 0.50000")


def test_a_blend_is_noted_by_its_cross_fitted_score(written: TinyCompetition, client: Client) -> None:
    frame = pd.read_csv("submissions/a.csv", dtype={"id": str})
    scores = {"crossfit": 0.41, "fitted": 0.40}
    runs = [{"run": "runs/a", "scores": None}] * 2
    sidecar = {"weights": "best", "runs": runs, "blend": {"metric": "rmse", "scores": scores}}
    write_submission(Path("submissions/all.csv"), frame, sidecar)
    submit(Path("submissions/all.csv"), competition="tiny-comp", say=lambda line: None)
    assert (read_log()[0].cv, read_log()[0].how) == (0.41, "cross-fitted")


def test_what_submit_refuses(written: TinyCompetition, client: Client) -> None:
    path = Path("submissions/a.csv")
    frame = pd.read_csv(path, dtype={"id": str})

    def fault(**options: Any) -> str:
        with pytest.raises(ValueError, match=".") as found:
            submit(options.pop("path", path), say=lambda line: None, **options)
        return str(found.value)

    assert "--competition is missing" in fault()
    assert "no such file; write one with `comp infer`" in fault(path=Path("gone.csv"))
    assert "is no bundle: MANIFEST.json is missing" in fault(path=Path("runs"))
    assert "--score nan: wanted the leaderboard's number" in fault(score=float("nan"))
    path.write_text(path.read_text().replace("0.", "1.", 1))
    assert "was changed since submissions/a.json was written" in fault(competition="x")
    story = json.loads(path.with_suffix(".json").read_text())
    write_submission(path, frame.head(5), story)
    assert "lacks 15 of the 20 ids of the sample submission" in fault(competition="x")
    path.with_suffix(".json").unlink()
    assert "name the sample submission with --sample" in fault(competition="x")
    sample = str(written.sample_submission)
    assert "has not the columns, ids and order of" in fault(competition="x", sample=sample)
    frame.assign(target="").to_csv(path, index=False)
    assert "column 'target' has cells that are empty or no finite number" in fault(competition="x", sample=sample)
    assert client.sent == [] and not LOG.exists()
    frame.to_csv(path, index=False)
    submit(path, competition="x", sample=sample, say=lambda line: None)
    assert len(client.sent) == 1 and read_log()[0].cv is None


def test_without_credentials_it_says_what_to_do(
    written: TinyCompetition, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("kagglesdk", reason="the extra `kaggle` is not installed")
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(Path.cwd()))
    monkeypatch.setattr(sys, "argv", ["comp", "submit", "submissions/a.csv", "--competition", "tiny-comp"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert (
        "no Kaggle credentials: call `kaggle auth login`, or make a token at kaggle.com/settings/api"
        in capsys.readouterr().err
    )
    assert not LOG.exists()


def test_the_log_is_a_table_that_is_read_back(isolated: Path) -> None:
    assert read_log() == [] and compare() == []
    add_entry(Entry("a.csv", "c", "rmse", 0.5, "cross-fitted", None, "x"))
    add_entry(Entry("b.csv", "c", "rmse", 0.4))
    add_entry(Entry("a.csv", "c", "rmse", 0.3))
    assert note_score(Entry("a.csv", "c"), 0.31) and [entry.lb for entry in read_log()] == [None, None, 0.31]
    assert note_score(Entry("a.csv", "c"), 0.52) and [entry.lb for entry in read_log()] == [0.52, None, 0.31]
    assert not note_score(Entry("a.csv", "c"), 0.6) and len(read_log()) == 4
    LOG.write_text(LOG.read_text() + "| broken | line |\n")
    with pytest.raises(ValueError, match=r"LOG.md, line 11: wanted 8 cells"):
        read_log()


def test_cv_beside_lb_and_their_correlation(isolated: Path) -> None:
    pairs = [(0.50, 0.47), (0.48, 0.46), (0.47, 0.44), (0.52, 0.50)]
    for number, (cv, lb) in enumerate(pairs):
        add_entry(Entry(f"s{number}.csv", "clear", "rmse", cv, "cross-fitted"))
        shown = CliRunner().invoke(app, ["oof"]).output
        assert f"clear, rmse: {min(number, 3)} submissions have both" in shown or number > 3 or "correlate" in shown
        note_score(Entry(f"s{number}.csv", "clear"), lb)
    add_entry(Entry("other.csv", "else", "accuracy", 0.8, lb=0.7))
    lines = CliRunner().invoke(app, ["oof"]).output.splitlines()
    assert next(line for line in lines if line.startswith("s0.csv")).split()[1:4] == ["0.50000", "0.47000", "-0.03000"]
    expected = np.corrcoef(np.array(pairs).T)[0, 1]
    assert f"clear, rmse: CV and LB correlate by {expected:.3f} over 4 submissions" in lines
    assert "else, accuracy: 1 submissions have both CV and LB; a correlation needs 3" in lines
