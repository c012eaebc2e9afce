"""The options of training and of evaluation during it. No torch in here."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from comp.config_section import Section
from comp.config_stability import Stability
from comp.metrics import METRICS

__all__ = ["Evaluation", "Training", "parse_every"]


class Training(Section):
    """Length, batch and precision."""

    epochs: int = Field(3, ge=1)
    """Passes over the training rows of a fold."""
    batch_size: int = Field(16, ge=1)
    """Rows per optimizer step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows per forward and backward; the step still sees batch_size rows; null = batch_size."""
    batch_tokens: int | None = Field(None, ge=1)
    """Most tokens of an optimizer step, padding included: it sees as many rows as fit, batch_size at most and one at
    least, so that short texts make large batches. Every row still weighs the same within its step; the number of steps
    differs a little from epoch to epoch. null = always batch_size rows."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Autocast type; weights stay float32. auto = bf16 where the hardware has it, else fp16 on GPU, else fp32; fp32
    also where a measurement finds it faster (see `model.attention`)."""
    seed: int = Field(42, ge=0)
    """Seed of head initialisation, dropout and batch order."""
    length_bucketing: bool = True
    """Batch texts of like length (order still shuffled); false = plain shuffle."""
    compile: bool = False
    """Run training passes of the backbone through torch.compile; whether that paid is said after each fold."""
    shard: bool = False
    """Under torch.distributed.run: give each process a part of the backbone's weights, gradients and moments, for a
    model that does not fit one GPU (FSDP). false = each has all of them, which is faster where they fit."""
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

    def must_fit(self, max_length: int, whole_batch: str | None) -> None:
        """Raise ValueError where batch_tokens does not fit the rest; `whole_batch`: what compares all rows of one."""
        if self.batch_tokens is None:
            return
        if self.batch_tokens < max_length:
            raise ValueError(
                f"training.batch_tokens {self.batch_tokens} is less than one text may have, model.max_length "
                f"{max_length}; raise it, or set it to null"
            )
        if whole_batch:
            raise ValueError(
                f"{whole_batch} compares the rows of a whole batch, whose number training.batch_tokens would vary; set "
                "it to null"
            )


EVERY = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*(%|steps?)\s*$")


def parse_every(text: str) -> tuple[float, Literal["percent", "steps"]]:
    """Read "10%" (of an epoch) or "25 steps" (optimizer steps). Raises ValueError on anything else."""
    match = EVERY.match(text)
    if not match or float(match[1]) <= 0 or (match[2] != "%" and float(match[1]) % 1):
        raise ValueError(f"every is '10%' (of an epoch) or '25 steps', got '{text}'")
    return float(match[1]), "percent" if match[2] == "%" else "steps"


class Evaluation(Section):
    """When the held-out fold is scored, and on how many rows. It is always scored once more at the end, on all."""

    every: str | None = "20%"
    """Interval: "10%" of an epoch or "25 steps"; null = by `schedule`, or at the end only."""
    schedule: list[tuple[float, int]] | None = None
    """Score-driven interval, [[threshold, steps], ...], thresholds falling: after an evaluation the first row whose
    threshold is <= the score gives the steps to the next one. Needs `every: null`."""
    start_percent: float = Field(0, ge=0, lt=100)
    """No evaluation before this percent of all steps."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a better score; null = never."""
    decide: Literal["full", "exact", "race"] = "full"
    """How many rows an evaluation scores to decide whether the weights are the best so far. full = all. exact = until
    even a perfect rest could not win: what is kept is bit for bit the same. race = in blocks, until a sequential test
    of the rows' differences says wins or loses; what is kept is scored on all rows in the end. Scores of the others are
    estimates then, marked as such. exact and race need a metric that is a mean over rows: rmse, mae, log_loss,
    accuracy."""
    error_rate: float | None = Field(None, gt=0, lt=0.5)
    """Of a race: the chance that worse weights win where all rows would say that they lose, and that better ones lose;
    null = 0.05."""
    race_percent: float | None = Field(None, gt=0, le=100)
    """Of a race: what the test has not decided after this percent of the rows goes by the estimate, at no stated rate
    of error; that is nearly a tie, and most of the time is spent on those. The first evaluation, with nothing to beat,
    scores no more either, and in the end the last weights are kept where the best so far are surely less than .1%
    better. null = 100: all rows decide then."""

    @property
    def deciding(self) -> dict[str, Any]:
        """How evaluations decide: keyword arguments of HeldOut."""
        return {
            "decide": self.decide,
            "error_rate": 0.05 if self.error_rate is None else self.error_rate,
            "race_percent": 100.0 if self.race_percent is None else self.race_percent,
        }

    def must_fit(self, metric: str, stability: Stability) -> None:
        """Raise ValueError where what is decided early does not fit the metric, or what reads the scores."""
        if self.decide == "full":
            return
        if METRICS[metric].losses is None:
            fitting = ", ".join(name for name, row in METRICS.items() if row.losses is not None)
            raise ValueError(
                f"evaluation.decide '{self.decide}' needs a metric that is a mean over rows, which '{metric}' is not; "
                f"set it to full, or use one of {fitting}"
            )
        if stability.averaging.name == "soup":
            raise ValueError(
                f"stability.averaging 'soup' ranks evaluations by their scores, of which evaluation.decide "
                f"'{self.decide}' only estimates most; set it to full, or use swa or ema"
            )
        if self.decide == "race" and getattr(stability.adversarial, "start_score", None) is not None:
            raise ValueError(
                "stability.adversarial.start_score waits for the best score, which evaluation.decide 'race' only "
                "estimates; set it to full or exact, or use start_epoch alone"
            )

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
            if self.decide != "full":
                raise ValueError(
                    f"schedule reads the score of every evaluation, which decide '{self.decide}' only estimates; set "
                    "decide to full, or use `every`"
                )
        return self

    @model_validator(mode="after")
    def _only_a_race_errs(self) -> Evaluation:
        for name in ("error_rate", "race_percent"):
            if getattr(self, name) is not None and self.decide != "race":
                raise ValueError(
                    f"{name} is of a race, but decide is '{self.decide}'; set {name} to null, or decide to race"
                )
        return self
