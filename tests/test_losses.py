"""LOSSES against float64 numpy and torch; exact accumulation; shapes; gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from comp import config
from comp.config import LOSS_KINDS, Task
from comp.config_variants import MSELoss
from comp.model.losses import LOSSES, Loss, build_loss, decode, item_count, num_outputs

B, K, C = 11, 3, 4
OPTIONS = {
    "smooth_l1": {"beta": 0.7},
    "cross_entropy": {"label_smoothing": 0.1},
    "focal": {"gamma": 1.5},
}
CASES = [(name, kind) for name, kinds in LOSS_KINDS.items() for kind in kinds]


def _loss(name: str, kind: str, **options: float) -> Loss:
    row = TypeAdapter(config.Loss).validate_python({"name": name, **(options or OPTIONS.get(name, {}))})
    return build_loss(row, kind, _width(kind))


def _width(kind: str) -> int:
    return {"multiclass": C, "multilabel": K, "regression": K}.get(kind, 1)


def _batch(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    preds = 2 * torch.randn(B, _width(kind), generator=rng, dtype=dtype)
    if kind == "multiclass":
        targets = torch.randint(C, (B, 1), generator=rng).to(dtype)
    elif kind in ("binary", "multilabel"):
        targets = torch.rand(B, _width(kind), generator=rng, dtype=dtype)  # soft
        targets[::2] = targets[::2].round()
    else:
        targets = 2 * torch.randn(B, _width(kind), generator=rng, dtype=dtype)
    weights = torch.rand(B, generator=rng, dtype=dtype) * 2
    weights[4] = 0.0
    return preds, targets, weights


def _reference(name: str, kind: str, preds: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Item losses (B, K), multiclass (B, 1), written out in float64."""
    options = OPTIONS.get(name, {})
    if kind == "multiclass":
        share = np.exp(preds) / np.exp(preds).sum(axis=1, keepdims=True)
        smooth = options.get("label_smoothing", 0.0)
        truth = np.eye(C)[targets[:, 0].astype(int)] * (1 - smooth) + smooth / C
        loss = -(truth * np.log(share)).sum(axis=1, keepdims=True)
        if name == "focal":
            loss *= (1 - np.take_along_axis(share, targets.astype(int), 1)) ** options["gamma"]
        return loss
    error = np.abs(preds - targets)
    if name == "mse":
        return error**2
    if name == "mae":
        return error
    if name == "smooth_l1":
        beta = options["beta"]
        return np.where(error < beta, error**2 / (2 * beta), error - beta / 2)
    share = 1 / (1 + np.exp(-preds))
    loss = -targets * np.log(share) - (1 - targets) * np.log(1 - share)
    return loss * np.abs(targets - share) ** options["gamma"] if name == "focal" else loss


def test_catalogue_kinds_and_options_agree_with_the_config():
    assert {name: row.kinds for name, row in LOSSES.items()} == LOSS_KINDS
    variants = TypeAdapter(config.Loss).json_schema()["discriminator"]["mapping"]
    assert set(variants) == set(LOSSES)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_sum_and_count_equal_the_formula(name: str, kind: str, weighted: bool):
    preds, targets, weights = _batch(kind)
    total, count = _loss(name, kind)(preds, targets, weights if weighted else None)
    items = _reference(name, kind, preds.double().numpy(), targets.double().numpy())
    scale = weights.double().numpy() if weighted else np.ones(B)
    assert total.item() == pytest.approx((items * scale[:, None]).sum(), rel=1e-5)
    assert count.item() == pytest.approx(scale.sum() * items.shape[1], rel=1e-6)
    assert count.item() == item_count(targets, weights if weighted else None, kind).item()
    assert total.shape == count.shape == ()
    assert total.dtype == count.dtype == torch.float32


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_mean_equals_torch(name: str, kind: str):
    preds, targets, _ = _batch(kind)
    index = targets[:, 0].long()
    references = {
        "mse": lambda: F.mse_loss(preds, targets),
        "mae": lambda: F.l1_loss(preds, targets),
        "smooth_l1": lambda: F.smooth_l1_loss(preds, targets, beta=0.7),
        "bce": lambda: F.binary_cross_entropy_with_logits(preds, targets),
        "cross_entropy": lambda: F.cross_entropy(preds, index, label_smoothing=0.1),
        "focal": lambda: (
            _loss("cross_entropy" if kind == "multiclass" else "bce", kind, **zero)(preds, targets)[0]
            / item_count(targets, None, kind)
        ),
    }
    zero = {"label_smoothing": 0.0} if kind == "multiclass" else {}
    total, count = _loss(name, kind, **({"gamma": 0.0} if name == "focal" else {}))(preds, targets)
    torch.testing.assert_close(total / count, references[name]())


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_over_ragged_pieces_is_exact(name: str, kind: str, weighted: bool):
    preds, targets, weights = _batch(kind)
    loss = _loss(name, kind)
    whole = preds.clone().requires_grad_()
    total, count = loss(whole, targets, weights if weighted else None)
    (total / count).backward()

    pieces = preds.clone().requires_grad_()
    cuts = [slice(0, 5), slice(5, 6), slice(6, 11)]
    window = sum(item_count(targets[cut], weights[cut] if weighted else None, kind) for cut in cuts)
    for cut in cuts:
        piece, _ = loss(pieces[cut], targets[cut], weights[cut] if weighted else None)
        (piece / window).backward()
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-6, atol=1e-7)

    # the mean of means, which this interface avoids, is another gradient
    wrong = preds.clone().requires_grad_()
    for cut in cuts:
        piece, own = loss(wrong[cut], targets[cut], weights[cut] if weighted else None)
        (piece / own / len(cuts)).backward()
    assert (wrong.grad - whole.grad).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_weights_of_two_count_rows_twice(name: str, kind: str):
    preds, targets, _ = _batch(kind)
    loss = _loss(name, kind)
    weighted = loss(preds, targets, torch.tensor([2.0] + [1.0] * (B - 1)))
    repeated = loss(torch.cat([preds[:1], preds]), torch.cat([targets[:1], targets]), None)
    torch.testing.assert_close(weighted, repeated)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_in_float64(name: str, kind: str):
    preds, targets, weights = _batch(kind, torch.float64)
    loss = _loss(name, kind)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets, weights)[0], preds.requires_grad_())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_low_precision_preds_are_summed_in_float32(name: str, kind: str):
    preds, targets, weights = _batch(kind)
    low = preds.to(torch.bfloat16)
    total, count = _loss(name, kind)(low, targets, weights)
    torch.testing.assert_close((total, count), _loss(name, kind)(low.float(), targets, weights))
    assert total.dtype == torch.float32


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", LOSS_KINDS["focal"])
def test_focal_is_finite_where_the_answer_is_certain(kind: str, gamma: float):
    _, targets, _ = _batch(kind)
    targets = targets.round()
    one = F.one_hot(targets[:, 0].long(), C) if kind == "multiclass" else targets
    for sign in (1, -1):
        preds = (sign * 200.0 * (2 * one - 1)).float().requires_grad_()
        total, _ = _loss("focal", kind, gamma=gamma)(preds, targets)
        total.backward()
        assert torch.isfinite(total)
        assert torch.isfinite(preds.grad).all()
        assert (total.item() < 1e-6) == (sign == 1)


def test_focal_fades_easy_items():
    easy, hard = torch.tensor([[3.0]]), torch.tensor([[-3.0]])
    target = torch.ones(1, 1)
    plain, focal = _loss("bce", "binary"), _loss("focal", "binary", gamma=2.0)
    assert (focal(easy, target)[0] / plain(easy, target)[0]).item() == pytest.approx(
        torch.sigmoid(-easy).item() ** 2, rel=1e-5
    )
    assert (focal(hard, target)[0] / plain(hard, target)[0]).item() > 0.9


def test_all_weights_zero_is_a_zero_count():
    preds, targets, _ = _batch("regression")
    total, count = _loss("mse", "regression")(preds, targets, torch.zeros(B))
    assert (total.item(), count.item()) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "preds", "targets", "weights", "message"),
    [
        ("ordinal", (B, 1), (B,), None, r"ordinal loss: targets must have shape \(11, 1\), got \(11,\)"),
        ("ordinal", (B,), (B, 1), None, r"preds must have shape \(11, 1\), got \(11,\)"),
        ("ordinal", (B, 1), (B, 1), (B, 1), r"weights must have shape \(11,\), got \(11, 1\)"),
        ("ordinal", (B, 1), (1, 1), None, r"targets must have shape \(11, 1\), got \(1, 1\)"),
        ("regression", (B, K), (B, 1), None, r"targets must have shape \(11, 3\), got \(11, 1\)"),
        ("regression", (B, 1), (B, 1), None, r"preds must have shape \(11, 3\), got \(11, 1\)"),
        ("multiclass", (B, C), (B, C), None, r"multiclass loss: targets must have shape \(11, 1\), got \(11, 4\)"),
        ("multiclass", (B, C), (B,), None, r"targets must have shape \(11, 1\), got \(11,\)"),
        ("multilabel", (B, K), (B, K), (1,), r"weights must have shape \(11,\), got \(1,\)"),
    ],
)
def test_shapes_are_not_broadcast(kind: str, preds: tuple, targets: tuple, weights: tuple | None, message: str):
    name = next(name for name, kinds in LOSS_KINDS.items() if kind in kinds)
    with pytest.raises(ValueError, match=message):
        _loss(name, kind)(torch.zeros(preds), torch.zeros(targets), None if weights is None else torch.ones(weights))


def test_build_loss_refuses_a_kind_it_does_not_fit():
    with pytest.raises(ValueError, match="loss 'mse' does not fit kind 'binary'; it fits regression, ordinal"):
        build_loss(MSELoss(), "binary", 1)


def test_num_outputs():
    assert num_outputs(Task(name="t", kind="regression", targets=["a", "b"]), None) == 2
    assert num_outputs(Task(name="t", kind="binary", targets=["a"]), None) == 1
    task = Task(name="genre", kind="multiclass", targets=["a"])
    assert num_outputs(task, 5) == 5
    for given in (None, 1):
        with pytest.raises(ValueError, match=f"task 'genre': multiclass needs at least 2 classes, got {given}"):
            num_outputs(task, given)


def test_decode():
    logits = torch.tensor([[0.0, 2.0], [-1.0, 1.0]], dtype=torch.bfloat16)
    for kind in ("regression", "ordinal"):
        assert torch.equal(decode(logits, kind), logits.float())
    for kind in ("binary", "multilabel"):
        torch.testing.assert_close(decode(logits, kind), 1 / (1 + torch.exp(-logits.float())))
    shares = decode(logits, "multiclass")
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(shares[0, 1] / shares[0, 0], torch.tensor(2.0).exp())
    assert shares.dtype == torch.float32
