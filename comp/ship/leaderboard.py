"""submissions/LOG.md: a dated line per submission, its cross-validated score beside the leaderboard's."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from comp.runs import now, write_text

__all__ = ["LOG", "Entry", "add_entry", "compare", "note_score", "read_log"]

LOG = Path("submissions/LOG.md")
HEAD = """# Submissions

CV is out of fold; of a blend cross-fitted. LB is what the leaderboard said: `comp submit PATH --score N` fills it in.

| when (UTC) | competition | what | metric | CV | how | LB | note |
|---|---|---|---|---|---|---|---|
"""
FEWEST = 3
"""Two points always lie on a line."""


@dataclass(frozen=True)
class Entry:
    """One submission."""

    what: str
    """Path of the CSV or the bundle."""
    competition: str
    metric: str = ""
    cv: float | None = None
    how: str = ""
    """What the CV is: cross-fitted, out of fold, ..."""
    lb: float | None = None
    note: str = ""
    when: str = ""

    def line(self) -> str:
        cells = [
            self.when, self.competition, self.what, self.metric, _number(self.cv), self.how, _number(self.lb), self.note
        ]  # fmt: skip
        plain = [re.sub(r"[|\s]+", " ", cell).strip() for cell in cells]
        return f"| {' | '.join(plain)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def read_log(path: Path = LOG) -> list[Entry]:
    """Return the submissions, oldest first; [] without a log. Raises ValueError for a line that cannot be read."""
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("| ") or line.startswith("| when"):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        try:
            when, competition, what, metric, cv, how, lb, note = cells
            scores = [float(cell) if cell else None for cell in (cv, lb)]
        except ValueError:
            raise ValueError(f"{path}, line {number}: wanted 8 cells, CV and LB numbers or empty; got {line}") from None
        entries.append(Entry(what, competition, metric, scores[0], how, scores[1], note, when))
    return entries


def _write(path: Path, entries: Sequence[Entry]) -> None:
    write_text(path, HEAD + "".join(f"{entry.line()}\n" for entry in entries))


def add_entry(entry: Entry, path: Path = LOG) -> None:
    """Add a submission, dated now."""
    when = now().replace("T", " ")[:16]
    _write(path, [*read_log(path), replace(entry, when=when)])


def note_score(entry: Entry, score: float, path: Path = LOG) -> bool:
    """Write a leaderboard score to the latest line of `entry.what` that has none; without one, add a line.

    Returns whether the line was there. Raises ValueError for a score that is not finite.
    """
    if not math.isfinite(score):
        raise ValueError(f"--score {score}: wanted the leaderboard's number")
    entries = read_log(path)
    for place in reversed(range(len(entries))):
        if entries[place].what == entry.what and entries[place].lb is None:
            entries[place] = replace(entries[place], lb=score)
            _write(path, entries)
            return True
    add_entry(replace(entry, lb=score), path)
    return False


def compare(path: Path = LOG) -> list[str]:
    """Return a table of CV beside LB, and their correlation per competition and metric; [] without a submission."""
    entries = read_log(path)
    if not entries:
        return []
    width = max(len("submission"), *(len(entry.what) for entry in entries))
    lines = [f"{'submission':<{width}} {'CV':>10} {'LB':>10} {'LB - CV':>10}  {'when':<16}  CV is"]
    for entry in entries:
        gap = None if entry.cv is None or entry.lb is None else entry.lb - entry.cv
        shown = " ".join(f"{'-' if value is None else f'{value:.5f}':>10}" for value in (entry.cv, entry.lb, gap))
        lines.append(f"{entry.what:<{width}} {shown}  {entry.when:<16}  {entry.metric} {entry.how}")
    kinds = dict.fromkeys((entry.competition, entry.metric) for entry in entries)
    for competition, metric in kinds:
        pairs = [
            (entry.cv, entry.lb)
            for entry in entries
            if (entry.competition, entry.metric) == (competition, metric) and None not in (entry.cv, entry.lb)
        ]
        told = _correlation([(cv, lb) for cv, lb in pairs if cv is not None and lb is not None])
        lines.append(f"{competition}, {metric or 'no metric'}: {told}")
    return lines


def _correlation(pairs: Sequence[tuple[float, float]]) -> str:
    if len(pairs) < FEWEST:
        return f"{len(pairs)} submissions have both CV and LB; a correlation needs {FEWEST}"
    means = [sum(values) / len(pairs) for values in zip(*pairs, strict=True)]
    away = [(cv - means[0], lb - means[1]) for cv, lb in pairs]
    spread = math.sqrt(sum(one**2 for one, _ in away) * sum(two**2 for _, two in away))
    if not spread:
        return f"CV or LB is the same in all {len(pairs)} submissions: no correlation"
    found = sum(one * two for one, two in away) / spread
    return f"CV and LB correlate by {found:.3f} over {len(pairs)} submissions"
