"""folds/<name>.csv: made by a splitter, written once, checked against its data.

Beside the CSV (id, fold) lies a sidecar, <name>.json: the settings and fingerprints it was made with. A CSV made
by hand needs none. fold -1 (splitter `time` only) = rows that are trained on and never validated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.catalog import pick
from comp.data.frames import cell_strings, listed, no_column, parse_numbers, raise_faults, read_frame, row_fault
from comp.data.splitters import SETTINGS, SPLITTERS, FoldOfRow, column_cells, group_codes, own_folds, time_values
from comp.data.tables import Table
from comp.runs import digest, read_json, versions, write_json, write_text

if TYPE_CHECKING:
    from comp.config import Folds, Task

__all__ = [
    "Folding",
    "audit",
    "get_folds",
    "get_or_make_folds",
    "make_folds",
    "read_folds",
    "train_rows",
    "valid_rows",
    "write_folds",
]

MOST_SHARES = 12  # classes shown on one line of the audit
ANEW = "make the folds anew with `comp folds --config FILE --overwrite`, or name another file in folds.name"


@dataclass(frozen=True)
class Folding:
    """A fold file that fits its table."""

    fold: FoldOfRow
    """(N,) fold of each table row, 0..num_folds-1; -1 = never validated (splitter time only)."""
    fingerprint: str
    """Digest of the (id, fold) pairs, whatever their order."""
    num_folds: int
    splitter: str


def train_rows(fold_of_row: FoldOfRow, k: int, splitter: str) -> NDArray[np.int64]:
    """Return the row numbers (M,) that fold `k` trains on: all other folds, or under `time` the earlier ones."""
    chosen: NDArray[np.int64] = np.flatnonzero(fold_of_row < k if splitter == "time" else fold_of_row != k)
    return chosen


def valid_rows(fold_of_row: FoldOfRow, k: int) -> NDArray[np.int64]:
    """Return the row numbers (M,) that fold `k` is validated on."""
    chosen: NDArray[np.int64] = np.flatnonzero(fold_of_row == k)
    return chosen


# --- making, writing, reading ------------------------------------------------------------------------------


def make_folds(table: Table, tasks: Sequence[Task], folds: Folds) -> FoldOfRow:
    """Return the fold (N,) of each row, split on the first task. Raises ValueError when it cannot be done."""
    if len(table) < folds.num_folds:
        raise ValueError(f"{len(table)} rows cannot fill folds.num_folds {folds.num_folds}; lower num_folds")
    fold: FoldOfRow = pick(SPLITTERS, folds.splitter, "splitter").make(table, tasks[0], folds)
    raise_faults(f"splitter '{folds.splitter}'", list(_misfits(fold, table, folds)))
    return fold


def _misfits(fold: FoldOfRow, table: Table, folds: Folds) -> Iterator[str]:
    """Yield what is wrong with a split of `table` under `folds`."""
    lowest, highest = -1 if folds.splitter == "time" else 0, folds.num_folds - 1
    outside = (fold < lowest) | (fold > highest)
    if outside.any():
        advice = f"allowed are {lowest} to {highest}: number folds from 0, or set folds.num_folds to their number"
        yield from row_fault("fold numbers do not fit", outside, table.ids, advice, np.unique(fold[outside]))
        return
    empty = sorted(set(range(folds.num_folds)) - set(fold.tolist()))
    if empty:
        yield f"fold {listed(empty)} has no rows; lower folds.num_folds ({folds.num_folds})"
    if folds.group is not None:
        codes = group_codes(table, folds)
        pairs = np.unique(np.stack([codes, fold], axis=1), axis=0)
        crossing = np.isin(codes, np.flatnonzero(np.bincount(pairs[:, 0]) > 1))
        if crossing.any():
            names = np.asarray(cell_strings(table.frame[folds.group]), dtype=object)[crossing]
            yield (
                f"{len(set(names))} groups of column '{folds.group}' cross folds ({listed(names)}); use splitter "
                "group or stratified_group, or leave folds.group out"
            )
    if folds.splitter == "time":
        times = time_values(table, folds)
        spans = [(times[fold == k].min(), times[fold == k].max()) for k in np.unique(fold)]
        if any(before[1] >= after[0] for before, after in pairwise(spans)):
            yield f"folds are not in the order of column '{folds.column}'; each must be later than the one before"
    if folds.splitter == "column":
        moved = fold != own_folds(table, folds)
        advice = "bring the two in line"
        yield from row_fault(f"folds differ from column '{folds.column}'", moved, table.ids, advice)


def _fingerprint(ids: Iterable[str], fold: Iterable[int]) -> str:
    return digest(sorted(f"{name}\t{k}" for name, k in zip(ids, fold, strict=True)))


def write_folds(path: Path | str, table: Table, fold: FoldOfRow, folds: Folds) -> None:
    """Write `path` (CSV: id, fold) and its sidecar, `path` with suffix .json; both replace what is there."""
    path = Path(path)
    sidecar = path.with_suffix(".json")
    sidecar.unlink(missing_ok=True)  # killed between the two writes: no sidecar rather than the old one
    frame = pd.DataFrame({"id": table.ids, "fold": fold})
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))
    settings = {name: getattr(folds, name) for name in ("splitter", "num_folds", *SETTINGS[folds.splitter])}
    fingerprints = {"data": table.label_fingerprint(), "folds": _fingerprint(table.ids, fold.tolist())}
    write_json(sidecar, {**settings, "rows": len(table), **fingerprints, "comp": versions()["comp"]})


def read_folds(path: Path | str, table: Table, folds: Folds) -> Folding:
    """Read a fold file and align it to the table's rows.

    Raises ValueError that lists why the file does not fit: an id missing, extra or twice, a fold number out of
    range, an empty fold, a group across folds, folds out of time order, or a sidecar that was written for other
    data or other settings.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such fold file; make it with `comp folds --config FILE`")
    frame = read_frame(path)
    for name in ("id", "fold"):
        if name not in frame.columns:
            raise ValueError(f"{path}: {no_column(name, 'a fold file has columns id and fold', frame)}")
    ids = np.asarray(cell_strings(frame["id"]), dtype=object)
    faults = list(_id_faults(ids, table))
    numbers = parse_numbers(frame["fold"])[0]
    wrong = ~np.isfinite(numbers) | (numbers != np.round(numbers))
    faults += row_fault("column 'fold' is not a whole number", wrong, ids, "number folds from 0", frame["fold"][wrong])
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        faults += _sidecar_faults(read_json(sidecar), ids, frame["fold"], table, folds)
    if not faults:
        by_id = dict(zip(ids, numbers.astype(np.int64).tolist(), strict=True))
        fold = np.asarray([by_id[name] for name in table.ids], dtype=np.int64)
        faults += _misfits(fold, table, folds)
    raise_faults(f"{path} does not fit ({ANEW})", faults)
    return Folding(fold, _fingerprint(table.ids, fold.tolist()), folds.num_folds, folds.splitter)


def _id_faults(ids: NDArray[np.object_], table: Table) -> Iterator[str]:
    here, there = set(ids), set(table.ids)
    twice = pd.Series(ids, dtype=object).duplicated().to_numpy()
    yield from row_fault("an id stands there again", twice, ids, "each id has one fold")
    missing = np.asarray([name not in here for name in table.ids])
    yield from row_fault("ids of the training table are missing", missing, table.ids, "each row needs a fold")
    extra = np.asarray([name not in there for name in ids])
    yield from row_fault("ids are not in the training table", extra, ids, "each id must be a row")


def _sidecar_faults(
    sidecar: dict[str, Any], ids: NDArray[np.object_], cells: pd.Series, table: Table, folds: Folds
) -> Iterator[str]:
    for name in ("splitter", "num_folds", *SETTINGS[folds.splitter]):
        if name in sidecar and sidecar[name] != getattr(folds, name):
            yield f"folds.{name}: the file was made with {sidecar[name]}, the config says {getattr(folds, name)}"
    if sidecar.get("folds") != _fingerprint(ids, cells):
        yield "the CSV was changed after it was made; delete the .json beside it if that was on purpose"
    elif sidecar.get("data") != table.label_fingerprint():
        yield "ids or targets of the first task are not those the file was made for"


def get_or_make_folds(path: Path | str, table: Table, tasks: Sequence[Task], folds: Folds) -> Folding:
    """Return the folds of `path`; made and written first when there is no such file. Raises as read_folds."""
    if not Path(path).exists():
        write_folds(path, table, make_folds(table, tasks, folds), folds)
    return read_folds(path, table, folds)


def get_folds(path: Path | str, table: Table, tasks: Sequence[Task], folds: Folds) -> Folding:
    """Return the folds of `path`, or what they will be where there is no such file, which stays so."""
    if Path(path).exists():
        return read_folds(path, table, folds)
    fold = make_folds(table, tasks, folds)
    return Folding(fold, _fingerprint(table.ids, fold.tolist()), folds.num_folds, folds.splitter)


# --- audit -------------------------------------------------------------------------------------------------


def audit(fold: FoldOfRow, table: Table, task: Task, *, group: str | None = None) -> list[str]:
    """Return lines on each fold: rows, groups, and mean and spread (numbers) or shares (classes) of the target.

    A line that starts with "warning:" names a class or label whose rows are all in one fold.
    """
    targets = table.hard_targets(task)
    shares = _shares(targets, table, task)
    codes = None if group is None else np.asarray(cell_strings(column_cells(table, group, "folds.group")), dtype=object)
    lines = []
    for k in np.unique(fold):
        rows = fold == k
        parts = [f"{rows.sum()} rows"]
        if codes is not None:
            parts.append(f"{len(set(codes[rows]))} groups")
        if shares:
            parts += [f"{name} {mask[rows].mean():.1%}" for name, mask in list(shares.items())[:MOST_SHARES]]
            parts += [f"and {len(shares) - MOST_SHARES} more"] * (len(shares) > MOST_SHARES)
        else:
            parts += [
                f"{name} mean {values.mean():.4g} std {values.std():.4g}"
                for name, values in zip(task.targets, targets[rows].T.astype(np.float64), strict=True)
            ]
        lines.append(f"fold {k}: {', '.join(parts)}{' (trained on, never validated)' if k < 0 else ''}")
    for name, mask in shares.items():
        homes = np.unique(fold[mask])
        if len(homes) == 1:
            lines.append(
                f"warning: {_all_rows(int(mask.sum()), name)} in fold {homes[0]}: the model that is validated "
                "there never saw one; merge it with another class, or lower folds.num_folds"
            )
    return lines


def _all_rows(number: int, name: str) -> str:
    return f"the only row of {name} is" if number == 1 else f"all {number} rows of {name} are"


def _shares(targets: NDArray[np.float32], table: Table, task: Task) -> dict[str, NDArray[np.bool_]]:
    """Return "target=label" -> rows (N,) that have it; {} for numbers and soft labels."""
    name = task.targets[0] if len(task.targets) == 1 else task.name
    if task.kind in ("multiclass", "ordinal"):
        labels = table.classes[task.name]
        values = [float(label) for label in labels] if task.kind == "ordinal" else range(len(labels))
        masks = {f"{name}={label}": targets[:, 0] == value for label, value in zip(labels, values, strict=True)}
        return {label: mask for label, mask in masks.items() if mask.any()}
    if task.kind in ("binary", "multilabel") and set(np.unique(targets)) <= {0.0, 1.0}:
        masks = {f"{name}=1": values == 1 for name, values in zip(task.targets, targets.T, strict=True)}
        masks |= {f"{name}=0": targets[:, 0] == 0} if task.kind == "binary" else {}
        return {label: mask for label, mask in masks.items() if mask.any()}
    return {}
