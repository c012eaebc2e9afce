"""What evaluations cost a run, and what deciding them early saves: MiniLM, one fold, 20 evaluations an epoch.

    python benchmarks/eval_cost.py                             # 10 seeds of each data set: hours on two cores
    python benchmarks/eval_cost.py --data CLEAR --rows 60 --seeds 1 --try     # does it work? writes no result

On all 2,834 rows of CLEAR's train.csv (a fifth, 567 rows, held out), on 1,000 of them, and on all 8,530 of Rotten
Tomatoes (1,706 held out). For each seed the same fold is trained with a single evaluation at the end (none), and with
20 evaluations by evaluation.decide full, exact and race, and by a race with evaluation.race_percent: 5, but 25 on the
1,000 rows. Their order changes from seed to seed. Time is that of training steps and evaluations, the writing of the
best weights included, over that of the steps of the same run, so that a drift of the machine's speed favours no way;
that an evaluation leaves the steps as fast as they are, those of none show. Every finished run is appended to
benchmarks/results/eval_cost.jsonl, and skipped when it is there already; the tables go to eval_cost.md. exact, which
keeps the very weights of full, none and the race without a cap are trained for the first seeds only (--few-seeds).
Goals: 20 evaluations an epoch add at most 25% to the time of the steps, and what is kept scores within 0.1% of what
full keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from finished_run import ROOT
from goals import Goal, note

from comp import config_file
from comp.runs import RunFolder, read_json
from comp.runtime import open_runtime
from comp.ship.demo import find_reviews, read_reviews
from comp.training import crossval

TRAIN = ROOT.parent / "shared" / "data" / "clear" / "train.csv"
RESULTS = ROOT / "benchmarks" / "results"
WAYS = ("none", "full", "exact", "race", "race, capped")
KEY = ("data", "way", "seed", "rows", "epochs", "every", "error_rate", "race_percent", "machine")
GOALS = 0.25, 0.001
FEW = "none", "exact", "race"  # trained for some of the seeds only
Row = dict[str, Any]


@dataclass(frozen=True)
class Data:
    """Whose rows are trained on."""

    config: str
    overrides: tuple[str, ...]
    metric: str
    rows: int
    race_percent: float


DATA = {
    "CLEAR, all rows": Data("clear-minilm.yaml", (), "RMSE", 2834, 5),
    "CLEAR": Data("clear-minilm.yaml", (), "RMSE", 1000, 25),
    "Rotten Tomatoes": Data(
        "demo.yaml", ("metric=log_loss", "folds.num_folds=5", "optimizer.lr=2e-5"), "log loss", 8530, 5
    ),
}


def table_of(name: str, rows: int) -> pd.DataFrame:
    """Return so many training rows, drawn once."""
    if name.startswith("CLEAR"):
        frame = pd.read_csv(TRAIN, dtype=str, keep_default_na=False)
    else:
        texts, labels = zip(*read_reviews(find_reviews()), strict=True)
        frame = pd.DataFrame({"id": range(len(texts)), "text": texts, "label": labels})
    return frame.sample(min(rows, len(frame)), random_state=1)


def settings(name: str, way: str, options: argparse.Namespace, seed: int) -> Row:
    """Return what a measurement is named by."""
    return {
        "data": name,
        "way": way,
        "seed": seed,
        "rows": options.rows or DATA[name].rows,
        "epochs": options.epochs,
        "every": None if way == "none" else options.every,
        "error_rate": options.error_rate if way.startswith("race") else None,
        "race_percent": (options.race_percent or DATA[name].race_percent) if way == "race, capped" else None,
        "machine": open_runtime().describe(),
    }


def measure(chosen: Row) -> Row:
    """Train fold 0 in the present folder; return the settings with seconds and scores."""
    data = DATA[chosen["data"]]
    overrides = [
        *data.overrides,
        "competition.train=train.csv",
        "competition.test=null",
        "competition.sample_submission=null",
        f"training.epochs={chosen['epochs']}",
        f"training.seed={chosen['seed']}",
        "evaluation.start_percent=0",
        f"evaluation.every={chosen['every'] or 'null'}",
        f"evaluation.decide={'full' if chosen['way'] == 'none' else chosen['way'].split(',')[0]}",
        f"evaluation.error_rate={'null' if chosen['error_rate'] is None else chosen['error_rate']}",
        f"evaluation.race_percent={'null' if chosen['race_percent'] is None else chosen['race_percent']}",
        "tracking.wandb=off",
    ]
    name = f"{chosen['way'].replace(', ', '-')}-{chosen['seed']}"
    crossval.run(
        config_file.load(ROOT / "configs" / data.config, overrides),
        name,
        "0",
        restart=True,
        save_every="never",
        say=lambda line: None,
    )
    done = read_json(RunFolder(Path("runs") / name).fold(0).done)
    kept = ("train_seconds", "eval_seconds", "evaluations", "rows_scored", "best", "best_step", "last")
    return {**chosen, **{key: done[key] for key in kept}}


def seconds(row: Row) -> float:
    return float(row["train_seconds"] + (0 if row["way"] == "none" else row["eval_seconds"]))


def slower(row: Row) -> float:
    """Return the time of steps and evaluations over that of the steps."""
    return seconds(row) / float(row["train_seconds"])


def compared(rows: Sequence[Row]) -> dict[str, tuple[list[Row], list[float], list[float]]]:
    """Return by way its rows, their time over that without evaluations, and their score over that of `full`, less 1."""
    found = {(row["way"], row["seed"]): row for row in rows}
    seeds = sorted({seed for way, seed in found if all((other, seed) in found for other in WAYS if other not in FEW)})
    ways = {}
    for way in WAYS:
        own = [found[way, seed] for seed in seeds if (way, seed) in found]
        if own:
            ways[way] = (
                own,
                [slower(row) for row in own],
                [row["best"] / found["full", row["seed"]]["best"] - 1 for row in own],
            )
    return ways


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the report: each way against its own steps, and against `full` of the same seed."""
    lines = [
        "| evaluation.decide | seeds | rows scored | time / without: median (range) | kept score, mean "
        "| from full: mean | largest, worse |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, (own, ratios, apart) in compared(rows).items():
        lines.append(
            f"| {way} | {len(own)} | {statistics.mean(row['rows_scored'] for row in own):.0%} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
            f"| {statistics.mean(row['best'] for row in own):.5f} "
            f"| {statistics.mean(apart):+.3%} | {max(apart):+.3%} |"
        )
    return lines


def goals_of(name: str, rows: Sequence[Row]) -> list[Goal]:
    """Return how a capped race does by the goals."""
    if "race, capped" not in (ways := compared(rows)):
        return []
    _, ratios, apart = ways["race, capped"]
    what = f"20 evaluations an epoch by a capped race, {name} ({len(ratios)} {'seed' if len(ratios) == 1 else 'seeds'})"
    score = 100 * statistics.mean(apart)
    return [
        Goal(f"{what}: time / without", statistics.median(ratios), "at most", 1 + GOALS[0]),
        Goal(f"{what}: score kept, worse than full's by", score, "at most", 100 * GOALS[1], "percent"),
    ]


def section(name: str, rows: Sequence[Row], chosen: Row) -> list[str]:
    """Return what was measured on a data set: of `chosen`, a capped race, and all `rows` like it."""
    held = -(-chosen["rows"] // 5)
    return [
        "",
        f"## {name}",
        "",
        f"{chosen['rows']:,} rows, {held:,} of them held out; {DATA[name].metric}; the capped race goes by the",
        f"estimate after {chosen['race_percent']:g}% of the rows, or the first 40.",
        "",
        *table(rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATA), help="this data set only")
    parser.add_argument("--rows", type=int, help="of the training rows, drawn once")
    parser.add_argument("--seeds", type=int, default=10, help="0 to this number less one")
    parser.add_argument("--few-seeds", type=int, default=2, help="of them by none, exact and a race without a cap")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--every", default="5%")
    parser.add_argument("--error-rate", type=float, default=0.05, help="of the races")
    parser.add_argument("--race-percent", type=float, help="of the capped race")
    parser.add_argument("--try", dest="trial", action="store_true", help="print only, write no result")
    options = parser.parse_args()
    file = RESULTS / "eval_cost.jsonl"
    there = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() and not options.trial else []
    for name in [options.data] if options.data else DATA:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            table_of(name, options.rows or DATA[name].rows).to_csv("train.csv", index=False)
            train(name, options, file, there)
            os.chdir("/")
    lines = [
        "# What evaluations cost",
        "",
        f"`python benchmarks/eval_cost.py` on {open_runtime().describe()}: MiniLM, epochs: {options.epochs}, 20",
        "evaluations each; none = one evaluation at the end, whose time is left out. Without = the steps alone.",
    ]
    goals: list[Goal] = []
    for name in DATA:
        chosen = settings(name, "race, capped", options, 0)
        alike = [row for row in there if all(row[key] == chosen[key] for key in ("data", "rows", "epochs", "machine"))]
        if rows := [row for row in alike if row["race_percent"] in (None, chosen["race_percent"])]:
            lines += section(name, rows, chosen)
            goals += goals_of(name, rows)
    goal = (
        f"Goals: at most {1 + GOALS[0]:.2f} times as long as without, and a kept score within {GOALS[1]:.1%} of full's."
    )
    lines += ["", goal]
    print("\n".join(lines))
    if not options.trial:
        (RESULTS / "eval_cost.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        note("eval_cost.py", open_runtime().describe(), goals)


def train(name: str, options: argparse.Namespace, file: Path, there: list[Row]) -> None:
    """Add to the rows that are `there` those that are missing, and append them to `file`."""
    for seed in range(options.seeds):
        for place in range(len(WAYS)):
            way = WAYS[(seed + place) % len(WAYS)]
            chosen = settings(name, way, options, seed)
            known = any(all(row[key] == chosen[key] for key in KEY) for row in there)
            if known or (way in FEW and seed >= options.few_seeds):
                continue
            if not Path("runs").exists():
                measure(settings(name, "none", options, 0))  # warm-up, and the caches
            row = measure(chosen)
            there.append(row)
            if not options.trial:
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
            print(f"{name}, {way:<12} seed {seed}: {seconds(row):.1f} s, kept {row['best']:.5f}", flush=True)


if __name__ == "__main__":
    assert TRAIN.exists(), f"{TRAIN} is not there"
    main()
