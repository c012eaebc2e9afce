"""What the studies share: 600 rows of CLEAR, MiniLM, 3 folds, 2 seeds, 2 epochs of 128 tokens, 5 evaluations an epoch.

A study compares variants (label -> overrides of configs/clear-minilm.yaml). Every fold is trained by comp's own
cross-validation and its row appended to a .jsonl file as it finishes; rows that are there are skipped, so a stop loses
nothing. The report pairs each variant with the baseline on the same seed and fold.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comp.runs import RunFolder

from rows import RESULTS, ROOT, WORK, Row, read_rows, spread_rows, train_all

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
KEYS = ("variant", "seed", "fold")


@dataclass(frozen=True)
class Study:
    """What is compared, against what, and where the answer goes."""

    name: str
    """Stem of the files in benchmarks/results/."""
    title: str
    what: str
    """Heading of the first column."""
    baseline: str
    variants: Mapping[str, Sequence[str]]
    """Label -> overrides."""

    @property
    def rows(self) -> Path:
        return RESULTS / f"{self.name}.jsonl"

    @property
    def command(self) -> str:
        return f"python benchmarks/studies/{self.name}.py"


# --- training --------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Write the 600 rows, spread evenly over the sorted target, and their folds, into a folder outside the project."""
    from comp import config_file
    from comp.data.folds import get_or_make_folds
    from comp.data.tables import read_competition

    WORK.mkdir(parents=True, exist_ok=True)
    spread_rows(NUM_ROWS).to_csv(WORK / "train.csv", index=False)
    os.chdir(WORK)
    config = config_file.load(ROOT / "configs" / "clear-minilm.yaml", SETTINGS)
    table, _ = read_competition(config.competition, config.tasks)
    get_or_make_folds(Path("folds/clear600.csv"), table, config.tasks, config.folds)


def train(label: str, variant: Sequence[str], seed: int, fold: int) -> Row | str:
    """Train one fold in a worker process; return its row, or the reason why the variant was refused."""
    from comp import config_file
    from comp.runs import RunFolder
    from comp.training import crossval

    os.chdir(WORK)
    name = f"{label}-{seed}-{fold}".replace(" ", "").replace(",", "-")
    overrides = [*SETTINGS, f"training.seed={seed}", *variant]
    folder = RunFolder(Path("runs") / name)
    shutil.rmtree(folder.path, ignore_errors=True)
    try:
        config = config_file.load(ROOT / "configs" / "clear-minilm.yaml", overrides)
        crossval.run(config, name, str(fold), save_every="never", say=lambda line: None)
    except ValueError as refusal:
        return f"{label}: {refusal}"
    row = row_of(folder, label, variant, seed, fold)
    shutil.rmtree(folder.path)
    return row


def row_of(folder: RunFolder, label: str, variant: Sequence[str], seed: int, fold: int) -> Row:
    """Return the row of a finished fold; its scores are of the first task."""
    import numpy as np
    import pandas as pd

    from comp.runs import commit, read_json, versions

    frame = pd.read_parquet(folder.fold(fold).oof)
    done = read_json(folder.fold(fold).done)
    target = frame["target_readability_target"].to_numpy(np.float64)
    squared = {k: float(((frame[f"{k}_readability_target"] - target) ** 2).sum()) for k in ("pred", "last")}
    return {
        "variant": label,
        "overrides": list(variant),
        "seed": seed,
        "fold": fold,
        "rows": len(frame),
        "squared_best": squared["pred"],
        "squared_last": squared["last"],
        "best_step": done["best_step"],
        "steps": done["steps"],
        "seconds": done["seconds"],
        "commit": commit(ROOT / "comp"),
        "versions": {key: versions()[key] for key in ("torch", "transformers")},
    }


def run(study: Study, jobs: int) -> None:
    """Train what is missing, all variants with the first seed before the second."""
    prepare()
    chosen = study.variants
    known = {tuple(row[key] for key in KEYS) for row in read_rows(study.rows, *KEYS)}
    todo = [(label, seed, fold) for seed in SEEDS for label in chosen for fold in range(FOLDS)]
    todo = [job for job in todo if job not in known]
    print(f"{len(known)} rows are there, {len(todo)} to train, {jobs} at a time", flush=True)
    full = [(label, chosen[label], seed, fold) for label, seed, fold in todo]
    train_all(train, full, study.rows, jobs=jobs, describe=describe)


def describe(row: Row) -> str:
    """Return the line that is printed when a row is there."""
    score = (row["squared_best"] / row["rows"]) ** 0.5
    return f"{row['variant']} seed {row['seed']} fold {row['fold']}: RMSE {score:.4f}, {row['seconds']:.0f} s"


# --- the report ------------------------------------------------------------------------------------------------------


def rmse(rows: Iterable[Row], kind: str) -> float:
    """Return the RMSE over all rows of the given folds together. `kind`: best | last."""
    rows = list(rows)
    return float((sum(row[f"squared_{kind}"] for row in rows) / sum(row["rows"] for row in rows)) ** 0.5)


def summary(study: Study, rows: list[Row]) -> list[Row]:
    """Return one line per variant, best first: RMSE, spread, difference from the baseline.

    `best`, `last`: pooled RMSE of each seed's folds, mean over seeds. `spread`: standard deviation over seed x fold, by
    the best checkpoint. `gain_best`, `gain_last`: mean over the (seed, fold) both have of baseline - variant;
    `error_...` its standard error (None for fewer than two).
    """
    import numpy as np

    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["variant"], []).append(row)
    base = {(row["seed"], row["fold"]): row for row in by_label[study.baseline]}
    lines = []
    for label, own in by_label.items():
        seeds = sorted({row["seed"] for row in own})
        folds = [rmse([row], "best") for row in own]
        twins = [(base[row["seed"], row["fold"]], row) for row in own if (row["seed"], row["fold"]) in base]
        line: Row = {
            "variant": label,
            "folds": folds,
            "spread": float(np.std(folds, ddof=1)) if len(folds) > 1 else 0.0,
        }
        for kind in ("best", "last"):
            line[kind] = float(np.mean([rmse([row for row in own if row["seed"] == seed], kind) for seed in seeds]))
            gains = [rmse([twin], kind) - rmse([row], kind) for twin, row in twins]
            known = len(gains) > 1 and label != study.baseline
            line[f"gain_{kind}"] = float(np.mean(gains)) if gains else 0.0
            line[f"error_{kind}"] = float(np.std(gains, ddof=1) / len(gains) ** 0.5) if known else None
        lines.append(line)
    return sorted(lines, key=lambda line: float(line["best"]))


def table(study: Study, rows: list[Row]) -> str:
    """Return the Markdown page."""
    lines = [
        f"# {study.title}",
        "",
        f"`{study.command}`: {NUM_ROWS} rows of CLEAR, MiniLM, {FOLDS} folds x {len(SEEDS)} seeds, 2 epochs of",
        "texts of at most 128 tokens, 5 evaluations an epoch. RMSE by the best checkpoint flatters (it is chosen on",
        "the rows it is scored on), by the last does not. Gain: how much lower than the baseline",
        f"`{study.baseline}` on the same seed and fold, with its standard error; under about two errors it is noise.",
        "",
        f"| {study.what} | folds | RMSE best | RMSE last | spread | gain best | gain last |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += table_rows(study, rows)
    return "\n".join(lines) + "\n"


def table_rows(study: Study, rows: list[Row]) -> list[str]:
    """Return the lines of the table, one per variant."""
    lines = []
    for line in summary(study, rows):
        gains = [
            "" if line[f"error_{kind}"] is None else f"{line[f'gain_{kind}']:+.4f} ± {line[f'error_{kind}']:.4f}"
            for kind in ("best", "last")
        ]
        lines.append(
            f"| {line['variant']} | {len(line['folds'])} | {line['best']:.4f} | {line['last']:.4f} | "
            f"{line['spread']:.4f} | {gains[0]} | {gains[1]} |"
        )
    return lines


def picture(study: Study, rows: list[Row], file: Path) -> None:
    """Draw one line per variant: each fold's difference from the baseline on the same seed and fold, and their mean.

    The dots of the first seed stand above the line, those of the second below, so that neither hides the bar.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = summary(study, rows)
    base = {(row["seed"], row["fold"]): rmse([row], "best") for row in rows if row["variant"] == study.baseline}
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(lines) + 1.8), layout="constrained")
    places = {line["variant"]: place for place, line in enumerate(lines)}
    for place in range(0, len(lines), 2):  # bands lead the eye from a name to its dots
        axes.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.04, lw=0)
    axes.axvline(0, color="grey", lw=1)
    for seed, colour, shift in zip(SEEDS, ("tab:blue", "tab:orange"), (-0.22, 0.22), strict=True):
        own = [row for row in rows if row["seed"] == seed and (seed, row["fold"]) in base]
        if own:
            across = [rmse([row], "best") - base[seed, row["fold"]] for row in own]
            down = [places[row["variant"]] + shift for row in own]
            axes.plot(across, down, "o", ms=4.5, mew=0, alpha=0.7, color=colour, label=f"a fold, seed {seed}")
    bars = [line for line in lines if line["error_best"] is not None]
    if bars:
        axes.errorbar(
            [-line["gain_best"] for line in bars],
            [places[line["variant"]] for line in bars],
            xerr=[2 * line["error_best"] for line in bars],
            fmt="|", color="black", ms=9, capsize=2.5, elinewidth=1, label="mean ± 2 standard errors",
        )  # fmt: skip
    axes.set_yticks(range(len(lines)), [f"{line['variant']}  {line['best']:.3f}" for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel(f"RMSE minus that of {study.baseline} on the same seed and fold (left is better)")
    axes.set_title(f"{study.title}: RMSE of the best checkpoints, beside each name", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)  # outside: it can hide no dot
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main(study: Study, about: str) -> None:
    """Run a study from the command line, or only its report."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="folds trained at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="only write table and picture")
    options = parser.parse_args()
    if not options.report:
        run(study, options.jobs)
    rows = read_rows(study.rows, *KEYS)
    if not any(row["variant"] == study.baseline for row in rows):
        sys.exit(f"no rows of '{study.baseline}' in {study.rows}; run `{study.command}` first")
    (RESULTS / f"{study.name}.md").write_text(table(study, rows), encoding="utf-8")
    picture(study, rows, RESULTS / f"{study.name}.png")
    print(f"wrote {RESULTS / study.name}.md and .png")
