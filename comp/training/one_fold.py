"""Train one fold: assemble its parts, fit, and write what it leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from comp.config import Config
from comp.data.batches import Labels, collate, longest_window
from comp.data.folds import Folding, train_rows, valid_rows
from comp.data.tables import Table
from comp.data.tokens import Encoded
from comp.metrics import is_better
from comp.model.backbone import save_recipe
from comp.model.frozen import NoFrozenStates
from comp.model.text_model import TextModel
from comp.optim.groups import group_table
from comp.optim.lookahead import Lookahead
from comp.progress import OpenProgress, open_progress
from comp.runs import RunFolder, full_disk_said, sweep, write_json, write_text
from comp.runtime import Runtime, Stopper, open_runtime, random_state, seed_everything, set_random_state
from comp.stability.consistency import twice
from comp.stability.prior_decay import PriorDecay
from comp.tracking import NullTracker, Watched, best_values, open_tracker
from comp.training.assembly import (
    build_adversary,
    build_averager,
    build_fold_groups,
    build_fold_model,
    build_fold_optimizer,
    build_supcon,
    finish_average,
)
from comp.training.cadence import Never
from comp.training.checkpoint import bytes_of, save_weights
from comp.training.compiling import compile_backbone
from comp.training.held_out import HeldOut
from comp.training.job import Link, Say
from comp.training.lessons import NoPseudo, Stages
from comp.training.objective import Objective
from comp.training.ranks import OneRank
from comp.training.resume import SaveEvery, Saver, read_state, start_digest
from comp.training.trainer import Parts, TrainState, fit

__all__ = ["Fold", "Plan", "Ready", "Watch", "rows_of", "train_fold", "train_job", "unwatched"]

Fold = int | str
Watch = Callable[[Fold, float, float], None]
"""Fold, share of its steps done, score of an evaluation; what it raises ends the training."""


def unwatched(fold: Fold, share: float, score: float) -> None:
    """Nobody watches the evaluations."""


class Ready:
    """A model that was built to see whether it fits; the fold that comes first takes it rather than build another."""

    def __init__(self) -> None:
        self.built: tuple[TextModel, list[nn.Parameter]] | None = None
        self.random: dict[str, Any] = {}

    def build(self, config: Config, table: Table, tokenizer: Any) -> tuple[TextModel, list[nn.Parameter]]:
        """Build the model from the config's seed, and keep it."""
        seed_everything(config.training.seed)
        self.built = build_fold_model(config, table, tokenizer)
        self.random = random_state()
        return self.built

    def take(self, config: Config, table: Table, tokenizer: Any) -> tuple[TextModel, list[nn.Parameter]]:
        """Return the kept model, once, then new ones; every generator stands where building leaves it."""
        built, self.built = self.built or self.build(config, table, tokenizer), None
        set_random_state(self.random)
        return built


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
    watch: Watch = unwatched
    open_progress: OpenProgress = open_progress
    ready: Ready = field(default_factory=Ready)
    to_come: int = 0
    """Folds that are still to be trained after the present one: the time left for the whole run."""
    precision: str = "auto"
    """What the runtime is opened with where a fold is trained."""
    attention: str | None = None
    """Kernel of training passes where the config leaves it open; None = as transformers has it."""
    frozen: NoFrozenStates = field(default_factory=NoFrozenStates)


def train_job(plan: Plan, fold: Fold, link: Link) -> None:
    """Train one fold as a job of `map_jobs`, here or in another process."""
    runtime = open_runtime(plan.precision)
    plan = replace(plan, runtime=runtime, say=link.say, open_progress=link.open_progress)
    train_fold(plan, fold, link.stopper, link.ranks)


def train_fold(plan: Plan, fold: Fold, stopper: Stopper, ranks: OneRank) -> None:
    """Train one fold from seed, or from its saved state, to done.json; of several `ranks` the first writes."""
    config, table, runtime = plan.config, plan.table, plan.runtime
    folder = plan.folder.fold(fold)
    if ranks.first:
        sweep(folder.path)
    saved = read_state(folder, plan.say) if ranks.first else None
    if saved is None and folder.path.exists() and ranks.first:
        plan.say(f"fold {fold}: was not finished and left no state to go on from, starts anew")
        shutil.rmtree(folder.path)
    training, held_out = rows_of(fold, config, table, plan.folding)
    if ranks.first:
        folder.bad_batch.unlink(missing_ok=True)  # of an earlier sitting
    model, fresh = plan.ready.take(config, table, plan.tokenizer)
    model.pooler.fit(plan.encoded.documents(training))
    model.backbone.attend(training=plan.attention)
    start = start_digest(model)
    ranks.check_same(start)
    ranks.reseed(config.training.seed)
    weight_bytes = bytes_of(model)
    if config.training.shard:
        from comp.training.shards import shard  # which is not in the oldest torch

        ranks, fresh = shard(model, fresh, runtime.device)
    saved = ranks.hand_out(saved)
    model.to(runtime.device)
    plan.frozen.serve(model)
    if ranks.first:
        with full_disk_said(plan.folder.backbone):
            save_recipe(model.backbone, plan.tokenizer, plan.folder.backbone)

    groups = build_fold_groups(config, model, fresh)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    table_text = group_table(groups, frozen)
    if not plan.folder.finished_folds():
        plan.say(table_text)
        if model.backbone.shares_blocks and config.groups.layout != "unified":
            plan.say(
                "the blocks of this model are one block, used at every depth (ALBERT): groups.layout "
                f"'{config.groups.layout}' gives it the one rate of the table"
            )
    if ranks.first:
        write_text(folder.groups, table_text + "\n")
    optimizer = build_fold_optimizer(config, ranks.own_parts(groups))
    PriorDecay(optimizer.inner if isinstance(optimizer, Lookahead) else optimizer)

    lesson = plan.pseudo.lesson(fold, table, training)
    stages = Stages(lesson, config, plan.encoded.lengths)
    num_steps = stages.num_steps
    averager, schedule = build_averager(config, model, stages)
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
        **config.evaluation.deciding,
        seed=config.training.seed,
        ranks=ranks,
    )
    tracker = (
        NullTracker()
        if not ranks.first
        else open_tracker(
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
    )
    tracker = Watched(tracker, partial(plan.watch, fold), num_steps)
    showing = optimizer.slow_weights if isinstance(optimizer, Lookahead) else nullcontext
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
    begun = saved["train"]["step"] if saved else 0
    progress = plan.open_progress(num_steps, f"fold {fold}", done=begun, to_come=plan.to_come * num_steps)
    num_masks, rdrop = max(1, config.model.multi_sample_dropout), config.stability.rdrop
    objective = Objective(
        config.tasks,
        lesson.table,
        training,
        num_masks=num_masks,
        rdrop=rdrop,
        supcon=build_supcon(config, table, training),
    )
    sizes = config.training.model_dump(include={"batch_size", "micro_batch_size", "batch_tokens"})
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
        adversary=build_adversary(config, model),
        averager=averager,
        loss=objective.share,
        evaluate=held.evaluate,
        others=held.others,
        keep_best=held.keep_best,
        showing=showing,
        is_better=partial(is_better, config.metric),
        cadence=stages.cadence() if fold != "full" else Never(),
        saver=saver,
        stop_asked=lambda: ranks.most(stopper.signal),
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
        blame=lambda rows, about: folder.blame(lesson.table.ids[rows], about) if ranks.first else "",
        ranks=ranks,
    )
    report = None
    if config.training.compile:
        report = compile_backbone(model, parts, longest_window(lesson.all_rows, plan.encoded.lengths, **sizes)[0])
    plan.say(f"fold {fold}: {len(lesson.rows):,} rows to train on, {len(held_out):,} held out, {num_steps:,} steps")
    padding = {"training": stages.padding(plan.encoded), "evaluation": held.padding()}
    if model.backbone.packs:
        padding = {name: None if share is None else 0.0 for name, share in padding.items()}
    shares = [f"{share:.1%} of tokens in {name}" for name, share in padding.items() if share is not None]
    plan.say(f"fold {fold}: padding {', '.join(shares)}")
    if held.decision.warning:
        plan.say(f"fold {fold}: {held.decision.warning}")
    try:
        state = TrainState() if saved is None else saver.restore(saved)
        if saved is not None:
            plan.say(f"fold {fold}: goes on after step {state.step}")
        state = fit(parts, state)
        held.kept.write()
        with showing():
            weights = ranks.weights(model)
            if ranks.first:
                save_weights(folder.last, weights)
        tried = held if fold != "full" else None
        averaged = finish_average(averager, tried, folder.averaged, model, writes=ranks.first)
        if fold != "full":
            settled = held.settle(state.best_step)
            if settled is not None:
                state.best_step, state.best_score = settled
                plan.say(f"fold {fold}: the best weights are those of step {state.best_step}, from before the stop")
            if ranks.first:
                held.write(folder.oof, int(fold))
                held.write_history(folder.evaluations)
        summary = _summary(state, averaged, saver.seconds) | {"padding": padding, "rows_scored": held.scored_share}
        tracker.summary(summary)
    except Exception:
        held.kept.write()
        raise
    finally:
        progress.close()
        tracker.finish()
    if fold != "full":
        also = "" if averaged is None else f"averaged {averaged:.5f}, "
        plan.say(
            f"fold {fold}: {config.metric} best {state.best_score:.5f} at step {state.best_step} of {state.step}, "
            f"last {state.last_score:.5f}, {also}{state.num_evaluations} evaluations, {summary['seconds']:.0f} s"
        )
    if report is not None:
        plan.say(f"fold {fold}: {report.told(state.step * config.training.passes)}")
    if ranks.first:
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
