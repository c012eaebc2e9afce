"""The loop: exact accumulation, evaluation without side effects, best weights, patience, NaN."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_TASKS, TinyCompetition
from torch import nn

from comp.config import Config
from comp.data.batches import Labels, collate, training_windows
from comp.data.tables import Table, read_train
from comp.data.tokens import encode
from comp.metrics import is_better
from comp.model.losses import num_outputs
from comp.model.sources import load_tokenizer
from comp.model.text_model import TextModel, build_model
from comp.progress import NullProgress
from comp.stability.adversarial import AWP, FGM, NoAdversary
from comp.stability.averaging import NoAverager
from comp.tracking import JsonlTracker, NullTracker
from comp.training.cadence import Cadence, Never
from comp.training.early import Evaluation
from comp.training.objective import Objective
from comp.training.trainer import NonFiniteError, Parts, TrainState, fit

CPU = torch.device("cpu")


def config_of(competition: TinyCompetition, backbone: Path, **sections: Any) -> Config:
    return Config.model_validate(competition.config(backbone, **sections))


def model_of(config: Config, table: Table, **options: Any) -> tuple[TextModel, Any]:
    tokenizer = load_tokenizer(config.model.backbone)
    torch.manual_seed(0)
    heads = {task.name: num_outputs(task, len(table.classes.get(task.name, []))) for task in config.tasks}
    options = {"dropout": 0.0, **options}
    model = build_model(
        config.model.backbone,
        tokenizer,
        pretrained=True,
        pooler={"name": "mean"},
        heads=heads,
        max_length=48,
        **options,
    )
    return model, tokenizer


def parts_of(
    config: Config,
    table: Table,
    model: TextModel,
    tokenizer: Any,
    rows: np.ndarray,
    *,
    micro: int | None = None,
    **own: Any,
) -> Parts:
    """Parts with plain SGD at rate 1, so that one step moves the weights by exactly the gradient."""
    encoded = encode(tokenizer, table.texts, max_length=48, cache=None)
    losses = Objective(config.tasks, table, rows)
    labels = Labels(table.targets, table.weights)
    defaults: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD([{"params": list(model.parameters()), "lr": 1.0, "peak_lr": 1.0}]),
        "schedule": lambda step: 1.0,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "autocast": nullcontext,
        "device": CPU,
        "windows": partial(training_windows, rows, encoded.lengths, batch_size=13, micro_batch_size=micro, seed=0),
        "collate": lambda part: collate(encoded, part, labels),
        "count": losses.count,
        "outputs": model,
        "adversary": NoAdversary(),
        "averager": NoAverager(),
        "loss": losses.share,
        "evaluate": lambda best, full: Evaluation(0.0, best),
        "others": dict,
        "showing": nullcontext,
        "keep_best": lambda step: None,
        "saver": SimpleNamespace(due=lambda step, evaluated: False),
        "stop_asked": lambda: None,
        "is_better": partial(is_better, config.metric),
        "cadence": Never(),
        "tracker": NullTracker(),
        "progress": NullProgress(),
        "epochs": 1,
        "steps_per_epoch": 5,
        "peak_lr": 1e-3,
    }
    parts = Parts(**{**defaults, **own})
    object.__setattr__(parts, "windows", lambda epoch, windows=parts.windows: windows(epoch=epoch))
    return parts


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


LOSSES = {
    "regression": [{"name": "mse"}, {"name": "smooth_l1", "beta": 0.1}, {"name": "mae"}],
    "binary": [{"name": "bce"}, {"name": "focal"}],
    "multiclass": [{"name": "cross_entropy", "label_smoothing": 0.1}, {"name": "focal"}],
    "multilabel": [{"name": "bce"}, {"name": "focal"}],
    "ordinal": [{"name": "mse"}],
}
ACCUMULATION = [(kind, loss, weighted) for kind in TINY_TASKS for loss in LOSSES[kind] for weighted in (False, True)]


@pytest.mark.parametrize(("kind", "loss", "weighted"), ACCUMULATION, ids=lambda value: str(value))
def test_accumulation_is_exact_for_ragged_windows(
    kind: str,
    loss: dict[str, Any],
    weighted: bool,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Callable[..., Path],
) -> None:
    """13 rows as 5 + 5 + 3 give the gradient of the 13 at once, and that of torch's own mean over items."""
    competition = tiny_competition(kind)
    tasks = [{"name": "main", "kind": kind, "targets": competition.targets, "loss": loss}]
    config = config_of(competition, tiny_model_folder("bert"), tasks=tasks)
    table = read_train(config.competition, config.tasks)
    if weighted:
        row_weights = np.random.default_rng(0).uniform(0, 3, len(table)).astype(np.float32)
        table = Table(table.ids, table.texts, table.targets, table.classes, row_weights, table.frame)
    rows = np.arange(13)
    moved = []
    for micro in (None, 5, 1):
        model, tokenizer = model_of(config, table)
        before = weights(model)
        state = fit(parts_of(config, table, model, tokenizer, rows, micro=micro), TrainState())
        assert state.step == 1
        moved.append({name: before[name] - after for name, after in weights(model).items()})
    assert max(gradient.abs().max().item() for gradient in moved[0].values()) > 1e-3
    for other in moved[1:]:
        for name, gradient in moved[0].items():
            assert torch.allclose(gradient, other[name], atol=1e-6), name


def test_several_tasks_add_up_by_weight(
    tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> None:
    competition = tiny_competition("regression")

    def gradient(tasks: list[dict[str, Any]]) -> torch.Tensor:
        config = config_of(competition, tiny_model_folder("bert"), tasks=tasks)
        table = read_train(config.competition, config.tasks)
        model, tokenizer = model_of(config, table)
        for head in model.heads.values():
            nn.init.constant_(head.weight, 0.05)
        before = weights(model)
        fit(parts_of(config, table, model, tokenizer, np.arange(13), micro=4), TrainState())
        name = "backbone.model.encoder.layer.0.output.dense.weight"
        return before[name] - weights(model)[name]

    one = {"name": "main", "kind": "regression", "targets": ["target"]}
    both = gradient([one, {**one, "name": "other", "weight": 0.5}])
    assert torch.allclose(both, 1.5 * gradient([one]), atol=1e-6)


@pytest.fixture
def ready(
    tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Callable[..., tuple[Parts, TextModel]]:
    config = config_of(tiny_competition("regression"), tiny_model_folder("bert"))
    table = read_train(config.competition, config.tasks)

    def make(dropout: float = 0.0, lr: float = 1e-3, **own: Any) -> tuple[Parts, TextModel]:
        model, tokenizer = model_of(config, table, dropout=dropout)
        optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "lr": lr, "peak_lr": lr}])
        return parts_of(config, table, model, tokenizer, np.arange(60), optimizer=optimizer, **own), model

    return make


def test_evaluation_leaves_training_alone(ready: Callable[..., tuple[Parts, TextModel]]) -> None:
    """Any cadence gives the same weights, dropout on: evaluation draws no random number and restores the mode."""
    results = []
    for cadence in (Never(), Cadence(10, interval=1), Cadence(10, interval=3)):
        parts, model = ready(dropout=0.3, cadence=cadence, epochs=2)

        def evaluate(best: float | None, full: bool, model: TextModel = model, parts: Parts = parts) -> Evaluation:
            model.eval()
            with torch.inference_mode():
                value = float(model(parts.collate(np.arange(8)))["main"].mean())
            model.train()
            return Evaluation(value, best)

        object.__setattr__(parts, "evaluate", evaluate)
        torch.manual_seed(5)
        state = fit(parts, TrainState())
        assert state.step == 10
        results.append(weights(model))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_best_is_kept_ties_do_not_count_and_patience_stops(ready: Callable[..., tuple[Parts, TextModel]]) -> None:
    scores = iter([3.0, 2.0, 2.0, 2.5, 1.0, 0.5])
    kept: list[int] = []
    state = TrainState()
    parts, _ = ready(
        cadence=Cadence(100, interval=1),
        evaluate=lambda best, full: Evaluation(next(scores), best),
        keep_best=kept.append,
        patience=2,
        epochs=20,
    )
    fit(parts, state)
    assert kept == [1, 2]
    assert (state.best_score, state.best_step, state.last_score, state.num_evaluations) == (2.0, 2, 2.5, 4)
    assert state.stopped_early
    assert state.step == 4


def test_rates_follow_the_schedule_and_clipping_happens_once(
    ready: Callable[..., tuple[Parts, TextModel]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, norms = [], []
    parts, model = ready(schedule=lambda step: 1 / (1 + step), clip_norm=0.01, micro=4)
    step = parts.optimizer.step

    def recorded(*args: Any, **options: Any) -> Any:
        rates.append(parts.optimizer.param_groups[0]["lr"])
        norms.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm().item())
        return step(*args, **options)

    monkeypatch.setattr(parts.optimizer, "step", recorded)
    fit(parts, TrainState())
    assert rates == pytest.approx([1e-3 / (1 + number) for number in range(5)])
    assert norms == pytest.approx([0.01] * 5, rel=1e-3)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_with_step_rate_and_advice(
    where: str, ready: Callable[..., tuple[Parts, TextModel]]
) -> None:
    parts, model = ready()
    original, calls = parts.loss, []

    def broken(outputs: Any, batch: Any, items: Any) -> torch.Tensor:
        calls.append(1)
        loss = original(outputs, batch, items)
        if len(calls) != 3:
            return loss
        # sqrt at 0: a finite loss with an infinite gradient
        return loss * float("nan") if where == "loss" else loss + (model.heads["main"].bias * 0).abs().sqrt().sum()

    object.__setattr__(parts, "loss", broken)
    with pytest.raises(NonFiniteError, match=r"stopped at step 3: .*learning rate 1.00e-03.*lower optimizer.lr"):
        fit(parts, TrainState())
    calls.clear()
    with pytest.raises(NonFiniteError, match=r"weights so far are kept\. Try another one\.$"):
        fit(replace(parts, remedy="another one"), TrainState())


def test_under_a_loss_scaler_an_infinite_gradient_is_a_skipped_step(
    ready: Callable[..., tuple[Parts, TextModel]],
) -> None:
    """fp16's scaler, on the CPU: its first scales overflow, those steps are skipped, then training goes on."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    parts, model = ready(scaler=scaler, clip_norm=1.0, epochs=4)
    original = parts.loss
    object.__setattr__(parts, "loss", lambda *inputs: 1000 * original(*inputs))
    before = weights(model)
    moved = []
    step = parts.optimizer.step
    object.__setattr__(parts.optimizer, "step", lambda *a, **k: (moved.append(1), step(*a, **k))[1])
    state = fit(parts, TrainState())
    assert state.step == 20
    assert 0 < len(moved) < 20
    assert scaler.get_scale() < 2.0**126
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert any(not torch.equal(before[name], after) for name, after in weights(model).items())


@pytest.mark.parametrize("attack", ["none", "fgm", "awp"])
@pytest.mark.parametrize("micro", [None, 4])
def test_a_loss_scale_changes_no_bit(
    attack: str, micro: int | None, ready: Callable[..., tuple[Parts, TextModel]]
) -> None:
    """Powers of two scale exactly, so only a wrong order (clipping, attacking or stepping before unscaling) differs."""
    found = []
    for scaler in (
        torch.amp.GradScaler("cpu", enabled=False),
        torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3),
    ):
        parts, model = ready(scaler=scaler, clip_norm=0.05, micro=micro, epochs=2)
        matrices = [p for block in model.backbone.blocks for p in block.parameters() if p.ndim > 1]
        words = model.backbone.model.get_input_embeddings().weight
        adversary = {
            "none": NoAdversary(),
            "fgm": FGM(words, eps=0.5),
            "awp": AWP(matrices, everything=list(model.parameters()), lr=0.1, eps=0.1, add_clean=True),
        }[attack]
        object.__setattr__(parts, "adversary", adversary)
        assert fit(parts, TrainState()).step == 10
        found.append(weights(model))
    assert scaler.get_scale() > 2.0**12, "the scale grew on the way"
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_the_log_has_losses_rates_and_scores(ready: Callable[..., tuple[Parts, TextModel]], tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    parts, _ = ready(tracker=tracker, cadence=Cadence(5, interval=2), evaluate=lambda best, full: Evaluation(0.7, best))
    state = fit(parts, TrainState())
    tracker.finish()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid/score" in line] == [2, 4, 5]
    training = [line for line in lines if "train/loss" in line]
    assert training[-1]["step"] == 5
    assert all(np.isfinite(line["train/loss"]) and line["train/tokens_per_second"] > 0 for line in training)
    assert state.num_tokens == int(parts.collate(np.arange(60)).mask.sum())


def test_training_learns(ready: Callable[..., tuple[Parts, TextModel]], tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    parts, _ = ready(tracker=tracker, epochs=12, lr=2e-3)
    fit(parts, TrainState())
    tracker.finish()
    losses = [json.loads(line)["train/loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]
