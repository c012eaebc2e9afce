"""`comp submit`: a checked CSV or bundle to Kaggle, and a line in submissions/LOG.md."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from comp import config_file
from comp.data.frames import parse_numbers
from comp.runs import RunFolder, read_json
from comp.ship.bundle import cv_of
from comp.ship.kaggle_client import open_client, push_dataset, push_kernel, submit_csv
from comp.ship.leaderboard import LOG, Entry, add_entry, note_score
from comp.ship.manifest import MANIFEST, read_manifest
from comp.ship.submission import read_submission, validate_submission
from comp.ship.verify import check_bundle

__all__ = ["submit"]

WAIT, PATIENCE = 10.0, 180
"""Seconds between two looks at a dataset that Kaggle unpacks, and how many looks."""


@dataclass(frozen=True)
class _Submission:
    """What is submitted, and what is known about it."""

    path: Path
    competition: str | None
    sidecar: dict[str, Any] | None
    """Of a CSV."""
    manifest: dict[str, Any] | None
    """Of a bundle."""


def submit(
    path: Path,
    *,
    competition: str | None = None,
    sample: str | None = None,
    message: str = "",
    score: float | None = None,
    say: Callable[[str], None] = print,
    sleep: Callable[[float], Any] = time.sleep,
) -> None:
    """Check and send a submission CSV, or the dataset and notebook of a bundle; note it in submissions/LOG.md.

    With `score`, nothing is sent: the leaderboard's score of a submission that was made is noted. `competition`: its
    name in Kaggle's addresses; a bundle says its own. `sample`: sample submission; None = that of the run it came from.
    Raises ValueError for what does not fit, and without credentials.
    """
    own = _open(path, competition)
    entry = _entry(own, message)
    if score is not None:
        known = note_score(entry, score)
        say(f"{LOG}: {'noted' if known else 'added'} {path}, CV {_shown(entry.cv)}, LB {score:.6g}; see `comp oof`")
        return
    if own.manifest is not None:
        check_bundle(path, say)
        _push(own.manifest, path, message, say, sleep)
    else:
        if own.competition is None:
            raise ValueError(f"--competition is missing: the name in Kaggle's addresses that {path} is for")
        _check_csv(own, sample)
        say(f"{path}: valid")
        answer = submit_csv(open_client(), path, message or path.stem, own.competition)
        say(f"kaggle: {answer}")
    add_entry(entry)
    say(f"{LOG}: added {path}, CV {_shown(entry.cv)}; when the score is there: comp submit {path} --score N")


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.5f}"


def _open(path: Path, competition: str | None) -> _Submission:
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        if competition not in (None, manifest["competition"]):
            raise ValueError(f"{path} was made for '{manifest['competition']}', not for '{competition}'")
        return _Submission(path, manifest["competition"], None, manifest)
    if path.is_dir():
        raise ValueError(f"{path} is no bundle: {MANIFEST} is missing; make one with `comp bundle`, or name a CSV")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; write one with `comp infer`")
    story = path.with_suffix(".json")
    sidecar = read_json(story) if story.exists() else None
    if sidecar is not None and sidecar.get("sha256") != hashlib.sha256(path.read_bytes()).hexdigest():
        raise ValueError(f"{path} was changed since {story} was written; write both anew with `comp infer`")
    return _Submission(path, competition, sidecar, None)


def _entry(own: _Submission, message: str) -> Entry:
    cv = own.manifest["cv"] if own.manifest is not None else _cv_of_csv(own.sidecar)
    found = cv or {"metric": "", "value": None, "kind": ""}
    name = own.competition or _name_of(own.sidecar)
    return Entry(str(own.path), name, found["metric"], found["value"], found["kind"], None, message)


def _name_of(sidecar: Mapping[str, Any] | None) -> str:
    run = _run_of(sidecar)
    return "" if run is None else config_file.load(run.config).competition.name


def _run_of(sidecar: Mapping[str, Any] | None) -> RunFolder | None:
    """Return the first run a CSV came from, where it is still there."""
    runs = (sidecar or {}).get("runs", [])
    folder = RunFolder(runs[0]["run"]) if runs else None
    return folder if folder is not None and folder.config.exists() and folder.manifest.exists() else None


def _cv_of_csv(sidecar: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return {metric, value, kind} of what a CSV's runs scored out of fold, from its sidecar where that has it."""
    if sidecar is None:
        return None
    if blend := sidecar.get("blend"):
        cross = blend["scores"]["crossfit"]
        kind = "fitted on the same rows" if cross is None else "cross-fitted"
        return {"metric": blend["metric"], "value": blend["scores"]["fitted"] if cross is None else cross, "kind": kind}
    runs, weights = sidecar.get("runs", []), sidecar.get("weights", "best")
    if len(runs) == 1 and runs[0].get("scores"):
        scores = runs[0]["scores"]
        value = scores.get(weights, {}).get("pooled")
        return None if value is None else {"metric": scores["metric"], "value": value, "kind": "out of fold, pooled"}
    paths = [run["run"] for run in runs]
    return cv_of(paths, weights, None) if paths and all(Path(path).exists() for path in paths) else None


def _check_csv(own: _Submission, sample: str | None) -> None:
    """Raise ValueError unless the CSV is what the competition will accept, as far as that can be known."""
    run = _run_of(own.sidecar)
    config = None if run is None else config_file.load(run.config)
    file = sample or (None if config is None else config.competition.sample_submission)
    if file is None:
        raise ValueError(f"{own.path}: nothing to check it against; name the sample submission with --sample")
    column = None if config is None else config.competition.id
    frame, layout = read_submission(own.path, column), read_submission(Path(file), column)
    if run is not None and config is not None:
        task = config.tasks[0]
        classes = read_json(run.manifest)["classes"].get(task.name)
        hard = bool((own.sidecar or {}).get("labels"))
        validate_submission(frame, layout, id_column=config.competition.id, task=task, classes=classes, hard=hard)
        return
    key = str(layout.columns[0])
    if list(frame.columns) != list(layout.columns) or list(frame[key]) != list(layout[key]):
        raise ValueError(f"{own.path} has not the columns, ids and order of {file}; write it with `comp infer`")
    if bad := [name for name in layout.columns[1:] if _breaks(frame[name], layout[name])]:
        raise ValueError(f"{own.path}: column '{bad[0]}' has cells that are empty or no finite number")


def _breaks(cells: pd.Series, sample: pd.Series) -> bool:
    """Tell whether cells are empty, or no finite numbers where the sample's are."""
    numbers = all(map(math.isfinite, parse_numbers(sample)[0]))
    wrong = not all(map(math.isfinite, parse_numbers(cells)[0])) if numbers else False
    return wrong or any(not str(cell).strip() for cell in cells)


def _push(
    manifest: Mapping[str, Any],
    path: Path,
    message: str,
    say: Callable[[str], None],
    sleep: Callable[[float], Any],
) -> None:
    """Upload the dataset, wait until Kaggle has unpacked it, push the notebook."""
    api = open_client()
    address = push_dataset(api, path, message or f"comp {manifest['comp']}, {manifest['created']}")
    say(f"dataset: {address}")
    ref = address.removeprefix("https://www.kaggle.com/datasets/")
    for _ in range(PATIENCE):
        if str(api.dataset_status(ref)).lower() == "ready":
            break
        sleep(WAIT)
    else:
        raise ValueError(
            f"{ref} is not ready after {WAIT * PATIENCE / 60:.0f} minutes; then: kaggle kernels push -p {path}"
        )
    say(f"notebook: {push_kernel(api, path)}")
    say(
        "when it has run: kaggle competitions submit "
        f"-c {manifest['competition']} -k {ref} -v VERSION -f submission.csv -m '{message or path.name}'"
    )
