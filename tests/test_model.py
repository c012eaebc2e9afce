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

from comp.data.batches import collate, encode
from comp.model.backbone import load_tokenizer, resolve_source, save_recipe
from comp.model.pooling import POOLERS, Pooler, build_pooler, cls_index, masked_max, masked_mean
from comp.model.text_model import TextModel, build_model
from comp.runtime import Runtime
from comp.training.checkpoint import load_weights, save_weights
from comp.training.predict import predict

TEXTS = ["the ship was golden", "a dull tram", "deer", "on the bridge she was happy and the market was bright"]
OWN_POOLER = ("bert", "roberta", "albert", "mpnet", "xlm-roberta")
FP32 = Runtime(torch.device("cpu"), "fp32")
CASES = [
    (kind, pooler) for kind in TINY_MODELS for pooler in POOLERS if pooler != "pooler_output" or kind in OWN_POOLER
]


def made(folder: Path, pooler: str = "mean", **options: Any) -> tuple[TextModel, Any]:
    tokenizer = load_tokenizer(str(folder))
    torch.manual_seed(3)
    options = {"pretrained": True, "heads": {"main": 2}, "max_length": 32, **options}
    model = build_model(str(folder), tokenizer, pooler=pooler, **options)
    # Heads start near zero; large ones let a difference between texts, or between batches, show.
    torch.nn.init.normal_(next(iter(model.heads.values())).weight)
    return model, tokenizer


def predicted(model: TextModel, tokenizer: Any, texts: list[str]) -> np.ndarray:
    encoded = encode(tokenizer, (texts,), max_length=32, cache=None)
    ids = np.array([str(place) for place in range(len(texts))], object)
    return predict(model, encoded, ids, kinds={"main": "regression"}, runtime=FP32).values["main"]


@pytest.mark.parametrize(("kind", "pooler"), CASES)
def test_padding_and_batch_order_change_nothing(kind: str, pooler: str, tiny_model_folder: Callable[..., Path]) -> None:
    model, tokenizer = made(tiny_model_folder(kind), pooler)
    together = predicted(model, tokenizer, TEXTS)
    alone = np.concatenate([predicted(model, tokenizer, [text]) for text in TEXTS])
    assert np.abs(together - alone).max() < 1e-5
    order = [2, 0, 3, 1]
    assert np.abs(predicted(model, tokenizer, [TEXTS[place] for place in order]) - together[order]).max() < 1e-5
    assert np.abs(together - together[0]).max() > 1e-3, "all texts give the same: nothing was compared"


@pytest.mark.parametrize(("kind", "pooler"), CASES)
def test_a_run_rebuilds_without_the_source(
    kind: str, pooler: str, tiny_model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, tokenizer = made(tiny_model_folder(kind), pooler)
    save_recipe(model.backbone, tokenizer, tmp_path / "backbone")
    save_weights(tmp_path / "w.safetensors", model)
    assert not list((tmp_path / "backbone").glob("*.safetensors"))
    again, own_tokenizer = made(tmp_path / "backbone", pooler, pretrained=False)
    load_weights(tmp_path / "w.safetensors", again)
    assert np.array_equal(predicted(again, own_tokenizer, TEXTS), predicted(model, tokenizer, TEXTS))


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
        assert any(module.p == 0.1 for module in own.modules() if isinstance(module, torch.nn.Dropout))


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


# --- poolers against independent references --------------------------------------------------------------------------

HIDDEN = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])


def reference(name: str, tokens: np.ndarray) -> np.ndarray:
    """Pool the real tokens (T, H) of one text in float64."""
    parts = {"mean": [tokens.mean(0)], "max": [tokens.max(0)], "cls": [tokens[0]]}
    parts["mean_max"] = parts["mean"] + parts["max"]
    return np.concatenate(parts[name])


@pytest.mark.parametrize("name", [name for name in POOLERS if name != "pooler_output"])
def test_values_equal_a_float64_reference(name: str, tiny_model_folder: Callable[..., Path]) -> None:
    model, _ = made(tiny_model_folder("bert"))
    pooler = build_pooler(name, model.backbone)
    found = pooler([None, HIDDEN], MASK, torch.zeros_like(MASK)).double().numpy()
    expected = [reference(name, h[m.bool()].double().numpy()) for h, m in zip(HIDDEN, MASK, strict=True)]
    assert np.abs(found - np.stack(expected)).max() < 1e-6


def test_pooler_output_equals_the_models_own(tiny_model_folder: Callable[..., Path]) -> None:
    from transformers import AutoModel

    for kind in OWN_POOLER:
        model, tokenizer = made(tiny_model_folder(kind), "pooler_output")
        whole = AutoModel.from_pretrained(tiny_model_folder(kind)).eval()
        inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
        batch = collate(encode(tokenizer, (TEXTS,), max_length=32, cache=None), np.arange(4))
        with torch.no_grad():
            expected = whole(**inputs).pooler_output
            hidden = model.eval().backbone(batch.input_ids, batch.mask, batch.token_type_ids)
            found = model.pooler(hidden, batch.mask, batch.input_ids)
        assert torch.allclose(found, expected, atol=1e-6), kind


def test_a_text_without_tokens_pools_to_zero_and_the_input_is_left_alone() -> None:
    hidden = HIDDEN.clone()
    mask = torch.tensor([[0, 0, 0, 0, 0]] * 3)
    assert masked_mean(hidden, mask).abs().max() == 0
    assert masked_max(hidden, mask).abs().max() == 0
    assert torch.equal(hidden, HIDDEN)


def test_garbage_at_padding_is_never_read() -> None:
    garbage = HIDDEN.masked_fill(MASK.eq(0)[..., None], float("nan"))
    assert torch.equal(masked_mean(garbage, MASK), masked_mean(HIDDEN, MASK))
    assert torch.equal(masked_max(garbage, MASK), masked_max(HIDDEN, MASK))


def test_the_classification_token_is_found_on_either_side() -> None:
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert cls_index(left, cls_last=True).tolist() == [3, 3]
    assert cls_index(left, cls_last=False).tolist() == [2, 0]
    assert cls_index(left.flip(1), cls_last=True).tolist() == [1, 3]


def test_xlnet_pads_left_and_its_cls_is_last(tiny_model_folder: Callable[..., Path]) -> None:
    model, tokenizer = made(tiny_model_folder("xlnet"), "cls")
    assert model.backbone.cls_last
    batch = collate(encode(tokenizer, (TEXTS,), max_length=32, cache=None), np.arange(4))
    assert batch.mask[:, -1].all()
    assert (batch.input_ids[:, -1] == tokenizer.cls_token_id).all()


def test_every_pooler_declares_its_width(tiny_model_folder: Callable[..., Path]) -> None:
    for name, row in POOLERS.items():
        assert issubclass(row.make, Pooler)
        assert row.about
        assert row.source
        model, _ = made(tiny_model_folder("bert"), name)
        assert model.heads["main"].in_features == model.pooler.out_features


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in TINY_MODELS if kind not in OWN_POOLER])
def test_pooler_output_is_refused_where_there_is_none(kind: str, tiny_model_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="has no pooler of its own; use pooler 'cls' or 'mean'"):
        made(tiny_model_folder(kind), "pooler_output")


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


def test_encoder_decoders_are_refused(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    from transformers import BartConfig

    folder = tmp_path / "bart"
    shutil.copytree(tiny_model_folder("roberta"), folder)
    BartConfig(vocab_size=50, d_model=16).save_pretrained(folder)
    with pytest.raises(ValueError, match="bart is an encoder-decoder"):
        made(folder)


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
    with pytest.raises(OSError, match="No space"):
        save_weights(path, model)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
