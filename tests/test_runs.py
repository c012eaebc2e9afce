"""Run folders, atomic writes, digests; and the machine under them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from comp import runtime
from comp.runs import (
    RunFolder,
    commit,
    digest,
    newest_finished,
    read_json,
    versions,
    write_atomic,
    write_text,
)
from comp.runtime import open_runtime, seed_everything


def test_digest_counts_borders_and_order() -> None:
    assert digest(["ab", "c"]) != digest(["a", "bc"]) != digest(["bc", "a"])
    assert digest(["a", b"b"]) == digest([b"a", "b"])
    assert len(digest([])) == 16


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a.json is not valid JSON.*delete it or make the run anew"):
        read_json(tmp_path / "a.json")


def test_finished_folds_and_the_newest_run(tmp_path: Path) -> None:
    for age, place in enumerate(["b/fold1", "a/fold10", "a/fold2", "a/full", "z-debug/fold0"]):
        done = tmp_path / place / "done.json"
        write_text(done, "{}")
        os.utime(done, (1000 + age, 1000 + age))
    (tmp_path / "a" / "fold3").mkdir()
    (tmp_path / "a" / "folder").mkdir()
    assert RunFolder(tmp_path / "a").finished_folds() == [2, 10, "full"]
    assert newest_finished(tmp_path) == tmp_path / "a"


def test_commit_says_when_there_are_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)
    clean = commit()
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert commit() == clean + "+changes"


def test_versions_are_those_of_the_libraries() -> None:
    assert versions()["torch"] == torch.__version__
    assert json.dumps(versions())


def test_seeds_reach_every_generator() -> None:
    import random

    draws = []
    for _ in range(2):
        seed_everything(11)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(1))))  # noqa: NPY002
    assert draws[0] == draws[1]


def test_precision_is_chosen_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(runtime, "cpu_has_bf16", lambda has=has: has)
        assert open_runtime("auto", "cpu").precision == expected
    assert open_runtime("fp32", "cpu").precision == "fp32"
    with pytest.raises(ValueError, match="precision fp16 needs a GPU, got the CPU; use precision bf16, fp32 or auto"):
        open_runtime("fp16", "cpu")


def test_a_gpu_without_kernels_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "Tesla P100")
    with pytest.raises(ValueError, match="Tesla P100: "):
        open_runtime("auto", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (7, 5))
    assert open_runtime("auto", "cuda").precision == "fp16", "a T4 has no native bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (8, 0))
    assert open_runtime("auto", "cuda").precision == "bf16"


def test_autocast_and_scaler_follow_the_precision() -> None:
    weight, x = torch.randn(3, 3), torch.randn(2, 3)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        place = open_runtime(precision, "cpu")
        with place.autocast():
            assert (x @ weight).dtype == dtype
        assert not place.grad_scaler().is_enabled()
    assert runtime.Runtime(torch.device("cpu"), "fp16").grad_scaler().is_enabled()
