"""Checkpoints in half precision: half the upload, and what it costs on the out-of-fold rows, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comp.blend.crossfit import Blend
from comp.blend.members import read_member
from comp.data.tables import read_train, table_of
from comp.metrics import evaluate
from comp.runs import write_atomic
from comp.ship.loaded import LoadedRun

__all__ = ["cost_of_halves", "halve", "told"]

LARGEST = torch.finfo(torch.float16).max
Floats = NDArray[np.float64]


def halve(source: Path, to: Path) -> int:
    """Write weights as float16 (a T4 has no bfloat16); they are read back into a float32 model.

    A tensor with a value beyond float16 stays as it is. Returns how many did.
    """
    with safe_open(source, "pt") as file:
        about = file.metadata()
    state, kept = load_file(source), 0
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        if tensor.numel() and float(tensor.abs().max()) > LARGEST:
            kept += 1
        else:
            state[name] = tensor.half()
    write_atomic(to, lambda temporary: save_file(state, temporary, metadata=about))
    return kept


def cost_of_halves(
    whole: Sequence[LoadedRun], halved: Sequence[LoadedRun], blend: Blend | None
) -> list[dict[str, Any]]:
    """Predict each fold's held-out rows with the weights as they were and as they are; return a line per run.

    A line: run, metric, before, after, largest (change of a prediction), rows; the last one is of the blend, if any.
    Full-data models have no held-out rows. Raises ValueError when the training table or the rows are gone.
    """
    lines, found = [], []
    for old, new in zip(whole, halved, strict=True):
        member = read_member(old.folder.path)
        config = old.config
        table = read_train(config.competition, config.tasks, classes=old.classes)
        row_of = {name: row for row, name in enumerate(table.ids)}
        ids, before, after = [], [], []
        for fold in [fold for fold in old.folds if fold != "full"]:
            held = list(member.rows.index[member.rows["fold"] == fold])
            if missing := [name for name in held if name not in row_of]:
                raise ValueError(
                    f"{config.competition.train} lacks {len(missing)} rows that {old.folder.path} was trained with "
                    f"(for example {missing[0]}); the cost of --half cannot be measured"
                )
            part = table_of(table.frame.iloc[[row_of[name] for name in held]], config.competition)
            ids += held
            before.append(replace(old, folds=[fold]).predict_table(part))
            after.append(replace(new, folds=[fold]).predict_table(part))
        if not ids:
            continue
        targets = member.rows.loc[ids, member.columns("target")].to_numpy(float)
        both = np.concatenate(before), np.concatenate(after)
        lines.append(_line(old.folder.name, config.metric, targets, both, old.task.kind))
        found.append((pd.Index(ids), both))
    if blend is not None and len(found) == len(whole):
        lines += _of_blend(blend, found)
    return lines


def _line(run: str, metric: str, targets: Floats, both: tuple[Floats, Floats], kind: str) -> dict[str, Any]:
    before, after = (evaluate(metric, targets, preds, kind) for preds in both)
    largest = float(np.abs(both[0] - both[1]).max())
    return {
        "run": run, "metric": metric, "before": before, "after": after, "largest": largest, "rows": len(targets)
    }  # fmt: skip


def _of_blend(blend: Blend, found: Sequence[tuple[pd.Index, tuple[Floats, Floats]]]) -> list[dict[str, Any]]:
    """Return the line of the blend as it was fitted, on its own rows; [] where a run did not predict all of them."""
    ids = pd.read_parquet(blend.path.with_name("rows.parquet"))["id"]
    places = [own.get_indexer(pd.Index(ids)) for own, _ in found]
    if any((place < 0).any() for place in places):
        return []
    both = [
        blend.apply(np.stack([preds[which][place] for place, (_, preds) in zip(places, found, strict=True)]))
        for which in (0, 1)
    ]
    problem = blend.problem
    return [_line("blend", problem.metric, problem.targets, (both[0], both[1]), problem.kind)]


def told(line: Mapping[str, Any]) -> str:
    """Return a line of `cost_of_halves` as text."""
    change = line["after"] - line["before"]
    return (
        f"{line['run']}: {line['metric']} {line['before']:.6f} -> {line['after']:.6f} ({change:+.6f}) on "
        f"{line['rows']:,} out-of-fold rows; no prediction changes by more than {line['largest']:.1e}"
    )
