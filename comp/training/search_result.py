"""What a search found: the table of its trials, a config of the best, and how much choosing flatters."""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from comp.runs import write_text
from comp.search_space import overrides_of, told
from comp.training.optimism import flattery
from comp.training.search import Finalist, Search
from comp.training.study import Tried, hours_of

__all__ = ["chosen", "optimism", "study_table", "write_best", "write_trials"]

SHOWN = 10  # trials in the terminal
ABSENT = object()


def chosen(search: Search, tried: Sequence[Tried], finalists: Sequence[Finalist]) -> Tried | None:
    """Return the trial whose config is the result: the best finalist's, else the best one; None without any."""
    if finalists:
        return finalists[0].tried
    complete = _ranked(search, [one for one in tried if one.state == "complete"])
    return complete[0] if complete else None


def _ranked(search: Search, tried: Sequence[Tried]) -> list[Tried]:
    """Return complete trials best first, then pruned ones by how far they came, then the others."""
    sign = -1.0 if search.higher_is_better else 1.0
    order = {"complete": 0, "pruned": 1}

    def key(one: Tried) -> tuple[float, ...]:
        score = float("inf") if one.score is None else sign * one.score
        return order.get(one.state, 2), 0.0 if one.state == "complete" else -one.share, score, one.number

    return sorted(tried, key=key)


def study_table(search: Search, tried: Sequence[Tried], finalists: Sequence[Finalist], most: int = SHOWN) -> str:
    """Return the trials, best first, and the finalists as text."""
    rows = [["trial", "state", search.base.metric, "seconds", *search.space.rows]]
    for one in _ranked(search, tried)[:most]:
        state = f"pruned {one.share:.0f}%" if one.state == "pruned" else one.state
        values = [told(one.values[key]) if key in one.values else "-" for key in search.space.rows]
        rows.append([str(one.number), state, _number(one.score), _number(one.seconds, 0), *values])
    lines = _columns(rows)
    if len(tried) > most:
        lines.append(f"... and {len(tried) - most} more, in {search.order.folder}/trials.csv")
    counts = {state: sum(one.state == state for one in tried) for state in dict.fromkeys(one.state for one in tried)}
    counted = ", ".join(f"{number} {state}" for state, number in counts.items())
    lines.append(f"{len(tried)} trials ({counted}) in {hours_of(tried):.2f} hours")
    if finalists:
        seeds = [f"seed {seed}" for seed in search.order.seeds]
        rows = [["finalist", *seeds, "mean", "deviation", "as trial"]]
        for own in finalists:
            scores = [_number(own.scores.pooled[seed]) for seed in search.order.seeds]
            rows.append(
                [
                    f"trial {own.tried.number}",
                    *scores,
                    _number(own.mean),
                    _number(own.deviation),
                    _number(own.tried.score),
                ]
            )
        lines += ["", *_columns(rows)]
    return "\n".join(lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _number(value: float | None, places: int = 5) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def optimism(search: Search, tried: Sequence[Tried], finalists: Sequence[Finalist]) -> str:
    """Return the line that says how much the best trial's score is flattered.

    Measured by choosing among the complete trials on a random half of the held-out rows and scoring on the other.
    """
    complete = _ranked(search, [one for one in tried if one.state == "complete"])
    if not complete:
        return "no trial was trained to its end: nothing can be said of their scores"
    best = complete[0]
    words = (
        f"trial {best.number}'s {best.score:.5f} is flattered: the best of {len(complete)} on the rows that chose it"
    )
    by_rows = _flattery(search, complete)
    if by_rows is not None and len(complete) > 1:
        words += f", worth about {by_rows:.5f} by the rows alone"
    again = next((own for own in finalists if own.tried.number == best.number), None)
    if again is not None:
        words += f"; under seeds {', '.join(map(str, search.order.seeds))} it has {again.mean:.5f}"
        if search.base.training.seed in search.order.seeds:
            words += f" (seed {search.base.training.seed} is the trials' own, and flattered too)"
    return words + "; comp train --fold all on best.yaml gives the score to believe"


def _flattery(search: Search, complete: Sequence[Tried]) -> float | None:
    task, predictions, targets = search.base.tasks[0], [], None
    for one in complete:
        path = search.run_of(one.number).oof
        if not path.exists():  # the values of another trial
            continue
        rows = pd.read_parquet(path)
        names = [name for name in rows.columns if name.startswith(f"averaged_{task.name}_")]
        names = names or [name for name in rows.columns if name.startswith(f"pred_{task.name}_")]
        predictions.append(rows[names].to_numpy(float))
        targets = rows[[f"target_{task.name}_{column}" for column in task.targets]].to_numpy(float)
    if targets is None:
        return None
    return flattery(targets, predictions, search.base.metric, task.kind)


# --- files -----------------------------------------------------------------------------------------------------------


def write_trials(search: Search, tried: Sequence[Tried]) -> Path:
    """Write trials.csv, every trial by number."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", search.base.metric, "percent_trained", "seconds", *search.space.rows, "note"])
    for one in tried:
        values = [told(one.values[key], short=False) if key in one.values else "" for key in search.space.rows]
        score, seconds = ("" if number is None else repr(number) for number in (one.score, one.seconds))
        writer.writerow([one.number, one.state, score, f"{one.share:.0f}", seconds, *values, one.note])
    path = search.order.folder / "trials.csv"
    write_text(path, out.getvalue())
    return path


def write_best(search: Search, best: Tried, tried: Sequence[Tried], finalists: Sequence[Finalist]) -> Path:
    """Write best.yaml: what the best trial changes, over the config that was searched."""
    order, path = search.order, search.order.folder / "best.yaml"
    metric, again = search.base.metric, next((own for own in finalists if own.tried.number == best.number), None)
    finished, hours = sum(one.finished for one in tried), hours_of(tried)
    flattered = f"{metric} {best.score:.5f} as trial {best.number}, chosen among {finished}, so flattered"
    result = f"{flattered}; no finalist was trained again"
    if again is not None:
        spread = "" if again.deviation is None else f" with deviation {again.deviation:.5f}"
        seeds = ", ".join(map(str, order.seeds))
        result = f"{metric} {again.mean:.5f}{spread} over seeds {seeds}, mean of fold {search.fold} ({flattered})"
    again_cost = f", then {len(finalists)} configs under {len(order.seeds)} seeds" if finalists else ""
    head = [
        f"The best config that search '{order.name}' of {order.config} over {order.space} found.",
        f"Command: comp train --fold all --config {path}",
        f"Cost:    {finished} trials of fold {search.fold}, {hours:.2f} hours, {order.jobs} at a time{again_cost}",
        f"Result:  {result}",
    ]
    body = {"extends": os.path.relpath(search.source.file, order.folder), **_changes(search, best)}
    text = "".join(f"# {line}\n" for line in head)
    write_text(path, text + yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=110))
    return path


def _changes(search: Search, best: Tried) -> dict[str, Any]:
    """Return the sections that the best trial and --set change, nested; a list changed inside is given whole."""
    config = search.source.config([*search.order.overrides, *overrides_of(best.values)]).model_dump(mode="json")
    keys = [*(override.partition("=")[0].strip() for override in search.order.overrides), *best.values]
    found: dict[str, Any] = {}
    for key in keys:
        parts = list(itertools.takewhile(lambda part: not part.isdecimal(), re.split(r"[.\[\]]+", key)))
        value: Any = config
        for part in parts:
            value = value.get(part, ABSENT) if isinstance(value, dict) else ABSENT
        if value is ABSENT:  # of another variant than the one that was chosen in the end
            continue
        place = found
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        place[parts[-1]] = value
    return found
