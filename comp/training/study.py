"""The study of a search: Optuna's sampler, pruner and journal, in searches/NAME/journal.log.

Several processes share a journal. Who asks for a trial does so alone (a lock beside the journal), so that no budget is
overrun. A trial's values depend on the search's seed, on how many trials began before it and on their scores, not on
the process that asks: a search that was killed and goes on tries what one that was not would have.

Trials of different lengths are compared at the same share of their steps, in twentieths, not at the same step: batch
size and epochs may be searched, and the learning rate falls over the whole of each. The value at a mark is the best
score up to there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from comp.lock import hold
from comp.metrics import METRICS, is_better
from comp.runs import digest
from comp.search_space import Space

__all__ = ["PRUNERS", "Pruned", "Reporter", "Study", "Tried", "need_optuna"]

MARK = 5  # percent of a trial's steps between the marks that trials are compared at
FIRST_MARK = 10  # percent before which no trial is pruned
PRUNERS = ("median", "halving", "none")
TURN_SECONDS = 60.0  # that a process waits for its turn: asking takes one second at most
FAILURES = 3  # refused trials in a row that end a search


class Pruned(Exception):
    """A trial is behind the others; the message says where."""


def need_optuna() -> None:
    """Raise ValueError unless Optuna can be imported."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise ValueError(
            "comp search needs Optuna, which is not installed: `pip install optuna` (or the extra comp[hpo])"
        ) from None


@dataclass(frozen=True)
class Tried:
    """One trial as the journal has it."""

    number: int
    state: str
    """complete, pruned, refused, killed, running or waiting."""
    score: float | None
    """Of a complete trial; of a pruned one the best before it was stopped."""
    values: dict[str, Any]
    """Config key -> value."""
    share: float
    """Percent of its steps that it was trained for, as far as it reported."""
    note: str
    began: datetime | None
    ended: datetime | None

    @property
    def seconds(self) -> float | None:
        return None if self.began is None or self.ended is None else (self.ended - self.began).total_seconds()

    @property
    def finished(self) -> bool:
        """True when it counts in the budget."""
        return self.state in ("complete", "pruned")


class Study:
    """The trials of one search. `folder`: searches/NAME; `parallel`: other processes ask, too."""

    def __init__(self, folder: Path, space: Space, metric: str, *, seed: int, pruner: str, parallel: bool) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        journal = str(journal_of(folder))
        self.folder, self.space, self.metric, self.seed, self.parallel = folder, space, metric, seed, parallel
        made = {
            "median": lambda: optuna.pruners.MedianPruner(5, FIRST_MARK, n_min_trials=2),
            "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(FIRST_MARK, reduction_factor=3),
            "none": optuna.pruners.NopPruner,
        }
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(journal, JournalFileOpenLock(journal))),
            study_name=folder.name,
            direction="maximize" if self.higher_is_better else "minimize",
            pruner=made[pruner](),
            load_if_exists=True,
        )
        self._live: dict[int, Any] = {}
        """Optuna's own trials, of those that this process asked for."""

    @property
    def higher_is_better(self) -> bool:
        return METRICS[self.metric].higher_is_better

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Keep the other processes of this search waiting."""
        until = time.monotonic() + TURN_SECONDS
        while True:
            with suppress(ValueError):  # somebody else's turn
                holding = hold(self.folder / "turn")
                holding.__enter__()
                break
            if time.monotonic() > until:
                raise ValueError(f"{self.folder}: another process has kept its turn for {TURN_SECONDS:.0f} s; stop it")
            time.sleep(0.02)
        try:
            yield
        finally:
            holding.__exit__(None, None, None)

    def ask(self, trials: int | None, hours: float | None) -> tuple[int, dict[str, Any]] | None:
        """Begin a trial and return its number and values; None when the budget is spent.

        `trials`: finished ones, those under way counted in. `hours`: in which a finished trial ran. Raises ValueError
        when the first trial, or the last few, were refused.
        """
        import optuna

        with self.turn():
            before = self.tried()
            self._raise_if_hopeless(before)
            begun = [one for one in before if one.finished or one.state in ("running", "refused")]
            if trials is not None and sum(one.state != "refused" for one in begun) >= trials:
                return None
            if hours is not None and hours_of(before) >= hours:
                return None
            seed = int(digest([str(self.seed), str(len(begun))])[:8], 16)
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=self.parallel)
            trial = self._study.ask()
            values = self.space.ask(trial)
            trial.set_user_attr("asked", True)  # all its values are there
            self._live = {trial.number: trial}
            return trial.number, values

    def _raise_if_hopeless(self, before: Sequence[Tried]) -> None:
        ended = [one for one in before if one.finished or one.state == "refused"]
        last = ended[-FAILURES:]
        if not last or any(one.state != "refused" for one in last) or (len(last) < FAILURES and len(ended) > len(last)):
            return
        what = f"trial {last[-1].number} ({', '.join(f'{key}={value}' for key, value in last[-1].values.items())})"
        raise ValueError(f"{what} was refused: {last[-1].note}")

    def report(self, number: int, percent: int, score: float) -> None:
        """Note the best score of a trial up to a mark."""
        self._live[number].report(score, percent)

    def should_prune(self, number: int) -> bool:
        return bool(self._live[number].should_prune())

    def complete(self, number: int, score: float, note: str = "") -> None:
        self._note(number, note)
        self._study.tell(number, score)

    def prune(self, number: int, note: str) -> None:
        """End a trial that is behind, or whose training failed: the sampler learns that it was no good."""
        from optuna.trial import TrialState

        self._note(number, note)
        self._study.tell(number, state=TrialState.PRUNED)

    def refuse(self, number: int, note: str) -> None:
        """End a trial whose config cannot be trained; it does not count, and nothing is learned from it."""
        from optuna.trial import TrialState

        self._live[number].set_user_attr("refused", True)
        self._note(number, note)
        self._study.tell(number, state=TrialState.FAIL)

    def give_up(self, number: int) -> None:
        """End a trial that was stopped or killed; its values are tried again by the next one."""
        from optuna.trial import TrialState

        trial = self._study.get_trials(deepcopy=False)[number]
        self._study.tell(number, state=TrialState.FAIL)
        if trial.user_attrs.get("asked"):
            self._study.enqueue_trial(dict(trial.params))

    def give_up_running(self) -> list[int]:
        """Give up every trial that is under way. Only for where no process runs one any more."""
        left = [one.number for one in self.tried() if one.state == "running"]
        for number in left:
            self.give_up(number)
        return left

    def _note(self, number: int, note: str) -> None:
        if note:
            self._live[number].set_user_attr("note", note)

    def tried(self) -> list[Tried]:
        """Return all trials by number."""
        return [self._as_tried(trial) for trial in self._study.get_trials(deepcopy=False)]

    def _as_tried(self, trial: Any) -> Tried:
        state = trial.state.name.lower()
        if state == "fail":
            state = "refused" if trial.user_attrs.get("refused") else "killed"
        values, scores = self.space.told(trial.params), list(trial.intermediate_values.values())
        score = trial.value if state == "complete" else None
        if state == "pruned" and scores:
            score = max(scores) if self.higher_is_better else min(scores)
        share = 100.0 if state == "complete" else float(trial.last_step or 0)
        note = str(trial.user_attrs.get("note", ""))
        return Tried(trial.number, state, score, values, share, note, trial.datetime_start, trial.datetime_complete)

    def best(self) -> list[Tried]:
        """Return the complete trials, best first, each config once."""
        sign = -1.0 if self.higher_is_better else 1.0
        done = [one for one in self.tried() if one.state == "complete" and one.score is not None]
        found: dict[str, Tried] = {}
        for one in sorted(done, key=lambda one: (sign * (one.score or 0.0), one.number)):
            found.setdefault(str(sorted(one.values.items())), one)
        return list(found.values())

    def importances(self) -> dict[str, float]:
        """Return the share of the scores' spread that each key explains, largest first; {} with too few trials.

        fANOVA (Hutter et al. 2014) over the complete trials; PED-ANOVA (Watanabe et al. 2023) where a key is searched
        under a condition.
        """
        from optuna import importance

        scores = {one.score for one in self.tried() if one.state == "complete"}
        if len(scores) < 4 or len(self.space.rows) < 2:
            return {}
        conditional = any(row.when for row in self.space.rows.values())
        evaluator = (
            importance.PedAnovaImportanceEvaluator()
            if conditional
            else importance.FanovaImportanceEvaluator(seed=self.seed)
        )
        found = importance.get_param_importances(self._study, evaluator=evaluator)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


class Reporter:
    """Tells the study how a trial fares. `folds`: those it trains, in order."""

    def __init__(self, study: Study, number: int, folds: Sequence[int]) -> None:
        self._study, self._number, self._folds = study, number, list(folds)
        self._best: dict[int, float] = {}
        self._mark = 0

    def __call__(self, fold: int | str, share: float, score: float) -> None:
        """Note an evaluation: the share of the fold's steps done, and the score. Raises Pruned."""
        assert isinstance(fold, int)
        before = self._value()
        if is_better(self._study.metric, score, self._best.get(fold)):
            self._best[fold] = score
        percent = 100 * (self._folds.index(fold) + share) / len(self._folds)
        reached = round(percent / MARK)
        for mark in range(self._mark + 1, reached + 1):
            value = self._value() if mark == reached else before
            if value is not None:
                self._study.report(self._number, mark * MARK, value)
        fresh, self._mark = reached > self._mark, max(reached, self._mark)
        if fresh and percent < 100 - MARK / 2 and self._study.should_prune(self._number):
            raise Pruned(f"behind at {percent:.0f}% of its steps: {self._study.metric} {self._value():.5f}")

    def _value(self) -> float | None:
        """Mean over the folds so far of the best score of each."""
        return sum(self._best.values()) / len(self._best) if self._best else None


def journal_of(folder: Path) -> Path:
    """Return the journal; by its absolute path, since Optuna's locks are looked up from another folder."""
    return folder.absolute() / "journal.log"


def hours_of(tried: Sequence[Tried]) -> float:
    """Return the hours in which at least one of the finished trials ran."""
    spans = sorted((one.began, one.ended) for one in tried if one.finished and one.began and one.ended)
    total, until = 0.0, None
    for began, ended in spans:
        start = began if until is None else max(began, until)
        total += max(0.0, (ended - start).total_seconds())
        until = ended if until is None else max(ended, until)
    return total / 3600


def mend_journal(folder: Path) -> None:
    """Take away what a kill left: half a line at the journal's end, and its lock. Only for where no process uses it."""
    journal = journal_of(folder)
    for left in folder.glob("journal.log.*"):
        left.unlink(missing_ok=True)
    if journal.exists():
        whole = journal.read_bytes().rfind(b"\n") + 1
        if whole < journal.stat().st_size:
            os.truncate(journal, whole)
