"""What evaluations cost a run, and what deciding them early saves: MiniLM on CLEAR, one fold, alternating.

    python benchmarks/eval_cost.py                             # 10 seeds of 1,000 rows: over an hour on two cores
    python benchmarks/eval_cost.py --rows 60 --seeds 1 --try   # does it work? writes no result

For each seed the same fold (a fifth of the rows held out) is trained with a single evaluation at the end (none), and
with 20 evaluations an epoch by evaluation.decide full, exact and race, and by a race with evaluation.race_percent.
Their order changes from seed to seed, so that a drift of the machine's speed favours none. Time is that of training
steps and evaluations, the writing of the best weights included; of `none` that of the steps alone. Every finished run
is appended to benchmarks/results/eval_cost.jsonl, and skipped when it is there already; the table goes to eval_cost.md.
Since exact keeps the very weights of full, `--exact-seeds` trains it for the first seeds only.
Goals: 20 evaluations an epoch add at most 25% to the time of none, and what is kept scores within 0.1% of what full
keeps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from finished_run import CONFIG, ROOT

from comp import config_file
from comp.runs import RunFolder, read_json
from comp.runtime import open_runtime
from comp.training import crossval

TRAIN = ROOT.parent / "shared" / "data" / "clear" / "train.csv"
RESULTS = ROOT / "benchmarks" / "results"
WAYS = ("none", "full", "exact", "race", "race, capped")
KEY = ("way", "seed", "rows", "epochs", "every", "error_rate", "race_percent", "machine")
GOALS = 0.25, 0.001
Row = dict[str, Any]


def settings(way: str, options: argparse.Namespace, seed: int) -> Row:
    """Return what a measurement is named by."""
    return {
        "way": way,
        "seed": seed,
        "rows": options.rows,
        "epochs": options.epochs,
        "every": None if way == "none" else options.every,
        "error_rate": options.error_rate if way.startswith("race") else None,
        "race_percent": options.race_percent if way == "race, capped" else None,
        "machine": open_runtime().describe(),
    }


def measure(chosen: Row) -> Row:
    """Train fold 0 in the present folder; return the settings with seconds and scores."""
    overrides = [
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
        config_file.load(CONFIG, overrides), name, "0", restart=True, save_every="never", say=lambda line: None
    )
    done = read_json(RunFolder(Path("runs") / name).fold(0).done)
    kept = ("train_seconds", "eval_seconds", "evaluations", "rows_scored", "best", "best_step", "last")
    return {**chosen, **{key: done[key] for key in kept}}


def seconds(row: Row) -> float:
    return float(row["train_seconds"] + (0 if row["way"] == "none" else row["eval_seconds"]))


def table(rows: Sequence[Row]) -> list[str]:
    """Return the lines of the report: each way against `none` and `full` of the same seed."""
    found = {(row["way"], row["seed"]): row for row in rows}
    seeds = sorted({seed for way, seed in found if all((other, seed) in found for other in WAYS if other != "exact")})
    if not seeds:
        return ["No seed has all ways yet."]
    lines = [
        "| evaluation.decide | seeds | rows scored | time / none: median (range) | kept RMSE, mean | from full: mean | "
        "largest, worse |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in WAYS:
        own = [found[way, seed] for seed in seeds if (way, seed) in found]
        if not own:
            continue
        ratios = [seconds(row) / seconds(found["none", row["seed"]]) for row in own]
        apart = [row["best"] / found["full", row["seed"]]["best"] - 1 for row in own]
        lines.append(
            f"| {way} | {len(own)} | {statistics.mean(row['rows_scored'] for row in own):.0%} "
            f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) "
            f"| {statistics.mean(row['best'] for row in own):.5f} "
            f"| {statistics.mean(apart):+.3%} | {max(apart):+.3%} |"
        )
    return [*lines, "", f"Seeds {', '.join(map(str, seeds))}."]


def report(rows: Sequence[Row], chosen: Row) -> list[str]:
    """Return the page: what was measured, the table, the goals."""
    command = f"python benchmarks/eval_cost.py --rows {chosen['rows']} --epochs {chosen['epochs']}"
    held = chosen["rows"] // 5
    return [
        "# What evaluations cost",
        "",
        f"`{command}` on {chosen['machine']}: MiniLM on",
        f"{chosen['rows']:,} rows of CLEAR, {held} of them held out, epochs: {chosen['epochs']}; 20 evaluations each;",
        "none = one evaluation at the end, whose time is left out. The capped race goes by the estimate after a",
        "quarter of the rows.",
        "",
        *table(rows),
        "",
        f"Goals: at most {1 + GOALS[0]:.2f} times as long as none, and a kept score within {GOALS[1]:.1%} of full's.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="of CLEAR's training rows, drawn once")
    parser.add_argument("--seeds", type=int, default=10, help="0 to this number less one")
    parser.add_argument("--exact-seeds", type=int, default=2, help="of them with evaluation.decide exact")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--every", default="5%")
    parser.add_argument("--error-rate", type=float, default=0.05, help="of the races")
    parser.add_argument("--race-percent", type=float, default=25, help="of the capped race")
    parser.add_argument("--try", dest="trial", action="store_true", help="print only, write no result")
    options = parser.parse_args()
    file = RESULTS / "eval_cost.jsonl"
    there = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() and not options.trial else []
    frame = pd.read_csv(TRAIN, dtype=str, keep_default_na=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        frame.sample(min(options.rows, len(frame)), random_state=1).to_csv("train.csv", index=False)
        measure(settings("none", argparse.Namespace(**{**vars(options), "epochs": 1}), 0))  # warm-up, and the caches
        for seed in range(options.seeds):
            for place in range(len(WAYS)):
                way = WAYS[(seed + place) % len(WAYS)]
                if way == "exact" and seed >= options.exact_seeds:
                    continue
                chosen = settings(way, options, seed)
                known = next((row for row in there if all(row[key] == chosen[key] for key in KEY)), None)
                rows.append(known or measure(chosen))
                if known is None and not options.trial:
                    RESULTS.mkdir(exist_ok=True)
                    with file.open("a", encoding="utf-8") as out:
                        out.write(json.dumps(rows[-1]) + "\n")
                print(
                    f"{chosen['way']:<12} seed {seed}: {seconds(rows[-1]):.1f} s, kept {rows[-1]['best']:.5f}",
                    flush=True,
                )
        os.chdir("/")
    lines = report(rows, settings("none", options, 0))
    print("\n".join(lines))
    if not options.trial:
        (RESULTS / "eval_cost.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    assert TRAIN.exists(), f"{TRAIN} is not there"
    main()
