"""Features fitted in the fold, estimators over the same folds, and runs of them that infer and blend like any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TinyCompetition
from scipy import sparse
from typer.testing import CliRunner

from comp import config_file, load
from comp.blend.classical import ESTIMATORS, Fit, run_classical
from comp.blend.ensemble import one_hot
from comp.blend.features import FEATURES, Source, parse_features, transform, write_features
from comp.cli import app
from comp.data.tables import read_train
from comp.model.backbone import load_backbone
from comp.model.sources import load_tokenizer
from comp.runtime import Runtime
from comp.training import crossval

CPU = Runtime(torch.device("cpu"), "fp32")
SAID: list[str] = []


@pytest.fixture
def setup(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Callable[..., Any]:
    def make(kind: str = "regression", **sections: Any) -> tuple[Any, TinyCompetition]:
        competition = tiny_competition(kind)
        data = competition.config(tiny_model_folder("bert"), **sections)
        (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
        return config_file.load("tiny.yaml"), competition

    return make


def fitted(config: Any, name: str, features: list[str], estimator: str = "ridge", **own: Any) -> Any:
    SAID.clear()
    return run_classical(config, name, features=features, estimator=estimator, say=SAID.append, **own)


# --- features --------------------------------------------------------------------------------------------------------


def source_of(config: Any, fold: int = 0) -> Source:
    return Source(read_train(config.competition, config.tasks), config, CPU, fold, config.model.backbone, None)


@pytest.mark.parametrize("name", ["tfidf", "statistics", "embeddings"])
def test_features_are_fitted_to_training_rows_alone(name: str, setup: Callable[..., Any]) -> None:
    config, competition = setup()
    source, training = source_of(config), np.arange(40)
    matrix, states = transform(source, [(name, "")], training=training)
    states = json.loads(json.dumps(states))
    again, _ = transform(source, [(name, "")], states=states)
    assert np.allclose(matrix.toarray(), again.toarray(), atol=1e-12)
    frame = pd.read_csv(competition.train, dtype=str)
    frame.loc[40:, "text"] = "entirely different words, and MANY more of them! " * 5
    frame.to_csv(competition.train, index=False)
    other, others = transform(source_of(config), [(name, "")], training=training)
    for key, values in states[0].items():
        if key == "vocabulary":
            assert others[0][key] == values
        else:
            assert others[0][key] == pytest.approx(values, abs=1e-5)
    assert np.allclose(matrix[:40].toarray(), other[:40].toarray(), atol=1e-3)
    assert not np.allclose(matrix[40:].toarray(), other[40:].toarray())
    if name != "tfidf":
        columns = matrix[:40].toarray()
        assert np.allclose(columns.mean(0), 0, atol=1e-9)
        assert np.allclose(columns.std(0)[columns.std(0) > 0], 1)


def test_embeddings_are_the_mean_of_the_last_layer(setup: Callable[..., Any]) -> None:
    config, _ = setup()
    source = source_of(config)
    matrix, (state,) = transform(source, [("embeddings", "")], training=np.arange(60))
    found = matrix.toarray() * np.array(state["std"]) + np.array(state["mean"])
    tokenizer = load_tokenizer(config.model.backbone)
    backbone = load_backbone(config.model.backbone, tokenizer, dropout=0.0, with_pooler=False).eval()
    for row in (0, 17):
        given = tokenizer(
            source.table.texts[0][row], truncation=True, max_length=config.model.max_length, return_tensors="pt"
        )
        with torch.no_grad():
            states = backbone.model(**given).last_hidden_state
        assert found[row] == pytest.approx(states[0].mean(0).numpy(), abs=1e-4)


def test_embeddings_of_a_run_are_each_folds_own(setup: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = setup(optimizer={"lr": 1e-3})
    crossval.run(config, "tuned", save_every="never", say=lambda line: None)
    two = [
        transform(source_of(config, fold), [("run", "tuned")], training=np.arange(60))[0].toarray() for fold in (0, 1)
    ]
    assert not np.allclose(two[0], two[1], atol=1e-3)
    # the head of fold 0 on fold 0's vectors gives its out-of-fold predictions
    from safetensors.torch import load_file

    matrix, (state,) = transform(source_of(config, 0), [("run", "runs/tuned")], training=np.arange(60))
    vectors = matrix.toarray() * np.array(state["std"]) + np.array(state["mean"])
    head = load_file("runs/tuned/fold0/best.safetensors")
    found = vectors @ head["heads.main.weight"].numpy().T + head["heads.main.bias"].numpy()
    rows = pd.read_parquet("runs/tuned/fold0/oof.parquet")
    ids = list(source_of(config).table.ids)
    assert found[[ids.index(name) for name in rows["id"]], 0] == pytest.approx(
        rows["pred_main_target"].to_numpy(), abs=1e-3
    )


def test_a_run_on_other_folds_is_refused(setup: Callable[..., Any]) -> None:
    """Its models saw rows that are held out here."""
    config, _ = setup()
    crossval.run(config_file.load("tiny.yaml", ["folds.seed=9", "folds.name=other"]), "other", say=SAID.append)
    mark = json.loads(Path("folds/other.json").read_text())["folds"]
    with pytest.raises(ValueError, match=rf"'run:other' were trained on different folds \({mark}\) than these \("):
        fitted(config, "no", ["run:other"])
    with pytest.raises(ValueError, match="'run:other' were trained on different folds"):
        write_features(config, ["run:other"], say=SAID.append)


def test_a_table_of_features_holds_each_row_by_its_own_fold(setup: Callable[..., Any]) -> None:
    config, _ = setup(optimizer={"lr": 1e-3})
    crossval.run(config, "tuned", save_every="never", say=lambda line: None)
    command = ["features", "--config", "tiny.yaml", "--features", "run:tuned", "--features", "statistics"]
    found = CliRunner().invoke(app, [*command, "--out", "features.parquet"])
    assert found.exit_code == 0, found.exception
    assert "fold 1 run:tuned: 60 rows x 32 columns; runs/.cache/features/" in found.output
    assert "wrote features.parquet: 60 held-out rows x 45 columns, each by its own fold" in found.output
    assert len(list(Path("runs/.cache/features").glob("*.npy"))) == 3, "two folds of the run, one of the statistics"
    table = pd.read_parquet("features.parquet")
    rows = pd.read_parquet("runs/tuned/oof.parquet").set_index("id")
    assert (
        sorted(table["id"]) == sorted(rows.index) and (table["fold"] == rows.loc[table["id"], "fold"].to_numpy()).all()
    )
    ids = list(source_of(config).table.ids)
    for fold, part in table.groupby("fold"):
        training = np.array([place for place, name in enumerate(ids) if rows.loc[name, "fold"] != fold])
        matrix, _ = transform(source_of(config, fold), [("run", "tuned")], training=training)
        expected = matrix.toarray()[[ids.index(name) for name in part["id"]]]
        assert part[[f"run:tuned_{place}" for place in range(32)]].to_numpy() == pytest.approx(expected, abs=1e-5)
    said = (
        CliRunner().invoke(app, ["features", "--config", "tiny.yaml", "--features", "tfidf", "--fold", "full"]).output
    )
    assert "fold full tfidf: 60 rows x " in said and "not kept, it is fast" in said
    for words, message in (
        (["--features", "tfidf", "--out", "f.parquet"], "tfidf has other words, and so other columns, in every fold"),
        (["--out", "f.csv"], "--out 'f.csv': a .parquet file of held-out rows, which --fold full has not"),
        (["--out", "f.parquet", "--fold", "full"], "which --fold full has not"),
    ):
        assert message in str(CliRunner().invoke(app, [*command, *words]).exception)


def test_names_of_features() -> None:
    assert parse_features(["tfidf", "run:a"]) == [("tfidf", ""), ("run", "a")]
    for names, message in (
        (["tfidff"], "unknown features 'tfidff'; did you mean 'tfidf'?"),
        (["run"], "only run takes a name, as in run:large"),
        (["tfidf:a"], "only run takes a name"),
        ([], "name each once, and one at least"),
        (["tfidf", "tfidf"], "name each once"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_features(names)
    assert set(FEATURES) == {"tfidf", "statistics", "embeddings", "run"}


# --- estimators ------------------------------------------------------------------------------------------------------

KINDS = {
    "regression": "rmse",
    "binary": "log_loss",
    "multiclass": "log_loss",
    "multilabel": "log_loss",
    "ordinal": "qwk",
}


def problem(kind: str, rows: int = 120) -> tuple[sparse.csr_matrix, np.ndarray, int]:
    draw = np.random.default_rng(0)
    seen = draw.normal(size=(rows, 6))
    if kind == "multiclass":
        return sparse.csr_matrix(seen), seen[:, :3].argmax(1)[:, None].astype(float), 3
    columns = {"multilabel": 2, "regression": 2}.get(kind, 1)
    targets = seen[:, :columns] + 0.3 * draw.normal(size=(rows, columns))
    if kind == "ordinal":
        targets = np.clip(np.round(targets), -1, 1)
    elif kind != "regression":
        targets = (targets > 0).astype(float)
    return sparse.csr_matrix(seen), targets, columns


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, row in ESTIMATORS.items() for kind in KINDS if kind in row.kinds]
)
def test_every_estimator_learns_every_kind(name: str, kind: str) -> None:
    seen, targets, outputs = problem(kind)
    fit = Fit(name, kind, KINDS[kind], seen[:80], targets[:80], outputs)
    options = json.loads(json.dumps(fit.choose({})))
    assert set(options) == set(ESTIMATORS[name].grid)
    found = fit.predict(options, seen[80:])
    assert found.shape == (40, outputs)
    truth = one_hot(targets[80:], outputs, kind)
    constant = one_hot(targets[:80], outputs, kind).mean(0)
    assert ((found - truth) ** 2).mean() < 0.6 * ((constant - truth) ** 2).mean()
    assert np.array_equal(found, fit.predict(options, seen[80:])), "fitted again it is the same"
    if kind == "multiclass":
        assert np.allclose(found.sum(1), 1)


def test_hyperparameters_are_the_best_of_inner_folds_or_the_given_ones() -> None:
    draw = np.random.default_rng(1)
    seen = sparse.csr_matrix(draw.normal(size=(60, 40)))
    noise = Fit("ridge", "regression", "rmse", seen, draw.normal(size=(60, 1)), 1)
    assert noise.choose({})["alpha"] >= 100
    clear = Fit("ridge", "regression", "rmse", seen, seen[:, :1].toarray() * 3, 1)
    assert clear.choose({}) == {"alpha": 0.1}
    assert clear.choose({"alpha": 7}) == {"alpha": 7}
    with pytest.raises(ValueError, match="estimator 'ridge' has no option 'C'; allowed: alpha"):
        clear.choose({"C": 1})


# --- runs ------------------------------------------------------------------------------------------------------------


def test_inner_folds_keep_groups_together() -> None:
    """What tells the group alone is worth nothing on rows of other groups."""
    draw = np.random.default_rng(0)
    groups = np.repeat(np.arange(30), 6)
    targets = (draw.normal(size=30)[groups] + 0.1 * draw.normal(size=180))[:, None]
    signs = sparse.csr_matrix(draw.normal(size=(30, 25))[groups])
    fit = Fit("ridge", "regression", "rmse", signs, targets, 1)
    assert fit.choose({})["alpha"] <= 1
    assert replace(fit, groups=groups).choose({})["alpha"] == 1000
    assert replace(fit, groups=np.zeros(180, int)).choose({}) == fit.choose({}), "one group cannot be parted"


def test_groups_of_the_config_are_those_of_the_inner_folds(
    setup: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, competition = setup()
    train = pd.read_csv(competition.train, dtype=str)
    train["site"] = [f"s{row % 9}" for row in range(len(train))]
    train.to_csv(competition.train, index=False)
    config = config_file.load("tiny.yaml", ["folds.splitter=group", "folds.group=site"])
    real, seen = Fit.choose, []
    monkeypatch.setattr(Fit, "choose", lambda fit, *words: seen.append(fit.groups) or real(fit, *words))
    fitted(config, "grouped", ["tfidf"])
    folds = pd.read_csv("folds/tiny-regression.csv", dtype=str).set_index("id")["fold"].astype(int)
    for fold in (0, 1):
        sites = train["site"][(folds.loc[train["id"]] != fold).to_numpy()]
        assert (seen[fold] == sites.str[1:].astype(int).to_numpy()).all()


def test_a_part_with_a_single_class_is_predicted_as_that_class() -> None:
    truth = np.eye(3)[[2, 2, 2]]
    seen = sparse.csr_matrix(np.eye(3))
    fit = Fit("ridge", "multiclass", "log_loss", seen, np.full((3, 1), 2.0), 3)
    assert (fit.predict({"alpha": 1.0}, seen) == truth).all()


@pytest.mark.parametrize("kind", ["regression", "binary", "multiclass", "multilabel", "ordinal"])
def test_a_run_scores_infers_and_blends(
    kind: str, setup: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config, competition = setup(kind)
    scores = fitted(config, "words", ["tfidf", "statistics"])
    assert set(scores.folds) == {0, 1}
    assert any(line.startswith("fold 0: ") and "ridge alpha" in line for line in SAID)
    capsys.readouterr()
    fitted(config, "vectors", ["embeddings"], "svm", options={"C": 1.0})
    assert "Writing model" not in capsys.readouterr().err, "transformers' bar for the backbone that is kept"
    Path(config.model.backbone).rename("gone")  # a run needs no hub
    train = pd.read_csv(competition.train, dtype=str)
    for name in ("words", "vectors"):
        for fold in (0, 1):
            rows = pd.read_parquet(f"runs/{name}/fold{fold}/oof.parquet")
            frame = train.set_index("id").loc[rows["id"]].reset_index()
            found = load(f"runs/{name}", folds=[fold]).predict(frame).iloc[:, 1:].to_numpy(float)
            preds = rows[[column for column in rows.columns if column.startswith("pred_")]].to_numpy()
            assert np.abs(found - preds).max() < 1e-4
    both = ["--run", "runs/words", "--run", "runs/vectors"]
    assert "cross-fitted" in CliRunner().invoke(app, ["blend", *both, "--method", "hill_climb"]).output
    assert "wrote submissions/blend.csv" in CliRunner().invoke(app, ["infer", "--blend", "blends/blend"]).output
    Path("gone").rename(config.model.backbone)


def test_finished_folds_full_data_and_refusals(setup: Callable[..., Any]) -> None:
    config, competition = setup()
    fitted(config, "words", ["tfidf"], folds="0")
    assert "out-of-fold scores so far: fold 1 is not trained yet" in SAID
    scores = fitted(config, "words", ["tfidf"])
    assert "fold 0: finished before, skipped (--restart fits it again)" in SAID and len(scores.folds) == 2
    with pytest.raises(ValueError, match="was made from another classical; name a new run with --run"):
        fitted(config, "words", ["tfidf", "embeddings"])
    fitted(config, "words", ["tfidf"], folds="full")
    found = load("runs/words", folds=["full"]).predict(pd.read_csv(competition.test, dtype=str))
    assert len(found) == 20 and np.isfinite(found["target"]).all()
    with pytest.raises(ValueError, match="estimator 'kernel_ridge' does not fit kind 'binary'"):
        fitted(setup("binary")[0], "no", ["tfidf"], "kernel_ridge")
    with pytest.raises(ValueError, match="runs/words is a classical run and has no averaged weights"):
        load("runs/words", weights="averaged")
    with pytest.raises(ValueError, match="nothing is no run folder"):
        fitted(config, "no", ["run:nothing"])


def test_the_command(setup: Callable[..., Any]) -> None:
    setup()
    command = ["classical", "--config", "tiny.yaml", "--features", "tfidf", "--estimator", "svm", "--option", "C=2"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "svm C 2" in found.output and Path("runs/tfidf-svm/scores.json").exists()
    assert "tfidf-svm" in CliRunner().invoke(app, ["oof"]).output
