"""The texts of a stage of pre-training: tables of the competition, or a fold's training rows, and further files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.data.frames import blank, cell_strings, listed, no_column, raise_faults, read_frame
from comp.data.tables import Table

if TYPE_CHECKING:
    from comp.config import Competition
    from comp.config_pretrain import Corpus

__all__ = ["Texts", "read_texts", "split_rows"]

Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Texts:
    """N texts to learn from."""

    columns: tuple[list[str], ...]
    """One list of N per text column."""
    sources: list[dict[str, Any]]
    """Where they are from: path, sha256 of the file, rows that are used, rows that were left out for want of text."""

    def __len__(self) -> int:
        return len(self.columns[0])


def read_texts(
    corpus: Corpus,
    competition: Competition,
    train: Table,
    test: Table | None,
    *,
    training: Rows | None = None,
    seed: int,
) -> Texts:
    """Read the texts of a corpus.

    `training`: rows of `train` to keep, those of a fold; its held-out texts and the test table are then left out.
    Rows without text are left out. Raises ValueError for files and columns that are not there, when the parts of a
    corpus have different numbers of text columns, or when fewer than two texts are left.
    """
    parts: list[tuple[tuple[list[str], ...], dict[str, Any]]] = []
    for name in corpus.tables:
        if name == "test" and training is not None:
            continue
        if name == "test" and (test is None or competition.test is None):
            raise ValueError("pretrain.corpora reads the test table, but competition.test is null; set tables: [train]")
        table, path = (train, competition.train) if name == "train" or test is None else (test, str(competition.test))
        chosen = training if name == "train" and training is not None else np.arange(len(table))
        parts.append(_part(tuple([column[row] for row in chosen] for column in table.texts), name, path))
    names = competition.text_columns if corpus.text is None else _names(corpus.text)
    parts += [_part(_file_texts(path, names), "file", path) for path in corpus.files]
    if not parts:
        raise ValueError(
            "a corpus of pretrain.corpora has the test table alone, and --fold reads none of it, only the fold's "
            "training rows; leave out --fold, or set tables: [train]"
        )
    if len({len(columns) for columns, _ in parts}) > 1:
        counts = ", ".join(f"{about['path']} {len(columns)}" for columns, about in parts)
        raise ValueError(
            f"the parts of one corpus of pretrain.corpora have different numbers of text columns ({counts}); name one "
            "text column for the files, or make them a corpus of their own"
        )
    columns = tuple([text for own, _ in parts for text in own[place]] for place in range(len(parts[0][0])))
    if corpus.max_rows is not None and corpus.max_rows < len(columns[0]):
        rows = np.sort(np.random.default_rng(seed).permutation(len(columns[0]))[: corpus.max_rows])
        columns = tuple([column[row] for row in rows] for column in columns)
    if len(columns[0]) < 2:
        raise ValueError(f"{listed([about['path'] for _, about in parts])}: {len(columns[0])} texts are too few")
    return Texts(columns, [about for _, about in parts])


def _names(text: str | list[str]) -> list[str]:
    return [text] if isinstance(text, str) else text


def _part(columns: tuple[list[str], ...], kind: str, path: str) -> tuple[tuple[list[str], ...], dict[str, Any]]:
    """Return the rows that have any text, and what they are."""
    empty = np.all([blank(cells) for cells in columns], axis=0) if len(columns[0]) else np.zeros(0, bool)
    kept = tuple([text for text, without in zip(cells, empty, strict=True) if not without] for cells in columns)
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    about = {"kind": kind, "path": path, "sha256": sha256, "rows": len(kept[0]), "without_text": int(empty.sum())}
    return kept, about


def _file_texts(path: str, names: Sequence[str]) -> tuple[list[str], ...]:
    frame = read_frame(Path(path))
    role = "pretrain.corpora text"
    raise_faults(path, [no_column(name, role, frame) for name in names if name not in frame.columns])
    return tuple(cell_strings(frame[name]) for name in names)


def split_rows(num_rows: int, percent: float, seed: int) -> tuple[Rows, Rows]:
    """Return (training rows, held-out rows), `percent` of them, at least one, drawn with `seed`; rising.

    Raises ValueError when no row is left to train on.
    """
    if not percent:
        return np.arange(num_rows), np.zeros(0, np.int64)
    count = max(1, round(num_rows * percent / 100))
    order = np.random.default_rng([seed, 1]).permutation(num_rows)
    return np.sort(order[count:]), np.sort(order[:count])
