"""Run the folds that are asked for, score them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from comp.config import Config
from comp.data.folds import Folding, get_or_make_folds
from comp.data.leaks import Evidence, OutOfFold, better_than_can_be, lint
from comp.data.lineage import check_lineage, read_lineage
from comp.data.tables import Table, read_competition
from comp.data.tokens import Encoded, encode
from comp.lock import hold
from comp.model.sources import load_tokenizer, vocabulary_digest
from comp.runs import RUNS, RunFolder, claim, read_json, sweep, write_json
from comp.runtime import open_runtime, release_memory
from comp.tracking import check_tracking
from comp.training import oof
from comp.training.assembly import build_fold_groups, build_fold_optimizer, choose_kernels, open_frozen
from comp.training.checkpoint import bytes_of
from comp.training.compiling import check_compiler
from comp.training.dispatch import How, Job, JobsFailed, Say, map_jobs, threads_each
from comp.training.lessons import open_pseudo
from comp.training.one_fold import train_job
from comp.training.plan import Fold, Plan, Ready, Watch, rows_of, unwatched
from comp.training.preflight import check_how, check_metric, check_parts, check_rows, check_space, check_steps
from comp.training.resume import SaveEvery, parse_save_every

__all__ = ["FOLDS", "Begun", "begin", "open_tables", "parse_folds", "run", "score_run"]

FOLDS = Path("folds")


def parse_folds(text: str, num_folds: int) -> list[Fold]:
    """Read "all", "full", "3" or "0,2". Raises ValueError that says what is allowed."""
    if text == "all":
        return list(range(num_folds))
    if text == "full":
        return ["full"]
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) < num_folds for part in parts) or len(set(parts)) != len(parts):
        raise ValueError(f"--fold '{text}': allowed are all, full, or numbers 0 to {num_folds - 1} like 0,2")
    return [int(part) for part in parts]


def run(
    config: Config,
    name: str,
    folds: str = "all",
    *,
    restart: bool = False,
    save_every: str = "auto",
    how: How = How(),  # noqa: B008 - frozen
    say: Say = print,
    root: Path = RUNS,
    watch: Watch = unwatched,
) -> oof.Scores | None:
    """Train the folds of a run that are not finished yet, then gather and score all finished ones.

    `save_every`: when the state of a fold is saved, from which it goes on after a stop (see `parse_save_every`).
    `how`: one fold after the other, or side by side. `say` takes lines for the user. `root`: the folder that holds the
    run's. `watch` is told of every evaluation. Returns the scores of the first task, or None when no fold was
    validated. Raises ValueError, before any training, for whatever does not fit, or when another process trains this
    run; Stopped after SIGTERM or Ctrl-C, the state saved; JobsFailed when folds that train side by side failed, after
    the others are done and scored.
    """
    options: dict[str, Any] = {"restart": restart, "save_every": save_every, "how": how, "say": say}
    with begin(config, name, folds, **options, root=root, watch=watch) as begun:
        try:
            map_jobs(train_job, begun.jobs, how, say=say, inherit=[begun.lock])
        except JobsFailed:
            begun.score()
            raise
        return begun.score()


@dataclass(frozen=True)
class Begun:
    """A run whose folder is made and held, its folds to be trained."""

    plan: Plan
    jobs: list[Job]
    """Of the folds that are not finished."""
    lock: int

    def score(self) -> oof.Scores | None:
        """Gather and score the finished folds, as `score_run`."""
        return score_run(self.plan.folder, self.plan.config, self.plan.table, self.plan.say)


@contextmanager
def begin(
    config: Config,
    name: str,
    folds: str,
    *,
    restart: bool,
    save_every: str,
    how: How,
    say: Say,
    root: Path = RUNS,
    watch: Watch = unwatched,
    of_many: bool = False,
) -> Iterator[Begun]:
    """Check everything, make the run folder and hold it; see `run`. `of_many`: jobs are named by run and fold."""
    every = parse_save_every(save_every)
    with hold(root / name) as lock:
        plan, todo = _prepare(config, RunFolder(root / name), folds, restart, every, how, say)
        plan = replace(plan, watch=watch)
        label = f"{name} " if of_many else ""
        shared = replace(plan, say=print)  # what is sent to other processes; they say by the link
        jobs = []
        for place, fold in enumerate(todo, 1):
            own = replace(shared, to_come=len(todo) - place if how.where == "serial" else 0)
            jobs.append(Job(f"{label}fold {fold}", (own, fold), plan.folder.path / "logs" / f"fold{fold}.log"))
        yield Begun(plan, jobs, lock)


def _prepare(
    config: Config, folder: RunFolder, folds: str, restart: bool, every: SaveEvery, how: How, say: Say
) -> tuple[Plan, list[Fold]]:
    """Return what all folds share, and which are to be trained."""
    wanted = parse_folds(folds, config.folds.num_folds)
    check_how(config, wanted, how)
    check_tracking(config.tracking)
    runtime, threads = open_runtime(config.training.precision), threads_each(how)
    if config.training.compile:
        check_compiler(runtime)
    tokenizer = load_tokenizer(config.model.backbone, config.model.new_tokens)
    coming = [folder.fold(fold) for fold in wanted if restart or not folder.fold(fold).done.exists()]

    ready = Ready()

    def fits(table: Table) -> None:
        if coming:
            model, fresh = ready.build(config, table, tokenizer)
            if config.training.shard:
                check_parts(model)
            build_fold_optimizer(config, build_fold_groups(config, model, fresh))
            check_space(config, coming, bytes_of(model), len(table), every, how.num)

    table, folding = open_tables(config, wanted, say, check=fits)
    check_lineage(config.model.backbone, folding, wanted, table)
    if how.where != "serial":  # each process builds its own
        ready = Ready()
        release_memory()
    rows = {fold: rows_of(fold, config, table, folding) for fold in wanted}
    for fold, own in rows.items():
        check_rows(config, table, fold, *own)
    pseudo = open_pseudo(config, table, folding, wanted, say)
    encoded = encode(tokenizer, pseudo.texts(table), **config.model.cutting)
    for fold, (training, _) in rows.items():
        check_steps(config, fold, pseudo.lesson(fold, table, training), encoded.lengths)
    marks = {"data": table.fingerprint(), **({"folds": folding.fingerprint} if folding else {}), **pseudo.marks}
    about: dict[str, Any] = {"threads": threads, "backbone": config.model.backbone, "classes": table.classes}
    about["tokenizer"] = vocabulary_digest(tokenizer)
    attention: str | None = None
    precision: str = config.training.precision
    if coming and how.where in ("serial", "processes"):  # the devices of a cluster, or of other ranks, may differ
        known = read_json(folder.manifest).get("kernels") if folder.manifest.exists() else None
        kernels, runtime = choose_kernels(config, runtime, known, say)
        about["kernels"], attention, precision = asdict(kernels), kernels.attention, runtime.precision
    describe = runtime.describe(threads)
    if how.where == "ranks":
        describe = f"{how.ranks.size} x {describe}"
    if how.where == "ray":  # whose devices this machine does not know
        describe = f"Ray ({', '.join(f'{key} {n:g}' for key, n in how.resources.items())}), {config.training.precision}"
    about["runtime"] = describe
    claim(folder, config, marks, about, restart=wanted if restart else [])
    sweep(folder.path)
    frozen = open_frozen(config, encoded, runtime, folder.path, say)
    plan = Plan(config, folder, table, folding, pseudo, tokenizer, encoded, runtime, every, say, ready=ready)
    plan = replace(plan, precision=precision, attention=attention, frozen=frozen)
    say(f"run {folder.path}: {len(table):,} rows, {int(encoded.offsets[-1]):,} tokens on {describe}")
    begun_with = read_json(folder.manifest).get("threads")
    if runtime.device.type == "cpu" and how.where != "ray" and begun_with not in (None, threads):
        say(
            f"the run was begun with {begun_with} threads a fold, this is {threads}: numbers may differ in their last "
            f"digits from those of a run in one go; OMP_NUM_THREADS={begun_with * max(1, how.num)} keeps them"
        )
    _say_cuts(encoded, config.model.max_length, say)
    todo = []
    for fold in wanted:
        if folder.fold(fold).done.exists():
            folder.fold(fold).drop_state()  # where a kill came just before that
            say(f"fold {fold}: finished before, skipped (--restart trains it again)")
        else:
            todo.append(fold)
    return plan, todo


def _say_cuts(encoded: Encoded, max_length: int, say: Say) -> None:
    """Say which texts are not read whole, or not in one piece."""
    if encoded.num_windowed:
        say(f"{encoded.num_windowed:,} texts are read as {len(encoded.offsets) - 1 - len(encoded):,} more windows")
    if encoded.num_cut:
        share = encoded.num_cut / len(encoded)
        say(f"{encoded.num_cut:,} texts ({share:.1%}) are cut at model.max_length {max_length} tokens")


def open_tables(
    config: Config, wanted: Sequence[Fold], say: Say, *, check: Callable[[Table], None] | None = None
) -> tuple[Table, Folding | None]:
    """Return the training table and its folds (None when only the full-data model is wanted); warn of leaks.

    `check` raises ValueError for a table that will not do, before a fold file is written.
    """
    table, test = read_competition(config.competition, config.tasks)
    if check is not None:
        check(table)
    folding = None
    if wanted != ["full"]:
        check_metric(config, table, slice(None), config.competition.train)
        folding = get_or_make_folds(FOLDS / f"{config.fold_name}.csv", table, config.tasks, config.folds)
    fold, lineage = None if folding is None else folding.fold, read_lineage(config.model.backbone)
    for leak in lint(Evidence(table, test, fold, config.folds.group, lineage=lineage)):
        say(leak.line)
    return table, folding


def score_run(folder: RunFolder, config: Config, table: Table, say: Say) -> oof.Scores | None:
    """Gather the finished folds, print each task's scores three ways and write scores.json."""
    finished = [fold for fold in folder.finished_folds() if isinstance(fold, int)]
    if not finished:
        return None
    classes = table.classes
    frame = oof.gather(folder, finished, seed=config.training.seed)
    scores = {
        task.name: oof.score(frame, task, config.metric_of(task), classes, complete=task is config.tasks[0])
        for task in config.tasks
    }
    first = scores[config.tasks[0].name]
    flatters = oof.keep_best_flattery(folder, finished, config.tasks[0], config.metric)
    about = {"keep_best_flatters": None if flatters is None else flatters[0]}
    tasks = {name: own.as_dict() for name, own in scores.items()}
    write_json(folder.scores, {**first.as_dict(), **about, "tasks": tasks})
    missing: Sequence[int] = sorted(set(range(config.folds.num_folds)) - set(finished))
    for name, own in scores.items():
        say(own.table(f"{name} {own.metric}" if len(scores) > 1 else None))
    task = config.tasks[0]
    target = frame[[f"target_{task.name}_{name}" for name in task.targets]].to_numpy()
    pred = frame[[f"pred_{task.name}_{name}" for name in oof.output_names(task, classes)]].to_numpy()
    if leak := better_than_can_be([OutOfFold(folder.name, task.kind, target, pred)]):
        say(f"warning: {leak}")
    if flatters is not None and flatters[1] > 1:
        say(f"choosing the best of {flatters[1]} evaluations a fold flatters `best` by about {flatters[0]:.5f}")
    elif flatters is None and config.evaluation.decide != "full":
        say(oof.FLATTERY_UNKNOWN.format(config.evaluation.decide))
    if missing:
        which = f"fold {missing[0]} is" if len(missing) == 1 else f"folds {', '.join(map(str, missing))} are"
        say(f"out-of-fold scores so far: {which} not trained yet")
    return first
