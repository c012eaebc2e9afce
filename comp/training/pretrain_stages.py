"""What the stages of pre-training are made of: the model, the corpora tokenized and split, their windows and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from comp.config import Config
from comp.config_pretrain import MLM, Corpus, Pretrain
from comp.data.batches import training_windows
from comp.data.corpora import Texts, read_texts, split_rows
from comp.data.folds import Folding, get_folds, train_rows
from comp.data.lineage import check_lineage
from comp.data.masking import Masker, encode_texts
from comp.data.tables import Table
from comp.data.tokens import Memory, encode
from comp.model.pretraining import MaskedLM, SentenceEncoder, load_masked_lm, load_sentence_encoder
from comp.optim.schedules import build_schedule
from comp.training.crossval import FOLDS, parse_folds
from comp.training.mlm import MaskedWords
from comp.training.simcse import TwinPasses

__all__ = [
    "Learner",
    "Lesson",
    "Stage",
    "build_stages",
    "load_learner",
    "parse_fold",
    "schedule_of",
    "steps_of",
    "windows_of",
]

Learner: TypeAlias = MaskedLM | SentenceEncoder
Lesson: TypeAlias = MaskedWords | TwinPasses
Rows: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Stage:
    """One corpus, tokenized."""

    number: int
    corpus: Corpus
    lesson: Lesson
    texts: Texts
    num_held_out: int
    """Texts that are held out."""

    @property
    def num_rows(self) -> int:
        """Rows of an epoch: texts, or blocks of packed ones."""
        return len(self.lesson.encoded)


def parse_fold(fold: str | None, config: Config) -> int | None:
    """Read --fold: one number, or None. Raises ValueError that says what is allowed."""
    if fold is None:
        return None
    folds = parse_folds(fold, config.folds.num_folds)
    if len(folds) != 1 or not isinstance(folds[0], int):
        raise ValueError(
            f"--fold '{fold}': a backbone is pre-trained for one fold, a number from 0 to "
            f"{config.folds.num_folds - 1}; leave it out for one on all texts"
        )
    return folds[0]


# --- building ---------------------------------------------------------------------------------------------------------


def load_learner(config: Config, options: Pretrain, tokenizer: Any) -> tuple[Learner, str]:
    """Return the model to train, and words about its head.

    Raises ValueError for one that the objective cannot train, or that is too short.
    """
    model, objective = config.model, options.objective
    how: dict[str, Any] = {"dropout": options.dropout, "allow_pickle": model.allow_pickle}
    how["gradient_checkpointing"] = model.gradient_checkpointing
    learner: Learner
    if isinstance(objective, MLM):
        learner, about = load_masked_lm(model.backbone, **how)
    else:
        learner, about = load_sentence_encoder(model.backbone, tokenizer, vector=objective.vector, **how), ""
    length = options.max_length or model.max_length
    if learner.max_positions is not None and length > learner.max_positions:
        raise ValueError(
            f"pretrain.max_length is {length}, but '{model.backbone}' has {learner.max_positions} positions; set it to "
            f"at most {learner.max_positions}"
        )
    return learner, about


def build_stages(
    config: Config,
    options: Pretrain,
    tokenizer: Any,
    learner: Learner,
    table: Table,
    test: Table | None,
    fold: int | None,
) -> tuple[list[Stage], Folding | None]:
    """Return the stages, and the folds where one is asked for; nothing is written.

    `fold`: whose training rows alone are read of the competition; None = all. Raises ValueError when a corpus cannot be
    read or is too small, the fold file does not fit, or the backbone has read held-out texts.
    """
    folding, training = None, None
    if fold is not None:
        folding = get_folds(FOLDS / f"{config.fold_name}.csv", table, config.tasks, config.folds)
        check_lineage(config.model.backbone, folding, [fold], table)
        training = train_rows(folding.fold, fold, folding.splitter)
    seed = config.training.seed
    stages = []
    for number, corpus in enumerate(options.corpora, 1):
        texts = read_texts(corpus, config.competition, table, test, training=training, seed=seed)
        rows, held_out = split_rows(len(texts), options.held_out_percent, seed)
        if options.objective.name == "simcse" and (len(rows) < 2 or len(held_out) == 1):
            raise ValueError(
                f"pretrain.corpora {number}: {len(rows)} texts to train on and {len(held_out)} held out, but simcse "
                "compares texts with each other; add texts, or change held_out_percent"
            )
        lesson = _lesson(config, options, tokenizer, learner, texts, rows, held_out)
        stages.append(Stage(number, corpus, lesson, texts, len(held_out)))
    return stages, folding


def _lesson(
    config: Config, options: Pretrain, tokenizer: Any, learner: Learner, texts: Texts, rows: Rows, held_out: Rows
) -> Lesson:
    objective, seed = options.objective, config.training.seed
    cutting = config.model.cutting | {"max_length": options.max_length or config.model.max_length}
    memory: Memory = {}
    parts = [tuple([column[row] for row in own] for column in texts.columns) for own in (rows, held_out)]
    if not isinstance(objective, MLM):
        both = encode(tokenizer, texts.columns, memory=memory, **cutting)
        return TwinPasses(both.take(rows), both.take(held_out), objective.temperature, options.batch_size, seed)
    maskers: list[Masker] = []
    for part in parts:
        if len(part[0]):
            packing, words_too = objective.packing, objective.whole_word
            encoded, words = encode_texts(tokenizer, part, packing=packing, words=words_too, memory=memory, **cutting)
        else:
            encoded, words = maskers[0].encoded.take(held_out), None
        vocab = int(learner.model.get_input_embeddings().num_embeddings)
        share = objective.mask_percent / 100
        maskers.append(Masker.build(encoded, words, tokenizer, vocab_size=vocab, share=share, seed=seed))
    return MaskedWords(maskers[0], maskers[1])


# --- steps ------------------------------------------------------------------------------------------------------------


def windows_of(config: Config, stage: Stage, epoch: int) -> list[list[Rows]]:
    """Return the windows of an epoch; of simcse without one that has a single row, which compares nothing."""
    options = config.pretrain or Pretrain()
    windows = training_windows(
        np.arange(stage.num_rows),
        stage.lesson.encoded.lengths,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        bucketing=config.training.length_bucketing,
        seed=config.training.seed,
        epoch=epoch,
    )
    if options.objective.name == "simcse":
        windows = [window for window in windows if len(window[0]) > 1]
    return windows


def steps_of(config: Config, stage: Stage) -> tuple[int, int, int]:
    """Return (optimizer steps, epochs, the last of which may be cut; steps of a whole epoch)."""
    options = config.pretrain or Pretrain()
    per_epoch, rest = divmod(stage.num_rows, options.batch_size)
    per_epoch += rest > (1 if options.objective.name == "simcse" else 0)
    steps = stage.corpus.steps or per_epoch * (stage.corpus.epochs or 1)
    return steps, -(-steps // per_epoch), per_epoch


def schedule_of(config: Config, stage: Stage) -> Callable[[int], float]:
    """Return step -> multiplier. Raises ValueError when the warm-up is longer than the stage."""
    steps, _, per_epoch = steps_of(config, stage)
    try:
        return build_schedule((config.pretrain or Pretrain()).schedule, num_steps=steps, steps_per_epoch=per_epoch)
    except ValueError as fault:
        raise ValueError(f"pretrain, stage {stage.number}: {fault}") from None
