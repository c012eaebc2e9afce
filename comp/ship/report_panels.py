"""The panels of a report: what was read of a run, as tables, pictures and notes. Nothing is drawn or written here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp import config_file
from comp.config import Task
from comp.data.folds import audit
from comp.data.frames import cell_strings
from comp.data.leaks import too_good
from comp.metrics import METRICS, evaluate_known
from comp.runs import read_json
from comp.ship.report_page import Block, Grid, Lines, Long, Note, Page, Panel, Picture, Tiles
from comp.ship.report_run import FoldLog, RunRecord
from comp.ship.report_tasks import prediction_blocks
from comp.ship.row_errors import ERRORS, Part, length_bins, mean_errors, row_errors

__all__ = ["report_page"]

NUM_WORST = 20
MOST_GROUPS = 15
LEAST_GROUP = 3  # rows: a smaller group's mean error says little
BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 60
Floats = NDArray[np.float64]


def number(value: float | None, digits: int = 5) -> str:
    """Return a score as text; "-" where there is none."""
    return "-" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def fold_name(fold: int | str) -> str:
    return "full" if fold == "full" else f"fold {fold}"


def report_page(run: RunRecord) -> Page:
    """Return the whole report of a run."""
    manifest = run.manifest
    about = [f"{run.config.competition.name}", str(manifest.get("backbone", "")), str(manifest["runtime"])]
    about += [f"made {manifest['created']}", f"commit {manifest['commit'] or 'unknown'}"]
    panels = [
        _summary(run),
        _scores(run),
        _training(run),
        *(_predictions(run, task) for task in run.config.tasks if run.rows is not None),
        _errors(run),
        _worst(run),
        _balance(run),
        _time(run),
        _config(run),
        _versions(run),
    ]
    return Page(
        f"run {run.folder.name}",
        " · ".join(part for part in about if part),
        [panel for panel in panels if panel.blocks],
    )


# --- scores ----------------------------------------------------------------------------------------------------------


def _summary(run: RunRecord) -> Panel:
    tiles, notes = [], []
    first = run.config.tasks[0]
    if run.scores:
        found = run.scores[first.name]
        better = "higher" if METRICS[found.metric].higher_is_better else "lower"
        tiles = [
            (f"{found.metric}, mean of folds", number(found.mean), f"spread {found.std:.5f}; {better} is better"),
            ("pooled", number(found.pooled), f"{found.num_rows:,} rows"),
            ("last weights, mean of folds", number(found.last_mean), f"pooled {number(found.last_pooled)}"),
        ]
        if found.averaged_folds is not None:
            tiles.append(
                ("averaged weights, mean", number(found.averaged_mean), f"pooled {number(found.averaged_pooled)}")
            )
    finished = [log for log in run.logs if log.done is not None]
    remark = f"of {run.config.folds.num_folds}" + (", and the full-data model" if _full(run) else "")
    tiles.append(("folds finished", str(len(run.finished)), remark))
    begun = [fold_name(log.fold) for log in run.logs if log.done is None]
    if begun:
        notes.append(Note(f"{', '.join(begun)}: begun and not finished; `comp train` goes on with it.", warning=True))
    if run.rows is None:
        why = "only the full-data model is trained, which holds no rows out" if finished else "no fold is finished"
        notes.append(
            Note(f"There are no out-of-fold rows: {why}. So there are no scores and errors here.", warning=True)
        )
    elif doubt := too_good(first.kind, run.targets(first), run.preds(first)):
        notes.append(Note(doubt, warning=True))
    notes += [Note(f"{text[0].upper()}{text[1:]}.", warning=True) for text in run.missing]
    return Panel("summary", "Summary", [Tiles(tiles), *notes])


def _full(run: RunRecord) -> bool:
    return any(log.fold == "full" and log.done is not None for log in run.logs)


def _scores(run: RunRecord) -> Panel:
    blocks: list[Block] = []
    for task in run.config.tasks if run.scores else []:
        found = run.scores[task.name]
        series = {"best": found.folds, "last": found.last_folds}
        series |= {"averaged": found.averaged_folds} if found.averaged_folds is not None else {}
        means = [found.mean, found.last_mean, found.averaged_mean][: len(series)]
        pooled = [found.pooled, found.last_pooled, found.averaged_pooled][: len(series)]
        rows = [[fold_name(k), *(number(scores[k]) for scores in series.values())] for k in found.folds]
        rows += [
            ["mean of folds", *map(number, means)],
            ["spread", *(number(spread) for spread in found.spreads)],
            ["pooled", *map(number, pooled)],
        ]
        title = f"{task.name}: {found.metric}, {found.num_rows:,} rows"
        blocks.append(Grid(f"scores-{task.name}", title, ["", *series], rows, strong=[len(rows) - 3, len(rows) - 1]))
        if len(found.folds) > 1 and all(score is not None for scores in series.values() for score in scores.values()):
            data = {
                "folds": [fold_name(k) for k in found.folds],
                "series": {name: list(scores.values()) for name, scores in series.items()},
                "metric": found.metric,
            }
            blocks.append(Picture(f"fold-scores-{task.name}", f"{task.name}: score of each fold", "fold_scores", data))
        if found.ahead is not None and task is run.config.tasks[0]:
            blocks.append(Note(f"Ahead by the mean of the folds: {found.ahead} weights."))
    if blocks:
        blocks.insert(0, Note("Spread: standard deviation between the folds. Pooled: all rows scored at once."))
    flatters = run.flattery
    if flatters is not None and flatters[1] > 1:
        blocks.append(
            Note(
                f"Choosing the best of {flatters[1]} evaluations a fold flatters the score of the best weights by "
                f"about {flatters[0]:.5f}; the last weights are chosen by no score."
            )
        )
    return Panel("scores", "Scores", blocks)


# --- training --------------------------------------------------------------------------------------------------------


def sparkline(values: Sequence[float]) -> str:
    """Return values as bars of eight heights, at most 60 of them."""
    kept = np.asarray(values, np.float64)
    if len(kept) > MOST_BARS:
        kept = np.array([part.mean() for part in np.array_split(kept, MOST_BARS)])
    if not len(kept) or not np.isfinite(kept).all():
        return ""
    low, span = kept.min(), np.ptp(kept)
    heights = np.zeros(len(kept), int) if span == 0 else np.minimum(7, ((kept - low) / span * 8).astype(int))
    return "".join(BARS[height] for height in heights)


def _training(run: RunRecord) -> Panel:
    logs = [log for log in run.logs if log.train]
    if not logs:
        return Panel("training", "Training", [])
    metric = run.config.metric
    folds, words = [], []
    for log in logs:
        steps = [int(line["step"]) for line in log.valid]
        scores = [float(line["valid/score"]) for line in log.valid]
        done, chosen = log.done or {}, log.chosen
        fold: dict[str, Any] = {
            "name": fold_name(log.fold) + ("" if log.done is not None else " (not finished)"),
            "valid": (steps, scores),
            "train": ([line["step"] for line in log.train], [line["train/loss"] for line in log.train]),
        }
        if chosen is not None:
            fold["chosen"] = (chosen, scores[steps.index(chosen)] if chosen in steps else done["best"])
        if done.get("averaged") is not None:
            fold["averaged"] = (done["steps"], done["averaged"])
        folds.append(fold)
        losses = fold["train"][1]
        words.append(f"{fold['name']}  loss  {sparkline(losses)}  {losses[0]:.4f} to {losses[-1]:.4f}")
        if scores:
            told = f"  chosen {fold['chosen'][1]:.5f} at step {chosen}" if chosen is not None else ""
            words.append(f"{fold['name']}  {metric}  {sparkline(scores)}  {scores[0]:.5f} to {scores[-1]:.5f}{told}")
    about = "Every evaluation is a dot, the chosen one is ringed" if any(log.valid for log in logs) else "Training loss"
    blocks: list[Block] = [Picture("curves", about, "curves", {"folds": folds, "metric": metric}, words)]
    blocks += _auxiliary(run, logs)
    blocks += _rates(run, logs[0])
    rows = [
        [fold["name"], str(step), number(score), "chosen" if step == fold.get("chosen", (None,))[0] else ""]
        for fold in folds
        for step, score in zip(*fold["valid"], strict=True)
    ]
    if rows:
        title = f"all {len(rows)} evaluations"
        blocks.append(Grid("evaluations", title, ["fold", "step", metric, ""], rows, folded=True))
    return Panel("training", "Training", blocks)


def _auxiliary(run: RunRecord, logs: Sequence[FoldLog]) -> list[Block]:
    tasks = []
    for task in run.config.tasks[1:]:
        folds = []
        for log in logs:
            lines = [line for line in log.valid if line.get(f"valid/{task.name}") is not None]
            if lines:
                found = [line["step"] for line in lines], [line[f"valid/{task.name}"] for line in lines]
                folds.append({"name": fold_name(log.fold), "valid": found})
        if folds:
            tasks.append({"name": task.name, "metric": run.config.metric_of(task), "folds": folds})
    about = "The auxiliary tasks; the first task alone chooses the evaluation that is kept"
    return [Picture("auxiliary", about, "auxiliary", {"tasks": tasks})] if tasks else []


def _rates(run: RunRecord, log: FoldLog) -> list[Block]:
    """Each group's peak rate times the schedule, which the log shows as a share of the config's rate."""
    lr = run.config.optimizer.lr
    if not log.groups or not lr or not any(line["train/lr"] for line in log.train):
        return []
    data = {
        "groups": log.groups,
        "steps": [line["step"] for line in log.train],
        "shares": [line["train/lr"] / lr for line in log.train],
    }
    about = f"Learning rate of each parameter group in {fold_name(log.fold)}"
    words = [f"{name:<24} peak lr {peak:.2e}" for name, peak in log.groups]
    shape = f"{'schedule':<24} {sparkline([line['train/lr'] for line in log.train])}"
    return [Picture("rates", about, "rates", data, [*words, shape])]


# --- predictions and errors ------------------------------------------------------------------------------------------


def _predictions(run: RunRecord, task: Task) -> Panel:
    title = "Predictions" if len(run.config.tasks) == 1 else f"Predictions: {task.name}"
    blocks = prediction_blocks(task, run.targets(task), run.preds(task), run.outputs(task), run.classes.get(task.name))
    return Panel(f"predictions-{task.name}", title, blocks)


def _first_errors(run: RunRecord) -> Floats:
    task = run.config.tasks[0]
    return row_errors(task.kind, run.targets(task), run.preds(task))


def _errors(run: RunRecord) -> Panel:
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
        title += f"; {over:.1%} of the texts are longer than {run.lengths.limit} and are {fate}"
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
        "low": [part.mean - part.margin for part in parts],
        "high": [part.mean + part.margin for part in parts],
        "label": f"mean {kind}",
        "title": title.split(";")[0].split(":")[0],
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


def _worst(run: RunRecord) -> Panel:
    if run.rows is None:
        return Panel("worst", "Worst rows", [])
    task, errors = run.config.tasks[0], _first_errors(run)
    targets, preds, outputs = run.targets(task), run.preds(task), run.outputs(task)
    order = np.argsort(-errors, kind="stable")[:NUM_WORST]
    texts = None
    if run.table is not None and run.place_of is not None:
        texts = ["\n".join(column[run.place_of[row]] for column in run.table.texts) for row in order]
    heads = ["id", "fold", "error", "target", "prediction", *(["text"] if texts is not None else [])]
    rows = []
    for place, row in enumerate(order):
        target, pred = _said(task, targets[row], preds[row], outputs)
        cells = [str(run.rows["id"].iloc[row]), str(run.rows["fold"].iloc[row]), number(errors[row], 4), target, pred]
        rows.append([*cells, Long(texts[place])] if texts is not None else cells)
    title = f"the {len(rows)} rows with the largest {ERRORS[task.kind]} in {task.name}, best weights"
    return Panel("worst", "Worst rows", [Grid("worst-rows", title, heads, rows)])


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


# --- the rest --------------------------------------------------------------------------------------------------------


def _balance(run: RunRecord) -> Panel:
    blocks: list[Block] = []
    task = run.config.tasks[0]
    if run.folding is not None and run.table is not None:
        lines = audit(run.folding.fold, run.table, task, group=run.config.folds.group)
        title = f"folds/{run.config.fold_name}.csv, splitter {run.folding.splitter}"
        blocks.append(Lines("balance-lines", title, "\n".join(lines)))
    if run.rows is not None and len(run.finished) > 1:
        picture = _balance_picture(run, task)
        blocks = [*blocks, picture] if picture is not None else blocks
    return Panel("balance", "Fold balance", blocks)


def _balance_picture(run: RunRecord, task: Task) -> Picture | None:
    assert run.rows is not None
    targets, folds = run.targets(task), run.rows["fold"].to_numpy()
    names = [fold_name(k) for k in run.finished]
    about = f"{task.name} in the held-out rows of each finished fold"
    parts = [targets[folds == k] for k in run.finished]
    if task.kind == "regression":
        label = task.targets[0] + (f" (the first of {len(task.targets)} columns)" if len(task.targets) > 1 else "")
        data = {"folds": names, "values": [part[:, 0] for part in parts], "label": label}
        return Picture("balance-picture", about, "spreads", data)
    if task.kind in ("binary", "multilabel"):
        labels, values = task.targets, [part.mean(axis=0) for part in parts]
    elif targets.shape[1] > 1:
        labels, values = run.outputs(task), [part.mean(axis=0) for part in parts]
    else:
        labels = run.classes[task.name]
        codes = [float(label) for label in labels] if task.kind == "ordinal" else range(len(labels))
        values = [np.array([(part[:, 0] == code).mean() for code in codes]) for part in parts]
    data = {"folds": names, "names": list(labels), "values": np.array(values)}
    return Picture("balance-picture", about, "shares", data)


def _time(run: RunRecord) -> Panel:
    logs = [log for log in run.logs if log.done is not None]
    if not logs:
        return Panel("time", "Time and padding", [])
    rows, parts = [], []
    for log in logs:
        done = log.done or {}
        padding = run.padding(log)
        share = done.get("evaluation_share")
        rate = done.get("tokens_per_second")
        rows.append(
            [
                fold_name(log.fold),
                f"{done['seconds']:,.1f}",
                *(f"{done[key]:,.1f}" if key in done else "-" for key in ("train_seconds", "eval_seconds")),
                "-" if share is None else f"{share:.1%}",
                f"{done['steps']:,}" if "steps" in done else "-",
                "-" if rate is None else f"{rate:,}",
                *(
                    ["-"] * 3
                    if padding is None
                    else (f"{x:.1%}" for x in (padding.share, padding.plain_share, padding.predict_share))
                ),
            ]
        )
        if "train_seconds" in done:
            spent = done["train_seconds"], done["eval_seconds"]
            parts.append((fold_name(log.fold), *spent, max(0.0, done["seconds"] - sum(spent))))
    heads = ["fold", "seconds", "training", "evaluating", "share", "steps", "tokens/s"]
    heads += ["padding", "without bucketing", "in prediction"]
    blocks: list[Block] = [Grid("time-table", "seconds of each fold, and the padding in its batches", heads, rows)]
    if parts:
        names = ("training", "evaluating", "saving and the rest")
        data = {
            "folds": [part[0] for part in parts],
            "parts": {name: [part[place] for part in parts] for place, name in enumerate(names, start=1)},
        }
        blocks.append(Picture("time-picture", "Seconds of each finished fold", "times", data))
    if any(row[-1] != "-" for row in rows):
        blocks.append(Note("Padding: its share of all tokens in the batches, counted anew from the texts."))
    return Panel("time", "Time and padding", blocks)


def _config(run: RunRecord) -> Panel:
    config = run.config
    base, where = config_file.load_base(config)
    dumped = config.model_dump(mode="json")
    rows = [
        [key, "-" if old is None else str(old), "-" if new is None else str(new)]
        for key, old, new in config_file.differences(base.model_dump(mode="json"), dumped)
    ]
    tasks = [
        [task.name, task.kind, ", ".join(task.targets), task.loss.name, f"{task.weight:g}", config.metric_of(task)]
        for task in config.tasks
    ]
    blocks: list[Block] = [
        Grid("tasks", "tasks", ["task", "kind", "targets", "loss", "weight", "metric"], tasks, left=6),
        Grid("config-diff", f"what differs from {where}", ["key", "base", "this run"], rows, left=3)
        if rows
        else Note(f"Nothing differs from {where}, but for competition, tasks, metric and backbone."),
        Lines("config-yaml", "the whole config", config_file.dump(config), folded=True),
    ]
    if run.folder.classical.exists():
        about = read_json(run.folder.classical)
        blocks.insert(0, Grid("classical", "classical run", ["", ""], [[k, str(v)] for k, v in about.items()], left=2))
    return Panel("config", "Config", blocks)


def _versions(run: RunRecord) -> Panel:
    rows = [*run.manifest["versions"].items()]
    rows += [(f"fingerprint of {part}", mark) for part, mark in run.manifest["fingerprints"].items()]
    return Panel("versions", "Versions", [Grid("versions-table", "", ["", ""], [list(row) for row in rows], left=2)])
