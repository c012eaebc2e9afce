"""The supervised contrastive term against equation 2 of Khosla et al., written out pair by pair in float64."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from comp import config_file
from comp.config import Task
from comp.data.batches import Batch
from comp.model.text_model import VECTOR
from comp.stability.contrast import SupCon
from comp.training.objective import ROWS, Objective

OPTIONS = {"weight": 1.0, "temperature": 0.5, "bandwidth": 0.8}


def by_hand(vectors: torch.Tensor, like: np.ndarray, temperature: float = 0.5) -> list[float]:
    z = [row / row.norm() for row in vectors.double()]
    losses = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]
        bottom = sum(math.exp(float(z[i] @ z[a]) / temperature) for a in others)
        chosen = {a: math.log(math.exp(float(z[i] @ z[a]) / temperature) / bottom) for a in others}
        total = sum(float(like[i, a]) for a in others)
        losses.append(-sum(float(like[i, a]) * chosen[a] for a in others) / total if total else 0.0)
    return losses


def kernel(targets: np.ndarray, std: np.ndarray) -> np.ndarray:
    apart = (((targets[:, None] - targets[None]) / std) ** 2).mean(-1)
    return np.exp(-apart / (2 * 0.8**2))


GRADES = np.array([[-1.0], [0.5], [0.5], [2.0], [7.0]])
PAIRS = np.array([[-1.0, 3.0], [0.5, 1.0], [0.5, -1.0], [2.0, 0.0], [7.0, 0.0]])
SOFT = np.array([[0.9], [0.1], [0.4], [1.0], [0.0]])
SHARES = np.array([[0.7, 0.3, 0.0], [0.0, 0.0, 1.0], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
LABELS = np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
CASES: dict[str, tuple[str, np.ndarray, np.ndarray]] = {
    "classes": ("multiclass", np.array([[0.0], [2.0], [0.0], [1.0], [2.0]]), np.zeros((5, 5))),
    "soft classes": ("multiclass", SHARES, SHARES @ SHARES.T),
    "binary": ("binary", SOFT, SOFT @ SOFT.T + (1 - SOFT) @ (1 - SOFT).T),
    "multilabel": ("multilabel", LABELS, np.zeros((5, 5))),
    "regression": ("regression", GRADES, kernel(GRADES, GRADES.std(0))),
    "two targets": ("regression", PAIRS, kernel(PAIRS, PAIRS.std(0))),
    "ordinal": ("ordinal", GRADES, kernel(GRADES, GRADES.std(0))),
}
for i, j in ((0, 2), (1, 4)):
    CASES["classes"][2][i, j] = CASES["classes"][2][j, i] = 1
for i, j, shared in ((0, 1, 1 / 2), (0, 4, 1 / 3), (2, 3, 1.0)):
    CASES["multilabel"][2][i, j] = CASES["multilabel"][2][j, i] = shared


@pytest.mark.parametrize("case", CASES)
def test_it_is_equation_two(case: str) -> None:
    kind, targets, like = CASES[case]
    vectors = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)) * 3
    found = SupCon(kind, targets, **OPTIONS)(vectors, torch.from_numpy(targets).float())
    assert found.tolist() == pytest.approx(by_hand(vectors, like), abs=1e-5)
    thrice = SupCon(kind, targets, **OPTIONS | {"weight": 3.0})(vectors, torch.from_numpy(targets).float())
    assert torch.allclose(thrice, 3 * found)


def test_an_anchor_with_nothing_like_it_counts_as_zero() -> None:
    found = SupCon("multiclass", np.zeros((1, 1)), **OPTIONS)(torch.randn(3, 4), torch.tensor([[0.0], [1.0], [0.0]]))
    assert found[1] == 0 and (found[[0, 2]] > 0).all()


@pytest.mark.parametrize("kind", ["multiclass", "regression", "binary", "multilabel"])
@pytest.mark.parametrize("rows", [1, 3])
def test_nothing_to_compare_is_zero_with_a_gradient_of_zero(kind: str, rows: int) -> None:
    targets = torch.eye(3)[:rows] if kind in ("multiclass", "multilabel") else torch.arange(rows)[:, None] * 1.0
    term = SupCon(kind, targets.numpy(), weight=1.0, temperature=0.07, bandwidth=1e-3)
    vectors = torch.randn(rows, 4, requires_grad=True)
    if kind == "binary":
        targets = targets[:1]
        vectors = torch.randn(1, 4, requires_grad=True)
    loss = term(vectors, targets)
    loss.sum().backward()
    assert (loss == 0).all()
    assert vectors.grad is not None and (vectors.grad == 0).all()


def test_length_and_order_do_not_matter() -> None:
    term = SupCon("regression", GRADES, **OPTIONS)
    vectors, targets, order = torch.randn(5, 7), torch.from_numpy(GRADES).float(), torch.tensor([3, 0, 4, 2, 1])
    found = term(vectors, targets)
    assert torch.allclose(term(vectors * torch.rand(5, 1) * 9, targets), found, atol=1e-5)
    assert torch.allclose(term(vectors[order], targets[order]), found[order], atol=1e-6)


def test_passes_are_more_texts_and_branches_are_not() -> None:
    term, targets = SupCon("regression", GRADES, **OPTIONS), torch.from_numpy(GRADES).float()
    views = torch.randn(2, 5, 7)
    both = by_hand(views.flatten(0, 1), kernel(np.tile(GRADES, (2, 1)), GRADES.std(0)))
    expected = (np.array(both[:5]) + np.array(both[5:])) / 2
    assert term(views, targets, passes=2).tolist() == pytest.approx(expected, abs=1e-5)
    apart = torch.stack([term(views[0], targets), term(views[1], targets)]).mean(0)
    assert torch.allclose(term(views, targets), apart, atol=1e-6)
    four = torch.cat([views, views.flip(0)])  # branches 0, 1 of the first pass, then of the second
    pairs = torch.stack([term(four[[n, n + 2]], targets, passes=2) for n in (0, 1)]).mean(0)
    assert torch.allclose(term(four, targets, passes=2), pairs, atol=1e-6)


def test_it_draws_like_texts_together() -> None:
    torch.manual_seed(3)
    vectors = torch.randn(12, 8, requires_grad=True)
    labels = torch.arange(12)[:, None] % 3 * 1.0
    term = SupCon("multiclass", labels.numpy(), weight=1.0, temperature=0.1, bandwidth=0.5)
    optimizer = torch.optim.Adam([vectors], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        term(vectors, labels).mean().backward()
        optimizer.step()
    z = torch.nn.functional.normalize(vectors.detach(), dim=-1)
    same = (labels == labels.T) & ~torch.eye(12, dtype=torch.bool)
    assert (z @ z.T)[same].min() > (z @ z.T)[labels != labels.T].max() + 0.5
    # Three others of the class share the softmax evenly, and nothing is left for the rest: the least there is.
    assert term(vectors, labels).mean().item() == pytest.approx(math.log(3), abs=1e-3)


@pytest.mark.parametrize("weights", [None, np.array([1.0, 0.0, 2.0, 1.0, 0.5], np.float32)])
def test_the_objective_adds_its_mean_over_rows(weights: np.ndarray | None) -> None:
    targets = GRADES.astype(np.float32)
    table: Any = SimpleNamespace(targets={"t": targets}, weights=weights, classes={})
    task, rows = Task(name="t", kind="regression", targets=["x"]), np.arange(5)
    given = None if weights is None else torch.from_numpy(weights)
    own = {"targets": {"t": torch.from_numpy(targets)}, "weights": given}
    batch = Batch(rows, torch.ones(5, 1), torch.ones(5, 1), 5, **own)
    outputs = {"t": torch.randn(5, 1), VECTOR: torch.randn(5, 7)}
    term = SupCon("regression", targets, **OPTIONS)
    plain, with_term = Objective([task], table, rows), Objective([task], table, rows, supcon=term)
    items = plain.count(rows)
    each = term(outputs[VECTOR], torch.from_numpy(targets))
    extra = (each * (torch.ones(5) if given is None else given)).sum() / items[ROWS]
    found = with_term.share(outputs, batch, items) - plain.share(outputs, batch, items)
    assert torch.allclose(found, extra, atol=1e-5)


def test_micro_batches_are_refused() -> None:
    base = Path(__file__).parents[1] / "configs" / "clear-minilm.yaml"
    overrides = ["stability.supcon.weight=0.1", "training.batch_size=16", "training.micro_batch_size=8"]
    with pytest.raises(ValueError, match="stability.supcon compares the rows of a whole batch, which micro-batches of"):
        config_file.load(base, overrides)
    config_file.load(base, [*overrides[:2], "training.micro_batch_size=16"])
