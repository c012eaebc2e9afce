"""Finished runs -> test predictions -> submission, without the hub. `load` is the notebook API.

Needs torch, transformers, numpy, pandas, scikit-learn, safetensors, PyYAML and pydantic, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from comp.runs import RunFolder, digest, kept, newest_finished, read_json
from comp.runtime import Runtime, open_runtime, release_memory
from comp.ship.jobs import Job, Jobs, parse_duration
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
Found = dict[int, list[NDArray[np.float64]]]
"""Run number -> predictions (N, K) of its models."""
PREDICTIONS = Path("runs/.cache/predictions")


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
        progress = open_progress(len(table) * len(self.folds), f"{self.folder.name}", "row")
        try:
            predict_fold = self.open(table, cache=cache, on_batch=progress.advance)
            mean: NDArray[np.float64] = np.mean([predict_fold(fold) for fold in self.folds], axis=0)
        finally:
            progress.close()
        return mean

    def open(
        self, table: Table, *, cache: Path | None = CACHE, on_batch: Callable[[int], Any] | None = None
    ) -> Callable[[Fold], NDArray[np.float64]]:
        """Tokenize a table and build the model; return fold -> its (N, K) predictions."""
        tokenizer = load_tokenizer(str(self.folder.backbone))
        encoded = encode(tokenizer, table.texts, **self.config.model.cutting, cache=cache)
        model = self.build(tokenizer).to(self.runtime.device)
        decoders = {self.task.name: build_decoder(self.task, self.classes.get(self.task.name, []))}

        def predict_fold(fold: Fold) -> NDArray[np.float64]:
            load_weights(self.weights_of(fold), model)
            found = predict(model, encoded, table.ids, decoders=decoders, runtime=self.runtime, on_batch=on_batch)
            return found.values[self.task.name]

        return predict_fold

    def weights_of(self, fold: Fold) -> Path:
        folder = self.folder.fold(fold)
        if self.weights == "averaged":
            if not folder.averaged.exists():
                raise ValueError(
                    f"{folder.path} has no averaged weights: stability.averaging was none; use --weights best or last"
                )
            return folder.averaged
        return folder.last if fold == "full" or self.weights == "last" else folder.best

    def build(self, tokenizer: Any) -> TextModel:
        """Return the run's model in evaluation mode, without the weights of a fold."""
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

    def open(
        self, table: Table, *, cache: Path | None = CACHE, on_batch: Callable[[int], Any] | None = None
    ) -> Callable[[Fold], NDArray[np.float64]]:
        """Return fold -> its (N, K) predictions."""

        def predict_fold(fold: Fold) -> NDArray[np.float64]:
            found = predict_classical(self.folder, self.config, table, fold, self.runtime, cached=cache is not None)
            if on_batch is not None:
                on_batch(len(table))
            return found

        return predict_fold

    def weights_of(self, fold: Fold) -> Path:
        return self.folder.fold(fold).path / "seen.npz"


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
    if folder.classical.exists() and weights == "averaged":
        raise ValueError(f"{path} is a classical run and has no averaged weights; use --weights best")
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
    time_budget: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Predict the test table with one or more runs, average them, write and check the submission; return its path.

    Without `runs`: the newest finished one. Every run counts the same, whatever its number of folds, and every model of
    a run, a full-data one too; or a `blend` says which runs and weights, and how they go together. The predictions are
    of the first task; runs must agree on its targets, kind and classes.

    What a model has predicted is kept, so that a killed call goes on where it was. `time_budget` ("8h"): models that
    will not fit are left out, lightest run first (see jobs.py), and the file is written anew after every model.
    """
    seconds = None if time_budget is None else parse_duration(time_budget)
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
    tables = [read_test(test_file, run.config.competition) for run in loaded]
    ids = list(tables[0].ids)
    for run, table in zip(loaded, tables, strict=True):
        if list(table.ids) != ids:
            raise ValueError(f"{run.folder.path} reads other ids from {test_file} than {first.folder.path}")
        names = ", ".join(str(fold) for fold in run.folds)
        say(f"{run.folder.path}: {len(table):,} rows, folds {names} ({weights} weights), {run.runtime.describe()}")
    about: Mapping[str, Any] = {
        "id_column": competition.id,
        "task": first.task,
        "classes": first.classes.get(first.task.name),
    }
    path = Path(out or f"submissions/{first.folder.name if blend is None else blend.path.resolve().parent.name}.csv")

    def write(found: Found) -> pd.DataFrame:
        values = _together(found, len(loaded), blend)
        frame = build_submission(sample, ids, values, **about) if sample is not None else build_without_sample(
            ids, values, **about
        )  # fmt: skip
        validate_submission(frame, sample, **about)
        used = [{**_about(run), "models": len(found.get(number, []))} for number, run in enumerate(loaded)]
        sidecar: dict[str, Any] = {"test": str(test_file), "weights": weights, "runs": used}
        write_submission(path, frame, sidecar if blend is None else {**sidecar, "blend": read_json(blend.path)})
        return frame

    shares = [1.0] * len(loaded) if blend is None else blend.shares
    found, jobs = _predict_all(loaded, tables, shares, seconds, write if seconds is not None else None)
    for job in jobs.dropped:
        say(f"left out, the time budget would not do: {loaded[job.run].folder.path} fold {job.fold}")
    frame = write(found)
    say(f"wrote {path}: {len(frame):,} rows, columns {', '.join(frame.columns)}; valid")
    return path


def _predict_all(
    runs: Sequence[LoadedRun],
    tables: Sequence[Table],
    shares: Sequence[float],
    seconds: float | None,
    after_each: Callable[[Found], Any] | None,
) -> tuple[Found, Jobs]:
    """Predict with one model at a time; return run number -> predictions of its models, and what became of the jobs."""
    planned = [
        Job(number, fold, run.weights_of(fold).stat().st_size * len(tables[number]))
        for number, run in enumerate(runs)
        for fold in run.folds
    ]
    jobs = Jobs(shares, planned, seconds)
    found: Found = {}
    progress = open_progress(sum(len(tables[job.run]) for job in planned), "rows", "row")
    opened: dict[int, Callable[[Fold], NDArray[np.float64]]] = {}

    def compute(job: Job) -> NDArray[np.float64]:
        if job.run not in opened:
            opened.clear()  # the model before goes first: one at a time is in memory
            release_memory()
            opened[job.run] = runs[job.run].open(tables[job.run], on_batch=progress.advance)
        return opened[job.run](job.fold)

    try:
        while (job := jobs.next()) is not None:
            run, table, started = runs[job.run], tables[job.run], time.monotonic()
            path = PREDICTIONS / f"{_mark(run, job.fold, table)}.npy"
            there = path.exists()
            found.setdefault(job.run, []).append(kept(path, partial(compute, job)))
            if there:
                progress.advance(len(table))
            jobs.finished(job, None if there else time.monotonic() - started)
            if after_each is not None:
                after_each(found)
    finally:
        progress.close()
    return found, jobs


def _mark(run: LoadedRun, fold: Fold, table: Table) -> str:
    """Return what a model's predictions depend on, as a digest."""
    weights = run.weights_of(fold)
    status = weights.stat()
    marks = read_json(run.folder.manifest)["fingerprints"]
    return digest(
        [table.fingerprint(), str(weights.resolve()), str(status.st_mtime_ns), str(marks), run.runtime.describe()]
    )


def _together(
    found: Mapping[int, list[NDArray[np.float64]]], num_runs: int, blend: Blend | None
) -> NDArray[np.float64]:
    """Return (N, K): the mean over each run's models, then over runs or as the blend says, of the runs there are."""
    runs = sorted(found)
    preds = np.stack([np.mean(found[run], axis=0) for run in runs])
    if blend is None:
        mean: NDArray[np.float64] = preds.mean(axis=0)
        return mean
    return (blend if len(runs) == num_runs else blend.among(runs)).apply(preds)


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
