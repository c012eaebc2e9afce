"""CSV or parquet -> Table (ids, texts, targets), with every check on a user's file in one message per file.

CSV cells are read as text and stay text ("NA", "007" and "" mean themselves); numbers are parsed where a
column is a target or a weight. Parquet, and frames handed over in a notebook, keep their own types.
"""

from __future__ import annotations

import csv
import io
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.catalog import nearest
from comp.runs import digest

if TYPE_CHECKING:
    from comp.config import Competition, Task

__all__ = [
    "Table",
    "cell_strings",
    "encode_targets",
    "leak_warnings",
    "listed",
    "no_column",
    "parse_numbers",
    "raise_faults",
    "read_frame",
    "read_test",
    "read_train",
    "row_fault",
    "table_of",
]

SUFFIXES = (".csv", ".parquet")
MOST_GRADES = 1000  # an ordinal target with a wider range is a mistake (a year, an id), not a scale
Ids: TypeAlias = NDArray[np.object_]
Mask: TypeAlias = NDArray[np.bool_]
Values: TypeAlias = NDArray[np.float32]
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
    grade is itself. {} for a test table."""
    classes: dict[str, list[str]]
    """Task name -> the sorted labels of a multiclass task, or every grade of an ordinal one, lowest first.
    Other kinds have no entry."""
    weights: NDArray[np.float32] | None
    """(N,), finite, >= 0, not all 0; None = every row counts the same."""
    frame: pd.DataFrame
    """The columns as read, index 0..N-1: groups, times and fold columns are looked up here."""

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> str:
        """Return a digest of ids, texts and targets, in row order."""
        named = [part for name, values in self.targets.items() for part in (name, _bytes(values))]
        return digest([*self.ids, *named, *(text for texts in self.texts for text in texts)])

    def label_fingerprint(self) -> str:
        """Return a digest of the ids with their targets of the first task, whatever the order of the rows."""
        order = np.argsort(self.ids)
        return digest([*self.ids[order], *(_bytes(values[order]) for values in list(self.targets.values())[:1])])


def _bytes(values: Values) -> bytes:
    return np.ascontiguousarray(values, dtype="<f4").tobytes()


# --- messages ----------------------------------------------------------------------------------------------


def raise_faults(source: str, faults: Sequence[str]) -> None:
    """Raise ValueError "source: fault", or with several faults a line for each; nothing when there is none."""
    if len(faults) == 1:
        raise ValueError(f"{source}: {faults[0]}")
    if faults:
        raise ValueError(f"{source}: {len(faults)} faults\n" + "\n".join(f"  - {fault}" for fault in faults))


def listed(items: Iterable[object], most: int = 3) -> str:
    """Return "'a', 'b', 'c', ..." with at most `most` of the different items."""
    names = list(dict.fromkeys(map(str, items)))
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")


def _rows(mask: Mask, ids: Ids | None) -> str:
    """Return "2 rows (id 'a', 'b')"; without ids the rows are counted from 1, the header apart."""
    found = np.flatnonzero(mask)
    which = f"data row {listed(found + 1)}".replace("'", "") if ids is None else f"id {listed(ids[found])}"
    return f"{len(found)} row{'' if len(found) == 1 else 's'} ({which})"


def row_fault(what: str, mask: Mask, ids: Ids | None, advice: str, seen: Iterable[object] = ()) -> list[str]:
    """Return one fault that names the rows under `mask` and what was `seen` there; [] when there are none."""
    if not mask.any():
        return []
    values = listed(seen)
    return [f"{what} in {_rows(mask, ids)}{': ' if values else ''}{values}; {advice}"]


def no_column(name: str, role: str, frame: pd.DataFrame) -> str:
    """Return the fault of a column that is not there; `role` says what asked for it."""
    names = [str(column) for column in frame.columns]
    return f"no column '{name}' ({role}){nearest(name, names)}; the columns are {listed(names, 20)}"


def _twice(names: Iterable[object]) -> list[str]:
    twice = [name for name, times in Counter(map(str, names)).items() if times > 1]
    return [f"column name {listed(twice)} occurs more than once; rename one"] if twice else []


# --- files -------------------------------------------------------------------------------------------------


def read_frame(path: Path | str, id_column: str | None = None) -> pd.DataFrame:
    """Read a CSV (all cells text) or parquet file (native types); with `id_column`, it is sure to have that.

    Raises ValueError: no such file, neither .csv nor .parquet, not UTF-8, ragged or unparsable, no rows, a column
    name twice, no `id_column`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(_no_file(path))
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: not a {' or '.join(SUFFIXES)} file; unpack or convert it first")
    frame = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    if not len(frame):
        raise ValueError(f"{path}: the table has no rows, only columns {listed([*frame.columns], 20)}")
    if id_column is not None:
        frame = _index_as_column(frame, id_column)
        if id_column not in frame.columns:
            raise ValueError(f"{path}: {no_column(id_column, 'the id', frame)}")
    return frame


def _no_file(path: Path) -> str:
    if path.is_dir():
        return f"{path}: this is a folder; name the .csv or .parquet file in it"
    where = f"paths are relative to the current directory, {Path.cwd()}"
    if not path.parent.is_dir():
        return f"{path}: no such file, nor is there a folder {path.parent}; {where}"
    names = sorted(file.name for file in path.parent.iterdir() if file.suffix.lower() in SUFFIXES)
    there = f"tables there are {listed(names, 10)}" if names else f"{path.parent} holds no table"
    return f"{path}: no such file{nearest(path.name, names)}; {there}; {where}"


def _read_csv(path: Path) -> pd.DataFrame:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = raw[: fault.start].count(b"\n") + 1
        guess = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252"
        raise ValueError(
            f"{path}: not UTF-8: byte 0x{raw[fault.start]:02x} at offset {fault.start} (line {line}); save "
            f"it as UTF-8: pandas.read_csv('{path}', encoding='{guess}').to_csv('{path}', index=False)"
        ) from None
    # Not pandas' reader: it pads a short row and cuts a long first one without an error.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # a setting of the whole process: put back below
    try:
        lines = [(reader.line_num, row) for row in reader if row]
    except csv.Error as fault:
        line = reader.line_num
        raise ValueError(f"{path}: broken CSV, line {line}: {fault}; look for an unclosed quote") from None
    finally:
        csv.field_size_limit(limit)
    if not lines:
        raise ValueError(f"{path}: the file is empty; its first line must name the columns")
    header, *rows = [row for _, row in lines]
    raise_faults(str(path), _twice(header))
    ragged = [(line, len(row)) for line, row in lines if len(row) != len(header)]
    if ragged:
        raise ValueError(
            f"{path}: {len(ragged)} of {len(rows)} rows do not have the header's {len(header)} fields; the first ends "
            f"in line {ragged[0][0]} and has {ragged[0][1]}; look for a comma or line break in a text without quotes"
        )
    return pd.DataFrame(rows, columns=header, dtype=object)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as fault:  # pyarrow's errors derive from these
        raise ValueError(f"{path}: not a readable parquet file ({fault}); write it anew") from None
    raise_faults(str(path), _twice(frame.columns))
    return frame


def _index_as_column(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return `frame` with index 0..N-1; an index called `name` becomes a column."""
    return frame.reset_index(drop=name in frame.columns or frame.index.name != name)


# --- cells -------------------------------------------------------------------------------------------------


def cell_strings(column: pd.Series) -> list[str]:
    """Return the cells as text, null as "", 3.0 as "3" (beside a null, pandas makes whole numbers floats)."""
    missing = column.isna().to_numpy(dtype=bool)
    whole = [int(c) if isinstance(c, float) and c.is_integer() else c for c in column.tolist()]
    return ["" if gone else str(cell) for cell, gone in zip(whole, missing, strict=True)]


def _blank(cells: Sequence[str]) -> Mask:
    return np.asarray([not cell.strip() for cell in cells], dtype=bool)


def parse_numbers(column: pd.Series) -> tuple[NDArray[np.float64], Mask, Mask]:
    """Return values, mask of empty cells, mask of cells that are no number, all (N,); NaN under the masks."""
    if pd.api.types.is_numeric_dtype(column):
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return values, np.isnan(values), np.zeros(len(values), dtype=bool)
    cells = [cell.strip() for cell in cell_strings(column)]
    values = pd.to_numeric(pd.Series(cells, dtype=object), errors="coerce").to_numpy(dtype=np.float64)
    missing = _blank(cells)
    return values, missing, np.isnan(values) & ~missing


def _finite(frame: pd.DataFrame, name: str, ids: Ids | None, advice: str) -> tuple[Values, list[str]]:
    """Return a column as (N,) float32, and its faults; `advice` is for cells that are no number."""
    values, missing, bad = parse_numbers(frame[name])
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    endless = np.isinf(narrow)
    return narrow, [
        *row_fault(f"column '{name}' is empty (NaN)", missing, ids, "fill it in or drop the row"),
        *row_fault(f"column '{name}' is not a number", bad, ids, advice, frame[name][bad]),
        *row_fault(f"column '{name}' is infinite or beyond float32", endless, ids, "drop the row"),
    ]


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


def _encode(frame: pd.DataFrame, task: Task, classes: Sequence[str] | None, ids: Ids | None) -> Encoded:
    if task.kind == "multiclass":
        return _encode_labels(frame, task.targets[0], classes, ids)
    if task.kind == "ordinal":
        return _encode_grades(frame, task.targets[0], classes, ids)
    shares = task.kind in ("binary", "multilabel")
    advice = f"{'map it to 0 and 1' if shares else 'make it numeric'}, or use kind multiclass for labels"
    columns, faults = [], []
    for name in task.targets:
        values, wrong = _finite(frame, name, ids, advice)
        columns.append(values)
        faults += wrong
        if shares:
            outside = (values < 0) | (values > 1)
            allowed = f"kind {task.kind} allows 0, 1 and soft labels between: map it, or use another kind"
            faults += row_fault(f"column '{name}' is outside 0..1", outside, ids, allowed, values[outside])
    return np.stack(columns, axis=1), [], faults


def _encode_labels(frame: pd.DataFrame, name: str, classes: Sequence[str] | None, ids: Ids | None) -> Encoded:
    cells = cell_strings(frame[name])
    faults = row_fault(f"column '{name}' has no label", _blank(cells), ids, "fill it in or drop the row")
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
    values, faults = _finite(frame, name, ids, "use whole grades, or kind multiclass for labels")
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


def read_test(path: Path | str, competition: Competition) -> Table:
    """Read a table without targets; target and weight columns that stand in it are not looked at."""
    return table_of(read_frame(path), competition, source=str(path))


def table_of(
    frame: pd.DataFrame,
    competition: Competition,
    tasks: Sequence[Task] = (),
    *,
    classes: Mapping[str, Sequence[str]] | None = None,
    source: str = "frame",
) -> Table:
    """Check a frame (one row per text, any index) and return it as a Table.

    tasks: heads whose targets are read; none = a test table, where weights are not read and a row without text is
    a warning instead of an error, because nobody can repair Kaggle's hidden test file.
    classes: task name -> labels of the training table; None = take them from this frame.
    Raises ValueError that lists every fault of the frame.
    """
    frame = _index_as_column(frame, competition.id)
    raise_faults(source, _column_faults(frame, competition, tasks))
    if not len(frame):
        raise ValueError(f"{source}: the table has no rows")
    ids, faults = _ids(frame, competition.id)
    names = None if faults else ids  # ids that are missing or doubled cannot name a row
    texts, wrong = _texts(frame, competition.text_columns, names, source, train=bool(tasks))
    faults += wrong
    targets: dict[str, Values] = {}
    labels: dict[str, list[str]] = {}
    for task in tasks:
        targets[task.name], found, wrong = _encode(frame, task, (classes or {}).get(task.name), names)
        faults += wrong
        if found:
            labels[task.name] = found
    weights = None
    if tasks and competition.weight is not None:
        weights, wrong = _weights(frame, competition.weight, names)
        faults += wrong
    raise_faults(source, faults)
    return Table(ids, texts, targets, labels, weights, frame)


def _column_faults(frame: pd.DataFrame, competition: Competition, tasks: Sequence[Task]) -> list[str]:
    names = [str(column) for column in frame.columns]
    if len(set(names)) < len(names):
        return _twice(names)
    roles = [(name, "competition.text") for name in competition.text_columns]
    roles += [(name, f"target of task '{task.name}'") for task in tasks for name in task.targets]
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
    missing = _blank(cells)
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
    empty = np.all([_blank(cells) for cells in texts], axis=0)
    what = f"column {listed(names, 5)} has no text (empty or missing)"
    if empty.all():
        faults.append(f"{what} in any row; name another column in competition.text")
    elif train:
        faults += row_fault(what, empty, ids, "fill it in or drop the row")
    else:
        for warning in row_fault(what, empty, ids, "such rows are predicted from an empty text"):
            warnings.warn(f"{source}: {warning}", stacklevel=3)
    return texts, faults


def _weights(frame: pd.DataFrame, name: str, ids: Ids | None) -> tuple[Values, list[str]]:
    weights, faults = _finite(frame, name, ids, "weights are numbers >= 0")
    negative = weights < 0
    faults += row_fault(f"column '{name}' is negative", negative, ids, "weights are >= 0", weights[negative])
    if not faults and not weights.any():
        faults.append(f"column '{name}' is 0 in every row; some weights must be above 0")
    return weights, faults


# --- leaks -------------------------------------------------------------------------------------------------


def leak_warnings(train: Table, test: Table | None = None) -> list[str]:
    """Return one line per leak: texts that repeat (white space and case aside) in train or between train and
    test, and ids that are in both; [] when there is none."""
    lines = []
    copies: dict[str, list[int]] = {}
    for row, text in enumerate(_folded(train)):
        copies.setdefault(text, []).append(row)
    groups = [rows for rows in copies.values() if len(rows) > 1]
    if groups:
        example = listed(train.ids[groups[0][:2]])
        lines.append(
            f"leak: {sum(map(len, groups))} training rows share their text with another ({len(groups)} texts, e.g. ids "
            f"{example}); copies in two folds flatter the score: drop them, or give them one value of a folds.group"
        )
    if test is None:
        return lines
    shared = [(row, copies[text][0]) for row, text in enumerate(_folded(test)) if text in copies]
    if shared:
        pairs = ", ".join(f"test '{test.ids[a]}' = train '{train.ids[b]}'" for a, b in shared[:2])
        lines.append(
            f"leak: {len(shared)} test rows have the text of a training row ({pairs}); a score on them "
            "measures memory: drop those training rows, unless the competition has them on purpose"
        )
    known = set(train.ids)
    both = [name for name in test.ids if name in known]
    if both:
        lines.append(
            f"leak: {len(both)} ids are in both train and test (e.g. {listed(both, 2)}); check that "
            "competition.test is not the training file, and that equal ids mean different rows"
        )
    return lines


def _folded(table: Table) -> list[str]:
    """Return each row's texts as one string, white space and case folded away."""
    rows = zip(*table.texts, strict=True)
    return ["\x00".join(" ".join(text.split()).casefold() for text in row) for row in rows]
