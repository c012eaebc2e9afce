"""Folds on Ray: what is asked of a cluster, and a fold whose process is killed.

The last test needs Ray, which `make test-slow` has not: `.venv/bin/pip install 'ray>=2.30'`, then
`.venv/bin/python -m pytest -m slow tests/test_cluster.py`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TinyCompetition, leavings


def die_once(plan: Any, fold: int, link: Any) -> None:
    """Train a fold; but the first process that trains fold 1 is killed in the middle."""
    from comp.training.one_fold import train_job
    from comp.training.resume import Saver

    due, died = Saver.due, Path("died")

    def dying(self: Any, step: int, evaluated: bool) -> bool:
        if fold == 1 and step == 11 and not died.exists():
            died.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return due(self, step, evaluated)

    Saver.due = dying  # type: ignore[method-assign]
    train_job(plan, fold, link)


def test_what_no_machine_has_is_refused_before_ray_waits_for_ever() -> None:
    from comp.training.cluster import GIB, check_nodes

    nodes = [{"CPU": 4.0, "memory": 8.0 * GIB, "node:10.0.0.1": 1.0}, {"CPU": 2.0, "GPU": 1.0, "A100": 1.0}]
    for wanted in ({"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}, {"A100": 0.5}, {"memory": 7.0 * GIB}):
        check_nodes(wanted, nodes)
    with pytest.raises(ValueError, match="no machine of the Ray cluster") as refused:
        check_nodes({"CPU": 4.0, "GPU": 1.0, "memory": 2.0 * GIB}, nodes)
    assert str(refused.value) == (
        "no machine of the Ray cluster has what a job asks for (cpu 4, gpu 1, memory 2); its machines have: cpu 4, "
        "memory 8; A100 1, cpu 2, gpu 1. Ask for less with --resources, or add a machine"
    )
    with pytest.raises(ValueError, match="its machines have: none"):
        check_nodes({"CPU": 1.0}, [])


@pytest.mark.bad_input
def test_without_ray_the_extra_is_named(refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["train", "--config", "tiny.yaml", "--run", "new", "--on", "ray"]
    refuses(arguments, ["--on ray needs the package ray: pip install 'comp[ray]'"])


def test_resources_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from comp.training import dispatch
    from comp.training.dispatch import How, how_of, threads_each

    monkeypatch.setattr(dispatch, "find_ray", lambda: None)

    how = how_of(None, "ray", "cpu=4, gpu=1,accelerator_type:A100=0.1")
    assert how.where == "ray" and how.resources == {"cpu": 4, "gpu": 1, "accelerator_type:A100": 0.1}
    assert threads_each(how) == 4
    assert how_of(2, "ray").num == 2 and how_of(2, "ray").resources == {"cpu": 1}
    assert how_of(1) == How()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_three_folds_on_ray_with_one_killed_are_those_of_serial(
    isolated: Path,
    tiny_competition: Callable[..., TinyCompetition],
    tiny_model_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray>=2.30'")
    from comp import config_file
    from comp.training import crossval
    from comp.training.dispatch import how_of

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    data = tiny_competition().config(tiny_model_folder("bert"), evaluation={"every": "3 steps"})
    data["folds"]["num_folds"], data["model"]["dropout"], data["training"]["epochs"] = 3, 0.1, 3
    Path("tiny.yaml").write_text(yaml.safe_dump(data))
    config = config_file.load("tiny.yaml")
    crossval.run(config, "serial", say=lambda line: None)
    monkeypatch.setattr(crossval, "train_job", die_once)
    with pytest.raises(ValueError, match="no machine of the Ray cluster has what a job asks for .cpu 1, gpu 64.; its"):
        crossval.run(config, "refused", how=how_of(None, "ray", "gpu=64"), say=lambda line: None)
    crossval.run(config, "ray", save_every="4 steps", how=how_of(None, "ray"), say=lambda line: None)
    assert Path("died").exists()
    assert leavings("ray", range(3)) == leavings("serial", range(3))
    assert Path("runs/ray/scores.json").read_text() == Path("runs/serial/scores.json").read_text()
    assert "fold 1: goes on after step 8" in capfd.readouterr().out
