"""Frames -> Table (ids, texts, targets), with every check on a user's file in one message per file."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.data.frames import (
    Ids,
    Values,
    blank,
    cell_strings,
    finite_numbers,
    index_as_column,
    listed,
    named_twice,
    no_column,
    raise_faults,
    read_frame,
    row_fault,
)
from comp.runs import digest

if TYPE_CHECKING:
    from comp.config import Competition, Task

__all__ = ["Table", "encode_targets", "read_competition", "read_test", "read_train", "table_of"]

SOFT_SUM = 1e-3  # how far a row of soft labels may sum from 1
MOST_GRADES = 1000  # an ordinal target with a wider range is a mistake (a year, an id), not a scale
Encoded: TypeAlias = tuple[Values, list[str], list[str]]  # targets (N, K), labels or [], faults


@dataclass(frozen=True)
class Table:
    """The rows of one table, every part in the order of the file."""

    ids: Ids
    """(N,) str, unique."""
    texts: tuple[list[str], ...]
    """One list of N per text column."""
    targets: dict[str, NDArray[np.float32]]
    """Task name -> (N, K), in the config's order; a multiclass label is the index of its class, an ordinal
    grade is itself. NaN = missing, in tasks after the first only. {} for a test table."""
    classes: dict[str, list[str]]
    """Task name -> the sorted labels of a multiclass task (the columns of soft labels), or every grade of an ordinal
    one, lowest first. Other kinds have no entry."""
    weights: NDArray[np.float32] | None
    """(N,), finite, >= 0, not all 0; None = every row counts the same."""
    frame: pd.DataFrame
    """The columns as read, index 0..N-1: groups, times and fold columns are looked up here."""
    errors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """Task name -> (N,) standard errors of its target, finite, >= 0; only tasks whose loss reads them."""

    def __len__(self) -> int:
        return len(self.ids)

    def hard_targets(self, task: Task) -> NDArray[np.float32]:
        """Return the task's targets (N, K), soft multiclass labels as the index (N, 1) of the likeliest class."""
        targets = self.targets[task.name]
        if task.kind == "multiclass" and targets.shape[1] > 1:
            return targets.argmax(axis=1)[:, None].astype(np.float32)
        return targets

    def fingerprint(self) -> str:
        """Return a digest of ids, texts and targets, in row order."""
        named = [part for name, values in self.targets.items() for part in (name, _bytes(values))]
        named += [part for name, values in self.errors.items() for part in (f"error of {name}", _bytes(values))]
        return digest([*self.ids, *named, *(text for texts in self.texts for text in texts)])

    def label_fingerprint(self) -> str:
        """Return a digest of the ids with their targets of the first task, whatever the order of the rows."""
        order = np.argsort(self.ids)
        return digest([*self.ids[order], *(_bytes(values[order]) for values in list(self.targets.values())[:1])])


def _bytes(values: Values) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


# --- targets -----------------------------------------------------------------------------------------------


def encode_targets(
    frame: pd.DataFrame, task: Task, classes: Sequence[str] | None, source: str, *, ids: Ids | None = None
) -> tuple[Values, list[str]]:
    """Return the task's targets (N, K) float32 and its class labels ([] for kinds that have none).

    classes: labels of an earlier table to encode by; None = take them from this one. ids name the rows in messages.
    Raises ValueError with every fault: a missing column, a cell not of the task's kind, a label outside `classes`.
    """
    role = f"target of task '{task.name}'"
    raise_faults(source, [no_column(name, role, frame) for name in task.targets if name not in frame.columns])
    values, labels, faults = _encode(frame, task, classes, ids)
    raise_faults(source, faults)
    return values, labels


def _encode(
    frame: pd.DataFrame, task: Task, classes: Sequence[str] | None, ids: Ids | None, *, gaps: bool = False
) -> Encoded:
    """Encode the targets of one task; with `gaps` an empty cell is NaN instead of a fault."""
    if gaps:
        return _encode_with_gaps(frame, task, classes, ids)
    if task.kind == "multiclass" and len(task.targets) == 1:
        return _encode_labels(frame, task.targets[0], classes, ids)
    if task.kind == "ordinal":
        return _encode_grades(frame, task.targets[0], classes, ids)
    shares = task.kind in ("binary", "multilabel", "multiclass")
    advice = f"{'map it to 0 and 1' if shares else 'make it numeric'}, or use kind multiclass for labels"
    columns, faults = [], []
    for name in task.targets:
        values, wrong = finite_numbers(frame, name, ids, advice)
        columns.append(values)
        faults += wrong
        if shares:
            outside = (values < 0) | (values > 1)
            allowed = f"kind {task.kind} allows 0, 1 and soft labels between: map it, or use another kind"
            faults += row_fault(f"column '{name}' is outside 0..1", outside, ids, allowed, values[outside])
    targets = np.stack(columns, axis=1)
    if task.kind != "multiclass":
        return targets, [], faults
    total = targets.sum(axis=1)
    off = np.abs(total - 1) > SOFT_SUM
    what = f"columns {listed(task.targets, 5)} do not sum to 1"
    faults += row_fault(what, off, ids, "divide each row of soft labels by its sum", total[off])
    return targets, list(task.targets), faults


def _encode_with_gaps(frame: pd.DataFrame, task: Task, classes: Sequence[str] | None, ids: Ids | None) -> Encoded:
    """Encode the rows that have every target (one column) or the cells that are there (several); NaN elsewhere."""
    empty = np.stack([blank(cell_strings(frame[name])) for name in task.targets], axis=1)
    if empty.all():
        what = f"column {listed(task.targets, 5)} of task '{task.name}' is empty in every row"
        return np.full(empty.shape, np.nan, np.float32), [], [f"{what}; fill it in or drop the task"]
    one_item = len(task.targets) == 1 or task.kind == "multiclass"
    kept = np.flatnonzero(~empty.any(axis=1)) if one_item else np.arange(len(frame))
    part = frame.take(kept).reset_index(drop=True)
    if not one_item:
        # A cell that is missing for now: 0 is allowed in every kind with several columns.
        part = part.assign(**{name: part[name].mask(empty[:, k], 0) for k, name in enumerate(task.targets)})
    values, labels, faults = _encode(part, task, classes, None if ids is None else ids[kept])
    targets = np.full((len(frame), values.shape[1]), np.nan, np.float32)
    targets[kept] = values
    if not one_item:
        targets[empty] = np.nan
    return targets, labels, faults


def _encode_labels(frame: pd.DataFrame, name: str, classes: Sequence[str] | None, ids: Ids | None) -> Encoded:
    cells = cell_strings(frame[name])
    faults = row_fault(f"column '{name}' has no label", blank(cells), ids, "fill it in or drop the row")
    found = _sorted_labels({cell for cell in cells if cell.strip()})
    if classes is None and len(found) == 1:
        faults.append(f"column '{name}' has a single class, {listed(found)}; kind multiclass needs two")
    known = found if classes is None else list(classes)
    faults += _unknown(name, cells, known)
    index = {label: float(number) for number, label in enumerate(known)}
    encoded = np.asarray([index.get(cell, np.nan) for cell in cells], dtype=np.float32)
    return encoded[:, None], known, faults


def _sorted_labels(labels: set[str]) -> list[str]:
    """Return labels sorted by number when each is one ("10" after "9"), else by text."""
    ordered = sorted(labels)
    numbers = pd.to_numeric(pd.Series(ordered, dtype=object), errors="coerce").to_numpy(dtype=np.float64)
    if not np.isfinite(numbers).all():
        return ordered
    return [ordered[place] for place in np.argsort(numbers, kind="stable")]


def _unknown(name: str, cells: Iterable[str], known: Sequence[str]) -> list[str]:
    allowed = set(known)
    strange = Counter(cell for cell in cells if cell.strip() and cell not in allowed)
    if not strange:
        return []
    counts = ", ".join(f"'{label}' ({times} rows)" for label, times in strange.most_common(5))
    more = ", ..." if len(strange) > 5 else ""
    advice = f"known are {listed(known, 20)}: correct them, or train anew on rows that have them"
    return [f"column '{name}' has {len(strange)} unknown labels: {counts}{more}; {advice}"]


def _encode_grades(frame: pd.DataFrame, name: str, classes: Sequence[str] | None, ids: Ids | None) -> Encoded:
    values, faults = finite_numbers(frame, name, ids, "use whole grades, or kind multiclass for labels")
    finite = np.isfinite(values)
    broken = finite & (values != np.round(values))
    allowed = "kind ordinal allows whole grades: round them, or use kind regression"
    faults += row_fault(f"column '{name}' is not a whole number", broken, ids, allowed, values[broken])
    whole = [int(value) for value in values[finite & ~broken]]
    if classes is not None:
        return values[:, None], list(classes), faults + _unknown(name, map(str, whole), classes)
    low, high = (min(whole), max(whole)) if whole else (0, 1)
    if low == high:
        faults.append(f"column '{name}' has a single grade, {low}; kind ordinal needs two")
    if high - low >= MOST_GRADES:
        faults.append(f"column '{name}' has grades {low} to {high}, over {MOST_GRADES}; use kind regression")
        return values[:, None], [], faults
    return values[:, None], [str(grade) for grade in range(low, high + 1)], faults


# --- tables ------------------------------------------------------------------------------------------------


def read_train(
    competition: Competition, tasks: Sequence[Task], *, classes: Mapping[str, Sequence[str]] | None = None
) -> Table:
    """Read `competition.train` with the targets of `tasks`. Raises as read_frame and table_of do."""
    frame = read_frame(competition.train)
    return table_of(frame, competition, tasks, classes=classes, source=competition.train)


def read_test(path: Path | str, competition: Competition, *, empty: bool = False) -> Table:
    """Read a table without targets; target and weight columns that stand in it are not looked at.

    `empty`: one without rows is allowed, as in the rerun of a notebook.
    """
    return table_of(read_frame(path, empty=empty), competition, source=str(path))


def read_competition(competition: Competition, tasks: Sequence[Task]) -> tuple[Table, Table | None]:
    """Return the training table and the test table (None when the config names none).

    Raises ValueError for every fault of either; a test table that carries labels may hold no class that train lacks.
    """
    train = read_train(competition, tasks)
    if competition.test is None:
        return train, None
    test = read_test(competition.test, competition)
    for task in tasks:
        column = task.targets[0]
        if task.kind == "multiclass" and column in test.frame.columns:
            labels = cell_strings(test.frame[column])
            raise_faults(competition.test, _unknown(column, labels, train.classes[task.name]))
    return train, test


def table_of(
    frame: pd.DataFrame,
    competition: Competition,
    tasks: Sequence[Task] = (),
    *,
    classes: Mapping[str, Sequence[str]] | None = None,
    source: str = "frame",
) -> Table:
    """Check a frame (one row per text, any index) and return it as a Table.

    tasks: heads whose targets are read; none = a test table, where weights are not read, there may be no row, and a
    row without text is a warning instead of an error, because nobody can repair Kaggle's hidden test file.
    classes: task name -> labels of the training table; None = take them from this frame.
    Raises ValueError that lists every fault of the frame.
    """
    frame = index_as_column(frame, competition.id)
    raise_faults(source, _column_faults(frame, competition, tasks))
    if not len(frame) and tasks:
        raise ValueError(f"{source}: the table has no rows")
    ids, faults = _ids(frame, competition.id)
    names = None if faults else ids  # ids that are missing or doubled cannot name a row
    texts, wrong = _texts(frame, competition.text_columns, names, source, train=bool(tasks))
    faults += wrong
    targets: dict[str, Values] = {}
    labels: dict[str, list[str]] = {}
    errors: dict[str, Values] = {}
    for task in tasks:
        known = (classes or {}).get(task.name)
        targets[task.name], found, wrong = _encode(frame, task, known, names, gaps=task is not tasks[0])
        faults += wrong
        if found:
            labels[task.name] = found
        if task.loss.name == "gaussian_nll":
            errors[task.name], wrong = _errors(frame, task.loss.standard_error, names)
            faults += wrong
    weights = None
    if tasks and competition.weight is not None:
        weights, wrong = _weights(frame, competition.weight, names)
        faults += wrong
    raise_faults(source, faults)
    return Table(ids, texts, targets, labels, weights, frame, errors)


def _column_faults(frame: pd.DataFrame, competition: Competition, tasks: Sequence[Task]) -> list[str]:
    names = [str(column) for column in frame.columns]
    if len(set(names)) < len(names):
        return named_twice(names)
    roles = [(name, "competition.text") for name in competition.text_columns]
    roles += [(name, f"target of task '{task.name}'") for task in tasks for name in task.targets]
    for task in tasks:
        if task.loss.name == "gaussian_nll":
            roles.append((task.loss.standard_error, f"standard error of task '{task.name}'"))
    if tasks and competition.weight is not None:
        roles.append((competition.weight, "competition.weight"))
    asked = [(competition.id, "competition.id"), *roles]
    faults = [no_column(name, role, frame) for name, role in asked if name not in frame.columns]
    for name, role in roles:
        if name == competition.id:
            faults.append(f"column '{name}' is both competition.id and {role}; change one of the two")
        elif role != "competition.text" and name in competition.text_columns:
            faults.append(f"column '{name}' is both competition.text and {role}; change one of the two")
    return faults


def _ids(frame: pd.DataFrame, name: str) -> tuple[Ids, list[str]]:
    cells = cell_strings(frame[name])
    ids = np.empty(len(cells), dtype=object)
    ids[:] = cells
    missing = blank(cells)
    again = pd.Series(ids, dtype=object).duplicated().to_numpy() & ~missing
    advice = "ids must be unique: drop the copies, or name another column in competition.id"
    return ids, [
        *row_fault(f"id column '{name}' is empty", missing, None, "every row needs an id"),
        *row_fault(f"id column '{name}' repeats an earlier id", again, None, advice, ids[again]),
    ]


def _texts(
    frame: pd.DataFrame, names: Sequence[str], ids: Ids | None, source: str, *, train: bool
) -> tuple[tuple[list[str], ...], list[str]]:
    """Return the text columns and their faults. A row may lack some of its texts (a title, say), not all."""
    texts, faults = tuple(cell_strings(frame[name]) for name in names), []
    for name in names:
        strange = next((cell for cell in frame[name].dropna() if not isinstance(cell, str)), None)
        if strange is not None:
            kind = type(strange).__name__
            faults.append(f"text column '{name}' holds {kind} values ({strange}, ...); make them strings")
    empty = np.all([blank(cells) for cells in texts], axis=0)
    what = f"column {listed(names, 5)} has no text (empty or missing)"
    if empty.all() and train:
        faults.append(f"{what} in any row; name another column in competition.text")
    elif train:
        faults += row_fault(what, empty, ids, "fill it in or drop the row")
    elif len(empty) > 1 and empty.all():
        warnings.warn(
            f"{source}: {what} in any row: all are predicted from an empty text; is it the right column?", stacklevel=3
        )
    else:
        for warning in row_fault(what, empty, ids, "such rows are predicted from an empty text"):
            warnings.warn(f"{source}: {warning}", stacklevel=3)
    return texts, faults


def _weights(frame: pd.DataFrame, name: str, ids: Ids | None) -> tuple[Values, list[str]]:
    weights, faults = finite_numbers(frame, name, ids, "weights are numbers >= 0")
    negative = weights < 0
    faults += row_fault(f"column '{name}' is negative", negative, ids, "weights are >= 0", weights[negative])
    if not faults and not weights.any():
        faults.append(f"column '{name}' is 0 in every row; some weights must be above 0")
    return weights, faults


def _errors(frame: pd.DataFrame, name: str, ids: Ids | None) -> tuple[Values, list[str]]:
    errors, faults = finite_numbers(frame, name, ids, "standard errors are numbers >= 0")
    negative = errors < 0
    return errors, faults + row_fault(
        f"column '{name}' is negative", negative, ids, "standard errors are >= 0", errors[negative]
    )


# --- leaks -------------------------------------------------------------------------------------------------
