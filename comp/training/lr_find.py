"""The learning-rate range test: `comp lr-find`. Nothing is written, and no generator is moved.

Smith 2015, arXiv:1506.01186, lets the rate grow over one short training and reads off where the loss falls and where it
stops to. Here it grows exponentially, the loss is smoothed by a bias-corrected moving average, the test ends where that
diverges, and the suggestion is the lower of two common readings (both fastai's): the rate of the steepest descent, and
a tenth of the rate at the minimum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from comp.config import Config
from comp.data.batches import Batch, Labels, collate
from comp.data.folds import get_folds
from comp.data.tables import read_competition
from comp.data.tokens import encode
from comp.metrics import is_better
from comp.model.sources import load_tokenizer
from comp.optim.lookahead import Lookahead
from comp.progress import open_progress
from comp.runtime import open_runtime, random_state, release_memory, seed_everything, set_random_state
from comp.stability.adversarial import NoAdversary
from comp.stability.averaging import NoAverager
from comp.stability.consistency import twice
from comp.stability.prior_decay import PriorDecay
from comp.tracking import NullTracker
from comp.training.assembly import build_fold_groups, build_fold_model, build_fold_optimizer, build_supcon
from comp.training.cadence import Never
from comp.training.crossval import FOLDS
from comp.training.early import Evaluation
from comp.training.lessons import Lesson, Stages
from comp.training.objective import Objective
from comp.training.plan import rows_of
from comp.training.preflight import check_shard
from comp.training.trainer import NonFiniteError, Parts, Stopped, TrainState, fit

__all__ = ["ADVICE", "RANGES", "Curve", "lr_find", "range_of", "read_curve", "smooth"]

RANGES: dict[str, tuple[float, float]] = {"madgrad": (1e-6, 1e-1), "adafactor": (1e-5, 1.0), "class": (1e-6, 1.0)}
USUAL = (1e-7, 1e-2)
ADVICE = {
    "madgrad": "MADGRAD wants a sweep of its own, its best rates differ from Adam's (its authors: 5e-3 for RoBERTa's "
    "pre-training, 2.5e-2 for translation), a lower weight_decay, often 0, and in NLP clipping helps",
    "adafactor": "rates of Adafactor are relative to the size of each tensor: not to be compared with Adam's",
}
BETA = 0.9
WARM = 5  # first steps whose average is of too few losses to read a slope from
DIVERGED = 3.0  # times the best, or the way down to it, above the best
Say = Callable[[str], None]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What a range test found."""

    name: str
    lrs: Numbers
    """(S,) learning rate of each step done."""
    losses: Numbers
    """(S,) mean loss of the step's batch, before its update."""
    smoothed: Numbers
    """(S,)"""
    steepest: float | None
    """Rate of the steepest descent; None = the loss never fell."""
    minimum: float | None
    """Rate at the lowest smoothed loss."""
    diverged: bool

    @property
    def suggestion(self) -> float | None:
        """The lower of the steepest descent's rate and a tenth of the minimum's."""
        return None if self.steepest is None or self.minimum is None else min(self.steepest, self.minimum / 10)

    def table(self, rows: int = 20) -> str:
        """Return the curve as text, some `rows` of it, and the readings."""
        lines = [f"{self.name:<12}{'lr':>10}{'loss':>10}{'smoothed':>10}"]
        last = len(self.lrs) - 1
        for place in sorted({round(number * last / (rows - 1)) for number in range(rows)}):
            numbers = f"{self.lrs[place]:>10.1e}{self.losses[place]:>10.4f}{self.smoothed[place]:>10.4f}"
            lines.append(f"{'':<12}{numbers}")
        end = "diverged" if self.diverged else "did not diverge"
        if self.suggestion is None or self.steepest is None or self.minimum is None:
            lines.append(f"the loss {end} and never fell: no suggestion; begin lower (--lowest), or look at the data")
            return "\n".join(lines)
        lines.append(
            f"steepest descent at {self.steepest:.1e}, minimum at {self.minimum:.1e}, the loss {end}; suggestion: "
            f"optimizer.lr={self.suggestion:.1e} (the lower of steepest descent and minimum / 10)"
        )
        if not self.diverged:
            lines.append("the end of the range was reached before the loss diverged: look further with --highest")
        return "\n".join(lines)


def range_of(config: Config, lowest: float | None = None, highest: float | None = None) -> tuple[float, float]:
    """Return the rates to begin and end with: those given, or the optimizer's own. Raises ValueError when empty."""
    usual = RANGES.get(config.optimizer.name, USUAL)
    low, high = lowest if lowest is not None else usual[0], highest if highest is not None else usual[1]
    if not 0 < low < high < math.inf:
        raise ValueError(f"--lowest {low:g}, --highest {high:g}: rates are above 0, and the lowest below the highest")
    return low, high


def smooth(losses: Numbers, beta: float = BETA) -> Numbers:
    """Return the moving average of (S,) losses, corrected for its start from 0."""
    average, found = 0.0, []
    for step, loss in enumerate(losses.tolist(), 1):
        average = beta * average + (1 - beta) * loss
        found.append(average / (1 - beta**step))
    return np.array(found)


def has_diverged(smoothed: Numbers) -> bool:
    """Tell whether the last of (S,) smoothed losses is far above the best, or not finite. Losses may be negative."""
    last, best = float(smoothed[-1]), float(np.nanmin(smoothed))
    scale = max(abs(best), float(smoothed[min(WARM, len(smoothed)) - 1]) - best)
    return not math.isfinite(last) or (len(smoothed) > WARM and last > best + DIVERGED * scale)


def read_curve(name: str, lrs: Numbers, losses: Numbers, *, diverged: bool) -> Curve:
    """Return the curve of (S,) rates and losses with its readings; losses that are not finite are cut off."""
    finite = len(losses) if np.isfinite(losses).all() else int(np.argmin(np.isfinite(losses)))
    lrs, losses = lrs[:finite], losses[:finite]
    smoothed = smooth(losses)
    steepest = minimum = None
    start = min(WARM, max(finite - 1, 0))
    lowest = start + int(np.argmin(smoothed[start:])) if finite else 0
    if lowest > start:
        slopes = np.gradient(smoothed, np.log(lrs))[start : lowest + 1]
        if slopes.min() < 0:
            steepest, minimum = float(lrs[start + int(np.argmin(slopes))]), float(lrs[lowest])
    return Curve(name, lrs, losses, smoothed, steepest, minimum, diverged)


class _Recorder(NoAverager):
    """Notes the loss of every step, and when to stop. It hears of a step where an averager would."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.pending, self.losses = objective, 0.0, list[float]()
        self.diverged = False

    def count(self, rows: NDArray[np.int64]) -> dict[str, float]:
        self.pending = 0.0  # a window begins, or begins again where memory ran out
        return self.objective.count(rows)

    def share(self, outputs: dict[str, torch.Tensor], batch: Batch, items: dict[str, float]) -> torch.Tensor:
        loss = self.objective.share(outputs, batch, items)
        self.pending += float(loss.detach())
        return loss

    def update(self, step: int) -> None:
        self.losses.append(self.pending)
        self.diverged = has_diverged(smooth(np.array(self.losses)))


class _Unsaved:
    """Saves nothing."""

    def due(self, step: int, evaluated: bool) -> bool:
        return False

    def save(self, state: TrainState) -> bool:
        return False


def lr_find(
    config: Config,
    *,
    steps: int = 100,
    fold: int = 0,
    lowest: float | None = None,
    highest: float | None = None,
    say: Say = print,
) -> Curve:
    """Train `steps` steps on the training rows of a fold with a rate that grows from `lowest` to `highest`.

    All rates keep their ratio to optimizer.lr. The schedule, averaging, adversarial training and pseudo rows of the
    config have no part in it. Raises ValueError for whatever does not fit.
    """
    low, high = range_of(config, lowest, highest)
    if steps < 2 * WARM:
        raise ValueError(f"--steps {steps}: at least {2 * WARM} are needed to see a slope")
    if not 0 <= fold < config.folds.num_folds:
        raise ValueError(f"--fold {fold}: allowed are 0 to {config.folds.num_folds - 1}")
    for what, is_on in (("adversarial", config.stability.adversarial.name != "none"), ("pseudo", bool(config.pseudo))):
        if is_on:
            say(f"{what} of the config has no part in the range test")
    before = random_state()
    try:
        return _test(config, np.geomspace(low, high, steps), fold)
    finally:
        set_random_state(before)
        release_memory()


def _test(config: Config, lrs: Numbers, fold: int) -> Curve:
    check_shard(config, together=False)
    runtime = open_runtime(config.training.precision)
    tokenizer = load_tokenizer(config.model.backbone, config.model.new_tokens)
    table, _ = read_competition(config.competition, config.tasks)
    folding = get_folds(FOLDS / f"{config.fold_name}.csv", table, config.tasks, config.folds)
    training, _ = rows_of(fold, config, table, folding)
    encoded = encode(tokenizer, table.texts, cache=None, **config.model.cutting)
    seed_everything(config.training.seed)
    model, fresh = build_fold_model(config, table, tokenizer)
    model.pooler.fit(encoded.documents(training))
    model.to(runtime.device)
    optimizer = build_fold_optimizer(config, build_fold_groups(config, model, fresh))
    PriorDecay(optimizer.inner if isinstance(optimizer, Lookahead) else optimizer)
    masks, rdrop = max(1, config.model.multi_sample_dropout), config.stability.rdrop
    supcon = build_supcon(config, table, training)
    recorder = _Recorder(Objective(config.tasks, table, training, num_masks=masks, rdrop=rdrop, supcon=supcon))
    labels = Labels(table.targets, table.weights, table.errors)
    stages = Stages(Lesson(table, training, np.zeros(0, np.int64)), config, encoded.lengths)
    per_epoch = stages.steps_per_epoch
    progress = open_progress(len(lrs), f"lr-find {config.optimizer.name}")
    parts = Parts(
        model=model,
        optimizer=optimizer,
        schedule=lambda step: float(lrs[step]) / config.optimizer.lr,
        scaler=runtime.grad_scaler(),
        autocast=runtime.autocast,
        device=runtime.device,
        windows=lambda epoch: stages.windows(epoch)[: len(lrs) - epoch * per_epoch],
        collate=lambda rows: collate(encoded, rows, labels),
        count=recorder.count,
        outputs=twice(model) if rdrop else model,
        adversary=NoAdversary(),
        averager=recorder,
        loss=recorder.share,
        evaluate=lambda best, whole: Evaluation(math.nan, best),
        others=dict,
        keep_best=lambda step: None,
        showing=nullcontext,
        is_better=lambda score, best: is_better(config.metric, score, best),
        cadence=Never(),
        saver=_Unsaved(),
        stop_asked=lambda: 0 if recorder.diverged else None,
        tracker=NullTracker(),
        progress=progress,
        epochs=-(-len(lrs) // per_epoch),
        steps_per_epoch=per_epoch,
        peak_lr=config.optimizer.lr,
        clip_norm=config.optimizer.clip_norm,
        whole_batch=config.whole_batch,
    )
    diverged = False
    try:
        fit(parts, TrainState())
    except (Stopped, NonFiniteError):  # the end that is looked for
        diverged = True
    finally:
        progress.close()
    losses = np.array(recorder.losses)
    name = config.optimizer.name if config.optimizer.name != "class" else config.optimizer.path
    return read_curve(name, lrs[: len(losses)], losses, diverged=diverged)
