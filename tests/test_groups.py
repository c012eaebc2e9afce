"""Parameter groups: every trainable parameter once, the right rate, the right decay, on every architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_MODELS
from torch import nn

from comp.model.sources import load_tokenizer
from comp.model.text_model import TextModel, build_model
from comp.optim.groups import LAYOUTS, build_groups, group_table, layer_wise

LAYOUT_OPTIONS: dict[str, dict[str, float]] = {name: {} for name in LAYOUTS} | {"llrd": {"decay": 0.5}}


def made(folder: Path, **options: Any) -> TextModel:
    return build_model(
        folder,
        load_tokenizer(str(folder)),
        pretrained=True,
        pooler={"name": "mean"},
        heads={"main": 1},
        max_length=32,
        **options,
    )


def groups_of(model: TextModel, **options: Any) -> list[Any]:
    return build_groups(model, depth_of=model.depth_of, num_layers=model.backbone.num_layers, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_every_trainable_parameter_stands_in_one_group(
    kind: str, layout: str, tiny_model_folder: Callable[..., Path]
) -> None:
    model = made(tiny_model_folder(kind), freeze_embeddings=True)
    groups = groups_of(model, lr=1e-5, layout=layout, **LAYOUT_OPTIONS[layout])
    listed = [id(parameter) for group in groups for parameter in group.params]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_norms_and_biases_are_not_decayed_and_weights_are(kind: str, tiny_model_folder: Callable[..., Path]) -> None:
    model = made(tiny_model_folder(kind))
    decay = {name: group.weight_decay for group in groups_of(model, lr=1e-5, weight_decay=0.1) for name in group.names}
    norms = 0
    for path, module in model.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if isinstance(module, nn.LayerNorm):
                norms += 1
                assert decay[full] == 0, full
            elif isinstance(module, nn.Linear | nn.Embedding):
                assert decay[full] == (0 if name == "bias" else 0.1), full
    assert norms >= 6


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_llrd_rates_by_depth(kind: str, tiny_model_folder: Callable[..., Path]) -> None:
    model = made(tiny_model_folder(kind))
    groups = groups_of(model, lr=1.0, head_lr=7.0, layout="llrd", decay=0.5)
    rates = {name: group.lr for group in groups for name in group.names}
    for name, rate in rates.items():
        depth = model.depth_of(name)
        assert rate == (7.0 if depth == 4 else 0.5 ** (4 - depth)), name


def test_module_wise_sets_the_embeddings_apart(tiny_model_folder: Callable[..., Path]) -> None:
    for kind in TINY_MODELS:
        model = made(tiny_model_folder(kind))
        groups = groups_of(model, lr=1.0, head_lr=7.0, layout="module_wise", embeddings_factor=0.25)
        for group in groups:
            for name in group.names:
                depth = model.depth_of(name)
                assert group.lr == {0: 0.25, 4: 7.0}.get(depth, 1.0), (kind, name)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [
        (12, [-1] * 5 + [0] * 4 + [1] * 4),
        (24, [-1] * 9 + [0] * 8 + [1] * 8),
        (6, [-1, -1, -1, 0, 0, 1, 1]),
        (3, [-1, -1, 0, 1]),
        (1, [-1, -1]),
    ],
)
def test_layer_wise_thirds_of_any_depth(num_layers: int, expected: list[int]) -> None:
    """Depth 0 (the embeddings) learns with the lowest third; a single block is its own lowest third."""
    found = [layer_wise(depth, num_layers, factor=2.6) for depth in range(num_layers + 1)]
    assert found == pytest.approx([2.6**power for power in expected])
    assert found == sorted(found)


def test_layer_wise_groups(tiny_model_folder: Callable[..., Path]) -> None:
    model = made(tiny_model_folder("roberta"))
    rates = {group.name: group.lr for group in groups_of(model, lr=1.0, layout="layer_wise", factor=2.0)}
    assert (rates["embeddings"], rates["block 1"], rates["block 2"], rates["block 3"]) == (0.5, 0.5, 1.0, 2.0)


def test_unified_has_one_backbone_rate_and_head_lr_falls_back(tiny_model_folder: Callable[..., Path]) -> None:
    model = made(tiny_model_folder("bert"))
    assert [(g.name, g.lr) for g in groups_of(model, lr=1e-5, head_lr=1e-3)] == [
        ("head", 1e-3), ("head, no decay", 1e-3), ("backbone", 1e-5), ("backbone, no decay", 1e-5),
    ]  # fmt: skip
    assert {group.lr for group in groups_of(model, lr=1e-5)} == {1e-5}


def test_the_table_counts_everything(tiny_model_folder: Callable[..., Path]) -> None:
    model = made(tiny_model_folder("bert"), freeze_layers=1)
    groups = groups_of(model, lr=2e-5)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen > 0
    assert sum(g.num_parameters for g in groups) + frozen == sum(p.numel() for p in model.parameters())
    text = group_table(groups, frozen)
    assert f"{frozen:,}" in text
    assert "2.00e-05" in text


def test_nothing_to_train_is_refused(tiny_model_folder: Callable[..., Path]) -> None:
    model = made(tiny_model_folder("bert"))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter is frozen"):
        groups_of(model, lr=1e-5)
