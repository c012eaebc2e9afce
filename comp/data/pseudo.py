"""Pseudo-labels, kept apart by fold: labels for fold k come from models alone that never saw fold k's held-out rows.

In cross-validation that is one model of a run: model k itself, which trained on all other folds. What a model of
another fold, a full-data model or a mean over folds says of a row carries what they learned from fold k's targets; a
student trained on it would be scored on rows it knows by hearsay. Such labels are kind `full`, for --fold full alone.

pseudo/NAME/  manifest.json  rows.parquet (the unlabelled rows that are used, under keys of their own)
              fold0.parquet ... (kind `fold`), full.parquet (kind `full`): key, pred_<output>, spread, agree

Which file serves which fold is decided by what stands in it, a digest of the held-out ids, and not by its name. M rows,
K outputs of the first task.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.data.frames import Ids, Mask, Values, blank, listed
from comp.data.leaks import alike
from comp.data.tables import Table, table_of
from comp.runs import commit, digest, now, read_json, versions, write_atomic, write_json

if TYPE_CHECKING:
    from comp.config import Competition, Task

__all__ = [
    "KEY",
    "Answers",
    "LabelSet",
    "answers_of",
    "confidence",
    "data_marks",
    "extended",
    "held_out_mark",
    "outputs_of",
    "read_set",
    "table_of_rows",
    "unfit_rows",
    "write_set",
]

KEY = "pseudo_key"
ROWS, MANIFEST = "rows.parquet", "manifest.json"
NUMBERS = ("regression", "ordinal")
ANEW = "make the set anew with `comp pseudo`"
Fold: TypeAlias = int | str


# --- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What the teachers say of M rows."""

    keys: Ids
    """(M,)"""
    preds: NDArray[np.float64]
    """(M, K) mean over the teachers: values, or probabilities."""
    spread: NDArray[np.float64]
    """(M,) how far apart the teachers are, in the output where it is most."""
    agree: Mask
    """(M,) whether all teachers choose the same class or labels; for numbers True."""


def answers_of(keys: Ids, by_teacher: Sequence[NDArray[np.floating]], kind: str) -> Answers:
    """Put the predictions (M, K) of one or more teachers together."""
    preds = np.stack(by_teacher).astype(np.float64)
    assert preds.ndim == 3 and preds.shape[1] == len(keys), preds.shape
    chosen = np.stack([_chosen(one, kind) for one in preds])
    agree = np.ones(len(keys), bool) if kind in NUMBERS else (chosen == chosen[0]).all(axis=(0, 2))
    return Answers(keys, preds.mean(axis=0), np.ptp(preds, axis=0).max(axis=1), agree)


def _chosen(preds: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """Return the likeliest class (M, 1), or every column (M, K) rounded, halves up."""
    if kind == "multiclass":
        return preds.argmax(axis=1)[:, None].astype(np.float64)
    rounded: NDArray[np.float64] = np.floor(preds + 0.5)
    return rounded


def confidence(preds: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """Return (M,) the probability of the chosen class; of several labels that of the least sure one."""
    if kind == "multiclass":
        return preds.max(axis=1)
    return np.maximum(preds, 1 - preds).min(axis=1)


def _targets(preds: NDArray[np.float64], task: Task, table: Table, labels: str) -> tuple[Values, Values]:
    """Return the first task's targets of the true rows (N, W) and of the pseudo rows (M, W), in one form.

    Class indices cannot hold soft labels: then the true rows become probabilities too, of 0 and 1.
    """
    true = table.targets[task.name]
    if labels == "soft":
        if task.kind == "multiclass" and true.shape[1] == 1:
            true = np.eye(preds.shape[1], dtype=np.float32)[true[:, 0].astype(np.int64)]
        return true, preds.astype(np.float32)
    chosen = _chosen(preds, task.kind)
    if task.kind == "ordinal":
        grades = [float(grade) for grade in table.classes[task.name]]
        chosen = chosen.clip(grades[0], grades[-1])
    if task.kind == "multiclass" and true.shape[1] > 1:
        chosen = np.eye(preds.shape[1])[chosen[:, 0].astype(np.int64)]
    return true, chosen.astype(np.float32)


def extended(
    table: Table,
    tasks: Sequence[Task],
    rows: Table,
    answers: Answers,
    *,
    labels: str,
    weight: float,
    training: NDArray[np.int64],
) -> Table:
    """Return the true rows and after them the pseudo `rows` (M), with ids, texts, targets and weights alone.

    `labels`: soft | hard, of the first task; the targets of other tasks are missing. A standard error, where a loss
    reads one, is the median of the `training` rows.
    """
    assert (rows.ids == answers.keys).all(), "labels of other rows"
    first, count = tasks[0], len(rows)
    targets = {
        name: _below(values, np.full((count, values.shape[1]), np.nan)) for name, values in table.targets.items()
    }
    targets[first.name] = _below(*_targets(answers.preds, first, table, labels))
    weights = None
    if table.weights is not None or weight != 1:
        own = np.ones(len(table)) if table.weights is None else table.weights
        weights = _below(own, np.full(count, weight))
    errors = {
        name: _below(values, np.full(count, np.median(values[training]))) for name, values in table.errors.items()
    }
    texts = tuple([*true, *pseudo] for true, pseudo in zip(table.texts, rows.texts, strict=True))
    ids = np.concatenate([table.ids, rows.ids])
    return replace(table, ids=ids, texts=texts, targets=targets, weights=weights, errors=errors, frame=pd.DataFrame())


def _below(true: NDArray[Any], pseudo: NDArray[Any]) -> Values:
    return np.concatenate([true, pseudo]).astype(np.float32)


# --- fingerprints and rows -------------------------------------------------------------------------------------------


def data_marks(table: Table, competition: Competition) -> dict[str, str]:
    """Return a fingerprint of ids and first targets, and one of each text column, whatever the order of the rows.

    Two configs may read different columns of one table: what both have must be the same.
    """
    order = np.argsort(table.ids)
    texts = zip(competition.text_columns, table.texts, strict=True)
    return {"targets": table.label_fingerprint()} | {
        f"text column '{name}'": digest(column[row] for row in order) for name, column in texts
    }


def held_out_mark(ids: Iterable[str]) -> str:
    """Return a fingerprint of a fold's held-out ids, whatever their order."""
    return digest(sorted(ids))


def outputs_of(task: Task, classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return what teachers and student must have in common of the first task."""
    names = list(classes[task.name]) if task.kind == "multiclass" else list(task.targets)
    return {"kind": task.kind, "targets": list(task.targets), "outputs": names}


def table_of_rows(frame: pd.DataFrame, competition: Competition, source: str) -> Table:
    """Return unlabelled rows, whose ids are the keys in column KEY. Raises ValueError where a text column lacks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of rows without text, which are left out
        return table_of(frame, competition.model_copy(update={"id": KEY}), source=source)


def unfit_rows(rows: Table, train: Table) -> dict[str, Mask]:
    """Return reason -> unlabelled rows (M,) that must not be trained on, each row under its first reason."""
    equal, near = alike(rows, train)
    again, nearly = alike(rows, rows)
    reasons = {
        "without text": np.all([blank(cells) for cells in rows.texts], axis=0),
        "with the text of a training row": equal,
        "with nearly the text of a training row": near,
        "with the text of an earlier row": again,
        "with nearly the text of an earlier row": nearly,
    }
    left = np.ones(len(rows), dtype=bool)
    for reason, mask in reasons.items():
        reasons[reason], left = mask & left, left & ~mask
    return reasons


# --- the set on disk -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelSet:
    """A label set whose manifest is as it was written."""

    folder: Path
    about: dict[str, Any]
    """data, folds, task, teachers, unlabelled, files; see `comp pseudo`."""
    fingerprint: str
    """Digest of `about`, the files' digests with it."""

    @property
    def num_teachers(self) -> int:
        return len(self.about["teachers"])

    def must_fit(self, table: Table, competition: Competition, task: Task, folds: str | None) -> None:
        """Raise ValueError unless the set was made from this data, task and, where given, this fold file."""
        mine = outputs_of(task, table.classes)
        for what, there in self.about["task"].items():
            if there != mine[what]:
                raise ValueError(
                    f"{self.folder} labels {what} {there}, but the first task here has {mine[what]}; {ANEW}"
                )
        here = data_marks(table, competition)
        for what, there in self.about["data"].items():
            if here.get(what, there) != there:
                raise ValueError(
                    f"{self.folder} was made from other training data: {what} {there}, here {here[what]}; its teachers "
                    f"may have seen rows that are held out here: {ANEW} from runs on this table"
                )
        if folds is not None and self.about["folds"] not in (None, folds):
            raise ValueError(
                f"{self.folder} was made on other folds: {self.about['folds']}, here {folds}; its teachers have seen "
                f"rows that are held out here: {ANEW} from runs on this fold file"
            )

    def rows(self) -> pd.DataFrame:
        """Return the unlabelled rows with their keys. Raises ValueError when the file was changed."""
        return self._read(ROWS)

    def answers(self, fold: Fold, held_out: str | None) -> Answers:
        """Return the labels for a fold whose held-out ids have the fingerprint `held_out` (None for "full").

        Raises ValueError when the set has none that were made without these rows, or the file was changed.
        """
        kind = "full" if fold == "full" else "fold"
        files = {name: about for name, about in self.about["files"].items() if name != ROWS}
        wanted = {"kind": kind, "held_out": held_out}
        found = [name for name, about in files.items() if all(about[key] == value for key, value in wanted.items())]
        if not found:
            there = ", ".join(f"{name} (kind {about['kind']})" for name, about in files.items())
            raise ValueError(
                f"{self.folder} has no labels for fold {fold}"
                + (" by models that never saw its held-out rows" if kind == "fold" else "")
                + f"; it has {there}. Labels of kind full, by models that saw them, are for --fold full alone: "
                f"finish fold {fold} in every teacher, then {ANEW}"
            )
        frame = self._read(found[0])
        said = {key: frame.attrs.get(key) for key in wanted}
        if said != wanted:
            raise ValueError(
                f"{self.folder / found[0]} holds labels of kind {said['kind']} for other rows than {MANIFEST} says "
                f"({said['held_out']}, not {held_out}); {ANEW}"
            )
        preds = frame[[f"pred_{name}" for name in self.about["task"]["outputs"]]].to_numpy(np.float64)
        return Answers(
            frame[KEY].to_numpy(object), preds, frame["spread"].to_numpy(np.float64), frame["agree"].to_numpy(bool)
        )

    def _read(self, name: str) -> pd.DataFrame:
        path = self.folder / name
        known = self.about["files"][name]["digest"]
        now_is = digest([path.read_bytes()]) if path.is_file() else "missing"
        if now_is != known:
            raise ValueError(f"{path} was changed after it was made (digest {known}, now {now_is}); {ANEW}")
        return pd.read_parquet(path)


def write_set(
    folder: Path,
    rows: pd.DataFrame,
    labels: Mapping[Fold, Answers],
    held_out: Mapping[Fold, str],
    about: Mapping[str, Any],
    *,
    source: str,
) -> LabelSet:
    """Write a label set and return it.

    `rows`: the unlabelled rows, keys in column KEY. `held_out`: fold -> fingerprint of its held-out ids; "full" has
    none. `about`: data, folds, task, teachers, unlabelled. `source`: file of the rows, named but no part of the
    fingerprint.
    """
    (folder / MANIFEST).unlink(missing_ok=True)  # killed on the way: no set, rather than a mixed one
    for path in folder.glob("*.parquet"):
        path.unlink()
    files: dict[str, dict[str, Any]] = {ROWS: {"digest": _write(folder / ROWS, rows)}}
    for fold, answers in labels.items():
        kind = {"kind": "full" if fold == "full" else "fold", "held_out": held_out.get(fold)}
        names = about["task"]["outputs"]
        columns = {KEY: answers.keys} | {f"pred_{name}": answers.preds[:, k] for k, name in enumerate(names)}
        frame = pd.DataFrame({**columns, "spread": answers.spread, "agree": answers.agree})
        frame.attrs.update(kind)
        name = "full.parquet" if fold == "full" else f"fold{fold}.parquet"
        files[name] = {**kind, "rows": len(frame), "digest": _write(folder / name, frame)}
    whole = json.loads(json.dumps({**about, "files": files}))
    made = {"created": now(), "commit": commit(), "versions": versions(), "source": source}
    write_json(folder / MANIFEST, {**made, "fingerprint": _mark(whole), "set": whole})
    return LabelSet(folder, whole, _mark(whole))


def _write(path: Path, frame: pd.DataFrame) -> str:
    write_atomic(path, lambda temporary: frame.to_parquet(temporary, index=False))
    return digest([path.read_bytes()])


def _mark(about: Mapping[str, Any]) -> str:
    return digest([json.dumps(about, sort_keys=True)])


def read_set(folder: str | Path) -> LabelSet:
    """Open a label set. Raises ValueError when it is none, or its manifest was changed."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        known = (
            sorted(str(file.parent) for file in folder.parent.glob(f"*/{MANIFEST}")) if folder.parent.is_dir() else []
        )
        raise ValueError(
            f"{folder} is no label set: {MANIFEST} is missing; make one with `comp pseudo --run RUN --data FILE` "
            f"(there are: {listed(known, 10) or 'none'})"
        )
    found = read_json(path)
    about, known_mark = found.get("set", {}), found.get("fingerprint")
    if _mark(about) != known_mark:
        raise ValueError(f"{path} was changed after it was made (fingerprint {known_mark}, now {_mark(about)}); {ANEW}")
    return LabelSet(folder, about, str(known_mark))
