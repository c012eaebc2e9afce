"""The scores of a run's folds, as one more run of the trackers: all that the report says, in the group of the folds.

W&B run `<run>-eval`, job type "eval": scores as its summary, out-of-fold rows and every table of the report, its
pictures, and the page itself. Runs again only when the out-of-fold rows have changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from comp import config_file
from comp.config import Tracking
from comp.progress import open_progress
from comp.runs import RunFolder, digest, read_json, write_json
from comp.ship.report_figures import draw, need_matplotlib
from comp.ship.report_page import Grid, Page, render_html
from comp.ship.report_panels import report_page
from comp.ship.report_run import RunRecord, read_run
from comp.ship.row_errors import row_errors
from comp.tracker import Tracker, warn
from comp.tracking import open_tracker, wandb_mode

__all__ = ["track_all", "track_scores"]

DONE = "tracked.json"


def track_all(paths: list[Path], tracking: Tracking, *, say: Callable[[str], None] = print) -> None:
    """Track the scores of runs whose folds are all trained; a fault is warned of, since the training is done."""
    for path in paths:
        folder = RunFolder(path)
        if not folder.scores.exists() or (wandb_mode(tracking.wandb)[0] == "off" and not tracking.also):
            continue
        numbered = [fold for fold in folder.finished_folds() if fold != "full"]
        if len(numbered) < config_file.load(folder.config).folds.num_folds:
            continue
        try:
            track_scores(path, tracking, say=say)
        except Exception as fault:
            warn(f"the scores of {path} are not tracked ({type(fault).__name__}: {fault}); `comp track scores {path}`")


def track_scores(
    run: str | Path, tracking: Tracking | None = None, *, again: bool = False, say: Callable[[str], None] = print
) -> bool:
    """Send what the report of a run says to the trackers; return False when that was done before.

    `tracking`: None = that of the run's config. `again`: send it even then. Raises ValueError when it is no run, has no
    out-of-fold rows, or no tracker is on.
    """
    record = read_run(run)
    folder, config = record.folder, record.config
    tracking = tracking or config.tracking
    mode, why = wandb_mode(tracking.wandb)
    if mode == "off" and not tracking.also:
        raise ValueError(f"{run}: no tracker is on ({why}); set tracking.wandb or tracking.also with --set")
    if record.rows is None:
        raise ValueError(f"{run} has no out-of-fold rows to track; train its folds with `comp train`")
    path = folder.path / DONE
    before = read_json(path) if path.exists() else {}
    mark = digest([pd.util.hash_pandas_object(record.rows, index=False).to_numpy().tobytes(), mode, *tracking.also])
    if before.get("rows") == mark and not again:
        say(f"{run}: its scores are tracked already")
        return False
    page = report_page(record)
    tracker = open_tracker(
        tracking,
        competition=config.competition.name,
        run_name=folder.name,
        fold="eval",
        folder=folder.path,
        metrics_path=None,
        config_dict={
            **config.model_dump(mode="json"),
            **{name: record.manifest[name] for name in ("versions", "commit", "runtime", "fingerprints")},
        },
        job_type="eval",
        mark=before.get("mark"),
    )
    try:
        tracker.table("oof", *_rows(record))
        for panel in page.panels:
            for block in panel.blocks:
                if isinstance(block, Grid) and block.rows:
                    cells = [[cell if isinstance(cell, str) else cell.text for cell in row] for row in block.rows]
                    tracker.table(f"tables/{block.name}", _distinct(block.heads), cells)
        _pictures(tracker, page)
        tracker.summary(dict(_scores(record)))
        write_json(path, {"rows": mark, "mark": tracker.mark()})
    finally:
        tracker.finish()
    to = {"off": [], "online": ["W&B"], "offline": ["W&B, offline: send it with `comp track sync`"]}[mode]
    say(f"{run}: scores, out-of-fold rows and pictures are tracked ({', '.join([*to, *tracking.also])})")
    return True


def _pictures(tracker: Tracker, page: Page) -> None:
    """Draw the report's pictures, where Matplotlib is, and hand them on with the page they stand in."""
    try:
        need_matplotlib()
    except ValueError as fault:
        warn(f"the report's pictures and page are not tracked: {fault}")
        return
    drawn, progress = {}, open_progress(len(page.pictures), "pictures", "picture")
    try:
        for picture in page.pictures:
            done = draw(picture)
            drawn[picture.name] = (done.svg, done.width, done.height)
            tracker.picture(f"plots/{picture.name}", done.png, picture.about)
            progress.advance()
    finally:
        progress.close()
    tracker.page("report", render_html(page, drawn))


def _distinct(heads: Any) -> list[str]:
    """Return the heads of a table, the nameless ones with a name."""
    return [head or ("name" if place == 0 else f"column {place}") for place, head in enumerate(heads)]


def _rows(record: RunRecord) -> tuple[list[str], list[list[Any]]]:
    """Return heads and rows of the out-of-fold table, with each row's error; what is not a number is None."""
    assert record.rows is not None
    frame = record.rows.copy()
    task = record.config.tasks[0]
    frame["error"] = row_errors(task.kind, record.targets(task), record.preds(task))
    return list(frame.columns), [[_cell(value) for value in row] for row in frame.itertuples(index=False, name=None)]


def _cell(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scores(record: RunRecord) -> Iterator[tuple[str, Any]]:
    """Yield every number of scores.json as (path of its keys, number), per task."""

    def walk(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, Mapping):
                yield from walk(f"{prefix}/{key}", value)
            elif value is not None:
                yield f"{prefix}/{key}", value

    for name, scores in record.scores.items():
        yield from walk(name, scores.as_dict())
    if record.flattery is not None:
        yield "keep_best_flatters", record.flattery[0]
