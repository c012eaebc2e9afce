"""Blends: known optima, honest scores, refusals, and the way to a submission."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TinyCompetition
from sklearn import metrics as sk
from typer.testing import CliRunner

from comp import config_file, load
from comp.blend.calibration import CALIBRATORS, apply_calibration, fit_calibration
from comp.blend.crossfit import Recipe, cross_fit, examine, read_blend
from comp.blend.ensemble import BLENDERS, Problem, apply_blend, fit_blend
from comp.blend.members import gather
from comp.cli import app
from comp.training import crossval

FITTED = [name for name, row in BLENDERS.items() if row.fitted]


def regression(runs: int = 4, rows: int = 300, columns: int = 1, seed: int = 0) -> Problem:
    """Runs of falling quality whose errors are half shared."""
    draw = np.random.default_rng(seed)
    targets = draw.normal(size=(rows, columns))
    shared = draw.normal(size=(rows, columns))
    preds = np.stack(
        [targets + 0.3 * shared + (0.3 + 0.2 * run) * draw.normal(size=targets.shape) for run in range(runs)]
    )
    return Problem(preds, targets, "regression", "rmse")


def classes(kind: str, metric: str, rows: int = 400, seed: int = 0) -> Problem:
    draw = np.random.default_rng(seed)
    if kind == "multiclass":
        targets = draw.integers(0, 3, size=(rows, 1)).astype(float)
        logits = 1.5 * (targets == np.arange(3)) + draw.normal(size=(4, rows, 3)) * np.arange(1, 5)[:, None, None] / 2
        preds = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return Problem(preds, targets, kind, metric)
    columns = 1 if kind == "binary" else 3
    targets = (draw.random((rows, columns)) < 0.3).astype(float)
    logits = 2 * (targets - 0.5) + draw.normal(size=(4, rows, columns)) * np.arange(1, 5)[:, None, None] / 2
    return Problem(1 / (1 + np.exp(-logits)), targets, kind, metric)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "regression": regression,
    "columns": lambda: regression(columns=3),
    "ordinal": lambda: Problem((p := regression()).preds * 2, np.round(p.targets * 2), "ordinal", "qwk"),
    "binary": lambda: classes("binary", "log_loss"),
    "multilabel": lambda: classes("multilabel", "roc_auc"),
    "multiclass": lambda: classes("multiclass", "log_loss"),
    "accuracy": lambda: classes("multiclass", "accuracy"),
}
FITTING = [
    (method, name)
    for method, row in BLENDERS.items()
    for name, make in PROBLEMS.items()
    if (problem := make()).kind in row.kinds and problem.metric in row.metrics
]
FOLD = np.arange(400) % 5


# --- each method -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "name"), FITTING)
def test_every_method_on_every_kind(method: str, name: str) -> None:
    """Better than the worst run, JSON in between, the same for the runs and rows in another order."""
    problem = PROBLEMS[name]()
    parameters = json.loads(json.dumps(fit_blend(method, problem)))
    found = apply_blend(method, parameters, problem, problem.preds)
    assert found.shape == problem.preds.shape[1:] and np.isfinite(found).all()
    if problem.kind == "multiclass":
        assert np.allclose(found.sum(1), 1)
    elif problem.kind in ("binary", "multilabel"):
        assert found.min() >= 0 and found.max() <= 1
    if not (method == "slsqp" and problem.metric in ("accuracy", "qwk")) and method != "stack":
        assert problem.loss(found) < max(problem.loss(one) for one in problem.preds)
    order = [2, 0, 3, 1]
    turned = problem.runs(order)
    again = apply_blend(method, fit_blend(method, turned), turned, turned.preds)
    if method not in ("nelder_mead", "slsqp"):  # a search ends near its optimum, not on it
        assert np.allclose(found, again, atol=1e-6)
    else:
        assert problem.loss(again) == pytest.approx(problem.loss(found), abs=0.02 * abs(problem.loss(found)))
    rows = np.random.default_rng(5).permutation(problem.preds.shape[1])
    shuffled = apply_blend(method, parameters, problem, problem.preds[:, rows])
    assert np.allclose(shuffled, found[rows], atol=1e-9)


@pytest.mark.parametrize("method", ["nelder_mead", "slsqp"])
@pytest.mark.parametrize("simplex", [True, False])
def test_searches_find_the_least_squares_weights(method: str, simplex: bool) -> None:
    """Without bounds against the normal equations, on the simplex against a fine grid."""
    problem = regression(runs=2 if simplex else 3)
    weights = np.array(fit_blend(method, problem, {"simplex": simplex})["weights"])[:, 0]
    if simplex:
        shares = np.linspace(0, 1, 20_001)
        losses = [problem.loss(share * problem.preds[0] + (1 - share) * problem.preds[1]) for share in shares[::20]]
        best = shares[::20][int(np.argmin(losses))]
        assert weights == pytest.approx([best, 1 - best], abs=2e-3)
    else:
        expected = np.linalg.lstsq(problem.preds[:, :, 0].T, problem.targets[:, 0], rcond=None)[0]
        assert weights == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("method", ["hill_climb", "nelder_mead", "slsqp"])
def test_simplex_weights_are_never_worse_than_the_best_run(method: str) -> None:
    for seed in range(5):
        problem = regression(seed=seed)
        weights = np.array(fit_blend(method, problem)["weights"])
        assert weights.min() >= 0 and np.allclose(weights.sum(0), 1)
        found = apply_blend(method, {"weights": weights}, problem, problem.preds)
        assert problem.loss(found) <= min(problem.loss(one) for one in problem.preds) + 1e-12


def test_weights_per_column() -> None:
    problem = regression(runs=2, columns=2)
    preds = problem.preds.copy()
    preds[0, :, 0], preds[1, :, 1] = problem.targets[:, 0], problem.targets[:, 1]
    problem = Problem(preds, problem.targets, "regression", "mcrmse")
    for method in ("nelder_mead", "slsqp"):
        assert np.array(fit_blend(method, problem, {"per_column": True})["weights"]) == pytest.approx(
            np.eye(2), abs=1e-2
        )
    with pytest.raises(ValueError, match="probabilities of a multiclass task belong together"):
        fit_blend("slsqp", classes("multiclass", "log_loss"), {"per_column": True})


def test_hill_climbing_by_hand() -> None:
    """Target 0: runs at +1, -1 and +3. First +1 (tie with -1, the first wins), then -1: exact, and nothing better."""
    preds = np.array([[[1.0]], [[-1.0]], [[3.0]]]).repeat(2, axis=1)
    problem = Problem(preds, np.zeros((2, 1)), "regression", "rmse")
    assert fit_blend("hill_climb", problem)["weights"] == [[0.5], [0.5], [0.0]]
    # equal runs: one that is in already wins, so the weight is not spread
    same = Problem(preds[[0, 0, 0]], np.zeros((2, 1)), "regression", "rmse")
    assert fit_blend("hill_climb", same)["weights"] == [[1.0], [0.0], [0.0]]


def test_rank_and_geometric_means_by_hand() -> None:
    preds = np.array([[[0.1], [0.2], [0.9]], [[0.3], [0.1], [0.1]]])
    problem = Problem(preds, np.array([[0.0], [0.0], [1.0]]), "binary", "roc_auc")
    ranks = apply_blend("rank_mean", {}, problem, preds)[:, 0]
    assert ranks == pytest.approx([(1 + 3) / 6, (2 + 1.5) / 6, (3 + 1.5) / 6])
    odds = np.sqrt(preds[0] * preds[1]), np.sqrt((1 - preds[0]) * (1 - preds[1]))
    found = apply_blend("geometric_mean", {}, problem, preds)
    assert found == pytest.approx(odds[0] / (odds[0] + odds[1]))
    with pytest.raises(ValueError, match="'rank_mean' does not fit metric 'rmse'; it fits roc_auc, spearman"):
        fit_blend("rank_mean", regression())
    with pytest.raises(ValueError, match="'geometric_mean' does not fit kind 'regression'"):
        fit_blend("geometric_mean", regression())


def test_stack_takes_any_estimator_and_no_other_class() -> None:
    problem = classes("multiclass", "log_loss")
    forest = {"estimator": "sklearn.ensemble.RandomForestClassifier", "n_estimators": 20}
    found = [apply_blend("stack", fit_blend("stack", problem, forest), problem, problem.preds) for _ in range(2)]
    assert np.array_equal(*found) and np.allclose(found[0].sum(1), 1)
    for options, message in (
        ({"estimator": "os.system"}, "must be a class of scikit-learn"),
        ({"estimator": "sklearn.linear_model.Nothing"}, "has no attribute 'Nothing'"),
        ({"alfa": 1}, "unexpected keyword argument 'alfa'"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_blend("stack", problem, options)
    with pytest.raises(ValueError, match="blend method 'hill_climb': .*unexpected keyword.*`comp list blenders`"):
        fit_blend("hill_climb", problem, {"mots": 3})


# --- honest scores ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", FITTED)
def test_what_is_fitted_never_sees_the_fold_it_is_scored_on(method: str) -> None:
    """Other targets in fold 2 change nothing of what is predicted there."""
    problem = regression(rows=400)
    first = cross_fit(problem, FOLD, Recipe(method))
    targets = problem.targets.copy()
    targets[FOLD == 2] = np.random.default_rng(9).normal(size=((FOLD == 2).sum(), 1))
    second = cross_fit(Problem(problem.preds, targets, "regression", "rmse"), FOLD, Recipe(method))
    assert np.array_equal(first[FOLD == 2], second[FOLD == 2])
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", [name for name in CALIBRATORS if name != "none"])
def test_calibration_never_sees_the_fold_it_is_scored_on(name: str) -> None:
    """A mean fits nothing, so whatever changes is the calibration's: outside fold 2, and not in it."""
    metrics = {"grade_thresholds": "qwk", "thresholds": "f1_macro", "isotonic": "log_loss", "temperature": "log_loss"}
    problem = PROBLEMS["ordinal"]() if name == "grade_thresholds" else classes("binary", metrics[name])
    fold = FOLD[: len(problem.targets)]
    recipe = Recipe("mean", None, name)
    assert recipe.fitted
    first = cross_fit(problem, fold, recipe)
    targets = problem.targets.copy()
    targets[fold == 2] = np.random.default_rng(9).permutation(targets[fold == 2])[::-1]
    targets[fold == 2] = targets[fold == 2].max() - targets[fold == 2]
    second = cross_fit(Problem(problem.preds, targets, problem.kind, problem.metric), fold, recipe)
    assert np.array_equal(first[fold == 2], second[fold == 2])
    assert not np.array_equal(first, second)
    _, report = examine(Stub(problem, fold), recipe)
    assert report.crossfit == pytest.approx(problem.score(first)) and report.gap is not None


@pytest.mark.parametrize("method", FITTED)
def test_noise_is_not_believed(method: str) -> None:
    """Twenty runs of noise: fitted weights find something in it, cross-fitted ones must not."""
    draw = np.random.default_rng(3)
    problem = Problem(draw.normal(size=(20, 60, 1)), draw.normal(size=(60, 1)), "regression", "rmse")
    recipe = Recipe(method, {"alpha": 1e-3} if method == "stack" else {})
    parameters = recipe.fit(problem)
    fitted = problem.score(recipe.apply(parameters, problem, problem.preds))
    honest = problem.score(cross_fit(problem, np.arange(60) % 5, recipe))
    assert honest > fitted


def test_the_report_by_hand() -> None:
    problem = regression(runs=3, rows=200)
    members = Stub(problem, np.arange(200) % 4)
    parameters, report = examine(members, Recipe("mean"))
    errors = problem.preds - problem.targets
    assert report.fitted == pytest.approx(np.sqrt((errors.mean(0) ** 2).mean()))
    assert report.crossfit == pytest.approx(report.fitted), "a mean fits nothing"
    assert report.gap == pytest.approx(0)
    assert report.single == pytest.approx([np.sqrt((one**2).mean()) for one in errors])
    assert report.without[1] == pytest.approx(np.sqrt((errors[[0, 2]].mean(0) ** 2).mean()))
    assert report.correlation == pytest.approx(np.corrcoef(errors[:, :, 0]))
    assert report.folds[2] == pytest.approx(np.sqrt((errors.mean(0)[np.arange(200) % 4 == 2] ** 2).mean()))
    assert report.weights == pytest.approx([1 / 3] * 3)
    text = report.table()
    assert "cross-fitted" in text and "flatters by" in text and "run2" in text
    one, alone = examine(Stub(problem.runs([0]), np.zeros(200, int)), Recipe("slsqp"))
    assert (alone.crossfit, alone.without, one["blend"]["weights"]) == (None, [None], [[1.0]])
    assert alone.table()


class Stub:
    def __init__(self, problem: Problem, fold: np.ndarray) -> None:
        self.problem, self.fold = problem, fold
        self.names = [f"run{number}" for number in range(len(problem.preds))]


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("case", PROBLEMS)
def test_calibrators_help_on_their_rows_and_keep_the_kind(name: str, case: str) -> None:
    problem = PROBLEMS[case]()
    if problem.kind not in CALIBRATORS[name].kinds:
        with pytest.raises(ValueError, match=f"calibration '{name}' does not fit kind '{problem.kind}'"):
            fit_calibration(name, problem, problem.preds[3])
        return
    values = problem.preds[3]  # the worst calibrated
    parameters = json.loads(json.dumps(fit_calibration(name, problem, values)))
    found = apply_calibration(name, parameters, values)
    assert found.shape == values.shape and np.isfinite(found).all()
    if problem.kind == "multiclass":
        assert np.allclose(found.sum(1), 1)
    if name == "none":
        assert np.array_equal(found, values)
    elif problem.metric in ("log_loss", "qwk", "rmse"):
        assert problem.loss(found) < problem.loss(values)
    far = apply_calibration(name, parameters, np.clip(values * 3, 0, 1) if problem.kind != "regression" else values * 9)
    assert np.isfinite(far).all()


def test_thresholds_bend_around_one_half_and_keep_the_order() -> None:
    problem = Problem(np.zeros((1, 6, 1)), np.array([[0.0], [0], [1], [1], [1], [0]]), "binary", "f1_macro")
    values = np.array([[0.05], [0.1], [0.2], [0.25], [0.3], [0.15]])
    found = apply_calibration("thresholds", fit_calibration("thresholds", problem, values), values)
    assert problem.score(values) < problem.score(found) == 1.0
    assert (np.argsort(found[:, 0]) == np.argsort(values[:, 0])).all()


def skewed_labels(metric: str) -> Problem:
    """Three labels, a rare one and a frequent one, whose best thresholds for F1 are far below 0.5; one run."""
    draw = np.random.default_rng(1)
    shares = np.array([0.06, 0.5, 0.75])
    targets = (draw.random((400, 3)) < shares).astype(float)
    logits = draw.normal(size=(400, 3)) + 1.5 * targets + np.log(shares / (1 - shares))
    return Problem(1 / (1 + np.exp(-logits))[None], targets, "multilabel", metric)


def test_thresholds_of_labels_are_best_by_the_metric_of_all_columns() -> None:
    """Macro F1 of labels is the mean of each label's F1 of class 1, not of both its classes."""
    problem = skewed_labels("f1_macro")
    values = problem.preds[0]
    chosen = fit_calibration("thresholds", problem, values)["thresholds"]
    best = [
        max(sk.f1_score(truth, column >= border) for border in np.unique(np.quantile(column, np.linspace(0, 1, 2000))))
        for truth, column in zip(problem.targets.T, values.T, strict=True)
    ]
    found = problem.score(apply_calibration("thresholds", {"thresholds": chosen}, values))
    assert found == pytest.approx(np.mean(best), abs=0.01)
    assert found > problem.score(values) + 0.05


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_thresholds_that_a_metric_ties_together_leave_no_better_neighbour(metric: str) -> None:
    problem = skewed_labels(metric)
    values = problem.preds[0]
    chosen = fit_calibration("thresholds", problem, values)["thresholds"]

    def score(borders: list[float]) -> float:
        return problem.score(apply_calibration("thresholds", {"thresholds": borders}, values))

    found = score(chosen)
    assert found > score([0.5] * 3)
    for place in range(3):
        for border in np.linspace(0.05, 0.95, 19):
            assert score([*chosen[:place], float(border), *chosen[place + 1 :]]) <= found + 0.005


def test_weights_per_column_of_macro_f1_are_those_of_each_columns_f1() -> None:
    problem = skewed_labels("f1_macro")
    assert (problem.column(0).metric, problem.column(0).targets.shape) == ("f1", (400, 1))
    scores = [problem.column(place).score(problem.preds[0][:, place : place + 1]) for place in range(3)]
    assert np.mean(scores) == pytest.approx(problem.score(problem.preds[0]))
    assert classes("binary", "f1_macro").column(0).metric == "f1_macro"


def test_temperature_of_an_overconfident_run_is_the_one_that_made_it() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20_000, 1))
    targets = (draw.random((20_000, 1)) < 1 / (1 + np.exp(-logits))).astype(float)
    problem = Problem(np.zeros((1, 20_000, 1)), targets, "binary", "log_loss")
    found = fit_calibration("temperature", problem, 1 / (1 + np.exp(-4 * logits)))
    assert found["temperature"] == pytest.approx(4, rel=0.1)


# --- runs, blend.json, submission ------------------------------------------------------------------------------------


@pytest.fixture
def trained(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Callable[..., TinyCompetition]:
    """Train three runs of two folds: a, b with another pooler, c with another seed."""

    def make(kind: str = "regression") -> TinyCompetition:
        competition = tiny_competition(kind)
        data = competition.config(
            tiny_model_folder("bert"), optimizer={"lr": 1e-3}, stability={"averaging": {"name": "ema"}}
        )
        (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
        for name, overrides in (("a", []), ("b", ["model.pooler.name=max"]), ("c", ["training.seed=5"])):
            crossval.run(config_file.load("tiny.yaml", overrides), name, save_every="never", say=lambda line: None)
        return competition

    return make


def command(*words: str) -> str:
    found = CliRunner().invoke(app, list(words))
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.output


RUNS = ("--run", "runs/a", "--run", "runs/b", "--run", "runs/c")


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass", "multilabel", "ordinal"])
def test_from_runs_to_a_submission(kind: str, trained: Callable[..., TinyCompetition]) -> None:
    competition = trained(kind)
    listed = command("oof")
    assert listed.count("2/2") == 3
    said = command("blend", *RUNS, "--method", "nelder_mead", "--name", "three", "--weights", "averaged")
    assert "wrote blends/three/blend.json; next: comp infer --blend blends/three" in said
    assert "cross-fitted" in said
    blend = read_blend("blends/three")
    weights = np.array(blend.parameters["blend"]["weights"])
    said = command("infer", "--blend", "blends/three")
    assert "wrote submissions/three.csv" in said
    test = pd.read_csv(competition.test, dtype=str)
    preds = [load(run, weights="averaged").predict(test).iloc[:, 1:].to_numpy() for run in blend.runs]
    expected = np.einsum("rnk,rk->nk", np.stack(preds), weights)
    assert np.allclose(blend.apply(np.stack(preds)), expected, atol=1e-6)
    sidecar = json.loads(next(Path("submissions").glob("three*.json")).read_text())
    assert sidecar["blend"]["method"] == "nelder_mead" and sidecar["weights"] == "averaged"
    if kind == "regression":
        found = pd.read_csv("submissions/three.csv", dtype={"id": str}).set_index("id").loc[test["id"], "target"]
        assert found.to_numpy() == pytest.approx(expected[:, 0], abs=1e-5)


def test_each_run_can_have_weights_of_its_own(trained: Callable[..., TinyCompetition]) -> None:
    test = pd.read_csv(trained("regression").test, dtype=str)
    command("blend", *RUNS, "--method", "ridge", "--name", "mixed", "--weights", "last,averaged,best")
    blend = read_blend("blends/mixed")
    assert blend.weights == "last,averaged,best"
    rows = pd.read_parquet("blends/mixed/rows.parquet").set_index("id")
    oof = pd.read_parquet("runs/b/oof.parquet").set_index("id")
    assert np.array_equal(rows["run1_0"], oof.loc[rows.index, "averaged_main_target"])
    command("infer", "--blend", "blends/mixed", "--precision", "fp32")
    each = zip(blend.runs, ("last", "averaged", "best"), strict=True)
    preds = [load(run, weights=own, precision="fp32").predict(test).iloc[:, 1:].to_numpy() for run, own in each]
    found = pd.read_csv("submissions/mixed.csv", dtype={"id": str}).set_index("id").loc[test["id"], "target"]
    assert found.to_numpy() == pytest.approx(blend.apply(np.stack(preds))[:, 0], abs=1e-5)
    command("infer", *RUNS, "--precision", "fp32", "--weights", "last,averaged,best", "--out", "mean.csv")
    found = pd.read_csv("mean.csv", dtype={"id": str}).set_index("id").loc[test["id"], "target"]
    assert found.to_numpy() == pytest.approx(np.mean(preds, axis=0)[:, 0], abs=1e-5)
    for weights, words in (("best,last", "are 2 for 3 runs"), ("best,worst,last", "weights 'worst': allowed are")):
        with pytest.raises(ValueError, match=words):
            gather(["runs/a", "runs/b", "runs/c"], weights=weights)


def test_rows_stack_calibration_and_fewer_rows(trained: Callable[..., TinyCompetition]) -> None:
    competition = trained()
    said = command(
        "blend", *RUNS, "--method", "stack", "--option", "estimator=sklearn.svm.SVR", "--option", "C=0.3",
        "--calibration", "isotonic", "--rows", "target > 0",
    )  # fmt: skip
    assert "rows are left out" in said
    blend = read_blend("blends/blend/blend.json")
    assert blend.recipe.options == {"estimator": "sklearn.svm.SVR", "C": 0.3}
    assert (blend.problem.targets > 0).all() and blend.problem.preds.shape[0] == 3
    assert "wrote submissions/blend.csv" in command("infer", "--blend", "blends/blend")
    with pytest.raises(ValueError, match="--rows 'nothing > 1': .* columns are id, text, target"):
        gather(["runs/a"], rows="nothing > 1")
    with pytest.raises(ValueError, match="no rows in common that fit --rows 'target > 1e9'"):
        gather(["runs/a"], rows="target > 1e9")
    # a column that no model reads: only rows of the target domain are fitted to and scored
    frame = pd.read_csv(competition.train, dtype=str)
    frame["source"] = ["web" if place % 3 else "book" for place in range(len(frame))]
    frame.to_csv(competition.train, index=False)
    said = command("blend", *RUNS, "--method", "slsqp", "--rows", "source == 'book'", "--name", "books")
    assert "rmse of the blend, 20 rows" in said
    books = gather(["runs/a", "runs/b", "runs/c"], rows="source == 'book'")
    assert sorted(books.ids) == sorted(frame["id"][frame["source"] == "book"])
    assert (
        read_blend("blends/books").parameters["blend"]["weights"]
        == Recipe("slsqp").fit(books.problem)["blend"]["weights"]
    ), "of the rows that are chosen, and no others"


def test_a_run_that_weighs_nothing_need_not_predict(trained: Callable[..., TinyCompetition]) -> None:
    """Run a copied as d has a's errors: hill climbing takes one of them alone."""
    competition = trained()
    shutil.copytree("runs/a", "runs/d")
    said = command("blend", "--run", "runs/a", "--run", "runs/d", "--method", "hill_climb", "--name", "twins")
    assert "a " in said and "d " in said
    blend = read_blend("blends/twins")
    assert blend.runs == ["runs/a"] and blend.parameters["blend"]["weights"] == [[1.0]]
    assert len(json.loads(Path("blends/twins/blend.json").read_text())["runs"]) == 1
    shutil.rmtree("runs/d")
    command("infer", "--blend", "blends/twins")
    found = pd.read_csv("submissions/twins.csv", dtype={"id": str}).set_index("id")["target"]
    test = pd.read_csv(competition.test, dtype=str)
    assert found.loc[test["id"]].to_numpy() == pytest.approx(
        load("runs/a").predict(test)["target"].to_numpy(), abs=1e-5
    )


def test_what_cannot_be_blended_is_refused(trained: Callable[..., TinyCompetition]) -> None:
    competition = trained()
    for runs, options, message in (
        (["runs/a", "runs/a"], {}, "a run is named twice"),
        (["runs/nothing"], {}, "runs/nothing is no run folder"),
        ([], {}, "no run to blend"),
        (["runs/a"], {"weights": "middle"}, "weights 'middle': allowed are best, last, averaged"),
    ):
        with pytest.raises(ValueError, match=message):
            gather(runs, **options)
    crossval.run(config_file.load("tiny.yaml", ["folds.seed=9", "folds.name=other"]), "other", say=lambda line: None)
    own, theirs = (json.loads(Path(f"folds/{name}.json").read_text())["folds"] for name in ("tiny-regression", "other"))
    refused = rf"were trained on different folds \({own} and {theirs}\).*use --method mean, rank_mean or"
    with pytest.raises(ValueError, match=refused):
        command("blend", "--run", "runs/a", "--run", "runs/other", "--method", "ridge")
    with pytest.raises(ValueError, match=refused):  # a mean fits nothing, but what calibrates it does
        command("blend", "--run", "runs/a", "--run", "runs/other", "--calibration", "isotonic")
    assert "cross-fitted" in command("blend", "--run", "runs/a", "--run", "runs/other", "--method", "mean")
    crossval.run(config_file.load("tiny.yaml", ["metric=mae"]), "metric", say=lambda line: None)
    with pytest.raises(ValueError, match="differ in their metric: rmse and mae"):
        gather(["runs/a", "runs/metric"])
    crossval.run(config_file.load("tiny.yaml", ["stability.averaging.name=none"]), "plain", say=lambda line: None)
    with pytest.raises(ValueError, match="runs/plain has no predictions by averaged weights"):
        gather(["runs/a", "runs/plain"], weights="averaged")
    with pytest.raises(ValueError, match="is no blend: blend.json is missing; make one with `comp blend`"):
        read_blend("blends/nothing")
    with pytest.raises(ValueError, match="--blend says which runs and weights"):
        command("infer", "--blend", "blends/blend", "--run", "runs/a")
    with pytest.raises(ValueError, match="a name is a folder inside blends/"):
        command("blend", *RUNS, "--name", "../x")
    with pytest.raises(ValueError, match="--option 'C': wanted key=value"):
        command("blend", *RUNS, "--option", "C")
    # a run that was trained anew has other models than the weights are for
    command("blend", *RUNS, "--method", "ridge", "--name", "old")
    crossval.run(config_file.load("tiny.yaml", ["training.seed=8"]), "c", restart=True, say=lambda line: None)
    with pytest.raises(ValueError, match="runs/c has another config than when blends/old/blend.json was fitted"):
        command("infer", "--blend", "blends/old")
    frame = pd.read_csv(competition.train, dtype=str)
    frame["target"] = frame["target"].iloc[::-1].to_numpy()
    frame.to_csv(competition.train, index=False)
    crossval.run(config_file.load("tiny.yaml", ["folds.name=third"]), "third", say=lambda line: None)
    with pytest.raises(ValueError, match="have different targets for the same ids"):
        gather(["runs/a", "runs/third"], any_folds=True)
