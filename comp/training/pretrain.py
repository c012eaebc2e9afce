"""Further pre-training of a backbone on texts alone: stages of corpora through the loop of `fit`, then a folder.

Each stage is a training of its own: it starts from the best weights of the one before, has its own held-out rows,
optimizer and schedule, and its own state to go on from. runs/NAME/backbone is there when all are done.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from comp.config import Config
from comp.config_pretrain import MLM, Pretrain
from comp.config_training import parse_every
from comp.data.batches import longest_window
from comp.data.folds import Folding, get_or_make_folds, valid_rows
from comp.data.lineage import Lineage, read_lineage, text_marks, write_lineage
from comp.data.tables import Table, read_competition
from comp.lock import hold
from comp.model.pretraining import write_backbone
from comp.model.sources import load_tokenizer, vocabulary_digest
from comp.optim.groups import build_groups, group_table
from comp.optim.lookahead import Lookahead
from comp.progress import open_progress
from comp.runs import FoldFolder, RunFolder, claim, digest, full_disk_said, read_json, sweep, versions, write_json
from comp.runtime import Runtime, Stopper, open_runtime, release_memory, seed_everything
from comp.stability.adversarial import NoAdversary
from comp.stability.averaging import NoAverager
from comp.stability.consistency import twice
from comp.tracking import open_tracker
from comp.training.assembly import build_fold_optimizer
from comp.training.cadence import Cadence, Never
from comp.training.checkpoint import BestWeights, bytes_of, load_weights, save_weights, step_of
from comp.training.crossval import FOLDS
from comp.training.early import Evaluation
from comp.training.job import Say
from comp.training.preflight import check_room
from comp.training.pretrain_stages import (
    Learner,
    Lesson,
    Stage,
    build_stages,
    load_learner,
    parse_fold,
    schedule_of,
    steps_of,
    windows_of,
)
from comp.training.resume import FIRST_SIZE, SaveEvery, Saver, closing, parse_save_every, read_state, start_digest
from comp.training.trainer import Parts, Stopped, TrainState, fit

__all__ = ["pretrain"]

REMEDY = (
    "a lower pretrain.lr or pretrain.head_lr, a longer warm-up (pretrain.schedule.warmup_percent), optimizer.clip_norm "
    "1.0 or training.precision fp32"
)
"""What to do about a training that is not finite: the rates of the section optimizer are not used here."""


@dataclass(frozen=True)
class Plan:
    """What all stages share."""

    config: Config
    options: Pretrain
    folder: RunFolder
    tokenizer: Any
    runtime: Runtime
    save_every: SaveEvery
    say: Say


def pretrain(
    config: Config,
    name: str,
    fold: str | None = None,
    *,
    restart: bool = False,
    save_every: str = "auto",
    say: Say = print,
) -> Path:
    """Pre-train the config's backbone as its section `pretrain` says; return the folder of the new one.

    `fold`: a number; only the training rows of that fold are read of the competition. What is finished is skipped, what
    was stopped goes on. Raises ValueError, before any training, for whatever does not fit; Stopped after SIGTERM or
    Ctrl-C, the state saved.
    """
    with hold(Path("runs") / name):
        return _run(config, name, fold, restart, save_every, say)


def _run(config: Config, name: str, fold: str | None, restart: bool, save_every: str, say: Say) -> Path:
    every, number = parse_save_every(save_every), parse_fold(fold, config)
    options = config.pretrain or Pretrain()
    folder = RunFolder(Path("runs") / name)
    runtime = open_runtime(config.training.precision)
    if config.model.new_tokens:
        raise ValueError(
            "comp pretrain keeps the tokenizer as it is: give model.new_tokens to the training that comes after it, "
            "and leave them out here (--set model.new_tokens=[])"
        )
    tokenizer = load_tokenizer(config.model.backbone)
    seed_everything(config.training.seed)
    learner, about_head = load_learner(config, options, tokenizer)
    table, test = read_competition(config.competition, config.tasks)
    stages, folding = build_stages(config, options, tokenizer, learner, table, test, number)
    plan = Plan(config, options, folder, tokenizer, runtime, every, say)
    for stage in stages:
        schedule_of(config, stage)
    weight_bytes = bytes_of(learner)
    if not folder.pretraining.done.exists() or restart:
        needed = {"weights": 3 * weight_bytes}  # of the stage before, of this one; the backbone
        needed["states"] = 0 if every.unit == "never" else 2 * FIRST_SIZE * weight_bytes
        check_room(needed, [folder.stage(stage.number) for stage in stages] + [FoldFolder(folder.backbone)])
    corpora = [stage.texts.sources for stage in stages]
    marks = {"data": digest([str([source["sha256"] for own in corpora for source in own])])}
    marks["pretrain"] = digest([str(number), vocabulary_digest(tokenizer)])
    if folding is not None:
        marks["folds"] = folding.fingerprint
    about: dict[str, Any] = {"runtime": runtime.describe(), "backbone": config.model.backbone, "fold": number}
    about |= {"corpora": corpora, "tokenizer": vocabulary_digest(tokenizer)}
    if folding is not None:
        get_or_make_folds(FOLDS / f"{config.fold_name}.csv", table, config.tasks, config.folds)
    if restart:
        shutil.rmtree(folder.path, ignore_errors=True)
    claim(folder, config, marks, about)
    sweep(folder.path)
    if folder.pretraining.done.exists():
        for stage in stages:
            folder.stage(stage.number).best.unlink(missing_ok=True)  # where a kill came just before that
        say(f"{folder.backbone}: finished before, skipped (--restart trains it again)")
        return folder.backbone
    lengths = sum(int(stage.lesson.encoded.offsets[-1]) for stage in stages)
    say(f"run {folder.path}: {options.objective.name}, {lengths:,} tokens an epoch on {runtime.describe()}")
    if about_head:
        say(f"head of the masked language model: {about_head}")
    if number is not None:
        say(f"fold {number}: of the competition only this fold's training rows are read, not the test table")
    start_bits = start_digest(learner)
    for stage in stages:
        own = folder.stage(stage.number)
        if own.done.exists():
            load_weights(own.best, learner)
            say(f"stage {stage.number}: finished before, skipped")
            continue
        with Stopper() as stopper:
            _train_stage(plan, stage, learner, start_bits, stopper)
        if stopper.signal is not None:
            raise Stopped(f"stopped after stage {stage.number}", stopper.signal)
        release_memory()
    return _finish(plan, stages, learner, table, folding, number)


# --- one stage -------------------------------------------------------------------------------------------------------


class HeldOutTexts:
    """Scores a learner on the held-out rows of a stage, and keeps the best weights; lower is better."""

    def __init__(self, learner: Learner, lesson: Lesson, runtime: Runtime, best_path: Path) -> None:
        self.learner, self.lesson, self.runtime, self.kept = learner, lesson, runtime, BestWeights(best_path)
        self.before: float | None = None
        """Score before the first step."""

    def evaluate(self) -> float:
        return self.lesson.score(self.learner, self.runtime)

    def keep_best(self, step: int) -> None:
        self.kept.keep(self.learner.state_dict(), step)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]


def _lower(score: float, best: float | None) -> bool:
    return score == score if best is None else score < best


def _train_stage(plan: Plan, stage: Stage, learner: Learner, start_bits: str, stopper: Stopper) -> None:
    """Train one stage from the weights in `learner`, or from its saved state, to done.json; its best weights are then
    in `learner`."""
    lesson, folder = stage.lesson, plan.folder.stage(stage.number)
    sweep(folder.path)
    saved = read_state(folder, plan.say)
    if saved is None and folder.path.exists():
        shutil.rmtree(folder.path)
    parts, held, saver = _assemble(plan, stage, learner, start_bits, saved, stopper)
    objective, num_held_out = plan.options.objective, stage.num_held_out
    scored = num_held_out > 0
    what = "blocks" if isinstance(objective, MLM) and objective.packing else "texts"
    trained = f"{len(stage.texts) - num_held_out:,} texts in {stage.num_rows:,} {what}"
    num_steps = steps_of(plan.config, stage)[0]
    plan.say(f"stage {stage.number}: {trained} to train on, {num_held_out:,} texts held out, {num_steps:,} steps")
    with closing(parts, held.kept):
        if saved is None:
            state = TrainState()
            held.before = held.evaluate() if scored else None
        else:
            state = saver.restore(saved)
            plan.say(f"stage {stage.number}: goes on after step {state.step}")
        state = fit(parts, state)
        if scored:
            held.kept.write()
        else:
            with parts.showing():
                save_weights(folder.best, learner, step=state.step)
        load_weights(folder.best, learner)  # where nothing is scored: Lookahead's slow ones
        after = held.evaluate() if scored else None
        summary = {
            "steps": state.step,
            "tokens": state.num_tokens,
            "seconds": round(saver.seconds, 1),
            "score": lesson.score_name if scored else None,
            "before": held.before,
            "best": after,
            "best_step": step_of(folder.best),  # of a run that was killed, it may be later than the state says
            "last": state.last_score,
            "evaluations": state.num_evaluations,
            "stopped_early": state.stopped_early,
            "tokens_per_second": round(state.num_tokens / max(state.train_seconds, 1e-9)),
            **lesson.others(),
        }
        parts.tracker.summary(summary)
    told = f"{lesson.score_name} {held.before:.4f} before, {after:.4f} after" if scored else "no rows held out to score"
    plan.say(f"stage {stage.number}: {told}, best at step {summary['best_step']} of {state.step}")
    write_json(folder.done, summary)
    folder.drop_state()


def _assemble(
    plan: Plan, stage: Stage, learner: Learner, start_bits: str, saved: dict[str, Any] | None, stopper: Stopper
) -> tuple[Parts, HeldOutTexts, Saver]:
    """Build all that `fit` works with; `saved`: the state to go on from."""
    config, options, runtime, lesson = plan.config, plan.options, plan.runtime, stage.lesson
    folder = plan.folder.stage(stage.number)
    seed_everything(config.training.seed)
    start = digest([start_bits, start_digest(learner)])
    learner.to(runtime.device)
    groups = build_groups(
        learner,
        depth_of=lambda name: 2 if learner.is_head(name) else 1,
        num_layers=1,
        lr=options.lr,
        head_lr=options.head_lr,
        weight_decay=config.optimizer.weight_decay,
    )
    if stage.number == 1:
        plan.say(group_table(groups))
    optimizer = build_fold_optimizer(config, groups)
    num_steps, epochs, per_epoch = steps_of(config, stage)
    held = HeldOutTexts(learner, lesson, runtime, folder.best)
    tracker = open_tracker(
        config.tracking,
        competition=config.competition.name,
        run_name=f"{plan.folder.name}-stage{stage.number}",
        fold="full",
        folder=folder.path,
        metrics_path=folder.metrics,
        config_dict=config.model_dump(mode="json"),
        job_type="pretrain",
        mark=saved["tracker"] if saved else None,
    )
    scaler = runtime.grad_scaler()
    saver = Saver(
        folder,
        {"model": learner, "optimizer": optimizer, "scaler": scaler, "held_out": held},
        start=start,
        weight_bytes=bytes_of(learner),
        mark=tracker.mark,
        best=held.kept,
        every=plan.save_every,
        seconds=saved["seconds"] if saved else 0.0,
    )

    def windows(epoch: int) -> list[list[NDArray[np.int64]]]:
        lesson.epoch = epoch
        return windows_of(config, stage, epoch)[: num_steps - epoch * per_epoch]

    cadence = Cadence.from_unit(
        num_steps=num_steps, steps_per_epoch=per_epoch, every=parse_every(options.every), table=None, start_percent=0
    )
    simcse = options.objective.name == "simcse"
    sizes: dict[str, Any] = {"batch_size": options.batch_size, "micro_batch_size": options.micro_batch_size}
    on_gpu = runtime.device.type == "cuda"
    parts = Parts(
        model=learner,
        optimizer=optimizer,
        schedule=schedule_of(config, stage),
        scaler=scaler,
        autocast=runtime.autocast,
        device=runtime.device,
        windows=windows,
        collate=lesson.collate,
        count=lesson.count,
        outputs=twice(learner) if simcse else learner,
        adversary=NoAdversary(),
        averager=NoAverager(),
        loss=lesson.share,
        evaluate=lambda best, whole: Evaluation(held.evaluate(), best),
        others=lesson.others,
        keep_best=held.keep_best,
        showing=optimizer.slow_weights if isinstance(optimizer, Lookahead) else nullcontext,
        is_better=_lower,
        cadence=cadence if stage.num_held_out else Never(),
        saver=saver,
        stop_asked=lambda: stopper.signal,
        tracker=tracker,
        progress=open_progress(num_steps, f"stage {stage.number}", done=saved["train"]["step"] if saved else 0),
        epochs=epochs,
        steps_per_epoch=per_epoch,
        peak_lr=options.lr,
        clip_norm=config.optimizer.clip_norm,
        patience=options.patience,
        whole_batch="pretrain.objective simcse" if simcse else None,
        remedy=REMEDY,
        largest=longest_window(np.arange(stage.num_rows), lesson.encoded.lengths, **sizes) if on_gpu else None,
    )
    return parts, held, saver


# --- the result ------------------------------------------------------------------------------------------------------


def _clean_fold(
    before: Lineage | None, stages: list[Stage], table: Table, folding: Folding | None, fold: int | None
) -> tuple[int | None, str | None]:
    """Return (fold, fingerprint of its file) of which no held-out text was read, neither now nor by the source; None
    where there is no such fold."""
    if fold is None or folding is None:
        read_all = any("train" in stage.corpus.tables for stage in stages)
        return (None, None) if before is None or read_all else (before.fold, before.about["folds"])
    if before is None or before.fold == fold:
        return fold, folding.fingerprint
    read = before.has_read(table)[valid_rows(folding.fold, fold)].any()
    return (None, None) if read else (fold, folding.fingerprint)


def _finish(
    plan: Plan, stages: list[Stage], learner: Learner, table: Table, folding: Folding | None, fold: int | None
) -> Path:
    """Write the backbone with its lineage, say it in the manifest, and let go of the weights of the stages."""
    config, folder = plan.config, plan.folder
    source = config.model.backbone
    before = read_lineage(source)
    done = [read_json(folder.stage(stage.number).done) for stage in stages]
    clean, of_folds = _clean_fold(before, stages, table, folding, fold)
    if fold is not None and clean is None:
        plan.say(
            f"warning: {source} has read held-out texts of fold {fold} before, so the new one counts as having too"
        )
    told = ("steps", "tokens", "score", "before", "best", "best_step")
    lineage = {
        "source": source,
        "objective": plan.options.objective.model_dump(mode="json"),
        "fold": clean,
        "folds": of_folds,
        "stages": [
            {
                "corpora": stage.texts.sources,
                "texts": len(stage.texts),
                "held_out": stage.num_held_out,
                **{key: own[key] for key in told},
            }
            for stage, own in zip(stages, done, strict=True)
        ],
        "before": None if before is None else before.about,
        "run": folder.name,
        "comp": versions()["comp"],
    }
    seen = [text_marks(stage.texts.columns) for stage in stages] + ([] if before is None else [before.seen])
    with full_disk_said(folder.backbone):
        write_backbone(folder.backbone, learner, plan.tokenizer, source)
    write_lineage(folder.backbone, lineage, np.concatenate(seen))
    write_json(folder.manifest, {**read_json(folder.manifest), "lineage": lineage})
    write_json(folder.pretraining.done, {"backbone": str(folder.backbone), "stages": done})
    for stage in stages:
        folder.stage(stage.number).best.unlink(missing_ok=True)
    plan.say(f"wrote {folder.backbone}; next: comp train ... --set model.backbone={folder.backbone}")
    return folder.backbone
