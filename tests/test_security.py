"""No pickle is read, no strange code runs, no network is asked, no secret is written."""

from __future__ import annotations

import ast
import os
import pickle
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import contents
from safetensors.torch import load_file

from comp import config_file, tracking
from comp.config import Tracking
from comp.model import sources
from comp.model.backbone import load_backbone
from comp.model.sources import load_tokenizer
from comp.runs import RunFolder, kept
from comp.training import crossval
from comp.training.resume import Saver, read_state

PACKAGE = Path(__file__).resolve().parents[1] / "comp"
SOURCES = sorted(PACKAGE.rglob("*.py"))
Call = Callable[..., tuple[int, str, str]]


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("hacked",)


# --- pickles ---------------------------------------------------------------------------------------------------------

PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def faults_of(source: str) -> list[str]:
    """Return what in a source could read a pickle, run a text as code or go through a shell."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name.split(".")[0] in PICKLERS]
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        wanted: dict[str, str] = {
            "torch.load": "weights_only=True", "np.load": "allow_pickle=False", "yaml.load": "Loader=_Loader",
        }  # fmt: skip
        if name in wanted:
            key, value = wanted[name].split("=")
            found += [f"{name} without {wanted[name]}"] if given.get(key) != value else []
        refused = name in ("eval", "exec", "compile", "os.system", "os.popen") or name.endswith(
            ("read_pickle", "unsafe_load", "full_load", "load_all", "torch.jit.load", "torch.hub.load")
        )
        if refused or given.get("shell", "False") != "False" or given.get("trust_remote_code", "False") != "False":
            found.append(ast.unparse(node))
    return found


KNOWN = {"worker.py": ["pickle"]}
"""What a process and the workers that it starts say to each other, over pipes without a name: no file, no socket."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_source_reads_a_pickle_or_runs_a_text(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    assert faults_of(path.read_text(encoding="utf-8")) == KNOWN.get(name, [])


def test_the_reader_finds_what_it_looks_for() -> None:
    bad = "import pickle\nfrom joblib import load\ntorch.load(f)\nnp.load(f, allow_pickle=True)\nyaml.load(t, Loader=yaml.Loader)"
    worse = "pd.read_pickle(f)\neval(t)\nsubprocess.run(t, shell=True)\nAutoModel.from_pretrained(f, trust_remote_code=True)"
    assert len(faults_of(bad)) == 5 and len(faults_of(worse)) == 4
    good = "torch.load(f, weights_only=True)\nyaml.load(t, Loader=_Loader)\nsubprocess.run([t])\nmodel.eval()"
    assert faults_of(good) == []
    assert issubclass(config_file._Loader, yaml.SafeLoader)


def test_a_planted_state_is_not_executed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_file.load("tiny.yaml")

    def stop(self: Saver, step: int, evaluated: bool) -> bool:
        if step == 3:
            raise KeyboardInterrupt
        return True

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "due", stop)
        with pytest.raises(KeyboardInterrupt):
            crossval.run(config, "new", "0", say=lambda line: None)
    folder = RunFolder("runs/new").fold(0)
    state = read_state(folder, print)
    assert state is not None
    for plant in (
        lambda: torch.save({**state, "random": Trap()}, folder.state),
        lambda: folder.state.write_bytes(pickle.dumps(Trap())),
    ):
        plant()
        said: list[str] = []
        found = read_state(folder, said.append)
        assert found is not None and found["train"]["step"] == 1, "the state before it is taken"
        assert "cannot be read" in said[0] and not Path("hacked").exists()
    torch.load(_trap(folder.state), weights_only=False)
    assert Path("hacked").exists(), "the trap works"


def _trap(path: Path) -> Path:
    torch.save(Trap(), path)
    return path


def test_planted_caches_are_made_anew(here: Path) -> None:
    path = Path("planted.npy")
    np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    assert kept(path, lambda: np.arange(3)).tolist() == [0, 1, 2]
    assert np.load(path).tolist() == [0, 1, 2]
    path.write_bytes(b"")
    assert kept(path, lambda: np.arange(2)).tolist() == [0, 1]
    for file in [*Path("runs/.cache").rglob("*.npy")]:
        np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    from comp.ship.infer import infer

    before = Path("submissions/tiny.csv").read_bytes()
    infer(["runs/tiny"], say=lambda line: None)
    assert Path("submissions/tiny.csv").read_bytes() == before and not Path("hacked").exists()


# --- backbones -------------------------------------------------------------------------------------------------------


def test_weights_of_a_pickle_only_when_it_is_allowed(here: Path) -> None:
    tokenizer, weights = load_tokenizer("model"), Path("model/model.safetensors")
    state = load_file(weights)
    own = load_backbone("model", tokenizer, dropout=0.0, with_pooler=False).state_dict()
    weights.unlink()
    torch.save(state, "model/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights are a pickle .*convert them once .* set model.allow_pickle to true"):
        load_backbone("model", tokenizer, dropout=0.0, with_pooler=False)
    found = load_backbone("model", tokenizer, dropout=0.0, with_pooler=False, allow_pickle=True).state_dict()
    assert all(torch.equal(own[name], found[name]) for name in own)
    # even then nothing but tensors is read
    torch.save({**state, "trap": Trap()}, "model/pytorch_model.bin")
    with pytest.raises(ValueError, match="model.backbone 'model' could not be loaded"):
        load_backbone("model", tokenizer, dropout=0.0, with_pooler=False, allow_pickle=True)
    assert not Path("hacked").exists()


def test_code_beside_a_model_does_not_run(here: Path, call: Call) -> None:
    import json

    config = json.loads(Path("model/config.json").read_text())
    classes = {
        "AutoConfig": "strange.Config",
        "AutoModel": "strange.Model",
        "AutoTokenizer": ["strange.T", "strange.T"],
    }
    Path("model/config.json").write_text(json.dumps({**config, "model_type": "strange", "auto_map": classes}))
    Path("model/strange.py").write_text(
        "import os\nos.mkdir('hacked')\nclass Config: pass\nclass Model: pass\nclass T: pass\n"
    )
    before = contents(here)
    status, _, err = call("train", "--config", "tiny.yaml", "--run", "new")
    assert status == 2 and "needs code that comes with the checkpoint, which comp never runs" in err
    assert contents(here) == before


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Refuse every connection and name look-up, and keep what was asked for; nothing says that we are offline."""
    asked: list[Any] = []

    def refuse(*args: Any, **options: Any) -> Any:
        asked.append(args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    sources._hub_is_there.cache_clear()
    return asked


def test_no_network_from_the_folds_to_the_submission(here: Path, call: Call, guard: list[Any]) -> None:
    threads = threading.active_count()
    for arguments in (
        ["folds", "--config", "tiny.yaml"],
        ["lint", "--config", "tiny.yaml"],
        ["train", "--config", "tiny.yaml", "--run", "new"],
        ["classical", "--config", "tiny.yaml", "--features", "tfidf", "--features", "run:new", "--run", "words"],
        ["blend", "--run", "runs/new", "--run", "runs/words"],
        ["infer", "--blend", "blends/blend"],
        [
            "score",
            "--submission",
            "submissions/blend.csv",
            "--truth",
            "data/held_back/solution.csv",
            "--metric",
            "roc_auc",
        ],
    ):
        status, _, err = call(*arguments)
        assert status == 0, err
    assert guard == []
    assert threading.active_count() <= threads + 1


def test_the_guard_sees_the_hub_being_asked(here: Path, call: Call, guard: list[Any]) -> None:
    status, _, err = call("train", "--config", "tiny.yaml", "--run", "new", "--set", "model.backbone=google/none-such")
    sources._hub_is_there.cache_clear()
    assert status == 2 and "Without internet" in err
    assert guard


# --- secrets ---------------------------------------------------------------------------------------------------------

KEY = "5ecre7" * 7


def test_keys_reach_neither_files_nor_messages(here: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "KAGGLE_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    told = []
    for arguments in (
        ["train", "--config", "tiny.yaml", "--run", "new", "--fold", "0", "--set", "tracking.wandb=auto"],
        ["infer", "--run", "runs/new"],
        ["train", "--config", "tiny.yaml", "--run", "new", "--set", "training.seed=7"],
    ):
        told += call(*arguments)[1:]
    files = [path for path in here.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "config.yaml", "manifest.json", "done.json"} <= {path.name for path in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in "".join(told)


def test_a_key_inside_another_librarys_error_is_blotted_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra `track` is not installed")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("SHORT_KEY", "a")
    monkeypatch.setattr(
        "wandb.init", lambda **about: (_ for _ in ()).throw(RuntimeError(f"bad key {KEY} of https://x:{KEY}@y"))
    )
    with pytest.warns(
        RuntimeWarning, match=r"W&B could not be started \(RuntimeError: bad key \*\*\* of https://x:\*\*\*@y\)"
    ):
        tracker = tracking.open_tracker(
            Tracking(wandb="online"), competition="c", run_name="r", fold=0, folder=tmp_path,
            metrics_path=tmp_path / "metrics.jsonl", config_dict={},
        )  # fmt: skip
    tracker.log({"loss": 1.0}, 1)
    tracker.finish()
    assert KEY not in (tmp_path / "metrics.jsonl").read_text()
