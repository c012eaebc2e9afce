"""FGM, AWP, R-Drop and multi-sample dropout against formulas written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import TinyCompetition
from safetensors.torch import load_file
from torch import nn

from comp import config_file
from comp.config import Task
from comp.data.batches import Batch, collate
from comp.data.tokens import encode
from comp.model.sources import load_tokenizer
from comp.model.text_model import build_model
from comp.stability.adversarial import AWP, FGM, NoAdversary
from comp.stability.consistency import disagreement, twice
from comp.training import crossval
from comp.training.objective import Objective


class Small(nn.Module):
    """Words -> mean -> two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 1)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(self.words(ids).mean(1)))).square().sum()


IDS = torch.tensor([[1, 2, 3], [4, 4, 7]])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def attacked(model: Small, adversary: NoAdversary) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss(IDS).backward()
    before = weights(model)
    with adversary.perturbed() as moved:
        assert moved
        assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        model.loss(IDS).backward()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters()), (
        "restored bit by bit"
    )
    return gradients(model)


def test_fgm_adds_the_gradient_at_the_moved_word_table() -> None:
    model, by_hand = Small(), Small()
    found = attacked(model, FGM(model.words.weight, eps=0.7))
    by_hand.loss(IDS).backward()
    clean = gradients(by_hand)
    with torch.no_grad():
        by_hand.words.weight.add_(0.7 * clean["words.weight"] / clean["words.weight"].norm())
    by_hand.zero_grad()
    by_hand.loss(IDS).backward()
    for name, gradient in gradients(by_hand).items():
        assert torch.allclose(found[name], clean[name] + gradient, atol=1e-6), name


@pytest.mark.parametrize("add_clean", [False, True])
def test_awp_steps_on_the_gradient_at_the_moved_matrices(add_clean: bool) -> None:
    model, by_hand = Small(), Small()
    matrices = [model.first.weight, model.second.weight]
    adversary = AWP(matrices, everything=list(model.parameters()), lr=0.3, eps=0.2, add_clean=add_clean)
    found = attacked(model, adversary)
    by_hand.loss(IDS).backward()
    clean = gradients(by_hand)
    with torch.no_grad():
        for name in ("first.weight", "second.weight"):
            w = dict(by_hand.named_parameters())[name]
            moved = w + 0.3 * w.norm() * clean[name] / clean[name].norm()
            w.copy_(torch.clamp(moved, w - 0.2 * w.abs(), w + 0.2 * w.abs()))
    by_hand.zero_grad()
    by_hand.loss(IDS).backward()
    for name, gradient in gradients(by_hand).items():
        expected = gradient + clean[name] if add_clean else gradient
        assert torch.allclose(found[name], expected, atol=1e-6), name
    assert not torch.allclose(found["words.weight"], clean["words.weight"])


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_a_loss_scale_changes_nothing(scale: float) -> None:
    model = Small()
    model.loss(IDS).mul(scale).backward()
    with FGM(model.words.weight, eps=0.7).perturbed():
        moved = model.words.weight.detach().clone()
    plain = Small()
    plain.loss(IDS).backward()
    with FGM(plain.words.weight, eps=0.7).perturbed():
        assert torch.allclose(plain.words.weight, moved, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_without_a_direction_there_is_no_second_pass(value: float) -> None:
    model = Small()
    start = weights(model)
    model.words.weight.grad = torch.full_like(model.words.weight, value)
    with FGM(model.words.weight, eps=0.7).perturbed() as moved:
        assert not moved
        assert torch.equal(model.words.weight, start["words.weight"])
    with NoAdversary().perturbed() as moved:
        assert not moved
    assert not NoAdversary().due(99.0, 0.1)


def test_when_to_attack() -> None:
    words = nn.Parameter(torch.ones(2, 2))
    assert not FGM(words, eps=1, start_epoch=1.0).due(0.99, None)
    assert FGM(words, eps=1, start_epoch=1.0).due(1.0, None)
    lower = AWP([words], everything=[words], lr=1, eps=1, start_score=0.5)
    assert [lower.due(0, score) for score in (None, 0.6, 0.5, 0.4)] == [False, False, True, True]
    higher = AWP([words], everything=[words], lr=1, eps=1, start_score=0.5, higher_is_better=True, start_epoch=1)
    assert [higher.due(1, score) for score in (None, 0.6, 0.5, 0.4)] == [False, True, True, False]
    assert not higher.due(0.5, 0.9)


@pytest.mark.parametrize("name", ["fgm", "awp"])
def test_accumulation_gives_the_step_of_the_one_big_batch(
    name: str, isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> None:
    data = tiny_competition().config(tiny_model_folder("bert"))
    data["stability"] = {"adversarial": {"name": name, "start_epoch": 0}}
    data["training"] |= {"batch_size": 12}
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    found = []
    for run, micro in (("whole", "null"), ("parts", "5")):
        config = config_file.load("tiny.yaml", [f"training.micro_batch_size={micro}"])
        crossval.run(config, run, "0", say=lambda line: None)
        found.append(load_file(f"runs/{run}/fold0/last.safetensors"))
    for key in found[0]:
        assert torch.allclose(found[0][key], found[1][key], atol=2e-5), key


# --- R-Drop ----------------------------------------------------------------------------------------------------------


def test_disagreement_of_classes_is_torchs_symmetric_kl() -> None:
    output = torch.randn(2, 6, 4, dtype=torch.float64)
    p, q = F.log_softmax(output[0], -1), F.log_softmax(output[1], -1)
    both = [F.kl_div(a, b, reduction="none", log_target=True).sum(-1) for a, b in ((p, q), (q, p))]
    assert torch.allclose(disagreement(output, "multiclass").double(), sum(both) / 2, atol=1e-6)


def test_disagreement_of_columns_is_that_of_bernoullis_and_of_numbers_their_square() -> None:
    output = torch.randn(2, 6, 3)
    p, q = output[0].sigmoid(), output[1].sigmoid()

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).sum(-1)

    for kind in ("binary", "multilabel", "steps"):
        assert torch.allclose(disagreement(output, kind), (kl(p, q) + kl(q, p)) / 2, atol=1e-5)
    assert torch.allclose(disagreement(output, "regression"), (output[0] - output[1]).square().sum(-1))
    branches = torch.randn(4, 6, 1)
    expected = ((branches[0] - branches[2]) ** 2 + (branches[1] - branches[3]) ** 2)[:, 0] / 2
    assert torch.allclose(disagreement(branches, "regression"), expected)


def objective_of(kind: str, **options: Any) -> tuple[Objective, Batch]:
    targets = np.array([[0.0], [1.0], [2.0], [1.0]], np.float32)
    table: Any = SimpleNamespace(targets={"t": targets}, weights=None, classes={"t": ["a", "b", "c"]})
    task = Task(name="t", kind=kind, targets=["x"])
    batch = Batch(np.arange(4), torch.ones(4, 1), torch.ones(4, 1), 4, targets={"t": torch.from_numpy(targets)})
    return Objective([task], table, np.arange(4), **options), batch


def test_rdrop_is_both_losses_plus_the_mean_disagreement() -> None:
    objective, batch = objective_of("multiclass", rdrop=3.0)
    output = torch.randn(2, 4, 3)
    labels = batch.targets["t"][:, 0].long()
    expected = F.cross_entropy(output[0], labels) + F.cross_entropy(output[1], labels)
    expected = expected + 3 * disagreement(output, "multiclass").mean()
    found = objective.share({"t": output}, batch, objective.count(np.arange(4)))
    assert torch.allclose(found, expected, atol=1e-6)
    # the published snippet's sum over the batch doubles with it; a mean does not
    rows = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    doubled = Batch(rows, torch.ones(8, 1), torch.ones(8, 1), 8, targets={"t": batch.targets["t"].repeat(2, 1)})
    again = objective.share({"t": output.repeat(1, 2, 1)}, doubled, objective.count(rows))
    assert torch.allclose(again, expected, atol=1e-6)


def test_twice_passes_the_batch_twice() -> None:
    torch.manual_seed(0)
    model = nn.Dropout(0.5)
    outputs = twice(lambda batch: {"t": model(batch)})(torch.ones(4, 3))
    assert outputs["t"].shape == (2, 4, 3)
    assert not torch.equal(outputs["t"][0], outputs["t"][1])
    assert twice(lambda batch: {"t": batch})(torch.ones(3, 4, 2))["t"].shape == (6, 4, 2)


# --- multi-sample dropout --------------------------------------------------------------------------------------------


def test_masks_share_one_pass_and_their_losses_are_averaged(tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder("bert")
    tokenizer = load_tokenizer(str(folder))
    model = build_model(
        folder, tokenizer, pretrained=True, pooler={"name": "mean"}, heads={"t": 3}, max_length=32,
        head_dropout=0.5, num_masks=5,
    )  # fmt: skip
    texts = ["the ship was golden", "a dull tram", "deer", "on the bridge"]
    batch = collate(encode(tokenizer, (texts,), max_length=32, cache=None), np.arange(4))
    calls: list[int] = []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    outputs = model.train()(batch)["t"]
    assert outputs.shape == (5, 4, 3)
    assert len(calls) == 1
    assert not torch.equal(outputs[0], outputs[1])
    assert model.eval()(batch)["t"].shape == (4, 3)
    objective, labelled = objective_of("multiclass", num_masks=5)
    labels = labelled.targets["t"][:, 0].long()
    expected = torch.stack([F.cross_entropy(view, labels) for view in outputs]).mean()
    assert torch.allclose(objective.share({"t": outputs}, labelled, objective.count(np.arange(4))), expected, atol=1e-6)
    assert not torch.allclose(F.cross_entropy(outputs.mean(0), labels), expected), "the mean of logits is another loss"
