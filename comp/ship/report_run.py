"""What a report reads of a run folder. Half-finished, full-data and classical runs are runs too.

Numbers come from the finished folds' own rows and logs, so that a run that was killed before it was scored has them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp import config_file
from comp.config import Config, Task
from comp.data.batches import count_tokens, sorted_batches
from comp.data.folds import Folding, read_folds
from comp.data.tables import Table, read_train
from comp.data.tokens import Encoded, encode
from comp.model.sources import load_tokenizer
from comp.runs import RunFolder, read_json
from comp.training import oof
from comp.training.crossval import FOLDS
from comp.training.lessons import NoPseudo, Stages, open_pseudo
from comp.training.plan import rows_of
from comp.training.predict import CPU_TOKENS, GPU_TOKENS

__all__ = ["FoldLog", "Lengths", "Padding", "RunRecord", "fold_name", "read_run"]

Fold = int | str
GROUP_LINE = re.compile(r"^(?P<name>\S.*?) +(?P<lr>\d\S*) +\S+ +\d+ +[\d,]+$")
UNCUT = 1 << 30
NEEDED = ("created", "commit", "versions", "runtime", "classes", "fingerprints")  # of a manifest


def fold_name(fold: Fold) -> str:
    """Return what a fold is called: "fold 0", or "full"."""
    return "full" if fold == "full" else f"fold {fold}"


@dataclass(frozen=True)
class FoldLog:
    """How the training of one fold went."""

    fold: Fold
    done: dict[str, Any] | None
    """done.json; None while the fold is not finished."""
    train: list[dict[str, Any]]
    """Lines of metrics.jsonl with a training loss."""
    valid: list[dict[str, Any]]
    """Lines with a validation score."""
    groups: list[tuple[str, float]]
    """Parameter groups and their peak learning rates (three digits), top first; no-decay twins left out."""

    @property
    def chosen(self) -> int | None:
        """Step of the evaluation that was kept, or that would be if the fold ended now."""
        if self.done is not None and self.done.get("best_step"):
            return int(self.done["best_step"])
        scores = [line["valid/score"] for line in self.valid]
        best = self.valid[-1]["valid/best"] if self.valid else None
        return int(self.valid[scores.index(best)]["step"]) if best in scores else None


@dataclass(frozen=True)
class Lengths:
    """Length of each row of the training table."""

    values: NDArray[np.int64]
    """(N,)"""
    unit: str
    """tokens (special ones included, before any cut) | words"""
    limit: int | None
    """Longer texts are cut, or become windows; None = no limit."""


@dataclass(frozen=True)
class Padding:
    """Tokens of one fold's batches."""

    real: int
    """Of the training batches that were seen."""
    share: float
    """Padding's share of the training batches."""
    plain_share: float
    """What it would be without length bucketing."""
    predict_share: float
    """Padding's share of the batches of one evaluation; 0 without held-out rows."""


@dataclass(frozen=True)
class RunRecord:
    """Everything a report says, before it is put into words. Made by `read_run`."""

    folder: RunFolder
    config: Config
    manifest: dict[str, Any]
    logs: list[FoldLog]
    """Folds that are begun or finished."""
    rows: pd.DataFrame | None
    """Out-of-fold rows of the finished folds; None when there are none."""
    table: Table | None
    """The training table; None when it is gone or has changed."""
    folding: Folding | None
    """Folds of the whole table; None without the table or its fold file."""
    missing: list[str]
    """What could not be read, and what the report is therefore without."""

    @property
    def finished(self) -> list[int]:
        return [log.fold for log in self.logs if isinstance(log.fold, int) and log.done is not None]

    @property
    def classes(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = self.manifest["classes"]
        return found

    def outputs(self, task: Task) -> list[str]:
        return oof.output_names(task, self.classes)

    def targets(self, task: Task) -> NDArray[np.float64]:
        """Return the targets (N, K) of the out-of-fold rows."""
        assert self.rows is not None
        return self.rows[[f"target_{task.name}_{name}" for name in task.targets]].to_numpy(np.float64)

    def preds(self, task: Task) -> NDArray[np.float64]:
        """Return the predictions (N, K or C) of the out-of-fold rows by the best weights."""
        assert self.rows is not None
        return self.rows[[f"pred_{task.name}_{name}" for name in self.outputs(task)]].to_numpy(np.float64)

    @cached_property
    def scores(self) -> dict[str, oof.Scores]:
        """Task name -> its scores over the finished folds; {} without out-of-fold rows."""
        if self.rows is None:
            return {}
        first = self.config.tasks[0]
        return {
            task.name: oof.score(self.rows, task, self.config.metric_of(task), self.classes, complete=task is first)
            for task in self.config.tasks
        }

    @cached_property
    def flattery(self) -> tuple[float, int] | None:
        """By how much keep-best flatters the first task's score, and the most evaluations of a fold."""
        if self.rows is None:
            return None
        return oof.keep_best_flattery(self.folder, self.finished, self.config.tasks[0], self.config.metric)

    @cached_property
    def place_of(self) -> NDArray[np.int64] | None:
        """Place in the training table of each out-of-fold row (N,); None without the table."""
        if self.table is None or self.rows is None:
            return None
        return pd.Index(self.table.ids).get_indexer(pd.Index(self.rows["id"])).astype(np.int64)

    @cached_property
    def _tokenizer(self) -> Any:
        """The run's tokenizer; None where it has none, or there are no texts for it."""
        if self.table is None or self.folder.classical.exists() or not (self.folder.backbone / "config.json").exists():
            return None
        return load_tokenizer(str(self.folder.backbone))

    @cached_property
    def _pseudo(self) -> NoPseudo | str:
        """The pseudo rows that the folds were trained on, or why they cannot be read."""
        assert self.table is not None
        folds = [log.fold for log in self.logs if log.done is not None]
        try:
            return open_pseudo(self.config, self.table, self.folding, folds, lambda line: None)
        except ValueError as fault:
            return str(fault).splitlines()[0]

    @property
    def unread_pseudo(self) -> str | None:
        """Why the pseudo rows cannot be read; None where they can, or there are none."""
        if self.config.pseudo is None or self.table is None:
            return None
        return self._pseudo if isinstance(self._pseudo, str) else None

    @cached_property
    def _encoded(self) -> Encoded:
        """The texts as the model reads them: the training table's, then pseudo rows."""
        assert self.table is not None and not isinstance(self._pseudo, str)
        return encode(self._tokenizer, self._pseudo.texts(self.table), **self.config.model.cutting)

    @cached_property
    def lengths(self) -> Lengths | None:
        """Lengths of the training texts: tokens where the run has a tokenizer, else words."""
        if self.table is None:
            return None
        if self._tokenizer is not None:
            whole = encode(self._tokenizer, self.table.texts, max_length=UNCUT)
            return Lengths(whole.lengths, "tokens", self.config.model.max_length)
        words = [sum(len(text.split()) for text in texts) for texts in zip(*self.table.texts, strict=True)]
        return Lengths(np.asarray(words, np.int64), "words", None)

    def padding(self, log: FoldLog) -> Padding | None:
        """Count the tokens of a finished fold's batches anew, as configured; None where they cannot be."""
        whole = log.fold == "full" and self.table is not None
        if self._tokenizer is None or log.done is None or not (whole or self.folding is not None):
            return None
        if isinstance(self._pseudo, str):
            return None
        assert self.table is not None
        training, held = rows_of(log.fold, self.config, self.table, self.folding)
        lesson = self._pseudo.lesson(log.fold, self.table, training)
        found = []
        for bucketing in (self.config.training.length_bucketing, False):
            options = self.config.training.model_copy(update={"length_bucketing": bucketing})
            stages = Stages(lesson, self.config.model_copy(update={"training": options}), self._encoded.lengths)
            windows = (window for epoch in range(stages.epochs) for window in stages.windows(epoch))
            found.append(
                count_tokens(self._encoded, [rows for window in islice(windows, log.done["steps"]) for rows in window])
            )
        (real, padded), (_, plain) = found
        limit = CPU_TOKENS if str(self.manifest["runtime"]).startswith("CPU") else GPU_TOKENS
        batches = sorted_batches(self._encoded.lengths[held], max_tokens=limit)
        own, shown = count_tokens(self._encoded, [held[places] for places in batches])
        if self.config.model.attention == "packed":  # padding that is never computed
            padded, shown = real, own
        return Padding(real, 1 - real / padded, 1 - real / plain, 1 - own / shown if shown else 0.0)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_run(path: str | Path) -> RunRecord:
    """Read a run folder. Raises ValueError when it is none, or nothing in it was begun."""
    folder = RunFolder(path)
    if not folder.config.exists() or not folder.manifest.exists():
        raise ValueError(f"{path} is no run folder: config.yaml or manifest.json is missing; see `comp oof`")
    config, manifest = config_file.load(folder.config), read_json(folder.manifest, *NEEDED)
    folds: list[Fold] = [*range(config.folds.num_folds), "full"]
    logs = [log for fold in folds if (log := _read_log(folder, fold)) is not None]
    if not logs:
        raise ValueError(f"{path}: no fold was begun yet; train them with `comp train`")
    finished = [log.fold for log in logs if isinstance(log.fold, int) and log.done is not None]
    rows = oof.read_rows(folder, finished) if finished else None
    missing: list[str] = []
    table = _read_table(config, manifest, missing)
    folding = None
    if table is not None and "folds" in manifest["fingerprints"]:
        folding = _read_folding(config, manifest, table, missing)
    return RunRecord(folder, config, manifest, logs, rows, table, folding, missing)


def _read_log(folder: RunFolder, fold: Fold) -> FoldLog | None:
    own = folder.fold(fold)
    done = read_json(own.done) if own.done.exists() else None
    lines = _read_lines(own.metrics) if own.metrics.exists() else []
    if done is None and not lines:
        return None
    groups = []
    for line in own.groups.read_text(encoding="utf-8").splitlines() if own.groups.exists() else []:
        match = GROUP_LINE.match(line)
        if match and not match["name"].endswith((", no decay", ", prior")):
            groups.append((match["name"], float(match["lr"])))
    return FoldLog(
        fold,
        done,
        [line for line in lines if "train/loss" in line],
        [line for line in lines if "valid/score" in line],
        groups,
    )


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a metrics.jsonl; one that is being written just now is left out."""
    text = path.read_text(encoding="utf-8")
    found = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            values = None
        if not isinstance(values, dict):
            raise ValueError(
                f"{path} line {number} is no JSON object; take the line out, or train the fold with --restart"
            )
        found.append(values)
    return found


def _read_table(config: Config, manifest: dict[str, Any], missing: list[str]) -> Table | None:
    without = "so there are no texts, lengths, groups and padding here"
    try:
        table = read_train(config.competition, config.tasks)
    except ValueError as fault:
        missing.append(f"the training table cannot be read ({str(fault).splitlines()[0]}), {without}")
        return None
    if table.fingerprint() != manifest["fingerprints"]["data"]:
        missing.append(f"{config.competition.train} has changed since the run was made, {without}")
        return None
    return table


def _read_folding(config: Config, manifest: dict[str, Any], table: Table, missing: list[str]) -> Folding | None:
    path = FOLDS / f"{config.fold_name}.csv"
    without = "so the balance is of the finished folds' rows only, and padding is not counted"
    try:
        folding = read_folds(path, table, config.folds)
    except ValueError as fault:
        missing.append(f"the fold file cannot be read ({str(fault).splitlines()[0]}), {without}")
        return None
    if folding.fingerprint != manifest["fingerprints"]["folds"]:
        missing.append(f"{path} has changed since the run was made, {without}")
        return None
    return folding
