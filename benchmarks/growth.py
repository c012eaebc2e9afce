"""How the cost of `comp train` grows with rows, evaluations and folds: a table and a plot.

    python benchmarks/growth.py                # about twenty minutes on two quiet cores
    python benchmarks/growth.py --rounds 1     # a quick look

MiniLM on CLEAR, one epoch in batches of 16. From 300 training rows, 100 held out, 5 evaluations and one fold, each is
doubled and doubled again by itself; a measurement has a process of its own, imports not counted. The rounds alternate,
and a ratio is against the same round's first. A row is written as it finishes, one that is there is skipped (--again).
Writes benchmarks/results/growth.{jsonl,md,png}.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from train_speed import BACKBONE, BATCH, DATA, MAX_LENGTH, RESULTS, device_name

START = {"rows": 300, "evaluations": 5, "folds": 1}
HELD_OUT, FOLDS = 100, 4
FILE = RESULTS / "growth.jsonl"
REASONS = {
    "rows": "twice the rows are twice the steps; the evaluations, loading and reading stay as they are",
    "evaluations": "only the scoring of the held-out rows grows, and the writing of weights that are better",
    "folds": "every fold trains anew; the table, its tokens, the imports and the warm-up are shared",
}


def sizes() -> list[dict[str, int]]:
    return [START] + [{**START, name: START[name] * factor} for name in START for factor in (2, 4)]


def measure(size: dict[str, int]) -> float:
    """Train as `size` says in this process; return the seconds."""
    import pandas as pd

    from comp import config_file
    from comp.training import crossval

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    total = size["rows"] + HELD_OUT
    frame = pd.read_csv(DATA).sort_values(["target", "id"])
    places = [round(i * (len(frame) - 1) / (total - 1)) for i in range(total)]
    frame = frame.iloc[places].sample(frac=1, random_state=1).reset_index(drop=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        frame["fold"] = [min(row // HELD_OUT, FOLDS - 1) for row in range(total)]
        frame.to_csv("train.csv", index=False)
        Path("growth.yaml").write_text(
            json.dumps(
                {
                    "competition": {"name": "growth", "train": "train.csv", "id": "id", "text": "excerpt"},
                    "tasks": [{"name": "main", "kind": "regression", "targets": ["target"], "loss": {"name": "mse"}}],
                    "metric": "rmse",
                    "folds": {"splitter": "column", "column": "fold", "num_folds": FOLDS},
                    "model": {"backbone": BACKBONE, "max_length": MAX_LENGTH, "dropout": 0.0},
                    "optimizer": {"name": "adamw", "lr": 1e-4, "head_lr": 1e-3},
                    "training": {"epochs": 1, "batch_size": BATCH},
                    "evaluation": {"every": f"{100 / size['evaluations']:g}%"},
                    "tracking": {"wandb": "off"},
                }
            )
        )
        wanted = ",".join(str(fold) for fold in range(size["folds"]))
        started = time.perf_counter()
        crossval.run(config_file.load("growth.yaml"), "growth", wanted, save_every="never")
        seconds = time.perf_counter() - started
        os.chdir("/")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--again", action="store_true", help="forget the rows that are there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(f"\n{measure(json.loads(options.one)):.3f}")
        return
    if options.again:
        FILE.unlink(missing_ok=True)
    rows = read_rows()
    for number in range(options.rounds):
        for size in sizes():
            if any(row["round"] == number and row["size"] == size for row in rows):
                continue
            found = subprocess.run(
                [sys.executable, __file__, "--one", json.dumps(size)], capture_output=True, text=True
            )
            if found.returncode:
                sys.exit(found.stderr[-3000:])
            rows.append(
                {
                    "round": number,
                    "size": size,
                    "seconds": float(found.stdout.strip().splitlines()[-1]),
                    "device": device_name(),
                }
            )
            with open(FILE, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(rows[-1]) + "\n")
            print(f"round {number + 1}: {size}: {rows[-1]['seconds']:.1f} s", flush=True)
    report(rows)


def read_rows() -> list[dict[str, Any]]:
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    return [json.loads(line) for line in lines if line.strip()]


def report(rows: list[dict[str, Any]]) -> None:
    """Write the table and the plot."""
    rounds = sorted({row["round"] for row in rows})
    took = {(row["round"], json.dumps(row["size"])): row["seconds"] for row in rows}
    base = json.dumps(START)

    def ratios(name: str, factor: int) -> list[float]:
        size = json.dumps({**START, name: START[name] * factor})
        return [took[number, size] / took[number, base] for number in rounds if (number, size) in took]

    grown = {name: [ratios(name, factor) for factor in (2, 4)] for name in START}
    lines = [
        "# How the cost grows",
        "",
        f"`python benchmarks/growth.py` on {rows[0]['device']}: MiniLM on CLEAR, one epoch, from {START['rows']} rows,",
        f"{HELD_OUT} held out, {START['evaluations']} evaluations, one fold. Time over that of the first size, median",
        f"of {len(rounds)} rounds and range.",
        "",
        "| what | x2 | x4 | why |",
        "|---|---|---|---|",
    ]
    for name, pair in grown.items():
        cells = [f"{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})" for own in pair]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {REASONS[name]} |")
    (RESULTS / "growth.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    plot(grown)


def plot(grown: dict[str, list[list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, pair in grown.items():
        middle = [1.0] + [statistics.median(own) for own in pair]
        low, high = [1.0] + [min(own) for own in pair], [1.0] + [max(own) for own in pair]
        axes.plot([1, 2, 4], middle, marker="o", label=name)
        axes.fill_between([1, 2, 4], low, high, alpha=0.15)
    axes.plot([1, 2, 4], [1, 2, 4], color="grey", linestyle=":", label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel="times as many", ylabel="times the first size's time")
    axes.set_xticks([1, 2, 4], ["1", "2", "4"])
    axes.set_yticks([1, 2, 3, 4], ["1", "2", "3", "4"])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(RESULTS / "growth.png", dpi=120)


if __name__ == "__main__":
    if not DATA.exists():
        sys.exit(f"{DATA} not found: the benchmark needs the CLEAR corpus in Kaggle's CommonLit format")
    main()
