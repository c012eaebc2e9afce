"""The same steps twice, in two processes, compared bit by bit: `comp train --check-determinism`.

Two processes rather than one: what depends on addresses, on the order of sets, on how threads start or on kernels that
are chosen at the first call differs between processes, not within one. They work in a folder of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from comp import config_file
from comp.config import Config
from comp.data.folds import get_folds, train_rows
from comp.data.tables import read_competition
from comp.runs import RunFolder
from comp.training.crossval import FOLDS, parse_folds

__all__ = ["STEPS", "check_determinism", "compare", "shortened"]

STEPS = 20
NAME = "trial"
# Losses are otherwise read every ten steps, as a mean.
CODE = "from comp.training import trainer; trainer.LOG_STEPS = 1; from comp.cli import main; main()"
ADVICE = (
    "On a GPU set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the start, and training.precision fp32 to see whether half "
    "precision is to blame; on a CPU fix OMP_NUM_THREADS. A stopped run goes on all the same, but not to the same bits"
)
Launch = Callable[[Path, Sequence[str], dict[str, str]], None]


def shortened(config: Config, num_rows: int) -> Config:
    """Return the config of a run of STEPS steps, or of the first whole epoch beyond, of a fold that has `num_rows`."""
    rows = min(num_rows, STEPS * config.training.batch_size)
    short = config.training.model_copy(update={"max_rows": max(2, rows), "epochs": 1})
    steps_per_epoch = -(-rows // config.training.batch_size)
    short = short.model_copy(update={"epochs": -(-STEPS // steps_per_epoch)})
    schedule = config.schedule
    if (getattr(schedule, "warmup_steps", None) or 0) > STEPS:
        schedule = schedule.model_copy(update={"warmup_steps": STEPS})
    return config.model_copy(
        update={
            "training": short,
            "schedule": schedule,
            "evaluation": config.evaluation.model_copy(update={"every": None, "schedule": None, "patience": None}),
            "tracking": config.tracking.model_copy(update={"wandb": "off", "also": []}),
        }
    )


def check_determinism(
    config: Config, folds: str = "all", *, say: Callable[[str], None] = print, launch: Launch | None = None
) -> bool:
    """Train STEPS steps of the first of `folds` twice; say whether losses, gradients and weights are the same bits.

    Leaves nothing behind. `launch(folder, arguments, environment)` runs the command line in a folder; None = in a
    process of its own. Raises ValueError when the training itself fails.
    """
    fold, num_rows = _first(config, folds)
    found = []
    for trial in range(2):
        with tempfile.TemporaryDirectory(prefix="comp-determinism-") as place:
            _furnish(Path(place), shortened(config, num_rows))
            arguments = ["train", "--config", "trial.yaml", "--fold", str(fold), "--run", NAME, "--save-every", "never"]
            (launch or _process)(Path(place), arguments, {"PYTHONHASHSEED": str(trial)})
            found.append(_leavings(Path(place) / "runs" / NAME, fold))
    differs = compare(*found)
    steps, weights = len(found[0]["steps"]), len(found[0]["weights"])
    if differs is None:
        say(f"the same bits: {steps} steps twice, in two processes, {weights} tensors of weights, losses and gradients")
        return True
    say(f"not the same bits: {differs}. {ADVICE}")
    return False


def _first(config: Config, folds: str) -> tuple[int | str, int]:
    """Return the first of the folds, and how many rows it trains on; a fold file that is not there stays so."""
    fold = parse_folds(folds, config.folds.num_folds)[0]
    table, _ = read_competition(config.competition, config.tasks)
    if isinstance(fold, str):
        return fold, len(table)
    folding = get_folds(FOLDS / f"{config.fold_name}.csv", table, config.tasks, config.folds)
    return fold, len(train_rows(folding.fold, fold, folding.splitter))


def _furnish(place: Path, config: Config) -> None:
    """Make a folder that looks like the present one to a run, but for runs/ and folds/, which are its own."""
    for entry in Path.cwd().iterdir():
        if entry.name not in ("runs", "folds", "submissions", "blends"):
            (place / entry.name).symlink_to(entry)
    (place / "folds").mkdir()
    for file in Path("folds").glob(f"{config.fold_name}.*"):
        (place / "folds" / file.name).write_bytes(file.read_bytes())

    def absolute(path: str | None) -> str | None:
        return str(Path(path).resolve()) if path is not None and Path(path).exists() else path

    competition, model = config.competition, config.model
    tables = {name: absolute(getattr(competition, name)) for name in ("train", "test", "sample_submission")}
    own = config.model_copy(
        update={
            "competition": competition.model_copy(update=tables),
            "model": model.model_copy(update={"backbone": absolute(model.backbone)}),
        }
    )
    (place / "trial.yaml").unlink(missing_ok=True)
    (place / "trial.yaml").write_text(config_file.dump(own), encoding="utf-8")


def _process(place: Path, arguments: Sequence[str], environment: dict[str, str]) -> None:
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *arguments],
        cwd=place,
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith("comp: ")), lines[-1])
        raise ValueError(f"the trial of {STEPS} steps failed: {said.removeprefix('comp: ')}")


def _leavings(folder: Path, fold: int | str) -> dict[str, Any]:
    """Return "steps": step -> its loss and gradient norm, and "weights": name -> bytes of the last weights."""
    own = RunFolder(folder).fold(fold)
    lines = [json.loads(line) for line in own.metrics.read_text(encoding="utf-8").splitlines()]
    steps = {line["step"]: (line["train/loss"], line["train/grad_norm"]) for line in lines if "train/loss" in line}
    with safe_open(own.last, "np") as file:
        weights = {name: file.get_tensor(name).tobytes() for name in sorted(file.keys())}
    return {"steps": steps, "weights": weights}


def compare(one: dict[str, Any], two: dict[str, Any]) -> str | None:
    """Return where two trials part first, in words; None when they do not."""
    for step in sorted({*one["steps"], *two["steps"]}):
        first, second = one["steps"].get(step), two["steps"].get(step)
        if first is None or second is None:
            return f"step {step} is in one of the two only"
        for what, a, b in zip(("the loss", "the gradient norm"), first, second, strict=True):
            if a != b:
                return f"step {step} is the first to differ, {what} is {a!r} and {b!r}"
    names = sorted({*one["weights"], *two["weights"]})
    differing = [name for name in names if one["weights"].get(name) != two["weights"].get(name)]
    if differing:
        return f"losses agree, but {len(differing)} of {len(names)} tensors of weights differ, {differing[0]} first"
    return None
