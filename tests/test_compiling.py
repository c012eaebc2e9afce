"""torch.compile in training: the same model, names of weights, the verdict, machines without a compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TinyCompetition
from safetensors import safe_open

from comp import config_file
from comp.data.batches import Batch
from comp.runtime import Runtime
from comp.tracking import NullTracker
from comp.training import compiling, crossval, one_fold
from comp.training.compiling import CompileReport, check_compiler

Folder = Callable[..., Path]


@pytest.fixture
def trained(
    isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Folder
) -> Callable[..., tuple[Any, list[str]]]:
    def train(name: str, **training: Any) -> tuple[Any, list[str]]:
        data = tiny_competition().config(tiny_model_folder("bert"))
        data["training"] |= training
        (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
        said: list[str] = []
        return crossval.run(config_file.load("tiny.yaml"), name, "0", say=said.append), said

    return train


def names(run: str) -> list[str]:
    with safe_open(Path("runs") / run / "fold0" / "best.safetensors", "pt") as file:
        return sorted(file.keys())


def check(trained: Callable[..., tuple[Any, list[str]]]) -> None:
    plain, _ = trained("plain")
    found, said = trained("compiled", compile=True)
    assert found.as_dict()["last"]["mean"] == pytest.approx(plain.as_dict()["last"]["mean"], abs=1e-4)
    assert names("compiled") == names("plain")
    assert sum("torch.compile took" in line for line in said) == 1
    assert any("it did not pay" in line or "it paid" in line for line in said)


def test_a_compiled_run_is_the_plain_one(
    trained: Callable[..., tuple[Any, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that traces and compiles nothing."""
    graphs = []

    def traced(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(inputs)
        return graph.forward

    def quickly(*args: Any) -> CompileReport:
        return compiling.compile_backbone(*args, backend=traced)

    monkeypatch.setattr(one_fold, "compile_backbone", quickly)
    check(trained)
    assert 1 <= len(graphs) <= 8, "lengths and sizes are dynamic: not a graph for each"


def test_a_compiler_that_fails_leaves_no_tracker_open(
    trained: Callable[..., tuple[Any, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []

    class Ended(NullTracker):
        def finish(self) -> None:
            ends.append("tracker")

    def broken(*args: Any) -> CompileReport:
        raise ValueError("the compiler broke down")

    monkeypatch.setattr(one_fold, "open_tracker", lambda *args, **options: Ended())
    monkeypatch.setattr(one_fold, "compile_backbone", broken)
    with pytest.raises(ValueError, match="the compiler broke down"):
        trained("broken", compile=True)
    assert ends == ["tracker"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself, where inductor is imported
def test_a_run_compiled_for_good_is_the_plain_one(trained: Callable[..., tuple[Any, list[str]]]) -> None:
    check(trained)


def test_the_verdict() -> None:
    report = CompileReport(compiling=10.0, plain=0.3, compiled=0.2)
    assert report.told(50).endswith("200 ms rather than 300, at most 5.0 s in 50 passes: it did not pay: "
                                    "training.compile false is faster here")  # fmt: skip
    assert report.told(200).endswith("at most 20.0 s in 200 passes: it paid")


def test_without_a_compiler_it_is_refused_before_anything_is_written(
    trained: Callable[..., tuple[Any, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(
        ValueError, match=r"needs a C\+\+ compiler \(g\+\+, clang\+\+, c\+\+\), and this machine has none"
    ):
        trained("refused", compile=True)
    assert not Path("runs/refused/manifest.json").exists()
    monkeypatch.setattr(compiling, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package triton on a GPU"):
        check_compiler(Runtime(torch.device("cuda"), "bf16"))


@pytest.mark.parametrize(
    "model",
    [
        {"gradient_checkpointing": True},
        {"cache_frozen": True, "freeze_layers": 1, "freeze_embeddings": True},
        {"attention": "packed"},
    ],
)
def test_what_does_not_go_with_it_is_refused(
    model: dict[str, Any], isolated: Path, tiny_competition: Callable[..., TinyCompetition], tiny_model_folder: Folder
) -> None:
    data = tiny_competition().config(tiny_model_folder("bert"))
    data["model"] |= model
    data["training"] |= {"compile": True}
    (isolated / "tiny.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match=f"training.compile does not work with model.{next(iter(model))}"):
        config_file.load("tiny.yaml")


def test_batches_go_to_a_gpu_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, **options: calls.append((str(device), options)) or self
    )
    ids = torch.ones(2, 3, dtype=torch.int64)
    batch = Batch(torch.arange(2).numpy(), ids, ids, 6, targets={"main": torch.ones(2, 1)}, weights=torch.ones(2))
    batch.to(torch.device("cuda"))
    assert calls == ["pinned", ("cuda", {"non_blocking": True})] * 4
