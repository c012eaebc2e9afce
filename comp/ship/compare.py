"""`comp compare`: runs side by side, their paired differences to the first with intervals, and what differs in them.

The bootstrap draws rows with replacement, the same rows for every run, and scores all runs on them: so it works for any
metric and the rows that are hard for all cancel out. Rows that go together (folds.group) are drawn together, whole
groups with replacement (Davison & Hinkley 1997, section 3.8). The interval is the percentile one (Efron 1979, Annals of
Statistics 7; Efron & Tibshirani 1993, chapter 13). It covers the choice of the rows, not that of the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp import config_file
from comp.blend.ensemble import Problem
from comp.blend.members import Member, Members, gather
from comp.catalog import pick
from comp.data.splitters import group_codes
from comp.data.tables import read_train
from comp.metrics import METRICS, evaluate_known
from comp.progress import open_progress
from comp.runs import read_json
from comp.ship.report import write_page
from comp.ship.report_figures import need_matplotlib
from comp.ship.report_page import Block, Grid, Note, Page, Panel, Picture, render_text

__all__ = ["Differences", "compare", "paired_bootstrap"]

SEED, LEVEL = 0, 0.95
LEAST_RESAMPLES = 100
FEW_GROUPS = 30
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Differences:
    """R runs against the first, on the same rows."""

    scores: Floats
    """(R,) on all rows."""
    low: Floats
    """(R,) lower end of the 95% interval of score - score of the first."""
    high: Floats
    """(R,)"""
    better: Floats
    """(R,) share of the resamples in which the run scores better than the first; ties count half."""
    resamples: int
    """Those on which the metric is defined."""
    undefined: int
    """Those on which it is not (a single class drawn), left out."""


def paired_bootstrap(
    problem: Problem, *, groups: NDArray[np.int64] | None = None, resamples: int = 1000, seed: int = SEED
) -> Differences:
    """Score all runs on `resamples` draws of the rows, or of whole `groups` (N,), numbers of rows that go together.

    Raises ValueError when the metric is not defined on the rows, or on fewer than half of the draws.
    """
    scores = np.array([problem.score(preds) for preds in problem.preds])
    draw = np.random.default_rng(seed)
    number = len(problem.targets)
    rows_of = [] if groups is None else [np.flatnonzero(groups == one) for one in np.unique(groups)]
    found = []
    progress = open_progress(resamples, "resamples", "draw")
    try:
        for _ in range(resamples):
            drawn = draw.integers(0, len(rows_of) or number, len(rows_of) or number)
            part = problem.rows(np.concatenate([rows_of[group] for group in drawn]) if rows_of else drawn)
            own = [evaluate_known(problem.metric, part.targets, preds, problem.kind) for preds in part.preds]
            if None not in own:
                found.append(own)
            progress.advance()
    finally:
        progress.close()
    if len(found) < resamples / 2:
        raise ValueError(
            f"{problem.metric} is not defined on {resamples - len(found)} of {resamples} draws of {number} rows (a "
            "single class in them); compare on more rows, or by another --metric"
        )
    scored = np.array(found, np.float64)
    apart = scored - scored[:, :1]
    low, high = np.quantile(apart, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0)
    gain = apart if METRICS[problem.metric].higher_is_better else -apart
    better = (gain > 0).mean(axis=0) + 0.5 * (gain == 0).mean(axis=0)
    return Differences(scores, low, high, better, len(found), resamples - len(found))


def compare(
    runs: Sequence[str | Path],
    *,
    weights: str = "best",
    metric: str | None = None,
    resamples: int = 1000,
    html: str | Path | None = None,
) -> str:
    """Return the comparison of two or more runs as text; `html`: also write it there as a page with a picture.

    `weights` (best, last, averaged) made the predictions; `metric`: of METRICS, instead of the runs' own. Raises
    ValueError for runs of different tasks or data, a metric that does not fit, or fewer than 100 resamples.
    """
    if len(runs) < 2:
        raise ValueError("name two runs or more to compare: comp compare runs/a runs/b")
    if resamples < LEAST_RESAMPLES:
        raise ValueError(f"--resamples {resamples}: an interval needs at least {LEAST_RESAMPLES}")
    if html is not None:
        need_matplotlib()
    members = gather(runs, weights=weights, any_folds=True, metric=metric)
    problem = members.problem
    row = pick(METRICS, problem.metric, "metric")
    if problem.kind not in row.kinds:
        fitting = [name for name, one in METRICS.items() if problem.kind in one.kinds]
        raise ValueError(f"metric '{problem.metric}' does not fit kind '{problem.kind}'; allowed: {', '.join(fitting)}")
    groups, fault = _groups(members)
    found = paired_bootstrap(problem, groups=groups, resamples=resamples)
    page = _page(members, found, groups, fault)
    if html is not None:
        write_page(page, Path(html))
    return render_text(page)


def _groups(members: Members) -> tuple[NDArray[np.int64] | None, str | None]:
    """Return the group (N,) of each row, where rows go together, and why it is not known where it is not."""
    config = members.members[0].config
    if config.folds.group is None:
        return None, None
    try:
        table = read_train(config.competition, config.tasks)
        of_id = dict(zip(table.ids, group_codes(table, config.folds), strict=True))
        return np.array([of_id[name] for name in members.ids], np.int64), None
    except ValueError as fault:
        return None, str(fault)
    except KeyError as fault:
        return None, f"{config.competition.train} has no row {fault}"


# --- in words --------------------------------------------------------------------------------------------------------


def _names(members: Members) -> list[str]:
    """Return the runs' names, or their paths where two are called the same."""
    names = members.names
    return names if len(set(names)) == len(names) else [str(member.folder.path) for member in members.members]


def _page(members: Members, found: Differences, groups: NDArray[np.int64] | None, fault: str | None) -> Page:
    problem, names = members.problem, _names(members)
    better = "higher" if METRICS[problem.metric].higher_is_better else "lower"
    about = f"{problem.metric} ({better} is better) of {members.weights} weights on {len(members.ids):,} rows"
    panels = [
        Panel("differences", "Paired differences", [*_warnings(members, fault), *_differences(members, found, groups)]),
        Panel("folds", "By fold", _folds(members)),
        Panel("runs", "Each run by itself", [_own_scores(members)]),
        Panel("config", "What differs in the configs", _configs(members)),
        Panel("made", "What else differs", _made(members)),
    ]
    title = f"compared with {names[0]}: {', '.join(names[1:])}"
    return Page(title, about, [panel for panel in panels if panel.blocks])


def _warnings(members: Members, fault: str | None) -> list[Block]:
    found = []
    first = members.members[0]
    if members.dropped:
        found.append(f"{members.dropped:,} rows are left out: not every run has them.")
    if _different(members, "folds"):
        found.append(
            "The runs were trained on different folds: their models saw different rows, so the difference is less "
            "exact, and there is none by fold."
        )
    if _different(members, "data"):
        found.append(
            "The runs read different texts or tasks (the fingerprints of their data differ); the targets of the rows "
            "that they share are the same."
        )
    if fault is not None:
        found.append(
            f"Rows go together by '{first.config.folds.group}', but are drawn one by one, so that the intervals are "
            f"too narrow: {fault}."
        )
    return [Note(text, warning=True) for text in found]


def _different(members: Members, part: str) -> bool:
    return len({member.mark(part) for member in members.members}) > 1


def _signed(value: float) -> str:
    return f"{value:+.5f}"


def _differences(members: Members, found: Differences, groups: NDArray[np.int64] | None) -> list[Block]:
    names = _names(members)
    apart = found.scores - found.scores[0]
    rows = [[names[0], f"{found.scores[0]:.5f}", "-", "-", "-", "-"]]
    rows += [
        [
            names[run],
            f"{found.scores[run]:.5f}",
            _signed(apart[run]),
            _signed(found.low[run]),
            _signed(found.high[run]),
            f"{found.better[run]:.1%}",
        ]
        for run in range(1, len(names))
    ]
    heads = ["run", members.problem.metric, "difference", "2.5%", "97.5%", "better in"]
    drawn = "the rows"
    if groups is not None:
        number, column = len(np.unique(groups)), members.members[0].config.folds.group
        drawn = f"whole groups of '{column}', of which there are {number:,},"
    text = (
        f"Score of all rows at once, minus that of {names[0]}. Interval: percentiles over {found.resamples:,} draws of "
        f"{drawn} with replacement (seed {SEED}), the same rows for every run. It covers the choice of the rows, not "
        "that of the seed: two runs that differ in their seed alone differ, too."
    )
    if groups is not None and len(np.unique(groups)) < FEW_GROUPS:
        text += " From so few groups it is rough."
    if found.undefined:
        text += f" {found.undefined:,} draws more are left out: the metric is not defined on them."
    data = {
        "names": names[1:],
        "values": apart[1:].tolist(),
        "low": found.low[1:].tolist(),
        "high": found.high[1:].tolist(),
        "label": f"difference in {members.problem.metric}",
        "title": f"against {names[0]}; 95% interval",
        "line": 0.0,
    }
    picture = Picture("difference", f"Paired difference in {members.problem.metric} to {names[0]}", "intervals", data)
    return [Grid("difference-table", "", heads, rows), picture, Note(text)]


def _folds(members: Members) -> list[Block]:
    if _different(members, "folds"):
        return []
    problem, names = members.problem, _names(members)
    scores: list[list[float | None]] = []
    folds = sorted(set(members.fold.tolist()))
    for fold in folds:
        part = problem.rows(members.fold == fold)
        scores.append([evaluate_known(problem.metric, part.targets, preds, problem.kind) for preds in part.preds])

    def line(name: str, values: Sequence[float | None]) -> list[str]:
        base = values[0]
        apart = ["-" if value is None or base is None else _signed(value - base) for value in values[1:]]
        return [name, *("-" if value is None else f"{value:.5f}" for value in values), *apart]

    rows = [line(f"fold {fold}", own) for fold, own in zip(folds, scores, strict=True)]
    known = np.array([own for own in scores if None not in own], np.float64)
    if len(known):
        rows.append(line("mean of folds", known.mean(axis=0).tolist()))
        wins = ((known - known[:, :1]) * (1 if METRICS[problem.metric].higher_is_better else -1) > 0).sum(axis=0)
        rows.append(["folds won", *[""] * len(names), *(f"{won} of {len(known)}" for won in wins[1:])])
    heads = ["", *names, *(f"{name} - {names[0]}" for name in names[1:])]
    return [Grid("fold-table", "", heads, rows)]


def _own_scores(members: Members) -> Grid:
    """Return what scores.json of each run says of the first task, on all its own rows."""
    rows = []
    for name, member in zip(_names(members), members.members, strict=True):
        found = read_json(member.folder.scores)
        cells = [name, found["metric"], f"{len(found['best']['folds'])}/{member.config.folds.num_folds}"]
        for kind in ("best", "last", "averaged"):
            own = found.get(kind, {})
            cells += ["-" if own.get(key) is None else f"{own[key]:.5f}" for key in ("mean", "pooled")]
        spread = f"{found['best']['std']:.5f}" if len(found["best"]["folds"]) > 1 else "-"
        rows.append([*cells, spread, str(member.config.training.seed)])
    heads = ["run", "metric", "folds", "best: mean", "pooled", "last: mean", "pooled", "averaged: mean", "pooled"]
    return Grid("own-scores", "", [*heads, "spread (best)", "seed"], rows, left=2)


def _table(names: Sequence[str], values: Sequence[dict[str, Any]], name: str) -> list[Block]:
    """Return the keys whose values are not all the same, a column a run; `values`: a flat mapping a run."""
    keys = list(dict.fromkeys(key for own in values for key in own))
    rows = [
        [key, *("-" if own.get(key) is None else str(own[key]) for own in values)]
        for key in keys
        if any(own.get(key) != values[0].get(key) for own in values)
    ]
    if not rows:
        return [Note("Nothing.")]
    return [Grid(name, "", ["", *names], rows, left=1 + len(names))]


def _configs(members: Members) -> list[Block]:
    first = members.members[0].config.model_dump(mode="json")
    found: list[dict[str, Any]] = [{} for _ in members.members]
    for own, member in zip(found[1:], members.members[1:], strict=True):
        for key, old, new in config_file.differences(first, member.config.model_dump(mode="json")):
            found[0][key], own[key] = old, new
    # A key in which one run differs has the first's value in the others.
    filled = [{key: own.get(key, found[0][key]) for key in found[0]} for own in found]
    return _table(_names(members), filled, "config-table")


def _made(members: Members) -> list[Block]:
    def flat(member: Member) -> dict[str, Any]:
        about = member.manifest
        named = {key: about.get(key) for key in ("created", "commit", "runtime")}
        if member.folder.classical.exists():
            named |= read_json(member.folder.classical)
        return {**named, **about["versions"], **{f"{k} fingerprint": v for k, v in about["fingerprints"].items()}}

    return _table(_names(members), [flat(member) for member in members.members], "made-table")
