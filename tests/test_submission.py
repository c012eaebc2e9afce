"""Submissions: built by id, checked, written with a sidecar, scored."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from comp.config import Task
from comp.metrics import METRICS
from comp.ship.scoring import score_submission
from comp.ship.submission import (
    build_submission,
    build_without_sample,
    read_submission,
    strange_labels,
    validate_submission,
    wants_labels,
    write_submission,
)

REGRESSION = Task(name="t", kind="regression", targets=["target"])
SIX = Task(name="t", kind="regression", targets=["b", "a"])
BINARY = Task(name="t", kind="binary", targets=["target"])
MULTILABEL = Task(name="t", kind="multilabel", targets=["x", "y"])
MULTICLASS = Task(name="t", kind="multiclass", targets=["author"])
ORDINAL = Task(name="t", kind="ordinal", targets=["score"])
AUTHORS = ["EAP", "HPL", "MWS"]


def _sample(**columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"id": ["007", "a,b", "3"], **columns}, dtype=object)


ZEROS = ["0", "0", "0"]
IDS = ["3", "007", "a,b"]  # not the sample's order
ONE = np.array([[0.3], [0.7], [0.2]])


def _build(sample: pd.DataFrame, values: np.ndarray, task: Task, classes: list[str] | None = None) -> pd.DataFrame:
    frame = build_submission(sample, IDS, values, id_column="id", task=task, classes=classes)
    validate_submission(frame, sample, id_column="id", task=task, classes=classes)
    return frame


# --- building --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [REGRESSION, BINARY])
@pytest.mark.parametrize("column", ["target", "prediction"])
def test_single_column_is_filled_by_id_whatever_its_name(task: Task, column: str):
    frame = _build(_sample(**{column: ZEROS}), ONE, task)
    assert list(frame.columns) == ["id", column]
    assert frame["id"].tolist() == ["007", "a,b", "3"]
    assert frame[column].tolist() == [0.7, 0.2, 0.3]


def test_columns_are_filled_by_name_in_the_samples_order():
    sample = _sample(a=ZEROS, b=ZEROS)[["a", "id", "b"]]
    values = np.array([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])  # columns b, a
    frame = _build(sample, values, SIX)
    assert list(frame.columns) == ["a", "id", "b"]
    assert frame["a"].tolist() == [20.0, 30.0, 10.0]
    assert frame["b"].tolist() == [2.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("classes", "cell", "wanted"),
    [
        (["0.0", "1.0", "2.0"], "0", ["0", "1", "2"]),
        (["0", "1", "2"], "0.0", ["0.0", "1.0", "2.0"]),
        (["1", "2", "3"], "0", ["1", "2", "3"]),
        (["1.0", "2.0", "3.0"], "2.0", ["1.0", "2.0", "3.0"]),
        (["0.5", "1.0", "2.0"], "0", ["0.5", "1.0", "2.0"]),
        (["1", "1.0", "2"], "7", ["1", "1.0", "2"]),
    ],
)
def test_labels_that_are_numbers_are_written_as_in_the_sample(classes: list[str], cell: str, wanted: list[str]):
    sample = _sample(label=[cell] * 3)
    frame = _build(sample, np.eye(3), MULTICLASS, classes)
    assert frame["label"].tolist() == [wanted[1], wanted[2], wanted[0]]
    assert strange_labels(sample, id_column="id", task=MULTICLASS, classes=classes) is None


def test_a_sample_without_any_of_the_labels_is_told():
    told = strange_labels(_sample(label=["0"] * 3), id_column="id", task=MULTICLASS, classes=AUTHORS)
    assert told is not None and "column 'label' holds '0', none of the labels 'EAP', 'HPL', 'MWS'" in told
    assert strange_labels(_sample(label=["HPL"] * 3), id_column="id", task=MULTICLASS, classes=AUTHORS) is None
    many = _sample(EAP=["0"] * 3, HPL=["0"] * 3, MWS=["0"] * 3)
    assert strange_labels(many, id_column="id", task=MULTICLASS, classes=AUTHORS) is None


def test_multiclass_as_labels_and_as_probabilities():
    values = np.array([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.2, 0.5, 0.3]])
    labels = _build(_sample(label=["EAP"] * 3), values, MULTICLASS, AUTHORS)
    assert labels["label"].tolist() == ["EAP", "HPL", "MWS"]
    shares = _build(_sample(MWS=ZEROS, EAP=ZEROS, HPL=ZEROS), values, MULTICLASS, AUTHORS)
    assert list(shares.columns) == ["id", "MWS", "EAP", "HPL"]
    assert shares["MWS"].tolist() == [0.1, 0.3, 0.7]
    assert shares["EAP"].tolist() == [0.6, 0.2, 0.1]


def test_ordinal_is_rounded_and_clipped_where_the_sample_is_whole():
    values = np.array([[2.5], [-0.7], [9.2]])
    grades = _build(_sample(score=["1", "2", "3.0"]), values, ORDINAL, ["1", "2", "3"])
    assert grades["score"].tolist() == [1, 3, 3]
    assert _build(_sample(score=ZEROS), values, ORDINAL)["score"].tolist() == [-1, 9, 3]
    numbers = _build(_sample(score=["1", "2", "2.5"]), values, ORDINAL, ["1", "2", "3"])
    assert numbers["score"].tolist() == [-0.7, 9.2, 2.5]


@pytest.mark.parametrize(
    ("task", "metric", "cells", "wanted"),
    [
        (BINARY, "accuracy", ["0", "1", "0"], True),
        (BINARY, "f1", ["0.0", "1.0", "0.0"], True),
        (BINARY, "f1_macro", [], True),
        (BINARY, "accuracy", ["0.5", "0.5", "0.5"], False),
        (BINARY, "accuracy", ["no", "no", "yes"], False),
        (BINARY, "roc_auc", ["0", "1", "0"], False),
        (BINARY, "log_loss", ["0", "0", "0"], False),
        (MULTILABEL, "f1", ["0", "0", "0"], True),
        (MULTILABEL, "roc_auc", ["0", "0", "0"], False),
        (MULTICLASS, "accuracy", ["0", "0", "0"], False),
        (REGRESSION, "rmse", ["0", "0", "0"], False),
    ],
)
def test_labels_are_wanted_where_the_metric_scores_them_and_the_sample_has_them(
    task: Task, metric: str, cells: list[str], wanted: bool
):
    sample = _sample(target=cells or ZEROS) if task is not MULTILABEL else _sample(x=cells, y=cells)
    about: dict[str, Any] = {"id_column": "id", "task": task, "classes": AUTHORS if task is MULTICLASS else None}
    assert wants_labels(sample if cells else sample.iloc[:0], **about, metric=metric) is wanted
    assert wants_labels(None, **about, metric=metric) is (task in (BINARY, MULTILABEL) and METRICS[metric].labels)


def test_labels_for_probabilities(tmp_path: Path):
    values = np.array([[0.5, 0.1], [0.4999, 1.0], [0.0, 0.5]])
    sample, about = _sample(x=ZEROS, y=ZEROS), {"id_column": "id", "task": MULTILABEL, "hard": True}
    frame = build_submission(sample, IDS, values, **about)
    assert frame["id"].tolist() == ["007", "a,b", "3"]
    assert (frame["x"].tolist(), frame["y"].tolist()) == ([0, 0, 1], [1, 1, 0])
    write_submission(tmp_path / "s.csv", frame, {})
    assert (tmp_path / "s.csv").read_text() == 'id,x,y\n007,0,1\n"a,b",0,1\n3,1,0\n'
    validate_submission(read_submission(tmp_path / "s.csv", "id"), sample, **about)
    with pytest.raises(ValueError, match=r"column 'y' must hold labels, 0 and 1, got 0\.3"):
        validate_submission(_frame(x=[0, 1, 1], y=[0, 0.3, 1]), sample, **about)
    with pytest.raises(ValueError, match="column 'y' must hold probabilities between 0 and 1, got 0 to 2"):
        validate_submission(_frame(x=[0, 1, 1], y=[0, 2, 1]), sample, **about)
    alone = build_without_sample(IDS, values[:, :1], id_column="id", task=BINARY, hard=True)
    assert alone["target"].tolist() == [1, 0, 0]


def test_without_a_sample():
    frame = build_without_sample(IDS, ONE, id_column="row", task=REGRESSION)
    assert list(frame.columns) == ["row", "target"]
    assert frame["row"].tolist() == IDS
    assert frame["target"].tolist() == [0.3, 0.7, 0.2]
    values = np.full((3, 3), 1 / 3)
    classes = build_without_sample(IDS, values, id_column="row", task=MULTICLASS, classes=AUTHORS)
    assert list(classes.columns) == ["row", *AUTHORS]
    grades = build_without_sample(IDS, 10 * ONE, id_column="row", task=ORDINAL)
    assert grades["score"].tolist() == [3, 7, 2]
    validate_submission(frame, None, id_column="row", task=REGRESSION)
    validate_submission(classes, None, id_column="row", task=MULTICLASS, classes=AUTHORS)
    with pytest.raises(ValueError, match="the submission must have the columns 'id', 'target', in this order; got"):
        validate_submission(frame, None, id_column="id", task=REGRESSION)
    with pytest.raises(ValueError, match="the submission has 1 ids more than once: '3'"):
        validate_submission(frame.iloc[[0, 0]], None, id_column="row", task=REGRESSION)


@pytest.mark.parametrize(
    ("sample", "task", "classes", "message"),
    [
        (_sample(target=ZEROS).rename(columns={"id": "Id"}), REGRESSION, None, "has no id column 'id', it has 'Id'"),
        (_sample(a=ZEROS, c=ZEROS), SIX, None, "columns 'a', 'c' are not the targets of task 't', 'b', 'a'$"),
        (_sample(a=ZEROS), SIX, None, "columns 'a' are not the targets of task 't'"),
        (_sample(), REGRESSION, None, "columns  are not the targets of task 't', 'target'"),
        (_sample(target=ZEROS, x=ZEROS), BINARY, None, "columns 'target', 'x' are not the targets"),
        (
            _sample(EAP=ZEROS, HPL=ZEROS),
            MULTICLASS,
            AUTHORS,
            "are not the classes of task 't', 'EAP', 'HPL', 'MWS' or a single column of labels",
        ),
    ],
)
def test_sample_that_does_not_fit_the_task(sample: pd.DataFrame, task: Task, classes: Any, message: str):
    width = len(classes or task.targets)
    with pytest.raises(ValueError, match=message):
        build_submission(sample, IDS, np.zeros((3, width)), id_column="id", task=task, classes=classes)


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        (["3", "007"], ONE[:2], "the table of predictions lacks 1 of the 3 ids of the sample submission: 'a,b'"),
        ([*IDS, "x"], np.zeros((4, 1)), "has 1 ids that the sample submission has not: 'x'"),
        (["3", "007", "7"], ONE, "lacks 1 of the 3 ids .*: 'a,b'; and has 1 ids that .* has not: '7'"),
        (["3", "3", "007"], ONE, "the table of predictions has 1 ids more than once: '3'"),
        (IDS, ONE[:2], r"predictions must have shape \(3, 1\), got \(2, 1\)"),
        (IDS, ONE[:, 0], r"predictions must have shape \(3, 1\), got \(3,\)"),
        (IDS, np.zeros((3, 2)), r"predictions must have shape \(3, 1\), got \(3, 2\)"),
        (IDS, np.array([[0.1], [np.nan], [np.inf]]), "predictions of 2 rows are NaN or infinite, ids '007', 'a,b'"),
    ],
)
def test_predictions_that_do_not_fit_the_sample(ids: list[str], values: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        build_submission(_sample(target=ZEROS), ids, values, id_column="id", task=REGRESSION)


def test_sample_with_an_id_twice():
    sample = _sample(target=ZEROS).iloc[[0, 1, 2, 0]]
    with pytest.raises(ValueError, match="the sample submission has 1 ids more than once: '007'"):
        build_submission(sample, IDS, ONE, id_column="id", task=REGRESSION)


# --- checking --------------------------------------------------------------------------------------------------


def _frame(**columns: list[Any]) -> pd.DataFrame:
    return pd.DataFrame({"id": ["007", "a,b", "3"], **columns})


@pytest.mark.parametrize(
    ("frame", "task", "message"),
    [
        (_frame(other=[1, 2, 3]), REGRESSION, "must have the columns 'id', 'target', in this order; got 'id', 'other'"),
        (_frame(target=[1, 2, 3])[["target", "id"]], REGRESSION, "in this order; got 'target', 'id'"),
        (_frame(index=[1, 2, 3], target=[1, 2, 3]), REGRESSION, "got 'id', 'index', 'target'"),
        (_frame(target=[1, 2, 3]).iloc[:2], REGRESSION, "the submission lacks 1 of the 3 ids .*: '3'"),
        (_frame(target=[1, 2, 3]).iloc[[0, 1, 2, 2]], REGRESSION, "the submission has 1 ids more than once: '3'"),
        (_frame(target=[1, 2, 3]).replace("3", "4"), REGRESSION, "has 1 ids that the sample submission has not: '4'"),
        (_frame(target=[1, 2, 3]).iloc[::-1], REGRESSION, "the sample's ids in another order"),
        (_frame(target=[1, np.nan, 3]), REGRESSION, "column 'target' has 1 values that are not finite numbers: 'nan'"),
        (_frame(target=[1, np.inf, -np.inf]), REGRESSION, "has 2 values that are not finite numbers: 'inf', '-inf'"),
        (_frame(target=["1", "", "x"]), REGRESSION, "has 2 values that are not finite numbers: '', 'x'"),
        (_frame(target=[0.5, 1.5, -1]), BINARY, "must hold probabilities between 0 and 1, got -1 to 1.5"),
    ],
)
def test_submission_that_is_refused(frame: pd.DataFrame, task: Task, message: str):
    with pytest.raises(ValueError, match=message):
        validate_submission(frame, _sample(target=ZEROS), id_column="id", task=task)


def test_probabilities_of_columns_and_classes_are_checked():
    good, bad = [0.0, 0.5, 1.0], [0.0, 0.5, 1.01]
    with pytest.raises(ValueError, match=r"column 'y' must hold probabilities between 0 and 1, got 0 to 1\.01"):
        validate_submission(_frame(x=good, y=bad), _sample(x=ZEROS, y=ZEROS), id_column="id", task=MULTILABEL)
    sample = _sample(EAP=ZEROS, HPL=ZEROS, MWS=ZEROS)
    frame = _frame(EAP=good, HPL=good, MWS=bad)
    with pytest.raises(ValueError, match="column 'MWS' must hold probabilities"):
        validate_submission(frame, sample, id_column="id", task=MULTICLASS, classes=AUTHORS)


def test_unknown_label_and_broken_grade():
    with pytest.raises(ValueError, match="column 'author' has unknown labels 'X', ''; allowed: 'EAP', 'HPL', 'MWS'"):
        validate_submission(
            _frame(author=["EAP", "X", ""]),
            _sample(author=["EAP"] * 3),
            id_column="id",
            task=MULTICLASS,
            classes=AUTHORS,
        )
    with pytest.raises(ValueError, match=r"column 'score' must hold whole grades, got 2\.5"):
        validate_submission(_frame(score=[1, 2, 2.5]), _sample(score=ZEROS), id_column="id", task=ORDINAL)


# --- files -----------------------------------------------------------------------------------------------------


def test_written_and_read_back(tmp_path: Path):
    values = np.array([[1 / 3], [np.float32(0.1)], [-1.23456789e-7]])
    frame = _build(_sample(target=ZEROS), values, REGRESSION)
    path = tmp_path / "submissions" / "clear.csv"
    story = write_submission(path, frame, {"runs": ["large"], "folds": [0, 1], "scores": {"pooled": 0.5}})
    assert path.read_bytes().startswith(b"id,target\n007,")
    assert b"\r" not in path.read_bytes()
    back = read_submission(path, "id")
    validate_submission(back, _sample(target=ZEROS), id_column="id", task=REGRESSION)
    assert back["id"].tolist() == ["007", "a,b", "3"]
    assert back["target"].astype("float32").tolist() == frame["target"].astype("float32").tolist()
    told = json.loads(story.read_text())
    assert story == tmp_path / "submissions" / "clear.json"
    assert told.pop("created").endswith("+00:00")
    assert set(told) == {"commit", "runs", "folds", "scores", "rows", "columns", "sha256"}
    assert told["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (told["runs"], told["folds"], told["rows"], told["columns"]) == (["large"], [0, 1], 3, ["id", "target"])
    assert sorted(file.name for file in path.parent.iterdir()) == ["clear.csv", "clear.json"]


def test_submission_must_be_a_csv(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a submission is a CSV file, got '.*demo\.json'; name it demo\.csv"):
        write_submission(tmp_path / "demo.json", _frame(target=[1, 2, 3]), {})


def test_read_keeps_text_as_it_is(tmp_path: Path):
    file = tmp_path / "s.csv"
    file.write_text("﻿id,label\n007,NA\nnull,1\n")
    frame = read_submission(file)
    assert list(frame.columns) == ["id", "label"]
    assert frame.to_numpy().tolist() == [["007", "NA"], ["null", "1"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,t\n1,1\n1,2\n", "has 1 ids more than once: '1'"),
        ("id,t\n,1\n2,2\n", "1 rows have an empty 'id'"),
        ("key,t\n1,1\n", "no column 'id'"),
    ],
)
def test_read_refuses(tmp_path: Path, text: str, message: str):
    file = tmp_path / "s.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_submission(file, "id")
    with pytest.raises(ValueError, match="no such file"):
        read_submission(tmp_path / "none.csv", "id")


# --- scoring ---------------------------------------------------------------------------------------------------


@pytest.fixture
def score(tmp_path: Path):
    def run(guess: str, truth: str, metric: str, **options: Any) -> dict[str, float]:
        for name, text in (("guess.csv", guess), ("truth.csv", truth)):
            (tmp_path / name).write_text(text.replace(" ", "\n") + "\n")
        return score_submission(tmp_path / "guess.csv", tmp_path / "truth.csv", metric, **options)

    return run


def test_score_aligns_by_id_and_splits_by_usage(score: Any):
    truth = "id,Usage,target,text 1,Public,1,x 2,Private,2,x 3,Private,3,x 4,Ignored,0,x"
    found = score("id,target 3,3 2,4 4,99 1,2", truth, "rmse")
    assert found == pytest.approx({"total": np.sqrt(5 / 3), "Public": 1.0, "Private": np.sqrt(2.0)})
    without = score("id,target 3,3 2,4 1,2", truth, "rmse")  # ignored rows need not be answered
    assert without == pytest.approx(found)
    assert list(found) == ["total", "Private", "Public"]


def test_score_without_usage_and_with_an_id_column(score: Any):
    assert score("id,t 1,1 2,3", "id,t 2,3 1,1", "mae") == {"total": 0.0}
    assert score("t,key 1,a 3,b", "key,t b,3 a,2", "mae", id_column="key") == {"total": 0.5}
    both = score("id,a,b 1,0,0 2,0,0", "b,id,a 1,2,3 1,1,3", "mcrmse")
    assert both == {"total": 2.0}


def test_score_labels_as_text(score: Any):
    truth, guess = "id,label 1,cat 2,dog 3,cat 4,bird", "id,label 1,cat 2,cat 3,cat 4,dog"
    assert score(guess, truth, "accuracy") == {"total": 0.5}
    wanted = sk.f1_score(["cat", "dog", "cat", "bird"], ["cat", "cat", "cat", "dog"], average="macro")
    assert score(guess, truth, "f1_macro")["total"] == pytest.approx(wanted)
    assert score("id,y 1,2 2,0", "id,y 1,2.0 2,1", "accuracy") == {"total": 0.5}


def test_score_probabilities_against_labels_and_one_hot(score: Any):
    guess = "id,A,B,C 1,.7,.2,.1 2,.1,.3,.6"
    wanted = -(np.log(0.7) + np.log(0.3)) / 2
    assert score(guess, "id,label 1,A 2,B", "log_loss")["total"] == pytest.approx(wanted)
    assert score(guess, "id,C,B,A 1,0,0,1 2,0,1,0", "log_loss")["total"] == pytest.approx(wanted)
    assert score(guess, "id,label 1,A 2,B", "accuracy") == {"total": 0.5}
    columns = score("id,A,B 1,.7,.2 2,.1,.9", "id,A,B 1,1,1 2,0,1", "log_loss")["total"]
    assert columns == pytest.approx(-np.log([0.7, 0.2, 0.9, 0.9]).mean())


@pytest.mark.parametrize(
    ("guess", "truth", "metric", "message"),
    [
        ("id,t 1,1", "id,t 1,1", "rsme", "unknown metric 'rsme'; did you mean 'rmse'"),
        ("id,t 1,1", "key,t 1,1", "rmse", "truth.csv.*no column 'id'"),
        ("id,t 1,1", "id,t 1,1 2,2", "rmse", "guess.csv lacks 1 of the 2 ids of .*truth.csv: '2'"),
        ("id,t 1,1 2,2", "id,t 1,1", "rmse", "guess.csv has 1 ids that .*truth.csv has not: '2'"),
        ("id,t 1,1 1,2", "id,t 1,1", "rmse", "guess.csv has 1 ids more than once: '1'"),
        ("id,t 1,1", "id,y 1,1", "rmse", "the submission's columns 't' are not in the truth, which has 'y'"),
        ("id,t,u 1,1,1", "id,t 1,1", "rmse", "columns 'u' are not in the truth, which has 't'"),
        ("id 1", "id,t 1,1", "rmse", "the submission has no column besides its ids"),
        ("id,t 1,x", "id,t 1,1", "rmse", "the submission: column 't' has 1 values that are not finite numbers: 'x'"),
        ("id,t 1,1", "id,t 1,x", "rmse", "the truth: column 't' has 1 values that are not finite numbers: 'x'"),
        ("id,t 1,cat 2,", "id,t 1,cat 2,dog", "accuracy", "the submission: column 't' has 1 empty labels"),
        ("id,t 1,0.2", "id,t 1,dog", "accuracy", "none of the submission's labels '0.2' occurs .* which has 'dog'"),
        (
            "id,t 1,1 2,0",
            "id,t,Usage 1,1,Public 2,0,Private",
            "roc_auc",
            "rows whose Usage is 'Private': roc_auc is not defined",
        ),
    ],
)
def test_score_refuses(score: Any, guess: str, truth: str, metric: str, message: str):
    with pytest.raises(ValueError, match=message):
        score(guess, truth, metric)


def test_rewriting_a_committed_submission_still_names_the_clean_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, frame = tmp_path / "s.csv", pd.DataFrame({"id": ["a"], "target": [0.5]})
    write_submission(path, frame, {})
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    write_submission(path, frame, {})
    assert "+changes" not in json.loads(path.with_suffix(".json").read_text())["commit"]
