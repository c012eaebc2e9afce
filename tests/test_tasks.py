"""Several tasks, missing targets, and the losses of readability and essays, from train.csv to the submission."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TinyCompetition

from comp import config_file
from comp.config import Task
from comp.data.batches import Batch
from comp.data.folds import audit, make_folds
from comp.data.tables import Table, encode_targets, read_train, table_of
from comp.metrics import evaluate, evaluate_known
from comp.model.heads import CORALHead, Head, LinearHead, build_head, plan_heads
from comp.runs import RunFolder, read_json
from comp.ship.infer import infer, load
from comp.training import crossval
from comp.training.objective import Objective

SAID: list[str] = []
Setup = Callable[..., Any]


@pytest.fixture
def setup(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Setup:
    """Return `setup(kind, tasks, change, **sections)`: config and competition; `change` edits train.csv's frame."""

    def make(
        kind: str,
        tasks: list[dict[str, Any]],
        change: Callable[[pd.DataFrame], Any] = lambda frame: None,
        **sections: Any,
    ) -> Any:
        competition = tiny_competition(kind)
        frame = pd.read_csv(competition.train, dtype=str, keep_default_na=False)
        change(frame)
        frame.to_csv(competition.train, index=False)
        data = competition.config(tiny_model_folder("bert"), tasks=tasks, evaluation={"every": "50%"}, **sections)
        (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
        return config_file.load("tiny.yaml"), competition

    SAID.clear()
    return make


def run(config: Any, name: str = "tiny", folds: str = "all") -> Any:
    return crossval.run(config, name, folds, say=SAID.append)


FIRST = {"name": "main", "kind": "regression", "targets": ["target"]}


def add_columns(frame: pd.DataFrame) -> None:
    """Auxiliary targets with gaps; `late` has values in the second half of the file only."""
    generator = np.random.default_rng(0)
    value = frame["target"].astype(float)
    gap = generator.random(len(frame)) < 0.4
    frame["noisy"] = [("" if g else f"{v + 0.1:.4f}") for v, g in zip(value, gap, strict=True)]
    frame["mood"] = [("" if g else ("up" if v > 0 else "down")) for v, g in zip(value, np.roll(gap, 7), strict=True)]
    frame["flag"] = [("" if i % 3 == 0 else str(int(v > 0))) for i, v in enumerate(value)]
    frame["other"] = [("" if i % 4 == 0 else str(int(v > 0.2))) for i, v in enumerate(value)]
    frame["grade"] = [("" if i % 5 == 0 else str(2 + (v > 0) + (v > 0.4))) for i, v in enumerate(value)]


AUXILIARY = [
    {"name": "noisy", "kind": "regression", "targets": ["noisy"], "weight": 0.5},
    {"name": "mood", "kind": "multiclass", "targets": ["mood"], "metric": "log_loss"},
    {"name": "flags", "kind": "multilabel", "targets": ["flag", "other"]},
    {"name": "grade", "kind": "ordinal", "targets": ["grade"], "loss": {"name": "ordinal"}},
]


def test_several_tasks_with_missing_targets_train_and_are_all_reported(setup: Setup) -> None:
    config, competition = setup("regression", [FIRST, *AUXILIARY], add_columns)
    scores = run(config)
    folder = RunFolder("runs/tiny")
    frame = pd.read_parquet(folder.oof)
    assert frame["target_noisy_noisy"].isna().sum() > 5
    assert frame.filter(like="pred_").notna().all().all()
    written = read_json(folder.scores)
    assert set(written["tasks"]) == {"main", "noisy", "mood", "flags", "grade"}
    assert written["best"] == written["tasks"]["main"]["best"]
    assert written["metric"] == "rmse"
    assert scores.pooled == written["best"]["pooled"]
    known = frame[frame["target_noisy_noisy"].notna()]
    expected = evaluate("rmse", known[["target_noisy_noisy"]].to_numpy(), known[["pred_noisy_noisy"]].to_numpy())
    assert written["tasks"]["noisy"]["best"]["pooled"] == expected
    assert written["tasks"]["noisy"]["num_rows"] == len(known) < len(frame)
    assert [written["tasks"][name]["metric"] for name in ("mood", "flags", "grade")] == ["log_loss", "log_loss", "qwk"]
    assert list(frame.filter(like="pred_mood_").columns) == ["pred_mood_down", "pred_mood_up"]
    assert frame["pred_grade_grade"].between(2, 4).all()
    said = "\n".join(SAID)
    for title in ("main rmse", "noisy rmse", "mood log_loss", "flags log_loss", "grade qwk"):
        assert title in said
    logged = [json.loads(line) for line in folder.fold(0).metrics.read_text().splitlines()]
    evaluations = [line for line in logged if "valid/score" in line]
    assert all({"valid/noisy", "valid/mood", "valid/flags", "valid/grade"} <= set(line) for line in evaluations)
    # The first task alone is submitted.
    submission = pd.read_csv(infer(["runs/tiny"], say=SAID.append))
    assert list(submission.columns) == ["id", "target"]
    assert list(load("runs/tiny").predict(pd.read_csv(competition.test, dtype=str)).columns) == ["id", "target"]


@pytest.mark.parametrize(("kind", "metric"), [("binary", "pearson"), ("multilabel", "mcrmse")])
def test_targets_between_0_and_1_are_trained_by_cross_entropy_and_scored_as_numbers(
    kind: str, metric: str, setup: Setup
) -> None:
    def shares(frame: pd.DataFrame) -> None:
        frame["target"] = 1 / (1 + np.exp(-3 * frame["target"].astype(float)))
        frame["other"] = 1 - frame["target"] / 2

    names = ["target"] if kind == "binary" else ["target", "other"]
    config, competition = setup("regression", [{**FIRST, "kind": kind, "targets": names}], shares, metric=metric)
    sample = pd.read_csv(competition.sample_submission, dtype=str)
    sample.assign(**dict.fromkeys(names, "0")).to_csv(competition.sample_submission, index=False)
    scores = run(config)
    rows = pd.read_parquet("runs/tiny/oof.parquet")
    targets, preds = (rows[[f"{which}_main_{name}" for name in names]].to_numpy() for which in ("target", "pred"))
    assert scores.pooled == evaluate(metric, targets, preds) and len(np.unique(targets)) > 20
    assert ((preds > 0) & (preds < 1)).all()
    submission = pd.read_csv(infer(["runs/tiny"], say=SAID.append))
    assert ((submission[names] > 0) & (submission[names] < 1)).all(axis=None)


def test_auxiliary_tasks_change_the_first_and_a_task_without_weight_in_a_fold_does_not_break_it(setup: Setup) -> None:
    def late(frame: pd.DataFrame) -> None:
        add_columns(frame)
        frame.loc[1:, "noisy"] = ""  # one target in all: one fold has none to score, the other none to train on

    config, _ = setup("regression", [FIRST, AUXILIARY[0]], late)
    scores = run(config)
    written = read_json(RunFolder("runs/tiny").scores)["tasks"]["noisy"]["best"]
    assert sorted(value is None for value in written["folds"].values()) == [False, True]
    assert any(line.split()[-1] == "-" for line in "\n".join(SAID).splitlines() if line.startswith("fold "))
    assert np.isfinite(scores.pooled)
    single = config.model_copy(update={"tasks": config.tasks[:1]})
    run(single, "single")
    two, one = (pd.read_parquet(f"runs/{name}/oof.parquet")["pred_main_target"] for name in ("tiny", "single"))
    assert not np.allclose(two, one), "the auxiliary task had no effect at all"


def test_a_task_whose_name_starts_with_anothers_is_scored_apart(setup: Setup) -> None:
    def change(frame: pd.DataFrame) -> None:
        frame["x"] = "100"
        frame.loc[::2, "x"] = "101"

    tasks = [{**FIRST, "name": "a"}, {"name": "a_b", "kind": "regression", "targets": ["x"]}]
    config, _ = setup("regression", tasks, change)
    run(config)
    written = read_json(RunFolder("runs/tiny").scores)["tasks"]
    assert written["a"]["best"]["pooled"] < 5
    assert written["a_b"]["best"]["pooled"] > 50


@pytest.mark.parametrize(
    "loss",
    [
        {"name": "rmse"},
        {"name": "pearson"},
        {"name": "pairwise_rank", "sigma": 2.0},
        {"name": "gaussian_nll", "standard_error": "se", "floor": 0.2},
    ],
    ids=lambda loss: loss["name"],
)
def test_losses_of_regression_train(loss: dict[str, Any], setup: Setup) -> None:
    def change(frame: pd.DataFrame) -> None:
        frame["se"] = [f"{0.1 + 0.01 * i:.2f}" for i in range(len(frame))]

    config, _ = setup("regression", [{**FIRST, "loss": loss}], change)
    run(config, folds="0")
    logged = [json.loads(line) for line in RunFolder("runs/tiny").fold(0).metrics.read_text().splitlines()]
    assert all(np.isfinite(line["train/loss"]) for line in logged if "train/loss" in line)
    infer(["runs/tiny"], say=SAID.append)


def test_ordinal_loss_submits_grades(setup: Setup) -> None:
    config, _ = setup(
        "ordinal", [{"name": "main", "kind": "ordinal", "targets": ["target"], "loss": {"name": "ordinal"}}]
    )
    run(config)
    frame = pd.read_parquet("runs/tiny/oof.parquet")
    assert frame["pred_main_target"].between(1, 4).all()
    submission = pd.read_csv(infer(["runs/tiny"], say=SAID.append))
    assert submission["target"].isin([1, 2, 3, 4]).all()
    again = load("runs/tiny", folds=[0]).predict(pd.read_csv("tiny-ordinal/train.csv", dtype=str)).set_index("id")
    rows = frame[frame["fold"] == 0]
    assert np.allclose(again.loc[rows["id"], "target"], rows["pred_main_target"], atol=1e-6)


def soften(frame: pd.DataFrame) -> None:
    """One column of probabilities per topic instead of a label."""
    for topic in ("sea", "town", "wood"):
        frame[topic] = [f"{0.8 if label == topic else 0.1}" for label in frame["target"]]


SOFT = {"name": "main", "kind": "multiclass", "targets": ["sea", "town", "wood"]}


def test_soft_labels_of_several_classes(setup: Setup) -> None:
    config, competition = setup(
        "multiclass", [SOFT], soften, metric="log_loss", folds={"splitter": "stratified", "num_folds": 2}
    )
    sample = pd.DataFrame({"id": pd.read_csv(competition.test, dtype=str)["id"], "sea": 0.3, "town": 0.3, "wood": 0.4})
    sample.to_csv(competition.sample_submission, index=False)
    scores = run(config)
    frame = pd.read_parquet("runs/tiny/oof.parquet")
    targets, preds = frame.filter(like="target_main_").to_numpy(), frame.filter(like="pred_main_").to_numpy()
    assert targets.shape == preds.shape == (60, 3)
    assert scores.pooled == pytest.approx(-(targets * np.log(preds)).sum(1).mean(), rel=1e-6)
    submission = pd.read_csv(infer(["runs/tiny"], say=SAID.append))
    assert list(submission.columns) == ["id", "sea", "town", "wood"]
    assert np.allclose(submission[["sea", "town", "wood"]].sum(axis=1), 1, atol=1e-5)
    table = read_train(config.competition, config.tasks)
    assert table.classes == {"main": ["sea", "town", "wood"]}
    hard = table.hard_targets(config.tasks[0])
    shares = [np.bincount(hard[make_folds(table, config.tasks, config.folds) == k, 0].astype(int)) for k in (0, 1)]
    assert np.abs(shares[0] - shares[1]).max() <= 1, "folds are stratified by the likeliest class"
    assert "main=sea" in audit(make_folds(table, config.tasks, config.folds), table, config.tasks[0], group=None)[0]


def test_class_weights_are_counted_on_the_training_rows_alone(setup: Setup) -> None:
    loss = {"name": "cross_entropy", "class_weights": "balanced"}
    config, _ = setup("multiclass", [{"name": "main", "kind": "multiclass", "targets": ["target"], "loss": loss}])
    table = read_train(config.competition, config.tasks)
    labels = table.targets["main"][:, 0].astype(int)
    rows = np.arange(20)
    found = Objective(config.tasks, table, rows).losses["main"].class_weights
    counts = np.bincount(labels[rows], minlength=3)
    assert np.allclose(found.numpy(), 20 / (3 * counts))
    table.targets["main"][20:] = 0  # rows of the held-out fold
    assert torch.equal(Objective(config.tasks, table, rows).losses["main"].class_weights, found)
    run(config, folds="0")


def test_branches_add_up_in_the_loss(setup: Setup) -> None:
    config, _ = setup("regression", [FIRST])
    table = read_train(config.competition, config.tasks)
    objective = Objective(config.tasks, table, np.arange(10))
    rows = np.arange(4)
    batch = Batch(
        rows, torch.zeros(4, 1), torch.ones(4, 1), 4, targets={"main": torch.from_numpy(table.targets["main"][rows])}
    )
    outputs = torch.randn(3, 4, 1, generator=torch.Generator().manual_seed(0))
    items = objective.count(rows)
    total = objective.share({"main": outputs}, batch, items)
    alone = [objective.share({"main": branch}, batch, items) for branch in outputs]
    torch.testing.assert_close(total, sum(alone))


# --- heads -----------------------------------------------------------------------------------------------------------


def test_heads_by_task() -> None:
    tasks = [
        Task(name="a", kind="ordinal", targets=["x"], loss={"name": "ordinal"}),
        Task(name="b", kind="ordinal", targets=["x"]),
        Task(name="c", kind="multiclass", targets=["y"]),
        Task(name="d", kind="multiclass", targets=["p", "q", "r", "s"]),
    ]
    planned = plan_heads(
        tasks, {"a": ["1", "2", "3"], "b": ["1", "2", "3"], "c": ["u", "v", "w", "x", "y"], "d": list("pqrs")}
    )
    assert planned == {"a": Head(2, coral=True), "b": Head(1), "c": Head(5), "d": Head(4)}


def test_coral_head_has_one_direction_and_falling_thresholds() -> None:
    head = build_head(Head(4, coral=True), 6, 0.02)
    assert isinstance(head, CORALHead)
    assert head.bias.tolist() == [1.0, 0.75, 0.5, 0.25]
    found = head(torch.randn(2, 3, 6))
    assert found.shape == (2, 3, 4)
    assert (found.diff(dim=-1) < 0).all(), "the probability of being above a grade falls with the grade"
    torch.testing.assert_close(found[..., 0] - found[..., 3], torch.full((2, 3), 0.75))
    assert isinstance(build_head(2, 6, 0.02), LinearHead)


# --- metrics of what is soft or missing ------------------------------------------------------------------------------


def test_metrics_of_soft_classes() -> None:
    targets = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    preds = np.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3]])
    expected = -(targets * np.log(preds)).sum(1).mean()
    assert evaluate("log_loss", targets, preds, "multiclass") == pytest.approx(expected)
    assert evaluate("accuracy", targets, preds, "multiclass") == 0.5
    assert evaluate("log_loss", targets, preds, "multilabel") != pytest.approx(expected)


def test_missing_targets_are_left_out_of_a_metric_that_is_none_without_any() -> None:
    targets, preds = np.array([[1.0], [np.nan], [3.0]]), np.array([[1.0], [9.0], [5.0]])
    assert evaluate_known("rmse", targets, preds) == pytest.approx(2**0.5)
    assert evaluate_known("rmse", targets[1:2], preds[1:2]) is None


# --- tables ----------------------------------------------------------------------------------------------------------


def table_with(
    setup: Setup, tasks: list[dict[str, Any]], change: Callable[[pd.DataFrame], Any], kind: str = "regression"
) -> Table:
    config, _ = setup(kind, tasks, change)
    return read_train(config.competition, config.tasks)


def test_gaps_are_nan_in_auxiliary_targets(setup: Setup) -> None:
    table = table_with(setup, [FIRST, *AUXILIARY], add_columns)
    empty = table.frame["flag"].eq("").to_numpy()
    assert np.array_equal(np.isnan(table.targets["flags"][:, 0]), empty)
    assert np.isfinite(table.targets["flags"][:, 1][empty]).any(), "the other column of the row stays"
    assert table.classes["mood"] == ["down", "up"]
    assert table.classes["grade"] == ["2", "3", "4"]
    assert np.isfinite(table.targets["main"]).all()


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [
        (
            {"name": "x", "kind": "regression", "targets": ["x"]},
            [""] * 60,
            "column 'x' of task 'x' is empty in every row; fill it in or drop the task",
        ),
        ({"name": "x", "kind": "regression", "targets": ["x"]}, ["", "high"] * 30, "column 'x' is not a number"),
        ({"name": "x", "kind": "binary", "targets": ["x"]}, ["", "2"] * 30, "column 'x' is outside 0..1"),
    ],
)
def test_what_is_wrong_with_an_auxiliary_target_is_said(
    task: dict[str, Any], cells: list[str], message: str, setup: Setup
) -> None:
    with pytest.raises(ValueError, match=message):
        table_with(setup, [FIRST, task], lambda frame: frame.__setitem__("x", cells))


def test_the_first_task_has_no_gaps(setup: Setup) -> None:
    with pytest.raises(ValueError, match=r"column 'target' is empty \(NaN\)"):
        table_with(setup, [FIRST], lambda frame: frame.__setitem__("target", ["", *frame["target"][1:]]))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (None, "no column 'se'.*standard error of task 'main'"),
        ([""] * 60, "column 'se' is empty"),
        (["-1"] * 60, "column 'se' is negative.*standard errors are >= 0"),
    ],
)
def test_standard_errors_are_checked(cells: list[str] | None, message: str, setup: Setup) -> None:
    tasks = [{**FIRST, "loss": {"name": "gaussian_nll", "standard_error": "se"}}]
    with pytest.raises(ValueError, match=message):
        table_with(setup, tasks, lambda frame: frame.__setitem__("se", cells) if cells else None)
    table = table_with(setup, tasks, lambda frame: frame.__setitem__("se", ["0.5"] * 60))
    assert table.errors["main"].tolist() == [0.5] * 60


def test_soft_labels_must_sum_to_one(setup: Setup) -> None:
    def change(frame: pd.DataFrame) -> None:
        soften(frame)
        frame.loc[3, "sea"] = "0.9"

    with pytest.raises(ValueError, match=r"columns 'sea', 'town', 'wood' do not sum to 1.*t003.*divide each row"):
        table_with(setup, [SOFT], change, "multiclass")


def test_encode_targets_reads_soft_labels() -> None:
    frame = pd.DataFrame({"a": ["0.25", "1"], "b": ["0.75", "0"]})
    values, labels = encode_targets(frame, Task(name="t", kind="multiclass", targets=["a", "b"]), None, "frame")
    assert values.tolist() == [[0.25, 0.75], [1.0, 0.0]]
    assert labels == ["a", "b"]


def test_a_frame_without_targets_needs_none(setup: Setup) -> None:
    config, competition = setup("regression", [FIRST, *AUXILIARY], add_columns)
    table = table_of(pd.read_csv(competition.test, dtype=str), config.competition)
    assert table.targets == table.errors == {}


# --- refused in the config -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "sections", "message"),
    [
        (
            [{**FIRST, "metric": "mae"}],
            {},
            "the first task 'main' has a metric of its own; set `metric` of the config instead",
        ),
        ([FIRST, {**AUXILIARY[0], "metric": "qwk"}], {}, "metric 'qwk' does not fit kind 'regression'; allowed: rmse"),
        ([FIRST, {**AUXILIARY[0], "metric": "nonsense"}], {}, "metric 'nonsense' does not fit"),
        (
            [{**FIRST, "loss": {"name": "pearson"}}],
            {"training": {"batch_size": 8, "micro_batch_size": 4}},
            "the loss of task 'main' compares the rows of a whole batch, which micro-batches of 4 would change",
        ),
        (
            [
                {
                    "name": "main",
                    "kind": "regression",
                    "targets": ["a", "b"],
                    "loss": {"name": "gaussian_nll", "standard_error": "se"},
                }
            ],
            {},
            "'gaussian_nll' has one standard error a row, so one target",
        ),
        ([{**FIRST, "loss": {"name": "gaussian_nll"}}], {}, "standard_error.*is missing"),
        ([{**FIRST, "loss": {"name": "ordinal"}}], {}, "loss 'ordinal' does not fit kind 'regression'"),
    ],
)
def test_what_does_not_fit_is_refused(
    tasks: list[dict[str, Any]], sections: dict[str, Any], message: str, setup: Setup
) -> None:
    with pytest.raises(ValueError, match=message):
        setup("regression", tasks, **sections)
