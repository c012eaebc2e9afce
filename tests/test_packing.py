"""Texts laid end to end: the states, gradients and predictions of padded ones, in every architecture that takes it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import MAX_TOKENS, TINY_MODELS, TinyCompetition

from comp import config_file
from comp.data.batches import Batch, collate
from comp.data.tokens import Encoded, encode
from comp.kernels import PACKS, attentions_of
from comp.model import attention
from comp.model.attention import packed_attention
from comp.model.packing import Packing
from comp.model.sources import load_tokenizer, read_config
from comp.model.text_model import TextModel, build_model
from comp.ship.infer import load
from comp.ship.report_run import read_run
from comp.training import crossval

Folder = Callable[..., Path]
LENGTHS = 3, 3, 7, 1, 5, 5
TEXTS = ["one", "two words", "some more words here", "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2, "one"]
PACKED = [name for name in TINY_MODELS if name in PACKS]


def test_what_is_packed_comes_back_with_its_gradient() -> None:
    lengths, width = (2, 4, 1), 4
    packing = Packing(lengths, width, torch.device("cpu"))
    padded = torch.randn(3, width, 5, dtype=torch.float64, requires_grad=True)
    packed = packing.pack(padded)
    assert packed.shape == (1, 7, 5)
    assert torch.equal(packed[0], torch.cat([padded[row, : lengths[row]] for row in (1, 0, 2)])), "longest first"
    found = packing.unpack(packed)
    assert torch.equal(found[0, :2], padded[0, :2]) and not found[0, 2:].any() and not found[2, 1:].any()
    assert packing.places.tolist() == [0, 1, 2, 3, 0, 1, 0] and packing.lengths == (4, 2, 1)
    assert torch.autograd.gradcheck(lambda own: packing.unpack(packing.pack(own)), [padded])
    whole = Packing((4, 4, 4), width, torch.device("cpu"))
    assert torch.equal(whole.unpack(whole.pack(padded)), padded)


@pytest.mark.parametrize("window", [None, 2, 4, 20])
@pytest.mark.parametrize("call", [0, 40, 10**6])
@pytest.mark.parametrize("lengths", [LENGTHS, (7, 5, 5, 3, 3, 1), (6, 6), (9, 2, 1)])
def test_each_text_attends_to_itself_alone(
    lengths: tuple[int, ...], call: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "CALL", call)
    attention._groups.cache_clear()
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, sum(lengths), 3, 4, generator=draw, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        found = []
        for q, k, v in zip(*(own.split(lengths, dim=2) for own in (query, key, value)), strict=True):
            scores = q @ k.transpose(-1, -2) * 0.3
            places = torch.arange(q.shape[2])
            if window is not None:
                scores = scores.masked_fill((places[:, None] - places).abs() >= window, float("-inf"))
            found.append(torch.softmax(scores, -1) @ v)
        return torch.cat(found, 2).transpose(1, 2)

    own = packed_attention(*inputs, lengths, scaling=0.3, window=window)
    attention._groups.cache_clear()
    wanted = plain(*inputs)
    given = torch.randn(wanted.shape, generator=draw, dtype=torch.float64)
    assert own.shape == wanted.shape
    torch.testing.assert_close(own, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(own, inputs, given), torch.autograd.grad(wanted, inputs, given), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_an_evaluation_of_the_same_lengths_may_come_before_training() -> None:
    attention._groups.cache_clear()
    inputs = [torch.randn(1, 2, 9, 4, requires_grad=True) for _ in range(3)]
    for window in (None, 2):
        with torch.inference_mode():
            packed_attention(*inputs, (4, 3, 2), window=window)
        packed_attention(*inputs, (4, 3, 2), window=window).sum().backward()
    assert all(own.grad is not None for own in inputs)


# --- in models -------------------------------------------------------------------------------------------------------


def read(folder: Path, **cutting: Any) -> Encoded:
    return encode(load_tokenizer(str(folder)), (TEXTS,), cache=None, **({"max_length": MAX_TOKENS} | cutting))


def model_of(folder: Path, chosen: str, **options: Any) -> TextModel:
    return build_model(
        folder, load_tokenizer(str(folder)), pretrained=True, heads={"main": 1}, max_length=MAX_TOKENS,
        attention=chosen, **({"pooler": {"name": "mean"}} | options),
    )  # fmt: skip


def batch_of(encoded: Encoded) -> Batch:
    return collate(encoded, np.arange(len(encoded)))


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in PACKED]
    + [(name, {"gradient_checkpointing": True}) for name in PACKED if name != "albert"],  # which cannot
)
def test_states_and_gradients_are_those_of_padded_texts(
    name: str, options: dict[str, Any], tiny_model_folder: Folder
) -> None:
    folder = tiny_model_folder(name)
    batch = batch_of(read(folder))
    assert batch.num_tokens < 0.6 * batch.mask.numel()
    states, grads, seen = [], [], []
    for chosen in ("eager", "packed"):
        torch.manual_seed(0)
        model = model_of(folder, chosen, **options).train()
        model.backbone.model.get_input_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0]))
        found = model.backbone(batch.input_ids, batch.mask, batch.token_type_ids, layers=range(4))
        states.append([state[batch.mask.bool()] for state in found if state is not None])
        model(batch)["main"].square().sum().backward()
        grads.append({key: own.grad for key, own in model.named_parameters() if own.grad is not None})
    assert len(states[0]) == len(states[1]) == 4
    assert seen[-1].shape == (1, batch.num_tokens), "nothing else goes through the blocks"
    for ours, theirs in zip(states[1], states[0], strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_predictions_are_those_of_padded_texts_in_windows_too(name: str, tiny_model_folder: Folder) -> None:
    folder = tiny_model_folder(name)
    batch = batch_of(read(folder, max_length=16, windows={"stride": 4, "max_windows": 4}))
    assert batch.window_of is not None
    pooler = {"name": "mean_max_cls"}
    torch.manual_seed(0)
    padded = model_of(folder, "sdpa", pooler=pooler).eval()
    packed = model_of(folder, "packed", pooler=pooler).eval()
    packed.load_state_dict(padded.state_dict())
    with torch.no_grad():
        assert (padded(batch)["main"] - packed(batch)["main"]).abs().max() < 1e-5


def test_dropout_falls_in_training_only(tiny_model_folder: Folder) -> None:
    folder = tiny_model_folder("bert")
    batch = batch_of(read(folder))
    model = model_of(folder, "packed", dropout=0.3)
    model.train()
    assert not torch.equal(model(batch)["main"], model(batch)["main"])
    model.eval()
    assert torch.equal(model(batch)["main"], model(batch)["main"])


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if name not in PACKS])
def test_others_are_refused(name: str, tiny_model_folder: Folder) -> None:
    assert "packed" not in attentions_of(read_config(str(tiny_model_folder(name)), 0.0))
    with pytest.raises(ValueError, match=r"model\.attention is 'packed', but .* has only .*; set it to auto or one of"):
        model_of(tiny_model_folder(name), "packed")


# --- in runs ---------------------------------------------------------------------------------------------------------


def test_a_run_wastes_no_token_and_infers_what_it_scored(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Folder
) -> None:
    competition = tiny_competition()
    data = competition.config(tiny_model_folder("bert"), evaluation={"every": "50%"})
    scores = {}
    for name in ("packed", "sdpa"):
        data["model"]["attention"] = name
        (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
        said: list[str] = []
        found = crossval.run(config_file.load("tiny.yaml"), name, "0", say=said.append)
        assert found is not None
        scores[name] = found.as_dict()["best"]["mean"]
        (line,) = (line for line in said if ": padding " in line)
        wasted = [float(share) for share in re.findall(r"([\d.]+)% of tokens", line)]
        assert len(wasted) == 2 and (not any(wasted)) == (name != "sdpa")
    assert scores["packed"] == pytest.approx(scores["sdpa"], abs=1e-5)

    rows = pd.read_parquet("runs/packed/fold0/oof.parquet")
    frame = pd.read_csv(competition.train, dtype=str).set_index("id").loc[rows["id"]].reset_index()
    run = load("runs/packed")
    assert run.build().backbone.packs
    assert np.abs(run.predict(frame)["target"].to_numpy() - rows["pred_main_target"].to_numpy()).max() < 1e-6
    record = read_run("runs/packed")
    padding = record.padding(record.logs[0])
    assert padding is not None and (padding.share, padding.predict_share) == (0, 0) and padding.plain_share > 0


def test_the_frozen_part_is_kept_for_packed_texts(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Folder
) -> None:
    data = tiny_competition().config(tiny_model_folder("bert"))
    data["model"] |= {"freeze_embeddings": True, "freeze_layers": 2, "attention": "packed"}
    scores = []
    for cached in (False, True):
        data["model"]["cache_frozen"] = cached
        (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
        found = crossval.run(config_file.load("tiny.yaml"), f"tiny-{cached}", "0", say=lambda line: None)
        assert found is not None
        scores.append(found.as_dict()["best"]["mean"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
