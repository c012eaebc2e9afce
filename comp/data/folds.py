"""Splitting the training rows: SPLITTERS, and folds/<name>.csv, written once and checked against its data.

Beside the CSV (id, fold) lies a sidecar, <name>.json: the settings and fingerprints it was made with. A CSV made
by hand needs none. fold -1 (splitter `time` only) = rows that are trained on and never validated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.catalog import Row, pick
from comp.data.frames import cell_strings, listed, no_column, parse_numbers, raise_faults, read_frame, row_fault
from comp.data.tables import Table
from comp.runs import digest, read_json, versions, write_json, write_text

if TYPE_CHECKING:
    from comp.config import Folds, Task

__all__ = [
    "SPLITTERS",
    "Folding",
    "audit",
    "bin_values",
    "get_or_make_folds",
    "make_folds",
    "merge_rare",
    "read_folds",
    "time_blocks",
    "train_rows",
    "valid_rows",
    "write_folds",
]

FoldOfRow: TypeAlias = NDArray[np.int64]
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
    """Return the rows that fold `k` trains on: those of all other folds, or under `time` the earlier ones."""
    chosen: NDArray[np.int64] = np.flatnonzero(fold_of_row < k if splitter == "time" else fold_of_row != k)
    return chosen


def valid_rows(fold_of_row: FoldOfRow, k: int) -> NDArray[np.int64]:
    """Return the rows that fold `k` is validated on."""
    chosen: NDArray[np.int64] = np.flatnonzero(fold_of_row == k)
    return chosen


# --- strata ------------------------------------------------------------------------------------------------


def bin_values(values: NDArray[np.float32], bins: int | str) -> NDArray[np.int64]:
    """Return the bin (N,) of each value (N,); bins "auto" = Sturges, 1 + log2(N).

    Bins have equal width, as `pd.cut` makes them in the competition kernels. Where an outlier or a spike puts
    more than three quarters of the rows into one of them, quantiles are the edges instead.
    """
    count = 1 + int(math.log2(len(values))) if isinstance(bins, str) else bins
    edges = np.linspace(values.min(), values.max(), count + 1)
    chosen = np.searchsorted(edges[1:-1], values)
    if np.bincount(chosen).max() > 0.75 * len(values):
        chosen = np.searchsorted(np.unique(np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])), values)
    return chosen.astype(np.int64)


def merge_rare(labels: NDArray[Any], *, least: int, ordered: bool) -> NDArray[np.int64]:
    """Return strata 0, 1, ... (N,) of at least `least` rows each, or a single one.

    The rarest label joins its rarer neighbour (ordered) or the next rarest label, until none is too rare:
    a label with fewer rows than folds cannot be spread over them.
    """
    _, start = np.unique(labels, return_inverse=True)
    counts = np.bincount(start).tolist()
    members = [[name] for name in range(len(counts))]
    while len(counts) > 1 and min(counts) < least:
        rare = counts.index(min(counts))
        others = (rare - 1, rare + 1) if ordered else range(len(counts))
        near = min((o for o in others if 0 <= o < len(counts) and o != rare), key=lambda o: counts[o])
        counts[near] += counts[rare]
        members[near] += members[rare]
        del counts[rare], members[rare]
    stratum = np.empty(sum(map(len, members)), dtype=np.int64)
    for number, names in enumerate(members):
        stratum[names] = number
    return stratum[start]


def _strata(table: Table, task: Task, folds: Folds) -> NDArray[np.int64]:
    """Return the stratum (N,) of each row; several target columns count as the mean of their z-scores."""
    targets = table.targets[task.name].astype(np.float64)
    values = targets[:, 0]
    if targets.shape[1] > 1:
        spread = targets.std(axis=0)
        values = ((targets - targets.mean(axis=0)) / np.where(spread > 0, spread, 1)).mean(axis=1)
    classes = task.kind in ("multiclass", "ordinal") or len(np.unique(values)) == 2
    labels = values if classes else bin_values(values.astype(np.float32), folds.bins)
    return merge_rare(labels, least=folds.num_folds, ordered=task.kind != "multiclass")


def _indicators(table: Table, task: Task, folds: Folds) -> NDArray[np.int64]:
    """Return 0/1 columns (N, M): labels as they are, classes and the bins of continuous columns as one-hot."""
    columns = []
    for values in table.targets[task.name].T:
        if task.kind not in ("multiclass", "ordinal") and set(np.unique(values)) <= {0.0, 1.0}:
            columns.append((values == 1)[:, None])
            continue
        labels = values if task.kind in ("multiclass", "ordinal") else bin_values(values, folds.bins)
        columns.append(labels[:, None] == np.unique(labels))
    found = np.concatenate(columns, axis=1)
    # one label alone is no multilabel target to scikit-learn; with its complement it is
    return (found if found.shape[1] > 1 else np.concatenate([found, ~found], axis=1)).astype(np.int64)


# --- splitters: (table, first task, settings) -> fold per row ----------------------------------------------


def kfold(table: Table, task: Task, folds: Folds) -> FoldOfRow:
    """Shuffle the rows and cut them into equal parts."""
    from sklearn.model_selection import KFold

    splitter = KFold(folds.num_folds, shuffle=True, random_state=folds.seed)
    return _from_splits(splitter.split(table.ids), len(table))


def stratified(table: Table, task: Task, folds: Folds) -> FoldOfRow:
    """Give every fold the same share of each class, or of each bin of a continuous target."""
    from sklearn.model_selection import StratifiedKFold

    splitter = StratifiedKFold(folds.num_folds, shuffle=True, random_state=folds.seed)
    return _from_splits(splitter.split(table.ids, _strata(table, task, folds)), len(table))


def group(table: Table, task: Task, folds: Folds) -> FoldOfRow:
    """Keep the rows of a group together, folds of about the same number of rows."""
    from sklearn.model_selection import GroupKFold

    codes = _enough_groups(table, folds)
    # Not GroupKFold(shuffle=True), which balances the number of groups: here rows are balanced, largest group
    # first, and the seed decides among groups of the same size.
    shuffled = np.random.default_rng(folds.seed).permutation(codes.max() + 1)[codes]
    return _from_splits(GroupKFold(folds.num_folds).split(table.ids, groups=shuffled), len(table))


def stratified_group(table: Table, task: Task, folds: Folds) -> FoldOfRow:
    """Keep the rows of a group together, and the shares of classes or bins as even as that allows."""
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(folds.num_folds, shuffle=True, random_state=folds.seed)
    strata = _strata(table, task, folds)
    return _from_splits(splitter.split(table.ids, strata, _enough_groups(table, folds)), len(table))


def multilabel_stratified(table: Table, task: Task, folds: Folds) -> FoldOfRow:
    """Give every fold the same share of every label, or of every bin of every continuous target."""
    try:
        from iterstrat.ml_stratifiers import MultilabelStratifiedKFold
    except ImportError:
        raise ValueError(
            "splitter 'multilabel_stratified' needs the package iterative-stratification: "
            "pip install iterative-stratification, or commit the fold file where it is installed"
        ) from None
    splitter = MultilabelStratifiedKFold(folds.num_folds, shuffle=True, random_state=folds.seed)
    return _from_splits(splitter.split(table.ids, _indicators(table, task, folds)), len(table))


def time(table: Table, task: Task, folds: Folds) -> FoldOfRow:
    """Cut the rows, sorted by `column`, into num_folds + 1 blocks: -1 (never validated), 0, 1, ..."""
    return time_blocks(_times(table, folds), num_folds=folds.num_folds, column=str(folds.column))


def column(table: Table, task: Task, folds: Folds) -> FoldOfRow:
    """Take the fold numbers of the table's own column."""
    return _own_folds(table, folds)


SPLITTERS: dict[str, Row] = {
    "kfold": Row(kfold, "shuffled rows, equal parts", "scikit-learn KFold"),
    "stratified": Row(stratified, "even shares of each class or bin of the target", "scikit-learn StratifiedKFold"),
    "group": Row(group, "rows of a group stay together, even numbers of rows", "scikit-learn GroupKFold"),
    "stratified_group": Row(
        stratified_group,
        "groups stay together, shares of classes or bins nearly even",
        "scikit-learn StratifiedGroupKFold",
    ),
    "multilabel_stratified": Row(
        multilabel_stratified,
        "even shares of every label, or bin of every target",
        "Sechidis et al. 2011, iterative-stratification",
    ),
    "time": Row(time, "blocks in time, each validated by a model of the earlier ones", "as TimeSeriesSplit"),
    "column": Row(column, "the table's own column of fold numbers 0, 1, ..."),
}

# The settings that change a splitter's folds: what the sidecar records, and a later config must agree with.
SETTINGS: dict[str, tuple[str, ...]] = {
    "kfold": ("seed",),
    "stratified": ("seed", "bins"),
    "group": ("seed", "group"),
    "stratified_group": ("seed", "bins", "group"),
    "multilabel_stratified": ("seed", "bins"),
    "time": ("column",),
    "column": ("column",),
}


def time_blocks(times: NDArray[np.float64], *, num_folds: int, column: str) -> FoldOfRow:
    """Return fold -1..num_folds-1 (N,): blocks of about equal size by time (N,), a tie never cut in two.

    Raises ValueError when there are fewer than num_folds + 1 different times.
    """
    order = np.argsort(times, kind="stable")
    starts = np.flatnonzero(np.diff(times[order]) > 0) + 1  # places where a new time begins
    if len(starts) < num_folds:
        raise ValueError(
            f"time column '{column}' has {len(starts) + 1} different values; {num_folds} folds need at least "
            f"{num_folds + 1}: lower folds.num_folds or name a finer column"
        )
    block = np.zeros(len(times), dtype=np.int64)
    used = -1
    for k in range(num_folds):
        wanted = (k + 1) * len(times) / (num_folds + 1)
        nearest = int(np.abs(starts - wanted).argmin())
        used = min(max(nearest, used + 1), len(starts) - num_folds + k)  # leave a start for each later block
        block[starts[used] :] = k + 1
    fold = np.empty(len(times), dtype=np.int64)
    fold[order] = block - 1
    return fold


def _from_splits(splits: Iterable[tuple[Any, NDArray[np.int64]]], num_rows: int) -> FoldOfRow:
    fold = np.full(num_rows, -1, dtype=np.int64)
    for k, (_, held_out) in enumerate(splits):
        fold[held_out] = k
    assert (fold >= 0).all()
    return fold


# --- columns of the table ----------------------------------------------------------------------------------


def _cells(table: Table, name: str, key: str) -> pd.Series:
    if name not in table.frame.columns:
        raise ValueError(no_column(name, key, table.frame))
    return table.frame[name]


def _groups(table: Table, folds: Folds) -> NDArray[np.int64]:
    """Return group numbers 0, 1, ... (N,)."""
    names = cell_strings(_cells(table, str(folds.group), "folds.group"))
    empty = np.asarray([not name.strip() for name in names])
    advice = "every row needs a group: give a row that stands alone a value of its own"
    raise_faults("folds.group", row_fault(f"column '{folds.group}' is empty", empty, table.ids, advice))
    return np.unique(np.asarray(names, dtype=object), return_inverse=True)[1].astype(np.int64)


def _enough_groups(table: Table, folds: Folds) -> NDArray[np.int64]:
    codes = _groups(table, folds)
    if codes.max() + 1 < folds.num_folds:
        raise ValueError(
            f"folds.group: column '{folds.group}' has {codes.max() + 1} groups, fewer than folds.num_folds "
            f"{folds.num_folds}; lower num_folds or name a finer column"
        )
    return codes


def _times(table: Table, folds: Folds) -> NDArray[np.float64]:
    """Return sortable times (N,): numbers as they are, ISO dates in nanoseconds."""
    cells = _cells(table, str(folds.column), "folds.column")
    lost = np.ones(len(cells), dtype=bool)
    if not pd.api.types.is_datetime64_any_dtype(cells):
        values = parse_numbers(cells)[0]
        lost = ~np.isfinite(values)
        if not lost.any():
            return values
        cells = pd.Series(cell_strings(cells), dtype=object)
    dates = pd.to_datetime(cells, format="ISO8601", errors="coerce", utc=True)
    no_date = dates.isna().to_numpy(dtype=bool)
    lost = min(lost, no_date, key=np.sum)  # numbers with a gap are reported as numbers, dates as dates
    what = f"column '{folds.column}' is neither a number nor an ISO date (2021-12-31, 2021-12-31T23:59)"
    advice = "fill it in, or drop the row"
    raise_faults("folds.column", row_fault(what, lost, table.ids, advice, cells[lost]))
    return dates.dt.tz_localize(None).to_numpy(dtype="datetime64[ns]").astype(np.int64).astype(np.float64)


def _own_folds(table: Table, folds: Folds) -> FoldOfRow:
    cells = _cells(table, str(folds.column), "folds.column")
    values = parse_numbers(cells)[0]
    wrong = ~np.isfinite(values) | (values != np.round(values))
    advice = f"allowed are 0 to {folds.num_folds - 1}"
    what = f"column '{folds.column}' is not a whole number"
    raise_faults("folds.column", row_fault(what, wrong, table.ids, advice, cells[wrong]))
    return values.astype(np.int64)


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
        codes = _groups(table, folds)
        pairs = np.unique(np.stack([codes, fold], axis=1), axis=0)
        crossing = np.isin(codes, np.flatnonzero(np.bincount(pairs[:, 0]) > 1))
        if crossing.any():
            names = np.asarray(cell_strings(table.frame[folds.group]), dtype=object)[crossing]
            yield (
                f"{len(set(names))} groups of column '{folds.group}' cross folds ({listed(names)}); use splitter "
                "group or stratified_group, or leave folds.group out"
            )
    if folds.splitter == "time":
        times = _times(table, folds)
        spans = [(times[fold == k].min(), times[fold == k].max()) for k in np.unique(fold)]
        if any(before[1] >= after[0] for before, after in pairwise(spans)):
            yield f"folds are not in the order of column '{folds.column}'; each must be later than the one before"
    if folds.splitter == "column":
        moved = fold != _own_folds(table, folds)
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


# --- audit -------------------------------------------------------------------------------------------------


def audit(fold: FoldOfRow, table: Table, task: Task, *, group: str | None = None) -> list[str]:
    """Return lines on each fold: rows, groups, and mean and spread (numbers) or shares (classes) of the target.

    A line that starts with "warning:" names a class or label whose rows are all in one fold.
    """
    targets = table.targets[task.name]
    shares = _shares(targets, table, task)
    codes = None if group is None else np.asarray(cell_strings(_cells(table, group, "folds.group")), dtype=object)
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
                f"warning: all {mask.sum()} rows of {name} are in fold {homes[0]}: the model that is validated "
                "there never saw one; merge it with another class, or lower folds.num_folds"
            )
    return lines


def _shares(targets: NDArray[np.float32], table: Table, task: Task) -> dict[str, NDArray[np.bool_]]:
    """Return "target=label" -> rows (N,) that have it; {} for numbers and soft labels."""
    name = task.targets[0]
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
