"""SPLITTERS: (table, first task, settings of the folds) -> fold per row.

fold -1 (splitter `time` only) = rows that are trained on and never validated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.catalog import Row
from comp.data.frames import cell_strings, no_column, parse_numbers, raise_faults, row_fault
from comp.data.tables import Table

if TYPE_CHECKING:
    from comp.config import Folds, Task

__all__ = [
    "SETTINGS",
    "SPLITTERS",
    "FoldOfRow",
    "bin_values",
    "column_cells",
    "group_codes",
    "merge_rare",
    "own_folds",
    "time_blocks",
    "time_values",
]

FoldOfRow: TypeAlias = NDArray[np.int64]


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
    targets = table.hard_targets(task).astype(np.float64)
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
    for values in table.hard_targets(task).T:
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
    return time_blocks(time_values(table, folds), num_folds=folds.num_folds, column=str(folds.column))


def column(table: Table, task: Task, folds: Folds) -> FoldOfRow:
    """Take the fold numbers of the table's own column."""
    return own_folds(table, folds)


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
    "column": Row(column, "the table's own column of fold numbers 0, 1, ...", "common practice"),
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


def column_cells(table: Table, name: str, key: str) -> pd.Series:
    """Return the raw column `name` (N,), which config key `key` names. Raises ValueError when it is not there."""
    if name not in table.frame.columns:
        raise ValueError(no_column(name, key, table.frame))
    return table.frame[name]


def group_codes(table: Table, folds: Folds) -> NDArray[np.int64]:
    """Return group numbers 0, 1, ... (N,)."""
    names = cell_strings(column_cells(table, str(folds.group), "folds.group"))
    empty = np.asarray([not name.strip() for name in names])
    advice = "every row needs a group: give a row that stands alone a value of its own"
    raise_faults("folds.group", row_fault(f"column '{folds.group}' is empty", empty, table.ids, advice))
    return np.unique(np.asarray(names, dtype=object), return_inverse=True)[1].astype(np.int64)


def _enough_groups(table: Table, folds: Folds) -> NDArray[np.int64]:
    codes = group_codes(table, folds)
    if codes.max() + 1 < folds.num_folds:
        raise ValueError(
            f"folds.group: column '{folds.group}' has {codes.max() + 1} groups, fewer than folds.num_folds "
            f"{folds.num_folds}; lower num_folds or name a finer column"
        )
    return codes


def time_values(table: Table, folds: Folds) -> NDArray[np.float64]:
    """Return sortable times (N,): numbers as they are, ISO dates in nanoseconds."""
    cells = column_cells(table, str(folds.column), "folds.column")
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


def own_folds(table: Table, folds: Folds) -> FoldOfRow:
    """Return the table's own fold numbers (N,). Raises ValueError for cells that are not whole numbers."""
    cells = column_cells(table, str(folds.column), "folds.column")
    values = parse_numbers(cells)[0]
    wrong = ~np.isfinite(values) | (values != np.round(values))
    advice = f"allowed are 0 to {folds.num_folds - 1}"
    what = f"column '{folds.column}' is not a whole number"
    raise_faults("folds.column", row_fault(what, wrong, table.ids, advice, cells[wrong]))
    return values.astype(np.int64)
