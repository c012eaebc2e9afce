"""Which pooler is best? Every one of the catalogue with its default options, against `mean`.

    python benchmarks/studies/poolers.py              # about 110 minutes of two cores; rows that are there are skipped
    python benchmarks/studies/poolers.py --report     # table and picture from the rows there are

Rows, table and picture: benchmarks/results/poolers.jsonl, .md, .png. The setting stands in clear600.py. two_tower is
left out: CLEAR has one text column.
"""

from __future__ import annotations

from clear600 import Study, main

from comp.model.pooling import POOLERS

BASELINE = "mean"
NAMES = [BASELINE, *(name for name in POOLERS if name not in (BASELINE, "two_tower"))]
STUDY = Study(
    name="poolers",
    title="Poolers on 600 rows of CLEAR",
    what="pooler",
    baseline=BASELINE,
    variants={name: [f"model.pooler.name={name}"] for name in NAMES},
)

if __name__ == "__main__":
    main(STUDY, __doc__)
