"""The runs of a blend: their out-of-fold rows side by side, aligned by id, from the same data and folds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp import config_file
from comp.blend.ensemble import Problem
from comp.config import Config, Task, Tracking
from comp.data.frames import read_frame
from comp.data.leaks import Evidence, OutOfFold, better_than_can_be, lint
from comp.data.tables import read_competition
from comp.runs import RUNS, RunFolder, digest, read_json
from comp.training.oof import COLUMN, output_names

__all__ = ["Member", "Members", "gather", "leaks_of", "list_runs", "read_member"]


@dataclass(frozen=True)
class Member:
    """One finished run."""

    folder: RunFolder
    config: Config
    manifest: dict[str, Any]
    rows: pd.DataFrame
    """Its oof.parquet, by id."""

    @property
    def task(self) -> Task:
        return self.config.tasks[0]

    @property
    def outputs(self) -> list[str]:
        """Names of the predicted columns of the first task."""
        return output_names(self.task, self.manifest["classes"])

    def columns(self, kind: str) -> list[str]:
        """Return the columns of the first task that start with `kind`: target, pred, last, averaged."""
        names = self.task.targets if kind == "target" else self.outputs
        return [f"{kind}_{self.task.name}_{name}" for name in names]

    def out_of_fold(self) -> OutOfFold:
        """Return its rows of the first task, by the best weights."""
        targets, preds = (self.rows[self.columns(kind)].to_numpy(float) for kind in ("target", "pred"))
        return OutOfFold(self.folder.name, self.task.kind, targets, preds)

    def mark(self, part: str) -> str:
        """Return the fingerprint of its data or folds."""
        return str(self.manifest["fingerprints"].get(part, "none"))


def read_member(path: str | Path) -> Member:
    """Read a run with out-of-fold rows. Raises ValueError when it is none."""
    folder = RunFolder(path)
    if not folder.config.exists() or not folder.manifest.exists():
        raise ValueError(f"{path} is no run folder: config.yaml or manifest.json is missing; see `comp oof`")
    if not folder.oof.exists():
        raise ValueError(f"{path} has no out-of-fold rows yet; train its folds with `comp train`")
    rows = read_frame(folder.oof, "id").set_index("id")
    return Member(folder, config_file.load(folder.config), read_json(folder.manifest, "classes", "fingerprints"), rows)


@dataclass(frozen=True)
class Members:
    """Runs that can be blended, and the rows that all of them have."""

    members: list[Member]
    ids: NDArray[np.object_]
    """(N,)"""
    fold: NDArray[np.int64]
    """(N,) of the first run; of all of them, when the folds are the same."""
    problem: Problem
    weights: str
    """Which weights made the predictions: best, last or averaged, or one for each run: best,averaged."""
    dropped: int
    """Rows that not every run has."""

    def among(self, runs: list[int]) -> Members:
        """Return some of the runs, on the same rows."""
        members = [self.members[run] for run in runs]
        weights = joined([weights_each(self.weights, len(self.members))[run] for run in runs])
        return replace(self, members=members, problem=self.problem.runs(runs), weights=weights)

    @property
    def names(self) -> list[str]:
        return [member.folder.name for member in self.members]


def weights_each(weights: str, num_runs: int) -> list[str]:
    """Read "averaged", which is every run's, or one for each run in their order, like "best,averaged".

    Raises ValueError for another number than that of the runs. Whether a run has such weights is not looked at.
    """
    each = [word.strip() for word in weights.split(",")]
    if len(each) == 1:
        each *= num_runs
    if len(each) != num_runs:
        raise ValueError(
            f"weights '{weights}' are {len(each)} for {num_runs} runs; give one for all of them, or one for each in "
            "their order, like best,averaged"
        )
    return each


def joined(each: Sequence[str]) -> str:
    """Return what `weights_each` reads."""
    return each[0] if len(set(each)) == 1 else ",".join(each)


def gather(
    paths: Sequence[str | Path],
    *,
    weights: str = "best",
    rows: str | None = None,
    any_folds: bool = False,
    metric: str | None = None,
) -> Members:
    """Read runs and put their predictions of the first task side by side.

    `rows`: a pandas query over the columns of the training table; only those rows are fitted to and scored.
    `any_folds`: allow runs on different fold files. `metric`: to score by, instead of the one that all runs must then
    share. Raises ValueError when the runs cannot be blended: another task,
    metric, data or folds, no rows in common, weights that a run does not have.
    """
    if len({Path(path).resolve() for path in paths}) != len(paths):
        raise ValueError("a run is named twice; each counts once")
    members = [read_member(path) for path in paths]
    if not members:
        raise ValueError("no run to blend; name them with --run, see `comp oof`")
    first = members[0]
    for other in members[1:]:
        _must_fit(first, other, any_folds=any_folds, any_metric=metric is not None)
    each = weights_each(weights, len(members))
    if unknown := [word for word in each if word not in COLUMN]:
        raise ValueError(f"weights '{unknown[0]}': allowed are {', '.join(COLUMN)}, or one for each run: best,averaged")
    kinds = [COLUMN[word] for word in each]
    for member, word, kind in zip(members, each, kinds, strict=True):
        if not set(member.columns(kind)) <= set(member.rows.columns):
            raise ValueError(
                f"{member.folder.path} has no predictions by {word} weights; use another --weights, for all or one "
                "for each in their order, like best,averaged"
            )
    common = first.rows.index
    for member in members[1:]:
        common = common[common.isin(member.rows.index)]
    union = len(set().union(*(member.rows.index for member in members)))
    if rows is not None:
        common = common[common.isin(_chosen_ids(first, rows))]
    if not len(common):
        raise ValueError(f"the runs have no rows in common{'' if rows is None else f' that fit --rows {rows!r}'}")
    preds = np.stack(
        [
            member.rows.loc[common, member.columns(kind)].to_numpy(float)
            for member, kind in zip(members, kinds, strict=True)
        ]
    )
    targets = first.rows.loc[common, first.columns("target")]
    problem = Problem(preds, targets.to_numpy(float), first.task.kind, metric or first.config.metric)
    fold = first.rows.loc[common, "fold"].to_numpy(np.int64)
    return Members(members, common.to_numpy(object), fold, problem, joined(each), union - len(common))


def _must_fit(first: Member, other: Member, *, any_folds: bool, any_metric: bool) -> None:
    """Raise ValueError unless two runs can stand side by side."""
    where = f"{first.folder.path} and {other.folder.path}"
    for what, one, two in (
        ("kind of task", first.task.kind, other.task.kind),
        ("targets", first.task.targets, other.task.targets),
        ("outputs", first.outputs, other.outputs),
        ("metric", first.config.metric, other.config.metric),
    ):
        if one != two and not (what == "metric" and any_metric):
            raise ValueError(f"{where} differ in their {what}: {one} and {two}; take runs of one competition")
    same = first.rows.index.intersection(other.rows.index)
    mine, theirs = (run.rows.loc[same, run.columns("target")].to_numpy(float) for run in (first, other))
    if not np.array_equal(mine, theirs):
        raise ValueError(f"{where} have different targets for the same ids: they were trained on different data")
    if first.mark("folds") != other.mark("folds") and not any_folds:
        raise ValueError(
            f"{where} were trained on different folds ({first.mark('folds')} and {other.mark('folds')}): no weights "
            "can be fitted without rows that one of them saw; use --method mean, rank_mean or geometric_mean, or train "
            "one of them anew on the other's fold file"
        )


def leaks_of(members: Sequence[Member]) -> list[str]:
    """Return what the leak rules find in the members' tables, folds and out-of-fold rows.

    Tables that are gone are said, and the rules that need them left out.
    """
    found: list[str] = []
    alike: dict[tuple[str, str], list[Member]] = {}
    for member in members:
        alike.setdefault((member.mark("data"), member.mark("folds")), []).append(member)
    for own in alike.values():
        first, runs = own[0], tuple(member.out_of_fold() for member in own)
        try:
            table, test = read_competition(first.config.competition, first.config.tasks)
        except ValueError as fault:
            leak = better_than_can_be(runs)
            found += [f"leaks are not looked for in the tables: {fault}", *([str(leak)] if leak else [])]
            continue
        fold = first.rows["fold"].reindex(table.ids).fillna(-1).to_numpy(np.int64)
        found += [str(leak) for leak in lint(Evidence(table, test, fold, first.config.folds.group, runs))]
    return found


def _chosen_ids(member: Member, query: str) -> set[str]:
    """Return the ids of the training rows that a pandas query over the table's columns keeps."""
    table, _ = read_competition(member.config.competition, member.config.tasks)
    frame = table.frame.copy()
    for name in frame.columns:
        numbers = pd.to_numeric(frame[name], errors="coerce")
        if numbers.notna().all():
            frame[name] = numbers
    try:
        kept = frame.query(query).index
    except Exception as fault:  # pandas raises whatever its parser meets
        raise ValueError(
            f"--rows {query!r}: {type(fault).__name__}: {fault}; columns are {', '.join(map(str, frame.columns))}"
        ) from None
    return set(table.ids[kept.to_numpy()])


# --- what there is ---------------------------------------------------------------------------------------------------


def list_runs(root: Path = RUNS) -> list[str]:
    """Return a table of the runs that have out-of-fold rows, latest last: score, folds, seed, age, folds' fingerprint.

    Runs whose folds' fingerprints are the same can be blended with fitted weights. `flatters`: how much keep-best
    flatters the best score. Runs that differ in their seed alone get a further line: the score of their mean, which is
    what `comp infer` makes of them.
    """
    heads = f"{'best':>9} {'last':>9} {'averaged':>9} {'flatters':>9} {'folds':>7} {'seed':>6} {'age':>7}  fold file"
    lines = [f"{'run':<28} {'metric':<10} {heads}"]
    bags: dict[str, list[RunFolder]] = {}
    for scores in sorted(root.glob("*/scores.json"), key=lambda path: path.stat().st_mtime):
        folder = RunFolder(scores.parent)
        config, found = config_file.load(folder.config), read_json(scores)
        marks = read_json(folder.manifest, "fingerprints")["fingerprints"]
        shown = [found.get(kind, {}).get("pooled") for kind in COLUMN] + [found.get("keep_best_flatters")]
        folds = f"{len(found['best']['folds'])}/{config.folds.num_folds}"
        file = f"{config.fold_name} {marks.get('folds', 'none')}"
        lines.append(
            f"{folder.name:<28} {found['metric']:<10} {_numbers(shown)} {folds:>7} {config.training.seed:>6} "
            f"{_age(time.time() - scores.stat().st_mtime):>7}  {file}"
        )
        bags.setdefault(_but_for_the_seed(folder, config, marks), []).append(folder)
    for folders in bags.values():
        if len(folders) > 1:
            lines += _bag_lines(folders)
    return lines


def _numbers(values: Sequence[float | None]) -> str:
    return " ".join(f"{'-' if value is None else f'{value:.5f}':>9}" for value in values)


def _but_for_the_seed(folder: RunFolder, config: Config, marks: Mapping[str, str]) -> str:
    """Return what runs have in common that differ in their seed alone."""
    plain = config.model_copy(
        update={"tracking": Tracking(), "training": config.training.model_copy(update={"seed": 0})}
    )
    return digest([config_file.dump(plain), *(f"{part} {mark}" for part, mark in marks.items() if part != "config")])


def _bag_lines(folders: Sequence[RunFolder]) -> list[str]:
    """Return a line for the mean of runs that differ in their seed, over the rows that all have."""
    shown: list[float | None] = []
    for kind in COLUMN:
        try:
            members = gather([folder.path for folder in folders], weights=kind)
            shown.append(members.problem.score(members.problem.preds.mean(axis=0)))
        except ValueError:  # no such weights, or a metric that is not defined on these rows
            shown.append(None)
    seeds = [config_file.load(folder.config).training.seed for folder in folders]
    name = folders[0].name.removesuffix(f"-seed{seeds[0]}")
    metric = read_json(folders[0].scores)["metric"]
    about = f"mean of {len(folders)} runs, seeds {', '.join(map(str, sorted(seeds)))}"
    return [f"{name:<28} {metric:<10} {_numbers([*shown, None])}  {about}"]


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
