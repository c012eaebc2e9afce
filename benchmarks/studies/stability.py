"""Which few-sample techniques pay? 250 training rows of CLEAR, 200 to choose by, 1,000 others to score, 8 seeds.

    python benchmarks/studies/stability.py            # about two hours of two cores; rows that are there are skipped
    python benchmarks/studies/stability.py --costs    # time against plain; ten minutes of a quiet machine
    python benchmarks/studies/stability.py --report   # table and picture from the rows there are

Rows, table and picture: benchmarks/results/stability.jsonl, stability_cost.jsonl, .md, .png. MiniLM, texts of at most
128 tokens, the same 48 steps for everyone. `plain` is AdamW evaluated at the ends of epochs; every other variant is
plain with one thing changed, the recipes with several. Where a technique has a strength or an optimizer a rate, its
candidates are tried with a seed of their own on the 200 rows, and the best goes on: the 1,000 rows choose nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rows import RESULTS, ROOT, WORK, Row, note, read_rows, spread_rows, train_all

TRAINING, SELECTION, SCORING = 250, 200, 1000
SEEDS, TRIAL_SEED = range(1, 9), 100
ROWS, BASELINE = RESULTS / "stability.jsonl", "plain"
FAR = 1.15  # means beyond this times plain's are written, not drawn
KEYS = ("variant", "seed", "overrides")
COSTS, COST_KEYS = RESULTS / "stability_cost.jsonl", ("variant", "overrides", "round")
COMMAND = "python benchmarks/studies/stability.py"
SETTINGS = [
    "competition.name=few",
    "competition.test=null",
    "competition.sample_submission=null",
    "folds={splitter: column, column: fold, num_folds: 2}",
    "model.max_length=128",
    "groups={layout: unified}",
    "training.epochs=3",
    "evaluation.every=100%",
    "evaluation.start_percent=0",
    "tracking.wandb=off",
]


@dataclass(frozen=True)
class Variant:
    """One thing to change, with the candidates for its strength, one list of overrides each."""

    candidates: Sequence[Sequence[str]]
    weights: str = "best"
    """What is scored: best, or averaged."""
    what: str = ""
    """A word on it for the table; empty when its label says all."""


def one(*overrides: str, **own: Any) -> Variant:
    return Variant([overrides], **own)


def any_of(template: str, *values: float, **own: Any) -> Variant:
    """One candidate per value, put in the place of `{}`; several overrides are separated by `; `."""
    return Variant(
        [template.replace("{}", f"{value:f}".rstrip("0").rstrip(".")).split("; ") for value in values], **own
    )


OFTEN = "evaluation.every=4 steps"
PAIR = ("stability.reinit_layers=2", "stability.averaging.name=swa")
LLRD = "groups={layout: llrd, decay: 0.9}"
VARIANTS: dict[str, Variant] = {
    BASELINE: any_of("optimizer.lr={}", 1e-4, 2e-4, 4e-4, what="AdamW, evaluated at the ends of epochs"),
    "frequent evaluation": one(OFTEN, what="every 4 steps instead of every 16"),
    "bertadam": one("optimizer.name=bertadam", what="AdamW without bias correction"),
    "reinit 1": one("stability.reinit_layers=1"),
    "reinit 2": one("stability.reinit_layers=2"),
    "reinit 3": one("stability.reinit_layers=3"),
    "llrd": any_of("groups={layout: llrd, decay: {}}", 0.7, 0.8, 0.9),
    "mixout": any_of("stability.mixout={}", 0.1, 0.5, 0.8),
    "prior_decay": any_of("stability.prior_decay={}", 10, 100, 300),
    "swa": one("stability.averaging.name=swa", weights="averaged"),
    "ema": one("stability.averaging.name=ema", weights="averaged"),
    "madgrad": any_of("optimizer={name: madgrad, lr: {}, head_lr: {}, weight_decay: 0}", 3e-5, 1e-4, 3e-4, 1e-3),
    "radam_lookahead": any_of(
        "optimizer.name=radam_lookahead; optimizer.lr={}", 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3
    ),
    "fgm": any_of("stability.adversarial={name: fgm, eps: {}}", 0.1, 0.5),
    "awp": any_of("stability.adversarial={name: awp, start_epoch: 1, lr: {}, eps: 0.01}", 1e-4, 1e-3, 1e-2),
    "rdrop": any_of("model.dropout=0.1; stability.rdrop={}", 0.1, 1, 3, 10, what="with dropout 0.1"),
    "multi_sample_dropout": any_of("model.multi_sample_dropout=5; model.head_dropout={}", 0.1, 0.3, 0.5),
    "supcon": any_of("stability.supcon.weight={}", 0.03, 0.1, 0.3),
    "freeze_embeddings": one("model.freeze_embeddings=true"),
    # The two techniques whose mean on the rows to choose by is lowest, as far as they go together; then with more.
    "reinit 2 + swa": one(*PAIR, weights="averaged", what="the best pair"),
    "recipe": one(*PAIR, LLRD, weights="averaged", what="the best pair and llrd"),
    "recipe, frozen": one(
        *PAIR, LLRD, "model.freeze_embeddings=true", weights="averaged", what="that, with frozen embeddings"
    ),
}


# --- training --------------------------------------------------------------------------------------------------------


def prepare() -> None:
    """Write the rows and their two folds: 1 = trained on, 0 = chosen by; and the ones to score, apart."""
    from comp.data.folds import get_or_make_folds
    from comp.data.tables import read_competition

    WORK.mkdir(parents=True, exist_ok=True)
    frame = spread_rows(TRAINING + SELECTION + SCORING)
    frame.iloc[TRAINING + SELECTION :].to_csv(WORK / "score.csv", index=False)
    os.chdir(WORK)
    for name, training, selection in (("few", TRAINING, SELECTION), ("half", TRAINING // 2, SELECTION // 2)):
        few = frame.iloc[[*range(training), *range(TRAINING, TRAINING + selection)]].copy()
        few["fold"] = [1] * training + [0] * selection
        few.to_csv(f"{name}.csv", index=False)
        config = load_config(name)
        table, _ = read_competition(config.competition, config.tasks)
        get_or_make_folds(Path(f"folds/{name}.csv"), table, config.tasks, config.folds)


def load_config(rows: str, overrides: Sequence[str] = ()) -> Any:
    """Return the config of one training on rows "few", or "half" of them for timing."""
    from comp import config_file

    own = [f"competition.train={WORK / f'{rows}.csv'}", f"folds.name={rows}"]
    return config_file.load(ROOT / "configs" / "clear-minilm.yaml", [*SETTINGS, *own, *overrides])


def train(label: str, overrides: Sequence[str], weights: str, seed: int) -> Row | str:
    """Train once in a worker process and score; return the row, or the reason why the variant was refused.

    A trial is scored on the 200 rows alone.
    """
    import numpy as np
    import pandas as pd

    from comp import load
    from comp.runs import RunFolder, commit, read_json, versions
    from comp.training import crossval

    os.chdir(WORK)
    name = f"few-{os.getpid()}"
    folder = RunFolder(Path("runs") / name)
    shutil.rmtree(folder.path, ignore_errors=True)
    try:
        config = load_config("few", [f"training.seed={seed}", *overrides])
        crossval.run(config, name, "0", save_every="never", say=lambda line: None)
    except ValueError as refusal:
        return f"{label}: {refusal}"
    done = read_json(folder.fold(0).done)
    row: Row = {
        "variant": label,
        "overrides": list(overrides),
        "seed": seed,
        "weights": weights,
        "selection": done[weights],
        "best_step": done["best_step"],
        "steps": done["steps"],
        "commit": commit(ROOT / "comp"),
        "versions": {key: versions()[key] for key in ("torch", "transformers")},
    }
    if seed != TRIAL_SEED:
        frame = pd.read_csv("score.csv")
        found = load(folder.path, weights=weights).predict(frame)["target"].to_numpy(np.float64)
        row["rmse"] = float(np.sqrt(np.mean((found - frame["target"].to_numpy(np.float64)) ** 2)))
    shutil.rmtree(folder.path)
    return row


def describe(row: Row) -> str:
    """Return the line that is printed when a row is there."""
    score = f"{row['rmse']:.4f}" if "rmse" in row else f"{row['selection']:.4f} on the rows to choose by"
    return f"{row['variant']} {' '.join(row['overrides'])} seed {row['seed']}: {score}"


def run(jobs: int) -> None:
    """Try the candidates of plain, then of the others on top of it, then train all of them with every seed."""
    prepare()
    work = partial(train_all, train, file=ROWS, jobs=jobs, describe=describe)
    for labels in ([BASELINE], [label for label in VARIANTS if label != BASELINE]):
        rows = known()
        work(todo=missing(rows, [(label, tried, TRIAL_SEED) for label in labels for tried in trials(label, rows)]))
    rows = known()
    wanted = [(label, chosen(label, rows), seed) for seed in SEEDS for label in VARIANTS]
    work(todo=missing(rows, wanted))


def known() -> list[Row]:
    return read_rows(ROWS, *KEYS)


def missing(rows: list[Row], wanted: Sequence[tuple[str, Sequence[str], int]]) -> list[tuple[Any, ...]]:
    """Return the jobs that have no row yet."""
    there = {(row["variant"], tuple(row["overrides"]), row["seed"]) for row in rows}
    todo = [job for job in wanted if (job[0], tuple(job[1]), job[2]) not in there]
    print(f"{len(wanted) - len(todo)} rows are there, {len(todo)} to train", flush=True)
    return [(label, overrides, VARIANTS[label].weights, seed) for label, overrides, seed in todo]


def trials(label: str, rows: list[Row]) -> list[list[str]]:
    """Return the overrides to try for a variant: nothing when there is nothing to choose."""
    candidates = VARIANTS[label].candidates
    return [full(label, one, rows) for one in candidates] if len(candidates) > 1 else []


def full(label: str, candidate: Sequence[str], rows: list[Row]) -> list[str]:
    """Return a candidate on top of what was chosen for plain."""
    return [*([] if label == BASELINE else chosen(BASELINE, rows)), *candidate]


def chosen(label: str, rows: list[Row]) -> list[str]:
    """Return the overrides of a variant's best trial."""
    tried = trials(label, rows)
    if not tried:
        return full(label, VARIANTS[label].candidates[0], rows)
    scores = {
        tuple(row["overrides"]): row["selection"]
        for row in rows
        if row["variant"] == label and row["seed"] == TRIAL_SEED
    }
    return min(tried, key=lambda overrides: scores.get(tuple(overrides), float("inf")))


# --- what they cost ---------------------------------------------------------------------------------------------------


def time_all(rounds: int) -> None:
    """Time every chosen variant against plain, one right after the other on half of the rows, in turns which is first.

    Evaluations count, start-up does not.
    """
    prepare()
    rows = known()
    there = {(row["variant"], tuple(row["overrides"]), row["round"]) for row in read_rows(COSTS, *COST_KEYS)}
    plain = chosen(BASELINE, rows)
    for number in range(1, rounds + 1):
        for place, label in enumerate(VARIANTS):
            own = chosen(label, rows)
            if (label, tuple(own), number) in there:
                continue
            order = [(BASELINE, plain), ("it", own)]
            took = {which: timed(overrides) for which, overrides in (order if place % 2 else order[::-1])}
            note(
                COSTS,
                {"variant": label, "overrides": own, "round": number, "ratio": took["it"] / took[BASELINE]},
                lambda row: f"{row['variant']} round {row['round']}: {row['ratio']:.2f} of plain's time",
            )


def timed(overrides: Sequence[str]) -> float:
    """Return the seconds of one training in this process, evaluations included."""
    from comp.runs import RunFolder, read_json
    from comp.training import crossval

    folder = RunFolder(Path("runs/timed"))
    shutil.rmtree(folder.path, ignore_errors=True)
    crossval.run(load_config("half", overrides), "timed", "0", save_every="never", say=lambda line: None)
    return float(read_json(folder.fold(0).done)["seconds"])


def costs_of(rows: list[Row]) -> dict[str, float]:
    """Return variant -> its time over plain's, median of the rounds of its chosen candidate."""
    found: dict[str, list[float]] = {}
    for row in read_rows(COSTS, *COST_KEYS):
        if row["variant"] in VARIANTS and row["overrides"] == chosen(row["variant"], rows):
            found.setdefault(row["variant"], []).append(row["ratio"])
    return {label: statistics.median(ratios) for label, ratios in found.items()}


# --- the report ------------------------------------------------------------------------------------------------------


def summary(rows: list[Row], variants: Mapping[str, Variant] = VARIANTS) -> list[Row]:
    """Return one line per variant, lowest mean first; only the chosen candidates' rows, trials left out.

    `mean`, `std`, `worst`: RMSE on the 1,000 rows, over seeds. `gain`: mean over seeds of plain - variant in percent
    of plain's mean; `error` its standard error. `steadier`: std over plain's.
    """
    import numpy as np

    own = {
        label: {
            row["seed"]: row
            for row in rows
            if row["variant"] == label and "rmse" in row and row["overrides"] == chosen(label, rows)
        }
        for label in variants
    }
    plain = own[BASELINE]
    lines = []
    for label, by_seed in own.items():
        if len(by_seed) < 2:
            continue
        scores = np.array([row["rmse"] for row in by_seed.values()])
        base = np.array([row["rmse"] for row in plain.values()])
        both = [(plain[seed], row) for seed, row in by_seed.items() if seed in plain]
        gains = 100 * np.array([one["rmse"] - other["rmse"] for one, other in both]) / base.mean()
        lines.append(
            {
                "variant": label,
                "scores": scores.tolist(),
                "selection": float(np.mean([row["selection"] for row in by_seed.values()])),
                "mean": float(scores.mean()),
                "std": float(scores.std(ddof=1)),
                "worst": float(scores.max()),
                "gain": float(gains.mean()),
                "error": float(gains.std(ddof=1) / len(gains) ** 0.5),
                "steadier": float(scores.std(ddof=1) / base.std(ddof=1)),
            }
        )
    return sorted(lines, key=lambda line: float(line["mean"]))


def table(rows: list[Row]) -> str:
    """Return the Markdown page."""
    lines = [
        "# Few-sample techniques on 250 rows of CLEAR",
        "",
        f"`{COMMAND}`: {TRAINING} rows to train on, {SELECTION} to choose by (the checkpoint, and",
        f"the strengths below with seed {TRIAL_SEED}), RMSE on {SCORING:,} others; MiniLM, 128 tokens, 3 epochs = 48",
        f"steps for everyone, seeds {min(SEEDS)} to {max(SEEDS)}. Gain: how much lower than `{BASELINE}` on the same",
        "seeds, in percent, with its standard error; under about two errors it is noise. Steadier: standard",
        "deviation over seeds relative to",
        f"`{BASELINE}`'s; with 8 seeds each, two equal ones differ by a factor of up to about 2 by luck. Selection:",
        "RMSE on the rows to choose by, which flatters. Cost: time of training and evaluating relative to",
        f"`{BASELINE}`'s right beside it (`{COMMAND} --costs`; `{BASELINE}` against itself shows the noise).",
        "",
        "| technique | mean | std | worst seed | gain, % | steadier | selection | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    costs = costs_of(rows)
    for line in summary(rows):
        plain = line["variant"] == BASELINE
        cost = f"{costs[line['variant']]:.2f}" if line["variant"] in costs else "-"
        gain = "" if plain else f"{line['gain']:+.1f} ± {line['error']:.1f}"
        lines.append(
            f"| {line['variant']} | {line['mean']:.4f} | {line['std']:.4f} | {line['worst']:.4f} | {gain} | "
            f"{line['steadier']:.2f} | {line['selection']:.4f} | {cost} |"
        )
    lines += ["", "What each changes:", ""]
    for label, variant in VARIANTS.items():
        candidates = variant.candidates
        told = f"{variant.what}: " if variant.what else ""
        own = chosen(label, rows)[len(full(label, [], rows)) :]
        tried = f"; tried: {' | '.join('`' + ' '.join(one) + '`' for one in candidates)}" if len(candidates) > 1 else ""
        lines.append(f"- {label}: {told}`{' '.join(own)}`{tried}")
    return "\n".join(lines) + "\n"


def picture(rows: list[Row], file: Path) -> None:
    """Draw one line per variant: a dot per seed, the mean, and a bar of one standard deviation to each side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = summary(rows)
    base = next(line["mean"] for line in lines if line["variant"] == BASELINE)
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(lines) + 1.6), layout="constrained")
    for place, line in enumerate(lines):
        if line["mean"] > FAR * base:  # it would press all others together
            told = f"{min(line['scores']):.2f} to {line['worst']:.2f} \N{RIGHTWARDS ARROW}"
            axes.text(0.99, place, told, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=9)
            continue
        if place % 2 == 0:  # bands lead the eye from a name to its dots
            axes.axhspan(place - 0.5, place + 0.5, color="black", alpha=0.04, lw=0)
        plain = line["variant"] == BASELINE
        colour = "tab:red" if plain else "tab:blue"
        axes.plot(line["scores"], [place - 0.18] * len(line["scores"]), "o", ms=4, mew=0, alpha=0.6, color=colour)
        axes.errorbar(
            line["mean"], place + 0.18, xerr=line["std"], fmt="|", color="black", ms=8, capsize=2.5, elinewidth=1
        )
        if plain:
            axes.axvline(line["mean"], color="tab:red", lw=1, alpha=0.6)
    axes.set_yticks(range(len(lines)), [f"{line['variant']}  {line['mean']:.3f}" for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel(f"RMSE on {SCORING:,} unseen rows: a dot per seed, below them mean ± standard deviation")
    axes.set_title(f"{TRAINING} training rows, 48 steps: techniques against plain fine-tuning (red)", fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--costs", action="store_true", help="time the variants instead; nothing else may run")
    parser.add_argument("--rounds", type=int, default=1, help="of timing")
    parser.add_argument("--report", action="store_true", help="only write table and picture")
    options = parser.parse_args()
    if options.costs:
        time_all(options.rounds)
    elif not options.report:
        run(options.jobs)
    rows = known()
    if sum(row["variant"] == BASELINE and "rmse" in row for row in rows) < 2:
        sys.exit(f"fewer than two rows of '{BASELINE}' in {ROWS}; run `{COMMAND}` first")
    (RESULTS / "stability.md").write_text(table(rows), encoding="utf-8")
    picture(rows, RESULTS / "stability.png")
    print(f"wrote {RESULTS / 'stability'}.md and .png")


if __name__ == "__main__":
    main()
