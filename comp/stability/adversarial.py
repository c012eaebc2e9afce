"""Adversarial training: a second pass at weights moved to where the loss is worse.

FGM, the form common on Kaggle of Miyato et al. 2017, arXiv:1605.07725: the word table moves by eps g / |g|; the
gradient there is added to the clean one. (The paper perturbs each text's normalised embeddings.) AWP, Wu et al. 2020,
arXiv:2004.05884: every matrix of the blocks moves by lr |w| g / |g|, within eps |w| of where it was, and the step is
taken on the gradient found there, or on the sum of both.

The direction is that of the whole window's gradient and all its micro-batches are passed again, so accumulation changes
nothing; a loss scale cancels out. Weights come back from a copy, bit by bit: adding and subtracting would not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["AWP", "FGM", "NoAdversary"]


class NoAdversary:
    """Never attacks."""

    def due(self, epochs: float, best_score: float | None) -> bool:
        """Tell whether to attack at this step, `epochs` into training, with this best score so far."""
        return False

    @contextmanager
    def perturbed(self) -> Iterator[bool]:
        """Move the weights while inside; yields False, unmoved, where the gradient shows no direction."""
        yield False


class FGM(NoAdversary):
    """Moves the word table."""

    def __init__(self, words: nn.Parameter, *, eps: float, start_epoch: float = 0.0) -> None:
        self.params = [words]
        self.eps, self.start_epoch = eps, start_epoch

    def due(self, epochs: float, best_score: float | None) -> bool:
        return epochs >= self.start_epoch

    @contextmanager
    def perturbed(self) -> Iterator[bool]:
        moving = [parameter for parameter in self.params if parameter.grad is not None]
        kept = [parameter.detach().clone() for parameter in moving]
        moved = bool(moving)
        try:
            with torch.no_grad():
                norms = torch._foreach_norm([p.grad for p in moving if p.grad is not None]) if moving else ()
                read = torch.stack(norms).tolist() if moving else []  # one sync point for all
                for parameter, norm, value in zip(moving, norms, read, strict=True):
                    moved = self._move(parameter, norm, value) and moved
            if moved:
                self._before_second_pass()
            yield moved
        finally:
            with torch.no_grad():
                for parameter, value in zip(moving, kept, strict=True):
                    parameter.copy_(value)

    def _move(self, parameter: nn.Parameter, norm: torch.Tensor, value: float) -> bool:
        """Move one parameter, whose gradient has `norm`, read as `value`; tell whether that shows a direction."""
        assert parameter.grad is not None
        if not math.isfinite(value) or not value > 0:
            return False
        parameter.addcmul_(parameter.grad, self.eps / norm)
        return True

    def _before_second_pass(self) -> None:
        """FGM keeps the clean gradient: the second one is added."""


class AWP(FGM):
    """Moves the matrices of the blocks."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        *,
        everything: Sequence[nn.Parameter],
        lr: float,
        eps: float,
        add_clean: bool = False,
        start_epoch: float = 0.0,
        start_score: float | None = None,
        higher_is_better: bool = False,
    ) -> None:
        """`params`: the matrices; `everything`: all parameters, whose clean gradient goes unless `add_clean`."""
        self.params, self.everything = list(params), list(everything)
        self.lr, self.eps, self.add_clean, self.start_epoch = lr, eps, add_clean, start_epoch
        self.start_score, self.higher_is_better = start_score, higher_is_better

    def due(self, epochs: float, best_score: float | None) -> bool:
        if self.start_score is None:
            return epochs >= self.start_epoch
        if best_score is None:
            return False
        reached = best_score >= self.start_score if self.higher_is_better else best_score <= self.start_score
        return epochs >= self.start_epoch and reached

    def _move(self, parameter: nn.Parameter, norm: torch.Tensor, value: float) -> bool:
        assert parameter.grad is not None
        if not math.isfinite(value):
            return False
        if value > 0:
            limit = self.eps * parameter.abs()
            step = parameter.grad * (self.lr * parameter.norm() / norm)
            parameter.add_(torch.minimum(torch.maximum(step, -limit), limit))
        return True

    def _before_second_pass(self) -> None:
        if not self.add_clean:
            for parameter in self.everything:
                parameter.grad = None
