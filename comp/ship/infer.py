"""Finished runs -> test predictions -> submission, without the hub. `load` is the notebook API.

Needs torch, transformers, numpy, pandas, scikit-learn, safetensors, PyYAML and pydantic, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp import config_file
from comp.blend.classical import predict_classical
from comp.blend.crossfit import Blend
from comp.config import Config, Task
from comp.data.tables import Table, read_test, table_of
from comp.data.tokens import CACHE, encode
from comp.model.backbone import load_tokenizer
from comp.model.heads import plan_heads
from comp.model.losses import build_decoder
from comp.model.text_model import TextModel, build_model
from comp.progress import open_progress
from comp.runs import RunFolder, newest_finished, read_json
from comp.runtime import Runtime, open_runtime
from comp.ship.submission import (
    build_submission,
    build_without_sample,
    read_submission,
    validate_submission,
    write_submission,
)
from comp.training.checkpoint import load_weights
from comp.training.predict import predict

__all__ = ["LoadedRun", "infer", "load"]

Fold = int | str


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to predict. Made by `load`."""

    folder: RunFolder
    config: Config
    classes: dict[str, list[str]]
    """Task name -> class labels (multiclass) or grades (ordinal)."""
    folds: list[Fold]
    """Models that are averaged."""
    weights: str
    """best | last | averaged"""
    runtime: Runtime

    @property
    def task(self) -> Task:
        """The task that is submitted."""
        return self.config.tasks[0]

    @property
    def output_names(self) -> list[str]:
        """Names of the predicted columns of the first task: targets, or the classes of a multiclass task."""
        return self.classes[self.task.name] if self.task.kind == "multiclass" else list(self.task.targets)

    def predict(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Predict a frame that has the competition's id and text columns.

        Returns the id column (as text) and one column per output, in the rows' order: values for regression and
        ordinal, probabilities for the other kinds; the mean over the run's fold models. Raises ValueError for missing
        columns, empty or duplicate ids.
        """
        table = table_of(frame, self.config.competition, source="frame")
        values = self.predict_table(table, cache=None)
        columns = {name: values[:, place] for place, name in enumerate(self.output_names)}
        return pd.DataFrame({self.config.competition.id: table.ids, **columns})

    def predict_table(self, table: Table, *, cache: Path | None = CACHE) -> NDArray[np.float64]:
        """Return (N, K) predictions of the first task in the table's order, averaged over the folds.

        The text is tokenized once; one model at a time is in memory.
        """
        tokenizer = load_tokenizer(str(self.folder.backbone))
        encoded = encode(tokenizer, table.texts, **self.config.model.cutting, cache=cache)
        model = self._model(tokenizer).to(self.runtime.device)
        decoders = {self.task.name: build_decoder(self.task, self.classes.get(self.task.name, []))}
        progress = open_progress(len(table) * len(self.folds), f"{self.folder.name}", "row")
        total: NDArray[np.float64] | float = 0.0
        try:
            for fold in self.folds:
                load_weights(self._weights_of(fold), model)
                found = predict(
                    model, encoded, table.ids, decoders=decoders, runtime=self.runtime, on_batch=progress.advance
                )
                total = total + found.values[self.task.name]
        finally:
            progress.close()
        assert isinstance(total, np.ndarray)
        mean: NDArray[np.float64] = total / len(self.folds)
        return mean

    def _weights_of(self, fold: Fold) -> Path:
        folder = self.folder.fold(fold)
        if self.weights == "averaged":
            if not folder.averaged.exists():
                raise ValueError(
                    f"{folder.path} has no averaged weights: stability.averaging was none; use --weights best or last"
                )
            return folder.averaged
        return folder.last if fold == "full" or self.weights == "last" else folder.best

    def _model(self, tokenizer: Any) -> TextModel:
        model = self.config.model
        return build_model(
            self.folder.backbone,
            tokenizer,
            pretrained=False,
            pooler=model.pooler.model_dump(),
            heads=plan_heads(self.config.tasks, self.classes),
            max_length=model.max_length,
            num_fields=len(self.config.competition.text_columns),
            part=model.part,
            dropout=model.dropout,
            head_dropout=model.head_dropout,
        ).eval()


@dataclass(frozen=True)
class LoadedClassical(LoadedRun):
    """A finished run of scikit-learn on features, ready to predict. Made by `load`."""

    def predict_table(self, table: Table, *, cache: Path | None = CACHE) -> NDArray[np.float64]:
        """Return (N, K) predictions in the table's order, averaged over the folds."""
        found = [predict_classical(self.folder, self.config, table, fold, self.runtime) for fold in self.folds]
        mean: NDArray[np.float64] = np.mean(found, axis=0)
        return mean


def load(
    path: str | Path, *, folds: Sequence[Fold] | None = None, weights: str = "best", precision: str | None = None
) -> LoadedRun:
    """Open a finished run for prediction: `load("runs/large").predict(frame)`.

    `folds`: which fold models to average; None = all finished ones, or the full-data model when there is no fold.
    `weights`: best (by validation), last, or averaged. `precision`: None = as in training. Raises ValueError when the
    folder is no run, or a fold is not finished.
    """
    folder = RunFolder(path)
    if not folder.config.exists() or not folder.manifest.exists():
        raise ValueError(f"{path} is no run folder: config.yaml or manifest.json is missing; see `ls runs/`")
    if weights not in ("best", "last", "averaged"):
        raise ValueError(f"weights '{weights}': allowed are best, last and averaged")
    config = config_file.load(folder.config)
    finished = folder.finished_folds()
    if not finished:
        raise ValueError(f"{path} has no finished fold; train it with `comp train`")
    chosen = list(folds) if folds is not None else [fold for fold in finished if fold != "full"] or ["full"]
    absent = [fold for fold in chosen if fold not in finished]
    if absent or not chosen:
        raise ValueError(
            f"{path}: fold {', '.join(map(str, absent)) or 'none'} is not finished; finished: "
            f"{', '.join(map(str, finished))}"
        )
    wanted = precision or config.training.precision
    runtime = open_runtime(wanted)
    loaded = LoadedClassical if folder.classical.exists() else LoadedRun
    return loaded(folder, config, read_json(folder.manifest)["classes"], chosen, weights, runtime)


def infer(
    runs: Sequence[str | Path] = (),
    *,
    test: str | None = None,
    out: str | None = None,
    folds: Sequence[Fold] | None = None,
    weights: str = "best",
    blend: Blend | None = None,
    precision: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Predict the test table with one or more runs, average them, write and check the submission; return its path.

    Without `runs`: the newest finished one. Every run counts the same, whatever its number of folds; or a `blend` says
    which runs and weights, and how they go together. The predictions are of the first task; runs must agree on its
    targets, kind and classes.
    """
    if blend is not None:
        runs, weights = blend.runs, blend.weights
    if not runs:
        runs = [newest_finished()]
        say(f"newest finished run: {runs[0]}")
    loaded = [load(run, folds=folds, weights=weights, precision=precision) for run in runs]
    first = loaded[0]
    for other in loaded[1:]:
        if (other.task.kind, other.output_names) != (first.task.kind, first.output_names):
            raise ValueError(
                f"{first.folder.path} predicts {first.task.kind} {first.output_names}, but {other.folder.path} "
                f"predicts {other.task.kind} {other.output_names}; runs in one submission must predict the same"
            )
    if blend is not None:
        _must_be_as_blended(loaded, blend)
    competition = first.config.competition
    test_file = test or competition.test
    if test_file is None:
        raise ValueError(f"{first.folder.path} names no competition.test; give the table with --test FILE")
    # The sample must fit the table that is predicted: --test of another table goes without it.
    sample_file = competition.sample_submission if test is None or test == competition.test else None
    sample = read_submission(Path(sample_file), competition.id) if sample_file else None
    found: list[NDArray[np.float64]] = []
    ids: NDArray[np.object_] | None = None
    for run in loaded:
        table = read_test(test_file, run.config.competition)
        if ids is not None and list(ids) != list(table.ids):
            raise ValueError(f"{run.folder.path} reads other ids from {test_file} than {first.folder.path}")
        ids = table.ids
        names = ", ".join(str(fold) for fold in run.folds)
        say(f"{run.folder.path}: {len(table):,} rows, folds {names} ({weights} weights), {run.runtime.describe()}")
        found.append(run.predict_table(table))
    assert ids is not None
    values = np.mean(found, axis=0) if blend is None else blend.apply(np.stack(found))
    about: Mapping[str, Any] = {
        "id_column": competition.id,
        "task": first.task,
        "classes": first.classes.get(first.task.name),
    }
    if sample is not None:
        frame = build_submission(sample, list(ids), values, **about)
    else:
        frame = build_without_sample(list(ids), values, **about)
    validate_submission(frame, sample, **about)
    path = Path(out or f"submissions/{first.folder.name if blend is None else blend.path.resolve().parent.name}.csv")
    sidecar = {"test": str(test_file), "weights": weights, "runs": [_about(run) for run in loaded]}
    if blend is not None:
        sidecar["blend"] = read_json(blend.path)
    write_submission(path, frame, sidecar)
    say(f"wrote {path}: {len(frame):,} rows, columns {', '.join(frame.columns)}; valid")
    return path


def _must_be_as_blended(runs: Sequence[LoadedRun], blend: Blend) -> None:
    """Raise ValueError when a run was trained anew since the blend was fitted: its weights are of other models."""
    for run, marks in zip(runs, blend.fingerprints, strict=True):
        now = read_json(run.folder.manifest)["fingerprints"]
        changed = [part for part, mark in marks.items() if now.get(part) != mark]
        if changed:
            raise ValueError(
                f"{run.folder.path} has another {' and another '.join(changed)} than when {blend.path} was fitted; fit "
                "the blend anew with `comp blend`"
            )


def _about(run: LoadedRun) -> dict[str, Any]:
    manifest = read_json(run.folder.manifest)
    scores = read_json(run.folder.scores) if run.folder.scores.exists() else None
    return {
        "run": str(run.folder.path),
        "folds": run.folds,
        "scores": scores,
        "trained_commit": manifest["commit"],
        "fingerprints": manifest["fingerprints"],
    }
