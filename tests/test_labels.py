"""Binary and multilabel tasks: where 0 and 1 are submitted for probabilities, through infer, bundle and submit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TinyCompetition
from typer.testing import CliRunner

from comp import config_file, load
from comp.cli import app
from comp.config import Task
from comp.ship.infer import as_labels
from comp.ship.scoring import score_submission
from comp.training import crossval

BINARY = {"id_column": "id", "task": Task(name="t", kind="binary", targets=["target"]), "classes": None}
REGRESSION = {"id_column": "id", "task": Task(name="t", kind="regression", targets=["target"]), "classes": None}


@pytest.fixture
def trained(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Callable[..., TinyCompetition]:
    """Return `train(kind, metric)`: a run whose competition's sample submission is all 0."""

    def make(kind: str, metric: str) -> TinyCompetition:
        competition = tiny_competition(kind)
        sample = pd.read_csv(competition.sample_submission, dtype=str)
        sample[competition.targets] = "0"
        sample.to_csv(competition.sample_submission, index=False)
        data = competition.config(tiny_model_folder("bert"), metric=metric, optimizer={"lr": 5e-3, "head_lr": 2e-2})
        data |= {"training": {"epochs": 20, "batch_size": 8, "precision": "fp32"}, "evaluation": {"every": "100%"}}
        (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
        crossval.run(config_file.load("tiny.yaml"), "tiny", save_every="never", say=lambda line: None)
        return competition

    return make


def written(*words: str) -> tuple[str, pd.DataFrame]:
    """Return what `comp infer` prints and writes."""
    found = CliRunner().invoke(app, ["infer", *words])
    assert found.exit_code == 0, found.exception
    return found.output, pd.read_csv("submissions/tiny.csv", dtype=str)


@pytest.mark.parametrize(("kind", "metric"), [("binary", "f1"), ("binary", "accuracy"), ("multilabel", "f1_macro")])
def test_labels_where_the_metric_scores_them(kind: str, metric: str, trained: Any) -> None:
    competition = trained(kind, metric)
    columns = competition.targets
    probabilities = load("runs/tiny").predict(pd.read_csv(competition.test, dtype=str)).set_index("id")[columns]
    said, frame = written()
    assert f"labels are submitted, 1 from a probability of 0.5 on, as {metric} scores them" in said
    assert ("`comp blend --calibration thresholds`" in said) == (metric != "accuracy")
    assert set(np.unique(frame[columns])) == {"0", "1"}
    expected = (probabilities.loc[frame["id"]] >= 0.5).astype(int)
    assert (frame[columns].astype(int).to_numpy() == expected.to_numpy()).all()
    by_labels = score_submission(Path("submissions/tiny.csv"), competition.solution, metric)["total"]
    assert CliRunner().invoke(app, ["submit", "submissions/tiny.csv", "--score", "0.5"]).exit_code == 0

    said, frame = written("--probabilities")
    assert "labels" not in said
    assert np.allclose(frame[columns].astype(float), probabilities.loc[frame["id"]], atol=1e-6)
    assert json.loads(Path("submissions/tiny.json").read_text())["labels"] is False
    assert score_submission(Path("submissions/tiny.csv"), competition.solution, metric)["total"] == by_labels


def test_probabilities_where_the_metric_scores_them_and_labels_when_asked_for(trained: Any) -> None:
    trained("binary", "roc_auc")
    said, frame = written()
    assert "probabilities are submitted; where the competition scores labels, write these with --labels" in said
    probabilities = frame["target"].astype(float)
    assert probabilities.between(0, 1, inclusive="neither").all()
    said, frame = written("--labels")
    assert "are submitted" not in said
    assert (frame["target"].astype(int) == (probabilities >= 0.5)).all() and frame["target"].nunique() == 2


def test_thresholds_of_a_blend_are_what_labels_are_made_by(trained: Any) -> None:
    competition = trained("binary", "f1")
    words = ["blend", "--run", "runs/tiny", "--calibration", "thresholds"]
    found = CliRunner().invoke(app, words)
    assert found.exit_code == 0, found.exception
    blend = next(Path("blends").glob("*/blend.json"))
    about = json.loads(blend.read_text())
    assert len(about["parameters"]["calibration"]["thresholds"]) == 1
    probabilities = load("runs/tiny").predict(pd.read_csv(competition.test, dtype=str)).set_index("id")["target"]
    border = (probabilities.min() + 0.5) / 2  # the rows of so small a competition leave it near 0.5
    about["parameters"]["calibration"]["thresholds"] = [border]
    blend.write_text(json.dumps(about))
    found = CliRunner().invoke(app, ["infer", "--blend", str(blend.parent), "--out", "submissions/tiny.csv"])
    assert found.exit_code == 0, found.exception
    assert "labels are submitted, by the blend's thresholds, as f1 scores them\n" in found.output
    labels = pd.read_csv("submissions/tiny.csv", dtype=str).set_index("id")["target"].astype(int)
    assert (labels == (probabilities.loc[labels.index] >= border)).all()
    assert (labels != (probabilities.loc[labels.index] >= 0.5)).any()


def test_what_labels_do_not_fit() -> None:
    for wanted in (True, False):
        with pytest.raises(ValueError, match="are for tasks of kind binary and multilabel; 't' is regression, where"):
            as_labels(wanted, None, REGRESSION, None, "rmse")
    assert as_labels(None, None, REGRESSION, None, "rmse") == (False, None)
    ranks: Any = SimpleNamespace(
        recipe=SimpleNamespace(method="rank_mean", calibration="none"), problem=SimpleNamespace(metric="roc_auc")
    )
    with pytest.raises(ValueError, match=r"--labels: a blend by rank_mean gives ranks, which have no 0\.5"):
        as_labels(True, None, BINARY, ranks, "roc_auc")
    assert as_labels(None, None, BINARY, ranks, "accuracy") == (False, None), "the blend's metric counts"
