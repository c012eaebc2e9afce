"""Assemble one fold, run the folds that are asked for, score them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from comp.config import Config
from comp.data.batches import Labels, collate, longest_window
from comp.data.folds import Folding, get_or_make_folds, train_rows, valid_rows
from comp.data.leaks import Evidence, OutOfFold, better_than_can_be, lint
from comp.data.tables import Table, read_competition
from comp.data.tokens import Encoded, encode
from comp.lock import hold
from comp.metrics import METRICS, is_better
from comp.model.backbone import load_tokenizer, save_recipe, vocabulary_digest
from comp.model.heads import plan_heads
from comp.model.text_model import TextModel, build_model
from comp.model.token_pooling import PoolerOutput
from comp.optim import build_optimizer
from comp.optim.groups import ParameterGroup, build_groups, group_table
from comp.optim.lookahead import Lookahead
from comp.progress import open_progress
from comp.runs import RunFolder, claim, full_disk_said, sweep, write_json, write_text
from comp.runtime import Runtime, Stopper, open_runtime, release_memory, seed_everything
from comp.stability.adversarial import AWP, FGM, NoAdversary
from comp.stability.averaging import EMA, SWA, NoAverager, Soup
from comp.stability.consistency import twice
from comp.stability.contrast import SupCon
from comp.stability.mixout import mix_
from comp.stability.prior_decay import PriorDecay
from comp.stability.reinit import reinit_blocks_, reinit_linear_
from comp.tracking import open_tracker
from comp.training import oof
from comp.training.cadence import Never
from comp.training.checkpoint import bytes_of, save_weights
from comp.training.held_out import HeldOut
from comp.training.lessons import NoPseudo, Stages, open_pseudo
from comp.training.objective import Objective
from comp.training.preflight import check_metric, check_rows, check_space, check_steps
from comp.training.resume import SaveEvery, Saver, parse_save_every, read_state, start_digest
from comp.training.trainer import Parts, Stopped, TrainState, fit

__all__ = ["Fold", "open_tables", "parse_folds", "rows_of", "run", "score_run"]

FOLDS = Path("folds")
Fold = int | str
Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What all folds of a run share."""

    config: Config
    folder: RunFolder
    table: Table
    folding: Folding | None
    """None when only the full-data model is trained."""
    pseudo: NoPseudo
    tokenizer: Any
    encoded: Encoded
    """The rows of the table, then pseudo rows."""
    runtime: Runtime
    save_every: SaveEvery
    say: Say


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
    tokenizer = load_tokenizer(config.model.backbone)
    coming = [folder.fold(fold) for fold in wanted if restart or not folder.fold(fold).done.exists()]

    def fits(table: Table) -> None:
        if coming:
            model, fresh = _model(config, table, tokenizer)
            _optimizer(config, _groups(config, model, fresh))
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
    about: dict[str, Any] = {"runtime": runtime.describe(), "backbone": config.model.backbone, "classes": table.classes}
    about["tokenizer"] = vocabulary_digest(tokenizer)
    claim(folder, config, marks, about, restart=wanted if restart else [])
    sweep(folder.path)
    plan = Plan(config, folder, table, folding, pseudo, tokenizer, encoded, runtime, every, say)
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


# --- one fold --------------------------------------------------------------------------------------------------------


def train_fold(plan: Plan, fold: Fold, stopper: Stopper) -> None:
    """Train one fold from seed, or from its saved state, to done.json."""
    config, table, runtime = plan.config, plan.table, plan.runtime
    folder = plan.folder.fold(fold)
    sweep(folder.path)
    saved = read_state(folder, plan.say)
    if saved is None and folder.path.exists():
        plan.say(f"fold {fold}: was not finished and left no state to go on from, starts anew")
        shutil.rmtree(folder.path)
    training, held_out = rows_of(fold, config, table, plan.folding)
    folder.bad_batch.unlink(missing_ok=True)  # of an earlier sitting
    seed_everything(config.training.seed)
    model, fresh = _model(config, table, plan.tokenizer)
    model.pooler.fit(plan.encoded.documents(training))
    start = start_digest(model)
    model.to(runtime.device)
    with full_disk_said(plan.folder.backbone):
        save_recipe(model.backbone, plan.tokenizer, plan.folder.backbone)

    groups = _groups(config, model, fresh)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    table_text = group_table(groups, frozen)
    if not plan.folder.finished_folds():
        plan.say(table_text)
        if model.backbone.shares_blocks and config.groups.layout != "unified":
            plan.say(
                "the blocks of this model are one block, used at every depth (ALBERT): groups.layout "
                f"'{config.groups.layout}' gives it the one rate of the table"
            )
    write_text(folder.groups, table_text + "\n")
    optimizer = _optimizer(config, groups)
    PriorDecay(optimizer.inner if isinstance(optimizer, Lookahead) else optimizer)

    lesson = plan.pseudo.lesson(fold, table, training)
    stages = Stages(lesson, config, plan.encoded.lengths)
    num_steps = stages.num_steps
    averager, schedule = _averager(config, model, stages)
    labels = Labels(lesson.table.targets, lesson.table.weights, lesson.table.errors)
    held = HeldOut(
        model,
        plan.encoded.head(len(table)),
        held_out,
        table=table,
        tasks=config.tasks,
        metrics=[config.metric_of(task) for task in config.tasks],
        runtime=runtime,
        best_path=folder.best,
    )
    tracker = open_tracker(
        config.tracking,
        competition=config.competition.name,
        run_name=plan.folder.name,
        fold=fold,
        folder=folder.path,
        metrics_path=folder.metrics,
        config_dict=config.model_dump(mode="json"),
        mark=saved["tracker"] if saved else None,
    )
    showing = optimizer.slow_weights if isinstance(optimizer, Lookahead) else nullcontext
    scaler = runtime.grad_scaler()
    saver = Saver(
        folder,
        {"model": model, "optimizer": optimizer, "scaler": scaler, "averager": averager, "held_out": held},
        start=start,
        weight_bytes=bytes_of(model),
        mark=tracker.mark,
        every=plan.save_every,
        seconds=saved["seconds"] if saved else 0.0,
    )
    progress = open_progress(num_steps, f"fold {fold}", done=saved["train"]["step"] if saved else 0)
    num_masks, rdrop = max(1, config.model.multi_sample_dropout), config.stability.rdrop
    objective = Objective(
        config.tasks, lesson.table, training, num_masks=num_masks, rdrop=rdrop, supcon=_supcon(config, table, training)
    )
    sizes = config.training.model_dump(include={"batch_size", "micro_batch_size"})
    on_gpu = runtime.device.type == "cuda"
    parts = Parts(
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        scaler=scaler,
        autocast=runtime.autocast,
        device=runtime.device,
        windows=stages.windows,
        collate=lambda rows: collate(plan.encoded, rows, labels),
        count=objective.count,
        outputs=twice(model) if rdrop else model,
        adversary=_adversary(config, model),
        averager=averager,
        loss=objective.share,
        evaluate=held.evaluate,
        others=held.others,
        keep_best=held.keep_best,
        showing=showing,
        is_better=partial(is_better, config.metric),
        cadence=stages.cadence() if fold != "full" else Never(),
        saver=saver,
        stop_asked=lambda: stopper.signal,
        tracker=tracker,
        progress=progress,
        epochs=stages.epochs,
        steps_per_epoch=stages.steps_per_epoch,
        lead_steps=stages.lead_steps,
        peak_lr=config.optimizer.lr,
        clip_norm=config.optimizer.clip_norm,
        patience=config.evaluation.patience,
        whole_batch=config.whole_batch,
        # On a CPU memory does not run out in words: the system ends the process.
        largest=longest_window(lesson.all_rows, plan.encoded.lengths, **sizes) if on_gpu else None,
        blame=lambda rows, about: folder.blame(lesson.table.ids[rows], about),
    )
    plan.say(f"fold {fold}: {len(lesson.rows):,} rows to train on, {len(held_out):,} held out, {num_steps:,} steps")
    try:
        state = TrainState() if saved is None else saver.restore(saved)
        if saved is not None:
            plan.say(f"fold {fold}: goes on after step {state.step}")
        state = fit(parts, state)
        with showing():
            save_weights(folder.last, model)
        averaged = _average(averager, held if fold != "full" else None, folder.averaged, model)
        if fold != "full":
            settled = held.settle(state.best_step)
            if settled is not None:
                state.best_step, state.best_score = settled
                plan.say(f"fold {fold}: the best weights are those of step {state.best_step}, from before the stop")
            held.write(folder.oof, int(fold))
            held.write_history(folder.evaluations)
        summary = _summary(state, averaged, saver.seconds)
        tracker.summary(summary)
    finally:
        progress.close()
        tracker.finish()
    if fold != "full":
        also = "" if averaged is None else f"averaged {averaged:.5f}, "
        plan.say(
            f"fold {fold}: {config.metric} best {state.best_score:.5f} at step {state.best_step} of {state.step}, "
            f"last {state.last_score:.5f}, {also}{state.num_evaluations} evaluations, {summary['seconds']:.0f} s"
        )
    write_json(folder.done, summary)  # a fold is finished when this file is there
    folder.drop_state()


def _summary(state: TrainState, averaged: float | None, seconds: float) -> dict[str, Any]:
    """Return what done.json and the trackers say of a finished fold; scores are null without held-out rows."""
    return {
        "steps": state.step,
        "seconds": round(seconds, 1),
        "train_seconds": round(state.train_seconds, 1),
        "eval_seconds": round(state.eval_seconds, 1),
        "tokens": state.num_tokens,
        "best": state.best_score,
        "best_step": state.best_step,
        "last": state.last_score,
        "averaged": averaged,
        "evaluations": state.num_evaluations,
        "stopped_early": state.stopped_early,
        "evaluation_share": round(state.eval_seconds / max(state.eval_seconds + state.train_seconds, 1e-9), 3),
        "tokens_per_second": round(state.num_tokens / max(state.train_seconds, 1e-9)),
    }


def rows_of(
    fold: Fold, config: Config, table: Table, folding: Folding | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (training rows, held-out rows) of a fold, cut to training.max_rows each."""
    if fold == "full":
        training, held_out = np.arange(len(table)), np.zeros(0, np.int64)
    else:
        assert folding is not None and isinstance(fold, int)
        training = train_rows(folding.fold, fold, folding.splitter)
        held_out = valid_rows(folding.fold, fold)
    limit = config.training.max_rows
    if limit is not None:
        generator = np.random.default_rng(config.training.seed)
        training = np.sort(generator.permutation(training)[:limit])
        held_out = np.sort(generator.permutation(held_out)[:limit])
    return training, held_out


def _model(config: Config, table: Table, tokenizer: Any) -> tuple[TextModel, list[nn.Parameter]]:
    """Return the model with re-initialisation and mixout in it, and the re-initialised parameters."""
    model, stability = config.model, config.stability
    built = build_model(
        model.backbone,
        tokenizer,
        pretrained=True,
        pooler=model.pooler.model_dump(),
        heads=plan_heads(config.tasks, table.classes),
        max_length=model.max_length,
        num_fields=len(table.texts),
        part=model.part,
        dropout=model.dropout,
        head_dropout=model.head_dropout,
        num_masks=max(1, model.multi_sample_dropout),
        with_vectors=stability.supcon.weight > 0,
        freeze_embeddings=model.freeze_embeddings,
        freeze_layers=model.freeze_layers,
        gradient_checkpointing=model.gradient_checkpointing,
        allow_pickle=model.allow_pickle,
    )
    fresh = reinit_blocks_(built.backbone, stability.reinit_layers)
    if stability.reinit_pooler:
        std = float(getattr(built.backbone.config, "initializer_range", 0.02))
        fresh += [
            p
            for module in built.modules()
            if isinstance(module, PoolerOutput)
            for p in reinit_linear_(module.dense, std)
        ]
    mix_(built.backbone, stability.mixout, fresh=fresh)  # after: what is random must not be mixed towards
    return built, fresh


def _groups(config: Config, model: TextModel, fresh: list[nn.Parameter]) -> list[ParameterGroup]:
    return build_groups(
        model,
        depth_of=model.depth_of,
        num_layers=model.backbone.num_layers,
        lr=config.optimizer.lr,
        head_lr=config.optimizer.head_lr,
        weight_decay=config.optimizer.weight_decay,
        prior_decay=config.stability.prior_decay,
        fresh=fresh,
        **config.groups.model_dump(),
    )


def _optimizer(config: Config, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    own = config.optimizer.model_dump(exclude={"lr", "head_lr", "weight_decay", "clip_norm"})
    return build_optimizer(groups=groups, **own)


def _averager(config: Config, model: TextModel, stages: Stages) -> tuple[NoAverager, Callable[[int], float]]:
    """Build what stability.averaging says; return it and the schedule, which SWA holds constant from its start."""
    chosen, schedule, steps, lead = config.stability.averaging, stages.schedule(), stages.last_steps, stages.lead_steps
    if chosen.name == "swa":
        start = max(1, math.ceil(steps * chosen.start_percent / 100))
        constant, from_here = chosen.lr_factor, lead + start
        average = SWA(model, start=from_here, interval=max(1, (steps - start) // (chosen.points - 1)))
        return average, schedule if constant is None else lambda step: schedule(step) if step < from_here else constant
    if chosen.name == "ema":
        decay = max(0.0, 1 - 10 / steps) if chosen.decay is None else chosen.decay
        return EMA(model, decay=decay, start=lead), schedule
    if chosen.name == "soup":
        return Soup(
            model, size=chosen.size, greedy=chosen.greedy, is_better=partial(is_better, config.metric)
        ), schedule
    return NoAverager(), schedule


def _average(averager: NoAverager, held: HeldOut | None, path: Path, model: TextModel) -> float | None:
    """Finish the average, score it on the held-out rows and write it; None where there is none or no such rows."""
    averager.finish(None if held is None else held.try_weights)
    if not averager.ready:
        return None
    with averager.swapped_in():
        save_weights(path, model)
        return None if held is None else held.keep_averaged()


def _adversary(config: Config, model: TextModel) -> NoAdversary:
    """Build what stability.adversarial says; the moved parameters are trained ones."""
    chosen = config.stability.adversarial
    own = chosen.model_dump(exclude={"name"})
    if chosen.name == "none":
        return NoAdversary()
    if chosen.name == "fgm":
        return FGM(model.backbone.model.get_input_embeddings().weight, **own)
    matrices = [p for block in model.backbone.blocks for p in block.parameters() if p.ndim > 1 and p.requires_grad]
    higher = METRICS[config.metric].higher_is_better
    return AWP(matrices, everything=list(model.parameters()), higher_is_better=higher, **own)


def _supcon(config: Config, table: Table, training: NDArray[np.int64]) -> SupCon | None:
    """Build the contrastive term of the first task; its kernel is as wide as the training targets say."""
    first, chosen = config.tasks[0], config.stability.supcon
    return SupCon(first.kind, table.targets[first.name][training], **chosen.model_dump()) if chosen.weight else None


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
