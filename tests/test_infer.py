"""Inference over many models: order, time budget, going on after a kill, and what must not change the numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_MODELS, TinyCompetition
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from comp import config_file, load
from comp.blend.crossfit import read_blend
from comp.cli import app
from comp.data import tokens
from comp.data.batches import collate
from comp.data.tables import read_test
from comp.data.tokens import encode
from comp.model.sources import load_tokenizer
from comp.model.text_model import build_model
from comp.runtime import Runtime
from comp.ship import infer as ship
from comp.ship import loaded
from comp.ship.jobs import Job, Jobs, parse_duration
from comp.ship.workers import Alone, Crew
from comp.training import checkpoint, crossval

# --- jobs ------------------------------------------------------------------------------------------------------------


def test_durations() -> None:
    assert [parse_duration(text) for text in ("8h", "1.5 h", "90min", "300s")] == [28800, 5400, 5400, 300]
    for text in ("", "8", "h", "0h", "-1h", "nan h", "8 hours", "inf s"):
        with pytest.raises(ValueError, match="--time-budget .*: allowed are like 8h, 90min or 300s"):
            parse_duration(text)


def plan(seconds: float | None, now: list[float], weights: tuple[float, ...] = (0.2, 0.5, 0.3)) -> Jobs:
    planned = [Job(run, fold, 1.0) for run in range(len(weights)) for fold in (0, 1)]
    return Jobs(weights, planned, seconds, clock=lambda: now[0])


def play(jobs: Jobs, now: list[float], each: float) -> list[tuple[int, Any]]:
    played = []
    while (job := jobs.next()) is not None:
        now[0] += each
        played.append((job.run, job.fold))
        jobs.finished(job, each)
    return played


def test_without_a_budget_all_play_heaviest_first() -> None:
    now = [0.0]
    assert play(plan(None, now), now, 100.0) == [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (700, [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 1)]),
        (600, [(1, 0), (1, 1), (2, 0), (2, 1), (0, 0)]),  # the lightest run's second fold goes first
        (400, [(1, 0), (2, 0), (0, 0)]),  # then every second fold
        (250, [(1, 0), (2, 0)]),  # then the lightest run
        (120, [(1, 0)]),
        (10, [(1, 0)]),  # one model always plays
    ],
)
def test_what_will_not_fit_is_dropped_from_the_lightest_up(budget: float, expected: list[tuple[int, int]]) -> None:
    now = [0.0]
    jobs = plan(budget, now)
    assert play(jobs, now, 100.0) == expected
    assert len(jobs.dropped) == 6 - len(expected)
    assert budget < 200 or now[0] <= budget


def test_costs_are_projected_by_size_and_kept_jobs_measure_nothing() -> None:
    now = [0.0]
    jobs = Jobs((1.0, 1.0), [Job(0, 0, 1.0), Job(0, 1, 1.0), Job(1, 0, 5.0)], 700.0, clock=lambda: now[0])
    first = jobs.next()
    assert first is not None
    jobs.finished(first, None)
    assert jobs.projected() == 0.0
    second = jobs.next()
    assert second is not None
    now[0] = 100.0
    jobs.finished(second, 100.0)
    assert jobs.projected() == 500.0
    assert jobs.next() is not None and jobs.next() is None and not jobs.dropped


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> TinyCompetition:
    """Two runs of two folds, one with a full-data model too, and a ridge blend of both."""
    competition = tiny_competition()
    data = competition.config(tiny_model_folder("bert"), optimizer={"lr": 1e-3})
    data["training"] = data.get("training", {}) | {"precision": "fp32"}
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    for name, overrides in (("a", []), ("b", ["model.pooler.name=max"])):
        crossval.run(config_file.load("tiny.yaml", overrides), name, save_every="never", say=lambda line: None)
    crossval.run(config_file.load("tiny.yaml"), "a", "full", save_every="never", say=lambda line: None)
    assert CliRunner().invoke(app, ["blend", *both(), "--method", "ridge"]).exit_code == 0
    return competition


def both() -> list[str]:
    return ["--run", "runs/a", "--run", "runs/b"]


def submitted(*words: str) -> pd.Series:
    found = CliRunner().invoke(app, ["infer", *words, "--out", "out.csv"])
    assert found.exit_code == 0, found.exception
    return pd.read_csv("out.csv", dtype={"id": str}).set_index("id")["target"]


def forget() -> None:
    for file in ship.PREDICTIONS.glob("*.npy"):
        file.unlink()


def test_order_of_rows_and_runs_size_of_batches_and_number_of_workers_change_nothing(
    trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1e-6, against the mean of fold models that see each text alone."""
    test = pd.read_csv(trained.test, dtype=str)
    runs, blend = ["runs/a", "runs/b"], read_blend("blends/blend")
    each = {run: np.mean([alone(run, fold, test) for fold in (0, 1)], axis=0) for run in runs}
    mean = pd.Series(np.mean(list(each.values()), axis=0), test["id"])
    blended = pd.Series(blend.apply(np.stack([each[run][:, None] for run in blend.runs]))[:, 0], test["id"])
    crew = Crew(["cpu", "cpu", "cpu"])
    close, crew.close = crew.close, lambda: None
    shares: list[int] = []

    @settings(max_examples=12, deadline=None)
    @given(
        order=st.permutations(range(len(test))),
        turned=st.booleans(),
        batch_tokens=st.sampled_from([1, 40, 200, 2048]),
        workers=st.sampled_from([1, 2, 3]),
        applied=st.booleans(),
    )
    def holds(order: list[int], turned: bool, batch_tokens: int, workers: int, applied: bool) -> None:
        forget()
        some = Crew.__new__(Crew)
        some.workers, some.close = crew.workers[:workers], lambda: None
        monkeypatch.setattr(ship, "crew_of", lambda run, num_texts: some if workers > 1 else Alone())
        test.iloc[list(order)].to_csv("shuffled.csv", index=False)
        which = {"blend": blend} if applied else {"runs": runs[::-1] if turned else runs}
        devices = ["cpu"] * workers
        path = ship.infer(
            **which, test="shuffled.csv", out="out.csv", batch_tokens=batch_tokens, devices=devices, say=str
        )
        found = pd.read_csv(path, dtype={"id": str}).set_index("id")["target"]
        assert list(found.index) == list(test["id"].iloc[list(order)])
        expected = blended if applied else mean
        assert found.to_numpy() == pytest.approx(expected[found.index].to_numpy(), abs=1e-6)
        content = load("runs/a", batch_tokens=batch_tokens).read(read_test("shuffled.csv", blend_config()))
        shares.append(len(load("runs/a", batch_tokens=batch_tokens).shares(content, 24)))

    try:
        holds()
    finally:
        close()
    assert max(shares) >= 10, "rows are really shared out"


def alone(run: str, fold: int, test: pd.DataFrame) -> np.ndarray:
    """Return what a fold model says to each text alone."""
    return load(run, folds=[fold], batch_tokens=1).predict(test)["target"].to_numpy()


def blend_config() -> Any:
    return config_file.load("tiny.yaml").competition


def test_worker_processes_of_the_command(trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as one process, each model kept whichever way, a budget heeded."""
    one = submitted(*both(), "--batch-tokens", "64")
    forget()
    two = submitted(*both(), "--batch-tokens", "64", "--workers", "2")
    assert two.equals(one)
    monkeypatch.setattr(ship, "crew_of", None)
    assert submitted(*both(), "--batch-tokens", "64").equals(one), "all four are kept, whoever predicted"
    for words, message in (
        (["--workers", "0"], "--workers 0: at least 1 is needed"),
        (["--workers", "2", "--devices", "cpu"], "--devices names one device a worker; leave out --workers"),
        (["--devices", "cpu,cuda:7"], "device 'cuda:7' is not there; this machine has "),
        (["--batch-tokens", "0"], "batch_tokens 0: at least 1 is needed"),
    ):
        refused = CliRunner().invoke(app, ["infer", *both(), *words])
        assert isinstance(refused.exception, ValueError) and message in str(refused.exception)


def test_a_killed_call_with_workers_goes_on_and_leaves_what_is_finished(
    trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = submitted(*both(), "--batch-tokens", "64")
    forget()
    Path("out.csv").unlink()
    real, asked = Crew.predict, []

    def dies(self: Crew, *words: Any) -> Any:
        asked.append(words[1])
        if len(asked) == 3:
            os.kill(self.workers[1].pid, signal.SIGKILL)
        return real(self, *words)

    monkeypatch.setattr(Crew, "predict", dies)
    words = [*both(), "--batch-tokens", "64", "--workers", "2", "--time-budget", "8h", "--out", "out.csv"]
    found = CliRunner().invoke(app, ["infer", *words])
    assert found.exit_code == 1
    assert "comp: the worker on cpu ended by SIGKILL, which is often the system's answer to too little" in found.output
    assert "the same command goes on, with --workers 1 in one process" in found.output
    assert [run["models"] for run in json.loads(Path("out.json").read_text())["runs"]] == [2, 0]
    assert pd.read_csv("out.csv")["target"].notna().all()
    assert submitted(*words[:-2]).equals(whole)
    assert len(asked) == 5, "two of four models were there"


def test_texts_are_tokenized_once_per_tokenizer(trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a and c differ in length, a and b in the pooler; the cache cannot be written, and is not needed."""
    crossval.run(config_file.load("tiny.yaml", ["model.max_length=20"]), "c", save_every="never", say=str)
    shutil.rmtree("runs/.cache")
    Path("runs/.cache").write_text("a file, so that no folder can be made here")
    real, calls = tokens._tokenize, []
    monkeypatch.setattr(tokens, "_tokenize", lambda *words: calls.append(1) or real(*words))
    with pytest.warns(UserWarning, match="nothing is kept in runs/.cache/predictions: "):
        found = submitted(*both(), "--run", "runs/c")
    assert len(calls) == 1
    test = pd.read_csv(trained.test, dtype=str)
    each = [load(f"runs/{name}").predict(test)["target"].to_numpy() for name in "abc"]
    assert len(calls) == 1 + 3
    assert found[test["id"]].to_numpy() == pytest.approx(np.mean(each, axis=0), abs=1e-6)


def test_too_little_memory_is_said(trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: Any, **options: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loaded, "predict", full)
    with pytest.raises(
        ValueError, match="runs/a: cpu has too little memory for batches of 2,048 tokens; use a smaller"
    ):
        load("runs/a").predict(pd.read_csv(trained.test, dtype=str))


def test_weights_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices cut into rows, vectors, numbers, tensors of nothing; a cut file is refused."""

    def made() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(30, 70), torch.nn.BatchNorm1d(70))
        model.register_buffer("nothing", torch.zeros(0, 4))
        model[1].num_batches_tracked += torch.randint(1, 100, ())
        return model

    monkeypatch.setattr(checkpoint, "PIECE", 100)
    one, two, half = made(), made(), made().to(torch.bfloat16)
    checkpoint.save_weights(tmp_path / "w.safetensors", one)
    checkpoint.load_weights(tmp_path / "w.safetensors", two)
    checkpoint.load_weights(tmp_path / "w.safetensors", half)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name])
        assert torch.equal(tensor.to(half.state_dict()[name].dtype), half.state_dict()[name])
    raw = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(raw[:-50])
    with pytest.raises(ValueError, match="cannot be read .*; train the fold again with --restart"):
        checkpoint.load_weights(tmp_path / "w.safetensors", two)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_halved_linear_layers_give_the_bits_of_autocast(name: str, tiny_model_folder: Callable[..., Path]) -> None:
    folder = str(tiny_model_folder(name))
    tokenizer = load_tokenizer(folder)
    runtime = Runtime(torch.device("cpu"), "bf16")
    model = build_model(folder, tokenizer, pretrained=True, pooler={"name": "mean"}, heads={"main": 1}, max_length=32)
    encoded = encode(tokenizer, [["the ship was golden", "a dull tram on the bridge"]], max_length=32, cache=None)
    outputs = []
    for _ in range(2):
        with torch.inference_mode(), runtime.autocast():
            outputs.append(model.eval()(collate(encoded, np.arange(2)))["main"])
        runtime.halve_linear_(model.backbone)
    assert torch.equal(*outputs)
    assert any(module.weight.dtype == torch.bfloat16 for module in model.modules() if type(module) is torch.nn.Linear)
    assert model.heads["main"].weight.dtype == torch.float32


def test_a_full_data_model_counts_as_any_other_model(trained: TinyCompetition) -> None:
    test = pd.read_csv(trained.test, dtype=str)
    each = [load("runs/a", folds=[fold]).predict(test)["target"].to_numpy() for fold in (0, 1, "full")]
    found = submitted("--run", "runs/a", "--fold", "0,1,full").loc[test["id"]].to_numpy()
    assert found == pytest.approx(np.mean(each, axis=0), abs=1e-5)
    alone = submitted("--run", "runs/a", "--fold", "full").loc[test["id"]].to_numpy()
    assert alone == pytest.approx(each[2], abs=1e-5)
    assert (
        submitted("--run", "runs/a", "--fold", "all,full")
        .loc[test["id"]]
        .equals(submitted("--run", "runs/a", "--fold", "0,1,full").loc[test["id"]])
    )
    for wrong in ("0,0", "all,0", "x", ""):
        refused = CliRunner().invoke(app, ["infer", "--run", "runs/a", "--fold", wrong])
        assert "allowed are all, full, numbers like 0,2, or several like all,full" in str(refused.exception)


def test_a_killed_call_goes_on(trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = submitted(*both())
    forget()
    real, calls = loaded.predict, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(loaded, "predict", counted)
    CliRunner().invoke(app, ["infer", *both(), "--out", "out.csv"])
    assert len(calls) == 3
    assert submitted(*both()).to_numpy() == pytest.approx(whole.to_numpy(), abs=1e-12)
    assert len(calls) == 3 + 2, "two of four models were there"
    assert submitted(*both()).equals(whole)
    assert len(calls) == 5
    # another model under the same name is another prediction
    crossval.run(config_file.load("tiny.yaml", ["training.seed=9"]), "a", restart=True, say=lambda line: None)
    assert not np.allclose(submitted(*both()), whole, atol=1e-4)


def test_a_time_budget_leaves_a_valid_file_and_says_what_it_left_out(
    trained: TinyCompetition, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(ship.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ship, "Jobs", partial(Jobs, clock=lambda: now[0]))
    real, files = loaded.predict, []

    def slow(*args: Any, **options: Any) -> Any:
        files.append(Path("out.csv").exists())
        now[0] += 100.0
        return real(*args, **options)

    monkeypatch.setattr(loaded, "predict", slow)
    said = CliRunner().invoke(app, ["infer", "--blend", "blends/blend", "--time-budget", "240s", "--out", "out.csv"])
    assert said.exit_code == 0, said.exception
    assert files == [False, True], "the file is written after every model"
    assert said.output.count("left out, the time budget would not do: runs/") == 2
    models = [run["models"] for run in json.loads(Path("out.json").read_text())["runs"]]
    assert models == [1, 1]
    forget()
    now[0] = 0.0
    said = CliRunner().invoke(app, ["infer", "--blend", "blends/blend", "--time-budget", "110s", "--out", "out.csv"])
    models = [run["models"] for run in json.loads(Path("out.json").read_text())["runs"]]
    assert sorted(models) == [0, 1]
    blend, test = read_blend("blends/blend"), pd.read_csv(trained.test, dtype=str)
    heaviest = models.index(1)
    preds = load(blend.runs[heaviest], folds=[0]).predict(test)[["target"]].to_numpy()
    expected = blend.among([heaviest]).apply(preds[None])[:, 0]
    found = pd.read_csv("out.csv", dtype={"id": str}).set_index("id").loc[test["id"], "target"].to_numpy()
    assert found == pytest.approx(expected, abs=1e-5), "the blend is fitted again to the runs there are"
