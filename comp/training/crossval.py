"""Run the folds that are asked for, score them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comp.config import Config
from comp.data.folds import Folding, get_or_make_folds
from comp.data.leaks import Evidence, OutOfFold, better_than_can_be, lint
from comp.data.tables import Table, read_competition
from comp.data.tokens import encode
from comp.lock import hold
from comp.model.backbone import load_tokenizer, vocabulary_digest
from comp.runs import RunFolder, claim, read_json, sweep, write_json
from comp.runtime import Stopper, open_runtime, release_memory
from comp.training import oof
from comp.training.assembly import (
    build_fold_groups,
    build_fold_model,
    build_fold_optimizer,
    choose_kernels,
    open_frozen,
)
from comp.training.checkpoint import bytes_of
from comp.training.compiling import check_compiler
from comp.training.lessons import open_pseudo
from comp.training.one_fold import Fold, Plan, Say, rows_of, train_fold
from comp.training.preflight import check_metric, check_rows, check_space, check_steps
from comp.training.resume import parse_save_every
from comp.training.trainer import Stopped

__all__ = ["FOLDS", "open_tables", "parse_folds", "run", "score_run"]

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
    say: Say = print,
) -> oof.Scores | None:
    """Train the folds of a run that are not finished yet, then gather and score all finished ones.

    `save_every`: when the state of a fold is saved, from which it goes on after a stop (see `parse_save_every`). `say`
    takes lines for the user. Returns the scores of the first task, or None when no fold was validated. Raises
    ValueError, before any training, for whatever does not fit, or when another process trains this run; Stopped after
    SIGTERM or Ctrl-C, the state saved.
    """
    with hold(Path("runs") / name):
        return _run(config, name, folds, restart, save_every, say)


def _run(config: Config, name: str, folds: str, restart: bool, save_every: str, say: Say) -> oof.Scores | None:
    every = parse_save_every(save_every)
    wanted = parse_folds(folds, config.folds.num_folds)
    if wanted == ["full"] and config.stability.averaging.name == "soup":
        raise ValueError(
            "stability.averaging 'soup' chooses by held-out rows, which --fold full has not; use swa or ema"
        )
    folder = RunFolder(Path("runs") / name)
    runtime = open_runtime(config.training.precision)
    if config.training.compile:
        check_compiler(runtime)
    tokenizer = load_tokenizer(config.model.backbone)
    coming = [folder.fold(fold) for fold in wanted if restart or not folder.fold(fold).done.exists()]

    def fits(table: Table) -> None:
        if coming:
            model, fresh = build_fold_model(config, table, tokenizer)
            build_fold_optimizer(config, build_fold_groups(config, model, fresh))
            check_space(config, coming, bytes_of(model), len(table), every)

    table, folding = open_tables(config, wanted, say, check=fits)
    release_memory()
    rows = {fold: rows_of(fold, config, table, folding) for fold in wanted}
    for fold, own in rows.items():
        check_rows(config, table, fold, *own)
    pseudo = open_pseudo(config, table, folding, wanted, say)
    for fold, (training, _) in rows.items():
        check_steps(config, fold, pseudo.lesson(fold, table, training))
    encoded = encode(tokenizer, pseudo.texts(table), **config.model.cutting)
    marks = {"data": table.fingerprint(), **({"folds": folding.fingerprint} if folding else {}), **pseudo.marks}
    about: dict[str, Any] = {"backbone": config.model.backbone, "classes": table.classes}
    about["tokenizer"] = vocabulary_digest(tokenizer)
    attention = None
    if coming:
        known = read_json(folder.manifest).get("kernels") if folder.manifest.exists() else None
        kernels, runtime = choose_kernels(config, runtime, known, say)
        about["kernels"], attention = asdict(kernels), kernels.attention
    about["runtime"] = runtime.describe()
    claim(folder, config, marks, about, restart=wanted if restart else [])
    sweep(folder.path)
    frozen = open_frozen(config, encoded, runtime, folder.path, say)
    plan = Plan(config, folder, table, folding, pseudo, tokenizer, encoded, runtime, every, say, attention, frozen)
    say(f"run {folder.path}: {len(table):,} rows, {int(encoded.offsets[-1]):,} tokens on {runtime.describe()}")
    if encoded.num_windowed:
        say(f"{encoded.num_windowed:,} texts are read as {len(encoded.offsets) - 1 - len(encoded):,} more windows")
    if encoded.num_cut:
        share = encoded.num_cut / len(encoded)
        say(f"{encoded.num_cut:,} texts ({share:.1%}) are cut at model.max_length {config.model.max_length} tokens")
    for fold in wanted:
        if folder.fold(fold).done.exists():
            folder.fold(fold).drop_state()  # where a kill came just before that
            say(f"fold {fold}: finished before, skipped (--restart trains it again)")
        else:
            with Stopper() as stopper:
                train_fold(plan, fold, stopper)
            if stopper.signal is not None:  # it came while the fold was being written, after the last step
                raise Stopped(f"stopped after fold {fold}", stopper.signal)
            release_memory()
    return score_run(folder, config, table, say)


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
    for leak in lint(Evidence(table, test, None if folding is None else folding.fold, config.folds.group)):
        say(f"warning: {leak}")
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
    if missing:
        say(f"out-of-fold scores so far: folds {', '.join(map(str, missing))} are not trained yet")
    return first
