"""A backbone parted among processes: gradients, weights, files and resumed runs are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TinyCompetition, write_tiny_model
from two_processes import assert_alike, in_two, noting_gradients, numbers

SCRIPT = str(Path(__file__).with_name("two_processes.py"))
TINY = 1e-12
"""A learning rate that leaves the weights as they are: every window's gradients are then those of the same weights."""


def assert_same_gradients(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    assert len(one) == len(two) == 5
    for step, (expected, found) in enumerate(zip(one, two, strict=True), 1):
        assert expected.keys() == found.keys()
        for name, gradient in expected.items():
            if gradient is None:
                assert found[name] is None, f"{name} at step {step}"
                continue
            np.testing.assert_allclose(found[name], gradient, rtol=1e-6, atol=1e-6, err_msg=f"{name} at step {step}")
        assert max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None) > 0.01


def test_two_processes_are_one(isolated: Path, tiny_competition: Callable[..., TinyCompetition]) -> None:
    """In one start of two processes: gradients with whole models and with parts, whole runs with parts, a stopped one.

    The last window of an epoch has one row, which leaves the second process none.
    """
    from comp import config_file
    from comp.training import crossval

    competition = tiny_competition(train_rows=66)

    def write(name: str, kind: str, shard: bool, **more: Any) -> None:
        folder = isolated / kind
        if not folder.exists():
            write_tiny_model(folder, kind)
        data = competition.config(folder, evaluation={"every": "2 steps"})
        data["training"] = {"epochs": 2, "batch_size": 8, "micro_batch_size": 2, "precision": "fp32", "shard": shard}
        data["optimizer"] = {"name": "adamw", "lr": 1e-3}
        data["model"]["dropout"] = 0.0
        for section, keys in more.items():
            data[section] = {**data.get(section, {}), **keys}
        (isolated / name).write_text(yaml.safe_dump(data))

    # a word table that is tied, a final norm outside of the blocks, a matrix of one row, which leaves one part empty
    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "roberta": ("roberta", {}),
        "modernbert": (
            "modernbert",
            {
                "model": {"pooler": {"name": "weighted_layers"}, "gradient_checkpointing": True, "attention": "packed"},
                "stability": {"prior_decay": 0.1, "reinit_layers": 1},
                "groups": {"layout": "llrd", "decay": 0.9},
                "optimizer": {"name": "radam", "clip_norm": 0.1},
            },
        ),
        "bart": ("bart", {"optimizer": {"name": "madgrad"}, "model": {"freeze_layers": 1, "part": "decoder"}}),
    }
    slow = {"training": {"epochs": 1}, "optimizer": {"lr": TINY, "head_lr": TINY}}
    for shard in (False, True):
        write(f"gradients-{shard}.yaml", "roberta", shard, **slow)
        for name, (kind, more) in cases.items():
            write(f"{name}-{shard}.yaml", kind, shard, **more)

    noise = {
        "training": {"epochs": 1, "max_rows": 32},  # no window with a pass that is for the others only, which draws too
        "model": {"dropout": 0.1, "head_dropout": 0.1, "multi_sample_dropout": 2},
        "stability": {"rdrop": 0.5},
    }
    for shard in (False, True):
        write(f"noise-{shard}.yaml", "roberta", shard, **noise)

    noted: list[dict[str, Any]] = []
    with noting_gradients(noted):
        crossval.run(config_file.load("gradients-False.yaml"), "gradients", "0", say=lambda line: None)
    for name in cases:
        crossval.run(config_file.load(f"{name}-False.yaml"), f"{name}-one", "0", say=lambda line: None)

    tasks = [f"note_gradients gradients-{shard}.yaml {shard}.pt" for shard in (False, True)]
    tasks += ["train roberta-True.yaml roberta", *(f"train_and_stop {name}-True.yaml {name}-cut" for name in cases)]
    tasks += [f"train noise-{shard}.yaml noise-{shard}" for shard in (False, True)]
    done = in_two(isolated, SCRIPT, *tasks, "jobs bart-True.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    for shard in (False, True):
        assert_same_gradients(noted, torch.load(f"{shard}.pt"))
    for name in cases:
        one, two = f"{name}-one", f"{name}-cut"
        assert_alike(numbers(one), numbers(two))
        names = [sorted(path.name for path in Path("runs", run, "fold0").iterdir()) for run in (one, two)]
        assert names[0] == names[1]
    assert_alike(numbers("noise-False"), numbers("noise-True"))
    for kind in ("best", "last"):
        path = f"fold0/{kind}.safetensors"
        same = [Path("runs", run, path).read_bytes() for run in ("roberta", "roberta-cut")]
        assert same[0] == same[1], "a stop in the middle changes no bit"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "training.shard parts a backbone among the processes of torch.distributed.run, and this one is alone"),
        (
            ["stability.mixout=0.1", "model.dropout=0.0"],
            "training.shard does not work with stability.mixout, which need",
        ),
        (["stability.averaging.name=ema"], "with stability.averaging 'ema', which need the whole model"),
        (["stability.adversarial.name=awp"], "with stability.adversarial 'awp', which"),
        (
            ["optimizer.name=adafactor", "training.compile=true"],
            "with training.compile and optimizer 'adafactor', which",
        ),
        (["optimizer.lookahead={}"], "with optimizer.lookahead, which"),
    ],
)
def test_what_cannot_be_parted_is_refused(
    here: Path, call: Callable[..., tuple[int, str, str]], settings: list[str], message: str
) -> None:
    sets = [word for setting in ["training.shard=true", *settings] for word in ("--set", setting)]
    status, _, err = call("train", "--config", "tiny.yaml", "--run", "new", *sets)
    assert status == 2 and message in " ".join(err.split()), err
    assert not Path("runs/new").exists()
    status, _, err = call("lr-find", "--config", "tiny.yaml", *sets)
    assert status == 2 and message in " ".join(err.split()), err


@pytest.mark.bad_input
def test_one_block_at_every_depth_is_not_parted(tiny_model_folder: Callable[..., Path]) -> None:
    from comp.model.sources import load_tokenizer
    from comp.model.text_model import build_model
    from comp.training.preflight import check_parts

    for kind in ("bert", "albert"):
        folder = tiny_model_folder(kind)
        options: Any = {"pretrained": True, "pooler": {"name": "mean"}, "heads": {"main": 1}, "max_length": 48}
        model = build_model(folder, load_tokenizer(str(folder)), **options)
        if kind == "bert":
            check_parts(model)
            continue
        with pytest.raises(ValueError, match="has a single block, used at every depth"):
            check_parts(model)
