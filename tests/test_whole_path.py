"""From train.csv to a valid submission on a two-minute scale: tiny models, every kind of task."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import TINY_TASKS, TinyCompetition
from safetensors.torch import load_file

import comp
from comp import config_file
from comp.config import Config
from comp.metrics import evaluate
from comp.runs import RunFolder, newest_finished, write_json
from comp.ship.infer import infer, load
from comp.ship.scoring import score_submission
from comp.training import crossval

Setup = Callable[..., tuple[Config, TinyCompetition]]
SAID: list[str] = []


@pytest.fixture
def setup(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Callable[..., Path]
) -> Setup:
    """Return `setup(kind, model="bert", pair=False, **sections)`: a checked config in an empty current directory."""

    def make(kind: str = "regression", *, model: str = "bert", pair: bool = False, **sections: Any) -> Any:
        competition = tiny_competition(kind, pair=pair)
        data = competition.config(tiny_model_folder(model), **sections)
        (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
        return config_file.load("tiny.yaml"), competition

    SAID.clear()
    return make


def run(config: Config, name: str = "tiny", folds: str = "all", **options: Any) -> Any:
    return crossval.run(config, name, folds, say=SAID.append, **options)


@pytest.mark.parametrize("kind", TINY_TASKS)
def test_train_then_infer(kind: str, setup: Setup) -> None:
    config, competition = setup(kind, evaluation={"every": "50%"})
    scores = run(config)
    folder = RunFolder("runs/tiny")
    for fold in (0, 1):
        left = {path.name for path in folder.fold(fold).path.iterdir()}
        assert left == {
            "best.safetensors",
            "last.safetensors",
            "metrics.jsonl",
            "oof.parquet",
            "evaluations.parquet",
            "groups.txt",
            "done.json",
        }
    assert folder.finished_folds() == [0, 1]
    rows = pd.read_parquet(folder.oof)
    train = pd.read_csv(competition.train, dtype=str)
    assert sorted(rows["id"]) == sorted(train["id"])
    folds = pd.read_csv("folds/tiny-" + kind + ".csv", dtype=str).set_index("id")["fold"].astype(int)
    assert (rows.set_index("id")["fold"] == folds[rows["id"]]).all()
    truth = rows.filter(like="target_main_").to_numpy()
    assert scores.pooled == evaluate(config.metric, truth, rows.filter(like="pred_main_").to_numpy())
    assert scores.last_pooled == evaluate(config.metric, truth, rows.filter(like="last_main_").to_numpy())
    assert json.loads(folder.scores.read_text())["best"]["pooled"] == scores.pooled
    assert "mean of folds" in "\n".join(SAID)

    path = infer(["runs/tiny"], say=SAID.append)
    submission, sample = pd.read_csv(path, dtype=str), pd.read_csv(competition.sample_submission, dtype=str)
    assert list(submission.columns) == list(sample.columns)
    assert list(submission["id"]) == list(sample["id"])
    sidecar = json.loads(path.with_suffix(".json").read_text())
    assert sidecar["runs"][0]["folds"] == [0, 1]
    assert sidecar["runs"][0]["scores"]["best"]["pooled"] == scores.pooled
    assert np.isfinite(score_submission(path, competition.solution, config.metric)["total"])


def test_out_of_fold_rows_are_the_best_weights_own_predictions(setup: Setup) -> None:
    config, competition = setup(
        training={"epochs": 3, "batch_size": 8, "precision": "fp32"}, evaluation={"every": "50%"}
    )
    run(config)
    train = pd.read_csv(competition.train, dtype=str)
    for weights, prefix in (("best", "pred"), ("last", "last")):
        for fold in (0, 1):
            rows = pd.read_parquet(f"runs/tiny/fold{fold}/oof.parquet")
            frame = train.set_index("id").loc[rows["id"]].reset_index()
            again = load("runs/tiny", folds=[fold], weights=weights).predict(frame)
            assert list(again["id"]) == list(rows["id"])
            assert np.abs(again["target"].to_numpy() - rows[f"{prefix}_main_target"].to_numpy()).max() < 1e-6


def test_it_learns(setup: Setup) -> None:
    config, competition = setup(
        training={"epochs": 25, "batch_size": 8, "precision": "fp32"},
        optimizer={"lr": 5e-3, "head_lr": 2e-2},
        evaluation={"every": "100%"},
    )
    scores = run(config)
    spread = pd.read_csv(competition.train)["target"].std()
    assert scores.pooled < 0.9 * spread
    assert scores.pooled <= scores.last_pooled + 1e-9
    infer(["runs/tiny"], say=SAID.append)
    assert score_submission(Path("submissions/tiny.csv"), competition.solution, "rmse")["total"] < 0.95 * spread


def test_alberts_one_block_is_said(setup: Setup) -> None:
    config, _ = setup(model="albert", groups={"layout": "llrd", "decay": 0.5})
    run(config, folds="0")
    said = "\n".join(SAID)
    assert "one block, used at every depth (ALBERT): groups.layout 'llrd' gives it the one rate" in said
    assert "block 3 " in said and "block 2 " not in said


def test_same_seed_same_bits_another_seed_others(setup: Setup) -> None:
    config, _ = setup(model="bert", evaluation={"every": "50%"})
    dropout = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.2})})
    run(dropout, "a", "0")
    run(dropout, "b", "0")
    run(config_file.load("tiny.yaml", ["model.dropout=0.2", "training.seed=7"]), "c", "0")
    one, two, three = (load_file(f"runs/{name}/fold0/last.safetensors") for name in "abc")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], three[name]) for name in one)


def test_finished_folds_are_skipped_and_restart_trains_them_again(setup: Setup) -> None:
    config, _ = setup()
    run(config, folds="0")
    first = Path("runs/tiny/fold0/done.json").stat().st_mtime_ns
    scores = run(config)
    assert "fold 0: finished before, skipped (--restart trains it again)" in SAID
    assert Path("runs/tiny/fold0/done.json").stat().st_mtime_ns == first
    assert set(scores.folds) == {0, 1}
    run(config, folds="1", restart=True)
    assert Path("runs/tiny/fold0/done.json").stat().st_mtime_ns == first
    run(config, restart=True)
    assert Path("runs/tiny/fold0/done.json").stat().st_mtime_ns > first


def test_the_out_of_fold_rows_carry_their_origin_and_the_flattery_is_said(setup: Setup) -> None:
    config, _ = setup()
    scores = run(config)
    rows = pd.read_parquet("runs/tiny/oof.parquet")
    assert list(rows.columns[:3]) == ["id", "fold", "seed"] and set(rows["seed"]) == {config.training.seed}
    manifest = json.loads(Path("runs/tiny/manifest.json").read_text())
    assert rows.attrs["fingerprints"] == manifest["fingerprints"] and set(manifest["fingerprints"]) >= {"data", "folds"}
    found = json.loads(Path("runs/tiny/scores.json").read_text())["keep_best_flatters"]
    assert 0 <= found < 1
    evaluations = json.loads(Path("runs/tiny/fold0/done.json").read_text())["evaluations"]
    assert f"choosing the best of {evaluations} evaluations a fold flatters `best` by about {found:.5f}" in SAID
    # the kept evaluation is among the written ones, and it is the best of them
    history = pd.read_parquet("runs/tiny/fold0/evaluations.parquet").set_index("id")
    own = pd.read_parquet("runs/tiny/fold0/oof.parquet").set_index("id")
    assert history.shape == (len(own), evaluations)
    errors = history.sub(own["target_main_target"], axis=0).pow(2).mean().pow(0.5)
    assert errors.min() == pytest.approx(scores.folds[0], abs=1e-6)
    kept = history[errors.idxmin()]
    assert kept.to_numpy() == pytest.approx(own["pred_main_target"].to_numpy(), abs=1e-6)


def test_an_unfinished_fold_without_a_state_starts_anew(setup: Setup) -> None:
    config, _ = setup()
    run(config, folds="0")
    Path("runs/tiny/fold0/done.json").unlink()
    run(config, folds="0")
    assert "fold 0: was not finished and left no state to go on from, starts anew" in SAID


def test_another_config_or_other_data_never_mix_into_a_run(setup: Setup) -> None:
    config, competition = setup()
    run(config, folds="0")
    other = config_file.load("tiny.yaml", ["training.epochs=2", "tracking.tags=[x]"])
    with pytest.raises(
        ValueError, match=r"made from another config: training.epochs 1 -> 2; name a new run with --run"
    ):
        run(other)
    frame = pd.read_csv(competition.train, dtype=str)
    frame["text"] += " oak"
    frame.to_csv(competition.train, index=False)
    with pytest.raises(ValueError, match="made from another data"):
        run(config)
    run(other, restart=True, folds="1")
    assert RunFolder("runs/tiny").finished_folds() == [1], "a restart with another config forgets all folds"
    run(config_file.load("tiny.yaml", ["training.epochs=2", "tracking.tags=[y]"]), folds="1")  # tracking may differ


def test_full_trains_on_every_row_and_infers(setup: Setup) -> None:
    config, _ = setup()
    assert run(config, folds="full") is None
    assert "60 rows to train on, 0 held out" in "\n".join(SAID)
    assert not Path("folds").exists()
    loaded = load("runs/tiny")
    assert loaded.folds == ["full"]
    infer(["runs/tiny"], say=SAID.append)
    run(config, folds="0")
    assert load("runs/tiny").folds == [0]
    assert load("runs/tiny", folds=["full"]).folds == ["full"]


def test_two_runs_are_averaged_and_the_newest_is_the_default(setup: Setup) -> None:
    config, competition = setup()
    run(config, "a", "0")
    run(config_file.load("tiny.yaml", ["training.seed=9", "model.pooler.name=max"]), "b", "0")
    frame = pd.read_csv(competition.test, dtype=str)
    single = [load(f"runs/{name}").predict(frame)["target"].to_numpy() for name in "ab"]
    for order in (["runs/a", "runs/b"], ["runs/b", "runs/a"]):
        values = pd.read_csv(infer(order, out="both.csv", say=SAID.append))["target"].to_numpy()
        assert np.abs(values - np.mean(single, 0)).max() < 1e-6
    assert newest_finished() == Path("runs/b")
    assert infer(say=SAID.append).name == "b.csv"
    assert "newest finished run: runs/b" in SAID


def test_prediction_does_not_depend_on_row_order(setup: Setup) -> None:
    config, competition = setup()
    run(config, folds="0")
    loaded = load("runs/tiny")
    frame = pd.read_csv(competition.test, dtype=str)
    straight = loaded.predict(frame).set_index("id")["target"]
    shuffled = loaded.predict(frame.sample(frac=1, random_state=3)).set_index("id")["target"]
    alone = pd.concat([loaded.predict(frame.iloc[[row]]) for row in range(5)]).set_index("id")["target"]
    assert (straight - shuffled[straight.index]).abs().max() < 1e-6
    assert (straight[alone.index] - alone).abs().max() < 1e-6
    assert list(loaded.predict(frame)["id"]) == list(frame["id"])


def test_a_pair_of_text_columns(setup: Setup) -> None:
    config, _ = setup(pair=True)
    run(config, folds="0")
    assert infer(["runs/tiny"], say=SAID.append).exists()


def test_xlnet_which_pads_left(setup: Setup) -> None:
    config, _ = setup("binary", model="xlnet")
    run(config, folds="0")
    assert infer(["runs/tiny"], say=SAID.append).exists()


def test_a_run_moves_and_needs_neither_hub_nor_source(setup: Setup, tmp_path: Path) -> None:
    config, competition = setup()
    run(config, folds="0")
    frame = pd.read_csv(competition.test, dtype=str)
    before = load("runs/tiny").predict(frame)
    Path("runs/tiny").rename("moved")
    saved = yaml.safe_load(Path("moved/config.yaml").read_text())
    saved["model"]["backbone"] = "gone/from-the-hub"
    Path("moved/config.yaml").write_text(yaml.safe_dump(saved))
    pd.testing.assert_frame_equal(load("moved").predict(frame), before)


def test_several_tasks_train_together_and_the_first_is_submitted(setup: Setup) -> None:
    tasks = [
        {"name": "main", "kind": "regression", "targets": ["target"]},
        {"name": "side", "kind": "regression", "targets": ["target"], "loss": {"name": "mae"}, "weight": 0.3},
    ]
    config, _ = setup(tasks=tasks)
    run(config, folds="0")
    rows = pd.read_parquet("runs/tiny/oof.parquet")
    assert {"pred_main_target", "pred_side_target", "target_side_target"} <= set(rows.columns)
    frame = pd.read_csv(infer(["runs/tiny"], say=SAID.append))
    assert list(frame.columns) == ["id", "target"]


def test_row_weights_frozen_layers_checkpointing_and_microbatches_run(setup: Setup) -> None:
    config, competition = setup()
    frame = pd.read_csv(competition.train, dtype=str)
    frame["w"] = np.linspace(0, 2, len(frame))
    frame.to_csv(competition.train, index=False)
    extra = [
        "competition.weight=w", "model.freeze_embeddings=true", "model.freeze_layers=1", "training.micro_batch_size=3",
        "model.gradient_checkpointing=true", "groups={layout: llrd, decay: 0.9}", "training.precision=bf16",
        "model.truncation=tail", "model.max_length=8",
    ]  # fmt: skip
    run(config_file.load("tiny.yaml", extra), folds="0")
    assert "frozen" in Path("runs/tiny/fold0/groups.txt").read_text()
    assert any("are cut at model.max_length 8 tokens" in line for line in SAID)


def test_nan_stops_training_and_the_fold_stays_unfinished(setup: Setup) -> None:
    from comp.training.trainer import NonFiniteError

    config, _ = setup()
    wild = config_file.load("tiny.yaml", ["optimizer.lr=1e30", "optimizer.head_lr=1e30", "optimizer.clip_norm=null"])
    with pytest.raises(NonFiniteError, match="training stopped at step"):
        run(wild, folds="0")
    assert RunFolder("runs/tiny").finished_folds() == []


def test_each_fold_is_one_wandb_run_inside_the_run_folder(setup: Setup) -> None:
    pytest.importorskip("wandb", reason="the extra `track` is not installed")
    setup()
    run(config_file.load("tiny.yaml", ["tracking.wandb=offline"]), folds="0")
    assert len(list(Path("runs/tiny/fold0/wandb").glob("offline-run-*/*.wandb"))) == 1
    assert not Path("wandb").exists()
    lines = [json.loads(line) for line in Path("runs/tiny/fold0/metrics.jsonl").read_text().splitlines()]
    done = json.loads(Path("runs/tiny/fold0/done.json").read_text())
    assert lines[-1]["summary"] == done


@pytest.mark.parametrize("text", ["5", "0,0", "some", "-1", "0,9", ""])
def test_folds_that_are_not_there(text: str, setup: Setup) -> None:
    config, _ = setup()
    with pytest.raises(ValueError, match="allowed are all, full, or numbers 0 to 1"):
        run(config, folds=text)


def test_what_load_and_infer_refuse(setup: Setup) -> None:
    config, _ = setup()
    with pytest.raises(ValueError, match="no finished run under runs/; train one with `comp train`"):
        infer()
    with pytest.raises(ValueError, match="runs/tiny is no run folder"):
        load("runs/tiny")
    run(config, folds="0")
    with pytest.raises(ValueError, match="fold 1 is not finished; finished: 0"):
        load("runs/tiny", folds=[1])
    with pytest.raises(ValueError, match="weights 'middle': allowed are best, last and averaged"):
        load("runs/tiny", weights="middle")
    with pytest.raises(ValueError, match="no such file"):
        infer(["runs/tiny"], test="nothing.csv", say=SAID.append)
    Path("runs/tiny/fold0/done.json").unlink()
    with pytest.raises(ValueError, match="has no finished fold"):
        load("runs/tiny")


def test_another_test_table_and_a_sample_that_does_not_fit(setup: Setup) -> None:
    config, competition = setup()
    run(config, folds="0")
    frame = pd.read_csv(competition.test, dtype=str)
    frame.head(7).to_csv("small.csv", index=False)
    path = infer(["runs/tiny"], test="small.csv", out="small-out.csv", say=SAID.append)
    assert len(pd.read_csv(path)) == 7
    frame.head(7).to_csv(competition.test, index=False)
    with pytest.raises(ValueError, match="lacks 13 of the 20 ids"):
        infer(["runs/tiny"], say=SAID.append)


def test_a_damaged_gather_is_noticed(setup: Setup) -> None:
    config, _ = setup()
    run(config)
    one = Path("runs/tiny/fold1/oof.parquet")
    one.write_bytes(Path("runs/tiny/fold0/oof.parquet").read_bytes())
    with pytest.raises(ValueError, match="ids are in the out-of-fold rows of two folds"):
        run(config)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_first_hour_of_a_competitor(setup: Setup, call: Callable[..., tuple[int, str, str]]) -> None:
    _, competition = setup("binary")
    assert call("config", "check", "tiny.yaml")[:2] == (0, "tiny.yaml: ok\n")
    status, out, _ = call("folds", "--config", "tiny.yaml")
    assert status == 0
    assert "folds/tiny-binary.csv: 60 rows, 2 folds, fingerprint" in out
    assert out.split("\n")[-2].startswith("no leak found (`comp lint` says what was looked for); next: comp train")
    status, out, _ = call("train", "--config", "tiny.yaml", "--set", "evaluation.every=null", "--fold", "all")
    assert status == 0
    assert "pooled" in out
    status, out, _ = call("infer")
    assert status == 0
    assert "wrote submissions/tiny.csv: 20 rows, columns id, target; valid" in out
    status, out, _ = call(
        "score", "--submission", "submissions/tiny.csv", "--truth", str(competition.solution), "--metric", "roc_auc"
    )
    assert status == 0
    assert out.startswith("roc_auc total: 0.")


def test_init_writes_a_config_that_trains(
    setup: Setup, call: Callable[..., tuple[int, str, str]], tiny_model_folder: Callable[..., Path]
) -> None:
    _, competition = setup("regression")
    status, out, _ = call("init", str(competition.folder), "--name", "first")
    assert status == 0
    assert "wrote configs/first.yaml" in out
    small = ["--set", f"model.backbone={tiny_model_folder('bert')}", "--set", "model.max_length=32"]
    assert call("train", "--config", "first", "--debug", "--set", "tracking.wandb=off", *small)[0] == 0
    assert call("init", str(competition.folder), "--name", "first")[0] == 2


def test_debug_is_the_same_path_with_few_rows(setup: Setup, call: Callable[..., tuple[int, str, str]]) -> None:
    setup()
    status, out, _ = call("train", "--config", "tiny.yaml", "--debug", "--fold", "1", "--set", "training.epochs=9")
    assert status == 0
    assert "fold 1: 30 rows to train on, 30 held out, 4 steps" in out
    assert "mean of folds" in out and "spread" not in out, "one fold has none"
    shown = [line.split() for line in call("report", "runs/tiny-debug", "--text")[1].split("\n")]
    assert ["spread", "-", "-"] in shown
    assert Path("runs/tiny-debug/fold1/done.json").exists()
    assert not Path("runs/tiny").exists()
    assert call("train", "--config", "tiny.yaml", "--debug", "--fold", "1")[0] == 0, "a debug run replaces the last"
    with pytest.raises(ValueError, match="no finished run"):
        newest_finished()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--config", "nothing.yaml"], "config file 'nothing.yaml' not found"),
        (["train", "--config", "tiny.yaml", "--fold", "7"], "allowed are all, full, or numbers 0 to 1"),
        (["train", "--config", "tiny.yaml", "--run", "a/b"], "a name is a folder inside runs/"),
        (["train", "--config", "tiny.yaml", "--set", "competition.train=gone.csv"], "no such file"),
        (["train", "--config", "tiny.yaml", "--set", "competition.text=txet"], "did you mean 'text'?"),
        (["train", "--config", "tiny.yaml", "--set", "tasks.0.targets=[nope]"], "no column 'nope'"),
        (["train", "--config", "tiny.yaml", "--set", "model.backbone=/gone"], "model.backbone '/gone': no such folder"),
        (["train", "--config", "tiny.yaml", "--set", "training.precision=fp16"], "precision fp16 needs a GPU"),
        (["train", "--config", "tiny.yaml", "--set", "model.max_length=4096"], "has 64 positions"),
        (["config", "check", "tiny.yaml", "--set", "metric=auc"], "unknown metric 'auc'"),
        (["config", "show", "tiny.yaml", "--set", "trainig.epochs=2"], "did you mean 'training'?"),
        (["infer", "--run", "runs/gone"], "runs/gone is no run folder"),
        (["infer", "--fold", "one"], "allowed are all, full, numbers like 0,2"),
        (["list", "poolerz"], "did you mean 'poolers'?"),
        (["score", "--submission", "a.csv", "--truth", "b.csv", "--metric", "rmse"], "no such file"),
        (["score", "--submission", "tiny.yaml", "--truth", "b.csv", "--metric", "rsme"], "did you mean 'rmse'?"),
        (["init", "."], "train"),
    ],
)
def test_bad_input_is_one_message_and_status_2(
    arguments: list[str], words: str, setup: Setup, call: Callable[..., tuple[int, str, str]]
) -> None:
    setup()
    status, _, err = call(*arguments)
    assert status == 2
    assert words in err
    assert "Traceback" not in err
    assert not Path("folds").exists() and not Path("runs").exists(), "what was refused left something behind"


def test_a_fault_of_a_library_keeps_its_traceback(
    setup: Setup, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup()
    monkeypatch.setattr(crossval, "encode", lambda *_, **__: int("not a number"))
    with pytest.raises(ValueError, match="invalid literal"):
        call("train", "--config", "tiny.yaml")


def test_a_nan_in_training_is_status_1_without_traceback(
    setup: Setup, call: Callable[..., tuple[int, str, str]]
) -> None:
    setup()
    wild = ["--set", "optimizer.lr=1e30", "--set", "optimizer.head_lr=1e30"]
    status, _, err = call("train", "--config", "tiny.yaml", *wild)
    assert status == 1
    assert "training stopped at step" in err


def test_lists_schema_and_show(setup: Setup, call: Callable[..., tuple[int, str, str]]) -> None:
    from comp.catalog import CATALOGUES, catalogue

    setup()
    assert all(f"comp list {name}" in call("list")[1] for name in CATALOGUES)
    for name in CATALOGUES:
        out = call("list", name)[1]
        for key, row in catalogue(name).items():
            assert any(line.startswith(key) and row.about in line for line in out.splitlines())
    assert json.loads(call("config", "schema")[1])["title"] == "Config"
    shown = call("config", "show", "tiny.yaml", "--set", "training.epochs=4")[1]
    assert yaml.safe_load(shown)["training"]["epochs"] == 4
    assert yaml.safe_load(shown)["optimizer"]["betas"] == [0.9, 0.999]


def test_folds_overwrite(setup: Setup, call: Callable[..., tuple[int, str, str]]) -> None:
    setup()
    assert call("folds", "--config", "tiny.yaml")[0] == 0
    status, _, err = call("folds", "--config", "tiny.yaml", "--set", "folds.seed=5")
    assert status == 2
    assert "--overwrite" in err
    assert call("folds", "--config", "tiny.yaml", "--set", "folds.seed=5", "--overwrite")[0] == 0


# --- imports ---------------------------------------------------------------------------------------------------------


def seconds_of(code: str) -> float:
    probe = f"import time; t = time.perf_counter()\n{code}\nprint(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout)


def test_import_is_light_and_the_notebook_api_is_there() -> None:
    assert min(seconds_of("import comp") for _ in range(3)) < 0.1
    assert comp.load is load
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        comp.lode  # noqa: B018


def test_inference_needs_nothing_beyond_kaggles_image(setup: Setup) -> None:
    """With every other package blocked: import, load, predict."""
    config, competition = setup()
    run(config, folds="0")
    blocked = ["madgrad", "torch_optimizer", "wandb", "typer", "accelerate", "pyarrow", "iterstrat", "optuna"]
    code = f"""
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in {blocked!r} else real(name, *rest)
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked: " + name)
sys.meta_path.insert(0, Block())
import pandas as pd
from comp import load
frame = pd.read_csv({str(competition.test)!r}, dtype=str)
print(len(load("runs/tiny").predict(frame)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "20", done.stderr


def test_write_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"score": float("nan")})
    assert not list(tmp_path.iterdir())
