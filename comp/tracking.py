"""Where the numbers of a run go: metrics.jsonl always, Weights & Biases when it is wanted and there, others by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comp.config import Config, Tracking
from comp.metrics import METRICS
from comp.tracker import JsonlTracker, NullTracker, Tracker, Trackers, Watched, warn, without_secrets
from comp.tracking_others import Run, check_also, open_also
from comp.tracking_wandb import WandbTracker, start_wandb, wandb_mode

__all__ = [
    "JsonlTracker",
    "NullTracker",
    "Tracker",
    "Trackers",
    "WandbTracker",
    "Watched",
    "best_values",
    "check_tracking",
    "open_tracker",
    "wandb_mode",
    "without_secrets",
]


def best_values(config: Config) -> dict[str, str]:
    """Return name of a logged value -> "min" or "max", whichever is its best: W&B's summary of a curve."""
    scores = {"valid/score": config.metric, "valid/best": config.metric}
    scores |= {f"valid/{task.name}": config.metric_of(task) for task in config.tasks[1:]}
    found = {name: "max" if METRICS[metric].higher_is_better else "min" for name, metric in scores.items()}
    return {**found, "train/loss": "min", "train/grad_norm": "max", "train/lr": "max", "train/tokens_per_second": "max"}


def check_tracking(tracking: Tracking) -> None:
    """Raise ValueError when `tracking` asks for what is not there."""
    wandb_mode(tracking.wandb)
    check_also(tracking.also)


def open_tracker(
    tracking: Tracking,
    *,
    competition: str,
    run_name: str,
    fold: int | str,
    folder: Path,
    metrics_path: Path | None,
    config_dict: Mapping[str, Any],
    job_type: str = "train",
    mark: Mapping[str, Any] | None = None,
    best: Mapping[str, str] | None = None,
) -> Tracker:
    """Return the tracker of one fold: `metrics_path` as JSON lines (None = none), one W&B run unless that is off, and
    those of `tracking.also`.

    The run is `<run_name>-fold<k>` (or `<run_name>-full`; `<run_name>-eval` of the scores of all folds), its group
    `tracking.group` or `run_name`, its project `tracking.project` or `competition`; `config_dict` is its config. W&B's
    files go to `folder`/wandb. `mark`: of the tracker of an earlier sitting, to go on with. `best`: see `best_values`.
    Raises ValueError when `tracking` asks for what is not there.
    """
    check_tracking(tracking)
    mode, _ = wandb_mode(tracking.wandb)
    mark = mark or {}
    name = f"{run_name}-{fold}" if isinstance(fold, str) else f"{run_name}-fold{fold}"
    project, group = tracking.project or competition, tracking.group or run_name
    trackers: list[Tracker] = []
    if metrics_path is not None:
        trackers.append(JsonlTracker(metrics_path, mark.get("metrics_bytes")))
    if mode != "off":
        started = start_wandb(
            mode,
            folder,
            best or {},
            project=project,
            group=group,
            name=name,
            job_type=job_type,
            tags=list(tracking.tags),
            config=dict(config_dict),
            **({"id": mark["wandb_id"], "resume": "allow"} if "wandb_id" in mark else {}),
        )
        trackers.append(started)
    for other in tracking.also:
        try:
            trackers.append(open_also(other, Run(folder, project, group, name, config_dict, mark)))
        except Exception as fault:
            warn(f"{other} could not be started ({type(fault).__name__}: {fault}); training goes on without it")
    return Trackers(trackers)
