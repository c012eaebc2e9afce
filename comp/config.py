"""Every knob of a run, typed and strict. No torch in here; files are read by config_file.py.

Sections are frozen. An unknown key is an error. A field's meaning, unit and the value that turns it off stand under
the field, and reach editors through the JSON schema (`comp config schema`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from comp.catalog import nearest
from comp.config_optimizers import AdamW, Optimizer
from comp.config_poolers import DensePooler, MeanPooler, Pooler
from comp.config_pretrain import Pretrain
from comp.config_pseudo import Pseudo
from comp.config_section import Section
from comp.config_stability import Stability
from comp.config_training import Evaluation, Training
from comp.config_variants import Groups, LinearSchedule, Loss, Schedule, UnifiedLayout
from comp.metrics import METRICS

__all__ = [
    "DEFAULT_LOSS",
    "LOSS_KINDS",
    "Config",
    "Kind",
    "Task",
]

Kind = Literal["regression", "binary", "multiclass", "multilabel", "ordinal"]


class Competition(Section):
    """Where the competition's files are, and which columns matter."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the competition: the W&B project and the default name of the fold file."""
    train: str
    """Training table, CSV or parquet; relative to the current directory."""
    test: str | None = None
    """Test table; null = `comp infer` must be given `--test`."""
    sample_submission: str | None = None
    """Kaggle's sample_submission.csv; null = `comp infer` writes predictions under the target columns' names."""
    id: str = "id"
    """Column that names each row, unique within a table."""
    text: str | list[str] = "text"
    """Text column, or a list: two become a pair, more are joined by the separator token."""
    weight: str | None = None
    """Column of row weights (>= 0) used by the training loss only; null = every row counts the same."""

    @property
    def text_columns(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else list(self.text)

    @field_validator("text")
    @classmethod
    def _text_named_once(cls, value: str | list[str]) -> str | list[str]:
        names = [value] if isinstance(value, str) else value
        if not names or len(set(names)) != len(names):
            raise ValueError(f"name at least one text column, each once; got {names}")
        return value


# --- tasks and losses ------------------------------------------------------------------------------------------------


LOSS_KINDS: dict[str, tuple[str, ...]] = {
    "mse": ("regression", "ordinal"),
    "smooth_l1": ("regression", "ordinal"),
    "mae": ("regression", "ordinal"),
    "rmse": ("regression", "ordinal"),
    "gaussian_nll": ("regression",),
    "pearson": ("regression", "ordinal"),
    "pairwise_rank": ("regression", "ordinal"),
    "ordinal": ("ordinal",),
    "bce": ("binary", "multilabel"),
    "cross_entropy": ("multiclass",),
    "focal": ("binary", "multilabel", "multiclass"),
}
DEFAULT_LOSS: dict[str, str] = {
    "regression": "mse",
    "binary": "bce",
    "multiclass": "cross_entropy",
    "multilabel": "bce",
    "ordinal": "mse",
}
DEFAULT_METRIC: dict[str, str] = {
    "regression": "rmse",
    "binary": "log_loss",
    "multiclass": "accuracy",
    "multilabel": "log_loss",
    "ordinal": "qwk",
}
WHOLE_BATCH_LOSSES = ("rmse", "pearson", "pairwise_rank")
"""Losses of all rows of a batch together: not a sum over rows, so micro-batches would change them."""


class Task(Section):
    """One head of the model. The first task is the one submitted and the one that chooses the best checkpoint; the
    targets of the others may have empty cells, which the loss leaves out."""

    name: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Name of the head in logs and checkpoints."""
    kind: Kind
    """regression: any real columns. binary: one column of 0..1 (soft labels allowed). multiclass: one column of
    labels, or one column of probabilities per class (soft labels, each row sums to 1). multilabel: several columns of
    0..1. ordinal: one column of integer grades, predicted as a number and rounded to the nearest grade where a metric
    or a submission wants grades."""
    targets: list[str] = Field(min_length=1)
    """Target columns of the training table."""
    loss: Loss
    """Loss of this head; left out = mse (regression, ordinal), bce (binary, multilabel) or cross_entropy
    (multiclass)."""
    weight: float = Field(1.0, gt=0)
    """Weight of this head's loss in the sum."""
    metric: str | None = None
    """Metric of an auxiliary task; null = rmse (regression), log_loss (binary, multilabel), accuracy (multiclass) or
    qwk (ordinal). The first task's is the config's `metric`."""

    @model_validator(mode="before")
    @classmethod
    def _usual_loss(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("loss") is None and data.get("kind") in DEFAULT_LOSS:
            return {**data, "loss": {"name": DEFAULT_LOSS[data["kind"]]}}
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Task:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets are named twice: {self.targets}")
        single, several = len(self.targets) == 1, len(self.targets) > 1
        if self.loss.name == "gaussian_nll" and not single:
            raise ValueError(f"loss 'gaussian_nll' has one standard error a row, so one target; got {self.targets}")
        if self.metric is not None and (self.metric not in METRICS or self.kind not in METRICS[self.metric].kinds):
            fitting = [name for name, row in METRICS.items() if self.kind in row.kinds]
            raise ValueError(f"metric '{self.metric}' does not fit kind '{self.kind}'; allowed: {', '.join(fitting)}")
        if self.kind in ("binary", "ordinal") and not single:
            raise ValueError(
                f"kind '{self.kind}' has exactly one target column, got {len(self.targets)}; "
                "several columns of 0 and 1 are kind 'multilabel', several numbers are kind 'regression'"
            )
        if self.kind == "multilabel" and not several:
            raise ValueError("kind 'multilabel' needs several target columns; one column is kind 'binary'")
        if self.kind not in LOSS_KINDS[self.loss.name]:
            fitting = [name for name, kinds in LOSS_KINDS.items() if self.kind in kinds]
            raise ValueError(f"loss '{self.loss.name}' does not fit kind '{self.kind}'; allowed: {', '.join(fitting)}")
        return self


# --- folds and model -------------------------------------------------------------------------------------------------


class Folds(Section):
    """How the training rows are split; written once to folds/<name>.csv."""

    splitter: Literal["kfold", "stratified", "group", "stratified_group", "multilabel_stratified", "time", "column"] = (
        "stratified"
    )
    """Splitter (see `comp list splitters`)."""
    num_folds: int = Field(5, ge=2)
    """Number of folds."""
    seed: int = Field(42, ge=0)
    """Seed of the shuffle."""
    group: str | None = None
    """Column whose values never cross folds; needed by `group` and `stratified_group`."""
    bins: int | Literal["auto"] = "auto"
    """Bins of a continuous target when stratifying; auto = Sturges, 1 + log2(rows)."""
    column: str | None = None
    """splitter `column`: the training table's own column of fold numbers (0, 1, ...). splitter `time`: the column to
    sort by (number or ISO date)."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the fold file, folds/<name>.csv; null = the competition's name."""

    @model_validator(mode="after")
    def _columns_for_splitter(self) -> Folds:
        if self.splitter in ("group", "stratified_group") and not self.group:
            raise ValueError(f"splitter '{self.splitter}' needs `group`: the column whose values stay together")
        if self.splitter in ("time", "column") and not self.column:
            what = "the column to sort by" if self.splitter == "time" else "the column of fold numbers"
            raise ValueError(f"splitter '{self.splitter}' needs `column`: {what}")
        if self.column and self.splitter not in ("time", "column"):
            raise ValueError(f"splitter '{self.splitter}' does not read `column`; leave it out")
        binned = ("stratified", "stratified_group", "multilabel_stratified")
        if self.bins != "auto" and self.splitter not in binned:
            raise ValueError(f"splitter '{self.splitter}' does not read `bins`; only {', '.join(binned)} do")
        if isinstance(self.bins, int) and self.bins < 2:
            raise ValueError(f"bins must be at least 2, or auto; got {self.bins}")
        return self


class TextWindows(Section):
    """Texts longer than max_length as overlapping windows, whose vectors are averaged."""

    stride: int = Field(64, ge=0)
    """Tokens that neighbouring windows share (the meaning of `stride` in Hugging Face tokenizers)."""
    max_windows: int = Field(4, ge=2)
    """Most windows of a text; `truncation` says which are kept of more."""


class Model(Section):
    """Backbone, pooler and what is trained of them."""

    backbone: str = Field(min_length=1)
    """Hub name, local folder, or package:NAME (a model inside an installed Python package)."""
    part: Literal["encoder", "decoder"] = "encoder"
    """Half of an encoder-decoder (BART) that is read: the encoder alone, whose first token classifies, or the decoder
    run over the same text, as BART classifies: on the last </s>. Other models: encoder."""
    pooler: Pooler = MeanPooler()
    """How token vectors become one vector (see `comp list poolers`)."""
    max_length: int = Field(256, ge=4)
    """Tokens per text, special tokens included; longer texts are cut or become windows."""
    truncation: Literal["head", "tail", "head_tail"] = "head"
    """What is kept of a text that is too long: its head, its tail, or a quarter from the head and the rest from the
    tail."""
    windows: TextWindows | None = None
    """Read long texts whole, as windows of max_length; null = cut them. The cost grows with the windows."""
    new_tokens: list[str] = Field(default_factory=list)
    """Tokens that the tokenizer is given besides its own, each with an embedding that begins as the mean of all: "\\n"
    where it drops line ends (DeBERTa), or marks that stand in the texts, such as [NAME]. The features `embeddings` of
    `comp classical` are of the model as it was pretrained, without them."""
    dropout: float | None = Field(0.0, ge=0, lt=1)
    """Every dropout of the backbone; null = the checkpoint's own."""
    attention: Literal["auto", "sdpa", "eager", "blocked", "packed"] = "auto"
    """Kernel of attention: sdpa = torch's fused ones, eager = matrix products, blocked = a few heads at a time, for the
    caches of a CPU, packed = the same with texts laid end to end, without padding: for batches of many lengths. auto =
    in training the fastest of the first three on this device with this dropout, measured once and kept (`comp doctor`),
    otherwise as transformers has it."""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the pooled vector; 0 = off."""
    multi_sample_dropout: int = Field(0, ge=0)
    """Masks of head_dropout per text, whose losses are averaged (arXiv:1905.09788); 0 = off."""
    freeze_embeddings: bool | Literal["words"] = False
    """Keep the embeddings fixed: true = the whole module (words, positions, types, norm), words = the word table."""
    freeze_layers: int = Field(0, ge=0)
    """Keep the lowest n blocks fixed; 0 = off."""
    cache_frozen: bool = False
    """Compute the frozen embeddings and blocks once per text and keep their states for all epochs, evaluations and
    folds, in memory or on disk: equal to about 1e-6 in fp32. Needs freeze_embeddings true, freeze_layers and dropout
    0."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: about 30% slower, much less memory."""
    allow_pickle: bool = False
    """Read the backbone's weights from pytorch_model.bin where it has no safetensors; false = refuse them."""

    @model_validator(mode="after")
    def _new_tokens_can_be_learned(self) -> Model:
        if len(set(self.new_tokens)) < len(self.new_tokens) or not all(token.strip(" ") for token in self.new_tokens):
            raise ValueError(f"model.new_tokens {self.new_tokens}: each once, and none empty or of spaces alone")
        if self.new_tokens and self.freeze_embeddings:
            raise ValueError(
                "model.new_tokens are learned, but model.freeze_embeddings keeps the word table as it is; leave one out"
            )
        return self

    @model_validator(mode="after")
    def _frozen_part_is_fixed(self) -> Model:
        wanted = {"freeze_embeddings": (self.freeze_embeddings, True), "dropout": (self.dropout, 0.0)}
        wrong = [f"{key} is {own}, not {needed}" for key, (own, needed) in wanted.items() if own != needed]
        wrong += ["freeze_layers is 0"] if not self.freeze_layers else []
        if self.cache_frozen and wrong:
            raise ValueError(
                f"model.cache_frozen keeps what never changes, but {', '.join(wrong).replace('True', 'true')}; set "
                "freeze_embeddings true, freeze_layers to 1 or more and dropout to 0, or cache_frozen to false"
            )
        return self

    @property
    def innermost_pooler(self) -> Pooler:
        """The pooler under any dense layers."""
        pooler = self.pooler
        while isinstance(pooler, DensePooler):
            pooler = pooler.of
        return pooler

    @property
    def cutting(self) -> dict[str, Any]:
        """What the tokens of a text depend on: keyword arguments of `encode`."""
        return self.model_dump(include={"max_length", "truncation", "windows"})


# --- optimisation ----------------------------------------------------------------------------------------------------


# --- the run ---------------------------------------------------------------------------------------------------------


class Tracking(Section):
    """Weights & Biases and other trackers. metrics.jsonl is always written."""

    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """auto = online with an API key, else offline; not installed = off."""
    project: str | None = None
    """W&B project; null = the competition's name."""
    group: str | None = None
    """W&B group; null = the run's name."""
    tags: list[str] = Field(default_factory=list)
    """W&B tags."""
    also: list[Literal["tensorboard", "trackio"]] = Field(default_factory=list)
    """More trackers (see `comp list trackers`), each an extra of its name; they use the project and group above."""


class Config(Section):
    """One experiment."""

    competition: Competition
    tasks: list[Task] = Field(min_length=1)
    """One head each; the first is submitted and scored."""
    metric: str
    """Metric of the first task (see `comp list metrics`)."""
    folds: Folds = Folds()
    model: Model
    optimizer: Optimizer = AdamW()
    """The optimizer and its rates (see `comp list optimizers`)."""
    groups: Groups = UnifiedLayout()
    """Learning rates by depth (see `comp list layouts`)."""
    schedule: Schedule = LinearSchedule()
    """Learning rate over the run (see `comp list schedules`)."""
    stability: Stability = Stability()
    training: Training = Training()
    pseudo: Pseudo | None = None
    """Pseudo-labelled rows of `comp pseudo`; null = off."""
    pretrain: Pretrain | None = None
    """What `comp pretrain` does, which training does not look at; null = its defaults."""
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()

    @field_validator("optimizer", mode="before")
    @classmethod
    def _usual_optimizer(cls, value: Any) -> Any:
        return {"name": "adamw", **value} if isinstance(value, dict) else value

    @field_validator("metric")
    @classmethod
    def _metric_exists(cls, value: str) -> str:
        if value not in METRICS:
            raise ValueError(f"unknown metric '{value}'{nearest(value, METRICS)} Allowed: {', '.join(METRICS)}")
        return value

    @field_validator("tasks")
    @classmethod
    def _tasks_differ(cls, value: list[Task]) -> list[Task]:
        names = [task.name for task in value]
        if len(set(names)) != len(names):
            raise ValueError(f"two tasks have the same name: {names}")
        return value

    @model_validator(mode="after")
    def _tasks_fit_the_rest(self) -> Config:
        if self.tasks[0].metric is not None:
            raise ValueError(
                f"the first task '{self.tasks[0].name}' has a metric of its own; set `metric` of the config instead"
            )
        if self.whole_batch and (self.training.micro_batch_size or self.training.batch_size) < self.training.batch_size:
            raise ValueError(
                f"{self.whole_batch} compares the rows of a whole batch, which micro-batches of "
                f"{self.training.micro_batch_size} would change; set training.micro_batch_size to null, or a smaller "
                "training.batch_size"
            )
        return self

    @model_validator(mode="after")
    def _stability_fits_the_rest(self) -> Config:
        stability, optimizer = self.stability, self.optimizer
        if stability.mixout and self.model.dropout != 0:
            raise ValueError(
                f"stability.mixout takes the place of dropout, but model.dropout is {self.model.dropout}; set it to 0"
            )
        if stability.averaging.name != "none" and (
            optimizer.name == "radam_lookahead" or getattr(optimizer, "lookahead", None) is not None
        ):
            raise ValueError(
                f"stability.averaging '{stability.averaging.name}' and lookahead both average the weights along the "
                "run; set one of them to none"
            )
        if stability.mixout and stability.prior_decay:
            raise ValueError(
                "stability.mixout and stability.prior_decay both pull to the pretrained weights; set one to 0"
            )
        if stability.prior_decay and optimizer.name == "madgrad" and optimizer.momentum:
            raise ValueError(
                "madgrad with momentum starts every step from the weights it began with, so it forgets what "
                "stability.prior_decay does; set optimizer.momentum to 0, or the decay"
            )
        if stability.reinit_pooler and self.model.innermost_pooler.name != "pooler_output":
            raise ValueError(
                f"stability.reinit_pooler is for the checkpoint's own pooler, but model.pooler is "
                f"'{self.model.pooler.name}'; set it to false, or the pooler to pooler_output"
            )
        return self

    @model_validator(mode="after")
    def _noise_fits_the_rest(self) -> Config:
        model, stability = self.model, self.stability
        if model.multi_sample_dropout and not model.head_dropout:
            raise ValueError(
                "model.multi_sample_dropout draws masks of model.head_dropout, which is 0; set it to 0.1 or so"
            )
        if stability.rdrop and not (model.dropout != 0 or model.head_dropout or stability.mixout):
            raise ValueError(
                "stability.rdrop compares two passes with different noise, but there is none; set model.dropout (or "
                "head_dropout, or stability.mixout) above 0"
            )
        if stability.adversarial.name == "fgm" and model.freeze_embeddings:
            raise ValueError(
                "stability.adversarial 'fgm' moves the word table, which model.freeze_embeddings keeps fixed; use awp, "
                "or set freeze_embeddings to false"
            )
        return self

    @model_validator(mode="after")
    def _compiled_fits_the_rest(self) -> Config:
        model = self.model
        unfit = {
            "cache_frozen; set one of them to false": model.cache_frozen,
            "gradient_checkpointing; set one of them to false": model.gradient_checkpointing,
            "attention packed, whose passes go by the batch's lengths; set it to auto": model.attention == "packed",
        }
        found = next((words for words, there in unfit.items() if there), None)
        if self.training.compile and found is not None:
            raise ValueError(f"training.compile does not work with model.{found}")
        return self

    @model_validator(mode="after")
    def _shards_fit_the_rest(self) -> Config:
        stability, optimizer = self.stability, self.optimizer
        unfit = {
            "stability.mixout": stability.mixout > 0,
            f"stability.adversarial '{stability.adversarial.name}'": stability.adversarial.name != "none",
            f"stability.averaging '{stability.averaging.name}'": stability.averaging.name != "none",
            "model.cache_frozen": self.model.cache_frozen,
            "training.compile": self.training.compile,
            f"optimizer '{optimizer.name}'": optimizer.name not in ("adamw", "bertadam", "radam", "madgrad"),
            "optimizer.lookahead": getattr(optimizer, "lookahead", None) is not None,
        }
        found = [name for name, there in unfit.items() if there]
        if self.training.shard and found:
            raise ValueError(
                f"training.shard does not work with {' and '.join(found)}, which need the whole model in each process; "
                "turn off one or the other (the optimizers adamw, bertadam, radam and madgrad work with it)"
            )
        return self

    @model_validator(mode="after")
    def _pseudo_fits_task(self) -> Config:
        if self.pseudo is not None:
            self.pseudo.must_fit(self.tasks[0].kind, self.tasks[0].loss.name)
        return self

    @model_validator(mode="after")
    def _pooler_fits_texts(self) -> Config:
        count = len(self.competition.text_columns)
        if self.model.innermost_pooler.name == "two_tower" and count < 2:
            raise ValueError(
                f"pooler 'two_tower' needs two text columns or more; competition.text has {count}: "
                f"{', '.join(self.competition.text_columns)}; name another one, or use pooler 'dense'"
            )
        return self

    @model_validator(mode="after")
    def _metric_fits_task(self) -> Config:
        kind = self.tasks[0].kind
        if kind not in METRICS[self.metric].kinds:
            fitting = [name for name, row in METRICS.items() if kind in row.kinds]
            raise ValueError(
                f"metric '{self.metric}' does not fit the first task's kind '{kind}'; allowed: {', '.join(fitting)}"
            )
        self.evaluation.must_fit(self.metric, self.stability)
        self.training.must_fit(self.model.max_length, self.whole_batch)
        return self

    def metric_of(self, task: Task) -> str:
        """Return the metric a task is reported by."""
        return self.metric if task is self.tasks[0] else task.metric or DEFAULT_METRIC[task.kind]

    @property
    def whole_batch(self) -> str | None:
        """What compares the rows of a whole batch, so that micro-batches would change it; None = nothing does."""
        found = [f"the loss of task '{task.name}'" for task in self.tasks if task.loss.name in WHOLE_BATCH_LOSSES]
        found += ["stability.supcon"] if self.stability.supcon.weight else []
        return found[0] if found else None

    @property
    def fold_name(self) -> str:
        """Stem of the fold file."""
        return self.folds.name or self.competition.name
