"""The few-sample techniques, their options and what cannot go together. No torch in here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from comp.config_section import Section

__all__ = ["Stability"]


class NoAveraging(Section):
    name: Literal["none"] = "none"
    """none = off."""


class SWAAveraging(Section):
    name: Literal["swa"] = "swa"
    start_percent: float = Field(75, ge=0, lt=100)
    """Percent of all optimizer steps before the first point."""
    points: int = Field(10, ge=2)
    """Points to average, evenly spaced to the end."""
    lr_factor: float | None = Field(0.5, gt=0, le=1)
    """From the start on, every group's rate is constant at this share of its own peak; null = follow the schedule."""


class EMAAveraging(Section):
    name: Literal["ema"] = "ema"
    decay: float | None = Field(None, gt=0, lt=1)
    """Share of the average that stays at each step; null = 1 - 10 / steps of the run, a horizon of a tenth of it."""


class SoupAveraging(Section):
    name: Literal["soup"] = "soup"
    size: int = Field(5, ge=2)
    """Best checkpoints kept for the soup, each as large as the model, in main memory."""
    greedy: bool = True
    """true = a checkpoint stays in when the held-out score is strictly better with it; false = all of them."""


Averaging = Annotated[NoAveraging | SWAAveraging | EMAAveraging | SoupAveraging, Field(discriminator="name")]


class NoAdversarial(Section):
    name: Literal["none"] = "none"
    """none = off."""


class FGMAdversarial(Section):
    name: Literal["fgm"] = "fgm"
    eps: float = Field(0.5, gt=0)
    """How far the word table moves (its norm)."""
    start_epoch: float = Field(0.0, ge=0)
    """Epochs before the first attack, may be a fraction."""


class AWPAdversarial(Section):
    name: Literal["awp"] = "awp"
    lr: float = Field(1e-2, gt=0)
    """How far each matrix moves, as a share of its norm."""
    eps: float = Field(1e-2, gt=0)
    """Farthest any weight moves, as a share of itself."""
    add_clean: bool = False
    """true = step on the sum of clean and adversarial gradient; false = on the adversarial one alone, as the paper."""
    start_epoch: float = Field(1.0, ge=0)
    """Epochs before the first attack, may be a fraction."""
    start_score: float | None = None
    """No attack before the best score has reached this; null = whatever the score."""


Adversarial = Annotated[NoAdversarial | FGMAdversarial | AWPAdversarial, Field(discriminator="name")]


class SupConTerm(Section):
    """The supervised contrastive term of the first task."""

    weight: float = Field(0.0, ge=0)
    """Its weight beside the tasks' losses; 0 = off."""
    temperature: float = Field(0.07, gt=0)
    """Divides the cosines: lower looks at the nearest texts only."""
    bandwidth: float = Field(0.5, gt=0)
    """How far apart numbers still count as alike, in standard deviations of the training targets."""


class Stability(Section):
    """Few-sample techniques, all off unless set."""

    reinit_layers: int = Field(0, ge=0)
    """Top blocks to re-initialise; 0 = off."""
    reinit_pooler: bool = False
    """Re-initialise the checkpoint's own pooler (pooler `pooler_output`); false = off."""
    mixout: float = Field(0.0, ge=0, le=1)
    """Probability of mixing a column of a backbone's linear layer with its pretrained value; needs model.dropout 0;
    0 = off."""
    prior_decay: float = Field(0.0, ge=0)
    """Weight decay of the backbone towards its pretrained weights, in place of optimizer.weight_decay; felt from about
    1; 0 = off."""
    averaging: Averaging = NoAveraging()
    """Averages of the weights along the run, scored beside best and last: none | swa | ema | soup."""
    adversarial: Adversarial = NoAdversarial()
    """A second pass at worse weights: none | fgm | awp; about doubles the cost of a step."""
    rdrop: float = Field(0.0, ge=0)
    """Weight of the R-Drop term: two passes with different dropout must agree; 0 = off."""
    supcon: SupConTerm = SupConTerm()
    """Vectors of texts with like targets draw together."""
