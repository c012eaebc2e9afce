"""The panels of a report: what was read of a run, as tables, pictures and notes. Nothing is drawn or written here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from comp import config_file
from comp.config import Task
from comp.data.folds import audit
from comp.data.leaks import OutOfFold, better_than_can_be
from comp.metrics import METRICS
from comp.runs import read_json
from comp.ship.report_errors import errors_panel, worst_panel
from comp.ship.report_page import Block, Grid, Lines, Note, Page, Panel, Picture, Tiles, number
from comp.ship.report_run import FoldLog, RunRecord, fold_name
from comp.ship.report_tasks import most_common, prediction_blocks
from comp.training.oof import FLATTERY_UNKNOWN

__all__ = ["report_page"]

BARS = "▁▂▃▄▅▆▇█"
MOST_BARS = 60
MOST_SHARES = 12  # classes whose shares are drawn fold by fold


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
        errors_panel(run),
        worst_panel(run),
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
        spread = f"spread {found.std:.5f}; " if len(found.folds) > 1 else ""
        tiles = [
            (f"{found.metric}, mean of folds", number(found.mean), f"{spread}{better} is better"),
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
    elif leak := better_than_can_be([OutOfFold(run.folder.name, first.kind, run.targets(first), run.preds(first))]):
        notes.append(Note(str(leak), warning=True))
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
            ["spread", *(number(spread if len(found.folds) > 1 else None) for spread in found.spreads)],
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
    elif flatters is None and run.config.evaluation.decide != "full" and blocks:
        unknown = FLATTERY_UNKNOWN.format(run.config.evaluation.decide)
        blocks.append(Note(f"{unknown[0].upper()}{unknown[1:]}."))
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
            "estimated": [line.get("valid/rows", 1.0) < 1 for line in log.valid],
            "train": ([line["step"] for line in log.train], [line["train/loss"] for line in log.train]),
        }
        if chosen is not None:
            # What was kept may have been estimated when it was chosen; in the end its score is known.
            fold["chosen"] = (chosen, done["best"] if done.get("best") is not None else scores[steps.index(chosen)])
        if done.get("averaged") is not None:
            fold["averaged"] = (done["steps"], done["averaged"])
        folds.append(fold)
        losses = fold["train"][1]
        words.append(f"{fold['name']}  loss  {sparkline(losses)}  {losses[0]:.4f} to {losses[-1]:.4f}")
        if scores:
            told = f"  chosen {fold['chosen'][1]:.5f} at step {chosen}" if chosen is not None else ""
            words.append(f"{fold['name']}  {metric}  {sparkline(scores)}  {scores[0]:.5f} to {scores[-1]:.5f}{told}")
    about = "Every evaluation is a dot, the chosen one is ringed" if any(log.valid for log in logs) else "Training loss"
    if any(any(fold["estimated"]) for fold in folds):
        about += "; crosses are estimates from some of the rows"
    if len(run.config.tasks) > 1:
        about += "; the training loss is the weighted sum of all tasks' losses"
    blocks: list[Block] = [Picture("curves", about, "curves", {"folds": folds, "metric": metric}, words)]
    blocks += _auxiliary(run, logs)
    blocks += _rates(run, logs[0])
    partly = any("valid/rows" in line for log in logs for line in log.valid)
    rows = [
        [
            fold["name"],
            str(step),
            number(score),
            "chosen" if step == fold.get("chosen", (None,))[0] else "",
            *([f"{rows:.0%}"] if partly else []),
        ]
        for fold, log in zip(folds, logs, strict=True)
        for step, score, rows in zip(*fold["valid"], [line.get("valid/rows", 1.0) for line in log.valid], strict=True)
    ]
    if rows:
        title = f"all {len(rows)} evaluations"
        heads = ["fold", "step", metric, "", *(["rows scored"] if partly else [])]
        blocks.append(Grid("evaluations", title, heads, rows, folded=True))
    return Panel("training", "Training", blocks)


def _auxiliary(run: RunRecord, logs: Sequence[FoldLog]) -> list[Block]:
    tasks = []
    for task in run.config.tasks[1:]:
        folds = []
        for log in logs:
            lines = [line for line in log.valid if line.get(f"valid/{task.name}") is not None]
            if lines:
                steps, scores = [line["step"] for line in lines], [line[f"valid/{task.name}"] for line in lines]
                kept = (log.chosen, scores[steps.index(log.chosen)]) if log.chosen in steps else None
                folds.append({"name": fold_name(log.fold), "valid": (steps, scores), "chosen": kept})
        if folds:
            tasks.append({"name": task.name, "metric": run.config.metric_of(task), "folds": folds})
    about = "The auxiliary tasks; the first task alone chooses the evaluation that is kept, which is ringed"
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


# --- predictions and the rest ----------------------------------------------------------------------------------------


def _predictions(run: RunRecord, task: Task) -> Panel:
    title = "Predictions" if len(run.config.tasks) == 1 else f"Predictions: {task.name}"
    blocks = prediction_blocks(task, run.targets(task), run.preds(task), run.outputs(task), run.classes.get(task.name))
    return Panel(f"predictions-{task.name}", title, blocks)


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
        boxes = {"folds": names, "values": [part[:, 0] for part in parts], "label": label}
        return Picture("balance-picture", about, "spreads", boxes)
    labels: Sequence[str] = task.targets
    if task.kind in ("binary", "multilabel"):
        values = [part.mean(axis=0) for part in parts]
    elif targets.shape[1] > 1:
        labels, values = run.outputs(task), [part.mean(axis=0) for part in parts]
    else:
        labels = run.classes[task.name]
        codes = [float(label) for label in labels] if task.kind == "ordinal" else range(len(labels))
        values = [np.array([(part[:, 0] == code).mean() for code in codes]) for part in parts]
    table = np.array(values)
    drawn = most_common(table.mean(axis=0), MOST_SHARES)
    if len(drawn) < len(labels):
        about += f"; the {len(drawn)} most frequent of {len(labels):,}"
    shown: dict[str, Any] = {"folds": names, "names": [labels[k] for k in drawn], "values": table[:, drawn]}
    return Picture("balance-picture", about, "shares", shown)


def _time(run: RunRecord) -> Panel:
    logs = [log for log in run.logs if log.done is not None]
    if not logs:
        return Panel("time", "Time and padding", [])
    rows: list[list[str]] = []
    parts = []
    for log in logs:
        done = log.done or {}
        padding = run.padding(log)
        found = (None,) * 3 if padding is None else (padding.share, padding.plain_share, padding.predict_share)
        cells = [f"{done[key]:,.1f}" if key in done else "-" for key in ("seconds", "train_seconds", "eval_seconds")]
        cells.append(_percent(done.get("evaluation_share")))
        cells += [f"{done[key]:,}" if key in done else "-" for key in ("steps", "tokens_per_second")]
        rows.append([fold_name(log.fold), *cells, *map(_percent, found)])
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
    if run.unread_pseudo:
        blocks.append(Note(f"Padding is not counted: {run.unread_pseudo}.", warning=True))
    return Panel("time", "Time and padding", blocks)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


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
    changes: Block = Note(f"Nothing differs from {where}, but for competition, tasks, metric and backbone.")
    if rows:
        changes = Grid("config-diff", f"what differs from {where}", ["key", "base", "this run"], rows, left=3)
    blocks: list[Block] = [
        Grid("tasks", "tasks", ["task", "kind", "targets", "loss", "weight", "metric"], tasks, left=6),
        changes,
        Lines("config-yaml", "the whole config", config_file.dump(config), folded=True),
    ]
    if run.folder.classical.exists():
        about = read_json(run.folder.classical)
        rows = [[key, str(value)] for key, value in about.items()]
        blocks.insert(0, Grid("classical", "classical run", ["", ""], rows, left=2))
    return Panel("config", "Config", blocks)


def _versions(run: RunRecord) -> Panel:
    rows = [[name, str(version)] for name, version in run.manifest["versions"].items()]
    rows += [[f"fingerprint of {part}", str(mark)] for part, mark in run.manifest["fingerprints"].items()]
    return Panel("versions", "Versions", [Grid("versions-table", "", ["", ""], rows, left=2)])
