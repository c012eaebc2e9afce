"""`comp compare` on runs that differ in a known way: numbers, intervals, what it refuses and what it warns of."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import write_tiny_competition

from comp import config_file
from comp.blend.classical import run_classical
from comp.blend.members import gather
from comp.cli import app
from comp.metrics import evaluate
from comp.ship.compare import compare, paired_bootstrap


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with three runs of ridge on words: a; b, of another seed and penalty; other, on other folds."""
    folder, before = tmp_path_factory.mktemp("compare"), Path.cwd()
    os.chdir(folder)
    competition = write_tiny_competition(folder / "data", "regression")
    for name, penalty, sections in (
        ("a", 1.0, {}),
        ("b", 30.0, {"training": {"seed": 7, "epochs": 1, "batch_size": 8, "precision": "fp32"}}),
        ("other", 1.0, {"folds": {"splitter": "kfold", "num_folds": 3, "name": "other"}}),
    ):
        Path("tiny.yaml").write_text(yaml.safe_dump(competition.config("nowhere", **sections)))
        run_classical(
            config_file.load("tiny.yaml"),
            name,
            features=["tfidf"],
            estimator="ridge",
            options={"alpha": penalty},
            say=lambda line: None,
        )
    yield folder
    os.chdir(before)


def lines_of(text: str, start: str) -> list[list[str]]:
    """Return the cells of the lines that start with `start`."""
    return [re.split(r"  +", line.strip()) for line in text.splitlines() if line.startswith(start)]


def test_scores_and_differences_are_those_of_the_rows(home: Path) -> None:
    text = compare(["runs/a", "runs/b"], resamples=300)
    rows = [pd.read_parquet(f"runs/{name}/oof.parquet").set_index("id") for name in "ab"]
    rows[1] = rows[1].loc[rows[0].index]
    truth = rows[0][["target_main_target"]].to_numpy(float)
    scores = [evaluate("rmse", truth, own[["pred_main_target"]].to_numpy(float)) for own in rows]
    lines = lines_of(text, "b ")
    name, score, apart, low, high, better = lines[0]
    assert (name, score, apart) == ("b", f"{scores[1]:.5f}", f"{scores[1] - scores[0]:+.5f}")
    assert float(low) < float(apart) < float(high)
    assert 0 <= float(better[:-1]) <= 100
    assert lines_of(text, "a ")[0] == ["a", f"{scores[0]:.5f}", "-", "-", "-", "-"]
    for fold in (0, 1):
        part = (rows[0]["fold"] == fold).to_numpy()
        own = [evaluate("rmse", truth[part], one[["pred_main_target"]].to_numpy(float)[part]) for one in rows]
        (line,) = lines_of(text, f"fold {fold}")
        assert line == [f"fold {fold}", *(f"{value:.5f}" for value in own), f"{own[1] - own[0]:+.5f}"]
    saved = json.loads(Path("runs/b/scores.json").read_text())
    assert lines_of(text, "b ")[1][3:5] == [f"{saved['best']['mean']:.5f}", f"{saved['best']['pooled']:.5f}"]
    assert "over 300 draws of the rows with replacement (seed 0)" in text
    assert compare(["runs/a", "runs/b"], resamples=300) == text


def test_what_differs_is_listed_and_what_is_alike_is_not(home: Path) -> None:
    text = compare(["runs/a", "runs/b"], resamples=100)
    assert lines_of(text, "training.seed") == [["training.seed", "42", "7"]]
    assert not lines_of(text, "training.epochs") and "optimizer" not in text
    assert lines_of(text, "options") == [["options", "{'alpha': 1.0}", "{'alpha': 30.0}"]]
    assert "warning" not in text


def test_several_runs_on_other_folds_and_fewer_rows(home: Path) -> None:
    shutil.copytree("runs/a", "runs/fewer", dirs_exist_ok=True)
    rows = pd.read_parquet("runs/a/oof.parquet")
    rows.iloc[10:].to_parquet("runs/fewer/oof.parquet", index=False)
    text = compare(["runs/a", "runs/other", "runs/fewer"], resamples=100)
    assert "warning: 10 rows are left out: not every run has them." in text
    assert "warning: The runs were trained on different folds" in text
    assert "on 50 rows" in text and not lines_of(text, "fold 0")
    assert lines_of(text, "fewer ")[0][2:5] == ["+0.00000"] * 3, "the same predictions"
    assert lines_of(text, "folds.num_folds") == [["folds.num_folds", "2", "3", "2"]]


def test_another_metric_and_its_direction(home: Path) -> None:
    by = {name: compare(["runs/a", "runs/b"], metric=name, resamples=200) for name in ("mae", "pearson")}
    assert "mae (lower is better)" in by["mae"] and "pearson (higher is better)" in by["pearson"]
    rows = [pd.read_parquet(f"runs/{name}/oof.parquet") for name in "ab"]
    apart = [
        evaluate("pearson", own[["target_main_target"]].to_numpy(float), own[["pred_main_target"]].to_numpy(float))
        for own in rows
    ]
    _, _, shown, _, _, better = lines_of(by["pearson"], "b ")[0]
    assert shown == f"{apart[1] - apart[0]:+.5f}"
    assert (float(better[:-1]) > 50) == (apart[1] > apart[0])


def test_html_has_the_same_numbers_and_a_picture(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `report`, is not installed")
    text = compare(["runs/a", "runs/b"], resamples=100, html=tmp_path / "ab.html")
    page = (tmp_path / "ab.html").read_text(encoding="utf-8")
    for cell in lines_of(text, "b ")[0]:
        assert f">{cell}</td>" in page
    assert "data:image/svg+xml;base64," in page and "<script" not in page
    assert (tmp_path / "ab" / "difference.png").read_bytes().startswith(b"\x89PNG")


def test_rows_that_go_together_are_drawn_together(home: Path, tmp_path: Path) -> None:
    shutil.copytree("runs/a", tmp_path / "grouped")
    config = yaml.safe_load((tmp_path / "grouped" / "config.yaml").read_text())
    train = pd.read_csv(config["competition"]["train"], dtype=str)
    config["folds"] |= {"splitter": "group", "group": "site"}
    config["competition"]["train"] = str(tmp_path / "train.csv")
    (tmp_path / "grouped" / "config.yaml").write_text(yaml.safe_dump(config))
    train.to_csv(tmp_path / "train.csv", index=False)
    text = compare([tmp_path / "grouped", "runs/b"], resamples=100)
    said = "warning: Rows go together by 'site', but are drawn one by one, so that the intervals are too narrow: "
    assert said in text and "no column 'site'" in text

    train["site"] = [f"s{row % 7}" for row in range(len(train))]
    train.to_csv(tmp_path / "train.csv", index=False)
    text = compare([tmp_path / "grouped", "runs/b"], resamples=100)
    assert "draws of whole groups of 'site', of which there are 7, with replacement" in " ".join(text.split())
    assert "one by one" not in text and "From so few groups it is rough." in " ".join(text.split())
    low, high = lines_of(text, "b ")[0][3:5]
    members = gather([tmp_path / "grouped", "runs/b"])
    sites = train.set_index("id").loc[list(members.ids), "site"].str[1:].astype(int).to_numpy()
    found = paired_bootstrap(members.problem, groups=sites, resamples=100)
    assert [low, high] == [f"{found.low[1]:+.5f}", f"{found.high[1]:+.5f}"]

    train.iloc[1:].to_csv(tmp_path / "train.csv", index=False)
    text = compare([tmp_path / "grouped", "runs/b"], resamples=100)
    assert said in text and f"has no row '{train['id'][0]}'" in text


def test_runs_of_the_same_name_are_told_apart(home: Path, tmp_path: Path) -> None:
    shutil.copytree("runs/b", tmp_path / "a")
    text = compare(["runs/a", tmp_path / "a"], resamples=100)
    assert text.startswith(f"compared with runs/a: {tmp_path / 'a'}\n")


def test_what_is_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree("runs/b", tmp_path / "moved")
    rows = pd.read_parquet("runs/b/oof.parquet")
    rows["target_main_target"] += np.float32(1)
    rows.to_parquet(tmp_path / "moved" / "oof.parquet", index=False)

    def refused(message: str, runs: list[Any], **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            compare(runs, **options)

    refused("different targets for the same ids: they were trained on different data", ["runs/a", tmp_path / "moved"])
    rows["id"] = "x" + rows["id"]
    rows.to_parquet(tmp_path / "moved" / "oof.parquet", index=False)
    refused("the runs have no rows in common", ["runs/a", tmp_path / "moved"])
    refused("name two runs or more to compare", ["runs/a"])
    refused("a run is named twice", ["runs/a", "runs/a"])
    refused("runs/none is no run folder", ["runs/a", "runs/none"])
    refused("--resamples 10: an interval needs at least 100", ["runs/a", "runs/b"], resamples=10)
    refused("metric 'roc_auc' does not fit kind 'regression'; allowed: rmse", ["runs/a", "runs/b"], metric="roc_auc")
    refused("unknown metric 'rsme'; did you mean 'rmse'", ["runs/a", "runs/b"], metric="rsme")
    refused("weights 'first': allowed are best, last, averaged", ["runs/a", "runs/b"], weights="first")
    refused("no predictions by averaged weights", ["runs/a", "runs/b"], weights="averaged")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(r"the extra comp\[report\]", ["runs/a", "runs/b"], html=tmp_path / "x.html")


def test_command_line(home: Path, capsys: Any) -> None:
    app(["compare", "runs/a", "runs/b", "--weights", "last", "--resamples", "100"], standalone_mode=False)
    assert capsys.readouterr().out == compare(["runs/a", "runs/b"], weights="last", resamples=100)
