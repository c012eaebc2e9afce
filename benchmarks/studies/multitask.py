"""Does a second task help the first? The target of CLEAR with and without its standard error as an auxiliary target.

    python benchmarks/studies/multitask.py            # about 11 minutes of two cores; rows that are there are skipped
    python benchmarks/studies/multitask.py --report   # table and picture from the rows there are

Rows, table and picture: benchmarks/results/multitask.jsonl, .md, .png. The setting stands in clear600.py; the scores
are of the first task alone.
"""

from __future__ import annotations

from clear600 import Study, main

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

if __name__ == "__main__":
    main(STUDY, __doc__)
