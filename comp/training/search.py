"""`comp search`: trials of a config over a space of its keys, then the best again under several seeds.

searches/NAME/  search.json (what is searched)  journal.log (the study)
                trials/trial-0007/ (an ordinary run, its log in trial.log; weights kept of the best only)
                finalists/trial-0007-seed1/ (ordinary runs)
                trials.csv  importance.png  best.yaml
Nothing of it lies in runs/, so that no list of runs is flooded by trials.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comp import config_file
from comp.config import Config, Tracking
from comp.config_file import Source
from comp.data.tables import read_competition
from comp.lock import hold
from comp.metrics import METRICS
from comp.runs import RunFolder, digest, read_json, write_json, write_text
from comp.runtime import is_ours, release_memory
from comp.search_space import Space, overrides_of, read_space, told
from comp.training import crossval
from comp.training.oof import Scores
from comp.training.seeds import SeedScores
from comp.training.study import PRUNERS, Pruned, Reporter, Study, Tried, mend_journal, need_optuna
from comp.training.trainer import NonFiniteError

__all__ = ["SEARCHES", "Finalist", "Order", "Search", "open_search", "search"]

SEARCHES = Path("searches")
Say = Callable[[str], None]
SideBySide = Callable[["Search", Study, Callable[[], None], Say, Sequence[int]], None]


@dataclass(frozen=True)
class Order:
    """What was asked for."""

    config: str
    space: str
    name: str
    overrides: Sequence[str] = ()
    fold: str = "0"
    trials: int | None = 20
    """Finished trials, pruned ones counted in; None = by hours."""
    hours: float | None = None
    """Hours in which trials ran, of all sittings; none begins afterwards."""
    jobs: int = 1
    finalists: int = 3
    """Best configs that are trained again; 0 = none."""
    seeds: Sequence[int] = (0, 1)
    """Of the finalists."""
    pruner: str = "median"
    seed: int = 0
    """Of the sampler."""
    keep: int = 1
    """Trials whose weights are kept."""

    @property
    def folder(self) -> Path:
        return SEARCHES / self.name


@dataclass(frozen=True)
class Finalist:
    """A config that was trained again."""

    tried: Tried
    scores: SeedScores

    @property
    def mean(self) -> float:
        mean, _, _ = self.scores.spread(self.scores.pooled)
        assert mean is not None
        return mean

    @property
    def deviation(self) -> float | None:
        return self.scores.spread(self.scores.pooled)[1]


@dataclass(frozen=True)
class Search:
    """An order, checked: what its trials share."""

    order: Order
    source: Source
    base: Config
    space: Space
    folds: Sequence[int]

    @property
    def higher_is_better(self) -> bool:
        return METRICS[self.base.metric].higher_is_better

    @property
    def fold(self) -> str:
        return ",".join(map(str, self.folds))

    def config(self, values: dict[str, Any]) -> Config:
        """Return the config of a trial."""
        config = self.source.config([*self.order.overrides, *overrides_of(values)])
        if config.tracking.group is None:
            config = config.model_copy(
                update={"tracking": config.tracking.model_copy(update={"group": f"search-{self.order.name}"})}
            )
        return config

    def study(self) -> Study:
        order = self.order
        return Study(
            order.folder, self.space, self.base.metric, seed=order.seed, pruner=order.pruner, parallel=order.jobs > 1
        )

    def run_of(self, number: int) -> RunFolder:
        """Return the run of a trial."""
        return RunFolder(self.order.folder / "trials" / f"trial-{number:04d}")


def open_search(order: Order) -> Search:
    """Read and check the config and the space. Raises ValueError with everything that is wrong; writes nothing."""
    if order.pruner not in PRUNERS:
        raise ValueError(f"--pruner '{order.pruner}': allowed are {', '.join(PRUNERS)}")
    for option, number, least in (
        ("trials", order.trials, 1), ("jobs", order.jobs, 1), ("finalists", order.finalists, 0),
        ("keep", order.keep, 0), ("seed", order.seed, 0),
    ):  # fmt: skip
        if number is not None and number < least:
            raise ValueError(f"--{option} {number}: at least {least} is needed")
    if order.hours is not None and not 0 < order.hours < float("inf"):
        raise ValueError(f"--hours {order.hours}: a number above 0 is needed")
    need_optuna()
    source = Source(order.config)
    base = source.config(order.overrides)
    folds = [fold for fold in crossval.parse_folds(order.fold, base.folds.num_folds) if isinstance(fold, int)]
    if not folds:
        raise ValueError("--fold full has no held-out rows to score a trial by; use numbers like 0,2, or all")
    return Search(order, source, base, read_space(order.space, source, order.overrides), folds)


def search(
    found: Search, *, restart: bool = False, side_by_side: SideBySide | None = None, say: Say = print
) -> tuple[list[Tried], list[Finalist]]:
    """Run the trials that the budget has left, then the finalists that are not trained yet.

    Returns all trials by number, and the finalists, best first. `restart`: forget what is there. `side_by_side`: runs
    the trials in several processes (see search_workers.py); None = here, one after the other. Raises ValueError
    when another process is at this search, or what is there was made from something else; Stopped after SIGTERM or
    Ctrl-C: the same command goes on, and tries again what was under way.
    """
    order = found.order
    with hold(order.folder) as lock:
        fresh = _claim(found, restart)
        try:
            mend_journal(order.folder)
            study = found.study()
            _give_up(found, study, say)
            if side_by_side is None:
                work(found, study, say)
            else:
                side_by_side(found, study, lambda: _give_up(found, study, say), say, [lock])
        except ValueError:
            if fresh and not any(one.finished for one in found.study().tried()):
                shutil.rmtree(order.folder)  # refused before anything was done, as if it had not been asked for
            raise
        return study.tried(), _finalists(found, study, say)


def _claim(found: Search, restart: bool) -> bool:
    """Make searches/NAME, or make sure that the one there searches the same; tell whether it is new."""
    order, path = found.order, found.order.folder / "search.json"
    plain = found.base.model_copy(update={"tracking": Tracking()})
    table, _ = read_competition(found.base.competition, found.base.tasks)
    rows = [f"{key}: {row.model_dump_json()}" for key, row in found.space.rows.items()]
    marks = {
        "config": digest([config_file.dump(plain)]),
        "space": digest(rows),
        "data": table.fingerprint(),
        "--fold": found.fold,
        "--pruner": order.pruner,
        "--seed": str(order.seed),
    }
    if restart:
        shutil.rmtree(order.folder, ignore_errors=True)
    if path.exists():
        known = read_json(path, "marks")["marks"]
        changed = [part for part, mark in marks.items() if known.get(part) != mark]
        if changed:
            raise ValueError(
                f"{order.folder} was made from another {' and another '.join(changed)}, whose scores are not "
                "comparable; name a new search with --name, or start this one anew with --restart"
            )
        return False
    write_json(path, {"marks": marks, "order": asdict(order)})
    return True


def _give_up(found: Search, study: Study, say: Say) -> None:
    """Mark the trials that nobody runs any more as killed, and remove what they left."""
    for number in study.give_up_running():
        shutil.rmtree(found.run_of(number).path, ignore_errors=True)
        say(f"trial {number}: was stopped or killed; it is done again")


# --- trials ----------------------------------------------------------------------------------------------------------


def _go_on() -> None:
    """Stop at nothing."""


def work(found: Search, study: Study, say: Say, heed: Callable[[], None] = _go_on) -> None:
    """Run trial after trial until the budget is spent; `heed` raises Stopped where the next is not to begin."""
    order = found.order
    while (asked := study.ask(order.trials, order.hours)) is not None:
        number, values = asked
        try:
            heed()
            _try(found, study, number, values)
        except BaseException:
            study.give_up(number)
            shutil.rmtree(found.run_of(number).path, ignore_errors=True)
            raise
        with study.turn():
            _drop_weights(found, study)
        tried = study.tried()
        say(_said(tried[number], found, sum(one.finished for one in tried)))
        release_memory()


def _try(found: Search, study: Study, number: int, values: dict[str, Any]) -> None:
    """Train one trial and tell the study how it went."""
    same = [one for one in study.best() if one.values == values]
    if same and same[0].score is not None:  # the same seed: the same bits
        study.complete(number, same[0].score, f"the values of trial {same[0].number}")
        return
    folder, lines = found.run_of(number), list[str]()
    reporter = Reporter(study, number, found.folds)
    try:
        scores = crossval.run(
            found.config(values),
            folder.name,
            found.fold,
            save_every="never",
            root=folder.path.parent,
            watch=reporter,
            say=lines.append,
        )
        assert scores is not None
        study.complete(number, score_of(scores))
    except Pruned as pruned:
        study.prune(number, str(pruned))
    except NonFiniteError as fault:
        study.prune(number, f"diverged: {str(fault).partition(';')[0]}")
    except ValueError as fault:
        if not is_ours(fault):
            raise
        study.refuse(number, str(fault))
    finally:
        if folder.path.exists():
            write_text(folder.path / "trial.log", "".join(f"{line}\n" for line in lines))


def score_of(scores: Scores) -> float:
    """Return what a trial is judged by: all held-out rows, by averaged weights where there are such, else the best."""
    score = scores.averaged_pooled if scores.averaged_pooled is not None else scores.pooled
    assert score is not None, "the first task has every target"
    return score


def _drop_weights(found: Search, study: Study) -> None:
    """Remove the weights of all finished trials but the best few."""
    kept = {one.number for one in study.best()[: found.order.keep]}
    for one in study.tried():
        if one.state in ("complete", "pruned", "refused") and one.number not in kept:
            drop_weights(found.run_of(one.number))


def drop_weights(folder: RunFolder) -> None:
    """Remove what a run needs to predict; its scores, curves and out-of-fold rows stay."""
    for file in folder.path.glob("fold*/*.safetensors"):
        file.unlink(missing_ok=True)
    shutil.rmtree(folder.backbone, ignore_errors=True)


def _said(one: Tried, found: Search, finished: int) -> str:
    """Return the line that a trial ends with."""
    budget = f"/{found.order.trials}" if found.order.trials is not None else ""
    score = "" if one.score is None else f" {found.base.metric} {one.score:.5f}"
    values = " ".join(f"{key}={told(value)}" for key, value in one.values.items())
    about = f"; {one.note}" if one.note and one.state != "pruned" else ""
    state = f"pruned at {one.share:.0f}%" if one.state == "pruned" else one.state
    took = "" if one.seconds is None else f", {one.seconds:.0f} s"
    return f"[{finished}{budget}] trial {one.number}: {state}{score}{took}{about}  {values}"


# --- finalists -------------------------------------------------------------------------------------------------------


def _finalists(found: Search, study: Study, say: Say) -> list[Finalist]:
    """Train the best configs again under each seed; return them best first."""
    order, best = found.order, study.best()[: found.order.finalists]
    if not best or not order.seeds:
        return []
    say(f"finalists: trials {', '.join(str(one.number) for one in best)} again under seeds {_list(order.seeds)}")
    root, done = order.folder / "finalists", []
    for one in best:
        config = found.config(one.values)
        scores: dict[int, Scores] = {}
        for seed in order.seeds:
            own = config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})
            name, lines = f"trial-{one.number:04d}-seed{seed}", list[str]()
            made = crossval.run(own, name, found.fold, root=root, say=lines.append)
            assert made is not None
            write_text(root / name / "trial.log", "".join(f"{line}\n" for line in lines))
            scores[seed] = made
            say(f"  trial {one.number}, seed {seed}: {found.base.metric} {score_of(made):.5f}")
            release_memory()
        judged: dict[int, float | None] = {seed: score_of(own) for seed, own in scores.items()}
        last = {seed: own.last_pooled for seed, own in scores.items()}
        done.append(Finalist(one, SeedScores(found.base.metric, judged, last)))
    sign = -1.0 if found.higher_is_better else 1.0
    done.sort(key=lambda finalist: sign * finalist.mean)
    for finalist in done[1:]:
        for seed in order.seeds:
            drop_weights(RunFolder(root / f"trial-{finalist.tried.number:04d}-seed{seed}"))
    return done


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
