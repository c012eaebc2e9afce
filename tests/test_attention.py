"""Attention in blocks: the numbers and gradients of plain products, in every architecture that takes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY_MODELS
from torch import nn

from comp.kernels import attentions_of, attentions_on
from comp.model import attention
from comp.model.attention import blocked_attention
from comp.model.sources import load_tokenizer, read_config
from comp.model.text_model import build_model

Folder = Callable[..., Path]


def tensors(dtype: torch.dtype, texts: int = 3, heads: int = 4, queries: int = 7, keys: int = 7) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    sides = (queries, keys, keys)
    found = [torch.randn(texts, side, heads, 5, generator=draw, dtype=torch.float64).to(dtype) for side in sides]
    return [own.transpose(1, 2).requires_grad_() for own in found]  # as transformers has them: not contiguous


def padding(texts: int = 3, keys: int = 7, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    mask = torch.zeros(texts, 1, 1, keys, dtype=dtype)
    mask[0, ..., 4:] = torch.finfo(dtype).min
    return mask


def plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2) * scaling
    return torch.softmax(scores if mask is None else scores + mask, -1) @ value


def masks() -> dict[str, torch.Tensor | None]:
    per_head = torch.randn(1, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    window = torch.where((torch.arange(7)[:, None] - torch.arange(7)).abs() < 3, 0.0, torch.finfo(torch.float32).min)
    return {
        "none": None,
        "padding": padding(),
        "window": (padding() + window).clamp_min(torch.finfo(torch.float32).min),
        "per head": per_head,
    }


@pytest.mark.parametrize("scores", [1, 49, 2 * 49, 4 * 49, 2 * 4 * 49, 10**6])
@pytest.mark.parametrize("name", ["none", "padding", "window", "per head"])
def test_values_and_gradients_are_those_of_plain_products(
    name: str, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SCORES", scores)
    mask, inputs = masks()[name], tensors(torch.float64)
    given = torch.randn(3, 4, 7, 5, dtype=torch.float64)
    expected = plain(*inputs, mask, 0.4)
    found = blocked_attention(*inputs, mask, scaling=0.4)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(found, inputs, given), torch.autograd.grad(expected, inputs, given)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_the_functions_own_slope() -> None:
    inputs = tensors(torch.float64, texts=2, heads=2, queries=3, keys=4)
    assert torch.autograd.gradcheck(lambda *own: blocked_attention(*own, padding(2, 4)), inputs)


def test_half_precision_is_as_near_as_torchs_own() -> None:
    inputs = [own.detach() for own in tensors(torch.float32, queries=40, keys=40)]
    exact = plain(*inputs, None, 5**-0.5)
    halves = [own.bfloat16() for own in inputs]
    ours = (blocked_attention(*halves) - exact).abs().max()
    torchs = (nn.functional.scaled_dot_product_attention(*halves) - exact).abs().max()
    assert ours < 2 * torchs


def test_dropout_falls_on_probabilities_and_its_gradient_knows_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SCORES", 60)
    query, key, _ = tensors(torch.float64)
    value = torch.eye(7, dtype=torch.float64).expand(3, 4, 7, 7).clone().requires_grad_()  # what is attended to
    torch.manual_seed(3)
    found = blocked_attention(query, key, value, dropout=0.3)
    probs = plain(query, key, value, None, 5**-0.5)
    kept = found != 0
    assert 0.55 < kept.double().mean() < 0.85
    torch.testing.assert_close(found, probs * kept / 0.7)
    given = torch.randn_like(found)
    grads = torch.autograd.grad(found, (query, key, value), given)
    weights = torch.softmax(query @ key.transpose(-1, -2) * 5**-0.5, -1) * kept / 0.7
    torch.testing.assert_close(grads, torch.autograd.grad(weights @ value, (query, key, value), given))
    torch.manual_seed(3)
    assert torch.equal(found, blocked_attention(query, key, value, dropout=0.3)), "the seed decides"


def test_without_gradients_no_probabilities_are_kept() -> None:
    with torch.inference_mode():
        found = blocked_attention(*tensors(torch.float32))
    assert found.grad_fn is None
    torch.testing.assert_close(found, plain(*tensors(torch.float32), None, 5**-0.5).detach())


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture_that_takes_it_trains_the_same(name: str, tiny_model_folder: Folder) -> None:
    folder = tiny_model_folder(name)
    config = read_config(str(folder), 0.0)
    if "blocked" not in attentions_of(config):
        pytest.skip(f"{name} has an attention of its own")
    grads = []
    ids = torch.randint(5, 30, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    for chosen in ("eager", "blocked"):
        model = build_model(
            folder, load_tokenizer(str(folder)), pretrained=True, pooler={"name": "mean"}, heads={"target": 1},
            max_length=16, attention=chosen,
        )  # fmt: skip
        model.train()
        state = model.backbone(ids, mask)[-1]
        assert state is not None
        (state * mask[..., None]).square().sum().backward()
        grads.append({key: own.grad for key, own in model.named_parameters() if own.grad is not None})
    assert grads[0]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_it_is_measured_on_a_cpu_only(tiny_model_folder: Folder) -> None:
    config = read_config(str(tiny_model_folder("bert")), 0.0)
    assert attentions_on(config, "cpu") == ("sdpa", "eager", "blocked")
    assert attentions_on(config, "cuda") == ("sdpa", "eager")


def test_what_it_cannot_do_is_refused() -> None:
    query, key, value = tensors(torch.float32)
    with pytest.raises(ValueError, match="model.attention is 'blocked', which has no softcap; set it to auto"):
        attention._of_transformers(nn.Module(), query, key, value, None, softcap=30.0)
    with pytest.raises(ValueError, match="2 keys' heads for 4 queries'"):
        attention._of_transformers(nn.Module(), query, key[:, :2], value[:, :2], None)
