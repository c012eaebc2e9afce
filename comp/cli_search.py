"""The subcommands that run others: search, pipeline. One short function each, as in cli.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from comp.cli_stop import goes_on

if TYPE_CHECKING:
    from comp.pipeline_file import Command

__all__ = ["search_app"]

search_app = typer.Typer()


@search_app.command()
def search(
    config: Annotated[str, typer.Option("--config", help="Config file; a bare name is also looked up in configs/.")],
    space: Annotated[str, typer.Option("--space", help="YAML: config key -> a list, or {kind, low, high, ...}.")],
    name: Annotated[str | None, typer.Option(help="Name of the search, in searches/; default: the config's.")] = None,
    trials: Annotated[int | None, typer.Option(help="Finished trials, pruned ones counted in. [default: 20]")] = None,
    hours: Annotated[float | None, typer.Option(help="Instead: no trial begins after this many hours.")] = None,
    jobs: Annotated[int, typer.Option(help="Trials at a time, a process each.")] = 1,
    fold: Annotated[str, typer.Option(help="Folds that a trial trains: numbers like 0,2, or all.")] = "0",
    finalists: Annotated[int, typer.Option(help="Best configs that are trained again; 0 = none.")] = 3,
    seeds: Annotated[str, typer.Option(help="Seeds of the finalists, like 0,1.")] = "0,1",
    pruner: Annotated[str, typer.Option(help="median, halving or none.")] = "median",
    seed: Annotated[int, typer.Option(help="Of the sampler (TPE): one at a time, the same trials again.")] = 0,
    keep: Annotated[int, typer.Option(help="Trials whose weights are kept, the best.")] = 1,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the config, e.g. training.epochs=2; repeatable.")
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget the search of this name that is there.")] = False,
) -> None:
    """Search config keys with pruning, train the best again under several seeds, write a config of the winner."""
    from comp import config_file
    from comp.runs import check_name
    from comp.ship.report_search import write_importance
    from comp.training.search import Order, open_search
    from comp.training.search import search as run
    from comp.training.search_result import chosen, optimism, study_table, write_best, write_trials
    from comp.training.search_workers import run_workers
    from comp.training.seeds import parse_seeds

    if trials is not None and hours is not None:
        raise ValueError("--trials and --hours are both given; the budget is one of them")
    name = config_file.find(config).stem if name is None else name
    check_name(name, "--name", "searches")
    order = Order(
        config=config,
        space=space,
        name=name,
        overrides=overrides or [],
        fold=fold,
        trials=20 if trials is None and hours is None else trials,
        hours=hours,
        jobs=jobs,
        finalists=finalists,
        seeds=parse_seeds(seeds),
        pruner=pruner,
        seed=seed,
        keep=keep,
    )
    opened = open_search(order)
    with goes_on(order.folder):
        tried, again = run(opened, restart=restart, side_by_side=None if jobs == 1 else run_workers)
    print(f"\n{study_table(opened, tried, again)}\n\n{optimism(opened, tried, again)}")
    written = [write_trials(opened, tried)]
    if importances := opened.study().importances():
        print("importance: " + ", ".join(f"{key} {share:.2f}" for key, share in importances.items()))
        try:
            write_importance(order.folder / "importance.png", importances, opened.base.metric)
            written.append(order.folder / "importance.png")
        except ValueError as fault:
            print(f"no importance.png: {fault}")
    else:
        print("importance: too few complete trials with different scores, or one key alone")
    best = chosen(opened, tried, again)
    if best is not None:
        written.append(write_best(opened, best, tried, again))
    print(f"wrote {', '.join(map(str, written))}")


@search_app.command()
def pipeline(
    context: typer.Context,
    file: Annotated[str, typer.Argument(help="YAML: name, and steps of {name, command, config, args}.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would run and why; run nothing.")] = False,
) -> None:
    """Run commands one after the other, skipping those that nothing has changed for.

    Where something has changed, what the step made before is removed and made anew; --dry-run says so first.
    """
    from comp.pipeline import StepFailed, run_pipeline
    from comp.pipeline_file import read_pipeline

    steps, calls = read_pipeline(file, dict(_commands(context.find_root().command)))
    try:
        run_pipeline(steps, calls, dry_run=dry_run)
    except StepFailed as failed:
        print(f"comp: {failed}", file=sys.stderr)
        raise typer.Exit(failed.status) from None


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Command]]:
    """Yield every command of the command line, by its name, with what it takes."""
    from comp.pipeline_file import Command, Option

    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
            if not command.invoke_without_command:
                continue
        options = {
            spelling.lstrip("-"): Option(bool(own.is_flag), bool(own.multiple), bool(own.required))
            for own in command.params
            if own.param_type_name == "option"
            for spelling in own.opts
            if spelling.startswith("--")
        }
        arguments = [own for own in command.params if own.param_type_name == "argument"]
        most = float("inf") if any(own.nargs < 0 for own in arguments) else float(len(arguments))
        yield f"{before}{name}", Command(options, sum(own.required for own in arguments), most)
