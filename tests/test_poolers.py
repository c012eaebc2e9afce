"""Every pooler against an independent float64 reference, and on every architecture from tokens to reloaded weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODELS
from pydantic import TypeAdapter

from comp.config_poolers import Pooler as PoolerConfig
from comp.data.batches import collate
from comp.data.tokens import encode
from comp.model.backbone import save_recipe
from comp.model.pooling import POOLERS, Pooler, build_pooler, needs_trained_pooler
from comp.model.sbert_wk import neighbours, token_weights
from comp.model.sources import load_tokenizer
from comp.model.text_model import TextModel, build_model
from comp.model.token_pooling import cls_index, masked_max, masked_mean
from comp.optim import build_optimizer
from comp.optim.groups import build_groups
from comp.runtime import Runtime
from comp.training.checkpoint import load_weights, save_weights
from comp.training.predict import predict

Array = np.ndarray
BODIES = ["the ship was golden", "a dull tram", "deer", "on the bridge she was happy and the market was bright"]
TITLES = ["sea", "a grim street", "wood", "town"]
OWN_POOLER = ("bert", "roberta", "albert", "mpnet", "xlm-roberta")
LAYERS = 3  # of the tiny models; the defaults want four
OPTIONS: dict[str, dict[str, Any]] = {name: {} for name in POOLERS} | {
    "concat_layers": {"num_layers": LAYERS},
    "psum": {"num_layers": LAYERS},
    "hsum": {"num_layers": LAYERS},
    "token_attention": {"hidden_size": 7},
    "conv1d": {"channels": 6},
    "lstm_layers": {"hidden_size": 6},
    "gru_layers": {"hidden_size": 6},
    "attention_layers": {"hidden_size": 6},
    "dense": {"of": {"name": "mean_max"}, "out_features": 5},
    "two_tower": {"out_features": 5},
}
CASES = [(kind, name) for kind in TINY_MODELS for name in POOLERS if name != "pooler_output" or kind in OWN_POOLER]
FP32 = Runtime(torch.device("cpu"), "fp32")


def made(folder: Path, name: str, **options: Any) -> tuple[TextModel, Any]:
    tokenizer = load_tokenizer(str(folder))
    torch.manual_seed(3)
    pooler = {"name": name, **OPTIONS[name], **options.pop("pooler", {})}
    options = {"pretrained": True, "heads": {"main": 2}, "max_length": 32, "num_fields": 2, **options}
    model = build_model(str(folder), tokenizer, pooler=pooler, **options)
    # Heads start near zero; large ones let a difference between texts, or between batches, show.
    torch.nn.init.normal_(next(iter(model.heads.values())).weight)
    return model, tokenizer


def encoded_pair(tokenizer: Any, rows: list[int]) -> Any:
    texts = [TITLES[row] for row in rows], [BODIES[row] for row in rows]
    return encode(tokenizer, texts, max_length=32, cache=None)


def predicted(model: TextModel, tokenizer: Any, rows: list[int]) -> Array:
    ids = np.array([str(row) for row in rows], object)
    encoded = encoded_pair(tokenizer, rows)
    return predict(model, encoded, ids, decoders={"main": torch.Tensor.float}, runtime=FP32).values["main"]


# --- on every architecture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_padding_and_batch_order_change_nothing(kind: str, name: str, tiny_model_folder: Callable[..., Path]) -> None:
    model, tokenizer = made(tiny_model_folder(kind), name)
    model.double()  # SBERT-WK's roots magnify the rounding of float32 states, which differs with the padded width
    together = predicted(model, tokenizer, [0, 1, 2, 3])
    alone = np.concatenate([predicted(model, tokenizer, [row]) for row in range(4)])
    assert np.abs(together - alone).max() < 1e-5
    order = [2, 0, 3, 1]
    assert np.abs(predicted(model, tokenizer, order) - together[order]).max() < 1e-5
    assert np.abs(together - together[0]).max() > 1e-4, "all texts give the same: nothing was compared"


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_tokens_to_a_bf16_step_to_a_reloaded_checkpoint(
    kind: str, name: str, tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, tokenizer = made(tiny_model_folder(kind), name)
    encoded = encoded_pair(tokenizer, [0, 1, 2, 3])
    model.pooler.fit(encoded.documents(np.arange(4)))
    groups = build_groups(model, depth_of=model.depth_of, num_layers=model.backbone.num_layers, lr=1e-3)
    listed = {id(parameter) for group in groups for parameter in group.params}
    assert all(id(parameter) in listed for parameter in model.pooler.parameters())
    before = {parameter_name: p.detach().clone() for parameter_name, p in model.pooler.named_parameters()}
    optimizer = build_optimizer("adamw", groups, betas=(0.9, 0.999), eps=1e-6)
    model.train()
    for _ in range(2):  # some gradients are 0 where another parameter starts at 0
        batch = collate(encoded, np.arange(4))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch)["main"]
        assert output.dtype == torch.float32
        (output - torch.arange(8.0).view(4, 2)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter_name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), parameter_name
    for parameter_name, parameter in model.pooler.named_parameters():
        assert not torch.equal(parameter, before[parameter_name]), f"{parameter_name} did not train"

    save_recipe(model.backbone, tokenizer, tmp_path / "backbone")
    save_weights(tmp_path / "w.safetensors", model)
    again, own_tokenizer = made(tmp_path / "backbone", name, pretrained=False)
    load_weights(tmp_path / "w.safetensors", again)
    found = predicted(again, own_tokenizer, [0, 1, 2, 3])
    assert np.array_equal(found, predicted(model, tokenizer, [0, 1, 2, 3]))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", POOLERS)
def test_all_state_moves_with_to(name: str, tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder("bert"), name)
    model.pooler.to(torch.float64)
    state = model.pooler.state_dict()
    assert {tensor.dtype for tensor in state.values()} <= {torch.float64}
    loose = [key for module in model.pooler.modules() for key, value in vars(module).items() if torch.is_tensor(value)]
    assert not loose, "a tensor that is neither parameter nor buffer would not move, train or be saved"


def test_a_text_of_one_token_and_a_batch_of_one(tiny_model_folder: Callable[..., Path]) -> None:
    """Not even special tokens around it: T = 1."""
    for name in POOLERS:
        model, _ = made(tiny_model_folder("bert"), name)
        batch = SimpleNamespace(hidden=torch.randn(LAYERS + 1, 1, 1, 32), mask=torch.ones(1, 1, dtype=torch.long))
        extra = {"fields": torch.zeros(1, 1, dtype=torch.long)} if model.pooler.needs_fields else {}
        vector = model.pooler.eval()(list(batch.hidden), batch.mask, batch.mask, **extra)
        assert vector.shape[-2:] == (1, model.pooler.out_features), name
        assert torch.isfinite(vector).all(), name


# --- values against references ---------------------------------------------------------------------------------------

B, T, H, VOCAB = 4, 7, 12, 20
LENGTHS = (7, 4, 2, 3)
BACKBONE: Any = SimpleNamespace(
    hidden_size=H,
    num_states=LAYERS,
    num_layers=LAYERS,
    cls_last=False,
    vocab_size=VOCAB,
    config=SimpleNamespace(num_attention_heads=3, intermediate_size=24, initializer_range=0.3),
    take_pooler=lambda: torch.nn.Linear(H, H),
)


def data(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden (L + 1, B, T, H) with NaN at padding, mask, ids, fields. Layers drift, as those of a model do."""
    generator = torch.Generator().manual_seed(0)
    drift = 0.4 * torch.randn(LAYERS + 1, B, T, H, generator=generator, dtype=torch.float64)
    hidden = torch.randn(1, B, T, H, generator=generator, dtype=torch.float64) + drift.cumsum(0)
    mask = (torch.arange(T)[None] < torch.tensor(LENGTHS)[:, None]).long()
    hidden = hidden.masked_fill(mask.eq(0)[None, ..., None], float("nan")).to(dtype)
    ids = torch.randint(VOCAB, (B, T), generator=generator)
    fields = torch.tensor(
        [[-1, 0, 0, 1, 1, 1, -1], [-1, 0, 1, -1, -1, -1, -1], [0, 1] + [-1] * 5, [-1, -1, 1] + [-1] * 4]
    )
    return hidden, mask, ids, fields


def prepared(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Pooler:
    torch.manual_seed(1)
    pooler = build_pooler({"name": name, **OPTIONS[name], **options}, BACKBONE, num_fields=2)
    with torch.no_grad():
        for parameter_name, parameter in pooler.named_parameters():
            if parameter_name.split(".")[-1] in ("weight", "scale", "bias") and parameter.ndim < 2:
                parameter.add_(0.3 * torch.rand_like(parameter))  # ones and zeros would hide a mistake
    pooler.fit([np.array([1, 2, 2]), np.array([2, 3]), np.array([19])])
    return pooler.to(dtype).eval()


def pooled(pooler: Pooler, hidden: torch.Tensor, mask: torch.Tensor, ids: torch.Tensor, fields: torch.Tensor) -> Array:
    extra = {"fields": fields} if pooler.needs_fields else {}
    with torch.no_grad():
        found = pooler(list(hidden), mask, ids, **extra)
    return found.double().numpy()


def weights_of(pooler: Pooler) -> dict[str, Array]:
    return {name: tensor.detach().double().numpy() for name, tensor in pooler.state_dict().items()}


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array) -> Array:
    return np.exp(x) / np.exp(x).sum()


def convolve(x: Array, weight: Array, bias: Array) -> Array:
    """x (T, C) -> (T', O), kernel of weight (O, C, k), padded by k // 2 zeros."""
    k = weight.shape[2]
    padded = np.concatenate([np.zeros((k // 2, x.shape[1])), x, np.zeros((k // 2, x.shape[1]))])
    rows = [np.einsum("ock,kc->o", weight, padded[t : t + k]) + bias for t in range(len(padded) - k + 1)]
    return np.stack(rows)


def recurrent(w: dict[str, Array], steps: list[Array], kind: str) -> Array:
    size = w["cell.weight_hh_l0"].shape[1]
    h, c = np.zeros(size), np.zeros(size)
    for x in steps:
        a = w["cell.weight_ih_l0"] @ x + w["cell.bias_ih_l0"]
        b = w["cell.weight_hh_l0"] @ h + w["cell.bias_hh_l0"]
        if kind == "lstm":
            i, f, g, o = np.split(a + b, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (ar, az, an), (br, bz, bn) = np.split(a, 3), np.split(b, 3)
            r, z = sigmoid(ar + br), sigmoid(az + bz)
            h = (1 - z) * np.tanh(an + r * bn) + z * h
    return h


def block(w: dict[str, Array], prefix: str, x: Array, heads: int = 3) -> Array:
    """A post-norm transformer encoder block on (T, H)."""
    erf = np.vectorize(math.erf)

    def norm(y: Array, which: str) -> Array:
        scaled = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
        return scaled * w[f"{prefix}.{which}.weight"] + w[f"{prefix}.{which}.bias"]

    q, k, v = np.split(x @ w[f"{prefix}.self_attn.in_proj_weight"].T + w[f"{prefix}.self_attn.in_proj_bias"], 3, 1)
    size = x.shape[1] // heads
    parts = []
    for head in range(heads):
        cut = slice(head * size, (head + 1) * size)
        scores = q[:, cut] @ k[:, cut].T / math.sqrt(size)
        parts.append(np.stack([softmax(row) for row in scores]) @ v[:, cut])
    attended = np.concatenate(parts, 1) @ w[f"{prefix}.self_attn.out_proj.weight"].T
    x = norm(x + attended + w[f"{prefix}.self_attn.out_proj.bias"], "norm1")
    inner = x @ w[f"{prefix}.linear1.weight"].T + w[f"{prefix}.linear1.bias"]
    inner = 0.5 * inner * (1 + erf(inner / math.sqrt(2)))
    return norm(x + inner @ w[f"{prefix}.linear2.weight"].T + w[f"{prefix}.linear2.bias"], "norm2")


def sums(w: dict[str, Array], states: list[Array], hierarchical: bool) -> Array:
    before = np.zeros_like(states[0])
    branches = []
    for n in range(LAYERS):
        fed = states[-1 - n] + (before if hierarchical else 0)
        before = block(w, f"blocks.{n}", fed)
        branches.append(np.tanh(w["dense.weight"] @ before[0] + w["dense.bias"]))
    return np.stack(branches)


def original_wk(states: list[Array], start: int, window: int) -> Array:
    """The authors' algorithm, a QR decomposition per token and layer, with its Python slices as they stand."""
    words, changes = [], []
    for token in range(max(1, len(states[0]) - 1)):
        layers = np.stack([state[token] for state in states[start:]])
        count = len(layers)
        align, novel = np.zeros(count), np.zeros(count)
        for k in range(count):
            near = np.vstack([layers[k - window : k], layers[k + 1 : k + window + 1], layers[k : k + 1]])
            _, r = np.linalg.qr(near.T)
            last, m = r[:, -1], len(near) - 1
            others = r[:, :-1] / np.linalg.norm(r[:, :-1], axis=0)
            mean = (others.mean(1)[:m] @ last[:m]) / np.linalg.norm(last[:m])
            align[k] = 1 / (mean * len(near) * 2)
            novel[k] = abs(last[m]) / np.linalg.norm(last)
        alpha = align / align.sum() + novel / novel.sum()
        words.append(alpha / alpha.sum() @ layers)
        unit = layers / np.linalg.norm(layers, axis=1, keepdims=True)
        changes.append(np.var([unit[k] @ unit[k + 1] for k in range(count - 1)]))
    return np.array(changes) / np.sum(changes) @ np.stack(words)


def reference(name: str, w: dict[str, Array], states: list[Array], ids: Array, fields: Array) -> Array:
    """Pool one text alone, in float64: states are L + 1 arrays (T, H) of its real tokens."""
    last, tops = states[-1], [state[0] for state in states]
    mean, best = last.mean(0), last.max(0)
    if name in ("mean", "max", "mean_max", "mean_max_cls", "cls"):
        return np.concatenate(
            {"mean": [mean], "max": [best], "mean_max": [mean, best], "cls": [last[0]]}.get(name, [mean, best, last[0]])
        )
    if name == "pooler_output":
        return np.tanh(w["dense.weight"] @ last[0] + w["dense.bias"])
    if name == "conv1d":
        once = np.maximum(convolve(last, w["first.weight"], w["first.bias"]), 0)
        return convolve(once, w["second.weight"], w["second.bias"]).max(0)
    if name == "token_attention":
        scores = np.tanh(last @ w["project.weight"].T + w["project.bias"]) @ w["score.weight"][0]
        return softmax(scores) @ last
    if name == "gem":
        return np.mean(np.maximum(last, 1e-6) ** w["p"], 0) ** (1 / w["p"])
    if name == "word_weights":
        frequency = {1: 1, 2: 2, 3: 1, 19: 1}
        idf = np.array([math.log((1 + 3) / (1 + frequency.get(int(i), 0))) + 1 for i in ids])
        return idf @ last / idf.sum()
    if name == "concat_layers":
        return np.concatenate([tops[-1 - n] for n in range(LAYERS)])
    if name in ("weighted_layers", "scalar_mix"):
        share = w["weight"] / w["weight"].sum() if name == "weighted_layers" else w["scale"] * softmax(w["weight"])
        return sum(s * state for s, state in zip(share, states[1:], strict=True)).mean(0)
    if name in ("lstm_layers", "gru_layers"):
        return recurrent(w, tops[1:], name.split("_")[0])
    if name == "attention_layers":
        share = softmax(np.array([w["query"] @ top for top in tops[1:]]))
        return w["project.weight"] @ sum(s * top for s, top in zip(share, tops[1:], strict=True))
    if name == "sbert_wk":
        return original_wk(states, 1, 2)
    if name in ("psum", "hsum"):
        return sums(w, states, name == "hsum")
    if name == "dense":
        return np.tanh(w["dense.weight"] @ np.concatenate([mean, best]) + w["dense.bias"])
    if name == "two_tower":
        means = [last[fields == n].mean(0) if (fields == n).any() else np.zeros(H) for n in (0, 1)]
        return np.concatenate([np.tanh(w[f"towers.{n}.weight"] @ means[n] + w[f"towers.{n}.bias"]) for n in (0, 1)])
    raise AssertionError(f"no reference for {name}: write one")


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", POOLERS)
def test_values_equal_a_float64_reference(name: str, dtype: torch.dtype, bound: float) -> None:
    hidden, mask, ids, fields = data(dtype)
    pooler = prepared(name, dtype)
    found = pooled(pooler, hidden, mask, ids, fields)
    w = weights_of(pooler)
    expected = np.stack(
        [
            reference(
                name,
                w,
                [state[row, :length].double().numpy() for state in hidden],
                ids[row, :length].numpy(),
                fields[row, :length].numpy(),
            )
            for row, length in enumerate(LENGTHS)
        ],
        axis=-2,
    )
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < bound
    assert np.abs(expected - expected[..., :1, :]).max() > 1e-3


@pytest.mark.parametrize("name", POOLERS)
def test_left_padding_gives_the_same(name: str) -> None:
    hidden, mask, ids, fields = data()
    pooler = prepared(name)

    def to_the_right(tensor: torch.Tensor, axis: int) -> torch.Tensor:
        rows = [row.roll(T - length, axis) for row, length in zip(tensor.unbind(axis), LENGTHS, strict=True)]
        return torch.stack(rows, axis)

    left = to_the_right(hidden, 1), *(to_the_right(tensor, 0) for tensor in (mask, ids, fields))
    assert left[1][1].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert np.abs(pooled(pooler, *left) - pooled(pooler, hidden, mask, ids, fields)).max() < 1e-9


@pytest.mark.parametrize("name", POOLERS)
def test_the_hidden_states_are_left_alone_and_only_its_layers_are_read(name: str) -> None:
    hidden, mask, ids, fields = data()
    pooler = prepared(name)
    expected = pooled(pooler, hidden, mask, ids, fields)
    kept = hidden.clone()
    wanted = {index % (LAYERS + 1) for index in pooler.layers}
    states: Any = [state if place in wanted else None for place, state in enumerate(hidden)]
    assert np.array_equal(pooled(pooler, states, mask, ids, fields), expected)
    assert torch.equal(hidden.nan_to_num(99), kept.nan_to_num(99))


@pytest.mark.parametrize("layer", range(-LAYERS - 1, LAYERS + 1))
def test_cls_of_any_layer(layer: int) -> None:
    hidden, mask, ids, fields = data()
    found = pooled(prepared("cls", layer=layer), hidden, mask, ids, fields)
    assert np.array_equal(found, hidden[layer][:, 0].numpy())


def test_mixtures_of_the_classification_token_and_from_another_layer() -> None:
    hidden, mask, ids, fields = data()
    pooler = prepared("weighted_layers", tokens="cls", layer_start=2)
    w = weights_of(pooler)["weight"]
    expected = (w[0] * hidden[2][:, 0] + w[1] * hidden[3][:, 0]).numpy() / w.sum()
    assert np.abs(pooled(pooler, hidden, mask, ids, fields) - expected).max() < 1e-12


def test_weighted_layers_and_word_weights_equal_sentence_transformers() -> None:
    models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    hidden, mask, ids, fields = data(torch.float32)
    hidden = hidden.nan_to_num(0.0)
    pooler = prepared("weighted_layers", torch.float32)
    theirs = models.WeightedLayerPooling(H, num_hidden_layers=LAYERS, layer_start=1)
    with torch.no_grad():
        theirs.layer_weights.copy_(pooler.weight)
    mixed = theirs({"all_layer_embeddings": list(hidden)})["token_embeddings"]
    expected = masked_mean(mixed, mask).detach().numpy()
    assert np.abs(pooled(pooler, hidden, mask, ids, fields) - expected).max() < 1e-6


# --- details ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(3, 9))
@pytest.mark.parametrize("window", [1, 2, 3])
def test_sbert_wk_equals_the_original_for_any_layers_and_window(count: int, window: int) -> None:
    if window >= count:
        return
    generator = np.random.default_rng(count)
    states = list(np.cumsum(0.3 * generator.normal(size=(count, 5, H)), 0) + generator.normal(size=(5, H)))
    backbone = SimpleNamespace(**{**vars(BACKBONE), "num_states": count})
    pooler = build_pooler({"name": "sbert_wk", "layer_start": 1, "window": window}, backbone)
    hidden = [None, *(torch.from_numpy(state)[None] for state in states)]
    mask = torch.ones(1, 5, dtype=torch.long)
    found = pooler(hidden, mask, mask)[0].numpy()
    assert np.abs(found - original_wk([states[0], *states], 1, window)).max() < 1e-9


def test_sbert_wk_windows_of_the_code_and_of_the_paper() -> None:
    assert neighbours(5, 2, "repo") == [[1, 2], [2, 3], [0, 1, 3, 4], [1, 2, 4], [2, 3]]
    assert neighbours(5, 2, "paper") == [[1, 2], [0, 2, 3], [0, 1, 3, 4], [1, 2, 4], [2, 3]]
    hidden, mask, ids, fields = data()
    repo, paper = (pooled(prepared("sbert_wk", windows=w), hidden, mask, ids, fields) for w in ("repo", "paper"))
    assert np.abs(repo - paper).max() > 1e-4


def test_sbert_wk_survives_layers_that_are_all_alike_and_its_gradient_too() -> None:
    states = torch.randn(6, 1, H).expand(6, 5, H).clone().requires_grad_()
    alpha, change = token_weights(states)
    assert torch.isfinite(alpha).all() and torch.isfinite(change).all()
    assert (alpha.sum(1) - 1).abs().max() < 1e-9
    (alpha.sum() + change.sum() + (alpha**2).sum()).backward()
    assert torch.isfinite(states.grad).all()


def test_sbert_wk_gradient() -> None:
    states = torch.randn(4, 5, H, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 2
    assert torch.autograd.gradcheck(lambda x: token_weights(x), states.requires_grad_())


def test_conv1d_with_an_odd_kernel() -> None:
    hidden, mask, ids, fields = data()
    pooler = prepared("conv1d", kernel_size=3)
    w = weights_of(pooler)
    found = pooled(pooler, hidden, mask, ids, fields)
    for row, length in enumerate(LENGTHS):
        assert np.abs(found[row] - reference("conv1d", w, [hidden[-1][row, :length].numpy()], ids, fields)).max() < 1e-9


def test_idf_is_of_the_texts_it_was_fitted_on() -> None:
    pooler = prepared("word_weights")
    assert float(pooler.idf[2]) == pytest.approx(math.log(4 / 3) + 1)
    assert float(pooler.idf[5]) == pytest.approx(math.log(4) + 1), "an unseen token"
    assert "idf" in pooler.state_dict()
    assert not list(pooler.parameters())


def test_branches_are_averaged_in_prediction_and_apart_in_training(tiny_model_folder: Callable[..., Path]) -> None:
    model, tokenizer = made(tiny_model_folder("bert"), "psum")
    batch = collate(encoded_pair(tokenizer, [0, 1, 2, 3]), np.arange(4))
    apart = model.train()(batch)["main"]
    assert apart.shape == (LAYERS, 4, 2)
    assert torch.allclose(model.eval()(batch)["main"], apart.mean(0), atol=1e-5)


def test_mixing_weights_do_not_decay(tiny_model_folder: Callable[..., Path]) -> None:
    for name, keys in {
        "weighted_layers": {"weight"},
        "scalar_mix": {"weight", "scale"},
        "gem": {"p"},
        "attention_layers": {"query"},
        "lstm_layers": {"cell.bias_ih_l0", "cell.bias_hh_l0"},
        "psum": {"blocks.0.norm1.weight", "blocks.0.self_attn.in_proj_bias"},
    }.items():
        model, _ = made(tiny_model_folder("bert"), name)
        groups = build_groups(model, depth_of=model.depth_of, num_layers=3, lr=1e-3, weight_decay=0.1)
        plain = {n for group in groups if group.weight_decay == 0 for n in group.names}
        assert {f"pooler.{key}" for key in keys} <= plain, name
    decayed = {n for group in groups if group.weight_decay for n in group.names}
    assert {"pooler.dense.weight", "pooler.blocks.0.self_attn.in_proj_weight"} <= decayed


def test_modernbert_states_go_through_the_final_norm(tiny_model_folder: Callable[..., Path]) -> None:
    model, tokenizer = made(tiny_model_folder("modernbert"), "mean")
    batch = collate(encoded_pair(tokenizer, [0, 1, 2, 3]), np.arange(4))
    states = model.backbone(batch.input_ids, batch.mask, layers=(1, 2, 3))
    last = model.backbone(batch.input_ids, batch.mask)[-1]
    assert torch.equal(states[3], last)
    raw = model.backbone.model(batch.input_ids, attention_mask=batch.mask, output_hidden_states=True).hidden_states
    assert torch.equal(states[1], model.backbone.model.final_norm(raw[1]))
    assert torch.equal(states[3], raw[3]), "the last entry is normalised by the model itself"


def test_pooler_output_equals_the_models_own(tiny_model_folder: Callable[..., Path]) -> None:
    from transformers import AutoModel

    for kind in OWN_POOLER:
        model, tokenizer = made(tiny_model_folder(kind), "pooler_output")
        whole = AutoModel.from_pretrained(tiny_model_folder(kind)).eval()
        inputs = tokenizer(BODIES, padding=True, return_tensors="pt")
        batch = collate(encode(tokenizer, (BODIES,), max_length=32, cache=None), np.arange(4))
        with torch.no_grad():
            expected = whole(**inputs).pooler_output
            hidden = model.eval().backbone(batch.input_ids, batch.mask, batch.token_type_ids)
            found = model.pooler(hidden, batch.mask, batch.input_ids)
        assert torch.allclose(found, expected, atol=1e-6), kind


def test_a_text_without_tokens_pools_to_zero() -> None:
    hidden, mask = torch.randn(3, 5, 4), torch.zeros(3, 5, dtype=torch.long)
    assert masked_mean(hidden, mask).abs().max() == 0
    assert masked_max(hidden, mask).abs().max() == 0


def test_the_classification_token_is_found_on_either_side() -> None:
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert cls_index(left, cls_last=True).tolist() == [3, 3]
    assert cls_index(left, cls_last=False).tolist() == [2, 0]
    assert cls_index(left.flip(1), cls_last=True).tolist() == [1, 3]


def test_xlnet_pads_left_and_its_cls_is_last(tiny_model_folder: Callable[..., Path]) -> None:
    model, tokenizer = made(tiny_model_folder("xlnet"), "cls")
    assert model.backbone.cls_last
    batch = collate(encoded_pair(tokenizer, [0, 1, 2, 3]), np.arange(4))
    assert batch.mask[:, -1].all()
    assert (batch.input_ids[:, -1] == tokenizer.cls_token_id).all()


# --- BART ------------------------------------------------------------------------------------------------------------


def test_bart_classifies_on_the_last_separator_of_its_decoder(tiny_model_folder: Callable[..., Path]) -> None:
    """The convention of BartForSequenceClassification, whose head sees the decoder at the last </s>."""
    from transformers import AutoModel

    folder = tiny_model_folder("bart")
    model, tokenizer = made(folder, "cls", part="decoder")
    whole = AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(BODIES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = whole(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    expected = torch.stack(
        [h[ids.eq(tokenizer.eos_token_id).nonzero()[-1, 0]] for h, ids in zip(hidden, inputs["input_ids"], strict=True)]
    )
    batch = collate(encode(tokenizer, (BODIES,), max_length=32, cache=None), np.arange(4))
    with torch.no_grad():
        states = model.eval().backbone(batch.input_ids, batch.mask)
        found = model.pooler(states, batch.mask, batch.input_ids)
    assert torch.allclose(found, expected, atol=1e-6)


def test_barts_encoder_is_alone_and_its_decoder_stands_on_it(tiny_model_folder: Callable[..., Path]) -> None:
    from transformers import AutoModel

    folder = tiny_model_folder("bart")
    encoder, tokenizer = made(folder, "mean")
    assert not any("decoder" in name for name, _ in encoder.named_parameters())
    batch = collate(encoded_pair(tokenizer, [0, 1, 2, 3]), np.arange(4))
    whole = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = whole.encoder(batch.input_ids, attention_mask=batch.mask).last_hidden_state
        found = encoder.eval().backbone(batch.input_ids, batch.mask)[-1]
    assert torch.equal(found, expected)
    both, _ = made(folder, "mean", part="decoder", freeze_embeddings=True)
    assert (both.backbone.num_layers, both.backbone.num_states) == (6, 3)
    depths = {name: both.depth_of(name) for name, _ in both.named_parameters()}
    assert set(depths.values()) == set(range(8))
    assert depths["backbone.model.decoder.layers.0.fc1.weight"] == 4
    frozen = {name for name, parameter in both.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, depth in depths.items() if depth == 0}


@pytest.mark.parametrize("name", [name for name in POOLERS if name != "pooler_output"])
def test_poolers_on_barts_decoder(name: str, tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    model, tokenizer = made(tiny_model_folder("bart"), name, part="decoder")
    model.double()
    together = predicted(model, tokenizer, [0, 1, 2, 3])
    alone = np.concatenate([predicted(model, tokenizer, [row]) for row in range(4)])
    assert np.abs(together - alone).max() < 1e-5
    save_recipe(model.backbone, tokenizer, tmp_path / "backbone")
    save_weights(tmp_path / "w.safetensors", model)
    again, own = made(tmp_path / "backbone", name, part="decoder", pretrained=False)
    again.double()
    load_weights(tmp_path / "w.safetensors", again)
    assert np.array_equal(predicted(again, own, [0, 1, 2, 3]), together)


# --- catalogue and refusals ------------------------------------------------------------------------------------------


def test_catalogue_and_config_agree_on_names_and_options() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(PoolerConfig)
    variants = adapter.json_schema()["discriminator"]["mapping"]
    assert set(variants) == set(POOLERS)
    for name, row in POOLERS.items():
        assert row.about and row.source, name
        options = adapter.validate_python({"name": name}).model_dump()
        assert options["name"] == name
        make = row.make.func if isinstance(row.make, partial) else row.make
        assert issubclass(make, Pooler)
        allowed = set(make.__init__.__kwdefaults or {}) if hasattr(make.__init__, "__kwdefaults") else None
        assert allowed is None or set(options) - {"name"} <= allowed
        wide = SimpleNamespace(**{**vars(BACKBONE), "num_states": 6})
        assert build_pooler(options, wide, num_fields=2).out_features > 0, "the config's own defaults build"


def test_a_dense_layer_goes_after_any_pooler() -> None:
    hidden, mask, ids, fields = data()
    for name in POOLERS:
        pooler = prepared("dense", of={"name": name, **OPTIONS[name]}, out_features=4, activation="gelu")
        found = pooled(pooler, hidden, mask, ids, fields)
        assert found.shape[-2:] == (B, 4), name
        assert np.isfinite(found).all(), name
    assert needs_trained_pooler({"name": "dense", "of": {"name": "pooler_output"}})
    assert not needs_trained_pooler({"name": "dense", "of": {"name": "mean"}})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "concat_layers",
            {"num_layers": 4},
            "'concat_layers': num_layers is 4, but the backbone has 3 blocks; set model.pooler.num_layers to at most 3",
        ),
        ("psum", {"num_layers": 4}, "'psum': num_layers is 4, but the backbone has 3"),
        ("hsum", {"num_layers": 4}, "'hsum': num_layers is 4, but the backbone has 3"),
        ("cls", {"layer": 4}, r"'cls': layer is 4, but the backbone has 3 blocks; set model.pooler.layer to -4 .. 3"),
        ("weighted_layers", {"layer_start": 4}, "'weighted_layers': layer_start is 4.*at most 3"),
        ("scalar_mix", {"layer_start": 9}, "'scalar_mix': layer_start is 9.*at most 3"),
        (
            "sbert_wk",
            {"layer_start": 2},
            "'sbert_wk': layer_start is 2, but the backbone has 3 blocks and 3 are needed; set model.pooler.layer_start to at most 1",
        ),
        ("sbert_wk", {"window": 3}, "'sbert_wk': window is 3, but only 3 layers are compared.*below 3"),
        (
            "two_tower",
            {"num_fields": 1},
            "'two_tower' has one dense layer per text column and needs two columns, got one",
        ),
    ],
)
def test_what_cannot_apply_is_refused_with_the_reason(
    name: str, options: dict[str, Any], message: str, tiny_model_folder: Callable[..., Path]
) -> None:
    fields = options.pop("num_fields", 2)
    with pytest.raises(ValueError, match=message):
        made(tiny_model_folder("bert"), name, pooler=options, num_fields=fields)


def test_sbert_wk_needs_three_blocks() -> None:
    backbone = SimpleNamespace(**{**vars(BACKBONE), "num_states": 2})
    with pytest.raises(
        ValueError, match="'sbert_wk' needs 3 blocks, but the backbone has 2; use pooler 'mean' or 'cls'"
    ):
        build_pooler({"name": "sbert_wk"}, backbone)


@pytest.mark.parametrize("kind", [kind for kind in TINY_MODELS if kind not in OWN_POOLER])
def test_pooler_output_is_refused_where_there_is_none(kind: str, tiny_model_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="has no pooler of its own; use pooler 'cls' or 'mean'"):
        made(tiny_model_folder(kind), "pooler_output")


def test_a_decoder_that_is_not_there_is_refused(tiny_model_folder: Callable[..., Path]) -> None:
    with pytest.raises(
        ValueError, match="model.part is 'decoder', but this is bert: it has no decoder; set model.part to encoder"
    ):
        made(tiny_model_folder("bert"), "mean", part="decoder")
