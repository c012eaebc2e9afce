"""Train one fold: assemble its parts, fit, and write what it leaves."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from comp.data.batches import Labels, collate, longest_window
from comp.metrics import is_better
from comp.model.backbone import save_recipe
from comp.model.text_model import TextModel
from comp.optim.groups import group_table
from comp.optim.lookahead import Lookahead
from comp.runs import FoldFolder, full_disk_said, sweep, write_json, write_text
from comp.runtime import Stopper, open_runtime
from comp.stability.averaging import NoAverager
from comp.stability.consistency import twice
from comp.stability.prior_decay import PriorDecay
from comp.tracking import NullTracker, Tracker, Watched, best_values, open_tracker
from comp.training.assembly import (
    build_adversary,
    build_averager,
    build_fold_groups,
    build_fold_optimizer,
    build_supcon,
    finish_average,
)
from comp.training.cadence import Never
from comp.training.checkpoint import bytes_of, save_weights
from comp.training.compiling import compile_backbone
from comp.training.held_out import HeldOut
from comp.training.job import Link
from comp.training.lessons import Lesson, Stages
from comp.training.objective import Objective
from comp.training.plan import Fold, Plan, rows_of
from comp.training.ranks import OneRank
from comp.training.resume import Saver, closing, read_state, start_digest
from comp.training.trainer import Parts, TrainState, fit

__all__ = ["train_fold", "train_job"]


def train_job(plan: Plan, fold: Fold, link: Link) -> None:
    """Train one fold as a job of `map_jobs`, here or in another process."""
    runtime = open_runtime(plan.precision)
    plan = replace(plan, runtime=runtime, say=link.say, open_progress=link.open_progress)
    train_fold(plan, fold, link.stopper, link.ranks)


def train_fold(plan: Plan, fold: Fold, stopper: Stopper, ranks: OneRank) -> None:
    """Train one fold from seed, or from its saved state, to done.json; of several `ranks` the first writes."""
    saved = _read_saved(plan, fold) if ranks.first else None
    made = _assemble(plan, fold, saved, stopper, ranks)
    parts, held, saver, ranks = made.parts, made.held, made.saver, made.parts.ranks
    report, padding = None, _padding(plan, made)
    with closing(parts, held.kept):
        if plan.config.training.compile:
            report = compile_backbone(held.model, parts, made.longest[0])
        _say_what_comes(plan, fold, made, padding)
        state = TrainState() if made.saved is None else saver.restore(made.saved)
        if made.saved is not None:
            plan.say(f"fold {fold}: goes on after step {state.step}")
        state = fit(parts, state)
        averaged = _write_results(plan, fold, made, state)
        summary = _summary(state, averaged, saver.seconds) | {"padding": padding, "rows_scored": held.scored_share}
        parts.tracker.summary(summary)
    if fold != "full":
        also = "" if averaged is None else f"averaged {averaged:.5f}, "
        plan.say(
            f"fold {fold}: {plan.config.metric} best {state.best_score:.5f} at step {state.best_step} of {state.step}, "
            f"last {state.last_score:.5f}, {also}{state.num_evaluations} evaluations, {summary['seconds']:.0f} s"
        )
    if report is not None:
        plan.say(f"fold {fold}: {report.told(state.step * plan.config.training.passes)}")
    if ranks.first:
        folder = plan.folder.fold(fold)
        write_json(folder.done, summary)  # a fold is finished when this file is there
        folder.drop_state()


def _read_saved(plan: Plan, fold: Fold) -> dict[str, Any] | None:
    """Return the state to go on from; what an earlier sitting left and no state leads to is removed."""
    folder = plan.folder.fold(fold)
    sweep(folder.path)
    saved = read_state(folder, plan.say)
    if saved is None and folder.path.exists():
        plan.say(f"fold {fold}: was not finished and left no state to go on from, starts anew")
        shutil.rmtree(folder.path)
    folder.bad_batch.unlink(missing_ok=True)
    return saved


# --- before the first step -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Assembled:
    """A fold that is ready to be trained."""

    parts: Parts
    saver: Saver
    saved: dict[str, Any] | None
    """The state to go on from, as every rank has it."""
    held: HeldOut
    averager: NoAverager
    lesson: Lesson
    stages: Stages
    longest: list[NDArray[np.int64]]
    """The window that takes most memory."""


def _assemble(plan: Plan, fold: Fold, saved: dict[str, Any] | None, stopper: Stopper, ranks: OneRank) -> _Assembled:
    """Build all that `fit` works with; the order is that in which random numbers are drawn."""
    config, table, runtime, folder = plan.config, plan.table, plan.runtime, plan.folder.fold(fold)
    training, held_out = rows_of(fold, config, table, plan.folding)
    model, fresh = plan.ready.take(config, table, plan.tokenizer)
    model.pooler.fit(plan.encoded.documents(training))
    model.backbone.attend(training=plan.attention)
    start, weight_bytes = start_digest(model), bytes_of(model)
    ranks.check_same(start)
    ranks.reseed(config.training.seed)
    if config.training.shard:
        from comp.training.shards import shard  # which is not in the oldest torch

        ranks, fresh = shard(model, fresh, runtime.device)
    saved = ranks.hand_out(saved)
    model.to(runtime.device)
    plan.frozen.serve(model)
    if ranks.first:
        with full_disk_said(plan.folder.backbone):
            save_recipe(model.backbone, plan.tokenizer, plan.folder.backbone)
    optimizer = _build_optimizer(plan, folder, model, fresh, ranks)
    lesson = plan.pseudo.lesson(fold, table, training)
    stages = Stages(lesson, config, plan.encoded.lengths)
    averager, schedule = build_averager(config, model, stages)
    held = HeldOut(
        model,
        plan.encoded.head(len(table)),
        held_out,
        table=table,
        tasks=config.tasks,
        metrics=[config.metric_of(task) for task in config.tasks],
        runtime=runtime,
        best_path=folder.best,
        **config.evaluation.deciding,
        seed=config.training.seed,
        ranks=ranks,
    )
    tracker = Watched(_open_tracker(plan, fold, saved, ranks), partial(plan.watch, fold), stages.num_steps)
    scaler = ranks.grad_scaler(runtime)
    saver = Saver(
        folder,
        {
            "model": ranks.stateful(model),
            "optimizer": ranks.stateful(optimizer),
            "scaler": scaler,
            "averager": averager,
            "held_out": held,
        },
        start=start,
        weight_bytes=weight_bytes,
        mark=tracker.mark,
        best=held.kept,
        every=plan.save_every,
        seconds=saved["seconds"] if saved else 0.0,
        ranks=ranks,
    )
    labels = Labels(lesson.table.targets, lesson.table.weights, lesson.table.errors)
    rdrop = config.stability.rdrop
    objective = Objective(
        config.tasks,
        lesson.table,
        training,
        num_masks=max(1, config.model.multi_sample_dropout),
        rdrop=rdrop,
        supcon=build_supcon(config, table, training),
    )
    sizes = config.training.model_dump(include={"batch_size", "micro_batch_size", "batch_tokens"})
    longest = longest_window(lesson.all_rows, plan.encoded.lengths, **sizes)
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
        adversary=build_adversary(config, model),
        averager=averager,
        loss=objective.share,
        evaluate=held.evaluate,
        others=held.others,
        keep_best=held.keep_best,
        showing=optimizer.slow_weights if isinstance(optimizer, Lookahead) else nullcontext,
        is_better=partial(is_better, config.metric),
        cadence=stages.cadence() if fold != "full" else Never(),
        saver=saver,
        stop_asked=lambda: ranks.most(stopper.signal),
        tracker=tracker,
        progress=plan.open_progress(
            stages.num_steps,
            f"fold {fold}",
            done=saved["train"]["step"] if saved else 0,
            to_come=plan.to_come * stages.num_steps,
        ),
        epochs=stages.epochs,
        steps_per_epoch=stages.steps_per_epoch,
        lead_steps=stages.lead_steps,
        peak_lr=config.optimizer.lr,
        clip_norm=config.optimizer.clip_norm,
        patience=config.evaluation.patience,
        whole_batch=config.whole_batch,
        # On a CPU memory does not run out in words: the system ends the process.
        largest=longest if runtime.device.type == "cuda" else None,
        blame=lambda rows, about: folder.blame(lesson.table.ids[rows], about) if ranks.first else "",
        ranks=ranks,
    )
    return _Assembled(parts, saver, saved, held, averager, lesson, stages, longest)


def _build_optimizer(
    plan: Plan, folder: FoldFolder, model: TextModel, fresh: list[nn.Parameter], ranks: OneRank
) -> torch.optim.Optimizer:
    """Return the optimizer over the groups of the config's layout, which are said once a run and written."""
    config = plan.config
    groups = build_fold_groups(config, model, fresh)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    told = group_table(groups, frozen)
    if not plan.folder.finished_folds():
        plan.say(told)
        if model.backbone.shares_blocks and config.groups.layout != "unified":
            plan.say(
                "the blocks of this model are one block, used at every depth (ALBERT): groups.layout "
                f"'{config.groups.layout}' gives it the one rate of the table"
            )
    if ranks.first:
        write_text(folder.groups, told + "\n")
    optimizer = build_fold_optimizer(config, ranks.own_parts(groups))
    PriorDecay(optimizer.inner if isinstance(optimizer, Lookahead) else optimizer)
    return optimizer


def _open_tracker(plan: Plan, fold: Fold, saved: dict[str, Any] | None, ranks: OneRank) -> Tracker:
    if not ranks.first:
        return NullTracker()
    config, folder = plan.config, plan.folder.fold(fold)
    return open_tracker(
        config.tracking,
        competition=config.competition.name,
        run_name=plan.folder.name,
        fold=fold,
        folder=folder.path,
        metrics_path=folder.metrics,
        config_dict=config.model_dump(mode="json"),
        mark=saved["tracker"] if saved else None,
        best=best_values(config),
    )


def _padding(plan: Plan, made: _Assembled) -> dict[str, float | None]:
    """Return the share of padding among the tokens of "training" and "evaluation"; None: nothing is evaluated."""
    found = {"training": made.stages.padding(plan.encoded), "evaluation": made.held.padding()}
    if made.held.model.backbone.packs:
        return {name: None if share is None else 0.0 for name, share in found.items()}
    return found


def _say_what_comes(plan: Plan, fold: Fold, made: _Assembled, padding: dict[str, float | None]) -> None:
    rows, held_out = f"{len(made.lesson.rows):,} rows to train on", f"{len(made.held.rows):,} held out"
    plan.say(f"fold {fold}: {rows}, {held_out}, {made.stages.num_steps:,} steps")
    shares = [f"{share:.1%} of tokens in {name}" for name, share in padding.items() if share is not None]
    plan.say(f"fold {fold}: padding {', '.join(shares)}")
    if made.held.decision.warning:
        plan.say(f"fold {fold}: {made.held.decision.warning}")


# --- after the last step ---------------------------------------------------------------------------------------------


def _write_results(plan: Plan, fold: Fold, made: _Assembled, state: TrainState) -> float | None:
    """Write weights and out-of-fold rows; return the score of the averaged weights, None where there are none."""
    parts, held, folder = made.parts, made.held, plan.folder.fold(fold)
    ranks, model = parts.ranks, held.model
    held.kept.write()
    with parts.showing():
        weights = ranks.weights(model)
        if ranks.first:
            save_weights(folder.last, weights)
    tried = held if fold != "full" else None
    averaged = finish_average(made.averager, tried, folder.averaged, model, writes=ranks.first)
    if fold == "full":
        return averaged
    settled = held.settle(state.best_step)
    if settled is not None:
        state.best_step, state.best_score = settled
        plan.say(f"fold {fold}: the best weights are those of step {state.best_step}, from before the stop")
    if ranks.first:
        held.write(folder.oof, int(fold))
        held.write_history(folder.evaluations)
    return averaged


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
