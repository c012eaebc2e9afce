"""Submissions: built from sample_submission.csv, aligned by id, checked, written with a sidecar, scored.

Tables are read as text, so that ids such as "007" stay what they are. N rows, K target columns, C classes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.catalog import pick
from comp.config import Task
from comp.data.frames import cell_strings, parse_numbers, read_frame
from comp.metrics import METRICS, evaluate
from comp.runs import commit, now, write_atomic, write_json

__all__ = [
    "build_submission",
    "build_without_sample",
    "check_path",
    "read_submission",
    "score_submission",
    "strange_labels",
    "validate_submission",
    "write_submission",
]

Floats: TypeAlias = NDArray[np.float64]
PROBABILITIES = ("binary", "multilabel", "multiclass")
LABEL_METRICS = ("accuracy", "f1_macro")  # can compare labels that are text
USAGE = "Usage"  # Kaggle's solution files say here which rows are Public, Private or Ignored


def _some(names: Iterable[Any], most: int = 5) -> str:
    """Return "'a', 'b', ..." for a message."""
    names = [str(name) for name in names]
    return ", ".join(f"'{name}'" for name in names[:most]) + (", ..." if len(names) > most else "")


def _check_unique(ids: Sequence[str], what: str) -> None:
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"{what} has {len(twice)} ids more than once: {_some(twice)}")


def _check_same_ids(found: Sequence[str], wanted: Sequence[str], what: str, against: str) -> None:
    """Raise ValueError unless both hold the same ids, each once, in whatever order."""
    _check_unique(wanted, against)
    _check_unique(found, what)
    have, want = set(found), set(wanted)
    faults = []
    if missing := [name for name in wanted if name not in have]:
        faults.append(f"lacks {len(missing)} of the {len(want)} ids of {against}: {_some(missing)}")
    if extra := [name for name in found if name not in want]:
        faults.append(f"has {len(extra)} ids that {against} has not: {_some(extra)}")
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
            f"the sample submission has no id column '{id_column}', it has {_some(names)}; set competition.id"
        )
    found = [name for name in names if name != id_column]
    wanted = list(classes) if task.kind == "multiclass" else list(task.targets)
    if len(found) == 1 and (task.kind == "multiclass" or len(wanted) == 1):
        return found, task.kind == "multiclass"  # one column is that one column, whatever it is called
    if sorted(found) != sorted(wanted):
        what = "classes" if task.kind == "multiclass" else "targets"
        alternative = " or a single column of labels" if task.kind == "multiclass" else ""
        raise ValueError(
            f"the sample submission's columns {_some(found)} are not the {what} of task '{task.name}', "
            f"{_some(wanted)}{alternative}"
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
        f"the sample submission's column '{columns[0]}' holds {_some(cells)}, none of the labels {_some(labels)} that "
        "are predicted; labels are written as the training table has them: see what the competition's page wants"
    )


def _whole_numbers(sample: pd.DataFrame, columns: Sequence[str]) -> bool:
    """Return whether every value of the sample's prediction columns is a whole number."""
    values = np.stack([parse_numbers(sample[name])[0] for name in columns])
    return bool(np.all(values == np.floor(values)))


def _check_values(ids: Sequence[str], values: Floats, width: int) -> None:
    if values.ndim != 2 or values.shape != (len(ids), width):
        raise ValueError(f"predictions must have shape ({len(ids)}, {width}), got {values.shape}")
    bad = np.asarray(~np.isfinite(values).all(axis=1))
    if bad.any():
        raise ValueError(
            f"predictions of {int(bad.sum())} rows are NaN or infinite, ids "
            f"{_some(name for name, is_bad in zip(ids, bad, strict=True) if is_bad)}"
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
) -> pd.DataFrame:
    """Return a submission with exactly the sample's ids, row order and columns, filled from `values` by id.

    `sample` is read as text (`read_submission`); `values` (N, K) are decoded predictions of `ids`, (N, C) for
    multiclass with `classes` in index order. Regression, binary and multilabel fill the columns named as the
    targets (a single column may be named otherwise). Multiclass: a single column gets the likeliest label, whole
    numbers written as the sample writes them ("3", not "3.0"), else one column per label gets its probability.
    Ordinal: rounded to the grade where the sample holds whole numbers, and clipped to the range of `classes` when
    given. Raises ValueError when ids, columns or values do not fit.
    """
    labels = _classes(task, classes)
    columns, as_labels = _layout(sample, id_column, task, labels)
    ids, wanted = [str(name) for name in ids], [str(name) for name in sample[id_column]]
    _check_same_ids(ids, wanted, "the table of predictions", "the sample submission")
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
            filled[name] = _grades(column, labels) if whole else column
    return pd.DataFrame(filled)[list(sample.columns)]


def build_without_sample(
    ids: Sequence[Any],
    values: NDArray[np.floating],
    *,
    id_column: str,
    task: Task,
    classes: Sequence[Any] | None = None,
) -> pd.DataFrame:
    """Return ids in their order and the target columns; multiclass: one probability column per class.

    Ordinal predictions are rounded to grades.
    """
    sample = _usual_sample([str(name) for name in ids], id_column, task, _classes(task, classes))
    return build_submission(sample, ids, values, id_column=id_column, task=task, classes=classes)


# --- checking -----------------------------------------------------------------------------------------------


def _numbers(frame: pd.DataFrame, column: str, what: str) -> Floats:
    """Return a column as (N,) float64. Raises ValueError on text, empty cells, NaN and infinities."""
    numbers = parse_numbers(frame[column])[0]
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise ValueError(
            f"{what}: column '{column}' has {int(bad.sum())} values that are not finite numbers: "
            f"{_some(dict.fromkeys(frame[column][bad]))}"
        )
    return numbers


def validate_submission(
    frame: pd.DataFrame,
    sample: pd.DataFrame | None,
    *,
    id_column: str,
    task: Task,
    classes: Sequence[Any] | None = None,
) -> None:
    """Raise ValueError unless `frame` (built, or read back as text) is what the competition will accept.

    Checked: columns and their order, ids (each once, none missing or extra, the sample's order), finite
    numbers, probabilities within 0..1, whole grades where the sample has them, known class labels. Without a
    sample the columns are those of `build_without_sample`, and the ids only have to be unique.
    """
    what, labels = "the submission", _classes(task, classes)
    if sample is None:
        own_ids = frame[id_column].tolist() if id_column in frame.columns else []
        sample = _usual_sample([str(name) for name in own_ids], id_column, task, labels)
    columns, as_labels = _layout(sample, id_column, task, labels)
    if list(frame.columns) != list(sample.columns):
        raise ValueError(
            f"{what} must have the columns {_some(sample.columns, 99)}, in this order; got {_some(frame.columns, 99)}"
        )
    ids, wanted = [str(name) for name in frame[id_column]], [str(name) for name in sample[id_column]]
    _check_unique(ids, what)
    _check_same_ids(ids, wanted, what, "the sample submission")
    if ids != wanted:
        raise ValueError(f"{what} has the sample's ids in another order; sort the rows as in the sample")
    if as_labels:
        given = dict.fromkeys(str(label) for label in frame[columns[0]])
        labels = _written_as(labels, sample[columns[0]].tolist())
        if unknown := [label for label in given if label not in labels]:
            raise ValueError(
                f"{what}: column '{columns[0]}' has unknown labels {_some(unknown)}; allowed: {_some(labels, 20)}"
            )
        return
    whole = task.kind == "ordinal" and _whole_numbers(sample, columns)
    for name in columns:
        numbers = _numbers(frame, name, what)
        if task.kind in PROBABILITIES and len(numbers) and (numbers.min() < 0 or numbers.max() > 1):
            raise ValueError(
                f"{what}: column '{name}' must hold probabilities between 0 and 1, got {numbers.min():g} to "
                f"{numbers.max():g}"
            )
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


# --- scoring ------------------------------------------------------------------------------------------------


def score_submission(
    submission_path: Path, truth_path: Path, metric: str, id_column: str | None = None
) -> dict[str, float]:
    """Return {"total": score} of a submission against the truth, and a score per value of `Usage`.

    Rows are matched by id (None = the submission's first column) and must be the same on both sides, but
    for those whose Usage is Ignored. The submission's columns are looked up in the truth; other columns
    there are left alone. Multiclass: labels against labels (accuracy, f1_macro), or one probability column
    per label against one column of labels or against one-hot columns. Raises ValueError on files that do
    not fit.
    """
    pick(METRICS, metric, "metric")
    guess = read_submission(submission_path, id_column)
    key = id_column if id_column is not None else str(guess.columns[0])
    truth = read_submission(truth_path, key)
    by_usage = USAGE in truth.columns and USAGE not in guess.columns
    if by_usage:
        ignored = truth[USAGE] == "Ignored"
        guess = guess[~guess[key].isin(list(truth[key][ignored]))]
        truth = truth[~ignored]
    _check_same_ids(list(guess[key]), list(truth[key]), str(submission_path), str(truth_path))
    guess = guess.set_index(key).loc[list(truth[key])]
    usage = truth[USAGE].to_numpy(dtype=object) if by_usage else None
    targets, preds = _scored(truth.drop(columns=[key, *([USAGE] if by_usage else [])]), guess, metric)
    scores = {"total": evaluate(metric, targets, preds)}
    for part in sorted(set(usage)) if usage is not None else ():
        rows = usage == part
        try:
            scores[str(part)] = evaluate(metric, targets[rows], preds[rows])
        except ValueError as fault:
            raise ValueError(f"rows whose {USAGE} is '{part}': {fault}") from None
    return scores


def _scored(truth: pd.DataFrame, guess: pd.DataFrame, metric: str) -> tuple[Floats, Floats]:
    """Return targets and predictions as `evaluate` wants them, from text tables whose rows already match."""
    columns = [str(name) for name in guess.columns]
    for_classes = "multiclass" in METRICS[metric].kinds
    if not columns:
        raise ValueError("the submission has no column besides its ids")
    if strange := [name for name in columns if name not in truth.columns]:
        labelled = [name for name in truth.columns if set(truth[name]) <= set(columns)]
        if for_classes and len(strange) == len(columns) > 1 and len(labelled) == 1:
            index = [[columns.index(label)] for label in truth[labelled[0]]]
            return np.asarray(index, dtype=np.float64), _table(guess, columns, "the submission")
        raise ValueError(
            f"the submission's columns {_some(strange)} are not in the truth, which has {_some(truth.columns)}"
        )
    if len(columns) == 1 and metric in LABEL_METRICS and not _numeric(truth, guess, columns[0]):
        return _label_indices(truth[columns[0]], guess[columns[0]], columns[0])
    targets, preds = _table(truth, columns, "the truth"), _table(guess, columns, "the submission")
    if for_classes and len(columns) > 1 and _one_hot(targets) and _sums_to_one(preds):
        return targets.argmax(axis=1)[:, None].astype(np.float64), preds
    return targets, preds


def _table(frame: pd.DataFrame, columns: Sequence[str], what: str) -> Floats:
    return np.stack([_numbers(frame, name, what) for name in columns], axis=1)


def _numeric(truth: pd.DataFrame, guess: pd.DataFrame, column: str) -> bool:
    return all(bool(np.isfinite(parse_numbers(frame[column])[0]).all()) for frame in (truth, guess))


def _label_indices(truth: pd.Series, guess: pd.Series, column: str) -> tuple[Floats, Floats]:
    """Return both columns of labels as indices (N, 1) into their common sorted labels."""
    for what, cells in (("the truth", truth), ("the submission", guess)):
        if empty := sum(not str(cell).strip() for cell in cells):
            raise ValueError(f"{what}: column '{column}' has {empty} empty labels")
    if not set(truth) & set(guess):
        raise ValueError(
            f"column '{column}': none of the submission's labels {_some(dict.fromkeys(guess))} occurs in the "
            f"truth, which has {_some(dict.fromkeys(truth))}"
        )
    index = {label: float(number) for number, label in enumerate(sorted({*truth, *guess}))}
    targets, preds = (np.asarray([[index[cell]] for cell in cells]) for cells in (truth, guess))
    return targets, preds


def _one_hot(targets: Floats) -> bool:
    return bool(np.isin(targets, (0.0, 1.0)).all() and (targets.sum(axis=1) == 1).all())


def _sums_to_one(preds: Floats) -> bool:
    return bool(preds.min() >= 0 and np.abs(preds.sum(axis=1) - 1).max() < 1e-3)
