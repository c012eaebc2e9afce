"""What all folds of a run share, and which rows each trains on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from comp.config import Config
from comp.data.folds import Folding, train_rows, valid_rows
from comp.data.tables import Table
from comp.data.tokens import Encoded
from comp.model.frozen import NoFrozenStates
from comp.model.text_model import TextModel
from comp.progress import OpenProgress, open_progress
from comp.runs import RunFolder
from comp.runtime import Runtime, random_state, seed_everything, set_random_state
from comp.training.assembly import build_fold_model
from comp.training.job import Say
from comp.training.lessons import Fold, NoPseudo
from comp.training.resume import SaveEvery

__all__ = ["Fold", "Plan", "Ready", "Watch", "rows_of", "unwatched"]

Watch = Callable[[Fold, float, float], None]
"""Fold, share of its steps done, score of an evaluation; what it raises ends the training."""


def unwatched(fold: Fold, share: float, score: float) -> None:
    """Nobody watches the evaluations."""


class Ready:
    """A model that was built to see whether it fits; the fold that comes first takes it rather than build another."""

    def __init__(self) -> None:
        self.built: tuple[TextModel, list[nn.Parameter]] | None = None
        self.random: dict[str, Any] = {}

    def build(self, config: Config, table: Table, tokenizer: Any) -> tuple[TextModel, list[nn.Parameter]]:
        """Build the model from the config's seed, and keep it."""
        seed_everything(config.training.seed)
        self.built = build_fold_model(config, table, tokenizer)
        self.random = random_state()
        return self.built

    def take(self, config: Config, table: Table, tokenizer: Any) -> tuple[TextModel, list[nn.Parameter]]:
        """Return the kept model, once, then new ones; every generator stands where building leaves it."""
        built, self.built = self.built or self.build(config, table, tokenizer), None
        set_random_state(self.random)
        return built


@dataclass(frozen=True)
class Plan:
    """What all folds of a run share."""

    config: Config
    folder: RunFolder
    table: Table
    folding: Folding | None
    """None when only the full-data model is trained."""
    pseudo: NoPseudo
    tokenizer: Any
    encoded: Encoded
    """The rows of the table, then pseudo rows."""
    runtime: Runtime
    save_every: SaveEvery
    say: Say
    watch: Watch = unwatched
    open_progress: OpenProgress = open_progress
    ready: Ready = field(default_factory=Ready)
    to_come: int = 0
    """Folds that are still to be trained after the present one: the time left for the whole run."""
    precision: str = "auto"
    """What the runtime is opened with where a fold is trained."""
    attention: str | None = None
    """Kernel of training passes where the config leaves it open; None = as transformers has it."""
    frozen: NoFrozenStates = field(default_factory=NoFrozenStates)


def rows_of(
    fold: Fold, config: Config, table: Table, folding: Folding | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return (training rows, held-out rows) of a fold, cut to training.max_rows each."""
    if fold == "full":
        training, held_out = np.arange(len(table)), np.zeros(0, np.int64)
    else:
        assert folding is not None and isinstance(fold, int)
        training = train_rows(folding.fold, fold, folding.splitter)
        held_out = valid_rows(folding.fold, fold)
    limit = config.training.max_rows
    if limit is not None:
        generator = np.random.default_rng(config.training.seed)
        training = np.sort(generator.permutation(training)[:limit])
        held_out = np.sort(generator.permutation(held_out)[:limit])
    return training, held_out
