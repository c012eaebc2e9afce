"""CSV and parquet files -> frames, cells -> text and numbers, and the words for what is wrong with them.

CSV cells are read as text and stay text ("NA", "007" and "" mean themselves); numbers are parsed where a
column is a target or a weight. Parquet, and frames handed over in a notebook, keep their own types.
"""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp.catalog import nearest

__all__ = [
    "Ids",
    "Mask",
    "Values",
    "blank",
    "cell_strings",
    "finite_numbers",
    "index_as_column",
    "listed",
    "named_twice",
    "no_column",
    "parse_numbers",
    "raise_faults",
    "read_frame",
    "row_fault",
]

SUFFIXES = (".csv", ".parquet")
SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars"}  # of files that call themselves .csv
MOST_SHOWN = 80  # letters of a cell in a message
Ids: TypeAlias = NDArray[np.object_]
Mask: TypeAlias = NDArray[np.bool_]
Values: TypeAlias = NDArray[np.float32]


# --- messages ----------------------------------------------------------------------------------------------


def raise_faults(source: str, faults: Sequence[str]) -> None:
    """Raise ValueError "source: fault", or with several faults a line for each; nothing when there is none."""
    if len(faults) == 1:
        raise ValueError(f"{source}: {faults[0]}")
    if faults:
        raise ValueError(f"{source}: {len(faults)} faults\n" + "\n".join(f"  - {fault}" for fault in faults))


def listed(items: Iterable[object], most: int = 3) -> str:
    """Return "'a', 'b', 'c', ..." with at most `most` of the different items."""
    names = list(dict.fromkeys(_short(str(item)) for item in items))
    return ", ".join(map(repr, names[:most])) + (", ..." if len(names) > most else "")


def _short(text: str) -> str:
    """Return a cell as a message can show it: one may hold megabytes."""
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text):,} letters)"


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


def named_twice(names: Iterable[object]) -> list[str]:
    """Return one fault that names the columns that occur more than once; [] when there are none."""
    twice = [name for name, times in Counter(map(str, names)).items() if times > 1]
    return [f"column name {listed(twice)} occurs more than once; rename one"] if twice else []


# --- files -------------------------------------------------------------------------------------------------


def read_frame(path: Path | str, id_column: str | None = None, *, empty: bool = False) -> pd.DataFrame:
    """Read a CSV (all cells text) or parquet file (native types); with `id_column`, it is sure to have that.

    `empty`: a table without rows is allowed.

    Raises ValueError: no such file, neither .csv nor .parquet, not UTF-8, not separated by commas, ragged or
    unparsable, no rows, a column name twice, no `id_column`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(_no_file(path))
    if path.suffix.lower() not in SUFFIXES:
        advice = _convert(path, "\t") if path.suffix.lower() in (".tsv", ".tab") else "unpack or convert it first"
        raise ValueError(f"{path}: not a {' or '.join(SUFFIXES)} file; {advice}")
    frame = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    if not len(frame) and not empty:
        raise ValueError(f"{path}: the table has no rows, only columns {listed([*frame.columns], 20)}")
    if id_column is not None:
        frame = index_as_column(frame, id_column)
        if id_column not in frame.columns:
            raise ValueError(f"{path}: {no_column(id_column, 'the id', frame)}")
    return frame


def _convert(path: Path, separator: str) -> str:
    """Return the line of Python that makes a CSV of a table with another separator."""
    to = path.with_suffix(".csv")
    return f"make it one: pandas.read_csv('{path}', sep={separator!r}, dtype=str).to_csv('{to}', index=False)"


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
    if "\0" in text:
        place = text.index("\0")
        raise ValueError(
            f"{path}: a NUL character at offset {place} (line {text.count(chr(10), 0, place) + 1}), which no text has; "
            "the file is damaged, or UTF-16: write it anew as UTF-8"
        )
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
    for separator, name in SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise ValueError(f"{path}: its columns are separated by {name}, not by commas; {_convert(path, separator)}")
    raise_faults(str(path), named_twice(header))
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
    raise_faults(str(path), named_twice(frame.columns))
    return frame


def index_as_column(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """Return `frame` with index 0..N-1; an index called `name` becomes a column."""
    return frame.reset_index(drop=name in frame.columns or frame.index.name != name)


# --- cells -------------------------------------------------------------------------------------------------


def cell_strings(column: pd.Series) -> list[str]:
    """Return the cells as text, null as "", 3.0 as "3" (beside a null, pandas makes whole numbers floats)."""
    missing = column.isna().to_numpy(dtype=bool)
    whole = [int(c) if isinstance(c, float) and c.is_integer() else c for c in column.tolist()]
    return ["" if gone else str(cell) for cell, gone in zip(whole, missing, strict=True)]


def blank(cells: Sequence[str]) -> Mask:
    """Return which of N cells are empty or white space, (N,)."""
    return np.asarray([not cell.strip() for cell in cells], dtype=bool)


def parse_numbers(column: pd.Series) -> tuple[NDArray[np.float64], Mask, Mask]:
    """Return values, mask of empty cells, mask of cells that are no number, all (N,); NaN under the masks."""
    if pd.api.types.is_numeric_dtype(column):
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
        return values, np.isnan(values), np.zeros(len(values), dtype=bool)
    cells = [cell.strip() for cell in cell_strings(column)]
    values = pd.to_numeric(pd.Series(cells, dtype=object), errors="coerce").to_numpy(dtype=np.float64)
    missing = blank(cells)
    return values, missing, np.isnan(values) & ~missing


def finite_numbers(frame: pd.DataFrame, name: str, ids: Ids | None, advice: str) -> tuple[Values, list[str]]:
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
