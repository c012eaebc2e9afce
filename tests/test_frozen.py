"""The frozen part computed once: the same outputs and gradients, every architecture or a reason, room, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_MODELS, TinyCompetition

from comp import config_file
from comp.data.batches import collate
from comp.data.tokens import Encoded, encode
from comp.model import frozen
from comp.model.frozen import FrozenStates, NoFrozenStates, open_frozen_states
from comp.model.sources import load_tokenizer
from comp.model.text_model import TextModel, build_model
from comp.runtime import Runtime
from comp.training import crossval

CPU = Runtime(torch.device("cpu"), "fp32")
HALF = Runtime(torch.device("cpu"), "bf16")
REFUSED = {
    "albert": "share one set of weights",
    "deberta-v2": "'model.encoder.rel_embeddings.weight' is trained, and lies below the frozen part's top",
    "xlnet": "'model.mask_emb' is trained, and lies below the frozen part's top",
    "electra": "'model.embeddings_project.weight' is trained, and lies below the frozen part's top",
    "mpnet": "'model.encoder.relative_attention_bias.weight' is trained, and lies below the frozen part's top",
}
TEXTS = [
    "a warm ship",
    "the dull and bitter oak of two towns, then some moss",
    "tide",
    "we sail on a golden wave today",
]
Folder = Callable[..., Path]


def built(folder: Path, *, cached: bool, layers: int = 2, **options: Any) -> TextModel:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(folder))
    pooler = options.pop("pooler", {"name": "mean"})
    return build_model(
        str(folder), tokenizer, pretrained=True, pooler=pooler, heads={"main": 1}, max_length=24,
        freeze_embeddings=True, freeze_layers=layers, cache_frozen=cached, **options,
    )  # fmt: skip


def encoded_of(folder: Path, **options: Any) -> Encoded:
    return encode(load_tokenizer(str(folder)), [TEXTS * 2], **({"max_length": 24} | options), cache=None)


def states_of(encoded: Encoded, model: TextModel, runtime: Runtime = CPU) -> FrozenStates:
    kept = np.zeros((int(encoded.offsets[-1]), model.backbone.hidden_size), np.float32)
    states = FrozenStates(encoded, runtime, kept)
    states.serve(model)
    return states


def outputs_and_gradients(model: TextModel, encoded: Encoded, rows: list[int]) -> tuple[torch.Tensor, list[Any]]:
    model.zero_grad()
    output = model(collate(encoded, np.array(rows)))["main"]
    output.square().sum().backward()
    return output.detach(), [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_outputs_and_gradients_are_those_of_the_whole_network(name: str, tiny_model_folder: Folder) -> None:
    folder = tiny_model_folder(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            built(folder, cached=True)
        return
    cached = built(folder, cached=True)
    plain, encoded = built(folder, cached=False), encoded_of(folder)
    states_of(encoded, cached)
    for rows in ([0, 1], [3, 2, 1], [6]):
        for train in (True, False):
            expected, gradients = outputs_and_gradients(plain.train(train), encoded, rows)
            found, own = outputs_and_gradients(cached.train(train), encoded, rows)
            assert (found - expected).abs().max() < 1e-5
            for one, other in zip(own, gradients, strict=True):
                assert (one is None) == (other is None)
                assert one is None or (one - other).abs().max() < 1e-4
    assert list(plain.state_dict()) == list(cached.state_dict())


@pytest.mark.parametrize("pooler", [{"name": "concat_layers", "num_layers": 2}, {"name": "cls", "layer": 2}])
def test_poolers_of_the_layers_that_are_kept_work(pooler: dict[str, Any], tiny_model_folder: Folder) -> None:
    folder = tiny_model_folder("bert")
    plain, cached = (built(folder, cached=cached, pooler=pooler) for cached in (False, True))
    encoded = encoded_of(folder)
    states_of(encoded, cached)
    expected, _ = outputs_and_gradients(plain, encoded, [0, 1, 2])
    assert (outputs_and_gradients(cached, encoded, [0, 1, 2])[0] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("pooler", [{"name": "concat_layers", "num_layers": 3}, {"name": "sbert_wk"}])
def test_poolers_of_lower_layers_are_refused(pooler: dict[str, Any], tiny_model_folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"the pooler reads the states of layer \d, and those above 2 alone are kept"):
        built(tiny_model_folder("bert"), cached=True, pooler=pooler)


def test_windows_of_long_texts_are_kept_each(tiny_model_folder: Folder) -> None:
    folder = tiny_model_folder("bert")
    encoded = encoded_of(folder, max_length=10, windows={"stride": 2, "max_windows": 4})
    assert encoded.num_windowed
    plain, cached = (built(folder, cached=cached) for cached in (False, True))
    states_of(encoded, cached)
    expected, _ = outputs_and_gradients(plain, encoded, [1, 0, 3])
    assert (outputs_and_gradients(cached, encoded, [1, 0, 3])[0] - expected).abs().max() < 1e-5


def test_states_are_computed_once_and_the_same_whoever_asks_first(tiny_model_folder: Folder) -> None:
    folder = tiny_model_folder("bert")
    encoded = encoded_of(folder)
    found, calls = [], []
    for first in ([0], [5, 2]):
        model = built(folder, cached=True).train()
        model.backbone.model.embeddings.register_forward_hook(lambda *_: calls.append(1))
        states = states_of(encoded, model, HALF)
        for rows in (first, [0, 1, 2, 3, 4, 5, 6, 7]):
            with torch.no_grad():
                states.states(model, collate(encoded, np.array(rows)))
        found.append(states.kept)
        assert model.training
    assert np.array_equal(*found)
    assert len(calls) == 2, "one batch holds all the rows, and each model computed it once"
    with pytest.raises(AssertionError, match="cut from another table"):
        states.states(model, collate(encoded.take(np.array([2, 1])), np.array([0])))


def test_room_in_memory_on_disk_or_nowhere(
    tmp_path: Path, tiny_model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, said = encoded_of(tiny_model_folder("bert")), []

    def opened() -> NoFrozenStates:
        return open_frozen_states(encoded, hidden_size=32, runtime=CPU, folder=tmp_path, say=said.append)

    assert isinstance(opened(), FrozenStates) and said[-1].endswith("are kept in memory")
    monkeypatch.setattr(frozen, "memory_bytes", lambda: (10**6, 100))
    on_disk = opened()
    assert isinstance(on_disk, FrozenStates) and said[-1].endswith("on disk: memory has no room for them")
    assert isinstance(on_disk.kept, np.memmap) and not list(tmp_path.glob(".*"))
    model = built(tiny_model_folder("bert"), cached=True)
    on_disk.serve(model)
    in_memory = FrozenStates(encoded, CPU, np.zeros(on_disk.kept.shape, np.float32))
    batch = collate(encoded, np.array([1, 3]))
    assert torch.equal(on_disk.states(model, batch), in_memory.states(model, batch))
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    assert type(opened()) is NoFrozenStates and "computed anew in every pass" in said[-1]


def test_a_run_trains_to_the_same_scores(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Folder
) -> None:
    data = tiny_competition().config(tiny_model_folder("bert"), evaluation={"every": "50%"})
    data["model"] |= {"freeze_embeddings": True, "freeze_layers": 2}
    data["training"] |= {"epochs": 2}
    scores, said = [], []
    for cached in (False, True):
        data["model"]["cache_frozen"] = cached
        (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
        found = crossval.run(config_file.load("tiny.yaml"), f"tiny-{cached}", "0,1", say=said.append)
        assert found is not None
        scores.append(found.as_dict())
    assert scores[0]["best"]["mean"] == pytest.approx(scores[1]["best"]["mean"], abs=1e-5)
    assert sum("are kept in memory" in line for line in said) == 1, "both folds share them"
