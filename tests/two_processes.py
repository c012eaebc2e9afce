"""What the tests of several processes on one fold share; and, run by torch.distributed.run, what those processes do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

ABORTED = re.compile(r"exitcode +: -(6|11)\b")
RUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment(folder: Path) -> dict[str, str]:
    path = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HOME": str(folder),
        "PYTHONFAULTHANDLER": "1",
    }


def in_two(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run two processes with these arguments, in the present folder.

    One that is aborted is given a second start, without the runs that the first has made. It was a broken heap, in one
    start of about fifteen while every fold called glibc's mallopt beside gloo's threads, and none of some thirty since
    it is called once; see ranks.join, and pytorch/pytorch#179291, for another way to such an end.
    """
    command = [sys.executable, *RUN, *arguments]
    before = set(Path("runs").glob("*"))
    for start in (1, 2):
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=600, env=environment(folder), check=False
        )
        if start == 2 or not ABORTED.search(done.stderr):
            break
        print(done.stderr)  # where it was, by faulthandler
        for run in set(Path("runs").glob("*")) - before:
            shutil.rmtree(run)
    return done


def numbers(run: str, kinds: Sequence[str] = ("best", "last")) -> dict[str, np.ndarray]:
    """Return what a finished fold 0 leaves, as numbers; `kinds` of weights."""
    from safetensors.numpy import load_file

    folder = Path("runs") / run / "fold0"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, np.ndarray] = {
        f"{key} at {line['step']}": np.array(line[key])
        for line in lines
        for key in ("train/loss", "train/grad_norm", "valid/score")
        if key in line
    }
    for kind in kinds:
        found |= {f"{kind} {name}": values for name, values in load_file(folder / f"{kind}.safetensors").items()}
    for table in ("oof", "evaluations"):
        frame = pd.read_parquet(folder / f"{table}.parquet")
        assert frame["id"].is_unique
        found |= {f"{table} {name}": frame[name].to_numpy() for name in frame if frame[name].dtype.kind == "f"}
        found[f"{table} ids"] = frame["id"].str[1:].astype(int).to_numpy()
    done = json.loads((folder / "done.json").read_text())
    return found | {key: np.array(done[key]) for key in ("steps", "tokens", "best_step", "evaluations")}


def assert_alike(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=2e-5, atol=1e-6, err_msg=name)


@contextmanager
def noting_gradients(noted: list[dict[str, Any]]) -> Iterator[None]:
    """Note the gradients of each step, whole, before they are clipped: parameter -> (...), None where it has none."""
    from comp.training import trainer

    clip = trainer._clip

    def noting(parts: Any) -> Any:
        found = {}
        for name, parameter in parts.model.named_parameters():
            own, ranks = parameter, parts.ranks
            if ranks.sharded:
                own = ranks.parts.get(id(parameter), parameter)
            whole = None if own.grad is None else own.grad.clone()
            found[name] = ranks.gather(whole, parameter) if ranks.sharded and whole is not None else whole
        noted.append(found)
        return clip(parts)

    trainer._clip = noting
    try:
        yield
    finally:
        trainer._clip = clip


# --- in the two processes --------------------------------------------------------------------------------------------


def note_gradients(own: Any, config: str, path: str) -> None:
    """Train a fold, the gradients of whose steps the first process writes to `path`."""
    import torch

    from comp import config_file
    from comp.training import crossval

    crossval.run(config_file.load(config), Path(path).stem, "0", how=own, say=lambda line: None)
    torch.save(NOTED, path)


def train_and_stop(own: Any, config: str, run: str) -> None:
    """Train a fold, stopped in the middle by a signal, which is what a preempted machine sends; then go on."""
    from comp import config_file
    from comp.training import crossval, trainer
    from comp.training.trainer import Stopped

    clip, steps = trainer._clip, 0

    def stopping(parts: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(parts)

    trainer._clip = stopping
    try:
        crossval.run(config_file.load(config), run, "0", how=own, say=lambda line: None)
        raise AssertionError("it was not stopped")
    except Stopped:
        pass
    finally:
        trainer._clip = clip
    said: list[str] = []
    crossval.run(config_file.load(config), run, "0", how=own, say=said.append)
    assert "fold 0: goes on after step 5" in said, said


def train(own: Any, config: str, run: str) -> None:
    from comp import config_file
    from comp.training import crossval

    crossval.run(config_file.load(config), run, "0", how=own, say=lambda line: None)


def jobs(own: Any, config: str) -> None:
    """Have both processes do what needs both."""
    from comp.training.dispatch import Job, map_jobs

    map_jobs(read_and_scale, [Job("read", (config,))], own)


def read_and_scale(config: str, link: Any) -> None:
    """Weights that the first process reads reach both; a step that overflows in one part is skipped in both."""
    import torch
    from torch import nn

    from comp import config_file
    from comp.data.tables import read_competition
    from comp.model.sources import load_tokenizer
    from comp.runtime import Runtime, seed_everything
    from comp.training.assembly import build_fold_model
    from comp.training.checkpoint import save_weights
    from comp.training.shards import shard

    loaded = config_file.load(config)
    seed_everything(1)
    table, _ = read_competition(loaded.competition, loaded.tasks)
    model, fresh = build_fold_model(loaded, table, load_tokenizer(loaded.model.backbone))
    wanted = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    path = Path("other.safetensors")
    if link.ranks.first:
        save_weights(path, wanted)
    shards, fresh = shard(model, fresh, torch.device("cpu"))
    for part in shards.parts.values():
        assert len(part) <= (len(shards.whole[id(part)]) + 1) // 2, "a part is half of the rows"
    shards.read_weights(path, model)
    found = shards.weights(model)
    assert (found.keys() == wanted.keys()) if shards.first else found == {}
    assert all(torch.equal(found[name], wanted[name]) for name in found)

    scaler = shards.grad_scaler(Runtime(torch.device("cpu"), "fp16"))
    assert scaler.is_enabled()
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    for overflows in (True, False):
        scaler.scale(parameter.sum()).backward()
        if overflows and not shards.first:
            parameter.grad = torch.full((2,), float("inf"))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert parameter.tolist() == ([1.0, 1.0] if overflows else [0.0, 0.0])


NOTED: list[dict[str, Any]] = []
"""Gradients by step, in this process."""


def main(arguments: Sequence[str]) -> None:
    """Do one task after the other: "function argument argument", ..., without starting processes anew."""
    from comp.training import predict
    from comp.training.dispatch import How, joined
    from comp.training.shards import Shards

    predict.CPU_TOKENS = 128  # small batches, of which one process has more than the other
    in_step, unequal = Shards.in_step, set()

    def noting_passes(self: Any, passes: int) -> Any:
        unequal.add(len(set(self.each(passes))) > 1)
        return in_step(self, passes)

    Shards.in_step = noting_passes
    with noting_gradients(NOTED), joined(How("ranks")) as own:
        if own is None:  # not the first, which has followed it until now
            return
        for task in arguments:
            name, *rest = task.split()
            NOTED.clear()
            globals()[name](own, *rest)
        assert unequal == {True}, "every evaluation has a process that waits for the other"


if __name__ == "__main__":
    main(sys.argv[1:])
