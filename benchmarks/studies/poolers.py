"""Which pooler is best? 600 rows of CLEAR, MiniLM, 3 folds, 2 seeds, 2 epochs of 128 tokens, 5 evaluations an epoch.

    python benchmarks/studies/poolers.py              # about 90 minutes of two cores; rows that are there are skipped
    python benchmarks/studies/poolers.py --report     # table and picture from the rows there are

Every row of benchmarks/results/poolers.jsonl is one trained fold, written as it finishes: a stop loses nothing. The
table is benchmarks/results/poolers.md, the picture poolers.png. Each fold is trained by comp's own cross-validation
with the settings of configs/clear-minilm.yaml but for what SETTINGS says; only the pooler and the seed change.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = RESULTS / "poolers.jsonl"
DATA = ROOT.parent / "shared" / "data" / "clear" / "train.csv"
WORK = Path(tempfile.gettempdir()) / "comp-study-poolers"
COMMAND = "python benchmarks/studies/poolers.py"

NUM_ROWS, SEEDS, FOLDS = 600, (1, 2), 3
SETTINGS = [
    "competition.name=clear600",
    f"competition.train={WORK / 'train.csv'}",
    "competition.test=null",
    "competition.sample_submission=null",
    f"folds.num_folds={FOLDS}",
    "folds.seed=1",
    "model.max_length=128",
    "training.epochs=2",
    "evaluation.every=20%",
    "evaluation.start_percent=0",
    "tracking.wandb=off",
]
BASELINE = "mean"
AT_A_TIME = 24  # jobs of one set of processes: what their memory gathers is given back (max_tasks_per_child deadlocks)
# Beyond the catalogue's defaults; two_tower is left out, since CLEAR has one text column.
VARIANTS: dict[str, dict[str, Any]] = {
    "cls, layer -2": {"name": "cls", "layer": -2},
    "weighted_layers of cls": {"name": "weighted_layers", "tokens": "cls"},
    "sbert_wk, paper": {"name": "sbert_wk", "windows": "paper"},
    "dense on mean_max": {"name": "dense", "of": {"name": "mean_max"}},
}
Row = dict[str, Any]


def poolers(variants: bool) -> dict[str, dict[str, Any]]:
    """Return label -> pooler section: the baseline, the rest of the catalogue, the variants if asked for."""
    from comp.model.pooling import POOLERS

    names = [BASELINE, *(name for name in POOLERS if name not in (BASELINE, "two_tower"))]
    return {name: {"name": name} for name in names} | (VARIANTS if variants else {})


# --- training --------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Write the 600 rows, spread evenly over the sorted target, and their folds, into a folder outside the project."""
    import pandas as pd

    from comp import config_file
    from comp.data.folds import get_or_make_folds
    from comp.data.tables import read_competition

    if not DATA.exists():
        sys.exit(f"{DATA} not found: the study needs the CLEAR corpus in Kaggle's CommonLit format")
    frame = pd.read_csv(DATA)
    places = [round(i * (len(frame) - 1) / (NUM_ROWS - 1)) for i in range(NUM_ROWS)]
    WORK.mkdir(parents=True, exist_ok=True)
    frame.sort_values(["target", "id"]).iloc[places].sample(frac=1, random_state=1).to_csv(
        WORK / "train.csv", index=False
    )
    os.chdir(WORK)
    config = config_file.load(ROOT / "configs" / "clear-minilm.yaml", SETTINGS)
    table, _, _ = read_competition(config.competition, config.tasks)
    get_or_make_folds(Path("folds/clear600.csv"), table, config.tasks, config.folds)


def train(label: str, section: dict[str, Any], seed: int, fold: int) -> Row | str:
    """Train one fold in a worker process; return its row, or the reason why the pooler was refused."""
    import numpy as np
    import pandas as pd

    from comp import config_file
    from comp.runs import RunFolder, commit, read_json, versions
    from comp.training import crossval

    os.chdir(WORK)
    name = f"{label}-{seed}-{fold}".replace(" ", "").replace(",", "-")
    overrides = [*SETTINGS, f"training.seed={seed}", f"model.pooler={json.dumps(section)}"]
    folder = RunFolder(Path("runs") / name)
    shutil.rmtree(folder.path, ignore_errors=True)
    try:
        config = config_file.load(ROOT / "configs" / "clear-minilm.yaml", overrides)
        crossval.run(config, name, str(fold), say=lambda line: None)
    except ValueError as refusal:
        return str(refusal)
    frame = pd.read_parquet(folder.fold(fold).oof)
    done = read_json(folder.fold(fold).done)
    target = frame.filter(like="target_").to_numpy(np.float64)
    squared = {
        k: float(((frame.filter(like=f"{k}_readability") - target) ** 2).to_numpy().sum()) for k in ("pred", "last")
    }
    shutil.rmtree(folder.path)
    return {
        "pooler": label,
        "section": section,
        "seed": seed,
        "fold": fold,
        "rows": len(frame),
        "squared_best": squared["pred"],
        "squared_last": squared["last"],
        "best_step": done["best_step"],
        "steps": done["steps"],
        "seconds": done["seconds"],
        "commit": commit(),
        "versions": {key: versions()[key] for key in ("torch", "transformers")},
    }


def run(jobs: int, variants: bool) -> None:
    """Train what is missing, all poolers with the first seed before the second."""
    prepare()
    chosen = poolers(variants)
    known = {(row["pooler"], row["seed"], row["fold"]) for row in read_rows()}
    todo = [(label, seed, fold) for seed in SEEDS for label in chosen for fold in range(FOLDS)]
    todo = [job for job in todo if job not in known]
    print(f"{len(known)} rows are there, {len(todo)} to train, {jobs} at a time", flush=True)
    context = get_context("spawn")
    for start in range(0, len(todo), AT_A_TIME):
        part = todo[start : start + AT_A_TIME]
        with ProcessPoolExecutor(jobs, mp_context=context, initializer=one_thread) as pool:
            futures = [pool.submit(train, label, chosen[label], seed, fold) for label, seed, fold in part]
            for future in as_completed(futures):
                note(future.result())


def note(row: Row | str) -> None:
    """Append a row, or say why there is none."""
    if isinstance(row, str):
        print(f"refused: {row}", flush=True)
        return
    RESULTS.mkdir(exist_ok=True)
    with open(ROWS, "a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")
    score = (row["squared_best"] / row["rows"]) ** 0.5
    where = f"{row['pooler']} seed {row['seed']} fold {row['fold']}"
    print(f"{where}: RMSE {score:.4f}, {row['seconds']:.0f} s", flush=True)


def one_thread() -> None:
    """Give a worker one thread (two processes of one thread train more than one of two) and no progress lines."""
    import torch

    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives


# --- the report ------------------------------------------------------------------------------------------------------


def read_rows(file: Path = ROWS) -> list[Row]:
    """Return the finished rows, the latest of each (pooler, seed, fold)."""
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({(row["pooler"], row["seed"], row["fold"]): row for row in rows}.values())


def rmse(rows: Iterable[Row], kind: str) -> float:
    """Return the RMSE over all rows of the given folds together. `kind`: best | last."""
    rows = list(rows)
    return float((sum(row[f"squared_{kind}"] for row in rows) / sum(row["rows"] for row in rows)) ** 0.5)


def summary(rows: list[Row]) -> list[Row]:
    """Return one line per pooler, best first: RMSE, spread, difference from the baseline, cost.

    `best`, `last`: pooled RMSE of each seed's folds, mean over seeds. `spread`: standard deviation over seed x fold.
    `gain`: mean over the (seed, fold) both have of baseline - pooler, by the best checkpoint; `error` its standard
    error (None for fewer than two). `cost`: median seconds relative to the baseline's.
    """
    import numpy as np

    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["pooler"], []).append(row)
    base = {(row["seed"], row["fold"]): row for row in by_label.get(BASELINE, [])}
    lines = []
    for label, own in by_label.items():
        seeds = sorted({row["seed"] for row in own})
        folds = [rmse([row], "best") for row in own]
        gains = [
            rmse([base[key]], "best") - rmse([row], "best")
            for row in own
            if (key := (row["seed"], row["fold"])) in base
        ]
        known = len(gains) > 1 and label != BASELINE
        lines.append(
            {
                "pooler": label,
                "folds": folds,
                "best": float(np.mean([rmse([r for r in own if r["seed"] == seed], "best") for seed in seeds])),
                "last": float(np.mean([rmse([r for r in own if r["seed"] == seed], "last") for seed in seeds])),
                "spread": float(np.std(folds, ddof=1)) if len(folds) > 1 else 0.0,
                "gain": float(np.mean(gains)) if gains else 0.0,
                "error": float(np.std(gains, ddof=1) / len(gains) ** 0.5) if known else None,
                "cost": float(
                    np.median([r["seconds"] for r in own]) / np.median([r["seconds"] for r in base.values()])
                ),
            }
        )
    return sorted(lines, key=lambda line: line["best"])


def table(rows: list[Row]) -> str:
    """Return the Markdown page."""
    lines = [
        "# Poolers on 600 rows of CLEAR",
        "",
        f"`{COMMAND}`: MiniLM, {FOLDS} folds x {len(SEEDS)} seeds, 2 epochs of 400 texts of at most 128 tokens, 5",
        "evaluations an epoch, default options of each pooler. RMSE by the best checkpoint flatters (it is chosen on",
        "the rows it is scored on), by the last does not. Gain: how much lower than `mean` on the same seed and fold,",
        "with its standard error over them; a gain under about two errors is noise. Cost: seconds relative to `mean`.",
        "",
        "| pooler | folds | RMSE best | RMSE last | spread | gain over mean | cost |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in summary(rows):
        gain = "" if line["error"] is None else f"{line['gain']:+.4f} ± {line['error']:.4f}"
        lines.append(
            f"| {line['pooler']} | {len(line['folds'])} | {line['best']:.4f} | {line['last']:.4f} | "
            f"{line['spread']:.4f} | {gain} | {line['cost']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], file: Path) -> None:
    """Draw one line of dots per pooler: the difference from `mean` on the same seed and fold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = summary(rows)
    base = {(row["seed"], row["fold"]): rmse([row], "best") for row in rows if row["pooler"] == BASELINE}
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(lines) + 1.6), layout="constrained")
    colours = dict(zip(SEEDS, ("tab:blue", "tab:orange"), strict=True))
    for place, line in enumerate(lines):
        for row in rows:
            key = row["seed"], row["fold"]
            if row["pooler"] == line["pooler"] and key in base:
                axes.plot(rmse([row], "best") - base[key], place, "o", ms=4, alpha=0.6, color=colours[row["seed"]])
        if line["error"] is not None:
            axes.errorbar(
                -line["gain"], place, xerr=2 * line["error"], fmt="|", color="black", ms=10, capsize=3, elinewidth=1
            )
    axes.axvline(0, color="grey", lw=1)
    axes.set_yticks(range(len(lines)), [f"{line['pooler']}  {line['best']:.3f}" for line in lines])
    axes.invert_yaxis()
    axes.set_xlabel("RMSE minus that of mean pooling on the same seed and fold (left is better)")
    axes.set_title("Poolers on 600 rows of CLEAR: each dot a fold, bars two standard errors", fontsize=10)
    for seed, colour in colours.items():
        axes.plot([], [], "o", ms=4, color=colour, label=f"seed {seed}")
    axes.legend(loc="lower right", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="folds trained at a time, one thread each")
    parser.add_argument("--variants", action="store_true", help="also the non-default options in VARIANTS")
    parser.add_argument("--report", action="store_true", help="only write table and picture")
    options = parser.parse_args()
    if not options.report:
        run(options.jobs, options.variants)
    rows = read_rows()
    if not any(row["pooler"] == BASELINE for row in rows):
        sys.exit(f"no rows of '{BASELINE}' in {ROWS}; run `{COMMAND}` first")
    (RESULTS / "poolers.md").write_text(table(rows), encoding="utf-8")
    picture(rows, RESULTS / "poolers.png")
    print(f"wrote {RESULTS / 'poolers.md'} and poolers.png")


if __name__ == "__main__":
    main()
