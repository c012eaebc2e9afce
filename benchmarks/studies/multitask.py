"""Does a second task help the first? The target of CLEAR with and without its standard error as an auxiliary target.

    python benchmarks/studies/multitask.py            # about 6 minutes of two cores; rows that are there are skipped
    python benchmarks/studies/multitask.py --report   # table and picture from the rows there are

Rows, table and picture: benchmarks/results/multitask.jsonl, .md, .png. The setting stands in clear600.py; the scores
are of the first task alone. One task with the default pooler is what `mean` of the pooler study trained: its rows are
taken over where they are there.
"""

from __future__ import annotations

import json

from clear600 import KEYS, Study, main
from poolers import BASELINE as POOLER
from poolers import STUDY as POOLERS
from rows import read_rows

FIRST = "{name: readability, kind: regression, targets: [target]}"
ERROR = "{name: error, kind: regression, targets: [standard_error], weight: %s}"
STUDY = Study(
    name="multitask",
    title="One task or two on 600 rows of CLEAR",
    what="tasks",
    baseline="target alone",
    variants={
        "target alone": [f"tasks=[{FIRST}]"],
        "target + standard_error, weight 0.5": [f"tasks=[{FIRST}, {ERROR % 0.5}]"],
    },
)


def take_over() -> None:
    """Append the rows of the pooler study that are those of the baseline, but for the ones that are there."""
    known = {tuple(row[key] for key in KEYS) for row in read_rows(STUDY.rows, *KEYS)}
    own = {"variant": STUDY.baseline, "overrides": STUDY.variants[STUDY.baseline]}
    for row in read_rows(POOLERS.rows, *KEYS):
        if row["variant"] == POOLER and (STUDY.baseline, row["seed"], row["fold"]) not in known:
            with open(STUDY.rows, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({**row, **own}) + "\n")


if __name__ == "__main__":
    take_over()
    main(STUDY, __doc__)
