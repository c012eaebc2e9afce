"""What a backbone that `comp pretrain` made has read: lineage.json and seen.npy in its folder.

seen.npy holds 64 bits for each text, so that a text that was read is known again, whatever file it came from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.data.folds import Folding, train_rows, valid_rows
from comp.data.tables import Table
from comp.runs import read_json, write_json, write_stream

__all__ = ["Lineage", "check_lineage", "folded", "read_lineage", "text_marks", "write_lineage"]

LINEAGE, SEEN = "lineage.json", "seen.npy"
Marks = NDArray[np.uint64]


def folded(texts: Sequence[list[str]]) -> list[str]:
    """Return each row's texts (one list per text column) as one string, white space and case folded away."""
    return ["\x00".join(" ".join(text.split()).casefold() for text in row) for row in zip(*texts, strict=True)]


def text_marks(texts: Sequence[list[str]]) -> Marks:
    """Return (N,) a number for each row's folded texts; different texts share one by chance in 1 of 2^64 pairs."""
    hashes = (hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in folded(texts))
    return np.frombuffer(b"".join(hashes), dtype="<u8").astype(np.uint64)


@dataclass(frozen=True)
class Lineage:
    """What a pre-trained backbone comes from."""

    folder: str
    about: dict[str, Any]
    """lineage.json: source, objective, fold, folds (fingerprint), stages, `before` (that of the source, or null)."""
    seen: Marks
    """Marks of all texts it has read, those of the backbones before it included; sorted."""

    @property
    def fold(self) -> int | None:
        """The fold on whose training rows alone it was made; None = on all rows."""
        fold: int | None = self.about["fold"]
        return fold

    def has_read(self, table: Table) -> NDArray[np.bool_]:
        """Return which rows (N,) of a table have a text that it has read."""
        return np.isin(text_marks(table.texts), self.seen)


def read_lineage(source: str) -> Lineage | None:
    """Return the lineage in a backbone's folder; None for a hub name, a package, or a folder without one.

    Raises ValueError for one that is damaged.
    """
    folder = Path(source)
    if not (folder / LINEAGE).is_file():
        return None
    about = read_json(folder / LINEAGE, "source", "objective", "fold", "folds", "stages", "before")
    try:
        seen = np.load(folder / SEEN, allow_pickle=False).astype(np.uint64)
    except (OSError, ValueError, EOFError) as fault:
        raise ValueError(
            f"{folder / SEEN} cannot be read ({fault}): which texts {source} has read is not known; pre-train it anew"
        ) from None
    return Lineage(source, about, seen)


def write_lineage(folder: Path, about: dict[str, Any], seen: Marks) -> None:
    """Write lineage.json and seen.npy into a backbone's folder."""
    write_stream(folder / SEEN, lambda file: np.save(file, np.unique(seen), allow_pickle=False))
    write_json(folder / LINEAGE, about)


def check_lineage(source: str, folding: Folding | None, folds: Sequence[int | str], table: Table) -> None:
    """Raise ValueError when a backbone made for one fold is to be trained on another, whose held-out rows it has read.

    One made on the texts of all rows passes, with the notes of the leak rules: it flatters every fold alike.
    """
    lineage = read_lineage(source)
    if lineage is None or lineage.fold is None or folding is None:
        return
    same, read = lineage.about["folds"] == folding.fingerprint, lineage.has_read(table)
    if same:
        read = np.zeros(len(table), bool)
        read[train_rows(folding.fold, lineage.fold, folding.splitter)] = True
    for fold in folds:
        held_out = valid_rows(folding.fold, fold) if isinstance(fold, int) else np.zeros(0, np.int64)
        if read[held_out].any():
            where = "" if same else ", made from another fold file"
            raise ValueError(
                f"model.backbone '{source}' was pre-trained for fold {lineage.fold} alone{where}: it has read "
                f"{int(read[held_out].sum()):,} of the {len(held_out):,} held-out texts of fold {fold}; train fold "
                f"{lineage.fold} with it (--fold {lineage.fold}), or pre-train one with `comp pretrain --fold {fold}`, "
                "or one for all folds without --fold"
            )
