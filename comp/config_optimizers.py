"""The options of each optimizer, one class per row of OPTIMIZERS. No torch in here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from comp.config_section import Section

__all__ = ["AdamW", "Optimizer"]


class Lookahead(Section):
    """Slow weights that follow the optimizer's; they are the ones evaluated and kept."""

    steps: int = Field(5, ge=1)
    """Optimizer steps between two moves of the slow weights."""
    alpha: float = Field(0.5, gt=0, le=1)
    """Share of the way they go."""


class Rates(Section):
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate of the backbone (of its top block under llrd)."""
    head_lr: float | None = Field(1e-3, gt=0)
    """Peak learning rate of pooler and heads; null = lr."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay, decoupled but for madgrad; biases, norms and mixing weights are always exempt; 0 = off."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Largest global gradient norm of an update; null = no clipping."""


class Wrappable(Rates):
    lookahead: Lookahead | None = None
    """Lookahead around this optimizer; null = off."""


class AdamLike(Section):
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moment."""
    eps: float = Field(1e-6, gt=0)
    """Added to the root of the second moment."""

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas must lie in [0, 1), got {list(value)}")
        return value


class AdamW(AdamLike, Wrappable):
    """The options of optimizer.name adamw, the default."""

    name: Literal["adamw"] = "adamw"


class BERTAdam(AdamLike, Wrappable):
    name: Literal["bertadam"] = "bertadam"


class RAdam(AdamLike, Wrappable):
    name: Literal["radam"] = "radam"


class RAdamLookahead(AdamLike, Rates):
    name: Literal["radam_lookahead"] = "radam_lookahead"
    steps: int = Field(5, ge=1)
    """Optimizer steps between two moves of the slow weights."""
    alpha: float = Field(0.5, gt=0, le=1)
    """Share of the way they go."""


class MADGRAD(Wrappable):
    name: Literal["madgrad"] = "madgrad"
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty inside the dual average (it accumulates: often 0 is best); 0 = off."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum; 0 = off."""
    eps: float = Field(1e-6, ge=0)
    """Added to the cube root, and to every learning rate above 0."""
    decouple_decay: bool = False
    """Decay the weights themselves, as AdamW does."""

    @model_validator(mode="after")
    def _momentum_forgets(self) -> MADGRAD:
        if self.lookahead is not None and self.momentum:
            raise ValueError(
                "madgrad with momentum starts every step from the weights it began with, so it forgets what lookahead "
                "does; set momentum to 0 or lookahead to null"
            )
        return self


class Adafactor(Wrappable):
    name: Literal["adafactor"] = "adafactor"
    beta2_decay: float = Field(-0.8, lt=0)
    """Exponent by which the memory of the second moment grows with the steps."""
    clip_threshold: float = Field(1.0, ge=1)
    """Largest root mean square of an update before the rate."""


class ClassOptimizer(Wrappable):
    name: Literal["class"] = "class"
    path: str
    """Dotted name: torch.optim.NAdam, torch_optimizer.DiffGrad, ..."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Its keyword arguments, checked against its signature."""


Optimizer = Annotated[
    AdamW | BERTAdam | RAdam | RAdamLookahead | MADGRAD | Adafactor | ClassOptimizer, Field(discriminator="name")
]
