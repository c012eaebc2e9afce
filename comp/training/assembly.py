"""Config -> the parts of a fold that need the model: groups, optimizer, average, adversary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from comp.config import Config
from comp.data.tables import Table
from comp.data.tokens import Encoded
from comp.kernels import Kernels, choose
from comp.metrics import METRICS, is_better
from comp.model.frozen import NoFrozenStates, open_frozen_states
from comp.model.heads import plan_heads
from comp.model.sources import read_config
from comp.model.text_model import TextModel, build_model
from comp.model.token_pooling import PoolerOutput
from comp.optim import build_optimizer
from comp.optim.groups import ParameterGroup, build_groups
from comp.runtime import Runtime
from comp.stability.adversarial import AWP, FGM, NoAdversary
from comp.stability.averaging import EMA, SWA, NoAverager, Soup
from comp.stability.contrast import SupCon
from comp.stability.mixout import mix_
from comp.stability.reinit import reinit_blocks_, reinit_linear_
from comp.training.checkpoint import save_weights
from comp.training.held_out import HeldOut
from comp.training.lessons import Stages

__all__ = [
    "build_adversary",
    "build_averager",
    "build_fold_groups",
    "build_fold_model",
    "build_fold_optimizer",
    "build_supcon",
    "choose_kernels",
    "finish_average",
    "open_frozen",
]


def build_fold_model(config: Config, table: Table, tokenizer: Any) -> tuple[TextModel, list[nn.Parameter]]:
    """Return the model with re-initialisation and mixout in it, and the re-initialised parameters."""
    model, stability = config.model, config.stability
    built = build_model(
        model.backbone,
        tokenizer,
        pretrained=True,
        pooler=model.pooler.model_dump(),
        heads=plan_heads(config.tasks, table.classes),
        max_length=model.max_length,
        num_fields=len(table.texts),
        part=model.part,
        new_tokens=model.new_tokens,
        dropout=model.dropout,
        attention=model.attention,
        head_dropout=model.head_dropout,
        num_masks=max(1, model.multi_sample_dropout),
        with_vectors=stability.supcon.weight > 0,
        freeze_embeddings=model.freeze_embeddings,
        freeze_layers=model.freeze_layers,
        cache_frozen=model.cache_frozen,
        gradient_checkpointing=model.gradient_checkpointing,
        allow_pickle=model.allow_pickle,
    )
    fresh = reinit_blocks_(built.backbone, stability.reinit_layers)
    if stability.reinit_pooler:
        std = float(getattr(built.backbone.config, "initializer_range", 0.02))
        fresh += [
            p
            for module in built.modules()
            if isinstance(module, PoolerOutput)
            for p in reinit_linear_(module.dense, std)
        ]
    mix_(built.backbone, stability.mixout, fresh=fresh)  # after: what is random must not be mixed towards
    return built, fresh


def choose_kernels(
    config: Config, runtime: Runtime, known: Mapping[str, Any] | None, say: Callable[[str], None]
) -> tuple[Kernels, Runtime]:
    """Return what all folds of a run train with; `known`: what its manifest holds of an earlier choice."""
    model = config.model
    return choose(
        read_config(model.backbone, model.dropout),
        runtime,
        attention=model.attention,
        precision=config.training.precision,
        max_length=model.max_length,
        compiled=config.training.compile,
        known=known,
        say=say,
    )


def open_frozen(
    config: Config, encoded: Encoded, runtime: Runtime, folder: Path, say: Callable[[str], None]
) -> NoFrozenStates:
    """Make room for the states of the frozen part, which all folds share; nothing where the config does not want it."""
    if not config.model.cache_frozen:
        return NoFrozenStates()
    size = int(read_config(config.model.backbone, None).hidden_size)
    return open_frozen_states(encoded, hidden_size=size, runtime=runtime, folder=folder, say=say)


def build_fold_groups(config: Config, model: TextModel, fresh: list[nn.Parameter]) -> list[ParameterGroup]:
    """Return the parameter groups of a fold's model by the config's rates, decay and layout.

    `fresh`: parameters that were drawn anew, which no pretrained value pulls at. Raises ValueError as `build_groups`.
    """
    return build_groups(
        model,
        depth_of=model.depth_of,
        num_layers=model.backbone.num_layers,
        lr=config.optimizer.lr,
        head_lr=config.optimizer.head_lr,
        weight_decay=config.optimizer.weight_decay,
        prior_decay=config.stability.prior_decay,
        fresh=fresh,
        **config.groups.model_dump(),
    )


def build_fold_optimizer(config: Config, groups: list[ParameterGroup]) -> torch.optim.Optimizer:
    """Return the config's optimizer over the groups, its rates being theirs. Raises ValueError as `build_optimizer`."""
    own = config.optimizer.model_dump(exclude={"lr", "head_lr", "weight_decay", "clip_norm"})
    return build_optimizer(groups=groups, **own)


def build_averager(config: Config, model: TextModel, stages: Stages) -> tuple[NoAverager, Callable[[int], float]]:
    """Build what stability.averaging says; return it and the schedule, which SWA holds constant from its start."""
    chosen, schedule, steps, lead = config.stability.averaging, stages.schedule(), stages.last_steps, stages.lead_steps
    if chosen.name == "swa":
        start = max(1, math.ceil(steps * chosen.start_percent / 100))
        constant, from_here = chosen.lr_factor, lead + start
        average = SWA(model, start=from_here, interval=max(1, (steps - start) // (chosen.points - 1)))
        return average, schedule if constant is None else lambda step: schedule(step) if step < from_here else constant
    if chosen.name == "ema":
        decay = max(0.0, 1 - 10 / steps) if chosen.decay is None else chosen.decay
        return EMA(model, decay=decay, start=lead), schedule
    if chosen.name == "soup":
        return Soup(
            model, size=chosen.size, greedy=chosen.greedy, is_better=partial(is_better, config.metric)
        ), schedule
    return NoAverager(), schedule


def finish_average(
    averager: NoAverager, held: HeldOut | None, path: Path, model: TextModel, *, writes: bool = True
) -> float | None:
    """Finish the average, score it on the held-out rows and write it; None where there is none or no such rows."""
    averager.finish(None if held is None else held.try_weights)
    if not averager.ready:
        return None
    with averager.swapped_in():
        if writes:
            save_weights(path, model)
        return None if held is None else held.keep_averaged()


def build_adversary(config: Config, model: TextModel) -> NoAdversary:
    """Build what stability.adversarial says; the moved parameters are trained ones."""
    chosen = config.stability.adversarial
    own = chosen.model_dump(exclude={"name"})
    if chosen.name == "none":
        return NoAdversary()
    if chosen.name == "fgm":
        return FGM(model.backbone.model.get_input_embeddings().weight, **own)
    matrices = [p for block in model.backbone.blocks for p in block.parameters() if p.ndim > 1 and p.requires_grad]
    higher = METRICS[config.metric].higher_is_better
    return AWP(matrices, everything=list(model.parameters()), higher_is_better=higher, **own)


def build_supcon(config: Config, table: Table, training: NDArray[np.int64]) -> SupCon | None:
    """Build the contrastive term of the first task; its kernel is as wide as the targets of the training rows (M,) say.

    None where its weight is 0.
    """
    first, chosen = config.tasks[0], config.stability.supcon
    return SupCon(first.kind, table.targets[first.name][training], **chosen.model_dump()) if chosen.weight else None
