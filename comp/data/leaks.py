"""LEAKS: what makes a score on held-out rows better than the truth, looked for before anything is trained.

Texts are compared with white space and case folded away. Nearly the same: of all runs of five words that either text
has, at least 80% are in both (the Jaccard index that MinHash approximates; by sparse products it costs seconds for
20,000 texts and is exact).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.catalog import Row
from comp.data.frames import Mask, cell_strings, listed
from comp.data.lineage import Lineage, folded
from comp.data.splitters import column_cells
from comp.data.tables import Table
from comp.metrics import evaluate_known
from comp.runs import digest, write_json

__all__ = ["LEAKS", "Evidence", "Leak", "OutOfFold", "alike", "better_than_can_be", "leak_table", "lint"]

CACHE = Path("runs/.cache/leaks")
WORDS, NEAR = 5, 0.8
BLOCK = 512  # rows compared with all others at a time: 512 x 20,000 numbers are 80 MB
FEW = 50  # a text column with at most so many different values is a label, not a text
Texts: TypeAlias = list[str]


@dataclass(frozen=True)
class OutOfFold:
    """The out-of-fold rows of a run's first task."""

    run: str
    kind: str
    """Of the task."""
    targets: NDArray[np.floating]
    """(N, K), or (N, 1) class indices."""
    preds: NDArray[np.floating]
    """(N, K)"""


@dataclass(frozen=True)
class Evidence:
    """What is looked at."""

    train: Table
    test: Table | None = None
    fold: NDArray[np.int64] | None = None
    """(N,) of the training rows; None = not split yet."""
    group: str | None = None
    """Column whose values must not be in two folds."""
    runs: tuple[OutOfFold, ...] = ()
    """Runs on these rows and folds."""
    lineage: Lineage | None = None
    """What the backbone has read; None = nothing that is known of."""


@dataclass(frozen=True)
class Leak:
    """One finding."""

    rule: str
    count: int
    """Rows, or groups."""
    what: str
    """In words, with an example."""
    fix: str
    """What to do about it."""
    note: bool = False
    """Allowed, but to be said."""

    def __str__(self) -> str:
        return f"{'note' if self.note else 'leak'}: {self.what}; {self.fix}"

    @property
    def line(self) -> str:
        """The finding as a line for the user."""
        return str(self) if self.note else f"warning: {self}"


# --- texts -----------------------------------------------------------------------------------------------------------


def _folded(table: Table) -> Texts:
    return folded(table.texts)


def _apart(evidence: Evidence, rows: list[int]) -> bool:
    """Tell whether rows lie in different folds, or may come to."""
    return evidence.fold is None or len({int(evidence.fold[row]) for row in rows}) > 1


ONE_FOLD = "drop them, or give them one value of a folds.group"


def copies(evidence: Evidence) -> Leak | None:
    """Training rows with the same text, not all in one fold."""
    found: dict[str, list[int]] = {}
    for row, text in enumerate(_folded(evidence.train)):
        found.setdefault(text, []).append(row)
    groups = [rows for rows in found.values() if len(rows) > 1 and _apart(evidence, rows)]
    if not groups:
        return None
    count = sum(map(len, groups))
    return Leak(
        "copies",
        count,
        f"{count} training rows share their text with another ({len(groups)} texts, e.g. ids "
        f"{listed(evidence.train.ids[groups[0][:2]])}); copies in two folds flatter the score",
        ONE_FOLD,
    )


def near_copies(evidence: Evidence) -> Leak | None:
    """Training rows with nearly the same text, in different folds."""
    texts = _folded(evidence.train)
    pairs = [(one, other) for one, other in _near(texts, texts) if one < other and _apart(evidence, [one, other])]
    if not pairs:
        return None
    rows = {row for pair in pairs for row in pair}
    example = listed(evidence.train.ids[list(pairs[0])])
    what = f"{len(rows)} training rows have nearly the text of another (e.g. ids {example}); in two folds they flatter"
    return Leak("near_copies", len(rows), f"{what} the score", ONE_FOLD)


def test_copies(evidence: Evidence) -> Leak | None:
    """Test rows with the text of a training row."""
    train, test = evidence.train, evidence.test
    if test is None:
        return None
    first = {text: row for row, text in reversed(list(enumerate(_folded(train))))}
    shared = [(row, first[text]) for row, text in enumerate(_folded(test)) if text in first]
    return _of_test("test_copies", "have the text of a training row", evidence, shared)


def near_test_copies(evidence: Evidence) -> Leak | None:
    """Test rows with nearly the text of a training row."""
    if evidence.test is None:
        return None
    found = dict(reversed(list(_near(_folded(evidence.test), _folded(evidence.train)))))
    return _of_test("near_test_copies", "have nearly the text of a training row", evidence, list(found.items()))


def _of_test(rule: str, what: str, evidence: Evidence, shared: list[tuple[int, int]]) -> Leak | None:
    if not shared or evidence.test is None:
        return None
    pairs = ", ".join(f"test '{evidence.test.ids[a]}' = train '{evidence.train.ids[b]}'" for a, b in shared[:2])
    fix = "a score on them measures memory: drop those training rows, unless the competition has them on purpose"
    return Leak(rule, len(shared), f"{len(shared)} test rows {what} ({pairs})", fix)


def alike(ones: Table, others: Table) -> tuple[Mask, Mask]:
    """Return which rows of `ones` (N,) have the text of a row of `others`, and which of the rest have nearly one.

    Where both are one table: of an earlier row.
    """
    texts = _folded(ones)
    if ones is others:
        first = {text: row for row, text in reversed(list(enumerate(texts)))}
        equal = np.array([first[text] != row for row, text in enumerate(texts)], dtype=bool)
        found = {one for one, other in _near(texts, texts) if other < one}
    else:
        known = _folded(others)
        there = set(known)
        equal = np.array([text in there for text in texts], dtype=bool)
        found = {one for one, _ in _near(texts, known)}
    near = np.zeros(len(texts), dtype=bool)
    near[sorted(found)] = True
    return equal, near & ~equal


def _near(ones: Texts, others: Texts) -> Iterator[tuple[int, int]]:
    """Yield (row of `ones`, row of `others`) of nearly the same texts, equal ones left out, in rising order."""
    from sklearn.feature_extraction.text import HashingVectorizer

    runs = HashingVectorizer(
        ngram_range=(WORDS, WORDS), token_pattern=r"\S+", lowercase=False, binary=True, norm=None,
        alternate_sign=False, n_features=2**22, dtype=np.float32,
    )  # fmt: skip
    left = runs.transform(ones).tocsr()
    right = left if others is ones else runs.transform(others).tocsr()
    sizes = np.asarray(left.sum(axis=1)).ravel(), np.asarray(right.sum(axis=1)).ravel()
    across = right.T.tocsc()
    for start in range(0, left.shape[0], BLOCK):
        common = (left[start : start + BLOCK] @ across).tocoo()
        rows, columns = common.row + start, common.col
        union = sizes[0][rows] + sizes[1][columns] - common.data
        near = np.flatnonzero(common.data >= NEAR * union)
        for one, other in sorted(zip(rows[near].tolist(), columns[near].tolist(), strict=True)):
            if ones[one] != others[other]:
                yield one, other


# --- columns ---------------------------------------------------------------------------------------------------------


def same_ids(evidence: Evidence) -> Leak | None:
    """Ids that are in both tables."""
    known = set(evidence.train.ids)
    both = [name for name in ([] if evidence.test is None else evidence.test.ids) if name in known]
    if not both:
        return None
    return Leak(
        "same_ids",
        len(both),
        f"{len(both)} ids are in both train and test (e.g. {listed(both, 2)})",
        "check that competition.test is not the training file, and that equal ids mean different rows",
    )


def split_groups(evidence: Evidence) -> Leak | None:
    """Values of the group column that are in two folds."""
    if evidence.fold is None or evidence.group is None:
        return None
    cells = cell_strings(column_cells(evidence.train, evidence.group, "folds.group"))
    homes: dict[str, set[int]] = {}
    for cell, fold in zip(cells, evidence.fold.tolist(), strict=True):
        homes.setdefault(cell, set()).add(fold)
    split = [cell for cell, folds in homes.items() if len(folds) > 1]
    if not split:
        return None
    return Leak(
        "split_groups",
        len(split),
        f"{len(split)} values of '{evidence.group}' are in more than one fold (e.g. {listed(split, 2)})",
        "use folds.splitter group or stratified_group, and write the fold file anew",
    )


def target_in_text(evidence: Evidence) -> Leak | None:
    """A text column that is the target, or tells it: few different values, each with one target."""
    for texts in evidence.train.texts:
        values = [" ".join(text.split()).casefold() for text in texts]
        for name, targets in evidence.train.targets.items():
            several = len(np.unique(targets, axis=0)) > 1
            told: dict[str, set[bytes]] = {}
            for value, row in zip(values, targets, strict=True):
                told.setdefault(value, set()).add(row.tobytes())
            numbers = [[f"{cell:g}" for cell in row] for row in targets.tolist()]
            equal = all(value in row for value, row in zip(values, numbers, strict=True))
            few = len(told) <= min(FEW, len(values) // 2) and all(len(own) == 1 for own in told.values())
            if several and (equal or few):
                example = listed(list(told), 2)
                what = f"a text column tells the target of task '{name}' (e.g. {example} each have one target)"
                return Leak("target_in_text", len(values), what, "take that column out of competition.text")
    return None


# --- the backbone ----------------------------------------------------------------------------------------------------


def seen_test(evidence: Evidence) -> Leak | None:
    """Test rows whose texts the backbone was pre-trained on."""
    lineage, test = evidence.lineage, evidence.test
    count = 0 if lineage is None or test is None else int(lineage.has_read(test).sum())
    if not count or lineage is None or test is None:
        return None
    return Leak(
        "seen_test",
        count,
        f"the backbone {lineage.folder} has read {count:,} of the {len(test):,} test texts, without targets",
        "most competitions allow it: look at the rules, and say so beside the score",
        note=True,
    )


def seen_held_out(evidence: Evidence) -> Leak | None:
    """Held-out rows whose texts the backbone was pre-trained on, by fold."""
    lineage = evidence.lineage
    if lineage is None:
        return None
    read = lineage.has_read(evidence.train)
    fold = np.zeros(len(read), np.int64) if evidence.fold is None else evidence.fold
    held_out = read & (fold >= 0)
    if not held_out.any():
        return None
    clean = [k for k in np.unique(fold[fold >= 0]).tolist() if lineage.fold == k or not held_out[fold == k].any()]
    count = int((held_out & ~np.isin(fold, clean)).sum())
    if not count:
        return None
    but = f", but for those of fold {', '.join(map(str, clean))}" if clean and evidence.fold is not None else ""
    return Leak(
        "seen_held_out",
        count,
        f"the backbone {lineage.folder} has read the texts of {count:,} training rows, without targets{but}: scores on "
        "them may flatter a little",
        "`comp pretrain --fold k` makes one for fold k that has not read its held-out rows",
        note=True,
    )


# --- runs ------------------------------------------------------------------------------------------------------------


def too_good(evidence: Evidence) -> Leak | None:
    """Runs whose out-of-fold rows are better than they can be."""
    return better_than_can_be(evidence.runs)


def better_than_can_be(runs: Sequence[OutOfFold]) -> Leak | None:
    """Find the runs whose out-of-fold predictions leave nearly no error, as texts do not."""
    found = []
    for run in runs:
        numbers = run.kind in ("regression", "ordinal") or (
            run.kind in ("binary", "multilabel") and not np.isin(run.targets, (0, 1)).all()  # soft labels
        )
        metric, bound = ("pearson", 0.995) if numbers else ("roc_auc", 0.9999)
        score = evaluate_known(metric, run.targets, run.preds, run.kind)
        if score is not None and score >= bound:
            found.append(f"{run.run} ({metric} {score:.5f}, above {bound})")
    if not found:
        return None
    return Leak(
        "too_good",
        len(found),
        f"out-of-fold predictions are better than they can be: {', '.join(found)}",
        "look for the target in the texts, and for copies across folds, with `comp lint`",
    )


LEAKS: dict[str, Row] = {
    "copies": Row(copies, "the same text in two folds", "rivals: AutoGluon on CommonLit"),
    "near_copies": Row(near_copies, "nearly the same text in two folds", "Broder 1997, resemblance"),
    "test_copies": Row(test_copies, "a test text that is a training text", "common practice"),
    "near_test_copies": Row(near_test_copies, "a test text that is nearly a training text", "Broder 1997, resemblance"),
    "same_ids": Row(same_ids, "an id in train and in test", "common practice"),
    "split_groups": Row(split_groups, "a group in two folds", "common practice"),
    "target_in_text": Row(target_in_text, "a text column that tells the target", "common practice"),
    "seen_test": Row(seen_test, "a backbone that has read test texts (a note)", "common practice"),
    "seen_held_out": Row(seen_held_out, "a backbone that has read held-out texts (a note)", "common practice"),
    "too_good": Row(too_good, "out-of-fold rows better than they can be", "common practice"),
}


def lint(evidence: Evidence, *, cache: Path | None = CACHE) -> list[Leak]:
    """Return what every rule of LEAKS finds. Kept in `cache` by the data, folds, group and runs that were looked at."""
    train, test, fold = evidence.train, evidence.test, evidence.fold
    marks: list[str | bytes] = [train.fingerprint(), "" if test is None else test.fingerprint(), evidence.group or ""]
    marks += ["" if fold is None else digest([fold.tobytes()]), *LEAKS]
    marks += [part for run in evidence.runs for part in (run.run, run.targets.tobytes(), run.preds.tobytes())]
    if evidence.lineage is not None:
        marks += [evidence.lineage.folder, json.dumps(evidence.lineage.about), evidence.lineage.seen.tobytes()]
    path = None if cache is None else cache / f"{digest(marks)}.json"
    if path is not None and path.exists():
        known: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return [Leak(**one) for one in known]
    found = [leak for row in LEAKS.values() if (leak := row.make(evidence)) is not None]
    if path is not None:
        write_json(path, [asdict(leak) for leak in found])
    return found


def _lacking(evidence: Evidence) -> dict[str, str]:
    """Return rule -> what it would need to look at and has not got."""
    needs = {
        "no test table": (evidence.test is None, ("test_copies", "near_test_copies", "same_ids", "seen_test")),
        "no folds.group": (evidence.group is None, ("split_groups",)),
        "no folds yet": (evidence.fold is None, ("split_groups",)),
        "no record of what it has read": (evidence.lineage is None, ("seen_test", "seen_held_out")),
        "no --run": (not evidence.runs, ("too_good",)),
    }
    return {rule: why for why, (lacks, rules) in needs.items() if lacks for rule in rules}


def leak_table(leaks: list[Leak], evidence: Evidence) -> str:
    """Return the findings with their counts and fixes, a line for every rule; "-" where it had nothing to look at."""
    found, lacking = {leak.rule: leak for leak in leaks}, _lacking(evidence)
    width = max(map(len, LEAKS))
    lines = []
    for rule, row in LEAKS.items():
        count: int | str = found[rule].count if rule in found else "-" if rule in lacking else 0
        why = f": {lacking[rule]}" if count == "-" else ""
        lines.append(f"{rule:<{width}} {count:>7}  {row.about}{why}")
        if rule in found:
            lines += [f"{'':<{width}}          {found[rule].what}", f"{'':<{width}}          -> {found[rule].fix}"]
    return "\n".join(lines)
