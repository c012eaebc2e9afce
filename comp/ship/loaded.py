"""A finished run, ready to predict without the hub. `load` is the notebook API.

Needs torch, transformers, numpy, pandas, scikit-learn, safetensors, PyYAML and pydantic, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from comp import config_file
from comp.blend.classical import predict_classical
from comp.config import Config, Task
from comp.data.batches import sorted_batches
from comp.data.frames import listed
from comp.data.tables import Table, table_of
from comp.data.tokens import CACHE, Encoded, Memory, encode
from comp.kernels import device_name
from comp.model.heads import plan_heads
from comp.model.losses import build_decoder
from comp.model.sources import check_tokenizer, load_tokenizer
from comp.model.text_model import TextModel, build_model
from comp.progress import open_progress
from comp.runs import RunFolder, read_json
from comp.runtime import Runtime, check_devices, open_runtime, visible_devices
from comp.ship.manifest import MANIFEST
from comp.ship.workers import Alone, Crew, open_crew
from comp.training.checkpoint import load_weights
from comp.training.predict import batch_tokens_of, predict

__all__ = ["LoadedRun", "crew_of", "load", "renamed"]

Fold: TypeAlias = int | str
Floats: TypeAlias = NDArray[np.float64]
FEW = 2000  # texts, times models, below which starting a process for each GPU costs more than it saves


@dataclass(frozen=True)
class LoadedRun:
    """A finished run, ready to predict. Made by `load`."""

    folder: RunFolder
    config: Config
    classes: dict[str, list[str]]
    """Task name -> class labels (multiclass) or grades (ordinal)."""
    folds: list[Fold]
    """Models that are averaged."""
    weights: str
    """best | last | averaged"""
    runtimes: tuple[Runtime, ...]
    """The device of each worker."""
    batch_tokens: int | None = None
    """Most padded tokens of a batch; None = by the device."""
    few: int = 0
    """Fewer texts than this, times models, go to the first device alone."""

    @property
    def task(self) -> Task:
        """The task that is submitted."""
        return self.config.tasks[0]

    @property
    def output_names(self) -> list[str]:
        """Names of the predicted columns of the first task: targets, or the classes of a multiclass task."""
        return self.classes[self.task.name] if self.task.kind == "multiclass" else list(self.task.targets)

    @property
    def runtime(self) -> Runtime:
        """The first device."""
        return self.runtimes[0]

    @property
    def of_task(self) -> dict[str, Any]:
        """What submission.py wants to know of the first task."""
        classes = self.classes.get(self.task.name)
        return {"id_column": self.config.competition.id, "task": self.task, "classes": classes}

    def describe(self) -> str:
        """Return the devices in words."""
        if len(self.runtimes) == 1:
            return self.runtime.describe()
        return f"{len(self.runtimes)} workers on {'; '.join(runtime.kind for runtime in self.runtimes)}"

    def predict(self, frame: pd.DataFrame, *, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
        """Predict a frame that has the competition's id and text columns.

        `columns`: name in the frame -> name in the config, where they differ: {"full_text": "text"}. Returns the id
        column (as text) and one column per output, in the rows' order: values for regression and ordinal, probabilities
        for the other kinds; the mean over the run's fold models. Raises ValueError for missing columns, empty or
        duplicate ids.
        """
        table = table_of(renamed(frame, columns or {}), self.config.competition, source="frame")
        return self.as_frame(table, self.predict_table(table, cache=None))

    def as_frame(self, table: Table, values: Floats) -> pd.DataFrame:
        """Return the ids of a table and one column per output of (N, K) predictions."""
        columns = {name: values[:, place] for place, name in enumerate(self.output_names)}
        return pd.DataFrame({self.config.competition.id: table.ids, **columns})

    def predict_table(self, table: Table, *, cache: Path | None = CACHE, to_come: int = 0) -> Floats:
        """Return (N, K) predictions of the first task in the table's order, averaged over the folds.

        The text is tokenized once; one model at a time is in the memory of each device. `to_come`: rows that other
        calls of the same job will predict, for the time left.
        """
        if not len(table):
            return np.zeros((0, len(self.output_names)))
        content = self.read(table, cache=cache)
        crew = crew_of(self, len(table) * len(self.folds))
        progress = open_progress(len(table) * len(self.folds), f"{self.folder.name}", "row", to_come=to_come)
        try:
            total = np.zeros((len(table), len(self.output_names)))
            for fold in self.folds:
                total += crew.predict(self, fold, content, progress.advance)
        finally:
            progress.close()
            crew.close()
        return total / len(self.folds)

    # --- what the workers ask for

    @property
    def key(self) -> str:
        """What its model depends on but for the fold."""
        return f"{self.folder.path.resolve()} {self.weights}"

    def on(self, place: int) -> LoadedRun:
        """Return the run for the worker at `place`."""
        return replace(self, runtimes=(self.runtimes[place],))

    def read(self, table: Table, *, cache: Path | None = CACHE, memory: Memory | None = None) -> Any:
        """Return what the model sees of a table: its tokens."""
        tokenizer = load_tokenizer(str(self.folder.backbone))
        check_tokenizer(tokenizer, self.folder.backbone, read_json(self.folder.manifest).get("tokenizer"))
        return encode(tokenizer, table.texts, **self.config.model.cutting, cache=cache, memory=memory)

    def shares(self, content: Any, number: int) -> list[tuple[NDArray[np.int64], Any]]:
        """Cut the rows into about `number` shares of whole batches, longest rows first: places and their tokens."""
        assert isinstance(content, Encoded)
        lengths = content.lengths
        enough = size = lengths.sum() / number
        least = min(self.batch_tokens or batch_tokens_of(runtime) for runtime in self.runtimes)
        shares: list[list[NDArray[np.int64]]] = []
        for batch in sorted_batches(lengths, max_tokens=least):
            if size >= enough:
                shares.append([])
                size = 0
            shares[-1].append(batch)
            size += lengths[batch].sum()
        rows = [np.concatenate(share) for share in shares]
        return [(places, content.take(places)) for places in rows]

    def build(self) -> TextModel:
        """Return the model on its device, with random weights."""
        model = self.config.model
        built = build_model(
            self.folder.backbone,
            load_tokenizer(str(self.folder.backbone)),
            pretrained=False,
            pooler=model.pooler.model_dump(),
            heads=plan_heads(self.config.tasks, self.classes),
            max_length=model.max_length,
            num_fields=len(self.config.competition.text_columns),
            part=model.part,
            dropout=model.dropout,
            attention=model.attention,
            head_dropout=model.head_dropout,
        )
        self.runtime.halve_linear_(built.backbone)
        return built.to(self.runtime.device).eval()

    def fill(self, model: Any, fold: Fold) -> None:
        """Put the weights of a fold into the model."""
        load_weights(self.weights_of(fold), model)

    def predict_with(self, model: Any, fold: Fold, content: Any, on_batch: Callable[[int], Any] | None) -> Floats:
        """Return (N, K) predictions of the rows whose tokens are given. Raises ValueError when memory will not do."""
        import torch

        try:
            found = predict(
                model,
                content,
                np.arange(len(content)).astype(object),
                decoders={self.task.name: build_decoder(self.task, self.classes.get(self.task.name, []))},
                runtime=self.runtime,
                on_batch=on_batch,
                batch_tokens=self.batch_tokens,
            )
        except torch.cuda.OutOfMemoryError:
            used = self.batch_tokens or batch_tokens_of(self.runtime)
            raise ValueError(
                f"{self.folder.path}: {self.runtime.device} has too little memory for batches of {used:,} tokens; use "
                "a smaller --batch-tokens"
            ) from None
        return found.values[self.task.name]

    def weights_of(self, fold: Fold) -> Path:
        folder = self.folder.fold(fold)
        if self.weights == "averaged":
            if not folder.averaged.exists():
                raise ValueError(
                    f"{folder.path} has no averaged weights: stability.averaging was none; use --weights best or last"
                )
            return folder.averaged
        return folder.last if fold == "full" or self.weights == "last" else folder.best


@dataclass(frozen=True)
class LoadedClassical(LoadedRun):
    """A finished run of scikit-learn on features, ready to predict. Made by `load`."""

    def read(self, table: Table, *, cache: Path | None = CACHE, memory: Memory | None = None) -> Any:
        """Return the table, and whether features may be kept on disk."""
        return table, cache is not None

    def shares(self, content: Any, number: int) -> list[tuple[NDArray[np.int64], Any]]:
        """Return one share: what is costly is the fitting, which is the same for few rows."""
        return [(np.arange(len(content[0])), content)]

    def build(self) -> Any:
        """Return nothing: an estimator is fitted when it predicts."""
        return None

    def fill(self, model: Any, fold: Fold) -> None:
        """Do nothing."""

    def predict_with(self, model: Any, fold: Fold, content: Any, on_batch: Callable[[int], Any] | None) -> Floats:
        """Return (N, K) predictions of the table."""
        table, cached = content
        found = predict_classical(self.folder, self.config, table, fold, self.runtime, cached=cached)
        if on_batch is not None:
            on_batch(len(table))
        return found

    def weights_of(self, fold: Fold) -> Path:
        return self.folder.fold(fold).path / "seen.npz"


def crew_of(run: LoadedRun, num_texts: int) -> Alone | Crew:
    """Open who predicts `num_texts` texts, counted once for each model, on the devices of a run."""
    devices = [str(runtime.device) for runtime in run.runtimes]
    return open_crew(devices if num_texts >= run.few else devices[:1])


def renamed(frame: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Rename columns, the index too. Raises ValueError when one is not there, or its new name is taken."""
    if frame.index.name in columns:
        frame = frame.reset_index()
    absent = [name for name in columns if name not in frame.columns]
    taken = [new for new in columns.values() if new in frame.columns and new not in columns]
    if absent or taken or len(set(columns.values())) < len(columns):
        reasons = [f"the frame has no {listed(absent)}; "] * bool(absent)
        reasons += [f"{listed(taken)} is there already; "] * bool(taken)
        raise ValueError(
            f"columns {dict(columns)}: {''.join(reasons)}give name in the frame -> name in the config, each once; the "
            f"frame's columns are {listed(frame.columns, 20)}"
        )
    return frame.rename(columns=dict(columns))


def load(
    path: str | Path,
    *,
    folds: Sequence[Fold] | None = None,
    weights: str = "best",
    precision: str | None = None,
    devices: Sequence[str] | None = None,
    batch_tokens: int | None = None,
    fallback: str = "stop",
) -> LoadedRun:
    """Open a finished run for prediction: `load("runs/large").predict(frame)`.

    `folds`: which models are averaged, each counting the same: numbers, "full" (the full-data model), "all" (every
    finished fold); None = all, or the full-data model when there is no fold. `weights`: best (by validation), last, or
    averaged. `precision`: None = as in training, which under auto is what it chose by measurement on this kind of
    device, and elsewhere the usual one; auto = the device's usual one. `devices`: like ["cuda:0", "cuda:1"], a worker
    process for each when there are several; None = every visible GPU, the first alone for few texts. `batch_tokens`:
    most padded tokens of a batch; None = 8192 on a GPU, 2048 on a CPU. `fallback`: stop or cpu, see `open_runtime`.
    Raises ValueError when the folder is no run, a fold is not finished or a device is not there.
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise ValueError(f"batch_tokens {batch_tokens}: at least 1 is needed")
    if devices is not None:
        check_devices(devices)
    folder = RunFolder(path)
    if (folder.path / MANIFEST).exists():
        raise ValueError(f"{path} is a bundle of runs: use comp.load_bundle('{path}'), or load one of its runs/")
    if not folder.config.exists() or not folder.manifest.exists():
        raise ValueError(f"{path} is no run folder: config.yaml or manifest.json is missing; see `ls runs/`")
    if weights not in ("best", "last", "averaged"):
        raise ValueError(f"weights '{weights}': allowed are best, last and averaged")
    config = config_file.load(folder.config)
    finished = folder.finished_folds()
    if not finished:
        raise ValueError(f"{path} has no finished fold; train it with `comp train`")
    numbered = [fold for fold in finished if fold != "full"]
    wanted_folds = list(folds) if folds is not None else ["all"] if numbered else ["full"]
    chosen = [one for fold in wanted_folds for one in (numbered if fold == "all" else [fold])]
    absent = [fold for fold in chosen if fold not in finished]
    if absent or not chosen:
        raise ValueError(
            f"{path}: fold {', '.join(map(str, absent)) or 'none'} is not finished; finished: "
            f"{', '.join(map(str, finished))}"
        )
    manifest = read_json(folder.manifest, "classes", "fingerprints", "commit")
    wanted = precision or config.training.precision
    runtimes = [open_runtime(wanted, device, fallback=fallback) for device in devices or visible_devices()]
    if precision is None and wanted == "auto":
        runtimes = [_as_trained(one, manifest.get("kernels")) for one in runtimes]
    if devices is None:  # of GPUs without kernels one CPU is left
        runtimes = [one for one in runtimes if one.device.type != "cpu"] or runtimes[:1]
    if folder.classical.exists() and weights == "averaged":
        raise ValueError(f"{path} is a classical run and has no averaged weights; use --weights best")
    loaded = LoadedClassical if folder.classical.exists() else LoadedRun
    few = FEW if devices is None else 0
    return loaded(folder, config, manifest["classes"], chosen, weights, tuple(runtimes), batch_tokens, few)


def _as_trained(runtime: Runtime, kernels: Any) -> Runtime:
    """Return a runtime in the precision that training chose under auto, on the same kind of device; else as it is.

    `kernels`: what the manifest holds of that choice; a run made before there was one has none.
    """
    if not isinstance(kernels, dict) or kernels.get("precision") not in ("bf16", "fp16", "fp32"):
        return runtime
    # A CPU's name ends with its threads, which may differ.
    known, here = (str(name).split(",")[0] for name in (kernels.get("device"), device_name(runtime.device)))
    return replace(runtime, precision=kernels["precision"]) if known == here else runtime
