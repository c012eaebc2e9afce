"""Every YAML in configs/ opens with its command, cost and result, and trains, on a tiny model and tiny data."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pandas as pd
import pytest
import typer
from conftest import TinyCompetition

from comp import config_file
from comp.cli import app
from comp.cli_search import _commands
from comp.pipeline_file import read_pipeline
from comp.training import crossval

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))
PIPELINES = [file for file in FILES if file.stem == "pipeline"]
CONFIGS = [file for file in FILES if file not in PIPELINES]
FRAGMENTS = ("base", "few-rows")
"""No competition of their own: to be extended."""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_opens_with_command_cost_and_result(file: Path) -> None:
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    for word in ("Command:", "Cost", "esult"):
        assert any(word in line for line in head), f"{file.name} does not say its {word}"


@pytest.mark.parametrize("file", [file for file in CONFIGS if file.stem not in FRAGMENTS], ids=lambda file: file.stem)
def test_trains(
    file: Path,
    isolated: Path,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Callable[..., Path],
) -> None:
    """The file's own techniques and cadence; only data, backbone and size are replaced."""
    config = config_file.load(file)
    tiny = tiny_competition(config.tasks[0].kind)
    replaced = [
        f"competition.train={tiny.train}", f"competition.test={tiny.test}", "competition.text=text",
        f"competition.sample_submission={tiny.sample_submission}", f"tasks.0.targets=[{', '.join(tiny.targets)}]",
        f"model.backbone={tiny_model_folder('roberta')}", "model.max_length=32", "training.epochs=1",
        "training.max_rows=24", "tracking.wandb=off",
    ]  # fmt: skip
    if config.pseudo is not None:  # its labels are made by an earlier step
        replaced.append("pseudo=null")
    frame = pd.read_csv(tiny.train, dtype=str)
    for place, task in enumerate(config.tasks[1:], 1):
        assert task.kind == "regression", "write made-up targets of this kind here"
        frame[f"auxiliary{place}"] = [str(row % 3) for row in range(len(frame))]
        replaced.append(f"tasks.{place}.targets=[auxiliary{place}]")
    frame.to_csv(tiny.train, index=False)
    said: list[str] = []
    scores = crossval.run(config_file.load(file, replaced), "built", "0", say=said.append)
    assert scores is not None
    assert scores.num_rows == min(24, 60 // config.folds.num_folds)


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.parent.name)
def test_pipelines_name_commands_and_configs_that_are_there(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    commands = dict(_commands(typer.main.get_command(app)))
    pipeline, calls = read_pipeline(file, {"pretrain": commands["train"], **commands})
    assert len(calls) == len(pipeline.steps)
    made = [output for call in calls for output in call.outputs]
    for call in calls:
        config = call.load()
        if config is not None and config.model.backbone.startswith("runs/"):
            assert any(config.model.backbone.startswith(f"{output}/") for output in made)
        if config is not None and config.pseudo is not None:
            assert config.pseudo.folder in made


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_hold_no_competition_of_their_own(name: str) -> None:
    with pytest.raises(config_file.ConfigError, match="competition: is missing"):
        config_file.load(FOLDER / f"{name}.yaml")


def test_the_recipe_for_few_rows_is_that_of_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent / "benchmarks" / "studies"))
    own = tmp_path / "own.yaml"
    own.write_text(
        f"extends: [{FOLDER / 'base.yaml'}, {FOLDER / 'few-rows.yaml'}]\nmetric: rmse\n"
        "competition: {name: own, train: train.csv}\ntasks: [{name: main, kind: regression, targets: [y]}]\n"
        "model: {backbone: roberta-base}\n"
    )
    stability = import_module("stability")
    (best,) = stability.VARIANTS["reinit 2 + swa"].candidates
    study = config_file.load(FOLDER / "clear-minilm.yaml", [*stability.SETTINGS, *best])
    found = config_file.load(own)
    assert (found.stability, found.groups, found.schedule) == (study.stability, study.groups, study.schedule)
    for name in ("stability", "rows"):
        sys.modules.pop(name, None)
