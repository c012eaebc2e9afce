"""The notebooks in examples/ are valid, carry no outputs, and run from the first cell to the last."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from bundling import bundle, inside, train
from conftest import TinyCompetition

nbformat = pytest.importorskip("nbformat", reason="the extra `kaggle` is not installed")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def code_of(notebook: Path) -> dict[str, str]:
    """Return the code cells by their ids, in order."""
    cells = nbformat.read(notebook, as_version=4).cells
    return {cell.id: cell.source for cell in cells if cell.cell_type == "code"}


def run(cells: dict[str, str], names: list[str] | None = None) -> dict[str, Any]:
    """Execute cells one after the other as a kernel does, all of them or some; return the names they leave."""
    space: dict[str, Any] = {}
    for name in cells if names is None else names:
        exec(compile(cells[name], f"cell {name}", "exec"), space)
    return space


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Callable[..., Path]) -> Iterator[Any]:
    """A folder with runs, a blend and a bundle of it."""
    folder = tmp_path_factory.mktemp("project")
    competition = train(folder, tiny_model_folder("bert"))
    with inside(folder):
        bundle()
        yield competition


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_valid_and_carries_no_outputs(notebook: Path) -> None:
    found = nbformat.read(notebook, as_version=4)
    nbformat.validate(found)
    for cell in found.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None), cell.id
    assert found.cells[0].source.startswith("# ")


def test_the_runs_are_explored(
    project: TinyCompetition, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    pytest.importorskip("IPython", reason="the extra `kaggle` is not installed")
    for name in ("COMP_PROJECT", "COMP_BUNDLE", "COMP_TEST", "COMP_SAMPLE"):
        monkeypatch.delenv(name, raising=False)
    left = run(code_of(EXAMPLES / "explore-runs.ipynb"))
    out = capsys.readouterr().out
    assert left["RUNS"] == ["runs/a", "runs/b", "runs/words"]
    assert left["oof"].shape == (60, 4) and left["scores"] == pd.DataFrame(left["by_fold"])["all rows"].tolist()
    assert left["scores"][left["best"]] == min(left["scores"])
    assert "2.5%     97.5%" in out and "folds won" in out and "pictures, all of them in runs/words/report.html" in out
    assert sum(len(part.rows) for part in left["parts"]) == 60
    assert {own.crossfit for own in left["found"].values()} != {None}
    expected = pd.read_csv(project.sample_submission, dtype=str)
    written = pd.read_csv("submission.csv", dtype={"id": str})
    assert list(written["id"]) == list(expected["id"]) and list(written.columns) == list(expected.columns)
    assert written["target"].to_numpy() == pytest.approx(left["predicted"].set_index("id").loc[written["id"], "target"])


def test_a_bundle_predicts_without_the_runs(
    project: TinyCompetition, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Kaggle: another folder, nothing but the bundle and the competition's tables."""
    here = Path.cwd()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COMP_PROJECT", str(tmp_path))
    monkeypatch.setenv("COMP_BUNDLE", str(here / "bundles/tiny-blend"))
    monkeypatch.setenv("COMP_TEST", str(here / project.test))
    monkeypatch.setenv("COMP_SAMPLE", str(here / project.sample_submission))
    with inside(here):
        left = run(code_of(EXAMPLES / "explore-runs.ipynb"), ["setup", "predict", "shift", "submit"])
        assert os.listdir(tmp_path) == ["submission.csv"]
    blended = left["model"].predict(left["frame"])
    assert left["submission"]["id"].tolist() == blended["id"].tolist()
    assert pd.read_csv(tmp_path / "submission.csv")["target"].to_numpy() == pytest.approx(blended["target"].to_numpy())
