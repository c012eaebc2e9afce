"""Where a run errs: the mean error of its rows by fold, length and group, and the worst rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from comp.config import Task
from comp.data.frames import cell_strings
from comp.metrics import evaluate_known
from comp.ship.report_page import Block, Cell, Grid, Long, Note, Panel, Picture, number
from comp.ship.report_run import RunRecord, fold_name
from comp.ship.row_errors import ERRORS, Part, length_bins, mean_errors, row_errors

__all__ = ["errors_panel", "worst_panel"]

NUM_WORST = 20
MOST_GROUPS = 15
LEAST_GROUP = 3  # rows: a smaller group's mean error says little
Floats = NDArray[np.float64]


def _first_errors(run: RunRecord) -> Floats:
    task = run.config.tasks[0]
    return row_errors(task.kind, run.targets(task), run.preds(task))


def errors_panel(run: RunRecord) -> Panel:
    """Return the mean error of the first task by fold, by length of the text, and by group."""
    if run.rows is None:
        return Panel("errors", "Errors", [])
    task, errors = run.config.tasks[0], _first_errors(run)
    kind = ERRORS[task.kind]
    blocks: list[Block] = [
        Note(
            f"Of each out-of-fold row of {task.name}, best weights: {kind}, mean {number(float(errors.mean()), 4)} "
            "(dashed line). Intervals are 95% of the mean, as if rows were independent."
        )
    ]
    folds = run.rows["fold"].to_numpy(np.int64)
    known = sorted(set(folds.tolist()))
    by_fold = mean_errors(errors, [fold_name(k) for k in known], np.searchsorted(known, folds).astype(np.int64))
    by_length, by_group = _by_length(run, errors), _by_group(run, errors)
    for name, title, parts in (("fold", "fold", by_fold), by_length, by_group):
        if parts:
            blocks.append(_interval_picture(f"errors-by-{name}", f"by {title}", parts, kind, float(errors.mean())))
    for name, title, parts in (("fold", "fold", by_fold), by_length, by_group):
        if parts:
            blocks.append(_part_grid(run, task, f"table-by-{name}", title, parts, kind))
    return Panel("errors", "Errors by part", blocks)


def _by_length(run: RunRecord, errors: Floats) -> tuple[str, str, list[Part]]:
    if run.lengths is None or run.place_of is None:
        return "length", "length", []
    own = run.lengths.values[run.place_of]
    title = f"length in {run.lengths.unit}"
    if run.lengths.limit is not None:
        over = float((own > run.lengths.limit).mean())
        fate = "cut" if run.config.model.windows is None else "read as windows"
        told = f"{over:.1%} of the texts are longer than {run.lengths.limit} and are {fate}"
        title += f"; {told}" if over else f"; no text is longer than {run.lengths.limit}, none is {fate}"
    return "length", title, mean_errors(errors, *length_bins(own))


def _by_group(run: RunRecord, errors: Floats) -> tuple[str, str, list[Part]]:
    column = run.config.folds.group
    if column is None or run.place_of is None or run.table is None:
        return "group", "group", []
    cells = np.asarray(cell_strings(run.table.frame[column]), dtype=object)[run.place_of]
    names, of_row = np.unique(cells, return_inverse=True)
    parts = [part for part in mean_errors(errors, names.tolist(), of_row) if len(part.rows) >= LEAST_GROUP]
    parts.sort(key=lambda part: -part.mean)
    title = f"group ({column}, {len(names):,} groups)"
    if len(parts) > MOST_GROUPS:
        title = f"group ({column}): the {MOST_GROUPS} worst of {len(names):,} groups"
    if len(parts) < len(names):
        title += f", of {LEAST_GROUP} rows or more"
    return "group", title, parts[:MOST_GROUPS]


def _interval_picture(name: str, title: str, parts: Sequence[Part], kind: str, line: float) -> Picture:
    data = {
        "names": [part.name for part in parts],
        "values": [part.mean for part in parts],
        "low": [max(0.0, part.mean - part.margin) for part in parts],  # no error is below 0
        "high": [part.mean + part.margin for part in parts],
        "label": f"mean {kind}",
        "title": title.split(";")[0].split(" (")[0],
        "line": line,
    }
    return Picture(name, f"Mean {kind} {title}", "intervals", data)


def _part_grid(run: RunRecord, task: Task, name: str, title: str, parts: Sequence[Part], kind: str) -> Grid:
    targets, preds, metric = run.targets(task), run.preds(task), run.config.metric_of(task)
    rows = [
        [
            part.name,
            f"{len(part.rows):,}",
            number(part.mean, 4),
            number(part.margin, 4),
            number(evaluate_known(metric, targets[part.rows], preds[part.rows], task.kind)),
        ]
        for part in parts
    ]
    heads = [title.split(" ")[0], "rows", f"mean {kind}", "±", metric]
    return Grid(name, f"by {title}", heads, rows, folded=True)


def worst_panel(run: RunRecord) -> Panel:
    """Return the rows with the largest errors, with their texts."""
    if run.rows is None:
        return Panel("worst", "Worst rows", [])
    task, errors = run.config.tasks[0], _first_errors(run)
    targets, preds, outputs = run.targets(task), run.preds(task), run.outputs(task)
    order = np.argsort(-errors, kind="stable")[:NUM_WORST]
    texts = None
    if run.table is not None and run.place_of is not None:
        texts = ["\n".join(column[run.place_of[row]] for column in run.table.texts) for row in order]
    heads = ["id", "fold", "error", "target", "prediction", *(["text"] if texts is not None else [])]
    rows: list[list[Cell]] = []
    for place, row in enumerate(order):
        target, pred = _said(task, targets[row], preds[row], outputs)
        cells: list[Cell] = [
            str(run.rows["id"].iloc[row]),
            str(run.rows["fold"].iloc[row]),
            number(errors[row], 4),
            target,
            pred,
        ]
        rows.append(cells if texts is None else [*cells, Long(texts[place])])
    title = f"the {len(rows)} rows with the largest {ERRORS[task.kind]} in {task.name}, best weights"
    said = (3, 4) if task.kind == "multiclass" else ()  # names of classes, which may be long
    return Panel("worst", "Worst rows", [Grid("worst-rows", title, heads, rows, words=said)])


def _said(task: Task, target: Floats, pred: Floats, outputs: Sequence[str]) -> tuple[str, str]:
    """Return a row's target and prediction in words."""
    if task.kind == "multiclass":
        if len(target) > 1:  # soft labels
            true = int(target.argmax())
            return f"{outputs[true]} {target[true]:.2f}", f"{outputs[int(pred.argmax())]} {pred.max():.3f}"
        true = int(target[0])
        return outputs[true], f"{outputs[int(pred.argmax())]} {pred.max():.3f} (true one {pred[true]:.3f})"
    if task.kind in ("binary", "ordinal"):
        return f"{target[0]:g}", f"{pred[0]:.3f}"
    most = 6
    pairs = [f"{value:.4g}" for value in target[:most]], [f"{value:.3f}" for value in pred[:most]]
    more = ", ..." if len(target) > most else ""
    return ", ".join(pairs[0]) + more, ", ".join(pairs[1]) + more
