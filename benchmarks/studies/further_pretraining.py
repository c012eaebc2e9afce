"""Does further pre-training on the competition's own texts help? MiniLM on CLEAR, with and without.

    python benchmarks/studies/further_pretraining.py            # about 40 minutes of two cores; goes on where it was
    python benchmarks/studies/further_pretraining.py --report   # the table from the rows there are
    python benchmarks/studies/further_pretraining.py --rows 40 --texts 60 --out /tmp/try   # a trial of minutes

For each seed one backbone is pre-trained (masked words, packed) on the texts of all 4,724 excerpts, train and test, and
both it and the plain one are fine-tuned on 3 folds of 600 training rows, spread evenly over the target. The
pre-training of a seed, and each fold, is a row of benchmarks/results/further_pretraining.jsonl as it finishes; the
table is further_pretraining.md. The plain checkpoint has no masked-language-model head, so the head starts from nothing
and learns at a rate of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from functools import partial
from pathlib import Path

from clear600 import KEYS, Study, describe, row_of, table_rows
from rows import DATA, RESULTS, ROOT, WORK, Row, read_rows, spread_rows, train_all

PLAIN, FURTHER, PRETRAINING = "as published", "pre-trained further", "pre-training"
SEEDS, FOLDS = (1, 2), 3
PLACE = WORK / "further"
COMMAND = "python benchmarks/studies/further_pretraining.py"
CONFIG = ROOT / "configs" / "clear-minilm.yaml"
STUDY = Study("further_pretraining", "Further pre-training on CLEAR", "backbone", PLAIN, {PLAIN: [], FURTHER: []})


def settings(rows: int, epochs: int) -> list[str]:
    """Return the overrides of configs/clear-minilm.yaml that all trainings share."""
    return [
        f"competition.name=further{rows}",
        f"competition.train={PLACE / f'train{rows}.csv'}",
        "competition.sample_submission=null",
        f"folds.num_folds={FOLDS}",
        "folds.seed=1",
        f"training.epochs={epochs}",
        "evaluation.every=50%",
        "evaluation.start_percent=0",
        "tracking.wandb=off",
    ]


def name_of(seed: int, epochs: int, texts: int | None) -> str:
    return f"texts{texts or 'all'}-{epochs}-{seed}"


def pretrain_one(seed: int, *, epochs: int, texts: int | None) -> Row:
    """Pre-train a backbone in a worker process; return its row."""
    from comp import config_file
    from comp.runs import read_json
    from comp.training.pretrain import pretrain

    os.chdir(PLACE)
    corpus = {"tables": ["train", "test"], "epochs": epochs, "max_rows": texts}
    overrides = [
        f"competition.train={DATA}",
        f"competition.test={DATA.with_name('test.csv')}",
        "competition.sample_submission=null",
        "tracking.wandb=off",
        f"training.seed={seed}",
        f"pretrain={{lr: 1.0e-4, head_lr: 1.0e-3, every: 50%, held_out_percent: 2, corpora: [{_flow(corpus)}]}}",
    ]
    name = name_of(seed, epochs, texts)
    pretrain(config_file.load(CONFIG, overrides), name, say=lambda line: None)
    (done,) = read_json(Path("runs") / name / "done.json")["stages"]
    kept = {key: done[key] for key in ("before", "best", "steps", "tokens", "seconds")}
    told = [override for override in overrides if not override.startswith("competition.")]  # paths of this machine
    return {"variant": PRETRAINING, "seed": seed, "fold": -1, "overrides": told, **kept}


def _flow(mapping: dict[str, object]) -> str:
    """Return a mapping as YAML in one line."""
    parts = [f"{key}: {'null' if value is None else value}" for key, value in mapping.items()]
    return "{" + ", ".join(parts).replace("'", "") + "}"


def train_one(label: str, seed: int, fold: int, *, shared: list[str], backbone: str | None) -> Row:
    """Fine-tune one fold in a worker process; return its row."""
    from comp import config_file
    from comp.runs import RunFolder
    from comp.training import crossval

    os.chdir(PLACE)
    own = [] if backbone is None else [f"model.backbone={backbone}"]
    folder = RunFolder(Path("runs") / f"{label.replace(' ', '-')}-{seed}-{fold}")
    shutil.rmtree(folder.path, ignore_errors=True)
    config = config_file.load(CONFIG, [*shared, f"training.seed={seed}", *own])
    crossval.run(config, folder.name, str(fold), save_every="never", say=lambda line: None)
    row = row_of(folder, label, own, seed, fold)
    shutil.rmtree(folder.path)
    return row


def call(job: str, *arguments: object, **options: object) -> Row:
    """Do one job by its name: what is handed to another process must be found there."""
    make = {"pretrain": pretrain_one, "train": train_one}[job]
    row: Row = make(*arguments, **options)  # type: ignore[operator]
    return row


def told(row: Row) -> str:
    """Return the line that is printed when a row is there."""
    if row["variant"] != PRETRAINING:
        return describe(row)
    fell = f"perplexity {row['before']:.1f} -> {row['best']:.2f}"
    return f"{row['variant']} seed {row['seed']}: {fell}, {row['seconds']:.0f} s"


def run(file: Path, options: argparse.Namespace) -> None:
    """Pre-train what is missing, then fine-tune what is missing, all of the first seed before the second."""
    from comp import config_file
    from comp.data.folds import get_or_make_folds
    from comp.data.tables import read_competition

    PLACE.mkdir(parents=True, exist_ok=True)
    spread_rows(options.rows).to_csv(PLACE / f"train{options.rows}.csv", index=False)
    shared = [*settings(options.rows, options.epochs), f"competition.test={DATA.with_name('test.csv')}"]
    os.chdir(PLACE)
    config = config_file.load(CONFIG, shared)
    table, _ = read_competition(config.competition, config.tasks)
    get_or_make_folds(Path("folds") / f"{config.fold_name}.csv", table, config.tasks, config.folds)
    known = {tuple(row[key] for key in KEYS) for row in read_rows(file, *KEYS)}
    further = {seed: Path("runs") / name_of(seed, options.pretrain_epochs, options.texts) for seed in SEEDS}
    there = {seed: (folder / "backbone" / "config.json").is_file() for seed, folder in further.items()}
    todo = [("pretrain", seed) for seed in SEEDS if (PRETRAINING, seed, -1) not in known or not there[seed]]
    how = partial(call, epochs=options.pretrain_epochs, texts=options.texts)
    train_all(how, todo, file, jobs=options.jobs, describe=told)
    for seed in SEEDS:
        for label, backbone in ((PLAIN, None), (FURTHER, str(further[seed] / "backbone"))):
            jobs = [("train", label, seed, fold) for fold in range(FOLDS) if (label, seed, fold) not in known]
            how = partial(call, shared=shared, backbone=backbone)
            train_all(how, jobs, file, jobs=options.jobs, describe=told)


def table(rows: list[Row]) -> str:
    """Return the Markdown page."""
    tuned = [row for row in rows if row["variant"] != PRETRAINING]
    made = [row for row in rows if row["variant"] == PRETRAINING]
    used = ", ".join(str(count) for count in sorted({row["rows"] for row in tuned}))
    lines = [
        f"# {STUDY.title}",
        "",
        f"`{COMMAND}`: MiniLM, {FOLDS} folds x {len(SEEDS)} seeds, {used} held-out rows a fold.",
        "The further backbone has read the texts of train and test, the held-out ones too, without targets, as a",
        "competitor may. RMSE by the best checkpoint flatters, by the last does not. Gain: how much lower than",
        f"`{PLAIN}` on the same seed and fold, with its standard error; under about two errors it is noise.",
        "",
        "| backbone | folds | RMSE best | RMSE last | spread | gain best | gain last |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += table_rows(STUDY, tuned)
    lines += ["", "Pre-training, perplexity of held-out texts (the head is new, so it starts from chance):", ""]
    for row in sorted(made, key=lambda row: int(row["seed"])):
        lines.append(
            f"- seed {row['seed']}: {row['before']:,.0f} before, {row['best']:.2f} after {row['steps']} steps, "
            f"{row['tokens']:,} tokens"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--rows", type=int, default=600, help="rows of CLEAR to fine-tune on, all folds together")
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning")
    parser.add_argument("--pretrain-epochs", type=int, default=1, help="passes over the texts")
    parser.add_argument("--texts", type=int, default=None, help="most texts to pre-train on; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows and the table")
    parser.add_argument("--report", action="store_true", help="only write the table")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{STUDY.name}.jsonl"
    if not options.report:
        run(file, options)
    rows = read_rows(file, *KEYS)
    if not any(row["variant"] == PLAIN for row in rows):
        sys.exit(f"no rows of '{PLAIN}' in {file}; run `{COMMAND}` first")
    (out / f"{STUDY.name}.md").write_text(table(rows), encoding="utf-8")
    print(f"wrote {out / STUDY.name}.md")


if __name__ == "__main__":
    main()
