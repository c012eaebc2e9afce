"""Attention and precision by measurement: what is measured, kept, chosen, recorded; predictions do not care."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY_MODELS, Call, TinyCompetition

from comp import config_file, kernels
from comp.data.batches import Batch
from comp.model.sources import load_tokenizer, read_config
from comp.model.text_model import TextModel, build_model
from comp.runtime import Runtime
from comp.ship.infer import load
from comp.training import crossval

CPU = Runtime(torch.device("cpu"), "fp32")
HALF = Runtime(torch.device("cpu"), "bf16")
RATES = {"sdpa bf16": 100.0, "sdpa fp32": 90.0, "eager bf16": 130.0, "eager fp32": 80.0}
BLOCKED = {"blocked bf16": 90.0, "blocked fp32": 80.0}
Folder = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "comp" / "kernels.json"


def chosen(
    folder: Path, runtime: Runtime = HALF, *, dropout: float = 0.1, known: Any = None, **wishes: str
) -> tuple[kernels.Kernels, Runtime, list[str]]:
    said: list[str] = []
    wanted = {"attention": "auto", "precision": "auto"} | wishes
    config = read_config(str(folder), dropout)
    found, opened = kernels.choose(config, runtime, max_length=16, known=known, say=said.append, **wanted)
    return found, opened, said


def test_each_way_is_measured_without_touching_the_runs_random_numbers(tiny_model_folder: Folder) -> None:
    config = read_config(str(tiny_model_folder("bert")), 0.1)
    before = torch.get_rng_state()
    rates = kernels.measure(config, HALF, tokens=16)
    assert torch.equal(before, torch.get_rng_state())
    blocked = {"blocked bf16", "blocked fp32", "blocked bf16 without dropout"}
    assert set(rates) == {*RATES, "sdpa bf16 without dropout", "eager bf16 without dropout", *blocked}
    assert all(rate > 0 for rate in rates.values())
    assert config.num_hidden_layers == 3, "the config measured with is a copy"
    plain = kernels.measure(read_config(str(tiny_model_folder("bert")), 0.0), CPU, tokens=16)
    assert set(plain) == {"sdpa fp32", "eager fp32", "blocked fp32"}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_architecture_can_be_measured(name: str, tiny_model_folder: Folder) -> None:
    config = read_config(str(tiny_model_folder(name)), 0.1)
    expected = {f"{attention} fp32" for attention in kernels.attentions_on(config, "cpu")}
    assert {key for key in kernels.measure(config, CPU, tokens=8) if "without" not in key} == expected


def test_the_fastest_is_taken_once_and_kept(
    tiny_model_folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def measured(*_: Any, **__: Any) -> dict[str, float]:
        calls.append(1)
        return RATES | BLOCKED | {"sdpa bf16 without dropout": 200.0, "eager bf16 without dropout": 190.0}

    monkeypatch.setattr(kernels, "measure", measured)
    folder = tiny_model_folder("bert")
    found, runtime, said = chosen(folder)
    assert (found.attention, found.precision, runtime.precision) == ("eager", "bf16", "bf16")
    assert "eager bf16, 130 tokens/s a block (sdpa bf16 100, sdpa fp32 90" in said[0]
    assert "dropout costs 35% of a block's speed here, model.dropout 0 would spare it" in said[0]
    assert chosen(folder)[0] == found
    assert len(calls) == 1, "the second time it comes from the cache"
    chosen(folder, dropout=0.0)
    assert len(calls) == 2, "another dropout is another question"
    cache.write_text('{"broken', encoding="utf-8")
    chosen(folder)
    assert len(calls) == 3, "a damaged cache is measured anew"
    known = json.loads(cache.read_text())
    for rates in [rates for own in known.values() for rates in own.values()]:
        del rates["blocked bf16"], rates["blocked fp32"]
    cache.write_text(json.dumps(known), encoding="utf-8")
    chosen(folder)
    assert len(calls) == 4, "of an attention that the cache does not know yet"


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        (RATES | {"eager bf16": 104.0}, ("sdpa", "bf16")),  # within the margin
        (RATES | {"eager fp32": 140.0}, ("eager", "fp32")),
        (RATES | {"sdpa fp32": 200.0}, ("sdpa", "fp32")),
    ],
)
def test_the_usual_way_stays_unless_another_is_clearly_faster(
    rates: dict[str, float],
    expected: tuple[str, str],
    tiny_model_folder: Folder,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "measure", lambda *_, **__: rates)
    found, runtime, _ = chosen(tiny_model_folder("bert"))
    assert (found.attention, found.precision) == expected
    assert runtime.precision == expected[1]


def test_what_the_user_says_is_not_measured(
    tiny_model_folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "measure", lambda *_, **__: RATES)
    folder = tiny_model_folder("bert")
    found, _, said = chosen(folder, attention="sdpa", precision="bf16")
    assert (found.attention, found.precision, found.rates, said) == ("sdpa", "bf16", {}, [])
    assert not cache.exists()
    found, runtime, _ = chosen(folder, precision="bf16")
    assert (found.attention, runtime.precision, set(found.rates)) == ("eager", "bf16", {"sdpa bf16", "eager bf16"})


def test_a_run_goes_on_with_what_it_began_with(
    tiny_model_folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "measure", lambda *_, **__: RATES)
    folder = tiny_model_folder("bert")
    first = chosen(folder)[0]
    cache.unlink()
    monkeypatch.setattr(kernels, "measure", lambda *_, **__: RATES | {"sdpa fp32": 900.0})
    known = json.loads(json.dumps(vars(first)))
    again, runtime, said = chosen(folder, known=known)
    assert (again, runtime.precision, said) == (first, "bf16", [])
    assert chosen(folder, dropout=0.2, known=known)[0].precision == "fp32", "another question, another answer"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_nothing_is_measured_where_nothing_can_be_kept(tiny_model_folder: Folder, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.parent.chmod(0o500)
    assert chosen(tiny_model_folder("bert"))[0].rates == {}


def test_a_cache_that_is_a_file_costs_the_measurement_only(tiny_model_folder: Folder, cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("in the way")
    found, runtime, said = chosen(tiny_model_folder("bert"))
    assert (found.attention, runtime.precision, found.rates, said) == ("sdpa", "bf16", {}, [])


def test_what_cannot_be_measured_is_said_and_trains_as_usual(
    tiny_model_folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> dict[str, float]:
        raise KeyError("layers")

    monkeypatch.setattr(kernels, "measure", failing)
    found, runtime, said = chosen(tiny_model_folder("bert"))
    assert (found.attention, runtime.precision, found.rates) == ("sdpa", "bf16", {})
    assert said == ["attention and precision could not be measured (KeyError: 'layers'): the usual ones are taken"]


# --- the model -------------------------------------------------------------------------------------------------------


def model_of(folder: Path, attention: str = "auto") -> TextModel:
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(folder))
    return build_model(
        str(folder), tokenizer, pretrained=True, pooler={"name": "mean"}, heads={"main": 1}, max_length=16,
        attention=attention,
    )  # fmt: skip


def padded() -> Batch:
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    ids = torch.randint(6, 40, (3, 9), generator=torch.Generator().manual_seed(1)) * mask
    return Batch(np.arange(3), ids, mask, int(mask.sum()))


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "albert", "modernbert", "bart"])
def test_both_attentions_are_one_model_and_training_alone_changes(name: str, tiny_model_folder: Folder) -> None:
    folder = tiny_model_folder(name)
    sdpa, eager, mixed = model_of(folder, "sdpa"), model_of(folder, "eager"), model_of(folder)
    mixed.backbone.attend(training="eager")
    seen: list[str] = []
    mixed.backbone.model.register_forward_pre_hook(lambda *_: seen.append(mixed.backbone.config._attn_implementation))
    batch = padded()
    for train in (True, False, True):
        outputs = [model.train(train)(batch)["main"].detach() for model in (sdpa, eager, mixed)]
        assert (outputs[0] - outputs[1]).abs().max() < 1e-5
        assert torch.equal(outputs[2], outputs[1 if train else 0])
    assert seen == ["eager", "sdpa", "eager"]


def test_an_attention_that_the_architecture_lacks_is_refused(tiny_model_folder: Folder) -> None:
    wanted = "model.attention is 'sdpa', but deberta-v2 has only eager; set it to auto or one of these"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        model_of(tiny_model_folder("deberta-v2"), "sdpa")
    model_of(tiny_model_folder("deberta-v2"), "eager")


@pytest.mark.parametrize("attention", ["auto", "eager", "blocked"])
def test_a_run_records_its_choice_and_infers_what_it_scored(
    attention: str,
    isolated: Path,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Folder,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    monkeypatch.setattr(kernels, "measure", lambda *_, **__: {"sdpa fp32": 1000.0, "eager fp32": 2000.0})
    competition = tiny_competition()
    data = competition.config(tiny_model_folder("bert"))
    data["model"] |= {"attention": attention, "dropout": 0.1}
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    said: list[str] = []
    crossval.run(config_file.load("tiny.yaml"), "tiny", "0", say=said.append)
    recorded = json.loads(Path("runs/tiny/manifest.json").read_text())["kernels"]
    expected = "eager" if attention == "auto" else attention
    assert (recorded["attention"], recorded["precision"]) == (expected, "fp32")
    assert any("attention and precision: eager fp32, 2,000" in line for line in said) == (attention == "auto")
    assert "attn" not in Path("runs/tiny/backbone/config.json").read_text()

    import pandas as pd

    rows = pd.read_parquet("runs/tiny/fold0/oof.parquet")
    frame = pd.read_csv(competition.train, dtype=str).set_index("id").loc[rows["id"]].reset_index()
    run = load("runs/tiny")
    found = run.predict(frame)["target"].to_numpy()
    assert np.abs(found - rows["pred_main_target"].to_numpy()).max() < 1e-6
    if attention == "auto":
        status, out, _ = call("doctor")
        assert status in (0, 1)
        assert "bert 32x4, dropout 0.1, in attention 0.1" in out
        assert "eager fp32, 2,000 tokens/s a block (sdpa fp32 1,000)" in out


def test_inference_takes_the_precision_that_training_chose_on_the_same_device(
    isolated: Path,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Folder,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    monkeypatch.setattr("comp.runtime.cpu_has_bf16", lambda: True)  # so that the hardware would take bf16
    monkeypatch.setattr(kernels, "measure", lambda *_, **__: RATES | {"eager fp32": 300.0})
    data = tiny_competition().config(tiny_model_folder("bert"))
    data["training"]["precision"] = "auto"
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    crossval.run(config_file.load("tiny.yaml"), "tiny", "0", say=lambda line: None)
    path = Path("runs/tiny/manifest.json")
    manifest = json.loads(path.read_text())
    assert manifest["kernels"]["precision"] == "fp32"

    assert load("runs/tiny").runtime.precision == "fp32"
    assert load("runs/tiny", precision="bf16").runtime.precision == "bf16", "an explicit one wins"
    assert load("runs/tiny", precision="auto").runtime.precision == "bf16", "so does the device's usual one"
    status, out, _ = call("infer", "--run", "runs/tiny")
    assert status == 0 and re.search(r"best weights\), CPU \(\d+ threads\), fp32", out)

    name, threads = manifest["kernels"]["device"].rsplit(", ", 1)
    for device, wanted in ((f"{name}, 96 threads", "fp32"), (f"Another CPU, {threads}", "bf16"), ("NVIDIA T4", "bf16")):
        path.write_text(json.dumps({**manifest, "kernels": {**manifest["kernels"], "device": device}}))
        assert load("runs/tiny").runtime.precision == wanted, device
    for other in (None, "fp32", {"precision": "int8", "device": manifest["kernels"]["device"]}):
        path.write_text(json.dumps({**manifest, "kernels": other}))
        assert load("runs/tiny").runtime.precision == "bf16", other
    del manifest["kernels"]  # a run made before there was a choice
    path.write_text(json.dumps(manifest))
    assert load("runs/tiny").runtime.precision == "bf16"
