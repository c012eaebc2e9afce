"""What `comp pretrain` and `comp lr-find` refuse: status 2, one message that says what to do, nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import write_tiny_model

pytestmark = pytest.mark.bad_input

PRETRAIN = ["pretrain", "--config", "tiny.yaml", "--run", "new"]
FIND = ["lr-find", "--config", "tiny.yaml"]
Row = tuple[str, *tuple[str, ...]]

CONFIGS: dict[str, Row] = {
    "an objective that is none": ("pretrain.objective.name=mln", "unknown name 'mln'; did you mean 'mlm'?", "simcse"),
    "an option of the other": ("pretrain.objective={name: simcse, packing: true}", "pretrain.objective.packing"),
    "every token": ("pretrain.objective.mask_percent=100", "less than 100, got 100"),
    "no corpus": ("pretrain.corpora=[]", "pretrain.corpora", "at least 1"),
    "a corpus of nothing": ("pretrain.corpora=[{epochs: 2}]", "names `tables` (train, test)", "or `files`"),
    "a table that is none": ("pretrain.corpora=[{tables: [valid]}]", "got 'valid'", "Allowed: train, test"),
    "a table twice": ("pretrain.corpora=[{tables: [train, train]}]", "named twice"),
    "a column without files": ("pretrain.corpora=[{tables: [train], text: body}]", "the column of `files`"),
    "epochs and steps": ("pretrain.corpora=[{tables: [train], epochs: 1, steps: 5}]", "give one of them"),
    "half a file": ("pretrain.held_out_percent=60", "less than or equal to 50, got 60"),
    "an interval that is none": ("pretrain.every=often", "every is '10%' (of an epoch) or '25 steps', got 'often'"),
    "patience without scores": ("pretrain={held_out_percent: 0, patience: 2}", "patience counts scores"),
    "parts of more than the whole": ("pretrain={batch_size: 4, micro_batch_size: 8}", "larger than batch_size 4"),
    "simcse in parts": ("pretrain={objective: {name: simcse}, micro_batch_size: 4}", "a whole batch"),
    "simcse of one": ("pretrain={objective: {name: simcse}, batch_size: 1}", "batch_size must be 2 or more"),
    "simcse without dropout": ("pretrain={objective: {name: simcse}, dropout: 0}", "set it to 0.1 or null"),
    "a rate of zero": ("pretrain.lr=0", "pretrain.lr", "greater than 0, got 0"),
    "a warm-up that is too long": ("pretrain.schedule={name: linear, warmup_steps: 5000}", "pretrain, stage 1", "5000"),
    "too long for the model": ("pretrain.max_length=65", "pretrain.max_length is 65", "at most 64"),
    "a file that is not there": ("pretrain.corpora=[{files: [none.csv]}]", "none.csv: no such file"),
    "a column that is not there": (
        "pretrain.corpora=[{files: [data/train.csv], text: txt}]", "no column 'txt' (pretrain.corpora text); did you mean 'text'?",
    ),
    "columns that differ": (
        "pretrain.corpora=[{tables: [train], files: [data/train.csv], text: [id, text]}]", "different numbers of text columns",
    ),
    "too few texts": ("pretrain.corpora=[{files: [data/one.csv]}]", "data/one.csv", "1 texts are too few"),
    "no test table": ("competition.test=null", "competition.test is null; set tables: [train]"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_configs(case: str, refuses: Callable[..., str]) -> None:
    pd.DataFrame({"id": ["a", "b"], "text": ["one text", ""]}).to_csv("data/one.csv", index=False)
    override, *words = CONFIGS[case]
    refuses([*PRETRAIN, "--set", override], words)


OPTIONS: dict[str, tuple[list[str], *tuple[str, ...]]] = {
    "all folds": (["--fold", "all"], "--fold 'all'", "a number from 0 to 1"),
    "a fold that is none": (["--fold", "7"], "--fold '7'", "0 to 1"),
    "the test table of a fold": (
        ["--fold", "0", "--set", "pretrain.corpora=[{tables: [test]}]"], "the test table alone", "leave out --fold",
    ),
    "a name that leads away": (["--run", "../other"], "--run: a name is a folder inside runs/"),
    "saving now and then": (["--save-every", "sometimes"], "--save-every 'sometimes'", "allowed are auto"),
    "the folder of a trained run": (["--run", "tiny"], "runs/tiny was made from another", "kind of model", "--restart"),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, refuses: Callable[..., str]) -> None:
    arguments, *words = OPTIONS[case]
    refuses([*PRETRAIN, *arguments], words)


@pytest.mark.parametrize("kind", ["electra", "xlnet", "bart"])
def test_backbones(kind: str, refuses: Callable[..., str]) -> None:
    write_tiny_model(Path("other"), kind)
    refuses([*PRETRAIN, "--set", "model.backbone=other"], ["model.backbone 'other'", "use "])


def test_a_backbone_without_weights_of_its_encoder(refuses: Callable[..., str]) -> None:
    told = json.loads(Path("model/config.json").read_text())
    Path("model/config.json").write_text(json.dumps(told | {"num_hidden_layers": 4}))
    refuses(PRETRAIN, ["model.backbone 'model'", "would be random", "does not fit its config.json"])


@pytest.mark.parametrize("damage", ["gone", "cut", "not JSON"])
def test_a_damaged_lineage(damage: str, refuses: Callable[..., str]) -> None:
    about = dict.fromkeys(("source", "objective", "fold", "folds", "stages", "before"))
    Path("model/lineage.json").write_text("{" if damage == "not JSON" else json.dumps(about))
    if damage == "cut":
        np.save("model/seen.npy", np.arange(30, dtype=np.uint64))
        Path("model/seen.npy").write_bytes(Path("model/seen.npy").read_bytes()[:150])
    wanted = ["model/lineage.json"] if damage == "not JSON" else ["model/seen.npy cannot be read", "anew"]
    refuses(["lint", "--config", "tiny.yaml"], wanted)
    refuses(["train", "--config", "tiny.yaml", "--run", "new"], wanted)


FINDS: dict[str, tuple[list[str], *tuple[str, ...]]] = {
    "few steps": (["--steps", "3"], "--steps 3: at least 10"),
    "a fold that is none": (["--fold", "9"], "--fold 9: allowed are 0 to 1"),
    "an empty range": (["--lowest", "1e-2", "--highest", "1e-3"], "the lowest below the highest"),
    "a rate below zero": (["--lowest", "-1"], "--lowest -1", "above 0"),
    "an optimizer that is none": (["--optimizer", "adamx"], "unknown name 'adamx'"),
    "a picture that is none": (["--out", "it.jpg"], "--out it.jpg", "a .png file"),
    "a folder that is not there": (["--out", "nowhere/it.png"], "in a folder that is there"),
}


@pytest.mark.parametrize("case", FINDS)
def test_lr_find(case: str, refuses: Callable[..., str]) -> None:
    arguments, *words = FINDS[case]
    refuses([*FIND, *arguments], words)
