"""What the notebook of a bundle calls on Kaggle: find the competition's tables, infer, leave submission.csv.

The scored rerun has other rows than the visible run, and nobody can repair it: what can be made valid is made valid,
with a warning.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from comp import config_file
from comp.blend.crossfit import Blend, read_blend
from comp.blend.members import weights_each
from comp.data.frames import read_frame
from comp.data.tables import read_test, table_of
from comp.runs import RunFolder
from comp.runtime import open_runtime
from comp.ship.infer import infer, must_fit
from comp.ship.loaded import LoadedRun, load, renamed
from comp.ship.manifest import places, read_manifest
from comp.ship.submission import read_submission

__all__ = ["LoadedBundle", "find_table", "load_bundle", "rerun"]


@dataclass(frozen=True)
class LoadedBundle:
    """The runs of a bundle and how they go together, ready to predict. Made by `load_bundle`."""

    runs: list[LoadedRun]
    blend: Blend | None
    """None = the mean of the runs."""

    def predict(self, frame: pd.DataFrame, *, columns: Mapping[str, str] | None = None) -> pd.DataFrame:
        """Predict a frame, as `LoadedRun.predict`: the id column and one column per output, in the rows' order."""
        frame = renamed(frame, columns or {})
        tables = [table_of(frame, run.config.competition, source="frame") for run in self.runs]
        preds = np.stack([run.predict_table(table, cache=None) for run, table in zip(self.runs, tables, strict=True)])
        together = self.blend is not None and preds.shape[1] > 0
        values = self.blend.apply(preds) if self.blend is not None and together else preds.mean(axis=0)
        return self.runs[0].as_frame(tables[0], values)


def load_bundle(path: str | Path, *, precision: str | None = None, fallback: str = "stop") -> LoadedBundle:
    """Open a bundle for prediction: `load_bundle("/kaggle/input/large").predict(frame)`.

    `precision`: None = as the bundle says. `fallback`: stop or cpu, for a GPU without kernels. Raises ValueError when
    the folder is no bundle, or was changed.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    wanted = precision or manifest["precision"]
    options = {"folds": manifest["folds"], "precision": wanted, "fallback": fallback}
    each = weights_each(manifest["weights"], len(manifest["runs"]))
    runs = [load(folder / run["path"], weights=own, **options) for run, own in zip(manifest["runs"], each, strict=True)]
    blend = _blend(folder, manifest)
    must_fit(runs, blend)
    return LoadedBundle(runs, blend)


def _blend(folder: Path, manifest: Mapping[str, Any]) -> Blend | None:
    if manifest["blend"] is None:
        return None
    blend = read_blend(folder / manifest["blend"])
    return replace(blend, runs=[str(folder / run["path"]) for run in manifest["runs"]])


def rerun(
    bundle: str | Path,
    inputs: str | Path = "/kaggle/input",
    *,
    out: str | Path = "submission.csv",
    say: Callable[[str], None] = print,
) -> pd.DataFrame:
    """Predict the competition's test table, wherever under `inputs` it is mounted; write `out` and return it as text.

    A table without rows gives a CSV of its header. Where the sample submission does not name the test table's rows, the
    submission is made from the rows, in the sample's columns. The GPU is looked at first; what becomes of one without
    kernels is written in the bundle. Nothing is written but `out` and its sidecar.
    """
    folder, where, path = Path(bundle).resolve(), Path(inputs).resolve(), Path(out).resolve()
    manifest = read_manifest(folder)
    scored = "the scored rerun" if os.environ.get("KAGGLE_IS_COMPETITION_RERUN") else "not the scored rerun"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again, once, by infer
        runtime = open_runtime(fallback=manifest["fallback"])
    device = runtime.describe().rsplit(", ", 1)[0]  # each run says its own precision
    say(f"bundle '{manifest['bundle']}' of {manifest['created']}, {scored}, {device}")
    names = manifest["tables"]
    test = find_table(where, manifest["competition"], names["test"], without=folder)
    assert test is not None
    sample = None
    if names["sample_submission"] is not None:
        sample = find_table(where, manifest["competition"], names["sample_submission"], without=folder, needed=False)
        if sample is None:
            warnings.warn(
                f"no {names['sample_submission']} under {where}: columns are named as the targets", stacklevel=2
            )
    with _elsewhere() as scratch:
        infer(
            [folder / run["path"] for run in manifest["runs"]] if manifest["blend"] is None else [],
            test=str(test),
            sample=None if sample is None else str(_fitting(sample, test, folder, manifest, scratch)),
            out=str(path),
            folds=manifest["folds"],
            weights=manifest["weights"],
            blend=_blend(folder, manifest),
            precision=manifest["precision"],
            fallback=manifest["fallback"],
            time_budget=manifest["time_budget"],
            labels=manifest.get("labels"),  # which bundles of before do not say
            say=say,
        )
    return read_frame(path, empty=True)


@contextmanager
def _elsewhere() -> Iterator[Path]:
    """Work in a folder that goes away: what is kept between calls would become the notebook's output."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            yield Path(name)
        finally:
            os.chdir(before)


def find_table(root: Path, competition: str, name: str, *, without: Path, needed: bool = True) -> Path | None:
    """Return the file `name` of a competition, wherever under `root` it is mounted; not the bundle's own.

    Of several, those under a folder called like the competition, and of them the nearest. None when there is none and
    it is not `needed`. Raises ValueError when there is none, or two are equally near.
    """
    found = [path for path in places(root, name) if not path.is_relative_to(without)]
    own = [path for path in found if competition in path.relative_to(root).parts]
    chosen = own or found
    if not chosen:
        if not needed:
            return None
        raise ValueError(f"no {name} under {root}; add the competition '{competition}' to the notebook's inputs")
    nearest = [path for path in chosen if len(path.parts) == len(chosen[0].parts)]
    if len(nearest) > 1:
        raise ValueError(
            f"{len(nearest)} files could be {name} of '{competition}': {', '.join(map(str, nearest[:5]))}; remove the "
            "inputs that are not of this competition"
        )
    if not own:
        warnings.warn(f"{nearest[0]} is taken for {name}: no folder is called '{competition}'", stacklevel=2)
    return nearest[0]


def _fitting(sample: Path, test: Path, folder: Path, manifest: Mapping[str, Any], scratch: Path) -> Path:
    """Return the sample submission, or one in its columns for the rows that the test table has."""
    competition = config_file.load(RunFolder(folder / manifest["runs"][0]["path"]).config).competition
    frame = read_submission(sample, competition.id, empty=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again by infer
        ids = list(read_test(test, competition, empty=True).ids)
    if set(frame[competition.id]) == set(ids):
        return sample
    warnings.warn(
        f"{sample} names {len(frame):,} rows, {test} has {len(ids):,}, and they are not the same: the submission is "
        "made from the rows of the test table, in the columns of the sample",
        stacklevel=2,
    )
    first = frame.iloc[0] if len(frame) else None
    cells = {
        name: ids if name == competition.id else ["0" if first is None else first[name]] * len(ids)
        for name in frame.columns
    }
    path = scratch / "sample_submission.csv"
    pd.DataFrame(cells, dtype=object).to_csv(path, index=False)
    return path
