"""Finished runs, or a blend of them -> test predictions -> submission. Nothing is asked of the hub.

Needs torch, transformers, numpy, pandas, scikit-learn, safetensors, PyYAML and pydantic, nothing else.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.blend.crossfit import Blend
from comp.blend.members import weights_each
from comp.data.tables import Table, read_test
from comp.data.tokens import Memory
from comp.progress import open_progress
from comp.runs import digest, kept, newest_finished, read_json
from comp.ship.jobs import Job, Jobs, parse_duration
from comp.ship.loaded import Fold, LoadedRun, crew_of, load
from comp.ship.submission import (
    HARD,
    build_submission,
    build_without_sample,
    check_path,
    holds_whole_numbers,
    read_submission,
    strange_labels,
    validate_submission,
    wants_labels,
    write_submission,
)
from comp.ship.workers import Alone, Crew

__all__ = ["LoadedRun", "as_labels", "infer", "load", "must_fit"]

Found = dict[int, list[NDArray[np.float64]]]
"""Run number -> predictions (N, K) of its models."""
PREDICTIONS = Path("runs/.cache/predictions")


def infer(
    runs: Sequence[str | Path] = (),
    *,
    test: str | None = None,
    sample: str | None = None,
    out: str | None = None,
    folds: Sequence[Fold] | None = None,
    weights: str = "best",
    blend: Blend | None = None,
    precision: str | None = None,
    devices: Sequence[str] | None = None,
    batch_tokens: int | None = None,
    fallback: str = "stop",
    time_budget: str | None = None,
    labels: bool | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Predict the test table with one or more runs, average them, write and check the submission; return its path.

    Without `runs`: the newest finished one. Every run counts the same, whatever its number of folds, and every model of
    a run, a full-data one too; or a `blend` says which runs and weights, and how they go together. The predictions are
    of the first task; runs must agree on its targets, kind and classes. `sample`: sample submission; None = the
    config's, where the test table is the config's too. A test table without rows gives the header alone. `folds`,
    `precision`, `devices`, `batch_tokens` and `fallback` are those of `load`, and so are `weights`, of all runs or one
    for each: "best,averaged".

    Texts are tokenized once per tokenizer. What a model has predicted is kept, so that a killed call goes on where it
    was. `time_budget` ("8h"): models that will not fit are left out, lightest run first (see jobs.py), and the file is
    written anew after every model. `labels`: whether binary and multilabel tasks submit 0 and 1 for probabilities; None
    = where `wants_labels` says so. Raises ValueError when there is no finished run or no test table, runs or tables do
    not fit together, or the submission would not be accepted: nothing is written then.
    """
    seconds = None if time_budget is None else parse_duration(time_budget)
    if blend is not None:
        runs, weights = blend.runs, blend.weights
    if not runs:
        runs = [newest_finished()]
        say(f"newest finished run: {runs[0]}")
    how: dict[str, Any] = {"precision": precision, "devices": devices, "batch_tokens": batch_tokens}
    each = weights_each(weights, len(runs))
    loaded = [
        load(run, folds=folds, weights=own, fallback=fallback, **how) for run, own in zip(runs, each, strict=True)
    ]
    must_fit(loaded, blend)
    first = loaded[0]
    competition = first.config.competition
    test_file = test or competition.test
    if test_file is None:
        raise ValueError(f"{first.folder.path} names no competition.test; give the table with --test FILE")
    # The sample must fit the table that is predicted: --test of another table goes without it.
    own_sample = competition.sample_submission if test is None or test == competition.test else None
    sample_file = sample or own_sample
    layout = read_submission(Path(sample_file), competition.id, empty=True) if sample_file else None
    tables = [read_test(test_file, run.config.competition, empty=True) for run in loaded]
    ids = list(tables[0].ids)
    for run, table in zip(loaded, tables, strict=True):
        if list(table.ids) != ids:
            raise ValueError(f"{run.folder.path} reads other ids from {test_file} than {first.folder.path}")
        names = ", ".join(str(fold) for fold in run.folds)
        say(f"{run.folder.path}: {len(table):,} rows, folds {names} ({run.weights} weights), {run.describe()}")
    of_task = first.of_task
    hard, told = as_labels(labels, layout, of_task, blend, first.config.metric)
    path = Path(out or f"submissions/{first.folder.name if blend is None else blend.path.resolve().parent.name}.csv")
    check_path(path)
    if layout is not None:  # what does not fit it is said now, not after the last model
        build_submission(layout, ids, np.zeros((len(ids), len(first.output_names))), **of_task)
        if strange := strange_labels(layout, **of_task):
            say(f"warning: {strange}")
    if told:
        say(told)

    def write(found: Found) -> pd.DataFrame:
        values = _together(found, len(loaded), blend) if ids else np.zeros((0, len(first.output_names)))
        frame = (
            build_without_sample(ids, values, **of_task, hard=hard)
            if layout is None
            else build_submission(layout, ids, values, **of_task, hard=hard)
        )
        validate_submission(frame, layout, **of_task, hard=hard)
        used = [{**_about(run), "models": len(found.get(number, []))} for number, run in enumerate(loaded)]
        sidecar: dict[str, Any] = {"test": str(test_file), "weights": weights, "runs": used, "labels": hard}
        write_submission(path, frame, sidecar if blend is None else {**sidecar, "blend": read_json(blend.path)})
        return frame

    if not ids:
        warnings.warn(f"{test_file}: the table has no rows, so the submission is its header alone", stacklevel=2)
        write({})
        say(f"wrote {path}: 0 rows; valid")
        return path
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
    num_texts = sum(len(tables[job.run]) for job in planned)
    progress = open_progress(num_texts, "rows", "row")
    predicting = _Predicting(runs, tables, num_texts, progress.advance)
    try:
        while (job := jobs.next()) is not None:
            run, table = runs[job.run], tables[job.run]
            path = PREDICTIONS / f"{_mark(run, job.fold, table)}.npy"
            there = path.exists()
            if there:
                progress.advance(len(table))
            else:
                predicting.prepare(job.run)
            started = time.monotonic()
            found.setdefault(job.run, []).append(kept(path, partial(predicting.predict, job)))
            jobs.finished(job, None if there else time.monotonic() - started)
            if after_each is not None:
                after_each(found)
    finally:
        progress.close()
        predicting.close()
    return found, jobs


class _Predicting:
    """Opens who predicts, and reads tables, when a model is first asked for. Each tokenizer sees a text once."""

    def __init__(
        self, runs: Sequence[LoadedRun], tables: Sequence[Table], num_texts: int, on_rows: Callable[[int], Any]
    ) -> None:
        self.runs, self.tables, self.num_texts, self.on_rows = runs, tables, num_texts, on_rows
        self.crew: Alone | Crew | None = None
        self.memory: Memory = {}
        self.content: Any = None
        self.read: int | None = None

    def prepare(self, run: int) -> None:
        """Do what is done once for all models of a run, and is no part of the time of one."""
        if self.crew is None:
            self.crew = crew_of(self.runs[run], self.num_texts)
        if self.read != run:
            self.content, self.read = None, run
            self.content = self.runs[run].read(self.tables[run], memory=self.memory)

    def predict(self, job: Job) -> NDArray[np.float64]:
        """Return (N, K) predictions of one model."""
        assert self.crew is not None and self.read == job.run
        return self.crew.predict(self.runs[job.run], job.fold, self.content, self.on_rows)

    def close(self) -> None:
        if self.crew is not None:
            self.crew.close()


def _mark(run: LoadedRun, fold: Fold, table: Table) -> str:
    """Return what a model's predictions depend on, as a digest."""
    weights = run.weights_of(fold)
    status = weights.stat()
    marks = read_json(run.folder.manifest)["fingerprints"]
    kinds = sorted({runtime.kind for runtime in run.runtimes})  # not how many, nor their threads
    return digest([table.fingerprint(), str(weights.resolve()), str(status.st_mtime_ns), str(marks), *kinds])


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


def must_fit(runs: Sequence[LoadedRun], blend: Blend | None) -> None:
    """Raise ValueError unless runs predict the same, and are as they were when a blend was fitted to them."""
    first = runs[0]
    for other in runs[1:]:
        if (other.task.kind, other.output_names) != (first.task.kind, first.output_names):
            raise ValueError(
                f"{first.folder.path} predicts {first.task.kind} {first.output_names}, but {other.folder.path} "
                f"predicts {other.task.kind} {other.output_names}; runs in one submission must predict the same"
            )
    if blend is None:
        return
    for run, marks in zip(runs, blend.fingerprints, strict=True):
        now = read_json(run.folder.manifest)["fingerprints"]
        changed = [part for part, mark in marks.items() if now.get(part) != mark]
        if changed:
            raise ValueError(
                f"{run.folder.path} has another {' and another '.join(changed)} than when {blend.path} was fitted; fit "
                "the blend anew with `comp blend`"
            )


def as_labels(
    wanted: bool | None, layout: pd.DataFrame | None, of_task: Mapping[str, Any], blend: Blend | None, metric: str
) -> tuple[bool, str | None]:
    """Return whether 0 and 1 are submitted for probabilities, and what to say where nobody asked for either.

    `wanted`, `layout` (the sample), `metric`: as of `infer`; a blend has a metric of its own. Raises ValueError where
    what is wanted does not fit the task or the blend.
    """
    task = of_task["task"]
    if task.kind not in HARD:
        if wanted is not None:
            raise ValueError(
                f"--labels and --probabilities are for tasks of kind {' and '.join(HARD)}; '{task.name}' is "
                f"{task.kind}, where the sample submission decides: leave them out"
            )
        return False, None
    recipe = None if blend is None else blend.recipe
    metric = metric if blend is None else blend.problem.metric
    hard = wants_labels(layout, **of_task, metric=metric) if wanted is None else wanted
    if hard and recipe is not None and recipe.method == "rank_mean":
        raise ValueError("--labels: a blend by rank_mean gives ranks, which have no 0.5; use another method")
    if wanted is not None:
        return hard, None
    if hard:
        calibration = "none" if recipe is None else recipe.calibration
        better = metric.startswith("f1") and calibration == "none"
        hint = "; a better threshold: `comp blend --calibration thresholds`, of one run too" if better else ""
        how = "by the blend's thresholds" if calibration == "thresholds" else "1 from a probability of 0.5 on"
        return True, f"labels are submitted, {how}, as {metric} scores them{hint}"
    of_classes = metric in ("roc_auc", "log_loss")
    if of_classes and layout is not None and len(layout) and holds_whole_numbers(layout, **of_task):
        return False, "probabilities are submitted; where the competition scores labels, write these with --labels"
    return False, None


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
