"""How much keep-best flatters: the best of many evaluations is scored on the rows that chose it.

Half-split selection: choose the evaluation that is best on a random half of the fold's rows, score it on the other
half, and see how much worse that is, on average over splits. Half the rows choose with sqrt(2) times the noise, so the
difference is divided by sqrt(2). Rows count as independent; the steps of one run are not, and need not be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from comp.metrics import METRICS, evaluate

__all__ = ["flattery"]

Floats = NDArray[np.float64]


def flattery(
    targets: Floats, evaluations: Sequence[Floats], metric: str, kind: str, *, splits: int = 20, seed: int = 0
) -> float | None:
    """Return by how much the best of `evaluations` (each (N, K)) scores better on `targets` (N, K) than it is.

    At least 0; 0 for one evaluation; None where the metric is not defined on halves of the rows.
    """
    if len(evaluations) < 2:
        return 0.0
    if len(targets) < 4:
        return None
    sign = -1.0 if METRICS[metric].higher_is_better else 1.0
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = draw.permutation(len(targets))
        halves = order[: len(order) // 2], order[len(order) // 2 :]
        try:
            scores = np.array(
                [[sign * evaluate(metric, targets[half], one[half], kind) for one in evaluations] for half in halves]
            )
        except ValueError:  # a half may hold a single class
            continue
        for choosing, other in (scores, scores[::-1]):
            best = int(choosing.argmin())
            found.append(other[best] - choosing[best])
    return max(0.0, float(np.mean(found)) / 2**0.5) if found else None
