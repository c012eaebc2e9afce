"""Weight averages of one fold's path: SWA, EMA, soups. All in float32, of what is trained; never across folds.

SWA: Izmailov et al. 2018, arXiv:1803.05407, the mean of points at a constant rate near the end; few epochs mean that
the points lie inside an epoch. Transformers have no batch norm, so nothing has to be recomputed. EMA: every step, with
the warm-up min(decay, (1 + t) / (10 + t)); at a few hundred steps a decay of 0.999 would still be mostly the pretrained
weights, so the default's horizon is a tenth of the run. Soups: Wortsman et al. 2022, arXiv:2203.05482, of the fold's
own checkpoints: the uniform mean of the best, or greedily, where one stays in when the held-out score is strictly
better with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["EMA", "SWA", "NoAverager", "Soup"]

Tensors = list[torch.Tensor]


class NoAverager:
    """Averages nothing."""

    ready = False
    """True when there is an average to put in."""

    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 1."""

    def evaluated(self, step: int, score: float) -> None:
        """Take in the weights that have just been scored."""

    def finish(self, evaluate: Callable[[], float] | None) -> None:
        """Make the average at the end of training; `evaluate` scores the weights in the model."""

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average into the model; its own weights come back bit by bit."""
        yield


class _Averager(NoAverager):
    def __init__(self, model: nn.Module) -> None:
        self.params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.average: Tensors = []

    @property
    def ready(self) -> bool:  # type: ignore[override]
        return bool(self.average)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["average"]
        self.average = [t.to(p.device) for p, t in zip(self.params, saved, strict=True)] if saved else []

    def present(self) -> Tensors:
        """Return copies of the model's trained weights, float32."""
        return [parameter.detach().clone().float() for parameter in self.params]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        assert self.ready, "there is no average yet"
        with self._holding(self.average):
            yield

    @contextmanager
    def _holding(self, weights: Sequence[torch.Tensor]) -> Iterator[None]:
        kept = [parameter.detach().clone() for parameter in self.params]
        _put(self.params, weights)
        try:
            yield
        finally:
            _put(self.params, kept)


def _put(params: Sequence[nn.Parameter], weights: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, weight in zip(params, weights, strict=True):
            parameter.copy_(weight)


class SWA(_Averager):
    """Equal mean of the weights at steps start, start + interval, ..."""

    def __init__(self, model: nn.Module, *, start: int, interval: int) -> None:
        super().__init__(model)
        self.start, self.interval, self.count = start, interval, 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.count = state_dict["count"]

    def update(self, step: int) -> None:
        if step < self.start or (step - self.start) % self.interval:
            return
        self.count += 1
        if self.count == 1:
            self.average = self.present()
            return
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach().float() for p in self.params], 1 / self.count)


class EMA(_Averager):
    """Exponential moving average of every step after step `start`, from the weights there."""

    def __init__(self, model: nn.Module, *, decay: float, start: int = 0) -> None:
        super().__init__(model)
        self.decay, self.start = decay, start
        self.average = self.present()

    def update(self, step: int) -> None:
        step -= self.start
        if step < 1:
            self.average = self.present() if step == 0 else self.average
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach().float() for p in self.params], 1 - decay)


class Soup(_Averager):
    """Mean of the best `size` evaluated checkpoints, kept in main memory; `greedy`: of those that help."""

    def __init__(
        self, model: nn.Module, *, size: int, greedy: bool, is_better: Callable[[float, float | None], bool]
    ) -> None:
        super().__init__(model)
        self.size, self.greedy, self.is_better = size, greedy, is_better
        self.ingredients: list[tuple[float, Tensors]] = []
        """Best first."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ingredients": self.ingredients}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.ingredients = list(state_dict["ingredients"])

    def evaluated(self, step: int, score: float) -> None:
        place = next(
            (k for k, (s, _) in enumerate(self.ingredients) if self.is_better(score, s)), len(self.ingredients)
        )
        if place < self.size:
            self.ingredients.insert(place, (score, [weight.cpu() for weight in self.present()]))
            del self.ingredients[self.size :]

    def finish(self, evaluate: Callable[[], float] | None) -> None:
        if not self.ingredients:
            return
        chosen = [weights for _, weights in self.ingredients]
        if self.greedy:
            assert evaluate is not None, "a greedy soup needs held-out rows"
            best, chosen = self.ingredients[0][0], [self.ingredients[0][1]]
            for _, weights in self.ingredients[1:]:
                with self._holding(_mean([*chosen, weights])):
                    score = evaluate()
                if self.is_better(score, best):
                    best, chosen = score, [*chosen, weights]
        self.average = _mean(chosen)
        self.ingredients = []


def _mean(soups: Sequence[Tensors]) -> Tensors:
    return [torch.stack(same).mean(0) for same in zip(*soups, strict=True)]
