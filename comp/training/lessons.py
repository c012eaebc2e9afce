"""What a fold trains on: its true rows, or pseudo-labelled rows beside or before them; and the stages that makes.

With rows before them (two_stage) an epoch number below `lead_epochs` means a pass over pseudo rows. That stage has the
learning-rate schedule to itself. Every other duration of the config counts from the first step on true rows, so that
the second stage is the training that it would be alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.config import Config
from comp.config_pseudo import NUMBERS, Pseudo
from comp.config_training import parse_every
from comp.data.batches import count_tokens, training_windows
from comp.data.folds import Folding, valid_rows
from comp.data.pseudo import (
    Answers,
    LabelSet,
    confidence,
    extended,
    held_out_mark,
    read_set,
    table_of_rows,
    unfit_rows,
)
from comp.data.tables import Table
from comp.data.tokens import Encoded
from comp.optim.schedules import build_schedule
from comp.training.cadence import Cadence

__all__ = ["Fold", "Lesson", "NoPseudo", "PseudoRows", "Stages", "choose", "open_pseudo"]

Rows: TypeAlias = NDArray[np.int64]
Fold: TypeAlias = int | str
Say: TypeAlias = Callable[[str], None]


@dataclass(frozen=True)
class Lesson:
    """What one fold trains on. Class weights, IDF and scales are still counted on its true training rows."""

    table: Table
    """The true rows first, then pseudo rows with the labels for this fold."""
    rows: Rows
    """Row numbers of an epoch."""
    lead: Rows
    """Row numbers of an epoch of the stage before; none without."""
    lead_epochs: int = 0

    @property
    def all_rows(self) -> Rows:
        """Row numbers of every stage."""
        return np.concatenate([self.lead, self.rows])


class NoPseudo:
    """Training on the true rows alone."""

    marks: dict[str, str] = {}  # noqa: RUF012 - a constant
    """Fingerprints for the run's manifest."""

    def texts(self, table: Table) -> tuple[list[str], ...]:
        """Return the text columns of all rows that a fold can train on, the true ones first."""
        return table.texts

    def lesson(self, fold: Fold, table: Table, training: Rows) -> Lesson:
        """Return what a fold trains on, of the true `training` rows and its own pseudo rows."""
        return Lesson(table, training, np.zeros(0, np.int64))


@dataclass(frozen=True)
class PseudoRows(NoPseudo):
    """Training with the rows of a label set."""

    options: Pseudo
    config: Config
    labels: LabelSet
    rows: Table
    """The unlabelled rows, ids their keys."""
    fit: NDArray[np.bool_]
    """(M,) rows that do not copy a training text."""
    held_out: dict[Fold, str]
    """Fold -> fingerprint of its held-out ids."""

    @property
    def marks(self) -> dict[str, str]:  # type: ignore[override]
        return {"pseudo": self.labels.fingerprint}

    def texts(self, table: Table) -> tuple[list[str], ...]:
        return tuple([*true, *pseudo] for true, pseudo in zip(table.texts, self.rows.texts, strict=True))

    def lesson(self, fold: Fold, table: Table, training: Rows) -> Lesson:
        options, answers, chosen = self.options, *self.chosen(fold)
        both = extended(
            table,
            self.config.tasks,
            self.rows,
            answers,
            labels=options.labels,
            weight=options.weight,
            training=training,
        )
        pseudo = len(table) + chosen
        if options.stage_epochs:
            return Lesson(both, training, pseudo, options.stage_epochs)
        return Lesson(both, np.concatenate([training, pseudo]), np.zeros(0, np.int64))

    def chosen(self, fold: Fold) -> tuple[Answers, Rows]:
        """Return the labels for a fold and the rows (of M) it trains on. Raises ValueError when none is left."""
        answers = self.labels.answers(fold, self.held_out.get(fold))
        kind, training = self.config.tasks[0].kind, self.config.training
        rows = choose(answers, self.fit, kind=kind, options=self.options, seed=training.seed, most=training.max_rows)
        if not len(rows):
            raise ValueError(
                f"of the {len(self.rows):,} rows of {self.labels.folder} none is left for fold {fold}; loosen "
                "pseudo.min_confidence, agreement or max_spread"
            )
        return answers, rows


def choose(
    answers: Answers, fit: NDArray[np.bool_], *, kind: str, options: Pseudo, seed: int, most: int | None = None
) -> Rows:
    """Return the rows (of M) to train on, rising: those of `fit` (M,) that pass the filters, the surest, then a draw.

    `most`: at most so many whatever the options say.
    """
    kept = fit.copy()
    if options.min_confidence is not None:
        kept &= confidence(answers.preds, kind) >= options.min_confidence
    if options.agreement:
        kept &= answers.agree
    if options.max_spread is not None:
        kept &= answers.spread <= options.max_spread
    rows = np.flatnonzero(kept)
    if options.keep_percent < 100:
        doubt = answers.spread if kind in NUMBERS else 1 - confidence(answers.preds, kind)
        number = int(np.ceil(len(rows) * options.keep_percent / 100))
        rows = np.sort(rows[np.argsort(doubt[rows], kind="stable")[:number]])
    limit = min(len(rows), options.max_rows or len(rows), most or len(rows))
    if limit < len(rows):
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:limit])
    return rows


def open_pseudo(
    config: Config, table: Table, folding: Folding | None, folds: Sequence[Fold], say: Say
) -> NoPseudo | PseudoRows:
    """Open the label set of `config.pseudo` for `folds`; say what each trains on. NoPseudo when it is null.

    Raises ValueError when the set is of other data or folds, was changed, has no labels that were made without the
    held-out rows of a fold, or an option asks of it what it has not.
    """
    options, task = config.pseudo, config.tasks[0]
    if options is None:
        return NoPseudo()
    labels = read_set(options.folder)
    labels.must_fit(table, config.competition, task, None if folding is None else folding.fingerprint)
    spread = options.max_spread is not None or (options.keep_percent < 100 and task.kind in NUMBERS)
    if (options.agreement or spread) and labels.num_teachers < 2:
        what = "agreement" if options.agreement else "max_spread" if options.max_spread is not None else "keep_percent"
        raise ValueError(
            f"pseudo.{what} compares teachers, and {labels.folder} has one; make it anew with several --run, or leave "
            "the option out"
        )
    rows = table_of_rows(labels.rows(), config.competition, str(labels.folder))
    unfit = {reason: mask for reason, mask in unfit_rows(rows, table).items() if mask.any()}
    for reason, mask in unfit.items():
        say(f"warning: {int(mask.sum()):,} pseudo rows {reason}, as this config reads it, are left out")
    fit = ~np.any([*unfit.values(), np.zeros(len(rows), bool)], axis=0)
    numbers = [] if folding is None else [fold for fold in folds if isinstance(fold, int)]
    held_out: dict[Fold, str] = {
        fold: held_out_mark(table.ids[valid_rows(folding.fold, fold)]) for fold in numbers if folding is not None
    }
    opened = PseudoRows(options, config, labels, rows, fit, held_out)
    for fold in folds:
        _, chosen = opened.chosen(fold)
        say(f"fold {fold}: {len(chosen):,} of {len(rows):,} pseudo rows of {labels.folder}, {options.mode}")
    return opened


# --- stages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stages:
    """The epochs of a fold, in one stage or two."""

    lesson: Lesson
    config: Config
    lengths: NDArray[np.int64]
    """Tokens of each row of the lesson's table."""

    @property
    def epochs(self) -> int:
        return self.lesson.lead_epochs + self.config.training.epochs

    @cached_property
    def _steps(self) -> list[int]:
        """Optimizer steps of each epoch."""
        options = self.config.training
        if options.batch_tokens is not None:
            return [len(self.windows(epoch)) for epoch in range(self.epochs)]
        rows = [self.lesson.lead] * self.lesson.lead_epochs + [self.lesson.rows] * options.epochs
        return [-(-len(own) // options.batch_size) for own in rows]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch of the last stage; with batch_tokens of a mean one, rounded."""
        return max(1, round(self.last_steps / self.config.training.epochs))

    @property
    def lead_steps(self) -> int:
        """Optimizer steps of the stage before it."""
        return sum(self._steps[: self.lesson.lead_epochs])

    @property
    def last_steps(self) -> int:
        """Optimizer steps of the last stage."""
        return sum(self._steps[self.lesson.lead_epochs :])

    @property
    def num_steps(self) -> int:
        return self.lead_steps + self.last_steps

    def windows(self, epoch: int) -> list[list[Rows]]:
        """Return the windows of micro-batches of an epoch, counted over both stages."""
        options, lead = self.config.training, self.lesson.lead_epochs
        return training_windows(
            self.lesson.lead if epoch < lead else self.lesson.rows,
            self.lengths,
            batch_size=options.batch_size,
            micro_batch_size=options.micro_batch_size,
            batch_tokens=options.batch_tokens,
            bucketing=options.length_bucketing,
            seed=options.seed,
            epoch=epoch if epoch < lead else epoch - lead,
        )

    def padding(self, encoded: Encoded) -> float:
        """Return the share of padding among the tokens of all epochs."""
        windows = (window for epoch in range(self.epochs) for window in self.windows(epoch))
        real, padded = count_tokens(encoded, (rows for window in windows for rows in window))
        return 1 - real / padded

    def schedule(self) -> Callable[[int], float]:
        """Return step -> multiplier; each stage has the schedule from its start to its end."""
        chosen, lead = self.config.schedule, self.lead_steps
        last = build_schedule(chosen, num_steps=self.last_steps, steps_per_epoch=self.steps_per_epoch)
        if not lead:
            return last
        try:
            first = build_schedule(chosen, num_steps=lead, steps_per_epoch=lead // self.lesson.lead_epochs)
        except ValueError as fault:
            raise ValueError(f"in the stage of the pseudo rows, {fault}") from None
        return lambda step: first(step) if step < lead else last(step - lead)

    def cadence(self) -> Cadence:
        """Return when to evaluate: in the last stage only."""
        options = self.config.evaluation
        return Cadence.from_unit(
            num_steps=self.last_steps,
            steps_per_epoch=self.steps_per_epoch,
            every=parse_every(options.every) if options.every else None,
            table=options.schedule,
            start_percent=options.start_percent,
            lead=self.lead_steps,
        )
