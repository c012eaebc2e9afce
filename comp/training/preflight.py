"""What a run is told before it starts, and before anything is written: steps, rows and metric that cannot work."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from comp.config import Config
from comp.data.tables import Table
from comp.metrics import evaluate
from comp.model.text_model import TextModel
from comp.runs import FoldFolder
from comp.training.job import How
from comp.training.lessons import Fold, Lesson, Stages
from comp.training.resume import FIRST_SIZE, SaveEvery

__all__ = [
    "check_how",
    "check_metric",
    "check_parts",
    "check_room",
    "check_rows",
    "check_shard",
    "check_space",
    "check_steps",
]

Rows = NDArray[np.int64]


def check_steps(config: Config, fold: Fold, lesson: Lesson, lengths: Rows) -> None:
    """Raise ValueError for a fold whose steps are too few for the schedule's warm-up or for Lookahead.

    `lengths`: tokens of each row of the lesson's table.
    """
    stages = Stages(lesson, config, lengths)
    stages.schedule()
    lookahead = getattr(config.optimizer, "lookahead", None)
    if config.optimizer.name == "radam_lookahead":
        lookahead = config.optimizer
    if lookahead is not None and lookahead.steps > stages.num_steps:
        raise ValueError(
            f"fold {fold} trains for {stages.num_steps} steps, but lookahead moves its slow weights, the ones that are "
            f"kept, every {lookahead.steps} steps only: they would stay as they are; lower its steps"
        )


def check_how(config: Config, wanted: Sequence[Fold], how: How) -> None:
    """Raise ValueError for what of the config does not go with the folds that are wanted, or with how they train."""
    if wanted == ["full"] and config.stability.averaging.name == "soup":
        raise ValueError(
            "stability.averaging 'soup' chooses by held-out rows, which --fold full has not; use swa or ema"
        )
    if how.where == "ranks" and config.whole_batch is not None:
        raise ValueError(
            f"{config.whole_batch} compares the rows of a whole batch, which cannot be shared out among the processes "
            "of torch.distributed.run; train folds side by side instead, with --jobs"
        )
    if how.where == "ranks" and config.evaluation.decide != "full":
        raise ValueError(
            f"evaluation.decide '{config.evaluation.decide}' scores rows one look after the other, which the processes "
            "of torch.distributed.run do not share; set it to full, or train folds side by side with --jobs"
        )
    if how.where != "serial" and config.model.cache_frozen:
        raise ValueError(
            "model.cache_frozen keeps the states for the folds of one process; set it to false, or leave out --jobs, "
            "--on and torch.distributed.run"
        )
    if how.where == "ranks" and config.training.compile:
        raise ValueError("training.compile does not work under torch.distributed.run; set it to false")
    check_shard(config, how.where == "ranks")


def check_shard(config: Config, together: bool) -> None:
    """Raise ValueError where training.shard cannot be; `together`: this is one of several processes on one fold."""
    if not config.training.shard:
        return
    if not together:
        raise ValueError(
            "training.shard parts a backbone among the processes of torch.distributed.run, and this one is alone: set "
            "it to false, or start `comp train` with torch.distributed.run"
        )
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:
        able = False
    else:
        able = all(hasattr(FSDPModule, f"set_{n}") for n in ("gradient_divide_factor", "force_sum_reduction_for_comms"))
    if not able:
        raise ValueError(f"training.shard needs torch 2.8 or newer, this is {torch.__version__}; set it to false")


def check_parts(model: TextModel) -> None:
    """Raise ValueError for a backbone that cannot be parted by its blocks."""
    if model.backbone.shares_blocks:
        raise ValueError(
            "training.shard parts a backbone block by block, but this one has a single block, used at every depth "
            "(ALBERT), and little to part; set it to false"
        )


def check_rows(config: Config, table: Table, fold: Fold, training: Rows, held_out: Rows) -> None:
    """Raise ValueError for a fold without rows, or whose held-out rows the metric is not defined on."""
    for rows, what in ((training, "train"), *(() if fold == "full" else ((held_out, "validate"),))):
        if not len(rows):
            raise ValueError(f"fold {fold} has no rows to {what} on; look at the fold file with `comp folds`")
    if fold != "full":
        check_metric(config, table, held_out, f"fold {fold}")


def check_metric(config: Config, table: Table, held_out: Rows | slice, where: str) -> None:
    """Raise ValueError where the metric is not defined on some rows: it would be after an epoch, otherwise."""
    task = config.tasks[0]
    targets = table.targets[task.name][held_out].astype(np.float64)
    classes = len(table.classes.get(task.name, ())) if task.kind == "multiclass" else targets.shape[1]
    probable = np.random.default_rng(0).dirichlet(np.ones(classes), len(targets))  # of any kind: within 0..1
    try:
        evaluate(config.metric, targets, probable, task.kind)
    except ValueError as fault:
        raise ValueError(f"{where}: {fault}") from None


def space_of(
    config: Config, folds: int, full: bool, weight_bytes: int, num_rows: int, every: SaveEvery, at_a_time: int = 1
) -> dict[str, int]:
    """Return what a run will write, name -> bytes: weights, the states of the folds `at_a_time`, predictions.

    `folds` with held-out rows keep their best and last weights, the `full` one its last; with averages one more each.
    Two states lie side by side, of each fold that trains. A soup keeps its checkpoints in the state.
    """
    averaging = config.stability.averaging
    averaged = averaging.name != "none"
    kept = folds * (2 + averaged) + full * (1 + averaged)
    average = {"none": 0, "swa": 1, "ema": 1}.get(averaging.name, getattr(averaging, "size", 0))
    racing = config.evaluation.decide == "race"  # the best weights lie in the state while they are not wholly scored
    states = 0 if every.unit == "never" else 2 * (FIRST_SIZE + average + racing) * min(at_a_time, folds + full)
    outputs = sum(len(task.targets) for task in config.tasks)
    return {
        "weights": kept * weight_bytes,
        "states": states * weight_bytes,
        "predictions": 8 * 8 * num_rows * outputs,  # three kinds of weights, and a few evaluations
    }


def check_space(
    config: Config,
    folders: Sequence[FoldFolder],
    weight_bytes: int,
    num_rows: int,
    every: SaveEvery,
    at_a_time: int = 1,
) -> None:
    """Raise ValueError when the disk has less room than the folds that are to be trained will take."""
    full = any(folder.path.name == "full" for folder in folders)
    needed = space_of(config, len(folders) - full, full, weight_bytes, num_rows, every, at_a_time)
    check_room(needed, folders)


def check_room(needed: dict[str, int], folders: Sequence[FoldFolder]) -> None:
    """Raise ValueError when the disk has less room than what is `needed` (name -> bytes) in some folders."""
    there = sum(file.stat().st_size for folder in folders for file in folder.path.glob("*") if file.is_file())
    place = next(above for above in (folders[0].path, *folders[0].path.absolute().parents) if above.exists())
    free, total = shutil.disk_usage(place).free, sum(needed.values())
    if total - there > free:
        parts = ", ".join(f"{name} {_size(size)}" for name, size in needed.items())
        raise ValueError(
            f"the run will take {_size(total)} ({parts}), of which {_size(there)} are there, but the disk of "
            f"{folders[0].path.parent} has {_size(free)} left; free some, train fewer folds at a time (--fold 0), or "
            "keep no states (--save-every never)"
        )


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**28 else f"{number / 2**20:.2f} MiB"
