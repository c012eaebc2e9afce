"""The training loop: Parts in, weights and a TrainState out.

A window is what one optimizer step sees: `batch_size` rows, in micro-batches. Every loss is divided by the item count
of its whole window, so the gradient equals that of the one big batch, ragged windows included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from comp.data.batches import Batch
from comp.progress import NullProgress
from comp.runtime import random_state, release_memory, set_random_state
from comp.tracking import Tracker
from comp.training.early import Evaluation
from comp.training.memory import ADVICE, Exhausted, cut, halved, running_out
from comp.training.ranks import ALONE, OneRank

__all__ = ["NonFiniteError", "Parts", "Stopped", "TrainState", "fit"]

LOG_STEPS = 10  # losses stay on the device until then: reading one is a sync point

Rows = NDArray[np.int64]
Outputs = dict[str, torch.Tensor]


REMEDY = (
    "a lower optimizer.lr or optimizer.head_lr, a longer warm-up (schedule.warmup_percent), optimizer.clip_norm 1.0 or "
    "training.precision fp32; and look for extreme targets in the data"
)
"""What to do about a training that is not finite, unless `Parts` says otherwise."""


class NonFiniteError(ArithmeticError):
    """The loss or the gradient became NaN or infinite; training cannot go on."""


class Stopped(Exception):
    """Training was asked to stop by `signal`; the message says after what, and whether that is saved."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


class Adversary(Protocol):
    def due(self, epochs: float, best_score: float | None) -> bool: ...

    def perturbed(self) -> AbstractContextManager[bool]: ...


class Averager(Protocol):
    def update(self, step: int) -> None: ...

    def evaluated(self, step: int, score: float) -> None: ...


class WhenToEvaluate(Protocol):
    def due(self, step: int, last_step: int, last_score: float | None) -> bool: ...


class Saver(Protocol):
    def due(self, step: int, evaluated: bool) -> bool: ...

    def save(self, state: TrainState) -> bool: ...


@dataclass
class TrainState:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    """Epochs done."""
    num_tokens: int = 0
    """Real tokens seen."""
    num_evaluations: int = 0
    best_score: float | None = None
    best_step: int = 0
    last_score: float | None = None
    last_eval_step: int = 0
    evaluations_since_best: int = 0
    stopped_early: bool = False
    window: int = 0
    """Windows of the present epoch done."""
    unlogged: list[tuple[int, float, float, float]] = field(default_factory=list)
    """(step, loss, gradient norm, learning rate) of the steps no log line covers yet; set when the state is saved."""
    micro_rows: int | None = None
    """Rows of a micro-batch since memory ran out; None = as the windows are cut."""
    unlogged_tokens: int = 0
    """Real tokens of those steps."""
    train_seconds: float = 0.0
    """Time in training steps."""
    eval_seconds: float = 0.0
    """Time in evaluations, writing of the best weights included."""


@dataclass(frozen=True)
class Parts:
    """Everything `fit` works with, finished."""

    model: nn.Module
    """model(batch) -> task name -> (B, K)"""
    optimizer: torch.optim.Optimizer
    """Its groups carry `peak_lr`."""
    schedule: Callable[[int], float]
    """Steps done -> multiplier of every group's peak rate."""
    scaler: torch.amp.GradScaler
    autocast: Callable[[], AbstractContextManager[Any]]
    device: torch.device
    windows: Callable[[int], Sequence[Sequence[Rows]]]
    """Epoch -> windows of micro-batches of row numbers."""
    collate: Callable[[Rows], Batch]
    count: Callable[[Rows], dict[str, float]]
    """Rows of a window -> items per task, on the CPU."""
    outputs: Callable[[Batch], Outputs]
    """The model in training: one pass, or two for R-Drop."""
    adversary: Adversary
    averager: Averager
    loss: Callable[[Outputs, Batch, dict[str, float]], torch.Tensor]
    """Outputs, micro-batch, items of the window -> this micro-batch's share of the window's mean loss."""
    evaluate: Callable[[float | None, bool], Evaluation]
    """Score the held-out rows against the best score so far: all of them when told so (True), or as many as decide."""
    others: Callable[[], dict[str, float]]
    """More scores of the same predictions, to be logged only."""
    keep_best: Callable[[int], None]
    """Keep the present weights, and the predictions just made, as the best; with the step they are of."""
    showing: Callable[[], AbstractContextManager[Any]]
    """Puts the weights that stand for the model into it: Lookahead's slow ones; nothing for most optimizers."""
    is_better: Callable[[float, float | None], bool]
    cadence: WhenToEvaluate
    saver: Saver
    stop_asked: Callable[[], int | None]
    """The signal by which the run shall stop after the present step, or None."""
    tracker: Tracker
    progress: NullProgress
    epochs: int
    steps_per_epoch: int
    """Of the epochs that durations count."""
    peak_lr: float
    """The config's learning rate, which logs show times the schedule; groups have their own."""
    clip_norm: float | None = None
    patience: int | None = None
    lead_steps: int = 0
    """Steps of a stage before, which durations do not count."""
    whole_batch: str | None = None
    """What forbids to part a batch into smaller micro-batches; None = nothing."""
    largest: Sequence[Rows] | None = None
    """The window that takes most memory, to be tried after the first step; None = not tried."""
    ranks: OneRank = ALONE
    """The processes that share this fold."""
    remedy: str = REMEDY
    """What to try when loss or gradient is not finite, in the keys of the config that rule this training."""
    blame: Callable[[Rows, dict[str, float]], str] = lambda rows, about: ""
    """Keep the rows of a step that is not finite, and return words that name them."""


def fit(parts: Parts, state: TrainState) -> TrainState:
    """Train from `state` to the last epoch, or until patience runs out.

    Raises NonFiniteError when loss or gradient is not finite: the best weights kept so far stay as they are. Raises
    Stopped, the state saved, when that was asked for; ValueError when memory runs out with one row at a time.
    """
    pulse = _Pulse(parts, state)
    parts.model.train()
    parts.optimizer.zero_grad(set_to_none=True)
    largest = parts.largest
    while state.epoch < parts.epochs and not state.stopped_early:
        windows = parts.windows(state.epoch)
        for window in windows[state.window :]:
            lr = _set_rates(parts, state.step)
            loss = _gradient(parts, state, window)
            norm = _clip(parts)
            parts.scaler.step(parts.optimizer)
            parts.scaler.update()
            parts.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.window += 1
            parts.averager.update(state.step)
            pulse.beat(loss, norm, lr, window)
            if largest is not None:  # after a step, when the optimizer's moments are there too
                _rehearse(parts, state, largest)
                largest = None
            evaluated = parts.cadence.due(state.step, state.last_eval_step, state.last_score)
            if evaluated:
                pulse.read()
                ends = state.epoch + 1 == parts.epochs and state.window == len(windows)
                _evaluate(parts, state, pulse, ends)
                state.stopped_early = parts.patience is not None and state.evaluations_since_best >= parts.patience
            _save(parts, state, pulse, evaluated)
            if state.stopped_early:
                break
        state.epoch, state.window = state.epoch + 1, 0
    pulse.read()
    return state


def _save(parts: Parts, state: TrainState, pulse: _Pulse, evaluated: bool) -> None:
    """Save the state when that is due, and stop when that is asked for."""
    stop = parts.stop_asked()
    if stop is not None or parts.saver.due(state.step, evaluated):
        started = time.perf_counter()
        pulse.note()
        saved = parts.saver.save(state)
        pulse.pause(time.perf_counter() - started)
        if stop is not None:
            told = "and saved" if saved else "but there was no room to save it"
            raise Stopped(f"stopped after step {state.step}, {told}", stop)


def _set_rates(parts: Parts, step: int) -> float:
    """Set every group's rate for the step to come; return the one that is shown."""
    multiplier = parts.schedule(step)
    for group in parts.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * multiplier
    return parts.peak_lr * multiplier


def _gradient(parts: Parts, state: TrainState, window: Sequence[Rows]) -> torch.Tensor:
    """Accumulate the gradient of one window, an attack included; return its mean loss, still on the device.

    Where memory runs out, the whole step is done again from where it began, in micro-batches of half the size, and
    all later ones are cut so too.
    """
    while True:
        random, tokens = random_state(), state.num_tokens
        micro = cut(window, state.micro_rows)
        try:
            with running_out():
                loss = _backward(parts, state, micro)
                _attack(parts, state, micro)
            return loss
        except Exhausted as fault:
            reason = str(fault)
        parts.optimizer.zero_grad(set_to_none=True)
        state.num_tokens = tokens
        set_random_state(random)
        release_memory()
        if parts.ranks.size > 1:  # the others wait for this one's part of the step
            raise ValueError(f"memory ran out ({reason}); lower training.micro_batch_size, or try {ADVICE}")
        state.micro_rows = halved(micro, parts.whole_batch, state.step + 1, reason)


def _rehearse(parts: Parts, state: TrainState, window: Sequence[Rows]) -> None:
    """Try the window that takes most memory, so that it runs out now and not after hours; nothing else changes."""
    random, tokens = random_state(), state.num_tokens
    _gradient(parts, state, window)
    parts.optimizer.zero_grad(set_to_none=True)
    state.num_tokens = tokens
    set_random_state(random)


def _backward(parts: Parts, state: TrainState, window: Sequence[Rows]) -> torch.Tensor:
    """Accumulate the gradient of one window; return its mean loss, still on the device."""
    items = parts.count(np.concatenate(window))
    total, tokens = torch.zeros((), device=parts.device), 0
    with parts.ranks.summing(parts.model) as gather:
        for rows in parts.ranks.share(window):
            batch = parts.collate(rows).to(parts.device)
            with parts.autocast():
                outputs = parts.outputs(batch)
            loss = parts.loss(outputs, batch, items)
            parts.scaler.scale(loss).backward()
            total += loss.detach()
            tokens += batch.num_tokens
        for rows in parts.ranks.idle(window):
            with parts.autocast():
                outputs = parts.outputs(parts.collate(rows).to(parts.device))
            (sum(output.sum() for output in outputs.values()) * torch.zeros((), device=parts.device)).backward()
        total, tokens = gather(total, tokens)
    state.num_tokens += tokens
    return total


def _attack(parts: Parts, state: TrainState, window: Sequence[Rows]) -> None:
    """Pass the window again at weights where its loss is worse, when that is due; tokens are not counted twice."""
    epochs = (state.step - parts.lead_steps) / parts.steps_per_epoch
    if not parts.adversary.due(epochs, state.best_score):
        return
    tokens = state.num_tokens
    with parts.adversary.perturbed() as moved:
        if moved:
            _backward(parts, state, window)
    state.num_tokens = tokens


def _clip(parts: Parts) -> torch.Tensor:
    """Clip once per window, on true gradients; return the norm before clipping."""
    parts.scaler.unscale_(parts.optimizer)
    trainable = [p for group in parts.optimizer.param_groups for p in group["params"] if p.grad is not None]
    limit = math.inf if parts.clip_norm is None else parts.clip_norm
    return parts.ranks.clip(trainable, limit)


def _evaluate(parts: Parts, state: TrainState, pulse: _Pulse, ends: bool) -> None:
    """Score the weights and keep them if they are best; `ends`: after the last step of all."""
    started = time.perf_counter()
    with parts.showing():
        rows = _score(parts, state, pulse, ends)
    seconds = time.perf_counter() - started
    state.eval_seconds += seconds
    pulse.pause(seconds)
    pulse.show()
    scores = {"valid/score": state.last_score, "valid/best": state.best_score, **parts.others()}
    parts.tracker.log(scores, state.step)
    mark = " *" if state.best_step == state.step else ""
    part = "" if rows == 1 else f"  (estimated from {rows:.0%} of the rows)"
    parts.progress.say(f"  step {state.step:>6}  score {state.last_score:.5f}  best {state.best_score:.5f}{mark}{part}")


def _score(parts: Parts, state: TrainState, pulse: _Pulse, ends: bool) -> float:
    """Return the share of the rows that was scored: all where training may end here, since the last score is shown."""
    out_of_patience = parts.patience is not None and state.evaluations_since_best + 1 >= parts.patience
    found = parts.evaluate(state.best_score, ends or out_of_patience)
    if not math.isfinite(found.score):
        raise NonFiniteError(_told(parts, state.step, "the held-out predictions are not finite", pulse.lr))
    state.num_evaluations += 1
    state.last_score, state.last_eval_step, state.best_score = found.score, state.step, found.best
    parts.averager.evaluated(state.step, found.score)
    if parts.is_better(found.score, state.best_score):
        state.best_score, state.best_step = found.score, state.step
        state.evaluations_since_best = state.evaluations_since_best + 1 if found.tie else 0
        parts.keep_best(state.step)
    else:
        state.evaluations_since_best += 1
    return found.rows


class _Pulse:
    """Collects losses on the device and reads them every few steps: log, progress line, and the check for NaN."""

    def __init__(self, parts: Parts, state: TrainState) -> None:
        self.parts, self.state = parts, state
        self.waiting: list[tuple[int, torch.Tensor, torch.Tensor, float, Sequence[Rows]]] = [
            (step, torch.tensor(loss, device=parts.device), torch.tensor(norm, device=parts.device), lr, [])
            for step, loss, norm, lr in state.unlogged
        ]
        self.started, self.tokens = time.perf_counter(), state.num_tokens - state.unlogged_tokens
        self.scaled = parts.scaler.is_enabled()
        self.shown: dict[str, str] = {}
        self.lr = 0.0

    def beat(self, loss: torch.Tensor, norm: torch.Tensor, lr: float, window: Sequence[Rows]) -> None:
        self.lr = lr
        self.waiting.append((self.state.step, loss, norm, lr, window))
        if len(self.waiting) >= LOG_STEPS:
            self.read()

    def note(self) -> None:
        """Write what is not logged yet into the state: a run that goes on logs the lines of one that was not cut.

        Raises NonFiniteError rather than let a state be saved that can only fail again.
        """
        self.state.unlogged = [(step, float(loss), float(norm), lr) for step, loss, norm, lr, _ in self.waiting]
        for (step, loss, norm, lr), (*_, window) in zip(self.state.unlogged, self.waiting, strict=True):
            self._check(step, loss, norm, lr, window)
        self.state.unlogged_tokens = self.state.num_tokens - self.tokens

    def pause(self, seconds: float) -> None:
        """Take an evaluation's time out of the training rate."""
        self.started += seconds

    def read(self) -> None:
        if not self.waiting:
            return
        state, now = self.state, time.perf_counter()
        numbers = torch.stack([torch.stack([loss, norm.float()]) for _, loss, norm, *_ in self.waiting]).tolist()
        for (step, _, _, lr, window), (loss, norm) in zip(self.waiting, numbers, strict=True):
            self._check(step, loss, norm, lr, window)
        seconds = now - self.started
        rate = (state.num_tokens - self.tokens) / max(seconds, 1e-9)
        state.train_seconds += seconds
        mean_loss = sum(loss for loss, _ in numbers) / len(numbers)
        lr, norm = self.waiting[-1][3], numbers[-1][1]
        self.parts.tracker.log(
            {"train/loss": mean_loss, "train/lr": lr, "train/grad_norm": norm, "train/tokens_per_second": rate},
            state.step,
        )
        self.shown = {"loss": f"{mean_loss:.4f}", "lr": f"{lr:.1e}", "tokens/s": f"{rate:,.0f}"}
        self.show(len(self.waiting))
        self.waiting.clear()
        self.started, self.tokens = time.perf_counter(), state.num_tokens

    def _check(self, step: int, loss: float, norm: float, lr: float, window: Sequence[Rows]) -> None:
        # Under a loss scaler an infinite gradient is a skipped step, and normal.
        if not math.isfinite(loss) or not (self.scaled or math.isfinite(norm)):
            about = {"step": step, "loss": loss, "grad_norm": norm, "lr": lr}
            named = self.parts.blame(np.concatenate(window), about) if window else ""
            raise NonFiniteError(_told(self.parts, step, f"loss {loss}, gradient norm {norm}{named}", lr))

    def show(self, steps: int = 0) -> None:
        """Move the progress line by `steps`; without, only bring its best score up to date."""
        best = "-" if self.state.best_score is None else f"{self.state.best_score:.5f}"
        self.parts.progress.advance(steps, **self.shown, best=best)


def _told(parts: Parts, step: int, what: str, lr: float) -> str:
    return (
        f"training stopped at step {step}: {what}; learning rate {lr:.2e}. The best weights so far are kept. Try "
        f"{parts.remedy}."
    )
