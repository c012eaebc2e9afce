"""What was asked of comp's speed and what was measured: one table of all benchmarks that have a goal.

    python benchmarks/goals.py     # prints the table and writes it to benchmarks/results/README.md

Each of these benchmarks leaves its figures in benchmarks/results/goals.json by `note`, over those of its last run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

RESULTS = Path(__file__).resolve().parent / "results"
FILE, PAGE = RESULTS / "goals.json", RESULTS / "README.md"
FORMS = {"ratio": "{:.2f}", "percent": "{:.2f}%", "seconds": "{:.2f} s"}


@dataclass(frozen=True)
class Goal:
    """One figure of a benchmark, and what it should be."""

    what: str
    found: float
    sense: Literal["at least", "at most"]
    asked: float
    unit: Literal["ratio", "percent", "seconds"] = "ratio"

    @property
    def met(self) -> bool:
        return self.found >= self.asked if self.sense == "at least" else self.found <= self.asked


def note(script: str, machine: str, goals: Sequence[Goal]) -> None:
    """Write the figures of a run of `script` ("eval_cost.py"), measured on `machine`."""
    rows = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    rows[script] = {"machine": machine, "goals": [asdict(goal) for goal in goals]}
    FILE.write_text(json.dumps(dict(sorted(rows.items())), indent=1) + "\n", encoding="utf-8")


def table() -> list[str]:
    """Return the lines of the page."""
    lines = [
        "# Speed: goals and figures",
        "",
        "`make bench` measures all of this. Ratios are medians over rounds or seeds; each command's own page, beside",
        "this one, says how they spread.",
        "",
        "| what | measured | goal | met | command | machine |",
        "|---|---|---|---|---|---|",
    ]
    rows = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for script, row in rows.items():
        for goal in [Goal(**goal) for goal in row["goals"]]:
            form = FORMS[goal.unit]
            lines.append(
                f"| {goal.what} | {form.format(goal.found)} | {goal.sense} {form.format(goal.asked)} "
                f"| {'yes' if goal.met else 'no'} | `python benchmarks/{script}` | {row['machine']} |"
            )
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
    PAGE.write_text("\n".join(table()) + "\n", encoding="utf-8")
