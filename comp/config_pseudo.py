"""Pseudo-labels: which set, how its rows are trained on, and which of them. No torch in here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from comp.config_section import Section

__all__ = ["Pseudo"]

NUMBERS = ("regression", "ordinal")


class Pseudo(Section):
    """Rows that `comp pseudo` has labelled, beside the true training rows. The first task learns from them; to the
    others their targets are missing. Class weights, IDF and scales are still counted on true rows alone."""

    folder: str = Field(min_length=1)
    """Folder of the label set, pseudo/NAME. Fold k reads the labels of the models that never saw its held-out rows,
    `--fold full` those for the full-data model."""
    mode: Literal["mixed", "two_stage"] = "mixed"
    """mixed = pseudo rows among the true ones. two_stage = first `epochs` over the pseudo rows, then training.epochs
    over the true ones: each stage has the learning-rate schedule anew (the optimizer's moments stay), and evaluation,
    averaging and adversarial training belong to the second."""
    weight: float = Field(1.0, gt=0)
    """mixed: row weight of a pseudo row in the loss, where a true row has 1 or its competition.weight; a step's loss is
    the weighted mean over its batch. `pseudo: null` trains without them."""
    epochs: int | None = Field(None, ge=1)
    """two_stage: passes over the pseudo rows; null = 1."""
    labels: Literal["soft", "hard"] = "soft"
    """soft = probabilities and grades as predicted. hard = the likeliest class, 0 or 1 from 0.5 on, the nearest
    grade."""
    min_confidence: float | None = Field(None, gt=0, le=1)
    """Classes: keep rows whose chosen class has at least this probability, of several labels the least sure one; null =
    off."""
    agreement: bool = False
    """Classes: keep rows for which all teachers choose the same; needs two teachers or more; false = off."""
    max_spread: float | None = Field(None, ge=0)
    """Numbers: keep rows for which the teachers' predictions lie at most so far apart, in every target; needs two
    teachers or more; null = off."""
    keep_percent: float = Field(100, gt=0, le=100)
    """Keep this share of what the filters leave, the surest first: by probability, for numbers by the teachers'
    spread; 100 = all."""
    max_rows: int | None = Field(None, ge=1)
    """Most rows, drawn from what is left with training.seed; null = all."""

    @model_validator(mode="after")
    def _options_of_the_mode(self) -> Pseudo:
        if self.mode == "two_stage" and self.weight != 1:
            raise ValueError(
                "weight is relative to the true rows of the same batch, and in mode 'two_stage' there are none beside "
                "pseudo rows; set it to 1, or the mode to mixed"
            )
        if self.mode == "mixed" and self.epochs is not None:
            raise ValueError(
                "epochs are those of the first stage, which mode 'mixed' has not; set it to null, or the mode to "
                "two_stage"
            )
        return self

    @property
    def stage_epochs(self) -> int:
        """Epochs over pseudo rows alone."""
        return (self.epochs or 1) if self.mode == "two_stage" else 0

    def must_fit(self, kind: str, loss: str) -> None:
        """Raise ValueError for an option that the first task's kind or loss has no use for."""
        if kind in NUMBERS and (self.min_confidence is not None or self.agreement):
            raise ValueError(
                f"pseudo.min_confidence and pseudo.agreement are for classes; kind '{kind}' is a number: use "
                "pseudo.max_spread"
            )
        if kind not in NUMBERS and self.max_spread is not None:
            raise ValueError(
                f"pseudo.max_spread is for numbers; kind '{kind}' has classes: use pseudo.min_confidence or "
                "pseudo.agreement"
            )
        if kind == "regression" and self.labels == "hard":
            raise ValueError("pseudo.labels 'hard' is for classes and grades; kind 'regression' has none: use soft")
        if loss == "ordinal" and self.labels == "soft":
            raise ValueError(
                "loss 'ordinal' reads whole grades, and soft labels are fractions of them; set pseudo.labels to hard"
            )
