"""The command line: one short function per subcommand. Heavy modules are imported inside them."""

from __future__ import annotations

import errno
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from comp.cli_pretrain import pretrain_app
from comp.cli_search import search_app
from comp.cli_ship import ship_app
from comp.cli_stop import goes_on
from comp.cli_track import track_app

if TYPE_CHECKING:
    from comp.config import Config

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
app.add_typer(pretrain_app)
app.add_typer(ship_app)  # without a name: its commands stand beside these
app.add_typer(search_app)
app.add_typer(track_app)

ConfigOption = Annotated[str, typer.Option("--config", help="Config file; a bare name is also looked up in configs/.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="key=value over the config, e.g. training.epochs=2; repeatable.")
]
DEBUG = ["training.max_rows=64", "training.epochs=1", "tracking.wandb=off", "tracking.also=[]"]


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
    jobs: Annotated[int | None, typer.Option(help="Folds and seeds side by side, in so many processes.")] = None,
    on: Annotated[str | None, typer.Option(help="ray: on a Ray cluster (RAY_ADDRESS, or this machine).")] = None,
    resources: Annotated[
        str | None, typer.Option(help="Of a fold on Ray, like cpu=4,gpu=1; default: cpu=1, a GPU if there are any.")
    ] = None,
    check_determinism: Annotated[
        bool, typer.Option("--check-determinism", help="Train 20 steps twice instead, and say whether the bits agree.")
    ] = False,
) -> None:
    """Train the folds that are not finished yet, and score them."""
    from comp import config_file
    from comp.runs import check_name
    from comp.training import crossval
    from comp.training.dispatch import JobsFailed, how_of, joined
    from comp.training.seeds import parse_seeds, run_seeds

    file = config_file.find(config)
    loaded = config_file.load(file, [*(overrides or []), *(DEBUG if debug else [])])
    name = file.stem if run is None else run
    if debug:
        if getattr(loaded.schedule, "warmup_steps", None):  # meant for a whole run, longer than this one
            loaded = config_file.load(file, [*(overrides or []), *DEBUG, "schedule.warmup_steps=1"])
        name, restart, save_every = f"{name}-debug", True, "never"
        fold = fold if fold == "full" else str(crossval.parse_folds(fold, loaded.folds.num_folds)[0])
    check_name(name, "--run", "runs")
    how = how_of(jobs, on, resources)
    if check_determinism:
        from comp.training.determinism import check_determinism as check

        if not check(loaded, fold):
            raise typer.Exit(1)
        return
    try:
        with goes_on(f"runs/{name}"), joined(how) as own:
            if own is None:  # of several processes on one fold, one that is led
                return
            if seeds is None:
                crossval.run(loaded, name, fold, restart=restart, save_every=save_every, how=own)
            else:
                run_seeds(loaded, name, fold, parse_seeds(seeds), restart=restart, save_every=save_every, how=own)
    except JobsFailed as failed:
        print(f"comp: {failed}", file=sys.stderr)
        raise typer.Exit(1) from None
    _track_scores([name] if seeds is None else [f"{name}-seed{seed}" for seed in parse_seeds(seeds)], loaded)


def _track_scores(names: Sequence[str], config: Config) -> None:
    from comp.ship.tracked import track_all

    track_all([Path("runs") / name for name in names], config.tracking)


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
    _track_scores([name], loaded)


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
    """List the runs that have out-of-fold rows, then the submissions: their scores beside the leaderboard's."""
    from comp.blend.members import list_runs
    from comp.ship.leaderboard import compare

    print("\n".join(list_runs()))
    if submissions := compare():
        print("\n" + "\n".join(submissions))


@app.command()
def blend(
    run: Annotated[list[str], typer.Option(help="Run folder; repeatable.")],
    method: Annotated[str, typer.Option(help="See `comp list blenders`.")] = "mean",
    option: Annotated[list[str] | None, typer.Option(help="Of the method, key=value; repeatable.")] = None,
    calibration: Annotated[str, typer.Option(help="See `comp list calibrators`.")] = "none",
    rows: Annotated[str | None, typer.Option(help="Query over the training table, like \"source == 'web'\".")] = None,
    weights: Annotated[
        str, typer.Option(help="best (by validation), last, or averaged; or one for each run: best,averaged.")
    ] = "best",
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
    from comp.runs import check_name
    from comp.ship.teachers import make_labels

    if name is not None:
        check_name(name, "--name", "pseudo")
    make_labels(run, data, name=name, weights=weights, overwrite=overwrite)


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
    leaks = lint(Evidence(table, test, folding.fold, loaded.folds.group))
    for leak in leaks:
        print(f"warning: {leak}")
    found = "" if leaks else "no leak found (`comp lint` says what was looked for); "
    print(f"{found}next: comp train --config {config} --debug")


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
    from comp.data.lineage import read_lineage
    from comp.data.tables import read_competition

    loaded = config_file.load(config, overrides or [])
    table, test = read_competition(loaded.competition, loaded.tasks)
    path = Path("folds") / f"{loaded.fold_name}.csv"
    folding = get_or_make_folds(path, table, loaded.tasks, loaded.folds) if path.exists() else None
    tested = 0 if test is None else len(test)
    print(f"{len(table):,} training rows, {tested:,} test rows, folds: {path if folding else 'none yet (comp folds)'}")
    fold = None if folding is None else folding.fold
    runs = tuple(read_member(path).out_of_fold() for path in run or [])
    lineage = read_lineage(loaded.model.backbone)
    evidence = Evidence(table, test, fold, loaded.folds.group, runs, lineage)
    print(leak_table(lint(evidence), evidence))


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

    with goes_on("runs/demo"):
        run_demo()


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


def _terminated(number: int, frame: object) -> None:
    """End the process in order: locks are let go, temporary files removed. The training of a fold has its own way."""
    print(
        "comp: stopped by SIGTERM; what is written is whole, and the same command goes on from there", file=sys.stderr
    )
    sys.exit(128 + number)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2, without traceback."""
    signal.signal(signal.SIGTERM, _terminated)
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
