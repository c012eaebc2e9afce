"""The sections that are chosen by name, one class per catalogue row, each with its row's own options.

`name` (or `layout`) tells the variants apart: it is the key in the catalogue. No torch in here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from comp.config_section import Section

__all__ = [
    "Groups",
    "LLRDLayout",
    "LinearSchedule",
    "Loss",
    "Schedule",
    "UnifiedLayout",
    "WarmupSchedule",
]


# --- losses -----------------------------------------------------------------------------------------------------------


class MSELoss(Section):
    name: Literal["mse"] = "mse"


class SmoothL1Loss(Section):
    name: Literal["smooth_l1"] = "smooth_l1"
    beta: float = Field(1.0, gt=0)
    """Error at which the loss turns from quadratic to linear, in target units."""


class MAELoss(Section):
    name: Literal["mae"] = "mae"


class RMSELoss(Section):
    name: Literal["rmse"] = "rmse"


class GaussianNLLLoss(Section):
    name: Literal["gaussian_nll"] = "gaussian_nll"
    standard_error: str
    """Column of the training table with the standard error of the target, row by row."""
    floor: float = Field(0.1, gt=0)
    """Smallest standard error; a row with less counts as having this (CLEAR has one row with 0)."""


class PearsonLoss(Section):
    name: Literal["pearson"] = "pearson"


class PairwiseRankLoss(Section):
    name: Literal["pairwise_rank"] = "pairwise_rank"
    sigma: float = Field(1.0, gt=0)
    """Steepness: the loss of a pair is softplus(-sigma x difference of the predictions)."""


class OrdinalLoss(Section):
    name: Literal["ordinal"] = "ordinal"
    decode: Literal["expected", "rank"] = "expected"
    """expected = lowest grade + sum of the probabilities of being above each grade; rank = lowest grade + how many of
    them exceed 0.5, as in the paper."""


class ClassWeighted(Section):
    class_weights: Literal["balanced"] | None = None
    """balanced = rows / (classes x rows of the class), counted on the training rows of the fold; null = off. With
    several columns each is balanced by itself."""


class BCELoss(ClassWeighted):
    name: Literal["bce"] = "bce"


class CrossEntropyLoss(ClassWeighted):
    name: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target spread evenly over all classes; 0 = off."""


class FocalLoss(ClassWeighted):
    name: Literal["focal"] = "focal"
    gamma: float = Field(2.0, ge=0)
    """Focusing exponent of (1 - p)^gamma; 0 = plain cross-entropy."""


Loss = Annotated[
    MSELoss
    | SmoothL1Loss
    | MAELoss
    | RMSELoss
    | GaussianNLLLoss
    | PearsonLoss
    | PairwiseRankLoss
    | OrdinalLoss
    | BCELoss
    | CrossEntropyLoss
    | FocalLoss,
    Field(discriminator="name"),
]

# --- layouts of the parameter groups ----------------------------------------------------------------------------------


class UnifiedLayout(Section):
    """groups.layout unified, the default; it has no options."""

    layout: Literal["unified"] = "unified"


class ModuleWiseLayout(Section):
    layout: Literal["module_wise"] = "module_wise"
    embeddings_factor: float = Field(0.5, gt=0)
    """Rate of the embeddings as a share of the blocks'."""


class LayerWiseLayout(Section):
    layout: Literal["layer_wise"] = "layer_wise"
    factor: float = Field(2.6, ge=1)
    """The lowest third of the blocks, and the embeddings, learn at lr / factor, the highest at lr x factor."""


class LLRDLayout(Section):
    """The options of groups.layout llrd."""

    layout: Literal["llrd"] = "llrd"
    decay: float = Field(0.95, gt=0, le=1)
    """Each block's learning rate is this times the rate of the block above it; 1 = the same for all."""


Groups = Annotated[UnifiedLayout | ModuleWiseLayout | LayerWiseLayout | LLRDLayout, Field(discriminator="layout")]


# --- schedules --------------------------------------------------------------------------------------------------------


class ConstantSchedule(Section):
    name: Literal["constant"] = "constant"


class WarmupSchedule(Section):
    """What every schedule with a warm-up has; at most one of its lengths is given."""

    warmup_percent: float | None = Field(None, ge=0, le=100)
    """Length of the linear warm-up in percent of all optimizer steps; left out together with the other two = 10."""
    warmup_steps: int | None = Field(None, ge=0)
    """The same in optimizer steps."""
    warmup_epochs: float | None = Field(None, ge=0)
    """The same in epochs."""

    @model_validator(mode="before")
    @classmethod
    def _usual_warmup(cls, data: Any) -> Any:
        units = ("warmup_percent", "warmup_steps", "warmup_epochs")
        if isinstance(data, dict) and all(data.get(unit) is None for unit in units):
            return {**data, "warmup_percent": 10.0}
        return data

    @model_validator(mode="after")
    def _one_unit(self) -> WarmupSchedule:
        given = [n for n in ("warmup_percent", "warmup_steps", "warmup_epochs") if getattr(self, n) is not None]
        if len(given) > 1:
            raise ValueError(f"give the warm-up in one unit, got {' and '.join(given)}; set the others to null")
        return self


class ConstantWithWarmupSchedule(WarmupSchedule):
    name: Literal["constant_with_warmup"] = "constant_with_warmup"


class LinearSchedule(WarmupSchedule):
    """The options of schedule.name linear."""

    name: Literal["linear"] = "linear"


class CosineSchedule(WarmupSchedule):
    name: Literal["cosine"] = "cosine"
    num_cycles: float = Field(0.5, gt=0)
    """Waves of the cosine after warm-up; 0.5 = one fall to 0."""


class CosineRestartsSchedule(WarmupSchedule):
    name: Literal["cosine_with_restarts"] = "cosine_with_restarts"
    num_cycles: int = Field(2, ge=1)
    """Falls to 0, each from the full rate; 1 = no restart."""


class PolynomialSchedule(WarmupSchedule):
    name: Literal["polynomial"] = "polynomial"
    power: float = Field(1.0, gt=0)
    """Exponent of the fall; 1 = linear."""
    end_multiplier: float = Field(0.0, ge=0, lt=1)
    """Rate at the end as a share of the peak."""


Schedule = Annotated[
    ConstantSchedule
    | ConstantWithWarmupSchedule
    | LinearSchedule
    | CosineSchedule
    | CosineRestartsSchedule
    | PolynomialSchedule,
    Field(discriminator="name"),
]
