"""Finished runs -> a label set: for every fold, what its own model of each run says of unlabelled rows.

Model k of a run trained on all folds but k, so it alone may label rows for the training of fold k. `full` labels, for
--fold full, come from each run's full-data model, or else the mean of its folds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.blend.features import check_folds_of_runs, parse_features
from comp.config import Config
from comp.config_pseudo import NUMBERS
from comp.data.folds import Folding, read_folds, valid_rows
from comp.data.frames import cell_strings, read_frame
from comp.data.pseudo import (
    KEY,
    Answers,
    answers_of,
    confidence,
    data_marks,
    held_out_mark,
    outputs_of,
    table_of_rows,
    unfit_rows,
    write_set,
)
from comp.data.tables import Table, read_train
from comp.runs import RUNS, RunFolder, digest, kept, read_json
from comp.ship.infer import LoadedRun, load
from comp.training.crossval import FOLDS

__all__ = ["SETS", "Teacher", "chosen_by_held_out", "make_labels", "open_teacher"]

SETS = Path("pseudo")
PREDICTIONS = RUNS / ".cache" / "pseudo"
SURE = 0.9
Fold = int | str


@dataclass(frozen=True)
class Teacher:
    """A run that labels."""

    run: LoadedRun
    table: Table
    """Its training table, as it was trained on."""
    folding: Folding | None
    """None for a run that has a full-data model alone."""

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def finished(self) -> list[Fold]:
        return self.run.folder.finished_folds()

    def about(self) -> dict[str, Any]:
        """Return what the label set says of it."""
        return {
            "run": self.run.folder.name,
            "weights": self.run.weights,
            "fingerprints": read_json(self.run.folder.manifest)["fingerprints"],
            "chosen_by_held_out_rows": chosen_by_held_out(self.config, self.run),
        }

    def predict(self, fold: Fold, table: Table, to_come: int = 0) -> NDArray[np.float64]:
        """Return (M, K) predictions of one model; kept on disk, so that a killed call goes on where it was.

        `to_come`: rows that the models after it will predict.
        """
        weights = self.run.weights_of(fold)
        marks = [str(weights.resolve()), str(weights.stat().st_mtime_ns), self.run.runtime.describe()]
        marks.append(str(read_json(self.run.folder.manifest)["fingerprints"]))
        path = PREDICTIONS / f"{digest([table.fingerprint(), *marks])}.npy"
        found = kept(path, lambda: replace(self.run, folds=[fold]).predict_table(table, to_come=to_come))
        if not np.isfinite(found).all():
            raise ValueError(f"{self.run.folder.fold(fold).path} predicts NaN or infinite values; train it anew")
        return found


def chosen_by_held_out(config: Config, run: LoadedRun) -> list[str]:
    """Return by what a fold model's weights depend on its held-out rows after all, though it never trained on them."""
    if run.folder.classical.exists():
        features = [name for name in read_json(run.folder.classical)["features"] if name.startswith("run:")]
        return [f"the features {name} are of best weights, those of the best held-out score" for name in features]
    if run.folds == ["full"]:
        return []  # holds nothing out
    adversarial = config.stability.adversarial
    reasons = {
        "best weights are those of the best held-out score": run.weights == "best",
        "a soup is chosen by held-out scores": run.weights == "averaged" and config.stability.averaging.name == "soup",
        "evaluation.patience ends training by held-out scores": config.evaluation.patience is not None,
        "adversarial.start_score waits for a held-out score": getattr(adversarial, "start_score", None) is not None,
    }
    return [reason for reason, there in reasons.items() if there]


def open_teacher(path: str | Path, weights: str) -> Teacher:
    """Open a finished run. Raises ValueError when its table, its fold file or a fold is not what it was trained on."""
    classical = RunFolder(path).classical.exists()  # has one kind of weights
    run = load(path, weights="last" if classical else weights)
    folder, config, marks = run.folder, run.config, read_json(run.folder.manifest)["fingerprints"]
    table = read_train(config.competition, config.tasks)
    if table.fingerprint() != marks["data"]:
        raise ValueError(
            f"{folder.path} was trained on data {marks['data']}, but {config.competition.train} is now "
            f"{table.fingerprint()}: train it anew"
        )
    for fold in folder.finished_folds():
        run.weights_of(fold)  # raises where there are no averaged ones
    numbers = [fold for fold in folder.finished_folds() if isinstance(fold, int)]
    if not numbers:
        return Teacher(run, table, None)
    folding = read_folds(FOLDS / f"{config.fold_name}.csv", table, config.folds)
    if folding.fingerprint != marks["folds"]:
        raise ValueError(
            f"{folder.path} was trained on folds {marks['folds']}, but {FOLDS / config.fold_name}.csv is now "
            f"{folding.fingerprint}: a model may have seen rows that this file holds out; train it anew"
        )
    for fold in numbers:
        validated = pd.read_parquet(folder.fold(fold).oof, columns=["id"])["id"]
        if not set(validated) <= set(table.ids[valid_rows(folding.fold, fold)]):
            raise ValueError(
                f"{folder.fold(fold).path} was validated on other rows than fold {fold} of the fold file has: it is "
                "the model of another fold; put it back, or train it anew"
            )
    if classical:
        check_folds_of_runs(parse_features(read_json(folder.classical, "features")["features"]), folding)
    return Teacher(run, table, folding)


# --- the set ---------------------------------------------------------------------------------------------------------


def make_labels(
    runs: Sequence[str | Path],
    data: str,
    *,
    name: str | None = None,
    weights: str = "last",
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Path:
    """Label the rows of `data` by one or more runs; write pseudo/<name> (the first run's name) and return its path.

    `weights`: last, best or averaged; best weights were chosen on held-out rows, which is said and noted. Raises
    ValueError when the runs do not go together, or no row is left.
    """
    if len({Path(run).resolve() for run in runs}) != len(runs):
        raise ValueError("a run is named twice; each counts once")
    teachers = [open_teacher(run, weights) for run in runs]
    folder = SETS / (name or teachers[0].run.folder.name)
    if (folder / "manifest.json").exists() and not overwrite:
        raise ValueError(
            f"{folder} is there already; name another set with --name, or replace it with --overwrite (a run that "
            "trains on it cannot go on then)"
        )
    shared = _shared(teachers)
    for teacher in teachers:
        for reason in teacher.about()["chosen_by_held_out_rows"]:
            say(f"warning: {teacher.run.folder.path}: {reason}: a mild leak from the held-out rows into their labels")
    folds = [fold for fold in teachers[0].finished if all(fold in teacher.finished for teacher in teachers)]
    if not folds:
        raise ValueError("no fold is finished in every run; finish one with `comp train --fold`")
    numbers = [fold for fold in folds if isinstance(fold, int)]
    for fold in sorted({fold for teacher in teachers for fold in teacher.finished if isinstance(fold, int)}):
        if fold not in folds:
            say(f"fold {fold}: not finished in every run, left out")
    rows, dropped, mark = _fresh_rows(data, teachers, say)
    tables = [table_of_rows(rows, teacher.config.competition, data) for teacher in teachers]
    by_fold = _predict(teachers, tables, numbers)
    kind = shared["task"]["kind"]
    labels = {own: answers_of(tables[0].ids, preds, kind) for own, preds in by_fold.items()}
    for own, answers in labels.items():
        say(_line(own, answers, kind, len(teachers)))
    table, folding = teachers[0].table, teachers[0].folding
    held_out: dict[Fold, str] = {}
    for fold in numbers:
        assert folding is not None
        held_out[fold] = held_out_mark(table.ids[valid_rows(folding.fold, fold)])
    unlabelled = {"rows": len(rows) + sum(dropped.values()), "dropped": dropped, "fingerprint": mark}
    about = {**shared, "teachers": [teacher.about() for teacher in teachers], "unlabelled": unlabelled}
    made = write_set(folder, rows, labels, held_out, about, source=data)
    say(f"wrote {folder}, fingerprint {made.fingerprint}; next: comp train --set pseudo.folder={folder}")
    return folder


def _predict(
    teachers: Sequence[Teacher], tables: Sequence[Table], numbers: Sequence[int]
) -> dict[Fold, list[NDArray[np.float64]]]:
    """Return fold, or "full", -> the predictions (M, K) of each teacher; `tables` are the rows as each reads them."""
    wanted: list[Fold] = [*numbers, "full"]
    found: dict[Fold, list[NDArray[np.float64]]] = {fold: [] for fold in wanted}
    models = [("full",) * ("full" in teacher.finished) for teacher in teachers]
    left = sum(len(numbers) + len(full) for full in models) * len(tables[0])
    for teacher, table in zip(teachers, tables, strict=True):
        for fold in numbers:
            left -= len(table)
            found[fold].append(teacher.predict(fold, table, left))
        own = [found[fold][-1] for fold in numbers]
        full = "full" in teacher.finished
        left -= len(table) * full
        found["full"].append(teacher.predict("full", table, left) if full else np.mean(own, axis=0))
    return found


def _shared(teachers: Sequence[Teacher]) -> dict[str, Any]:
    """Return data, folds and task of the teachers. Raises ValueError, with what differs, unless they are the same."""
    first = teachers[0]
    shared: dict[str, Any] = {"data": {}, "folds": None}
    for teacher in teachers:
        where = f"{first.run.folder.path} and {teacher.run.folder.path}"
        task = outputs_of(teacher.run.task, teacher.run.classes)
        if task != shared.setdefault("task", task):
            raise ValueError(f"{where} predict {shared['task']} and {task}; teachers must predict the same")
        for what, mark in data_marks(teacher.table, teacher.config.competition).items():
            if mark != shared["data"].setdefault(what, mark):
                raise ValueError(
                    f"{where} were trained on different data: {what} {shared['data'][what]} and {mark}; train one anew"
                )
        folds = None if teacher.folding is None else teacher.folding.fingerprint
        if teacher is not first and folds != shared["folds"]:
            raise ValueError(
                f"{where} were trained on different folds ({shared['folds']} and {folds}): a model of one has seen "
                "rows that the other holds out; train one anew on the other's fold file"
            )
        shared["folds"] = folds
    return shared


def _fresh_rows(
    data: str, teachers: Sequence[Teacher], say: Callable[[str], None]
) -> tuple[pd.DataFrame, dict[str, int], str]:
    """Return the rows of `data` to label, how many were dropped why, and a fingerprint of the whole table.

    The rows have keys that no training id can be; target columns, if there are any, are not among theirs.
    """
    competition, task = teachers[0].config.competition, teachers[0].run.task
    frame = read_frame(data, competition.id).drop(columns=task.targets, errors="ignore")
    if KEY in frame.columns:
        raise ValueError(f"{data}: column '{KEY}' is a name of ours; rename it")
    prefix = "pseudo:"
    while any(str(known).startswith(prefix) for known in teachers[0].table.ids):
        prefix = f"pseudo-{prefix}"
    frame.insert(0, KEY, [prefix + cell for cell in cell_strings(frame[competition.id])])
    left, mark, dropped = np.arange(len(frame)), "", dict[str, int]()
    views = {tuple(teacher.config.competition.text_columns): teacher for teacher in teachers}
    for teacher in views.values():
        part = frame.take(left).reset_index(drop=True)
        table = table_of_rows(part, teacher.config.competition, data)
        mark = mark or table.fingerprint()
        unfit = unfit_rows(table, teacher.table)
        for reason, mask in unfit.items():
            dropped[reason] = dropped.get(reason, 0) + int(mask.sum())
        left = left[~np.any(list(unfit.values()), axis=0)]
        if not len(left):
            break
    dropped = {reason: count for reason, count in dropped.items() if count}
    told = "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) if dropped else ""
    say(f"{data}: {len(left):,} of {len(frame):,} rows to label{told}")
    if not len(left):
        raise ValueError(
            f"{data}: no row is left to label; give a table whose texts are not those of the training rows"
        )
    return frame.take(left).reset_index(drop=True), dropped, mark


def _line(fold: Fold, answers: Answers, kind: str, num_teachers: int) -> str:
    """Return what the labels of a fold are like, which is what the filters are chosen by."""
    parts = [f"fold {fold}: {len(answers.keys):,} rows"]
    if kind not in NUMBERS:
        sure = confidence(answers.preds, kind)
        parts.append(f"probability of the chosen class at least {SURE} in {np.mean(sure >= SURE):.0%}")
    if num_teachers > 1 and kind not in NUMBERS:
        parts.append(f"teachers agree in {answers.agree.mean():.0%}")
    elif num_teachers > 1:
        low, high = np.quantile(answers.spread, [0.5, 0.9])
        parts.append(f"teachers apart by {low:.4g} (median), {high:.4g} (nine in ten)")
    return ", ".join(parts)
