"""The options of training and of evaluation during it. No torch in here."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Literal

from pydantic import Field, field_validator, model_validator

from comp.config_section import Section

__all__ = ["Evaluation", "Training", "parse_every"]


class Training(Section):
    """Length, batch and precision."""

    epochs: int = Field(3, ge=1)
    """Passes over the training rows of a fold."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per forward and backward; the step still sees batch_size rows; null = batch_size."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type; weights stay float32. auto = bf16 where the hardware has it, else fp16 on GPU, else fp32; fp32
    also where a measurement finds it faster (see `model.attention`)."""
    seed: int = Field(42, ge=0)
    """Seed of head initialisation, dropout and batch order."""
    length_bucketing: bool = True
    """Batch texts of like length (order still shuffled); false = plain shuffle."""
    compile: bool = False
    """Run training passes of the backbone through torch.compile; whether that paid is said after each fold."""
    max_rows: int | None = Field(None, ge=2)
    """Use only this many rows of each part of a fold, drawn with `seed`; null = all. For debugging."""

    @property
    def passes(self) -> int:
        """Micro-batches of a step."""
        return -(-self.batch_size // (self.micro_batch_size or self.batch_size))

    @model_validator(mode="after")
    def _micro_within_batch(self) -> Training:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} is larger than batch_size {self.batch_size}; "
                "batch_size is what one optimizer step sees, micro_batch_size a part of it"
            )
        return self


EVERY = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(%|steps?)\s*$")


def parse_every(text: str) -> tuple[float, Literal["percent", "steps"]]:
    """Read "10%" (of an epoch) or "25 steps" (optimizer steps). Raises ValueError on anything else."""
    match = EVERY.match(text)
    if not match or float(match[1]) <= 0 or (match[2] != "%" and float(match[1]) % 1):
        raise ValueError(f"every is '10%' (of an epoch) or '25 steps', got '{text}'")
    return float(match[1]), "percent" if match[2] == "%" else "steps"


class Evaluation(Section):
    """When the held-out fold is scored. It is always scored once more at the end."""

    every: str | None = "20%"
    """Interval: "10%" of an epoch or "25 steps"; null = by `schedule`, or at the end only."""
    schedule: list[tuple[float, int]] | None = None
    """Score-driven interval, [[threshold, steps], ...], thresholds falling: after an evaluation the first row whose
    threshold is <= the score gives the steps to the next one. Needs `every: null`."""
    start_percent: float = Field(0, ge=0, lt=100)
    """No evaluation before this percent of all steps."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a better score; null = never."""

    @field_validator("every")
    @classmethod
    def _every_is_readable(cls, value: str | None) -> str | None:
        if value is not None:
            parse_every(value)
        return value

    @model_validator(mode="after")
    def _one_cadence(self) -> Evaluation:
        if self.schedule is not None:
            if self.every is not None:
                raise ValueError("`every` and `schedule` are both set; with a schedule, set `every: null`")
            thresholds = [threshold for threshold, _ in self.schedule]
            if not thresholds or any(a <= b for a, b in pairwise(thresholds)):
                raise ValueError(f"schedule's thresholds must fall from row to row, got {thresholds}")
            if any(steps < 1 for _, steps in self.schedule):
                raise ValueError("schedule's steps must be at least 1")
        return self
