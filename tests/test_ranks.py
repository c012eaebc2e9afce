"""Several processes on one fold: the losses, weights and predictions of one process, no row twice, one that writes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import TinyCompetition
from two_processes import RUN, assert_alike, environment, in_two, numbers

TRAIN = ["-m", "--", "comp", "train", "--config", "tiny.yaml", "--fold", "0", "--run"]
KINDS = ("best", "last", "averaged")


@pytest.fixture
def config(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Any:
    """Write a config whose last window has one row, which leaves the second process none; no dropout."""
    from comp import config_file

    data = tiny_competition(train_rows=66).config(tiny_model_folder("bert"), evaluation={"every": "2 steps"})
    data["training"] = {"epochs": 2, "batch_size": 8, "micro_batch_size": 3, "precision": "fp32"}
    data["optimizer"] = {"name": "adamw", "lr": 1e-3}
    data["model"]["dropout"] = 0.0
    data["stability"] = {"adversarial": {"name": "fgm"}, "averaging": {"name": "ema"}}
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    return config_file.load("tiny.yaml")


def test_two_processes_are_one_and_go_on_after_a_stop(config: Any, isolated: Path) -> None:
    from comp.training import crossval

    crossval.run(config, "one", "0", say=lambda line: None)
    done = in_two(isolated, *TRAIN, "two")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("fold 0: rmse best") == 1, "one process speaks"
    assert_alike(numbers("one", KINDS), numbers("two", KINDS))
    assert json.loads(Path("runs/two/manifest.json").read_text())["runtime"].startswith("2 x CPU (1 threads)")
    assert not list(Path("runs").rglob("*.part")) and not list(Path("runs/two").glob("f*/state*"))

    process = subprocess.Popen(
        [sys.executable, *RUN, *TRAIN, "cut", "--save-every", "2 steps"],
        env=environment(isolated),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    state, end = Path("runs/cut/fold0/state.pt"), time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # torch.distributed.run hands it on
    text = process.communicate(timeout=300)[0]
    assert "and saved" in text or Path("runs/cut/fold0/done.json").exists(), text
    done = in_two(isolated, *TRAIN, "cut")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_alike(numbers("one", KINDS), numbers("cut", KINDS))


def test_rows_are_shared_without_loss_or_repetition() -> None:
    from comp.training.ranks import OneRank, Ranks

    window = [np.arange(0, 3), np.arange(3, 6), np.arange(6, 7)]
    ranks = [object.__new__(Ranks) for _ in range(3)]
    for number, rank in enumerate(ranks):
        rank.size, rank.rank = 3, number
    for rows in (window, [np.array([5])]):
        shares = [rank.share(rows) for rank in ranks]
        assert all(len(micro) <= len(rows[0]) for share in shares for micro in share)
        assert sorted(np.concatenate([micro for share in shares for micro in share])) == sorted(np.concatenate(rows))
    assert ranks[2].share([np.array([5])]) == [], "a rank without rows"
    assert sorted(np.concatenate([rank.part(np.arange(10, 17)) for rank in ranks])) == list(range(10, 17))
    alone = OneRank()
    assert alone.share(window) is window and alone.own(alone.each("a")) == "a" and alone.own(["a", "b"]) == "a"


@pytest.mark.bad_input
def test_what_cannot_be_shared_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from comp import config_file
    from comp.training import crossval
    from comp.training.dispatch import How, how_of

    config = config_file.load("tiny.yaml", ["stability.supcon.weight=0.1"])
    with pytest.raises(ValueError, match="compares the rows of a whole batch, which cannot be shared out among the"):
        crossval.run(config, "new", how=How("ranks"), say=lambda line: None)
    assert not Path("runs/new").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for jobs, on in ((2, None), (None, "ray")):
        with pytest.raises(ValueError, match="torch.distributed.run shares one fold .* leave out --jobs and --on"):
            how_of(jobs, on)
    assert how_of(None) == How("ranks")
