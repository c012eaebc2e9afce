"""The command line: one short function per subcommand. Heavy modules are imported inside them."""

from __future__ import annotations

import errno
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="comp",
    help="The workbench of one text competition: folds, fine-tuning, honest scores, submission.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Look at config files.", no_args_is_help=True)
app.add_typer(config_app, name="config")

ConfigOption = Annotated[str, typer.Option("--config", help="Config file; a bare name is also looked up in configs/.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over the config, e.g. training.epochs=2; repeatable.")
]
DEBUG = ["training.max_rows=64", "training.epochs=1", "tracking.wandb=off"]


@app.command()
def train(
    config: ConfigOption,
    fold: Annotated[str, typer.Option(help="all, full (every row, no validation), or numbers like 0,2.")] = "all",
    overrides: SetOption = None,
    run: Annotated[str | None, typer.Option(help="Name of the run; default: the config file's.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="64 rows, one fold, one epoch, tracking off.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Train the folds anew, finished ones too.")] = False,
    save_every: Annotated[
        str, typer.Option(help="auto (at evaluations), evaluation, never, '10 minutes', '200 steps': to go on from.")
    ] = "auto",
    seeds: Annotated[str | None, typer.Option(help="Numbers like 0,1,2: one run each, then mean and spread.")] = None,
    check_determinism: Annotated[
        bool, typer.Option("--check-determinism", help="Train 20 steps twice instead, and say whether the bits agree.")
    ] = False,
) -> None:
    """Train the folds that are not finished yet, and score them."""
    from comp import config_file
    from comp.runs import check_name
    from comp.training import crossval
    from comp.training.seeds import parse_seeds, run_seeds
    from comp.training.trainer import Stopped

    file = config_file.find(config)
    loaded = config_file.load(file, [*(overrides or []), *(DEBUG if debug else [])])
    name = file.stem if run is None else run
    if debug:
        if getattr(loaded.schedule, "warmup_steps", None):  # meant for a whole run, longer than this one
            loaded = config_file.load(file, [*(overrides or []), *DEBUG, "schedule.warmup_steps=1"])
        name, restart, save_every = f"{name}-debug", True, "never"
        fold = fold if fold == "full" else str(crossval.parse_folds(fold, loaded.folds.num_folds)[0])
    check_name(name, "--run", "runs")
    if check_determinism:
        from comp.training.determinism import check_determinism as check

        if not check(loaded, fold):
            raise typer.Exit(1)
        return
    try:
        if seeds is None:
            crossval.run(loaded, name, fold, restart=restart, save_every=save_every)
        else:
            run_seeds(loaded, name, fold, parse_seeds(seeds), restart=restart, save_every=save_every)
    except Stopped as stopped:
        print(f"comp: {stopped}; the same command goes on from what is saved")
        raise typer.Exit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        print(f"comp: stopped; the same command goes on from what runs/{name} has saved")
        raise typer.Exit(130) from None


@app.command()
def classical(
    config: ConfigOption,
    features: Annotated[list[str], typer.Option(help="See `comp list features`; run:NAME of a run; repeatable.")],
    estimator: Annotated[str, typer.Option(help="See `comp list estimators`.")] = "ridge",
    option: Annotated[list[str] | None, typer.Option(help="Of the estimator, key=value instead of a search.")] = None,
    fold: Annotated[str, typer.Option(help="all, full (every row, no validation), or numbers like 0,2.")] = "all",
    overrides: SetOption = None,
    run: Annotated[str | None, typer.Option(help="Name of the run; default: features and estimator.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Fit the folds anew, finished ones too.")] = False,
) -> None:
    """Fit scikit-learn to features over the same folds: a run that infers and blends like any other."""
    from comp import config_file
    from comp.blend.classical import run_classical
    from comp.runs import check_name

    loaded = config_file.load(config, overrides or [])
    name = "-".join([*(text.replace(":", "-") for text in features), estimator]) if run is None else run
    check_name(name, "--run", "runs")
    options = config_file.parse_pairs(option or [], "--option")
    run_classical(loaded, name, features=features, estimator=estimator, options=options, folds=fold, restart=restart)


@app.command()
def features(
    config: ConfigOption,
    features: Annotated[list[str], typer.Option(help="See `comp list features`; run:NAME of a run; repeatable.")],
    fold: Annotated[str, typer.Option(help="all, full (every row, no validation), or numbers like 0,2.")] = "all",
    out: Annotated[Path | None, typer.Option(help="Parquet file of each fold's held-out rows, by id.")] = None,
    overrides: SetOption = None,
) -> None:
    """Compute features for every fold and keep them; say their shapes and where they are."""
    from comp import config_file
    from comp.blend.features import write_features

    write_features(config_file.load(config, overrides or []), features, folds=fold, out=out)


@app.command()
def oof() -> None:
    """List the runs that have out-of-fold rows: scores, folds, seed, age, fold file."""
    from comp.blend.members import list_runs

    print("\n".join(list_runs()))


@app.command()
def blend(
    run: Annotated[list[str], typer.Option(help="Run folder; repeatable.")],
    method: Annotated[str, typer.Option(help="See `comp list blenders`.")] = "mean",
    option: Annotated[list[str] | None, typer.Option(help="Of the method, key=value; repeatable.")] = None,
    calibration: Annotated[str, typer.Option(help="See `comp list calibrators`.")] = "none",
    rows: Annotated[str | None, typer.Option(help="Query over the training table, like \"source == 'web'\".")] = None,
    weights: Annotated[str, typer.Option(help="best (by validation), last, or averaged.")] = "best",
    name: Annotated[str, typer.Option(help="Name of the blend, a folder inside blends/.")] = "blend",
) -> None:
    """Fit a blend to the runs' out-of-fold rows; score it honestly; write blends/<name>/blend.json."""
    from comp import config_file
    from comp.blend.crossfit import Recipe, examine, write_blend
    from comp.blend.members import gather, leaks_of
    from comp.runs import check_name

    check_name(name, "--name", "blends")
    recipe = Recipe(method, config_file.parse_pairs(option or [], "--option"), calibration)
    members = gather(run, weights=weights, rows=rows, any_folds=not recipe.fitted)
    if members.dropped:
        print(f"{members.dropped:,} rows are left out: not every run has them, or --rows does not want them")
    for line in leaks_of(members.members):
        print(f"warning: {line}")
    parameters, report = examine(members, recipe)
    print(report.table())
    path = write_blend(Path("blends") / name, members, recipe, parameters, report)
    print(f"wrote {path}; next: comp infer --blend {path.parent}")


@app.command()
def pseudo(
    run: Annotated[list[str], typer.Option(help="Run folder, a teacher; repeatable.")],
    data: Annotated[str, typer.Option(help="Table without targets: the columns of the test table.")],
    name: Annotated[str | None, typer.Option(help="Name of the set, inside pseudo/; default: the run's.")] = None,
    weights: Annotated[str, typer.Option(help="last, averaged, or best (chosen on held-out rows).")] = "last",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a set of this name.")] = False,
) -> None:
    """Label a table by finished runs, for each fold by its own models alone: pseudo/<name>."""
    from comp.ship.teachers import make_labels

    if name is not None and (Path(name).name != name or name.startswith(".")):
        raise ValueError(f"--name '{name}': a set is named like a folder inside pseudo/, without slashes")
    make_labels(run, data, name=name, weights=weights, overwrite=overwrite)


@app.command()
def infer(
    run: Annotated[list[str] | None, typer.Option(help="Run folder; repeatable; default: the newest finished.")] = None,
    blend: Annotated[str | None, typer.Option(help="Blend to apply, in place of --run: blends/<name>.")] = None,
    test: Annotated[str | None, typer.Option(help="Table to predict; default: the config's competition.test.")] = None,
    out: Annotated[str | None, typer.Option(help="CSV to write; default: submissions/<run or blend>.csv.")] = None,
    fold: Annotated[str | None, typer.Option(help="all (the default), full, all,full, or like 0,2.")] = None,
    weights: Annotated[str | None, typer.Option(help="best (the default), last, or averaged.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; default: as in training.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes, one a GPU; default: every visible GPU.")] = None,
    devices: Annotated[str | None, typer.Option(help="Like cuda:0,cuda:1 or cpu,cpu: one process each.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Most padded tokens of a batch; default: 8192 on a GPU, 2048 on a CPU.")
    ] = None,
    time_budget: Annotated[str | None, typer.Option(help="Like 8h: leaves out what will not fit.")] = None,
) -> None:
    """Predict the test table with finished runs and write a checked submission.

    Every model of a run weighs the same, a full-data one (--fold all,full) like a fold's. Of several runs each weighs
    the same, whatever its number of models; a blend has weights of its own.
    """
    from comp.runtime import choose_devices
    from comp.ship.infer import infer as write
    from comp.ship.workers import WorkerFault

    folds: list[int | str] | None = None
    if fold is not None:
        parts = [part.strip() for part in fold.split(",")]
        known = all(part in ("all", "full") or part.isdecimal() for part in parts)
        if not known or len(set(parts)) != len(parts) or ("all" in parts and any(part.isdecimal() for part in parts)):
            raise ValueError(f"--fold '{fold}': allowed are all, full, numbers like 0,2, or several like all,full")
        folds = [int(part) if part.isdecimal() else part for part in parts]
    how: dict[str, Any] = {"folds": folds, "precision": precision, "batch_tokens": batch_tokens, "test": test}
    how |= {"time_budget": time_budget, "out": out, "devices": choose_devices(workers, devices)}
    try:
        if blend is None:
            write(run or [], weights=weights or "best", **how)
            return
        if run or weights:
            raise ValueError("--blend says which runs and weights; leave out --run and --weights")
        from comp.blend.crossfit import read_blend

        write(blend=read_blend(blend), **how)
    except WorkerFault as fault:
        print(f"comp: {fault}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command()
def folds(
    config: ConfigOption,
    overrides: SetOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a fold file that does not fit.")] = False,
) -> None:
    """Write folds/<name>.csv (once) and show how balanced it is."""
    from comp import config_file
    from comp.data import folds as splits
    from comp.data.leaks import Evidence, lint
    from comp.data.tables import read_competition

    loaded = config_file.load(config, overrides or [])
    table, test = read_competition(loaded.competition, loaded.tasks)
    path = Path("folds") / f"{loaded.fold_name}.csv"
    if overwrite and path.exists():
        splits.write_folds(path, table, splits.make_folds(table, loaded.tasks, loaded.folds), loaded.folds)
    folding = splits.get_or_make_folds(path, table, loaded.tasks, loaded.folds)
    print(f"{path}: {len(table):,} rows, {folding.num_folds} folds, fingerprint {folding.fingerprint}")
    for line in splits.audit(folding.fold, table, loaded.tasks[0], group=loaded.folds.group):
        print(line)
    for leak in lint(Evidence(table, test, folding.fold, loaded.folds.group)):
        print(f"warning: {leak}")


@app.command("lint")
def lint_(
    config: ConfigOption,
    overrides: SetOption = None,
    run: Annotated[list[str] | None, typer.Option(help="Run whose out-of-fold rows to look at; repeatable.")] = None,
) -> None:
    """Look for leaks in the tables, the folds and runs: counts, examples and what to do."""
    from comp import config_file
    from comp.blend.members import read_member
    from comp.data.folds import get_or_make_folds
    from comp.data.leaks import Evidence, leak_table, lint
    from comp.data.tables import read_competition

    loaded = config_file.load(config, overrides or [])
    table, test = read_competition(loaded.competition, loaded.tasks)
    path = Path("folds") / f"{loaded.fold_name}.csv"
    folding = get_or_make_folds(path, table, loaded.tasks, loaded.folds) if path.exists() else None
    tested = 0 if test is None else len(test)
    print(f"{len(table):,} training rows, {tested:,} test rows, folds: {path if folding else 'none yet (comp folds)'}")
    fold = None if folding is None else folding.fold
    runs = tuple(read_member(path).out_of_fold() for path in run or [])
    print(leak_table(lint(Evidence(table, test, fold, loaded.folds.group, runs))))


@app.command()
def score(
    submission: Annotated[Path, typer.Option(help="Submission CSV.")],
    truth: Annotated[Path, typer.Option(help="CSV of the true targets; a Usage column is scored apart.")],
    metric: Annotated[str, typer.Option(help="Metric, see `comp list metrics`.")],
    id_column: Annotated[str | None, typer.Option("--id", help="Id column; default: the submission's first.")] = None,
) -> None:
    """Score a submission against a file of true targets."""
    from comp.ship.submission import score_submission

    for part, value in score_submission(submission, truth, metric, id_column).items():
        print(f"{metric} {part}: {value:.5f}")


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder with train, test and sample_submission.")] = Path("."),
    out: Annotated[Path | None, typer.Option(help="Config to write; default: configs/<name>.yaml.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the competition; default: the folder's.")] = None,
) -> None:
    """Look at a competition's files and write a first config."""
    from comp.data.first_config import write_first_config

    name = name or folder.resolve().name
    path = out or Path("configs") / f"{name}.yaml"
    for line in write_first_config(folder, path, name):
        print(line)
    print(f"wrote {path}; next: comp folds --config {path}")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder, finished or not.")],
    text: Annotated[bool, typer.Option("--text", help="Print it for a terminal or a notebook; write nothing.")] = False,
    out: Annotated[Path | None, typer.Option(help="Page to write; default: report.html in the run folder.")] = None,
) -> None:
    """Write one page on a run: scores, curves, errors, worst rows, config; its pictures as PNG files, too."""
    from comp.ship.report import report_text, write_report

    if text:
        if out is not None:
            raise ValueError("--text prints the report and writes no page; leave out --out, or --text")
        print(report_text(run), end="")
        return
    path = write_report(run, out)
    print(f"wrote {path}; pictures in {path.with_suffix('')}/")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="Run folders; the others are compared with the first.")],
    weights: Annotated[str, typer.Option(help="best (by validation), last, or averaged.")] = "best",
    metric: Annotated[str | None, typer.Option(help="See `comp list metrics`; default: the runs' own.")] = None,
    resamples: Annotated[int, typer.Option(help="Draws of the rows that the intervals are made of.")] = 1000,
    html: Annotated[Path | None, typer.Option(help="Write it as a page, too.")] = None,
) -> None:
    """Runs side by side: scores, paired differences with intervals, and what differs in their configs."""
    from comp.ship.compare import compare as show

    print(show(runs, weights=weights, metric=metric, resamples=resamples, html=html), end="")
    if html is not None:
        print(f"wrote {html}")


@app.command()
def explain(
    run: Annotated[str, typer.Argument(help="Run folder.")],
    row: Annotated[list[str] | None, typer.Option(help="Id of a row that a fold held out; repeatable.")] = None,
    sample: Annotated[int | None, typer.Option(help="So many rows drawn instead: which words push?")] = None,
    output: Annotated[str | None, typer.Option(help="Column or class; default: the first, or predicted.")] = None,
    weights: Annotated[str, typer.Option(help="best (by validation), last, or averaged.")] = "best",
    steps: Annotated[int, typer.Option(help="Points of the integral.")] = 50,
    html: Annotated[Path | None, typer.Option(help="Write it as a page, too.")] = None,
) -> None:
    """Which words push a prediction up or down, by the fold model that did not see the row."""
    from comp.ship.explain_page import explain as show

    text = show(
        run,
        row or [],
        sample=sample,
        output=output,
        weights=weights,
        steps=steps,
        html=html,
        colour=sys.stdout.isatty(),
    )
    print(text, end="")
    if html is not None:
        print(f"wrote {html}")


@app.command("list")
def list_(
    what: Annotated[str | None, typer.Argument(help="poolers, losses, metrics, optimizers, schedules, ...")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown tables; without a name, all.")] = False,
) -> None:
    """List a catalogue: name, what it is, where it comes from."""
    from comp.catalog import CATALOGUES, catalogue, markdown

    if as_markdown:
        print(markdown([what] if what else CATALOGUES), end="")
        return
    if what is None:
        for name in CATALOGUES:
            print(f"comp list {name}")
        return
    rows = catalogue(what)
    width = max(map(len, rows))
    for name, row in rows.items():
        print(f"{name:<{width}}  {row.about}" + (f"  [{row.source}]" if row.source else ""))


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, devices and their kernels, memory, disk, tracking, network."""
    from comp.doctor import examine, has_problem, render

    findings = examine()
    print(render(findings))
    if has_problem(findings):
        raise typer.Exit(1)


@app.command()
def demo() -> None:
    """Train, infer and score a small competition made from film reviews; about four minutes on two cores."""
    from comp.ship.demo import run_demo
    from comp.training.trainer import Stopped

    try:
        run_demo()
    except Stopped as stopped:
        print(f"comp: {stopped}; the same command goes on from what is saved")
        raise typer.Exit(128 + stopped.signal) from None


@config_app.command("show")
def config_show(config: Annotated[str, typer.Argument(help="Config file.")], overrides: SetOption = None) -> None:
    """Print the resolved config: every key, after extends and --set."""
    from comp import config_file

    print(config_file.dump(config_file.load(config, overrides or [])), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema, for completion and checks in editors."""
    import json

    from comp import config_file

    print(json.dumps(config_file.schema(), indent=2))


@config_app.command("check")
def config_check(
    configs: Annotated[list[str], typer.Argument(help="Config files.")], overrides: SetOption = None
) -> None:
    """Check config files; print every fault of every file at once."""
    from comp import config_file

    faults = []
    for config in configs:
        try:
            config_file.load(config, overrides or [])
            print(f"{config_file.find(config)}: ok")
        except ValueError as fault:
            faults.append(str(fault))
    if faults:
        raise ValueError("\n".join(faults))


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2, without traceback."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        app()
    except (ValueError, ArithmeticError) as fault:
        from comp.runtime import is_ours

        if not is_ours(fault):
            raise
        print(f"comp: {fault}", file=sys.stderr)
        sys.exit(2 if isinstance(fault, ValueError) else 1)
    except (RuntimeError, MemoryError) as fault:  # where no smaller batch helps: the model itself, the optimizer
        from comp.training.memory import ADVICE, is_memory

        if not is_memory(fault):
            raise
        reason = str(fault).strip().split("\n")[0] or "no more is given"
        print(f"comp: memory ran out ({reason}); what is saved is whole. Try {ADVICE}", file=sys.stderr)
        sys.exit(1)
    except OSError as fault:
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" ({fault.filename})" if fault.filename else ""
            print(
                f"comp: the disk is full{where}; what was written before is whole: free some space, and the same "
                "command goes on from what is saved",
                file=sys.stderr,
            )
            sys.exit(1)
        if fault.filename is None:
            raise
        print(
            f"comp: {fault.filename2 or fault.filename}: {fault.strerror}; look at the path, its rights and the disk",
            file=sys.stderr,
        )
        sys.exit(2)
