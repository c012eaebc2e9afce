"""What every study does: train jobs in worker processes, append a row as each finishes, skip those that are there."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DATA = ROOT.parent / "shared" / "data" / "clear" / "train.csv"
WORK = Path(tempfile.gettempdir()) / "comp-studies"

AT_A_TIME = 24  # jobs of one set of processes: what their memory gathers is given back (max_tasks_per_child deadlocks)
Row = dict[str, Any]


def spread_rows(num_rows: int) -> Any:
    """Return `num_rows` of CLEAR, spread evenly over the sorted target, in an order drawn once."""
    import pandas as pd

    if not DATA.exists():
        sys.exit(f"{DATA} not found: the study needs the CLEAR corpus in Kaggle's CommonLit format")
    frame = pd.read_csv(DATA)
    places = [round(i * (len(frame) - 1) / (num_rows - 1)) for i in range(num_rows)]
    return frame.sort_values(["target", "id"]).iloc[places].sample(frac=1, random_state=1)


def train_all(
    call: Callable[..., Row | str],
    todo: Sequence[tuple[Any, ...]],
    file: Path,
    *,
    jobs: int,
    describe: Callable[[Row], str],
) -> None:
    """Call `call(*job)` for every job, `jobs` at a time in one-thread processes; append each row as it comes.

    A call returns a row, of which `describe` makes the line to print, or the reason why there is none.
    """
    context = get_context("spawn")
    for start in range(0, len(todo), AT_A_TIME):
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_one_thread) as pool:
            futures = [pool.submit(call, *job) for job in todo[start : start + AT_A_TIME]]
            for future in as_completed(futures):
                note(file, future.result(), describe)


def note(file: Path, row: Row | str, describe: Callable[[Row], str]) -> None:
    """Append a row, or say why there is none."""
    if isinstance(row, str):
        print(f"refused: {row}", flush=True)
        return
    RESULTS.mkdir(exist_ok=True)
    with open(file, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")
    print(describe(row), flush=True)


def _one_thread() -> None:
    """Give a worker one thread (two processes of one thread train more than one of two) and no progress lines."""
    import torch

    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives


def read_rows(file: Path, *keys: str) -> list[Row]:
    """Return the finished rows, the latest of those that have the same `keys`."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({json.dumps([row[key] for key in keys]): row for row in rows}.values())
