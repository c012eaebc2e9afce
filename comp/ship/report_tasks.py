"""How the out-of-fold predictions of a task look, by its kind: scatter, reliability or confusion, and their numbers.

Shapes: N rows, K target columns, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.config import Task
from comp.metrics import evaluate_known
from comp.ship.report_page import Block, Grid, Note, Picture
from comp.ship.row_errors import NORMAL_95

__all__ = ["confusion_counts", "most_common", "prediction_blocks", "reliability_bins", "share_interval"]

Floats = NDArray[np.float64]
NUM_BINS = 10
MOST_PANELS = 9  # columns of a task that get a picture
MOST_PAIRS = 10
MOST_CLASSES = 40  # of a confusion matrix, and of a table that stands open


def prediction_blocks(
    task: Task, targets: Floats, preds: Floats, outputs: Sequence[str], labels: Sequence[str] | None
) -> list[Block]:
    """Return pictures and tables of predictions (N, K or C) against targets (N, K), rows without a target left out.

    `outputs`: names of the predicted columns. `labels`: names of the classes or grades, of the kinds that have them.
    """
    known = np.isfinite(targets).all(axis=1) if task.kind == "multiclass" else np.isfinite(targets).any(axis=1)
    targets, preds = targets[known], preds[known]
    blocks: list[Block] = []
    if not known.all():
        blocks.append(Note(f"{int((~known).sum()):,} rows without a target are left out."))
    if not len(targets):
        return [Note("No finished fold has a row with a target of this task.")]
    if task.kind == "regression":
        return blocks + _numbers(task, targets, preds, outputs)
    if task.kind in ("binary", "multilabel"):
        return blocks + _probabilities(task, targets, preds, outputs)
    assert labels is not None
    return blocks + _classes(task, targets, preds, labels)


def _score(metric: str, targets: Floats, preds: Floats, kind: str) -> str:
    value = evaluate_known(metric, targets, preds, kind)
    return "-" if value is None else f"{value:.5f}"


def _too_many(columns: Sequence[str]) -> list[Block]:
    if len(columns) <= MOST_PANELS:
        return []
    return [Note(f"Drawn are the first {MOST_PANELS} of {len(columns)} columns; the table has all.")]


def _known_columns(targets: Floats, preds: Floats, outputs: Sequence[str]) -> Iterator[tuple[str, Floats, Floats]]:
    """Yield (name, targets (n,), predictions (n,)) of each column that has a target in some row."""
    for place, name in enumerate(outputs):
        known = np.isfinite(targets[:, place])
        if known.any():
            yield name, targets[known, place], preds[known, place]


def _numbers(task: Task, targets: Floats, preds: Floats, outputs: Sequence[str]) -> list[Block]:
    columns, rows = [], []
    for name, target, pred in _known_columns(targets, preds, outputs):
        columns.append((name, target, pred))
        scores = [
            _score(metric, target[:, None], pred[:, None], task.kind)
            for metric in ("rmse", "mae", "pearson", "spearman")
        ]
        bias = f"{float((pred - target).mean()):.4f}"
        rows.append([name, f"{len(target):,}", *scores, bias, f"{target.std():.4f}", f"{pred.std():.4f}"])
    heads = [
        "target",
        "rows",
        "RMSE",
        "MAE",
        "Pearson",
        "Spearman",
        "mean error",
        "spread of targets",
        "of predictions",
    ]
    about = f"{task.name}: out-of-fold prediction over target; dashed: equal"
    return [
        Picture(f"scatter-{task.name}", about, "scatter", {"columns": columns[:MOST_PANELS]}),
        *_too_many(outputs),
        Grid(f"columns-{task.name}", "", heads, rows),
    ]


# --- probabilities ---------------------------------------------------------------------------------------------------


def reliability_bins(targets: Floats, preds: Floats, num_bins: int = NUM_BINS) -> list[tuple[int, float, float]]:
    """Return (rows, mean prediction, mean target) of (N,) probabilities in bins of about equal numbers of rows, lowest
    first; equal predictions share a bin."""
    edges = np.unique(np.quantile(preds, np.linspace(0, 1, min(num_bins, len(preds)) + 1)[1:-1], method="higher"))
    bins = np.searchsorted(edges, preds, side="right")
    parts = [np.flatnonzero(bins == place) for place in range(len(edges) + 1)]
    return [(len(rows), float(preds[rows].mean()), float(targets[rows].mean())) for rows in parts if len(rows)]


def share_interval(shares: Floats, counts: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Return the ends (B,), (B,) of the 95% interval of shares (B,) of `counts` rows (B,), within 0..1 (Wilson 1927).

    Unlike the normal one it has a width at shares of 0 and 1, where few rows say little.
    """
    middle = (shares + NORMAL_95**2 / (2 * counts)) / (1 + NORMAL_95**2 / counts)
    half = np.sqrt(shares * (1 - shares) / counts + NORMAL_95**2 / (4 * counts**2)) * NORMAL_95
    half = half / (1 + NORMAL_95**2 / counts)
    return middle - half, middle + half


def _probabilities(task: Task, targets: Floats, preds: Floats, outputs: Sequence[str]) -> list[Block]:
    columns: list[dict[str, Any]] = []
    rows, bins_shown = [], []
    for name, target, pred in _known_columns(targets, preds, outputs):
        bins = reliability_bins(target, pred)
        counts, predicted, actual = (np.array(part) for part in zip(*bins, strict=True))
        gap = float((counts * np.abs(predicted - actual)).sum() / counts.sum())
        columns.append(
            {
                "name": name,
                "predicted": predicted,
                "actual": actual,
                **dict(zip(("low", "high"), share_interval(actual, counts), strict=True)),
                "ones": pred[target >= 0.5],
                "zeros": pred[target < 0.5],
            }
        )
        scores = [
            _score(metric, target[:, None], pred[:, None], "binary")
            for metric in ("log_loss", "roc_auc", "accuracy", "f1_macro")
        ]
        rows.append([name, f"{len(target):,}", f"{target.mean():.1%}", f"{pred.mean():.1%}", *scores, f"{gap:.4f}"])
        bins_shown += [[name, f"{n:,}", f"{p:.4f}", f"{a:.4f}"] for n, p, a in bins]
    heads = ["target", "rows", "ones", "mean prediction", "log loss", "ROC AUC", "accuracy at .5", "macro F1", "gap"]
    about = f"{task.name}: share of ones over predicted probability (bars: 95%), and rows by probability"
    blocks: list[Block] = [
        Picture(f"reliability-{task.name}", about, "reliability", {"columns": columns[:MOST_PANELS]}),
        *_too_many(outputs),
        Grid(f"columns-{task.name}", "", heads, rows),
        Note("Gap: mean distance of the dots from the dashed line (expected calibration error, bins of equal rows)."),
        Grid(
            f"bins-{task.name}",
            "the bins of the picture",
            ["target", "rows", "predicted", "share of ones"],
            bins_shown,
            folded=True,
        ),
    ]
    hard = np.isin(targets[:, 0], (0.0, 1.0)).all()
    if task.kind == "binary" and hard:
        counts = confusion_counts(targets[:, 0].astype(np.int64), (preds[:, 0] >= 0.5).astype(np.int64), 2)
        data = {"counts": counts, "names": ["0", "1"], "what": "class"}
        blocks.insert(1, Picture(f"confusion-{task.name}", f"{task.name}: rows at threshold .5", "confusion", data))
    return blocks


# --- classes ---------------------------------------------------------------------------------------------------------


def confusion_counts(truth: NDArray[np.int64], guess: NDArray[np.int64], num_classes: int) -> NDArray[np.int64]:
    """Return the counts (C, C) of true classes (N,) by predicted ones (N,)."""
    flat = np.bincount(truth * num_classes + guess, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes).astype(np.int64)


def most_common(counts: NDArray[Any], most: int) -> NDArray[np.int64]:
    """Return the places of the `most` largest of (C,) counts, in their own order; all of them where there are fewer."""
    return np.sort(np.argsort(-counts, kind="stable")[:most]).astype(np.int64)


def _classes(task: Task, targets: Floats, preds: Floats, labels: Sequence[str]) -> list[Block]:
    num = len(labels)
    soft = task.kind == "multiclass" and targets.shape[1] > 1
    if task.kind == "ordinal":
        low = int(labels[0])
        truth = targets[:, 0].astype(np.int64) - low
        # Rounded as the metrics round, and brought inside the grades as a submission is.
        guess = np.clip(np.floor(preds[:, 0] + 0.5).astype(np.int64) - low, 0, num - 1)
        what = "grade"
    else:
        truth = (targets.argmax(axis=1) if soft else targets[:, 0]).astype(np.int64)
        guess = preds.argmax(axis=1).astype(np.int64)
        what = "class"
    counts = confusion_counts(truth, guess, num)
    about = f"{task.name}: true {what} by predicted one{', likeliest class as the truth' if soft else ''}"
    rows = []
    for place, label in enumerate(labels):
        hits, true, said = counts[place, place], counts[place].sum(), counts[:, place].sum()
        cells = [f"{x / n:.3f}" if n else "-" for x, n in ((hits, true), (hits, said), (2 * hits, true + said))]
        mean = preds[truth == place, 0 if task.kind == "ordinal" else place]
        rows.append([label, f"{true:,}", f"{said:,}", *cells, f"{mean.mean():.3f}" if len(mean) else "-"])
    last = "mean prediction" if task.kind == "ordinal" else "mean probability"
    heads = [what, "rows", "predicted", "recall", "precision", "F1", last]
    off = counts - np.diag(np.diag(counts))
    pairs = [divmod(int(flat), num) for flat in np.argsort(-off, axis=None, kind="stable")[:MOST_PAIRS]]
    confused = [
        [labels[a], labels[b], f"{off[a, b]:,}", f"{off[a, b] / counts[a].sum():.1%}"] for a, b in pairs if off[a, b]
    ]
    drawn = most_common(counts.sum(axis=1), MOST_CLASSES)
    if len(drawn) < num:
        about += f"; the {len(drawn)} most frequent of {num:,}"
    names = [labels[place] for place in drawn]
    data = {"counts": counts[np.ix_(drawn, drawn)], "names": names, "what": what}
    title = f"each {what}"
    blocks: list[Block] = [
        Picture(f"confusion-{task.name}", about, "confusion", data),
        Grid(f"classes-{task.name}", title if num > MOST_CLASSES else "", heads, rows, folded=num > MOST_CLASSES),
    ]
    if confused:
        heads = [f"true {what}", "predicted", "rows", "of the true ones"]
        blocks.append(Grid(f"confused-{task.name}", "most often confused", heads, confused, left=2, folded=num <= 6))
    return blocks
