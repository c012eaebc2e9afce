"""Submissions: built from sample_submission.csv, aligned by id, checked, written with a sidecar.

Tables are read as text, so that ids such as "007" stay what they are. N rows, K target columns, C classes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.config import Task
from comp.data.frames import cell_strings, listed, parse_numbers, read_frame
from comp.metrics import METRICS
from comp.runs import commit, now, write_atomic, write_json

__all__ = [
    "HARD",
    "build_submission",
    "build_without_sample",
    "check_path",
    "check_same_ids",
    "holds_whole_numbers",
    "numbers_of",
    "read_submission",
    "strange_labels",
    "validate_submission",
    "wants_labels",
    "write_submission",
]

Floats: TypeAlias = NDArray[np.float64]
PROBABILITIES = ("binary", "multilabel", "multiclass")
HARD = ("binary", "multilabel")  # probabilities whose labels are 0 and 1


def _check_unique(ids: Sequence[str], what: str) -> None:
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{what} has {len(twice)} ids more than once: {listed(twice, 5)}")


def check_same_ids(found: Sequence[str], wanted: Sequence[str], what: str, against: str) -> None:
    """Raise ValueError unless both hold the same ids, each once, in whatever order."""
    _check_unique(wanted, against)
    _check_unique(found, what)
    have, want = set(found), set(wanted)
    faults = []
    if missing := [name for name in wanted if name not in have]:
        faults.append(f"lacks {len(missing)} of the {len(want)} ids of {against}: {listed(missing, 5)}")
    if extra := [name for name in found if name not in want]:
        faults.append(f"has {len(extra)} ids that {against} has not: {listed(extra, 5)}")
    if faults:
        raise ValueError(f"{what} {'; and '.join(faults)}")


# --- building -----------------------------------------------------------------------------------------------


def _usual_sample(ids: Sequence[str], id_column: str, task: Task, classes: Sequence[str]) -> pd.DataFrame:
    """Return the sample submission of a competition that ships none."""
    names = classes if task.kind == "multiclass" else task.targets
    return pd.DataFrame({id_column: list(ids), **{name: ["0"] * len(ids) for name in names}}, dtype=object)


def _layout(sample: pd.DataFrame, id_column: str, task: Task, classes: Sequence[str]) -> tuple[list[str], bool]:
    """Return the sample's prediction columns in its order, and whether it is one column of labels."""
    names = [str(name) for name in sample.columns]
    if id_column not in names:
        raise ValueError(
            f"the sample submission has no id column '{id_column}', it has {listed(names, 5)}; set competition.id"
        )
    found = [name for name in names if name != id_column]
    wanted = list(classes) if task.kind == "multiclass" else list(task.targets)
    if len(found) == 1 and (task.kind == "multiclass" or len(wanted) == 1):
        return found, task.kind == "multiclass"  # one column is that one column, whatever it is called
    if sorted(found) != sorted(wanted):
        what = "classes" if task.kind == "multiclass" else "targets"
        alternative = " or a single column of labels" if task.kind == "multiclass" else ""
        raise ValueError(
            f"the sample submission's columns {listed(found, 5)} are not the {what} of task '{task.name}', "
            f"{listed(wanted, 5)}{alternative}"
        )
    return found, False


def _classes(task: Task, classes: Sequence[Any] | None) -> list[str]:
    assert task.kind != "multiclass" or classes, "multiclass needs its class labels"
    return [str(label) for label in classes or ()]


def _written_as(labels: Sequence[str], cells: Sequence[str]) -> list[str]:
    """Return labels as the sample's cells write them: the "3.0" of a training table is the sample's "3".

    As they are where a cell is one of them, and where not all of both are whole numbers.
    """
    numbers = parse_numbers(pd.Series(list(labels), dtype=object))[0]
    if set(labels) & set(cells) or not np.all(numbers == np.floor(numbers)) or not cells:
        return list(labels)
    for form, end in ((r"-?\d+", ""), (r"-?\d+\.0", ".0")):
        written = [f"{int(number)}{end}" for number in numbers]
        if all(re.fullmatch(form, cell) for cell in cells) and len(set(written)) == len(labels):
            return written
    return list(labels)


def strange_labels(sample: pd.DataFrame, *, id_column: str, task: Task, classes: Sequence[Any] | None) -> str | None:
    """Return a warning where the sample's one column of labels holds none of the classes; None where all is well."""
    labels = _classes(task, classes)
    columns, as_labels = _layout(sample, id_column, task, labels)
    cells = list(dict.fromkeys(sample[columns[0]])) if as_labels else []
    if not cells or set(labels) & set(cells):
        return None
    if not any(parse_numbers(pd.Series(texts, dtype=object))[2].any() for texts in (labels, cells)):
        return None  # numbers all: 0 stands for none
    return (
        f"the sample submission's column '{columns[0]}' holds {listed(cells, 5)}, none of the labels "
        f"{listed(labels, 5)} that are predicted; labels are written as the training table has them: see "
        "what the competition's page wants"
    )


def _whole_numbers(sample: pd.DataFrame, columns: Sequence[str]) -> bool:
    """Return whether every value of the sample's prediction columns is a whole number."""
    values = np.stack([parse_numbers(sample[name])[0] for name in columns])
    return bool(np.all(values == np.floor(values)))


def wants_labels(
    sample: pd.DataFrame | None, *, id_column: str, task: Task, classes: Sequence[Any] | None, metric: str
) -> bool:
    """Tell whether the competition wants 0 and 1 where the task predicts probabilities of them.

    So it is for binary and multilabel tasks where the metric scores labels (accuracy, f1, f1_macro) and the sample, if
    there is one, holds whole numbers only.
    """
    if task.kind not in HARD or not METRICS[metric].labels:
        return False
    return sample is None or holds_whole_numbers(sample, id_column=id_column, task=task, classes=classes)


def holds_whole_numbers(
    sample: pd.DataFrame, *, id_column: str, task: Task, classes: Sequence[Any] | None = None
) -> bool:
    """Tell whether every value of the sample's prediction columns is a whole number."""
    return _whole_numbers(sample, _layout(sample, id_column, task, _classes(task, classes))[0])


def _check_values(ids: Sequence[str], values: Floats, width: int) -> None:
    if values.ndim != 2 or values.shape != (len(ids), width):
        raise ValueError(f"predictions must have shape ({len(ids)}, {width}), got {values.shape}")
    bad = np.asarray(~np.isfinite(values).all(axis=1))
    if bad.any():
        raise ValueError(
            f"predictions of {int(bad.sum())} rows are NaN or infinite, ids "
            f"{listed((name for name, is_bad in zip(ids, bad, strict=True) if is_bad), 5)}"
        )


def _grades(values: Floats, classes: Sequence[str]) -> NDArray[np.int64]:
    """Round halves up; clip to the lowest and highest of `classes` when they are known."""
    grades = np.floor(values + 0.5)
    if classes:
        known = [float(label) for label in classes]
        grades = np.clip(grades, min(known), max(known))
    return grades.astype(np.int64)


def build_submission(
    sample: pd.DataFrame,
    ids: Sequence[Any],
    values: NDArray[np.floating],
    *,
    id_column: str,
    task: Task,
    classes: Sequence[Any] | None = None,
    hard: bool = False,
) -> pd.DataFrame:
    """Return a submission with exactly the sample's ids, row order and columns, filled from `values` by id.

    `sample` is read as text (`read_submission`); `values` (N, K) are decoded predictions of `ids`, (N, C) for
    multiclass with `classes` in index order. Regression, binary and multilabel fill the columns named as the
    targets (a single column may be named otherwise). Multiclass: a single column gets the likeliest label, whole
    numbers written as the sample writes them ("3", not "3.0"), else one column per label gets its probability.
    Ordinal: rounded to the grade where the sample holds whole numbers, and clipped to the range of `classes` when
    given. `hard`: binary and multilabel as 0 and 1, a probability from 0.5 on is 1. Raises ValueError when ids, columns
    or values do not fit.
    """
    labels = _classes(task, classes)
    columns, as_labels = _layout(sample, id_column, task, labels)
    ids, wanted = [str(name) for name in ids], [str(name) for name in sample[id_column]]
    check_same_ids(ids, wanted, "the table of predictions", "the sample submission")
    names = labels if task.kind == "multiclass" else list(task.targets)
    table = np.asarray(values, dtype=np.float64)
    _check_values(ids, table, len(names))
    row_of = {name: row for row, name in enumerate(ids)}
    table = table[[row_of[name] for name in wanted]]
    whole = task.kind == "ordinal" and _whole_numbers(sample, columns)
    filled: dict[str, Any] = {id_column: wanted}
    for name in columns:
        if as_labels:
            written = _written_as(labels, sample[name].tolist())
            filled[name] = [written[k] for k in table.argmax(axis=1)]
        else:
            # a single column may be called otherwise in the sample
            column = table[:, names.index(name) if len(columns) > 1 else 0]
            filled[name] = _grades(column, labels) if whole or hard else column
    return pd.DataFrame(filled)[list(sample.columns)]


def build_without_sample(
    ids: Sequence[Any],
    values: NDArray[np.floating],
    *,
    id_column: str,
    task: Task,
    classes: Sequence[Any] | None = None,
    hard: bool = False,
) -> pd.DataFrame:
    """Return ids in their order and the target columns; multiclass: one probability column per class.

    Ordinal predictions are rounded to grades. `hard`: as in `build_submission`.
    """
    sample = _usual_sample([str(name) for name in ids], id_column, task, _classes(task, classes))
    return build_submission(sample, ids, values, id_column=id_column, task=task, classes=classes, hard=hard)


# --- checking -----------------------------------------------------------------------------------------------


def numbers_of(frame: pd.DataFrame, column: str, what: str) -> Floats:
    """Return a column as (N,) float64. Raises ValueError on text, empty cells, NaN and infinities."""
    numbers = parse_numbers(frame[column])[0]
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise ValueError(
            f"{what}: column '{column}' has {int(bad.sum())} values that are not finite numbers: "
            f"{listed(frame[column][bad], 5)}"
        )
    return numbers


def validate_submission(
    frame: pd.DataFrame,
    sample: pd.DataFrame | None,
    *,
    id_column: str,
    task: Task,
    classes: Sequence[Any] | None = None,
    hard: bool = False,
) -> None:
    """Raise ValueError unless `frame` (built, or read back as text) is what the competition will accept.

    Checked: columns and their order, ids (each once, none missing or extra, the sample's order), finite
    numbers, probabilities within 0..1 (`hard`: 0 and 1), whole grades where the sample has them, known class labels.
    Without a sample the columns are those of `build_without_sample`, and the ids only have to be unique.
    """
    what, labels = "the submission", _classes(task, classes)
    if sample is None:
        own_ids = frame[id_column].tolist() if id_column in frame.columns else []
        sample = _usual_sample([str(name) for name in own_ids], id_column, task, labels)
    columns, as_labels = _layout(sample, id_column, task, labels)
    if list(frame.columns) != list(sample.columns):
        raise ValueError(
            f"{what} must have the columns {listed(sample.columns, 99)}, in this order; got {listed(frame.columns, 99)}"
        )
    ids, wanted = [str(name) for name in frame[id_column]], [str(name) for name in sample[id_column]]
    _check_unique(ids, what)
    check_same_ids(ids, wanted, what, "the sample submission")
    if ids != wanted:
        raise ValueError(f"{what} has the sample's ids in another order; sort the rows as in the sample")
    if as_labels:
        given = dict.fromkeys(str(label) for label in frame[columns[0]])
        labels = _written_as(labels, sample[columns[0]].tolist())
        if unknown := [label for label in given if label not in labels]:
            raise ValueError(
                f"{what}: column '{columns[0]}' has unknown labels {listed(unknown, 5)}; allowed: {listed(labels, 20)}"
            )
        return
    whole = task.kind == "ordinal" and _whole_numbers(sample, columns)
    for name in columns:
        numbers = numbers_of(frame, name, what)
        if task.kind in PROBABILITIES and len(numbers) and (numbers.min() < 0 or numbers.max() > 1):
            raise ValueError(
                f"{what}: column '{name}' must hold probabilities between 0 and 1, got {numbers.min():g} to "
                f"{numbers.max():g}"
            )
        if hard and np.any(numbers != np.floor(numbers)):
            odd = numbers[numbers != np.floor(numbers)][0]
            raise ValueError(f"{what}: column '{name}' must hold labels, 0 and 1, got {odd:g}")
        if whole and np.any(numbers != np.floor(numbers)):
            odd = numbers[numbers != np.floor(numbers)][0]
            raise ValueError(f"{what}: column '{name}' must hold whole grades, got {odd:g}")


# --- files --------------------------------------------------------------------------------------------------


def check_path(path: Path) -> None:
    """Raise ValueError where no submission can be written."""
    if path.suffix != ".csv":
        raise ValueError(f"a submission is a CSV file, got '{path}'; name it {path.stem}.csv")
    if path.is_dir():
        raise ValueError(f"a submission is a CSV file, but {path} is a folder; name a file in it")
    above = next(folder for folder in path.parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"a submission cannot be written to {path}: {above} is no folder; name another place")


def write_submission(path: Path, frame: pd.DataFrame, sidecar: Mapping[str, Any]) -> Path:
    """Write `frame` as CSV (9 digits, exact for float32) and its sidecar `<stem>.json`, both atomically.

    The sidecar holds created, commit, the caller's entries (runs, folds, scores, ...), and the CSV's rows,
    columns and sha256. Returns the sidecar's path. An old sidecar goes first: never a new CSV beside an old
    story.
    """
    check_path(path)
    raw = frame.to_csv(index=False, float_format="%.9g", lineterminator="\n").encode()
    story = path.with_suffix(".json")
    made = {"created": now(), "commit": commit()}  # asked before a file of the repository is touched
    story.unlink(missing_ok=True)
    write_atomic(path, lambda temporary: _write_bytes(temporary, raw))
    content = {
        **made,
        **sidecar,
        "rows": len(frame),
        "columns": [str(name) for name in frame.columns],
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    write_json(story, content)
    return story


def _write_bytes(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)


def read_submission(path: Path, id_column: str | None = None, *, empty: bool = False) -> pd.DataFrame:
    """Read a submission, a sample or a solution, every cell as text; `id_column` None = the first column.

    `empty`: one without rows is allowed. Raises ValueError when the file or the id column is missing, or an id is empty
    or there twice.
    """
    frame = read_frame(path, id_column, empty=empty)
    frame = pd.DataFrame({str(name): cell_strings(frame[name]) for name in frame.columns}, dtype=object)
    name = id_column if id_column is not None else str(frame.columns[0])
    ids = list(frame[name])
    if nameless := sum(not entry.strip() for entry in ids):
        raise ValueError(f"{path}: {nameless} rows have an empty '{name}'")
    _check_unique(ids, str(path))
    return frame
