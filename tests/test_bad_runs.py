"""Backbones, runs and blends that are damaged, half there or not what they were: refused, nothing written.

Each row is tried through the command line: status 2, one message that says what to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import write_tiny_model
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.bad_input

TRAIN = ["train", "--config", "tiny.yaml", "--run", "new"]
INFER = ["infer", "--run", "runs/tiny"]
MODEL, RUN = Path("model"), Path("runs/tiny")
Do = Callable[[], object]


def edit(path: Path, **changes: Any) -> Do:
    """Return what changes keys of a JSON or YAML file; None takes one out."""

    def change() -> None:
        known = (json.loads if path.suffix == ".json" else yaml.safe_load)(path.read_text()) | changes
        known = {key: value for key, value in known.items() if value is not None}
        path.write_text(json.dumps(known) if path.suffix == ".json" else yaml.safe_dump(known))

    return change


def cut(path: Path, keep: int = 200) -> Do:
    return lambda: path.write_bytes(path.read_bytes()[:keep])


def gone(path: Path) -> Do:
    return lambda: shutil.rmtree(path) if path.is_dir() else path.unlink()


def filled(path: Path, raw: bytes) -> Do:
    return lambda: path.write_bytes(raw)


def weights(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Do:
    return lambda: save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {name: tensor for name, tensor in state.items() if part not in name}


def pickled() -> None:
    state = load_file(MODEL / "model.safetensors")
    torch.save(state, MODEL / "pytorch_model.bin")
    (MODEL / "model.safetensors").unlink()


def other_tokenizer(folder: Path) -> Do:
    """Return what puts XLNet's tokenizer, of other ids, into a folder."""

    def change() -> None:
        write_tiny_model(Path("../other"), "xlnet")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(f"../other/{name}", folder / name)

    return change


# --- backbones -------------------------------------------------------------------------------------------------------

STATE = MODEL / "model.safetensors"
BACKBONES: dict[str, tuple[Do, *tuple[str, ...]]] = {
    "no config": (gone(MODEL / "config.json"), "the folder has no config.json, so it is no saved model"),
    "an empty config": (filled(MODEL / "config.json", b""), "model.backbone 'model'", "config.json"),
    "a broken config": (cut(MODEL / "config.json", 40), "model.backbone 'model'", "config.json"),
    "a config of no type": (edit(MODEL / "config.json", model_type=None), "model.backbone 'model'", "model_type"),
    "a config of a strange type": (edit(MODEL / "config.json", model_type="berd"), "model.backbone 'model'", "berd"),
    "a config of images": (edit(MODEL / "config.json", model_type="vit"), "model"),
    "no weights": (gone(STATE), "model.backbone 'model'", "model.safetensors"),
    "truncated weights": (cut(STATE, 5000), "model.backbone 'model'", "cannot be read"),
    "half a header": (cut(STATE, 20), "model.backbone 'model'", "cannot be read"),
    "empty weights": (filled(STATE, b""), "model.backbone 'model'", "cannot be read"),
    "a page of a hub for weights": (filled(STATE, b"version https://git-lfs.github.com/spec/v1\n"), "cannot be read"),
    "weights as a pickle": (pickled, "model.backbone 'model'", "pickle", "model.allow_pickle", "safetensors"),
    "weights of another size": (
        weights(STATE, lambda state: {name: tensor[..., :16].contiguous() for name, tensor in state.items()}),
        "model.backbone 'model'", "do not fit",
    ),
    "weights without a block": (weights(STATE, without("layer.1.")), "are not in its weights and would be random"),
    "weights without the words": (weights(STATE, without("word_emb")), "not in its weights", "word_embeddings"),
    "more blocks than weights": (edit(MODEL / "config.json", num_hidden_layers=5), "not in its weights", "layer.3"),
    "no tokenizer": (
        lambda: [gone(MODEL / name)() for name in ("tokenizer.json", "tokenizer_config.json")],
        "model.backbone 'model'", "tokenizer",
    ),
    "no tokenizer.json": (gone(MODEL / "tokenizer.json"), "model.backbone 'model'", "tokenizer"),
    "a broken tokenizer": (cut(MODEL / "tokenizer.json"), "model.backbone 'model'", "tokenizer"),
    "a tokenizer that is none": (filled(MODEL / "tokenizer.json", b"{}"), "model.backbone 'model'", "tokenizer"),
    "a tokenizer of more words": (
        edit(MODEL / "config.json", vocab_size=20), "model.backbone 'model'", "do not fit",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BACKBONES)
def test_backbones(case: str, refuses: Callable[..., str]) -> None:
    change, *words = BACKBONES[case]
    change()
    refuses(TRAIN, words)


SOURCES: dict[str, tuple[str, *tuple[str, ...]]] = {
    "no such folder": ("/gone/model", "model.backbone '/gone/model': no such folder"),
    "no such folder beside": ("./modle", "model.backbone './modle': no such folder"),
    "a name of the hub, offline": ("google/none-such", "could not be loaded", "Without internet, give a local folder"),
    "a short name of the hub, offline": ("bert-none-such", "could not be loaded", "Without internet"),
    "a file": ("tiny.yaml", "model.backbone 'tiny.yaml'"),
    "no such package": (
        "package:none_such",
        "model.backbone 'package:none_such'",
        "no installed package",
        "pip install",
    ),
    "a package without a model": ("package:json", "model.backbone 'package:json'"),
    "no package": ("'package:'", "model.backbone 'package:'"),
    "a strange name": ("a b", "model.backbone 'a b'"),
    "a name with a NUL": ('"a\\0b"', "model.backbone"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_sources_of_backbones(case: str, refuses: Callable[..., str]) -> None:
    source, *words = SOURCES[case]
    refuses([*TRAIN, "--set", f"model.backbone={source}"], words)


# --- runs ------------------------------------------------------------------------------------------------------------

RUNS: dict[str, tuple[Do, list[str], *tuple[str, ...]]] = {
    "no such run": (lambda: None, ["infer", "--run", "runs/gone"], "runs/gone is no run folder", "`ls runs/`"),
    "an empty folder": (lambda: Path("runs/new").mkdir(), ["infer", "--run", "runs/new"], "runs/new is no run folder"),
    "no config": (gone(RUN / "config.yaml"), INFER, "is no run folder: config.yaml or manifest.json is missing"),
    "a broken config": (filled(RUN / "config.yaml", b"{"), INFER, "runs/tiny/config.yaml", "not valid YAML"),
    "a config that was cut": (filled(RUN / "config.yaml", b""), INFER, "runs/tiny/config.yaml", "competition"),
    "a config of another pooler": (
        edit(RUN / "config.yaml", model={"backbone": "model", "max_length": 48, "pooler": {"name": "gem"}}),
        INFER, "best.safetensors do not fit this model", "1 missing", "config and checkpoint disagree",
    ),
    "a config of another task": (
        edit(RUN / "config.yaml", tasks=[{"name": "other", "kind": "binary", "targets": ["target"]}]),
        INFER, "do not fit this model", "config and checkpoint disagree",
    ),
    "no manifest": (gone(RUN / "manifest.json"), INFER, "is no run folder", "manifest.json is missing"),
    "a broken manifest": (cut(RUN / "manifest.json", 30), INFER, "manifest.json is not valid JSON", "make the run anew"),
    "an empty manifest": (filled(RUN / "manifest.json", b"{}"), INFER, "manifest.json must hold an object with classes"),
    "a manifest that is a list": (filled(RUN / "manifest.json", b"[]"), INFER, "must hold an object", "got list"),
    "half a run": (
        lambda: [gone(RUN / f"fold{fold}" / "done.json")() for fold in (0, 1)], INFER, "has no finished fold; train it",
    ),
    "a fold that is not there": (lambda: None, [*INFER, "--fold", "2"], "fold 2 is not finished; finished: 0, 1"),
    "a fold that is half done": (gone(RUN / "fold1/done.json"), [*INFER, "--fold", "1"], "fold 1 is not finished"),
    "no full model": (lambda: None, [*INFER, "--fold", "0,full"], "fold full is not finished; finished: 0, 1"),
    "no weights": (gone(RUN / "fold0/best.safetensors"), INFER, "fold0/best.safetensors"),
    "truncated weights": (cut(RUN / "fold0/best.safetensors", 9000), INFER, "cannot be read", "--restart"),
    "half a header of weights": (cut(RUN / "fold0/best.safetensors", 30), INFER, "cannot be read", "--restart"),
    "weights of a pickle": (
        lambda: torch.save({"a": torch.ones(1)}, RUN / "fold0/best.safetensors"), INFER, "cannot be read", "--restart",
    ),
    "weights of another run": (
        weights(RUN / "fold0/best.safetensors", without("heads.main.bias")), INFER, "do not fit this model: 1 missing",
    ),
    "no averages": (lambda: None, [*INFER, "--weights", "averaged"], "has no averaged weights", "--weights best or last"),
    "weights that are none": (lambda: None, [*INFER, "--weights", "middle"], "allowed are best, last and averaged"),
    "no recipe": (gone(RUN / "backbone"), INFER, "runs/tiny/backbone", "no such folder"),
    "a recipe without a tokenizer": (
        lambda: [gone(RUN / "backbone" / name)() for name in ("tokenizer.json", "tokenizer_config.json")],
        INFER, "model.backbone 'runs/tiny/backbone'", "tokenizer",
    ),
    "a recipe without a config": (gone(RUN / "backbone/config.json"), INFER, "has no config.json"),
    "another recipe": (
        edit(RUN / "backbone/config.json", num_hidden_layers=2), INFER, "do not fit this model", "unknown",
    ),
    "another tokenizer": (
        other_tokenizer(RUN / "backbone"), INFER, "runs/tiny/backbone", "not the tokenizer that the run was trained with",
    ),
    "--fold of words": (lambda: None, [*INFER, "--fold", "one"], "allowed are all, full, numbers like 0,2, or several"),
    "--fold of figures that are none": (lambda: None, [*INFER, "--fold", "²"], "allowed are all, full, numbers like 0,2"),
    "--time-budget": (lambda: None, [*INFER, "--time-budget", "8 days"], "allowed are like 8h, 90min or 300s"),
    "--precision": (lambda: None, [*INFER, "--precision", "int8"], "precision 'int8': allowed are auto, bf16, fp16, fp32"),
    "--out of another kind": (lambda: None, [*INFER, "--out", "a.parquet"], "a submission is a CSV file", "a.csv"),
    "--out into a file": (lambda: None, [*INFER, "--out", "tiny.yaml/a.csv"], "tiny.yaml is no folder; name another place"),
    "--out onto a folder": (lambda: Path("a.csv").mkdir(), [*INFER, "--out", "a.csv"], "a.csv is a folder; name a file in it"),
    "a blend and a run": (lambda: None, [*INFER, "--blend", "blends/x"], "leave out --run and --weights"),
    "a run twice": (lambda: None, ["blend", "--run", "runs/tiny", "--run", "runs/tiny"], "a run is named twice"),
    "a run without rows": (gone(RUN / "oof.parquet"), ["blend", "--run", "runs/tiny"], "has no out-of-fold rows yet"),
    "rows that were cut": (cut(RUN / "oof.parquet"), ["blend", "--run", "runs/tiny"], "oof.parquet: not a readable parquet file"),
    "a method that is none": (
        lambda: None, ["blend", "--run", "runs/tiny", "--method", "men"], "did you mean 'mean'?",
    ),
    "a calibration that is none": (
        lambda: None, ["blend", "--run", "runs/tiny", "--calibration", "isotonc"], "did you mean 'isotonic'?",
    ),
    "an option of no method": (
        lambda: None, ["blend", "--run", "runs/tiny", "--method", "hill_climb", "--option", "speed=2"], "speed",
    ),
    "a query that is none": (lambda: None, ["blend", "--run", "runs/tiny", "--rows", "x ="], "--rows", "columns are id"),
    "a query of no rows": (lambda: None, ["blend", "--run", "runs/tiny", "--rows", "id == 'x'"], "no rows in common"),
    "no blend": (lambda: None, ["infer", "--blend", "blends/gone"], "is no blend: blend.json is missing"),
    "a blend that is a list": (
        lambda: filled(Path("blend.json"), b"[]")(), ["infer", "--blend", "blend.json"], "must hold an object",
    ),
    "a blend without rows": (
        lambda: filled(Path("blend.json"), b"{}")(), ["infer", "--blend", "blend.json"], "make it anew with `comp blend`",
    ),
    "scores that are broken": (filled(RUN / "scores.json", b"{"), ["oof"], "scores.json is not valid JSON"),
    "a config edited for going on": (
        lambda: None, ["train", "--config", "tiny.yaml", "--set", "training.seed=9"],
        "made from another config: training.seed 42 -> 9", "name a new run with --run", "--restart",
    ),
    "other data for going on": (
        lambda: Path("data/train.csv").write_text(Path("data/train.csv").read_text().replace(" the ", " a ")),
        ["train", "--config", "tiny.yaml"], "made from another data", "name a new run with --run",
    ),
    "a run of another kind": (
        lambda: None, ["classical", "--config", "tiny.yaml", "--features", "tfidf", "--run", "tiny"],
        "runs/tiny was made from another kind of model", "name a new run",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RUNS)
def test_runs(case: str, refuses: Callable[..., str]) -> None:
    change, arguments, *words = RUNS[case]
    change()
    refuses(arguments, words)


def test_out_of_fold_rows_of_other_folds(here: Path, refuses: Callable[..., str]) -> None:
    """Gathered once more after a fold, they are looked at."""
    shutil.copy(RUN / "fold0/oof.parquet", RUN / "fold1/oof.parquet")
    refuses(["train", "--config", "tiny.yaml"], ["30 ids are in the out-of-fold rows of two folds", "--restart"])
    rows = pd.read_parquet(RUN / "fold0/oof.parquet").assign(
        id=lambda frame: frame["id"] + "x", pred_main_target=float("nan")
    )
    rows.to_parquet(RUN / "fold1/oof.parquet")
    refuses(["train", "--config", "tiny.yaml"], ["hold NaN or infinite values", "--restart"])
