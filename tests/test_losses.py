"""LOSSES against float64 numpy and torch; exact accumulation; shapes; gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor

from comp import config
from comp.config import LOSS_KINDS, WHOLE_BATCH_LOSSES, Task
from comp.config_variants import MSELoss
from comp.model.losses import LOSSES, Loss, build_decoder, build_loss, decode, item_count, num_outputs

B, K, C = 11, 3, 4
OPTIONS = {
    "smooth_l1": {"beta": 0.7},
    "cross_entropy": {"label_smoothing": 0.1},
    "focal": {"gamma": 1.5},
    "gaussian_nll": {"standard_error": "se", "floor": 0.3},
    "pairwise_rank": {"sigma": 1.7},
}
CASES = [(name, kind) for name, kinds in LOSS_KINDS.items() for kind in kinds]
ITEMS = [(name, kind) for name, kind in CASES if name not in WHOLE_BATCH_LOSSES]
GRADES = 5
LOWEST = 2


def _loss(name: str, kind: str, **options: float) -> Loss:
    row = TypeAdapter(config.Loss).validate_python({"name": name, **(options or OPTIONS.get(name, {}))})
    return build_loss(row, kind, _width(kind, name), lowest=LOWEST)


def _width(kind: str, name: str = "") -> int:
    if name in ("ordinal", "gaussian_nll"):
        return {"ordinal": GRADES - 1}.get(name, 1)
    return {"multiclass": C, "multilabel": K, "regression": K}.get(kind, 1)


def _errors(name: str, rows: int = B, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Standard errors, one of them under the floor."""
    return torch.linspace(0.1, 1.2, rows, dtype=dtype) if name == "gaussian_nll" else None


def _batch(kind: str, dtype: torch.dtype = torch.float32, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    preds = 2 * torch.randn(B, _width(kind, name), generator=rng, dtype=dtype)
    if kind == "multiclass":
        targets = torch.randint(C, (B, 1), generator=rng).to(dtype)
    elif kind in ("binary", "multilabel"):
        targets = torch.rand(B, _width(kind), generator=rng, dtype=dtype)  # soft
        targets[::2] = targets[::2].round()
    elif kind == "ordinal":
        targets = torch.randint(LOWEST, LOWEST + GRADES, (B, 1), generator=rng).to(dtype)
    else:
        targets = 2 * torch.randn(B, _width(kind, name), generator=rng, dtype=dtype)
    weights = torch.rand(B, generator=rng, dtype=dtype) * 2
    weights[4] = 0.0
    return preds, targets, weights


def _reference(name: str, kind: str, preds: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Item losses (B, K), multiclass (B, 1), written out in float64."""
    options = OPTIONS.get(name, {})
    if kind == "multiclass":
        share = np.exp(preds) / np.exp(preds).sum(axis=1, keepdims=True)
        smooth = options.get("label_smoothing", 0.0)
        truth = np.eye(C)[targets[:, 0].astype(int)] if targets.shape[1] == 1 else targets
        truth = truth * (1 - smooth) + smooth / C
        if name == "focal":
            return -(np.abs(truth - share) ** options["gamma"] * truth * np.log(share)).sum(axis=1, keepdims=True)
        return -(truth * np.log(share)).sum(axis=1, keepdims=True)
    if name == "ordinal":
        above = 1 / (1 + np.exp(-preds))
        level = targets - LOWEST > np.arange(GRADES - 1)
        return -np.log(np.where(level, above, 1 - above)).sum(axis=1, keepdims=True)
    error = np.abs(preds - targets)
    if name == "gaussian_nll":
        known = np.maximum(np.linspace(0.1, 1.2, B), options["floor"])[:, None]
        return -np.log(np.exp(-0.5 * (error / known) ** 2) / known)
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


def _whole_reference(name: str, preds: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """The value of a whole-batch loss; NaN in targets = missing."""
    rows, columns = targets.shape
    cells = [(i, k) for i in range(rows) for k in range(columns) if np.isfinite(targets[i, k])]
    if name == "rmse":
        weight = sum(weights[i] for i, _ in cells)
        return (sum(weights[i] * (preds[i, k] - targets[i, k]) ** 2 for i, k in cells) / weight) ** 0.5
    if name == "pearson":
        values = []
        for k in range(columns):
            own = np.isfinite(targets[:, k])
            covariance = np.cov(preds[own, k], targets[own, k], aweights=weights[own])
            values.append(1 - covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))
        return float(np.mean(values))
    total = count = 0.0
    for k in range(columns):
        for i in range(rows):
            for j in range(rows):
                if targets[i, k] > targets[j, k]:
                    weight = weights[i] * weights[j]
                    total += weight * np.log1p(np.exp(-OPTIONS[name]["sigma"] * (preds[i, k] - preds[j, k])))
                    count += weight
    return total / count


def test_catalogue_kinds_and_options_agree_with_the_config():
    assert {name: row.kinds for name, row in LOSSES.items()} == LOSS_KINDS
    variants = TypeAdapter(config.Loss).json_schema()["discriminator"]["mapping"]
    assert set(variants) == set(LOSSES)


@pytest.mark.parametrize(("name", "kind"), ITEMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_sum_and_count_equal_the_formula(name: str, kind: str, weighted: bool):
    preds, targets, weights = _batch(kind, name=name)
    total, count = _loss(name, kind)(preds, targets, weights if weighted else None, _errors(name))
    items = _reference(name, kind, preds.double().numpy(), targets.double().numpy())
    scale = weights.double().numpy() if weighted else np.ones(B)
    assert total.item() == pytest.approx((items * scale[:, None]).sum(), rel=1e-5)
    assert count.item() == pytest.approx(scale.sum() * items.shape[1], rel=1e-6)
    assert count.item() == item_count(targets, weights if weighted else None, kind).item()
    assert total.shape == count.shape == ()
    assert total.dtype == count.dtype == torch.float32


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] not in ("pearson", "pairwise_rank")])
def test_mean_equals_torch(name: str, kind: str):
    preds, targets, _ = _batch(kind, name=name)
    index = targets[:, 0].long()
    references = {
        "mse": lambda: F.mse_loss(preds, targets),
        "mae": lambda: F.l1_loss(preds, targets),
        "rmse": lambda: F.mse_loss(preds, targets).sqrt(),
        "gaussian_nll": lambda: F.gaussian_nll_loss(preds, targets, _errors(name).clamp(min=0.3)[:, None] ** 2),
        "ordinal": lambda: sum(
            F.binary_cross_entropy_with_logits(preds[:, k], (targets[:, 0] > LOWEST + k).float())
            for k in range(GRADES - 1)
        ),
        "smooth_l1": lambda: F.smooth_l1_loss(preds, targets, beta=0.7),
        "bce": lambda: F.binary_cross_entropy_with_logits(preds, targets),
        "cross_entropy": lambda: F.cross_entropy(preds, index, label_smoothing=0.1),
        "focal": lambda: (
            _loss("cross_entropy" if kind == "multiclass" else "bce", kind, **zero)(preds, targets)[0]
            / item_count(targets, None, kind)
        ),
    }
    zero = {"label_smoothing": 0.0} if kind == "multiclass" else {}
    options = {"gamma": 0.0} if name == "focal" else {}
    total, count = _loss(name, kind, **options)(preds, targets, None, _errors(name))
    torch.testing.assert_close(total / count, references[name]())


@pytest.mark.parametrize(("name", "kind"), ITEMS)
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_over_ragged_pieces_is_exact(name: str, kind: str, weighted: bool):
    preds, targets, weights = _batch(kind, name=name)
    targets[2, 0] = torch.nan
    errors = _errors(name)
    loss = _loss(name, kind)
    whole = preds.clone().requires_grad_()
    total, count = loss(whole, targets, weights if weighted else None, errors)
    (total / count).backward()

    pieces = preds.clone().requires_grad_()
    cuts = [slice(0, 5), slice(5, 6), slice(6, 11)]
    window = sum(item_count(targets[cut], weights[cut] if weighted else None, kind) for cut in cuts)
    for cut in cuts:
        piece, _ = loss(
            pieces[cut], targets[cut], weights[cut] if weighted else None, None if errors is None else errors[cut]
        )
        (piece / window).backward()
    torch.testing.assert_close(pieces.grad, whole.grad, rtol=1e-6, atol=1e-7)

    # the mean of means, which this interface avoids, is another gradient
    wrong = preds.clone().requires_grad_()
    for cut in cuts:
        piece, own = loss(
            wrong[cut], targets[cut], weights[cut] if weighted else None, None if errors is None else errors[cut]
        )
        (piece / own / len(cuts)).backward()
    assert (wrong.grad - whole.grad).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_weights_of_two_count_rows_twice(name: str, kind: str):
    preds, targets, _ = _batch(kind, name=name)
    loss, errors = _loss(name, kind), _errors(name)
    weighted = loss(preds, targets, torch.tensor([2.0] + [1.0] * (B - 1)), errors)
    errors = None if errors is None else torch.cat([errors[:1], errors])
    repeated = loss(torch.cat([preds[:1], preds]), torch.cat([targets[:1], targets]), None, errors)
    torch.testing.assert_close(weighted, repeated)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_in_float64(name: str, kind: str):
    preds, targets, weights = _batch(kind, torch.float64, name)
    targets[2, 0] = torch.nan
    loss, errors = _loss(name, kind), _errors(name, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets, weights, errors)[0], preds.requires_grad_())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_low_precision_preds_are_summed_in_float32(name: str, kind: str):
    preds, targets, weights = _batch(kind, name=name)
    low, errors = preds.to(torch.bfloat16), _errors(name)
    total, count = _loss(name, kind)(low, targets, weights, errors)
    torch.testing.assert_close((total, count), _loss(name, kind)(low.float(), targets, weights, errors))
    assert total.dtype == torch.float32


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("kind", ["regression", "ordinal"])
@pytest.mark.parametrize("name", WHOLE_BATCH_LOSSES)
def test_whole_batch_losses_equal_the_formula(name: str, kind: str, missing: bool, weighted: bool):
    preds, targets, weights = _batch(kind)
    if missing:
        targets[1, 0] = targets[5] = torch.nan
    total, count = _loss(name, kind)(preds, targets, weights if weighted else None)
    known = weights.double().numpy() if weighted else np.ones(B)
    expected = _whole_reference(name, preds.double().numpy(), targets.double().numpy(), known)
    assert (total / count).item() == pytest.approx(expected, rel=1e-5)
    assert count.item() == pytest.approx((known[:, None] * np.isfinite(targets.numpy())).sum(), rel=1e-6)


@pytest.mark.parametrize("name", WHOLE_BATCH_LOSSES)
@pytest.mark.parametrize("case", ["one row", "equal targets", "equal predictions", "all missing", "no weight"])
def test_whole_batch_losses_are_finite_where_they_are_not_defined(name: str, case: str):
    preds, targets, weights = _batch("regression")
    rows = 1 if case == "one row" else B
    preds, targets, weights = preds[:rows], targets[:rows], torch.ones(rows)
    if case == "equal targets":
        targets = torch.full_like(targets, 0.3)
    if case == "equal predictions":
        preds = torch.full_like(preds, 0.3)
    if case == "all missing":
        targets = torch.full_like(targets, torch.nan)
    if case == "no weight":
        weights = torch.zeros(rows)
    preds.requires_grad_()
    total, count = _loss(name, "regression")(preds, targets, weights)
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(preds.grad).all()
    if case in ("all missing", "no weight"):
        assert total.item() == count.item() == 0


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_missing_targets_equal_dropped_rows(name: str, kind: str):
    preds, targets, weights = _batch(kind, name=name)
    loss, errors = _loss(name, kind), _errors(name)
    kept = torch.tensor([row for row in range(B) if row not in (2, 7)])
    dropped = loss(preds[kept], targets[kept], weights[kept], None if errors is None else errors[kept])
    targets[[2, 7]] = torch.nan
    torch.testing.assert_close(loss(preds, targets, weights, errors), dropped)
    none = loss(preds, torch.full_like(targets, torch.nan), weights, errors)
    assert (none[0].item(), none[1].item()) == (0.0, 0.0)


@pytest.mark.parametrize(("name", "kind"), [("cross_entropy", "multiclass"), ("focal", "multiclass")])
def test_soft_labels_of_several_classes(name: str, kind: str):
    rng = torch.Generator().manual_seed(4)
    preds, targets = torch.randn(B, C, generator=rng), torch.rand(B, C, generator=rng).softmax(1)
    row = TypeAdapter(config.Loss).validate_python({"name": name, **OPTIONS[name]})
    soft = build_loss(row, kind, C, num_targets=C)
    expected = _reference(name, kind, preds.double().numpy(), targets.double().numpy())
    assert soft(preds, targets)[0].item() == pytest.approx(expected.sum(), rel=1e-5)
    assert soft(preds, targets)[1].item() == B
    hard = F.one_hot(torch.arange(B) % C, C).float()
    assert soft(preds, hard)[0].item() == pytest.approx(
        _loss(name, kind)(preds, (torch.arange(B) % C)[:, None])[0].item(), rel=1e-5
    )


def test_balanced_weights_are_scikit_learns_and_of_the_given_rows():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.array([0, 0, 0, 1, 1, 3, 0, 3, 1, 0, 2], dtype=np.float32)
    for name in ("cross_entropy", "focal"):
        loss = _loss(name, "multiclass", class_weights="balanced").fit(labels[:, None])
        expected = compute_class_weight("balanced", classes=np.arange(C), y=labels)
        assert np.allclose(loss.class_weights.numpy(), expected)
        preds, targets = _batch("multiclass")[0], torch.from_numpy(labels)[:, None]
        plain = _loss(name, "multiclass", class_weights=None)
        items = torch.stack([plain(preds[i : i + 1], targets[i : i + 1])[0] for i in range(B)])
        total, count = loss(preds, targets)
        torch.testing.assert_close(total, (items * torch.from_numpy(expected).float()[labels.astype(int)]).sum())
        assert count.item() == B
        soft = build_loss(
            TypeAdapter(config.Loss).validate_python({"name": name, "class_weights": "balanced"}),
            "multiclass",
            C,
            num_targets=C,
        )
        one_hot = np.eye(C, dtype=np.float32)[labels.astype(int)]
        assert np.allclose(soft.fit(one_hot).class_weights.numpy(), expected)
        torch.testing.assert_close(
            soft.fit(one_hot)(preds, torch.from_numpy(one_hot)), (total, count), rtol=1e-5, atol=1e-5
        )
    few = _loss("cross_entropy", "multiclass", class_weights="balanced").fit(np.array([[0.0], [0.0], [1.0], [np.nan]]))
    assert np.allclose(few.class_weights.numpy(), [3 / 4, 3 / 2, 0, 0])


def test_balanced_weights_of_columns():
    from sklearn.utils.class_weight import compute_class_weight

    targets = np.array([[0, 1, 1], [0, 1, 0], [1, 1, 0], [0, 1, 0]], dtype=np.float32)
    loss = _loss("bce", "multilabel", class_weights="balanced").fit(targets)
    for k in (0, 2):
        expected = compute_class_weight("balanced", classes=np.array([0, 1]), y=targets[:, k])
        assert np.allclose(loss.class_weights[:, k].numpy(), expected)
    assert loss.class_weights[:, 1].tolist() == [0, 1]
    preds = torch.zeros(4, 3)
    total, _ = loss(preds, torch.from_numpy(targets))
    assert total.item() == pytest.approx(12 * np.log(2), rel=1e-6), "every column weighs as much as it has rows"


def test_coral_decodes_to_grades():
    task = Task(name="t", kind="ordinal", targets=["a"], loss={"name": "ordinal"})
    classes = ["2", "3", "4", "5"]
    logits = torch.tensor([[9.0, 9.0, -9.0], [-9.0, -9.0, -9.0], [2.0, 0.1, -0.1]])
    found = build_decoder(task, classes)(logits)
    assert found.shape == (3, 1)
    assert found[:, 0].tolist() == pytest.approx((2 + torch.sigmoid(logits).sum(1)).tolist())
    rank = Task(name="t", kind="ordinal", targets=["a"], loss={"name": "ordinal", "decode": "rank"})
    assert build_decoder(rank, classes)(logits)[:, 0].tolist() == [4, 2, 4]
    assert num_outputs(task, 4) == 3
    plain = Task(name="t", kind="ordinal", targets=["a"])
    assert torch.equal(build_decoder(plain, classes)(logits[:, :1]), logits[:, :1])
    assert num_outputs(plain, 4) == 1


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
