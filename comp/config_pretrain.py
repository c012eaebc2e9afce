"""Further pre-training of the backbone on texts without targets: which texts, which objective. No torch in here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from comp.config_section import Section
from comp.config_training import parse_every
from comp.config_variants import LinearSchedule, Schedule

__all__ = ["MLM", "Corpus", "Pretrain", "SimCSE"]


class MLM(Section):
    """Masked language modelling: of the chosen tokens 80% become the mask, 10% another token, 10% stay."""

    name: Literal["mlm"] = "mlm"
    mask_percent: float = Field(15, gt=0, lt=100)
    """Share of a text's tokens that are to be guessed, special ones aside; at least one a text or block."""
    whole_word: bool = False
    """Choose whole words: all tokens of one or none; false = single tokens."""
    packing: bool = True
    """Put the texts one after the other, a separator between, and cut that into blocks of max_length: no token is lost
    and none is padding, but a block may begin inside a text, and attention crosses the separators. false = one text
    each, cut as model.truncation says or read in model.windows."""


class SimCSE(Section):
    """Unsupervised SimCSE: two passes of a text with different dropout are each other's answer, the other texts of the
    batch are wrong ones."""

    name: Literal["simcse"] = "simcse"
    temperature: float = Field(0.05, gt=0)
    """Divides the cosines."""
    vector: Literal["cls", "mean"] = "cls"
    """cls = the classification token through a dense layer of its own, which is dropped afterwards, as published; mean
    = the mean over tokens, without one."""


Objective = Annotated[MLM | SimCSE, Field(discriminator="name")]


class Corpus(Section):
    """The texts of one stage."""

    tables: list[Literal["train", "test"]] = Field(default_factory=list)
    """Tables of the competition whose texts are read; targets never are."""
    files: list[str] = Field(default_factory=list)
    """Further CSV or parquet files; relative to the current directory."""
    text: str | list[str] | None = None
    """Text column or columns of `files`; null = those of the competition."""
    epochs: int | None = Field(None, ge=1)
    """Passes over the texts; null = 1, or as many as `steps` need."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps in place of epochs; null = by `epochs`."""
    max_rows: int | None = Field(None, ge=2)
    """Most rows, drawn with training.seed; null = all."""

    @model_validator(mode="after")
    def _says_what_to_read(self) -> Corpus:
        if not self.tables and not self.files:
            raise ValueError("a corpus names `tables` (train, test) of the competition, or `files`, or both")
        for name, given in (("tables", self.tables), ("files", self.files)):
            if len(set(given)) != len(given):
                raise ValueError(f"`{name}` are named twice: {given}")
        if self.text is not None and not self.files:
            raise ValueError("`text` is the column of `files`, and there are none; the tables have competition.text")
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}; give one of them")
        return self


class Pretrain(Section):
    """What `comp pretrain` does. It also reads the sections competition, folds (with --fold), model (backbone,
    truncation, windows, gradient_checkpointing, allow_pickle), optimizer (but for its rates, which are those here),
    training (precision, seed, length_bucketing) and tracking."""

    objective: Objective = MLM()
    """mlm or simcse."""
    corpora: list[Corpus] = Field(default_factory=lambda: [Corpus(tables=["train", "test"])], min_length=1)
    """One stage each, one after the other: the domain's texts, then the task's. A stage starts from the best weights
    of the one before, its optimizer and schedule anew."""
    lr: float = Field(5e-5, gt=0)
    """Peak learning rate of the backbone, all depths alike."""
    head_lr: float | None = Field(None, gt=0)
    """Peak learning rate of the head that guesses words, or of simcse's dense layer; null = lr. A head that the
    checkpoint has not starts from nothing, and wants more than a backbone: 1e-3, say."""
    schedule: Schedule = LinearSchedule()
    """Learning rate over each stage (see `comp list schedules`)."""
    batch_size: int = Field(16, ge=1)
    """Texts or blocks per optimizer step."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Texts or blocks per forward and backward; null = batch_size. Not for simcse, which compares the whole batch."""
    max_length: int | None = Field(None, ge=4)
    """Tokens per text or block, special tokens included; null = model.max_length."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Every dropout of the backbone while it is pre-trained; null = the checkpoint's own."""
    held_out_percent: float = Field(5, ge=0, le=50)
    """Share of each stage's rows that is never trained on: its score, perplexity for mlm, the loss for simcse, chooses
    the weights that are kept; 0 = none, the last weights are kept."""
    every: str = "20%"
    """When the held-out rows are scored: "20%" of an epoch or "25 steps"; and once more at the end."""
    patience: int | None = Field(None, ge=1)
    """Stop a stage after this many scores in a row without a better one; null = never."""

    @field_validator("objective", mode="before")
    @classmethod
    def _usual_objective(cls, value: Any) -> Any:
        return {"name": "mlm", **value} if isinstance(value, dict) else value

    @field_validator("every")
    @classmethod
    def _every_is_readable(cls, value: str) -> str:
        parse_every(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Pretrain:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(f"micro_batch_size {self.micro_batch_size} is larger than batch_size {self.batch_size}")
        if self.objective.name == "simcse":
            if self.micro_batch_size is not None and self.micro_batch_size < self.batch_size:
                raise ValueError(
                    "simcse compares the texts of a whole batch, which micro-batches would change; set "
                    "micro_batch_size to null, or a smaller batch_size"
                )
            if self.batch_size < 2:
                raise ValueError("simcse compares the texts of a batch with each other; batch_size must be 2 or more")
            if self.dropout == 0:
                raise ValueError("simcse tells two passes apart by dropout alone, and it is 0; set it to 0.1 or null")
        if self.patience is not None and not self.held_out_percent:
            raise ValueError("patience counts scores of held-out rows, and held_out_percent is 0; set one of them")
        return self
